"""Sums over a tensor that an elementwise rule reads equal those that a tensorwise rule computes
itself.
"""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.func import grad, vmap

import functorch_opt as fo
from functorch_opt import tree
from functorch_opt._execution.compiled import CompiledStep
from functorch_opt._execution.segments import PROGRAMS

# ---- one transformation, written both ways: it reads the update, the parameter, a slot, a hyperpar


def with_sums(weight: float | Tensor = 0.5) -> fo.GradientTransformation:
    sums = {
        "gg": lambda g, weight: weight * g.square().sum(),
        "pm": lambda p, mean: (p * mean).sum(),
        "signs": lambda g, other: (g * other > 0).to(g.dtype).sum(),
        "n": lambda g: g.numel(),
    }
    return fo.leafwise(
        _rule,
        _prepare,
        slots={"mean": tree.zeros_like},
        hyper={"weight": weight},
        sums=sums,
    )


def _prepare(count, *, other):
    return {"other": fo.Each(other), "t": tree.as_real(count + 1)}


def _rule(g, p, mean, gg, pm, signs, n, t):
    mean = torch.lerp(mean, g, 0.3)
    return g * gg / n + pm * p / t + mean * (signs / (n + 1)), {"mean": mean}


def with_the_whole_tensor(weight: float | Tensor = 0.5) -> fo.GradientTransformation:
    def rule(g, p, mean, weight, t, other):
        signs = (g * other > 0).to(g.dtype).sum()
        return _rule(
            g, p, mean, weight * (g**2).sum(), (p * mean).sum(), signs, g.numel(), t
        )

    return fo.leafwise(
        rule,
        _prepare,
        slots={"mean": tree.zeros_like},
        hyper={"weight": weight},
        kind="tensorwise",
    )


SHAPES = {
    "matrix": (5, 7),
    "long": (9001,),
    "one": (1,),
    "scalar": (),
    "empty": (0, 3),
    "thin": (6, 1),
}


def drawn(seed: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        for name, shape in SHAPES.items()
    }


def steps(
    tx: fo.GradientTransformation, dtype: torch.dtype = torch.float64
) -> list[dict[str, Tensor]]:
    ps = drawn(0, dtype)
    state, seen = tx.init(ps), []
    for i in range(3):
        updates, state = tx.update(
            drawn(i + 1, dtype), state, ps, other=drawn(i + 10, dtype)
        )
        ps = fo.apply_updates(ps, updates)
        seen.append(ps)
    return seen


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_the_same_as_a_tensorwise_rule(dtype: torch.dtype) -> None:
    ours, expected = steps(with_sums(), dtype), steps(with_the_whole_tensor(), dtype)
    torch.testing.assert_close(ours, expected)
    assert all((a["matrix"] - b["matrix"]).abs().max() > 0.1 for a, b in pairwise(ours))


def test_complex_tensors_are_pairs_of_reals() -> None:
    tx = fo.leafwise(lambda g, gg: g / gg.sqrt(), sums={"gg": lambda g: g.square().sum()})
    g = torch.tensor([3.0 + 0.0j, 0.0 + 4.0j])
    torch.testing.assert_close(tx.update([g], tx.init([g]))[0][0], g / 5)


def test_mapped_and_differentiated() -> None:
    ps, gs, other = (
        {n: x for n, x in drawn(i).items() if x.dim() == 2 and x.numel()}
        for i in (0, 1, 2)
    )

    def after(make, weight: Tensor, scale: Tensor) -> Tensor:
        tx = make(weight)
        updates, _ = tx.update(
            {n: scale * g for n, g in gs.items()}, tx.init(ps), ps, other=other
        )
        return sum(u.square().sum() for u in updates.values())

    weights, scales = (
        torch.tensor([0.5, 2.0, 0.1]).double(),
        torch.tensor([1.0, 0.3, 3.0]).double(),
    )
    for of in (after, grad(after, argnums=1), grad(after, argnums=2)):
        mapped = vmap(lambda w, s, of=of: of(with_sums, w, s))(weights, scales)
        expected = torch.stack(
            [
                of(with_the_whole_tensor, w, s)
                for w, s in zip(weights, scales, strict=True)
            ]
        )
        torch.testing.assert_close(mapped, expected)
        assert expected.abs().min() > 1e-3


@pytest.mark.parametrize(
    "backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)]
)
def test_compiled(backend: str) -> None:
    """They run in one pass with what is before and after, as one program for all tensors but
    scalars.
    """
    PROGRAMS.clear()
    tx = fo.chain(fo.scale_by_adam(eps=1e-3), with_sums(), fo.scale_by_learning_rate(0.1))
    step, ps, mine = (
        CompiledStep(tx, True, backend=backend),
        drawn(0, torch.float32),
        drawn(0, torch.float32),
    )
    state, ours = tx.init(ps), tx.init(mine)
    for i in range(3):
        gs, other = drawn(i + 1, torch.float32), drawn(i + 10, torch.float32)
        updates, state = tx.update(gs, state, ps, other=other)
        ps = fo.apply_updates(ps, updates)
        mine, ours = step(mine, gs, ours, other=other)
        torch.testing.assert_close(mine, ps, rtol=1e-4, atol=1e-5)
    assert len(step.segments) == 1
    assert [len(programs) for programs in PROGRAMS.values()] == [1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_compiled_sums_over_a_master_copy(dtype: torch.dtype) -> None:
    """Not over the rounded parameter."""
    tx = fo.keep_master_weights(
        fo.chain(fo.scale_by_adam(eps=1e-3), with_sums(), fo.sgd(0.1))
    )
    step, ps, mine = (
        CompiledStep(tx, True, backend="eager"),
        drawn(0, dtype),
        drawn(0, dtype),
    )
    state, ours = tx.init(ps), tx.init(mine)
    for i in range(3):
        gs, other = drawn(i + 1, dtype), drawn(i + 10, dtype)
        updates, state = tx.update(gs, state, ps, other=other)
        ps = fo.apply_updates(ps, updates)
        mine, ours = step(mine, gs, ours, other=other)
        torch.testing.assert_close(
            fo.get(ours, "mean"), fo.get(state, "mean"), rtol=1e-5, atol=1e-6
        )
        torch.testing.assert_close(mine, ps, rtol=1e-5, atol=1e-6)
    assert len(step.segments) == 1


# ---- what is compiled for a CPU ------------------------------------------------------------------


@pytest.mark.slow
def test_a_compiled_sum_of_many_numbers_is_exact() -> None:
    """A float32 sum, number after number, would stop growing at 2^24 a lane and be off by 1e-4 long
    before.
    """
    tx = fo.leafwise(
        lambda g, total: torch.zeros_like(g) + total, sums={"total": lambda g: g.sum()}
    )
    g = torch.rand(3_000_001, generator=torch.Generator().manual_seed(0))
    ps, _ = CompiledStep(tx, True)([torch.zeros_like(g)], [g], tx.init([g]))
    exact = g.double().sum()
    assert abs(ps[0][0] - exact) / exact < 1e-7
    assert (ps[0] == ps[0][0]).all()


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(33, 50), (40, 1), (1, 40), (6, 5, 4)], ids=str)
def test_numbers_and_rows_that_many_elements_read(shape: tuple[int, ...]) -> None:
    """They are stored before they are read; a view is read as it is."""

    def rule(g, p):
        row = g.mean(dim=-1, keepdim=True)
        size = (g.square().sum() + 1).sqrt()
        first = p[..., :1] * size
        return (
            (g - row) / size + torch.where(size > 2, first, row) + (row * 2).exp() / size
        )

    tx = fo.chain(fo.leafwise(rule, kind="tensorwise"), fo.sgd(0.1, momentum=0.9))
    generator = torch.Generator().manual_seed(0)
    step, ps = fo.compiled_step(tx), [torch.randn(shape, generator=generator)]
    mine = tree.map(torch.clone, ps)
    state, ours = tx.init(ps), tx.init(mine)
    for _ in range(3):
        gs = [torch.randn(shape, generator=generator)]
        updates, state = tx.update(gs, state, ps)
        ps = fo.apply_updates(ps, updates)
        mine, ours = step(mine, gs, ours)
        torch.testing.assert_close(mine, ps, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_factors_that_wait_for_another_sum() -> None:
    """They are taken out of sums.

    What guards them, what is overwritten in between, and sums of zeros stay right.
    """

    def scaled(g, p, mean, total, n):
        kept, mean = (
            torch.where(g * p > 0, g * (n / (total + 1)), 0.0),
            torch.lerp(mean, g, 0.3),
        )
        return kept, {"mean": mean}

    def guarded(g, most):
        return torch.where(most > 0, g * (1 / most), 0.0)

    def of_old(g, held, hh):
        return held * hh, {"held": torch.lerp(held, g, 0.5)}

    def of_new(g, velocity, vv):
        velocity = g + 0.5 * velocity
        return velocity * (1 / (vv + 1)), {"velocity": velocity}

    def norm(g, gg, total):
        return g / (gg + total.abs() + 1).sqrt()

    sums = {"total": lambda g, p: (g * p > 0).to(g.dtype).sum(), "n": lambda g: g.numel()}
    of_norm = {
        "gg": lambda g: g.square().sum(),
        "total": lambda g: (g * g * 3.0 + g).sum(),
    }
    tx = fo.chain(
        fo.leafwise(scaled, slots={"mean": tree.zeros_like}, sums=sums),
        fo.leafwise(norm, sums=of_norm),
        fo.leafwise(guarded, sums={"most": lambda g: g.abs().sum()}),
        fo.leafwise(norm, sums=of_norm),
        fo.leafwise(
            of_old,
            slots={"held": torch.ones_like},
            sums={"hh": lambda held: held.square().sum()},
        ),
        fo.leafwise(norm, sums=of_norm),
        fo.leafwise(
            of_new,
            slots={"velocity": torch.ones_like},
            sums={"vv": lambda velocity: velocity.square().sum()},
        ),
        fo.leafwise(norm, sums=of_norm),
    )
    ps = drawn(0, torch.float32)
    step, mine = CompiledStep(tx, True), tree.map(torch.clone, ps)
    state, ours = tx.init(ps), tx.init(mine)
    for i in range(4):
        gs = drawn(i + 1, torch.float32)
        if i == 2:
            gs = tree.map(torch.zeros_like, gs)
        updates, state = tx.update(gs, state, ps)
        assert all(u.isfinite().all() for u in updates.values())
        ps = fo.apply_updates(ps, updates)
        mine, ours = step(mine, gs, ours)
        torch.testing.assert_close(mine, ps, rtol=1e-5, atol=1e-5)
        for slot in ("held", "velocity"):
            torch.testing.assert_close(
                fo.get(ours, slot), fo.get(state, slot), rtol=1e-5, atol=1e-5
            )


def test_which_factors_are_taken_out() -> None:
    """Those that wait for a sum, so that one loop gives both; a factor that is known stays."""
    from torch.fx.experimental.proxy_tensor import make_fx

    from functorch_opt._execution.cpu_passes import take_sums

    def together(g, p, known):
        number = 1 / g.sum()
        return torch.stack(
            [
                (torch.where(p > 0, g * number, 0.0) ** 2).sum(),
                (g * known).sum(),
                (p * number).sum(),
            ]
        )

    def alone(graph: torch.fx.Graph) -> list[bool]:
        """Of each sum over a vector, whether it needs no other."""
        sums = [node for node in graph.nodes if node.target is torch.ops.aten.sum.default]
        before: dict[object, set[object]] = {}
        for node in graph.nodes:
            before[node] = {
                n for above in node.all_input_nodes for n in (above, *before[above])
            }
        return [not before[node] & {*sums} for node in sums]

    examples = torch.randn(7, generator=torch.Generator().manual_seed(0)).unbind()
    g, p, known = torch.stack(examples), torch.stack(examples[::-1]), torch.tensor(0.7)
    traced = make_fx(together, tracing_mode="symbolic")(g, p, known)
    assert alone(traced.graph) == [True, False, True, False]
    take_sums(traced.graph)
    traced.recompile()
    assert alone(traced.graph) == [True, True, True, True]
    *_, of_known = [node for node in traced.graph.nodes if node.op == "placeholder"]
    (reader,) = of_known.users
    assert reader.meta["val"].shape == g.shape
    torch.testing.assert_close(traced(g, p, known), together(g, p, known))
