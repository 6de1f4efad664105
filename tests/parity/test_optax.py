"""The functional layer against optax: the same names, arguments and numbers, or a stated reason why
not.

A case is one expression, evaluated in both libraries (``lambda o: o.adamw(0.1)`` with ``o = fo``
and ``o = optax``): what ports by changing the import. Where the expressions have to differ, the
case holds two, and `DIVERGENCES` says why. Written against optax 0.2.8.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from parity_page import assert_near, compares
from registry import ROWS

import functorch_opt as fo
from functorch_opt import schedules, tree

jax = pytest.importorskip(
    "jax", reason="comparison with optax needs jax: pip install jax optax"
)
optax = pytest.importorskip(
    "optax", reason="comparison with optax needs optax: pip install jax optax"
)
jnp = jax.numpy

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_enable_x64", True)

STEPS = 100


# ---- data and the two training loops -------------------------------------------------------------


def draw(seed: int) -> dict:
    """A nested tree with a matrix, a vector and a scalar, float64; no entry near zero."""
    rng = np.random.default_rng(seed)

    def leaf(*shape: int) -> torch.Tensor:
        x = rng.standard_normal(shape)
        return torch.tensor(x + np.copysign(0.01, x))

    return {"layer": {"w": leaf(3, 4), "b": leaf(4)}, "scales": [leaf()]}


PARAMS, GRADS = draw(0), [draw(step) for step in range(1, STEPS + 1)]
HUNDRED = {"grads": GRADS}
WITH_NANS = [tree.map(lambda g: torch.where(g > 1, torch.nan, g), g) for g in GRADS]
SOME_NOT_FINITE = [
    tree.map(
        lambda g, bad=i % 5 in (1, 2): torch.where(g > 0, torch.inf, g) if bad else g, g
    )
    for i, g in enumerate(GRADS)
]
ZEROS = [tree.map(torch.zeros_like, g) for g in GRADS]


def to_jax(x: Any) -> Any:
    return tree.map(lambda leaf: jnp.asarray(leaf.numpy()), x)


def arrays(x: Any) -> dict[str, np.ndarray]:
    """The leaves of a tree of either library, by path."""
    leaves = jax.tree_util.tree_flatten_with_path(x)[0]
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
        for path, leaf in leaves
    }


def run_ours(tx: fo.GradientTransformation, grads: list = GRADS) -> tuple[list, Any, Any]:
    """All updates, the last params, the last state."""
    ps, state, seen = PARAMS, tx.init(PARAMS), []
    for g in grads:
        updates, state = tx.update(g, state, ps)
        ps = fo.apply_updates(ps, updates)
        seen.append(updates)
    return seen, ps, state


def run_theirs(tx: Any, grads: list = GRADS, jit: bool = False) -> tuple[list, Any, Any]:
    """The same.

    Not jitted, as a rule: to compile a case takes longer than its 100 steps, and single operations
    are compiled once for all cases.
    """
    ps, seen = to_jax(PARAMS), []
    state = tx.init(ps)
    update = jax.jit(tx.update) if jit else tx.update
    for g in grads:
        updates, state = update(to_jax(g), state, ps)
        ps = optax.apply_updates(ps, updates)
        seen.append(updates)
    return seen, ps, state


def assert_same(ours: Any, theirs: Any, tolerance: float = 1e-10) -> None:
    a, b = arrays(ours), arrays(theirs)
    assert a.keys() == b.keys()
    for path in a:
        assert a[path].dtype == b[path].dtype == np.float64
        assert_near(a[path], b[path], tolerance, path)


# ---- the table -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    name: str
    ours: Callable[[Any], Any]
    theirs: Callable[[Any], Any]
    grads: list | None = None
    moves: bool = True
    tolerance: float = 1e-10
    remark: str = ""


def same(name: str, *expressions: Callable[[Any], Any], **options: Any) -> list[Case]:
    return [Case(name, expression, expression, **options) for expression in expressions]


def of_contrib(
    name: str, *expressions: Callable[[Any], Any], around: Callable = lambda tx: tx
) -> list[Case]:
    """What optax has in contrib."""
    both = SimpleNamespace(**{**vars(optax), **vars(optax.contrib)})
    return [Case(name, f, lambda o, f=f: around(f(both)), **HUNDRED) for f in expressions]


def pair(
    name: str, ours: Callable[[Any], Any], theirs: Callable[[Any], Any], **options: Any
) -> list[Case]:
    return [Case(name, ours, theirs, **options)]


MASK = {"layer": {"w": True, "b": False}, "scales": [True]}
VECTORS = {"layer": True, "scales": False}
LABELS = {"layer": {"w": "matrix", "b": "rest"}, "scales": ["rest"]}
MASKS = (
    lambda path, p: p.ndim > 1,
    lambda params: jax.tree.map(lambda p: p.ndim > 1, params),
)
"""The same mask as a function, in either library's form."""
FLOAT32 = {"tolerance": 1e-5, "remark": "optax decays float32 moments in float32"}
"""For float32 moments under float64 params: optax multiplies them by their decay in float32, where
we compute everything in float64.
"""

FLOAT32_DECAY = {"tolerance": 1e-6, "remark": "optax works out the decay in float32"}
"""optax works the decay of Adafactor's means out in float32."""


def wide(o: Any, schedule: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """optax counts in int32, and int32 / int is float32 in JAX: give its schedules an int64, so
    that they compute in float64 like ours.
    """
    return schedule if o is fo else lambda count: schedule(count.astype(jnp.int64))


def decay(o: Any) -> Any:
    return wide(o, o.exponential_decay(0.3, 10, 0.5))


def warmup(o: Any) -> Any:
    return wide(o, o.warmup_cosine_decay_schedule(0.01, 0.2, 10, 40, 0.02))


def gathering(o: Any, k: int, inner: Any = None, **options: Any) -> Any:
    """optax's MultiSteps as a transformation, which gathers in float64."""
    inner = o.adam(0.1) if inner is None else inner
    options["accumulator_dtype"] = jnp.float64
    return jitted(o.MultiSteps(inner, k, **options).gradient_transformation())


def jitted(tx: Any) -> Any:
    """`tx` of optax, whose branches would be compiled anew at every step."""
    return tx._replace(update=jax.jit(tx.update)) if isinstance(tx, tuple) else tx


def one_to_three(o: Any) -> Callable[[Any], Any]:
    """A k that grows with the steps that were made."""
    return lambda steps: 1 + (steps >= 4) * 1 + (steps >= 10) * 1


def skip_above(o: Any, bound: float) -> Callable[..., Any]:
    return lambda updates, gradient_step, params: o.skip_large_updates(
        updates, gradient_step, params, bound
    )


def counting_in_int64(tx: Any) -> Any:
    """`tx` of optax, which takes the root of its int32 count in float32."""

    def init(params: Any) -> Any:
        state = tx.init(params)
        return jax.tree.map(
            lambda x: x.astype(jnp.int64) if x.dtype == jnp.int32 else x, state
        )

    return optax.GradientTransformation(init, tx.update)


def in_shape(tx: Any) -> Any:
    """`tx` of optax, whose updates get the shapes of the gradients."""

    def update(updates: Any, state: Any, params: Any) -> tuple[Any, Any]:
        new, state = tx.update(updates, state, params)
        return jax.tree.map(lambda u, g: u.reshape(g.shape), new, updates), state

    return optax.GradientTransformation(tx.init, update)


def in_jax_layout(tx: Any) -> Any:
    """`tx` of optax, which sees matrices as JAX has them, [in, out], where torch has [out, in]."""

    def turned(x: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf.T if leaf.ndim == 2 else leaf, x)

    def update(updates: Any, state: Any, params: Any) -> tuple[Any, Any]:
        updates, state = tx.update(turned(updates), state, turned(params))
        return turned(updates), state

    return optax.GradientTransformation(lambda params: tx.init(turned(params)), update)


TWO_TRIPLES = ((3.0, -3.2, 1.2), (2.0, -1.5, 0.5))

CASES: list[Case] = [
    *pair(
        "adaptive_grad_clip",
        lambda o: o.adaptive_grad_clip(0.1),
        lambda o: in_jax_layout(o.adaptive_grad_clip(0.1)),
        **HUNDRED,
    ),
    *pair(
        "adaptive_grad_clip",
        lambda o: o.adaptive_grad_clip(1.5, 2.0),
        lambda o: in_jax_layout(o.adaptive_grad_clip(1.5, 2.0)),
        **HUNDRED,
    ),
    *same(
        "adaptive_grad_clip",
        lambda o: o.masked(o.adaptive_grad_clip(0.5, axis=0), VECTORS),
        lambda o: o.masked(o.adaptive_grad_clip(0.5, 0.1, -1), VECTORS),
        lambda o: o.adaptive_grad_clip(100.0, axis=()),
        **HUNDRED,
    ),
    *same(
        "add_decayed_weights",
        lambda o: o.add_decayed_weights(0.1),
        lambda o: o.add_decayed_weights(),
        lambda o: o.add_decayed_weights(decay(o)),
    ),
    *same(
        "add_decayed_weights",
        lambda o: o.add_decayed_weights(0.1, MASK),
        lambda o: o.add_decayed_weights(decay(o), mask=MASK),
    ),
    *pair(
        "add_decayed_weights",
        lambda o: o.add_decayed_weights(0.1, MASKS[0]),
        lambda o: o.add_decayed_weights(0.1, MASKS[1]),
    ),
    *same("centralize", lambda o: o.centralize()),
    *same(
        "chain",
        lambda o: o.chain(
            o.clip_by_global_norm(0.5),
            o.scale_by_adam(),
            o.add_decayed_weights(0.1),
            o.scale_by_learning_rate(warmup(o)),
        ),
        lambda o: o.chain(
            o.chain(o.trace(0.9), o.trace(0.5)), o.clip(0.3), o.scale(-0.1)
        ),
    ),
    *same("clip", lambda o: o.clip(0.7), lambda o: o.clip(100.0)),
    *same("clip", lambda o: o.clip(0.0), moves=False),
    *same(
        "clip_by_block_rms",
        lambda o: o.clip_by_block_rms(0.5),
        lambda o: o.clip_by_block_rms(9.0),
    ),
    *same(
        "clip_by_global_norm",
        lambda o: o.clip_by_global_norm(0.5),
        lambda o: o.clip_by_global_norm(5.0),
        lambda o: o.clip_by_global_norm(1e6),
    ),
    *same(
        "ema",
        lambda o: o.ema(0.9),
        lambda o: o.ema(0.9, debias=False),
        lambda o: o.ema(0.0),
    ),
    *pair(
        "ema",
        lambda o: o.ema(0.9, accumulator_dtype=torch.float32),
        lambda o: o.ema(0.9, accumulator_dtype=jnp.float32),
        **FLOAT32,
    ),
    *same("identity", lambda o: o.identity()),
    *same(
        "inject_hyperparams",
        lambda o: o.inject_hyperparams(o.adamw)(learning_rate=0.1, weight_decay=0.1),
        lambda o: o.inject_hyperparams(o.adamw)(
            learning_rate=warmup(o),
            b1=wide(o, o.linear_schedule(0.8, 0.95, 30)),
            eps=1e-3,
        ),
        lambda o: o.inject_hyperparams(o.rmsprop)(
            0.01, centered=True, momentum=0.9, nesterov=True
        ),
        lambda o: o.inject_hyperparams(o.sgd, static_args=("momentum",))(decay(o), 0.9),
    ),
    *same(
        "keep_params_nonnegative",
        lambda o: o.keep_params_nonnegative(),
        lambda o: o.chain(o.scale(-0.1), o.keep_params_nonnegative()),
        lambda o: o.chain(o.sgd(decay(o), 0.9), o.keep_params_nonnegative()),
        lambda o: o.chain(o.adam(0.01), o.keep_params_nonnegative()),
        **HUNDRED,
    ),
    *same(
        "masked",
        lambda o: o.masked(o.chain(o.trace(0.9), o.scale(-0.3)), MASK),
        lambda o: o.masked(o.clip_by_global_norm(0.5), MASK),
        lambda o: o.chain(
            o.masked(o.adamw(0.1), MASK),
            o.masked(o.scale(0.5), {"layer": True, "scales": False}),
        ),
        lambda o: o.masked(o.scale_by_schedule(decay(o)), False),
    ),
    *pair(
        "masked",
        lambda o: o.masked(o.adam(0.1), MASKS[0]),
        lambda o: o.masked(o.adam(0.1), MASKS[1]),
    ),
    *same(
        "normalize_by_update_norm",
        lambda o: o.normalize_by_update_norm(),
        lambda o: o.normalize_by_update_norm(-0.3),
        lambda o: o.normalize_by_update_norm(0.5, 2.0),
        lambda o: o.normalize_by_update_norm(eps=0.0),
        **HUNDRED,
    ),
    *same(
        "partition",
        lambda o: o.partition(
            {
                "matrix": o.chain(o.clip_by_global_norm(0.5), o.adam(0.1)),
                "rest": o.sgd(0.2, 0.9),
            },
            LABELS,
        ),
        lambda o: o.partition(
            {"matrix": o.adamw(warmup(o)), "rest": o.set_to_zero(), "spare": o.lion(0.1)},
            LABELS,
        ),
        lambda o: o.chain(
            o.partition(
                {"a": o.scale_by_adam(), "b": o.identity()}, {"layer": "a", "scales": "b"}
            ),
            o.scale(-0.1),
        ),
    ),
    *pair(
        "partition",
        lambda o: o.partition(
            {"matrix": o.adam(0.1), "rest": o.sgd(0.2)},
            lambda path, p: "matrix" if p.ndim > 1 else "rest",
        ),
        lambda o: o.partition(
            {"matrix": o.adam(0.1), "rest": o.sgd(0.2)},
            lambda ps: jax.tree.map(lambda p: "matrix" if p.ndim > 1 else "rest", ps),
        ),
    ),
    *same("scale", lambda o: o.scale(-0.3), lambda o: o.scale(2)),
    *same(
        "scale_by_adadelta",
        lambda o: o.scale_by_adadelta(),
        lambda o: o.scale_by_adadelta(0.95, 1e-2),
    ),
    *same(
        "scale_by_adam",
        lambda o: o.scale_by_adam(),
        lambda o: o.scale_by_adam(0.5, 0.7, 1e-2, 1e-3),
        lambda o: o.scale_by_adam(nesterov=True),
        lambda o: o.scale_by_adam(0.5, 0.7, 1e-2, 1e-3, nesterov=True),
        lambda o: o.scale_by_adam(0.0, 0.0, 1.0),
    ),
    *pair(
        "scale_by_adam",
        lambda o: o.scale_by_adam(amsgrad=True),
        lambda o: o.scale_by_amsgrad(),
    ),
    *pair(
        "scale_by_adam",
        lambda o: o.scale_by_adam(0.5, 0.7, 1e-2, 1e-3, amsgrad=True),
        lambda o: o.scale_by_amsgrad(0.5, 0.7, 1e-2, 1e-3),
    ),
    *pair(
        "scale_by_adam",
        lambda o: o.scale_by_adam(mu_dtype=torch.float32),
        lambda o: o.scale_by_adam(mu_dtype=jnp.float32),
        **FLOAT32,
    ),
    *same(
        "scale_by_adamax",
        lambda o: o.scale_by_adamax(),
        lambda o: o.scale_by_adamax(0.5, 0.7, 1e-2),
    ),
    *same(
        "scale_by_adan",
        lambda o: o.scale_by_adan(b2=0.5),
        lambda o: o.scale_by_adan(0.9, 0.5, 0.95, 1e-3),
        lambda o: o.scale_by_adan(0.5, 0.5, 0.7, 1e-2, 1e-3),
        lambda o: o.scale_by_adan(0.0, 0.5, 0.0, 1.0),
        **HUNDRED,
    ),
    *of_contrib(
        "scale_by_ademamix",
        lambda o: o.scale_by_ademamix(),
        lambda o: o.scale_by_ademamix(0.5, 0.7, 0.9, 2.0, 1e-2, 1e-3),
        lambda o: o.scale_by_ademamix(b3=0.99, alpha=decay(o)),
        lambda o: o.scale_by_ademamix(b3=wide(o, o.linear_schedule(0.9, 0.99, 30))),
    ),
    *of_contrib(
        "scale_by_adopt",
        lambda o: o.scale_by_adopt(),
        lambda o: o.scale_by_adopt(0.5, 0.7, 1e-2, use_clipping=False),
        lambda o: o.scale_by_adopt(0.8, 0.99, use_clipping=False, nesterov=True),
        lambda o: o.scale_by_adopt(
            0.8, 0.99, 0.5, nesterov=True, clip_value_fn=wide(o, lambda t: 0.1 * t)
        ),
    ),
    *same(
        "scale_by_belief",
        lambda o: o.scale_by_belief(),
        lambda o: o.scale_by_belief(0.5, 0.7, 1e-2, 1e-3),
        lambda o: o.scale_by_belief(nesterov=True),
        lambda o: o.scale_by_belief(0.5, 0.7, 1e-2, 0.0, nesterov=True),
        **HUNDRED,
    ),
    *same(
        "scale_by_learning_rate",
        lambda o: o.scale_by_learning_rate(0.1),
        lambda o: o.scale_by_learning_rate(0.1, flip_sign=False),
        lambda o: o.scale_by_learning_rate(decay(o)),
        lambda o: o.scale_by_learning_rate(decay(o), flip_sign=False),
        lambda o: o.scale_by_learning_rate(None),
        lambda o: o.scale_by_learning_rate(),
    ),
    *same(
        "scale_by_factored_rms",
        lambda o: o.scale_by_factored_rms(),
        lambda o: o.scale_by_factored_rms(min_dim_size_to_factor=2, epsilon=1e-3),
        lambda o: o.scale_by_factored_rms(False, 0.5, -3),
        lambda o: o.scale_by_factored_rms(True, 0.5, -3, 3),
        **FLOAT32_DECAY,
    ),
    *same(
        "scale_by_lion", lambda o: o.scale_by_lion(), lambda o: o.scale_by_lion(0.5, 0.7)
    ),
    *pair(
        "scale_by_lion",
        lambda o: o.scale_by_lion(mu_dtype=torch.float32),
        lambda o: o.scale_by_lion(mu_dtype=jnp.float32),
    ),
    *of_contrib(
        "scale_by_madgrad",
        lambda o: o.scale_by_madgrad(0.1),
        lambda o: o.scale_by_madgrad(0.5, 0.5, 1e-3),
        lambda o: o.scale_by_madgrad(decay(o), 0.8),
        lambda o: o.scale_by_madgrad(0.1, 0.0, 0.0),
        around=counting_in_int64,
    ),
    *same(
        "scale_by_novograd",
        lambda o: o.scale_by_novograd(),
        lambda o: o.scale_by_novograd(0.5, 0.7, 1e-2, 1e-3, 0.1),
        lambda o: o.scale_by_novograd(0.95, 0.98, weight_decay=0.01),
        lambda o: o.scale_by_novograd(0.0, 0.0, 1.0),
        **HUNDRED,
    ),
    *same(
        "scale_by_optimistic_gradient",
        lambda o: o.scale_by_optimistic_gradient(),
        lambda o: o.scale_by_optimistic_gradient(0.5, 2.0),
        lambda o: o.scale_by_optimistic_gradient(1.0, 0.0),
        lambda o: o.scale_by_optimistic_gradient(0.0, -1.0),
        **HUNDRED,
    ),
    *same(
        "scale_by_param_block_norm",
        lambda o: o.chain(o.scale(-0.1), o.scale_by_param_block_norm()),
        lambda o: o.chain(o.scale(-0.1), o.scale_by_param_block_norm(2.0)),
        lambda o: o.chain(o.scale(0.01), o.scale_by_param_block_norm(0.0)),
        lambda o: o.chain(o.adam(0.01), o.scale_by_param_block_norm(3.0)),
        **HUNDRED,
    ),
    *same(
        "scale_by_param_block_rms",
        lambda o: o.scale_by_param_block_rms(),
        lambda o: o.scale_by_param_block_rms(2.0),
    ),
    *same(
        "scale_by_radam",
        lambda o: o.scale_by_radam(),
        lambda o: o.scale_by_radam(0.8, 0.95, 1e-3, 1e-4, 4.5),
        lambda o: o.scale_by_radam(0.8, 0.95, 1e-3, nesterov=True),
    ),
    *same(
        "scale_by_rms",
        lambda o: o.scale_by_rms(),
        lambda o: o.scale_by_rms(0.99, 1e-2, 0.5),
        lambda o: o.scale_by_rms(eps=1e-3, eps_in_sqrt=False),
        lambda o: o.scale_by_rms(bias_correction=True),
        lambda o: o.scale_by_rms(
            0.99, 1e-3, 0.5, eps_in_sqrt=False, bias_correction=True
        ),
    ),
    *same(
        "scale_by_rss",
        lambda o: o.scale_by_rss(),
        lambda o: o.scale_by_rss(0.0, 1e-3),
        lambda o: o.scale_by_rss(2.0),
    ),
    *same(
        "scale_by_schedule",
        lambda o: o.scale_by_schedule(decay(o)),
        lambda o: o.scale_by_schedule(lambda count: -(0.5**count)),
    ),
    *of_contrib(
        "scale_by_simplified_ademamix",
        lambda o: o.scale_by_simplified_ademamix(),
        lambda o: o.scale_by_simplified_ademamix(0.5, 0.7, 2.0, 1e-2, 1e-3),
        lambda o: o.scale_by_simplified_ademamix(0.9, alpha=decay(o)),
        lambda o: o.scale_by_simplified_ademamix(0.0, 0.0, 3.0, 1.0),
    ),
    *same(
        "scale_by_sm3",
        lambda o: o.masked(o.scale_by_sm3(), VECTORS),
        lambda o: o.masked(o.scale_by_sm3(0.5, 0.9, 1e-3), VECTORS),
        lambda o: o.masked(o.scale_by_sm3(0.0), VECTORS),
        lambda o: o.masked(o.scale_by_sm3(b2=0.5, eps=1.0), VECTORS),
        **HUNDRED,
    ),
    *same(
        "scale_by_stddev",
        lambda o: o.scale_by_stddev(),
        lambda o: o.scale_by_stddev(0.99, 1e-2, 0.5),
        lambda o: o.scale_by_stddev(eps=1e-3, eps_in_sqrt=False),
        # bias corrected, the variance at the first step is g^2 - g^2: the default eps of 1e-8 would
        # show the rounding of either library
        lambda o: o.scale_by_stddev(eps=1e-2, bias_correction=True),
    ),
    *same(
        "scale_by_trust_ratio",
        lambda o: o.scale_by_trust_ratio(),
        lambda o: o.scale_by_trust_ratio(2.5, 0.3, 1e-2),
        lambda o: o.scale_by_trust_ratio(trust_coefficient=0.001, eps=0.5),
    ),
    *same(
        "scale_by_trust_ratio",
        lambda o: o.scale_by_trust_ratio(),
        grads=ZEROS,
        moves=False,
    ),
    *same("scale_by_sign", lambda o: o.scale_by_sign()),
    *same(
        "scale_by_yogi",
        lambda o: o.scale_by_yogi(),
        lambda o: o.scale_by_yogi(0.5, 0.7, 1e-2, 1e-3, 0.5),
        lambda o: o.scale_by_yogi(eps=1e-8, initial_accumulator_value=1e-3),
        lambda o: o.scale_by_yogi(0.0, 0.0, 1.0),
        **HUNDRED,
    ),
    *same(
        "with_extra_args_support",
        lambda o: o.with_extra_args_support(o.adam(0.1)),
        lambda o: o.with_extra_args_support(o.sgd(decay(o), 0.9)),
        lambda o: o.chain(o.with_extra_args_support(o.clip(0.5)), o.lion(0.01)),
        lambda o: o.with_extra_args_support(o.chain(o.adamw(0.1), o.ema(0.9))),
    ),
    *same("set_to_zero", lambda o: o.set_to_zero(), moves=False),
    *pair(
        "stateless",
        lambda o: o.stateless(
            lambda updates, params: tree.map(lambda u, p: 0.1 * p - u, updates, params)
        ),
        lambda o: o.stateless(
            lambda updates, params: jax.tree.map(
                lambda u, p: 0.1 * p - u, updates, params
            )
        ),
    ),
    *same(
        "stateless_with_tree_map",
        lambda o: o.stateless_with_tree_map(lambda u, p: 0.1 * p - u),
        lambda o: o.stateless_with_tree_map(lambda u, p: -0.5 * u),
        lambda o: o.stateless_with_tree_map(lambda u, p: u * p - 0.1 * u**2),
        lambda o: o.chain(
            o.stateless_with_tree_map(lambda u, p: u - 0.01 * p), o.adam(0.1)
        ),
    ),
    *same(
        "trace",
        lambda o: o.trace(0.9),
        lambda o: o.trace(0.5, nesterov=True),
        lambda o: o.trace(decay=0.0),
    ),
    *pair(
        "trace",
        lambda o: o.trace(0.9, accumulator_dtype=torch.float32),
        lambda o: o.trace(0.9, accumulator_dtype=jnp.float32),
        **FLOAT32,
    ),
    *same("zero_nans", lambda o: o.zero_nans(), grads=WITH_NANS),
    # optimizers
    *same(
        "adabelief",
        lambda o: o.adabelief(0.1),
        lambda o: o.adabelief(decay(o), 0.5, 0.7, 1e-2, 1e-3),
        lambda o: o.adabelief(0.1, nesterov=True),
        lambda o: o.adabelief(warmup(o), eps=1e-8, eps_root=0.0),
        **HUNDRED,
    ),
    *pair(
        "adabelief",
        lambda o: o.adabelief(0.1, weight_decay=0.1, weight_decay_mask=MASK),
        lambda o: o.chain(
            o.scale_by_belief(),
            o.add_decayed_weights(0.1, MASK),
            o.scale_by_learning_rate(0.1),
        ),
        **HUNDRED,
    ),
    *same(
        "adafactor",
        lambda o: o.adafactor(0.01),
        lambda o: o.adafactor(decay(o), 2, momentum=0.9, dtype_momentum=None, eps=1e-3),
        lambda o: o.adafactor(
            0.1,
            weight_decay_rate=0.01,
            weight_decay_mask=MASK,
            factored=False,
            decay_offset=-2,
        ),
        lambda o: o.adafactor(
            0.1, 3, 0.5, multiply_by_parameter_scale=False, clipping_threshold=None
        ),
        **FLOAT32_DECAY,
    ),
    *same(
        "adadelta",
        lambda o: o.adadelta(),
        lambda o: o.adadelta(None, 0.95, 1e-3),
        lambda o: o.adadelta(1.0, weight_decay=0.1, weight_decay_mask=MASK),
        lambda o: o.adadelta(decay(o), eps=1e-2, weight_decay=decay(o)),
    ),
    *same("adagrad", lambda o: o.adagrad(0.1), lambda o: o.adagrad(decay(o), 0.0, 1e-3)),
    *same(
        "adam",
        lambda o: o.adam(0.1),
        lambda o: o.adam(decay(o), 0.8, 0.95, 1e-3, 1e-4),
        lambda o: o.adam(learning_rate=warmup(o), nesterov=True),
        lambda o: o.adam(0.1, mu_dtype=None),
    ),
    *pair(
        "adam",
        lambda o: o.adam(0.1, mu_dtype=torch.float32),
        lambda o: o.adam(0.1, mu_dtype=jnp.float32),
        **FLOAT32,
    ),
    *same(
        "adamax", lambda o: o.adamax(0.1), lambda o: o.adamax(decay(o), 0.8, 0.95, 1e-3)
    ),
    *same(
        "adamaxw",
        lambda o: o.adamaxw(0.1),
        lambda o: o.adamaxw(decay(o), 0.8, 0.95, 1e-3, 0.1, MASK),
        lambda o: o.adamaxw(warmup(o), weight_decay=decay(o)),
        lambda o: o.adamaxw(0.1, weight_decay=0.0),
        **HUNDRED,
    ),
    *same(
        "adamw",
        lambda o: o.adamw(0.1),
        lambda o: o.adamw(warmup(o), weight_decay=0.1, mask=MASK),
        lambda o: o.adamw(
            0.1, 0.8, 0.95, 1e-3, 1e-4, None, decay(o), None, nesterov=True
        ),
        lambda o: o.adamw(0.1, weight_decay=0.0),
    ),
    *pair(
        "adamw",
        lambda o: o.adamw(0.1, weight_decay=0.1, mask=MASKS[0]),
        lambda o: o.adamw(0.1, weight_decay=0.1, mask=MASKS[1]),
    ),
    *same(
        "adan",
        lambda o: o.adan(0.1, b2=0.5),
        lambda o: o.adan(decay(o), 0.9, 0.5, 0.95, 1e-3, 0.0, 0.1, MASK),
        lambda o: o.adan(warmup(o), b2=0.5, weight_decay=decay(o)),
        lambda o: o.adan(0.1, 0.5, 0.5, 0.5, 1e-2),
        **HUNDRED,
    ),
    *of_contrib(
        "ademamix",
        lambda o: o.ademamix(0.1),
        lambda o: o.ademamix(decay(o), 0.8, 0.95, 0.99, 2.0, 1e-3, 1e-4, None, 0.1, MASK),
        lambda o: o.ademamix(warmup(o), alpha=wide(o, o.linear_schedule(0.0, 5.0, 60))),
        lambda o: o.ademamix(0.01, b3=0.9, weight_decay=0.1),
    ),
    *of_contrib(
        "adopt",
        lambda o: o.adopt(0.1),
        lambda o: o.adopt(decay(o), 0.8, 0.95, 1e-2, use_clipping=False),
        lambda o: o.adopt(warmup(o), nesterov=True, use_clipping=False),
    ),
    *same(
        "amsgrad",
        lambda o: o.amsgrad(0.1),
        lambda o: o.amsgrad(decay(o), 0.8, 0.95, 1e-3, 1e-4),
    ),
    *same(
        "fromage",
        lambda o: o.fromage(0.1),
        lambda o: o.fromage(decay(o)),
        lambda o: o.fromage(0.5, 0.3),
        lambda o: o.fromage(warmup(o), min_norm=0.0),
        **HUNDRED,
    ),
    *same(
        "lamb",
        lambda o: o.lamb(0.1),
        lambda o: o.lamb(warmup(o), 0.8, 0.95, 1e-3, 1e-4, 0.1, MASK),
        lambda o: o.lamb(0.01, weight_decay=0.1),
    ),
    *pair(
        "lamb",
        lambda o: o.lamb(0.1, weight_decay=0.1, mask=MASKS[0]),
        lambda o: o.lamb(0.1, weight_decay=0.1, mask=MASKS[1]),
    ),
    *same(
        "lars",
        lambda o: o.lars(1.0),
        lambda o: o.lars(warmup(o), 0.1, MASK, 0.5, 1e-2, MASK, 0.5, True),
        lambda o: o.lars(1.0, weight_decay=0.1, trust_ratio_mask=False, momentum=0.0),
    ),
    *same(
        "lion",
        lambda o: o.lion(0.01),
        lambda o: o.lion(decay(o), 0.8, 0.95, weight_decay=0.1, mask=MASK),
    ),
    *of_contrib(
        "madgrad",
        lambda o: o.madgrad(0.1),
        lambda o: o.madgrad(decay(o), 0.5, 0.1, 1e-3),
        lambda o: o.madgrad(1.0, weight_decay=0.01),
        lambda o: o.madgrad(0.1, 0.0, eps=0.0),
        around=counting_in_int64,
    ),
    *pair("muon", lambda o: o.muon(0.1), lambda o: in_jax_layout(o.contrib.muon(0.1))),
    *pair(
        "muon",
        lambda o: o.muon(decay(o), beta=0.8, eps=1e-3, weight_decay=0.1, nesterov=False),
        lambda o: in_jax_layout(
            o.contrib.muon(decay(o), beta=0.8, eps=1e-3, weight_decay=0.1, nesterov=False)
        ),
    ),
    *pair(
        "muon",
        lambda o: o.muon(
            0.1,
            ((3.0, -3.2, 1.2), (2.0, -1.5, 0.5)),
            adam_b1=0.5,
            adam_b2=0.7,
            adam_eps_root=1e-3,
            adam_weight_decay=0.1,
            adam_learning_rate=0.01,
            consistent_rms=0.2,
        ),
        lambda o: in_jax_layout(
            o.contrib.muon(
                0.1,
                ((3.0, -3.2, 1.2), (2.0, -1.5, 0.5)),
                adam_b1=0.5,
                adam_b2=0.7,
                adam_eps_root=1e-3,
                adam_weight_decay=0.1,
                adam_learning_rate=0.01,
                consistent_rms=0.2,
            )
        ),
    ),
    *(
        case
        for options in (
            {"preconditioning": "aol", "nesterov": False},
            {"preconditioning": "schatten", "ns_steps": 4},
            {"preconditioning": "spectral", "adaptive": True},
            {"adaptive": True, "beta": 0.8, "weight_decay": 0.1},
            {"preconditioning": "aol", "ns_coeffs": TWO_TRIPLES, "adaptive": True},
        )
        for case in pair(
            "muon",
            lambda o, options=options: o.muon(0.1, **options),
            lambda o, options=options: in_jax_layout(o.contrib.muon(0.1, **options)),
        )
    ),
    *same(
        "nadam",
        lambda o: o.nadam(0.1),
        lambda o: o.nadam(decay(o), 0.8, 0.95, 1e-3, 1e-4),
    ),
    *same(
        "nadamw",
        lambda o: o.nadamw(0.1),
        lambda o: o.nadamw(decay(o), 0.8, 0.95, 1e-3, 1e-4, None, 0.1, MASK),
        lambda o: o.nadamw(warmup(o), weight_decay=decay(o)),
        lambda o: o.nadamw(0.1, weight_decay=0.0),
        **HUNDRED,
    ),
    *same(
        "novograd",
        lambda o: o.novograd(0.1),
        lambda o: o.novograd(decay(o), 0.5, 0.7, 1e-2, 1e-3, 0.1),
        lambda o: o.novograd(warmup(o), 0.95, 0.98, weight_decay=0.01),
        lambda o: o.novograd(0.1, 0.0, 0.0),
        **HUNDRED,
    ),
    *same(
        "optimistic_gradient_descent",
        lambda o: o.optimistic_gradient_descent(0.1),
        lambda o: o.optimistic_gradient_descent(decay(o), 0.5, 2.0),
        lambda o: o.optimistic_gradient_descent(warmup(o), beta=0.0),
        lambda o: o.optimistic_gradient_descent(0.1, 0.0, 1.0),
        **HUNDRED,
    ),
    *same(
        "radam",
        lambda o: o.radam(0.1),
        lambda o: o.radam(decay(o), 0.8, 0.95, 1e-3, 1e-4, 4.5, nesterov=True),
    ),
    *same(
        "rmsprop",
        lambda o: o.rmsprop(0.01),
        lambda o: o.rmsprop(decay(o), 0.99, 1e-3, 0.5, False, momentum=0.9),
        lambda o: o.rmsprop(0.01, centered=True),
        lambda o: o.rmsprop(
            0.01,
            centered=True,
            momentum=0.9,
            nesterov=True,
            eps=1e-2,
            bias_correction=True,
        ),
        lambda o: o.rmsprop(0.01, momentum=0.9, nesterov=True, bias_correction=True),
    ),
    *same(
        "sgd",
        lambda o: o.sgd(0.1),
        lambda o: o.sgd(decay(o), 0.9),
        lambda o: o.sgd(0.1, momentum=0.9, nesterov=True),
        lambda o: o.sgd(0.1, 0.0),
    ),
    *pair(
        "sgd",
        lambda o: o.sgd(0.1, 0.9, accumulator_dtype=torch.float32),
        lambda o: o.sgd(0.1, 0.9, accumulator_dtype=jnp.float32),
        **FLOAT32,
    ),
    *same(
        "signum",
        lambda o: o.signum(0.1),
        lambda o: o.signum(decay(o), 0.5),
        lambda o: o.signum(warmup(o), 0.99),
        lambda o: o.signum(0.1, 0.0),
        **HUNDRED,
    ),
    *of_contrib(
        "simplified_ademamix",
        lambda o: o.simplified_ademamix(0.1),
        lambda o: o.simplified_ademamix(decay(o), 0.5, 0.7, 2.0, 1e-2, 1e-3, 0.1, MASK),
        lambda o: o.simplified_ademamix(warmup(o), 0.9, alpha=decay(o)),
        lambda o: o.simplified_ademamix(1e-3, alpha=100.0, weight_decay=0.1),
    ),
    *same(
        "sm3",
        lambda o: o.masked(o.sm3(0.1), VECTORS),
        lambda o: o.masked(o.sm3(0.5, 0.5), VECTORS),
        lambda o: o.masked(o.sm3(0.01, 0.99), VECTORS),
        lambda o: o.masked(o.sm3(0.1, 0.0), VECTORS),
        **HUNDRED,
    ),
    *same(
        "yogi",
        lambda o: o.yogi(0.1),
        lambda o: o.yogi(decay(o), 0.8, 0.95, 1e-2),
        lambda o: o.yogi(warmup(o), eps=1e-8),
        lambda o: o.yogi(0.1, 0.0, 0.0),
        **HUNDRED,
    ),
    *same("sign_sgd", lambda o: o.sign_sgd(0.1), lambda o: o.sign_sgd(decay(o))),
    # Under warm-up the learning rates of optax's weights are one step ahead: see test_authors.py.
    *of_contrib(
        "schedule_free",
        lambda o: o.schedule_free(o.sgd(0.1), 0.1),
        lambda o: o.schedule_free(o.sgd(0.1), 0.1, 0.5, 1.0),
        lambda o: o.schedule_free(o.adam(0.1, b1=0.0), 0.1, b1=0.98),
        lambda o: o.schedule_free(o.adamw(0.1, b1=0.0, weight_decay=0.1), 0.1),
    ),
    *of_contrib(
        "schedule_free_adamw",
        lambda o: o.schedule_free_adamw(),
        lambda o: o.schedule_free_adamw(0.1, None, 0.5, 0.9, 1e-3, 0.1),
        lambda o: o.schedule_free_adamw(0.01, b1=0.98, weight_lr_power=1.0),
    ),
    *of_contrib(
        "schedule_free_sgd",
        lambda o: o.schedule_free_sgd(),
        lambda o: o.schedule_free_sgd(0.1, None, 0.5, 0.1),
        lambda o: o.schedule_free_sgd(0.01, b1=0.98, weight_lr_power=1.0),
    ),
    *of_contrib(
        "dog",
        lambda o: o.dog(),
        lambda o: o.dog(0.5, ("distance", 0.1), 1e-2, 0.1),
        lambda o: o.dog(2.0, ("learning_rate", 0.05), weight_decay=0.1, mask=MASK),
        lambda o: o.dog(decay(o), ("heuristic", 1e-3)),
    ),
    *of_contrib(
        "dowg",
        lambda o: o.dowg(),
        lambda o: o.dowg(0.5, 0.1, 1e-2, 0.1),
        lambda o: o.dowg(decay(o), eps=1e-3, weight_decay=0.1, mask=MASK),
    ),
    *same(
        "chain",
        lambda o: o.chain(o.zero_nans(), o.lion(0.01)),
        lambda o: o.chain(o.scale_by_rms(), o.trace(0.9), o.scale(-0.01)),
    ),
    *same(
        "clip",
        lambda o: o.clip(0.1),
    ),
    *same(
        "clip_by_block_rms",
        lambda o: o.clip_by_block_rms(0.1),
        lambda o: o.clip_by_block_rms(1.0),
    ),
    *same(
        "clip_by_global_norm",
        lambda o: o.clip_by_global_norm(0.01),
    ),
    *same(
        "scale",
        lambda o: o.scale(0.0),
        moves=False,
    ),
    *same(
        "scale",
        lambda o: o.scale(1e-3),
    ),
    *same(
        "scale_by_adadelta",
        lambda o: o.scale_by_adadelta(0.5, 1e-3),
        lambda o: o.scale_by_adadelta(0.99, 1.0),
    ),
    *same(
        "scale_by_adamax",
        lambda o: o.scale_by_adamax(0.0, 0.9, 1e-3),
        lambda o: o.scale_by_adamax(0.95, 0.5, 1.0),
    ),
    *same(
        "scale_by_lion",
        lambda o: o.scale_by_lion(0.0, 0.9),
        lambda o: o.scale_by_lion(0.99, 0.5),
    ),
    *same(
        "scale_by_param_block_rms",
        lambda o: o.scale_by_param_block_rms(0.1),
        lambda o: o.chain(o.scale(-0.01), o.scale_by_param_block_rms(1.0)),
    ),
    *same(
        "scale_by_radam",
        lambda o: o.scale_by_radam(0.5, 0.9, 1e-2, threshold=6.0),
    ),
    *same(
        "scale_by_rss",
        lambda o: o.scale_by_rss(0.5, 1e-2),
    ),
    *same(
        "scale_by_schedule",
        lambda o: o.scale_by_schedule(warmup(o)),
        lambda o: o.scale_by_schedule(wide(o, o.cosine_decay_schedule(-0.1, 60))),
    ),
    *same(
        "adagrad",
        lambda o: o.adagrad(0.5, 1.0),
        lambda o: o.adagrad(warmup(o), eps=1e-2),
    ),
    *same(
        "adamax",
        lambda o: o.adamax(warmup(o), 0.5),
        lambda o: o.adamax(0.01, 0.95, 0.5, 1e-2),
    ),
    *of_contrib(
        "adopt",
        lambda o: o.adopt(0.01, 0.5, 0.9, 1e-3),
    ),
    *same(
        "amsgrad",
        lambda o: o.amsgrad(warmup(o), 0.5),
        lambda o: o.amsgrad(0.01, 0.95, 0.5, 1e-2),
    ),
    *same(
        "lars",
        lambda o: o.lars(0.5, 0.01, True, 0.1, 1e-3, True, 0.95),
    ),
    *same(
        "lion",
        lambda o: o.lion(warmup(o), 0.5),
        lambda o: o.lion(0.1, 0.99, 0.5, weight_decay=0.0),
    ),
    *same(
        "nadam",
        lambda o: o.nadam(warmup(o), 0.5),
        lambda o: o.nadam(0.01, 0.95, 0.5, 1e-2),
    ),
    *same(
        "radam",
        lambda o: o.radam(warmup(o), 0.5),
        lambda o: o.radam(0.01, 0.95, 0.5, 1e-2),
    ),
    *same(
        "sign_sgd",
        lambda o: o.sign_sgd(warmup(o)),
        lambda o: o.sign_sgd(1.0),
    ),
    *of_contrib(
        "schedule_free_adamw",
        lambda o: o.schedule_free_adamw(0.5, b2=0.5, eps=1e-2, weight_decay=0.01),
    ),
    *of_contrib(
        "schedule_free_sgd",
        lambda o: o.schedule_free_sgd(0.5, b1=0.2, weight_decay=0.01),
    ),
    *of_contrib(
        "dowg",
        lambda o: o.dowg(2.0, 1e-3, 1e-8),
    ),
    *same(
        "apply_if_finite",
        lambda o: o.apply_if_finite(o.adam(0.1), 2),
        lambda o: o.apply_if_finite(o.adamw(warmup(o), weight_decay=0.1), 10),
        grads=SOME_NOT_FINITE,
    ),
    *pair(
        "muon",
        lambda o: o.muon(warmup(o), ns_steps=3, beta=0.5, adam_b1=0.8),
        lambda o: in_jax_layout(
            o.contrib.muon(warmup(o), ns_steps=3, beta=0.5, adam_b1=0.8)
        ),
    ),
    *of_contrib(
        "scale_by_cocob",
        lambda o: o.scale_by_cocob(),
        lambda o: o.scale_by_cocob(2.0, 0.1),
        lambda o: o.chain(o.trace(0.9), o.scale_by_cocob(10.0)),
        lambda o: o.scale_by_cocob(0.0),
    ),
    *of_contrib(
        "cocob",
        lambda o: o.cocob(),
        lambda o: o.cocob(0.5, 2.0, 1e-2, 0.1),
        lambda o: o.cocob(decay(o), weight_decay=0.1, mask=MASK),
        lambda o: o.cocob(alpha=1.0),
    ),
    *of_contrib(
        "dadapt_adamw",
        lambda o: o.dadapt_adamw(),
        lambda o: o.dadapt_adamw(0.5, (0.5, 0.9), 1e-2, 0.1, 0.1),
        lambda o: o.dadapt_adamw(decay(o), estim_lr0=1e-2),
        lambda o: o.dadapt_adamw(warmup(o), (0.0, 0.99), weight_decay=0.01),
    ),
    *of_contrib(
        "mechanize",
        lambda o: o.mechanize(o.sgd(1.0)),
        lambda o: o.mechanize(o.adam(decay(o)), 0.1, 1e-3, 0.1, 3),
        lambda o: o.mechanize(o.sgd(0.1, 0.9), weight_decay=0.0, num_betas=1),
        lambda o: o.mechanize(o.adamw(1.0, weight_decay=0.1), s_init=1e-2),
    ),
    *of_contrib(
        "sam",
        lambda o: o.sam(o.sgd(0.1), o.chain(o.normalize(), o.sgd(0.05))),
        lambda o: o.sam(o.adam(0.1), o.chain(o.normalize(), o.sgd(0.5)), 3),
        lambda o: o.sam(o.adamw(decay(o)), o.sgd(0.1, 0.9), 4),
        lambda o: o.sam(o.adam(0.1), o.adam(0.1), 3, reset_state=False),
    ),
    *of_contrib(
        "normalize",
        lambda o: o.normalize(),
        lambda o: o.chain(o.normalize(), o.adam(0.1)),
        lambda o: o.chain(o.trace(0.9), o.normalize(), o.scale(-0.1)),
        lambda o: o.masked(o.normalize(), MASK),
    ),
    *same(
        "amsgrad",
        lambda o: o.amsgrad(0.1, bias_correction_mu=False),
        lambda o: o.amsgrad(decay(o), 0.5, 0.7, 1e-2, 1e-3, bias_correction_nu=False),
        lambda o: o.amsgrad(0.1, 0.8, 0.6, 1e-3, 0.0, None, False, False),
        **HUNDRED,
    ),
    *same(
        "scale_by_amsgrad",
        lambda o: o.scale_by_amsgrad(),
        lambda o: o.scale_by_amsgrad(0.5, 0.7, 1e-2, 1e-3, bias_correction_nu=False),
        lambda o: o.scale_by_amsgrad(bias_correction_mu=False),
        lambda o: o.scale_by_amsgrad(0.8, 0.6, 1e-3, 0.0, None, False, False),
        **HUNDRED,
    ),
    *same(
        "scale_by_lion",
        lambda o: o.scale_by_lion(mode="smooth"),
        lambda o: o.scale_by_lion(0.5, 0.7, mode="smooth", smooth_beta=3.0),
        lambda o: o.scale_by_lion(0.8, 0.9, mode="refined"),
        **HUNDRED,
    ),
    *same(
        "optimistic_adam_v2",
        lambda o: o.optimistic_adam_v2(0.1),
        lambda o: o.optimistic_adam_v2(decay(o), alpha=0.5, beta=0.2, eps=1e-3),
        lambda o: o.optimistic_adam_v2(0.1, b1=0.5, b2=0.7, nesterov=False),
        lambda o: o.optimistic_adam_v2(0.1, eps_root=1e-2, beta=-0.5),
        **HUNDRED,
    ),
    *[
        case
        for arguments in ((1e-6,), (0.1, 1e-2), (1e-3, 1e-8, -0.5), (1.0, 0.0, 2.0))
        for case in pair(
            "scale_by_distance_over_gradients",
            lambda o, given=arguments: o.scale_by_distance_over_gradients(*given),
            lambda o, given=arguments: in_shape(
                o.scale_by_distance_over_gradients(
                    *given[:2],
                    param_dtype=jnp.float64,
                    **dict(zip(["global_scale"], given[2:], strict=False)),
                )
            ),
            remark="optax makes a vector of a 0-dim update",
            **HUNDRED,
        )
    ],
    # wrappers; optax gathers in float32 unless told otherwise
    *pair(
        "MultiSteps", lambda o: o.MultiSteps(o.adam(0.1), 4), lambda o: gathering(o, 4)
    ),
    *pair(
        "MultiSteps",
        lambda o: o.MultiSteps(o.sgd(decay(o), 0.9), 3, use_grad_mean=False),
        lambda o: gathering(o, 3, o.sgd(decay(o), 0.9), use_grad_mean=False),
    ),
    *pair(
        "MultiSteps", lambda o: o.MultiSteps(o.adam(0.1), 1), lambda o: gathering(o, 1)
    ),
    *pair(
        "MultiSteps",
        lambda o: o.MultiSteps(o.adamw(0.1, weight_decay=0.1), 7),
        lambda o: gathering(o, 7, o.adamw(0.1, weight_decay=0.1)),
    ),
    *pair(
        "MultiSteps",
        lambda o: o.MultiSteps(o.adam(0.1), one_to_three(o)),
        lambda o: gathering(o, one_to_three(o)),
        **HUNDRED,
    ),
    *pair(
        "MultiSteps",
        lambda o: o.MultiSteps(
            o.adam(0.1), 3, should_skip_update_fn=fo.skip_not_finite, use_grad_mean=False
        ),
        lambda o: gathering(
            o, 3, should_skip_update_fn=optax.skip_not_finite, use_grad_mean=False
        ),
        grads=SOME_NOT_FINITE,
    ),
    *pair(
        "MultiSteps",
        lambda o: o.MultiSteps(
            o.sgd(decay(o)), one_to_three(o), should_skip_update_fn=skip_above(o, 15.0)
        ),
        lambda o: gathering(
            o,
            one_to_three(o),
            o.sgd(decay(o)),
            should_skip_update_fn=skip_above(o, 15.0),
        ),
        **HUNDRED,
    ),
    *same(
        "flatten",
        lambda o: o.flatten(o.adam(0.1)),
        lambda o: o.flatten(o.chain(o.clip_by_block_rms(0.5), o.sgd(decay(o), 0.9))),
        lambda o: o.chain(o.flatten(o.lamb(0.1, weight_decay=0.1)), o.scale(0.5)),
        lambda o: o.flatten(o.lion(0.1)),
        **HUNDRED,
    ),
    *same(
        "apply_every",
        lambda o: o.apply_every(),
        lambda o: o.chain(o.apply_every(3), o.scale(-0.1)),
        lambda o: o.chain(o.adam(0.1), o.apply_every(4)),
        lambda o: o.chain(o.clip_by_global_norm(0.5), o.apply_every(7), o.sgd(0.1, 0.9)),
        **HUNDRED,
    ),
    *same(
        "conditionally_mask",
        lambda o: jitted(o.conditionally_mask(o.adam(0.1), lambda step: step % 3 != 1)),
        lambda o: jitted(
            o.conditionally_mask(o.sgd(decay(o), 0.9), lambda step: step >= 5)
        ),
        lambda o: jitted(
            o.chain(
                o.conditionally_mask(o.scale_by_adam(), lambda step: step < 40),
                o.scale(-0.1),
            )
        ),
        lambda o: jitted(
            o.chain(
                o.trace(0.9),
                o.conditionally_mask(o.adamw(warmup(o)), lambda step: step % 7 > 2),
            )
        ),
        **HUNDRED,
    ),
    *same(
        "conditionally_transform",
        lambda o: jitted(
            o.conditionally_transform(o.adam(0.1), lambda step: step % 3 != 1)
        ),
        lambda o: jitted(
            o.conditionally_transform(o.sgd(decay(o), 0.9), lambda step: step >= 5)
        ),
        lambda o: jitted(
            o.chain(
                o.conditionally_transform(o.scale_by_adam(), lambda step: step < 40),
                o.scale(-0.1),
            )
        ),
        lambda o: jitted(
            o.chain(
                o.trace(0.9),
                o.conditionally_transform(o.adamw(warmup(o)), lambda step: step % 7 > 2),
            )
        ),
        **HUNDRED,
    ),
    *same(
        "freeze",
        lambda o: o.freeze(MASK),
        lambda o: o.freeze({"layer": True, "scales": False}),
        lambda o: o.chain(o.adam(0.1), o.freeze(MASK)),
        lambda o: o.freeze(False),
        **HUNDRED,
    ),
    *same("freeze", lambda o: o.freeze(True), moves=False),
    *same(
        "selective_transform",
        lambda o: o.selective_transform(o.adamw(0.1), freeze_mask=MASK),
        lambda o: o.selective_transform(o.sgd(decay(o), 0.9), freeze_mask=MASK),
        lambda o: o.selective_transform(
            o.chain(o.clip_by_global_norm(0.5), o.sgd(0.1)),
            freeze_mask={"layer": {"w": False, "b": True}, "scales": [False]},
        ),
        lambda o: o.chain(
            o.selective_transform(o.lamb(0.1), freeze_mask=VECTORS), o.scale(0.5)
        ),
        **HUNDRED,
    ),
    *same(
        "named_chain",
        lambda o: o.named_chain(("a", o.trace(0.9)), ("b", o.scale(-0.1))),
        lambda o: o.named_chain(
            ("clip", o.clip_by_global_norm(0.5)), ("adam", o.adamw(decay(o)))
        ),
        lambda o: o.named_chain(
            ("inner", o.chain(o.trace(0.9), o.trace(0.5))), ("scale", o.scale(-0.1))
        ),
        lambda o: o.named_chain(
            ("inner", o.named_chain(("adam", o.scale_by_adam()), ("half", o.scale(0.5)))),
            ("step", o.scale_by_learning_rate(warmup(o))),
        ),
        **HUNDRED,
    ),
    *same("apply_if_finite", lambda o: o.apply_if_finite(o.adam(0.1), 3)),
    *same(
        "apply_if_finite",
        lambda o: o.apply_if_finite(o.sgd(decay(o), 0.9), 3),
        grads=SOME_NOT_FINITE,
    ),
]

DIVERGENCES = {
    "asgd": "optax has none",
    "rprop": "optax 0.2.8 returns the step of the update before: the step sizes are compared, below",
    "scale_by_muon": "compared in muon: optax has the factor of the shape in a stage of its own",
    "scale_by_nadam": "optax has none: it is torch's NAdam",
    "scale_by_rprop": "as rprop",
    "add_noise": "other random numbers (Philox from a key in the state, not Threefry): only the variance schedule is compared, below",
    "noisy_sgd": "as add_noise",
    **dict.fromkeys(
        ("differentially_private_aggregate", "dp_adam", "dpsgd"),
        "optax has none outside of contrib: see test_private.py",
    ),
    **dict.fromkeys(
        ("keep_error_bits", "keep_master_weights", "params_ema", "stored", "with_owners"),
        "optax has none",
    ),
    **dict.fromkeys(
        ("every", "gate", "largest", "wrap"),
        "optax has none: they declare a transformation",
    ),
    "lookahead": "optax has pairs of parameters: compared below",
    **dict.fromkeys(
        ("lbfgs", "scale_by_lbfgs", "polyak_sgd", "scale_by_polyak"),
        "see test_optax_line_search.py",
    ),
    **dict.fromkeys(
        ("scale_by_backtracking_linesearch", "scale_by_zoom_linesearch"),
        "see test_optax_line_search.py",
    ),
    **dict.fromkeys(("cautious", "gradient_signs"), "optax has none"),
    **dict.fromkeys(("grams", "scale_by_grams"), "optax has none"),
    "cautious_weight_decay": "optax has none",
    **dict.fromkeys(("laprop", "scale_by_laprop"), "optax has none"),
    **dict.fromkeys(("stable_adamw", "scale_by_stable_adamw"), "optax has none"),
    **dict.fromkeys(("mars_adamw", "scale_by_mars"), "optax has none"),
    **dict.fromkeys(
        ("acprop", "scale_by_acprop"),
        "optax 0.2.8 has g - m with the mean of the step before: see test_authors.py",
    ),
    **dict.fromkeys(
        ("scale_by_dog", "scale_by_dowg"), "optax has none in public: see dog"
    ),
    "prodigy": "optax 0.2.8 has other numbers than the authors: see test_authors.py",
    **dict.fromkeys(
        ("momo", "momo_adam"),
        "they read value=: see test_authors.py",
    ),
    **dict.fromkeys(
        ("reduce_on_plateau", "sophia", "scale_by_sophia", "split_real_and_imaginary"),
        "they read extra arguments, or complex numbers: compared below",
    ),
    **dict.fromkeys(
        ("monitor", "snapshot"),
        "the updates pass: the numbers that are kept are compared below",
    ),
    **dict.fromkeys(
        (
            *(
                "muon_with_adamw",
                "hyperball",
                "muonh",
                "scale_by_norm_floor",
                "normuon",
                "scale_by_normuon",
            ),
            *("adamuon", "scale_by_adamuon", "dion", "scale_by_dion"),
            *("mano", "scale_by_mano", "scion", "scale_by_scion"),
        ),
        "optax has none: see test_matrices.py",
    ),
    **dict.fromkeys(
        (
            *("soap", "scale_by_soap", "shampoo", "scale_by_shampoo", "splus"),
            *("kl_shampoo", "scale_by_kl_shampoo", "kl_soap", "scale_by_kl_soap"),
            *("scale_by_splus", "psgd_kron", "scale_by_psgd_kron"),
        ),
        "optax has none: see test_preconditioners.py",
    ),
    **dict.fromkeys(
        (
            *("adam_mini", "scale_by_adam_mini", "adamc", "corrected_weight_decay"),
            *("came", "scale_by_came", "focus", "scale_by_focus", "zclip"),
            *("stable_spam", "scale_by_stable_spam", "clip_spikes"),
            "scale_to_usual_norm",
        ),
        "optax has none: see test_first_order.py",
    ),
    **dict.fromkeys(
        ("galore", "scale_by_galore"),
        "the authors' numbers: optax has another eps, and no decay after the step; "
        "see test_low_rank.py",
    ),
    **dict.fromkeys(
        ("apollo", "scale_by_apollo", "fira", "scale_by_fira", "project_gradients"),
        "optax has none: see test_low_rank.py",
    ),
    **dict.fromkeys(
        ("asam", "scale_by_param_size", "ema_nesterov", "outer_loop"),
        "optax has none: see test_outer.py",
    ),
    "qk_clip": "optax has none: see test_qk_clip.py",
    **dict.fromkeys(
        ("schedule_free_prodigy", "schedule_free_radam"),
        "optax has none: see test_authors.py",
    ),
    "sgld": "optax has none",
    "stochastic_round": "optax has none",
}
"""Rows of the registry that are not in `CASES`, and why."""

# Not to be seen in these numbers: masked and partition keep flat dicts from path to leaf, without
# holes, where optax keeps the tree with MaskedNode in the gaps; a function mask takes (path, leaf)
# and not the tree; zero_nans keeps no found_nan; a chain's state is a dict by stage name, not a
# tuple. Complex tensors are pairs of reals here, as in torch.optim; optax uses |g|^2. Low-precision
# params keep float32 moments here, and moments of their own dtype in optax. centralize takes the
# same dims in both, which are those of a torch weight [out, in], but not of a JAX kernel [in, out].


# ---- transformations and optimizers --------------------------------------------------------------


OPTAX = "optax 0.2.8"
BRANCHES = ("MultiSteps", "apply_if_finite", "muon")
"""Names whose optax has branches and loops, which take long if they are not jitted."""


def named(cases: list[Case]) -> list:
    def mark(case: Case) -> Any:
        names = ("muon", "scale_by_muon") if case.name == "muon" else (case.name,)
        options = {"bound": case.tolerance, "remark": case.remark}
        return compares(*names, reference=OPTAX, **options)

    return [
        pytest.param(case, id=f"{case.name}-{i}", marks=mark(case))
        for i, case in enumerate(cases)
    ]


@pytest.mark.parametrize("case", named(CASES))
def test_equals_optax(case: Case) -> None:
    grads = GRADS if case.grads is None else case.grads
    updates, ps, _ = run_ours(case.ours(fo), grads)
    their_updates, their_ps, _ = run_theirs(
        case.theirs(optax), grads, jit=case.name in BRANCHES
    )
    assert_same(updates, their_updates, case.tolerance)
    assert_same(ps, their_ps, case.tolerance)
    before, after = arrays(PARAMS), arrays(ps)
    assert all(np.isfinite(value).all() for value in after.values())
    assert case.moves != all(np.array_equal(after[path], before[path]) for path in before)


@pytest.mark.parametrize(
    ("name", "options", "theirs"),
    [
        (
            "SGD",
            {"lr": 0.1, "momentum": 0.9, "nesterov": True},
            lambda: optax.sgd(0.1, 0.9, nesterov=True),
        ),
        ("Adam", {"lr": 0.1, "eps": 1e-3}, lambda: optax.adam(0.1, eps=1e-3)),
        (
            "AdamW",
            {"lr": 0.1, "weight_decay": 0.1},
            lambda: optax.adamw(0.1, weight_decay=0.1),
        ),
        ("Adamax", {"lr": 0.1, "eps": 1e-3}, lambda: optax.adamax(0.1, eps=1e-3)),
        ("Adadelta", {"eps": 1e-3}, lambda: optax.adadelta(1.0, eps=1e-3)),
        (
            "RMSprop",
            {"lr": 0.01, "alpha": 0.9},
            lambda: optax.rmsprop(0.01, eps_in_sqrt=False),
        ),
    ],
)
def test_50_torchs_names_equal_optax_where_torch_does(
    name: str, options: dict, theirs: Callable[[], Any]
) -> None:
    ps, spec = tree.flatten(PARAMS)
    params = [torch.nn.Parameter(p.clone()) for p in ps]
    opt = getattr(fo.optim, name)(params, **options)
    for g in GRADS:
        for p, leaf in zip(params, tree.leaves(g), strict=True):
            p.grad = leaf.clone()
        opt.step()
    assert_same(
        tree.unflatten(spec, [p.detach() for p in params]), run_theirs(theirs())[1]
    )


@compares("lookahead", reference=OPTAX)
@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize(("k", "a"), [(1, 0.5), (3, 0.5), (5, 0.0), (5, 1.0)])
def test_lookahead_equals_optax(k: int, a: float, reset: bool) -> None:
    """The fast parameters after every step, and the slow ones, which optax has beside them."""
    tx = fo.lookahead(fo.adam(0.1), k, a, reset)
    ps, state = PARAMS, tx.init(PARAMS)
    theirs = optax.lookahead(optax.adam(0.1), k, a, reset)
    pair = optax.LookaheadParams.init_synced(to_jax(PARAMS))
    their_state = theirs.init(pair)
    for g in GRADS:
        updates, state = tx.update(g, state, ps)
        ps = fo.apply_updates(ps, updates)
        their_updates, their_state = theirs.update(to_jax(g), their_state, pair)
        pair = optax.apply_updates(pair, their_updates)
        assert_same(ps, pair.fast)
        assert_same(fo.eval_params(tx, state, ps), pair.slow)


@pytest.mark.parametrize(
    "make",
    [
        lambda o: o.MultiSteps(o.adam(0.1), 3),
        lambda o: o.MultiSteps(o.adam(0.1), 1, use_grad_mean=False),
        lambda o: o.MultiSteps(o.adam(0.1), one_to_three(o)),
        lambda o: o.MultiSteps(o.adam(0.1), 2, should_skip_update_fn=o.skip_not_finite),
    ],
)
def test_multi_steps_says_as_optax_whether_it_has_updated(make: Any) -> None:
    ours, theirs = make(fo), make(optax)
    assert ours.gradient_transformation() is ours
    state, their_state = ours.init(PARAMS), theirs.init(to_jax(PARAMS))
    assert repr(ours.inner_opt) == "adam(0.1)"
    assert ours.gradient_transformation() is ours
    said = [bool(ours.has_updated(state))]
    expected = [bool(theirs.has_updated(their_state))]
    for g in SOME_NOT_FINITE[:12]:
        _, state = ours.update(g, state, PARAMS)
        _, their_state = theirs.update(to_jax(g), their_state, to_jax(PARAMS))
        said.append(bool(ours.has_updated(state)))
        expected.append(bool(theirs.has_updated(their_state)))
    assert said == expected
    assert True in said and False in said


def test_apply_if_finite_counts_as_optax() -> None:
    ours = run_ours(fo.apply_if_finite(fo.sgd(0.1), 3), SOME_NOT_FINITE)[2]
    their = optax.apply_if_finite(optax.sgd(0.1), 3)
    theirs = run_theirs(their, SOME_NOT_FINITE, jit=True)[2]
    for name in ("notfinite_count", "total_notfinite", "last_finite"):
        assert fo.get(ours, name).item() == getattr(theirs, name).item()


MEASURES: dict[str, Callable[[Any], Any]] = {
    "norm": lambda o: o.tree.norm,
    "largest": lambda o: o.tree.max,
    "sum_of_sizes": lambda o: lambda updates: o.tree.norm(updates, 1),
    "square": lambda o: lambda updates: o.tree.vdot(updates, updates),
}


@compares("snapshot", reference=OPTAX)
@pytest.mark.parametrize("name", MEASURES)
def test_a_snapshot_is_that_of_optax(name: str) -> None:
    assert_measures_the_same([name], lambda o: o.snapshot(name, MEASURES[name](o)))


@compares("snapshot", reference=OPTAX, remark="of trees")
@pytest.mark.parametrize("kind", ["of_each", "pair", "itself", "nested"])
def test_a_snapshot_of_a_tree_is_that_of_optax(kind: str) -> None:
    def measure(o: Any, map_: Callable[..., Any], updates: Any) -> Any:
        of_each = map_(lambda u: abs(u).max(), updates)
        pair = {"norm": o.tree.norm(updates), "largest": o.tree.max(updates)}
        kinds = {"of_each": of_each, "pair": pair, "itself": updates}
        return {**kinds, "nested": [of_each, (pair, updates)]}[kind]

    ours = fo.snapshot("kept", lambda us: measure(fo, tree.map, us), is_tree=True)
    theirs = optax.snapshot("kept", lambda us: measure(optax, jax.tree.map, us))
    tx, their = fo.chain(fo.trace(0.9), ours), optax.chain(optax.trace(0.9), theirs)
    state, their_state = tx.init(PARAMS), their.init(to_jax(PARAMS))
    for g in GRADS:
        _, state = tx.update(g, state)
        _, their_state = their.update(to_jax(g), their_state)
        assert_same(fo.get(state, "kept"), optax.tree.get(their_state, "kept"))


@compares("monitor", reference=OPTAX)
@pytest.mark.parametrize("averaged", [(0.9,), (0.5, False), (0.0,), (0.99, True)])
def test_measurements_are_those_of_optax(averaged: tuple) -> None:
    """All of them at once, and a mean of one."""

    def monitor(o: Any) -> Any:
        measures = {name: measure(o) for name, measure in MEASURES.items()}
        measures["mean"] = o.measure_with_ema(o.tree.norm, *averaged)
        return o.monitor(measures)

    assert_measures_the_same([*MEASURES, "mean"], monitor)


def assert_measures_the_same(names: list[str], make: Callable[[Any], Any]) -> None:
    """The numbers that the stage keeps, and the updates after it, at every step."""
    tx, theirs = (o.chain(o.trace(0.9), make(o), o.scale(-0.1)) for o in (fo, optax))
    state, their_state = tx.init(PARAMS), theirs.init(to_jax(PARAMS))
    for g in GRADS:
        updates, state = tx.update(g, state)
        their_updates, their_state = theirs.update(to_jax(g), their_state)
        assert_same(updates, their_updates)
        for name in names:
            assert_same(fo.get(state, name), optax.tree.get(their_state, name))


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf"), 1e200])
def test_skip_functions_say_what_those_of_optax_say(bad: float) -> None:
    updates = tree.map(lambda g: torch.where(g > 1, bad, g), GRADS[0])
    theirs = to_jax(updates)
    for ours_of, theirs_of in (
        (fo.skip_not_finite, optax.skip_not_finite),
        (skip_above(fo, 15.0), skip_above(optax, 15.0)),
        (skip_above(fo, 1e3), skip_above(optax, 1e3)),
    ):
        flag, info = ours_of(updates, 0, None)
        their_flag, their_info = theirs_of(theirs, 0, None)
        assert flag.item() == bool(their_flag)
        assert info.keys() == their_info.keys()
        for name, value in info.items():
            np.testing.assert_allclose(value.item(), their_info[name].item(), rtol=1e-12)


def test_the_data_exercises_the_cases() -> None:
    everything = [
        torch.stack(xs) for xs in zip(*(tree.leaves(g) for g in GRADS), strict=True)
    ]
    assert all(
        (g.abs() >= 0.01).all() and (g > 1).any() and (g < -1).any() for g in everything
    )
    norms = torch.stack([tree.norm(g) for g in GRADS])
    assert (norms < 5).any()
    assert (norms > 5).any()
    assert all(
        torch.stack(xs).isnan().any()
        for xs in zip(*(tree.leaves(g) for g in WITH_NANS), strict=True)
    )


@pytest.mark.parametrize("index", [0, 1])
def test_injected_hyperparameters_read_the_same(index: int) -> None:
    case = [case for case in CASES if case.name == "inject_hyperparams"][index]
    ours, theirs = (
        run_ours(case.ours(fo))[2]["hyperparams"],
        run_theirs(case.theirs(optax))[2].hyperparams,
    )
    assert_same(ours, theirs)


@compares(
    "rprop",
    "scale_by_rprop",
    reference=OPTAX,
    remark="the step sizes: optax returns the step of the update before",
)
@pytest.mark.parametrize(
    "options",
    [
        (0.1, 0.5, 1.2, 1e-6, 50.0),
        (0.1, 0.3, 1.5, 0.01, 0.4),
        (0.5, 0.9, 1.01, 1e-3, 1.0),
        (0.01, 0.2, 2.0, 1e-6, 0.1),
    ],
)
def test_rprop_has_the_step_sizes_of_optax(options: tuple[float, ...]) -> None:
    """And moves by them at once, where optax 0.2.8 gives the step of the update before."""
    updates, _, ours = run_ours(fo.rprop(*options))
    _, _, theirs = run_theirs(optax.rprop(*options))
    assert_same(fo.get(ours, "step_size"), theirs[0].step_sizes)
    assert_same(tree.map(torch.neg, updates[-1]), theirs[0].prev_updates)


QUARTIC = [1.0, 3.0, 0.5]
"""A loss of each leaf: ``sum a x^4 + x^2``, whose Hessian is diagonal."""


def quartic(of: Any, x: Any) -> Any:
    leaves = tree.leaves(x) if of is torch else jax.tree.leaves(x)
    return sum((a * p**4 + p**2).sum() for a, p in zip(QUARTIC, leaves, strict=True))


def second_derivative(given: Any, params: Any) -> Any:
    """The diagonal, in the form of either library."""
    flatten = tree.flatten if given is torch else jax.tree.flatten
    leaves, spec = flatten(params)
    found = [12 * a * p**2 + 2 for a, p in zip(QUARTIC, leaves, strict=True)]
    return tree.unflatten(spec, found) if given is torch else spec.unflatten(found)


SOPHIA = [
    {},
    {"b1": 0.5, "b2": 0.7, "gamma": 0.1, "weight_decay": 0.1, "update_interval": 3},
    {"clip_threshold": None, "eps": 0.5, "update_interval": 1, "b2": 0.9, "gamma": 0.3},
    {"gamma": 0.0, "weight_decay_mask": MASK, "clip_threshold": 0.3},
]


def direction(o: Any, **options: Any) -> Any:
    """Sophia without what follows on its direction, but a step of 0.1."""
    decays = ("weight_decay", "weight_decay_mask")
    rest = {name: option for name, option in options.items() if name not in decays}
    scale = o.scale_by_sophia if o is fo else o.contrib._sophia.scale_by_sophia
    return o.chain(scale(**rest), o.scale(-0.1))


def whole(o: Any, **options: Any) -> Any:
    return (o if o is fo else o.contrib).sophia(0.1, **options)


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(make, id=name, marks=compares(name, reference=OPTAX))
        for name, make in (("sophia", whole), ("scale_by_sophia", direction))
    ],
)
@pytest.mark.parametrize("options", SOPHIA)
@pytest.mark.parametrize("known", [True, False], ids=["known", "hutchinson"])
def test_sophia_equals_optax(
    make: Callable[..., Any], options: dict, known: bool
) -> None:
    """With a diagonal that is given, and with that of Hutchinson, which is exact for a diagonal
    Hessian whatever the signs are.
    """
    given = optax.GradientTransformationExtraArgs(
        lambda params: (),
        lambda updates, state, params, **extra: (second_derivative(jnp, params), state),
    )
    exact = (lambda obj_fn, params, key: second_derivative(torch, params), given)
    mine, theirs_fn = ({"hessian_diagonal_fn": f} if known else {} for f in exact)
    tx = make(fo, key=3, **options, **mine)
    theirs = jitted_with_loss(make(optax, **options, **theirs_fn))
    ps, state, their_ps = PARAMS, tx.init(PARAMS), to_jax(PARAMS)
    their_state = theirs.init(their_ps)
    for g in HUNDRED["grads"]:
        updates, state = tx.update(g, state, ps, obj_fn=lambda x: quartic(torch, x))
        ps = fo.apply_updates(ps, updates)
        their_updates, their_state = theirs.update(to_jax(g), their_state, their_ps)
        their_ps = optax.apply_updates(their_ps, their_updates)
        assert_same(updates, their_updates)
    assert_same(ps, their_ps)


def jitted_with_loss(tx: Any) -> Any:
    update = jax.jit(
        lambda g, state, params: tx.update(
            g, state, params, obj_fn=lambda x: quartic(jnp, x)
        )
    )
    return optax.GradientTransformation(tx.init, update)


PLATEAU = [
    {},
    {"factor": 0.5, "patience": 3, "rtol": 0.1},
    {"factor": 0.7, "patience": 2, "atol": 0.3, "cooldown": 4, "min_scale": 0.2},
    {"patience": 1, "accumulation_size": 3, "rtol": 0.0, "atol": 0.05, "factor": 0.9},
]


@compares("reduce_on_plateau", reference=OPTAX, remark="of values above zero")
@pytest.mark.parametrize("options", PLATEAU)
def test_reduce_on_plateau_equals_optax_for_positive_values(options: dict) -> None:
    tx = fo.chain(fo.sgd(0.1), fo.reduce_on_plateau(**options))
    theirs = optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau(**options))
    update = jax.jit(theirs.update)
    rng = np.random.default_rng(0)
    values = 3.0 + np.exp(-np.arange(100) / 10) + 0.2 * rng.standard_normal(100)
    ps, state, their_state = PARAMS, tx.init(PARAMS), theirs.init(to_jax(PARAMS))
    scales = set()
    for g, value in zip(HUNDRED["grads"], values, strict=True):
        updates, state = tx.update(g, state, ps, value=float(value))
        their_updates, their_state = update(to_jax(g), their_state, value=value)
        assert_same(updates, their_updates)
        scales.add(fo.get(state, "scale").item())
    assert len(scales) > 2


SHARPNESS = [
    {"sync_period": 2},
    {"sync_period": 4},
    {"sync_period": 3, "adv": lambda o: o.sgd(0.1, 0.9)},
    {"sync_period": 1},
]


@compares("sam", reference=OPTAX, remark="with `opaque_mode`")
@pytest.mark.parametrize("options", SHARPNESS)
def test_opaque_sam_equals_optax(options: dict) -> None:
    def make(o: Any, normalize: Any, sam: Any) -> Any:
        adv = options.get("adv", lambda o: o.chain(normalize(), o.sgd(0.05)))
        k = options["sync_period"]
        return sam(o.adam(0.1), adv(o), k, opaque_mode=True)

    tx = make(fo, fo.normalize, fo.sam)
    theirs = make(optax, optax.contrib.normalize, optax.contrib.sam)
    ps, state, their_ps = PARAMS, tx.init(PARAMS), to_jax(PARAMS)
    their_state = theirs.init(their_ps)
    slope = torch.func.grad(lambda x: quartic(torch, x) / 10)
    their_slope = jax.jit(jax.grad(lambda x: quartic(jnp, x) / 10))
    for _ in range(100):
        updates, state = tx.update(slope(ps), state, ps, grad_fn=lambda q, i: slope(q))
        ps = fo.apply_updates(ps, updates)
        their_updates, their_state = theirs.update(
            their_slope(their_ps),
            their_state,
            their_ps,
            grad_fn=lambda q, i: their_slope(q),
        )
        their_ps = optax.apply_updates(their_ps, their_updates)
        assert_same(ps, their_ps)


SPLIT = [
    *same(
        "split_real_and_imaginary",
        lambda o: o.clip_by_block_rms(0.5),
        lambda o: o.chain(o.clip_by_global_norm(1.0), o.adam(0.1)),
        lambda o: o.lamb(0.1, weight_decay=0.1),
        lambda o: o.lars(decay(o), 0.1, momentum=0.5),
    ),
    *same(
        "split_real_and_imaginary",
        lambda o: o.scale_by_factored_rms(min_dim_size_to_factor=2),
        **FLOAT32_DECAY,
    ),
]


@pytest.mark.parametrize("case", named(SPLIT))
def test_complex_values_are_split_as_in_optax(case: Case) -> None:
    """A complex matrix beside a real vector."""

    def drawn(seed: int) -> dict:
        w, v = draw(seed)["layer"]["w"], draw(seed + 500)["layer"]["w"]
        return {"w": torch.complex(w, v), "b": draw(seed)["layer"]["b"]}

    tx = fo.split_real_and_imaginary(case.ours(fo))
    theirs = optax.contrib.split_real_and_imaginary(case.theirs(optax))
    ps, state, their_ps = drawn(0), tx.init(drawn(0)), to_jax(drawn(0))
    their_state = theirs.init(their_ps)
    for step in range(1, STEPS + 1):
        updates, state = tx.update(drawn(step), state, ps)
        ps = fo.apply_updates(ps, updates)
        their_updates, their_state = theirs.update(
            to_jax(drawn(step)), their_state, their_ps
        )
        their_ps = optax.apply_updates(their_ps, their_updates)
        for name in ps:
            assert updates[name].dtype == drawn(0)[name].dtype
            assert_near(updates[name], their_updates[name], case.tolerance, name)
            assert_near(ps[name], their_ps[name], case.tolerance, name)


NOISY = [
    pytest.param(
        name,
        marks=compares(
            name, reference=OPTAX, remark="the variance: the draws are other ones"
        ),
    )
    for name in ("add_noise", "noisy_sgd")
]


@pytest.mark.parametrize(
    ("eta", "gamma"), [(0.01, 0.55), (2.0, 0.0), (0.5, 1.3), (1.0, 0.1)]
)
@pytest.mark.parametrize("name", NOISY)
def test_noise_has_the_variance_of_optax(name: str, eta: float, gamma: float) -> None:
    """With one key the numbers drawn do not depend on the variance: dividing by the noise of
    variance 1 leaves the standard deviation.
    """
    first = () if name == "add_noise" else (1.0,)
    deviations = []
    for o, run in ((fo, run_ours), (optax, run_theirs)):
        noise, unit = (
            arrays(run(getattr(o, name)(*first, eta=e, gamma=g, key=3), ZEROS)[0])
            for e, g in ((eta, gamma), (1.0, 0.0))
        )
        deviations.append({path: noise[path] / unit[path] for path in noise})
    assert_same(*deviations)
    at_first, at_last = deviations[0]["0/layer/w"], deviations[0][f"{STEPS - 1}/layer/w"]
    assert np.allclose(at_first, at_last) == (gamma == 0)


@pytest.mark.parametrize("name", ["add_noise", "noisy_sgd"])
def test_noise_is_standard_normal_at_unit_variance(name: str) -> None:
    """The numbers are others than optax's, but of the same distribution: two moments of 100 x 17
    draws, within four deviations.
    """
    tx = getattr(fo, name)(
        **({} if name == "add_noise" else {"learning_rate": 1.0}),
        eta=1.0,
        gamma=0.0,
        key=3,
    )
    drawn = np.concatenate([x.ravel() for x in arrays(run_ours(tx, ZEROS)[0]).values()])
    assert abs(drawn.mean()) < 4 / drawn.size**0.5
    assert abs((drawn**2).mean() - 1) < 4 * (2 / drawn.size) ** 0.5


# ---- schedules -----------------------------------------------------------------------------------

CYCLE = {"init_value": 0.1, "peak_value": 1.0, "warmup_steps": 5, "decay_steps": 30}


def curves(
    name: str, *expressions: Callable[[Any], Any]
) -> list[tuple[str, Callable[[Any], Any]]]:
    return [(name, expression) for expression in expressions]


SCHEDULES: list[tuple[str, Callable[[Any], Any]]] = [
    ("constant_schedule", lambda o: o.constant_schedule(0.3)),
    ("polynomial_schedule", lambda o: o.polynomial_schedule(0.1, 2.0, 2.5, 60)),
    (
        "polynomial_schedule",
        lambda o: o.polynomial_schedule(
            init_value=1.0,
            end_value=-1.0,
            power=0.5,
            transition_steps=40,
            transition_begin=17,
        ),
    ),
    ("linear_schedule", lambda o: o.linear_schedule(0.0, 1.0, 70)),
    ("linear_schedule", lambda o: o.linear_schedule(1.0, 0.1, 1, 30)),
    ("exponential_decay", lambda o: o.exponential_decay(0.7, 20, 0.3)),
    ("exponential_decay", lambda o: o.exponential_decay(0.7, 20, 0.3, 9, True)),
    (
        "exponential_decay",
        lambda o: o.exponential_decay(0.7, 20, 0.3, transition_begin=9, end_value=0.2),
    ),
    ("exponential_decay", lambda o: o.exponential_decay(0.7, 20, 1.3, end_value=1.1)),
    ("exponential_decay", lambda o: o.exponential_decay(0.7, 20, 1.3, end_value=0.2)),
    ("exponential_decay", lambda o: o.exponential_decay(0.7, 20, 1.0, end_value=0.5)),
    ("exponential_decay", lambda o: o.exponential_decay(-0.7, 20, 0.5, staircase=True)),
    ("cosine_decay_schedule", lambda o: o.cosine_decay_schedule(0.4, 80)),
    ("cosine_decay_schedule", lambda o: o.cosine_decay_schedule(0.4, 33, 0.2, 2.5)),
    (
        "join_schedules",
        lambda o: o.join_schedules(
            [
                o.linear_schedule(0.0, 1.0, 9),
                o.exponential_decay(1.0, 7, 0.5),
                o.constant_schedule(0.2),
            ],
            [12, 55],
        ),
    ),
    (
        "join_schedules",
        lambda o: o.join_schedules([o.cosine_decay_schedule(1.0, 50)], []),
    ),
    ("piecewise_constant_schedule", lambda o: o.piecewise_constant_schedule(0.4)),
    (
        "piecewise_constant_schedule",
        lambda o: o.piecewise_constant_schedule(0.4, {50: 0.1, 7: 3.0, 8: 0.5}),
    ),
    (
        "piecewise_interpolate_schedule",
        lambda o: o.piecewise_interpolate_schedule(
            "linear", 0.4, {50: 0.1, 7: 3.0, 8: 0.5}
        ),
    ),
    (
        "piecewise_interpolate_schedule",
        lambda o: o.piecewise_interpolate_schedule("cosine", 0.4, {50: 0.1, 7: 3.0}),
    ),
    ("warmup_constant_schedule", lambda o: o.warmup_constant_schedule(0.1, 0.9, 25)),
    (
        "warmup_cosine_decay_schedule",
        lambda o: o.warmup_cosine_decay_schedule(0.0, 0.9, 10, 90),
    ),
    (
        "warmup_cosine_decay_schedule",
        lambda o: o.warmup_cosine_decay_schedule(0.1, 0.9, 10, 70, 0.05, 1.5),
    ),
    (
        "warmup_cosine_decay_schedule",
        lambda o: o.warmup_cosine_decay_schedule(0.1, 0.9, 0, 70, end_value=0.05),
    ),
    (
        "warmup_cosine_decay_schedule",
        lambda o: o.warmup_cosine_decay_schedule(0.2, 0.0, 10, 70),
    ),
    (
        "warmup_exponential_decay_schedule",
        lambda o: o.warmup_exponential_decay_schedule(0.0, 0.9, 10, 20, 0.5),
    ),
    (
        "warmup_exponential_decay_schedule",
        lambda o: o.warmup_exponential_decay_schedule(
            0.0, 0.9, 10, 20, 0.5, 5, True, 0.2
        ),
    ),
    (
        "warmup_exponential_decay_schedule",
        lambda o: o.warmup_exponential_decay_schedule(0.0, 0.9, 0, 20, 0.5),
    ),
    ("linear_onecycle_schedule", lambda o: o.linear_onecycle_schedule(90, 0.6)),
    (
        "linear_onecycle_schedule",
        lambda o: o.linear_onecycle_schedule(77, 0.6, 0.45, 0.7, 4.0, 10.0),
    ),
    ("cosine_onecycle_schedule", lambda o: o.cosine_onecycle_schedule(90, 0.6)),
    (
        "cosine_onecycle_schedule",
        lambda o: o.cosine_onecycle_schedule(77, 0.6, 0.45, 4.0, 10.0),
    ),
    (
        "sgdr_schedule",
        lambda o: o.sgdr_schedule(
            [
                CYCLE,
                {**CYCLE, "peak_value": 0.5, "warmup_steps": 0},
                {**CYCLE, "decay_steps": 20, "end_value": 0.2},
            ]
        ),
    ),
    *curves(
        "constant_schedule",
        lambda o: o.constant_schedule(-2.0),
        lambda o: o.constant_schedule(0.0),
        lambda o: o.constant_schedule(value=1e-8),
    ),
    *curves(
        "polynomial_schedule",
        lambda o: o.polynomial_schedule(0.0, 3.0, 1.0, 1),
        lambda o: o.polynomial_schedule(-1.0, 0.5, 4, 30, 60),
    ),
    *curves(
        "linear_schedule",
        lambda o: o.linear_schedule(-1.0, 2.0, transition_steps=50, transition_begin=49),
        lambda o: o.linear_schedule(0.3, 0.3, 10),
    ),
    *curves(
        "cosine_decay_schedule",
        lambda o: o.cosine_decay_schedule(-0.4, 1),
        lambda o: o.cosine_decay_schedule(1.0, 100, alpha=1.5, exponent=0.5),
    ),
    *curves(
        "join_schedules",
        lambda o: o.join_schedules([o.constant_schedule(0.1), lambda t: 0.01 * t], [1]),
        lambda o: o.join_schedules(
            [o.linear_schedule(float(i), 0.0, 9) for i in range(5)], [3, 4, 60, 90]
        ),
    ),
    *curves(
        "piecewise_constant_schedule",
        lambda o: o.piecewise_constant_schedule(-1.0, {1: 2.0}),
        lambda o: o.piecewise_constant_schedule(1.0, {30: 0.0, 60: 5.0}),
    ),
    *curves(
        "piecewise_interpolate_schedule",
        lambda o: o.piecewise_interpolate_schedule("linear", -1.0, {100: 0.5}),
        lambda o: o.piecewise_interpolate_schedule("cosine", 1.0, {1: 2.0, 40: 0.0}),
    ),
    *curves(
        "warmup_constant_schedule",
        lambda o: o.warmup_constant_schedule(0.0, 1.0, 1),
        lambda o: o.warmup_constant_schedule(1.0, 0.2, 60),
        lambda o: o.warmup_constant_schedule(-1.0, 0.0, warmup_steps=100),
    ),
    *curves(
        "warmup_exponential_decay_schedule",
        lambda o: o.warmup_exponential_decay_schedule(
            0.5, 0.1, 30, 1, 1.02, end_value=0.3
        ),
    ),
    *curves(
        "linear_onecycle_schedule",
        lambda o: o.linear_onecycle_schedule(120, 2.0, pct_start=0.1, pct_final=0.2),
        lambda o: o.linear_onecycle_schedule(
            50, 0.1, div_factor=1.0, final_div_factor=2.0
        ),
    ),
    *curves(
        "cosine_onecycle_schedule",
        lambda o: o.cosine_onecycle_schedule(120, 2.0, pct_start=0.1),
        lambda o: o.cosine_onecycle_schedule(
            50, 0.1, div_factor=1.0, final_div_factor=2.0
        ),
    ),
    *curves(
        "sgdr_schedule",
        lambda o: o.sgdr_schedule([CYCLE]),
        lambda o: o.sgdr_schedule([{**CYCLE, "init_value": 0.5, "exponent": 2.0}] * 5),
        lambda o: o.sgdr_schedule(
            [{**CYCLE, "peak_value": 1.0 / (i + 1)} for i in range(3)]
        ),
    ),
]


def linear_and_cosine(o: Any) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    return o.linear_schedule(0.1, 0.9, 40), o.cosine_decay_schedule(2.0, 70, 0.1)


def composed(
    ours: Callable[[Any, Any], Any],
    theirs: Callable[[Callable[[Any], Any], Callable[[Any], Any], Any], Any],
) -> Callable[[Any], Any]:
    """One of our combinations of two schedules, and the same by hand with optax's."""

    def make(o: Any) -> Callable[[Any], Any]:
        a, b = linear_and_cosine(o)
        return ours(a, b) if o is fo else lambda count: theirs(a, b, count)

    return make


def warm_up_then(
    init_value: float, peak_value: float, steps: int, decay: Callable[[Any], Any]
) -> Callable[[Any], Any]:
    """A warm-up, and then a function of the steps after it, with optax's schedules."""
    return optax.join_schedules(
        [optax.linear_schedule(init_value, peak_value, steps), decay], [steps]
    )


def stable_then(
    kind: str, decay: Callable[[Any], Any], warmup: int = 20, stable: int = 50
) -> Callable[[Any], Any]:
    """`warmup_stable_decay_schedule`, whose end takes 30 steps from 0.9 to 0.3."""

    def make(o: Any) -> Callable[[Any], Any]:
        if o is fo:
            return fo.warmup_stable_decay_schedule(
                0.1, 0.9, warmup, stable, 30, 0.3, kind
            )
        rest = o.join_schedules([o.constant_schedule(0.9), decay], [stable])
        return warm_up_then(0.1, 0.9, warmup, rest)

    return make


def falling_root(
    init_value: float, peak_value: float, steps: int
) -> Callable[[Any], Any]:
    """`inverse_sqrt_schedule`."""
    return lambda o: (
        fo.inverse_sqrt_schedule(init_value, peak_value, steps)
        if o is fo
        else warm_up_then(
            init_value,
            peak_value,
            steps,
            lambda t: peak_value * jnp.sqrt(steps / (t + steps)),
        )
    )


def up_and_down(low: float, high: float, up: int, down: int) -> Callable[[Any], Any]:
    """`cyclic_schedule`."""

    def make(o: Any) -> Callable[[Any], Any]:
        if o is fo:
            return fo.cyclic_schedule(low, high, up, down)
        rise, fall = o.linear_schedule(low, high, up), o.linear_schedule(high, low, down)
        cycle = o.join_schedules([rise, fall], [up])
        return lambda t: cycle(t % (up + down))

    return make


OURS: list[tuple[str, Callable[[Any], Any]]] = [
    *curves(
        "add_schedules",
        composed(lambda a, b: a + b + 0.5, lambda a, b, t: a(t) + b(t) + 0.5),
        composed(lambda a, b: 1.0 + a, lambda a, b, t: 1.0 + a(t)),
        composed(lambda a, b: a + -1.0 * b, lambda a, b, t: a(t) - b(t)),
        composed(
            lambda a, b: fo.add_schedules(b, lambda t: 0.01 * t),
            lambda a, b, t: b(t) + 0.01 * t,
        ),
    ),
    *curves(
        "multiply_schedules",
        composed(lambda a, b: -2.0 * a * b, lambda a, b, t: -2.0 * a(t) * b(t)),
        composed(lambda a, b: a * a, lambda a, b, t: a(t) ** 2),
        composed(lambda a, b: b * (a + 0.5), lambda a, b, t: b(t) * (a(t) + 0.5)),
        composed(
            lambda a, b: fo.multiply_schedules(0.1, lambda t: 0.99**t, b),
            lambda a, b, t: 0.1 * 0.99**t * b(t),
        ),
    ),
    *curves(
        "clip_schedule",
        *(
            composed(
                lambda a, b, low=low, high=high: fo.clip_schedule(a * b, low, high),
                lambda a, b, t, low=low, high=high: jnp.clip(a(t) * b(t), low, high),
            )
            for low, high in ((0.2, 0.7), (0.3, None), (None, 0.5), (0.4, 0.4))
        ),
    ),
    *curves(
        "shift_schedule",
        *(
            composed(
                lambda a, b, by=by: fo.shift_schedule(b, by),
                lambda a, b, t, by=by: b(jnp.maximum(t - by, 0)),
            )
            for by in (13, 1, 110, -20)
        ),
    ),
    *curves(
        "repeat_schedule",
        *(
            composed(
                lambda a, b, steps=steps: fo.repeat_schedule(b, steps),
                lambda a, b, t, steps=steps: b(t % steps),
            )
            for steps in (33, 1, 70, 500)
        ),
    ),
    *curves(
        "warmup_stable_decay_schedule",
        stable_then("linear", optax.linear_schedule(0.9, 0.3, 30)),
        stable_then("cosine", optax.cosine_decay_schedule(0.9, 30, 0.3 / 0.9)),
        stable_then("1-sqrt", lambda t: 0.9 - 0.6 * jnp.sqrt(jnp.clip(t, 0, 30) / 30)),
        stable_then("linear", optax.linear_schedule(0.9, 0.3, 30), 1, 7),
    ),
    *curves(
        "inverse_sqrt_schedule",
        falling_root(0.1, 0.9, 20),
        falling_root(0.0, 1.0, 1),
        falling_root(2.0, 0.5, 60),
        falling_root(0.0, -0.3, 10),
    ),
    *curves(
        "cyclic_schedule",
        up_and_down(0.1, 0.9, 10, 20),
        up_and_down(0.0, 1.0, 1, 1),
        up_and_down(0.5, 0.2, 40, 5),
        up_and_down(-1.0, 1.0, 200, 10),
    ),
]
"""What optax has no name for, and how it is written with optax."""

REFUSED: list[tuple[str, Callable[[Any], Any]]] = [
    ("optax stays at the first value for ever", lambda o: o.linear_schedule(0.5, 1.0, 0)),
    (
        "optax stays at the first value for ever",
        lambda o: o.polynomial_schedule(0.5, 1.0, 2.0, -3),
    ),
    (
        "optax stays at the first value for ever",
        lambda o: o.exponential_decay(0.5, 0, 0.9),
    ),
    (
        "optax stays at the first value for ever",
        lambda o: o.exponential_decay(0.5, 10, 0.0),
    ),
    ("optax takes it for 0", lambda o: o.linear_schedule(0.5, 1.0, 10, -3)),
    (
        "0^0 is 1: optax never leaves the first value",
        lambda o: o.polynomial_schedule(0.5, 1.0, 0.0, 10),
    ),
    (
        "optax skips the first schedule",
        lambda o: o.join_schedules(
            [o.constant_schedule(1.0), o.constant_schedule(2.0)], [0]
        ),
    ),
    (
        "optax skips the second schedule",
        lambda o: o.join_schedules(
            [o.constant_schedule(float(i)) for i in range(3)], [5, 5]
        ),
    ),
    (
        "optax never reaches the last schedule",
        lambda o: o.join_schedules([o.constant_schedule(1.0)] * 2, []),
    ),
    (
        "optax scales from the start: write it into the first value",
        lambda o: o.piecewise_constant_schedule(1.0, {0: 0.5}),
    ),
    (
        "in optax the first two pieces are one and the peak is never reached",
        lambda o: o.linear_onecycle_schedule(3, 1.0),
    ),
    ("steps are whole numbers", lambda o: o.linear_schedule(0.5, 1.0, 10.0)),
]
"""What optax takes and we refuse when it is made, since it cannot be meant."""


def values_of(
    make: Callable[[Any], Any], last: int = 120
) -> tuple[np.ndarray, np.ndarray]:
    theirs = make(optax)
    return make(fo)(torch.arange(last)).numpy(), np.asarray(
        jax.vmap(lambda count: jnp.asarray(theirs(count), jnp.float64))(jnp.arange(last))
    )


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(make, id=f"{name}-{i}", marks=compares(name, reference=source))
        for source, table in ((OPTAX, SCHEDULES), (f"of {OPTAX}'s, by hand", OURS))
        for i, (name, make) in enumerate(table)
    ],
)
def test_schedule_equals_optax(make: Callable[[Any], Any]) -> None:
    ours, theirs = values_of(make)
    assert_near(ours, theirs)


@pytest.mark.parametrize(
    ("reason", "make"),
    REFUSED,
    ids=[f"{i}-{reason}" for i, (reason, _) in enumerate(REFUSED)],
)
def test_refused_here_and_not_in_optax(reason: str, make: Callable[[Any], Any]) -> None:
    with pytest.raises(ValueError, match=r"must be|one boundary fewer"):
        make(fo)
    make(optax)(3)


def test_warmup_of_no_steps_is_at_the_peak_and_not_in_optax() -> None:
    ours, theirs = values_of(lambda o: o.warmup_constant_schedule(0.1, 0.9, 0))
    assert (ours == 0.9).all()
    assert (theirs == 0.1).all()


def test_a_peak_of_0_decays_to_the_end_value_and_not_in_optax() -> None:
    ours, theirs = values_of(
        lambda o: o.warmup_cosine_decay_schedule(0.1, 0.0, 5, 20, 0.3)
    )
    assert (ours[-1], theirs[-1]) == (0.3, 0.0)


def test_every_schedule_of_optax_is_here() -> None:
    factories = {
        name
        for name, value in vars(optax.schedules).items()
        if inspect.isfunction(value) and not name.startswith("inject")
    }
    assert factories == {name for name, _ in SCHEDULES}


@pytest.mark.parametrize("o", [fo, optax], ids=["fo", "optax"])
def test_negative_scales_are_refused_as_in_optax(o: Any) -> None:
    with pytest.raises(ValueError, match=r"0 or greater|non-negative"):
        o.piecewise_constant_schedule(1.0, {10: -0.5})


# ---- complete ------------------------------------------------------------------------------------


def test_every_public_name_is_compared_or_explained() -> None:
    compared, registered = {case.name for case in CASES}, {row.name for row in ROWS}
    assert not compared & DIVERGENCES.keys()
    assert compared | DIVERGENCES.keys() == registered
    shown = {"preview"}  # a picture
    assert {name for name, _ in SCHEDULES + OURS} == set(schedules.__all__) - shown
