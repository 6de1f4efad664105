"""The picture of a sweep: losses over the first hyperparameter that varies, and the curves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from functorch_opt._core.extra import viz

if TYPE_CHECKING:
    from functorch_opt.sweeps.report import Sweep

BLACK, BLUE, RED = "#000000", "#0072B2", "#D55E00"
MOST_CURVES = 64


def plot(of: Sweep) -> Any:
    """The figure, with the losses on the left and the curves on the right."""
    figure = viz("matplotlib.figure", "plot()").Figure(
        figsize=(12, 4.5), layout="constrained"
    )
    left, right = figure.subplots(1, 2)
    shown = _Shown(of)
    _losses(left, of, shown)
    colors = _curves(right, of, shown)
    figure.colorbar(colors, ax=right, label=shown.name)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


class _Shown:
    """What both parts of the picture need: the hyperparameter on the axis, and the best run."""

    def __init__(self, of: Sweep) -> None:
        self.names = [name for name in of.settings if name != "seed"]
        self.name = self.names[0] if self.names else "run"
        runs = torch.arange(len(of.losses), dtype=torch.float64)
        self.x = of.settings[self.name] if self.names else runs
        least, most = self.x.min(), self.x.max()
        self.log = bool(least > 0 and most > 20 * least)
        self.best = of.best_run if of.means.isfinite().any() else None


# ---- losses --------------------------------------------------------------------------------------


def _losses(axes: Any, of: Sweep, shown: _Shown) -> None:
    """The loss of each setting and run, over the hyperparameter."""
    x = shown.x
    lines = _lines(of, shown)
    for label, settings in lines.items():
        settings.sort(key=lambda i: float(x[i * of.seeds]))
        at = x[:: of.seeds][settings]
        means = _finite(of.means[settings])
        color = None if label else BLUE
        looks = dict(ms=3.5, lw=1, color=color)
        axes.plot(at, means, "-o", label=label, **looks)
    if of.seeds > 1:
        looks = dict(ms=3, color=BLACK, alpha=0.5)
        axes.plot(x, _finite(of.losses), ".", label="single seeds", **looks)
    if of.diverged.any():
        number = int(of.diverged.sum())
        at_the_top = torch.full((number,), 0.97)
        edge = axes.get_xaxis_transform()
        looks = dict(color=BLACK, transform=edge)
        axes.plot(x[of.diverged], at_the_top, "x", label="diverged", **looks)
    if shown.best is not None:
        label = f"best: {shown.name}={x[shown.best]:.3g}"
        mean = of.means[shown.best // of.seeds]
        looks = dict(ms=16, color=RED, mec=BLACK)
        axes.plot(x[shown.best], mean, "*", label=label, **looks)
    finite = of.losses[of.losses.isfinite()]
    axes.set(xlabel=shown.name, ylabel="loss after training")
    axes.set(xscale="log" if shown.log else "linear")
    is_positive = len(finite) and finite.min() > 0
    axes.set(yscale="log" if is_positive else "linear")
    if len(lines) <= 10:
        axes.legend(fontsize=8, frameon=False)


def _lines(of: Sweep, shown: _Shown) -> dict[str, list[int]]:
    """The settings that differ in the first hyperparameter only, under a label with the others."""
    lines: dict[str, list[int]] = {}
    for i in range(len(of.means)):
        others = _label(of, shown.names[1:], i * of.seeds)
        lines.setdefault(others, []).append(i)
    return lines


def _label(of: Sweep, names: list[str], run: int) -> str:
    """What some hyperparameters of a run are."""
    parts = []
    for name in names:
        value = of.settings[name][run]
        parts.append(f"{name}={value:.3g}")
    return ", ".join(parts)


def _finite(x: Tensor) -> Tensor:
    """`x` with NaN in place of what is not finite. A NaN leaves a gap in a line."""
    return torch.where(x.isfinite(), x, torch.nan)


# ---- curves --------------------------------------------------------------------------------------


def _curves(axes: Any, of: Sweep, shown: _Shown) -> Any:
    """A running mean of the training loss of some runs, in the colors of the hyperparameter."""
    window = max(1, of.curves.shape[1] // 50)
    channels = of.curves.unsqueeze(1)
    means = torch.nn.functional.avg_pool1d(channels, window, stride=1)
    curves = means.squeeze(1)
    steps = torch.arange(curves.shape[1]) + (window - 1) / 2
    colors = _colors(shown)
    number = min(len(curves), MOST_CURVES)
    some = torch.linspace(0, len(curves) - 1, number)
    for run in some.round().long().tolist():
        color = colors.to_rgba(float(shown.x[run]))
        axes.plot(steps, curves[run], color=color, lw=1)
    if (best := shown.best) is not None:
        label = _label(of, shown.names, best) or best
        label = f"best: {label}"
        axes.plot(steps, curves[best], color=RED, lw=2.5, label=label)
        axes.legend(fontsize=8, frameon=False)
    kept = curves[~of.diverged]
    if len(kept) and kept.min() > 0:
        # Runs that diverge may leave the picture.
        least, most = float(kept.min()), float(kept.max())
        axes.set(yscale="log")
        axes.set(ylim=(0.8 * least, 1.2 * most))
    axes.set(xlabel="step", ylabel="training loss")
    return colors


def _colors(shown: _Shown) -> Any:
    norms = viz("matplotlib.colors", "plot()")
    make = norms.LogNorm if shown.log else norms.Normalize
    least, most = shown.x.min(), shown.x.max()
    norm = make(float(least), float(most))
    return viz("matplotlib.cm", "plot()").ScalarMappable(norm, "viridis")
