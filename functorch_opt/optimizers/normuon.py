"""NorMuon: Muon, whose rows are brought to about one size by a mean of their squares.

    mu = beta mu + (1 - beta) g
    m  = beta mu + (1 - beta) g      with nesterov; mu without
    o  = orthogonal(m)                                                                   as in Muon
    v  = b2 v + (1 - b2) mean over each row of o^2
    r  = o / (sqrt(v) + eps)
    u  = scale r |o| / (|r| + eps)

Source: Li, Liu, Liang, Chen & Zhao, "NorMuon: Making Muon more efficient and scalable", 2025, alg. 1,
and the authors' code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from functorch_opt import tree
from functorch_opt._core.rule import leafwise
from functorch_opt._core.transformation import (
    GradientTransformation,
    ScalarOrSchedule,
    check_choice,
    check_range,
    transformation,
)
from functorch_opt.optimizers.matrices import (
    ORDINARY,
    MatrixDims,
    Scaling,
    as_matrix,
    as_tensor,
    blocks_of,
    check_scaling,
    joined,
    matrices_and_rest,
    matrix_slot,
    real_part,
    scale_of,
    shapes_of,
)
from functorch_opt.optimizers.orthogonal import Coefficients, norm, orthogonalizer

__all__ = ["normuon", "scale_by_normuon"]

Axis = Literal["rows", "short"]


def _averaged(shape: Sequence[int], axis: Axis) -> int:
    """The dim of a matrix over which the mean is taken."""
    return -1 if axis == "rows" or shape[-2] >= shape[-1] else -2


def _means_slot(dims: MatrixDims, axis: Axis) -> Callable[[Tensor], Tensor]:
    """Zeros for the means of every matrix; those of fused ones stand one after another."""

    def make(p: Tensor) -> Tensor:
        shapes = shapes_of(p.shape, dims)
        for shape in shapes:
            shape[_averaged(shape, axis)] = 1
        if len(shapes) > 1:
            shapes[0][-2] = sum([shape[-2] for shape in shapes])
        return p.new_zeros(shapes[0], dtype=tree.at_least_float32(p.real.dtype))

    return make


def _normalized(o, v, w2, eps, axis):
    """The orthogonal matrix with rows of about one size, and the means."""
    dim = _averaged(o.shape, axis)
    mean_square = (o * o.conj()).real.mean(dim).unsqueeze(dim)
    v = torch.lerp(v, mean_square, w2)
    r = o / ((v + tree.TINY).sqrt() + eps)
    return r * (norm(o) / (norm(r) + eps)), v


@transformation
def scale_by_normuon(
    ns_coeffs: Coefficients = (3.4445, -4.775, 2.0315),
    ns_steps: int = 5,
    beta: ScalarOrSchedule = 0.95,
    b2: ScalarOrSchedule = 0.95,
    eps: ScalarOrSchedule = 1e-10,
    mu_dtype: torch.dtype | None = None,
    *,
    nesterov: bool = True,
    axis: Axis = "rows",
    scaling: Scaling = "original",
    dims: MatrixDims = ORDINARY,
    ns_dtype: torch.dtype | None = None,
) -> GradientTransformation:
    """The orthogonal momentum of a matrix, with rows of about one size.

    The rule is at the top of `functorch_opt.optimizers.normuon`. The state is ``mu``, and ``v``
    with one number for each row. NVIDIA and timm have optimizers of this name which take the
    mean over the shorter side: that is ``axis="short"``.

    Args:
        ns_coeffs, ns_steps, mu_dtype, nesterov, scaling, dims, ns_dtype: see `scale_by_muon`. The
            norm of the momentum gets 1e-7 added.
        beta: weight of the old momentum, in [0, 1).
        b2: decay of the means of squares, in [0, 1).
        eps: added to roots and norms, 0 or greater.
        axis: "rows", as the authors have it, or "short": over the columns of a matrix with more
            columns than rows. Not with a tuple for ``dims.split``.

    Raises:
        ValueError: an argument outside its range; a tensor is no matrix.

    Source: Li et al., 2025, alg. 1, and the authors' code, which adds 1e-10 where the paper bounds.

    Example:
        >>> import torch, functorch_opt as fo
        >>> tx = fo.scale_by_normuon()
        >>> g = torch.tensor([[1.0, 0.0], [0.0, 100.0]])
        >>> u, state = tx.update([g], tx.init([torch.zeros(2, 2)]))
        >>> fo.get(state, "v")[0].shape, u[0].norm(dim=1).std() < 1e-3
        (torch.Size([2, 1]), tensor(True))
    """
    check_range(0, 1, beta=beta, b2=b2)
    check_range(0, float("inf"), eps=eps)
    check_choice("rows", "short", axis=axis)
    check_scaling(scaling)
    split, fused = dims.split, isinstance(dims.split, tuple)
    if axis == "short" and fused:
        raise ValueError(f"axis='short' needs matrices of one shape; dims is {dims}.")
    orthogonal = orthogonalizer(ns_coeffs, ns_steps, ns_dtype)

    def one(m, v, w2, eps):
        r, v = _normalized(orthogonal(m, 1e-7), v, w2, eps, axis)
        return r * scale_of(m.shape, scaling), v

    def rule(g, mu, v, weight, w2, eps):
        if not g.numel():
            return g.clone(), {"mu": mu.clone(), "v": real_part(v).clone()}
        mu = torch.lerp(mu, g, weight)
        m = torch.lerp(mu, g, weight) if nesterov else mu
        blocks = blocks_of(as_matrix(m, dims), split)
        vs = v.real.split(split, -2) if fused else [v.real]
        pairs = [one(x, y, w2, eps) for x, y in zip(blocks, vs, strict=True)]
        v = torch.cat([v for _, v in pairs], -2) if fused else pairs[0][1]
        u = joined([u for u, _ in pairs], split)
        return as_tensor(u, g, dims), {"mu": mu, "v": v}

    zeros = matrix_slot(partial(tree.zeros_like, dtype=mu_dtype), dims)
    slots = {"mu": zeros, "v": _means_slot(dims, axis)}
    hyper = {"beta": beta, "b2": b2, "eps": eps}
    return leafwise(rule, _weights, slots=slots, hyper=hyper, kind="tensorwise")


def _weights(beta, b2):
    return {"weight": 1 - beta, "w2": 1 - b2}


@transformation
def normuon(
    learning_rate: ScalarOrSchedule,
    ns_coeffs: Coefficients = (3.4445, -4.775, 2.0315),
    ns_steps: int = 5,
    beta: ScalarOrSchedule = 0.95,
    b2: ScalarOrSchedule = 0.95,
    eps: ScalarOrSchedule = 1e-10,
    weight_decay: ScalarOrSchedule = 0.0,
    *,
    nesterov: bool = True,
    axis: Axis = "rows",
    scaling: Scaling = "original",
    adam_learning_rate: ScalarOrSchedule | None = None,
    adam_b1: ScalarOrSchedule = 0.9,
    adam_b2: ScalarOrSchedule = 0.95,
    adam_eps: ScalarOrSchedule = 1e-10,
) -> GradientTransformation:
    """NorMuon for the tensors with two dims or more, and `adamw` for the rest.

    To choose by name and type too, take `matrix_labels` and `partition`.

    Args:
        learning_rate: 0 or greater, or a schedule.
        ns_coeffs, ns_steps, beta, b2, eps, nesterov, axis, scaling: see `scale_by_normuon`.
        weight_decay: the decay of the matrices, multiplied by the learning rate.
        adam_learning_rate, adam_b1, adam_b2, adam_eps: of `adamw`, without decay. None means
            `learning_rate`.

    Raises:
        ValueError: an argument outside its range.

    Source: Li et al., 2025.

    Example:
        >>> import functorch_opt as fo
        >>> fo.normuon(0.02, weight_decay=0.1)
        normuon(0.02, weight_decay=0.1)
    """
    direction = scale_by_normuon(
        ns_coeffs,
        ns_steps,
        beta,
        b2,
        eps,
        nesterov=nesterov,
        axis=axis,
        scaling=scaling,
    )
    adam: dict[str, Any] = {"b1": adam_b1, "b2": adam_b2, "eps": adam_eps}
    adam["learning_rate"] = adam_learning_rate
    return matrices_and_rest(direction, learning_rate, weight_decay, adam)
