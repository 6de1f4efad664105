"""Checkpoints of state that lies with owners: no rank of a checkpoint has to be there again.

A state dict has every such tensor divided among the ranks: as its parameter, if it has its shape,
and otherwise by rows. So it can be read on other ranks, or on one, and by torch's functions. What is
loaded goes back to the owners that this optimizer has.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from functorch_opt._core import sharding
from functorch_opt._core.exchange import Layout, Ranks
from functorch_opt._core.owned import (
    kept_as,
    kept_by,
    owner_of,
)
from functorch_opt.optim.numbers import Groups


def is_owned(x: Any) -> bool:
    """Whether one rank has `x`, and no other."""
    return sharding.is_sharded(x) and owner_of(x) is not None


def divided(state: Mapping[Any, Any], groups: Groups) -> dict[Any, Any]:
    """The ``state`` of a state dict, with what lies with owners divided among the ranks.

    All ranks call it: there is one message for each mesh and dtype.
    """
    params = [p for group in groups for p in group["params"]]
    wanted: dict[Any, list[tuple[int, str, Any]]] = {}
    for number, p in enumerate(params):
        entry = state.get(number)
        for key, x in entry.items() if isinstance(entry, Mapping) else ():
            if is_owned(x):
                wanted.setdefault((p.device_mesh, x.dtype), []).append((number, key, x))
    if not wanted:
        return dict(state)
    found = {
        number: dict(entry) if isinstance(entry, Mapping) else entry
        for number, entry in state.items()
    }
    for (mesh, _), places in wanted.items():
        xs = [x for _, _, x in places]
        parts = _parts(
            Ranks(mesh),
            xs,
            [params[number] for number, _, _ in places],
        )
        for (number, key, _), part in zip(places, parts, strict=True):
            found[number][key] = part
    return found


def _parts(ranks: Ranks, xs: list[Any], ps: list[Any]) -> list[Tensor]:
    from torch.distributed.tensor import DTensor

    owners = [ranks.members.index(owner_of(x)) for x in xs]
    locals_ = [x.detach().to_local() for x in xs]
    pairs = zip(locals_, owners, strict=True)
    wholes = [x if owner == ranks.me else None for x, owner in pairs]
    layouts = [_layout(x, p) for x, p in zip(xs, ps, strict=True)]
    parts, _ = ranks.from_owners(wholes, owners, layouts, locals_[0].new_empty(0))
    return [
        DTensor.from_local(
            part,
            ranks.mesh,
            layout.placements,
            run_check=False,
            shape=x.shape,
            stride=x.stride(),
        )
        for x, part, layout in zip(xs, parts, layouts, strict=True)
    ]


def _layout(x: Any, p: Any) -> Layout:
    """How `x` is divided: as its parameter, or by rows among the same ranks."""
    from torch.distributed.tensor import (
        Replicate,
        Shard,
    )

    placements = sharding.settled(p).placements
    if x.shape == p.shape:
        return Layout(
            tuple(x.shape),
            tuple(p.device_mesh.shape),
            tuple(placements),
        )
    rows = Shard(0) if x.dim() else Replicate()
    by_rows = [Replicate() if at.is_replicate() else rows for at in placements]
    return Layout(
        tuple(x.shape),
        tuple(p.device_mesh.shape),
        tuple(by_rows),
    )


def with_owners(
    entries: list[dict[str, Any]],
    expected: list[dict[str, Any]],
    params: list[Tensor],
) -> None:
    """Give to their owners what of loaded `entries` is `expected` to lie with one."""
    for entry, keys, p in zip(entries, expected, params, strict=True):
        for key, x in entry.items():
            like = keys[key].like if key in keys else None
            if is_owned(like) and not is_owned(x):
                entry[key] = _with_owner(x, like, p)


def _with_owner(x: Any, like: Any, p: Any) -> Tensor:
    if not sharding.is_sharded(x):
        return kept_as(like, x)
    ranks, owner = (
        Ranks(x.device_mesh),
        int(like.device_mesh.mesh.item()),
    )
    (whole,) = ranks.to_owners(
        [sharding.settled(x)],
        [ranks.members.index(owner)],
    )
    device = x.to_local().device
    return kept_by(
        owner,
        x.device_mesh,
        whole,
        x.shape,
        x.dtype,
        device,
    )
