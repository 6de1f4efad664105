"""The first state of parameters that have none yet."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from functorch_opt import random
from functorch_opt._core.checkpoint import state_dict
from functorch_opt._execution.memory import with_memory_of_its_own
from functorch_opt.codecs.rounded import KEY
from functorch_opt.optim.counts import Entries
from functorch_opt.optim.host import from_card, kept
from functorch_opt.optim.places import Place

if TYPE_CHECKING:
    from functorch_opt.optim.plan import Plan


def lacks(plan: Plan, entries: Entries, moved: set[int]) -> bool:
    """Whether a value has to be made: of a parameter that moves, or one that all share."""
    for key in plan.counts.keys:
        if not all(key in entries[i] for i in moved):
            return True
    there = [key in entries[i] for i, key in plan.where]
    if all(there):
        return False
    absent = [plan.flat[k] for k, x in zip(plan.kept, there, strict=True) if not x]
    return any(x.kind == "joint" or x.whole or x.i in moved for x in absent)


def complete(
    plan: Plan, entries: Entries, params: list[Tensor], moved: list[int]
) -> None:
    """Give first values to parameters that move and have none, and to what all share."""
    has_grad = set(moved)

    def is_needed(place: Any) -> bool:
        if place.kind == "slot" and not place.whole and place.i not in has_grad:
            return False
        return place.kind in ("slot", "joint") and place.key not in entries[place.i]

    absent = [place for place in plan.flat if place and is_needed(place)]
    slots = {(at.i, at.key) for at in plan.flat if at and at.kind == "slot"}
    for i in moved:
        started = any((i, key) in slots for key in entries[i])
        for key in plan.counts.keys:
            if key not in entries[i]:
                entries[i][key] = plan.counts.first(key, started and key == "step")
    if absent:
        everything = any(place.kind == "joint" or place.whole for place in absent)
        wanted = {place.i for place in absent}
        given = [
            p.detach() if everything or i in wanted else None
            for i, p in enumerate(params)
        ]
        given = from_card(plan, given)
        first = state_dict(plan.tx.init(plan.tree(plan.given(given))))
        mine = {place.path: first[place.path] for place in absent}
        mine = with_memory_of_its_own(mine, params)
        for place in absent:
            x = _own_draws(plan, place, mine[place.path])
            entries[place.i][place.key] = kept(plan, place, x, params[place.i])


def _own_draws(plan: Plan, place: Place, first: Tensor) -> Tensor:
    """The first value of a tensor of the state; a noise key is this bucket's own."""
    name = place.path.rpartition("/")[2]
    is_key = place.kind == "joint" and name in ("key", KEY)
    is_key = is_key and first.dtype is torch.int64 and first.shape == (2,)
    return random.fold_in(first, plan.place) if is_key and plan.place else first
