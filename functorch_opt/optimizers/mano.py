"""Mano: momentum without its part along the parameter, normalized by columns and rows in turn.

    mu = beta mu + g
    m  = g + beta mu         with nesterov; mu without
    q  = p / max(|p|, eps)                  |x|: norms along dim, which is the first at odd steps t,
    d  = m - (sum of m q) q                 and the second at even ones; so is the sum
    u  = 0.2 sqrt(size of dim) d / max(|d|, eps)

Source: Gu & Xie, "Mano: Restriking Manifold Optimization for LLM Training", 2026, alg. 1, and the
authors' code.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from functorch_opt import tree
from functorch_opt._core.rule import leafwise
from functorch_opt._core.transformation import (
    GradientTransformation,
    ScalarOrSchedule,
    check_range,
    transformation,
)
from functorch_opt.optimizers.matrices import (
    ORDINARY,
    MatrixDims,
    matrices_and_rest,
    matrix_slot,
    on_matrices,
)

__all__ = ["mano", "scale_by_mano"]


def _unit(x, dim, eps):
    """`x` divided by its norms along `dim`, of which the slope at 0 is finite."""
    square = (x * x.conj()).real.sum(dim, keepdim=True)
    return x / square.clamp(min=eps * eps).clamp(min=tree.TINY).sqrt()


@transformation
def scale_by_mano(
    beta: ScalarOrSchedule = 0.95,
    eps: ScalarOrSchedule = 1e-8,
    mu_dtype: torch.dtype | None = None,
    *,
    nesterov: bool = False,
    dims: MatrixDims = ORDINARY,
) -> GradientTransformation:
    """The momentum, tangent to spheres of columns or rows, and as long as they are.

    The rule is at the top of `functorch_opt.optimizers.mano`. It multiplies no matrices, and so
    costs little more than momentum.

    Args:
        beta: weight of the old momentum, in [0, 1).
        eps: the least norm, 0 or greater.
        mu_dtype: dtype of ``mu``; by default that of the params, at least float32.
        nesterov: look one step ahead.
        dims: which dims are a matrix, see `MatrixDims`.

    Raises:
        ValueError: an argument outside its range; a tensor is no matrix; ``update`` called without
            params.

    Source: Gu & Xie, 2026, alg. 1, and the authors' code.

    Example:
        >>> import torch, functorch_opt as fo
        >>> tx, params = fo.scale_by_mano(), [torch.eye(2)]
        >>> tx.update([torch.tensor([[3.0, 2.0], [5.0, 1.0]])], tx.init(params), params)[0]
        [tensor([[0.0000, 0.2828],
                [0.2828, 0.0000]])]
    """
    check_range(0, 1, beta=beta)
    check_range(0, float("inf"), eps=eps)

    def along(m, p, dim, eps):
        q = _unit(p, dim, eps)
        d = m - (m * q.conj()).sum(dim, keepdim=True) * q
        return _unit(d, dim, eps) * (0.2 * m.shape[dim] ** 0.5)

    def rule(g, p, mu, beta, eps, by_columns):
        mu = beta * mu + g
        m = g + beta * mu if nesterov else mu

        def step(m, p):
            by_rows = along(m, p, -1, eps)
            return torch.where(by_columns, along(m, p, -2, eps), by_rows)

        return on_matrices(step, dims, m, p), {"mu": mu}

    return leafwise(
        rule,
        lambda count: {"by_columns": count % 2 == 0},
        slots={"mu": matrix_slot(partial(tree.zeros_like, dtype=mu_dtype), dims)},
        hyper={"beta": beta, "eps": eps},
        kind="tensorwise",
    )


@transformation
def mano(
    learning_rate: ScalarOrSchedule,
    beta: ScalarOrSchedule = 0.95,
    eps: ScalarOrSchedule = 1e-8,
    weight_decay: ScalarOrSchedule = 0.1,
    *,
    nesterov: bool = False,
    adam_learning_rate: ScalarOrSchedule | None = None,
    adam_b1: ScalarOrSchedule = 0.9,
    adam_b2: ScalarOrSchedule = 0.95,
    adam_eps: ScalarOrSchedule = 1e-8,
) -> GradientTransformation:
    """Mano for the tensors with two dims or more, and `adamw` for the rest.

    Learning rates of AdamW fit. To choose by name and type too, take `matrix_labels` and
    `partition`.

    Args:
        learning_rate: 0 or greater, or a schedule; the authors have 1e-3.
        beta, eps, nesterov: see `scale_by_mano`.
        weight_decay: the decay of the matrices, multiplied by the learning rate.
        adam_learning_rate, adam_b1, adam_b2, adam_eps: of `adamw`, without decay. None means
            `learning_rate`.

    Raises:
        ValueError: an argument outside its range; ``update`` called without params.

    Source: Gu & Xie, 2026.

    Example:
        >>> import functorch_opt as fo
        >>> fo.mano(1e-3)
        mano(0.001)
    """
    direction = scale_by_mano(beta, eps, nesterov=nesterov)
    adam: dict[str, Any] = {"b1": adam_b1, "b2": adam_b2, "eps": adam_eps}
    adam["learning_rate"] = adam_learning_rate
    return matrices_and_rest(direction, learning_rate, weight_decay, adam)
