"""Rules of whole tensors and elementwise rules, one after another, without a compiler.

A body that needs whole tensors anywhere would see them whole everywhere, and make a new one at
every operation. So its entries are divided into turns. The elementwise ones among them see pieces
that stay in the cache, or small leaves joined, and leave the updates in memory of their own for the
next turn. A few leaves go through all turns before the next ones begin.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate, groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functorch_opt._execution.body import Body, Columns
from functorch_opt._execution.pieces import PIECE, Pieces, Rules, Whole, groups, plain
from functorch_opt._execution.writes import apart_from, memories, write

Way = Callable[[Body, list[Tensor], bool], Whole]
"""Finds out how leaves go through a body."""


class Turn(NamedTuple):
    """Consecutive entries of a body: which they are, and which tensors of a leaf are theirs.

    By themselves they are `alone`. Their update has this dtype; the last turn moves the parameter.
    """

    entries: slice
    slots: slice
    rows: slice
    alone: Body
    dtype: torch.dtype
    program: Whole

    @property
    def is_last(self) -> bool:
        return self.alone.into is None

    def body(self, of: Body) -> Body:
        """Its entries with the values of this step, which are of the kinds that they were."""
        now = of.now[self.entries]
        if any(of.exact):  # numbers that may have changed
            return Body(of.entries[self.entries], now, self.alone.into, False)
        return self.alone.with_values(now)

    def columns(self, us: Any, columns: list[Any]) -> list[Any]:
        """The columns that it needs, with the updates as they are now. Or one leaf's tensors."""
        return [us, columns[1], *columns[self.slots], *columns[self.rows]]


class ByTurns(Whole):
    """Leaves go through the turns, a large one alone and small ones in groups.

    Args:
        turns: all entries of a body.
        others: how leaves go that need no turns.
        needs_none: which parameters these have.
    """

    def __init__(
        self, turns: list[Turn], others: Whole, needs_none: Callable[[Tensor], bool]
    ) -> None:
        self.turns, self.others, self.needs_none = turns, others, needs_none

    def sizes(self, args: list[Tensor]) -> tuple[int, ...]:
        return (args[1].numel(),)

    @torch.no_grad()
    def run(
        self, columns: Columns, sizes: list[tuple[int, ...]], narrow: bool, body: Body
    ) -> None:
        others = [i for i, p in enumerate(columns[1]) if self.needs_none(p)]
        if not others:
            self._by_turns(columns, sizes, narrow, body)
            return
        self.others.run(_picked(columns, others), sizes, narrow, body)
        mine = [i for i, p in enumerate(columns[1]) if not self.needs_none(p)]
        if mine:
            of_mine = [sizes[i] for i in mine]
            self._by_turns(_picked(columns, mine), of_mine, narrow, body)

    def _by_turns(
        self, columns: Columns, sizes: list[tuple[int, ...]], narrow: bool, body: Body
    ) -> None:
        bodies = [turn.body(body) for turn in self.turns]
        for first, end in groups([n for (n,) in sizes], PIECE):
            group = [column[first:end] for column in columns]
            us = group[0]
            for turn, alone in zip(self.turns, bodies, strict=True):
                mine = turn.columns(us, group)
                in_pieces = isinstance(turn.program, Pieces)
                if not (turn.is_last or in_pieces) and len(us) == 1:
                    us = [_update(alone, [x for (x,) in mine], narrow)]
                    continue
                if not turn.is_last:
                    us = [torch.empty_like(p, dtype=turn.dtype) for p in group[1]]
                    mine.append(us)
                turn.program.run(mine, sizes[first:end], narrow, alone)


def _picked(columns: Columns, places: list[int]) -> Columns:
    return [[column[i] for i in places] for column in columns]


def turns_of(
    body: Body,
    leaf: list[Tensor],
    narrow: bool,
    way: Way,
) -> list[Turn]:
    """The turns of a body for leaves like `leaf`, each `way`; none if that is of no use."""
    kinds = [entry.rule_kind for entry in body.entries]
    on_host = leaf[1].device.type == "cpu"
    if not on_host or body.into is not None:
        return []
    if None in kinds or len({*kinds}) == 1:
        return []
    lengths = [len(entry.slots) for entry in body.entries]
    slots = [*accumulate(lengths, initial=2)]
    rows = [*accumulate(map(len, body.rows), initial=slots[-1])]
    turns: list[Turn] = []
    first = 0
    u = leaf[0]
    for _, of in groupby(kinds):
        end = first + len([*of])
        entries = slice(first, end)
        into = None if end == len(kinds) else rows[end] - rows[first]
        turn = Turn(
            entries,
            slice(slots[first], slots[end]),
            slice(rows[first], rows[end]),
            Body(body.entries[entries], body.now[entries], into, False),
            u.dtype,
            Whole(),
        )
        args = turn.columns(u, leaf)
        dtype = turn.alone.dtype_of_update(args)
        u = torch.empty_like(leaf[1], dtype=dtype)
        if not turn.is_last:
            args.append(u)
        program = way(turn.alone, args, narrow)
        turn.alone.now = []  # programs outlive the values of a step
        turns.append(turn._replace(dtype=dtype, program=program))
        first = end
    in_pieces = [isinstance(turn.program, Pieces) for turn in turns]
    return turns if any(in_pieces) else []


def _update(body: Body, leaf: list[Tensor], narrow: bool) -> Tensor:
    """Apply rules to one whole leaf, and return their update."""
    rules = Rules(*plain(body, narrow), None)
    args: list[Any] = [*leaf, leaf[0], *rules.scalars]
    writes, _ = rules.body.apart(args)
    kept = [(i, x) for i, x in writes if i != body.place]
    (u,) = [x for i, x in writes if i == body.place]
    u = apart_from({*memories([args[i] for i, _ in kept])} - {0}, u)
    write(args, kept, [])
    return u.contiguous()
