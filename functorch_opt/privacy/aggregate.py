"""One gradient from the gradients of the examples: clip each to norm C, and sum.

The formula is ``sum_i g_i / max(1, ||g_i|| / C)``.

Source: Abadi et al., "Deep Learning with Differential Privacy", CCS 2016, alg. 1.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functorch_opt import tree
from functorch_opt._core import structure
from functorch_opt._core.exchange import grouped
from functorch_opt.privacy import ranks
from functorch_opt.tree import PyTree

__all__ = ["ClippedSum", "clip_and_sum"]

Norms = PyTree
"""A number greater than 0 or a 0-dim tensor, for all parameters together.

It may also be a tree of them, in which each leaf is for the parameters below it.
"""


class ClippedSum(NamedTuple):
    """What `clip_and_sum` and `clipped_grad_sum` return.

    `differentially_private_aggregate` takes it in place of updates.
    """

    sum: PyTree
    """The sum over the examples, a tree of the structure of the params, in float32 or wider."""
    norms: PyTree
    """The norm of each example before the clip, [B].

    It is one tensor, or a tree of tensors if `l2_norm_clip` is a tree.
    """
    l2_norm_clip: Norms
    """The norm to which each example was clipped."""
    values: Tensor | None = None
    """The loss of each example, [B], if the gradients were computed from a loss."""


def clip_and_sum(
    grads: PyTree, l2_norm_clip: Norms, weights: Tensor | None = None
) -> ClippedSum:
    """Clip the gradient of each example to norm C, and sum.

    The formula is ``sum_i w_i g_i / max(1, |w_i| ||g_i|| / C)``.

    An example moves the sum by at most C, however large its gradient and its weight are. A gradient
    that is not finite makes the sum NaN.

    Args:
        grads: a tree of tensors [B, ...], as `per_example_grads` gives. None leaves stay None. B
            may be 0. They may be DTensors: with ``Shard(0)`` the ranks divide the examples, and with
            other cuts each rank has parts of the gradient of each example.
        l2_norm_clip: C, greater than 0; infinity does not clip. With a tree of them, parts of an
            example are clipped by their own norms. An entry stands for all that is below it, as in
            ``{"encoder": 1.0, "head": 0.5}``. With one for each tensor it is
            ``{name: C / len(params) ** 0.5 for name in params}``.
        weights: [B], the factors of the losses, and so of the gradients, before the clip; by
            default 1.

    Raises:
        ValueError: leaves have different B; a leaf has no axis of examples; `weights` has another
            shape; a C is not greater than 0; the examples of two leaves are not divided alike.
        TypeError: a leaf lies with an owner, or is cut in another way than by ``Shard``.
        NotImplementedError: a derivative would go from one rank to another.

    Source: Abadi et al., 2016, alg. 1. For parts: McMahan et al., "Learning Differentially Private
    Recurrent Language Models", 2018, sec. 3.

    Example:
        >>> import torch, functorch_opt as fo
        >>> grads = {"w": torch.tensor([[3.0, 4.0], [0.3, 0.4]])}
        >>> clipped = fo.clip_and_sum(grads, 1.0)
        >>> clipped.sum, clipped.norms
        ({'w': tensor([0.9000, 1.2000])}, tensor([5.0000, 0.5000]))
    """
    gs, spec = structure.flatten_tensors(grads, "grads")
    n = examples(grads, "grads")
    check_weights(weights, n)
    division = ranks.of_gradients("clip_and_sum", gs, n)
    weights = division.weights_here(weights)
    bounds, bounds_spec = tree.flatten(l2_norm_clip)
    check_bounds(l2_norm_clip, finite=False)
    names = ("l2_norm_clip", "grads")
    # An error raised here shows the bounds; further below it would show indices in place of them.
    structure.broadcast(l2_norm_clip, grads, names=names)
    numbers = tree.unflatten(bounds_spec, list(range(len(bounds))))
    part = structure.broadcast(numbers, grads, names=names)
    present = [i for i, g in enumerate(gs) if g is not None]
    each = ranks.norms([gs[i] for i in present], division)
    of_part = grouped(present, lambda i: part[i])
    norm_of = dict(zip(present, each, strict=True))
    norms, factors = [], []
    for k, bound in enumerate(bounds):
        mine = [norm_of[i] for i in of_part.get(k, [])]
        norm = _joined(mine, division.here, weights)
        factor = _factor(norm, bound)
        norms.append(division.of_examples(norm))
        factors.append(factor if weights is None else factor * weights)
    total: list[Tensor | None] = []
    for g, k in zip(gs, part, strict=True):
        total.append(None if g is None else ranks.summed(factors[k], g))
    return ClippedSum(
        tree.unflatten(spec, total), tree.unflatten(bounds_spec, norms), l2_norm_clip
    )


def _factor(norm: Tensor, bound: Any) -> Tensor:
    """``min(1, bound / norm)``, which is 0 if the bound is a tensor of 0."""
    if not isinstance(bound, Tensor):
        return 1 / torch.clamp(norm / bound, min=1)
    closed = bound == 0
    divisor = torch.where(closed, 1.0, bound)
    factor = 1 / torch.clamp(norm / divisor, min=1)
    return torch.where(closed, 0.0, factor)


def _joined(each: list[Tensor], n: int, weights: Tensor | None) -> Tensor:
    """The norm of each of `n` examples, over all tensors together."""
    each = each or [torch.zeros(n, dtype=torch.float32)]
    norm = torch.linalg.vector_norm(torch.stack(each), dim=0)
    return norm if weights is None else norm * weights.abs()


def examples(batch: PyTree, name: str) -> int:
    """How many examples there are: the size of the first axis, which all leaves must have."""
    leaves, _ = structure.flatten_tensors(batch, name)
    sizes = {
        path: tuple(x.shape[:1])
        for path, x in zip(tree.paths(batch), leaves, strict=True)
        if x is not None
    }
    different = set(sizes.values())
    if len(different) != 1 or () in different:
        shown = ", ".join(
            f"{path!r}: {size[0] if size else 'a scalar'}" for path, size in sizes.items()
        )
        raise ValueError(
            f"every tensor of {name} must have the same number of examples, its first axis; "
            f"got {shown or 'no tensor'}."
        )
    return next(iter(sizes.values()))[0]


def check_weights(weights: Tensor | None, n: int) -> None:
    if weights is not None and weights.shape != (n,):
        raise ValueError(
            f"weights has shape {tuple(weights.shape)}; there are {n} examples: it must be ({n},)."
        )


def check_bounds(l2_norm_clip: Norms, *, finite: bool) -> None:
    bounds, _ = tree.flatten(l2_norm_clip)
    for path, bound in zip(tree.paths(l2_norm_clip), bounds, strict=True):
        name = f"l2_norm_clip{f' at {path!r}' if path else ''}"
        many = isinstance(bound, Tensor) and bound.dim() > 0
        if many or isinstance(bound, bool) or not isinstance(bound, (int, float, Tensor)):
            raise TypeError(
                f"{name} must be a number or a 0-dim tensor; got {type(bound).__name__} {bound!r}."
            )
        if not isinstance(bound, Tensor) and not (
            0 < bound < math.inf or (bound == math.inf and not finite)
        ):
            raise ValueError(
                f"{name} must be greater than 0{' and finite' if finite else ''}; got {bound}."
            )
    if not bounds:
        raise ValueError(
            "l2_norm_clip is an empty tree: give one number for all parameters, "
            "or one for each part."
        )
