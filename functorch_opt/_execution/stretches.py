"""Large tensors through rules of both kinds: what is elementwise in pieces, the others whole.

A rule that needs a whole tensor needs its update whole, but the rules before it and behind it do
not. So the rules of a large tensor are taken in stretches, one after the other. Between two of them
the update lies in memory of its own.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import groupby, islice
from operator import itemgetter
from typing import NamedTuple

import torch
from torch import Tensor

from functorch_opt._execution.body import Body, Columns, Entry
from functorch_opt._execution.pieces import Pieces, Whole, in_pieces, most_of, plain
from functorch_opt._execution.stacked import if_stackable
from functorch_opt._execution.writes import apart_from, memories, write

OF_AN_ENTRY = ("entries", "now", "fixed", "exact", "shared", "rows")
"""Where a body has something for each of its entries."""
WORKED_OUT = ("with_constants", "narrowed", "row")
"""What a body works out of its entries when it is asked."""
STEPS_INTO = {"enter": 1, "open": 1, "leave": -1, "close": -1}


class Stretch(NamedTuple):
    """Entries of a body, of which `end` is the first behind it."""

    first: int
    end: int
    is_whole: bool
    """Whether one of them needs whole tensors."""


class Stretches(Whole):
    """Leaves that are larger than a piece go through the rules in stretches.

    Args:
        stretches: all entries, in order.
        small: how the other leaves go.
    """

    def __init__(self, stretches: list[Stretch], small: Whole) -> None:
        self.stretches = stretches
        self.small = small
        self.known: dict[tuple[int, torch.dtype], tuple[Whole, torch.dtype]] = {}
        """How leaves go through a stretch, and the dtype of the update behind it; by the dtype of
        the one before it."""

    def run(
        self,
        columns: Columns,
        sizes: list[tuple[int, ...]],
        narrow: bool,
        body: Body,
    ) -> None:
        most = most_of(columns[1][0])
        leaves = [*zip(*columns, strict=True)]
        small = [leaf for leaf in leaves if leaf[1].numel() <= most]
        if small:
            rest = [[*column] for column in zip(*small, strict=True)]
            self.small.run(rest, [()] * len(small), narrow, body)
        if len(small) == len(leaves):
            return
        body, _ = plain(body, narrow)
        parts = [body_of(body, first, end) for first, end, _ in self.stretches]
        for leaf in leaves:
            if leaf[1].numel() > most:
                self._go(Leaf(leaf, body), parts, narrow)

    def _go(self, leaf: Leaf, parts: list[Body], narrow: bool) -> None:
        """Let one leaf go through all parts."""
        for k, part in enumerate(parts):
            args = leaf.arguments(part)
            is_last = part is parts[-1]
            if self.stretches[k].is_whole and not is_last:
                leaf.u = _whole(part, args, narrow)
                continue
            how, dtype = self._how(k, part, args, narrow)
            if not is_last:
                leaf.u = torch.empty_like(leaf.p, dtype=dtype)
            args += leaf.target if is_last else [leaf.u]
            columns = [[x] for x in args]
            how.run(columns, [(leaf.p.numel(),)], narrow, part)

    def _how(
        self, k: int, part: Body, args: list[Tensor], narrow: bool
    ) -> tuple[Whole, torch.dtype]:
        u, p = args[:2]
        if self.stretches[k].is_whole:
            return Whole(), u.dtype
        if (k, u.dtype) not in self.known:
            new = [] if part.place is None else [u]
            dtype = part.dtype_of_update([*args, *new])
            behind = [torch.empty_like(p, dtype=dtype) for _ in new]
            how = in_pieces(part, [*args, *behind], narrow)
            self.known[k, u.dtype] = how, dtype
        return self.known[k, u.dtype]


class Leaf:
    """The tensors of a leaf, as the parts of a body take them: `u` is the update so far."""

    def __init__(self, leaf: tuple[Tensor, ...], body: Body) -> None:
        self.u, self.p = leaf[:2]
        end = 2 + body.n_slots
        self.slots = iter(leaf[2:end])
        self.rows = iter(leaf[end:])
        self.target = [] if body.place is None else [leaf[body.place]]
        """What the update is written into in the end, unless it is added to the parameter."""

    def arguments(self, part: Body) -> list[Tensor]:
        """The update, the parameter, and the slots and rows of the next part."""
        args = [self.u, self.p]
        args += islice(self.slots, part.n_slots)
        args += islice(self.rows, part.n_rows)
        return args


@torch.no_grad()
def _whole(part: Body, args: list[Tensor], narrow: bool) -> Tensor:
    """The update that comes out of a part that is not the last, of a whole tensor."""
    scalars = part.narrowed if narrow else part.scalars
    found, _ = part.apart([*args, args[0], *scalars])
    *writes, (_, u) = found
    targets = [args[i] for i, x in writes if x is not args[i]]
    u = apart_from({*memories(targets)} - {0}, u)
    write(args, writes, [])
    return u.contiguous()


def body_of(body: Body, first: int, end: int) -> Body:
    """Some of the entries of `body`, as a body.

    Unless they are the last, the update that comes out of them is written behind their rows.
    """
    part = copy.copy(body)
    for name in WORKED_OUT:
        vars(part).pop(name, None)
    for name in OF_AN_ENTRY:
        setattr(part, name, getattr(body, name)[first:end])
    part.scalars = []
    for shared, exact in zip(part.shared, part.exact, strict=True):
        part.scalars += [*shared.values(), *exact.values()]
    part.n_rows = sum(map(len, part.rows))
    part.n_slots = sum(len(entry.slots) for entry in part.entries)
    part.width = 2 + part.n_slots + part.n_rows
    is_last = end == len(body.entries)
    part.into = part.place = None
    if body.place is not None or not is_last:
        part.into, part.place = part.n_rows, part.width
        part.width += 1
    return part


# ---- which ---------------------------------------------------------------------------------------


def eagerly(body: Body, leaf: list[Tensor], narrow: bool) -> Whole:
    """How leaves like `leaf` go through the rules where nothing is compiled."""
    otherwise = if_stackable if body.whole else in_pieces
    small = otherwise(body, leaf, narrow)
    if isinstance(small, Pieces) or not any(map(_sees_the_whole, body.entries)):
        return small
    over_a_row = body.into is not None and body.into < body.n_rows
    if any(body.blocks) or over_a_row:
        return small
    stretches = [*_stretches(body.entries)]
    return Stretches(stretches, small) if len(stretches) > 1 else small


def _sees_the_whole(entry: Entry) -> bool:
    return entry.rule_kind == "tensorwise" or entry.looks_beside


def _stretches(entries: list[Entry]) -> Iterator[Stretch]:
    """What a wrapper or a gate has inside stays together."""
    units: list[tuple[int, bool]] = []
    depth = 0
    for k, entry in enumerate(entries):
        is_whole = _sees_the_whole(entry)
        if depth == 0:
            units.append((k, is_whole))
        elif is_whole:
            first, _ = units.pop()
            units.append((first, True))
        depth += STEPS_INTO.get(entry.kind, 0)
    starts = [next(group) for _, group in groupby(units, itemgetter(1))]
    ends = [first for first, _ in starts[1:]]
    ends.append(len(entries))
    for (first, is_whole), end in zip(starts, ends, strict=True):
        yield Stretch(first, end, is_whole)
