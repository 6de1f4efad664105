"""Schedules of several pieces: one schedule after another, or values that change at boundaries."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from functorch_opt._core.transformation import Scalar
from functorch_opt.schedules.checks import (
    check_boundaries,
    check_finite,
    check_not_negative,
    check_schedules,
)
from functorch_opt.schedules.schedule import makes_schedule, since

__all__ = [
    "join_schedules",
    "piecewise_constant_schedule",
    "piecewise_interpolate_schedule",
]


@makes_schedule
def join_schedules(
    schedules: Sequence[Callable[[Tensor], Any]], boundaries: Sequence[int]
) -> Callable[[Tensor], Any]:
    """The first schedule until the first boundary, then the second one, and so on.

    Each schedule starts from its own count of 0.

    Args:
        schedules: a list of at least one schedule.
        boundaries: the counts at which the next schedule begins. They increase, and there is one
            fewer than `schedules`.

    Raises:
        ValueError: there are not as many boundaries as needed, or they do not increase.
        TypeError: one of the schedules is not a function.

    Example:
        >>> import functorch_opt as fo
        >>> line, constant = fo.linear_schedule(0.0, 1.0, 10), fo.constant_schedule(0.5)
        >>> joined = fo.join_schedules([line, constant], [10])
        >>> joined(9), joined(10)
        (tensor(0.9000, dtype=torch.float64), tensor(0.5000, dtype=torch.float64))
    """
    schedules, boundaries = list(schedules), list(boundaries)
    if len(schedules) != len(boundaries) + 1:
        raise ValueError(
            "join_schedules needs one boundary fewer than schedules; "
            f"got {len(schedules)} schedules and {len(boundaries)} boundaries."
        )
    check_schedules(*schedules)
    check_boundaries(boundaries)
    begins = [0, *boundaries]
    ends = [*boundaries, None]
    pieces = list(zip(begins, ends, schedules, strict=True))

    def value(t: Tensor) -> Any:
        result = t
        for begin, end, schedule in pieces:
            # Beyond its end a piece might overflow, and then its gradient would be 0 * inf.
            length = end and end - begin
            piece = schedule(since(t, begin).clamp(0, length))
            result = torch.where(t < begin, result, piece) if begin else piece
        return result

    return value


def _scales(
    init_value: Scalar, boundaries_and_scales: Mapping[int, Scalar] | None
) -> dict[int, Scalar]:
    """The scales in the order of their boundaries, checked."""
    given = boundaries_and_scales or {}
    scales = {boundary: given[boundary] for boundary in sorted(given)}
    check_finite(init_value=init_value)
    check_not_negative(
        **{f"the scale at {boundary}": scale for boundary, scale in scales.items()}
    )
    check_boundaries(scales)
    return scales


@makes_schedule
def piecewise_constant_schedule(
    init_value: Scalar, boundaries_and_scales: Mapping[int, Scalar] | None = None
) -> Callable[[Tensor], Any]:
    """`init_value`, multiplied by one more scale from each boundary on.

    Args:
        init_value: first value.
        boundaries_and_scales: ``{count: scale}``; a scale is 0 or greater.

    Raises:
        ValueError: a boundary that is not a positive whole number; a negative scale.

    Example:
        >>> import functorch_opt as fo
        >>> schedule = fo.piecewise_constant_schedule(1.0, {10: 0.1, 20: 0.5})
        >>> [round(schedule(count).item(), 3) for count in (9, 10, 20)]
        [1.0, 0.1, 0.05]
    """
    scales = _scales(init_value, boundaries_and_scales)

    def value(t: Tensor) -> Any:
        result = torch.zeros_like(t) + init_value
        for boundary, scale in scales.items():
            result = torch.where(t < boundary, result, result * scale)
        return result

    return value


@makes_schedule
def piecewise_interpolate_schedule(
    interpolate_type: Literal["linear", "cosine"],
    init_value: Scalar,
    boundaries_and_scales: Mapping[int, Scalar] | None = None,
) -> Callable[[Tensor], Any]:
    """From one value of `piecewise_constant_schedule` to the next, along a line or half a cosine.

    Args:
        interpolate_type: "linear" or "cosine".
        init_value: value at count 0.
        boundaries_and_scales: ``{count: scale}``. At that count the value is the one of the
            boundary before, times the scale, which is 0 or greater.

    Raises:
        ValueError: an unknown type; a boundary that is not a positive whole number; a negative
            scale.

    Example:
        >>> import functorch_opt as fo
        >>> fo.piecewise_interpolate_schedule("linear", 1.0, {10: 0.5})(5)
        tensor(0.7500, dtype=torch.float64)
    """
    if interpolate_type not in ("linear", "cosine"):
        raise ValueError(
            f"interpolate_type must be 'linear' or 'cosine'; got {interpolate_type!r}."
        )
    scales = _scales(init_value, boundaries_and_scales)

    def value(t: Tensor) -> Any:
        result = torch.zeros_like(t) + init_value
        start, begin = result, 0
        for boundary, scale in scales.items():
            end = start * scale
            fraction = since(t, begin) / (boundary - begin)
            fraction = fraction.clamp(0, 1)
            if interpolate_type == "cosine":
                fraction = 0.5 * (1 - torch.cos(math.pi * fraction))
            between = start + (end - start) * fraction
            result = torch.where(t < begin, result, between)
            start, begin = end, boundary
        return result

    return value
