"""What concerns one leaf of a tree.

Here are its entry of the values that have one per leaf, the dtype in which its rule computes, and
the words for what is wrong with it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functorch_opt import tree
from functorch_opt._core import sharding, structure
from functorch_opt.tree import PyTree

__all__ = ["Each"]


class Each(NamedTuple):
    """Wraps a tree from which every tensor gets its own leaf, such as its noise or its mask.

    ``prepare`` returns it. The tree has the structure of the params.

    Args:
        tree: a tree of tensors.
        own: whether `prepare` has just made the tensors, and nobody else has them. Then a compiled
            step may write its updates over them, and needs no new memory.
    """

    tree: PyTree
    own: bool = False


# ---- one entry per leaf ------------------------------------------------------------------------


class _Parts(threading.local):
    """The parts of the tree that this thread is inside of, the innermost last."""

    def __init__(self) -> None:
        self.stack: list[list[int]] = []


_PARTS = _Parts()


@contextmanager
def part_of_tree(indices: list[int]) -> Iterator[None]:
    """Inside of it, a transformation sees only the leaves with these indices.

    Of a 1-dim count or hyperparameter, which has one entry per leaf, it takes these entries.
    """
    _PARTS.stack.append(
        [_PARTS.stack[-1][i] for i in indices] if _PARTS.stack else indices
    )
    try:
        yield
    finally:
        _PARTS.stack.pop()


def is_part() -> bool:
    """Whether the tree at hand is a part of another one."""
    return bool(_PARTS.stack)


def of_this_part(value: Any) -> Any:
    return (
        value[_PARTS.stack[-1]]
        if _PARTS.stack and isinstance(value, Tensor) and value.dim() == 1
        else value
    )


def check_entries(name: str, value: Any, n: int) -> None:
    """Raise ValueError for a 1-dim value that does not have one entry for each of `n` leaves."""
    if isinstance(value, Tensor) and value.dim() == 1 and value.shape[0] != n:
        raise ValueError(
            f"{name} has {value.shape[0]} entries for {n} leaves. A hyperparameter is a number or "
            "a 0-dim tensor; to train with many values at once, vmap over it."
        )


class Misfit(Exception):
    """What is wrong with a tensor. It is raised where the path of the tensor is not known."""


def uniform_dtype(
    g: Tensor, p: Tensor | None, slots: Sequence[Tensor | None]
) -> torch.dtype | None:
    """The dtype of ordinary real tensors, if all have the same one and rules compute in it.

    Nothing can be wrong with such an update. Otherwise the answer is None.
    """
    dtype = g.dtype
    if type(g) is not Tensor or type(p) not in sharding.PLAIN or dtype not in _PLAIN:
        return None
    if p.dtype is not dtype or p.shape != g.shape or g.layout is not torch.strided:  # type: ignore[union-attr]
        return None
    for slot in slots:
        if type(slot) is not Tensor or slot.dtype is not dtype:
            return None
    return dtype


_PLAIN = (torch.float32, torch.float64)


def wrong_update(
    g: Tensor, p: Tensor | None, slots: Sequence[Tensor | None] = ()
) -> str | None:
    """What is wrong with an update, and how to mend it; None if nothing is wrong."""
    plain = p is not None and type(g) is Tensor and type(p) in sharding.PLAIN
    if plain and all(type(slot) is Tensor for slot in slots):
        fits = p.dtype is g.dtype and p.shape == g.shape  # type: ignore[union-attr]
        if fits and g.dtype.is_floating_point and g.layout is torch.strided:
            return None
    if g.layout is not torch.strided or not (g.is_floating_point() or g.is_complex()):
        return (
            f"is a {g.layout} tensor of {g.dtype}. "
            "Gradients must be dense and floating or complex (for nn.Embedding: sparse=False)."
        )
    if p is None or any(slot is None for slot in slots):
        holder = "params" if p is None else "the state"
        return (
            f"is a tensor, but {holder} has None there. "
            "Give None for the update too, or init with this parameter."
        )
    if p.shape != g.shape:
        return (
            f"has shape {tuple(g.shape)} and its parameter {tuple(p.shape)}. "
            "They must be equal: nothing is broadcast."
        )
    if g.is_complex() and not p.is_complex():
        return f"is {g.dtype} and its parameter {p.dtype}. Give its real part."
    return sharding.unlike(g, p, [slot for slot in slots if slot is not None])


def outline(value: Any) -> str:
    """A returned value in a few words: types, and the names in a dict."""
    if isinstance(value, dict):
        return f"a dict of {[*value]}"
    return (
        f"({', '.join(map(outline, value))})"
        if type(value) is tuple
        else type(value).__name__
    )


def check_value(name: str, value: Any) -> None:
    """Raise TypeError for what a rule cannot read."""
    if isinstance(value, Each):
        return
    large = isinstance(value, Tensor) and value.dim() > 1
    if large or not isinstance(value, (int, float, Tensor)):
        given = f"a tensor of shape {tuple(value.shape)}" if large else outline(value)
        wanted = "a number, a 0-dim tensor, a 1-dim tensor with one entry per leaf, or Each(a tree"
        raise TypeError(
            f"{name} is {given}; what a rule may read is {wanted} of tensors)."
        )


Parted = tuple[dict[str, Any], dict[str, list[Any]]]
"""Values that are the same for all tensors, and those of which each has its own."""


class PerLeaf:
    """The scalars of a step, cast once to each of the dtypes in which tensors are computed."""

    def __init__(self, reference: PyTree, spec: Any, now: dict[str, Any]) -> None:
        self.fixed: dict[str, Any] = {}
        self.rows: dict[str, Any] = {}
        for name, value in now.items():
            if type(value) is float:
                self.fixed[name] = value
                continue
            check_value(name, value)
            if isinstance(value, Each):
                self.rows[name] = structure.match(
                    reference, spec, value.tree, names=("updates", name)
                )
            elif isinstance(value, Tensor) and value.dim() == 1:
                check_entries(name, value, spec.num_leaves)
                self.rows[name] = value
            else:
                self.fixed[name] = value
        self.cast: dict[tuple[torch.dtype, torch.device | None], Parted] = {}

    def at(
        self, i: int, dtype: torch.dtype, device: torch.device | None = None
    ) -> dict[str, Any]:
        fixed, rows = self.of(dtype, device)
        return fixed | _entries_of(rows, i) if rows else fixed

    def raw(self, i: int, device: torch.device | None) -> dict[str, Any]:
        """What leaf `i` reads, as `prepare` returned it, on `device` if one is given."""
        values = self.fixed | _entries_of(self.rows, i)
        if device is None:
            return values
        return {name: brought_to(x, device) for name, x in values.items()}

    def of(self, dtype: torch.dtype, device: torch.device | None = None) -> Parted:
        """The values that are the same for all tensors, and those of which each has its own.

        For leaves on one device of several they are brought to this `device`, once a step.
        """
        key = dtype, device
        if key not in self.cast:
            real = _REAL.get(dtype, dtype)
            fixed = {name: _to(value, real, device) for name, value in self.fixed.items()}
            rows = {name: _row_to(row, real, device) for name, row in self.rows.items()}
            self.cast[key] = fixed, rows
        return self.cast[key]


def places_of(xs: list[Any]) -> list[torch.device | None]:
    """The device of each tensor, if they lie on several; otherwise None for each."""
    found = {x.device for x in xs if x is not None}
    if len(found) < 2:
        return [None] * len(xs)
    return [None if x is None else x.device for x in xs]


def brought_to(x: Any, device: torch.device | None) -> Any:
    """A value of the step on `device`, where something is given. What lies on the host can be read
    from everywhere."""
    is_elsewhere = (
        isinstance(x, Tensor)
        and device is not None
        and x.device.type != "cpu"
        and x.device != device
    )
    return x.to(device, non_blocking=device.type != "cpu") if is_elsewhere else x  # type: ignore[union-attr]


def _entries_of(rows: Mapping[str, Any], i: int) -> dict[str, Any]:
    """The entries of leaf `i`."""
    return {name: row[i] for name, row in rows.items()}


def _row_to(row: Any, dtype: torch.dtype, device: torch.device | None) -> list[Any]:
    """A row of values, in a list or a 1-dim tensor, cast to `dtype`."""
    if isinstance(row, list):  # they lie where their leaves do
        return [_to(x, dtype, None) for x in row]
    return list(_to(row, dtype, device).unbind())


def enter(x: Any, dtype: torch.dtype, pairs: bool) -> Any:
    """A value in the form in which a rule computes with it.

    Complex tensors are cast to `dtype`. If `pairs`, they become pairs of reals, and real tensors
    are cast to the dtype of such a real. Bools and integers stay as they are.
    """
    if not isinstance(x, Tensor) or not (x.is_floating_point() or x.is_complex()):
        return x
    x = x.to(dtype if x.is_complex() or not pairs else _REAL[dtype])
    if not (pairs and x.is_complex()):
        return x
    return torch.view_as_real(
        x.resolve_conj()
    )  # of a view that conjugates there are no pairs


_REAL = {torch.complex64: torch.float32, torch.complex128: torch.float64}


def _to(value: Any, dtype: torch.dtype, device: torch.device | None) -> Any:
    value = brought_to(value, device)
    return (
        value.to(dtype)
        if isinstance(value, Tensor) and value.is_floating_point()
        else value
    )


def working_dtype(*values: Tensor | None) -> torch.dtype:
    """The dtype in which a rule computes: the widest of its tensors', and at least float32."""
    found: torch.dtype | None = None
    for x in values:
        if (
            x is not None
            and x.dtype != found
            and (x.is_floating_point() or x.is_complex())
        ):
            dtype = tree.at_least_float32(x.dtype)
            found = dtype if found is None else torch.promote_types(found, dtype)
    return found or torch.float32
