"""Differentiating through training: with respect to everything, at zero gradients, and with checkpoints of steps."""

from __future__ import annotations

import pytest
import torch
from registry import Row
from test_laws import cases, params
from torch import Tensor
from torch.func import grad, jacfwd, jacrev

import functorch_opt as fo
from functorch_opt import tree


def _train(tx: fo.GradientTransformation, ps: dict, gradients: list) -> list:
    """The params before each step, and after the last; `gradients` are functions of the params."""
    points, state = [ps], tx.init(ps)
    for gradient in gradients:
        updates, state = tx.update(gradient(points[-1]), state, points[-1])
        points.append(fo.apply_updates(points[-1], updates))
    return points


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@cases
def test_derivatives_at_zero_gradients_are_finite(row: Row, variant: dict, dtype: torch.dtype) -> None:
    """Three steps with gradients that are exactly zero, and whose derivative is not: g = stiffness (p - where p is)."""
    hyper = {name: torch.tensor(value, dtype=torch.float64) for name, value in row.hyper.items() if name not in variant}
    if "eps" in hyper:
        hyper["eps"] = torch.tensor(1e-8, dtype=torch.float64)  # the row's own is large
    start = params(dtype)
    rest = _train(row.build(variant, **hyper), start, [lambda ps: tree.map(torch.zeros_like, ps)] * 3)

    def end(hyper: dict, shift: Tensor, stiffness: Tensor) -> Tensor:
        pulls = [lambda ps, there=there: tree.map(lambda p, q: stiffness * (p - q), ps, there) for there in rest[:3]]
        after = _train(row.build(variant, **hyper), tree.map(lambda p: p + shift, start), pulls)[-1]
        return torch.cat([p.flatten() for p in tree.leaves(after)])

    at = hyper, torch.zeros((), dtype=dtype), torch.ones((), dtype=dtype)
    torch.testing.assert_close(end(*at), torch.cat([p.flatten() for p in tree.leaves(rest[-1])]))
    # Under vmap torch gives a 0-dim float32 tensor times a number a float64 tangent, and lerp rejects it: forward mode in float64 only.
    for jac in (jacrev, jacfwd) if dtype == torch.float64 else (jacrev,):
        derivative = tree.state_dict(jac(end, argnums=(0, 1, 2))(*at))
        wrong = [path for path, d in derivative.items() if not d.isfinite().all()]
        assert not wrong, (jac.__name__, wrong)


def test_adams_derivative_at_a_zero_gradient_is_the_true_one() -> None:
    """At step 1 Adam's update is g / (|g| + eps), whose derivative at 0 is 1 / eps."""
    for eps in (1e-3, 1e-8):
        tx = fo.scale_by_adam(eps=eps)
        p = torch.zeros((), dtype=torch.float64)
        zero = torch.zeros((), dtype=torch.float64)
        exact = grad(lambda g, tx=tx, p=p: tx.update(g, tx.init(p))[0])(zero)
        torch.testing.assert_close(exact, torch.tensor(1 / eps, dtype=torch.float64), rtol=1e-6, atol=0)
