"""Ready-made schedules that rise and fall: a warmup and what follows it, one cycle, restarts."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor

from functorch_opt._core.transformation import Scalar
from functorch_opt.schedules.curves import (
    constant_schedule,
    cosine_decay_schedule,
    exponential_decay,
    linear_schedule,
)
from functorch_opt.schedules.pieces import join_schedules, piecewise_interpolate_schedule
from functorch_opt.schedules.schedule import (
    Schedule,
    check_boundaries,
    check_finite,
    check_fraction,
    check_not_negative,
    check_positive,
    check_steps,
    makes_schedule,
)

__all__ = [
    "cosine_onecycle_schedule",
    "linear_onecycle_schedule",
    "sgdr_schedule",
    "warmup_constant_schedule",
    "warmup_cosine_decay_schedule",
    "warmup_exponential_decay_schedule",
]


# ---- a warmup and what follows -------------------------------------------------------------------


def _after_warmup(
    init_value: Scalar, peak_value: Scalar, warmup_steps: int, then: Schedule
) -> Schedule:
    """A line from `init_value` to `peak_value`, then another schedule.

    Without warmup steps it is that schedule from the start.
    """
    check_steps(0, warmup_steps=warmup_steps)
    check_finite(init_value=init_value, peak_value=peak_value)
    if warmup_steps == 0:
        return then
    line = linear_schedule(init_value, peak_value, warmup_steps)
    return join_schedules([line, then], [warmup_steps])


@makes_schedule
def warmup_constant_schedule(
    init_value: Scalar, peak_value: Scalar, warmup_steps: int
) -> Callable[[Tensor], Any]:
    """A line from `init_value` to `peak_value` over `warmup_steps` updates, then constant.

    With 0 steps it is `peak_value` from the start.

    Example:
        >>> import functorch_opt as fo
        >>> fo.warmup_constant_schedule(0.0, 1.0, 10)(20)
        tensor(1., dtype=torch.float64)
    """
    check_finite(init_value=init_value, peak_value=peak_value)
    return _after_warmup(
        init_value, peak_value, warmup_steps, constant_schedule(peak_value)
    )


@makes_schedule
def warmup_cosine_decay_schedule(
    init_value: Scalar,
    peak_value: Scalar,
    warmup_steps: int,
    decay_steps: int,
    end_value: Scalar = 0.0,
    exponent: Scalar = 1.0,
) -> Callable[[Tensor], Any]:
    """A line up to `peak_value`, then `cosine_decay_schedule` down to `end_value`.

    Args:
        init_value: first value.
        peak_value: value after the warmup, greater than 0.
        warmup_steps: updates of the warmup.
        decay_steps: updates of the **whole** schedule, the warmup included (as in optax).
        end_value: last value, 0 or greater.
        exponent: of the cosine factor, greater than 0.

    Raises:
        ValueError: `decay_steps` not greater than `warmup_steps`, a negative last value, or a
            value that is not finite.

    Example:
        >>> import functorch_opt as fo
        >>> schedule = fo.warmup_cosine_decay_schedule(0.0, 1.0, 10, 110)
        >>> [round(schedule(count).item(), 3) for count in (0, 5, 10, 60, 110)]
        [0.0, 0.5, 1.0, 0.5, 0.0]
    """
    check_finite(init_value=init_value)
    check_positive(peak_value=peak_value)
    check_not_negative(end_value=end_value)
    check_steps(0, warmup_steps=warmup_steps)
    check_steps(1, decay_steps=decay_steps)
    if decay_steps <= warmup_steps:
        raise ValueError(
            "decay_steps counts the warmup too, so it must be greater than warmup_steps; "
            f"got {decay_steps} and {warmup_steps}."
        )
    falls = decay_steps - warmup_steps
    cosine = cosine_decay_schedule(peak_value, falls, end_value / peak_value, exponent)
    return _after_warmup(init_value, peak_value, warmup_steps, cosine)


@makes_schedule
def warmup_exponential_decay_schedule(
    init_value: Scalar,
    peak_value: Scalar,
    warmup_steps: int,
    transition_steps: int,
    decay_rate: Scalar,
    transition_begin: int = 0,
    staircase: bool = False,
    end_value: Scalar | None = None,
) -> Callable[[Tensor], Any]:
    """A line up to `peak_value` over `warmup_steps` updates, then `exponential_decay`.

    The other arguments are those of `exponential_decay`.

    Example:
        >>> import functorch_opt as fo
        >>> fo.warmup_exponential_decay_schedule(0.0, 1.0, 10, 5, 0.5)(15)
        tensor(0.5000, dtype=torch.float64)
    """
    check_finite(init_value=init_value, peak_value=peak_value)
    decay = exponential_decay(
        peak_value, transition_steps, decay_rate, transition_begin, staircase, end_value
    )
    return _after_warmup(init_value, peak_value, warmup_steps, decay)


# ---- cycles --------------------------------------------------------------------------------------


@makes_schedule
def linear_onecycle_schedule(
    transition_steps: int,
    peak_value: Scalar,
    pct_start: float = 0.3,
    pct_final: float = 0.85,
    div_factor: float = 25.0,
    final_div_factor: float = 1e4,
) -> Callable[[Tensor], Any]:
    """One cycle of three lines.

    They go from ``peak_value / div_factor`` up to `peak_value`, back down to the first value, and
    then down to the first value divided by `final_div_factor`.

    Args:
        transition_steps: updates of the whole cycle.
        peak_value: highest value.
        pct_start: fraction of the cycle spent going up.
        pct_final: fraction after which the last descent begins.
        div_factor: the first value is ``peak_value / div_factor``.
        final_div_factor: the last value is the first divided by this.

    Raises:
        ValueError: the fractions are out of order, or there are so few steps that two pieces
            coincide.

    Source: Smith & Topin, "Super-Convergence: Very Fast Training of Neural Networks Using Large
    Learning Rates", 2018.

    Example:
        >>> import functorch_opt as fo
        >>> round(fo.linear_onecycle_schedule(100, 1.0)(30).item(), 6)
        1.0
    """
    check_fraction(pct_start=pct_start, pct_final=pct_final)
    check_finite(peak_value=peak_value)
    check_positive(div_factor=div_factor, final_div_factor=final_div_factor)
    check_steps(1, transition_steps=transition_steps)
    scales = [
        (int(pct_start * transition_steps), div_factor),
        (int(pct_final * transition_steps), 1 / div_factor),
        (transition_steps, 1 / final_div_factor),
    ]
    check_boundaries([count for count, _ in scales])
    return piecewise_interpolate_schedule("linear", peak_value / div_factor, dict(scales))


@makes_schedule
def cosine_onecycle_schedule(
    transition_steps: int,
    peak_value: Scalar,
    pct_start: float = 0.3,
    div_factor: float = 25.0,
    final_div_factor: float = 1e4,
) -> Callable[[Tensor], Any]:
    """One cycle of two half cosines.

    They go from ``peak_value / div_factor`` up to `peak_value`, and then down to the first value
    divided by `final_div_factor`. Arguments, errors and source are those of
    `linear_onecycle_schedule`; this is the shape of torch's ``OneCycleLR``.

    Example:
        >>> import functorch_opt as fo
        >>> fo.cosine_onecycle_schedule(100, 1.0)(30)
        tensor(1., dtype=torch.float64)
    """
    check_fraction(pct_start=pct_start)
    check_finite(peak_value=peak_value)
    check_positive(div_factor=div_factor, final_div_factor=final_div_factor)
    check_steps(1, transition_steps=transition_steps)
    scales = [
        (int(pct_start * transition_steps), div_factor),
        (transition_steps, 1 / (div_factor * final_div_factor)),
    ]
    check_boundaries([count for count, _ in scales])
    return piecewise_interpolate_schedule("cosine", peak_value / div_factor, dict(scales))


@makes_schedule
def sgdr_schedule(cosine_kwargs: Iterable[Mapping[str, Any]]) -> Callable[[Tensor], Any]:
    """Cosine decay with warm restarts: one `warmup_cosine_decay_schedule` after another.

    Args:
        cosine_kwargs: for each cycle, the arguments of `warmup_cosine_decay_schedule`. Their
            ``decay_steps`` is the length of the cycle.

    Raises:
        ValueError: there is no cycle, or `warmup_cosine_decay_schedule` refuses its arguments.

    Source: Loshchilov & Hutter, "SGDR: Stochastic Gradient Descent with Warm Restarts", 2017,
    eq. 5.

    Example:
        >>> import functorch_opt as fo
        >>> cycle = dict(init_value=0.0, peak_value=1.0, warmup_steps=0, decay_steps=10)
        >>> fo.sgdr_schedule([cycle, cycle])(10)
        tensor(1., dtype=torch.float64)
    """
    cycles = [dict(kwargs) for kwargs in cosine_kwargs]
    if not cycles:
        raise ValueError(
            "sgdr_schedule needs the arguments of at least one cycle; got none."
        )
    schedules = [warmup_cosine_decay_schedule(**kwargs) for kwargs in cycles]
    ends = list(itertools.accumulate(kwargs["decay_steps"] for kwargs in cycles))
    return join_schedules(schedules, ends[:-1])
