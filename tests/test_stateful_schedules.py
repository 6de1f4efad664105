"""Hyperparameters whose schedules have a state of their own, beside optax and in every execution."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from parity_page import assert_near, compares
from torch import Tensor
from torch.func import vmap

import functorch_opt as fo

STEPS = 100


class SlowerWhenWorse:
    """The rate is halved for each loss so far that was above the mean of those before it."""

    def __init__(self, first: float, decay: float, zero: Any) -> None:
        self.first, self.decay, self.zero = first, decay, zero

    def init(self) -> Any:
        return {"mean": self.zero, "worse": self.zero}

    def __call__(self, state: Any) -> Any:
        return self.first * 0.5 ** state["worse"]

    def update(self, state: Any, *, value: Any) -> Any:
        worse = state["worse"] + (value > state["mean"]) / 64
        mean = self.decay * state["mean"] + (1 - self.decay) * value
        return {"mean": mean, "worse": worse}


class ForOptax(SlowerWhenWorse):
    """The same, as optax calls it: with all extra arguments, also for the value."""

    def __call__(self, state: Any, **extra: Any) -> Any:
        return super().__call__(state)

    def update(self, state: Any, **extra: Any) -> Any:
        return super().update(state, value=extra["value"])


def schedule(first: float = 0.1, decay: float = 0.9) -> SlowerWhenWorse:
    return SlowerWhenWorse(first, decay, torch.zeros((), dtype=torch.float64))


@functools.cache
def draw(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"w": (3, 4), "b": (4,)}
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in shapes.items()
    }


def loss_at(step: int) -> Tensor:
    return torch.tensor(3 + np.sin(step), dtype=torch.float64)


def train(tx: fo.GradientTransformation, steps: int = STEPS) -> tuple[dict, Any]:
    params, state = draw(0), tx.init(draw(0))
    for step in range(1, steps + 1):
        extra = {"value": loss_at(step)} if "value" in tx.extra_args else {}
        updates, state = tx.update(draw(step), state, params, **extra)
        params = fo.apply_updates(params, updates)
    return params, state


# ---- beside optax --------------------------------------------------------------------------------

Make = Callable[[Any, Callable[..., Any]], Any]
CONFIGURATIONS: list[Make] = [
    lambda o, of: o.inject_hyperparams(o.sgd)(of(0.1, 0.9)),
    lambda o, of: o.inject_hyperparams(o.adamw)(of(0.01, 0.5), weight_decay=0.1),
    lambda o, of: o.inject_hyperparams(o.adam)(0.1, b1=of(0.8, 0.9), eps=1e-3),
    lambda o, of: o.inject_hyperparams(o.lion)(of(0.1, 0.99), b1=of(0.9, 0.5)),
]


@compares(
    "inject_hyperparams",
    reference="optax 0.2.8",
    remark="schedules with a state of their own, which read the loss",
)
@pytest.mark.parametrize("make", CONFIGURATIONS)
def test_a_stateful_schedule_is_that_of_optax(make: Make) -> None:
    optax = pytest.importorskip("optax")
    import jax
    import jax.numpy as jnp

    jax.config.update("jax_enable_x64", True)
    ours, state = train(make(fo, schedule))
    theirs = make(optax, lambda a, b: ForOptax(a, b, jnp.zeros(())))
    params = {name: jnp.asarray(p.numpy()) for name, p in draw(0).items()}
    update, their_state = jax.jit(theirs.update), theirs.init(params)
    for step in range(1, STEPS + 1):
        g = {name: jnp.asarray(x.numpy()) for name, x in draw(step).items()}
        value = jnp.asarray(loss_at(step).numpy())
        updates, their_state = update(g, their_state, params, value=value)
        params = optax.apply_updates(params, updates)
    for name, p in params.items():
        assert_near(ours[name], p)
    for name, value in their_state.hyperparams.items():
        assert_near(fo.get(state, f"hyperparams/{name}"), value)


# ---- in every execution --------------------------------------------------------------------------

INJECTED = {
    "alone": lambda: fo.inject_hyperparams(fo.adamw)(schedule(), weight_decay=0.1),
    "with a schedule": lambda: fo.inject_hyperparams(fo.adamw)(
        schedule(), b1=fo.linear_schedule(0.8, 0.9, 5)
    ),
    "in a chain": lambda: fo.chain(
        fo.clip_by_global_norm(1.0), fo.inject_hyperparams(fo.sgd)(schedule())
    ),
    "of a part": lambda: fo.masked(
        fo.inject_hyperparams(fo.sgd)(schedule()), {"w": True, "b": False}
    ),
}


def rate(state: Any) -> float:
    return fo.get(state, "hyperparams/learning_rate").item()


@pytest.mark.parametrize("name", INJECTED)
def test_the_value_of_a_step_is_that_of_the_state_before_it(name: str) -> None:
    tx = INJECTED[name]()
    seen = [rate(train(tx, steps)[1]) for steps in range(1, 9)]
    expected, state = [], schedule().init()
    for step in range(1, 9):
        expected.append(schedule()(state).item())
        state = schedule().update(state, value=loss_at(step))
    assert seen == expected and len(set(seen)) > 3


@pytest.mark.parametrize("name", INJECTED)
def test_compiled_and_stateful(name: str) -> None:
    tx = INJECTED[name]()
    expected, last = train(tx, 5)
    params = {n: p.clone() for n, p in draw(0).items()}
    step, state = fo.compiled_step(tx), tx.init(params)
    stateful = {n: torch.nn.Parameter(p) for n, p in draw(0).items()}
    opt = fo.optim.Optimizer(stateful.items(), tx)
    for t in range(1, 6):
        params, state = step(params, draw(t), state, value=loss_at(t))
        for n, g in draw(t).items():
            stateful[n].grad = g
        opt.step(lambda t=t: loss_at(t))
    assert rate(state) == rate(last)
    for n, p in expected.items():
        torch.testing.assert_close(params[n], p, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(stateful[n].detach(), p, rtol=1e-10, atol=1e-10)


def test_saved_and_resumed() -> None:
    tx = INJECTED["alone"]()
    params, state = train(tx, 3)
    file = io.BytesIO()
    torch.save(fo.state_dict(state), file)
    file.seek(0)
    again = fo.load_state_dict(tx.init(params), torch.load(file))
    one, other = (
        tx.update(draw(4), of, params, value=loss_at(4))[0] for of in (state, again)
    )
    assert torch.equal(one["w"], other["w"])


def test_vmapped_each_has_a_state_of_its_own() -> None:
    tx = INJECTED["alone"]()

    for step in range(5):
        draw(step)  # outside of vmap, where nothing can be drawn

    def run(scale: Tensor) -> tuple[Tensor, Tensor]:
        params, state = draw(0), tx.init(draw(0))
        for step in (1, 2, 3, 4):
            value = loss_at(step) * scale**step
            updates, state = tx.update(draw(step), state, params, value=value)
            params = fo.apply_updates(params, updates)
        return params["w"], fo.get(state, "hyperparams/learning_rate")

    scales = torch.tensor([1.0, 0.1], dtype=torch.float64)
    mapped, looped = vmap(run)(scales), [run(scale) for scale in scales]
    for got, expected in zip(mapped, zip(*looped, strict=True), strict=True):
        torch.testing.assert_close(got, torch.stack(expected))
    assert mapped[1][0] != mapped[1][1]


# ---- errors --------------------------------------------------------------------------------------


class NeedsTheLoss(SlowerWhenWorse):
    def __call__(self, state: Any, *, value: Any) -> Any:
        return value


def test_what_cannot_be_a_stateful_schedule() -> None:
    tx = INJECTED["alone"]()
    with pytest.raises(TypeError, match=r"reads value.*value=\.\.\."):
        tx.update(draw(1), tx.init(draw(0)), draw(0))
    with pytest.raises(TypeError, match=r"__call__ needs value, .* give a default"):
        fo.inject_hyperparams(fo.sgd)(NeedsTheLoss(0.1, 0.9, torch.tensor(0.0)))
    with pytest.raises(TypeError, match=r"takes \*\*extra; name the extra arguments"):
        fo.inject_hyperparams(fo.sgd)(ForOptax(0.1, 0.9, torch.tensor(0.0)))
    state = fo.inject_hyperparams(fo.adamw)(0.1).init(draw(0))
    with pytest.raises(ValueError, match="not a state of"):
        tx.update(draw(1), state, draw(0), value=1.0)
