"""Outer loops, steps ahead and ASAM, beside plain loops over the parameters."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from parity_page import assert_near, compares
from test_authors import (
    STEPS,
    assert_same,
    draw,
    plain_adam,
    train,
    train_plainly,
)
from torch import Tensor

import functorch_opt as fo

PAPER = "plain: the paper"

# ---- outer loops ------------------------------------------------------------------------------------


def plain_snoo(lr: float, outer_lr: float, momentum: float, k: int):
    """Adam, and every k steps Nesterov's step of torch.optim.SGD from the last snapshot."""

    def make(p: Tensor) -> Callable:
        adam, snapshot, velocity = plain_adam(0.9, 0.99, 1e-3), p, torch.zeros_like(p)

        def step(t: int, g: Tensor, p: Tensor) -> Tensor:
            nonlocal snapshot, velocity
            p = p - lr * adam(t, g)
            if t % k == 0:
                apart = snapshot - p
                velocity = momentum * velocity + outer_lr * apart
                p = snapshot = snapshot - momentum * velocity - outer_lr * apart
            return p

        return step

    return make


OUTER = [
    (0.05, 0.7, 0.5, 30),
    (0.1, 0.9, 0.8, 7),
    (0.02, 1.0, 0.0, 1),
    (0.1, 0.3, 0.9, 3),
]


@compares("outer_loop", reference=PAPER, remark="SNOO, and MuLoCo of one worker")
@pytest.mark.parametrize("options", OUTER)
def test_the_outer_loop_of_nesterov_is_snoo(options: tuple) -> None:
    lr, outer_lr, momentum, k = options
    outer = fo.sgd(outer_lr, momentum=momentum, nesterov=True)
    tx = fo.outer_loop(fo.adam(lr, 0.9, 0.99, 1e-3), outer, k)
    assert_same(train(tx), train_plainly(plain_snoo(*options)))


@pytest.mark.parametrize("k", [1, 3, 10])
def test_the_outer_loop_of_gradient_descent_is_lookahead(k: int) -> None:
    ours = fo.outer_loop(fo.adam(0.1), fo.sgd(0.5), k)
    assert_same(train(ours), train(fo.lookahead(fo.adam(0.1), k, 0.5)))


def test_the_outer_schedule_counts_outer_steps() -> None:
    """A rate that is 0 from the third outer step on leaves the weights where they are then."""
    rate = fo.piecewise_constant_schedule(1.0, {2: 0.0})
    tx, p = fo.outer_loop(fo.sgd(1.0), fo.sgd(rate), 4), torch.tensor(0.0)
    state = tx.init(p)
    for _ in range(20):
        updates, state = tx.update(torch.tensor(-1.0), state, p)
        p = fo.apply_updates(p, updates)
    assert p == fo.eval_params(tx, state, p) == 8


def test_an_outer_loop_says_what_it_takes() -> None:
    with pytest.raises(TypeError, match="outer must be a transformation"):
        fo.outer_loop(fo.sgd(1.0), 0.7, 3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="sync_period must be a whole number from 1"):
        fo.outer_loop(fo.sgd(1.0), fo.sgd(1.0), 0)


# ---- EMA-Nesterov -----------------------------------------------------------------------------------


def plain_ema_nesterov(lr: float, beta: Callable[[int], float], decay: float):
    """The step ahead is made before the gradient of the next step is taken."""

    def make(p: Tensor) -> Callable:
        adam, previous, lead = plain_adam(0.9, 0.99, 1e-3), p, torch.zeros_like(p)

        def step(t: int, g: Tensor, p: Tensor) -> Tensor:
            nonlocal previous, lead
            p = p - lr * adam(t, g)
            lead = decay * lead + (1 - decay) * (p - previous)
            previous = p
            return p + beta(t) * lead

        return step

    return make


@compares("ema_nesterov", reference=PAPER)
@pytest.mark.parametrize(
    "options", [(0.05, 0.3, 0.99), (0.1, 1.0, 0.9), (0.02, 0.1, 0.0), (0.1, 2.0, 0.5)]
)
def test_ema_nesterov_is_that_of_the_paper(options: tuple) -> None:
    lr, beta, decay = options
    tx = fo.ema_nesterov(fo.adam(lr, 0.9, 0.99, 1e-3), beta, decay)
    assert_same(train(tx), train_plainly(plain_ema_nesterov(lr, lambda t: beta, decay)))


@compares("ema_nesterov", reference=PAPER, remark="between two steps of the training")
@pytest.mark.parametrize(("begin", "end"), [(20, 80), (1, 50)])
def test_steps_ahead_can_begin_late_and_end_early(begin: int, end: int) -> None:
    def beta(count: Tensor) -> Tensor:
        t = count + 1
        return 0.3 * ((t >= begin) & (t < end)).double()

    tx = fo.ema_nesterov(fo.adam(0.1, 0.9, 0.99, 1e-3), beta, 0.9)
    plain = plain_ema_nesterov(0.1, lambda t: 0.3 * (begin <= t < end), 0.9)
    assert_same(train(tx), train_plainly(plain))


def test_the_weights_to_evaluate_are_those_before_the_step_ahead() -> None:
    tx, params = fo.ema_nesterov(fo.sgd(0.1), 0.5, 0.0), draw(0)
    state = tx.init(params)
    for t in range(1, 4):
        before = fo.get(state, "behind")
        updates, state = tx.update(draw(t), state, params)
        params = fo.apply_updates(params, updates)
        at = fo.eval_params(tx, state, params)
        ahead = {name: at[name] + 0.5 * (at[name] - before[name]) for name in at}
        assert_same(params, ahead)


# ---- ASAM -------------------------------------------------------------------------------------------


def pulled(params: dict[str, Tensor], t: int) -> dict[str, Tensor]:
    """The gradient at step t of a loss that is not quadratic."""
    target = draw(t)
    there = {"weight": target["w"], "bias": target["b"]}
    return {name: torch.tanh(p - there[name]) * p.cosh() for name, p in params.items()}


def first_layer() -> dict[str, Tensor]:
    start = draw(0)
    return {"weight": start["w"], "bias": start["b"]}


def plain_asam(
    lr: float, rho: float, eta: float, only_weights: bool
) -> dict[str, Tensor]:
    """SGD, with two gradients a step. T of biases is 1 where `only_weights`, as by the authors."""
    p = first_layer()
    for t in range(1, STEPS + 1):
        g = pulled(p, t)
        size = {name: x.abs() + eta for name, x in p.items()}
        if only_weights:
            size["bias"] = torch.ones_like(size["bias"])
        norm = math.sqrt(sum(((size[name] * g[name]) ** 2).sum().item() for name in g))
        ascent = {name: rho * size[name] ** 2 * g[name] / norm for name in g}
        sharp = pulled({name: p[name] + ascent[name] for name in p}, t)
        p = {name: p[name] - lr * sharp[name] for name in p}
    return p


def is_weight(path: str, p: Tensor) -> bool:
    return "weight" in path


@compares("asam", "scale_by_param_size", reference="plain: the authors' code")
@pytest.mark.parametrize("mask", [None, is_weight])
@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize(
    "options", [(0.1, 0.5, 0.01), (0.05, 1.0, 0.0), (0.02, 0.05, 1.0), (0.1, 0.1, 0.1)]
)
def test_asam_is_that_of_its_authors(options: tuple, at_once: bool, mask: object) -> None:
    lr, rho, eta = options
    tx = fo.asam(fo.sgd(lr), rho, eta, mask, opaque_mode=at_once)
    params = first_layer()
    state = tx.init(params)
    for t in range(1, STEPS + 1):
        for _ in range(1 if at_once else 2):
            extra = {"grad_fn": lambda p, i, t=t: pulled(p, t)} if at_once else {}
            updates, state = tx.update(pulled(params, t), state, params, **extra)
            params = fo.apply_updates(params, updates)
    theirs = plain_asam(*options, mask is not None)
    for name, p in theirs.items():
        assert_near(params[name], p, 1e-10, name)


def test_asam_does_not_depend_on_the_scale_of_a_layer() -> None:
    """What is c times as large, with a gradient of 1/c, has an adversarial step c times as long."""
    c = torch.tensor([[1.0], [10.0], [0.1]])
    p, g = draw(0)["w"].float(), draw(1)["w"].float()
    tx = fo.chain(
        fo.scale_by_param_size(0.0), fo.normalize(), fo.scale_by_param_size(0.0)
    )
    one, _ = tx.update(g, tx.init(p), p)
    other, _ = tx.update(g / c, tx.init(c * p), c * p)
    torch.testing.assert_close(other, c * one)
