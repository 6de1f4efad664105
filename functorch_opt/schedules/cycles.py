"""Ready-made schedules that rise and fall: one cycle, or many."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from functorch_opt._core.transformation import Scalar
from functorch_opt.schedules.checks import (
    check_boundaries,
    check_finite,
    check_fraction,
    check_positive,
    check_steps,
)
from functorch_opt.schedules.pieces import join_schedules, piecewise_interpolate_schedule
from functorch_opt.schedules.schedule import makes_schedule
from functorch_opt.schedules.warmups import warmup_cosine_decay_schedule

__all__ = [
    "cosine_onecycle_schedule",
    "cyclic_schedule",
    "linear_onecycle_schedule",
    "sgdr_schedule",
]


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


@makes_schedule
def cyclic_schedule(
    init_value: Scalar,
    peak_value: Scalar,
    step_size_up: int = 2000,
    step_size_down: int | None = None,
    mode: Literal["triangular", "triangular2", "exp_range"] = "triangular",
    gamma: Scalar = 1.0,
) -> Callable[[Tensor], Any]:
    """Up and down along two lines, again and again, as torch's ``CyclicLR``.

    The value is ``init + (peak - init) triangle(t) scale(t)``. The triangle goes from 0 to 1 and
    back. In the mode "triangular" the scale is 1, in "triangular2" it is halved after every cycle,
    and in "exp_range" it is ``gamma^t``.

    For another scale, write ``init_value + scale * cyclic_schedule(0.0, peak_value - init_value)``.

    Args:
        init_value: value at both ends of a cycle, torch's ``base_lr``.
        peak_value: value at the peak of the first cycle, torch's ``max_lr``.
        step_size_up: updates from the start of a cycle to its peak, at least 1.
        step_size_down: updates back, at least 1. The default is `step_size_up`.
        mode: "triangular", "triangular2" or "exp_range".
        gamma: factor of each update in the mode "exp_range", greater than 0.

    Raises:
        ValueError: an unknown mode, no steps up or down, or a value that is not finite.

    Source: Smith, "Cyclical Learning Rates for Training Neural Networks", 2017, sec. 3.

    Example:
        >>> import functorch_opt as fo
        >>> schedule = fo.cyclic_schedule(0.0, 1.0, 10, mode="triangular2")
        >>> [schedule(count).item() for count in (0, 5, 10, 20, 30, 50)]
        [0.0, 0.5, 1.0, 0.0, 0.5, 0.25]
    """
    up, down = step_size_up, step_size_up if step_size_down is None else step_size_down
    check_finite(init_value=init_value, peak_value=peak_value)
    check_positive(gamma=gamma)
    check_steps(1, step_size_up=up, step_size_down=down)
    modes: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "triangular": lambda x, t: x,
        "triangular2": lambda x, t: x * 0.5 ** (t / (up + down)).floor(),
        "exp_range": lambda x, t: x * torch.as_tensor(gamma, dtype=t.dtype) ** t,
    }
    if mode not in modes:
        raise ValueError(f"mode must be one of {[*modes]}; got {mode!r}.")
    scaled = modes[mode]

    def value(t: Tensor) -> Any:
        t = t.clamp(min=0)
        phase = t % (up + down)
        triangle = torch.minimum(phase / up, (up + down - phase) / down)
        return init_value + (peak_value - init_value) * scaled(triangle, t)

    return value
