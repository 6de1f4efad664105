"""What a schedule is, and the algebra of schedules.

    schedule(count) -> value        count: int, or int tensor (0-dim, or one entry per leaf)
                                    value: float64 tensor of that shape

``count`` is how many updates were made before this one: the first value used is ``schedule(0)``.
Any callable of this form can be used as a schedule. The schedules here have the names and arguments
that they have in optax, and a negative count is to them a count of 0. What torch calls step decay
is `exponential_decay` with ``staircase=True``.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ParamSpec

import torch
from torch import Tensor

from functorch_opt import tree
from functorch_opt._core.transformation import Expression, Scalar, ScalarOrSchedule
from functorch_opt.schedules.checks import (
    check_bounds,
    check_schedules,
    check_steps,
    check_terms,
)

__all__ = [
    "add_schedules",
    "clip_schedule",
    "multiply_schedules",
    "repeat_schedule",
    "shift_schedule",
]


class Schedule(Expression):
    """A function of the count that prints as it was written."""

    def __init__(self, value: Callable[[Tensor], Any]) -> None:
        self.value = value

    def __call__(self, count: Tensor | int) -> Tensor:
        t = tree.as_real(torch.as_tensor(count))
        value = self.value(t)
        is_like_t = (
            isinstance(value, Tensor)
            and value.dtype is t.dtype
            and value.shape == t.shape
        )
        return value if is_like_t else torch.zeros_like(t) + value

    def __add__(self, other: ScalarOrSchedule) -> Schedule:
        return add_schedules(self, other)

    def __radd__(self, other: ScalarOrSchedule) -> Schedule:
        return add_schedules(other, self)

    def __mul__(self, other: ScalarOrSchedule) -> Schedule:
        return multiply_schedules(self, other)

    def __rmul__(self, other: ScalarOrSchedule) -> Schedule:
        return multiply_schedules(other, self)


P = ParamSpec("P")


def makes_schedule(
    factory: Callable[P, Callable[[Tensor], Any]],
) -> Callable[P, Schedule]:
    """Decorate a function that returns a function of the count as a float64 tensor.

    The decorated function returns a `Schedule`.
    """

    @functools.wraps(factory)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> Schedule:
        own_args: Any = [_own(value) for value in args]
        own_kwargs: Any = {name: _own(value) for name, value in kwargs.items()}
        value = factory(*own_args, **own_kwargs)
        numbers = [*own_args, *own_kwargs.values()]
        if any(isinstance(x, Tensor) for x in numbers):
            value = _of_tensors(factory, own_args, own_kwargs)
        schedule = Schedule(value)
        schedule.call = (wrapper, tuple(own_args), own_kwargs)
        return schedule

    return wrapper


def _of_tensors(
    factory: Callable[..., Callable[[Tensor], Any]],
    args: list[Any],
    kwargs: dict[str, Any],
) -> Callable[[Tensor], Any]:
    """The function of the count, made anew for each count from tensors of the count's dtype.

    A tensor may be trained, so what counts is its value when the schedule is called, and not when
    it is made. In bfloat16 the difference of two tensors would be rounded to bfloat16.
    """

    def widen(x: Any, t: Tensor) -> Any:
        return x.to(t.dtype) if isinstance(x, Tensor) else x

    def value(t: Tensor) -> Any:
        wide = {name: widen(x, t) for name, x in kwargs.items()}
        wide_args = [widen(x, t) for x in args]
        return factory(*wide_args, **wide)(t)

    return value


def _own(value: Any) -> Any:
    """A copy of a container, and a list of what an iterator gives.

    The call is kept in order to print and to pickle it, so nobody may change its arguments or use
    them up.
    """
    if isinstance(value, Mapping):
        return {key: _own(item) for key, item in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, (str, Tensor)):
        return [_own(item) for item in value]
    return value


# ---- algebra -------------------------------------------------------------------------------------


@makes_schedule
def add_schedules(*schedules: ScalarOrSchedule) -> Callable[[Tensor], Any]:
    """The sum ``a(t) + b(t) + ...``, also written ``a + b`` if one of the two is from here.

    Args:
        schedules: functions of the count, and numbers or 0-dim tensors; at least one.

    Raises:
        TypeError: there is none, or one is neither a function nor a number.
        ValueError: a number is not finite.

    Example:
        >>> import functorch_opt as fo
        >>> schedule = fo.linear_schedule(0.0, 1.0, 10) + 0.25
        >>> schedule
        add_schedules(linear_schedule(0.0, 1.0, 10), 0.25)
        >>> schedule(5)
        tensor(0.7500, dtype=torch.float64)
    """
    check_terms(*schedules)
    return lambda t: functools.reduce(operator.add, [at(a, t) for a in schedules])


@makes_schedule
def multiply_schedules(*schedules: ScalarOrSchedule) -> Callable[[Tensor], Any]:
    """The product ``a(t) * b(t) * ...``, also written ``a * b`` if one of the two is from here.

    Arguments and errors are those of `add_schedules`. A factor may be negative:
    ``scale_by_schedule(-1.0 * learning_rate)`` descends.

    Example:
        >>> import functorch_opt as fo
        >>> cosine = fo.cosine_decay_schedule(1.0, 100)
        >>> schedule = fo.multiply_schedules(0.5, lambda t: t / 100, cosine)
        >>> schedule(50)
        tensor(0.1250, dtype=torch.float64)
    """
    check_terms(*schedules)
    return lambda t: functools.reduce(operator.mul, [at(a, t) for a in schedules])


@makes_schedule
def clip_schedule(
    schedule: Callable[[Tensor], Any],
    min_value: Scalar | None = None,
    max_value: Scalar | None = None,
) -> Callable[[Tensor], Any]:
    """``min(max(schedule(t), min_value), max_value)``; a bound that is None is left out.

    Args:
        schedule: a function of the count.
        min_value: the value is at least this.
        max_value: the value is at most this.

    Raises:
        TypeError: `schedule` is not a function.
        ValueError: there is no bound, a bound is not finite, or the bounds are out of order.

    Example:
        >>> import functorch_opt as fo
        >>> fo.clip_schedule(fo.linear_schedule(0.0, 1.0, 10), 0.25, 0.75)(9)
        tensor(0.7500, dtype=torch.float64)
    """
    check_schedules(schedule)
    check_bounds(min_value, max_value)

    def value(t: Tensor) -> Any:
        result = Schedule(schedule)(t)
        for larger_or_smaller, bound in (
            (torch.maximum, min_value),
            (torch.minimum, max_value),
        ):
            if bound is not None:
                result = larger_or_smaller(result, torch.as_tensor(bound, dtype=t.dtype))
        return result

    return value


@makes_schedule
def shift_schedule(
    schedule: Callable[[Tensor], Any], steps: int
) -> Callable[[Tensor], Any]:
    """``schedule(max(t - steps, 0))``: the same schedule, `steps` updates later.

    Args:
        schedule: a function of the count.
        steps: a number of updates. Until then the value is the first one. If it is negative, the
            schedule begins that many updates earlier, and so in its midst.

    Raises:
        TypeError: `schedule` is not a function.
        ValueError: `steps` is not a whole number.

    Example:
        >>> import functorch_opt as fo
        >>> line = fo.linear_schedule(0.0, 1.0, 10)
        >>> fo.shift_schedule(line, 5)(7), fo.shift_schedule(line, -5)(0)
        (tensor(0.2000, dtype=torch.float64), tensor(0.5000, dtype=torch.float64))
    """
    check_schedules(schedule)
    check_steps(None, steps=steps)
    first = max(-steps, 0)
    return lambda t: schedule(since(t, steps).clamp(min=first))


@makes_schedule
def repeat_schedule(
    schedule: Callable[[Tensor], Any], steps: int
) -> Callable[[Tensor], Any]:
    """``schedule(t mod steps)``: the first `steps` updates of a schedule, again and again.

    Args:
        schedule: a function of the count.
        steps: updates of one round, at least 1.

    Raises:
        TypeError: `schedule` is not a function.
        ValueError: there are no steps.

    Example:
        >>> import functorch_opt as fo
        >>> warm_restarts = fo.repeat_schedule(fo.cosine_decay_schedule(1.0, 10), 10)
        >>> [round(warm_restarts(count).item(), 3) for count in (0, 5, 10, 1_000_005)]
        [1.0, 0.5, 1.0, 0.5]
    """
    check_schedules(schedule)
    check_steps(1, steps=steps)
    return lambda t: schedule(t.clamp(min=0) % steps)


# ---- arithmetic ----------------------------------------------------------------------------------
# Operations that would change nothing are left out, because an operation on one number takes as
# long as one on a small parameter.


def at(schedule: ScalarOrSchedule, t: Tensor) -> Any:
    """The value at a count, of a schedule or of a number."""
    return schedule(t) if callable(schedule) else schedule


def since(t: Tensor, begin: int) -> Tensor:
    """How many updates have been made since `begin`."""
    return t - begin if begin else t


def to_power(x: Tensor, exponent: Scalar) -> Tensor:
    """``x**exponent``."""
    return x if isinstance(exponent, (int, float)) and exponent == 1 else x**exponent


def half_cosine(t: Tensor, steps: int, exponent: Scalar = 1) -> Tensor:
    """From 1 to 0: ``((1 + cos(pi t/T)) / 2)^exponent``."""
    angle = math.pi * t.clamp(0, steps) / steps
    cosine = 0.5 * (1 + torch.cos(angle))
    return to_power(cosine, exponent)
