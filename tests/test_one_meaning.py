"""Every execution gives the numbers of `update`, for rules and wrappers as users write them.

The reference is always the functional layer. Each test stands for a kind of fault that an execution
once had.
"""

from __future__ import annotations

import gc
import threading
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, jacfwd, jacrev

import functorch_opt as fo
from functorch_opt._execution import kernel
from functorch_opt._execution.compiled import CompiledStep
from functorch_opt._execution.segments import PROGRAMS

Make = Callable[[], fo.GradientTransformation]
NAN = float("nan")


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()
    PROGRAMS.clear()


# ---- the executions ------------------------------------------------------------------------------


def with_update(make: Make, gradients: list[float], start: Tensor) -> Tensor:
    tx, params = make(), {"w": start.clone()}
    state = tx.init(params)
    for g in gradients:
        updates, state = tx.update({"w": torch.full_like(start, g)}, state, params)
        params = fo.apply_updates(params, updates)
    return params["w"]


def with_compiled_step(make: Make, gradients: list[float], start: Tensor) -> Tensor:
    tx, params = make(), {"w": start.clone()}
    state, step = tx.init(params), fo.compiled_step(tx)
    for g in gradients:
        params, state = step(params, {"w": torch.full_like(start, g)}, state)
    return params["w"]


def with_optimizer(
    make: Make, gradients: list[float], start: Tensor, compile: bool
) -> Tensor:
    w = nn.Parameter(start.clone())
    optimizer = fo.optim.Optimizer([("w", w)], make(), compile=compile)
    for g in gradients:
        w.grad = torch.full_like(start, g)
        optimizer.step()
    return w.detach()


EXECUTIONS = {
    "optimizer": lambda *given: with_optimizer(*given, compile=False),
    "compiled_step": with_compiled_step,
    "compiled optimizer": lambda *given: with_optimizer(*given, compile=True),
}
executions = pytest.mark.parametrize(
    "execution",
    [
        pytest.param(run, id=name, marks=[pytest.mark.slow] if "compiled" in name else [])
        for name, run in EXECUTIONS.items()
    ],
)


def check(
    execution: Any, make: Make, gradients: list[float], start: Tensor | None = None
) -> None:
    start = torch.zeros(4) if start is None else start
    expected = with_update(make, gradients, start)
    assert expected.isfinite().all()
    torch.testing.assert_close(
        execution(make, gradients, start), expected, rtol=1e-5, atol=1e-5
    )


# ---- a rule may return any tensor that it was given ----------------------------------------------


def history_of_gradients() -> fo.GradientTransformation:
    def rule(g, last, before):
        return -(g + last + before) / 3, {"last": g, "before": last}

    return fo.leafwise(rule, slots={"last": torch.zeros_like, "before": torch.zeros_like})


def history_cloned() -> fo.GradientTransformation:
    """Inductor takes the clone out again."""

    def rule(g, last, before):
        return -(g + last + before) / 3, {"last": g, "before": last.clone()}

    return fo.leafwise(rule, slots={"last": torch.zeros_like, "before": torch.zeros_like})


def previous_parameter() -> fo.GradientTransformation:
    def rule(g, p, before):
        return -0.1 * (g + 2 * p) + 0.5 * (p - before), {"before": p}

    return fo.leafwise(rule, slots={"before": torch.clone})


def anchor_is_the_parameter() -> fo.GradientTransformation:
    """The first value of the slot is the memory of the parameter itself."""

    def rule(g, p, start):
        return -0.1 * g - 0.5 * (p - start), {"start": start}

    return fo.leafwise(rule, slots={"start": lambda p: p.detach()})


def delayed_by_a_step() -> fo.GradientTransformation:
    def rule(g, last):
        return last, {"last": -0.1 * g}

    return fo.leafwise(rule, slots={"last": torch.zeros_like})


def slots_that_swap() -> fo.GradientTransformation:
    def rule(g, one, two):
        return -one, {"one": two, "two": one + g}

    return fo.leafwise(rule, slots={"one": torch.zeros_like, "two": torch.ones_like})


def keyword_default() -> fo.GradientTransformation:
    def scaled(g, *, by=3.0):
        return by * g

    def rule(g):
        return scaled(g)

    return fo.leafwise(rule)


RULES = [
    pytest.param(history_of_gradients, [1.0, 2.0, 6.0], 0.0, id="history of gradients"),
    pytest.param(history_cloned, [1.0, 2.0, 6.0], 0.0, id="history, cloned"),
    pytest.param(previous_parameter, [0.0] * 30, 1.0, id="previous parameter"),
    pytest.param(anchor_is_the_parameter, [1.0] * 12, 0.0, id="anchor"),
    pytest.param(delayed_by_a_step, [1.0, 2.0, 6.0], 0.0, id="delayed"),
    pytest.param(slots_that_swap, [1.0, 2.0, 6.0, 3.0], 0.0, id="swap"),
    pytest.param(keyword_default, [1.0, 2.0], 0.0, id="keyword default"),
]


@executions
@pytest.mark.parametrize(("make", "gradients", "start"), RULES)
def test_a_rule_may_return_what_it_was_given(
    execution: Any, make: Make, gradients: list[float], start: float
) -> None:
    check(execution, make, gradients, torch.full((4,), start))


@executions
@pytest.mark.filterwarnings("ignore:.*eagerly, between the")
def test_the_state_of_a_whole_tree_may_be_the_params(execution: Any) -> None:
    def make():
        def update(updates, state, params):
            def rule(u, p, before):
                return -0.1 * u + 0.5 * (p - before)

            return fo.tree.map(rule, updates, params, state["before"]), {"before": params}

        return fo.GradientTransformation(lambda params: {"before": params}, update)

    check(execution, make, [1.0, 2.0, 6.0])


# ---- transformations that do not count every step ------------------------------------------------


def skipping(inner: fo.GradientTransformation) -> fo.GradientTransformation:
    """`inner`, but nothing where a gradient is not finite: as everybody writes it."""

    def update(updates, state, params=None, **extra):
        finite = torch.stack([u.isfinite().all() for u in fo.tree.leaves(updates)]).all()

        def safe(u):
            return torch.where(finite, u, 0.0)

        moved, new = inner.update(
            fo.tree.map(safe, updates), state["inner"], params, **extra
        )
        kept = fo.tree.map(lambda a, b: torch.where(finite, a, b), new, state["inner"])
        return fo.tree.map(safe, moved), {"inner": kept}

    def init(params):
        return {"inner": inner.init(params)}

    return fo.GradientTransformation(init, update, extra_args=inner.extra_args)


def step_down(count: Tensor) -> Tensor:
    return torch.where(count < 2, 1.0, 0.1)


@executions
@pytest.mark.filterwarnings("ignore:.*eagerly, between the")
@pytest.mark.parametrize("wrapper", [skipping, lambda tx: fo.apply_if_finite(tx, 5)])
@pytest.mark.parametrize("inner", [lambda: fo.adam(0.1), lambda: fo.sgd(step_down)])
def test_a_step_that_is_left_out_is_not_counted(
    execution: Any, wrapper: Any, inner: Make
) -> None:
    check(execution, lambda: wrapper(inner()), [1.0, NAN, NAN, -2.0, 1.0])


def updates_of_both(
    tx: fo.GradientTransformation, present: Callable[[int], bool], steps: int
) -> tuple[float, float]:
    """What the last step does to a parameter that has a gradient at some steps only."""
    params = {"a": torch.zeros(1), "e": torch.zeros(1)}
    state, updates = tx.init(params), {}
    mine = {name: nn.Parameter(x.clone()) for name, x in params.items()}
    optimizer = fo.optim.Optimizer(list(mine.items()), tx)
    moved = 0.0
    for i in range(steps):
        gradients = {"a": torch.ones(1), "e": torch.ones(1) if present(i) else None}
        before = mine["e"].item()
        updates, state = tx.update(gradients, state, params)
        for name, p in mine.items():
            p.grad = gradients[name]
        optimizer.step()
        moved = mine["e"].item() - before
    return updates["e"].item(), moved


@pytest.mark.parametrize(
    "present",
    [lambda i: i % 4 == 0, lambda i: i >= 30],
    ids=["every fourth step", "unfrozen late"],
)
def test_a_schedule_is_a_clock_of_the_training(present: Callable[[int], bool]) -> None:
    """A parameter that has few gradients, or late ones, is not at the beginning of a schedule."""
    expected, got = updates_of_both(
        fo.sgd(fo.cosine_decay_schedule(1.0, 40)), present, 37
    )
    assert got == pytest.approx(expected, rel=1e-5)


def test_a_count_that_a_rule_reads_is_one_of_the_parameter() -> None:
    """As torch counts: the bias correction of a parameter that was unfrozen late starts anew."""
    _, late = updates_of_both(fo.adam(0.1), lambda i: i == 9, 10)
    assert late == pytest.approx(-0.1, rel=1e-4)


def test_the_state_of_wrappers_lies_with_each_parameter() -> None:
    w = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    tx = fo.keep_master_weights(fo.adam(fo.linear_schedule(0.1, 0.0, 9)))
    optimizer = fo.optim.Optimizer([("w", w)], tx)
    w.grad = torch.ones_like(w)
    optimizer.step()
    assert optimizer.state[w]["keep_master_weights/kept/master"].shape == w.shape
    own = {key for key, value in optimizer.state[w].items() if value.shape == w.shape}
    assert {key.rpartition("/")[2] for key in own} == {"master", "mu", "nu"}


# ---- compiled code, and what it was made for -----------------------------------------------------

SCALE = 2.0


def stretch(x: Tensor) -> Tensor:
    return 10 * x


def moved_by(step: Any, tx: fo.GradientTransformation, n: int = 3) -> float:
    params = {"w": torch.zeros(n)}
    params, _ = step(params, {"w": torch.ones(n)}, tx.init(params))
    return params["w"][0].item()


def once(tx: fo.GradientTransformation) -> float:
    return moved_by(fo.compiled_step(tx), tx)


def reads_a_global() -> fo.GradientTransformation:
    def rule(g):
        return SCALE * g

    return fo.leafwise(rule)


def calls_a_helper() -> fo.GradientTransformation:
    def rule(g):
        return stretch(g)

    return fo.leafwise(rule)


@pytest.mark.slow
@pytest.mark.parametrize("same_step", [True, False], ids=["same step", "new step"])
def test_a_global_that_changes(monkeypatch: pytest.MonkeyPatch, same_step: bool) -> None:
    tx = reads_a_global()
    step = fo.compiled_step(tx)
    assert moved_by(step, tx) == 2.0
    monkeypatch.setitem(globals(), "SCALE", 3.0)
    assert (moved_by(step, tx) if same_step else once(reads_a_global())) == 3.0


@pytest.mark.slow
@pytest.mark.parametrize("same_step", [True, False], ids=["same step", "new step"])
def test_a_helper_that_is_defined_anew(
    monkeypatch: pytest.MonkeyPatch, same_step: bool
) -> None:
    tx = calls_a_helper()
    step = fo.compiled_step(tx)
    assert moved_by(step, tx) == 10.0
    monkeypatch.setitem(globals(), "stretch", lambda x: 7 * x)
    assert (moved_by(step, tx) if same_step else once(calls_a_helper())) == 7.0


class Config:
    def __init__(self) -> None:
        self.k = 1.0


def changed_attribute() -> tuple[Any, Any, Any]:
    config = Config()

    def rule(g):
        return config.k * g

    return rule, lambda: setattr(config, "k", 5.0), 5.0


def changed_list() -> tuple[Any, Any, Any]:
    factors = [1.0]

    def rule(g):
        return factors[0] * g

    return rule, lambda: factors.__setitem__(0, 5.0), 5.0


def changed_dict() -> tuple[Any, Any, Any]:
    factors = {"k": 1.0}

    def rule(g):
        return factors["k"] * g

    return rule, lambda: factors.update(k=5.0), 5.0


def changed_cell() -> tuple[Any, Any, Any]:
    k = 1.0

    def rule(g):
        return k * g

    def change():
        nonlocal k
        k = 5.0

    return rule, change, 5.0


@pytest.mark.slow
@pytest.mark.parametrize(
    "of", [changed_attribute, changed_list, changed_dict, changed_cell]
)
def test_what_a_rule_closes_over_changes(of: Any) -> None:
    rule, change, expected = of()
    tx = fo.leafwise(rule)
    step = fo.compiled_step(tx)
    assert moved_by(step, tx) == 1.0
    change()
    assert moved_by(step, tx) == expected
    assert once(fo.leafwise(rule)) == expected


class Scaler:
    """An object whose method computes something. Its values cannot be compared."""

    def __init__(self) -> None:
        self.k = 1.0

    def scaled(self, x: Tensor) -> Tensor:
        return self.k * x


@pytest.mark.slow
def test_an_object_with_methods_runs_eagerly_and_is_named() -> None:
    scaler = Scaler()

    def rule(g):
        return scaler.scaled(g)

    tx = fo.leafwise(rule)
    step = fo.compiled_step(tx)
    with pytest.warns(UserWarning, match="Scaler"):
        assert moved_by(step, tx) == 1.0
    scaler.k = 5.0
    assert moved_by(step, tx) == 5.0


def chosen_by(value: Any) -> fo.GradientTransformation:
    def rule(g):
        return 10 * g if value is True else g

    return fo.leafwise(rule)


def divided_by(value: float) -> fo.GradientTransformation:
    def rule(g):
        return g / value

    return fo.leafwise(rule)


@pytest.mark.slow
def test_equal_is_not_the_same() -> None:
    assert (once(chosen_by(1)), once(chosen_by(True)), once(chosen_by(1.0))) == (
        1.0,
        10.0,
        1.0,
    )
    infinity = float("inf")
    assert (once(divided_by(0.0)), once(divided_by(-0.0))) == (infinity, -infinity)


@pytest.mark.slow
@pytest.mark.parametrize("kwdefault", [False, True], ids=["default", "keyword default"])
def test_defaults_that_differ(kwdefault: bool) -> None:
    def make(by):
        def positional(x, by=by):
            return by * x

        def keyword(x, *, by=by):
            return by * x

        helper = keyword if kwdefault else positional

        def rule(g):
            return helper(g)

        return fo.leafwise(rule)

    assert (once(make(2.0)), once(make(3.0))) == (2.0, 3.0)


@pytest.mark.slow
def test_autocast_is_what_it_is_eagerly() -> None:
    def rule(g):
        return g @ g.mT @ g

    tx = fo.leafwise(rule, kind="tensorwise")
    g = {"w": torch.randn(6, 6, generator=torch.Generator().manual_seed(0))}
    params = {"w": torch.zeros(6, 6)}
    step = fo.compiled_step(tx, donate=False)
    for enabled in (False, True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            expected, _ = tx.update(g, tx.init(params), params)
            got, _ = step(params, g, tx.init(params))
        torch.testing.assert_close(got["w"], expected["w"].float(), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_a_strided_gradient_and_a_rule_for_whole_tensors() -> None:
    tx = fo.chain(fo.centralize(), fo.sgd(1.0))
    params = {"w": torch.ones(4, 6)}
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    g = grad(lambda p: torch.einsum("oi,bi->bo", p["w"], x).pow(3).sum())(params)
    state = tx.init(params)
    expected = fo.apply_updates(params, tx.update(g, state, params)[0])
    got, _ = fo.compiled_step(tx, donate=False)(params, g, state)
    torch.testing.assert_close(got["w"], expected["w"], rtol=1e-4, atol=1e-3)


@pytest.mark.slow
def test_one_step_in_three_threads() -> None:
    tx = fo.adamw(0.01)

    def train(seed, step):
        params = {"w": torch.randn(10, generator=torch.Generator().manual_seed(seed))}
        state = tx.init(params)
        for _ in range(100):
            params, state = step(params, {"w": params["w"] * 0.3 + 1}, state)
        return params["w"]

    alone = [train(seed, fo.compiled_step(tx)) for seed in range(3)]
    step, got = fo.compiled_step(tx), {}

    def job(seed):
        got[seed] = train(seed, step)

    threads = [threading.Thread(target=job, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in range(3):
        assert torch.equal(got[seed], alone[seed])


@pytest.mark.slow
def test_no_half_a_step_after_an_error() -> None:
    fail = False

    def schedule(count):
        if fail:
            raise MemoryError
        return 0.1

    stages = (
        fo.scale_by_adam(),
        fo.clip_by_global_norm(1.0),
        fo.scale_by_learning_rate(schedule),
    )
    w = nn.Parameter(torch.ones(4))
    optimizer = fo.optim.Optimizer([w], fo.chain(*stages), compile=True)
    w.grad = torch.ones(4)
    optimizer.step()
    before = {name: value.clone() for name, value in optimizer.state[w].items()}
    fail = True
    with pytest.raises(MemoryError):
        optimizer.step()
    changed = [n for n, x in optimizer.state[w].items() if not torch.equal(x, before[n])]
    assert not changed


# ---- how much is compiled, and for how long it lives ---------------------------------------------


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """An entry for each program that is compiled."""
    entries: list[int] = []
    init = kernel.Program.__init__

    def counted(self, *args, **kwargs):
        entries.append(1)
        init(self, *args, **kwargs)

    monkeypatch.setattr(kernel.Program, "__init__", counted)
    return entries


@pytest.mark.slow
def test_a_number_that_changes_compiles_twice_at_most(made: list[int]) -> None:
    step_number = 0

    def prepare():
        nonlocal step_number
        step_number += 1
        return {"k": step_number}

    tx = fo.leafwise(lambda g, k: g * k, prepare)
    step, params = fo.compiled_step(tx), {"w": torch.zeros(3)}
    state = tx.init(params)
    for _ in range(5):
        params, state = step(params, {"w": torch.ones(3)}, state)
    assert params["w"][0] == 15
    assert len(made) <= 2


@pytest.mark.slow
def test_two_models_in_turn_compile_once(made: list[int]) -> None:
    tx = fo.adamw(0.1)
    step = fo.compiled_step(tx)
    models = [{"w": torch.ones(3)}, {"a": torch.ones(4, 2), "b": torch.ones(5)}]
    states = [tx.init(params) for params in models]
    after_one_round = None
    for _ in range(3):
        for i, params in enumerate(models):
            gradients = fo.tree.map(torch.ones_like, params)
            models[i], states[i] = step(params, gradients, states[i])
        known = len(made), sum(map(len, step.segments.values())), len(step.views)
        after_one_round = after_one_round or known
        assert known == after_one_round
    assert len(made) == 1


@pytest.mark.slow
def test_what_a_rule_closes_over_is_let_go() -> None:
    class Big:
        pass

    def make(big):
        def rule(g):
            big  # noqa: B018
            return -g

        return fo.leafwise(rule)

    big = Big()
    alive = weakref.ref(big)
    once(make(big))
    del big
    gc.collect()
    assert alive() is None


GROUPED = {
    "mask": lambda: fo.adamw(1e-3, mask=lambda path, p: p.ndim > 1),
    "masked": lambda: fo.masked(fo.adamw(1e-3), lambda path, p: True),
    "partition": lambda: fo.partition(
        {"a": fo.adamw(1e-3), "b": fo.adamw(1e-4)},
        lambda path, p: "a" if path == "a" else "b",
    ),
    "inject": lambda: fo.inject_hyperparams(fo.adamw)(learning_rate=1e-3),
    "MultiSteps": lambda: fo.MultiSteps(fo.adamw(1e-3), 2),
    "apply_if_finite": lambda: fo.apply_if_finite(fo.adamw(1e-3), 3),
    "lookahead": lambda: fo.lookahead(fo.adamw(1e-3), 2, 0.5),
}


@pytest.mark.slow
@pytest.mark.parametrize("make", GROUPED.values(), ids=GROUPED)
def test_what_is_declared_is_compiled(make: Make, made: list[int]) -> None:
    """Nothing of it runs eagerly, and there is nothing to warn of."""
    tx = make()
    step = fo.compiled_step(tx)
    params = {"a": torch.ones(3, 2), "b": torch.ones(4)}
    gradients = fo.tree.map(torch.ones_like, params)
    state = tx.init(params)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            params, state = step(params, gradients, state)
    assert made and not step.said


@pytest.mark.slow
def test_a_wrapper_written_by_hand_is_named() -> None:
    tx = fo.transformation(skipping)(fo.adamw(1e-3))
    with pytest.warns(UserWarning, match="skipping eagerly, between the compiled rest"):
        once(tx)


# ---- derivatives, and single functions -----------------------------------------------------------


def test_forward_mode_through_injected_hyperparameters() -> None:
    def final(lr):
        tx, params = fo.inject_hyperparams(fo.sgd)(learning_rate=lr), torch.ones(2)
        state = tx.init(params)
        for _ in range(5):
            updates, state = tx.update(2 * params, state, params)
            params = fo.apply_updates(params, updates)
        return (params**2).sum()

    lr = torch.tensor(0.1)
    torch.testing.assert_close(jacfwd(final)(lr), jacrev(final)(lr))


def test_a_tree_as_mask_inside_of_a_partition() -> None:
    params = {
        "enc": {"w": torch.ones(2), "b": torch.ones(1)},
        "head": {"w": torch.ones(2)},
    }
    decay = {"enc": {"w": True, "b": False}, "head": {"w": True}}
    inside = {"a": fo.adamw(0.1, weight_decay=0.1, mask=decay), "s": fo.sgd(0.1)}
    tx = fo.partition(inside, {"enc": "a", "head": "s"})
    updates, _ = tx.update(params, tx.init(params), params)
    assert updates["enc"]["w"][0] < updates["enc"]["b"][0]


def test_a_default_can_be_injected() -> None:
    tx = fo.inject_hyperparams(fo.trace)(0.9, nesterov=True)
    assert list(tx.init({"w": torch.ones(2)})["hyperparams"])[:1] == ["decay"]


def test_a_schedule_does_not_ascend() -> None:
    with pytest.raises(ValueError, match="0 or greater"):
        fo.piecewise_constant_schedule(0.1, {3: -2.0})
    with pytest.raises(ValueError, match="0 or greater"):
        fo.piecewise_interpolate_schedule("linear", 13.0, {5: -3})


def test_lbfgs_under_another_default_dtype() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        tx, p = (
            fo.chain(fo.scale_by_lbfgs(), fo.scale(-0.1)),
            {"w": torch.ones(3).float()},
        )
        state = tx.init(p)
        for _ in range(3):
            updates, state = tx.update({"w": 2 * p["w"]}, state, p)
            p = fo.apply_updates(p, updates)
    finally:
        torch.set_default_dtype(torch.float32)
    assert p["w"].dtype == torch.float32 and (p["w"] < 1).all()


def test_clipping_zeros_to_zero() -> None:
    tx, g = fo.clip_by_global_norm(torch.tensor(0.0)), [torch.zeros(2)]
    assert torch.equal(tx.update(g, tx.init(g))[0][0], torch.zeros(2))


def test_a_state_that_changes_its_form_is_refused() -> None:
    def update(g, state, params):
        m = fo.tree.map(lambda a, b: 0.9 * a + b, state["m"], g) if "m" in state else g
        return fo.tree.map(lambda a: -0.1 * a, m), {"m": m}

    w = nn.Parameter(torch.zeros(2))
    w.grad = torch.ones(2)
    with pytest.raises((TypeError, ValueError), match="state"):
        fo.optim.Optimizer(
            [w], fo.GradientTransformation(lambda params: {}, update)
        ).step()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("scale_by_adam/shared/count", torch.tensor(2.5)),
        ("scale_by_adam/slots/mu/w", torch.zeros(2, dtype=torch.int32)),
    ],
)
def test_loading_looks_at_dtypes_and_counts(key: str, value: Tensor) -> None:
    state = fo.adam(0.1).init({"w": torch.zeros(2)})
    saved = fo.state_dict(state)
    assert key in saved
    with pytest.raises((TypeError, ValueError)):
        fo.load_state_dict(state, {**saved, key: value})


def in_dtype(dtype: torch.dtype) -> fo.GradientTransformation:
    """A rule whose update has a dtype of its own."""
    return fo.leafwise(lambda g: (0.5 * g).to(dtype))


def test_updates_between_passes_have_the_dtype_of_their_rule() -> None:
    """Two groups have rules of the same code, and another dtype each."""
    seen: list[dict[str, torch.dtype]] = []

    def look(updates, params):
        seen.append({path: u.dtype for path, u in updates.items()})
        return updates

    groups = {"a": in_dtype(torch.float64), "b": in_dtype(torch.float32)}
    tx = fo.chain(fo.partition(groups, lambda path, p: path), fo.stateless(look))
    params = {"a": torch.randn(3), "b": torch.randn(3)}
    grads = {"a": torch.randn(3), "b": torch.randn(3)}
    tx.update(grads, tx.init(params), params)
    step: Any = CompiledStep(tx, True, "eager")
    with pytest.warns(UserWarning, match="eagerly"):
        step(params, grads, tx.init(params))
    assert seen[0] == seen[1] == {"a": torch.float64, "b": torch.float32}


@executions
def test_a_wrapper_computes_with_one_number_in_its_dtype(execution: Any) -> None:
    """A hyperparameter is float64. Where it meets a 0-dim tensor, it must not make it float64."""

    def seen(p, h):
        return p / (1 + abs(h))

    def make() -> fo.GradientTransformation:
        inner = fo.leafwise(lambda g, p: -0.1 * (g + p))
        return fo.wrap(inner, before=seen, hyper={"h": fo.linear_schedule(0.9, 0.1, 3)})

    start = torch.tensor(0.7)
    check(execution, make, [1.0, -0.5, 2.0], start)
    seen_dtypes = []

    def update(updates, state, params):
        seen_dtypes.append(params["w"].dtype)
        return updates, state

    watching = fo.GradientTransformation(lambda params: (), update)
    tx = fo.wrap(watching, before=seen, hyper={"h": fo.linear_schedule(0.9, 0.1, 3)})
    params = {"w": start}
    tx.update(params, tx.init(params), params)
    assert seen_dtypes == [torch.float32]


def test_a_stage_that_changes_the_dtype_is_seen_by_the_next_as_by_itself() -> None:
    """Also where a later stage changes it back. Rules compute in float32 at least."""
    seen: list[torch.dtype] = []

    def looked_at(g: Tensor) -> Tensor:
        seen.append(g.dtype)
        return g / 3

    rounded = fo.leafwise(lambda g: g.bfloat16())
    stages = rounded, fo.leafwise(looked_at), fo.leafwise(lambda g: g.float())
    params = {"w": torch.zeros(4)}
    g = {"w": torch.tensor([1.0, 2.0, 3.0, 4.0])}
    together = fo.chain(*stages)
    expected = g
    for stage in stages:
        expected, _ = stage.update(expected, stage.init(params))
    got, _ = together.update(g, together.init(params))
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    assert seen[-1] is torch.float32
