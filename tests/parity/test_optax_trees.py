"""Functions of trees, projections and clips of examples against those of optax, in float64."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import functorch_opt as fo
from functorch_opt import projections, tree
from functorch_opt._elsewhere import OF_TREE

jax = pytest.importorskip("jax", reason="comparison with optax needs jax and optax")
optax = pytest.importorskip("optax", reason="comparison with optax needs jax and optax")
jnp = jax.numpy

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_enable_x64", True)


def draw(seed: int, dtype: torch.dtype = torch.float64) -> dict:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"w": (3, 4), "b": (4,), "s": ()}
    return {
        name: torch.randn(shape, generator=generator, dtype=dtype)
        for name, shape in shapes.items()
    }


def to_jax(x: Any) -> Any:
    if isinstance(x, dict):
        return {name: to_jax(leaf) for name, leaf in x.items()}
    if isinstance(x, torch.Tensor):
        return jnp.asarray(x.resolve_conj().numpy())
    return {torch.float32: jnp.float32}.get(x, x) if isinstance(x, torch.dtype) else x


def assert_same(ours: Any, theirs: Any, tolerance: float = 1e-10) -> None:
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        for name, x in ours.items():
            assert_same(x, theirs[name], tolerance)
        return
    if isinstance(ours, torch.Tensor):
        assert str(ours.dtype).removeprefix("torch.") == str(np.asarray(theirs).dtype)
    np.testing.assert_allclose(
        np.asarray(ours), np.asarray(theirs), rtol=tolerance, atol=tolerance
    )


A, B, C = draw(0), draw(1), draw(2)
Z = draw(3, torch.complex128)
POSITIVE = tree.map(lambda x: x.abs() + 0.1, A)
ONE = A["w"]
"""A tree that is a tensor: optax takes numbers as bounds of such trees only."""

ARITHMETIC: dict[str, list[tuple]] = {
    "add": [(A, B), (A, B, C), (Z, A)],
    "sub": [(A, B), (Z, A)],
    "mul": [(A, B), (Z, A)],
    "div": [(A, B), (Z, POSITIVE)],
    "scale": [(0.3, A), (-2.0, Z)],
    "add_scale": [(A, 0.3, B), (Z, -1.0, A)],
    "where": [(torch.tensor(True), A, B), (torch.tensor(False), A, B)],
    "clip": [(A, -0.5, 0.3), (A, None, 0.1), (A, 0.2)],
    "conj": [(Z,), (A,)],
    "real": [(Z,), (A,)],
    "sum": [(A,), (Z,)],
    "max": [(A,)],
    "min": [(A,)],
    "size": [(A,)],
    "vdot": [(A, B), (Z, Z), (Z, draw(4, torch.complex128))],
    "norm": [
        (A,),
        (Z,),
        (A, 1),
        (A, 2),
        (A, float("inf")),
        (A, None, True),
        (A, 1, True),
    ],
    "allclose": [
        (A, B),
        (A, A),
        (A, tree.map(lambda x: x + 1e-6, A)),
        (A, B, 10.0, 10.0),
    ],
    "full_like": [(A, 0.3), (A, 2.0, torch.float32)],
    "ones_like": [(A,), (A, torch.float32)],
    "batch_shape": [(A,), (A, (2,)), (A, (2, 3))],
    "cast": [(A, torch.float32), (A, None)],
    "cast_like": [(A, draw(0, torch.float32))],
    "update_moment": [(A, B, 0.9, 1), (A, B, 0.3, 2)],
    "update_moment_per_elem_norm": [
        (A, B, 0.9, 2),
        (Z, POSITIVE, 0.3, 2),
        (Z, B, 0.3, 3),
    ],
    "update_infinity_moment": [(A, POSITIVE, 0.9, 1e-8), (A, POSITIVE, 0.3, 0.5)],
    "bias_correction": [(A, 0.9, 1), (A, 0.3, 5), (A, 0.999, 100)],
}
OTHERS = {
    **OF_TREE,
    "get": "compared in test_wrappers.py: as map_params",
    "map_params": "compared in test_wrappers.py: the form of a state is another one",
    "random_like": "compared below: other draws, of the same form",
    "set": "compared in test_wrappers.py: as map_params",
}
"""Names of optax.tree that are not in `ARITHMETIC`, and what there is instead."""


@pytest.mark.parametrize(
    ("name", "given"),
    [(name, given) for name, rows in ARITHMETIC.items() for given in rows],
)
def test_arithmetic_equals_optax(name: str, given: tuple) -> None:
    ours = getattr(tree, name)(*given)
    theirs = getattr(optax.tree, name)(*map(to_jax, given))
    # optax works the correction out in the dtype of its int32 count, which is float32.
    assert_same(ours, theirs, 1e-6 if name == "bias_correction" else 1e-12)


@pytest.mark.parametrize(("params", "dtype"), [(A, None), (Z, None), (A, "float32")])
def test_random_like_has_the_form_of_optax(params: Any, dtype: str | None) -> None:
    """The numbers are others."""
    given = None if dtype is None else getattr(torch, dtype)
    ours = tree.random_like(fo.random.key(3), params, dtype=given)
    theirs = optax.tree.random_like(jax.random.key(3), to_jax(params), dtype=dtype)
    assert tree.paths(ours) == tree.paths(params)
    for x, y in zip(tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert (tuple(x.shape), str(x.dtype)) == (y.shape, f"torch.{y.dtype}")


def test_random_like_draws_what_it_is_told() -> None:
    like = {"a": torch.zeros(10_000), "none": None, "b": torch.zeros(10_000)}
    drawn = tree.random_like(fo.random.key(1), like)
    again = tree.random_like(fo.random.key(1), like)
    assert torch.equal(drawn["a"], again["a"]) and drawn["none"] is None
    for x in (drawn["a"], drawn["b"]):
        assert x.mean().abs() < 0.05 and (x.std() - 1).abs() < 0.05
    assert (drawn["a"] * drawn["b"]).mean().abs() < 0.05
    uniform = tree.random_like(fo.random.key(1), like, fo.random.uniform)["a"]
    assert (uniform.min(), uniform.max()) > (0, 0.99) and uniform.max() < 1
    mapped = torch.func.vmap(lambda key: tree.random_like(key, like)["b"])(
        fo.random.split(fo.random.key(1), 2)
    )
    assert (mapped[0] * mapped[1]).mean().abs() < 0.05
    with pytest.raises(TypeError, match="key"):
        tree.random_like(torch.zeros(3), like)


def test_a_condition_or_a_bound_may_be_a_tree_or_one_for_all() -> None:
    """Which optax does not take."""
    positive = tree.map(lambda x: x > 0, A)
    assert_same(
        tree.where(positive, A, tree.full_like(A, 0)), to_jax(tree.clip(A, 0.0, None))
    )
    boxed = to_jax(tree.clip(A, -0.5, 0.3))
    assert_same(
        projections.projection_box(A, -0.5, torch.tensor(0.3, dtype=torch.float64)), boxed
    )
    assert_same(projections.projection_box(A, tree.full_like(A, -0.5), 0.3), boxed)
    assert_same(projections.projection_hypercube(A), to_jax(tree.clip(A, 0.0, 1.0)))


def test_all_of_optax_tree_is_here_or_explained() -> None:
    theirs = {
        name
        for name, f in vars(optax.tree).items()
        if inspect.isfunction(f) or callable(f)
        if not name.startswith("_")
    }
    assert theirs == ARITHMETIC.keys() | OTHERS.keys()
    for name in ARITHMETIC:
        theirs = list(inspect.signature(getattr(optax.tree, name)).parameters)
        ours = list(inspect.signature(getattr(tree, name)).parameters)
        assert ours == theirs[: len(ours)], name
        assert theirs[len(ours) :] in ([], ["associative_reduction"]), name


# ---- projections ---------------------------------------------------------------------------------

PROJECTIONS: dict[str, list[tuple]] = {
    "projection_non_negative": [(A,)],
    "projection_box": [(ONE, -0.5, 0.3), (A, tree.map(lambda x: x - 1, B), B)],
    "projection_hypercube": [(ONE,), (ONE, 0.3), (ONE, POSITIVE["w"])],
    "projection_simplex": [(A,), (A, 0.3), (A, 20.0), (POSITIVE, 1.0)],
    "projection_l1_ball": [(A,), (A, 0.3), (A, 100.0)],
    "projection_l1_sphere": [(A,), (A, 0.3), (A, 100.0)],
    "projection_l2_ball": [(A,), (A, 0.3), (A, 100.0)],
    "projection_l2_sphere": [(A,), (A, 0.3), (A, 100.0)],
    "projection_linf_ball": [(A,), (A, 0.3), (A, 100.0)],
    "projection_vector": [(A, B), (A, A)],
    "projection_halfspace": [(A, B, 0.3), (A, B, -50.0), (A, B, 50.0)],
    "projection_hyperplane": [(A, B, 0.3), (A, B, -2.0)],
}


@pytest.mark.parametrize(
    ("name", "given"),
    [(name, given) for name, rows in PROJECTIONS.items() for given in rows],
)
def test_projections_equal_optax(name: str, given: tuple) -> None:
    ours, theirs = getattr(projections, name), getattr(optax.projections, name)
    assert_same(ours(*given), theirs(*map(to_jax, given)))
    for f, g in zip(
        *(inspect.signature(f).parameters.values() for f in (ours, theirs)), strict=True
    ):
        assert (f.name, f.default) == (g.name, g.default)


def test_all_projections_are_here() -> None:
    theirs = {n for n in vars(optax.projections) if n.startswith("projection_")}
    assert theirs == PROJECTIONS.keys() == set(projections.__all__)


@pytest.mark.parametrize(
    ("project", "inside"),
    [
        (projections.projection_simplex, lambda p: abs(tree.sum(p) - 1) < 1e-12),
        (projections.projection_l1_ball, lambda p: tree.norm(p, 1) <= 1 + 1e-12),
        (projections.projection_l1_sphere, lambda p: abs(tree.norm(p, 1) - 1) < 1e-12),
        (projections.projection_l2_ball, lambda p: tree.norm(p) <= 1 + 1e-12),
        (projections.projection_l2_sphere, lambda p: abs(tree.norm(p) - 1) < 1e-12),
    ],
)
def test_a_projection_is_the_nearest_point(project: Callable, inside: Callable) -> None:
    """No other point of the set is nearer: 300 points, some of them close by. Twice is once; and
    many trees are projected at once.
    """
    nearest = project(A)
    assert inside(nearest)
    assert_same(project(nearest), to_jax(nearest))
    distance = tree.norm(tree.sub(A, nearest))
    for seed in range(300):
        size = 10.0 ** -(seed % 5)
        other = project(tree.add_scale(nearest, size, draw(seed)))
        assert tree.norm(tree.sub(A, other)) >= distance - 1e-12
    many = torch.func.vmap(project)(tree.map(lambda *x: torch.stack(x), A, B))
    assert_same(tree.map(lambda x: x[1], many), to_jax(project(B)))


def test_zeros_have_no_nearest_point_on_a_sphere() -> None:
    zeros = tree.map(torch.zeros_like, A)
    assert_same(projections.projection_l2_sphere(zeros), to_jax(zeros))
    assert_same(projections.projection_l2_ball(zeros), to_jax(zeros))


# ---- examples ------------------------------------------------------------------------------------


def examples(seed: int, n: int = 6) -> dict:
    drawn = [draw(seed + i) for i in range(n - 1)] + [tree.map(torch.zeros_like, A)]
    return tree.map(lambda *x: torch.stack(x), *drawn)


@pytest.mark.parametrize("bound", [0.0, 0.5, 4.0, 1e6])
@pytest.mark.parametrize("uniform", [None, True, False])
def test_clips_of_examples_equal_optax(bound: float, uniform: bool | None) -> None:
    name = f"per_example_{'global' if uniform is None else 'layer'}_norm_clip"
    given = () if uniform is None else (uniform,)
    ours, counts = getattr(fo, name)(examples(0), bound, *given)
    theirs, their_counts = getattr(optax, name)(to_jax(examples(0)), bound, *given)
    assert_same(ours, theirs)
    for mine, other in zip(
        tree.leaves(counts), jax.tree.leaves(their_counts), strict=True
    ):
        assert mine.item() == other.item()


@pytest.mark.parametrize(
    "grads", [[torch.tensor(1.0)], [torch.ones(2, 3), torch.ones(3, 3)], [None]]
)
def test_what_has_no_examples(grads: list) -> None:
    for f in (fo.per_example_global_norm_clip, fo.per_example_layer_norm_clip):
        with pytest.raises(ValueError, match="axis of examples, which comes first"):
            f(grads, 1.0)


# ---- other functions -----------------------------------------------------------------------------


@pytest.mark.parametrize("step_size", [0.0, 0.005, 0.7, 1.0])
def test_incremental_update_equals_optax(step_size: float) -> None:
    theirs = optax.incremental_update(to_jax(A), to_jax(B), step_size)
    assert_same(fo.incremental_update(A, B, step_size), theirs)


@pytest.mark.parametrize(("steps", "period"), [(0, 5), (4, 5), (10, 5), (7, 1)])
def test_periodic_update_equals_optax(steps: int, period: int) -> None:
    theirs = optax.periodic_update(to_jax(A), to_jax(B), jnp.asarray(steps), period)
    assert_same(fo.periodic_update(A, B, steps, period), theirs)
    assert_same(fo.periodic_update(A, B, torch.tensor(steps), period), theirs)


@pytest.mark.parametrize("scale", [0.0, 0.3, -1.0])
def test_scale_gradient_equals_optax(scale: float) -> None:
    def ours(p: dict) -> torch.Tensor:
        return tree.sum(tree.map(torch.sin, fo.scale_gradient(p, scale)))

    def theirs(p: dict) -> Any:
        scaled = optax.scale_gradient(p, scale)
        return sum(jnp.sin(x).sum() for x in jax.tree.leaves(scaled))

    slope = torch.func.grad(ours)
    assert_same(slope(A), jax.grad(theirs)(to_jax(A)))
    both = torch.func.vmap(slope)(tree.map(lambda *x: torch.stack(x), A, B))
    assert_same(tree.map(lambda x: x[1], both), to_jax(slope(B)))
    x = A["w"].clone().requires_grad_()
    fo.scale_gradient(x, scale).sum().backward()
    assert (x.grad == scale).all()


def test_global_norm_equals_optax() -> None:
    assert_same(fo.global_norm(A), optax.tree.norm(to_jax(A)))
