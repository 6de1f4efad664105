"""The picture of many looks: layers down, steps across."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from functorch_opt._core.extra import viz
from functorch_opt._core.transformation import check_choice
from functorch_opt.transforms.report_table import OF_LAYERS, check_single, named_after

__all__ = ["report_plot"]


def report_plot(
    reports: Mapping[int, Mapping[str, Tensor]], quantity: str = "ratio"
) -> Any:
    """A picture of a training, as a matplotlib figure: parameters down, steps across, and one
    quantity of each in colour.

    Norms and ratios have a logarithmic scale, on which 0 is left blank, and an infinite ratio, that
    of a parameter of zeros. A parameter that a look has not, as while it is frozen, is blank there.
    It needs matplotlib: ``pip install
    'functorch_opt[viz]'``.

    Args:
        reports: ``{step: what `report` returned}``, at least one, in the order of the steps.
        quantity: one of param_norm, grad_norm, grad_zeros, update_norm, ratio and cosine.

    Returns:
        A ``matplotlib.figure.Figure``.

    Raises:
        ValueError: another quantity; no report; a value that is no single number.
        ModuleNotFoundError: matplotlib is not installed.

    Example:
        >>> import torch, functorch_opt as fo
        >>> tx, params = fo.adam(0.1), {"w": torch.ones(2), "b": torch.ones(1)}
        >>> found = fo.report(tx, params, tx.init(params), params)
        >>> figure = fo.report_plot({0: found, 10: found})
        >>> [label.get_text() for label in figure.axes[0].get_yticklabels()]
        ['b', 'w']
    """
    check_choice(*OF_LAYERS, quantity=quantity)
    if not reports:
        raise ValueError("there is no report: give {step: optimizer.report()}.")
    rows: dict[str, dict[int, float]] = {}
    for step, found in reports.items():
        check_single(found)
        for path in named_after(quantity, found):
            row = rows.setdefault(path, {})
            row[step] = found[f"{quantity}/{path}"].item()
    return _drawn(rows, [*reports], quantity)


def _drawn(
    rows: dict[str, dict[int, float]],
    steps: list[int],
    quantity: str,
) -> Any:
    is_log = quantity.endswith("norm") or quantity == "ratio"
    nan = float("nan")
    grid = []
    for row in rows.values():
        values = [row.get(step, nan) for step in steps]
        if is_log:
            values = [x if 0 < x < math.inf else nan for x in values]
        grid.append(values)
    figure = viz("matplotlib.figure", "report_plot()").Figure(
        figsize=(8, 1.5 + 0.25 * len(rows)),
        layout="constrained",
    )
    axes = figure.subplots()
    low, high = _limits(grid) if is_log else (0.0, 1.0)
    colors = viz("matplotlib.colors", "report_plot()")
    scale = colors.LogNorm if is_log else colors.Normalize
    image = axes.imshow(
        grid,
        aspect="auto",
        interpolation="nearest",
        norm=scale(-1.0 if quantity == "cosine" else low, high),
    )
    axes.set_yticks(range(len(rows)), [*rows])
    every = max(1, len(steps) // 8)
    shown = range(0, len(steps), every)
    labels = [str(steps[i]) for i in shown]
    axes.set_xticks([*shown], labels)
    axes.set_xlabel("step")
    figure.colorbar(image, label=quantity)
    return figure


def _limits(grid: list[list[float]]) -> tuple[float, float]:
    """The smallest and the largest number; or any, where there is none."""
    known = [x for row in grid for x in row if not math.isnan(x)]
    if not known:
        return 0.1, 1.0
    return min(known), max(known)
