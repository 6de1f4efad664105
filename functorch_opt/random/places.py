"""Where the numbers of a tensor lie in the stream that is drawn from a key.

A tensor takes the numbers of the stream in the order of its elements, four to a block. So the
elements of a part of it lie in some runs, equally long, with gaps between them, and a part can
be drawn without the whole.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functorch_opt import tree

Region = tuple[tuple[int, ...], tuple[int, ...]]
"""Offsets and sizes, by dimension, of a part in its whole."""


class Place(NamedTuple):
    """Where the elements of a tensor, or of a part of one, lie in the stream.

    They are some runs, equally long, of numbers without a gap.
    """

    shape: tuple[int, ...]
    first: int
    """The number at which the first run begins."""
    dims: tuple[tuple[int, int], ...]
    """The dimensions by which runs are ordered.

    Each says how many there are, and how far one is from the next.
    """
    length: int
    """How many numbers a run has."""

    @property
    def runs(self) -> int:
        """How many runs there are."""
        return math.prod(n for n, _ in self.dims)

    @property
    def lane(self) -> int | None:
        """The place in its block at which a run begins; None if it is not the same for all."""
        uneven = any(stride % 4 for n, stride in self.dims if n > 1)
        return None if uneven else self.first % 4

    @property
    def width(self) -> int:
        """How many blocks a run needs at most."""
        if not self.length:
            return 0
        return _blocks((3 if self.lane is None else self.lane) + self.length)

    @property
    def blocks(self) -> int:
        """How many blocks are drawn for all runs."""
        return self.runs * self.width

    def starts(self, device: torch.device) -> Tensor:
        """The number at which each run begins."""
        starts = torch.full((1,), self.first, dtype=torch.int64, device=device)
        for n, stride in self.dims:
            steps = stride * torch.arange(n, device=device)
            starts = (starts[:, None] + steps).flatten()
        return starts

    def numbers(self, base: int, device: torch.device) -> Tensor:
        """The blocks to draw, where the stream of the whole begins at block `base`."""
        first = self.starts(device) >> 2
        of_a_run = torch.arange(base, base + self.width, device=device)
        return (first[:, None] + of_a_run).flatten()

    def take(self, drawn: Tensor) -> Tensor:
        """The numbers, from these blocks."""
        rows = drawn.reshape(self.runs, 4 * self.width)
        if self.lane is not None:
            return rows[:, self.lane : self.lane + self.length].reshape(self.shape)
        lanes = self.starts(rows.device) & 3
        of_a_run = torch.arange(self.length, device=rows.device)
        return rows.gather(1, lanes[:, None] + of_a_run).reshape(self.shape)


NOWHERE = Place((0,), 0, (), 0)
"""The place of no numbers."""


def _blocks(numbers: int) -> int:
    """How many blocks have so many numbers."""
    return -(-numbers // 4)


def blocks_of(leaf: Tensor | None) -> int:
    """How many blocks the whole of a leaf takes from the stream."""
    return 0 if leaf is None else _blocks(leaf.numel() * (1 + leaf.is_complex()))


def place_in(shape: tuple[int, ...], region: Region | None = None) -> Place:
    """The place of the part `region` of a tensor of this shape, or of the whole."""
    if region is None:
        return Place(shape, 0, (), math.prod(shape))
    offsets, sizes = region
    strides = [math.prod(shape[d + 1 :]) for d in range(len(shape))]
    # Below the dimension `inner` the part has everything.
    cut = [d for d in range(len(shape)) if sizes[d] != shape[d]]
    inner = max(cut, default=0)
    first = sum(offset * stride for offset, stride in zip(offsets, strides, strict=True))
    dims = tuple(zip(sizes[:inner], strides[:inner], strict=True))
    return Place(sizes, first, dims, math.prod(sizes[inner:]))


def place_of(leaf: Tensor) -> Place:
    """The place of the elements of `leaf` that this process holds; a complex one is two numbers."""
    shape = (*leaf.shape, 2) if leaf.is_complex() else tuple(leaf.shape)
    if not tree.is_sharded(leaf):
        return place_in(shape)
    whole: Any = leaf
    offsets, sizes = _held(tuple(leaf.shape), whole.device_mesh, tuple(whole.placements))
    if leaf.is_complex():
        offsets, sizes = (*offsets, 0), (*sizes, 2)
    return place_in(shape, (offsets, sizes))


@functools.lru_cache(4096)
def _held(shape: tuple[int, ...], mesh: Any, placements: tuple[Any, ...]) -> Region:
    """What this rank holds of a tensor that is distributed so.

    Of a sum not yet taken, it is all that the rank would hold of the sum.
    """
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    settled = [
        Replicate() if placement.is_partial() else placement for placement in placements
    ]
    sizes, offsets = compute_local_shape_and_global_offset(shape, mesh, settled)
    return tuple(offsets), tuple(sizes)
