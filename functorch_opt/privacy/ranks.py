"""Examples on many ranks.

Tensors with an axis of examples, [B, ...], may be DTensors. Where they have ``Shard(0)``, the
examples are divided among the ranks, and each rank works on its own. Gradients may be divided along
the dims of the parameter as well. Then a rank has a part of the gradient of each of its examples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functorch_opt._core import numerics, sharding
from functorch_opt._core.exchange import grouped
from functorch_opt._core.owned import joined, refuse_derivatives


class Division(NamedTuple):
    """Which ranks have which examples: they are divided along `dims` of the `mesh`."""

    n: int
    """How many examples there are."""
    here: int
    """How many of them this rank has."""
    mesh: Any = None
    """None if the tensors are ordinary ones."""
    dims: tuple[int, ...] = ()

    def of_examples(self, x: Tensor) -> Any:
        """A tensor of all examples, of which `x` has those of this rank."""
        from torch.distributed.tensor import Shard

        return self._joined(x, (self.n, *x.shape[1:]), Shard(0))

    def total(self, x: Tensor) -> Any:
        """The sum over all examples, where `x` is that over those of this rank.

        Nothing is sent for it: the placements say that it is a sum.
        """
        from torch.distributed.tensor import Partial

        return self._joined(x, x.shape, Partial())

    def _joined(
        self,
        x: Tensor,
        shape: Sequence[int],
        divided: Any,
    ) -> Any:
        if self.mesh is None:
            return x
        like = torch.empty(tuple(shape), device="meta")
        return joined(x, self.mesh, self.placements(divided), like)

    def placements(self, divided: Any) -> list[Any]:
        """A placement for each dim of the mesh: `divided` where the examples are."""
        from torch.distributed.tensor import Replicate

        dims = range(self.mesh.ndim)
        return [divided if dim in self.dims else Replicate() for dim in dims]

    def weights_here(self, weights: Tensor | None) -> Tensor | None:
        """Those of this rank's examples, of all weights [B]."""
        if weights is None or self.mesh is None:
            return sharding.whole(weights)
        like = self.of_examples(weights.new_empty(self.here))
        return sharding.part_of(weights, like)


# ---- a batch -------------------------------------------------------------------------------------


def of_batch(name: str, params: Sequence[Any], batch: Sequence[Any]) -> Division:
    """How the examples of a `batch` are divided, for a gradient at `params`.

    Raises:
        NotImplementedError: a derivative would go through messages.
        ValueError: the tensors are not divided alike, or not by examples.
    """
    xs = [x for x in batch if x is not None]
    if not sharding.any_sharded([*xs, *params]):
        return Division(len(xs[0]), len(xs[0]))
    refuse_derivatives(name, [*xs, *params])
    kinds = {_layout(x) for x in xs}
    mesh, placements = kinds.pop()
    if mesh is None or kinds or not all(map(_by_examples, placements)):
        raise ValueError(
            f"{name}: with many ranks each tensor of the batch must be a DTensor that is divided "
            "by examples, all of them alike. Write DTensor.from_local(x, mesh, [Shard(0)]) of "
            "this rank's examples, or [Replicate()] if every rank has all of them."
        )
    here = len(xs[0].to_local())
    return Division(len(xs[0]), here, mesh, _example_dims(xs[0]))


def _layout(x: Any) -> tuple[Any, tuple[Any, ...]]:
    """The mesh and the placements of a tensor. An ordinary one has neither."""
    return (x.device_mesh, x.placements) if sharding.is_sharded(x) else (None, ())


def _by_examples(placement: Any) -> bool:
    from torch.distributed.tensor import Shard

    return placement.is_replicate() or placement == Shard(0)


def _example_dims(x: Any) -> tuple[int, ...]:
    """The dims of the mesh along which the examples of `x` are divided."""
    if not sharding.is_sharded(x):
        return ()
    placements = enumerate(x.placements)
    return tuple([dim for dim, placement in placements if placement.is_shard(0)])


# ---- gradients -----------------------------------------------------------------------------------


def of_gradients(name: str, gs: Sequence[Any], n: int) -> Division:
    """How the `n` examples of gradients are divided. None stands for a gradient that is missing.

    Raises:
        NotImplementedError: a derivative would go through messages.
        TypeError: a tensor lies with an owner, or is cut in a way that cannot be followed.
        ValueError: the examples of the tensors are not divided alike.
    """
    present = [g for g in gs if g is not None]
    sharded = list(filter(sharding.is_sharded, present))
    if not sharded:
        return Division(n, n)
    refuse_derivatives(name, present)
    for g in sharded:
        _check_cut(name, g)
    kinds = {(_layout(g)[0], _example_dims(g)) for g in present}
    if not any(dims for _, dims in kinds):
        return Division(n, n)
    if len(kinds) > 1:
        raise ValueError(
            f"{name}: the examples of some gradients are divided among ranks (Shard(0)), and those "
            "of others are not, or on another mesh. Divide them alike, as per_example_grads does."
        )
    (mesh, dims), g = kinds.pop(), sharded[0]
    return Division(n, len(g.to_local()), mesh, dims)


def _check_cut(name: str, g: Any) -> None:
    from torch.distributed.tensor import Partial, Replicate, Shard

    if sharding.is_owned(g):
        raise TypeError(
            f"{name} takes no tensors with owners. Leave it outside: "
            "chain(differentially_private_aggregate(...), with_owners(...))."
        )
    for placement in g.placements:
        if not isinstance(placement, (Partial, Replicate, Shard)):
            raise TypeError(f"{name} takes no gradient that is cut as {placement}.")


def norms(
    gs: Sequence[Any],
    division: Division,
) -> list[Tensor]:
    """The norm of each of this rank's examples, for each of the gradients: [b].

    Where the ranks have parts of them there is one message for each layout.
    """
    found = [_norm_here(g) for g in gs]
    cut = [i for i, g in enumerate(gs) if _cut_dims(g)]
    by_layout = grouped(cut, lambda i: (gs[i].device_mesh, _cut_dims(gs[i])))
    for (mesh, dims), indices in by_layout.items():
        parts = [found[i] for i in indices]
        wholes = _norms_of_wholes(parts, mesh, dims, division)
        for i, norm in zip(indices, wholes, strict=True):
            found[i] = norm
    return found


def _norm_here(g: Any) -> Tensor:
    part = sharding.part_of(g)
    dtype = numerics.at_least_float32(part.dtype)
    rows = part.unsqueeze(1).flatten(1)
    return torch.linalg.vector_norm(rows, dim=1, dtype=dtype)


def _cut_dims(g: Any) -> tuple[int, ...]:
    """The dims of the mesh along which `g` is cut in parts of its parameter."""
    if not sharding.is_sharded(g):
        return ()
    placements = enumerate(g.placements)
    return tuple([i for i, at in placements if at.is_shard() and not at.is_shard(0)])


def _norms_of_wholes(
    parts: list[Tensor],
    mesh: Any,
    dims: tuple[int, ...],
    division: Division,
) -> list[Tensor]:
    """The norms of tensors, from those of the parts that this rank has."""
    from torch.distributed.tensor import Partial, Replicate, Shard

    wide = numerics.real_dtype(parts[0].device)
    squares = torch.stack([norm.to(wide) ** 2 for norm in parts])
    whole = [
        Shard(1) if dim in division.dims else Replicate() for dim in range(mesh.ndim)
    ]
    terms = [Partial() if dim in dims else at for dim, at in enumerate(whole)]
    like = torch.empty(len(parts), division.n, device="meta")
    total = joined(squares, mesh, terms, like).redistribute(placements=whole)
    rows = total.to_local().sqrt().unbind()
    return [row.to(norm.dtype) for row, norm in zip(rows, parts, strict=True)]


def summed(factors: Tensor, g: Any) -> Any:
    """The sum of the gradients of this rank's examples, each by its factor.

    Of gradients on many ranks it is the whole sum, which is not taken yet.
    """
    part = sharding.part_of(g)
    part = part.to(numerics.at_least_float32(part.dtype))
    total = torch.tensordot(factors.to(part.dtype), part, 1)
    if not sharding.is_sharded(g):
        return total
    placements = list(map(_of_sum, g.placements))
    like = torch.empty(g.shape[1:], device="meta")
    return joined(total, g.device_mesh, placements, like)


def _of_sum(placement: Any) -> Any:
    """How the sum over examples lies, where the gradients lie as `placement` says."""
    from torch.distributed.tensor import Partial, Replicate, Shard

    if not placement.is_shard():
        return Replicate()
    return Shard(placement.dim - 1) if placement.dim else Partial()


# ---- the sum over the ranks ----------------------------------------------------------------------


def laid_out(sums: Sequence[Any], params: Sequence[Any]) -> list[Any]:
    """Sums over the examples of all ranks, each laid out as its parameter.

    Those of ordinary parameters, which every rank has, go in one message for each dtype.

    Raises:
        ValueError: a sum is on another mesh than its parameter.
    """
    found = list(sums)
    alike: list[int] = []
    for i, (x, p) in enumerate(zip(sums, params, strict=True)):
        if x is None or p is None or not sharding.is_sharded(x):
            continue
        if not sharding.is_sharded(p):
            alike.append(i)
        elif p.device_mesh == x.device_mesh:
            found[i] = sharding.join(sharding.part_of(x, p), p)
        else:
            raise ValueError(
                f"the examples are divided on {x.device_mesh}, and a parameter lies on "
                f"{p.device_mesh}. Divide the examples on the mesh of the parameters: "
                "[Shard(0)] * mesh.ndim."
            )
    by_kind = grouped(alike, lambda i: (*_layout(sums[i]), sums[i].dtype))
    for indices in by_kind.values():
        wholes = _taken([sums[i] for i in indices])
        for i, x in zip(indices, wholes, strict=True):
            found[i] = x
    return found


def _taken(sums: list[Any]) -> list[Any]:
    """Sums of one layout, on every rank. If they are not whole on any rank, they stay."""
    mesh, placements = _layout(sums[0])
    if any(placement.is_shard() for placement in placements):
        return sums
    parts = [x.to_local() for x in sums]
    row = torch.cat([part.flatten() for part in parts])
    total = joined(row, mesh, placements, row).full_tensor()
    sizes = [part.numel() for part in parts]
    rows = zip(total.split(sizes), parts, strict=True)
    return [x.view(part.shape) for x, part in rows]
