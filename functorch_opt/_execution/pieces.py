"""The eager execution in place: tensors go through the rules in pieces that stay in the cache.

A rule makes a new tensor at every operation. Of a large tensor it would read and write memory each
time, and need several times the memory of the tensor. So a large tensor goes through all rules a
piece at a time, and each piece is written back before the next one is begun. For small tensors the
calls are what takes the time. They are joined to one piece, and taken apart again.

Neither may change a number. A rule that is declared elementwise may still look at the shape or at
other elements, so rules are tried on a few small tensors first, whole and in pieces. Where that
differs, each tensor goes through them whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from functorch_opt._execution.body import Body, Columns
from functorch_opt._execution.lists import Recorded, recorded
from functorch_opt._execution.trials import drawn
from functorch_opt._execution.writes import write

PIECE = 131_072
"""Elements of a piece on a CPU. A handful of such pieces lie in the cache of one core."""
ELSEWHERE = 8_388_608
"""Elements of a piece on another device, where it is the calls that take the time."""
LISTS = 33_554_432
"""Elements of a piece there that goes through lists, which need less memory."""


class Whole:
    """Each tensor goes through the rules as it is."""

    def fits(self, args: list[Tensor]) -> bool:
        return True

    def sizes(self, args: list[Tensor]) -> tuple[int, ...]:
        return ()

    def run(
        self,
        columns: Columns,
        sizes: list[tuple[int, ...]],
        narrow: bool,
        body: Body,
    ) -> None:
        """Apply the body to each leaf.

        Args:
            columns: the updates, parameters, slots and rows.
            sizes: what `sizes` gave for each leaf.
            narrow: whether the rules compute in float32.
            body: the rules, and their scalars.
        """
        body, scalars = plain(body, narrow)
        rules = Rules(body, scalars, None)
        for leaf in zip(*columns, strict=True):
            rules.apply([*leaf])


class Pieces(Whole):
    """Large tensors are split, and small ones go together: joined, or as lists.

    Args:
        lists: what the rules do, for lists; None if torch has not all of it.
    """

    def __init__(self, lists: Recorded | None) -> None:
        self.lists = lists

    def sizes(self, args: list[Tensor]) -> tuple[int, ...]:
        return (args[1].numel(),)

    def run(
        self,
        columns: Columns,
        sizes: list[tuple[int, ...]],
        narrow: bool,
        body: Body,
    ) -> None:
        rules = self._rules(body, narrow)
        most = most_of(columns[1][0], rules.lists is not None)
        for first, end in _groups([n for (n,) in sizes], most):
            group = [column[first:end] for column in columns]
            if end - first == 1:
                _split([x for (x,) in group], rules, most)
            elif rules.lists is not None and self._unjoined(columns[1][0]):
                rules.lists.run(group, rules.scalars)
            else:
                _joined(group, sizes[first:end], rules, narrow)

    def _rules(self, body: Body, narrow: bool) -> Rules:
        on_host = all(x.device.type == "cpu" for x in body.scalars)
        if self.lists is not None and on_host:
            return Rules(body, body.narrowed if narrow else body.scalars, self.lists)
        return Rules(*plain(body, narrow), None)

    def _unjoined(self, p: Tensor) -> bool:
        """Whether leaves like `p` go as lists. On a CPU an operation is a call for each leaf, and so
        is each tensor that is joined or written. Elsewhere to join is to copy."""
        assert self.lists is not None
        return p.device.type != "cpu" or self.lists.calls <= self.lists.moved


class Rules(NamedTuple):
    """What is done to a leaf, and the scalars; as `lists` where torch has all of it for lists."""

    body: Body
    scalars: list[Tensor]
    lists: Recorded | None

    @torch.no_grad()
    def apply(self, leaf: list[Tensor]) -> None:
        """Apply them to one leaf. A sum in place saves a tensor and a copy of it."""
        if self.lists is not None:
            self.lists.run([[x] for x in leaf], self.scalars)
            return
        args = [*leaf, *self.scalars]
        write(args, *self.body.apart(args))


def in_pieces(body: Body, leaf: list[Tensor], narrow: bool) -> Whole:
    """How tensors like those of `leaf` go through the rules."""
    slots = leaf[2 : 2 + body.n_slots]
    has_sums = any(entry.looks_beside for entry in body.entries)
    if has_sums or not all(x.dim() for x in [leaf[1], *slots]):
        return Whole()
    try:
        return _pieces(body, leaf, narrow) or Whole()
    except Exception:
        return Whole()  # the tensors themselves say what is wrong


# ---- pieces --------------------------------------------------------------------------------------


def most_of(x: Tensor, as_lists: bool = False) -> int:
    if x.device.type == "cpu":
        return PIECE
    return LISTS if as_lists else ELSEWHERE


def _groups(sizes: list[int], most: int) -> Iterator[tuple[int, int]]:
    """Ranges of consecutive leaves that make up a piece together. A large leaf is alone."""
    first = 0
    total = 0
    for i, n in enumerate(sizes):
        if i > first and total + n > most:
            yield first, i
            first = i
            total = 0
        total += n
    yield first, len(sizes)


def _split(leaf: list[Tensor], rules: Rules, most: int) -> None:
    flat = [x.view(-1) if x.dim() else x for x in leaf]
    if flat[1].numel() <= most:
        rules.apply(flat)
        return
    pieces = [x.split(most) if x.dim() else repeat(x) for x in flat]
    for piece in zip(*pieces, strict=False):
        rules.apply([*piece])


def _joined(
    columns: Columns, sizes: list[tuple[int, ...]], rules: Rules, narrow: bool
) -> None:
    device = columns[1][0].device
    flat = [_join(column, sizes, narrow, device) for column in columns]
    if rules.lists is not None:
        rules.lists.run([[x] for x in flat], rules.scalars)
        for i, _ in (*rules.lists.writes, *rules.lists.moves):
            torch._foreach_copy_(columns[i], _taken_apart(flat[i], columns[i]))
        return
    writes, moves = rules.body.apart([*flat, *rules.scalars])
    for i, value in writes:
        if value is not flat[i]:
            torch._foreach_copy_(columns[i], _taken_apart(value, columns[i]))
    for i, u in moves:
        if u.dtype is flat[i].dtype:
            torch._foreach_add_(columns[i], _taken_apart(u, columns[i]))
        else:
            torch._foreach_copy_(columns[i], _taken_apart(flat[i] + u, columns[i]))


def _taken_apart(x: Tensor, column: list[Tensor]) -> Any:
    """Views of the elements that belong to each tensor of `column`."""
    return torch._C._nn.unflatten_dense_tensors(x.contiguous(), column)


def _join(
    column: list[Tensor],
    sizes: list[tuple[int, ...]],
    narrow: bool,
    device: torch.device,
) -> Tensor:
    """The elements of all these tensors, on `device`. A number of each leaf is repeated for its
    elements, in float32 where rules compute in it."""
    if column[0].dim():
        return torch._C._nn.flatten_dense_tensors(column)
    numbers = torch.stack(column)
    if narrow and numbers.dtype is torch.float64:
        numbers = numbers.to(torch.float32)
    times = torch.tensor([n for (n,) in sizes], device=numbers.device)
    repeated = numbers.repeat_interleave(times, output_size=sum(n for (n,) in sizes))
    return repeated.to(device, non_blocking=True)


# ---- a trial -------------------------------------------------------------------------------------


def plain(body: Body, narrow: bool) -> tuple[Body, list[Tensor]]:
    """The body with numbers as they are, and its scalars."""
    body = body.with_constants
    return body, body.narrowed if narrow else body.scalars


def _pieces(body: Body, leaf: list[Tensor], narrow: bool) -> Pieces | None:
    """How the elements go their own ways; None if they do not.

    Two small tensors must give the same numbers as they are, in pieces, and joined. Lists of them
    are only used if these do as well.
    """
    rules = Rules(*plain(body, narrow), None)
    shape = [4] + [3] * (leaf[1].dim() - 1)
    shapes = [shape if x.dim() else [] for x in leaf]
    one = drawn(shapes, leaf, 0)
    other = drawn(shapes, leaf, 1)
    expected = [[x.clone() for x in args] for args in (one, other)]
    for args in expected:
        rules.apply(args)
    split = [x.clone() for x in one]
    n = one[1].numel() // 2
    halves = [x.view(-1).split(n) if x.dim() else repeat(x) for x in split]
    with _Elementwise() as seen:
        for half in zip(*halves, strict=False):
            rules.apply([*half])
    together = [[x.clone(), y.clone()] for x, y in zip(one, other, strict=True)]
    pairs = [[x.clone() for x in pair] for pair in together]
    _joined(together, [(one[1].numel(),)] * 2, rules, narrow)
    wanted = [x for pair in zip(*expected, strict=True) for x in pair]
    agree = all(map(same, split, expected[0])) and _all_same(together, wanted)
    if seen.mixes or not agree:
        return None
    scalars = body.narrowed if narrow else body.scalars
    lists = recorded(body, one, scalars)
    if lists is not None:
        lists.run(pairs, scalars)
        lists = lists if _all_same(pairs, wanted) else None
    return Pieces(lists)


def _all_same(columns: Columns, wanted: list[Tensor]) -> bool:
    return all(map(same, [x for column in columns for x in column], wanted))


def same(a: Tensor, b: Tensor) -> bool:
    tolerance = 0.0 if not a.is_floating_point() else 16 * torch.finfo(a.dtype).eps
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)


class _Elementwise(TorchDispatchMode):
    """Sees whether any operation makes of a tensor one of another size, or a number for Python."""

    mixes = False

    def __torch_dispatch__(
        self, f: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        made = f(*args, **(kwargs or {}))
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        sizes = {x.numel() for x in given if x.dim()}
        results = [x for x in tree_leaves(made) if isinstance(x, Tensor)]
        if sizes and any(x.numel() not in sizes for x in results):
            self.mixes = True
        if f is torch.ops.aten._local_scalar_dense.default:
            self.mixes = True
        return made
