"""Schedules of one formula: a constant, a polynomial, an exponential, half a cosine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from functorch_opt._core.transformation import Scalar
from functorch_opt.schedules.checks import (
    check_finite,
    check_not_negative,
    check_positive,
    check_steps,
)
from functorch_opt.schedules.schedule import half_cosine, makes_schedule, since, to_power

__all__ = [
    "constant_schedule",
    "cosine_decay_schedule",
    "exponential_decay",
    "linear_schedule",
    "polynomial_schedule",
]


@makes_schedule
def constant_schedule(value: Scalar) -> Callable[[Tensor], Any]:
    """A schedule that is always `value`.

    Example:
        >>> import functorch_opt as fo
        >>> fo.constant_schedule(0.1)(7)
        tensor(0.1000, dtype=torch.float64)
    """
    check_finite(value=value)
    return lambda t: torch.zeros_like(t) + value


@makes_schedule
def polynomial_schedule(
    init_value: Scalar,
    end_value: Scalar,
    power: Scalar,
    transition_steps: int,
    transition_begin: int = 0,
) -> Callable[[Tensor], Any]:
    """From `init_value` to `end_value` along a power of the time that is left, then constant.

    The value is ``end + (init - end) (1 - t/T)^power``.

    Args:
        init_value: value until `transition_begin`.
        end_value: value from ``transition_begin + transition_steps`` on.
        power: exponent, greater than 0; 1 is `linear_schedule`.
        transition_steps: T, a number of updates, at least 1.
        transition_begin: updates before the transition starts.

    Raises:
        ValueError: there are no transition steps (optax would return `init_value` for ever), or a
            value is not finite.

    Example:
        >>> import functorch_opt as fo
        >>> fo.polynomial_schedule(1.0, 0.0, 2, 10)(5)
        tensor(0.2500, dtype=torch.float64)
    """
    check_finite(init_value=init_value, end_value=end_value)
    check_positive(power=power)
    check_steps(1, transition_steps=transition_steps)
    check_steps(0, transition_begin=transition_begin)

    def value(t: Tensor) -> Any:
        begun = since(t, transition_begin).clamp(0, transition_steps)
        left = to_power(1 - begun / transition_steps, power)
        return end_value + (init_value - end_value) * left

    return value


@makes_schedule
def linear_schedule(
    init_value: Scalar,
    end_value: Scalar,
    transition_steps: int,
    transition_begin: int = 0,
) -> Callable[[Tensor], Any]:
    """From `init_value` to `end_value` along a line, then constant.

    Arguments and errors are those of `polynomial_schedule`.

    Example:
        >>> import functorch_opt as fo
        >>> fo.linear_schedule(0.0, 1.0, 10)(5)
        tensor(0.5000, dtype=torch.float64)
    """
    return polynomial_schedule(
        init_value, end_value, 1, transition_steps, transition_begin
    )


@makes_schedule
def exponential_decay(
    init_value: Scalar,
    transition_steps: int,
    decay_rate: Scalar,
    transition_begin: int = 0,
    staircase: bool = False,
    end_value: Scalar | None = None,
) -> Callable[[Tensor], Any]:
    """``init_value * decay_rate^(t / transition_steps)``.

    With `staircase` the exponent is rounded down, which is called step decay.

    Args:
        init_value: value until `transition_begin`.
        transition_steps: updates after which the value has been multiplied by `decay_rate`, at
            least 1.
        decay_rate: factor, greater than 0.
        transition_begin: updates before the decay starts.
        staircase: hold the value between multiples of `transition_steps`, as torch's ``StepLR``
            does.
        end_value: a bound for the value: a lower one if the value decays, and an upper one
            otherwise (``decay_rate >= 1``).

    Raises:
        ValueError: there are no transition steps, or the rate is not positive.

    Example:
        >>> import functorch_opt as fo
        >>> step_decay = fo.exponential_decay(1.0, 30, 0.1, staircase=True)
        >>> [round(step_decay(epoch).item(), 3) for epoch in (0, 29, 30, 60)]
        [1.0, 1.0, 0.1, 0.01]
    """
    check_finite(init_value=init_value, end_value=end_value)
    check_positive(decay_rate=decay_rate)
    check_steps(1, transition_steps=transition_steps)
    check_steps(0, transition_begin=transition_begin)
    grows = torch.as_tensor(decay_rate, dtype=torch.float64) >= 1

    def value(t: Tensor) -> Any:
        exponent = since(t, transition_begin).clamp(min=0) / transition_steps
        exponent = exponent.floor() if staircase else exponent
        decayed = init_value * torch.as_tensor(decay_rate, dtype=t.dtype) ** exponent
        if end_value is None:
            return decayed
        bound = torch.as_tensor(end_value, dtype=t.dtype)
        return torch.where(
            grows, torch.minimum(decayed, bound), torch.maximum(decayed, bound)
        )

    return value


@makes_schedule
def cosine_decay_schedule(
    init_value: Scalar, decay_steps: int, alpha: Scalar = 0.0, exponent: Scalar = 1.0
) -> Callable[[Tensor], Any]:
    """Half a cosine from `init_value` down to ``alpha * init_value``, then constant.

    The value is ``init ((1 - alpha) ((1 + cos(pi t/T)) / 2)^exponent + alpha)``.

    Args:
        init_value: first value.
        decay_steps: T, a number of updates, at least 1.
        alpha: last value as a fraction of the first, 0 or greater.
        exponent: of the cosine factor, greater than 0.

    Raises:
        ValueError: there are no decay steps, the fraction is negative, or a value is not finite.

    Source: Loshchilov & Hutter, "SGDR: Stochastic Gradient Descent with Warm Restarts", 2017,
    eq. 5 (first period).

    Example:
        >>> import functorch_opt as fo
        >>> fo.cosine_decay_schedule(1.0, 100)(50)
        tensor(0.5000, dtype=torch.float64)
    """
    check_finite(init_value=init_value)
    check_not_negative(alpha=alpha)
    check_positive(exponent=exponent)
    check_steps(1, decay_steps=decay_steps)

    def value(t: Tensor) -> Any:
        left = half_cosine(t, decay_steps, exponent)
        return init_value * (1 - alpha) * left + init_value * alpha

    return value
