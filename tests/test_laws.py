"""The laws of `docs/design.md`, over every row of the registry."""

from __future__ import annotations

import copy
import io
import math
import pickle

import pytest
import torch
from registry import ROWS, Row
from torch import Tensor
from torch.func import jacrev, vmap

import functorch_opt as fo
from functorch_opt import tree
from functorch_opt._core import leafwise as one_pass
from functorch_opt._core.rule import Leafwise

CASES = [
    pytest.param(row, variant, id=f"{row.id}{i or ''}")
    for row in ROWS
    for i, variant in enumerate(row.variants)
]
cases = pytest.mark.parametrize(("row", "variant"), CASES)


def params(dtype: torch.dtype = torch.float64, seed: int = 0) -> dict:
    """Nested random values in the shapes that matter: a matrix, a 4-D kernel, a vector, a scalar
    and an empty tensor.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    return {
        "conv": {"w": draw(2, 3, 1, 2), "b": draw(2)},
        "heads": [draw(3, 2), draw()],
        "none": draw(0, 2),
    }


def grads(step: int, dtype: torch.dtype = torch.float64) -> dict:
    return params(dtype, seed=1000 + step)


def run(
    tx: fo.GradientTransformation,
    steps: int,
    dtype: torch.dtype = torch.float64,
    start: int = 0,
    state=None,
    ps=None,
):
    """Train for `steps`; returns params, state, and the last updates."""
    ps = params(dtype) if ps is None else ps
    state = tx.init(ps) if state is None else state
    updates = None
    for step in range(start, start + steps):
        updates, state = tx.update(grads(step, dtype), state, ps)
        ps = fo.apply_updates(ps, updates)
    return ps, state, updates


def assert_same(a, b, **tolerance) -> None:
    left, right = tree.flatten(a), tree.flatten(b)
    assert left[1] == right[1]
    for path, x, y in zip(tree.paths(a), left[0], right[0], strict=True):
        assert (x is None) == (y is None), path
        if x is not None:
            torch.testing.assert_close(
                x,
                y,
                msg=lambda m, path=path: f"{path}: {m}",
                equal_nan=True,
                **(tolerance or {"rtol": 0, "atol": 0}),
            )


# ---- 1. pure -------------------------------------------------------------------------------------


@cases
def test_update_is_pure(row: Row, variant: dict) -> None:
    tx = row.build(variant)
    ps, state, _ = run(tx, 2)
    inputs = (grads(2), state, ps)
    before = copy.deepcopy(inputs)
    first, second = tx.update(*inputs), tx.update(*inputs)
    assert_same(first, second)
    assert_same(inputs, before)
    if row.keyed and not row.rounds:
        assert not torch.equal(
            tx.update(grads(2), first[1], ps)[0]["conv"]["w"], first[0]["conv"]["w"]
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@cases
def test_the_short_way_is_the_long_way(
    row: Row, variant: dict, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Leaves of one dtype go through all rules with nothing in between, with the same bits as the
    long way.
    """
    tx, short, taken = row.build(variant), one_pass._quickly, []

    def watched(*args):
        taken.append(short(*args))
        return taken[-1]

    monkeypatch.setattr(one_pass, "_quickly", watched)
    one = run(tx, 3, dtype)
    assert not any(done is None for done in taken), "no rule of the library is unusual"
    if type(tx) is Leafwise:
        assert len(taken) == 3 * len(tree.leaves(params()))
    monkeypatch.setattr(one_pass, "_quickly", lambda *args: None)
    assert_same(run(tx, 3, dtype), one)


@cases
def test_two_inits_share_nothing(row: Row, variant: dict) -> None:
    tx = row.build(variant)
    one, two = tx.init(params()), tx.init(params())
    assert_same(one, two)
    assert not {x.data_ptr() for x in tree.leaves(one) if x.numel()} & {
        x.data_ptr() for x in tree.leaves(two) if x.numel()
    }


# ---- 2. structure, shape, dtype ------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype",
    [
        torch.bfloat16,
        torch.float16,
        torch.float32,
        torch.float64,
        torch.complex64,
        torch.complex128,
    ],
    ids=str,
)
@cases
def test_structure_shape_and_dtype_stay(
    row: Row, variant: dict, dtype: torch.dtype
) -> None:
    tx = row.build(variant)
    ps = params(dtype)
    state = tx.init(ps)
    shapes = [
        (s, [(x.shape, x.dtype) for x in leaves]) for leaves, s in [tree.flatten(state)]
    ]
    for step in range(3):
        updates, state = tx.update(grads(step, dtype), state, ps)
        assert [
            (s, [(x.shape, x.dtype) for x in leaves])
            for leaves, s in [tree.flatten(state)]
        ] == shapes
        for p, u in zip(tree.leaves(ps), tree.leaves(updates), strict=True):
            assert u.shape == p.shape
            assert u.dtype in (p.dtype, tree.at_least_float32(p.dtype))
        ps = fo.apply_updates(ps, updates)
        assert all(p.dtype == dtype and p.isfinite().all() for p in tree.leaves(ps))


@cases
def test_complex_is_a_pair_of_reals(row: Row, variant: dict) -> None:
    if row.reads_shape or "mask" in variant:
        pytest.skip("looks at the shape, which a real view changes")
    tx = row.build(variant)
    complex_ps, real_ps = (
        params(torch.complex128),
        tree.map(torch.view_as_real, params(torch.complex128)),
    )
    a, b = tx.init(complex_ps), tx.init(real_ps)
    for step in range(3):
        gs = tree.map(lambda x: x * (1 + 0.5j), grads(step, torch.complex128))
        u, a = tx.update(gs, a, complex_ps)
        v, b = tx.update(tree.map(torch.view_as_real, gs), b, real_ps)
        assert_same(tree.map(torch.view_as_real, u), v, rtol=1e-12, atol=1e-12)


def test_a_conjugated_view_is_a_complex_tensor_like_any_other() -> None:
    """A rule for matrices may return one, and the next rule sees pairs of reals."""
    turned = fo.leafwise(lambda g: g.mH, kind="tensorwise")
    p = torch.randn(2, 2, dtype=torch.complex64)
    for after in (fo.scale(0.5), fo.cautious(fo.scale(0.5))):
        tx = fo.chain(turned, after)
        updates, _ = tx.update(p, tx.init(p), p)
        expected, _ = after.update(p.mH.resolve_conj(), after.init(p), p)
        assert torch.equal(updates, expected)


@pytest.mark.parametrize(
    ("row", "variant"), [case for case in CASES if case.values[0].reads_shape]
)
def test_slots_without_elements_last(row: Row, variant: dict) -> None:
    """Views of the real part have strides twice as large: after 62 steps torch cannot count them."""
    _, state, _ = run(row.build(variant), 66, torch.complex64)
    strides = [stride for x in tree.leaves(state) for stride in x.stride()]
    assert max(strides, default=0) < 100


# ---- 3. vmap, grad, compile ----------------------------------------------------------------------


@cases
def test_vmap_equals_a_loop(row: Row, variant: dict) -> None:
    """Three models with their own params, gradients, keys and hyperparameters."""
    varied = {
        name: torch.tensor([value * f for f in (0.5, 0.9, 1.0)], dtype=torch.float64)
        for name, value in row.hyper.items()
        if not callable(variant.get(name, 0.0)) and name not in variant
    }
    if row.keyed:
        varied["key"] = fo.random.split(fo.random.key(3), 3)
    stack = [params(seed=i) for i in range(3)]
    gs = [[grads(10 * i + step) for i in range(3)] for step in range(3)]

    def train(hyper, ps, *gradients):
        tx = row.build(variant, **hyper)
        state = tx.init(ps)
        for g in gradients:
            updates, state = tx.update(g, state, ps)
            ps = fo.apply_updates(ps, updates)
        return ps, state

    def stacked(trees):
        return tree.map(lambda *xs: torch.stack(xs), *trees)

    batched = vmap(train)(varied, stacked(stack), *[stacked(g) for g in gs])
    looped = [
        train(
            {name: value[i] for name, value in varied.items()},
            stack[i],
            *[g[i] for g in gs],
        )
        for i in range(3)
    ]
    assert_same(batched, stacked(looped), rtol=1e-12, atol=1e-12)


@cases
def test_derivative_equals_finite_differences(row: Row, variant: dict) -> None:
    if not row.smooth:
        pytest.skip("not smooth")
    hyper = {
        name: torch.tensor(value, dtype=torch.float64)
        for name, value in row.hyper.items()
        if name not in variant
    }
    shift = torch.tensor(0.3, dtype=torch.float64)

    def after_three_steps(hyper, shift):
        tx = row.build(variant, **hyper)
        ps = tree.map(lambda p: p + shift, params())
        state = tx.init(ps)
        for step in range(3):
            updates, state = tx.update(
                tree.map(lambda g, p: g * (1 + 0.1 * shift) + 0.2 * p, grads(step), ps),
                state,
                ps,
            )
            ps = fo.apply_updates(ps, updates)
        return sum(p.sum() + (p**2).sum() for p in tree.leaves(ps))

    derivative = jacrev(after_three_steps, argnums=(0, 1))(hyper, shift)
    h = 1e-6
    for name in [*hyper, None]:

        def at(delta, name=name):
            moved = {n: v + delta if n == name else v for n, v in hyper.items()}
            return after_three_steps(moved, shift + delta if name is None else shift)

        finite = (at(h) - at(-h)) / (2 * h)
        exact = derivative[1] if name is None else derivative[0][name]
        torch.testing.assert_close(
            exact,
            finite,
            rtol=1e-5,
            atol=1e-6,
            msg=lambda m, name=name: f"{name or 'params'}: {m}",
        )


# ---- 5. missing and zero gradients ---------------------------------------------------------------


@cases
def test_missing_gradient_leaves_param_and_slots_alone(row: Row, variant: dict) -> None:
    if not row.passes_none:
        pytest.skip("a function of whole trees does as it likes")
    tx = row.build(variant)
    ps, state, _ = run(tx, 2)
    gs = grads(2)
    gs["conv"]["w"] = gs["heads"][1] = None
    updates, new = tx.update(gs, state, ps)
    assert updates["conv"]["w"] is None and updates["heads"][1] is None
    moved = fo.apply_updates(ps, updates)
    assert moved["conv"]["w"] is ps["conv"]["w"] and moved["heads"][1] is ps["heads"][1]
    old_flat, new_flat = fo.state_dict(state), fo.state_dict(new)
    for path, value in new_flat.items():
        if row.slots_rest and path.endswith(("conv/w", "heads/1")):
            assert torch.equal(value, old_flat[path]), path
    others = tree.leaves(gs)
    assert len(others) == 3


@cases
def test_a_param_that_is_none_is_nothing(row: Row, variant: dict) -> None:
    if not row.passes_none:
        pytest.skip("a function of whole trees does as it likes")
    tx = row.build(variant)
    ps, gs = params(), grads(0)
    ps["heads"][0] = gs["heads"][0] = None
    updates, state = tx.update(gs, tx.init(ps), ps)
    assert fo.apply_updates(ps, updates)["heads"][0] is None
    assert not [path for path in fo.state_dict(state) if path.endswith("heads/0")]


@cases
def test_zero_gradient_and_zero_learning_rate_move_nothing(
    row: Row, variant: dict
) -> None:
    tx = row.build(variant)
    ps, state = params(), None
    state = tx.init(ps)
    for _ in range(2):
        updates, state = tx.update(tree.map(torch.zeros_like, ps), state, ps)
        assert all(u.isfinite().all() for u in tree.leaves(updates))
    if "learning_rate" in row.hyper:
        tx = row.build({**variant, "learning_rate": 0.0})
        updates, _ = tx.update(tree.map(torch.zeros_like, ps), tx.init(ps), ps)
        assert_same(fo.apply_updates(ps, updates), ps)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@cases
def test_zero_gradient_is_finite_in_low_precision(
    row: Row, variant: dict, dtype: torch.dtype
) -> None:
    tx = row.build(variant)
    ps = params(dtype)
    updates, _ = tx.update(tree.map(torch.zeros_like, ps), tx.init(ps), ps)
    assert all(u.isfinite().all() for u in tree.leaves(updates))


# ---- 6. checkpoints ------------------------------------------------------------------------------


@cases
def test_resumed_equals_uninterrupted(row: Row, variant: dict) -> None:
    tx = row.build(variant)
    whole = run(tx, 5)
    ps, state, _ = run(tx, 3)
    file = io.BytesIO()
    torch.save({"params": ps, "state": fo.state_dict(state)}, file)
    file.seek(0)
    saved = torch.load(file)  # weights_only, the default
    again = row.build(variant)
    resumed = run(
        again,
        2,
        start=3,
        ps=saved["params"],
        state=fo.load_state_dict(again.init(params()), saved["state"]),
    )
    assert_same(resumed, whole)


@pytest.mark.parametrize(
    "row", [row for row in ROWS if row.written], ids=lambda row: row.id
)
def test_repr_reads_as_the_call_and_pickles(row: Row) -> None:
    tx = row.build()
    again = pickle.loads(pickle.dumps(tx))
    assert repr(again) == repr(tx)
    assert repr(eval(repr(tx), vars(fo))) == repr(tx)
    assert_same(run(again, 3), run(tx, 3))


# ---- 7. precision --------------------------------------------------------------------------------


def test_second_moment_decays_under_bfloat16_params() -> None:
    tx = fo.scale_by_adam()
    p = {"w": torch.zeros(1, dtype=torch.bfloat16)}
    state = tx.init(p)
    for _ in range(500):
        _, state = tx.update({"w": torch.ones(1, dtype=torch.bfloat16)}, state, p)
    nu = fo.get(state, "nu")["w"]
    assert nu.dtype == torch.float32
    torch.testing.assert_close(nu, torch.tensor([1 - 0.999**500]), rtol=1e-4, atol=0)


def test_moment_dtypes_overrule() -> None:
    state = fo.scale_by_adam(mu_dtype=torch.bfloat16, nu_dtype=torch.float64).init(
        {"w": torch.zeros(1)}
    )
    assert fo.get(state, "mu")["w"].dtype == torch.bfloat16
    assert fo.get(state, "nu")["w"].dtype == torch.float64


def test_the_data_exercises_the_laws() -> None:
    for step in range(4):
        assert all(
            g.numel() == 0 or (g.abs() > 1e-6).all() for g in tree.leaves(grads(step))
        )
    assert math.prod(grads(0)["none"].shape) == 0


# ---- 3 again: one graph --------------------------------------------------------------------------


class Counting:
    """A torch.compile backend that counts graphs and runs them as they are."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return graph.forward


@pytest.mark.slow
@cases
def test_compiles_to_one_graph_for_every_count_and_hyperparameter(
    row: Row, variant: dict
) -> None:
    """The whole step, transformation built inside: what changes between calls are tensors, so
    nothing recompiles.

    Two tensors are enough, for a graph has the rule once for each.
    """
    if row.unrolls:
        pytest.skip("its loop is unrolled, which takes long: see test_line_search.py")
    torch._dynamo.reset()
    backend = Counting()
    hyper = {
        name: torch.tensor(value, dtype=torch.float64)
        for name, value in row.hyper.items()
        if name not in variant
    }

    def step(hyper, gs, state, ps):
        updates, state = row.build(variant, **hyper).update(gs, state, ps)
        return fo.apply_updates(ps, updates), state

    compiled = torch.compile(step, fullgraph=True, backend=backend)
    ps, ours = params()["conv"], params()["conv"]
    state = mine = row.build(variant, **hyper).init(ps)
    for i in range(4):
        gs = grads(i)["conv"]
        ps, state = step(hyper, gs, state, ps)
        ours, mine = compiled(hyper, gs, mine, ours)
        assert_same((ours, mine), (ps, state), rtol=1e-12, atol=1e-12)
        if row.name != "inject_hyperparams":  # its hyperparameters are in the state
            hyper = {name: value * 0.9 for name, value in hyper.items()}
    assert backend.graphs == 1


def test_vmapped_init_and_update_compile_once() -> None:
    torch._dynamo.reset()
    tx, backend = fo.adamw(fo.linear_schedule(0.1, 0.0, 9)), Counting()
    ps = tree.map(lambda p: torch.stack([p, -p]), params())
    state, update = (
        vmap(tx.init)(ps),
        torch.compile(vmap(tx.update), fullgraph=True, backend=backend),
    )
    for i in range(3):
        _, state = update(tree.map(lambda g: torch.stack([g, g]), grads(i)), state, ps)
    assert backend.graphs == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["chain", "noisy_sgd", "partition"])
def test_inductor_gives_the_same_numbers(name: str) -> None:
    """The rows with the most kinds of work, through the real compiler: alone, and vmapped over
    three models.
    """
    torch._dynamo.reset()
    row = next(row for row in ROWS if row.name == name)
    tx = row.build()

    def step(gs, state, ps):
        updates, state = tx.update(gs, state, ps)
        return fo.apply_updates(ps, updates), state

    for transform, batch in (
        (lambda f: f, lambda t: t),
        (vmap, lambda t: tree.map(lambda x: torch.stack([x, 2 * x, -x]), t)),
    ):
        eager, compiled = transform(step), torch.compile(transform(step), fullgraph=True)
        ps = mine = batch(params(torch.float32))
        state = ours = transform(tx.init)(ps)
        for i in range(3):
            ps, state = eager(batch(grads(i, torch.float32)), state, ps)
            mine, ours = compiled(batch(grads(i, torch.float32)), ours, mine)
        assert_same((mine, ours), (ps, state), rtol=1e-5, atol=1e-6)
