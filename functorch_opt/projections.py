"""Projections: the point of a set that is nearest to a tree of tensors.

All leaves together are one vector. The names and arguments are those of ``optax.projections``. To
train within a set, project after every step: ``params = projection(apply_updates(params, updates))``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from functorch_opt import tree as trees
from functorch_opt.tree import PyTree

__all__ = [
    "projection_box",
    "projection_halfspace",
    "projection_hypercube",
    "projection_hyperplane",
    "projection_l1_ball",
    "projection_l1_sphere",
    "projection_l2_ball",
    "projection_l2_sphere",
    "projection_linf_ball",
    "projection_non_negative",
    "projection_simplex",
    "projection_vector",
]


def __dir__() -> list[str]:
    return sorted(__all__)


# ---- element by element -------------------------------------------------------------------------


def projection_non_negative(tree: PyTree) -> PyTree:
    """``p >= 0``. In a chain see `functorch_opt.keep_params_nonnegative`.

    Example:
        >>> import torch, functorch_opt as fo
        >>> fo.projections.projection_non_negative([torch.tensor([-1.0, 2.0])])
        [tensor([0., 2.])]
    """
    return trees.map(lambda x: torch.clamp(x, min=0), tree)


def projection_box(tree: PyTree, lower: Any, upper: Any) -> PyTree:
    """``lower <= p <= upper``.

    Args:
        tree: a tree of tensors.
        lower, upper: a number each, or a tree of tensors of the same structure.

    Example:
        >>> import torch, functorch_opt as fo
        >>> fo.projections.projection_box([torch.tensor([-1.0, 2.0])], 0.5, 1.5)
        [tensor([0.5000, 1.5000])]
    """
    lowest = _for_all(lower, tree)
    highest = _for_all(upper, tree)
    return trees.map(torch.clamp, tree, lowest, highest)


def _for_all(bound: Any, tree: PyTree) -> PyTree:
    """A bound as a tree like `tree`."""
    is_number = isinstance(bound, (int, float))
    is_scalar = isinstance(bound, Tensor) and not bound.dim()
    if not is_number and not is_scalar:
        return bound

    def bound_of(x: Tensor) -> Tensor:
        return torch.as_tensor(bound, dtype=x.dtype, device=x.device)

    return trees.map(bound_of, tree)


def projection_hypercube(tree: PyTree, scale: Any = 1) -> PyTree:
    """``0 <= p <= scale``.

    Example:
        >>> import torch, functorch_opt as fo
        >>> fo.projections.projection_hypercube([torch.tensor([-1.0, 2.0])])
        [tensor([0., 1.])]
    """
    return projection_box(tree, 0, scale)


def projection_linf_ball(tree: PyTree, scale: float | Tensor = 1) -> PyTree:
    """``max |p| <= scale``.

    Example:
        >>> import torch, functorch_opt as fo
        >>> fo.projections.projection_linf_ball([torch.tensor([-0.5, 2.0])])
        [tensor([-0.5000,  1.0000])]
    """
    bounds = trees.scale(scale, trees.ones_like(tree))
    return projection_box(tree, trees.scale(-1.0, bounds), bounds)


# ---- the simplex, and the 1-norm ----------------------------------------------------------------


def projection_simplex(tree: PyTree, scale: float | Tensor = 1) -> PyTree:
    """``p >= 0`` and ``sum p = scale``.

    Args:
        tree: a tree of real tensors.
        scale: greater than 0.

    Source: Held, Wolfe & Crowder, "Validation of Subgradient Optimization", 1974, by sorting.

    Example:
        >>> import torch, functorch_opt as fo
        >>> fo.projections.projection_simplex({"w": torch.tensor([0.75, 1.25]), "b": torch.zeros(1)})
        {'w': tensor([0.2500, 0.7500]), 'b': tensor([0.])}
    """
    here = trees.leaves(tree)
    values = torch.cat([x.flatten() for x in here])
    falling = values.sort(descending=True).values
    n = len(values)
    ranks = torch.arange(1, n + 1, device=values.device, dtype=values.dtype)
    # The k largest elements stay positive if, lowered by this, the k-th one does.
    lowered = (falling.cumsum(0) - scale) / ranks
    count = (falling > lowered).sum().clamp(min=1)
    by = lowered.gather(0, (count - 1).reshape(1))

    def lower(x: Tensor) -> Tensor:
        lowered = x - by.to(x.dtype).reshape(())
        return lowered.clamp(min=0)

    return trees.map(lower, tree)


def projection_l1_sphere(tree: PyTree, scale: float | Tensor = 1) -> PyTree:
    """``sum |p| = scale``.

    Example:
        >>> import torch, functorch_opt as fo
        >>> fo.projections.projection_l1_sphere([torch.tensor([-0.75, 1.25])])
        [tensor([-0.2500,  0.7500])]
    """
    sizes = projection_simplex(trees.map(torch.abs, tree), scale)
    return trees.mul(trees.map(torch.sign, tree), sizes)


def projection_l1_ball(tree: PyTree, scale: float | Tensor = 1) -> PyTree:
    """``sum |p| <= scale``.

    Example:
        >>> import torch, functorch_opt as fo
        >>> fo.projections.projection_l1_ball([torch.tensor([-0.5, 0.25])])
        [tensor([-0.5000,  0.2500])]
    """
    inside = trees.norm(tree, 1) <= scale
    return trees.where(inside, tree, projection_l1_sphere(tree, scale))


# ---- the 2-norm ---------------------------------------------------------------------------------


def projection_l2_sphere(tree: PyTree, scale: float | Tensor = 1) -> PyTree:
    """``|p| = scale``. Zeros stay zeros, for no direction is nearer than another.

    In optax they become NaN.

    Example:
        >>> import torch, functorch_opt as fo
        >>> fo.projections.projection_l2_sphere([torch.tensor([3.0, 4.0])], 10.0)
        [tensor([6., 8.])]
    """
    norm = trees.norm(tree)
    divisor = torch.where(norm == 0, 1.0, norm)
    return trees.scale(scale / divisor, tree)


def projection_l2_ball(tree: PyTree, scale: float | Tensor = 1) -> PyTree:
    """``|p| <= scale``.

    Example:
        >>> import torch, functorch_opt as fo
        >>> fo.projections.projection_l2_ball([torch.tensor([3.0, 4.0])], 2.5)
        [tensor([1.5000, 2.0000])]
    """
    norm = trees.norm(tree)
    return trees.scale(scale / torch.clamp(norm, min=scale), tree)


# ---- planes -------------------------------------------------------------------------------------


def projection_vector(x: PyTree, a: PyTree) -> PyTree:
    """The multiple of `a` that is nearest to x.

    Example:
        >>> import torch, functorch_opt as fo
        >>> fo.projections.projection_vector([torch.tensor([1.0, 3.0])], [torch.tensor([1.0, 1.0])])
        [tensor([2., 2.])]
    """
    by = trees.vdot(x, a) / trees.vdot(a, a)
    return trees.scale(by, a)


def projection_hyperplane(x: PyTree, a: PyTree, b: float | Tensor) -> PyTree:
    """``<a, p> = b``.

    Example:
        >>> import torch, functorch_opt as fo
        >>> a = [torch.tensor([1.0, 1.0])]
        >>> fo.projections.projection_hyperplane([torch.tensor([1.0, 3.0])], a, 2.0)
        [tensor([0., 2.])]
    """
    by = (b - trees.vdot(x, a)) / trees.vdot(a, a)
    return trees.add_scale(x, by, a)


def projection_halfspace(x: PyTree, a: PyTree, b: float | Tensor) -> PyTree:
    """``<a, p> <= b``.

    Example:
        >>> import torch, functorch_opt as fo
        >>> a = [torch.tensor([1.0, 1.0])]
        >>> fo.projections.projection_halfspace([torch.tensor([1.0, 0.5])], a, 2.0)
        [tensor([1.0000, 0.5000])]
    """
    by = (b - trees.vdot(x, a)) / trees.vdot(a, a)
    return trees.add_scale(x, torch.clamp(by, max=0), a)
