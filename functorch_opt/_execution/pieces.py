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
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from functorch_opt._execution.body import Body, Columns
from functorch_opt._execution.trials import drawn
from functorch_opt._execution.writes import write

PIECE = 65_536
"""Elements of a piece on a CPU. A handful of such pieces lie in the cache of one core."""
ELSEWHERE = 8_388_608
"""Elements of a piece on another device, where it is the calls that take the time."""


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
        for leaf in zip(*columns, strict=True):
            run_body(body, [*leaf, *scalars])


class Pieces(Whole):
    """Large tensors are split, and small ones are joined."""

    def sizes(self, args: list[Tensor]) -> tuple[int, ...]:
        return (args[1].numel(),)

    def run(
        self,
        columns: Columns,
        sizes: list[tuple[int, ...]],
        narrow: bool,
        body: Body,
    ) -> None:
        body, scalars = plain(body, narrow)
        for first, end in _groups([n for (n,) in sizes], most_of(columns[1][0])):
            group = [column[first:end] for column in columns]
            if end - first > 1:
                _joined(group, sizes[first:end], scalars, body, narrow)
            else:
                _split([x for (x,) in group], scalars, body)


def in_pieces(body: Body, leaf: list[Tensor], narrow: bool) -> Whole:
    """How tensors like those of `leaf` go through the rules."""
    slots = leaf[2 : 2 + body.n_slots]
    if body.whole or not all(x.dim() for x in [leaf[1], *slots]):
        return Whole()
    try:
        return Pieces() if _may_be_split(body, leaf, narrow) else Whole()
    except Exception:
        return Whole()  # the tensors themselves say what is wrong


# ---- pieces --------------------------------------------------------------------------------------


def most_of(x: Tensor) -> int:
    return PIECE if x.device.type == "cpu" else ELSEWHERE


def _groups(sizes: list[int], most: int) -> Iterator[tuple[int, int]]:
    """Ranges of consecutive leaves that make up a piece together. A large leaf is alone."""
    first, total = 0, 0
    for i, n in enumerate(sizes):
        if i > first and total + n > most:
            yield first, i
            first, total = i, 0
        total += n
    yield first, len(sizes)


def _split(leaf: list[Tensor], scalars: list[Tensor], body: Body) -> None:
    flat = [x.view(-1) if x.dim() else x for x in leaf]
    most = most_of(flat[1])
    if flat[1].numel() <= most:
        run_body(body, [*flat, *scalars])
        return
    pieces = [x.split(most) if x.dim() else repeat(x) for x in flat]
    for piece in zip(*pieces, strict=False):
        run_body(body, [*piece, *scalars])


@torch.no_grad()
def run_body(body: Body, args: list[Tensor]) -> None:
    """Apply the body to one leaf. A sum in place saves a tensor and a copy of it."""
    write(args, *body.apart(args))


def _joined(
    columns: Columns,
    sizes: list[tuple[int, ...]],
    scalars: list[Tensor],
    body: Body,
    narrow: bool,
) -> None:
    device = columns[1][0].device
    flat = [_join(column, sizes, narrow, device) for column in columns]
    writes, moves = body.apart([*flat, *scalars])
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


def _may_be_split(body: Body, leaf: list[Tensor], narrow: bool) -> bool:
    """Whether every element goes its own way: two small tensors give the same numbers as they
    are, in pieces, and joined."""
    body, scalars = plain(body, narrow)
    shape = [4] + [3] * (leaf[1].dim() - 1)
    shapes = [shape if x.dim() else [] for x in leaf]
    one = drawn(shapes, leaf, 0)
    other = drawn(shapes, leaf, 1)
    expected = [_applied(body, args, scalars) for args in (one, other)]
    split = [x.clone() for x in one]
    n = one[1].numel() // 2
    halves = [x.view(-1).split(n) if x.dim() else repeat(x) for x in split]
    with _Elementwise() as seen:
        for half in zip(*halves, strict=False):
            run_body(body, [*half, *scalars])
    joined = [[x.clone(), y.clone()] for x, y in zip(one, other, strict=True)]
    _joined(joined, [(one[1].numel(),)] * 2, scalars, body, narrow)
    found = [*split, *[x for pair in joined for x in pair]]
    wanted = [*expected[0], *[x for pair in zip(*expected, strict=True) for x in pair]]
    return not seen.mixes and all(map(same, found, wanted))


def _applied(body: Body, args: list[Tensor], scalars: list[Tensor]) -> list[Tensor]:
    args = [x.clone() for x in args]
    run_body(body, [*args, *scalars])
    return args


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
