"""A function may compute with its arguments when it makes a transformation: groups still count."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import functorch_opt as fo

RATES = (0.1, 0.3, 0.2)


def made(learning_rate, b1=0.9, rho=0.0):
    """Numbers are worked out of all three, also of what was worked out before."""
    half = 0.5 * learning_rate
    direction = fo.chain(fo.scale_by_adam(b1=1 - b1), fo.add_decayed_weights(half + rho))
    return fo.chain(direction, fo.scale_by_learning_rate(half**0.5))


def run(opt: torch.optim.Optimizer, params: list[nn.Parameter]) -> None:
    for step, rate in enumerate(RATES):
        generator = torch.Generator().manual_seed(step)
        opt.param_groups[0]["lr"] = rate
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        opt.step()


def two() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(7)
    draws = [torch.randn(3, generator=generator, dtype=torch.float64) for _ in range(2)]
    return [*map(nn.Parameter, draws)]


@pytest.mark.parametrize("compile", [False, True])
def test_numbers_are_worked_out_again_at_every_step(compile: bool) -> None:
    """The second group has numbers of its own; the reference is the functional layer."""
    params = two()
    hyper = {"b1": 0.3, "rho": 0.2}
    groups = [{"params": params[:1]}, {"params": params[1:], "lr": 0.7, "b1": 0.6}]
    opt = fo.optim.Optimizer(groups, made, compile=compile, lr=1.0, **hyper)
    run(opt, params)

    for i, (p, start) in enumerate(zip(params, two(), strict=True)):
        q, state = start.detach(), None
        for step, rate in enumerate(RATES):
            tx = made(rate, 0.3, 0.2) if i == 0 else made(0.7, 0.6, 0.2)
            state = tx.init(q) if state is None else state
            generator = torch.Generator().manual_seed(step)
            draws = [
                torch.randn(3, generator=generator, dtype=torch.float64) for _ in range(2)
            ]
            updates, state = tx.update(draws[i], state, q)
            q = fo.apply_updates(q, updates)
        torch.testing.assert_close(p.detach(), q, rtol=1e-12, atol=1e-12)


def looks(learning_rate):
    return fo.sgd(learning_rate) if learning_rate > 0 else fo.set_to_zero()


def bounds(learning_rate):
    return fo.sgd(min(learning_rate, 1.0))


def reads(learning_rate):
    return fo.sgd(float(learning_rate))


@pytest.mark.parametrize("function", [looks, bounds, reads])
def test_a_function_that_looks_at_a_number_is_an_error(function: Callable) -> None:
    params = two()
    opt = fo.optim.Optimizer(params, function, lr=0.1)
    before = [p.detach().clone() for p in params]
    with pytest.raises(TypeError, match=r"looks at the value .* lambda learning_rate"):
        run(opt, params)
    torch.testing.assert_close([p.detach() for p in params], before, rtol=0, atol=0)


def changes(learning_rate):
    if isinstance(learning_rate, torch.Tensor):
        learning_rate.mul_(2)
    return fo.sgd(learning_rate)


def takes_apart(learning_rate):
    if isinstance(learning_rate, torch.Tensor):
        learning_rate, _ = learning_rate.frexp()
    return fo.sgd(learning_rate)


@pytest.mark.parametrize(
    ("function", "says"),
    [(changes, "mul_ would change"), (takes_apart, "several tensors")],
)
def test_what_cannot_be_made_again_is_an_error(function: Callable, says: str) -> None:
    params = two()
    with pytest.raises(TypeError, match=f"{says}.* option of the groups"):
        run(fo.optim.Optimizer(params, function, lr=0.1), params)


def test_an_assignment_that_multiplies_is_an_operation() -> None:
    def function(learning_rate):
        learning_rate *= 2
        return fo.sgd(learning_rate)

    params, others = two(), two()
    run(fo.optim.Optimizer(params, function, lr=0.1), params)
    run(fo.optim.Optimizer(others, fo.chain(fo.scale(2.0), fo.sgd(1.0)), lr=0.1), others)
    torch.testing.assert_close(params, others, rtol=1e-12, atol=1e-12)


def test_what_is_fixed_may_be_looked_at() -> None:
    """And what gives back the argument itself is no operation."""

    def function(learning_rate, decay):
        tx = fo.sgd(torch.as_tensor(learning_rate))
        return fo.chain(fo.add_decayed_weights(decay), tx) if decay > 0 else tx

    params = two()
    opt = fo.optim.Optimizer(
        params, lambda learning_rate: function(learning_rate, 0.5), lr=0.1
    )
    before = params[0].detach().clone()
    params[0].grad = torch.zeros(3, dtype=torch.float64)
    opt.step()
    torch.testing.assert_close(params[0].detach(), 0.95 * before)
