"""Differentiate through training: with respect to everything, at zero gradients, and with
checkpoints of steps.
"""

from __future__ import annotations

import pytest
import torch
from registry import ROWS, Row
from test_laws import cases, params
from torch import Tensor
from torch.func import grad, jacfwd, jacrev
from torch.utils.checkpoint import checkpoint

import functorch_opt as fo
from functorch_opt import tree
from functorch_opt._core.checkpoint import state_dict


def _train(tx: fo.GradientTransformation, ps: dict, gradients: list) -> list:
    """The params before each step, and after the last; `gradients` are functions of the params."""
    points, state = [ps], tx.init(ps)
    for gradient in gradients:
        updates, state = tx.update(gradient(points[-1]), state, points[-1])
        points.append(fo.apply_updates(points[-1], updates))
    return points


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@cases
def test_derivatives_at_zero_gradients_are_finite(
    row: Row, variant: dict, dtype: torch.dtype
) -> None:
    """Three steps with gradients that are exactly zero, and whose derivative is not: g = stiffness
    (p - where p is).
    """
    if not row.slope_at_zero:
        pytest.skip("has no finite slope at zero")
    hyper = {
        name: torch.tensor(value, dtype=torch.float64)
        for name, value in row.hyper.items()
        if name not in variant
    }
    if "eps" in hyper:
        hyper["eps"] = torch.tensor(1e-8, dtype=torch.float64)  # the row's own is large
    start = params(dtype)
    rest = _train(
        row.build(variant, **hyper),
        start,
        [lambda ps: tree.map(torch.zeros_like, ps)] * 3,
    )

    def end(hyper: dict, shift: Tensor, stiffness: Tensor) -> Tensor:
        pulls = [
            lambda ps, there=there: tree.map(lambda p, q: stiffness * (p - q), ps, there)
            for there in rest[:3]
        ]
        after = _train(
            row.build(variant, **hyper), tree.map(lambda p: p + shift, start), pulls
        )[-1]
        return torch.cat([p.flatten() for p in tree.leaves(after)])

    at = hyper, torch.zeros((), dtype=dtype), torch.ones((), dtype=dtype)
    torch.testing.assert_close(
        end(*at), torch.cat([p.flatten() for p in tree.leaves(rest[-1])])
    )
    # Under vmap torch gives a 0-dim float32 tensor times a number a float64 tangent, and lerp
    # rejects it: forward mode in float64 only.
    for jac in (jacrev, jacfwd) if dtype == torch.float64 else (jacrev,):
        derivative = state_dict(jac(end, argnums=(0, 1, 2))(*at))
        wrong = [path for path, d in derivative.items() if not d.isfinite().all()]
        assert not wrong, (jac.__name__, wrong)


def test_adams_derivative_at_a_zero_gradient_is_the_true_one() -> None:
    """At step 1 Adam's update is g / (|g| + eps), whose derivative at 0 is 1 / eps."""
    for eps in (1e-3, 1e-8):
        tx = fo.scale_by_adam(eps=eps)
        p = torch.zeros((), dtype=torch.float64)
        zero = torch.zeros((), dtype=torch.float64)
        exact = grad(lambda g, tx=tx, p=p: tx.update(g, tx.init(p))[0])(zero)
        torch.testing.assert_close(
            exact, torch.tensor(1 / eps, dtype=torch.float64), rtol=1e-6, atol=0
        )


@pytest.mark.parametrize("name", ["scale_by_sign", "scale_by_lion", "sign_sgd"])
def test_what_is_not_smooth_has_the_derivative_zero(name: str) -> None:
    row = next(row for row in ROWS if row.name == name)
    assert not row.smooth
    tx, p = row.build(), torch.tensor([0.3, -2.0])
    assert torch.equal(
        jacrev(lambda g: tx.update(g, tx.init(p), p)[0])(torch.tensor([0.5, -1.0])),
        torch.zeros(2, 2),
    )


def test_checkpointed_steps_give_the_same_hypergradient_and_keep_less() -> None:
    """With torch.autograd inside and outside; torch.func.grad refuses the hooks that a checkpoint
    needs.
    """
    start = params()
    kept: list[int] = []

    def hypergradient(run) -> Tensor:
        rate = torch.tensor(0.05, dtype=torch.float64, requires_grad=True)
        tx = fo.adam(rate)

        def step(ps, state):
            leaves = tree.leaves(ps)
            with torch.enable_grad():
                loss = sum((p.sin() * p).sum() for p in leaves)
                gs = torch.autograd.grad(loss, leaves, create_graph=True)
            updates, state = tx.update(
                tree.unflatten(tree.flatten(ps)[1], list(gs)), state, ps
            )
            return fo.apply_updates(ps, updates), state

        seen: dict[int, int] = {}

        def pack(x: Tensor) -> Tensor:
            seen[x.data_ptr()] = x.numel()
            return x

        ps = tree.map(lambda p: p.clone().requires_grad_(), start)
        state = tx.init(start)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            for _ in range(6):
                ps, state = run(step, ps, state)
        kept.append(sum(seen.values()))
        return torch.autograd.grad(sum(p.sum() for p in tree.leaves(ps)), rate)[0]

    whole = hypergradient(lambda f, *args: f(*args))
    again = hypergradient(lambda f, *args: checkpoint(f, *args, use_reentrant=False))
    torch.testing.assert_close(again, whole, rtol=1e-12, atol=0)
    assert kept[1] < 0.5 * kept[0]
    with pytest.raises(RuntimeError, match="saved tensor hooks"):
        grad(lambda p: checkpoint(torch.sin, p, use_reentrant=False))(torch.tensor(1.0))
