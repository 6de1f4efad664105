"""Every schedule against its formula in plain `math` and against torch.optim.lr_scheduler.

The schedules are tested under vmap, grad and compile too.
"""

from __future__ import annotations

import math
import pickle
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
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


def warmup_stable_decay(
    t,
    init_value,
    peak_value,
    warmup_steps,
    stable_steps,
    decay_steps,
    end_value=0.0,
    decay_type="linear",
):
    if t < warmup_steps:
        return line(t, init_value, peak_value, warmup_steps)
    t = max(t - warmup_steps - stable_steps, 0)
    if decay_type == "cosine":
        return half_cosine(t, peak_value, end_value, decay_steps)
    x = min(t / decay_steps, 1)
    x = math.sqrt(x) if decay_type == "1-sqrt" else x
    return peak_value * (1 - x) + end_value * x


def inverse_sqrt(t, init_value, peak_value, warmup_steps, timescale=None):
    if t < warmup_steps:
        return line(t, init_value, peak_value, warmup_steps)
    s = timescale or warmup_steps
    return peak_value / math.sqrt(1 + (t - warmup_steps) / s)


def cyclic(
    t,
    init_value,
    peak_value,
    step_size_up=2000,
    step_size_down=None,
    mode="triangular",
    gamma=1.0,
):
    up, down = step_size_up, step_size_down or step_size_up
    cycle, phase = divmod(t, up + down)
    peak = (
        init_value
        + (peak_value - init_value)
        * {
            "triangular": 1,
            "triangular2": 2.0**-cycle,
            "exp_range": gamma**t,
        }[mode]
    )
    if phase < up:
        return line(phase, init_value, peak, up)
    return line(phase - up, peak, init_value, down)


ENDLESS = cyclic, inverse_sqrt
"""The formulas that go on after any count."""


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
    endless: bool = False
    """Whether it goes on after any count."""

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


def pair(init_value, end_value, decay_rate):
    return fo.linear_schedule(init_value, end_value, 10), fo.exponential_decay(
        0.8, 5, decay_rate
    )


def pair_formula(t, init_value, end_value, decay_rate):
    return line(t, init_value, end_value, 10), exponential(t, 0.8, 5, decay_rate)


def cosine(peak_value, alpha):
    return fo.cosine_decay_schedule(peak_value, 20, alpha)


def cosine_formula(t, peak_value, alpha):
    return half_cosine(t, peak_value, alpha * peak_value, 20)


def clipped_formula(t, min_value, max_value, **of_pair):
    return min(max(pair_formula(t, **of_pair)[0], min_value), max_value)


LINE = {"init_value": 0.1, "end_value": 0.7}
DECAY = {"init_value": 0.8, "decay_rate": 0.6}
JOINED = {**LINE, "decay_rate": 0.5, "peak_value": 2.0}
STEPS = {"init_value": 0.4, "at_10": 0.5, "at_31": 3.0}
WARM = {"init_value": 0.05, "peak_value": 0.9}
FALL = {**WARM, "decay_rate": 0.7}
PAIR = {**LINE, "decay_rate": 0.7}
COSINE = {"peak_value": 0.6, "alpha": 0.1}
BOUNDS = {"min_value": 0.23, "max_value": 0.56}
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
    *(
        Row(
            "warmup_stable_decay_schedule",
            warmup_stable_decay,
            {**WARM, "end_value": end},
            {
                "warmup_steps": warmup,
                "stable_steps": stable,
                "decay_steps": decay,
                "decay_type": kind,
            },
        )
        for end, warmup, stable, decay, kind in (
            (0.0, 8, 20, 12, "linear"),
            (0.2, 0, 30, 7, "linear"),
            (0.2, 5, 0, 30, "cosine"),
            (0.01, 1, 30, 12, "1-sqrt"),
        )
    ),
    Row("inverse_sqrt_schedule", inverse_sqrt, WARM, {"warmup_steps": 9}),
    Row(
        "inverse_sqrt_schedule",
        inverse_sqrt,
        {**WARM, "timescale": 4.5},
        {"warmup_steps": 12},
    ),
    Row(
        "inverse_sqrt_schedule",
        lambda t, peak_value, timescale: inverse_sqrt(t, 0.0, peak_value, 0, timescale),
        {"peak_value": 0.9, "timescale": 10.0},
        make=lambda peak_value, timescale: fo.inverse_sqrt_schedule(
            0.0, peak_value, 0, timescale
        ),
        endless=True,
    ),
    Row("cyclic_schedule", cyclic, WARM, {"step_size_up": 4}),
    Row(
        "cyclic_schedule",
        cyclic,
        WARM,
        {"step_size_up": 3, "step_size_down": 8, "mode": "triangular2"},
    ),
    Row(
        "cyclic_schedule",
        cyclic,
        {**WARM, "gamma": 0.95},
        {"step_size_up": 10, "step_size_down": 1, "mode": "exp_range"},
    ),
    Row(
        "add_schedules",
        lambda t, number, **hyper: sum(pair_formula(t, **hyper)) + number,
        {**PAIR, "number": 0.3},
        make=lambda number, **hyper: fo.add_schedules(*pair(**hyper), number),
    ),
    Row(
        "multiply_schedules",
        lambda t, number, **hyper: math.prod(pair_formula(t, **hyper)) * number,
        {**PAIR, "number": -1.5},
        make=lambda number, **hyper: fo.multiply_schedules(number, *pair(**hyper)),
    ),
    Row(
        "clip_schedule",
        clipped_formula,
        {**PAIR, **BOUNDS},
        make=lambda min_value, max_value, **hyper: fo.clip_schedule(
            pair(**hyper)[0], min_value, max_value
        ),
    ),
    Row(
        "clip_schedule",
        lambda t, max_value, **hyper: min(cosine_formula(t, **hyper), max_value),
        {**COSINE, "max_value": 0.35},
        make=lambda max_value, **hyper: fo.clip_schedule(
            cosine(**hyper), max_value=max_value
        ),
    ),
    *(
        Row(
            "shift_schedule",
            lambda t, steps, **hyper: cosine_formula(max(t - steps, 0), **hyper),
            COSINE,
            {"steps": steps},
            make=lambda steps, **hyper: fo.shift_schedule(cosine(**hyper), steps),
        )
        for steps in (7, -7, 0)
    ),
    Row(
        "repeat_schedule",
        lambda t, steps, **hyper: cosine_formula(t % steps, **hyper),
        COSINE,
        {"steps": 13},
        make=lambda steps, **hyper: fo.repeat_schedule(cosine(**hyper), steps),
        endless=True,
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
    assert {row.name for row in ROWS} == set(schedules.__all__) - {"preview"}


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
        assert values[-1] == values[-2] or endless(row), row


def endless(row: Row) -> bool:
    return row.endless or row.formula in ENDLESS or "decay_rate" in row.hyper


def powers(row: Row) -> bool:
    return bool({"decay_rate", "power", "exponent", "gamma"} & row.hyper.keys())


@rows
def test_a_negative_count_is_a_count_of_0(row: Row) -> None:
    schedule = row.build()
    counts = torch.tensor([-1, -(10**6)])
    assert torch.equal(schedule(counts), schedule(torch.zeros_like(counts)))


@rows
def test_far_beyond_the_end_is_the_end(row: Row) -> None:
    schedule = row.build()
    far = schedule(torch.tensor([10**12, 2**53]))
    assert far.isfinite().all()
    assert endless(row) or torch.equal(far, schedule(torch.tensor([LAST, LAST])))


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
    schedule, of_tensors = row.build(), row.build(**tensors(row.hyper))
    compiled, compiled_of_tensors = (
        torch.compile(lambda count, s=s: s(count), fullgraph=True, backend=backend)
        for s in (schedule, of_tensors)
    )
    for t in (0, 1, 5, 10, 11, LAST, 3):
        torch.testing.assert_close(compiled(torch.tensor(t)), schedule(t), rtol=0, atol=0)
    assert len(graphs) == 1
    for t in (0, LAST):
        values = compiled_of_tensors(torch.tensor(t)), of_tensors(t)
        torch.testing.assert_close(*values, rtol=0, atol=0)
    assert len(graphs) == 2
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
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_narrow_hyperparameters_are_rounded_once(row: Row, dtype: torch.dtype) -> None:
    """When they are given; what is made of them is float64."""
    narrow, counts = tensors(row.hyper, dtype), torch.arange(LAST + 1)
    wide = {name: value.double() for name, value in narrow.items()}
    assert torch.equal(row.build(**narrow)(counts), row.build(**wide)(counts))


@rows
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_tensor_is_read_when_the_schedule_is_called(
    row: Row, dtype: torch.dtype
) -> None:
    """It may be a parameter that is trained, and a step of torch.optim changes it in place."""
    hyper, counts = tensors(row.hyper, dtype), torch.arange(LAST + 1)
    schedule = row.build(**hyper)
    for value in hyper.values():
        value.mul_(0.9)
    assert torch.equal(schedule(counts), row.build(**hyper)(counts))


@rows
def test_a_tensor_that_is_trained_gets_its_gradient_at_every_step(row: Row) -> None:
    """Nothing of the graph is kept from one call to the next."""
    hyper = {name: value.requires_grad_() for name, value in tensors(row.hyper).items()}
    schedule = row.build(**hyper)
    first, second = (
        torch.autograd.grad(
            schedule(torch.arange(LAST + 1)).sum(),
            [*hyper.values()],
            materialize_grads=True,
        )
        for _ in range(2)
    )
    assert all(map(torch.equal, first, second))


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


@pytest.mark.parametrize("peak", [0.0, torch.tensor(0.0)], ids=["number", "tensor"])
def test_a_peak_of_0(peak) -> None:
    """No quotient of values: one of 64 swept peaks may be 0."""
    counts = torch.arange(31)
    for schedule in (
        fo.warmup_cosine_decay_schedule(0.0, peak, 5, 30),
        fo.warmup_exponential_decay_schedule(0.0, peak, 5, 30, 0.5),
        fo.warmup_stable_decay_schedule(0.0, peak, 5, 5, 20),
        fo.inverse_sqrt_schedule(0.0, peak, 5),
        fo.cosine_onecycle_schedule(30, peak),
        fo.linear_onecycle_schedule(30, peak),
        fo.cyclic_schedule(0.0, peak, 5),
        fo.sgdr_schedule([{**CYCLE, "peak_value": peak}]),
    ):
        assert schedule(counts).tolist() == [0.0] * 31, schedule
    assert fo.warmup_cosine_decay_schedule(0.1, peak, 5, 30, 0.3)(30) == 0.3


# ---- algebra -------------------------------------------------------------------------------------


def test_the_operators_are_the_functions() -> None:
    a, b = fo.linear_schedule(0.0, 1.0, 10), fo.cosine_decay_schedule(2.0, 20)
    plain, number = lambda t: 3.0 * t, torch.tensor(0.5)
    for pairs, add, multiply in (
        ((a, b), a + b, a * b),
        ((a, plain), a + plain, a * plain),
        ((plain, a), plain + a, plain * a),
        ((a, 0.5), a + 0.5, a * 0.5),
        ((2, a), 2 + a, 2 * a),
        ((number, a), number + a, number * a),
    ):
        assert repr(add) == repr(fo.add_schedules(*pairs))
        assert repr(multiply) == repr(fo.multiply_schedules(*pairs))
        assert torch.equal(add(COUNTS), fo.add_schedules(*pairs)(COUNTS))
        assert torch.equal(multiply(COUNTS), fo.multiply_schedules(*pairs)(COUNTS))
    assert torch.equal(sum([a, b])(COUNTS), a(COUNTS) + b(COUNTS))


COUNTS = torch.arange(25)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda f: fo.add_schedules(f), 6.0),
        (lambda f: fo.multiply_schedules(f, f), 36.0),
        (lambda f: fo.clip_schedule(f, max_value=5), 5.0),
        (lambda f: fo.shift_schedule(f, 1), 4.0),
        (lambda f: fo.repeat_schedule(f, 2), 2.0),
        (lambda f: fo.clip_schedule(lambda count: 7, 8), 8.0),
        (lambda f: fo.multiply_schedules(2, 3), 6.0),
    ],
)
def test_algebra_of_any_function_of_the_count(make, expected: float) -> None:
    value = make(lambda count: 2.0 * count)(torch.tensor([3, 3]))
    assert value.tolist() == [expected] * 2
    assert value.dtype == torch.float64


def test_a_product_is_a_learning_rate() -> None:
    tx = fo.sgd(0.5 * fo.linear_schedule(1.0, 0.0, 4) + 0.25)
    params = torch.zeros(2)
    state = tx.init(params)
    for rate in (0.75, 0.625, 0.5, 0.375, 0.25, 0.25):
        updates, state = tx.update(torch.ones(2), state, params)
        assert updates.tolist() == [-rate] * 2


def test_the_schedule_of_attention_is_all_you_need() -> None:
    d, warmup = 512, 400
    peak = (d * warmup) ** -0.5
    schedule = fo.shift_schedule(fo.inverse_sqrt_schedule(0.0, peak, warmup), -1)
    for count in (0, 5, 398, 399, 400, 9999):
        step = count + 1
        expected = d**-0.5 * min(step**-0.5, step * warmup**-1.5)
        assert schedule(count).item() == pytest.approx(expected, rel=1e-14)


def test_warmup_stable_decay_continues_from_a_checkpoint() -> None:
    """A longer run has the same values until the decay of the shorter one."""
    short = fo.warmup_stable_decay_schedule(0.0, 1.0, 5, 10, 5)
    long = fo.warmup_stable_decay_schedule(0.0, 1.0, 5, 30, 5)
    assert torch.equal(short(COUNTS)[:16], long(COUNTS)[:16])
    assert torch.equal(short(COUNTS)[15:21], long(COUNTS + 20)[15:21])


# ---- against torch.optim.lr_scheduler ------------------------------------------------------------

LR, N = 0.4, 200
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
                for n in (10, 20, 40, 80, 160)
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
        fo.cosine_onecycle_schedule(N - 1, LR, pct_start=59.5 / (N - 1)),
        N - 1,
    ),
    "OneCycleLR-linear": (
        lambda o: torch_lr.OneCycleLR(
            o, LR, total_steps=N, pct_start=0.3, anneal_strategy="linear"
        ),
        fo.piecewise_interpolate_schedule(
            "linear", LR / 25, {59: 25.0, N - 1: 1 / (25 * 1e4)}
        ),
        N - 1,
    ),
    "OneCycleLR-three_phase": (
        lambda o: torch_lr.OneCycleLR(
            o, LR, total_steps=N, pct_start=0.3, three_phase=True
        ),
        fo.piecewise_interpolate_schedule(
            "cosine", LR / 25, {59: 25.0, 118: 1 / 25, N - 1: 1e-4}
        ),
        N - 1,
    ),
    "CosineAnnealingLR-beyond": (
        lambda o: torch_lr.CosineAnnealingLR(o, 30, eta_min=0.1),
        fo.repeat_schedule(
            fo.piecewise_interpolate_schedule("cosine", LR, {30: 0.1 / LR, 60: LR / 0.1}),
            60,
        ),
        N,
    ),
    "CosineAnnealingWarmRestarts-endless": (
        lambda o: torch_lr.CosineAnnealingWarmRestarts(o, 13, eta_min=0.1),
        fo.repeat_schedule(fo.cosine_decay_schedule(LR, 13, 0.1 / LR), 13),
        N,
    ),
    **{
        f"CyclicLR-{mode}": (
            lambda o, mode=mode, down=down: torch_lr.CyclicLR(
                o, 0.1, LR, 12, down, mode, gamma=0.98, cycle_momentum=False
            ),
            fo.cyclic_schedule(0.1, LR, 12, down, mode, gamma=0.98),
            N,
        )
        for mode, down in (
            ("triangular", None),
            ("triangular2", 21),
            ("exp_range", 5),
        )
    },
}


PAGE = Path(__file__).parents[1] / "docs" / "migrate.md"
OF_PAGE = re.findall(r"^\| `(\w+\(.*\))` \| `(.*)` \|$", PAGE.read_text(), re.MULTILINE)
PAIRS = [row for row in OF_PAGE if row[0].partition("(")[0] in torch_lr.__all__]
"""The table of schedulers: torch's call, and the schedule."""


def assert_equals_torch(make, schedule, last: int) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=LR)
    scheduler = make(optimizer)
    seen = []
    for t in range(last + 1):
        seen.append(optimizer.param_groups[0]["lr"])
        assert seen[-1] == pytest.approx(schedule(t).item(), rel=1e-12, abs=1e-14), t
        optimizer.step()
        if t < last:
            scheduler.step()
    assert len(set(seen)) > 1


@pytest.mark.parametrize("name", TORCH)
def test_equals_torch(name: str) -> None:
    assert_equals_torch(*TORCH[name])


@pytest.mark.parametrize(("theirs", "ours"), PAIRS, ids=[t[:40] for t, _ in PAIRS])
def test_the_pairs_of_the_page_are_equal(theirs: str, ours: str) -> None:
    names = {"lr": LR, "f": lambda t: 1 / (1 + t)}
    assert_equals_torch(
        lambda opt: eval(theirs, {**vars(torch_lr), **names, "opt": opt}),
        eval(ours, {"fo": fo, **names}),
        N - 1,
    )


def test_every_scheduler_of_torch_has_a_counterpart() -> None:
    """`ReduceLROnPlateau` reads the loss, so it is no function of the count."""
    others = {"LRScheduler", "ReduceLROnPlateau"}
    assert {theirs.partition("(")[0] for theirs, _ in PAIRS} == (
        set(torch_lr.__all__) - others
    )


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
        lambda: fo.warmup_cosine_decay_schedule(0.0, -0.1, 10, 50),
        "peak_value must be 0 or greater",
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
    (
        lambda: fo.warmup_stable_decay_schedule(0.0, 1.0, 5, 5, 0),
        "decay_steps must be a whole number of updates, at least 1; got 0",
    ),
    (
        lambda: fo.warmup_stable_decay_schedule(0.0, 1.0, 5, -1, 5),
        "stable_steps must be a whole number of updates, at least 0; got -1",
    ),
    (
        lambda: fo.warmup_stable_decay_schedule(0.0, 1.0, 2.5, 5, 5),
        "warmup_steps must be a whole number",
    ),
    (
        lambda: fo.warmup_stable_decay_schedule(NAN, 1.0, 5, 5, 5),
        "init_value must be a finite number",
    ),
    (
        lambda: fo.warmup_stable_decay_schedule(0.0, INF, 5, 5, 5),
        "peak_value must be a finite number",
    ),
    (
        lambda: fo.warmup_stable_decay_schedule(0.0, 1.0, 5, 5, 5, NAN),
        "end_value must be a finite number",
    ),
    (
        lambda: fo.warmup_stable_decay_schedule(0.0, 1.0, 5, 5, 5, decay_type="sqrt"),
        r"decay_type must be one of \['linear', 'cosine', '1-sqrt'\]; got 'sqrt'",
    ),
    (
        lambda: fo.inverse_sqrt_schedule(0.0, 1.0, 0),
        "without a warmup, inverse_sqrt_schedule must be given a timescale",
    ),
    (
        lambda: fo.inverse_sqrt_schedule(0.0, 1.0, 5, 0.0),
        r"timescale must be greater than 0; got 0\.0",
    ),
    (
        lambda: fo.inverse_sqrt_schedule(0.0, 1.0, -5),
        "warmup_steps .* at least 0; got -5",
    ),
    (lambda: fo.inverse_sqrt_schedule(0.0, NAN, 5), "peak_value must be a finite number"),
    (
        lambda: fo.cyclic_schedule(0.1, 0.4, 0),
        "step_size_up must be a whole number of updates, at least 1; got 0",
    ),
    (lambda: fo.cyclic_schedule(0.1, 0.4, 5, 0), "step_size_down .* at least 1; got 0"),
    (
        lambda: fo.cyclic_schedule(0.1, 0.4, 5, mode="triangle"),
        r"mode must be one of \['triangular', 'triangular2', 'exp_range'\]; got 'triangle'",
    ),
    (
        lambda: fo.cyclic_schedule(0.1, 0.4, 5, mode="exp_range", gamma=0.0),
        "gamma must be greater than 0",
    ),
    (lambda: fo.cyclic_schedule(NAN, 0.4), "init_value must be a finite number"),
    (lambda: fo.cyclic_schedule(0.1, INF), "peak_value must be a finite number"),
    (
        lambda: fo.constant_schedule(1.0) + NAN,
        "a number beside schedules must be a finite number .* got nan",
    ),
    (
        lambda: fo.clip_schedule(fo.constant_schedule(1.0)),
        "give min_value, max_value or both; got neither",
    ),
    (
        lambda: fo.clip_schedule(fo.constant_schedule(1.0), 0.5, 0.1),
        r"min_value must not be greater than max_value; got 0\.5 and 0\.1",
    ),
    (
        lambda: fo.clip_schedule(fo.constant_schedule(1.0), NAN),
        "min_value must be a finite number",
    ),
    (
        lambda: fo.shift_schedule(fo.constant_schedule(1.0), 2.5),
        r"steps must be a whole number of updates; got 2\.5",
    ),
    (
        lambda: fo.repeat_schedule(fo.constant_schedule(1.0), 0),
        "steps must be a whole number of updates, at least 1; got 0",
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


@pytest.mark.parametrize(
    "make",
    [
        lambda: fo.join_schedules([0.1, 0.2], [10]),
        lambda: fo.clip_schedule(0.1, 0.0, 1.0),
        lambda: fo.shift_schedule(0.1, 5),
        lambda: fo.repeat_schedule(0.1, 5),
        lambda: fo.constant_schedule(1.0) + "0.1",
        lambda: None * fo.constant_schedule(1.0),
    ],
)
def test_what_is_no_function_is_refused(make: Callable[[], Any]) -> None:
    with pytest.raises(
        TypeError, match=r"function of the count; .*use constant_schedule"
    ):
        make()


def test_a_sum_of_nothing_is_refused() -> None:
    for function in (fo.add_schedules, fo.multiply_schedules):
        with pytest.raises(TypeError, match="at least one schedule is needed; got none"):
            function()


# ---- the picture ---------------------------------------------------------------------------------


def test_a_preview_shows_the_values_at_the_counts() -> None:
    pytest.importorskip("matplotlib")
    line = fo.linear_schedule(0.0, 1.0, 10)
    figure = fo.schedules.preview(25, line, lambda count: 0.5, log=True)
    first, second = figure.axes[0].lines
    assert [*first.get_xdata()] == [*range(25)]
    assert [*first.get_ydata()] == [line(count).item() for count in range(25)]
    assert {*second.get_ydata()} == {0.5}
    assert figure.axes[0].get_yscale() == "log"
    many = fo.schedules.preview(1_000_000, line).axes[0].lines[0].get_xdata()
    assert (len(many), many[0], many[-1]) == (1000, 0, 999_999)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ((0, fo.constant_schedule(1.0)), ValueError, "steps must be a whole number"),
        ((10,), TypeError, "at least one schedule"),
        ((10, 0.1), TypeError, "0.1"),
    ],
)
def test_what_cannot_be_previewed(given, error, message) -> None:
    with pytest.raises(error, match=message):
        fo.schedules.preview(*given)
