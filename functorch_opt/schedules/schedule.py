"""What a schedule is, and the checks of its arguments, which run when the schedule is made.

    schedule(count) -> value        count: int, or int tensor (0-dim, or one entry per leaf)
                                    value: float64 tensor of that shape

``count`` is how many updates were made before this one: the first value used is ``schedule(0)``.
Any callable of this form can be used as a schedule. The schedules here have the names and arguments
that they have in optax. What torch calls step decay is `exponential_decay` with ``staircase=True``.

A value may be of either sign. A factor of values, or a fraction of one, may not be negative,
because it would turn a descent into an ascent.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ParamSpec

import torch
from torch import Tensor

from functorch_opt import tree
from functorch_opt._core.transformation import Expression, Scalar


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
        schedule = Schedule(factory(*own_args, **own_kwargs))
        schedule.call = (wrapper, tuple(own_args), own_kwargs)
        return schedule

    return wrapper


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


# ---- checks: tensors are not looked into ---------------------------------------------------------


def check_steps(least: int, **steps: int) -> None:
    """Raise ValueError for anything but a whole number of at least `least`."""
    for name, value in steps.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(
                f"{name} must be a whole number of updates, at least {least}; got {value!r}."
            )


def check_finite(**values: Scalar | None) -> None:
    """Raise ValueError for anything but a finite number, a tensor or None."""
    for name, value in values.items():
        if value is None or isinstance(value, Tensor):
            continue
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ValueError(
                f"{name} must be a finite number or a 0-dim tensor; got {value!r}."
            )


def check_positive(**values: Scalar) -> None:
    """Raise ValueError for a number that is not finite, or not greater than 0."""
    check_finite(**values)
    for name, value in values.items():
        if not isinstance(value, Tensor) and value <= 0:
            raise ValueError(f"{name} must be greater than 0; got {value!r}.")


def check_not_negative(**values: Scalar) -> None:
    """Raise ValueError for a number that is not finite, or less than 0."""
    check_finite(**values)
    for name, value in values.items():
        if not isinstance(value, Tensor) and value < 0:
            raise ValueError(
                f"{name} must be 0 or greater, for it must not turn the sign; got {value!r}."
            )


def check_fraction(**fractions: float) -> None:
    """Raise ValueError for anything but a number between 0 and 1, both excluded."""
    for name, value in fractions.items():
        if not (isinstance(value, (int, float)) and 0 < value < 1):
            raise ValueError(f"{name} must be between 0 and 1; got {value!r}.")


def check_boundaries(boundaries: Iterable[Any]) -> None:
    """Raise ValueError for anything but increasing whole numbers of at least 1."""
    previous = 0
    for boundary in boundaries:
        if (
            isinstance(boundary, bool)
            or not isinstance(boundary, int)
            or boundary <= previous
        ):
            raise ValueError(
                "boundaries must be increasing whole numbers, at least 1; "
                f"got {boundary!r} after {previous}."
            )
        previous = boundary


# ---- arithmetic ----------------------------------------------------------------------------------
# Operations that would change nothing are left out, because an operation on one number takes as
# long as one on a small parameter.


def since(t: Tensor, begin: int) -> Tensor:
    """How many updates have been made since `begin`."""
    return t - begin if begin else t


def to_power(x: Tensor, exponent: Scalar) -> Tensor:
    """``x**exponent``."""
    return x if isinstance(exponent, (int, float)) and exponent == 1 else x**exponent
