"""stochastic_round gives one of two neighbours with the right probabilities, and nothing is left to
round.
"""

from __future__ import annotations

import math

import pytest
import torch
from parity_page import assert_near, compares
from torch import Tensor

import functorch_opt as fo
from functorch_opt import tree
from functorch_opt._execution.compiled import CompiledStep

LOW = [torch.bfloat16, torch.float16]
low = pytest.mark.parametrize("dtype", LOW, ids=str)


def values(dtype: torch.dtype) -> Tensor:
    """Every finite value of a 16-bit type, in order, as float32."""
    every = (
        torch.arange(-(2**15), 2**15, dtype=torch.int32)
        .to(torch.int16)
        .view(dtype)
        .float()
    )
    return every[every.isfinite()].unique()


def neighbours(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The largest value of `dtype` that is at most x, and the smallest that is at least x."""
    every = values(dtype)
    return every[torch.searchsorted(every, x, right=True) - 1], every[
        torch.searchsorted(every, x)
    ]


def rounded(p: Tensor, u: Tensor, count: int = 0, key: int = 0) -> tuple[Tensor, Tensor]:
    tx = fo.stochastic_round(key)
    state = tx.init(p)
    state = state._replace(shared={**state.shared, "count": torch.tensor(count)})
    updates, _ = tx.update(u, state, p)
    return updates, fo.apply_updates(p, updates)


def spread(n: int, dtype: torch.dtype, seed: int, reach: int) -> Tensor:
    """Random float32 of all signs and of sizes from the subnormal numbers of `dtype` to 2^reach."""
    generator = torch.Generator().manual_seed(seed)
    info = torch.finfo(dtype)
    least = math.log2(info.tiny * info.eps)
    exponents = least + torch.rand(n, generator=generator, dtype=torch.float64) * (
        reach - least
    )
    signs = 2 * torch.randint(2, (n,), generator=generator) - 1
    return (signs * 2**exponents).float()


@low
def test_the_sum_becomes_one_of_its_two_neighbours(dtype: torch.dtype) -> None:
    """The sizes of parameters and updates are arbitrary, and sums may be subnormal.

    Before it is rounded, p + u' is the neighbour up to float32.
    """
    p, u = spread(200_000, dtype, 0, 12).to(dtype), spread(200_000, dtype, 1, 12)
    same = torch.arange(0, 200_000, 3)
    u[same] = p[same].float() * torch.linspace(
        -1.5, 0.5, len(same)
    )  # where most of it cancels
    new, result = rounded(p, u)
    exact = p.float() + u
    below, above = neighbours(exact, dtype)
    assert new.dtype == torch.float32
    assert ((result.float() == below) | (result.float() == above)).all()
    torch.testing.assert_close(
        p.float() + new, result.float(), rtol=2e-7, atol=0
    )  # p counts for nothing beside much larger updates
    between = below != above
    assert between.float().mean() > 0.3
    assert torch.equal(result[~between].float(), exact[~between])
    assert (exact.abs() < torch.finfo(dtype).tiny).sum() > 100


@compares(
    "stochastic_round",
    reference="plain",
    bound=0.012,
    remark="the probability of the upper neighbour, by 40,000 draws",
)
@low
@pytest.mark.parametrize("p", [1.0, -1.0, 3.0, 1e-3, "tiny", 0.0])
def test_it_is_unbiased(dtype: torch.dtype, p: float | str) -> None:
    """The upper neighbour comes as often as it must, whatever the place between the two."""
    info = torch.finfo(dtype)
    value = torch.tensor(info.tiny if p == "tiny" else p).to(dtype)
    scale = max(abs(value.item()), info.tiny) * info.eps
    n = 40_000
    for fraction in (0.03125, 0.3, 0.55, 0.9, -0.2):
        ps, u = value.expand(n).contiguous(), torch.full((n,), fraction * scale)
        exact = ps.float() + u
        below, above = neighbours(exact, dtype)
        wanted = ((exact - below) / (above - below))[0].item()
        assert 0 < wanted < 1
        ups = (rounded(ps, u)[1].float() == above).double().mean().item()
        assert abs(ups - wanted) < 4.5 * math.sqrt(wanted * (1 - wanted) / n), fraction
        assert_near(ups, wanted, 0.012)


@low
def test_plain_rounding_stalls_where_this_does_not(dtype: torch.dtype) -> None:
    """1,000 steps of a tenth of the spacing at 1, down: plain rounding loses every one of them."""
    n, steps = 500, 1000
    size = torch.finfo(dtype).eps / 10
    u = torch.full((n,), -size)
    plain = ours = torch.ones(n, dtype=dtype)
    tx = fo.stochastic_round(3)
    state = tx.init(ours)
    for _ in range(steps):
        plain = fo.apply_updates(plain, u)
        updates, state = tx.update(u, state, ours)
        ours = fo.apply_updates(ours, updates)
    assert (plain == 1).all()
    assert (
        abs(ours.double().mean() - (1 - steps * size))
        < 4.5 * math.sqrt(steps * 0.1 * 0.9 / n) * torch.finfo(dtype).eps
    )
    assert (ours != ours[0]).any()


def test_bfloat16_training_goes_on_where_plain_rounding_stops() -> None:
    """A chain with Adam: to a distance that steps of 1e-3 can reach from 1 only if they add up."""
    target = torch.linspace(1.2, 1.8, 64)

    def distance(*last: fo.GradientTransformation) -> float:
        tx, p = fo.chain(fo.adam(1e-3), *last), torch.ones(64, dtype=torch.bfloat16)
        state = tx.init(p)
        for _ in range(1000):
            updates, state = tx.update((p.float() - target).bfloat16(), state, p)
            p = fo.apply_updates(p, updates)
        return (p.float() - target).abs().mean().item()

    assert distance() > 0.49
    assert distance(fo.stochastic_round(0)) < 0.05


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.complex64], ids=str
)
def test_wide_parameters_are_left_alone(dtype: torch.dtype) -> None:
    ps = {"wide": torch.randn(7, dtype=dtype), "low": torch.ones(7, dtype=torch.bfloat16)}
    us = {"wide": torch.randn(7, dtype=dtype), "low": torch.full((7,), 1e-3)}
    tx = fo.stochastic_round(0)
    new, _ = tx.update(us, tx.init(ps), ps)
    assert torch.equal(new["wide"], us["wide"])
    assert not torch.equal(new["low"], us["low"])


@low
def test_infinities_and_nan_stay_and_zero_moves_nothing(dtype: torch.dtype) -> None:
    p = spread(1000, dtype, 2, 8).to(dtype)
    assert torch.equal(rounded(p, torch.zeros(1000))[1], p)
    _, result = rounded(
        torch.ones(3, dtype=dtype), torch.tensor([math.inf, -math.inf, math.nan])
    )
    assert result[0] == math.inf
    assert result[1] == -math.inf
    assert result[2].isnan()


def test_two_steps_round_otherwise() -> None:
    p, u = torch.ones(1000, dtype=torch.bfloat16), torch.full((1000,), 4e-3)
    assert not torch.equal(rounded(p, u)[1], rounded(p, u, count=1)[1])
    assert not torch.equal(rounded(p, u)[1], rounded(p, u, key=1)[1])


def chain() -> fo.GradientTransformation:
    return fo.chain(
        fo.trace(0.9), fo.scale_by_learning_rate(1e-3), fo.stochastic_round(2)
    )


def test_in_a_compiled_step() -> None:
    _the_step_equals_update(CompiledStep(chain(), True, backend="eager"))


@pytest.mark.slow
def test_in_a_step_of_the_real_compiler() -> None:
    _the_step_equals_update(fo.compiled_step(chain()))


def _the_step_equals_update(step: CompiledStep) -> None:
    """They are equal bit for bit, because the random numbers are exact, and the sum that is rounded
    is computed in the same way.
    """
    generator = torch.Generator().manual_seed(0)
    ps = {
        "w": torch.randn(33, 5, generator=generator).bfloat16(),
        "b": torch.randn(50, generator=generator),
    }
    tx, mine = step.tx, tree.map(torch.clone, ps)
    state, ours = tx.init(ps), tx.init(ps)
    before = ps["w"]
    for _ in range(3):
        gs = tree.map(lambda p: torch.randn(p.shape, generator=generator).to(p.dtype), ps)
        updates, state = tx.update(gs, state, ps)
        ps = fo.apply_updates(ps, updates)
        mine, ours = step(mine, gs, ours)
        assert torch.equal(mine["w"], ps["w"])
        torch.testing.assert_close(mine["b"], ps["b"])
    assert 0.2 < (ps["w"] != before).float().mean() < 0.9


def test_params_are_needed() -> None:
    tx, p = fo.stochastic_round(0), torch.ones(2)
    with pytest.raises(ValueError, match=r"call update\(updates, state, params\)"):
        tx.update(p, tx.init(p))


def test_as_a_torch_optimizer() -> None:
    p = torch.nn.Parameter(torch.ones(1000, dtype=torch.bfloat16))
    opt = fo.optim.Optimizer([p], fo.chain(fo.sgd(1e-3), fo.stochastic_round(0)))
    p.grad = torch.ones_like(p)
    opt.step()
    assert set(p.detach().float().unique().tolist()) == {1.0, 1 - 2**-8}
    assert abs(p.detach().double().mean() - 0.999) < 4.5 * 2**-8 * math.sqrt(
        0.25 * 0.75 / 1000
    )
