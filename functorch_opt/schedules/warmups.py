"""Ready-made schedules that begin with a warmup, and what follows it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from functorch_opt._core.transformation import Scalar
from functorch_opt.schedules.checks import (
    check_finite,
    check_not_negative,
    check_positive,
    check_steps,
)
from functorch_opt.schedules.curves import (
    constant_schedule,
    exponential_decay,
    linear_schedule,
)
from functorch_opt.schedules.pieces import join_schedules
from functorch_opt.schedules.schedule import Schedule, half_cosine, makes_schedule, since

__all__ = [
    "inverse_sqrt_schedule",
    "warmup_constant_schedule",
    "warmup_cosine_decay_schedule",
    "warmup_exponential_decay_schedule",
    "warmup_stable_decay_schedule",
]


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
        peak_value: value after the warmup, 0 or greater.
        warmup_steps: updates of the warmup.
        decay_steps: updates of the **whole** schedule, the warmup included (as in optax).
        end_value: last value, 0 or greater.
        exponent: of the cosine factor, greater than 0.

    Raises:
        ValueError: `decay_steps` not greater than `warmup_steps`, a negative peak or last value,
            or a value that is not finite.

    The last value is `end_value` for a peak of 0 too. optax would decay to 0.

    Example:
        >>> import functorch_opt as fo
        >>> schedule = fo.warmup_cosine_decay_schedule(0.0, 1.0, 10, 110)
        >>> [round(schedule(count).item(), 3) for count in (0, 5, 10, 60, 110)]
        [0.0, 0.5, 1.0, 0.5, 0.0]
    """
    check_not_negative(peak_value=peak_value, end_value=end_value)
    check_positive(exponent=exponent)
    check_steps(0, warmup_steps=warmup_steps)
    check_steps(1, decay_steps=decay_steps)
    if decay_steps <= warmup_steps:
        raise ValueError(
            "decay_steps counts the warmup too, so it must be greater than warmup_steps; "
            f"got {decay_steps} and {warmup_steps}."
        )

    def falls(t: Tensor) -> Any:
        left = half_cosine(t, decay_steps - warmup_steps, exponent)
        return end_value + (peak_value - end_value) * left

    return _after_warmup(init_value, peak_value, warmup_steps, Schedule(falls))


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


@makes_schedule
def warmup_stable_decay_schedule(
    init_value: Scalar,
    peak_value: Scalar,
    warmup_steps: int,
    stable_steps: int,
    decay_steps: int,
    end_value: Scalar = 0.0,
    decay_type: Literal["linear", "cosine", "1-sqrt"] = "linear",
) -> Callable[[Tensor], Any]:
    """A line up to `peak_value`, which is then held, and at last a short decay to `end_value`.

    With ``x``, the fraction of the decay that is over, its value is ``end + (peak - end) left``,
    where `decay_type` says what is left: ``1 - x``, ``(1 + cos(pi x)) / 2`` or ``1 - sqrt(x)``.
    To train longer, go on from a checkpoint before the decay with more `stable_steps`.

    Args:
        init_value: first value.
        peak_value: value after the warmup.
        warmup_steps: updates of the warmup.
        stable_steps: updates at `peak_value`.
        decay_steps: updates of the decay **alone**, at least 1. The whole schedule takes
            ``warmup_steps + stable_steps + decay_steps``.
        end_value: last value.
        decay_type: "linear", "cosine" or "1-sqrt".

    Raises:
        ValueError: an unknown type, no decay steps, or a value that is not finite.

    Source: Hu et al., "MiniCPM: Unveiling the Potential of Small Language Models with Scalable
    Training Strategies", 2024, sec. 4; "1-sqrt" from Hägele et al., "Scaling Laws and
    Compute-Optimal Training Beyond Fixed Training Durations", 2024.

    Example:
        >>> import functorch_opt as fo
        >>> schedule = fo.warmup_stable_decay_schedule(0.0, 1.0, 10, 80, 20)
        >>> [round(schedule(count).item(), 3) for count in (0, 5, 10, 90, 100, 110)]
        [0.0, 0.5, 1.0, 1.0, 0.5, 0.0]
    """
    check_finite(end_value=end_value)
    check_steps(0, stable_steps=stable_steps)
    check_steps(1, decay_steps=decay_steps)
    kinds: dict[str, Callable[[Tensor], Tensor]] = {
        "linear": lambda x: 1 - x,
        "cosine": lambda x: 0.5 * (1 + torch.cos(math.pi * x)),
        "1-sqrt": lambda x: 1 - x.sqrt(),
    }
    if decay_type not in kinds:
        raise ValueError(f"decay_type must be one of {[*kinds]}; got {decay_type!r}.")
    left = kinds[decay_type]

    def falls(t: Tensor) -> Any:
        x = since(t, stable_steps).clamp(0, decay_steps) / decay_steps
        return end_value + (peak_value - end_value) * left(x)

    return _after_warmup(init_value, peak_value, warmup_steps, Schedule(falls))


@makes_schedule
def inverse_sqrt_schedule(
    init_value: Scalar,
    peak_value: Scalar,
    warmup_steps: int,
    timescale: Scalar | None = None,
) -> Callable[[Tensor], Any]:
    """A line up to `peak_value`, then ``peak_value * sqrt(s / (t - warmup_steps + s))`` for ever.

    Without `timescale` this is ``peak_value * sqrt(warmup_steps / t)``, as in "Attention Is All You
    Need". There the first update is number 1, so its schedule for a model of width d is
    ``shift_schedule(inverse_sqrt_schedule(0.0, (d * warmup_steps) ** -0.5, warmup_steps), -1)``.

    Args:
        init_value: first value.
        peak_value: value after the warmup.
        warmup_steps: updates of the warmup.
        timescale: s, a number of updates greater than 0: after ``3 s`` of them the value is half of
            the peak. The default is `warmup_steps`.

    Raises:
        ValueError: there is neither a warmup nor a timescale, or a value is not finite.

    Source: Vaswani et al., "Attention Is All You Need", 2017, eq. 3.

    Example:
        >>> import functorch_opt as fo
        >>> schedule = fo.inverse_sqrt_schedule(0.0, 1.0, 100)
        >>> [schedule(count).item() for count in (50, 100, 400, 10_000)]
        [0.5, 1.0, 0.5, 0.1]
    """
    check_finite(peak_value=peak_value)
    check_steps(0, warmup_steps=warmup_steps)
    s = warmup_steps if timescale is None else timescale
    if timescale is None and warmup_steps == 0:
        raise ValueError(
            "without a warmup, inverse_sqrt_schedule must be given a timescale."
        )
    check_positive(timescale=s)

    def falls(t: Tensor) -> Any:
        ratio = s / (t.clamp(min=0) + s)
        return peak_value * ratio.sqrt()

    return _after_warmup(init_value, peak_value, warmup_steps, Schedule(falls))
