"""Arithmetic with whole trees, by the names of ``optax.tree``.

Every function leaves ``None`` as it is, and takes trees of the same structure. A result that is one
number is a 0-dim tensor; of sharded leaves it is that of the whole tensors.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from functorch_opt._core.sharding import stacked, whole
from functorch_opt._core.structure import PyTree, leaves, map

Number = float | Tensor


def add(tree_x: PyTree, tree_y: PyTree, *other_trees: PyTree) -> PyTree:
    """``x + y + ...``.

    Example:
        >>> import torch, functorch_opt as fo
        >>> fo.tree.add({"w": torch.tensor(1.0)}, {"w": torch.tensor(2.0)}, {"w": torch.tensor(4.0)})
        {'w': tensor(7.)}
    """

    def total(*xs: Tensor) -> Tensor:
        return functools.reduce(torch.add, xs)

    return map(total, tree_x, tree_y, *other_trees)


def sub(tree_x: PyTree, tree_y: PyTree) -> PyTree:
    """``x - y``.

    Example:
        >>> import torch, functorch_opt as fo
        >>> fo.tree.sub([torch.tensor(3.0)], [torch.tensor(2.0)])
        [tensor(1.)]
    """
    return map(torch.sub, tree_x, tree_y)


def mul(tree_x: PyTree, tree_y: PyTree) -> PyTree:
    """``x * y``, element by element.

    Example:
        >>> import torch, functorch_opt as fo
        >>> fo.tree.mul([torch.tensor(3.0)], [torch.tensor(2.0)])
        [tensor(6.)]
    """
    return map(torch.mul, tree_x, tree_y)


def div(tree_x: PyTree, tree_y: PyTree) -> PyTree:
    """``x / y``, element by element.

    Example:
        >>> import torch, functorch_opt as fo
        >>> fo.tree.div([torch.tensor(3.0)], [torch.tensor(2.0)])
        [tensor(1.5000)]
    """
    return map(torch.div, tree_x, tree_y)


def scale(scalar: Number, tree: PyTree) -> PyTree:
    """``scalar * x``.

    Example:
        >>> import torch, functorch_opt as fo
        >>> fo.tree.scale(0.5, [torch.tensor(3.0), None])
        [tensor(1.5000), None]
    """
    return map(lambda x: scalar * x, tree)


def add_scale(tree_x: PyTree, scalar: Number, tree_y: PyTree) -> PyTree:
    """``x + scalar * y``.

    Example:
        >>> import torch, functorch_opt as fo
        >>> fo.tree.add_scale([torch.tensor(3.0)], -0.5, [torch.tensor(2.0)])
        [tensor(2.)]
    """
    return map(lambda x, y: x + scalar * y, tree_x, tree_y)


def where(condition: PyTree, tree_x: PyTree, tree_y: PyTree) -> PyTree:
    """x where the condition is true, and y elsewhere.

    Args:
        condition: one bool tensor for all, or a tree of them.
        tree_x, tree_y: trees of tensors.

    Example:
        >>> import torch, functorch_opt as fo
        >>> fo.tree.where(torch.tensor(False), [torch.tensor(3.0)], [torch.tensor(2.0)])
        [tensor(2.)]
    """
    if isinstance(condition, Tensor):
        return map(lambda x, y: torch.where(condition, x, y), tree_x, tree_y)
    return map(torch.where, condition, tree_x, tree_y)


def clip(tree: PyTree, min_value: Any = None, max_value: Any = None) -> PyTree:
    """Every element, at least `min_value` and at most `max_value`.

    Example:
        >>> import torch, functorch_opt as fo
        >>> fo.tree.clip([torch.tensor([-3.0, 0.5])], -1.0, 1.0)
        [tensor([-1.0000,  0.5000])]
    """
    return map(lambda x: torch.clamp(x, min_value, max_value), tree)


def conj(tree: PyTree) -> PyTree:
    """The complex conjugates.

    Example:
        >>> import torch, functorch_opt as fo
        >>> fo.tree.conj([torch.tensor(1 + 2j)])
        [tensor(1.-2.j)]
    """
    return map(lambda x: x.conj().resolve_conj(), tree)


def real(tree: PyTree) -> PyTree:
    """The real parts.

    Example:
        >>> import torch, functorch_opt as fo
        >>> fo.tree.real([torch.tensor(1 + 2j), torch.tensor(3.0)])
        [tensor(1.), tensor(3.)]
    """
    return map(lambda x: x.real, tree)


# ---- one number ---------------------------------------------------------------------------------


def reduced(
    of_leaf: Callable[[Tensor], Tensor], of_all: Callable[[Tensor], Tensor], tree: PyTree
) -> Tensor | None:
    """What `of_all` makes of the numbers of all leaves with elements; None if there are none."""
    numbers = [of_leaf(whole(x)) for x in leaves(tree) if x.numel()]
    if not numbers:
        return None
    return of_all(stacked(numbers))


def sum(tree: PyTree) -> Tensor:
    """The sum of all elements of all leaves.

    Example:
        >>> import torch, functorch_opt as fo
        >>> fo.tree.sum({"w": torch.tensor([1.0, 2.0]), "b": torch.tensor(4.0)})
        tensor(7.)
    """
    total = reduced(torch.sum, torch.sum, tree)
    return torch.zeros(()) if total is None else total


def max(tree: PyTree) -> Tensor:
    """The largest element of all leaves; minus infinity if there is none.

    Example:
        >>> import torch, functorch_opt as fo
        >>> fo.tree.max({"w": torch.tensor([1.0, 2.0]), "b": torch.tensor(4.0)})
        tensor(4.)
    """
    largest = reduced(torch.amax, torch.amax, tree)
    return torch.full((), -torch.inf) if largest is None else largest


def min(tree: PyTree) -> Tensor:
    """The smallest element of all leaves; infinity if there is none.

    Example:
        >>> import torch, functorch_opt as fo
        >>> fo.tree.min({"w": torch.tensor([1.0, 2.0]), "b": torch.tensor(4.0)})
        tensor(1.)
    """
    smallest = reduced(torch.amin, torch.amin, tree)
    return torch.full((), torch.inf) if smallest is None else smallest


def size(tree: PyTree) -> int:
    """How many elements all leaves have together.

    Example:
        >>> import torch, functorch_opt as fo
        >>> fo.tree.size({"w": torch.ones(3, 4), "b": torch.ones(3), "none": None})
        15
    """
    count = 0
    for x in leaves(tree):
        count += x.numel()
    return count


def vdot(tree_x: PyTree, tree_y: PyTree) -> Tensor:
    """The sum of ``conj(x) * y``, which is complex if x or y is. `dot` is its real part.

    Example:
        >>> import torch, functorch_opt as fo
        >>> fo.tree.vdot([torch.tensor([1.0, 2.0])], [torch.tensor([3.0, 4.0])])
        tensor(11.)
    """
    return sum(map(lambda x, y: x.conj() * y, tree_x, tree_y))


def allclose(
    a: PyTree,
    b: PyTree,
    rtol: float = 1e-5,
    atol: float = 1e-8,
    equal_nan: bool = False,
) -> bool:
    """Whether all leaves are equal, up to ``atol + rtol |b|``.

    Example:
        >>> import torch, functorch_opt as fo
        >>> fo.tree.allclose([torch.tensor(1.0)], [torch.tensor(1.0 + 1e-7)])
        True
    """

    def are_close(x: Tensor, y: Tensor) -> bool:
        return torch.allclose(x, y, rtol, atol, equal_nan)

    return all(leaves(map(are_close, a, b)))


# ---- trees like others --------------------------------------------------------------------------


def full_like(
    tree: PyTree, fill_value: float, dtype: torch.dtype | None = None
) -> PyTree:
    """Tensors of the same shapes, with one number everywhere.

    Args:
        tree: a tree of tensors.
        fill_value: the number.
        dtype: by default that of each leaf.

    Example:
        >>> import torch, functorch_opt as fo
        >>> fo.tree.full_like({"w": torch.ones(2), "b": None}, 3.0)
        {'w': tensor([3., 3.]), 'b': None}
    """
    return map(lambda x: torch.full_like(x, fill_value, dtype=dtype), tree)


def ones_like(tree: PyTree, dtype: torch.dtype | None = None) -> PyTree:
    """Tensors of the same shapes, with 1 everywhere.

    For zeros write ``full_like(tree, 0)``, for `zeros_like` is a function of one tensor.

    Example:
        >>> import torch, functorch_opt as fo
        >>> fo.tree.ones_like({"w": torch.zeros(2)})
        {'w': tensor([1., 1.])}
    """
    return full_like(tree, 1, dtype)


def batch_shape(tree: PyTree, shape: tuple[int, ...] = ()) -> PyTree:
    """Every leaf, repeated along new leading axes. The copies share their memory.

    Example:
        >>> import torch, functorch_opt as fo
        >>> fo.tree.batch_shape([torch.ones(3)], (2,))[0].shape
        torch.Size([2, 3])
    """
    return map(lambda x: x.expand((*shape, *x.shape)), tree)


def cast(tree: PyTree, dtype: torch.dtype | None) -> PyTree:
    """Every leaf in `dtype`; None changes nothing.

    Example:
        >>> import torch, functorch_opt as fo
        >>> fo.tree.cast([torch.tensor(1.0)], torch.bfloat16)
        [tensor(1., dtype=torch.bfloat16)]
    """
    if dtype is None:
        return tree
    return map(lambda x: x.to(dtype), tree)


def cast_like(tree: PyTree, other_tree: PyTree) -> PyTree:
    """Every leaf in the dtype that the same leaf of the other tree has.

    Example:
        >>> import torch, functorch_opt as fo
        >>> fo.tree.cast_like([torch.tensor(1.0)], [torch.zeros(3, dtype=torch.float64)])
        [tensor(1., dtype=torch.float64)]
    """
    return map(lambda x, y: x.to(y.dtype), tree, other_tree)


# ---- moments ------------------------------------------------------------------------------------


def update_moment(
    updates: PyTree, moments: PyTree, decay: Number, order: float
) -> PyTree:
    """``decay moment + (1 - decay) update^order``.

    Example:
        >>> import torch, functorch_opt as fo
        >>> fo.tree.update_moment([torch.tensor(4.0)], [torch.tensor(2.0)], 0.75, 2)
        [tensor(5.5000)]
    """

    def moved(g: Tensor, t: Tensor) -> Tensor:
        return (1 - decay) * g**order + decay * t

    return map(moved, updates, moments)


def update_moment_per_elem_norm(
    updates: PyTree, moments: PyTree, decay: Number, order: float
) -> PyTree:
    """``decay moment + (1 - decay) |update|^order``, which is real for complex updates.

    Real updates are taken as they are, with their sign, as in optax.

    Example:
        >>> import torch, functorch_opt as fo
        >>> fo.tree.update_moment_per_elem_norm([torch.tensor(3 + 4j)], [torch.zeros(())], 0.5, 2)
        [tensor(12.5000)]
    """

    def power(g: Tensor) -> Tensor:
        return g.abs() ** order if g.is_complex() else g**order

    def moved(g: Tensor, t: Tensor) -> Tensor:
        return (1 - decay) * power(g) + decay * t

    return map(moved, updates, moments)


def update_infinity_moment(
    updates: PyTree, moments: PyTree, decay: Number, eps: Number
) -> PyTree:
    """``max(decay moment, |update| + eps)``.

    Example:
        >>> import torch, functorch_opt as fo
        >>> fo.tree.update_infinity_moment([torch.tensor(-3.0)], [torch.tensor(2.0)], 0.5, 0.0)
        [tensor(3.)]
    """

    def moved(g: Tensor, t: Tensor) -> Tensor:
        return torch.maximum(decay * t, g.abs() + eps)

    return map(moved, updates, moments)


def bias_correction(moment: PyTree, decay: Number, count: Any) -> PyTree:
    """``moment / (1 - decay^count)``, for a mean that began at 0.

    Args:
        moment: a tree of tensors.
        decay: a number in [0, 1), or a 0-dim tensor.
        count: how many updates there were, 1 or greater.

    Example:
        >>> import torch, functorch_opt as fo
        >>> fo.tree.bias_correction([torch.tensor(0.5)], 0.5, 1)
        [tensor(1.)]
    """
    # In float32 the difference is off by 3e-5 for a decay of 0.999.
    wide = torch.as_tensor(count).to(torch.float64)
    correction = 1 - decay**wide

    def corrected(x: Tensor) -> Tensor:
        by = correction.to(x.device)
        return (x / by).to(x.dtype)

    return map(corrected, moment)
