"""What the ranks do in the tests of replicated parameters with owners."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from codes import off
from owners import Counts
from registry import ROWS, everywhere
from scenarios import (
    OURS,
    STEPS,
    batch,
    checkpoint,
    gathered,
    loss,
    make_net,
    my_rows,
    train,
    values,
)
from torch import Tensor
from torch.distributed.checkpoint.state_dict import set_state_dict
from torch.nn.parallel import DistributedDataParallel

import functorch_opt as fo
from functorch_opt import tree
from functorch_opt._core.checkpoint import state_dict
from functorch_opt._core.sharding import is_owned
from functorch_opt.codecs.codec import CODECS


def row_with_owners(rank: int, name: str) -> dict[str, float]:
    """Every variant of a row of the registry, two steps: how far from one process.

    The updates and the parameters are compared, and the whole state.
    """
    row = next(row for row in ROWS if row.name == name)
    errors: dict[str, float] = {}
    for i, variant in enumerate(row.variants):
        tx = row.build(variant)
        ours = fo.with_owners(tx)
        ps = mine = values(0)
        state, held = tx.init(ps), ours.init(ps)
        for step in (1, 2):
            us, state = tx.update(values(step), state, ps)
            our_us, held = ours.update(values(step), held, mine)
            assert all(type(u) is Tensor for u in our_us.values())
            ps, mine = fo.apply_updates(ps, us), fo.apply_updates(mine, our_us)
        whole = state_dict(tree.map(tree.whole, (mine, held)))
        expected = state_dict(tree.map(tree.whole, (ps, state)))
        assert whole.keys() == expected.keys()
        errors[str(i)] = max(
            float(((1.0 * whole[k] - 1.0 * x) / (1 + (1.0 * x).abs())).abs().max())
            for k, x in expected.items()
            if x.numel()
        )
    return errors


# ---- a training under DDP ------------------------------------------------------------------------


def trajectory(rank: int, name: str, compile: bool) -> dict[str, Any]:
    """A run under DDP whose optimizers have owners, beside the same optimizers in one process."""
    alone, net = make_net(), make_net()
    theirs = OURS[name](dict(alone.named_parameters()))
    train(alone, theirs, range(STEPS))
    opts = OURS[name](dict(net.named_parameters()), compile=compile, owners=True)
    wrapped = DistributedDataParallel(net)
    train(wrapped, opts, range(STEPS - 1), my_rows(rank))
    with Counts() as counts:
        train(wrapped, opts, range(STEPS - 1, STEPS), my_rows(rank))
    mine, expected = gathered(net), gathered(alone)
    of_all = [None] * dist.get_world_size()
    dist.all_gather_object(of_all, mine)
    slots = [x for opt in opts for of in opt.state.values() for x in of.values()]
    theirs = [x for opt in theirs for of in opt.state.values() for x in of.values()]
    return {
        "error": max(float((mine[n] - x).abs().max()) for n, x in expected.items()),
        "alike": all(torch.equal(of[n], mine[n]) for of in of_all for n in mine),
        "numbers": sum(tree.part_of(x).numel() for x in slots if tree.is_sharded(x)),
        "numbers of one process": sum(x.numel() for x in theirs if x.dim()),
        "messages": counts.messages,
        "bytes": counts.bytes,
        "worked": counts.worked,
    }


def trained(rank: int, decay: float) -> list[Any]:
    """The parameters after 100 steps of AdamW with owners, in the functional layer."""
    tx, ps = fo.with_owners(fo.adamw(0.01, weight_decay=decay)), values(0)
    state = tx.init(ps)
    for step in range(1, 101):
        updates, state = tx.update(values(step), state, ps)
        ps = fo.apply_updates(ps, updates)
    return [ps[name].tolist() for name in sorted(ps)]


# ---- checkpoints ---------------------------------------------------------------------------------


def begun(rank: int, name: str, seed: int = 0) -> tuple[Any, Any, list[Any]]:
    """A network, what to train it by, and its optimizers: with owners if there are several ranks."""
    net = make_net(seed)
    opts = OURS[name](dict(net.named_parameters()), owners=True)
    wrapped = DistributedDataParallel(net) if dist.get_world_size() > 1 else net
    return net, wrapped, opts


def rows_of(rank: int) -> slice:
    return my_rows(rank) if dist.get_world_size() > 1 else slice(None)


def save(rank: int, name: str, folder: str, steps: int) -> None:
    net, wrapped, opts = begun(rank, name)
    train(wrapped, opts, range(steps), rows_of(rank))
    dcp.save(checkpoint(net, opts), checkpoint_id=folder)


def load(rank: int, name: str, folder: str, steps: int) -> float:
    """Go on with the ranks that there are now; how far from one process without a pause."""
    alone = make_net()
    train(alone, OURS[name](dict(alone.named_parameters())), range(2 * steps))
    net, wrapped, opts = begun(rank, name, seed=1)
    saved = checkpoint(net, opts)
    dcp.load(saved, checkpoint_id=folder)
    set_state_dict(
        net, opts, model_state_dict=saved["model"], optim_state_dict=saved["optimizers"]
    )
    train(wrapped, opts, range(steps, 2 * steps), rows_of(rank))
    a, b = gathered(net), gathered(alone)
    return max(float((a[n] - b[n]).abs().max()) for n in a)


def whole_checkpoint(rank: int, name: str) -> dict[str, Any]:
    """A checkpoint of whole tensors goes from owners to one process, and back to owners."""
    net, wrapped, opts = begun(rank, name)
    train(wrapped, opts, range(3), my_rows(rank))
    full = [tree.map(tree.whole, opt.state_dict()["state"]) for opt in opts]
    alone, again = copy.deepcopy(net), copy.deepcopy(net)
    theirs = OURS[name](dict(alone.named_parameters()))
    back = OURS[name](dict(again.named_parameters()), owners=True)
    for mine, given, of_one, opt in zip(opts, full, theirs, back, strict=True):
        groups = mine.state_dict()["param_groups"]
        of_one.load_state_dict({"state": given, "param_groups": groups})
        opt.load_state_dict(of_one.state_dict())
    train(wrapped, opts, range(3, 6), my_rows(rank))
    train(alone, theirs, range(3, 6))
    train(DistributedDataParallel(again), back, range(3, 6), my_rows(rank))
    a, b, c = gathered(net), gathered(alone), gathered(again)
    return {
        "error": max(float((a[n] - b[n]).abs().max()) for n in a),
        "equal": all(torch.equal(a[n], c[n]) for n in a),
        "moved": float((a["up.weight"] - gathered(make_net())["up.weight"]).abs().max()),
        "plain": all(type(x) is Tensor for of in full for x in tree.leaves(of)),
    }


def a_group_comes_later(rank: int) -> float:
    """A group that is added to a run: what there is stays with its owner."""
    nets = [make_net(), make_net()]
    for net, owners in zip(nets, (False, True), strict=True):
        params = [*net.parameters()]
        opt = fo.optim.AdamW(params[-3:], lr=0.05, owners=owners)
        wrapped = DistributedDataParallel(net)
        train(wrapped, [opt], range(2), my_rows(rank))
        opt.add_param_group({"params": params[:-3]})
        train(wrapped, [opt], range(2, 5), my_rows(rank))
    a, b = map(gathered, nets)
    return max(float((a[n] - b[n]).abs().max()) for n in a)


def averages(rank: int) -> float:
    """What `eval_params` shows, and then the parameters: how far from one process."""
    nets, seen = [make_net(), make_net()], []
    for net, owners in zip(nets, (False, True), strict=True):
        tx = fo.chain(fo.adamw(0.05), fo.params_ema(0.5))
        opt = fo.optim.Optimizer(net.parameters(), tx, owners=owners)
        train(DistributedDataParallel(net), [opt], range(3), my_rows(rank))
        before = gathered(net)
        with opt.eval_params():
            seen.append(gathered(net))
        assert all(torch.equal(before[n], x) for n, x in gathered(net).items())
        assert not torch.equal(before["up.weight"], seen[-1]["up.weight"])
    a, b = seen
    return max(float((a[n] - b[n]).abs().max()) for n in a)


def looked_at(rank: int) -> tuple[int, float]:
    """How many numbers a report has, and how far they are from those of one process."""
    reports = []
    for owners in (False, True):
        net = make_net()
        tx = fo.chain(fo.clip_by_global_norm(0.1), fo.adamw(0.1))
        opt = fo.optim.Optimizer(net.named_parameters(), tx, owners=owners)
        x, y = batch(0)
        loss(net, x, y).backward()
        reports.append(opt.report())
    one, other = reports
    assert one.keys() == other.keys()
    return len(one), max(abs(float(x - other[name])) for name, x in one.items())


# ---- slots in a code -----------------------------------------------------------------------------


def coded(rank: int, code: str) -> dict[str, float]:
    """What differs after three steps from one process, of parameters and of the state."""
    tx = fo.stored(fo.chain(fo.clip(1.0), fo.adamw(0.1)), code, where=everywhere)
    ours = fo.with_owners(tx)
    ps = mine = values(0)
    state, held = tx.init(ps), ours.init(ps)
    for step in (1, 2, 3):
        us, state = tx.update(values(step), state, ps)
        our_us, held = ours.update(values(step), held, mine)
        ps, mine = fo.apply_updates(ps, us), fo.apply_updates(mine, our_us)
    expected = state_dict((ps, state))
    low = CODECS[code].dtype
    assert sum(x.dtype is low for x in expected.values()) > 4
    return off(expected, (mine, held))


def coded_step(rank: int, code: str, compile: bool) -> dict[str, float]:
    """The same of the stateful optimizer, in place."""
    found = []
    for owners in (False, True):
        torch.manual_seed(0)
        ps = [torch.nn.Parameter(torch.randn(n, 80)) for n in (60, 70, 80, 3)]
        options = {"state": code, "owners": owners, "compile": compile}
        opt = fo.optim.AdamW(ps, lr=0.1, **options)
        for _ in range(3):
            for p in ps:
                p.grad = torch.randn(p.shape)
            opt.step()
        of_each = {str(i): opt.state[p] for i, p in enumerate(ps)}
        found.append(({str(i): p.detach() for i, p in enumerate(ps)}, of_each))
    slots = [x for of in found[1][1].values() for x in of.values()]
    low = CODECS[code].dtype
    assert sum(is_owned(x) for x in slots if x.dtype is low) == 6
    return off(state_dict(found[0]), found[1])


# ---- errors --------------------------------------------------------------------------------------


def a_rule_fails(rank: int, kind: str, stateful: bool) -> str:
    """The error of a rule that fails for one tensor, as every rank gets it."""

    def rule(g: Tensor) -> Tensor:
        if g.shape == (5, 2):
            raise ValueError("five rows")
        return g

    tx = fo.chain(
        fo.leafwise(rule, kind=kind), fo.clip_by_global_norm(1.0), fo.scale(0.1)
    )
    gs = {"a": torch.ones(5, 2), "b": torch.ones(4, 2)}
    try:
        if stateful:
            params = {n: torch.nn.Parameter(g.clone()) for n, g in gs.items()}
            opt = fo.optim.Optimizer(params.items(), tx, owners=True)
            for n, p in params.items():
                p.grad = gs[n]
            opt.step()
        else:
            ours = fo.with_owners(tx)
            ours.update(gs, ours.init(gs), gs)
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def a_whole_step_fails(rank: int) -> tuple[str, bool]:
    """The error of a step that is worked out before it is written, since its rehearsal fails; and
    whether the parameter whose rule failed is as it was.
    """

    def rule(g: Tensor) -> Tensor:
        if g.shape not in [(50, 2), (40, 2)]:
            raise ValueError("few numbers")
        if g.shape == (50, 2):
            raise ValueError("fifty rows")
        return g

    params = {"a": torch.ones(50, 2), "b": torch.ones(40, 2)}
    params = {n: torch.nn.Parameter(p) for n, p in params.items()}
    tx = fo.chain(fo.leafwise(rule), fo.scale(0.1))
    opt = fo.optim.Optimizer(params.items(), tx, owners=True)
    for p in params.values():
        p.grad = torch.ones_like(p)
    error = ""
    try:
        opt.step()
    except (ValueError, RuntimeError) as caught:
        error = f"{type(caught).__name__}: {caught}"
    return error, bool((params["a"] == 1).all())


def refused(rank: int) -> list[str]:
    """The errors of what `with_owners` cannot do."""
    tx, ps = fo.with_owners(fo.adam(0.1)), {"w": torch.ones(2), "b": torch.ones(3)}
    state, errors = tx.init(ps), []

    def derivative() -> None:
        tx.update({n: x.clone().requires_grad_() for n, x in ps.items()}, state, ps)

    def no_params() -> None:
        tx.update({"w": None, "b": ps["b"]}, state)

    def function() -> None:
        search = fo.with_owners(fo.scale_by_backtracking_linesearch(5))
        given = {"value": torch.ones(()), "grad": ps, "value_fn": lambda at: 1.0}
        search.update(ps, search.init(ps), ps, **given)

    def memory() -> None:
        fo.with_owners(fo.scale_by_lbfgs()).init(ps)

    for f in (derivative, no_params, function, memory):
        with pytest.raises((TypeError, ValueError, NotImplementedError)) as caught:
            f()
        errors.append(f"{caught.type.__name__}: {caught.value}")
    return errors
