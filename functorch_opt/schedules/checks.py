"""The checks of arguments, which run when a schedule is made. Tensors are not looked into.

A value may be of either sign. A factor of values, or a fraction of one, may not be negative,
because it would turn a descent into an ascent.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from functorch_opt._core.transformation import Scalar


def check_steps(least: int | None, **steps: int) -> None:
    """Raise ValueError for anything but a whole number, of at least `least` if that is given."""
    for name, value in steps.items():
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not whole or (least is not None and value < least):
            bound = "" if least is None else f", at least {least}"
            raise ValueError(
                f"{name} must be a whole number of updates{bound}; got {value!r}."
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


def check_bounds(least: Scalar | None, greatest: Scalar | None) -> None:
    """Raise ValueError for no bounds, for one that is not finite, and for the wrong order."""
    if least is None and greatest is None:
        raise ValueError("give min_value, max_value or both; got neither.")
    check_finite(min_value=least, max_value=greatest)
    bounds = (least, greatest)
    given = [bound for bound in bounds if isinstance(bound, (int, float))]
    if given != sorted(given):
        raise ValueError(
            "min_value must not be greater than max_value; "
            f"got {least!r} and {greatest!r}."
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


def check_schedules(*schedules: Any) -> None:
    """Raise TypeError for anything but a function of the count."""
    for schedule in schedules:
        if not callable(schedule):
            raise TypeError(
                f"a schedule must be a function of the count; got {schedule!r}. "
                "For a number use constant_schedule."
            )


def check_terms(*terms: Any) -> None:
    """Raise for anything but functions of the count, finite numbers and tensors."""
    if not terms:
        raise TypeError("at least one schedule is needed; got none.")
    for term in terms:
        if isinstance(term, (int, float, Tensor)):
            check_finite(**{"a number beside schedules": term})
        else:
            check_schedules(term)
