"""Numbers: the dtypes in which things are computed, and norms and products of whole trees."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from functorch_opt._core.sharding import (
    PLAIN,
    by_layout,
    everybodys,
    part_of,
    stack,
    sum_over_ranks,
    whole,
)
from functorch_opt._core.structure import PyTree, leaves


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """float32 for the smaller floating dtypes: bfloat16, float16 and the 8-bit floats.

    Other dtypes are returned as they are.

    Args:
        dtype: any dtype.

    Example:
        >>> import torch, functorch_opt as fo
        >>> fo.tree.at_least_float32(torch.bfloat16), fo.tree.at_least_float32(torch.float64)
        (torch.float32, torch.float64)
    """
    return torch.float32 if dtype.is_floating_point and dtype.itemsize < 4 else dtype


def real_dtype(device: torch.device) -> torch.dtype:
    """The dtype of scalars that are computed once a step: float64, if the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def zero_count(params: PyTree) -> Tensor:
    """A count of 0, int64, on the device of the params.

    It is for the ``init`` of a transformation of whole trees. `functorch_opt.leafwise` makes its
    own.

    Under vmap it is batched as the params are. A count that is not batched would come out as a view
    with stride 0, and compiled code that has seen this view would compile again at the second step.

    Args:
        params: a tree with at least one tensor.

    Example:
        >>> import torch, functorch_opt as fo
        >>> fo.tree.zero_count({"w": torch.ones(2)})
        tensor(0)
    """
    p = leaves(params)[0]
    if type(p) in (Tensor, torch.nn.Parameter):
        return p.new_zeros((), dtype=torch.int64)
    # If the params are sharded, the count is still an ordinary tensor.
    return torch.zeros((), dtype=torch.int64, device=p.device)


def as_real(count: Tensor) -> Tensor:
    """A count as a tensor of float64, or of float32 on a device that has no float64.

    In float32 ``1 - b2**count`` is off by 3e-5 at the first step of ``b2=0.999``.

    Args:
        count: an integer tensor.

    Example:
        >>> import torch, functorch_opt as fo
        >>> 1 - 0.999 ** fo.tree.as_real(torch.tensor(1))
        tensor(0.0010, dtype=torch.float64)
    """
    return count.to(real_dtype(count.device))


def beside(value: Any, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """`value`, a number or a tensor, as a tensor on the device of `x`.

    Nobody waits for the device: a number is written there by the device itself.
    """
    if isinstance(value, Tensor):
        return value.to(x.device, dtype, non_blocking=True)
    return torch.full((), value, dtype=dtype, device=x.device)


MANY = 256
"""Numbers that one kernel takes."""
TINY = torch.finfo(torch.float32).tiny
"""The number that is added to squares under a root, 1.2e-38.

At 0 the derivative of the root is infinite, and that of the square is 0; their product is NaN.

With it the root of 0 becomes 1.1e-19. This is lost beside any eps above 1e-12, so updates are the
same numbers.
"""


def zeros_like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Zeros in the shape of `x`, by default in the dtype of `x`, but at least float32.

    The reason for float32 is that in bfloat16 ``0.999`` rounds to 1, and a second moment would
    never decay.

    Args:
        x: a tensor.
        dtype: a floating dtype, or a complex one if `x` is complex.

    Raises:
        TypeError: `dtype` cannot hold what is computed for `x`; `x` is no tensor.

    Example:
        >>> import torch, functorch_opt as fo
        >>> fo.tree.zeros_like(torch.ones(2, dtype=torch.bfloat16))
        tensor([0., 0.])
    """
    if not isinstance(x, Tensor):
        raise TypeError(
            f"zeros_like makes a slot of one tensor; got {type(x).__name__}. "
            "For a tree of zeros write functorch_opt.tree.full_like(tree, 0)."
        )
    if dtype is not None and (
        dtype.is_complex != x.is_complex()
        or not (dtype.is_floating_point or dtype.is_complex)
    ):
        wanted = "complex" if x.is_complex() else "floating"
        raise TypeError(
            f"a slot of dtype {dtype} cannot hold what is worked out for {x.dtype}: "
            f"give a {wanted} dtype, or None."
        )
    return torch.zeros_like(
        x, dtype=at_least_float32(x.dtype) if dtype is None else dtype
    )


def scalar_slot(value: float) -> Callable[[Tensor], Tensor]:
    """A function that makes the slot of a tensor: one real number, which is `value` at first.

    The number has the dtype of the tensor, but at least float32.
    """
    return lambda x: x.new_full((), value, dtype=at_least_float32(x.real.dtype))


def copied(x: Tensor) -> Tensor:
    """A copy of `x` in its dtype, but at least float32: the slot for where a parameter began."""
    return x.to(at_least_float32(x.dtype), copy=True)


class Lengths:
    """Stands in for a tree of which nothing is asked but its `norm`: the norms of its leaves."""

    def __init__(self, of_leaves: list[Tensor]) -> None:
        self.of_leaves = of_leaves

    @property
    def together(self) -> Tensor:
        """As sums of two, and not of a vector: so it is part of one kernel for single numbers."""
        if len(self.of_leaves) == 1:
            return self.of_leaves[0]
        squares = [x * x for x in self.of_leaves]
        while len(squares) > 1:
            left = squares[len(squares) // 2 * 2 :]
            squares = [*map(torch.add, squares[::2], squares[1::2]), *left]
        return squares[0].sqrt()


def lengths(xs: list[Tensor]) -> list[Tensor]:
    """The 2-norms of these tensors; of very many, the one norm of all."""
    norms = _norms(xs)
    return norms if len(norms) <= MANY else [_norm_of(norms)]


def norm(tree: PyTree, ord: float | str | None = None, squared: bool = False) -> Tensor:
    """The 2-norm of all leaves together, ``sqrt(sum |x|^2)``, a 0-dim tensor.

    ``None`` leaves count as nothing; a tree without tensors has norm 0. The gradient at a zero tree
    is zero, not NaN. Sharded leaves count as wholes: the ranks exchange one number for each leaf,
    and the norm is an ordinary tensor, the same on all ranks.

    Args:
        tree: a tree of tensors.
        ord: None or 2; or 1 for the sum of ``|x|``, inf for the largest.
        squared: whether to return the square of the norm.

    Raises:
        ValueError: another `ord`.

    Example:
        >>> import torch, functorch_opt as fo
        >>> fo.tree.norm({"w": torch.tensor([3.0]), "b": torch.tensor(4.0)})
        tensor(5.)
    """
    if squared:
        return norm(tree, ord) ** 2
    if ord not in (None, 2):
        return _other_norm(tree, ord)
    if isinstance(tree, Lengths):
        return tree.together
    here = leaves(tree)
    norms = _norms([part_of(x) for x in here])
    if not norms:
        return torch.zeros((), dtype=torch.float32)
    layouts = by_layout(here)
    of_parts = {i for _, indices in layouts for i in indices}
    plain = [n for i, n in enumerate(norms) if i not in of_parts]
    # The norms of other ranks are gathered and not summed, so that no square can overflow.
    for like, indices in layouts:
        mine = _norm_of([norms[i] for i in indices])
        of_all = everybodys([mine], like).flatten()
        plain.append(_norm_of([*of_all]))
    return _norm_of(plain)


def _other_norm(tree: PyTree, ord: Any) -> Tensor:
    """The 1-norm, or the largest absolute value."""
    orders = {1: 1.0, "inf": torch.inf, torch.inf: torch.inf}
    if ord not in orders:
        raise ValueError(f"ord must be None, 1, 2 or inf; got {ord!r}.")
    p = orders[ord]
    norms = _norms([whole(x) for x in leaves(tree) if x.numel()], p)
    if not norms:
        return torch.zeros((), dtype=torch.float32)
    return torch.linalg.vector_norm(stack(norms), p)


def dot(tree: PyTree, other: PyTree) -> Tensor:
    """The inner product of two trees, a 0-dim tensor, computed in float32 or wider.

    Complex numbers count as pairs of reals. A tree without tensors gives 0. Sharded leaves count
    as wholes, as in `norm`.

    Args:
        tree: a tree of tensors.
        other: a tree of the same structure.

    Example:
        >>> import torch, functorch_opt as fo
        >>> fo.tree.dot([torch.tensor([1.0, 2.0])], [torch.tensor([3.0, 4.0])])
        tensor(11.)
    """
    here = leaves(tree)
    products = []
    for x, y in zip(here, leaves(other), strict=True):
        wide = _wide(part_of(x))
        partner = _wide(part_of(y, x)).to(wide.dtype)
        products.append(torch.vdot(wide, partner).real)
    if not products:
        return torch.zeros((), dtype=torch.float32)
    return stack(sum_over_ranks(products, here)).sum()


def _wide(x: Tensor) -> Tensor:
    return x.to(at_least_float32(x.dtype)).flatten()


def _norms(xs: list[Tensor], p: float = 2.0) -> list[Tensor]:
    """The norm of each: on a device that launches kernels, of all in a few launches."""
    if torch.compiler.is_compiling() or not xs or xs[0].device.type == "cpu":
        return [_norm(x, p) for x in xs]
    kinds = {(type(x), x.dtype, x.device) for x in xs}
    of_functorch = any(map(torch._C._functorch.is_functorch_wrapped_tensor, xs))
    first = xs[0]
    is_real = type(first) in PLAIN and not first.is_complex()
    if len(kinds) > 1 or not is_real or of_functorch:
        return [_norm(x, p) for x in xs]
    wide = at_least_float32(first.dtype)
    return [*torch._foreach_norm(xs, p, dtype=wide)]


def _norm(x: Tensor, p: float) -> Tensor:
    dtype = at_least_float32(x.dtype)
    if x.dtype is not dtype:
        x = x.to(dtype)
    return torch.linalg.vector_norm(x, p)


def _norm_of(norms: list[Tensor]) -> Tensor:
    return torch.linalg.vector_norm(stack(norms))
