"""Wrappers and measurements, beyond what the laws and the comparison with optax say of them."""

from __future__ import annotations

from contextlib import nullcontext

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


def of_each(updates):
    return {
        "norms": tree.map(lambda u: u.norm(), updates),
        "elements": torch.cat([u.flatten() for u in tree.leaves(updates)]),
    }


def test_a_tree_is_kept_by_every_execution() -> None:
    tx = fo.chain(fo.adam(0.1), fo.snapshot("kept", of_each, is_tree=True))
    first = tx.init(PARAMS)
    assert all(x.isnan().all() for x in tree.leaves(fo.get(first, "kept")))
    expected, ps, mine = first, PARAMS, tree.map(torch.clone, PARAMS)
    step, state = fo.compiled_step(tx), tx.init(mine)
    stateful = {name: p.clone().requires_grad_() for name, p in PARAMS.items()}
    opt = fo.optim.Optimizer(list(stateful.items()), tx)
    for g in GRADS[:3]:
        updates, expected = tx.update(g, expected, ps)
        ps = fo.apply_updates(ps, updates)
        with (
            pytest.warns(UserWarning, match="snapshot")
            if g is GRADS[0]
            else nullcontext()
        ):
            mine, state = step(mine, g, state)
        for name, p in stateful.items():
            p.grad = g[name].clone()
        opt.step()
    kept = fo.get(expected, "kept")
    assert kept["elements"].shape == (8,) and kept["elements"].isfinite().all()
    torch.testing.assert_close(fo.get(state, "kept"), kept, rtol=1e-6, atol=1e-7)
    same(stateful, ps)
    again = fo.load_state_dict(first, fo.state_dict(expected))
    same(fo.get(again, "kept"), kept)


def test_a_snapshot_of_a_tree_has_one_form() -> None:
    def with_the_missing(updates):
        return [u for u in updates.values() if u is not None]

    tx = fo.snapshot("kept", with_the_missing, is_tree=True)
    with pytest.raises(TypeError, match="'kept' must return the same tree"):
        tx.update({**GRADS[0], "b": None}, tx.init(PARAMS), PARAMS)
    with pytest.raises(TypeError, match="'kept' must return a tree of tensors"):
        fo.snapshot("kept", lambda updates: [1.0], is_tree=True).init(PARAMS)
    with pytest.raises(TypeError, match="must be a function of the updates"):
        fo.snapshot("kept", 3.0, is_tree=True)


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


# ---- sharpness, plateaus, learned step sizes -----------------------------------------------------


def square(p) -> Tensor:
    return sum(x.square().sum() for x in tree.leaves(p)) / 2


def test_a_zero_gradient_is_no_direction_to_go() -> None:
    """The norm of it is 0: optax divides by it."""
    tx = fo.sam(fo.sgd(0.5), fo.chain(fo.normalize(), fo.sgd(0.1)))
    ps, zeros = PARAMS, tree.map(torch.zeros_like, PARAMS)
    state = tx.init(ps)
    for _ in range(4):
        updates, state = tx.update(zeros, state, ps)
        ps = fo.apply_updates(ps, updates)
    same(ps, PARAMS)


def test_between_the_steps_of_sam_the_parameters_are_elsewhere() -> None:
    """And `eval_params` has those that the optimizer has made."""
    tx = fo.sam(fo.sgd(0.5), fo.chain(fo.normalize(), fo.sgd(0.1)), 2)
    expected, ps, state = PARAMS, PARAMS, tx.init(PARAMS)
    slope = torch.func.grad(square)
    for _ in range(3):
        updates, state = tx.update(slope(ps), state, ps)
        away = fo.apply_updates(ps, updates)
        same(
            tree.norm(tree.map(torch.sub, away, expected)), 0.1 * torch.ones(()).double()
        )
        same(fo.eval_params(tx, state, away), expected)
        expected = tree.map(lambda p, g: p - 0.5 * g, expected, slope(away))
        updates, state = tx.update(slope(away), state, away)
        ps = fo.apply_updates(away, updates)
        same(ps, expected)
        same(fo.eval_params(tx, state, ps), expected)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: fo.sam(fo.sgd(0.1), 0.1), TypeError, "adv_optimizer must be a transf"),
        (lambda: fo.sam(fo.sgd(0.1), fo.sgd(0.1), 0), ValueError, "whole number from 1"),
        (
            lambda: fo.sam(fo.sgd(0.1), fo.sgd(0.1), 2, False, True),
            ValueError,
            "begin anew at every update",
        ),
        (lambda: fo.mechanize(0.1), TypeError, "mechanize takes a transformation"),
        (lambda: fo.mechanize(fo.sgd(1.0), num_betas=0), ValueError, "whole number"),
        (lambda: fo.mechanize(fo.sgd(1.0), s_init=0.0), ValueError, "s_init must be in"),
        (lambda: fo.split_real_and_imaginary(0.1), TypeError, "takes a transformation"),
        (lambda: fo.reduce_on_plateau(1.0), ValueError, "factor must be in"),
        (lambda: fo.reduce_on_plateau(rtol=0.0), ValueError, "rtol \\+ atol must be in"),
        (
            lambda: fo.reduce_on_plateau(patience=0),
            ValueError,
            "patience must be a whole",
        ),
        (lambda: fo.scale_by_lion(mode="soft"), ValueError, "mode must be 'hard'"),
        (lambda: fo.sophia(0.1, update_interval=0, key=0), ValueError, "update_interval"),
        (lambda: fo.sophia(0.1, eps=0.0, key=0), ValueError, "eps must be in"),
        (lambda: fo.sophia(0.1, key=1.5), TypeError, "seed must be a whole number"),
        (lambda: fo.dadapt_adamw(estim_lr0=0.0), ValueError, "estim_lr0 must be in"),
        (lambda: fo.dadapt_adamw(betas=(1.0, 0.9)), ValueError, "betas must be in"),
        (lambda: fo.cocob(eps=0.0), ValueError, "eps must be in"),
    ],
)
def test_what_cannot_be_built(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()


def scale_after(values: list[float], **options) -> float:
    tx = fo.reduce_on_plateau(0.5, patience=2, **options)
    state = tx.init(torch.zeros(1))
    for value in values:
        updates, state = tx.update(torch.ones(1), state, value=value)
    assert updates.item() == fo.get(state, "scale").item()
    return updates.item()


def test_a_plateau_may_lie_below_zero() -> None:
    """optax compares with ``(1 - rtol) best``, which is above a negative best value."""
    assert scale_after([-3.0] * 5, rtol=0.1) == 0.25
    assert scale_after([-3.0, -3.2, -3.5, -3.7, -4.0], rtol=0.01) == 1
    assert scale_after([-3.0, -3.1, -3.2], rtol=0.1) == 0.5
    assert scale_after([float("nan")] * 3) == 0.5
    assert scale_after([float("inf"), 5.0, 5.0]) == 1


@pytest.mark.parametrize(
    "make", [fo.dadapt_adamw, fo.cocob, lambda: fo.mechanize(fo.sgd(1.0))]
)
def test_zero_gradients_move_nothing_and_are_no_nan(make) -> None:
    tx, zeros = make(), tree.map(torch.zeros_like, PARAMS)
    ps, state = PARAMS, tx.init(PARAMS)
    for g in (zeros, zeros):
        updates, state = tx.update(g, state, ps)
        ps = fo.apply_updates(ps, updates)
    same(ps, PARAMS)
    updates, state = tx.update(GRADS[0], state, ps)
    assert all(u.isfinite().all() for u in tree.leaves((updates, state)))


def test_the_rate_of_an_optimizer_is_inside_of_what_learns_it() -> None:
    """`lr` of a stateful optimizer, which is given a ready transformation."""
    ps = [p.clone().requires_grad_() for p in PARAMS.values()]
    opt = fo.optim.Optimizer(ps, fo.mechanize(fo.sgd(1.0)), lr=0.3)
    tx = fo.mechanize(fo.sgd(0.3))
    expected, state = list(PARAMS.values()), tx.init(list(PARAMS.values()))
    for g in GRADS:
        for p, of in zip(ps, g.values(), strict=True):
            p.grad = of.clone()
        opt.step()
        updates, state = tx.update(list(g.values()), state, expected)
        expected = fo.apply_updates(expected, updates)
    same([p.detach() for p in ps], expected)


def test_the_estimate_of_hutchinson_is_the_diagonal_on_average() -> None:
    """Of a Hessian that is not diagonal; the params are a tree with a complex tensor."""
    a = draw(5, 5)
    hessian = a + a.T

    def loss(p):
        x = torch.cat([p["c"].real, p["c"].imag, p["r"]])
        return x @ hessian @ x / 2

    ps = {"c": torch.complex(draw(2), draw(2)), "r": draw(1)}
    keys = fo.random.split(fo.random.key(0), 4000)
    found = vmap(lambda key: fo.hutchinson_estimator_diag_hessian(loss, ps, key))(keys)
    mean = tree.map(lambda x: x.mean(0), found)
    flat = torch.cat([mean["c"].real, mean["c"].imag, mean["r"]])
    off = (hessian.square().sum(1) - hessian.diagonal().square()).sqrt()
    assert ((flat - hessian.diagonal()).abs() < 4 * off / 4000**0.5).all()
    assert found["r"].std() > 0


# ---- states --------------------------------------------------------------------------------------


def test_values_of_a_state_are_set_wherever_they_are() -> None:
    tx = fo.partition(
        {"a": fo.inject_hyperparams(fo.sgd)(learning_rate=0.1), "b": fo.adam(0.1)},
        {"w": "a", "b": "b"},
    )
    state = tx.init(PARAMS)
    new = tree.set(state, learning_rate=torch.tensor(0.5), count=torch.tensor(7))
    assert fo.get(new, "learning_rate") == 0.5
    assert fo.get(new, "count") == 7
    assert fo.get(state, "count") == 0
    assert tree.paths(new) == tree.paths(state)
    moments = {"b": torch.ones(2)}
    assert fo.get(tree.set(state, mu=moments), "mu") is moments
    with pytest.raises(KeyError, match="nothing is called 'lr' in this state; it holds"):
        tree.set(state, lr=0.5)


def test_filters_choose_among_values_of_one_name() -> None:
    """optax has the same functions with the same arguments, and another form of path."""
    assert tree.get is fo.get
    tx = fo.chain(fo.trace(0.9), fo.scale_by_adam(), fo.trace(0.5))
    state = tx.init(PARAMS)
    with pytest.raises(KeyError, match="'trace' is ambiguous"):
        tree.get(state, "trace", filtering=lambda path, value: "trace" in path)
    held = tree.map(torch.ones_like, PARAMS)

    seen = {}

    def is_second(path, value):
        seen[path] = value
        return path.startswith("trace_1/")

    new = tree.set(state, is_second, trace=held)
    assert seen.keys() == {"trace/trace", "trace_1/trace"}
    assert all(fo.get(state, path) is value for path, value in seen.items())
    assert tree.get(new, "trace", filtering=is_second) is held
    same(new["trace"].slots, state["trace"].slots)
    assert tree.get(state, "learning_rate", 0.5) == 0.5
    assert tree.get(state, "count", None, lambda path, value: False) is None
    for ask in (
        tree.get,
        lambda state, name, filtering: tree.set(state, filtering, mu=0),
    ):
        with pytest.raises(KeyError, match=r"'mu' .* for which `filtering` says True"):
            ask(state, "mu", filtering=lambda path, value: False)


@pytest.mark.parametrize("around", [lambda tx: tx, lambda tx: fo.masked(tx, True)])
def test_a_value_comes_before_the_stage_of_its_name(around) -> None:
    """As in optax, where a stage has no name: the momentum of sgd is ``trace``."""
    tx = around(fo.sgd(0.1, momentum=0.9))
    state = tx.init(PARAMS)
    assert tree.paths(tree.get(state, "trace")) == tree.paths(PARAMS)
    held = tree.map(torch.ones_like, tree.get(state, "trace"))
    new = tree.set(state, trace=held)
    assert tree.get(new, "trace") is held
    assert tree.paths(new) == tree.paths(state)
    tx.update(PARAMS, new, PARAMS)


def test_a_parameter_may_have_the_name_of_a_value() -> None:
    params = {"count": torch.ones(2), "mu": torch.ones(3)}
    state = fo.adam(0.1).init(params)
    new = tree.set(state, count=torch.tensor(7))
    assert tree.get(new, "count") == 7
    assert tree.get(new, "mu").keys() == params.keys()
    same(tree.get(new, "mu"), tree.get(state, "mu"))


def test_what_belongs_to_parameters_is_mapped_with_them() -> None:
    """Also in a group, where a slot is a flat dict; counts stay, or have a function of their own."""
    params = {"enc": {"w": draw(3, 2), "b": draw(2)}, "out": None}
    tx = fo.partition(
        {
            "a": fo.adam(0.1),
            "b": fo.chain(fo.trace(0.9), fo.lookahead(fo.sgd(0.1), 2, 0.5)),
        },
        lambda path, p: "a" if p.ndim > 1 else "b",
    )
    names = {"enc": {"w": "W", "b": "B"}, "out": "O"}
    assert tree.map_params is fo.tree_map_params
    seen = []

    def shown(slot, name):
        seen.append((tuple(slot.shape), name))
        return slot + 1

    state = tx.init(params)
    new = fo.tree_map_params(tx, shown, state, names)
    assert sorted(seen) == [((2,), "B")] * 2 + [((3, 2), "W")] * 2
    assert (fo.get(new, "mu")["enc/w"] == 1).all()
    same(fo.get(new, "slow")["enc/b"], params["enc"]["b"] + 1)
    assert fo.get(new, "scale_by_adam/count") == 0
    counted = fo.tree_map_params(
        tx, lambda slot: slot, state, transform_non_params=lambda x: x + 5
    )
    assert fo.get(counted, "scale_by_adam/count") == 5
    same(fo.get(counted, "mu"), fo.get(state, "mu"))


def test_vectors_hold_what_lies_in_them() -> None:
    """Tensors of two dtypes, an empty one, one without gradient, and one that is None."""
    params = {
        "a": torch.ones(2, 2),
        "b": torch.ones(3).bfloat16(),
        "c": torch.ones(0),
        "d": torch.ones(()),
        "e": None,
    }
    grads = {"a": 2 * torch.ones(2, 2), "b": torch.ones(3).bfloat16(), "c": torch.ones(0)}
    grads |= {"d": None, "e": None}
    tx = fo.flatten(fo.trace(0.5))
    state = tx.init(params)
    for _ in range(2):
        updates, state = tx.update(grads, state, params)
    assert {name: x.shape for name, x in fo.get(state, "trace").items()} == {
        "float32": (5,),
        "bfloat16": (3,),
    }
    assert updates["d"] is updates["e"] is None
    assert (updates["a"] == 3).all()
    assert (updates["b"] == 1.5).all()
    assert updates["c"].shape == (0,)
    with pytest.raises(ValueError, match="flatten needs the parameters"):
        tx.update(grads, state)


# ---- convergence ---------------------------------------------------------------------------------

GOAL = torch.tensor([1.0, -1.0, 1.0])


def parabola(p: Tensor) -> Tensor:
    return (p - GOAL.to(p.dtype)).abs().square().sum()


OPTIMIZERS = {
    "amsgrad": lambda: fo.amsgrad(
        0.05, bias_correction_mu=False, bias_correction_nu=False
    ),
    "cocob": fo.cocob,
    "dadapt_adamw": fo.dadapt_adamw,
    "l_dog": lambda: fo.scale_by_distance_over_gradients(1e-3, global_scale=-1.0),
    "mechanize": lambda: fo.mechanize(fo.sgd(1.0)),
    "optimistic_adam_v2": lambda: fo.optimistic_adam_v2(0.01),
    "sam": lambda: fo.sam(
        fo.sgd(0.05), fo.chain(fo.normalize(), fo.sgd(0.01)), opaque_mode=True
    ),
    "smooth_lion": lambda: fo.chain(
        fo.scale_by_lion(mode="smooth"), fo.scale_by_learning_rate(0.01)
    ),
    "sophia": lambda: fo.sophia(0.05, weight_decay=0.0, key=0),
    "weighted": lambda: fo.MultiSteps(fo.adam(0.05), 2, weighted=True),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_lowest_point_of_a_parabola_is_found(name: str, dtype: torch.dtype) -> None:
    """From (-1, 10, 1) to (1, -1, 1), within 0.01 after 5000 steps at most."""
    tx, p = OPTIMIZERS[name](), torch.tensor([-1.0, 10.0, 1.0], dtype=dtype)
    state = tx.init(p)
    known = {"obj_fn": parabola, "grad_fn": lambda q, i: slope(q), "weight": 2.0}

    def slope(q: Tensor) -> Tensor:
        return 2 * (q - GOAL.to(q.dtype))

    extra = {name: known[name] for name in tx.extra_args if name in known}
    for step in range(5000):
        updates, state = tx.update(slope(p), state, p, **extra)
        p = fo.apply_updates(p, updates)
        if step % 50 == 0 and (p - GOAL.to(dtype)).abs().max() < 0.01:
            return
    raise AssertionError(f"it is at {p}")
