"""Where the numbers of a tensor lie in the stream that is drawn from a key.

A tensor takes the numbers of the stream in the order of its elements, four to a block. So the
elements of a part of it lie in runs of equal length with gaps between them, and a part can be drawn
without the whole.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functorch_opt._core import sharding
from functorch_opt._core.owned import is_here

Region = tuple[tuple[int, ...], tuple[int, ...]]
"""The offsets and the sizes of a part of a tensor, by dimension."""


class Place(NamedTuple):
    """Where the elements of a tensor, or of a part of one, lie in the stream.

    They lie in runs of equal length, and inside of a run there is no gap.
    """

    shape: tuple[int, ...]
    first: int
    """The position in the stream at which the first run begins."""
    dims: tuple[tuple[int, int], ...]
    """The dimensions by which runs are ordered.

    Each is a pair: how many runs there are along it, and how far one begins after another.
    """
    length: int
    """How many numbers a run has."""

    @property
    def runs(self) -> int:
        """How many runs there are."""
        return math.prod(n for n, _ in self.dims)

    @property
    def lane(self) -> int | None:
        """The place inside of a block at which runs begin; None if they differ in it."""
        uneven = any(stride % 4 for n, stride in self.dims if n > 1)
        return None if uneven else self.first % 4

    @property
    def width(self) -> int:
        """How many blocks a run needs at most."""
        if not self.length:
            return 0
        most = 3 if self.lane is None else self.lane
        return _blocks(most + self.length)

    @property
    def blocks(self) -> int:
        """How many blocks are drawn for all runs."""
        return self.runs * self.width

    def starts(self, device: torch.device) -> Tensor:
        """The position in the stream at which each run begins."""
        starts = torch.full((1,), self.first, dtype=torch.int64, device=device)
        for n, stride in self.dims:
            steps = stride * torch.arange(n, device=device)
            starts = (starts[:, None] + steps).flatten()
        return starts

    def numbers(self, base: int, device: torch.device) -> Tensor:
        """The numbers of the blocks to draw, if the whole tensor begins at block `base`."""
        first = self.starts(device) >> 2
        of_a_run = torch.arange(base, base + self.width, device=device)
        return (first[:, None] + of_a_run).flatten()

    def take(self, drawn: Tensor) -> Tensor:
        """The elements, taken out of the numbers that were drawn for these blocks."""
        rows = drawn.reshape(self.runs, 4 * self.width)
        if self.lane is not None:
            end = self.lane + self.length
            return rows[:, self.lane : end].reshape(self.shape)
        lanes = self.starts(rows.device) & 3
        of_a_run = torch.arange(self.length, device=rows.device)
        columns = lanes[:, None] + of_a_run
        return rows.gather(1, columns).reshape(self.shape)


NOWHERE = Place((0,), 0, (), 0)
"""The place of no numbers."""


def _blocks(numbers: int) -> int:
    """How many blocks are needed for so many numbers."""
    return -(-numbers // 4)


def blocks_of(leaf: Tensor | None) -> int:
    """How many blocks the whole of a leaf takes from the stream."""
    if leaf is None:
        return 0
    return _blocks(leaf.numel() * (1 + leaf.is_complex()))


def place_in(shape: tuple[int, ...], region: Region | None = None) -> Place:
    """The place of the part `region` of a tensor of this shape, or of the whole."""
    if region is None:
        return Place(shape, 0, (), math.prod(shape))
    offsets, sizes = region
    dimensions = range(len(shape))
    strides = [math.prod(shape[d + 1 :]) for d in dimensions]
    # From the dimension after `inner` on, the part has all that the whole has.
    cut = [d for d in dimensions if sizes[d] != shape[d]]
    inner = max(cut, default=0)
    pairs = zip(offsets, strides, strict=True)
    first = sum(offset * stride for offset, stride in pairs)
    outer = zip(sizes[:inner], strides[:inner], strict=True)
    run = math.prod(sizes[inner:])
    return Place(sizes, first, tuple(outer), run)


def place_of(leaf: Tensor) -> Place:
    """The place of the elements that this process holds. A complex element is two numbers."""
    shape = (*leaf.shape, 2) if leaf.is_complex() else tuple(leaf.shape)
    if not sharding.is_sharded(leaf):
        return place_in(shape)
    if sharding.is_owned(leaf):
        return place_in(shape) if is_here(leaf) else NOWHERE
    whole: Any = leaf
    placements = tuple(whole.placements)
    offsets, sizes = _held(tuple(leaf.shape), whole.device_mesh, placements)
    if leaf.is_complex():
        offsets, sizes = (*offsets, 0), (*sizes, 2)
    return place_in(shape, (offsets, sizes))


@functools.lru_cache(4096)
def _held(shape: tuple[int, ...], mesh: Any, placements: tuple[Any, ...]) -> Region:
    """The part that this rank holds of a tensor with these placements on a mesh.

    If the ranks hold terms of a sum that has not been taken yet, it is the part that this rank
    would hold of the sum.
    """
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    settled = [
        Replicate() if placement.is_partial() else placement for placement in placements
    ]
    sizes, offsets = compute_local_shape_and_global_offset(shape, mesh, settled)
    return tuple(offsets), tuple(sizes)
