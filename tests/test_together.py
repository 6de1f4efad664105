"""What is worked out once a step, compiled for all stages in one. On a CPU it is not done; here it is."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from registry import ROWS, Row
from test_laws import assert_same, grads, params

import functorch_opt as fo
from functorch_opt._execution import together
from functorch_opt._execution.compiled import CompiledStep

FITTING = [row for row in ROWS if not (row.apart or row.unrolls)]


@pytest.fixture(autouse=True)
def everywhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(together, "DEVICES", {"cpu"})
    together.KNOWN.clear()
    together.KNOWN.made.clear()
    together.KNOWN.asks_norm.clear()
    yield
    together.KNOWN.clear()


def both(tx: fo.GradientTransformation, steps: int = 3, **extra: Any) -> None:
    """Some steps by `update`, and by one pass with a backend that runs the trace as it is."""
    step = CompiledStep(tx, True, "eager")
    ps, mine = params(), params()
    state, ours = tx.init(ps), tx.init(mine)
    for i in range(steps):
        updates, state = tx.update(grads(i), state, ps, **extra)
        ps = fo.apply_updates(ps, updates)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            mine, ours = step(mine, grads(i), ours, **extra)
        assert_same((mine, ours), (ps, state), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("row", FITTING, ids=lambda row: row.id)
def test_every_row_gives_what_update_gives(row: Row) -> None:
    both(row.build())


def made() -> list[Any]:
    return [*together.KNOWN.values()]


@pytest.mark.parametrize(
    "tx",
    [
        fo.adamw(1e-2),
        fo.nadamw(fo.warmup_cosine_decay_schedule(0.0, 1e-2, 2, 9)),
        fo.chain(fo.clip_by_global_norm(1.0), fo.adam(fo.constant_schedule(1.0) * 0.1)),
        fo.inject_hyperparams(fo.adam)(1e-2),
        fo.partition(
            {"a": fo.adam(0.1), "b": fo.lion(0.1)}, lambda path, p: "ab"[p.dim() > 1]
        ),
    ],
    ids=["adamw", "schedule", "sum of schedules", "injected", "partition"],
)
def test_one_program_serves_all_stages_and_steps(tx: fo.GradientTransformation) -> None:
    both(tx, steps=4)
    assert len(made()) == 1
    assert isinstance(made()[0], together.Joint)


def test_what_a_function_reads_is_asked_at_every_step() -> None:
    rate = [1.0]

    def prepare(count):
        return {"step": rate[0] / (count + 1.0)}

    tx = fo.leafwise(lambda g, step: g * step, prepare)
    step, state = CompiledStep(tx, True, "eager"), tx.init([torch.zeros(2)])
    moved = []
    for value in (1.0, 3.0):
        rate[0] = value
        ps = [torch.zeros(2)]
        ps, state = step(ps, [torch.ones(2)], state)
        moved.append(ps[0][0].item())
    assert moved == [1.0, 1.5]


def test_numbers_that_change_at_every_step_are_not_compiled_for_ever() -> None:
    for k in range(together.MOST):
        both(fo.adam(0.1, b1=0.5 + 0.01 * k), steps=1)
    assert None not in made()
    tx, ps = fo.adam(0.1, b1=0.9), [torch.zeros(2)]
    with pytest.warns(UserWarning, match="16 settings of the same functions"):
        CompiledStep(tx, True, "eager")(ps, [torch.ones(2)], tx.init(ps))
    assert made()[-1] is None


def test_a_function_that_looks_at_a_number_runs_as_it_is() -> None:
    def prepare(count):
        return {"step": 1.0 if int(count) % 2 else 2.0}

    both(fo.leafwise(lambda g, step: g * step, prepare), steps=4)
    assert made() == [None]


def test_an_extra_number_is_an_input() -> None:
    tx = fo.leafwise(
        lambda g, step: g * step, lambda count, *, x: {"step": x * (count + 1)}
    )
    for x in (2.0, 5.0):
        both(tx, steps=2, x=torch.tensor(x, dtype=torch.float64))
    assert len(made()) == 1


def test_two_numbers_that_are_one_tensor_first_are_two() -> None:
    first = fo.leafwise(lambda g, a: g * a, lambda count, *, x: {"a": x})
    second = fo.leafwise(lambda g, b: g + b, lambda count, *, y: {"b": y})
    tx = fo.chain(first, second)
    one = torch.tensor(2.0)
    both(tx, steps=1, x=one, y=one)
    both(tx, steps=1, x=torch.tensor(3.0), y=torch.tensor(5.0))
    assert len(made()) == 1


def test_it_matters_which_hyperparameter_a_schedule_is() -> None:
    def rule(g, p, a, b):
        return a * g + 10 * b * p

    one, two = fo.linear_schedule(1.0, 0.0, 9), fo.constant_schedule(3.0)
    both(fo.leafwise(rule, hyper={"a": one, "b": two}))
    both(fo.leafwise(rule, hyper={"b": one, "a": two}))


CLIPPED = [
    fo.chain(fo.clip_by_global_norm(0.1), fo.adamw(1e-2)),
    fo.chain(fo.clip_by_global_norm(torch.tensor(0.1)), fo.normalize(), fo.sgd(1e-2)),
    fo.chain(fo.normalize_by_update_norm(0.1), fo.clip_by_global_norm(1e-3)),
]


@pytest.mark.parametrize("tx", CLIPPED, ids=["adamw", "twice", "behind another"])
@pytest.mark.parametrize("most", [256, 2])
def test_a_norm_of_all_updates_is_part_of_the_program(
    tx: fo.GradientTransformation, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where there are so many tensors that the program takes the one norm of all."""
    monkeypatch.setattr("functorch_opt._core.numerics.MANY", most)
    both(tx, steps=4)
    assert any(isinstance(joint, together.Joint) for joint in made())
    assert [*together.KNOWN.asks_norm.values()].count(True) >= 1


READING = {
    "its leaves": lambda updates: fo.tree.leaves(updates)[0].norm(),
    "how many": lambda updates: fo.tree.norm(updates) * len(fo.tree.leaves(updates)),
    "another norm": lambda updates: fo.tree.norm(updates, 1),
    "a map": lambda updates: fo.tree.norm(fo.tree.scale(2.0, updates)),
    "the size": lambda updates: fo.tree.norm(updates) / fo.tree.size(updates),
}


@pytest.mark.parametrize("reads", READING)
def test_a_function_that_reads_more_of_the_updates_sees_them(reads: str) -> None:
    def prepare(updates: Any) -> dict[str, Any]:
        return {"factor": 1 / READING[reads](updates)}

    tx = fo.leafwise(lambda g, factor: g * factor, prepare)
    both(fo.chain(tx, fo.adam(1e-2)))
    assert [*together.KNOWN.asks_norm.values()].count(True) == 0
    assert sum(isinstance(joint, together.Joint) for joint in made()) == 1


def test_gradients_that_are_missing_are_not_in_the_norm() -> None:
    tx = fo.chain(fo.clip_by_global_norm(0.1), fo.adam(1e-2))
    step = CompiledStep(tx, True, "eager")
    ps, mine = ([torch.full((n,), 1.0) for n in (3, 5, 2)] for _ in range(2))
    state, ours = tx.init(ps), tx.init(mine)
    for i in range(6):
        gs: list[Any] = [torch.randn(n) + 1 for n in (3, 5, 2)]
        gs[i % 3] = None if i % 2 else gs[i % 3]
        updates, state = tx.update(gs, state, ps)
        ps = fo.apply_updates(ps, updates)
        mine, ours = step(mine, gs, ours)
        torch.testing.assert_close(mine, ps, rtol=1e-5, atol=1e-7)
