"""Gradients of single examples against loops over `torch.func.grad`, and the memory they take."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import bounded
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, vmap
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

import functorch_opt as fo
from functorch_opt import tree


def close(a: Any, b: Any, rtol: float = 1e-10, atol: float = 1e-12) -> None:
    assert tree.flatten(a)[1] == tree.flatten(b)[1]
    for path, x, y in zip(
        tree.paths(a), tree.flatten(a)[0], tree.flatten(b)[0], strict=True
    ):
        assert (x is None) == (y is None), path
        if x is not None:
            torch.testing.assert_close(
                x, y, rtol=rtol, atol=atol, msg=lambda m, path=path: f"{path!r}: {m}"
            )


# ---- models and losses ---------------------------------------------------------------------------


class Model(NamedTuple):
    apply: Callable[[Any, Tensor], Tensor]
    params: Any
    shape: tuple[int, ...]
    """Of an input."""


def of_module(module: nn.Module, shape: tuple[int, ...]) -> Model:
    module = module.double()
    return Model(
        lambda ps, x: functional_call(module, ps, x),
        {name: p.detach() for name, p in module.named_parameters()},
        shape,
    )


def models() -> dict[str, Model]:
    torch.manual_seed(0)
    w, b = torch.randn(4, 3, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    return {
        "function": Model(
            lambda ps, x: torch.tanh(x @ ps["w"]) + ps["rest"][0],
            {"w": w, "rest": [b, None]},
            (4,),
        ),
        "bare tensor": Model(lambda p, x: x @ p, w, (4,)),
        "mlp": of_module(
            nn.Sequential(
                nn.Flatten(), nn.Linear(4, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 3)
            ),
            (2, 2),
        ),
        "conv": of_module(
            nn.Sequential(
                nn.Conv2d(2, 4, 2),
                nn.GroupNorm(2, 4),
                nn.Tanh(),
                nn.Conv2d(4, 2, 2, groups=2),
                nn.Flatten(),
                nn.Linear(8, 3),
            ),
            (2, 4, 4),
        ),
    }


MODELS = models()
TARGETS = torch.eye(3, dtype=torch.float64)
LOSSES: dict[str, Callable[[Tensor, Tensor, str], Tensor]] = {
    "mse": lambda out, y, reduction: F.mse_loss(out, TARGETS[y], reduction=reduction),
    "cross entropy": lambda out, y, reduction: F.cross_entropy(
        out, y, reduction=reduction
    ),
    "huber": lambda out, y, reduction: F.huber_loss(
        out, TARGETS[y], reduction=reduction, delta=0.5
    ),
}


def problem(
    model: str, loss: str, n: int, reduction: str = "sum"
) -> tuple[Callable[..., Tensor], Any, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(n, *MODELS[model].shape, generator=generator, dtype=torch.float64)
    y = torch.randint(3, (n,), generator=generator)
    return (
        lambda ps, x, y: LOSSES[loss](MODELS[model].apply(ps, x), y, reduction),
        MODELS[model].params,
        x,
        y,
    )


def gradient(loss: Callable[..., Tensor], params: Any, *rest: Any) -> Any:
    """``grad`` for a tree with None in it."""
    ps, spec = tree.flatten(params)
    here = [i for i, p in enumerate(ps) if p is not None]

    def of_present(present: list[Tensor]) -> Tensor:
        found = dict(zip(here, present, strict=True))
        return loss(tree.unflatten(spec, [found.get(i) for i in range(len(ps))]), *rest)

    found = dict(zip(here, grad(of_present)([ps[i] for i in here]), strict=True))
    return tree.unflatten(spec, [found.get(i) for i in range(len(ps))])


problems = st.tuples(
    st.sampled_from([*MODELS]), st.sampled_from([*LOSSES]), st.integers(1, 7)
)
chunk_sizes = st.one_of(st.none(), st.integers(1, 8))


# ---- the law -------------------------------------------------------------------------------------


@bounded
@given(problems, chunk_sizes)
def test_the_sum_is_the_gradient_of_the_batch(
    of: tuple[str, str, int], chunk_size: int | None
) -> None:
    loss, params, x, y = problem(*of)
    each = fo.per_example_grads(loss, chunk_size)(params, x, y)
    assert all(
        g.shape == (len(x), *p.shape)
        for g, p in zip(tree.leaves(each), tree.leaves(params), strict=True)
    )
    close(tree.map(lambda g: g.sum(0), each), gradient(loss, params, x, y))
    loss, *_ = problem(*of, reduction="mean")
    close(
        tree.map(
            lambda g: g.mean(0), fo.per_example_grads(loss, chunk_size)(params, x, y)
        ),
        gradient(loss, params, x, y),
    )


@bounded
@given(
    problems,
    chunk_sizes,
    st.lists(st.sampled_from([0.0, 1.0, -0.5, 2.0]), min_size=7, max_size=7),
)
def test_the_weighted_sum_is_the_gradient_of_the_weighted_loss(
    of: tuple[str, str, int], chunk_size: int | None, weights: list[float]
) -> None:
    loss, params, x, y = problem(*of)
    w = torch.tensor(weights[: len(x)], dtype=torch.float64)

    def weighted(ps: Any) -> Tensor:
        return sum(w[i] * loss(ps, x[i : i + 1], y[i : i + 1]) for i in range(len(x)))

    clipped = fo.clipped_grad_sum(loss, math.inf, chunk_size)(params, x, y, weights=w)
    close(clipped.sum, gradient(weighted, params))
    close(
        clipped.values,
        torch.stack([loss(params, x[i : i + 1], y[i : i + 1]) for i in range(len(x))]),
    )


@bounded
@given(problems, chunk_sizes, st.booleans())
def test_each_gradient_is_clipped_as_a_whole(
    of: tuple[str, str, int], chunk_size: int | None, weighted: bool
) -> None:
    loss, params, x, y = problem(*of)
    each = [gradient(loss, params, x[i : i + 1], y[i : i + 1]) for i in range(len(x))]
    w = (
        torch.linspace(-1, 2, len(x), dtype=torch.float64)
        if weighted
        else torch.ones(len(x), dtype=torch.float64)
    )
    each = [tree.map(lambda g, i=i: w[i] * g, g) for i, g in enumerate(each)]
    norms = torch.stack([tree.norm(g) for g in each])
    bound = float(norms.median())
    by_hand = tree.map(
        lambda *gs: sum(
            g * min(1, bound / max(norm, 1e-300))
            for g, norm in zip(gs, norms, strict=True)
        ),
        *each,
    )
    clipped = fo.clipped_grad_sum(loss, bound, chunk_size)(
        params, x, y, weights=w if weighted else None
    )
    close(clipped.sum, by_hand)
    close(clipped.norms, norms)
    from_the_tree = fo.clip_and_sum(
        fo.per_example_grads(loss)(params, x, y), bound, w if weighted else None
    )
    close((clipped.sum, clipped.norms), (from_the_tree.sum, from_the_tree.norms))


def test_the_data_exercises_the_clip() -> None:
    for model in MODELS:
        loss, params, x, y = problem(model, "cross entropy", 7)
        norms = fo.clipped_grad_sum(loss, 1.0)(params, x, y).norms
        assert norms.min() > 1e-3 and norms.max() > 1.2 * norms.min()


# ---- parts, and batches of every kind ------------------------------------------------------------


def test_parts_are_clipped_by_their_own_norms() -> None:
    generator = torch.Generator().manual_seed(0)
    grads = {
        "encoder": {
            "w": torch.randn(5, 2, 3, generator=generator),
            "b": torch.randn(5, 3, generator=generator),
        },
        "head": None,
    }
    grads["head"] = [torch.randn(5, generator=generator), None]
    bounds = {"encoder": 2.6, "head": 0.4}
    clipped = fo.clip_and_sum(grads, bounds)
    for name, bound in bounds.items():
        alone = fo.clip_and_sum(grads[name], bound)
        close((clipped.sum[name], clipped.norms[name]), (alone.sum, alone.norms))
        assert (alone.norms > bound).any() and (alone.norms < bound).any()
    assert clipped.sum["head"][1] is None
    with pytest.raises(ValueError, match=r"at 'decoder' l2_norm_clip has 1\.0"):
        fo.clip_and_sum(grads, {"encoder": 1.0, "decoder": 1.0})


def test_a_part_without_gradients_has_norm_zero() -> None:
    clipped = fo.clip_and_sum({"a": torch.ones(2, 3), "b": None}, {"a": 1.0, "b": 1.0})
    assert clipped.sum["b"] is None and clipped.norms["b"].tolist() == [0, 0]


def test_batches_may_be_trees() -> None:
    w = torch.randn(4, 3, dtype=torch.float64)

    def loss(w: Tensor, batch: dict[str, Any], y: Tensor) -> Tensor:
        assert batch["mask"] is None
        return ((batch["x"] @ w).sum(1) * batch["scale"][0] - y).square().sum()

    x, scale, y = (
        torch.randn(5, 4, dtype=torch.float64),
        torch.rand(5, dtype=torch.float64),
        torch.randn(5, dtype=torch.float64),
    )
    grads = fo.per_example_grads(loss, chunk_size=2)(
        w, {"x": x, "scale": [scale], "mask": None}, y
    )
    close(grads.sum(0), gradient(loss, w, {"x": x, "scale": [scale], "mask": None}, y))


@pytest.mark.parametrize("chunk_size", [None, 4])
def test_an_empty_batch_gives_zeros(chunk_size: int | None) -> None:
    loss, params, x, y = problem("conv", "mse", 3)
    clipped = fo.clipped_grad_sum(loss, 1.0, chunk_size)(
        params, x[:0], y[:0], weights=torch.zeros(0)
    )
    close(clipped.sum, tree.map(torch.zeros_like, params))
    assert clipped.norms.shape == clipped.values.shape == (0,)
    assert fo.per_example_grads(loss, chunk_size)(params, x[:0], y[:0])[
        "0.weight"
    ].shape == (
        0,
        *params["0.weight"].shape,
    )


def test_low_precision_is_summed_in_float32() -> None:
    grads = torch.full((3000, 2), 1 / 64, dtype=torch.bfloat16)
    clipped = fo.clip_and_sum(grads, 100.0)
    assert clipped.sum.dtype == clipped.norms.dtype == torch.float32
    close(
        clipped.sum, torch.full((2,), 3000 / 64), rtol=1e-6
    )  # in bfloat16 the sum would stop growing at 4


def test_complex_gradients_are_clipped_by_their_modulus() -> None:
    grads = torch.tensor([[3 + 4j], [0.3j]], dtype=torch.complex128)
    clipped = fo.clip_and_sum(grads, 1.0)
    close(clipped.sum, torch.tensor([0.6 + 1.1j], dtype=torch.complex128))
    assert clipped.norms.dtype == torch.float64


def test_dropout() -> None:
    def loss(w: Tensor, x: Tensor) -> Tensor:
        return F.dropout(x * w, 0.5).sum()

    w, x = torch.ones(64), torch.ones(6, 64)
    with pytest.raises(RuntimeError, match="randomness"):
        fo.per_example_grads(loss)(w, x)
    torch.manual_seed(0)
    each = fo.per_example_grads(loss, chunk_size=3, randomness="different")(w, x)
    assert len({tuple(g.tolist()) for g in each}) == 6
    each = fo.per_example_grads(loss, randomness="same")(w, x)
    assert len({tuple(g.tolist()) for g in each}) == 1 and each.unique().tolist() == [
        0,
        2,
    ]


def test_what_is_not_finite_is_not_hidden() -> None:
    assert fo.clip_and_sum(torch.tensor([[1.0], [math.inf]]), 1.0).sum.isnan().all()
    assert fo.clip_and_sum(torch.tensor([[1.0], [math.nan]]), 1.0).sum.isnan().all()


# ---- pure, and transformable ---------------------------------------------------------------------


def test_nothing_given_is_changed() -> None:
    loss, params, x, y = problem("conv", "mse", 5)
    given = (params, x, y, torch.rand(5, dtype=torch.float64))
    before = copy.deepcopy(given)
    fo.clipped_grad_sum(loss, 0.1, 2)(*given[:3], weights=given[3])
    close(given, before, rtol=0, atol=0)


@pytest.mark.parametrize("model", ["function", "conv"])
def test_vmapped_over_models_equals_a_loop(model: str) -> None:
    loss, params, x, y = problem(model, "cross entropy", 5)
    several = [tree.map(lambda p, f=f: p * f, params) for f in (0.5, 1.0, 2.0)]
    bounds = torch.tensor([0.1, 0.5, 1.0], dtype=torch.float64)

    def clipped(leaves: list[Tensor], bound: Tensor) -> Any:
        found = iter(leaves)
        return tree.leaves(
            fo.clipped_grad_sum(loss, bound, 2)(
                tree.map(lambda _: next(found), params), x, y
            )[:2]
        )

    leaves = [tree.leaves(p) for p in several]
    batched = vmap(clipped)(
        [torch.stack(row) for row in zip(*leaves, strict=True)], bounds
    )
    looped = [clipped(p, bound) for p, bound in zip(leaves, bounds, strict=True)]
    close(batched, [torch.stack(row) for row in zip(*looped, strict=True)])


def test_differentiable_through_the_clip() -> None:
    """A learned clip, and a gradient of gradients, against finite differences; one example is at a
    minimum, its gradient zero.
    """
    x = torch.tensor([[1.0, 2.0], [0.5, -1.0], [0.0, 0.0]], dtype=torch.float64)
    y = torch.tensor([1.0, -2.0, 0.0], dtype=torch.float64)

    def moved(w: Tensor, bound: Tensor) -> Tensor:
        return (
            fo.clipped_grad_sum(
                lambda w, x, y: ((x @ w).sin() - y).square().sum(), bound, 2
            )(w, x, y)
            .sum.square()
            .sum()
        )

    point = (
        torch.tensor([0.3, -0.2], dtype=torch.float64),
        torch.tensor(1.0, dtype=torch.float64),
    )
    torch.autograd.gradcheck(moved, tuple(p.requires_grad_() for p in point))
    exact = jacrev(moved, argnums=(0, 1))(*point)
    assert all(g.isfinite().all() and (g != 0).all() for g in exact)


@pytest.mark.slow
def test_one_graph() -> None:
    """The whole step of private training, traced: no graph break, and no second graph for other
    values.
    """
    torch._dynamo.reset()
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    loss, params, x, y = problem("mlp", "cross entropy", 5)
    clipped_grads = fo.clipped_grad_sum(loss, 0.1, 2)
    tx = fo.dpsgd(0.1, 0.1, 1.0, key=0, momentum=0.9, expected_batch_size=5.0)

    def step(params: Any, state: Any, x: Tensor, y: Tensor) -> Any:
        clipped = clipped_grads(params, x, y)
        updates, state = tx.update(clipped, state, params)
        return fo.apply_updates(params, updates), state, clipped.norms

    compiled = torch.compile(step, backend=backend, fullgraph=True)
    ours, theirs = (params, tx.init(params)), (params, tx.init(params))
    for i in range(3):
        *ours, norms = step(*ours, x + i, y)
        *theirs, other = compiled(*theirs, x + i, y)
        close((ours, norms), (theirs, other))
    assert len(graphs) == 1


# ---- memory --------------------------------------------------------------------------------------


def most_alive(call: Callable[[], Any]) -> int:
    """The most bytes alive at a time during a call, beside what was there before."""
    call()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    alive = most = 0
    for event in sorted(
        (e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"),
        key=lambda e: e.start_ns(),
    ):
        alive += event.nbytes()
        most = max(most, alive)
    return most


def test_memory_is_that_of_a_chunk() -> None:
    model = nn.Linear(100, 200)
    params = {name: p.detach() for name, p in model.named_parameters()}
    size = 4 * sum(p.numel() for p in params.values())

    def loss(params: Any, x: Tensor) -> Tensor:
        return functional_call(model, params, x).square().sum()

    x = torch.randn(64, 100)
    fused = {
        (n, c): most_alive(
            lambda n=n, c=c: fo.clipped_grad_sum(loss, 1.0, c)(params, x[:n])
        )
        for n in (32, 64)
        for c in (4, 8)
    }
    tree_too = most_alive(lambda: fo.per_example_grads(loss)(params, x))
    assert tree_too > 64 * size
    for (_, c), most in fused.items():
        assert (
            c * size < most < (c + 3.1) * size
        )  # gradients of a chunk, the running sum, and the sum of the chunk
    assert fused[64, 8] < 1.01 * fused[32, 8]


# ---- errors --------------------------------------------------------------------------------------

w, x3, x4 = torch.ones(2), torch.ones(3, 2), torch.ones(4, 2)


def loss_of(w: Tensor, x: Tensor, y: Tensor | None = None) -> Tensor:
    return (x @ w).sum()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: fo.per_example_grads(loss_of, chunk_size=0), ValueError, "chunk_size must be a whole number, 1 or greater.* got 0"),
        (lambda: fo.clipped_grad_sum(loss_of, 1.0, chunk_size=2.5), ValueError, "chunk_size must be a whole number.* got 2.5"),
        (lambda: fo.clipped_grad_sum(loss_of, 0.0), ValueError, "l2_norm_clip must be greater than 0; got 0.0"),
        (lambda: fo.clipped_grad_sum(loss_of, math.nan), ValueError, "l2_norm_clip must be greater than 0; got nan"),
        (lambda: fo.clipped_grad_sum(loss_of, {"a": -1.0}), ValueError, "l2_norm_clip at 'a' must be greater than 0; got -1.0"),
        (lambda: fo.clipped_grad_sum(loss_of, "1"), TypeError, "l2_norm_clip must be a number or a 0-dim tensor; got str '1'"),
        (lambda: fo.clipped_grad_sum(loss_of, {}), ValueError, "l2_norm_clip is an empty tree"),
        (lambda: fo.per_example_grads(loss_of)(w, x3, x4), ValueError, r"the same number of examples.*'0': 3, '1': 4"),
        (lambda: fo.per_example_grads(loss_of)(w), ValueError, r"every tensor of batch must.*got no tensor"),
        (lambda: fo.per_example_grads(loss_of)(w, x3, torch.tensor(1.0)), ValueError, "'1': a scalar"),
        (lambda: fo.per_example_grads(loss_of)(w, x3, 2), TypeError, "batch holds int 2 at '1'"),
        (lambda: fo.per_example_grads(loss_of)({"w": 1.0}, x3), TypeError, "params holds float 1.0 at 'w'"),
        (lambda: fo.clipped_grad_sum(loss_of, 1.0)(w, x3, weights=torch.ones(2)), ValueError, r"weights has shape \(2,\); there are 3"),
        (lambda: fo.clip_and_sum(x3, 1.0, torch.ones(3, 1)), ValueError, r"weights has shape \(3, 1\)"),
        (lambda: fo.clip_and_sum({"a": x3, "b": x4}, 1.0), ValueError, "every tensor of grads must.*'a': 3, 'b': 4"),
    ],
)  # fmt: skip
def test_errors(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
