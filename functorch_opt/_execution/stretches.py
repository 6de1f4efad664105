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
    """Entries of a body, of which `end` is the first behind it, and how a tensor goes through."""

    first: int
    end: int
    how: Whole


class Stretches(Whole):
    """Leaves that are larger than a piece go through the rules in stretches.

    Args:
        stretches: of all entries, in order.
        small: how the other leaves go.
    """

    def __init__(self, stretches: list[Stretch], small: Whole) -> None:
        self.stretches = stretches
        self.small = small
        self.dtypes: dict[tuple[int, torch.dtype], torch.dtype] = {}
        """Of the update behind a stretch, by the dtype of the one before it."""

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
        parts = [part_of(body, first, end) for first, end, _ in self.stretches]
        for leaf in leaves:
            if leaf[1].numel() > most:
                self._go(Leaf(leaf, body), parts, narrow)

    def _go(self, leaf: Leaf, parts: list[Body], narrow: bool) -> None:
        """Let one leaf go through all parts."""
        for k, part in enumerate(parts):
            how = self.stretches[k].how
            args = leaf.arguments(part)
            if part is not parts[-1] and not isinstance(how, Pieces):
                leaf.u = _whole(part, args, narrow)
                continue
            if part is not parts[-1]:
                leaf.u = torch.empty_like(leaf.p, dtype=self._dtype(k, part, args))
                args.append(leaf.u)
            else:
                args += leaf.target
            columns = [[x] for x in args]
            how.run(columns, [(leaf.p.numel(),)], narrow, part)

    def _dtype(self, k: int, part: Body, args: list[Tensor]) -> torch.dtype:
        key = k, args[0].dtype
        if key not in self.dtypes:
            self.dtypes[key] = _dtype_behind(part, args)
        return self.dtypes[key]


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


def _dtype_behind(part: Body, args: list[Tensor]) -> torch.dtype:
    return part.dtype_of_update([*args, args[0]])


def part_of(body: Body, first: int, end: int) -> Body:
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


# ---- a trial -------------------------------------------------------------------------------------


def eagerly(body: Body, leaf: list[Tensor], narrow: bool) -> Whole:
    """How leaves like `leaf` go through the rules where nothing is compiled."""
    otherwise = if_stackable if body.whole else in_pieces
    small = otherwise(body, leaf, narrow)
    if isinstance(small, Pieces) or not any(map(_sees_the_whole, body.entries)):
        return small
    over_a_row = body.into is not None and body.into < body.n_rows
    if any(body.blocks) or over_a_row:
        return small
    stretches = [*_stretches(body, leaf, narrow)]
    if any(isinstance(stretch.how, Pieces) for stretch in stretches):
        return Stretches(stretches, small)
    return small


def _stretches(body: Body, tensors: list[Tensor], narrow: bool) -> Iterator[Stretch]:
    body, _ = plain(body, narrow)
    leaf = Leaf(tuple(tensors), body)
    for first, end, is_whole in _ranges(body.entries):
        part = part_of(body, first, end)
        args = leaf.arguments(part)
        leaf.u = torch.empty_like(leaf.p, dtype=_dtype_behind(part, args))
        if part.place is not None:
            args.append(leaf.u)
        how = Whole() if is_whole else in_pieces(part, args, narrow)
        yield Stretch(first, end, how)


def _sees_the_whole(entry: Entry) -> bool:
    return entry.rule_kind == "tensorwise" or entry.looks_beside


def _ranges(entries: list[Entry]) -> Iterator[tuple[int, int, bool]]:
    """Where stretches begin and end, and whether one needs whole tensors.

    What a wrapper or a gate has inside stays together.
    """
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
        yield first, end, is_whole
