"""Scripts of optax's users, of which nothing but the import differs.

Each is one function of a library and of its framework: arrays, gradients. It follows an example of
optax's documentation, and gives the same numbers with both.
"""

from __future__ import annotations

import typing
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from parity_page import assert_near

import functorch_opt as fo

jax = pytest.importorskip("jax", reason="comparison with optax needs jax and optax")
optax = pytest.importorskip("optax", reason="comparison with optax needs jax and optax")

jax.config.update("jax_enable_x64", True)


def value_and_grad(f: Callable[..., Any]) -> Callable[..., Any]:
    def both(*args: Any) -> tuple[Any, Any]:
        gradients, value = torch.func.grad_and_value(f)(*args)
        return value, gradients

    return both


OPTAX = SimpleNamespace(**{**vars(optax), **vars(optax.contrib)})
JAX = SimpleNamespace(
    array=jax.numpy.asarray,
    jit=jax.jit,
    grad=jax.grad,
    value_and_grad=jax.value_and_grad,
    vmap=jax.vmap,
    sigmoid=jax.nn.sigmoid,
    minimum=jax.numpy.minimum,
)
TORCH = SimpleNamespace(
    array=torch.as_tensor,
    jit=lambda f: f,
    grad=torch.func.grad,
    value_and_grad=value_and_grad,
    vmap=torch.func.vmap,
    sigmoid=torch.sigmoid,
    minimum=torch.minimum,
)

DRAWN = np.random.default_rng(0)
X = DRAWN.normal(size=(32, 3))
Y = X @ np.array([1.0, -2.0, 3.0]) + 0.5 + 0.1 * DRAWN.normal(size=32)


def first(of: Any) -> Any:
    return {"w": of.array(np.array([0.3, -0.2, 0.1])), "b": of.array(np.array(0.2))}


def loss_of(of: Any) -> Callable[..., Any]:
    x, y = of.array(X), of.array(Y)
    return lambda p, moved=0.0: (((x + moved) @ p["w"] + p["b"] - y) ** 2).mean()


def trained(optax: Any, of: Any, tx: Any, steps: int = 10) -> Any:
    params, loss = first(of), loss_of(of)
    state = tx.init(params)
    for _ in range(steps):
        updates, state = tx.update(of.grad(loss)(params), state, params)
        params = optax.apply_updates(params, updates)
    return params


# ---- the scripts, in which the library is called optax -------------------------------------------


def meta_learning(optax: Any, of: Any) -> Any:
    """The learning rate is learned through five steps of the optimizer."""
    tx = optax.inject_hyperparams(optax.rmsprop)(learning_rate=of.array(np.array(0.1)))
    meta_tx = optax.adam(learning_rate=0.03)
    loss = loss_of(of)

    def step(theta, state):
        updates, state = tx.update(of.grad(loss)(theta), state)
        return optax.apply_updates(theta, updates), state

    def after_five(eta, theta, state):
        state = optax.tree.set(state, learning_rate=of.sigmoid(eta))
        for _ in range(5):
            theta, state = step(theta, state)
        return loss(theta)

    eta, theta = of.array(np.array(-2.0)), first(of)
    meta_state, state = meta_tx.init(eta), tx.init(theta)
    for _ in range(5):
        gradient = of.grad(after_five)(eta, theta, state)
        updates, meta_state = meta_tx.update(gradient, meta_state)
        eta = optax.apply_updates(eta, updates)
        state = optax.tree.set(state, learning_rate=of.sigmoid(eta))
        theta, state = step(theta, state)
    return eta, theta


def adversarial_training(optax: Any, of: Any) -> Any:
    """An inner optimizer moves the inputs in a box, and an outer one the parameters."""
    loss, params = loss_of(of), first(of)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1))
    attack = optax.chain(optax.scale_by_sign(), optax.scale(0.05))
    state = tx.init(params)
    for _ in range(5):
        moved = of.array(0.0 * X)
        attacking = attack.init(moved)
        for _ in range(3):
            uphill = of.grad(lambda moved, p=params: loss(p, moved))(moved)
            updates, attacking = attack.update(uphill, attacking)
            moved = optax.apply_updates(moved, updates)
            moved = optax.projections.projection_linf_ball(moved, 0.1)
        updates, state = tx.update(of.grad(loss)(params, moved), state, params)
        params = optax.apply_updates(params, updates)
    return params


def sam(optax: Any, of: Any) -> Any:
    around = optax.chain(optax.normalize(), optax.sgd(0.1))
    tx = optax.sam(optax.sgd(0.05, momentum=0.9), around, sync_period=2)
    return trained(optax, of, tx, 12)


def opaque_sam(optax: Any, of: Any) -> Any:
    loss, params = loss_of(of), first(of)
    around = optax.chain(optax.normalize(), optax.adam(0.03))
    tx = optax.sam(optax.adam(0.01), around, sync_period=5, opaque_mode=True)
    state = tx.init(params)
    for _ in range(6):
        gradients = of.grad(loss)(params)
        updates, state = tx.update(
            gradients, state, params, grad_fn=of.grad(lambda p, _: loss(p))
        )
        params = optax.apply_updates(params, updates)
    return params


def reduce_on_plateau(optax: Any, of: Any) -> Any:
    loss, params, scales = loss_of(of), first(of), []
    tx = optax.chain(
        optax.adam(0.3),
        optax.reduce_on_plateau(patience=2, cooldown=1, factor=0.5, accumulation_size=2),
    )

    @of.jit
    def step(params, state):
        value, gradients = of.value_and_grad(loss)(params)
        updates, state = tx.update(gradients, state, params, value=value)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(60):
        params, state = step(params, state)
        scales.append(optax.tree.get(state, "scale"))
    assert float(scales[-1]) < 1
    return params, scales


def freezing(optax: Any, of: Any) -> Any:
    mask, labels = {"w": False, "b": True}, {"w": "train", "b": "freeze"}
    by_label = {"train": optax.adam(0.1), "freeze": optax.set_to_zero()}
    ways = [
        optax.chain(optax.adam(0.1), optax.freeze(mask)),
        optax.selective_transform(optax.adam(0.1), freeze_mask=mask),
        optax.chain(optax.adam(0.1), optax.masked(optax.set_to_zero(), mask)),
        optax.partition(by_label, labels),
    ]
    return [trained(optax, of, tx) for tx in ways]


def lbfgs(optax: Any, of: Any) -> Any:
    """The loop of the documentation, which stops by what the state holds."""

    def fun(w):
        return (100.0 * (w[1:] - w[:-1] ** 2) ** 2 + (1.0 - w[:-1]) ** 2).sum()

    tx, params = optax.lbfgs(), of.array(np.zeros(8))
    value_and_grad = optax.value_and_grad_from_state(fun)

    @of.jit
    def step(params, state):
        value, grad = value_and_grad(params, state=state)
        updates, state = tx.update(
            grad, state, params, value=value, grad=grad, value_fn=fun
        )
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    while True:
        params, state = step(params, state)
        iterations = optax.tree.get(state, "count")
        error = optax.tree.norm(optax.tree.get(state, "grad"))
        if not (iterations < 100 and error >= 1e-3):
            break
    return params, iterations


def accumulation_with_skips(optax: Any, of: Any) -> Any:
    tx = optax.MultiSteps(
        optax.adam(0.1),
        every_k_schedule=lambda step: 1 + 2 * (step > 2),
        should_skip_update_fn=optax.skip_not_finite,
    )
    loss, params, updated = loss_of(of), first(of), []
    state, update = tx.init(params), of.jit(tx.update)
    for i in range(20):
        gradients = of.grad(loss)(params)
        if i % 5 == 3:
            gradients = {**gradients, "b": gradients["b"] * float("nan")}
        updates, state = update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        updated.append(tx.has_updated(state))
    return params, updated


def injected_schedules(optax: Any, of: Any) -> Any:
    schedule = optax.warmup_cosine_decay_schedule(0.0, 1.0, 5, 20)
    bound = optax.linear_schedule(1.0, 0.0, transition_steps=99)
    tx = optax.chain(
        optax.inject_hyperparams(optax.clip_by_global_norm)(max_norm=bound),
        optax.inject_hyperparams(optax.adamw)(learning_rate=schedule, weight_decay=0.1),
    )
    loss, params, seen = loss_of(of), first(of), []
    state = tx.init(params)
    for _ in range(20):
        updates, state = tx.update(of.grad(loss)(params), state, params)
        params = optax.apply_updates(params, updates)
        for name in ("learning_rate", "max_norm"):
            is_number = lambda path, value: hasattr(value, "dtype")  # noqa: E731
            seen.append(optax.tree.get(state, name, filtering=is_number))
    return params, seen


def complex_parameters(optax: Any, of: Any) -> Any:
    goal = of.array(np.array([1 + 2j, -1j, 0.5]))
    tx = optax.split_real_and_imaginary(optax.adam(0.1))
    params = of.array(np.array([0.1 + 0.2j, 1j, -1.0]))
    state = tx.init(params)
    for _ in range(10):
        updates, state = tx.update(2 * (params - goal), state, params)
        params = optax.apply_updates(params, updates)
    return params.real, params.imag


def one_loop_for_any_optimizer(optax: Any, of: Any) -> Any:
    loss, found = loss_of(of), []
    search = optax.scale_by_backtracking_linesearch(15)
    for tx in (
        optax.sgd(0.1),
        optax.adam(0.1, nesterov=True),
        optax.polyak_sgd(),
        optax.chain(optax.sgd(0.1), search),
        optax.flatten(optax.adam(0.1)),
        optax.apply_if_finite(optax.lion(0.1), 3),
        optax.named_chain(("clip", optax.clip(1.0)), ("adam", optax.adam(0.1))),
        optax.conditionally_mask(optax.adam(0.1), lambda step: step % 2 == 0),
    ):
        tx = optax.with_extra_args_support(tx)
        params = first(of)
        state = tx.init(params)
        for _ in range(5):
            value, grad = of.value_and_grad(loss)(params)
            updates, state = tx.update(
                grad, state, params, value=value, grad=grad, value_fn=loss
            )
            params = optax.apply_updates(params, updates)
        found.append(params)
    return found


def averages(optax: Any, of: Any) -> Any:
    params = trained(optax, of, optax.lion(0.01))
    target = optax.incremental_update(params, first(of), 0.1)
    copied = optax.periodic_update(params, target, steps=10, update_period=5)
    sizes = optax.tree.norm(params), optax.tree.vdot(params, target)
    return target, copied, sizes


def states_as_trees(optax: Any, of: Any) -> Any:
    tx, more = optax.adam(0.1), first(of)
    state = optax.tree_map_params(
        tx,
        lambda x, m: x + m,
        tx.init(first(of)),
        more,
        transform_non_params=lambda count: count + 1,
    )
    return [optax.tree.get(state, name) for name in ("mu", "nu", "count")]


def stages_of_the_script(optax: Any, of: Any) -> Any:
    """A stage that reads an extra argument and has a state, one that has none, and annotations."""

    class Seen(NamedTuple):
        steps: Any
        least: Any

    def init(params: optax.Params) -> optax.OptState:
        return Seen(of.array(np.array(0.0)), of.array(np.array(1e9)))

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        *,
        value: Any,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        del params, extra_args
        share = value / (1 + value)
        least = of.minimum(state.least, value)
        return optax.tree.scale(share, updates), Seen(state.steps + 1, least)

    # A tree of optax 0.2.8 is made of trees, which it names by a string.
    known = {"optax": optax, "ArrayTree": Any}
    assert typing.get_type_hints(init, localns=known)
    assert typing.get_type_hints(update, localns=known)
    scale_by_loss = optax.GradientTransformationExtraArgs(init, update)
    decay = optax.stateless_with_tree_map(lambda u, p: u + 0.01 * p)

    def flip(
        updates: optax.Updates, state: optax.EmptyState, params: optax.Params = None
    ) -> tuple[optax.Updates, optax.EmptyState]:
        return optax.tree.scale(-0.1, updates), optax.EmptyState()

    negate = optax.GradientTransformation(optax.init_empty_state, flip)
    mask = {"w": True, "b": False}
    tx = optax.chain(optax.masked(scale_by_loss, mask), decay, negate)
    params = first(of)
    state, loss = tx.init(params), loss_of(of)
    for _ in range(10):
        value, grad = of.value_and_grad(loss)(params)
        updates, state = tx.update(grad, state, params, value=value)
        params = optax.apply_updates(params, updates)
    alone, seen = scale_by_loss.update(grad, init(params), params, value=value, grad=grad)
    return params, alone, seen.least, optax.tree.get(state, "least")


SCRIPTS = {
    stages_of_the_script: 1e-10,
    meta_learning: 1e-10,
    adversarial_training: 1e-10,
    sam: 1e-10,
    opaque_sam: 1e-10,
    reduce_on_plateau: 1e-10,
    freezing: 1e-10,
    lbfgs: 1e-10,
    accumulation_with_skips: 1e-6,  # optax gathers in float32
    injected_schedules: 1e-6,  # optax works schedules out in float32
    complex_parameters: 1e-10,
    one_loop_for_any_optimizer: 1e-10,
    averages: 1e-10,
    states_as_trees: 1e-10,
}


def numbers(x: Any) -> list[Any]:
    if isinstance(x, (list, tuple)):
        return [number for of in x for number in numbers(of)]
    if isinstance(x, dict):
        return [number for name in sorted(x) for number in numbers(x[name])]
    return [np.asarray(x, dtype=np.float64)]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_a_script_needs_another_import_only(script: Callable[..., Any]) -> None:
    ours, theirs = numbers(script(fo, TORCH)), numbers(script(OPTAX, JAX))
    assert len(ours) == len(theirs)
    for x, y in zip(ours, theirs, strict=True):
        assert_near(x, y, SCRIPTS[script])
