"""Numbers that a stage keeps, of all updates and of each layer, at the steps that are asked."""

from __future__ import annotations

import pickle
import warnings

import pytest
import torch
from torch import Tensor, nn

import functorch_opt as fo
from functorch_opt import tree

STEPS = 7


def ratio(u: Tensor, p: Tensor) -> Tensor:
    return u.norm() / p.norm()


def largest(u: Tensor) -> Tensor:
    return u.abs().amax()


LAYERS = {"largest": largest, "ratio": ratio}


def draw(seed: int) -> dict:
    generator = torch.Generator().manual_seed(seed)

    def tensor(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return {"conv": {"w": tensor(2, 3, 2), "b": tensor(3)}, "head": [tensor(3, 2)]}


def due_at(every) -> list[bool]:
    if callable(every):
        return [bool(every(step)) for step in range(STEPS)]
    return [step % every == 0 for step in range(STEPS)]


def after_the_second(step):
    return step > 2


def watched(every) -> fo.GradientTransformation:
    measures = {"norm": tree.norm}
    return fo.chain(
        fo.scale_by_adam(),
        fo.monitor(measures, layers=LAYERS, every=every),
        fo.scale_by_learning_rate(0.1),
    )


@pytest.mark.parametrize("every", [1, 2, 3, after_the_second], ids=str)
def test_the_numbers_are_those_of_the_last_step_that_was_asked(every) -> None:
    """And the updates are those of the chain without it."""
    tx, plain = watched(every), fo.adam(0.1)
    params = draw(0)
    state, other = tx.init(params), plain.init(params)
    assert fo.get(state, "norm").isnan()
    assert all(x.isnan() for x in tree.leaves(fo.get(state, "ratio")))
    wanted = fo.get(state, "norm"), fo.get(state, "ratio"), fo.get(state, "largest")
    for step, is_due in enumerate(due_at(every)):
        grads = draw(1 + step)
        updates, state = tx.update(grads, state, params)
        expected, other = plain.update(grads, other, params)
        torch.testing.assert_close(updates, expected, rtol=0, atol=0)
        if is_due:
            seen = tree.map(lambda u: u / -0.1, expected)
            wanted = (
                tree.norm(seen),
                tree.map(lambda u, p: u.norm() / p.norm(), seen, params),
                tree.map(lambda u: u.abs().max(), seen),
            )
        kept = fo.get(state, "norm"), fo.get(state, "ratio"), fo.get(state, "largest")
        torch.testing.assert_close(kept, wanted, rtol=1e-12, atol=0, equal_nan=True)
        params = fo.apply_updates(params, updates)
    assert all(type(x) is Tensor for x in tree.leaves(state))


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("every", [1, 3])
def test_every_execution_keeps_them(every: int, compile: bool) -> None:
    tx = watched(every)
    params = {"w": draw(0)["conv"]["w"], "b": draw(0)["conv"]["b"]}
    state, ps = tx.init(params), params
    mine = {name: nn.Parameter(p.clone()) for name, p in params.items()}
    optimizer = fo.optim.Optimizer([*mine.items()], tx, compile=compile)
    for step in range(5):
        grads = {name: draw(1 + step)["conv"][name] for name in params}
        updates, state = tx.update(grads, state, ps)
        ps = fo.apply_updates(ps, updates)
        for name, p in mine.items():
            p.grad = grads[name].clone()
        optimizer.step()
        inside = "monitor" if every == 1 else "monitor/inner"
        for name, p in mine.items():
            kept = optimizer.state[p][f"{inside}/ratio"]
            torch.testing.assert_close(kept, fo.get(state, "ratio")[name])
            torch.testing.assert_close(p.detach(), ps[name])


def test_off_is_no_stage_at_all() -> None:
    off = fo.monitor({"norm": tree.norm}, layers=LAYERS, every=0)
    params = draw(0)
    assert not tree.leaves(off.init(params))
    calls = []

    def counted(u):
        calls.append(u)
        return u.norm()

    tx = fo.monitor(layers={"norm": counted}, every=4)
    state = tx.init(params)
    for step in range(8):
        _, state = tx.update(draw(step), state, params)
    assert len(calls) == 2 * len(tree.leaves(params)), "only at the first and the fifth"


def test_a_report_has_them_by_layer() -> None:
    tx = watched(1)
    params = draw(0)
    found = fo.report(tx, draw(1), tx.init(params), params)
    _, state = tx.update(draw(1), tx.init(params), params)
    kept = fo.get(state, "ratio")
    assert found["state/monitor/ratio/conv/w"] == kept["conv"]["w"]
    assert found["state/monitor/largest/head/0"] == fo.get(state, "largest")["head"][0]
    assert found["state/monitor/norm"] == fo.get(state, "norm")


def test_a_report_at_a_step_that_is_asked() -> None:
    """By the name of the stage, and not as a step that is skipped at the others."""
    tx, params = watched(2), draw(0)
    state = tx.init(params)
    for step in range(3):
        found = fo.report(tx, draw(step), state, params)
        assert ("state/monitor/ratio/conv/w" in found) == (step != 1)
        assert not [name for name in found if name.startswith("skip")]
        _, state = tx.update(draw(step), state, params)
    bare = fo.monitor({"norm": tree.norm}, every=2)
    found = fo.report(bare, draw(1), bare.init(params), params)
    assert found["state/monitor/norm"] == tree.norm(draw(1))


def rows(updates):
    return {"of w": updates["w"].abs().sum(1), "largest": [updates["b"].abs().amax()]}


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize(
    "others", [{}, {"measures": {"norm": tree.norm}, "layers": LAYERS}]
)
def test_trees_of_any_form(every: int, others: dict) -> None:
    tx = fo.chain(fo.monitor(trees={"rows": rows}, every=every, **others), fo.sgd(0.1))
    params = {"w": draw(0)["conv"]["w"], "b": draw(0)["conv"]["b"]}
    mine = {name: nn.Parameter(p.clone()) for name, p in params.items()}
    optimizer = fo.optim.Optimizer([*mine.items()], tx)
    step, held, state = fo.compiled_step(tx), tx.init(params), tx.init(params)
    theirs = tree.map(torch.clone, params)
    assert all(x.isnan().all() for x in tree.leaves(fo.get(state, "rows")))
    for t in range(5):
        grads = {name: draw(1 + t)["conv"][name] for name in params}
        updates, state = tx.update(grads, state, params)
        params = fo.apply_updates(params, updates)
        if t % every == 0:
            wanted = rows(grads)
        torch.testing.assert_close(fo.get(state, "rows"), wanted, rtol=0, atol=0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it is eager: tests/test_wrappers.py
            theirs, held = step(theirs, grads, held)
        torch.testing.assert_close(fo.get(held, "rows"), wanted, rtol=1e-12, atol=0)
        for name, p in mine.items():
            p.grad = grads[name].clone()
        optimizer.step()
        torch.testing.assert_close({**mine}, params, rtol=1e-12, atol=1e-12)
    again = fo.load_state_dict(tx.init(params), fo.state_dict(state))
    torch.testing.assert_close(fo.get(again, "rows"), wanted, rtol=0, atol=0)
    if others:
        assert fo.get(state, "norm").isfinite()


def test_each_model_has_its_own() -> None:
    tx = watched(2)
    params = torch.stack([draw(i)["conv"]["w"] for i in range(3)])
    grads = torch.stack([draw(5 + i)["conv"]["w"] for i in range(3)])
    state = torch.vmap(tx.init)({"w": params})
    for _ in range(2):
        _, state = torch.vmap(tx.update)({"w": grads}, state, {"w": params})
    for i in range(3):
        alone = tx.init({"w": params[i]})
        for _ in range(2):
            _, alone = tx.update({"w": grads[i]}, alone, {"w": params[i]})
        kept = fo.get(state, "ratio")["w"]
        torch.testing.assert_close(kept[i], fo.get(alone, "ratio")["w"])


def test_a_parameter_without_gradient_keeps_its_number() -> None:
    tx = fo.monitor(layers={"largest": largest})
    params = {"w": torch.ones(2), "b": torch.ones(1)}
    _, state = tx.update(params, tx.init(params), params)
    _, state = tx.update({"w": 3 * params["w"], "b": None}, state, params)
    assert fo.get(state, "largest") == {"w": 3.0, "b": 1.0}


def test_it_is_saved_and_loaded() -> None:
    tx, params = watched(2), draw(0)
    _, state = tx.update(draw(1), tx.init(params), params)
    saved = fo.state_dict(state)
    loaded = fo.load_state_dict(tx.init(params), saved)
    torch.testing.assert_close(fo.get(loaded, "ratio"), fo.get(state, "ratio"))
    assert repr(pickle.loads(pickle.dumps(tx))) == repr(tx)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"layers": {"a": 3}}, TypeError, "'?a'? must be a function of the updates"),
        ({"every": -1}, ValueError, "every must be a whole number"),
        ({"every": 1.5}, ValueError, "every must be a whole number"),
        ({"measures": {"a": largest}, "layers": {"a": largest}}, TypeError, "different"),
        ({"trees": {"a": largest}, "layers": {"a": largest}}, TypeError, "different"),
        ({"trees": {"a": 3}}, TypeError, "'?a'? must be a function of the updates"),
    ],
)
def test_what_it_refuses(options, error, message) -> None:
    with pytest.raises(error, match=message):
        fo.monitor(**options)


@pytest.mark.parametrize("wrong", [lambda u: u, lambda u: 3.0], ids=["tensor", "float"])
def test_a_measure_of_a_layer_returns_a_number(wrong) -> None:
    tx = fo.monitor(layers={"wrong": wrong})
    params = {"w": torch.ones(2)}
    with pytest.raises(TypeError, match="'wrong' of layers must return a real 0-dim"):
        tx.update(params, tx.init(params), params)


@pytest.mark.parametrize("every", [1, 3])
def test_nothing_waits_for_the_device(every: int) -> None:
    """A tensor on the device ``meta`` has no value: who asks for one gets an error."""
    tx = watched(every)
    params = {"w": torch.ones(3, 2, device="meta")}
    state = tx.init(params)
    for _ in range(3):
        _, state = tx.update(params, state, params)
    assert fo.get(state, "ratio")["w"].device.type == "meta"
    with pytest.raises(RuntimeError, match="meta"):
        fo.get(state, "ratio")["w"].item()
    looked_at = fo.report(tx, params, state, params)
    assert looked_at["ratio/w"].device.type == "meta"
