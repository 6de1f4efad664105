"""What the ranks do in the tests of private training: each has some of the examples of a batch, or
parts of the gradients of all of them.

The reference is one process with the whole batch. Every rank works it out for itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from owners import drawn
from scenarios import make_net, mesh, place
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.placement_types import _StridedShard
from torch.func import functional_call

import functorch_opt as fo
from functorch_opt import tree

C, SIGMA = 0.7, 1.3
N = 9
"""Examples in a batch. Neither 2 nor 4 divides it."""

NET = make_net()


def loss(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
    return ((functional_call(NET, params, x) - y) ** 2).mean()


def examples(step: int, n: int = N) -> tuple[Tensor, Tensor]:
    given = drawn(step, {"x": (n, 6), "y": (n, 1)})
    return given["x"], given["y"]


def start() -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in make_net().named_parameters()}


def layouts() -> dict[str, tuple[Any, list[Any], list[Any] | None]]:
    """A mesh, how the examples lie on it, and how the parameters do; None for ordinary ones."""
    if dist.get_world_size() == 2:
        return {
            "copies": (mesh(), [Shard(0)], None),
            "FSDP2": (mesh(), [Shard(0)], [Shard(0)]),
            "the same examples": (mesh(), [Replicate()], [Shard(0)]),
        }
    grid = mesh(2, 2)
    return {
        "copies": (mesh(), [Shard(0)], None),
        "HSDP": (grid, [Shard(0), Shard(0)], [Replicate(), Shard(0)]),
        "beside copies": (grid, [Replicate(), Shard(0)], [Replicate(), Shard(0)]),
        "tensor parallel": (grid, [Shard(0), Replicate()], [Replicate(), Shard(0)]),
    }


def furthest(ours: Any, theirs: Any) -> float:
    """The sum of all differences between the numbers of two trees."""
    pairs = zip(tree.leaves(ours), tree.leaves(theirs), strict=True)
    distances = [(1.0 * tree.whole(a) - 1.0 * b).abs().sum() for a, b in pairs]
    return float(sum(distances))


def trained(rank: int, layout: str, sizes: list[int]) -> dict[str, Any]:
    """Steps of a private optimizer with batches of these sizes, beside one process."""
    where, of_batch, of_params = layouts()[layout]
    key, options = fo.random.key(3), {"expected_batch_size": 8.0}
    tx = fo.dp_adam(0.05, C, SIGMA, key, **options)
    sums = fo.clipped_grad_sum(loss, C, chunk_size=2)

    def put(x: Tensor, placements: list[Any] | None) -> Tensor:
        return x if placements is None else place(x, where, placements)

    ps = start()
    mine = {name: put(p, of_params) for name, p in ps.items()}
    state, held = tx.init(ps), tx.init(mine)
    seen = []
    for step, n in enumerate(sizes):
        x, y = examples(step, n)
        weights = drawn(step, {"w": (n,)})["w"]
        theirs = sums(ps, x, y, weights=weights)
        ours = sums(mine, put(x, of_batch), put(y, of_batch), weights=weights)
        seen += [furthest(ours[:2], theirs[:2]), furthest(ours.values, theirs.values)]
        us, state = tx.update(theirs, state, ps)
        our_us, held = tx.update(ours, held, mine)
        ps, mine = fo.apply_updates(ps, us), fo.apply_updates(mine, our_us)
    placements = [tree.is_sharded(p) and list(p.placements) for p in mine.values()]
    of_all: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_all, tree.map(tree.whole, mine))
    return {
        "sums": max(seen),
        "trained": furthest((mine, held), (ps, state)),
        "moved": furthest(start(), ps),
        "alike": all(
            torch.equal(of[name], of_all[0][name]) for of in of_all for name in ps
        ),
        "ordinary": not any(placements),
    }


def noise(rank: int) -> list[bool]:
    """Whether the update of an empty batch, which is noise alone, is that of one process."""
    where, _, of_params = layouts()["FSDP2"]
    sums = fo.clipped_grad_sum(loss, C)
    x, y = examples(0, 0)
    tx = fo.differentially_private_aggregate(C, SIGMA, 3, expected_batch_size=2.0)
    ps = start()
    expected, _ = tx.update(sums(ps, x, y), tx.init(ps), ps)
    found = []
    for placements in (None, of_params):
        mine = {
            name: p if placements is None else place(p, where, placements)
            for name, p in ps.items()
        }
        empty = [place(part, where, [Shard(0)]) for part in (x, y)]
        us, _ = tx.update(sums(mine, *empty), tx.init(mine), mine)
        found.append(all(torch.equal(tree.whole(us[n]), u) for n, u in expected.items()))
    assert all(u.abs().max() > 0.01 for u in expected.values())
    return found


# ---- gradients that are there --------------------------------------------------------------------

SHAPES: dict[str, tuple[int, ...]] = {"w": (N, 5, 3), "b": (N, 3), "c": (N, 2, 2)}
BOUNDS: dict[str, Any] = {"one": C, "parts": {"w": 0.9, "b": 0.4, "c": 3.0}}


def cuts() -> dict[str, tuple[Any, list[Any]]]:
    """Ways in which gradients [B, ...] are cut, by examples and along the dims of parameters."""
    if dist.get_world_size() == 2:
        return {
            "examples": (mesh(), [Shard(0)]),
            "rows": (mesh(), [Shard(1)]),
            "columns": (mesh(), [Shard(2)]),
            "copies": (mesh(), [Replicate()]),
        }
    grid = mesh(2, 2)
    return {
        "examples and rows": (grid, [Shard(0), Shard(1)]),
        "rows and examples": (grid, [Shard(1), Shard(0)]),
        "rows and columns": (grid, [Shard(1), Shard(2)]),
        "copies of columns": (grid, [Replicate(), Shard(2)]),
    }


def clipped(rank: int, cut: str) -> dict[str, float]:
    """How far clipped sums and norms of gradients that are cut are from those of one process."""
    where, placements = cuts()[cut]
    gs: dict[str, Any] = {**drawn(0, SHAPES), "none": None}
    mine = {n: g if g is None else place(g, where, placements) for n, g in gs.items()}
    weights = drawn(1, {"w": (N,)})["w"]
    found = {}
    for name, bound in BOUNDS.items():
        theirs = fo.clip_and_sum(gs, {**bound, "none": 1.0} if name == "parts" else bound)
        ours = fo.clip_and_sum(mine, theirs.l2_norm_clip)
        found[name] = furthest(ours[:2], theirs[:2])
        theirs = fo.clip_and_sum(gs, theirs.l2_norm_clip, weights)
        ours = fo.clip_and_sum(mine, theirs.l2_norm_clip, weights)
        found[f"{name}, weights"] = furthest(ours[:2], theirs[:2])
    del gs["none"], mine["none"]
    for f in (fo.per_example_global_norm_clip, fo.per_example_layer_norm_clip):
        total, numbers = f(mine, C)
        expected, counts = f(gs, C)
        assert tree.leaves(numbers) == tree.leaves(counts)
        found[f.__name__] = furthest(total, expected)
    return found


def per_example(rank: int) -> float:
    """The gradients of all examples, each made by the rank that has the example."""
    where, x, y = mesh(), *examples(0)
    expected = fo.per_example_grads(loss)(start(), x, y)
    batch = [place(part, where, [Shard(0)]) for part in (x, y)]
    ours = fo.per_example_grads(loss, chunk_size=2)(start(), *batch)
    assert all(g.placements == (Shard(0),) for g in ours.values())
    return furthest(ours, expected)


def messages(rank: int) -> dict[str, int]:
    """How many messages there are for sums with ordinary parameters, and for norms of parts."""
    where, _, _ = layouts()["copies"]
    ps, tx = start(), fo.dpsgd(0.1, C, SIGMA, 3)
    batch = [place(part, where, [Shard(0)]) for part in examples(0)]
    state = tx.init(ps)
    sums = fo.clipped_grad_sum(loss, C)(ps, *batch)  # sends nothing: see `Division.total`
    with CommDebugMode() as of_sums:
        tx.update(sums, state, ps)
    gs = {n: place(g, where, [Shard(1)]) for n, g in drawn(0, SHAPES).items()}
    with CommDebugMode() as of_norms:
        fo.clip_and_sum(gs, BOUNDS["parts"])
    return {
        "sums": of_sums.get_total_counts(),
        "norms": of_norms.get_total_counts(),
    }


def refused(rank: int) -> list[str]:
    """The errors of what cannot be."""
    where, x, y = mesh(), *examples(0)
    ps, sums = start(), fo.clipped_grad_sum(loss, C)
    cut = {name: place(p, where, [Shard(0)]) for name, p in ps.items()}
    mine = [place(part, where, [Shard(0)]) for part in (x, y)]
    tx = fo.dpsgd(0.1, C, SIGMA, 3)
    g = drawn(0, SHAPES)
    divided = place(g["w"], where, [Shard(0)])
    other = {n: place(p, mesh(2, 1), [Replicate()] * 2) for n, p in ps.items()}
    strided = [_StridedShard(1, split_factor=2)]
    wanting = {n: p.requires_grad_() for n, p in start().items()}

    def of_sums(params: Any, *batch: Any) -> Callable[[], Any]:
        return lambda: sums(params, *batch)

    def owned() -> None:
        ours = fo.with_owners(tx)
        many = {n: torch.stack([p, p]) for n, p in ps.items()}
        ours.update(many, ours.init(ps))

    errors = []
    for f in (
        of_sums(cut, x, y),
        of_sums(ps, mine[0], y),
        of_sums(ps, place(x, where, [Shard(1)]), mine[1]),
        of_sums(wanting, *mine),
        lambda: fo.clip_and_sum({"w": divided, "b": g["b"]}, C),
        lambda: tx.update(sums(ps, *mine), tx.init(other), other),
        owned,
        lambda: fo.clip_and_sum(DTensor.from_local(g["w"], where, strided), C),
    ):
        with pytest.raises((TypeError, ValueError, NotImplementedError)) as caught:
            f()
        errors.append(f"{caught.type.__name__}: {caught.value}")
    return errors


def terms(rank: int) -> float:
    """Gradients of examples that are terms of a sum over the ranks."""
    where, gs = mesh(), drawn(0, SHAPES)
    share = {n: g * (0.25 if rank else 0.75) for n, g in gs.items()}
    partial = {n: DTensor.from_local(g, where, [Partial()]) for n, g in share.items()}
    return furthest(fo.clip_and_sum(partial, C)[:2], fo.clip_and_sum(gs, C)[:2])
