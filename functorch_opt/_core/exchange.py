"""Parts of sharded tensors go to owners, and parts of what these have worked out come back.

Each way is one message from each rank to each other one, for all tensors of one dtype.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from functorch_opt._core.owned import group_of, members

Region = tuple[Any, ...]


class Layout(NamedTuple):
    """How a tensor is cut: its shape, the sizes of the mesh, and the placements."""

    shape: tuple[int, ...]
    sizes: tuple[int, ...]
    placements: tuple[Any, ...]


def layout_of(x: Any, placements: Sequence[Any] | None = None) -> Layout:
    """How the DTensor `x` is cut, or how it would be with other `placements`."""
    given = x.placements if placements is None else placements
    return Layout(
        tuple(x.shape),
        tuple(x.device_mesh.shape),
        tuple(given),
    )


@functools.lru_cache(4096)
def regions(layout: Layout) -> list[Region]:
    """For every rank, in the order of the mesh, what it has of a tensor: an index into the whole."""
    found = []
    for place in itertools.product(*map(range, layout.sizes)):
        rows = [torch.arange(n) for n in layout.shape]
        for at, size, placement in zip(
            place,
            layout.sizes,
            layout.placements,
            strict=True,
        ):
            if not placement.is_replicate():
                dim = placement.dim
                row = rows[dim].view([1] * dim + [-1])  # which is cut along this dim
                cuts, _ = placement._split_tensor(
                    row,
                    size,
                    with_padding=False,
                    contiguous=False,
                )
                rows[dim] = cuts[at].flatten()
        found.append(_region(rows))
    return found


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
    begin, end = int(row[0]), int(row[-1]) + 1
    return slice(begin, end) if end - begin == len(row) else None


@functools.lru_cache(65536)
def _shape(layout: Layout, rank: int) -> tuple[int, ...]:
    """The shape of the part that a rank has."""
    region = regions(layout)[rank]
    if region and isinstance(region[0], Tensor):
        return tuple(region[0].shape)
    return tuple([x.stop - x.start for x in region])


def _size(layout: Layout, rank: int) -> int:
    return int(torch.Size(_shape(layout, rank)).numel())


@functools.lru_cache(65536)
def _senders(layout: Layout, owner: int) -> tuple[int, ...]:
    """The ranks from which the owner gets the parts: of several with the same one the nearest,
    which has the owner's place in the dims of the mesh along which there are copies."""
    places = list(itertools.product(*map(range, layout.sizes)))
    copied = [d for d, x in enumerate(layout.placements) if x.is_replicate()]
    mine = places[owner]
    return tuple(
        [k for k, at in enumerate(places) if all(at[d] == mine[d] for d in copied)]
    )


class Ranks:
    """The ranks of a mesh, by their numbers in it."""

    def __init__(self, mesh: Any) -> None:
        self.mesh, self.members = mesh, members(mesh)
        self.n, self.me = (
            len(self.members),
            self.members.index(dist.get_rank()),
        )

    @functools.cached_property
    def order(self) -> list[int]:
        """The numbers of the ranks in the order of their process group."""
        return sorted(range(self.n), key=self.members.__getitem__)

    def to_owners(self, xs: list[Any], owners: list[int]) -> list[Tensor | None]:
        """The wholes of sharded tensors that are this rank's; None for those of other owners."""
        wholes: list[Tensor | None] = [None] * len(xs)
        for dtype in dict.fromkeys([x.dtype for x in xs]):
            mine = [i for i, x in enumerate(xs) if x.dtype is dtype]
            found = self._gathered(
                [xs[i] for i in mine],
                [owners[i] for i in mine],
            )
            for i, whole in zip(mine, found, strict=True):
                wholes[i] = whole
        return wholes

    def _gathered(self, xs: list[Any], owners: list[int]) -> list[Tensor | None]:
        layouts = [layout_of(x) for x in xs]
        ways = [_senders(*pair) for pair in zip(layouts, owners, strict=True)]
        sent: list[list[Tensor]] = [[] for _ in range(self.n)]
        sizes = [0] * self.n
        for x, layout, owner, way in zip(xs, layouts, owners, ways, strict=True):
            if self.me in way:
                sent[owner].append(x.to_local().reshape(-1))
            if owner == self.me:
                for sender in way:
                    sizes[sender] += _size(layout, sender)
        parts = self._exchanged(sent, sizes, xs[0])
        wholes: list[Tensor | None] = []
        for x, layout, owner, way in zip(xs, layouts, owners, ways, strict=True):
            mine = owner == self.me
            wholes.append(self._joined(parts, layout, way, x) if mine else None)
        return wholes

    def _joined(
        self,
        parts: list[Reader],
        layout: Layout,
        way: Any,
        like: Any,
    ) -> Tensor:
        whole = torch.empty(
            layout.shape,
            dtype=like.dtype,
            device=like.to_local().device,
        )
        for sender in way:
            part = parts[sender].next(_shape(layout, sender))
            whole[regions(layout)[sender]] = part
        return whole

    def from_owners(
        self,
        wholes: list[Tensor | None],
        owners: list[int],
        layouts: list[Layout],
        like: Tensor,
        failed: bool = False,
    ) -> tuple[list[Tensor], list[int]]:
        """This rank's parts of tensors of one dtype, which their owners have; and the ranks that
        `failed`, of which the parts are of no use.

        `like` has the dtype and the device. Every message ends with a number that says whether its
        sender failed, so that all ranks learn of it and none waits for ever.
        """
        sent: list[list[Tensor]] = [[] for _ in range(self.n)]
        sizes = [1] * self.n
        for whole, layout, owner in zip(wholes, layouts, owners, strict=True):
            sizes[owner] += _size(layout, self.me)
            if owner == self.me:
                x = like.new_zeros(layout.shape) if whole is None else whole
                for rank, region in enumerate(regions(layout)):
                    sent[rank].append(x[region].reshape(-1))
        flag = like.new_full((1,), float(failed))
        parts = self._exchanged([[*of, flag] for of in sent], sizes, like)
        found = [
            parts[owner].next(_shape(layout, self.me)).clone()
            for layout, owner in zip(layouts, owners, strict=True)
        ]
        flags = [part.next(()) for part in parts]
        failures = torch.stack(flags).abs().tolist()
        return found, [k for k, flag in enumerate(failures) if flag]

    def _exchanged(
        self,
        sent: list[list[Tensor]],
        sizes: list[int],
        like: Any,
    ) -> list[Reader]:
        """What the other ranks have sent to this one, `sizes` numbers of each."""
        order, width = self.order, like.element_size()
        device = like.to_local().device if hasattr(like, "to_local") else like.device
        empty = torch.empty(0, dtype=like.dtype, device=device)
        row = torch.cat(
            [
                empty,
                *[x for k in order for x in sent[k]],
            ]
        )
        taken = torch.empty(sum(sizes), dtype=like.dtype, device=device)
        n_sent = [sum([x.numel() for x in sent[k]]) for k in order]
        all_to_all(
            taken.view(torch.uint8),
            row.view(torch.uint8),
            [sizes[k] * width for k in order],
            [n * width for n in n_sent],
            group_of(tuple([self.members[k] for k in order])),
        )
        of_rank = dict(
            zip(
                order,
                taken.split([sizes[k] for k in order]),
                strict=True,
            )
        )
        return [Reader(of_rank[k]) for k in range(self.n)]


class Reader:
    """Takes one tensor after another from a row of numbers."""

    def __init__(self, row: Tensor) -> None:
        self.row, self.at = row, 0

    def next(self, shape: tuple[int, ...]) -> Tensor:
        begin, self.at = (
            self.at,
            self.at + torch.Size(shape).numel(),
        )
        return self.row[begin : self.at].view(shape)


def all_to_all(
    taken: Tensor,
    row: Tensor,
    takes: list[int],
    gives: list[int],
    group: Any,
) -> None:
    """Every rank sends a part of its row of bytes to every other one."""
    dist.all_to_all_single(taken, row, takes, gives, group=group)
