"""The picture of schedules: their values over the count."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from functorch_opt._core.extra import viz
from functorch_opt.schedules.checks import check_schedules, check_steps

MOST = 1000
"""Of how many counts the values are shown at most."""


def preview(steps: int, *schedules: Callable[[Any], Any], log: bool = False) -> Any:
    """A picture of schedules, as a matplotlib figure: ``preview(100, a, b).savefig("lr.png")``.

    It needs matplotlib: ``pip install 'functorch_opt[viz]'``.

    Args:
        steps: how many updates to show, 1 or greater.
        *schedules: functions of the count, at least one. Each is named as it was written.
        log: whether the values have a logarithmic axis.

    Returns:
        A ``matplotlib.figure.Figure`` with one line for each schedule.

    Raises:
        ValueError: there are no steps.
        TypeError: there is no schedule, or one is no function.
        ModuleNotFoundError: matplotlib is not installed.

    Example:
        >>> import functorch_opt as fo
        >>> figure = fo.schedules.preview(100, fo.linear_schedule(0.0, 0.1, 10))
        >>> [line.get_label() for line in figure.axes[0].lines]
        ['linear_schedule(0.0, 0.1, 10)']
    """
    check_steps(1, steps=steps)
    if not schedules:
        raise TypeError("preview takes at least one schedule after the number of steps.")
    check_schedules(*schedules)
    figure = viz("matplotlib.figure", "preview()").Figure(
        figsize=(8, 4), layout="constrained"
    )
    axes = figure.subplots()
    number = min(steps, MOST)
    spaced = torch.linspace(0, steps - 1, number)
    counts = spaced.round().long()
    for schedule in schedules:
        values = [float(schedule(count)) for count in counts]
        label = getattr(schedule, "__name__", None) or repr(schedule)
        axes.plot(counts, values, label=label)
    axes.set(xlabel="updates", ylabel="value", yscale="log" if log else "linear")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize="small")
    return figure
