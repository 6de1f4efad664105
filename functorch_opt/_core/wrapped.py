"""The leaves of a wrapped transformation: what is read for each, and what becomes of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from torch import Tensor

from functorch_opt import tree
from functorch_opt._core import structure
from functorch_opt._core.leaf import PerLeaf, places_of
from functorch_opt.tree import PyTree


class Declared(Protocol):
    """What is needed here of a wrapper."""

    before_reads: tuple[str, ...]

    @property
    def reads(self) -> tuple[str, ...]:
        """The names that it reads, of the values of a step and of slots."""

    def on_parts(self, f: Callable[..., Any], like: Any, *given: Any) -> Any:
        """``f`` of tensors. It gets this rank's parts of sharded ones."""

    def seen(
        self,
        g: Any,
        p: Any,
        slots: Any,
        now: Any,
    ) -> tuple[Any, Any]:
        """The update and the parameter of one leaf, as the inner transformation sees them."""

    def left(
        self, u: Tensor, g: Tensor, p: Any, slots: Any, now: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The update of one leaf, and its new slots."""


def called(
    f: Callable[..., Any],
    reads: tuple[str, ...],
    given: dict[str, Any],
    now: Mapping[str, Any],
) -> Any:
    """What `f` returns of a leaf and the values of a step.

    A leaf of one number is given as a row of one. For where two 0-dim tensors meet, torch lets the
    wider one decide the dtype, and the values of a step are float64.
    """
    present = {name: x for name, x in given.items() if x is not None}
    dims = {x.dim() for x in present.values()}
    values = {**now, **given}
    if dims != {0}:
        return f(*[values[name] for name in reads])
    values |= {name: x.reshape(1) for name, x in present.items()}
    return _as_numbers(f(*[values[name] for name in reads]))


def _as_numbers(result: Any) -> Any:
    if isinstance(result, tuple):
        return tuple(map(_as_numbers, result))
    if isinstance(result, dict):
        return {name: _as_numbers(x) for name, x in result.items()}
    is_row = isinstance(result, Tensor) and result.shape == (1,)
    return result.reshape(()) if is_row else result


class Leaves:
    """The leaves of a wrapped update, with the values that are read for each."""

    def __init__(
        self,
        tx: Declared,
        updates: PyTree,
        spec: Any,
        gs: list[Any],
        params: PyTree | None,
        slots: Mapping[str, PyTree],
        now: Mapping[str, Any],
    ) -> None:
        self.tx = tx
        self.spec = spec
        self.gs, self.params, self.slots = gs, params, slots
        names = ("updates", "params")
        no_params = params is None
        self.ps = (
            [None] * len(gs)
            if no_params
            else structure.match(updates, spec, params, names=names)
        )
        self.columns = {
            name: structure.match(
                updates, spec, slot, names=("updates", f"the state's {name}")
            )
            for name, slot in slots.items()
        }
        read = {name: now[name] for name in tx.reads if name in now}
        per_leaf = PerLeaf(updates, spec, read)
        self.now = [per_leaf.raw(i, at) for i, at in enumerate(places_of(gs))]

    def before(self) -> tuple[PyTree, PyTree | None]:
        """The updates and parameters that the inner transformation sees."""
        tx = self.tx
        pairs = []
        gradients_and_params = zip(self.gs, self.ps, strict=True)
        for i, (g, p) in enumerate(gradients_and_params):
            slots = {name: column[i] for name, column in self.columns.items()}
            lacks = p is None and "p" in tx.before_reads
            absent = lacks or any(x is None for x in slots.values())
            like = g if p is None else p
            given = (g, p, slots, self.now[i])
            pair = (g, p)
            if not absent:
                pair = tx.on_parts(tx.seen, like, *given)
            pairs.append(pair)
        seen = tree.unflatten(self.spec, [g for g, _ in pairs])
        if self.params is None:
            return seen, None
        moved = tree.unflatten(self.spec, [p for _, p in pairs])
        return seen, moved

    def after(self, us: list[Any]) -> tuple[PyTree, dict[str, PyTree]]:
        """The updates, and the new slots."""
        new_us: list[Any] = []
        new: dict[str, list[Any]] = {name: [] for name in self.columns}
        of_leaves = zip(us, self.gs, self.ps, strict=True)
        for i, (u, g, p) in enumerate(of_leaves):
            slots = {name: column[i] for name, column in self.columns.items()}
            if u is not None and g is not None:
                given = (u, g, p, slots, self.now[i])
                u, slots = self.tx.on_parts(self.tx.left, g, *given)
            new_us.append(u)
            for name, x in slots.items():
                new[name].append(x)
        slots_of = {
            name: structure.like(self.slots[name], self.spec, column)
            for name, column in new.items()
        }
        return tree.unflatten(self.spec, new_us), slots_of
