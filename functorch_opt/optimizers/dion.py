"""Dion: a low-rank orthogonal step by one power iteration, and what it leaves out stays.

    mu = mu + g
    P  = the orthonormal columns of mu Q                                                     [n, r]
    R  = mu' P                                                                               [m, r]
    mu = mu - (1 - beta) P R'
    Q  = the columns of R, each divided by (its norm + eps)                                  [m, r]
    u  = sqrt(n / m) P Q'

Source: Ahn, Xu, Abreu & Langford, "Dion: Distributed Orthonormalized Updates", 2025, alg. 1, and
the authors' code. Here on one process; of a sharded matrix the whole is gathered.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from functorch_opt import random, tree
from functorch_opt._core.rule import leafwise
from functorch_opt._core.transformation import (
    GradientTransformation,
    ScalarOrSchedule,
    check_range,
    check_whole,
    transformation,
)
from functorch_opt.optimizers.matrices import (
    ORDINARY,
    MatrixDims,
    Scaling,
    as_matrix,
    as_tensor,
    check_scaling,
    matrices_and_rest,
    matrix_slot,
    scale_of,
    shapes_of,
)

__all__ = ["dion", "scale_by_dion"]


@transformation
def scale_by_dion(
    rank: int = 768,
    beta: ScalarOrSchedule = 0.95,
    eps: ScalarOrSchedule = 1e-8,
    mu_dtype: torch.dtype | None = None,
    *,
    seed: int = 0,
    scaling: Scaling = "rms_to_rms",
    dims: MatrixDims = ORDINARY,
) -> GradientTransformation:
    """The orthogonal step of rank `rank` that one power iteration finds of the momentum.

    The rule is at the top of `functorch_opt.optimizers.dion`. The state is ``mu`` and ``q``.

    Args:
        rank: of the step, 1 or greater; at most the shorter side of a matrix counts.
        beta: how much of the step stays in the momentum, in [0, 1). The rest of the momentum, which
            the step leaves out, stays as it is.
        eps: added to the norms of columns, 0 or greater.
        mu_dtype: dtype of ``mu``; by default that of the params, at least float32.
        seed: of the random numbers with which ``q`` starts. Matrices of one shape start alike.
        scaling: see `scale_by_muon`; the authors have "rms_to_rms".
        dims: which dims are a matrix, see `MatrixDims`; without split.

    Raises:
        ValueError: an argument outside its range; a tensor is no matrix.

    Source: Ahn et al., 2025, alg. 1, and the authors' code.

    Example:
        >>> import torch, functorch_opt as fo
        >>> tx = fo.scale_by_dion(rank=1)
        >>> g = torch.tensor([[3.0, 0.0], [0.0, 0.0]])
        >>> u, _ = tx.update([g], tx.init([torch.zeros(2, 2)]))
        >>> u[0].round(decimals=5).abs()
        tensor([[1., 0.],
                [0., 0.]])
    """
    check_whole(1, rank=rank)
    check_range(0, 1, beta=beta)
    check_range(0, float("inf"), eps=eps)
    check_scaling(scaling)
    if dims.split is not None:
        raise ValueError(f"scale_by_dion takes no fused matrices; dims is {dims}.")

    def first_q(p):
        ((*batch, n, m),) = shapes_of(p.shape, dims)
        shape = (*batch, m, min(rank, n, m))
        drawn = random.normal(random.key(seed), shape)
        return drawn.to(p.device, tree.at_least_float32(p.dtype))

    def rule(g, mu, q, weight, eps):
        mu = mu + g
        x = as_matrix(mu, dims)
        left = torch.linalg.qr(x @ q).Q
        right = x.mH @ left
        mu = mu - as_tensor(weight * (left @ right.mH), mu, dims)
        square = (right * right.conj()).real.sum(-2, keepdim=True)
        q = right / ((square + tree.TINY).sqrt() + eps)
        u = as_tensor(left @ q.mH, g, dims) * scale_of(x.shape, scaling)
        return u, {"mu": mu, "q": q}

    first_mu = matrix_slot(partial(tree.zeros_like, dtype=mu_dtype), dims)
    return leafwise(
        rule,
        lambda beta: {"weight": 1 - beta},
        slots={"mu": first_mu, "q": first_q},
        hyper={"beta": beta, "eps": eps},
        kind="tensorwise",
    )


@transformation
def dion(
    learning_rate: ScalarOrSchedule,
    rank: int = 768,
    beta: ScalarOrSchedule = 0.95,
    eps: ScalarOrSchedule = 1e-8,
    weight_decay: ScalarOrSchedule = 0.01,
    *,
    seed: int = 0,
    adam_learning_rate: ScalarOrSchedule | None = None,
    adam_b1: ScalarOrSchedule = 0.9,
    adam_b2: ScalarOrSchedule = 0.95,
    adam_eps: ScalarOrSchedule = 1e-8,
) -> GradientTransformation:
    """Dion for the tensors with two dims or more, and `adamw` for the rest.

    To choose by name and type too, take `matrix_labels` and `partition`.

    Args:
        learning_rate: 0 or greater, or a schedule; the authors have 0.01.
        rank, beta, eps, seed: see `scale_by_dion`.
        weight_decay: the decay of the matrices, multiplied by the learning rate.
        adam_learning_rate, adam_b1, adam_b2, adam_eps: of `adamw`, without decay. None means
            `learning_rate`.

    Raises:
        ValueError: an argument outside its range.

    Source: Ahn et al., 2025.

    Example:
        >>> import functorch_opt as fo
        >>> fo.dion(0.01, rank=64)
        dion(0.01, rank=64)
    """
    direction = scale_by_dion(rank, beta, eps, seed=seed)
    adam: dict[str, Any] = {"b1": adam_b1, "b2": adam_b2, "eps": adam_eps}
    adam["learning_rate"] = adam_learning_rate
    return matrices_and_rest(direction, learning_rate, weight_decay, adam)
