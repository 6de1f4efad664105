"""Wrappers and measurements, beyond what the laws and the comparison with optax say of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.func import vmap

import functorch_opt as fo
from functorch_opt import tree

STEPS = 11
GENERATOR = torch.Generator().manual_seed(0)


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=GENERATOR, dtype=torch.float64)


PARAMS = {"w": draw(3, 2), "b": draw(2)}
GRADS = [{"w": draw(3, 2), "b": draw(2)} for _ in range(STEPS)]
WEIGHTS = [30, 7, 12, 0, 25, 3, 50, 8, 9, 11, 2]


def train(tx: fo.GradientTransformation, extra: list[dict]) -> tuple[list, dict]:
    """All updates, and the last params."""
    ps, state, seen = PARAMS, tx.init(PARAMS), []
    for g, given in zip(GRADS, extra, strict=True):
        updates, state = tx.update(g, state, ps, **given)
        ps = fo.apply_updates(ps, updates)
        seen.append(updates)
    return seen, ps


def compiled(tx: fo.GradientTransformation, extra: list[dict]) -> dict:
    ps = tree.map(torch.clone, PARAMS)
    step, state = fo.compiled_step(tx), tx.init(ps)
    for g, given in zip(GRADS, extra, strict=True):
        ps, state = step(ps, g, state, **given)
    return ps


def same(a, b) -> None:
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


# ---- accumulation --------------------------------------------------------------------------------


def by_hand(groups: list[list[int]], weights: list[int] | None, mean: bool) -> dict:
    """The params after a step of Adam with each group of small batches."""
    opt = fo.adam(0.1)
    ps, state = PARAMS, opt.init(PARAMS)
    for group in groups:
        parts = [1 if weights is None else weights[i] for i in group]
        total = sum(parts) if mean else 1
        gathered = {
            name: sum(n * GRADS[i][name] for n, i in zip(parts, group, strict=True))
            / total
            for name in PARAMS
        }
        updates, state = opt.update(gathered, state, ps)
        ps = fo.apply_updates(ps, updates)
    return ps


THREES = [[0, 1, 2], [3, 4, 5], [6, 7, 8]]


@pytest.mark.parametrize("mean", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
def test_a_flush_makes_a_step_with_what_is_left(weighted: bool, mean: bool) -> None:
    """Also in the midst of a group, after which the next one begins anew."""
    tx = fo.MultiSteps(fo.adam(0.1), 3, mean, weighted=weighted, flushes=True)
    weights = WEIGHTS if weighted else None
    given = [{"weight": n} if weighted else {} for n in WEIGHTS]
    for flushed, groups in (
        ((), THREES),
        ((10,), [*THREES, [9, 10]]),
        ((1, 3), [[0, 1], [2, 3], [4, 5, 6], [7, 8, 9]]),
    ):
        extra = [
            {**of, "flush": torch.tensor(i in flushed)} for i, of in enumerate(given)
        ]
        expected = by_hand(groups, weights, mean)
        same(train(tx, extra)[1], expected)
        # Numbers that the code was compiled with are float32 there.
        torch.testing.assert_close(compiled(tx, extra), expected, rtol=1e-6, atol=1e-7)


def test_small_batches_without_weight_are_nothing() -> None:
    """All of a group of weight 0: a step with a gradient of zero."""
    tx = fo.MultiSteps(fo.sgd(1.0), 2, weighted=True)
    seen, _ = train(tx, [{"weight": 0.0}] * STEPS)
    assert all((u == 0).all() for updates in seen for u in tree.leaves(updates))


def test_weights_are_of_the_mean_over_tokens() -> None:
    """One step with k weighted means is that with the mean over all tokens."""
    tokens = [draw(n, 4) for n in (5, 2, 9)]

    def loss(w, x):
        return (x @ w).square().sum()

    w = draw(4)
    tx = fo.MultiSteps(fo.sgd(1.0), 3, weighted=True)
    state = tx.init(w)
    for x in tokens:
        g = torch.func.grad(loss)(w, x) / len(x)
        updates, state = tx.update(g, state, w, weight=torch.tensor(len(x)))
    everything = torch.cat(tokens)
    same(updates, -torch.func.grad(loss)(w, everything) / len(everything))


def test_models_with_steps_of_their_own() -> None:
    """Under vmap each model flushes, and leaves out, where it decides to."""
    tx = fo.MultiSteps(
        fo.adam(0.1), 3, should_skip_update_fn=fo.skip_not_finite, flushes=True
    )

    def one(first, flush):
        p = torch.zeros(3, dtype=torch.float64)
        state = tx.init(p)
        for i, g in enumerate((first, torch.ones_like(p), 2 * torch.ones_like(p))):
            updates, state = tx.update(g, state, p, flush=flush & (i == 1))
            p = fo.apply_updates(p, updates)
        return p, fo.get(state, "inner/kept/mini_step")

    first = torch.stack([draw(3), draw(3), torch.full((3,), float("nan")).double()])
    flush = torch.tensor([False, True, False])
    together = vmap(one)(first, flush)
    for i in range(3):
        same(tree.map(lambda x, i=i: x[i], together), one(first[i], flush[i]))
    assert together[1].tolist() == [0, 1, 2]


def test_a_gradient_that_is_left_out_is_not_one_of_the_k() -> None:
    tx = fo.MultiSteps(fo.sgd(1.0), 2, should_skip_update_fn=fo.skip_not_finite)
    state, p, seen = tx.init(torch.zeros(1)), torch.zeros(1), []
    for g in (1.0, float("inf"), float("nan"), 3.0, 5.0):
        updates, state = tx.update(torch.tensor([g]), state, p)
        seen.append(updates.item())
    assert seen == [0, 0, 0, -2, 0]
    assert fo.get(state, "gate/gradient_step") == 1
    assert fo.get(state, "gate/mini_step") == 1


@pytest.mark.parametrize("k", [0, 1.5, True, "2"])
def test_periods_are_whole_numbers(k) -> None:
    for make in (lambda: fo.MultiSteps(fo.sgd(1.0), k), lambda: fo.apply_every(k)):
        with pytest.raises(ValueError, match="must be a whole number from 1; got"):
            make()


# ---- conditions ----------------------------------------------------------------------------------


@pytest.mark.parametrize("wrapper", [fo.conditionally_mask, fo.conditionally_transform])
def test_a_condition_may_read_extra_arguments(wrapper) -> None:
    def is_low(count, *, value):
        return (value < 2) & (count > 0)

    tx = fo.chain(wrapper(fo.trace(0.9), is_low, True), fo.scale_by_polyak())
    ps, state = {"w": torch.ones(2)}, tx.init({"w": torch.ones(2)})
    for value in (1.0, 3.0, 1.0):
        _, state = tx.update({"w": torch.ones(2)}, state, ps, value=torch.tensor(value))
    assert (fo.get(state, "trace")["w"] == 1).all()
    with pytest.raises(TypeError, match="def f\\(count, \\*, value\\); got one of"):
        wrapper(fo.trace(0.9), lambda step, value: value < 2, True)
    with pytest.raises(TypeError, match="must be a function of the count; got True"):
        wrapper(fo.trace(0.9), True)


# ---- frozen parameters, names --------------------------------------------------------------------


@pytest.mark.parametrize(
    "mask",
    [{"w": True, "b": False}, lambda path, p: path == "w"],
    ids=["tree", "function"],
)
def test_frozen_parameters_have_no_state(mask) -> None:
    tx = fo.selective_transform(fo.adam(0.1), freeze_mask=mask)
    state = tx.init(PARAMS)
    assert list(fo.get(state, "mu")) == ["b"]
    updates, _ = tx.update(GRADS[0], state, PARAMS)
    assert (updates["w"] == 0).all()
    same(updates["b"], fo.adam(0.1).update(GRADS[0], fo.adam(0.1).init(PARAMS))[0]["b"])
    with pytest.raises(TypeError, match="True and False"):
        fo.selective_transform(fo.adam(0.1), freeze_mask="w").init(PARAMS)


def test_a_named_chain_is_a_chain_with_other_keys() -> None:
    stage = fo.trace(0.9)
    tx = fo.named_chain(("a", stage), ("b", stage), ("c", fo.adam(0.1)))
    assert stage.name == "trace"
    assert list(tx.init(PARAMS)) == ["a", "b", "c"]
    plain = fo.chain(stage, stage, fo.adam(0.1))
    same(train(tx, [{}] * STEPS)[1], train(plain, [{}] * STEPS)[1])
    assert (
        repr(tx) == "named_chain(('a', trace(0.9)), ('b', trace(0.9)), ('c', adam(0.1)))"
    )


@pytest.mark.parametrize(
    ("pairs", "error", "message"),
    [
        ((("a", fo.trace(0.9)), ("a", fo.trace(0.9))), ValueError, "are called 'a'"),
        ((fo.trace(0.9),), TypeError, "pairs of a name and a transformation"),
        ((("a", 0.9),), TypeError, "'a' must be a transformation"),
        ((("a", fo.params_ema(0.9)), ("b", fo.scale(0.1))), ValueError, "come last"),
    ],
)
def test_what_no_named_chain_is(pairs, error, message) -> None:
    with pytest.raises(error, match=message):
        fo.named_chain(*pairs)


# ---- measurements --------------------------------------------------------------------------------


def largest(updates) -> Tensor:
    return torch.stack([u.abs().max() for u in tree.leaves(updates)]).max()


def test_measurements_say_what_the_updates_were() -> None:
    measures = {
        "largest": largest,
        "share": fo.measure_with_ema(lambda updates: largest(updates) > 3.5, 0.9),
    }
    tx = fo.chain(fo.scale(2.0), fo.monitor(measures), fo.clip(0.1))
    state = tx.init(PARAMS)
    assert fo.get(state, "largest").isnan()
    mean = torch.zeros((), dtype=torch.float64)
    for t, g in enumerate(GRADS, 1):
        _, state = tx.update(g, state, PARAMS)
        doubled = tree.map(lambda x: 2 * x, g)
        same(fo.get(state, "largest"), largest(doubled))
        mean = 0.9 * mean + 0.1 * (largest(doubled) > 3.5).double()
        same(fo.get(state, "share"), mean / (1 - 0.9**t))
    assert 0 < fo.get(state, "share") < 1


def test_measurements_are_kept_by_every_execution() -> None:
    tx = fo.chain(fo.adam(0.1), fo.snapshot("largest", largest))
    expected = tx.init(PARAMS)
    ps, mine = PARAMS, tree.map(torch.clone, PARAMS)
    step, state = fo.compiled_step(tx), tx.init(mine)
    stateful = {name: p.clone().requires_grad_() for name, p in PARAMS.items()}
    opt = fo.optim.Optimizer(list(stateful.items()), tx)
    for g in GRADS[:3]:
        updates, expected = tx.update(g, expected, ps)
        ps = fo.apply_updates(ps, updates)
        mine, state = step(mine, g, state)
        for name, p in stateful.items():
            p.grad = g[name].clone()
        opt.step()
    same(fo.get(state, "largest"), fo.get(expected, "largest"))
    same(opt.state[stateful["w"]]["snapshot/largest"], fo.get(expected, "largest"))


@pytest.mark.parametrize(
    ("measures", "error", "message"),
    [
        ({"a": 3}, TypeError, "'?a'? must be a function of the updates"),
        ({"means": largest}, ValueError, "cannot be called 'means'"),
        ({"count": largest}, TypeError, "none of them g, p, count"),
    ],
)
def test_what_no_measure_is(measures, error, message) -> None:
    with pytest.raises(error, match=message):
        fo.monitor(measures)
    tx = fo.snapshot("a", lambda updates: updates["w"])
    with pytest.raises(TypeError, match="'a' must return a number or a 0-dim tensor"):
        tx.update(GRADS[0], tx.init(PARAMS))
    with pytest.raises(ValueError, match="decay must be in"):
        fo.measure_with_ema(largest, 1.0)
