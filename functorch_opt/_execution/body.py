"""What becomes of one leaf: the rules of consecutive stages as one pure function.

That function is what is compiled.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from functorch_opt import tree
from functorch_opt._core.decision import chosen
from functorch_opt._core.gate import Gate
from functorch_opt._core.leaf import Each, brought_to, check_value, working_dtype
from functorch_opt._core.rule import Block, Leafwise
from functorch_opt._core.wrap import Wrap
from functorch_opt._execution.guards import Meaning
from functorch_opt._execution.writes import Writes
from functorch_opt.tree import zeros_like

Columns = list[list[Any]]
"""The updates, parameters, slots and rows of some leaves: a list of leaves for each."""
Kind = Literal["rule", "enter", "leave", "zero", "open", "close", "shut"]
Stage = Leafwise | Wrap | Gate
ACTIVE = "_active"


class Entry:
    """One thing that happens to a leaf.

    rule    The rule of a stage.
    enter   From here on, stages see the update and parameter that a wrapper shows them.
    leave   The wrapper makes of their update its own.
    zero    The update becomes zero.
    open    From here on, stages are behind a gate whose decision only the device knows, and which
            passes updates on if it is not open.
    close   The decision chooses between their update and the one that came in.
    shut    The same of a gate whose updates are zero if it is not open.
    """

    def __init__(self, kind: Kind, stage: Stage | None = None) -> None:
        self.kind = kind
        self.stage = stage
        self.name = stage.name if stage else kind
        self.slots: tuple[str, ...] = ()
        """The slots that it brings."""
        if isinstance(stage, (Leafwise, Wrap)) and kind != "leave":
            self.slots = tuple(stage.slots)
        self.rule_kind = stage.kind if isinstance(stage, Leafwise) else None
        """Whether it is an elementwise or a tensorwise rule; None if it is no rule."""
        self.blocks: Mapping[str, Block] = {}
        """Of slots that have other sizes than the parameter, how large they are."""
        self.stored: Any = None
        self.looks_beside = False
        """Whether the rule, though elementwise, needs more of the tensor than a block of it."""
        if isinstance(stage, Leafwise):
            self.blocks, self.stored = stage.blocks, stage.stored
            self.looks_beside = stage.has_sums or stage.on_tensor.work is not None
        self.functions = self._functions()
        self.meanings = [Meaning(f) for f in self.functions]

    def _functions(self) -> list[Callable[..., Any]]:
        """What user's code it runs."""
        if isinstance(self.stage, Leafwise):
            rule = self.stage.on_tensor
            return [
                rule.rule,
                *rule.sums.functions.values(),
                *([rule.work] if rule.work else []),
            ]
        if isinstance(self.stage, Wrap) and self.kind == "enter":
            return [f for f in (self.stage.before, self.stage.after) if f is not None]
        return []

    @cached_property
    def reads(self) -> Any:
        """The names that its functions read."""
        if isinstance(self.stage, Leafwise):
            return self.stage.on_tensor.reads
        if isinstance(self.stage, Wrap):
            return self.stage.before_reads, self.stage.after_reads
        return ()

    @property
    def meaning(self) -> Any:
        """What it computes, as a key."""
        if not self.functions:
            return self.kind, None
        of_functions = tuple([meaning.now() for meaning in self.meanings])
        of_stage = self.slots, self.reads, self.rule_kind, self.stored
        return self.kind, of_functions, *of_stage

    @property
    def unknown(self) -> str | None:
        """What it reads that nobody can look into."""
        return next((m.unknown for m in self.meanings if m.unknown), None)


def entry_of(kind: Kind, stage: Stage) -> Entry:
    """The entry of a stage. It is worked out once, and kept with the stage."""
    kept: dict[str, Entry] = vars(stage).setdefault("_entries", {})
    if kind not in kept:
        kept[kind] = Entry(kind, stage)
    return kept[kind]


class Body:
    """The entries of one kind of leaf: what is compiled, and what runs where that cannot be.

    It is called with a list: for every leaf its update, parameter, slots and rows (values of its
    own); then the scalars that all leaves have in common. It returns what is to be written, as
    positions in that list and new values. Updates are added to the parameters, or written `into` a
    row: over a value that has been read, or behind the others.

    A number is a constant of the compiled code, or, with `as_inputs`, one of its scalars.
    """

    def __init__(
        self,
        entries: list[Entry],
        now: list[dict[str, Any]],
        into: int | None,
        as_inputs: bool,
    ) -> None:
        self.entries, self.now, self.into = entries, now, into
        self.blocks = [
            entry.blocks.get(name) for entry in entries for name in entry.slots
        ]
        """For each slot of another size than the parameter: entries for a block of elements."""
        self.whole = any(
            entry.rule_kind == "tensorwise" or (entry.looks_beside and any(self.blocks))
            for entry in entries
        )
        self.fixed: list[dict[str, Any]] = []
        self.exact: list[dict[str, Tensor]] = []
        self.shared: list[dict[str, Tensor]] = []
        self.rows: list[list[str]] = []
        for of in now:
            self._sort(of, as_inputs)
        pairs = zip(self.shared, self.exact, strict=True)
        self.scalars = [x for pair in pairs for of in pair for x in of.values()]
        n_exact = [x for of in self.exact for x in of.values()]
        self.kept_wide = {id(x) for x in n_exact}
        self.n_rows = sum(map(len, self.rows))
        self.n_slots = sum(len(entry.slots) for entry in entries)
        self.width = 2 + self.n_slots + self.n_rows + (into == self.n_rows)
        self.place = None if into is None else 2 + self.n_slots + into
        tensors = tuple(
            [(n, x.dtype, x.device) for of in self.shared for n, x in of.items()]
        )
        names = tuple(
            [(*of, *rows) for of, rows in zip(self.shared, self.rows, strict=True)]
        )
        self.base = tuple([entry.meaning for entry in entries]), into, tensors, names
        self.numbers = tuple([written(of) for of in self.fixed])
        kinds = [(n, x.dtype) for of in self.exact for n, x in of.items()]
        lengths = [*map(len, self.exact)]
        self.key = self.base, self.numbers, tuple(kinds), tuple(lengths)

    def renewed(self, now: list[dict[str, Any]]) -> Body | None:
        """The same entries with the values of another step; None if something has to be looked at.

        It is asked again what the functions compute. Numbers must be what they were, and tensors of
        the same kinds.
        """
        if tuple([entry.meaning for entry in self.entries]) != self.base[0]:
            return None
        for before, of in zip(self.now, now, strict=True):
            if before.keys() != of.keys() or not all(
                map(is_of_kind, before.values(), of.values())
            ):
                return None
        return self.filled(now)

    def on(self, device: torch.device) -> Body:
        """The same for leaves on one of several devices: its values are brought there."""
        pairs = [of.items() for of in self.now]
        now = [{name: brought_to(x, device) for name, x in of} for of in pairs]
        return self.filled(now)

    def filled(self, now: list[dict[str, Any]]) -> Body:
        """The same entries with other values, which are of the same kinds."""
        shared = [
            {name: of[name] for name in mine}
            for mine, of in zip(self.shared, now, strict=True)
        ]
        pairs = zip(shared, self.exact, strict=True)
        new = self.given_scalars(
            [x for pair in pairs for of in pair for x in of.values()]
        )
        new.now, new.shared = now, shared
        return new

    def given_scalars(self, scalars: list[Tensor]) -> Body:
        """The same entries with other scalars, for compiled code, which asks for nothing else."""
        new = copy.copy(self)
        new.forget_values()
        new.scalars = scalars
        return new

    def forget_values(self) -> None:
        """Let go of what was worked out of the values of scalars: they hold others now."""
        vars(self).pop("with_constants", None)
        vars(self).pop("narrowed", None)

    @cached_property
    def with_constants(self) -> Body:
        """The same with numbers as they are: how it runs where it is not compiled."""
        return Body(self.entries, self.now, self.into, False) if any(self.exact) else self

    @cached_property
    def narrowed(self) -> list[Tensor]:
        """The scalars, those of float64 in float32.

        A rule would do this itself, but a kernel would do it again for every vector of every
        tensor. Numbers that became inputs stay what they were.
        """
        wide = [x for x, is_wide in zip(self.scalars, self.wide, strict=True) if is_wide]
        if not wide or len({x.device for x in wide}) > 1:
            return self.scalars
        left = iter(torch.stack(wide).to(torch.float32).unbind())
        pairs = zip(self.scalars, self.wide, strict=True)
        return [next(left) if is_wide else x for x, is_wide in pairs]

    def given(self, narrow: bool) -> list[Tensor]:
        """The scalars that compiled code is given, for rules that compute in float32 or not.

        To make a number narrow costs nothing on the host. On a device it would be a launch of its
        own, so it is made narrow where it is read.
        """
        on_host = all(x.device.type == "cpu" for x in self.scalars)
        return self.narrowed if narrow and on_host else self.scalars

    @property
    def wide(self) -> list[bool]:
        """For each scalar, whether a rule that computes in float32 takes it so."""
        kept = self.kept_wide
        return [x.dtype is torch.float64 and id(x) not in kept for x in self.scalars]

    def _sort(self, now: dict[str, Any], as_inputs: bool) -> None:
        fixed, exact, shared, rows = {}, {}, {}, []
        for name, x in now.items():
            check_value(name, x)
            if isinstance(x, Each) or (isinstance(x, Tensor) and x.dim()):
                rows.append(name)
            elif isinstance(x, Tensor):
                shared[name] = x
            elif as_inputs and not isinstance(x, bool):
                dtype = torch.float64 if isinstance(x, float) else torch.int64
                exact[name] = torch.tensor(x, dtype=dtype)
            else:
                fixed[name] = x
        self.fixed.append(fixed)
        self.exact.append(exact)
        self.shared.append(shared)
        self.rows.append(rows)

    def dtype_of_update(self, leaf: list[Tensor]) -> torch.dtype:
        """The dtype of the update that the rules make of a leaf, which they may choose.

        Rules that cannot be followed without numbers are not compiled either, and give a warning.
        """
        plain = self.with_constants
        scalars = [x.to("meta") for x in plain.scalars]
        one = _Leaf(plain, [tree.part_of(x).to("meta") for x in leaf], scalars)
        try:
            one.update()
        except Exception:
            return tree.at_least_float32(leaf[0].dtype)
        return one.u.dtype

    @cached_property
    def row(self) -> int:
        """How many elements it takes at a time, if slots have entries for blocks; otherwise 0."""
        sizes = [block.elements for block in filter(None, self.blocks)]
        return 0 if self.whole or not sizes else math.lcm(*sizes)

    @property
    def unknown(self) -> tuple[str, str] | None:
        """The stage that reads something that nobody can look into, and what that is."""
        for entry in self.entries:
            if what := entry.unknown:
                return entry.name, what
        return None

    def __call__(self, args: list[Tensor]) -> Writes:
        writes, moves = self.apart(args)
        return [*writes, *[(i, args[i] + u) for i, u in moves]]

    def apart(self, args: list[Tensor]) -> tuple[Writes, Writes]:
        """What is to be written; and apart from it, what is to be added to parameters."""
        end = len(args) - len(self.scalars)
        writes: Writes = []
        moves: Writes = []
        for k in range(0, end, self.width):
            leaf = _Leaf(self, args[k : k + self.width], args[end:])
            moves += [(k + 1, u) for u in leaf.update()]
            writes += [(k + i, x) for i, x in leaf.new]
        return writes, moves


class _Leaf:
    """One leaf on its way through the entries of a body."""

    def __init__(self, body: Body, args: list[Tensor], scalars: list[Tensor]) -> None:
        self.body, self.args = body, args
        self.u, self.p, *rest = args
        self.slots = iter(enumerate(rest[: body.n_slots], 2))
        self.rows = iter(rest[body.n_slots :])
        self.scalars = iter(scalars)
        self.stack: list[tuple[Any, ...]] = []
        self.new: Writes = []
        """What is to be written, as positions among the tensors of this leaf and new values."""

    def update(self) -> list[Tensor]:
        """Work out what is new. The update, if there is one to be added to the parameter."""
        seen, incoming = self.p, self.u
        zero: Tensor | None = None
        b = self.body
        for entry, fixed, exact, shared, rows in zip(
            b.entries, b.fixed, b.exact, b.shared, b.rows, strict=True
        ):
            now = {**fixed, **{name: next(self.scalars) for name in shared}}
            wide = {name: next(self.scalars) for name in exact}
            now |= {name: next(self.rows) for name in rows}
            stage = entry.stage
            if isinstance(stage, Leafwise):
                self._rule(stage, seen, now, wide)
            elif isinstance(stage, Wrap) and entry.kind == "enter":
                seen = self._enter(stage, seen, {**now, **wide})
            elif isinstance(stage, Wrap):
                seen = self._leave()
            elif isinstance(stage, Gate) and entry.kind == "open":
                self.stack.append((self.u, now[ACTIVE]))
            elif isinstance(stage, Gate):
                before, active = self.stack.pop()
                self.u = chosen(active, self.u, before)  # type: ignore[assignment]
            elif entry.kind == "shut":
                self.u = chosen(now[ACTIVE], self.u, zeros_like(self.u))  # type: ignore[assignment]
            else:
                self.u = zero = zeros_like(self.u)
        if b.place is not None:
            self.new.append((b.place, self.u))
            return []
        if self.u is zero or (not b.entries and incoming is not self.u):
            return []  # nothing moves the parameter
        return [self.u]

    def _mine(self, stage: Leafwise | Wrap) -> dict[str, tuple[int, Tensor]]:
        return {name: next(self.slots) for name in stage.slots}

    def _rule(
        self, stage: Leafwise, seen: Tensor, now: dict[str, Any], wide: Any
    ) -> None:
        mine = self._mine(stage)
        slots = {name: x for name, (_, x) in mine.items()}
        active = now.pop(ACTIVE, True)
        reads_p = "p" in stage.reads
        dtype = working_dtype(self.u, seen if reads_p else None, *slots.values())
        self.u, new = stage.on_tensor.apply(self.u, seen, slots, now, dtype, wide)
        self._keep(mine, new, active)

    def _enter(self, stage: Wrap, seen: Tensor, now: dict[str, Any]) -> Tensor:
        mine = self._mine(stage)
        slots = {name: x for name, (_, x) in mine.items()}
        self.stack.append((stage, self.u, seen, mine, now))
        self.u, seen = stage.seen(self.u, seen, slots, now)
        return seen

    def _leave(self) -> Tensor:
        stage, g, seen, mine, now = self.stack.pop()
        slots = {name: x for name, (_, x) in mine.items()}
        self.u, new = stage.left(self.u, g, seen, slots, now)
        self._keep(mine, new, now.get(ACTIVE, True))
        return seen

    def _keep(self, mine: Any, new: dict[str, Tensor], active: Any) -> None:
        for name, (place, old) in mine.items():
            x = chosen(active, new[name], old)
            self.new.append((place, x))  # type: ignore[arg-type]


def is_of_kind(before: Any, x: Any) -> bool:
    """Whether code that was made for one value takes another as it is."""
    if x is before:
        return True
    if type(x) is not type(before):
        return False
    if isinstance(x, Tensor):
        same = x.dtype is before.dtype and x.dim() == before.dim()
        return same and x.device == before.device
    if isinstance(x, Each):
        return True
    return bool(x == before) and _sign(x) == _sign(before)


def written(fixed: dict[str, Any]) -> Any:
    """Numbers as a key: 1 is not True, and 0.0 is not -0.0."""
    return tuple([(name, type(x), repr(x), _sign(x)) for name, x in fixed.items()])


def _sign(x: Any) -> float:
    return math.copysign(1.0, x) if isinstance(x, float) else 0.0
