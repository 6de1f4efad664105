"""Parts of sharded tensors go to owners, and parts of what these have worked out come back.

Each way is one message from each rank to each other one, for all tensors of one dtype.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from functorch_opt._core.owned import Kind, group_of, kept_by, members

Item = TypeVar("Item")
Region = tuple[Any, ...]
"""What a rank has of a tensor: an index into the whole."""


# ---- how a tensor is cut -------------------------------------------------------------------------


class Layout(NamedTuple):
    """How a tensor is cut: its shape, the sizes of the mesh, and the placements."""

    shape: tuple[int, ...]
    sizes: tuple[int, ...]
    placements: tuple[Any, ...]


def layout_of(x: Any, placements: Sequence[Any] | None = None) -> Layout:
    """How the DTensor `x` is cut, or how it would be with other `placements`."""
    if placements is None:
        placements = x.placements
    sizes = tuple(x.device_mesh.shape)
    return Layout(tuple(x.shape), sizes, tuple(placements))


@functools.lru_cache(4096)
def _places(sizes: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Where each rank is in a mesh of these sizes, in the order of the mesh."""
    return list(itertools.product(*map(range, sizes)))


@functools.lru_cache(4096)
def regions(layout: Layout) -> list[Region]:
    """For every rank, in the order of the mesh, what it has of a tensor."""
    places = _places(layout.sizes)
    return [_region(_rows_at(place, layout)) for place in places]


def _rows_at(place: tuple[int, ...], layout: Layout) -> list[Tensor]:
    """For each dim of a tensor, the indices along it that the rank at `place` has."""
    rows = [torch.arange(n) for n in layout.shape]
    for mesh_dim, placement in enumerate(layout.placements):
        if placement.is_replicate():
            continue
        cuts = _cut(rows[placement.dim], layout.sizes[mesh_dim], placement)
        rows[placement.dim] = cuts[place[mesh_dim]].flatten()
    return rows


def _cut(
    row: Tensor,
    n: int,
    placement: Any,
) -> list[Tensor]:
    """A row of indices, cut among `n` ranks as torch cuts the dim of the placement."""
    row = row.view([1] * placement.dim + [-1])
    cuts, _ = placement._split_tensor(row, n, with_padding=False, contiguous=False)
    return cuts


def _region(rows: list[Tensor]) -> Region:
    """An index of these rows, of each dim. It has slices if they are without gaps."""
    slices = [_slice(row) for row in rows]
    if None in slices:  # rows of several cuts, one inside of another
        return torch.meshgrid(rows, indexing="ij")
    return tuple(slices)


def _slice(row: Tensor) -> slice | None:
    """The rows as a slice; None if there are gaps between them."""
    if not len(row):
        return slice(0, 0)
    begin = int(row[0])
    end = int(row[-1]) + 1
    without_gaps = end - begin == len(row)
    return slice(begin, end) if without_gaps else None


@functools.lru_cache(65536)
def _shape(layout: Layout, rank: int) -> torch.Size:
    """The shape of the part that a rank has."""
    region = regions(layout)[rank]
    if region and isinstance(region[0], Tensor):
        return region[0].shape
    return torch.Size([x.stop - x.start for x in region])


@functools.lru_cache(65536)
def _senders(layout: Layout, owner: int) -> tuple[int, ...]:
    """The ranks from which the owner gets the parts.

    Of several ranks with the same part it is the nearest: the one that has the owner's place in the
    dims of the mesh along which there are copies.
    """
    places = _places(layout.sizes)
    placements = enumerate(layout.placements)
    copied = [dim for dim, placement in placements if placement.is_replicate()]

    def is_nearest(rank: int) -> bool:
        return all(places[rank][dim] == places[owner][dim] for dim in copied)

    return tuple(filter(is_nearest, range(len(places))))


# ---- what is sent --------------------------------------------------------------------------------


@dataclass
class Parcel:
    """A tensor that is cut among the ranks on one side, and whole with its owner on the other."""

    layout: Layout
    owner: int
    sharded: Any = None
    """The tensor that the owner gets."""
    whole: Tensor | None = None
    """What the owner has; None on the other ranks."""
    part: Any = None
    """What this rank has got of what the owner had."""


def parcel_to(owner: int, x: Any) -> Parcel:
    """A sharded tensor that goes to its owner."""
    return Parcel(layout_of(x), owner, sharded=x)


def grouped(items: Iterable[Item], key: Callable[[Item], Any]) -> dict[Any, list[Item]]:
    """The items by their keys, both in the order in which they come."""
    groups: dict[Any, list[Item]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


class Reader:
    """Takes one tensor after another from a row of numbers."""

    def __init__(self, row: Tensor) -> None:
        self.row = row
        self.at = 0

    def next(self, shape: torch.Size) -> Tensor:
        begin = self.at
        self.at += shape.numel()
        return self.row[begin : self.at].view(shape)


class Post:
    """What this rank gives to each other one, and how many numbers it takes from each."""

    def __init__(self, ranks: Ranks, like: Tensor) -> None:
        self.ranks = ranks
        self.like = like
        self.given: list[list[Tensor]] = [[] for _ in range(ranks.n)]
        self.takes = [0] * ranks.n

    def give(self, rank: int, x: Tensor) -> None:
        self.given[rank].append(x.reshape(-1))

    def take(self, rank: int, shape: torch.Size) -> None:
        self.takes[rank] += shape.numel()

    def exchanged(self) -> list[Reader]:
        """What the other ranks have given to this one. All of them call it."""
        order = self.ranks.order
        given = [x for rank in order for x in self.given[rank]]
        row = torch.cat([self._empty(0), *given])
        taken = self._empty(sum(self.takes))
        all_to_all(
            taken.view(torch.uint8),
            row.view(torch.uint8),
            [self._bytes(self.takes[rank]) for rank in order],
            [self._bytes(*map(torch.numel, self.given[rank])) for rank in order],
            group_of(tuple([self.ranks.members[rank] for rank in order])),
        )
        rows = taken.split([self.takes[rank] for rank in order])
        of_rank = dict(zip(order, rows, strict=True))
        return [Reader(of_rank[rank]) for rank in range(self.ranks.n)]

    def _empty(self, n: int) -> Tensor:
        return torch.empty(n, dtype=self.like.dtype, device=self.like.device)

    def _bytes(self, *numbers: int) -> int:
        return sum(numbers) * self.like.element_size()


def all_to_all(
    taken: Tensor,
    row: Tensor,
    takes: list[int],
    gives: list[int],
    group: Any,
) -> None:
    """Every rank sends a part of its row of bytes to every other one."""
    dist.all_to_all_single(taken, row, takes, gives, group=group)


class Ranks:
    """The ranks of a mesh, by their numbers in it."""

    def __init__(self, mesh: Any) -> None:
        self.mesh = mesh
        self.members = members(mesh)
        self.n = len(self.members)
        self.me = self.members.index(dist.get_rank())

    @functools.cached_property
    def order(self) -> list[int]:
        """The numbers of the ranks in the order of their process group."""
        return sorted(range(self.n), key=self.members.__getitem__)

    def keep(
        self,
        owner: int,
        x: Tensor | None,
        kind: Kind,
    ) -> Tensor:
        """The tensor `x` of an owner, which stays there. The other ranks give None."""
        return kept_by(self.members[owner], self.mesh, x, kind)

    def to_owners(self, parcels: Iterable[Parcel]) -> None:
        """Give sharded tensors to their owners: they get the ``whole`` of each parcel."""
        by_dtype = grouped(parcels, lambda parcel: parcel.sharded.dtype)
        for of_dtype in by_dtype.values():
            self._gather(of_dtype)

    def _gather(self, parcels: list[Parcel]) -> None:
        post = Post(self, parcels[0].sharded.to_local())
        mine = [parcel for parcel in parcels if parcel.owner == self.me]
        for parcel in parcels:
            if self.me in _senders(parcel.layout, parcel.owner):
                post.give(parcel.owner, parcel.sharded.to_local())
        for parcel in mine:
            for sender in _senders(parcel.layout, self.me):
                post.take(sender, _shape(parcel.layout, sender))
        readers = post.exchanged()
        for parcel in mine:
            parcel.whole = self._joined(parcel.layout, readers, post.like)

    def _joined(
        self,
        layout: Layout,
        readers: list[Reader],
        like: Tensor,
    ) -> Tensor:
        """The whole of a tensor of this rank, whose parts are next in what the others sent."""
        whole = torch.empty(layout.shape, dtype=like.dtype, device=like.device)
        for sender in _senders(layout, self.me):
            region = regions(layout)[sender]
            whole[region] = readers[sender].next(_shape(layout, sender))
        return whole

    def from_owners(
        self,
        parcels: list[Parcel],
        like: Tensor,
        failed: bool = False,
    ) -> list[int]:
        """Cut what owners have: each rank gets its ``part`` of each parcel.

        The tensors are of one dtype, that of `like`, and on its device. Every message ends with a
        number that says whether its sender failed, so that all ranks learn of it and none waits for
        ever.

        Returns:
            The ranks that `failed`, of which the parts are of no use.
        """
        post = Post(self, like)
        for parcel in parcels:
            post.take(parcel.owner, _shape(parcel.layout, self.me))
            if parcel.owner == self.me:
                self._give_parts(parcel, post)
        flag = like.new_full((1,), float(failed))
        for rank in range(self.n):
            post.give(rank, flag)
            post.take(rank, flag.shape)
        readers = post.exchanged()
        for parcel in parcels:
            part = readers[parcel.owner].next(_shape(parcel.layout, self.me))
            parcel.part = part.clone()
        flags = torch.cat([reader.next(flag.shape) for reader in readers])
        failures = flags.abs().tolist()
        return [rank for rank in range(self.n) if failures[rank]]

    def _give_parts(self, parcel: Parcel, post: Post) -> None:
        whole = parcel.whole
        if whole is None:  # its owner has failed
            whole = post.like.new_zeros(parcel.layout.shape)
        for rank, region in enumerate(regions(parcel.layout)):
            post.give(rank, whole[region])
