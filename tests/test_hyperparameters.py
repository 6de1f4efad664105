"""Hyperparameters that are tensors: derivatives in both modes, and values at the edge of what is
allowed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from registry import ROWS, Row
from torch import Tensor
from torch.func import grad, jacfwd, jacrev, vmap

import functorch_opt as fo
from functorch_opt import tree
from functorch_opt._core.inject import hyperparameters

DIFFERENTIABLE = [
    row
    for row in ROWS
    if row.written and row.smooth and row.hyper and row.name != "inject_hyperparams"
]


def draw(shape: tuple[int, ...], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


PARAMS = {"w": draw((3, 2), 0), "b": draw((3,), 1)}
PULLS = [{"w": draw((3, 2), 2 + i), "b": draw((3,), 5 + i)} for i in range(3)]


def after_three_steps(row: Row, **hyper: Any) -> Tensor:
    """A number that depends on all parameters, after training with injected hyperparameters."""
    tx = fo.inject_hyperparams(row.make)(**{"key": 7} if row.keyed else {}, **hyper)
    params, state = PARAMS, tx.init(PARAMS)
    for pull in PULLS:
        gradients = tree.map(torch.add, params, pull)
        updates, state = tx.update(gradients, state, params)
        params = fo.apply_updates(params, updates)
    return (params["w"] ** 2).sum() + (params["b"] ** 2).sum()


@pytest.mark.parametrize("row", DIFFERENTIABLE, ids=lambda row: row.name)
def test_both_modes_give_the_slope_of_every_injected_hyperparameter(row: Row) -> None:
    keyed = {"key": 7} if row.keyed else {}
    numbers, _ = hyperparameters(row.make, (), {**keyed, **row.hyper})
    for name, value in numbers.items():

        def final(x: Any, name: str = name) -> Tensor:
            return after_three_steps(row, **{**row.hyper, name: x})

        at = torch.tensor(float(value), dtype=torch.float64)
        forward, reverse = jacfwd(final)(at), jacrev(final)(at)
        step = 1e-6
        slope = (final(at + step) - final(at - step)) / (2 * step)
        if name in ("eps", "eps_root", "initial_scale") and value < step:
            slope = forward  # the root is too steep there for a finite difference
        assert forward.isfinite(), name
        torch.testing.assert_close(forward, reverse, rtol=1e-9, atol=1e-12, msg=name)
        torch.testing.assert_close(forward, slope, rtol=1e-4, atol=1e-7, msg=name)


# ---- values that a number may not have, or has by default ----------------------------------------


ZERO_UPDATES = {"w": torch.zeros(2), "b": torch.zeros(())}
SOME_UPDATES = {"w": torch.tensor([3.0, 4.0]), "b": torch.tensor(0.0)}


@pytest.mark.parametrize("updates", [ZERO_UPDATES, SOME_UPDATES], ids=["zero", "some"])
def test_clipping_to_a_norm_of_zero_gives_zero(updates: dict[str, Tensor]) -> None:
    def clipped(max_norm: Tensor, updates: Any = updates) -> Any:
        tx = fo.clip_by_global_norm(max_norm)
        return tx.update(updates, tx.init(updates))[0]

    zero = torch.tensor(0.0)
    assert all((u == 0).all() for u in tree.leaves(clipped(zero)))
    of_two = vmap(clipped)(torch.tensor([0.0, 1.0]))
    assert all((u[0] == 0).all() for u in tree.leaves(of_two))
    torch.testing.assert_close(
        tree.map(lambda u: u[1], of_two), clipped(torch.tensor(1.0))
    )

    def total(max_norm: Tensor, updates: Any) -> Tensor:
        return sum(u.sum() for u in tree.leaves(clipped(max_norm, updates)))

    slopes = grad(total, argnums=(0, 1))(zero, updates)
    assert all(x.isfinite().all() for x in tree.leaves(slopes))


def test_clipping_examples_to_a_norm_of_zero_gives_zero() -> None:
    grads = {"w": torch.tensor([[3.0, 4.0], [0.0, 0.0]])}

    def total(bound: Tensor) -> Tensor:
        return fo.clip_and_sum(grads, bound).sum["w"].sum()

    assert total(torch.tensor(0.0)) == 0
    assert grad(total)(torch.tensor(0.0)).isfinite()
    assert torch.equal(vmap(total)(torch.tensor([0.0, 5.0])), torch.tensor([0.0, 7.0]))


def test_adadelta_with_an_eps_of_zero_stays_finite() -> None:
    tx, p = fo.scale_by_adadelta(eps=torch.tensor(0.0)), torch.zeros(2)
    assert torch.equal(tx.update(p, tx.init(p))[0], p)


@pytest.mark.parametrize("dampening", [0.0, 0.3])
def test_nesterov_takes_a_dampening_whose_value_is_not_known(dampening: float) -> None:
    tx = fo.inject_hyperparams(fo.trace)(0.9, nesterov=True)
    g = torch.tensor([1.0, -2.0])
    state, trace = tx.init(g), g
    state["hyperparams"]["dampening"] = torch.tensor(dampening)
    for step in range(3):
        trace = g if step == 0 else 0.9 * trace + (1 - dampening) * g
        updates, state = tx.update(g, state)
        torch.testing.assert_close(updates, g + 0.9 * trace)
    with pytest.raises(ValueError, match="zero"):
        fo.trace(0.9, nesterov=True, dampening=0.1)


FACTORIES: list[tuple[Callable[..., Any], dict[str, Any]]] = [
    (row.make, {**({"key": 7} if row.keyed else {}), **row.hyper, **variant})
    for row in ROWS
    if row.written and row.name != "inject_hyperparams"
    for variant in row.variants
]


@pytest.mark.parametrize(
    ("factory", "given"), FACTORIES, ids=lambda x: getattr(x, "__name__", "")
)
def test_injected_values_are_taken_as_the_numbers_are(factory: Any, given: Any) -> None:
    """No factory refuses a number that comes as a tensor, or gives it another meaning."""
    plain, injected = factory(**given), fo.inject_hyperparams(factory)(**given)
    a, b = plain.init(PARAMS), injected.init(PARAMS)
    for gradients in PULLS:
        u, a = plain.update(gradients, a, PARAMS)
        v, b = injected.update(gradients, b, PARAMS)
        torch.testing.assert_close(u, v, rtol=1e-12, atol=1e-12)


def test_slots_may_start_at_a_tensor() -> None:
    def first(scale: Tensor) -> Tensor:
        params = {"w": torch.ones(2)}
        return fo.get(fo.scale_by_rms(initial_scale=scale).init(params), "nu")["w"]

    assert torch.equal(
        vmap(first)(torch.tensor([0.5, 2.0]))[:, 0], torch.tensor([0.5, 2.0])
    )
    assert torch.equal(jacrev(first)(torch.tensor(0.5)), torch.ones(2))
    start = fo.scale_by_rss(0.5).init([torch.ones(1, dtype=torch.complex64)])
    assert fo.get(start, "sum")[0] == 0.5 + 0.5j
