"""Line searches, L-BFGS and Polyak's step size against optax: the same parameters after every step,
in float64.

Not compared: ``verbose``, which is not here; what happens after a step of size 0; pairs with
negative curvature, which optax keeps.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from parity_page import assert_near, compares
from torch.func import grad_and_value

import functorch_opt as fo

jax = pytest.importorskip(
    "jax", reason="comparison with optax needs jax: pip install jax optax"
)
optax = pytest.importorskip(
    "optax", reason="comparison with optax needs optax: pip install jax optax"
)

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_enable_x64", True)


def rosenbrock(p):
    return (100 * (p[1:] - p[:-1] ** 2) ** 2 + (1 - p[:-1]) ** 2).sum()


def bowl(p):
    return (p**2).sum() ** 2 + 3 * p[0] * p[1] + p[2] ** 2 - p.sum()


CASES = {
    "lbfgs": (lambda o: o.lbfgs(), rosenbrock, 25),
    "memory": (lambda o: o.lbfgs(memory_size=2), rosenbrock, 20),
    "no scaling": (lambda o: o.lbfgs(scale_init_precond=False), bowl, 10),
    "fixed step": (lambda o: o.lbfgs(0.1, linesearch=None), bowl, 15),
    "lbfgs, backtracking": (
        lambda o: o.lbfgs(linesearch=o.scale_by_backtracking_linesearch(20)),
        bowl,
        8,
    ),
    "zoom": (
        lambda o: o.chain(o.sgd(1.0), o.scale_by_zoom_linesearch(15)),
        rosenbrock,
        15,
    ),
    "zoom, strict": (
        lambda o: o.chain(
            o.sgd(1.0),
            o.scale_by_zoom_linesearch(
                30, curv_rtol=0.1, slope_rtol=0.01, approx_dec_rtol=None
            ),
        ),
        bowl,
        8,
    ),
    "zoom, bounded": (
        lambda o: o.chain(
            o.sgd(1.0), o.scale_by_zoom_linesearch(15, max_learning_rate=0.01)
        ),
        bowl,
        10,
    ),
    "zoom, few": (
        lambda o: o.chain(o.sgd(1.0), o.scale_by_zoom_linesearch(3, curv_rtol=0.01)),
        bowl,
        10,
    ),
    "zoom, one": (
        lambda o: o.chain(
            o.sgd(0.1),
            o.scale_by_zoom_linesearch(15, tol=0.1, initial_guess_strategy="one"),
        ),
        bowl,
        10,
    ),
    "backtracking": (
        lambda o: o.chain(o.sgd(1.0), o.scale_by_backtracking_linesearch(40)),
        rosenbrock,
        15,
    ),
    "backtracking, rising": (
        lambda o: o.chain(
            o.sgd(1.0),
            o.scale_by_backtracking_linesearch(
                9, 0.1, 0.5, 3.0, 5.0, 0.01, 0.02, store_grad=True
            ),
        ),
        bowl,
        10,
    ),
    "backtracking, short": (
        lambda o: o.chain(
            o.sgd(0.5), o.scale_by_backtracking_linesearch(5, 0.3, 0.8, 1.5, 2.0)
        ),
        bowl,
        10,
    ),
    "polyak, scaled": (lambda o: o.polyak_sgd(2.0, 0.5, f_min=-3.0), bowl, 15),
    "polyak, defaults": (lambda o: o.polyak_sgd(), bowl, 10),
    "polyak": (lambda o: o.polyak_sgd(0.5, f_min=-5.0, eps=0.1), bowl, 15),
    "polyak, sps+": (
        lambda o: o.polyak_sgd(max_learning_rate=10.0, f_min=1.0, variant="sps+"),
        bowl,
        15,
    ),
}
"""Transformation, function, and steps: few enough that none has converged, where rounding
decides.
"""

NAMES = {
    "lbfgs": ("lbfgs", "scale_by_lbfgs"),
    "memory": ("lbfgs", "scale_by_lbfgs"),
    "no scaling": ("lbfgs", "scale_by_lbfgs"),
    "fixed step": ("lbfgs", "scale_by_lbfgs"),
    "lbfgs, backtracking": (
        "lbfgs",
        "scale_by_lbfgs",
        "scale_by_backtracking_linesearch",
    ),
    "zoom": ("scale_by_zoom_linesearch",),
    "backtracking": ("scale_by_backtracking_linesearch",),
    "polyak": ("polyak_sgd", "scale_by_polyak"),
}
"""What a case compares: of its name, or of what stands before the comma."""


def marked(case: str) -> Any:
    names = NAMES.get(case) or NAMES[case.partition(",")[0]]
    remark = "the parameters of 8 to 25 steps downhill"
    mark = compares(*names, reference="optax 0.2.8", bound=1e-6, remark=remark)
    return pytest.param(case, marks=mark)


START = np.array([-0.9, 1.3, 0.4])


@pytest.mark.parametrize("name", [marked(case) for case in CASES])
def test_the_same_steps(name: str) -> None:
    make, f, steps = CASES[name]
    tx, p = make(fo), torch.tensor(START)
    theirs, q = make(optax), jax.numpy.asarray(START)
    state, other = tx.init(p), theirs.init(q)
    update = jax.jit(
        lambda g, s, q, v: theirs.update(g, s, q, value=v, grad=g, value_fn=f)
    )
    value_and_grad = jax.jit(jax.value_and_grad(f))
    for step in range(steps):
        g, value = grad_and_value(f)(p)
        extra = {
            e: x
            for e, x in {"value": value, "grad": g, "value_fn": f}.items()
            if e in tx.extra_args
        }
        u, state = tx.update(g, state, p, **extra)
        p = fo.apply_updates(p, u)
        v, h = value_and_grad(q)
        u2, other = update(h, other, q, v)
        q = optax.apply_updates(q, u2)
        assert_near(p, q, 1e-6, f"step {step}")
        if "value_fn" in tx.extra_args:
            for key in ("learning_rate", "value"):
                np.testing.assert_allclose(
                    float(fo.get(state, key)),
                    float(optax.tree.get(other, key)),
                    rtol=1e-6,
                    err_msg=f"step {step}",
                )
            info = optax.tree.get(other, "info")
            assert int(fo.get(state, "num_linesearch_steps")) == int(
                info.num_linesearch_steps
            )
    assert not np.allclose(p.numpy(), START, atol=1e-2)


def test_other_arguments_reach_the_loss_as_in_optax() -> None:
    """At the first step, when there is no value yet, and later, when it comes from the state."""
    there = np.array([1.5, -0.5, 2.0])

    def apart(p, weight, *, goal):
        return (weight * (p - goal) ** 2).sum()

    results = []
    for o, array in ((fo, torch.tensor), (optax, jax.numpy.asarray)):
        p, weight, goal = array(START), array(there + 2), array(there)
        tx, value_and_grad = o.lbfgs(), o.value_and_grad_from_state(apart)
        state, values = tx.init(p), []
        for _ in range(3):
            value, g = value_and_grad(p, weight, state=state, goal=goal)
            values.append(float(value))
            updates, state = tx.update(
                g,
                state,
                p,
                value=value,
                grad=g,
                value_fn=lambda q, weight=weight, goal=goal: apart(q, weight, goal=goal),
            )
            p = o.apply_updates(p, updates)
        results.append((values, np.asarray(p)))
    (ours, p), (theirs, q) = results
    np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(p, q, rtol=1e-6)
    assert ours[0] == pytest.approx(apart(START, there + 2, goal=there))
