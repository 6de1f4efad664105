"""AdaMuon: the sign of the momentum, made orthogonal, then divided by the root of mean squares.

    mu = beta mu + (1 - beta) g
    m  = beta mu + (1 - beta) g      with nesterov; mu without
    o  = orthogonal(sign(m))                                                              as in Muon
    v  = beta v + (1 - beta) o^2
    r  = o / (sqrt(v) + eps)
    u  = 0.2 sqrt(n m) r / (|r| + eps)                                 for matrices of shape [n, m]

Source: Si, Zhang & Shen, "AdaMuon: Adaptive Muon Optimizer", 2025, alg. 1, and the authors' code.
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
from functorch_opt.optimizers.orthogonal import Coefficients, norm, orthogonalizer

__all__ = ["adamuon", "scale_by_adamuon"]


@transformation
def scale_by_adamuon(
    ns_coeffs: Coefficients = (3.4445, -4.775, 2.0315),
    ns_steps: int = 5,
    beta: ScalarOrSchedule = 0.95,
    eps: ScalarOrSchedule = 1e-8,
    mu_dtype: torch.dtype | None = None,
    *,
    nesterov: bool = True,
    dims: MatrixDims = ORDINARY,
    ns_dtype: torch.dtype | None = None,
) -> GradientTransformation:
    """The orthogonal sign of the momentum, with its own second moment, and an RMS of 0.2.

    The rule is at the top of `functorch_opt.optimizers.adamuon`. Another optimizer of this name, in
    NVIDIA's collection, takes no sign, has a decay of its own for ``v``, and the scale of Muon.

    Args:
        ns_coeffs, ns_steps, mu_dtype, nesterov, dims, ns_dtype: see `scale_by_muon`. The norm of
            the sign gets 1e-7 added.
        beta: decay of the momentum and of the squares, in [0, 1).
        eps: added to roots and norms, 0 or greater.

    Raises:
        ValueError: an argument outside its range; a tensor is no matrix.

    Source: Si, Zhang & Shen, 2025, alg. 1, and the authors' code.

    Example:
        >>> import torch, functorch_opt as fo
        >>> tx = fo.scale_by_adamuon()
        >>> u, _ = tx.update([torch.randn(3, 5)], tx.init([torch.zeros(3, 5)]))
        >>> u[0].square().mean().sqrt()
        tensor(0.2000)
    """
    check_range(0, 1, beta=beta)
    check_range(0, float("inf"), eps=eps)
    orthogonal = orthogonalizer(ns_coeffs, ns_steps, ns_dtype)

    def rule(g, mu, v, weight, eps):
        mu = torch.lerp(mu, g, weight)
        m = torch.lerp(mu, g, weight) if nesterov else mu
        o = on_matrices(lambda x: orthogonal(x, 1e-7), dims, torch.sgn(m))
        square = (o * o.conj()).real
        v = torch.lerp(v.real, square, weight)

        def step(r):
            return r * (0.2 * r.shape[-2:].numel() ** 0.5 / (norm(r) + eps))

        r = o / ((v + tree.TINY).sqrt() + eps)
        return on_matrices(step, dims, r), {"mu": mu, "v": v}

    return leafwise(
        rule,
        lambda beta: {"weight": 1 - beta},
        slots={
            "mu": matrix_slot(partial(tree.zeros_like, dtype=mu_dtype), dims),
            "v": lambda p: tree.zeros_like(p.real),
        },
        hyper={"beta": beta, "eps": eps},
        kind="tensorwise",
    )


@transformation
def adamuon(
    learning_rate: ScalarOrSchedule,
    ns_coeffs: Coefficients = (3.4445, -4.775, 2.0315),
    ns_steps: int = 5,
    beta: ScalarOrSchedule = 0.95,
    eps: ScalarOrSchedule = 1e-8,
    weight_decay: ScalarOrSchedule = 0.0,
    *,
    nesterov: bool = True,
    adam_learning_rate: ScalarOrSchedule | None = None,
    adam_b1: ScalarOrSchedule = 0.9,
    adam_b2: ScalarOrSchedule = 0.95,
    adam_eps: ScalarOrSchedule = 1e-8,
) -> GradientTransformation:
    """AdaMuon for the tensors with two dims or more, and `adamw` for the rest.

    Learning rates of AdamW fit. To choose by name and type too, take `matrix_labels` and
    `partition`.

    Args:
        learning_rate: 0 or greater, or a schedule.
        ns_coeffs, ns_steps, beta, eps, nesterov: see `scale_by_adamuon`.
        weight_decay: the decay of the matrices, multiplied by the learning rate.
        adam_learning_rate, adam_b1, adam_b2, adam_eps: of `adamw`, without decay. None means
            `learning_rate`.

    Raises:
        ValueError: an argument outside its range.

    Source: Si, Zhang & Shen, 2025.

    Example:
        >>> import functorch_opt as fo
        >>> fo.adamuon(1e-3, weight_decay=0.1)
        adamuon(0.001, weight_decay=0.1)
    """
    direction = scale_by_adamuon(ns_coeffs, ns_steps, beta, eps, nesterov=nesterov)
    adam: dict[str, Any] = {"b1": adam_b1, "b2": adam_b2, "eps": adam_eps}
    adam["learning_rate"] = adam_learning_rate
    return matrices_and_rest(direction, learning_rate, weight_decay, adam)
