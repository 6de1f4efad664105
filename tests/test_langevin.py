"""sgld makes the step of the paper, and has the stationary distribution that it must have."""

from __future__ import annotations

import math

import pytest
import torch

import functorch_opt as fo
from functorch_opt import random


def test_the_step_is_that_of_the_paper() -> None:
    """Eq. 4 for U = -log p: the step is -(epsilon_t / 2) grad U + eta_t, eta_t ~ N(0, epsilon_t),
    with epsilon twice the learning rate.
    """
    epsilon = fo.polynomial_schedule(0.2, 0.02, 1.0, 10)
    tx, key = fo.sgld(lambda count: epsilon(count) / 2, key=5), random.key(5)
    ps = {"w": torch.zeros(3, 2), "b": torch.zeros(5)}
    gs = {"w": torch.arange(6.0).reshape(3, 2), "b": -torch.ones(5)}
    state = tx.init(ps)
    for t in range(3):
        updates, state = tx.update(gs, state)
        noise = random.normal_like(key, ps, t)
        e = float(epsilon(torch.tensor(t)))
        for name, u in updates.items():
            torch.testing.assert_close(u, -e / 2 * gs[name] + math.sqrt(e) * noise[name])
    assert epsilon(torch.tensor(0)) != epsilon(torch.tensor(2))


def test_without_temperature_it_is_gradient_descent() -> None:
    p, g = torch.zeros(4), torch.tensor([1.0, -2.0, 0.5, 3.0])
    cold, plain = fo.sgld(0.1, 0.0, key=0), fo.sgd(0.1)
    torch.testing.assert_close(
        cold.update(g, cold.init(p))[0], plain.update(g, plain.init(p))[0]
    )


@pytest.mark.parametrize(("rate", "temperature"), [(0.1, 1.0), (0.5, 2.0), (1.0, 0.3)])
def test_stationary_variance(rate: float, temperature: float) -> None:
    """Of 40,000 chains with U = p^2 / 2s.

    They are a linear recursion, whose variance is T s / (1 - rate / 2s): for small rates that of
    exp(-U / T).
    """
    n, s = 40_000, 2.0
    tx, p = fo.sgld(rate, temperature, key=1), torch.zeros(n)
    state = tx.init(p)
    for _ in range(math.ceil(10 * s / rate)):
        updates, state = tx.update(p / s, state)
        p = fo.apply_updates(p, updates)
    wanted = temperature * s / (1 - rate / (2 * s))
    assert abs(p.double().var() / wanted - 1) < 4 * math.sqrt(2 / n)
    assert abs(p.double().mean()) < 4 * math.sqrt(wanted / n)
    assert abs((p.double() ** 4).mean() / wanted**2 - 3) < 4 * math.sqrt(96 / n)
    if rate == 0.1:
        assert abs(wanted / (temperature * s) - 1) < 0.03


def test_members_with_keys_and_temperatures_of_their_own() -> None:
    keys, temperatures = random.split(random.key(0), 3), torch.tensor([0.5, 1.0, 2.0])

    def step(key, temperature):
        tx = fo.sgld(0.1, temperature, key=key)
        return tx.update(torch.ones(5), tx.init(torch.zeros(5)))[0]

    both = torch.func.vmap(step)(keys, temperatures)
    torch.testing.assert_close(
        both, torch.stack([step(k, t) for k, t in zip(keys, temperatures, strict=True)])
    )
    assert not torch.equal(both[0], both[1])


@pytest.mark.parametrize(
    "wrong", [{"learning_rate": -0.1}, {"temperature": -1.0}, {"temperature": math.nan}]
)
def test_wrong_numbers(wrong: dict) -> None:
    with pytest.raises(ValueError, match=rf"{next(iter(wrong))} must be in \[0, inf\)"):
        fo.sgld(**{"learning_rate": 0.1, "key": 0, **wrong})


def test_a_missing_gradient_needs_params() -> None:
    tx, ps = fo.sgld(0.1, key=0), [torch.zeros(3), torch.zeros(2)]
    with pytest.raises(
        ValueError,
        match=r"sgld needs the size of every leaf.*call update\(updates, state, params\)",
    ):
        tx.update([None, torch.zeros(2)], tx.init(ps))
    some, _ = tx.update([None, torch.zeros(2)], tx.init(ps), ps)
    every, _ = tx.update(ps, tx.init(ps))
    assert torch.equal(some[1], every[1])


def test_the_key_has_no_default() -> None:
    with pytest.raises(TypeError, match="key"):
        fo.sgld(0.1)
