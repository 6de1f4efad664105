"""Slots that have an entry for each block of elements: such tensors go through rules row by row.

A row is as many elements as the blocks of all slots have in common. Seen so, a parameter is a
matrix of rows, and so is each slot, with as many columns as it has entries for a row. Rules are
elementwise, and what is worked out for a block is worked out along a row. What is left at the end,
fewer elements than a row, goes through the rules by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import prod
from typing import Any

import torch
from torch import Tensor

from functorch_opt._execution.body import Body, Columns
from functorch_opt._execution.pieces import Rules, Whole, most_of, plain, same
from functorch_opt._execution.trials import drawn
from functorch_opt._execution.writes import Pure, Writes

Block = tuple[int, int] | None
"""So many entries for so many elements; None: one for each element."""


class Rows(Whole):
    """Tensors go through the rules row by row, with `program` where there is one."""

    def __init__(self, body: Body, program: Any = None) -> None:
        self.program = None if type(program) is Whole else program
        self.blocks, self.row = body.blocks, body.row

    def run(
        self, columns: Columns, sizes: list[tuple[int, ...]], narrow: bool, body: Body
    ) -> None:
        rules = Rules(*plain(body, narrow), None)
        given = body.given(narrow)
        for leaf in zip(*columns, strict=True):
            main, rest = in_rows_and_rest([*leaf], body)
            for piece in _pieces(main, body) if main else ():
                # Compiled code keeps values between its loops, and so it gets pieces too.
                if self.program and self.program.fits([*piece, *given]):
                    self.program([*piece, *given])
                else:
                    rules.apply(piece)
            if rest:
                rules.apply(rest)


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
    if not all(x.dim() for x in leaf[1 : 2 + body.n_slots]):
        return Whole()
    if made is not None:
        return Rows(body, made([*example_rows(body, leaf), *scalars], *how))
    try:
        return Rows(body) if _may_be_split(body, leaf) else Whole()
    except Exception:
        return Whole()  # the tensors themselves say what is wrong


def has_size(x: Tensor, p: Tensor, block: Block) -> bool:
    """Whether `x` has the shape of `p`, or if it has entries for blocks, as many as there are."""
    if block is None:
        return x.shape == p.shape
    return x.numel() in (0, _entries(p.numel(), block))


def with_sizes_settled(body: Body) -> Pure:
    """The body, for which the length of a row and the sizes of tables are numbers in a trace."""
    tables = [x.shape[0] if x.dim() else None for x in body.scalars]

    def settled(args: list[Any]) -> Writes:
        scalars = args[len(args) - len(tables) :]
        for x, size in zip(scalars, tables, strict=True):
            assert size is None or x.shape[0] == size
        if body.row and args[1].dim() == 2:
            for x, block in zip(args, _of(body, body.width), strict=False):
                assert x.dim() < 2 or x.shape[1] == _entries(body.row, block)
        return body(args)

    return settled


def _entries(n: int, block: Block) -> int:
    """How many entries there are for `n` elements."""
    entries, elements = block or (1, 1)
    return -(-n * entries // elements)


def _of(body: Body, n: int) -> list[Block]:
    """The blocks of each of `n` tensors of a leaf."""
    return [None, None, *body.blocks, *[None] * (n - 2 - len(body.blocks))]


def in_rows_and_rest(leaf: list[Tensor], body: Body) -> tuple[list[Tensor], list[Tensor]]:
    """The tensors of a leaf as matrices of rows, and the elements that are left, as rows of one.

    A leaf without blocks is all in one row.
    """
    row, blocks = body.row, _of(body, len(leaf))
    if all(of is None or not x.numel() for x, of in zip(leaf, blocks, strict=True)):
        return [x.view(-1) if x.dim() else x for x in leaf], []
    n = leaf[1].numel()
    main: list[Tensor] = []
    rest: list[Tensor] = []
    for x, of in zip(leaf, blocks, strict=True):
        if not x.dim() or not x.numel():
            main.append(x)
            rest.append(x)
            continue
        columns = _entries(row, of)
        flat, end = x.view(-1), n // row * columns
        main.append(flat[:end].view(-1, columns))
        rest.append(flat[end:].view(1, -1))
    return main if n >= row else [], rest if n % row else []


def _pieces(main: list[Tensor], body: Body) -> Iterator[list[Tensor]]:
    """Some rows at a time."""
    p = main[1]
    most = most_of(p)
    step = max(1, most // p.shape[1]) if p.dim() == 2 else most
    for k in range(0, max(p.shape[0], 1), step):
        yield [x[k : k + step] if x.dim() == p.dim() and x.numel() else x for x in main]


def example_rows(body: Body, leaf: list[Tensor]) -> list[Tensor]:
    """Tensors like those of `leaf`, in rows, to trace the body with."""
    rows = max(2, leaf[1].numel() // body.row)
    found = []
    blocks = _of(body, len(leaf))
    has = any(of is not None and x.numel() for x, of in zip(leaf, blocks, strict=True))
    for x, of in zip(leaf, blocks, strict=True):
        if not x.dim() or not x.numel():
            found.append(x.detach())
            continue
        shape = (rows, _entries(body.row, of)) if has else (x.numel(),)
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
        first = [x[:1] if x.dim() == 2 else x for x in main]
        second = [x[1:] if x.dim() == 2 else x for x in main]
        parts = [first, second, rest]
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
    for x, of in zip(leaf, _of(body, len(leaf)), strict=True):
        if not x.dim() or not x.numel():
            shapes.append([*x.shape])
        elif of is None:
            shapes.append(shape)
        else:
            shapes.append([_entries(prod(shape), of)])
    return shapes
