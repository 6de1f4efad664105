"""A step that goes the way of the one before it gives the same numbers, and sees what changes."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import functorch_opt as fo
from functorch_opt import tree
from functorch_opt._execution import again
from functorch_opt._execution.again import Again
from functorch_opt._execution.compiled import CompiledStep

SHAPES = {"a": (4, 3), "b": (5,), "c": (2, 3, 2), "d": ()}
RATE = 0.1


def drawn(seed: int, names: str = "abcd") -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    drawn = {
        name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()
    }
    return {name: drawn[name] for name in names}


class Went:
    """Counts the steps that were asked whether they go the way of the one before, and did."""

    def __init__(self) -> None:
        self.same = self.other = 0


@pytest.fixture
def went(monkeypatch: pytest.MonkeyPatch) -> Went:
    seen, go = Went(), Again.go

    def counted(self: Again, *args: Any) -> Any:
        new = go(self, *args)
        if new is None:
            seen.other += 1
        else:
            seen.same += 1
        return new

    monkeypatch.setattr(Again, "go", counted)
    return seen


def reads_a_global(lr: float = 0.1) -> fo.GradientTransformation:
    """A prepare that reads a name of this module."""

    def prepare(count: Tensor) -> dict[str, Any]:
        return {"rate": RATE / (1.0 + count)}

    def rule(g: Tensor, rate: Tensor) -> Tensor:
        return -rate * g

    return fo.leafwise(rule, prepare=prepare)


def reads_a_number(calls: list[int]) -> fo.GradientTransformation:
    """What prepare gives is a number of Python's, another at every step."""

    def prepare(count: Tensor) -> dict[str, Any]:
        calls.append(1)
        return {"rate": 0.5 ** (1 + count.item())}

    def rule(g: Tensor, rate: float) -> Tensor:
        return -rate * g

    return fo.leafwise(rule, prepare=prepare)


CHAINS: dict[str, Callable[[], fo.GradientTransformation]] = {
    "adamw": lambda: fo.adamw(0.1),
    "sgd": lambda: fo.sgd(0.1, momentum=0.9),
    "schedule": lambda: fo.adam(fo.schedules.cosine_decay_schedule(0.1, 10)),
    "nadamw": lambda: fo.nadamw(torch.tensor(0.1)),
    "lamb": lambda: fo.lamb(0.1),
    "global": reads_a_global,
    "noise": lambda: fo.chain(fo.add_noise(0.1, 0.5, 3), fo.adam(0.1)),
}


GENERATED = ("adamw", "schedule")
CASES = [
    *[(name, "eager") for name in CHAINS],
    *[(name, "inductor") for name in GENERATED],
]


@pytest.mark.parametrize("leaves", ["abc", "abcd"])
@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize(("name", "backend"), CASES)
def test_it_gives_the_numbers_of_update(
    name: str,
    backend: str,
    joint: bool,
    leaves: str,
    went: Went,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whether what is worked out once a step is compiled or not; with a tensor of one element, which
    runs eagerly, and without one.
    """
    monkeypatch.setattr(again, "STEPS", 2 if joint else 1000)
    tx = CHAINS[name]()
    step = CompiledStep(tx, True, backend)
    mine, ps = drawn(0, leaves), drawn(0, leaves)
    ours, state = tx.init(mine), tx.init(ps)
    for i in range(8):
        updates, state = tx.update(drawn(i + 1, leaves), state, ps)
        ps = fo.apply_updates(ps, updates)
        mine, ours = step(mine, drawn(i + 1, leaves), ours)
        torch.testing.assert_close(mine, ps, rtol=1e-6, atol=1e-6)
        for x, y in zip(tree.leaves(ours), tree.leaves(state), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)
    assert went.other == 0
    (ways,) = step.ways.values()
    assert (ways.again is None) == (name == "noise")  # which looks at all updates
    if ways.again is not None:
        assert went.same == 5
        assert (ways.again.joint is not None) == (joint and name != "sgd")


def test_a_global_that_a_prepare_reads_may_change(
    went: Went, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(again, "STEPS", 1)
    tx = reads_a_global()
    step = CompiledStep(tx, True, "eager")
    mine = drawn(0)
    state = tx.init(mine)
    for i in range(10):
        if i == 5:
            monkeypatch.setitem(globals(), "RATE", 0.7)
        before = tree.map(torch.clone, mine)
        gs = drawn(i + 1)
        mine, state = step(mine, gs, state)
        rate = (0.7 if i >= 5 else 0.1) / (1 + i)
        for name, p in before.items():
            torch.testing.assert_close(mine[name], p - rate * gs[name])
    assert went.other > 0
    assert went.same > 3


def test_a_number_that_changes_is_not_taken_for_the_one_before(went: Went) -> None:
    calls: list[int] = []
    tx = reads_a_number(calls)
    step = CompiledStep(tx, True, "eager")
    mine = drawn(0)
    state = tx.init(mine)
    for i in range(15):
        before = tree.map(torch.clone, mine)
        gs = drawn(i + 1)
        mine, state = step(mine, gs, state)
        for name, p in before.items():
            torch.testing.assert_close(mine[name], p - 0.5 ** (1 + i) * gs[name])
    assert len(calls) == 15  # once a step
    assert went.same == 0
    assert went.other <= again.MISSES


CHANGES: dict[str, Callable[[dict[str, Any], dict[str, Any]], None]] = {
    "no gradient": lambda ps, gs: gs.update(b=None),
    "no gradient of a number": lambda ps, gs: gs.update(d=None),
    "the parameter itself": lambda ps, gs: gs.update(a=ps["a"]),
    "strided": lambda ps, gs: gs.update(a=drawn(50)["a"].t().contiguous().t()),
    "another dtype": lambda ps, gs: gs.update(a=gs["a"].to(torch.bfloat16)),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_gradients_of_another_kind(
    change: str, backend: str, went: Went, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(again, "STEPS", 1)
    tx = fo.adamw(0.1)
    step = CompiledStep(tx, True, backend)
    mine, ps = drawn(0), drawn(0)
    ours, state = tx.init(mine), tx.init(ps)
    for i in range(9):
        gs, others = drawn(i + 1), drawn(i + 1)
        if i in (4, 6):
            CHANGES[change](mine, gs)
            CHANGES[change](ps, others)
        updates, state = tx.update(others, state, ps)
        ps = fo.apply_updates(ps, updates)
        mine, ours = step(mine, gs, ours)
        torch.testing.assert_close(mine, ps, rtol=1e-5, atol=1e-6)
    assert went.same > 0


def test_a_state_of_another_transformation_is_still_refused() -> None:
    tx, other = fo.adamw(0.1), fo.sgd(0.1, momentum=0.9)
    step = fo.compiled_step(tx)
    ps = drawn(0)
    state = tx.init(ps)
    for i in range(4):
        ps, state = step(ps, drawn(i), state)
    with pytest.raises(ValueError, match="state"):
        step(ps, drawn(9), other.init(ps))


def test_groups_with_rates_of_their_own(
    went: Went, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decay that is one number for each tensor, and a rate that a scheduler writes."""
    monkeypatch.setattr(again, "STEPS", 2)

    def made(of: Any, **options: Any) -> Any:
        ps = [torch.nn.Parameter(x) for x in drawn(0).values()]
        groups = [
            {"params": ps[:2], "weight_decay": 0.1},
            {"params": ps[2:], "weight_decay": 0.0},
        ]
        opt = of(groups, lr=0.1, **options)
        return opt, ps, torch.optim.lr_scheduler.ExponentialLR(opt, 0.9)

    ours, mine, one = made(fo.optim.AdamW, compile=True)
    theirs, ps, other = made(torch.optim.AdamW)
    for i in range(8):
        for p, q, g in zip(mine, ps, drawn(i + 1).values(), strict=True):
            p.grad, q.grad = g.clone(), g.clone()
        if i == 5:
            ours.param_groups[0]["weight_decay"] = 0.3
            theirs.param_groups[0]["weight_decay"] = 0.3
        for x in (ours, theirs, one, other):
            x.step()
        for p, q in zip(mine, ps, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    assert went.same >= 4


def test_state_that_is_replaced_or_cleared_between_steps(went: Went) -> None:
    """Keys in another order, other tensors, a parameter without state."""
    ps = [torch.nn.Parameter(x) for x in drawn(0).values()]
    qs = [torch.nn.Parameter(x) for x in drawn(0).values()]
    ours, theirs = fo.optim.AdamW(ps, lr=0.1), torch.optim.AdamW(qs, lr=0.1)
    for i in range(12):
        for p, q, g in zip(ps, qs, drawn(i + 1).values(), strict=True):
            p.grad, q.grad = g.clone(), g.clone()
        if i == 9:
            for opt, params in ((ours, ps), (theirs, qs)):
                del opt.state[params[1]]
        if i == 5:
            ours.load_state_dict(ours.state_dict())
        if i == 7:
            first = ours.state[ps[0]]
            ours.state[ps[0]] = OrderedDict(reversed(first.items()))
            ours.state[ps[0]].move_to_end("step")
        ours.step()
        theirs.step()
        for p, q in zip(ps, qs, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    assert went.same > 2


def test_several_threads_with_one_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers of one step are not written over while another thread reads them."""
    monkeypatch.setattr(again, "STEPS", 0)
    tx = fo.adamw(fo.schedules.exponential_decay(0.1, 1, 0.5))
    step = fo.compiled_step(tx)

    def train(results: list[Any], steps: int) -> None:
        ps = {"a": torch.ones(1000), "b": torch.ones(300)}
        state = tx.init(ps)
        for i in range(steps):
            gs = {name: torch.full_like(p, i + 1.0) for name, p in ps.items()}
            ps, state = step(ps, gs, state)
        results.append(ps)

    train(alone := [], 12)
    together: list[Any] = []
    threads = [threading.Thread(target=train, args=(together, 12)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(together) == 4
    for found in together:
        torch.testing.assert_close(found, alone[0], rtol=0, atol=0)
