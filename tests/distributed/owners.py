"""What the ranks do in the tests of owners: they train, and count what they send and work on."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ranks import Ranks
from scenarios import mesh, place
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

import functorch_opt as fo
from functorch_opt import tree
from functorch_opt._core import exchange, one_tensor

SHAPES = {f"w{i}": (8, 4) for i in range(16)}


def drawn(step: int, shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The same random tensors on every rank."""
    generator = torch.Generator().manual_seed(step)
    return {
        n: torch.randn(s, generator=generator, dtype=torch.float64)
        for n, s in shapes.items()
    }


class Counts:
    """Inside, counts of this rank: messages, bytes sent to others, and tensors worked on."""

    def __enter__(self) -> Counts:
        self.messages, self.bytes, self.worked, self.gathers = 0, 0, 0, 0
        self.before = exchange.all_to_all, one_tensor.OneTensor.apply, self._gather()
        send, apply, gather = self.before

        def all_to_all(taken: Any, row: Any, takes: Any, gives: Any, group: Any) -> None:
            self.messages += 1
            self.bytes += sum(gives) - gives[dist.get_rank()]
            send(taken, row, takes, gives, group)

        def counted(of: Any, *args: Any, **options: Any) -> Any:
            self.worked += of.kind == "tensorwise"
            return apply(of, *args, **options)

        def full_tensor(x: Any, **options: Any) -> Tensor:
            self.gathers += 1
            return gather(x, **options)

        exchange.all_to_all = all_to_all
        one_tensor.OneTensor.apply = counted  # type: ignore[method-assign]
        torch.distributed.tensor.DTensor.full_tensor = full_tensor
        return self

    def _gather(self) -> Any:
        return torch.distributed.tensor.DTensor.full_tensor

    def __exit__(self, *error: Any) -> None:
        exchange.all_to_all, one_tensor.OneTensor.apply, of = self.before  # type: ignore[method-assign]
        torch.distributed.tensor.DTensor.full_tensor = of


RULES: dict[str, Callable[[], Any]] = {
    "muon": lambda: fo.scale_by_muon(),
    "normuon": lambda: fo.normuon(0.1),
    "soap": lambda: fo.scale_by_soap(),
    "shampoo": lambda: fo.scale_by_shampoo(),
}


def counted(rank: int, rule: str, stateful: bool) -> dict[str, int]:
    """One step, the second, of a rule for sixteen matrices of 8 x 4: what this rank has done."""
    tx, where = RULES[rule](), mesh()
    ps = {n: place(x, where, [Shard(0)]) for n, x in drawn(0, SHAPES).items()}
    gs = [
        {n: place(x, where, [Shard(0)]) for n, x in drawn(k, SHAPES).items()}
        for k in (1, 2)
    ]
    if stateful:
        ps = {n: nn.Parameter(p) for n, p in ps.items()}
        opt = fo.optim.Optimizer(ps.items(), tx)

        def step(k: int) -> None:
            for n, p in ps.items():
                p.grad = gs[k][n]
            opt.step()

    else:
        states = [tx.init(ps)]

        def step(k: int) -> None:
            states.append(tx.update(gs[k], states[-1], ps)[1])

    step(0)
    with Counts() as counts:
        step(1)
    return {
        "messages": counts.messages,
        "bytes": counts.bytes,
        "worked": counts.worked,
        "gathers": counts.gathers,
    }


def fewer_matrices_than_ranks(rank: int) -> tuple[int, float]:
    """How many this rank works on, and how far the updates are from those of one process."""
    shapes: dict[str, tuple[int, ...]] = {"a": (3, 5), "b": (7, 2)}
    tx, where = fo.scale_by_muon(), mesh()
    ps, gs = drawn(0, shapes), drawn(1, shapes)
    expected, _ = tx.update(gs, tx.init(ps), ps)
    mine = [{n: place(x, where, [Shard(0)]) for n, x in of.items()} for of in (ps, gs)]
    state = tx.init(mine[0])
    with Counts() as counts:
        ours, _ = tx.update(mine[1], state, mine[0])
    error = max(float((tree.whole(ours[n]) - u).abs().max()) for n, u in expected.items())
    return counts.worked, error


def layouts() -> dict[str, tuple[Any, list[Any]]]:
    """The ways in which FSDP2, HSDP and tensor parallelism cut a matrix, on four ranks."""
    grid = mesh(2, 2)
    return {
        "FSDP2": (mesh(), [Shard(0)]),
        "HSDP": (grid, [Replicate(), Shard(0)]),
        "columns of tensor parallelism": (grid, [Shard(0), Shard(1)]),
        "rows of tensor parallelism": (
            grid,
            [_StridedShard(0, split_factor=2), Shard(0)],
        ),
        "rows of rows": (grid, [Shard(0), Shard(0)]),
        "copies": (grid, [Replicate(), Replicate()]),
    }


def laid_out(rank: int, layout: str) -> tuple[int, int, float]:
    """Two steps of SOAP: how many matrices this rank worked on, and what it gathered; the error."""
    shapes: dict[str, tuple[int, ...]] = {f"w{i}": (4 * (i % 3 + 1), 3) for i in range(8)}
    tx, (where, placements) = fo.soap(0.1, frequency=1), layouts()[layout]

    def put(of: dict[str, Tensor]) -> dict[str, Tensor]:
        return {n: place(x, where, placements) for n, x in of.items()}

    ps = drawn(0, shapes)
    mine = put(ps)
    state, held = tx.init(ps), tx.init(mine)
    with Counts() as counts:
        for k in (1, 2, 3):
            us, state = tx.update(drawn(k, shapes), state, ps)
            ps = fo.apply_updates(ps, us)
        alone = counts.worked
        for k in (1, 2, 3):
            ours, held = tx.update(put(drawn(k, shapes)), held, mine)
            mine = fo.apply_updates(mine, ours)
        worked, gathers = counts.worked - alone, counts.gathers
    error = max(float((tree.whole(mine[n]) - p).abs().max()) for n, p in ps.items())
    return worked, gathers, error


def fails_on_the_owner(rank: int) -> str:
    """The error of a rule that fails for one tensor, as every rank gets it."""

    def rule(g: Tensor) -> Tensor:
        if g.shape[0] == 5:
            raise ValueError("five rows")
        return g

    tx, where = fo.leafwise(rule, kind="tensorwise"), mesh()
    gs = {
        n: place(x, where, [Shard(0)])
        for n, x in drawn(0, {"a": (5, 2), "b": (4, 2)}).items()
    }
    try:
        tx.update(gs, tx.init(gs), gs)
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def fails_in_a_sum(rank: int, kind: str, where: str, stateful: bool) -> tuple[str, str]:
    """The error of a function in sums or totals that fails on one rank, in its last tensor, as every
    rank gets it; and what a step says afterwards.
    """
    fails = [True]

    def of(g: Tensor) -> Tensor:
        if fails[0] and g.numel() and dist.get_rank() == 1 and g.shape[-1] == 3:
            raise ValueError("three columns")
        return g.float().square().sum() if g.shape[-1] == 3 else g.square().sum()

    given = {kind: {"of": of, "top": fo.largest(of)}}
    prepare = (lambda of: {"x": of}) if kind == "totals" else None
    rule = (lambda g, x: g * x) if kind == "totals" else (lambda g, of, top: g * of)
    tx = fo.leafwise(rule, prepare, **given)
    gs = drawn(0, {"a": (4, 2), "b": (4, 3), "c": (4, 3)})
    if where == "sharded":
        gs = {n: place(g, mesh(), [Shard(0)]) for n, g in gs.items()}
    else:
        tx = tx if stateful else fo.with_owners(tx)
    params = {n: nn.Parameter(g.clone()) for n, g in gs.items()}
    options = {"owners": True} if where == "owners" else {}
    opt = fo.optim.Optimizer(params.items(), tx, **options) if stateful else None
    state = None if stateful else tx.init(gs)

    def step() -> str:
        try:
            if opt is None:
                tx.update(gs, state, gs)
                return ""
            for n, p in params.items():
                p.grad = gs[n]
            opt.step()
        except (ValueError, RuntimeError) as error:
            return f"{type(error).__name__}: {error}"
        return ""

    first = step()
    fails[0] = False
    return first, step()


# ---- a run that is ended and goes on -------------------------------------------------------------


def in_8_bits(inner: Any) -> Any:
    return fo.stored(inner, where=lambda path, p: True)


SMALL = {"a": (6, 5), "b": (4, 4), "c": (3, 7)}
RUNS: dict[str, tuple[Callable[[], Any], dict[str, tuple[int, ...]]]] = {
    "soap": (lambda: fo.scale_by_soap(frequency=2), SMALL),
    "soap in 8 bits": (lambda: in_8_bits(fo.scale_by_soap(frequency=2)), SMALL),
    # Blocks of 256 elements begin and end in the middle of rows, and of what a rank has.
    "adam in 8 bits": (
        lambda: in_8_bits(fo.scale_by_adam()),
        {"a": (38, 37), "b": (9, 150), "c": (3, 7)},
    ),
}
"""A rule, and the shapes of what it trains."""


def train(
    rank: int, rule: str, shape: tuple[int, ...], steps: range, folder: str, dies: bool
) -> list[Any]:
    """Train tensors, from the last checkpoint in `folder` if there is one, and write one after
    every second step. With `dies` the last rank is killed before the last step.

    The gradients are given, so that meshes of any form must give the same bits.
    """
    size = 1
    for n in shape:
        size *= n
    where = init_device_mesh("cpu", shape) if size > 1 else None
    make, shapes = RUNS[rule]
    placements = [Replicate()] * (len(shape) - 1) + [Shard(0)]

    def put(x: Tensor) -> Tensor:
        return place(x, where, placements) if where else x

    ps = {n: nn.Parameter(put(x)) for n, x in drawn(0, shapes).items()}
    opt = fo.optim.Optimizer(ps.items(), fo.chain(make(), fo.sgd(0.1)))
    opt.init_state()
    at = Path(folder)
    done = max(
        [int(x.name) for x in at.iterdir() if (x / ".metadata").exists()], default=0
    )
    if done:
        saved = _saved(ps, opt)
        dcp.load(saved, checkpoint_id=at / str(done))
        opt.load_state_dict(saved["optimizer"])
    for k in range(done, steps.stop):
        if dies and k == steps.stop - 1:
            if rank == dist.get_world_size() - 1:
                os.kill(os.getpid(), signal.SIGKILL)
            dist.barrier()
        for n, g in drawn(k + 1, shapes).items():
            ps[n].grad = put(g)
        opt.step()
        if (k + 1) % 2 == 0:
            dcp.save(_saved(ps, opt), checkpoint_id=at / str(k + 1))
    kept = [x.dtype for of in opt.state.values() for x in of.values()]
    assert (torch.uint8 in kept) == ("8 bits" in rule)
    return [tree.whole(p.detach()).tolist() for p in ps.values()]


def _saved(ps: dict[str, Any], opt: Any) -> dict[str, Any]:
    return {
        "params": {n: p.detach() for n, p in ps.items()},
        "optimizer": opt.state_dict(),
    }


def functional(rank: int, folder: str, saves: bool) -> float:
    """A functional state of SOAP, whose tensors lie with owners, is written as it is; or it is read
    on the ranks that there are now, and a step made: how far from one process."""
    shapes = SMALL
    tx = fo.soap(0.1, frequency=1)

    def put(of: dict[str, Tensor]) -> dict[str, Tensor]:
        if dist.get_world_size() == 1:
            return of
        return {n: place(x, mesh(), [Shard(0)]) for n, x in of.items()}

    def step(ps: Any, state: Any, k: int, put: Any) -> Any:
        us, state = tx.update(put(drawn(k, shapes)), state, ps)
        return fo.apply_updates(ps, us), state

    ps = put(drawn(0, shapes))
    state = tx.init(ps)
    if saves:
        for k in (1, 2):
            ps, state = step(ps, state, k, put)
        dcp.save({"params": ps, "state": fo.state_dict(state)}, checkpoint_id=folder)
        return 0.0
    saved = {"params": ps, "state": fo.state_dict(state)}
    dcp.load(saved, checkpoint_id=folder)
    ps, _ = step(saved["params"], fo.load_state_dict(state, saved["state"]), 3, put)
    alone = drawn(0, shapes), tx.init(drawn(0, shapes))
    for k in (1, 2, 3):
        alone = step(*alone, k, lambda of: of)
    return max(float((tree.whole(ps[n]) - x).abs().max()) for n, x in alone[0].items())


def table() -> None:
    """Print what each rank does in a step for sixteen matrices of 8 x 4 doubles."""
    whole = sum(8 * 4 * 8 for _ in SHAPES)
    print(
        "rule      ranks  matrices  messages  bytes sent  if every rank gathered all gradients"
    )
    for world in (2, 4):
        ranks = Ranks(world)
        for rule in RULES:
            seen = ranks.run(counted, rule, False)[0]
            gathered = whole // world * (world - 1)
            print(
                f"{rule:<9} {world:>5} {seen['worked']:>9} {seen['messages']:>9} "
                f"{seen['bytes']:>11} {gathered:>8} (and {len(SHAPES)} matrices)"
            )
        ranks.stop()


if __name__ == "__main__":
    table()
