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
from functorch_opt._core.exchange import (
    Layout,
    Ranks,
    layout_of,
)
from functorch_opt._core.owned import kept_by, owner_of


def work_of(shape: Sequence[int]) -> int:
    """How much work a matrix rule does for a tensor: its elements times the second largest dim.

    That is the order of a product of two matrices of this shape, whichever dims the matrix has.
    """
    second = sorted(shape)[-2] if len(shape) > 1 else 1
    return max(1, int(torch.Size(shape).numel())) * max(1, second)


def assigned(shapes: Sequence[Sequence[int]], n: int) -> list[int]:
    """An owner for each tensor, one of `n` ranks.

    The one with the most work goes first, always to the rank that has the least so far.
    """
    by_work = sorted(
        range(len(shapes)),
        key=lambda i: (-work_of(shapes[i]), i),
    )
    ranks = [(0, k) for k in range(n)]
    owners = [0] * len(shapes)
    for i in by_work:
        load, owners[i] = heapq.heappop(ranks)
        heapq.heappush(
            ranks,
            (load + work_of(shapes[i]), owners[i]),
        )
    return owners


def has_owners(x: Any) -> bool:
    """Whether a rule that sees whole tensors works on `x` on one rank only."""
    return sharding.is_sharded(x) and x.device_mesh.size() > 1


def by_mesh(
    leaves: Sequence[Any],
) -> list[tuple[Any, list[int]]]:
    """For each mesh, the indices of the leaves that have an owner among its ranks."""
    found: dict[Any, list[int]] = {}
    for i, x in enumerate(leaves):
        if has_owners(x):
            found.setdefault(x.device_mesh, []).append(i)
    return list(found.items())


# ---- first values --------------------------------------------------------------------------------


def first_slots(
    slots: Mapping[str, Callable[[Tensor], Tensor]],
    leaves: list[Any],
) -> dict[str, list[Any]]:
    """The first values of the slots of a rule that sees whole tensors, each with its owner."""
    if not slots:
        return {}
    found: dict[str, list[Any]] = {name: [None] * len(leaves) for name in slots}
    plain = [i for i, p in enumerate(leaves) if p is not None and not has_owners(p)]
    for name, make in slots.items():
        for i in plain:
            found[name][i] = make(leaves[i])
    for mesh, mine in by_mesh(leaves):
        ps = [leaves[i] for i in mine]
        ranks, owners = (
            Ranks(mesh),
            assigned([p.shape for p in ps], mesh.size()),
        )
        wholes = _wholes(ranks, ps, owners)
        for i, owner, whole in zip(mine, owners, wholes, strict=True):
            for name, make in slots.items():
                found[name][i] = _first(make, leaves[i], whole, ranks, owner)
    return found


def _wholes(ranks: Ranks, ps: list[Any], owners: list[int]) -> list[Tensor | None]:
    """The whole parameters that are this rank's. If they are only shapes, nothing is sent."""
    if any(p.is_meta for p in ps):
        return [None] * len(ps)
    return ranks.to_owners(
        [sharding.settled(p.detach()) for p in ps],
        owners,
    )


def _first(
    make: Callable[[Tensor], Tensor],
    p: Any,
    whole: Tensor | None,
    ranks: Ranks,
    owner: int,
) -> Tensor:
    if whole is not None:
        value = make(whole)
        return _kept(value, ranks, owner, value)
    device = p.to_local().device
    try:
        value = make(torch.empty(p.shape, dtype=p.dtype, device="meta"))
    except (
        RuntimeError,
        NotImplementedError,
    ):  # it looks at the numbers
        value = make(torch.zeros(p.shape, dtype=p.dtype, device=device))
    return _kept(None, ranks, owner, value, device)


def _kept(
    x: Tensor | None,
    ranks: Ranks,
    owner: int,
    like: Any,
    device: Any = None,
) -> Tensor:
    device = like.device if device is None else device
    return kept_by(
        ranks.members[owner],
        ranks.mesh,
        x,
        like.shape,
        like.dtype,
        device,
    )


# ---- a step --------------------------------------------------------------------------------------


class Failed(NamedTuple):
    """What a rule raised, here or on the rank that owns the tensor."""

    error: Exception


Given = Callable[[int], tuple[torch.dtype, dict[str, Any]]]
"""The dtype in which the rule computes for a leaf, and what it reads of this step."""
Done = tuple[Tensor, dict[str, Tensor]] | Failed


def result(
    done: Done,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The update and the slots of a leaf. An error is raised, on every rank."""
    if isinstance(done, Failed):
        raise done.error
    return done


def apart(
    gs: Sequence[Any],
    slots: Mapping[str, Sequence[Any]],
) -> bool:
    """Whether owners do the work. No derivative goes through messages, and no graph has them."""
    if torch.compiler.is_compiling() or not any(map(has_owners, gs)):
        return False
    if not torch.is_grad_enabled():
        return True
    tensors = [x for column in (gs, *slots.values()) for x in column]
    return not any(isinstance(x, Tensor) and x.requires_grad for x in tensors)


def divided(
    on_tensor: Any,
    name: str,
    gs: list[Any],
    ps: list[Any],
    slots: Mapping[str, list[Any]],
    given: Given,
) -> dict[int, Done]:
    """What a rule that sees whole tensors makes of each sharded leaf, worked out by its owner."""
    done: dict[int, Done] = {}
    for mesh, mine in by_mesh(gs):
        ranks = Ranks(mesh)
        leaves = [
            _Leaf(
                on_tensor,
                i,
                gs,
                ps,
                slots,
                given,
                ranks,
            )
            for i in mine
        ]
        _find_owners(leaves, ranks)
        _send(leaves, ranks)
        done |= _worked_out(leaves, ranks, name)
    return done


class _Leaf:
    """One sharded leaf: what its rule reads, and what the owner makes of it."""

    def __init__(
        self,
        on_tensor: Any,
        i: int,
        gs: list[Any],
        ps: list[Any],
        slots: Mapping[str, list[Any]],
        given: Given,
        ranks: Ranks,
    ) -> None:
        self.on_tensor, self.i, self.g = (
            on_tensor,
            i,
            gs[i],
        )
        p = ps[i] if "p" in on_tensor.reads else None
        self.slots = {key: column[i] for key, column in slots.items()}
        self.dtype, now = given(i)
        self.values = {
            "g": self.g,
            "p": p,
            **self.slots,
            **now,
        }
        self.ranks, self.owner = ranks, -1
        self.made: Any = None

    @property
    def update_dtype(self) -> torch.dtype:
        """The dtype in which the update is sent back."""
        if self.g.is_complex() or not self.dtype.is_complex:
            return self.dtype
        return self.dtype.to_real()

    @property
    def layout(self) -> Layout:
        """How the update is cut: as what came in."""
        return layout_of(self.g, sharding._settled(self.g))

    def known_owner(self) -> int | None:
        """The owner of its slots."""
        for x in self.slots.values():
            if sharding.is_sharded(x) and (rank := owner_of(x)) is not None:
                return self.ranks.members.index(rank)
        return None

    def sent(self) -> dict[str, Any]:
        """What goes to the owner. Each rank has the rest, or the owner has it already."""
        found = {}
        for key, x in self.values.items():
            if not sharding.is_sharded(x):
                continue
            if owner_of(x) is not None:
                self.values[key] = x.to_local()
            elif x.device_mesh == self.ranks.mesh:
                found[key] = sharding.settled(x)
            else:
                self.values[key] = sharding.whole(x)
        return found

    def work(self) -> None:
        """The rule. An error waits until the others have been told."""
        slots = {key: self.values[key] for key in self.slots}
        g, p = self.values["g"], self.values["p"]
        now = {k: x for k, x in self.values.items() if k not in ("g", "p", *slots)}
        try:
            u, new = self.on_tensor.apply(g, p, slots, now, self.dtype)
            self.made = u.to(self.update_dtype), new
        except Exception as error:
            self.made = Failed(error)

    def kept(self, key: str) -> Tensor:
        """A slot after the step, which stays with the owner."""
        mine = self.made[1][key] if self.made else None
        old = self.slots[key]
        return _kept(
            mine,
            self.ranks,
            self.owner,
            old,
            self.g.to_local().device,
        )


def _find_owners(leaves: list[_Leaf], ranks: Ranks) -> None:
    """The owner of each leaf: that of its slots; leaves without are shared out."""
    free = []
    for leaf in leaves:
        owner = leaf.known_owner()
        if owner is None:
            free.append(leaf)
        else:
            leaf.owner = owner
    for leaf, owner in zip(
        free,
        assigned([leaf.g.shape for leaf in free], ranks.n),
        strict=True,
    ):
        leaf.owner = owner


def _send(leaves: list[_Leaf], ranks: Ranks) -> None:
    """Give every owner the wholes of what its rules read."""
    wanted = [(leaf, key, x) for leaf in leaves for key, x in leaf.sent().items()]
    xs, owners = (
        [x for _, _, x in wanted],
        [leaf.owner for leaf, _, _ in wanted],
    )
    wholes = ranks.to_owners(xs, owners)
    for (leaf, key, _), whole in zip(wanted, wholes, strict=True):
        leaf.values[key] = whole


def _worked_out(leaves: list[_Leaf], ranks: Ranks, name: str) -> dict[int, Done]:
    """Do the work of this rank's tensors, and exchange the updates."""
    for leaf in leaves:
        if leaf.owner == ranks.me:
            leaf.work()
    failed = any(isinstance(leaf.made, Failed) for leaf in leaves)
    done: dict[int, Done] = {}
    for dtype in dict.fromkeys([leaf.update_dtype for leaf in leaves]):
        of_dtype = [leaf for leaf in leaves if leaf.update_dtype is dtype]
        like = torch.empty(
            0,
            dtype=dtype,
            device=leaves[0].g.to_local().device,
        )
        parts, failures = ranks.from_owners(
            [None if failed or not leaf.made else leaf.made[0] for leaf in of_dtype],
            [leaf.owner for leaf in of_dtype],
            [leaf.layout for leaf in of_dtype],
            like,
            failed,
        )
        for leaf, part in zip(of_dtype, parts, strict=True):
            done[leaf.i] = _done(leaf, part, failures, name)
    return done


def _done(
    leaf: _Leaf,
    part: Tensor,
    failures: list[int],
    name: str,
) -> Done:
    if isinstance(leaf.made, Failed):
        return leaf.made
    if failures:
        ranks = ", ".join([str(leaf.ranks.members[k]) for k in failures])
        return Failed(RuntimeError(f"{name}: the rule failed on rank {ranks}."))
    return sharding.join(part, leaf.g), {key: leaf.kept(key) for key in leaf.slots}
