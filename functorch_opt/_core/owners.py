"""Rules that see whole tensors, on sharded ones: each tensor has an owner, which does its work.

The parts of the updates go to the owners in one message, each owner works on its own tensors, and
the parts of the results come back in one message. So no work is done twice, and what a rule keeps
for a tensor stays with the owner: see `functorch_opt._core.owned`. Nothing is sent to agree on the
owners, for every rank works them out from the shapes.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functorch_opt._core import sharding
from functorch_opt._core.exchange import Parcel, Ranks, grouped, layout_of, parcel_to
from functorch_opt._core.on_owner import update_dtype
from functorch_opt._core.owned import Kind, home, is_here, owner_of


def work_of(shape: Sequence[int]) -> int:
    """How much work a matrix rule does for a tensor: its elements times the second largest dim.

    That is the order of a product of two matrices of this shape, whichever dims the matrix has.
    """
    n = torch.Size(shape).numel()
    second = sorted(shape)[-2] if len(shape) > 1 else 1
    return max(1, n) * max(1, second)


def assigned(
    shapes: Sequence[Sequence[int]], n: int, loads: Sequence[int] = ()
) -> list[int]:
    """An owner for each tensor, one of `n` ranks, which may have `loads` of work already.

    The one with the most work goes first, always to the rank that has the least so far.
    """
    work = [work_of(shape) for shape in shapes]
    by_work = sorted(range(len(shapes)), key=lambda i: (-work[i], i))
    loads = loads or [0] * n
    ranks = [(load, rank) for rank, load in enumerate(loads)]
    heapq.heapify(ranks)
    owners = [0] * len(shapes)
    for i in by_work:
        load, owner = heapq.heappop(ranks)
        owners[i] = owner
        heapq.heappush(ranks, (load + work[i], owner))
    return owners


def shared_out(
    shapes: Sequence[Sequence[int]], known: Sequence[int | None], n: int
) -> list[int]:
    """An owner for each tensor: the one that is `known`, or the others are shared out."""
    free = [i for i, owner in enumerate(known) if owner is None]
    loads = [0] * n
    for shape, owner in zip(shapes, known, strict=True):
        if owner is not None:
            loads[owner] += work_of(shape)
    owners = assigned([shapes[i] for i in free], n, loads)
    of_free = dict(zip(free, owners, strict=True))
    return [of_free[i] if owner is None else owner for i, owner in enumerate(known)]


def has_owners(x: Any) -> bool:
    """Whether a rule that sees whole tensors works on `x` on one rank only."""
    if not sharding.is_sharded(x):
        return False
    return x.device_mesh.size() > 1 or owner_of(x) is not None


def by_mesh(
    leaves: Sequence[Any], chosen: Callable[[Any], bool] = has_owners
) -> list[tuple[Any, list[int]]]:
    """For each mesh, the indices of the `chosen` leaves that have an owner among its ranks."""
    owned = [i for i, x in enumerate(leaves) if chosen(x)]
    return list(grouped(owned, lambda i: home(leaves[i].device_mesh)).items())


# ---- first values --------------------------------------------------------------------------------

First = Callable[[Tensor], Tensor]
"""Makes the first value of a slot, of a parameter."""


def first_slots(
    slots: Mapping[str, First], leaves: list[Any], whole: bool
) -> dict[str, list[Any]]:
    """The first values of the slots of a rule, each with its owner if the leaf has one.

    If the rule sees `whole` tensors, each sharded leaf has one.
    """
    if not slots:
        return {}
    chosen = has_owners if whole else sharding.is_owned
    found: dict[str, list[Any]] = {name: [None] * len(leaves) for name in slots}
    for name, make in slots.items():
        for i, p in enumerate(leaves):
            if p is not None and not chosen(p):
                found[name][i] = make(p)
    for mesh, mine in by_mesh(leaves, chosen):
        ranks = Ranks(mesh)
        parcels = _sent(ranks, [leaves[i] for i in mine])
        for i, parcel in zip(mine, parcels, strict=True):
            for name, make in slots.items():
                found[name][i] = _first(make, parcel, ranks)
    return found


def _sent(ranks: Ranks, ps: list[Any]) -> list[Parcel]:
    """The parameters, each sent to an owner. If they are only shapes, nothing is sent."""
    if owner_of(ps[0]) is not None:
        return [_there(ranks, p) for p in ps]
    owners = assigned([p.shape for p in ps], ranks.n)
    if any(p.is_meta for p in ps):
        return list(map(parcel_to, owners, ps))
    settled = [sharding.settled(p.detach()) for p in ps]
    parcels = list(map(parcel_to, owners, settled))
    ranks.to_owners(parcels)
    return parcels


def _there(ranks: Ranks, p: Any) -> Parcel:
    """A parameter that is with its owner already."""
    parcel = parcel_to(ranks.members.index(owner_of(p)), p)
    if is_here(p):
        parcel.whole = p.detach().to_local()
    return parcel


def _first(
    make: First,
    parcel: Parcel,
    ranks: Ranks,
) -> Tensor:
    whole = parcel.whole
    if whole is not None:
        value = make(whole)
        kind = Kind(value.shape, value.dtype, value.device)
        return ranks.keep(parcel.owner, value, kind)
    p = parcel.sharded
    device = p.to_local().device
    try:
        value = make(torch.empty(p.shape, dtype=p.dtype, device="meta"))
    except (RuntimeError, NotImplementedError):  # it looks at the numbers
        value = make(torch.zeros(p.shape, dtype=p.dtype, device=device))
    return ranks.keep(parcel.owner, None, Kind(value.shape, value.dtype, device))


# ---- a step --------------------------------------------------------------------------------------


class Failed(NamedTuple):
    """What a rule raised, here or on the rank that owns the tensor."""

    error: Exception


Given = Callable[[int], tuple[torch.dtype, dict[str, Any]]]
"""The dtype in which the rule computes for a leaf, and what it reads of this step."""
Done = tuple[Tensor, dict[str, Tensor]] | Failed


def result(done: Done) -> tuple[Tensor, dict[str, Tensor]]:
    """The update and the slots of a leaf. An error is raised, on every rank."""
    if isinstance(done, Failed):
        raise done.error
    return done


def apart(gs: Sequence[Any], slots: Mapping[str, Sequence[Any]]) -> bool:
    """Whether owners do the work. No derivative goes through messages, and no graph has them."""
    if torch.compiler.is_compiling() or not any(map(has_owners, gs)):
        return False
    if not torch.is_grad_enabled():
        return True
    tensors = [x for column in (gs, *slots.values()) for x in column]
    return not any(isinstance(x, Tensor) and x.requires_grad for x in tensors)


class Step(NamedTuple):
    """One step of a rule that sees whole tensors, and what it reads of all leaves."""

    name: str
    on_tensor: Any
    gs: list[Any]
    ps: list[Any]
    slots: Mapping[str, list[Any]]
    given: Given


def divided(step: Step) -> dict[int, Done]:
    """What a rule that sees whole tensors makes of each sharded leaf, worked out by its owner."""
    done: dict[int, Done] = {}
    for mesh, mine in by_mesh(step.gs):
        ranks = Ranks(mesh)
        leaves = [_Leaf(step, i, ranks) for i in mine]
        _find_owners(leaves, ranks)
        _send(leaves, ranks)
        for leaf in leaves:
            if leaf.owner == ranks.me:
                leaf.work()
        failures = _send_back(leaves, ranks)
        for leaf in leaves:
            done[leaf.i] = leaf.done(failures)
    return done


class _Leaf:
    """One sharded leaf: what its rule reads, and what the owner makes of it."""

    def __init__(
        self,
        step: Step,
        i: int,
        ranks: Ranks,
    ) -> None:
        self.step, self.i, self.ranks = step, i, ranks
        self.g = step.gs[i]
        p = step.ps[i] if "p" in step.on_tensor.reads else None
        self.slots = {key: column[i] for key, column in step.slots.items()}
        self.dtype, self.now = step.given(i)
        self.values = {"g": self.g, "p": p, **self.slots, **self.now}
        self.owner = -1
        self.sent: dict[str, Parcel] = {}
        """What goes to the owner. Each rank has the rest, or the owner has it already."""
        self.update: Any = None
        """The update, on its way from the owner."""
        self.made: Any = None
        """On the owner, what the rule made."""

    @property
    def device(self) -> torch.device:
        return self.g.to_local().device

    @property
    def failed(self) -> bool:
        return isinstance(self.made, Failed)

    @property
    def update_dtype(self) -> torch.dtype:
        """The dtype in which the update is sent back."""
        return update_dtype(self.g, self.dtype)

    def known_owner(self) -> int | None:
        """Its owner, or that of its slots."""
        for x in (self.g, *self.slots.values()):
            rank = owner_of(x) if sharding.is_sharded(x) else None
            if rank is not None:
                return self.ranks.members.index(rank)
        return None

    def pack(self) -> None:
        """Sort out what goes to the owner."""
        for key, x in self.values.items():
            if not sharding.is_sharded(x):
                continue
            if owner_of(x) is not None:
                self.values[key] = x.to_local()
            elif x.device_mesh == self.ranks.mesh:
                self.sent[key] = parcel_to(self.owner, sharding.settled(x))
            else:
                self.values[key] = sharding.whole(x)

    def work(self) -> None:
        """The rule. An error waits until the others have been told."""
        values = dict(self.values)
        for key, parcel in self.sent.items():
            values[key] = parcel.whole
        slots = {key: values[key] for key in self.slots}
        now = {key: values[key] for key in self.now}
        apply = self.step.on_tensor.apply
        try:
            u, new = apply(values["g"], values["p"], slots, now, self.dtype)
            self.made = u.to(self.update_dtype), new
        except Exception as error:
            self.made = Failed(error)

    def pack_update(self, failed: bool) -> None:
        """Sort out what comes back: the update, cut as what came in."""
        layout = layout_of(self.g, sharding._settled(self.g))
        self.update = Parcel(layout, self.owner)
        if self.made and not failed:
            self.update.whole = self.made[0]

    def done(self, failures: list[int]) -> Done:
        """The update and the slots, which stay with the owner; or what was raised."""
        if self.failed:
            return self.made
        if failures:
            ranks = ", ".join([str(self.ranks.members[rank]) for rank in failures])
            error = f"{self.step.name}: the rule failed on rank {ranks}."
            return Failed(RuntimeError(error))
        none: tuple[Any, dict[str, Tensor]] = None, {}
        u, new = self.made or none
        kept = {}
        for key, old in self.slots.items():
            kind = Kind(old.shape, old.dtype, self.device)
            kept[key] = self.ranks.keep(self.owner, new.get(key), kind)
        if sharding.is_owned(self.g):  # nothing was sent, and nothing comes back
            kind = Kind(self.g.shape, self.update_dtype, self.device)
            return self.ranks.keep(self.owner, u, kind), kept
        return sharding.join(self.update.part, self.g), kept


def _find_owners(leaves: list[_Leaf], ranks: Ranks) -> None:
    """The owner of each leaf: that of its slots; leaves without are shared out."""
    known = [leaf.known_owner() for leaf in leaves]
    owners = shared_out([leaf.g.shape for leaf in leaves], known, ranks.n)
    for leaf, owner in zip(leaves, owners, strict=True):
        leaf.owner = owner


def _send(leaves: list[_Leaf], ranks: Ranks) -> None:
    """Give every owner the wholes of what its rules read."""
    parcels: list[Parcel] = []
    for leaf in leaves:
        leaf.pack()
        parcels += leaf.sent.values()
    ranks.to_owners(parcels)


def _send_back(leaves: list[_Leaf], ranks: Ranks) -> list[int]:
    """Give every rank its parts of the updates; and the ranks whose rule failed."""
    failed = any(leaf.failed for leaf in leaves)
    failures: list[int] = []
    by_dtype = grouped(leaves, lambda leaf: leaf.update_dtype)
    for dtype, of_dtype in by_dtype.items():
        sent = [leaf for leaf in of_dtype if not sharding.is_owned(leaf.g)]
        for leaf in sent:
            leaf.pack_update(failed)
        parcels = [leaf.update for leaf in sent]
        like = torch.empty(0, dtype=dtype, device=leaves[0].device)
        failures = ranks.from_owners(parcels, like, failed)
    return failures
