"""Schedules: functions of the count. They are pure, so they trace, vmap and differentiate, and are checked when they are made.

    schedule(count) -> value        count: int, or int tensor (0-dim, or one entry per leaf);  value: float64 tensor of that shape

``count`` is how many updates were made before this one: the first value used is ``schedule(0)``. Anything callable will do as a
schedule. Those here carry optax's names and arguments; what torch calls step decay is `exponential_decay` with ``staircase=True``.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, ParamSpec

import torch
from torch import Tensor

from functorch_opt import tree
from functorch_opt._core.transformation import Expression, Scalar

__all__ = [
    "constant_schedule",
    "cosine_decay_schedule",
    "cosine_onecycle_schedule",
    "exponential_decay",
    "join_schedules",
    "linear_onecycle_schedule",
    "linear_schedule",
    "piecewise_constant_schedule",
    "piecewise_interpolate_schedule",
    "polynomial_schedule",
    "sgdr_schedule",
    "warmup_constant_schedule",
    "warmup_cosine_decay_schedule",
    "warmup_exponential_decay_schedule",
]


class Schedule(Expression):
    """A function of the count that prints as it was written."""

    def __init__(self, value: Callable[[Tensor], Any]) -> None:
        self.value = value

    def __call__(self, count: Tensor | int) -> Tensor:
        t = tree.as_real(torch.as_tensor(count))
        value = self.value(t)
        is_like_t = isinstance(value, Tensor) and value.dtype is t.dtype and value.shape == t.shape
        return value if is_like_t else torch.zeros_like(t) + value


P = ParamSpec("P")


def _schedule(factory: Callable[P, Callable[[Tensor], Any]]) -> Callable[P, Schedule]:
    """The factory returns a function of the count as a float64 tensor; what it makes is a `Schedule`."""

    @functools.wraps(factory)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> Schedule:
        own_args: Any = [_own(value) for value in args]
        own_kwargs: Any = {name: _own(value) for name, value in kwargs.items()}
        schedule = Schedule(factory(*own_args, **own_kwargs))
        schedule.call = (wrapper, tuple(own_args), own_kwargs)
        return schedule

    return wrapper


def _own(value: Any) -> Any:
    """A copy of a container, a list of an iterator: the call is kept, to print and to pickle, and nobody may change it or use it up."""
    if isinstance(value, Mapping):
        return {key: _own(item) for key, item in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, (str, Tensor)):
        return [_own(item) for item in value]
    return value


# ---- checks at construction ------------------------------------------------------------------------------------------


def _at_least(least: int, **steps: int) -> None:
    for name, value in steps.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(
                f"{name} must be a whole number of updates, at least {least}; got {value!r}."
            )


def _finite(**values: Scalar | None) -> None:
    for name, value in values.items():
        if not (
            value is None
            or isinstance(value, Tensor)
            or (isinstance(value, (int, float)) and math.isfinite(value))
        ):
            raise ValueError(f"{name} must be a finite number or a 0-dim tensor; got {value!r}.")


def _positive(**values: Scalar) -> None:
    _finite(**values)
    for name, value in values.items():
        if not isinstance(value, Tensor) and value <= 0:
            raise ValueError(f"{name} must be greater than 0; got {value!r}.")


# ---- what would change nothing is left out: an operation on one number takes as long as one on a small parameter -----------------


def _since(t: Tensor, begin: int) -> Tensor:
    return t - begin if begin else t


def _power(x: Tensor, exponent: Scalar) -> Tensor:
    return x if isinstance(exponent, (int, float)) and exponent == 1 else x**exponent


# ---- one piece -------------------------------------------------------------------------------------------------------


@_schedule
def constant_schedule(value: Scalar) -> Callable[[Tensor], Any]:
    """Always `value`.

    Example:
        >>> import functorch_opt as fo
        >>> fo.constant_schedule(0.1)(7)
        tensor(0.1000, dtype=torch.float64)
    """
    _finite(value=value)
    return lambda t: torch.zeros_like(t) + value


@_schedule
def polynomial_schedule(
    init_value: Scalar,
    end_value: Scalar,
    power: Scalar,
    transition_steps: int,
    transition_begin: int = 0,
) -> Callable[[Tensor], Any]:
    """From `init_value` to `end_value` along ``(1 - t/T)^power``: ``end + (init - end) (1 - t/T)^power``, then constant.

    Args:
        init_value: value until `transition_begin`.
        end_value: value from ``transition_begin + transition_steps`` on.
        power: exponent, greater than 0; 1 is `linear_schedule`.
        transition_steps: T, in updates, at least 1.
        transition_begin: updates before the transition starts.

    Raises:
        ValueError: no transition steps (optax would return `init_value` for ever), or a value that is not finite.

    Example:
        >>> import functorch_opt as fo
        >>> fo.polynomial_schedule(1.0, 0.0, 2, 10)(5)
        tensor(0.2500, dtype=torch.float64)
    """
    _finite(init_value=init_value, end_value=end_value)
    _positive(power=power)
    _at_least(1, transition_steps=transition_steps)
    _at_least(0, transition_begin=transition_begin)

    def value(t: Tensor) -> Any:
        left = 1 - _since(t, transition_begin).clamp(0, transition_steps) / transition_steps
        return end_value + (init_value - end_value) * _power(left, power)

    return value


@_schedule
def linear_schedule(
    init_value: Scalar, end_value: Scalar, transition_steps: int, transition_begin: int = 0
) -> Callable[[Tensor], Any]:
    """From `init_value` to `end_value` along a line, then constant.

    Args and errors are those of `polynomial_schedule`.

    Example:
        >>> import functorch_opt as fo
        >>> fo.linear_schedule(0.0, 1.0, 10)(5)
        tensor(0.5000, dtype=torch.float64)
    """
    return polynomial_schedule(init_value, end_value, 1, transition_steps, transition_begin)


@_schedule
def exponential_decay(
    init_value: Scalar,
    transition_steps: int,
    decay_rate: Scalar,
    transition_begin: int = 0,
    staircase: bool = False,
    end_value: Scalar | None = None,
) -> Callable[[Tensor], Any]:
    """``init_value * decay_rate^(t / transition_steps)``; with `staircase` the exponent is rounded down: step decay.

    Args:
        init_value: value until `transition_begin`.
        transition_steps: updates after which the value has been multiplied by `decay_rate`, at least 1.
        decay_rate: factor, greater than 0.
        transition_begin: updates before the decay starts.
        staircase: hold the value between multiples of `transition_steps`, as torch's ``StepLR`` does.
        end_value: bound for the value: from below if it decays, from above otherwise (``decay_rate >= 1``).

    Raises:
        ValueError: no transition steps, or a rate that is not positive.

    Example:
        >>> import functorch_opt as fo
        >>> step_decay = fo.exponential_decay(1.0, 30, 0.1, staircase=True)
        >>> [round(step_decay(epoch).item(), 3) for epoch in (0, 29, 30, 60)]
        [1.0, 1.0, 0.1, 0.01]
    """
    _finite(init_value=init_value, end_value=end_value)
    _positive(decay_rate=decay_rate)
    _at_least(1, transition_steps=transition_steps)
    _at_least(0, transition_begin=transition_begin)
    grows = torch.as_tensor(decay_rate, dtype=torch.float64) >= 1

    def value(t: Tensor) -> Any:
        exponent = _since(t, transition_begin).clamp(min=0) / transition_steps
        decayed = init_value * torch.as_tensor(decay_rate, dtype=t.dtype) ** (
            exponent.floor() if staircase else exponent
        )
        if end_value is None:
            return decayed
        bound = torch.as_tensor(end_value, dtype=t.dtype)
        return torch.where(grows, torch.minimum(decayed, bound), torch.maximum(decayed, bound))

    return value


@_schedule
def cosine_decay_schedule(
    init_value: Scalar, decay_steps: int, alpha: Scalar = 0.0, exponent: Scalar = 1.0
) -> Callable[[Tensor], Any]:
    """Half a cosine from `init_value` down to ``alpha * init_value``: ``init ((1 - alpha) ((1 + cos(pi t/T)) / 2)^exponent + alpha)``.

    Args:
        init_value: first value.
        decay_steps: T, in updates, at least 1; constant afterwards.
        alpha: last value as a fraction of the first.
        exponent: of the cosine factor, greater than 0.

    Raises:
        ValueError: no decay steps, or a value that is not finite.

    Source: Loshchilov & Hutter, "SGDR: Stochastic Gradient Descent with Warm Restarts", 2017, eq. 5 (first period).

    Example:
        >>> import functorch_opt as fo
        >>> fo.cosine_decay_schedule(1.0, 100)(50)
        tensor(0.5000, dtype=torch.float64)
    """
    _finite(init_value=init_value, alpha=alpha)
    _positive(exponent=exponent)
    _at_least(1, decay_steps=decay_steps)

    def value(t: Tensor) -> Any:
        cosine = 0.5 * (1 + torch.cos(math.pi * t.clamp(0, decay_steps) / decay_steps))
        return init_value * (1 - alpha) * _power(cosine, exponent) + init_value * alpha

    return value


# ---- several pieces --------------------------------------------------------------------------------------------------


def _boundaries(boundaries: Iterable[Any], *, least: int) -> None:
    previous = least - 1
    for boundary in boundaries:
        if isinstance(boundary, bool) or not isinstance(boundary, int) or boundary <= previous:
            raise ValueError(
                f"boundaries must be increasing whole numbers, at least {least}; got {boundary!r} after {previous}."
            )
        previous = boundary


@_schedule
def join_schedules(
    schedules: Sequence[Callable[[Tensor], Any]], boundaries: Sequence[int]
) -> Callable[[Tensor], Any]:
    """The first schedule before the first boundary, the second from there on, and so on; each starts anew at 0.

    Args:
        schedules: at least one.
        boundaries: the counts at which the next one begins, increasing, one fewer than `schedules`.

    Raises:
        ValueError: the numbers do not fit, or the boundaries do not increase.

    Example:
        >>> import functorch_opt as fo
        >>> joined = fo.join_schedules([fo.linear_schedule(0.0, 1.0, 10), fo.constant_schedule(0.5)], [10])
        >>> joined(9), joined(10)
        (tensor(0.9000, dtype=torch.float64), tensor(0.5000, dtype=torch.float64))
    """
    schedules, boundaries = list(schedules), list(boundaries)
    if len(schedules) != len(boundaries) + 1:
        raise ValueError(
            f"join_schedules needs one boundary fewer than schedules; got {len(schedules)} schedules and {len(boundaries)} boundaries."
        )
    _boundaries(boundaries, least=1)

    def value(t: Tensor) -> Any:
        result = t
        for begin, end, schedule in zip(
            [0, *boundaries], [*boundaries, None], schedules, strict=True
        ):
            piece = schedule(
                _since(t, begin).clamp(0, end and end - begin)
            )  # beyond its end it might overflow, and 0 * inf is no gradient
            result = torch.where(t < begin, result, piece) if begin else piece
        return result

    return value


@_schedule
def piecewise_constant_schedule(
    init_value: Scalar, boundaries_and_scales: Mapping[int, Scalar] | None = None
) -> Callable[[Tensor], Any]:
    """`init_value`, multiplied by a scale at each boundary (cumulatively), from that count on.

    Args:
        init_value: first value.
        boundaries_and_scales: ``{count: scale}``.

    Raises:
        ValueError: a boundary that is not a positive whole number.

    Example:
        >>> import functorch_opt as fo
        >>> schedule = fo.piecewise_constant_schedule(1.0, {10: 0.1, 20: 0.5})
        >>> [round(schedule(count).item(), 3) for count in (9, 10, 20)]
        [1.0, 0.1, 0.05]
    """
    pieces = dict(sorted((boundaries_and_scales or {}).items()))
    _finite(
        init_value=init_value,
        **{f"the scale at {boundary}": scale for boundary, scale in pieces.items()},
    )
    _boundaries(pieces, least=1)

    def value(t: Tensor) -> Any:
        result = torch.zeros_like(t) + init_value
        for boundary, scale in pieces.items():
            result = torch.where(t < boundary, result, result * scale)
        return result

    return value


@_schedule
def piecewise_interpolate_schedule(
    interpolate_type: Literal["linear", "cosine"],
    init_value: Scalar,
    boundaries_and_scales: Mapping[int, Scalar] | None = None,
) -> Callable[[Tensor], Any]:
    """Like `piecewise_constant_schedule`, but going from one value to the next along a line or half a cosine.

    Args:
        interpolate_type: "linear" or "cosine".
        init_value: value at count 0.
        boundaries_and_scales: ``{count: scale}``: at that count the value is the one before times the scale.

    Raises:
        ValueError: another type, or a boundary that is not a positive whole number.

    Example:
        >>> import functorch_opt as fo
        >>> fo.piecewise_interpolate_schedule("linear", 1.0, {10: 0.5})(5)
        tensor(0.7500, dtype=torch.float64)
    """
    if interpolate_type not in ("linear", "cosine"):
        raise ValueError(
            f"interpolate_type must be 'linear' or 'cosine'; got {interpolate_type!r}."
        )
    pieces = dict(sorted((boundaries_and_scales or {}).items()))
    _finite(
        init_value=init_value,
        **{f"the scale at {boundary}": scale for boundary, scale in pieces.items()},
    )
    _boundaries(pieces, least=1)

    def value(t: Tensor) -> Any:
        result = torch.zeros_like(t) + init_value
        start, begin = result, 0
        for boundary, scale in pieces.items():
            end = start * scale
            fraction = (_since(t, begin) / (boundary - begin)).clamp(0, 1)
            if interpolate_type == "cosine":
                fraction = 0.5 * (1 - torch.cos(math.pi * fraction))
            result = torch.where(t < begin, result, start + (end - start) * fraction)
            start, begin = end, boundary
        return result

    return value


# ---- ready-made ------------------------------------------------------------------------------------------------------


def _after_warmup(
    init_value: Scalar, peak_value: Scalar, warmup_steps: int, then: Schedule
) -> Schedule:
    """A line from `init_value` to `peak_value`, then another schedule. Without warmup steps, that schedule from the start."""
    _at_least(0, warmup_steps=warmup_steps)
    _finite(init_value=init_value, peak_value=peak_value)
    return (
        then
        if warmup_steps == 0
        else join_schedules(
            [linear_schedule(init_value, peak_value, warmup_steps), then], [warmup_steps]
        )
    )


@_schedule
def warmup_constant_schedule(
    init_value: Scalar, peak_value: Scalar, warmup_steps: int
) -> Callable[[Tensor], Any]:
    """A line from `init_value` to `peak_value` over `warmup_steps` updates, then constant. With 0 steps, `peak_value` from the start.

    Example:
        >>> import functorch_opt as fo
        >>> fo.warmup_constant_schedule(0.0, 1.0, 10)(20)
        tensor(1., dtype=torch.float64)
    """
    _finite(init_value=init_value, peak_value=peak_value)
    return _after_warmup(init_value, peak_value, warmup_steps, constant_schedule(peak_value))


@_schedule
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
        peak_value: value after the warmup; positive.
        warmup_steps: updates of the warmup.
        decay_steps: updates of the **whole** schedule, the warmup included (as in optax).
        end_value: last value.
        exponent: of the cosine factor.

    Raises:
        ValueError: `decay_steps` not greater than `warmup_steps`, or a value that is not finite.

    Example:
        >>> import functorch_opt as fo
        >>> schedule = fo.warmup_cosine_decay_schedule(0.0, 1.0, 10, 110)
        >>> [round(schedule(count).item(), 3) for count in (0, 5, 10, 60, 110)]
        [0.0, 0.5, 1.0, 0.5, 0.0]
    """
    _finite(init_value=init_value, end_value=end_value)
    _positive(peak_value=peak_value)
    _at_least(0, warmup_steps=warmup_steps)
    _at_least(1, decay_steps=decay_steps)
    if decay_steps <= warmup_steps:
        raise ValueError(
            f"decay_steps counts the warmup too, so it must be greater than warmup_steps; got {decay_steps} and {warmup_steps}."
        )
    cosine = cosine_decay_schedule(
        peak_value, decay_steps - warmup_steps, end_value / peak_value, exponent
    )
    return _after_warmup(init_value, peak_value, warmup_steps, cosine)


@_schedule
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
    """A line up to `peak_value` over `warmup_steps` updates, then `exponential_decay` with the other arguments.

    Example:
        >>> import functorch_opt as fo
        >>> fo.warmup_exponential_decay_schedule(0.0, 1.0, 10, 5, 0.5)(15)
        tensor(0.5000, dtype=torch.float64)
    """
    _finite(init_value=init_value, peak_value=peak_value)
    decay = exponential_decay(
        peak_value, transition_steps, decay_rate, transition_begin, staircase, end_value
    )
    return _after_warmup(init_value, peak_value, warmup_steps, decay)


def _fraction(**fractions: float) -> None:
    for name, value in fractions.items():
        if not (isinstance(value, (int, float)) and 0 < value < 1):
            raise ValueError(f"{name} must be between 0 and 1; got {value!r}.")


@_schedule
def linear_onecycle_schedule(
    transition_steps: int,
    peak_value: Scalar,
    pct_start: float = 0.3,
    pct_final: float = 0.85,
    div_factor: float = 25.0,
    final_div_factor: float = 1e4,
) -> Callable[[Tensor], Any]:
    """One cycle of lines: ``peak/div_factor`` up to `peak_value`, down to where it began, then down by `final_div_factor`.

    Args:
        transition_steps: updates of the whole cycle.
        peak_value: highest value.
        pct_start: fraction of the cycle spent going up.
        pct_final: fraction after which the last descent begins.
        div_factor: first value is ``peak_value / div_factor``.
        final_div_factor: last value is the first divided by this.

    Raises:
        ValueError: fractions out of order, or so few steps that two pieces fall together.

    Source: Smith & Topin, "Super-Convergence: Very Fast Training of Neural Networks Using Large Learning Rates", 2018.

    Example:
        >>> import functorch_opt as fo
        >>> round(fo.linear_onecycle_schedule(100, 1.0)(30).item(), 6)
        1.0
    """
    _fraction(pct_start=pct_start, pct_final=pct_final)
    _finite(peak_value=peak_value)
    _positive(div_factor=div_factor, final_div_factor=final_div_factor)
    _at_least(1, transition_steps=transition_steps)
    scales = [
        (int(pct_start * transition_steps), div_factor),
        (int(pct_final * transition_steps), 1 / div_factor),
        (transition_steps, 1 / final_div_factor),
    ]
    _boundaries([count for count, _ in scales], least=1)
    return piecewise_interpolate_schedule("linear", peak_value / div_factor, dict(scales))


@_schedule
def cosine_onecycle_schedule(
    transition_steps: int,
    peak_value: Scalar,
    pct_start: float = 0.3,
    div_factor: float = 25.0,
    final_div_factor: float = 1e4,
) -> Callable[[Tensor], Any]:
    """One cycle of half cosines: ``peak/div_factor`` up to `peak_value`, then down to the first value divided by `final_div_factor`.

    Arguments, errors and source are those of `linear_onecycle_schedule`; this is the shape of torch's ``OneCycleLR``.

    Example:
        >>> import functorch_opt as fo
        >>> fo.cosine_onecycle_schedule(100, 1.0)(30)
        tensor(1., dtype=torch.float64)
    """
    _fraction(pct_start=pct_start)
    _finite(peak_value=peak_value)
    _positive(div_factor=div_factor, final_div_factor=final_div_factor)
    _at_least(1, transition_steps=transition_steps)
    scales = [
        (int(pct_start * transition_steps), div_factor),
        (transition_steps, 1 / (div_factor * final_div_factor)),
    ]
    _boundaries([count for count, _ in scales], least=1)
    return piecewise_interpolate_schedule("cosine", peak_value / div_factor, dict(scales))


@_schedule
def sgdr_schedule(cosine_kwargs: Iterable[Mapping[str, Any]]) -> Callable[[Tensor], Any]:
    """Cosine decay with warm restarts: one `warmup_cosine_decay_schedule` after another.

    Args:
        cosine_kwargs: for each cycle the arguments of `warmup_cosine_decay_schedule`; its ``decay_steps`` is the length of the cycle.

    Raises:
        ValueError: no cycle, or arguments that `warmup_cosine_decay_schedule` refuses.

    Source: Loshchilov & Hutter, "SGDR: Stochastic Gradient Descent with Warm Restarts", 2017, eq. 5.

    Example:
        >>> import functorch_opt as fo
        >>> cycle = dict(init_value=0.0, peak_value=1.0, warmup_steps=0, decay_steps=10)
        >>> fo.sgdr_schedule([cycle, cycle])(10)
        tensor(1., dtype=torch.float64)
    """
    cycles = [dict(kwargs) for kwargs in cosine_kwargs]
    if not cycles:
        raise ValueError("sgdr_schedule needs the arguments of at least one cycle; got none.")
    schedules = [warmup_cosine_decay_schedule(**kwargs) for kwargs in cycles]
    ends = list(itertools.accumulate(kwargs["decay_steps"] for kwargs in cycles))
    return join_schedules(schedules, ends[:-1])
