"""Sharded tensors (DTensors).

Here are the part that this rank has, the whole, and the numbers that the ranks exchange.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from functorch_opt._core.owned import (
    everybodys_copy,
    everybodys_rows,
    home,
    is_here,
    joined,
    kept_as,
    owner_of,
)

PLAIN = (Tensor, torch.nn.Parameter)


def is_sharded(x: Any) -> bool:
    """Whether `x` is a DTensor.

    The parts or copies of a DTensor lie on the ranks of a device mesh; FSDP2 makes such parameters.

    Args:
        x: anything.

    Example:
        >>> import torch, functorch_opt as fo
        >>> fo.tree.is_sharded(torch.ones(2))
        False
    """
    if type(x) in PLAIN:
        return False
    # If nobody has imported the module there are no DTensors, and importing it takes a second.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def is_owned(x: Any) -> bool:
    """Whether one rank has `x`, a DTensor, and no other."""
    return is_sharded(x) and owner_of(x) is not None


_NOT_SHARDED = {*PLAIN, type(None)}


def any_sharded(xs: Sequence[Any]) -> bool:
    """Whether any of `xs` is a DTensor."""
    return not {*map(type, xs)} <= _NOT_SHARDED and any(map(is_sharded, xs))


def any_cut(xs: Sequence[Any]) -> bool:
    """Whether any of `xs` is a DTensor of which no rank need have the whole."""
    return any_sharded(xs) and any(is_sharded(x) and not is_owned(x) for x in xs)


def whole(x: Any) -> Any:
    """The whole of a sharded tensor, gathered on every rank. Anything else is returned as it is.

    Args:
        x: anything.

    Example:
        >>> import torch, functorch_opt as fo
        >>> fo.tree.whole(torch.ones(2))
        tensor([1., 1.])
    """
    if not is_sharded(x):
        return x
    if owner_of(x) is not None:
        return everybodys_copy(x)
    if x.dtype is torch.int16:  # Neither gloo nor NCCL sends 16-bit integers.
        return x.to(torch.int32).full_tensor().to(x.dtype)
    return x.full_tensor()


def part_of(x: Any, like: Any = None) -> Any:
    """This rank's part of `x`, laid out as `like` is. A tensor that is not sharded is its own part.

    Args:
        x: anything.
        like: the tensor whose layout is taken, by default `x` itself. An `x` of another shape, or one
            that is an ordinary number, has no parts: every rank gets the whole.

    Example:
        >>> import torch, functorch_opt as fo
        >>> fo.tree.part_of(torch.ones(2))
        tensor([1., 1.])
    """
    like = x if like is None else like
    if not is_sharded(like) or not isinstance(x, Tensor) or x.shape != like.shape:
        return whole(x)
    if not x.dim() and not is_sharded(x):
        return x  # a number of the step, which all ranks read
    if is_owned(x) and not is_owned(like):
        x = everybodys_copy(x)
    x = x if is_sharded(x) else cut(x, like)
    part = _laid_out(x, _settled(like)).to_local()
    if owner_of(like) is not None and not is_here(like):
        # Of a shape () torch leaves the rest of the ranks one number.
        return part.flatten()[:0]
    return part


def join(part: Tensor, like: Any) -> Tensor:
    """The inverse of `part_of`.

    It returns the sharded tensor, laid out as `like`, of which `part` is this rank's part.
    """
    return joined(part, like.device_mesh, _settled(like), like)


def on_part(f: Callable[..., Tensor], like: Any, *xs: Any) -> Any:
    """``f(*xs)`` of this rank's parts of tensors that are laid out as `like`, joined again."""
    if not is_sharded(like):
        return f(*xs)
    return join(f(*[part_of(x, like) for x in xs]), like)


def cut(x: Tensor, like: Any) -> Tensor:
    """Lay out `x`, of which every rank has the whole, as `like` is laid out.

    Each rank keeps its part, and nothing is sent.
    """
    if owner_of(like) is not None:
        return kept_as(like, x)
    return _everywhere(x, like).redistribute(placements=_settled(like))


def _everywhere(x: Tensor, like: Any) -> Any:
    """The DTensor on the mesh of `like` of which every rank has the whole, `x`."""
    from torch.distributed.tensor import DTensor, Replicate

    mesh = like.device_mesh
    copies = [Replicate()] * mesh.ndim
    return DTensor.from_local(x, mesh, copies, run_check=False)


def on_shards(
    apply: Callable[..., Any],
    in_parts: bool,
    g: Any,
    p: Any,
    slots: dict[str, Any],
    now: dict[str, Any],
    *rest: Any,
) -> tuple[Any, dict[str, Any]]:
    """Call ``apply(g, p, slots, now, *rest) -> (update, slots)`` on sharded tensors.

    If `in_parts`, it is given this rank's parts of them, otherwise the gathered wholes.
    """
    like = g if p is None else p

    def as_seen(x: Any) -> Any:
        if not in_parts:
            return whole(x)
        x = part_of(x, like)
        is_number = isinstance(x, Tensor) and not x.dim()
        if is_number and x.requires_grad:
            return _gradient_summed(x, like)
        return x

    def as_kept(x: Any, old: Any) -> Any:
        if in_parts and old.shape == like.shape:
            return join(x, like)
        return cut(x, old) if is_sharded(old) else x

    def all_seen(values: dict[str, Any]) -> dict[str, Any]:
        return {name: as_seen(x) for name, x in values.items()}

    u, new = apply(as_seen(g), as_seen(p), all_seen(slots), all_seen(now), *rest)
    u = as_kept(u, g)
    return u, {name: as_kept(new[name], old) for name, old in slots.items()}


def _gradient_summed(x: Tensor, like: Any) -> Tensor:
    """`x` itself, which is a number that meets a part of a tensor on each rank.

    Its gradient is the sum of the gradients that come from the parts.
    """
    from torch.distributed.tensor import Partial

    terms = [
        placement if placement.is_replicate() else Partial()
        for placement in _settled(like)
    ]
    return _everywhere(x, like).to_local(grad_placements=terms)


def settled(x: Any) -> Any:
    """`x` itself; or the sum that its parts are terms of."""
    return _laid_out(x, _settled(x))


def _laid_out(x: Any, placements: list[Any]) -> Any:
    if list(x.placements) == placements:
        return x
    return x.redistribute(placements=placements)


def unlike(g: Any, p: Any, slots: Sequence[Any]) -> str | None:
    """What is wrong where some of these tensors are sharded and others are not.

    The answer is None if nothing is wrong.
    """
    name = "its parameter"
    if is_sharded(p) == is_sharded(g):
        name = "the state there"
        of_this_shape = [x for x in slots if x.dim() and x.shape == g.shape]
        if all(is_sharded(x) == is_sharded(g) for x in of_this_shape):
            return None
    mine, other = "a DTensor", "an ordinary tensor"
    if not is_sharded(g):
        mine, other = other, mine
    return (
        f"is {mine} and {name} {other}. "
        "Shard the parameters first; then init, and take gradients."
    )


def _settled(x: Any) -> list[Any]:
    """How `x` is laid out.

    Where the ranks hold terms of a sum that has not been taken yet, it is the layout that the sum
    will have.
    """
    from torch.distributed.tensor import Replicate

    return [
        Replicate() if placement.is_partial() else placement for placement in x.placements
    ]


def by_layout(tensors: list[Any]) -> list[tuple[Any, list[int]]]:
    """For each layout one of the sharded tensors that have it, and the indices of all of them.

    Tensors have one layout if they are split over the same dims of the same mesh.
    """
    layouts: dict[Any, tuple[Any, list[int]]] = {}
    for i, x in enumerate(tensors):
        if is_sharded(x):
            split = tuple([not placement.is_replicate() for placement in _settled(x)])
            layouts.setdefault((home(x.device_mesh), split), (x, []))[1].append(i)
    return list(layouts.values())


def everybodys(mine: list[Tensor], like: Any) -> Tensor:
    """The numbers of all ranks that hold different parts.

    The result has a dim for each dim of the mesh, and a last one for the numbers.
    """
    from torch.distributed.tensor import DTensor, Replicate, Shard

    mesh = like.device_mesh
    if owner_of(like) is not None:
        return everybodys_rows(stack(mine), like)
    placements = [
        Replicate() if placement.is_replicate() else Shard(dim)
        for dim, placement in enumerate(_settled(like))
    ]
    row = stack(mine).reshape([1] * mesh.ndim + [len(mine)])
    return DTensor.from_local(row, mesh, placements, run_check=False).full_tensor()


def refuse_sharded(name: str, leaves: list[Any]) -> None:
    """Raise TypeError if a leaf is sharded.

    This is for computations that mix the elements of all leaves, and that are not written for
    several ranks.
    """
    if any_sharded(leaves):
        raise TypeError(
            f"{name} takes no sharded tensors (DTensor): it needs all elements on one rank. "
            "Give it x.full_tensor()."
        )


def sum_over_ranks(values: list[Any], leaves: list[Any]) -> list[Any]:
    """The sums over whole leaves, from those over this rank's parts.

    Each of `values` is the sum over this rank's part of one of the `leaves`. For sharded leaves
    they are added up over the ranks, in one message for each layout.
    """
    return _over_ranks(torch.sum, values, leaves)


def added_over_ranks(values: list[Tensor], leaves: list[Any]) -> Tensor:
    """The sum of `values`, tensors of one shape, each of this rank's part of one of the `leaves`.

    For sharded leaves it is that over the ranks, in one message for each layout.
    """
    layouts = by_layout(leaves)
    sharded = {i for _, indices in layouts for i in indices}
    totals = [x for i, x in enumerate(values) if i not in sharded]
    for like, indices in layouts:
        mine = torch.stack([values[i] for i in indices]).sum(0)
        rows = everybodys([*mine.flatten().unbind()], like)
        total = rows.flatten(0, -2).sum(0)
        totals.append(total.to(mine.dtype).reshape(mine.shape))
    return torch.stack(totals).sum(0)


def rows_like(rows: Tensor, like: Any) -> Any:
    """Tensors of the shape of `like`, one in each of the `rows`: those of this rank's part."""
    if not is_sharded(like):
        return rows
    from torch.distributed.tensor import Replicate, Shard

    placements: list[Any] = []
    for placement in _settled(like):
        if placement.is_replicate():
            placements.append(Replicate())
        elif type(placement) is Shard:
            placements.append(Shard(placement.dim + 1))
        else:
            raise TypeError(
                f"a memory of many steps cannot be divided as {placement} divides a parameter."
            )
    whole = torch.empty((len(rows), *like.shape), device="meta")
    return joined(rows, like.device_mesh, placements, whole)


def largest_over_ranks(values: list[Any], leaves: list[Any]) -> list[Any]:
    """The same as `sum_over_ranks`, for maxima."""
    return _over_ranks(torch.amax, values, leaves)


def _over_ranks(
    joined: Callable[..., Tensor], values: list[Any], leaves: list[Any]
) -> list[Any]:
    """What `joined` makes, along the dims of the mesh, of the numbers of all ranks."""
    values = list(values)
    for like, indices in by_layout(leaves):
        of_all = everybodys([values[i] for i in indices], like)
        mesh_dims = tuple(range(like.device_mesh.ndim))
        found = joined(of_all, mesh_dims)
        for i, x in zip(indices, found.unbind(), strict=True):
            values[i] = x.to(values[i].dtype)
    return values


def stacked(numbers: list[Tensor]) -> Tensor:
    """One tensor of these, on the device of the first if they lie on several."""
    here = numbers[0].device
    return torch.stack([x.to(here) for x in numbers])


def stack(norms: list[Tensor]) -> Tensor:
    widest = torch.float64 if torch.float64 in [n.dtype for n in norms] else torch.float32
    return stacked([n.to(widest) for n in norms])
