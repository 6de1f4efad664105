"""A rule applied to one tensor.

Here are what the rule reads, the dtype in which it computes, and the checks of what it returns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from functorch_opt import tree
from functorch_opt._core import numerics, sharding
from functorch_opt._core.decision import chosen, known
from functorch_opt._core.leaf import (
    Misfit,
    PerLeaf,
    enter,
    outline,
    places_of,
    working_dtype,
)
from functorch_opt._core.on_owner import on_owner
from functorch_opt._core.sums import Sums
from functorch_opt._core.transformation import positional
from functorch_opt.tree import PyTree

Kind = Literal["elementwise", "tensorwise"]
DUE = "_due"
"""The name of the decision whether the rare work of a rule is done at this step."""


class Every(NamedTuple):
    """Work of a rule that is done on some steps only; see `every`."""

    due: Callable[..., Any]
    work: Callable[..., Any]


class OneTensor:
    """A rule for one tensor, with its sums over the tensor and its work of some steps only."""

    def __init__(
        self,
        name: str,
        rule: Callable[..., Any],
        slots: Mapping[str, Any],
        sums: Mapping[str, Any],
        rare: Every | None,
        kind: Kind,
    ) -> None:
        self.name, self.rule, self.slots, self.kind = name, rule, slots, kind
        self.slot_names = tuple(slots)
        self.sums, self.has_sums = Sums(name, sums), bool(sums)
        self.work = rare.work if rare else None
        self.rule_reads = positional(rule)
        self.work_reads = positional(rare.work) if rare else ()
        kept = self.slot_names if rare else ()  # those of a step without the work
        names = dict.fromkeys(
            (*self.rule_reads, *self.sums.reads, *self.work_reads, *kept)
        )
        due = (DUE,) if rare else ()
        self.reads = (*due, *[name for name in names if name not in sums])
        """What the rule, the sums and the rare work read, except for the sums themselves."""
        self.is_plain = rare is None and not sums

    def result(self, values: dict[str, Any]) -> Any:
        """What the rule returns, after the rare work and the sums that it reads are done."""
        if self.work is not None:
            values = values | self.after_work(values)
        if self.has_sums:
            values = values | self.sums.of(values)
        return self.rule(*[values[name] for name in self.rule_reads])

    def after_work(self, values: dict[str, Any]) -> dict[str, Any]:
        """The slots that the rare work makes, if it is done at this step."""
        due = False if self.work is None else known(values[DUE])
        if due is False:
            return {}
        made = self.work(*[values[name] for name in self.work_reads])  # type: ignore[misc]
        if not isinstance(made, dict) or made.keys() - set(self.slot_names):
            raise TypeError(
                f"{self.name}: the work of every must return {{slot: new value}} with slots among "
                f"{sorted(self.slot_names)}; it returned {outline(made)}."
            )
        if due:
            return made
        flag = values[DUE]
        return {name: chosen(flag, x, values[name]) for name, x in made.items()}

    # ---- computed in one dtype ------------------------------------------------------------------

    def apply(
        self,
        g: Tensor,
        p: Tensor | None,
        slots: dict[str, Tensor],
        now: dict[str, Any],
        dtype: torch.dtype,
        exact: Mapping[str, Any] | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The rule on one tensor, computed in `dtype`. Slots come back in the dtype they had.

        An elementwise rule sees a complex tensor as pairs of reals, as torch.optim does. Of sharded
        tensors it gets this rank's parts, whereas a tensorwise rule gets wholes. The values in
        `exact` are not cast.
        """
        if type(g) is not Tensor and tree.is_sharded(g):
            p = p if "p" in self.reads else None
            if sharding.is_owned(g):
                return on_owner(self.apply, g, p, slots, now, dtype, exact)
            in_parts = self.kind == "elementwise"
            return sharding.on_shards(
                self.apply, in_parts, g, p, slots, now, dtype, exact
            )
        values = {**now, **slots, "g": g, "p": p}
        pairs = dtype.is_complex and self.kind == "elementwise"
        values |= self._entered(values, dtype, pairs)
        if exact:
            values |= exact
        try:
            result = self.result(values)
        except RuntimeError as error:
            self._explain(error, g, slots)
            raise
        if not slots:
            return self._leave(result, g, "the update", g, pairs), {}
        self.check_pair(result)
        u, new = result
        kept = {}
        for name, old in slots.items():
            x = self._leave(new[name], old, f"slot {name}", g, pairs)
            kept[name] = x if x.dtype is old.dtype else x.to(old.dtype)
        return self._leave(u, g, "the update", g, pairs), kept

    def _entered(
        self,
        values: dict[str, Any],
        dtype: torch.dtype,
        pairs: bool,
        names: tuple[str, ...] = (),
    ) -> dict[str, Any]:
        """What functions that read these `names` compute with, by default the rule and its sums."""
        names = tuple([name for name in names or self.reads if name in values])
        same = (
            not isinstance(x := values[name], Tensor) or x.dtype == dtype
            for name in names
        )
        if not pairs and all(same):
            return {}
        return {name: enter(values[name], dtype, pairs) for name in names}

    def _explain(self, error: RuntimeError, g: Tensor, slots: dict[str, Tensor]) -> None:
        """Raise Misfit if an error of the rule comes from slots that do not fit the update."""
        if isinstance(error, torch.OutOfMemoryError):
            return
        others = [
            f"{name}, {slot.dtype} of shape {tuple(slot.shape)}"
            for name, slot in slots.items()
            if not self._fits(name, slot, g)
        ]
        if others:
            raise Misfit(
                f"is {g.dtype} of shape {tuple(g.shape)}, and the state has {', '.join(others)}. "
                "Is the state that of other params?"
            ) from error

    def _fits(self, name: str, slot: Tensor, g: Tensor) -> bool:
        """Whether a slot is as the first one of a parameter like `g` would be."""
        try:
            first = self.slots[name](g)
        except (RuntimeError, TypeError, ValueError):
            return False
        return slot.shape == first.shape and slot.is_complex() == first.is_complex()

    def check_pair(self, result: Any) -> None:
        """Raise TypeError if a rule with slots did not return an update and all its slots."""
        pair = (
            isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], dict)
        )
        if not pair or result[1].keys() != set(self.slot_names):
            wanted = (
                f"(update, {{slot: new value}}) with the slots {sorted(self.slot_names)}"
            )
            given = outline(result)
            raise TypeError(
                f"{self.name}: rule must return {wanted}; it returned {given}."
            )

    def _leave(
        self,
        x: Any,
        like: Tensor,
        what: str,
        g: Tensor,
        pairs: bool,
    ) -> Tensor:
        """What the rule returned for `like`, checked.

        If the rule has broadcast, it has met a state of other params, or it is wrong.
        """
        if (
            type(x) is Tensor
            and x.dtype is like.dtype
            and x.shape == like.shape
            and not pairs
        ):
            return x
        if not isinstance(x, Tensor):
            given = f"{type(x).__name__} {x!r} as {what}"
            raise TypeError(f"{self.name}: rule returned {given}; it must be a tensor.")
        if pairs and like.is_complex():
            x = torch.view_as_complex(x.contiguous())
        if x.shape != like.shape or (x.is_complex() and not like.is_complex()):
            raise Misfit(
                f"is {g.dtype} of shape {tuple(g.shape)}, and the rule made of {what}, "
                f"{like.dtype} of shape {tuple(like.shape)}, {x.dtype} of shape {tuple(x.shape)}. "
                "Is the state that of other params?"
            )
        return x

    # ---- sums that are known before the rule ----------------------------------------------------

    def values_of_leaves(
        self,
        gs: list[Any],
        ps: list[Any],
        slots: dict[str, list[Any]],
        per_leaf: PerLeaf,
        names: tuple[str, ...],
    ) -> list[dict[str, Any] | None]:
        """For each leaf, what functions of it read. Of sharded leaves it is this rank's part."""
        rows: list[dict[str, Any] | None] = []
        for i, (g, p, at) in enumerate(zip(gs, ps, places_of(gs), strict=True)):
            if g is None:
                rows.append(None)
                continue
            held = {name: column[i] for name, column in slots.items()}
            dtype = working_dtype(g, p if "p" in names else None, *held.values())
            all_values = {**per_leaf.at(i, dtype, at), **held, "g": g, "p": p}
            values = {name: tree.part_of(x, g) for name, x in all_values.items()}
            rows.append(values | self._entered(values, dtype, dtype.is_complex, names))
        return rows


def _as_tensor(x: Any, like: Tensor) -> Tensor:
    dtype = numerics.real_dtype(like.device) if isinstance(x, float) else None
    return numerics.beside(x, like, dtype)


def sums_of_leaves(
    sums: Sums, rows: list[dict[str, Any] | None], gs: list[Any]
) -> dict[str, list[Any]]:
    """The sums over each leaf. Those over sharded leaves are joined over the ranks."""
    in_parts = sharding.any_sharded(gs)
    found: list[dict[str, Any]] = []
    errors: list[Exception] = []
    for values in rows:
        if values is None:
            found.append(dict.fromkeys(sums.functions))
            continue
        try:
            of = sums.of(values, in_parts)
        except Exception as error:
            if not in_parts or torch.compiler.is_compiling():
                raise
            errors.append(
                error
            )  # the other ranks wait for a message, and learn of it there
            of = dict.fromkeys(sums.functions, math.nan)
        found.append({name: _as_tensor(x, values["g"]) for name, x in of.items()})
    if in_parts:
        return sums.joined_over_ranks(found, gs, errors)
    return {name: [row[name] for row in found] for name in sums.functions}


def leaf_values(
    updates: PyTree, now: Mapping[str, Any], names: tuple[str, ...]
) -> PerLeaf:
    """The values of a step that functions of one tensor read."""
    spec = tree.flatten(updates)[1]
    return PerLeaf(updates, spec, {name: now[name] for name in names if name in now})
