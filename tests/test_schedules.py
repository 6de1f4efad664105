"""Every schedule against its formula in plain `math` and against torch.optim.lr_scheduler.

The schedules are tested under vmap, grad and compile too.
"""

from __future__ import annotations

import math
import pickle
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import jacrev, vmap

import functorch_opt as fo
from functorch_opt import schedules

LAST = 45
"""The largest count. Every schedule below ends before it, so that what comes after is tested too.
"""


# ---- the formulas, one count at a time, written from the definitions -----------------------------


def line(t: int, start: float, end: float, steps: int) -> float:
    return end if t >= steps else start + (end - start) * t / steps


def half_cosine(
    t: int, start: float, end: float, steps: int, exponent: float = 1.0
) -> float:
    """``cos(x / 2)^2`` in place of ``(1 + cos x) / 2``, so that it is not the same line of code
    twice.
    """
    return (
        end
        if t >= steps
        else end + (start - end) * math.cos(math.pi * t / (2 * steps)) ** (2 * exponent)
    )


def polynomial(t, init_value, end_value, power, transition_steps, transition_begin=0):
    if t <= transition_begin:
        return init_value
    left = max(transition_begin + transition_steps - t, 0) / transition_steps
    return init_value * left**power + end_value * (1 - left**power)


def constant(t, value):
    return value


def linear(t, init_value, end_value, transition_steps, transition_begin=0):
    return line(max(t - transition_begin, 0), init_value, end_value, transition_steps)


def cosine_decay(t, init_value, decay_steps, alpha=0.0, exponent=1.0):
    return half_cosine(t, init_value, alpha * init_value, decay_steps, exponent)


def exponential(
    t,
    init_value,
    transition_steps,
    decay_rate,
    transition_begin=0,
    staircase=False,
    end_value=None,
):
    t = max(t - transition_begin, 0)
    value = init_value * math.exp(
        (t // transition_steps if staircase else t / transition_steps)
        * math.log(decay_rate)
    )
    if end_value is None:
        return value
    return min(value, end_value) if decay_rate > 1 else max(value, end_value)


def piecewise_constant(t, init_value, **scales):
    return init_value * math.prod(
        scale for name, scale in scales.items() if t >= int(name.removeprefix("at_"))
    )


def piecewise(between: Callable[..., float]) -> Callable[..., float]:
    def formula(t, init_value, **scales):
        value, begin = init_value, 0
        for name, scale in scales.items():
            boundary = int(name.removeprefix("at_"))
            if t < boundary:
                return between(t - begin, value, value * scale, boundary - begin)
            value, begin = value * scale, boundary
        return value

    return formula


def linear_onecycle(
    t,
    transition_steps,
    peak_value,
    pct_start=0.3,
    pct_final=0.85,
    div_factor=25.0,
    final_div_factor=1e4,
):
    low, up, down = (
        peak_value / div_factor,
        int(pct_start * transition_steps),
        int(pct_final * transition_steps),
    )
    if t < up:
        return line(t, low, peak_value, up)
    return (
        line(t - up, peak_value, low, down - up)
        if t < down
        else line(t - down, low, low / final_div_factor, transition_steps - down)
    )


def cosine_onecycle(
    t, transition_steps, peak_value, pct_start=0.3, div_factor=25.0, final_div_factor=1e4
):
    low, up = peak_value / div_factor, int(pct_start * transition_steps)
    if t < up:
        return half_cosine(t, low, peak_value, up)
    return half_cosine(t - up, peak_value, low / final_div_factor, transition_steps - up)


def warmup_constant(t, init_value, peak_value, warmup_steps):
    return line(t, init_value, peak_value, warmup_steps) if warmup_steps else peak_value


def warmup_cosine(
    t, init_value, peak_value, warmup_steps, decay_steps, end_value=0.0, exponent=1.0
):
    if t < warmup_steps:
        return line(t, init_value, peak_value, warmup_steps)
    return half_cosine(
        t - warmup_steps, peak_value, end_value, decay_steps - warmup_steps, exponent
    )


def warmup_exponential(t, init_value, peak_value, warmup_steps, **decay):
    return (
        line(t, init_value, peak_value, warmup_steps)
        if t < warmup_steps
        else exponential(t - warmup_steps, peak_value, **decay)
    )


# ---- the table -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    name: str
    formula: Callable[..., float]
    """``(count, **hyper, **fixed) -> value``."""
    hyper: dict[str, float]
    """Arguments that may be tensors."""
    fixed: dict[str, Any] = field(default_factory=dict)
    """The other arguments."""
    make: Callable[..., Any] | None = None
    """Builds the schedule from `hyper` and `fixed`, where that is not simply a call of the
    function.
    """

    def build(self, **hyper: Any) -> Any:
        return (self.make or getattr(fo, self.name))(
            **{**self.hyper, **hyper}, **self.fixed
        )

    def expect(self, t: int) -> float:
        return self.formula(t, **self.hyper, **self.fixed)


def scales_of(function: Callable[..., Any], *leading: Any) -> Callable[..., Any]:
    """``at_10=0.5`` stands for ``{10: 0.5}``, so that the scales are arguments like any other."""
    return lambda init_value, **scales: function(
        *leading,
        init_value,
        {int(name.removeprefix("at_")): s for name, s in scales.items()},
    )


def joined(init_value, end_value, decay_rate, peak_value, boundaries=(10, 25)):
    pieces = [
        fo.linear_schedule(init_value, end_value, 10),
        fo.exponential_decay(end_value, 5, decay_rate),
        fo.cosine_decay_schedule(peak_value, 12, 0.1),
    ]
    return fo.join_schedules(pieces, list(boundaries))


def joined_formula(t, init_value, end_value, decay_rate, peak_value, boundaries=(10, 25)):
    if t < boundaries[0]:
        return line(t, init_value, end_value, 10)
    if t < boundaries[1]:
        return exponential(t - boundaries[0], end_value, 5, decay_rate)
    return half_cosine(t - boundaries[1], peak_value, 0.1 * peak_value, 12)


def restarts(init_value, peak_value, second_peak, end_value, exponent):
    first = {
        "init_value": init_value,
        "peak_value": peak_value,
        "warmup_steps": 3,
        "decay_steps": 13,
        "end_value": end_value,
    }
    return fo.sgdr_schedule(
        [
            first,
            {
                "init_value": end_value,
                "peak_value": second_peak,
                "warmup_steps": 0,
                "decay_steps": 20,
                "exponent": exponent,
            },
        ]
    )


def restarts_formula(t, init_value, peak_value, second_peak, end_value, exponent):
    if t < 13:
        return warmup_cosine(t, init_value, peak_value, 3, 13, end_value)
    return warmup_cosine(t - 13, end_value, second_peak, 0, 20, 0.0, exponent)


LINE = {"init_value": 0.1, "end_value": 0.7}
DECAY = {"init_value": 0.8, "decay_rate": 0.6}
JOINED = {**LINE, "decay_rate": 0.5, "peak_value": 2.0}
STEPS = {"init_value": 0.4, "at_10": 0.5, "at_31": 3.0}
WARM = {"init_value": 0.05, "peak_value": 0.9}
FALL = {**WARM, "decay_rate": 0.7}
CYCLES = {"peak_value": 0.6, "div_factor": 4.0, "final_div_factor": 10.0}

ROWS = [
    Row("constant_schedule", constant, {"value": 0.3}),
    Row("constant_schedule", constant, {"value": -2.0}),
    Row(
        "polynomial_schedule",
        polynomial,
        {**LINE, "power": 2.0},
        {"transition_steps": 20},
    ),
    Row(
        "polynomial_schedule",
        polynomial,
        {**LINE, "power": 0.5},
        {"transition_steps": 7, "transition_begin": 9},
    ),
    Row(
        "polynomial_schedule",
        polynomial,
        {"init_value": 1.0, "end_value": -1.0, "power": 3.5},
        {"transition_steps": 1},
    ),
    Row("linear_schedule", linear, LINE, {"transition_steps": 10}),
    Row(
        "linear_schedule",
        linear,
        {"init_value": 2.0, "end_value": 0.0},
        {"transition_steps": 30, "transition_begin": 4},
    ),
    Row("exponential_decay", exponential, DECAY, {"transition_steps": 5}),
    Row(
        "exponential_decay",
        exponential,
        DECAY,
        {"transition_steps": 5, "staircase": True},
    ),
    Row(
        "exponential_decay",
        exponential,
        {**DECAY, "end_value": 0.25},
        {"transition_steps": 7, "transition_begin": 6, "staircase": True},
    ),
    Row(
        "exponential_decay",
        exponential,
        {**DECAY, "decay_rate": 1.3, "end_value": 1.7},
        {"transition_steps": 3, "transition_begin": 2},
    ),
    Row("cosine_decay_schedule", cosine_decay, {"init_value": 0.5}, {"decay_steps": 1}),
    Row(
        "cosine_decay_schedule",
        cosine_decay,
        {"init_value": 0.5, "alpha": 0.1},
        {"decay_steps": 30},
    ),
    Row(
        "cosine_decay_schedule",
        cosine_decay,
        {"init_value": 0.5, "alpha": 0.1, "exponent": 2.5},
        {"decay_steps": 13},
    ),
    Row("join_schedules", joined_formula, JOINED, make=joined),
    Row(
        "join_schedules",
        joined_formula,
        {**JOINED, "decay_rate": 1.2},
        {"boundaries": (1, 2)},
        make=joined,
    ),
    Row(
        "piecewise_constant_schedule",
        constant,
        {"value": 0.4},
        make=lambda value: fo.piecewise_constant_schedule(value),
    ),
    Row(
        "piecewise_constant_schedule",
        piecewise_constant,
        {**STEPS, "at_1": 0.1},
        make=scales_of(fo.piecewise_constant_schedule),
    ),
    Row(
        "piecewise_interpolate_schedule",
        piecewise(line),
        STEPS,
        make=scales_of(fo.piecewise_interpolate_schedule, "linear"),
    ),
    Row(
        "piecewise_interpolate_schedule",
        piecewise(half_cosine),
        STEPS,
        make=scales_of(fo.piecewise_interpolate_schedule, "cosine"),
    ),
    Row(
        "piecewise_interpolate_schedule",
        piecewise(half_cosine),
        {"init_value": 0.4, "at_1": 0.0},
        make=scales_of(fo.piecewise_interpolate_schedule, "cosine"),
    ),
    Row("warmup_constant_schedule", warmup_constant, WARM, {"warmup_steps": 10}),
    Row("warmup_constant_schedule", warmup_constant, WARM, {"warmup_steps": 0}),
    Row(
        "warmup_cosine_decay_schedule",
        warmup_cosine,
        WARM,
        {"warmup_steps": 8, "decay_steps": 40},
    ),
    Row(
        "warmup_cosine_decay_schedule",
        warmup_cosine,
        {**WARM, "end_value": 0.2, "exponent": 1.5},
        {"warmup_steps": 1, "decay_steps": 2},
    ),
    Row(
        "warmup_cosine_decay_schedule",
        warmup_cosine,
        {**WARM, "end_value": 0.2},
        {"warmup_steps": 0, "decay_steps": 25},
    ),
    Row(
        "warmup_exponential_decay_schedule",
        warmup_exponential,
        FALL,
        {"warmup_steps": 9, "transition_steps": 4},
    ),
    Row(
        "warmup_exponential_decay_schedule",
        warmup_exponential,
        FALL,
        {"warmup_steps": 0, "transition_steps": 4},
    ),
    Row(
        "warmup_exponential_decay_schedule",
        warmup_exponential,
        {**FALL, "end_value": 0.3},
        {
            "warmup_steps": 5,
            "transition_steps": 4,
            "transition_begin": 3,
            "staircase": True,
        },
    ),
    Row(
        "linear_onecycle_schedule",
        linear_onecycle,
        {"peak_value": 0.6},
        {"transition_steps": 40},
    ),
    Row(
        "linear_onecycle_schedule",
        linear_onecycle,
        CYCLES,
        {"transition_steps": 30, "pct_start": 0.45, "pct_final": 0.7},
    ),
    Row(
        "cosine_onecycle_schedule",
        cosine_onecycle,
        {"peak_value": 0.6},
        {"transition_steps": 40},
    ),
    Row(
        "cosine_onecycle_schedule",
        cosine_onecycle,
        CYCLES,
        {"transition_steps": 33, "pct_start": 0.5},
    ),
    Row(
        "sgdr_schedule",
        restarts_formula,
        {**WARM, "second_peak": 0.5, "end_value": 0.02, "exponent": 1.5},
        make=restarts,
    ),
]
rows = pytest.mark.parametrize(
    "row", [pytest.param(row, id=f"{row.name}-{i}") for i, row in enumerate(ROWS)]
)


def tensors(
    hyper: dict[str, float], dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    return {name: torch.tensor(value, dtype=dtype) for name, value in hyper.items()}


def test_the_table_is_complete() -> None:
    assert {row.name for row in ROWS} == set(schedules.__all__)


@rows
def test_equals_the_formula(row: Row) -> None:
    schedule = row.build()
    for t in range(LAST + 1):
        assert schedule(t).item() == pytest.approx(row.expect(t), rel=1e-12, abs=1e-15), t


def test_the_counts_exercise_the_formulas() -> None:
    """Nothing but a constant is constant, and what has an end is over before the last count."""
    for row in ROWS:
        values = [row.expect(t) for t in range(LAST + 1)]
        constant_here = row.formula is constant or (
            row.formula is warmup_constant and row.fixed["warmup_steps"] == 0
        )
        assert (len(set(values)) == 1) == constant_here, row
        assert values[-1] == values[-2] or "decay_rate" in row.hyper, row


def powers(row: Row) -> bool:
    return bool({"decay_rate", "power", "exponent"} & row.hyper.keys())


@rows
def test_int_tensor_vector_and_vmap_agree(row: Row) -> None:
    """Bit for bit among scalars and among vectors.

    Between the two, torch's `pow` itself differs by a rounding (scalar and SIMD code).
    """
    schedule = row.build()
    counts = torch.arange(LAST + 1)
    scalars, vector = [schedule(t) for t in range(LAST + 1)], schedule(counts)
    assert (vector.dtype, vector.shape) == (torch.float64, counts.shape)
    assert all(value.dtype == torch.float64 and value.shape == () for value in scalars)
    for t, value in zip(counts, scalars, strict=True):
        assert schedule(t) == schedule(t.to(torch.int32)) == value
    for other in (
        schedule(counts.to(torch.int32)),
        vmap(schedule)(counts),
        vmap(vmap(schedule))(counts.reshape(2, -1)).reshape(-1),
    ):
        assert torch.equal(other, vector)
    torch.testing.assert_close(
        torch.stack(scalars), vector, rtol=4.5e-16 if powers(row) else 0, atol=0
    )


@rows
def test_compiles_in_one_graph_without_recompiling(row: Row) -> None:
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    schedule = row.build()
    compiled = torch.compile(
        lambda count: schedule(count), fullgraph=True, backend=backend
    )
    for t in (0, 1, 5, 10, 11, LAST, 3):
        torch.testing.assert_close(compiled(torch.tensor(t)), schedule(t), rtol=0, atol=0)
    assert len(graphs) == 1
    torch.testing.assert_close(
        compiled(torch.arange(LAST)), schedule(torch.arange(LAST)), rtol=0, atol=0
    )


@rows
def test_derivatives_by_hyperparameters_equal_finite_differences(row: Row) -> None:
    hyper, counts, h = tensors(row.hyper), torch.arange(LAST + 1), 1e-6
    derivatives = jacrev(lambda hyper: row.build(**hyper)(counts))(hyper)
    assert derivatives.keys() == row.hyper.keys()
    for name, derivative in derivatives.items():
        assert derivative.isfinite().all(), name
        up, down = (
            row.build(**{**hyper, name: hyper[name] + delta})(counts) for delta in (h, -h)
        )
        torch.testing.assert_close(
            derivative,
            (up - down) / (2 * h),
            rtol=1e-6,
            atol=1e-8,
            msg=lambda m, name=name: f"{name}: {m}",
        )
    assert any(derivative.abs().max() > 1e-3 for derivative in derivatives.values())


@rows
def test_vmap_over_hyperparameters_equals_a_loop(row: Row) -> None:
    """64 learning rates in one run: each may have its own schedule."""
    counts = torch.arange(LAST + 1)
    factors = torch.tensor([0.5, 0.9, 1.0], dtype=torch.float64)
    many = {name: value * factors for name, value in tensors(row.hyper).items()}
    batched = vmap(lambda hyper: row.build(**hyper)(counts))(many)
    looped = torch.stack(
        [
            row.build(**{name: value[i] for name, value in many.items()})(counts)
            for i in range(3)
        ]
    )
    torch.testing.assert_close(batched, looped, rtol=1e-14, atol=1e-16)


@rows
def test_float32_hyperparameters_give_float64_values(row: Row) -> None:
    value = row.build(**tensors(row.hyper, torch.float32))(torch.arange(LAST + 1))
    assert value.dtype == torch.float64
    torch.testing.assert_close(
        value, row.build()(torch.arange(LAST + 1)), rtol=1e-5, atol=1e-6
    )


@rows
def test_repr_reads_as_the_call_and_pickles(row: Row) -> None:
    schedule, counts = row.build(), torch.arange(LAST + 1)
    assert repr(schedule).startswith(f"{row.name}(")
    for again in (
        eval(repr(schedule), dict(vars(fo))),
        pickle.loads(pickle.dumps(schedule)),
    ):
        assert repr(again) == repr(schedule)
        assert torch.equal(again(counts), schedule(counts))


CYCLE = {"init_value": 0.0, "peak_value": 1.0, "warmup_steps": 1, "decay_steps": 10}


def test_a_schedule_from_an_iterator_prints_and_pickles() -> None:
    """`sgdr_schedule` takes any iterable; what it was called with is used up by then."""
    schedule = fo.sgdr_schedule({**CYCLE, "peak_value": peak} for peak in (1.0, 0.5))
    assert eval(repr(schedule), dict(vars(fo)))(12) == schedule(12)
    assert pickle.loads(pickle.dumps(schedule))(12) == schedule(12)


@pytest.mark.parametrize(
    "make",
    [
        lambda given: fo.piecewise_constant_schedule(1.0, given),
        lambda given: fo.piecewise_interpolate_schedule("linear", 1.0, given),
    ],
    ids=["piecewise_constant_schedule", "piecewise_interpolate_schedule"],
)
def test_a_later_change_of_an_argument_changes_nothing(make) -> None:
    given = {10: 0.5}
    schedule = make(given)
    before = schedule(20)
    given[10] = 0.1
    assert schedule(20) == before
    assert pickle.loads(pickle.dumps(schedule))(20) == before


# ---- what is not elementary ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "warmup_constant_schedule",
        "warmup_cosine_decay_schedule",
        "warmup_exponential_decay_schedule",
        "sgdr_schedule",
    ],
)
def test_no_warmup_starts_at_the_peak(name: str) -> None:
    """optax's `warmup_constant_schedule` would stay at its first value for ever."""
    arguments = {
        "warmup_constant_schedule": {},
        "warmup_cosine_decay_schedule": {"decay_steps": 10},
        "warmup_exponential_decay_schedule": {"transition_steps": 10, "decay_rate": 0.5},
        "sgdr_schedule": {"decay_steps": 10},
    }[name]
    arguments = {"init_value": 0.0, "peak_value": 0.7, "warmup_steps": 0, **arguments}
    schedule = (
        fo.sgdr_schedule([arguments])
        if name == "sgdr_schedule"
        else getattr(fo, name)(**arguments)
    )
    assert schedule(0).item() == pytest.approx(0.7, rel=1e-15)


def test_derivative_is_finite_where_an_earlier_piece_has_overflowed() -> None:
    """`torch.where` sends a zero gradient into the piece not chosen, and 0 * inf is NaN: no piece
    may see counts beyond its end.
    """

    def value(init_value, at):
        pieces = [
            fo.exponential_decay(init_value, 1, 2.0),
            fo.exponential_decay(init_value, 1, 2.0),
            fo.constant_schedule(1.0),
        ]
        return fo.join_schedules(pieces, [5, 10])(at)

    one = torch.tensor(1.0, dtype=torch.float64)
    for count, derivative in ((3, 8.0), (7, 4.0), (5000, 0.0)):
        assert jacrev(value)(one, count).item() == derivative, count


def test_any_function_of_the_count_can_be_joined() -> None:
    schedule = fo.join_schedules([lambda count: 2.0 * count, lambda count: 7.0], [5])
    assert schedule(torch.arange(7)).tolist() == [0.0, 2.0, 4.0, 6.0, 8.0, 7.0, 7.0]


# ---- against torch.optim.lr_scheduler ------------------------------------------------------------

LR, N = 0.4, 60
torch_lr = torch.optim.lr_scheduler

TORCH = {
    "StepLR": (
        lambda o: torch_lr.StepLR(o, 7, gamma=0.3),
        fo.exponential_decay(LR, 7, 0.3, staircase=True),
        N,
    ),
    "ExponentialLR": (
        lambda o: torch_lr.ExponentialLR(o, 0.93),
        fo.exponential_decay(LR, 1, 0.93),
        N,
    ),
    "CosineAnnealingLR": (
        lambda o: torch_lr.CosineAnnealingLR(o, N),
        fo.cosine_decay_schedule(LR, N),
        N,
    ),
    "CosineAnnealingLR-eta_min": (
        lambda o: torch_lr.CosineAnnealingLR(o, N, eta_min=0.1),
        fo.cosine_decay_schedule(LR, N, alpha=0.1 / LR),
        N,
    ),
    "CosineAnnealingWarmRestarts": (
        lambda o: torch_lr.CosineAnnealingWarmRestarts(o, 10, T_mult=2, eta_min=0.1),
        fo.sgdr_schedule(
            [
                {
                    "init_value": 0.0,
                    "peak_value": LR,
                    "warmup_steps": 0,
                    "decay_steps": n,
                    "end_value": 0.1,
                }
                for n in (10, 20, 40)
            ]
        ),
        N,
    ),
    "LinearLR": (
        lambda o: torch_lr.LinearLR(o, 0.25, 0.9, total_iters=20),
        fo.linear_schedule(0.25 * LR, 0.9 * LR, 20),
        N,
    ),
    "PolynomialLR": (
        lambda o: torch_lr.PolynomialLR(o, 25, power=1.7),
        fo.polynomial_schedule(LR, 0.0, 1.7, 25),
        N,
    ),
    "MultiStepLR": (
        lambda o: torch_lr.MultiStepLR(o, [5, 30], gamma=0.2),
        fo.piecewise_constant_schedule(LR, {5: 0.2, 30: 0.2}),
        N,
    ),
    # torch's cycle has its first and its last value at counts 0 and total_steps - 1, and its peak
    # at pct_start * total_steps - 1
    "OneCycleLR-cosine": (
        lambda o: torch_lr.OneCycleLR(o, LR, total_steps=N, pct_start=0.3),
        fo.cosine_onecycle_schedule(N - 1, LR, pct_start=17.5 / (N - 1)),
        N - 1,
    ),
}


@pytest.mark.parametrize("name", TORCH)
def test_equals_torch(name: str) -> None:
    make, schedule, last = TORCH[name]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=LR)
    scheduler = make(optimizer)
    seen = []
    for t in range(last + 1):
        seen.append(optimizer.param_groups[0]["lr"])
        assert seen[-1] == pytest.approx(schedule(t).item(), rel=1e-12, abs=1e-14), t
        optimizer.step()
        if t < last:
            scheduler.step()
    assert len(set(seen)) > 2


# ---- errors --------------------------------------------------------------------------------------

NAN, INF = float("nan"), float("inf")
NO_STEPS = "transition_steps must be a whole number of updates, at least 1; got 0"
ERRORS: list[tuple[Callable[[], Any], str]] = [
    # what names are called in the error is what the caller called them
    (lambda: fo.constant_schedule(NAN), "^value must be a finite number"),
    (
        lambda: fo.constant_schedule("0.1"),
        "value must be a finite number or a 0-dim tensor; got '0.1'",
    ),
    (lambda: fo.linear_schedule(0, 1, 0), NO_STEPS),
    (lambda: fo.linear_schedule(0, 1, -5), "transition_steps .* got -5"),
    (
        lambda: fo.linear_schedule(0, 1, 10.0),
        r"transition_steps must be a whole number of updates, at least 1; got 10\.0",
    ),
    (lambda: fo.linear_schedule(0, 1, True), "transition_steps .* got True"),
    (
        lambda: fo.linear_schedule(0, 1, 10, -1),
        "transition_begin must be a whole number of updates, at least 0; got -1",
    ),
    (lambda: fo.linear_schedule(NAN, 1, 10), "init_value must be a finite number"),
    (
        lambda: fo.linear_schedule(0, INF, 10),
        "end_value must be a finite number .* got inf",
    ),
    (lambda: fo.polynomial_schedule(0, 1, 2, 0), NO_STEPS),
    (lambda: fo.polynomial_schedule(0, 1, 0, 10), "power must be greater than 0; got 0"),
    (lambda: fo.polynomial_schedule(0, 1, NAN, 10), "power must be a finite number"),
    (lambda: fo.exponential_decay(1.0, 0, 0.5), NO_STEPS),
    (
        lambda: fo.exponential_decay(1.0, 10, 0.0),
        r"decay_rate must be greater than 0; got 0\.0",
    ),
    (lambda: fo.exponential_decay(1.0, 10, -0.5), "decay_rate must be greater than 0"),
    (lambda: fo.exponential_decay(1.0, 10, NAN), "decay_rate must be a finite number"),
    (lambda: fo.exponential_decay(1.0, 10, 0.5, -3), "transition_begin .* got -3"),
    (
        lambda: fo.exponential_decay(1.0, 10, 0.5, end_value=NAN),
        "end_value must be a finite number",
    ),
    (
        lambda: fo.cosine_decay_schedule(1.0, 0),
        "decay_steps must be a whole number of updates, at least 1; got 0",
    ),
    (lambda: fo.cosine_decay_schedule(NAN, 10), "init_value must be a finite number"),
    (
        lambda: fo.cosine_decay_schedule(1.0, 10, alpha=INF),
        "alpha must be a finite number",
    ),
    (
        lambda: fo.cosine_decay_schedule(1.0, 10, exponent=0.0),
        "exponent must be greater than 0",
    ),
    (
        lambda: fo.join_schedules([], []),
        "one boundary fewer than schedules; got 0 schedules and 0 boundaries",
    ),
    (
        lambda: fo.join_schedules([fo.constant_schedule(1.0)] * 2, []),
        "got 2 schedules and 0 boundaries",
    ),
    (
        lambda: fo.join_schedules([fo.constant_schedule(1.0)] * 3, [5, 5]),
        "boundaries must be increasing whole numbers, at least 1; got 5 after 5",
    ),
    (
        lambda: fo.join_schedules([fo.constant_schedule(1.0)] * 3, [8, 5]),
        "boundaries must be increasing .* got 5 after 8",
    ),
    (
        lambda: fo.join_schedules([fo.constant_schedule(1.0)] * 2, [0]),
        "boundaries must be .* at least 1; got 0",
    ),
    (
        lambda: fo.join_schedules([fo.constant_schedule(1.0)] * 2, [2.5]),
        r"boundaries must be .* whole numbers.* got 2\.5",
    ),
    (
        lambda: fo.piecewise_constant_schedule(NAN, {10: 0.1}),
        "init_value must be a finite number",
    ),
    (
        lambda: fo.piecewise_constant_schedule(1.0, {10: NAN}),
        "the scale at 10 must be a finite number",
    ),
    (
        lambda: fo.piecewise_constant_schedule(1.0, {0: 0.1}),
        "boundaries must be .* at least 1; got 0",
    ),
    (
        lambda: fo.piecewise_constant_schedule(1.0, {2.5: 0.1}),
        r"boundaries must be .* whole numbers.* got 2\.5",
    ),
    (
        lambda: fo.piecewise_interpolate_schedule("cubic", 1.0, {10: 0.1}),
        "interpolate_type must be 'linear' or 'cosine'; got 'cubic'",
    ),
    (
        lambda: fo.piecewise_interpolate_schedule("linear", 1.0, {-1: 0.1}),
        "boundaries must be .* at least 1; got -1",
    ),
    (
        lambda: fo.piecewise_interpolate_schedule("linear", NAN, {10: 0.1}),
        "init_value must be a finite number",
    ),
    (
        lambda: fo.warmup_constant_schedule(0.0, 1.0, -1),
        "warmup_steps must be a whole number of updates, at least 0; got -1",
    ),
    (
        lambda: fo.warmup_constant_schedule(NAN, 1.0, 10),
        "init_value must be a finite number",
    ),
    (
        lambda: fo.warmup_constant_schedule(0.0, NAN, 10),
        "peak_value must be a finite number",
    ),
    (
        lambda: fo.warmup_cosine_decay_schedule(0.0, 1.0, 10, 10),
        "decay_steps counts the warmup too, .* greater than warmup_steps; got 10 and 10",
    ),
    (
        lambda: fo.warmup_cosine_decay_schedule(0.0, 1.0, 10, 5),
        "greater than warmup_steps; got 5 and 10",
    ),
    (lambda: fo.warmup_cosine_decay_schedule(0.0, 1.0, -1, 10), "warmup_steps .* got -1"),
    (
        lambda: fo.warmup_cosine_decay_schedule(0.0, 1.0, 10, 57.5),
        r"decay_steps must be a whole number of updates.* got 57\.5",
    ),
    (
        lambda: fo.warmup_cosine_decay_schedule(NAN, 1.0, 10, 50),
        "init_value must be a finite number",
    ),
    (
        lambda: fo.warmup_cosine_decay_schedule(0.0, NAN, 10, 50),
        "peak_value must be a finite number",
    ),
    (
        lambda: fo.warmup_cosine_decay_schedule(0.0, 0.0, 10, 50),
        "peak_value must be greater than 0",
    ),
    (
        lambda: fo.warmup_cosine_decay_schedule(0.0, 1.0, 10, 50, NAN),
        "end_value must be a finite number",
    ),
    (
        lambda: fo.warmup_cosine_decay_schedule(0.0, 1.0, 10, 50, exponent=-1.0),
        "exponent must be greater than 0",
    ),
    (
        lambda: fo.warmup_exponential_decay_schedule(0.0, 1.0, -2, 5, 0.5),
        "warmup_steps .* got -2",
    ),
    (lambda: fo.warmup_exponential_decay_schedule(0.0, 1.0, 2, 0, 0.5), NO_STEPS),
    (
        lambda: fo.warmup_exponential_decay_schedule(NAN, 1.0, 2, 5, 0.5),
        "init_value must be a finite number",
    ),
    (
        lambda: fo.warmup_exponential_decay_schedule(0.0, NAN, 2, 5, 0.5),
        "peak_value must be a finite number",
    ),
    (lambda: fo.linear_onecycle_schedule(0, 1.0), NO_STEPS),
    (lambda: fo.linear_onecycle_schedule(100, NAN), "peak_value must be a finite number"),
    (
        lambda: fo.linear_onecycle_schedule(100, 1.0, pct_start=1.5),
        r"pct_start must be between 0 and 1; got 1\.5",
    ),
    (
        lambda: fo.linear_onecycle_schedule(100, 1.0, pct_final=NAN),
        "pct_final must be between 0 and 1",
    ),
    (
        lambda: fo.linear_onecycle_schedule(100, 1.0, pct_start=0.9, pct_final=0.5),
        "boundaries must be increasing .* got 50 after 90",
    ),
    (
        lambda: fo.linear_onecycle_schedule(2, 1.0),
        "boundaries must be increasing .* got 0",
    ),
    (
        lambda: fo.linear_onecycle_schedule(100, 1.0, div_factor=0.0),
        "div_factor must be greater than 0",
    ),
    (lambda: fo.cosine_onecycle_schedule(-1, 1.0), "transition_steps .* got -1"),
    (lambda: fo.cosine_onecycle_schedule(100, NAN), "peak_value must be a finite number"),
    (
        lambda: fo.cosine_onecycle_schedule(100, 1.0, pct_start=0.0),
        r"pct_start must be between 0 and 1; got 0\.0",
    ),
    (
        lambda: fo.cosine_onecycle_schedule(100, 1.0, final_div_factor=NAN),
        "final_div_factor must be a finite number",
    ),
    (
        lambda: fo.cosine_onecycle_schedule(2, 1.0),
        "boundaries must be increasing .* got 0",
    ),
    (lambda: fo.sgdr_schedule([]), "at least one cycle"),
    (
        lambda: fo.sgdr_schedule([CYCLE, {**CYCLE, "decay_steps": 1}]),
        "decay_steps counts the warmup too",
    ),
    (
        lambda: fo.sgdr_schedule([CYCLE, {**CYCLE, "peak_value": NAN}]),
        "peak_value must be a finite number",
    ),
    # what multiplies a value must not turn its sign
    (
        lambda: fo.piecewise_constant_schedule(1.0, {3: -2.0}),
        "the scale at 3 must be 0 or greater",
    ),
    (
        lambda: fo.piecewise_interpolate_schedule("linear", 1.0, {5: -3}),
        "at 5 must be 0 or greater",
    ),
    (lambda: fo.cosine_decay_schedule(1.0, 10, alpha=-0.1), "alpha must be 0 or greater"),
    (
        lambda: fo.warmup_cosine_decay_schedule(0.0, 1.0, 2, 5, -0.1),
        "end_value must be 0 or greater",
    ),
    (
        lambda: fo.sgdr_schedule([{**CYCLE, "end_value": -0.1}]),
        "end_value must be 0 or greater",
    ),
    (
        lambda: fo.linear_onecycle_schedule(100, 1.0, div_factor=-2.0),
        "div_factor must be greater",
    ),
]


@pytest.mark.parametrize(
    ("make", "match"),
    ERRORS,
    ids=[
        f"{i}-{re.sub('[^a-z_]+', ' ', match)[:24].strip()}"
        for i, (_, match) in enumerate(ERRORS)
    ],
)
def test_refused_when_made(make: Callable[[], Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make()


def test_joining_what_is_no_function_is_refused() -> None:
    with pytest.raises(TypeError, match="For a number use constant_schedule"):
        fo.join_schedules([0.1, 0.2], [10])
