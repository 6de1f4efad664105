"""`compiled_step` of many models: what `vmap` of a step of one model does, in place.

That every random program gives the same numbers is a law of `test_programs`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import functorch_opt as fo
from functorch_opt import tree
from functorch_opt._execution.models import ModelsStep

MODELS = 5
FACTOR = 0.5


def chained(learning_rate: Any = 0.1) -> fo.GradientTransformation:
    schedule = fo.schedules.cosine_decay_schedule(1.0, 20)
    return fo.chain(
        fo.clip_by_global_norm(1.0),
        fo.adamw(learning_rate, weight_decay=0.01),
        fo.scale_by_schedule(schedule),
        fo.params_ema(0.9),
    )


def params(seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"w": (MODELS, 4, 3), "b": (MODELS, 3), "scale": (MODELS,)}
    return {
        name: torch.randn(shape, generator=generator) for name, shape in shapes.items()
    }


def traced(tx: fo.GradientTransformation, donate: bool = True) -> ModelsStep:
    return ModelsStep(tx, donate, "eager")


def alone(tx: fo.GradientTransformation, ps: Any, grads: list[Any], state: Any) -> Any:
    """By `vmap` of `update`, which overwrites nothing."""

    def one(ps: Any, gs: Any, state: Any) -> Any:
        updates, state = tx.update(gs, state, ps)
        return fo.apply_updates(ps, updates), state

    for gs in grads:
        ps, state = torch.vmap(one)(ps, gs, state)
    return ps, state


def same(got: Any, expected: Any) -> None:
    pairs = zip(tree.leaves(got), tree.leaves(expected), strict=True)
    for x, y in pairs:
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-7)


def test_each_model_has_its_own_hyperparameters_and_counts() -> None:
    make = fo.inject_hyperparams(chained)
    tx, rates = make(learning_rate=0.1), torch.logspace(-3, 0, MODELS)
    ps, grads = params(), [params(k) for k in range(1, 5)]
    state = torch.vmap(lambda p, lr: make(learning_rate=lr).init(p))(ps, rates)
    counts = torch.tensor([0, 3, 7, 1, 30])
    state = tree.map(lambda x: x + counts if x.dtype is torch.int64 else x, state)
    expected = alone(tx, ps, grads, state)
    step = traced(tx)
    for gs in grads:
        ps, state = step(ps, gs, state)
    same((ps, state), expected)
    moved = [float((ps["w"][m] - params()["w"][m]).abs().max()) for m in range(2)]
    assert moved[0] < moved[1]  # a smaller learning rate


def test_it_writes_in_place() -> None:
    tx = chained()
    ps = params()
    state = torch.vmap(tx.init)(ps)
    step = traced(tx)
    ps, state = step(ps, params(1), state)
    places = [x.data_ptr() for x in tree.leaves((ps, state))]
    again = step(ps, params(2), state)
    assert [x.data_ptr() for x in tree.leaves(again)] == places
    assert ps["w"]._version > 0


def test_without_donate_nothing_is_overwritten() -> None:
    tx, ps, grads = chained(), params(), [params(1)]
    state = torch.vmap(tx.init)(ps)
    before = tree.map(torch.clone, (ps, state))
    got = traced(tx, donate=False)(ps, grads[0], state)
    same((ps, state), before)
    same(got, alone(tx, ps, grads, state))


def test_a_parameter_without_gradient_stays() -> None:
    tx, ps = fo.adam(0.1), params()
    state = torch.vmap(tx.init)(ps)
    before = tree.map(torch.clone, (ps, state))
    ps, state = traced(tx)(ps, {**params(1), "b": None}, state)
    assert torch.equal(ps["b"], before[0]["b"])
    assert not torch.equal(ps["w"], before[0]["w"])
    mu, of = fo.get(state, "mu"), fo.get(before[1], "mu")
    assert torch.equal(mu["b"], of["b"])


def test_parameters_that_lie_otherwise() -> None:
    tx = fo.adam(0.1)
    ps = {"w": torch.randn(4, MODELS).T, "b": torch.randn(MODELS)}
    grads = {"w": torch.randn(4, MODELS).T, "b": torch.randn(2 * MODELS)[::2]}
    state = torch.vmap(tx.init)(ps)
    expected = alone(tx, ps, [grads], state)
    same(traced(tx)(ps, grads, state), expected)


@pytest.mark.slow
def test_a_gradient_may_be_the_memory_of_a_parameter() -> None:
    """What is read there is the parameter as it was, whatever has been written by then."""
    tx, ps = fo.chain(fo.clip_by_global_norm(1.0), fo.adam(0.1)), params()
    state = torch.vmap(tx.init)(ps)
    grads = {"w": ps["w"], "b": ps["w"][:, 0], "scale": ps["scale"]}
    expected = alone(tx, ps, [tree.map(torch.clone, grads)], state)
    got = fo.compiled_step(tx, models=True)(ps, grads, state)
    same(got, expected)


def test_extra_arguments_are_of_each_model() -> None:
    tx = fo.chain(fo.scale(-1.0), fo.scale_by_polyak())
    ps, gs = params(), params(1)
    value = torch.rand(MODELS)
    state = torch.vmap(tx.init)(ps)

    def one(ps: Any, gs: Any, state: Any, value: Tensor) -> Any:
        updates, state = tx.update(gs, state, ps, value=value)
        return fo.apply_updates(ps, updates), state

    expected = torch.vmap(one)(ps, gs, state, value)
    same(traced(tx)(ps, gs, state, value=value), expected)


def test_what_a_rule_reads_may_change(monkeypatch: pytest.MonkeyPatch) -> None:
    def rule(g):
        return -FACTOR * g

    tx, ps = fo.leafwise(rule), params()
    step, state = traced(tx), torch.vmap(tx.init)(ps)
    first = ps["w"].clone()
    ps, state = step(ps, params(1), state)
    torch.testing.assert_close(ps["w"], first - 0.5 * params(1)["w"])
    monkeypatch.setitem(globals(), "FACTOR", 2.0)
    before = ps["w"].clone()
    ps, state = step(ps, params(1), state)
    torch.testing.assert_close(ps["w"], before - 2 * params(1)["w"])


def test_what_nobody_can_look_into_runs_eagerly_and_says_so() -> None:
    class Factor:
        def __call__(self) -> float:
            return 2.0

    factor = Factor()

    def rule(g):
        return -factor() * g

    tx, ps = fo.leafwise(rule), params()
    expected = ps["w"] - 2 * params(1)["w"]
    with pytest.warns(UserWarning, match=r"eagerly.*reads Factor"):
        ps, _ = traced(tx)(ps, params(1), torch.vmap(tx.init)(ps))
    torch.testing.assert_close(ps["w"], expected)


def test_a_mistake_of_the_caller_raises_its_own_error_and_writes_nothing() -> None:
    def rule(g):
        raise RuntimeError("mine")

    tx, ps = fo.leafwise(rule), params()
    with pytest.raises(RuntimeError, match="mine"):
        traced(tx)(ps, params(1), torch.vmap(tx.init)(ps))
    same(ps, params())


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        (lambda ps, gs: gs.update(b=gs["b"][:2]), ValueError, "first dimension"),
        (lambda ps, gs: gs.update(scale=torch.ones(())), ValueError, "first dimension"),
        (lambda ps, gs: ps.update(scale=ps["b"][:, 0]), None, ""),
        (lambda ps, gs: ps.update(w=ps["w"][:1].expand(MODELS, 4, 3)), ValueError, "'w'"),
        (lambda ps, gs: gs.pop("b"), ValueError, "b"),
    ],
)
def test_what_does_not_fit(change: Any, error: Any, says: str) -> None:
    tx, ps, gs = fo.sgd(0.1), params(), params(1)
    change(ps, gs)
    state = torch.vmap(tx.init)(ps)
    before = tree.map(torch.clone, ps)
    if error is None:
        with pytest.raises(ValueError, match="shares memory"):
            traced(tx)(ps, gs, state)
        return
    with pytest.raises(error, match=says):
        traced(tx)(ps, gs, state)
    same(ps, before)


def test_a_hyperparameter_that_is_a_tensor_is_refused() -> None:
    with pytest.raises(TypeError, match=r"learning_rate is a tensor.*inject_hyperparams"):
        fo.compiled_step(fo.chain(fo.clip(1.0), fo.sgd(torch.tensor(0.1))), models=True)


def test_a_state_that_changes_its_dtype_is_refused() -> None:
    def update(updates: Any, state: Tensor, params: Any) -> Any:
        return updates, state.double()

    tx = fo.GradientTransformation(lambda ps: torch.zeros(()), update)
    ps = params()
    with pytest.raises(ValueError, match="keeps dtypes and shapes"):
        traced(tx)(ps, params(1), torch.vmap(tx.init)(ps))


def test_it_prints_as_its_call() -> None:
    step = fo.compiled_step(fo.sgd(0.1), models=True, donate=False)
    assert repr(step) == "compiled_step(sgd(0.1), donate=False, models=True)"


@pytest.mark.slow
@pytest.mark.parametrize("donate", [True, False])
def test_in_a_graph_of_somebody_elses(donate: bool) -> None:
    tx, grads = chained(), [params(k) for k in range(1, 4)]
    ps = params()
    state = torch.vmap(tx.init)(ps)
    expected = alone(tx, ps, grads, state)
    step = fo.compiled_step(tx, models=True, donate=donate)
    graph = torch.compile(lambda *args: step(*args), fullgraph=True, backend="aot_eager")
    place = ps["w"].data_ptr()
    for gs in grads:
        ps, state = graph(ps, gs, state)
    same((ps, state), expected)
    assert (ps["w"].data_ptr() == place) == donate


@pytest.mark.slow
def test_it_is_one_kernel_for_models_of_any_number_and_size() -> None:
    tx = fo.chain(fo.scale_by_adam(), fo.scale(-0.1))
    step = fo.compiled_step(tx, models=True)
    for models, width in ((MODELS, 3), (7, 11)):
        shapes = {"w": (models, 4, width), "b": (models, width)}
        ps: Any = {name: torch.randn(shape) for name, shape in shapes.items()}
        gs = tree.map(torch.randn_like, ps)
        state = torch.vmap(tx.init)(ps)
        expected = alone(tx, ps, [gs, gs], state)
        for _ in range(2):
            ps, state = step(ps, gs, state)
        same((ps, state), expected)
    ((first, second),) = step.run.made.values()
    assert first.program is second.program
    assert first.program.kernel is not None
