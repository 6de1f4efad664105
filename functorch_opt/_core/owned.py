"""Tensors that one rank has, and no other: the slots of a rule that sees whole tensors.

Such a tensor is a DTensor on a mesh of one rank, which is how torch says it: its owner has the
whole, and the other ranks have its shape and dtype. `torch.distributed.checkpoint` writes it once,
and reads it into any other layout.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

PREFIX = "owner among "
OWNED = "a tensor with an owner"
"""What an error calls it."""


@functools.lru_cache
def group_of(ranks: tuple[int, ...]) -> Any:
    """The process group of these ranks. All of them call it, and nobody else has to."""
    if ranks == tuple(range(dist.get_world_size())):
        return dist.group.WORLD
    return dist.new_group(list(ranks), use_local_synchronization=True)


def members(mesh: Any) -> tuple[int, ...]:
    """The ranks of a mesh, in its order; of the mesh of an owner, those among which it is one."""
    name = _owners_name(mesh)
    if name is not None:
        return _read(name)
    return tuple(mesh.mesh.flatten().tolist())


def _owners_name(mesh: Any) -> str | None:
    """Among which ranks the one of this mesh is an owner, as text; None for other meshes."""
    names = mesh.mesh_dim_names
    if not names or not names[0].startswith(PREFIX):
        return None
    return str(names[0]).removeprefix(PREFIX)


def home(mesh: Any) -> Any:
    """What the meshes of all owners among the same ranks have in common; another mesh is itself."""
    if _owners_name(mesh) is None:
        return mesh
    ranks = members(mesh)
    return _mesh_of_one(mesh.device_type, ranks[0], ranks)


def home_of_all(device_type: str) -> Any:
    """The `home` of tensors whose owners are among all ranks of this run."""
    return _mesh_of_one(device_type, 0, tuple(range(dist.get_world_size())))


@functools.lru_cache(None)
def _mesh_of_one(
    device_type: str,
    rank: int,
    ranks: tuple[int, ...],
) -> Any:
    """The mesh of one rank. The name of its dim says among which ranks it is an owner."""
    from torch.distributed.device_mesh import DeviceMesh

    name = PREFIX + _written(ranks)
    # Nothing is ever sent on it, so it needs no process group, which all ranks would have to make.
    return DeviceMesh(device_type, [rank], mesh_dim_names=(name,), _init_backend=False)


def _written(ranks: Sequence[int]) -> str:
    """Ranks as text: "0-3 8" is 0, 1, 2, 3 and 8."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    return " ".join([_written_run(run) for run in runs])


def _written_run(run: list[int]) -> str:
    first, last = run[0], run[-1]
    return str(first) if first == last else f"{first}-{last}"


@functools.lru_cache
def _read(text: str) -> tuple[int, ...]:
    """The ranks that `_written` has written."""
    found: list[int] = []
    for part in text.split():
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    return tuple(found)


@functools.lru_cache
def mesh_of_all(device_type: str) -> Any:
    """The mesh of all ranks of this run, in a row."""
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(device_type, (dist.get_world_size(),))


def owner_of(x: Any) -> int | None:
    """The rank that has `x`, a DTensor, alone; None if it lies on its mesh in the usual way."""
    if _owners_name(x.device_mesh) is None:
        return None
    return int(x.device_mesh.mesh.item())


def is_here(x: Any) -> bool:
    """Whether this rank is the owner of `x`, which has one."""
    return owner_of(x) == dist.get_rank()


def given_to(
    owner: int,
    mesh: Any,
    x: Tensor,
) -> Any:
    """The tensor `x`, which all ranks of a mesh have, as that of its owner: in the same memory."""
    from torch.distributed.tensor import Replicate

    one = _mesh_of_one(mesh.device_type, owner, members(mesh))
    if dist.get_rank() == owner:
        return joined(x, one, [Replicate()], x)
    return _on(one, x.new_empty(0), x.shape)


class Kind(NamedTuple):
    """What all ranks know of a tensor that one of them has."""

    shape: Any
    dtype: torch.dtype
    device: Any


def kept_by(
    owner: int,
    mesh: Any,
    x: Tensor | None,
    kind: Kind,
) -> Tensor:
    """The tensor `x` of a rank of `mesh`. The other ranks give None, and know its kind."""
    one = _mesh_of_one(mesh.device_type, owner, members(mesh))
    if x is None:
        x = torch.empty(0, dtype=kind.dtype, device=kind.device)
    return _on(one, x, kind.shape)


def _on(
    one: Any,
    local: Tensor,
    shape: Any,
) -> Tensor:
    """A DTensor of this shape on a mesh of one rank; the others have no element of it."""
    from torch.distributed.tensor import Replicate

    like = torch.empty(tuple(shape), device="meta")
    return joined(local.contiguous(), one, [Replicate()], like)


def joined(
    part: Tensor,
    mesh: Any,
    placements: Any,
    like: Any,
) -> Any:
    """The DTensor of which `part` is this rank's part, of the shape and stride of `like`."""
    from torch.distributed.tensor import DTensor

    if not like.shape and not part.numel():  # torch takes the shape () for none
        part = part.new_zeros(())
    return DTensor.from_local(
        part, mesh, placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def kept_as(like: Any, x: Tensor) -> Tensor:
    """The tensor `x`, which all ranks have, with the owner of `like`, who alone keeps it."""
    owner = owner_of(like)
    assert owner is not None
    if dist.get_rank() != owner:
        x = x.flatten()[:0]
    return _on(like.device_mesh, x, like.shape)


def _sharers(x: Any) -> tuple[int, ...]:
    """The ranks among which one owns `x`, in the order of their numbers."""
    return tuple(sorted(members(x.device_mesh)))


def everybodys_rows(row: Tensor, like: Any) -> Tensor:
    """The numbers that each of the ranks has among which one owns `like`: a row for each rank."""
    refuse_derivatives(OWNED, [row])
    ranks = _sharers(like)
    rows = [torch.empty_like(row) for _ in ranks]
    dist.all_gather(rows, row, group=group_of(ranks))
    return torch.stack(rows)


def everybodys_copy(x: Any) -> Tensor:
    """What its owner has, on all the ranks among which it is one. All of them call it."""
    owner = owner_of(x)
    refuse_derivatives(OWNED, [x])
    local = x.to_local()
    if local.is_meta:
        return torch.empty(x.shape, dtype=x.dtype, device="meta")
    found = torch.empty(x.shape, dtype=x.dtype, device=local.device)
    if dist.get_rank() == owner:
        found.copy_(local)
    group = group_of(_sharers(x))
    if found.numel():  # gloo has no message without bytes
        dist.broadcast(found.view(-1).view(torch.uint8), owner, group=group)
    return found


def refuse_derivatives(name: str, tensors: Sequence[Any]) -> None:
    """Raise NotImplementedError in a graph, or where a derivative is wanted."""
    wanted = any(isinstance(x, Tensor) and x.requires_grad for x in tensors)
    if torch.compiler.is_compiling() or (wanted and torch.is_grad_enabled()):
        raise NotImplementedError(
            f"{name}: no derivative goes through messages, and no graph has them. Leave {name} "
            "out of what is differentiated or given to torch.compile; or detach the gradients."
        )
