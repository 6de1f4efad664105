"""Checkpoints of state that lies with owners: no rank of a checkpoint has to be there again.

A state dict has every such tensor divided among the ranks: as its parameter, if it has its shape,
and otherwise by rows. So it can be read on other ranks, or on one, and by torch's functions. What is
loaded goes back to the owners that this optimizer has.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functorch_opt._core import sharding
from functorch_opt._core.exchange import Layout, Parcel, Ranks, grouped, parcel_to
from functorch_opt._core.owned import Kind, joined, kept_as, mesh_of_all, owner_of
from functorch_opt.optim.numbers import Groups


def mesh_of(p: Any) -> Any:
    """The ranks among which the state of a parameter is divided: its own, or all."""
    return p.device_mesh if sharding.is_sharded(p) else mesh_of_all(p.device.type)


class _Place(NamedTuple):
    """A tensor with an owner, and where it is in a state dict."""

    number: int
    key: str
    x: Any
    p: Any

    def sent_to(self) -> tuple[Any, torch.dtype]:
        """The ranks among which it is divided, and its dtype: there is a message for each pair."""
        return mesh_of(self.p), self.x.dtype


def divided(state: Mapping[Any, Any], groups: Groups) -> dict[Any, Any]:
    """The ``state`` of a state dict, with what lies with owners divided among the ranks.

    All ranks call it: there is one message for each mesh and dtype.
    """
    places = grouped(_places(state, groups), _Place.sent_to)
    if not places:
        return dict(state)
    found = {number: _copied(entry) for number, entry in state.items()}
    for mesh, dtype in places:
        for place, part in _parts(Ranks(mesh), places[mesh, dtype]):
            found[place.number][place.key] = part
    return found


def _copied(entry: Any) -> Any:
    return dict(entry) if isinstance(entry, Mapping) else entry


def _places(state: Mapping[Any, Any], groups: Groups) -> Iterator[_Place]:
    params = [p for group in groups for p in group["params"]]
    for number, p in enumerate(params):
        entry = state.get(number)
        if not isinstance(entry, Mapping):
            continue
        for key, x in entry.items():
            if sharding.is_owned(x):
                yield _Place(number, key, x, p)


def _parts(ranks: Ranks, places: list[_Place]) -> Iterator[tuple[_Place, Tensor]]:
    """Tensors of one dtype, divided among these ranks."""
    parcels = [_parcel(ranks, place) for place in places]
    like = places[0].x.detach().to_local().new_empty(0)
    ranks.from_owners(parcels, like)
    for place, parcel in zip(places, parcels, strict=True):
        placements = parcel.layout.placements
        yield place, joined(parcel.part, ranks.mesh, placements, place.x)


def _parcel(ranks: Ranks, place: _Place) -> Parcel:
    owner = ranks.members.index(owner_of(place.x))
    parcel = Parcel(_layout(place.x, place.p), owner)
    if owner == ranks.me:
        parcel.whole = place.x.detach().to_local()
    return parcel


def _layout(x: Any, p: Any) -> Layout:
    """How `x` is divided: as its parameter, or by rows among the same ranks."""
    from torch.distributed.tensor import Replicate, Shard

    mesh = mesh_of(p)
    is_replica = not sharding.is_sharded(p)
    placements = [Shard(0)] if is_replica else sharding.settled(p).placements
    if x.shape != p.shape or is_replica:
        rows = Shard(0) if x.dim() else Replicate()
        placements = [Replicate() if at.is_replicate() else rows for at in placements]
    return Layout(tuple(x.shape), tuple(mesh.shape), tuple(placements))


def with_owners(
    entries: list[dict[str, Any]],
    expected: list[dict[str, Any]],
    params: list[Tensor],
) -> None:
    """Give to their owners what of loaded `entries` is `expected` to lie with one."""
    for entry, keys, p in zip(entries, expected, params, strict=True):
        for key, x in entry.items():
            like = keys[key].like if key in keys else None
            if sharding.is_owned(like) and not sharding.is_owned(x):
                entry[key] = _with_owner(x, like, p)


def _with_owner(
    x: Any,
    like: Any,
    p: Any,
) -> Tensor:
    if not sharding.is_sharded(x):
        return kept_as(like, x)
    ranks = Ranks(x.device_mesh)
    owner = ranks.members.index(owner_of(like))
    parcel = parcel_to(owner, sharding.settled(x))
    ranks.to_owners([parcel])
    kind = Kind(x.shape, x.dtype, x.to_local().device)
    return ranks.keep(owner, parcel.whole, kind)
