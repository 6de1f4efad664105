"""Ordinary tensors that are the same on every rank, as under DDP: each is given to an owner.

The owner alone works on its tensors and keeps their slots, as in ZeRO. Nothing is sent to give them,
for every rank has them; what the owners make of them goes to all ranks in one message.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor

from functorch_opt._core import sharding
from functorch_opt._core.exchange import Layout, Parcel, Ranks, grouped
from functorch_opt._core.owned import given_to, home_of_all, is_here, owner_of
from functorch_opt._core.owners import shared_out


def is_one_process() -> bool:
    """Whether there is nobody to share work with."""
    return (
        not dist.is_available() or not dist.is_initialized() or dist.get_world_size() < 2
    )


class Replicas:
    """Which rank owns each of some tensors; those that are sharded, or None, have no owner here.

    Args:
        like: the tensors, all of them: the owners depend on the shapes of all.
        known: for each tensor the rank that has its slots already; None where there is none yet.
    """

    def __init__(
        self,
        like: Sequence[Any],
        known: Sequence[int | None] | None = None,
    ) -> None:
        known = [None] * len(like) if known is None else known
        self.mine = [i for i, x in enumerate(like) if _is_replica(x)]
        self.owners: dict[int, int] = {}
        if not self.mine or is_one_process():
            self.mine = []
            return
        self.home = home_of_all(like[self.mine[0]].device.type)
        self.ranks = Ranks(self.home)
        shapes = [like[i].shape for i in self.mine]
        owners = shared_out(shapes, [known[i] for i in self.mine], self.ranks.n)
        self.owners = dict(zip(self.mine, owners, strict=True))

    def given(self, xs: Sequence[Any]) -> list[Any]:
        """The tensors, each with its owner, in the same memory. Nothing is sent."""
        given = list(xs)
        for i, owner in self.owners.items():
            if _is_replica(given[i]):
                given[i] = given_to(owner, self.home, given[i])
        return given

    def taken(self, xs: Sequence[Any], errors: Sequence[Exception] = ()) -> list[Any]:
        """The tensors that their owners have, on every rank: one message for each dtype.

        Raises:
            RuntimeError: there were `errors` on another rank. The first own one is raised as it is.
        """
        taken = list(xs)
        if errors and not self.mine:
            raise errors[0]
        if not self.mine:
            return taken
        wanted = [i for i in self.mine if sharding.is_owned(taken[i])]
        by_dtype = grouped(wanted, lambda i: taken[i].dtype)
        failed, failures = bool(errors), []
        for dtype, indices in by_dtype.items():
            parcels = [self._parcel(taken[i], self.owners[i], failed) for i in indices]
            like = taken[indices[0]].to_local().new_empty(0, dtype=dtype)
            failures = self.ranks.from_owners(parcels, like, failed)
            for i, parcel in zip(indices, parcels, strict=True):
                taken[i] = parcel.part
        if failed:
            raise errors[0]
        if failures:
            raise RuntimeError(
                f"the step failed on rank {', '.join(map(str, failures))}."
            )
        return taken

    def _parcel(
        self,
        x: Any,
        owner: int,
        failed: bool,
    ) -> Parcel:
        from torch.distributed.tensor import Replicate

        layout = Layout(tuple(x.shape), (self.ranks.n,), (Replicate(),))
        parcel = Parcel(layout, owner)
        if not failed and is_here(x):
            parcel.whole = x.detach().to_local()
        return parcel


def _is_replica(x: Any) -> bool:
    return isinstance(x, Tensor) and not sharding.is_sharded(x)


def known_owner(slots: Sequence[Any]) -> int | None:
    """The owner of these slots of a tensor; None if they have none."""
    owned = filter(sharding.is_owned, slots)
    return next((owner_of(x) for x in owned), None)
