"""Slots that have an entry for each block of elements: such tensors go through rules row by row.

A row is as many elements as the blocks of all slots have in common. Seen so, a parameter is a
matrix of rows, and so is each slot, with as many columns as it has entries for a row. Rules are
elementwise, and what is worked out for a block is worked out along a row. What is left at the end,
fewer elements than a row, goes through the rules by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functorch_opt._core.rule import Block
from functorch_opt._execution.body import Body, Columns
from functorch_opt._execution.pieces import Rules, Whole, most_of, plain, same
from functorch_opt._execution.trials import drawn
from functorch_opt._execution.writes import Pure, Writes


class Rows(Whole):
    """Tensors go through the rules row by row, with `program` where there is one."""

    def __init__(self, body: Body, program: Any = None) -> None:
        self.program = None if type(program) is Whole else program
        self.blocks = body.blocks
        self.row = body.row

    def run(
        self,
        columns: Columns,
        sizes: list[tuple[int, ...]],
        narrow: bool,
        body: Body,
    ) -> None:
        rules = Rules(*plain(body, narrow), None)
        given = body.given(narrow)
        for leaf in zip(*columns, strict=True):
            main, rest = in_rows_and_rest([*leaf], body)
            if main:
                self._run_rows(main, rules, given)
            if rest:
                rules.apply(rest)

    def _run_rows(
        self,
        main: list[Tensor],
        rules: Rules,
        given: list[Tensor],
    ) -> None:
        fits: dict[int, bool] = {}  # all pieces but the last have the same sizes
        for piece in _pieces(main):
            # Compiled code keeps values between its loops, and so it gets pieces too.
            args = [*piece, *given]
            size = len(piece[1])
            if self.program and size not in fits:
                fits[size] = self.program.fits(args)
            if self.program and fits[size]:
                self.program(args)
            else:
                rules.apply(piece)


def in_rows(
    body: Body,
    leaf: list[Tensor],
    scalars: list[Tensor],
    made: Callable[..., Any] | None,
    *how: Any,
) -> Whole:
    """How tensors like those of `leaf` go through the rules.

    `made` compiles, of examples and of `how`; None: nothing is compiled.
    """
    p_and_slots = leaf[1 : 2 + body.n_slots]
    if not all(x.dim() for x in p_and_slots):
        return Whole()
    if made is not None:
        examples = [*example_rows(body, leaf), *scalars]
        return Rows(body, made(examples, *how))
    try:
        return Rows(body) if _may_be_split(body, leaf) else Whole()
    except Exception:
        return Whole()  # the tensors themselves say what is wrong


def has_size(
    x: Tensor,
    p: Tensor,
    block: Block | None,
) -> bool:
    """Whether `x` has the shape of `p`, or if it has entries for blocks, as many as there are."""
    if block is None or x.dtype is not block.dtype:
        return x.shape == p.shape
    return x.numel() in (0, _entries(p.numel(), block))


def with_sizes_settled(body: Body) -> Pure:
    """The body, for which the length of a row is a number in a trace."""

    def settled(args: list[Any]) -> Writes:
        if body.row and args[1].dim() == 2:
            for x, block in _columns(args[: body.width], body):
                assert x.dim() < 2 or x.shape[1] == _entries(body.row, block)
        return body(args)

    return settled


def _entries(n: int, block: Block | None) -> int:
    """How many entries there are for `n` elements."""
    return n if block is None else block.size(n)


class _Column(NamedTuple):
    """One of the tensors of a leaf, and what it has entries for."""

    x: Tensor
    block: Block | None

    @property
    def is_uncut(self) -> bool:
        """Whether every row sees all of it: one number, or nothing."""
        return not self.x.dim() or not self.x.numel()

    def entries(self, n: int) -> int:
        return _entries(n, self.block)

    def cut(self, n_rows: int, row: int) -> tuple[Tensor, Tensor]:
        """So many rows of `row` elements; and what is left, as one row."""
        if self.is_uncut:
            return self.x, self.x
        width = self.entries(row)
        end = n_rows * width
        flat = self.x.view(-1)
        return flat[:end].view(-1, width), flat[end:].view(1, -1)


def _columns(leaf: list[Tensor], body: Body) -> list[_Column]:
    """The update, the parameter, the slots, and what else the rules read of a leaf."""
    blocks: list[Block | None] = [None, None, *body.blocks]
    blocks += [None] * (len(leaf) - len(blocks))
    pairs = zip(leaf, blocks, strict=True)
    return [_Column(x, of if of and of.dtype is x.dtype else None) for x, of in pairs]


def _has_blocks(columns: list[_Column]) -> bool:
    """Whether any tensor of the leaf has an entry for several elements."""
    blocked = [column.x for column in columns if column.block is not None]
    return any(x.numel() for x in blocked)


def in_rows_and_rest(leaf: list[Tensor], body: Body) -> tuple[list[Tensor], list[Tensor]]:
    """The tensors of a leaf as matrices of rows, and the elements that are left, as rows of one.

    A leaf without blocks is all in one row.
    """
    columns = _columns(leaf, body)
    if not _has_blocks(columns):
        return [x.view(-1) if x.dim() else x for x in leaf], []
    n_rows, n_left = divmod(leaf[1].numel(), body.row)
    main: list[Tensor] = []
    rest: list[Tensor] = []
    for column in columns:
        rows, left = column.cut(n_rows, body.row)
        if n_rows:
            main.append(rows)
        if n_left:
            rest.append(left)
    return main, rest


def _rows(
    main: list[Tensor],
    begin: int,
    end: int,
) -> list[Tensor]:
    """Some of the rows, and what every row sees all of."""
    dim = main[1].dim()
    found = []
    for x in main:
        has_rows = x.dim() == dim and x.numel()
        found.append(x[begin:end] if has_rows else x)
    return found


def _pieces(main: list[Tensor]) -> Iterator[list[Tensor]]:
    """Some rows at a time."""
    p = main[1]
    step = most_of(p)
    if p.dim() == 2:
        step = max(1, step // p.shape[1])
    for begin in range(0, max(len(p), 1), step):
        yield _rows(main, begin, begin + step)


def example_rows(body: Body, leaf: list[Tensor]) -> list[Tensor]:
    """Tensors like those of `leaf`, in rows, to trace the body with."""
    columns = _columns(leaf, body)
    has_blocks = _has_blocks(columns)
    n_rows = max(2, leaf[1].numel() // body.row)
    found = []
    for column in columns:
        x = column.x
        if column.is_uncut:
            found.append(x.detach())
            continue
        shape = [x.numel()]
        if has_blocks:
            shape = [n_rows, column.entries(body.row)]
        found.append(torch.empty(shape, dtype=x.dtype, device=x.device))
    return found


def _may_be_split(body: Body, leaf: list[Tensor]) -> bool:
    """Whether every row goes its own way: small tensors give the same numbers as they are."""
    narrow = not any(x.dtype is torch.float64 for x in leaf)
    rules = Rules(*plain(body, narrow), None)
    args = drawn(_shapes_of_two_rows(body, leaf), leaf, 0)
    split = [x.clone() for x in args]
    rules.apply(args)
    main, rest = in_rows_and_rest(split, body)
    parts = [main]
    if rest:
        parts = [_rows(main, 0, 1), _rows(main, 1, 2), rest]
    for part in parts:
        rules.apply(part)
    return all(map(same, split, args))


def _shapes_of_two_rows(body: Body, leaf: list[Tensor]) -> list[list[int]]:
    """Shapes of as many dims as those of `leaf`, with two rows and a rest."""
    dims = leaf[1].dim()
    shape = [2 * body.row + 5]
    if dims > 1:
        shape = [body.row // 4, 9, *[1] * (dims - 2)]
    shapes: list[list[int]] = []
    for column in _columns(leaf, body):
        if column.is_uncut:
            shapes.append([*column.x.shape])
        elif column.block is None:
            shapes.append(shape)
        else:
            shapes.append([column.entries(prod(shape))])
    return shapes
