"""Section 1, a small race: eight optimizers, each with many learning rates and seeds in one run.

The race of all optimizers on six tasks is ``python -m benchmarks race``.
"""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.live import Live
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import functorch_opt as fo
from demo.common import (
    BLACK,
    BLUE,
    GREEN,
    ORANGE,
    PINK,
    RED,
    SKY,
    console,
    plt,
    save,
    say,
    title,
)
from demo.digits import BATCH, load

RATES, SEEDS, STEPS = torch.logspace(-4, 1, 11, dtype=torch.float64), 3, 100
VALIDATION = 300
"""Training images that choose the learning rate, and are not trained on."""
WIDTH = 20
"""Of the longest bar, in characters."""

Factory = Callable[..., fo.GradientTransformation]
OPTIMIZERS: dict[str, tuple[Factory, str]] = {
    "SGD with momentum": (partial(fo.sgd, momentum=0.9), BLACK),
    "Adam": (fo.adam, BLUE),
    "Adagrad": (fo.adagrad, "#999999"),
    "Lion": (fo.lion, ORANGE),
    "Prodigy": (fo.prodigy, PINK),
    "Schedule-Free AdamW": (fo.schedule_free_adamw, SKY),
    "Muon": (fo.muon, RED),
    "SOAP": (fo.soap, GREEN),
}


class Line(NamedTuple):
    """An optimizer at the end of its run."""

    name: str
    rate: float
    by_rate: Tensor
    """The validation loss for each learning rate, a mean over seeds."""
    curve: Tensor
    """The training loss at the best rate, a mean over seeds."""
    held_out: Tensor
    """The loss on images that chose nothing, for each seed."""
    seconds: float


def make_model() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def enter(name: str, steps: int) -> Line:
    """All learning rates and seeds of one optimizer, in one vmapped run."""
    data, begin = load(), time.perf_counter()
    x, y = data.x_train, data.y_train
    result = fo.sweep(
        make_model,
        (x[VALIDATION:], y[VALIDATION:]),
        OPTIMIZERS[name][0],
        loss=cross_entropy,
        validation=(x[:VALIDATION], y[:VALIDATION]),
        steps=steps,
        batch_size=BATCH,
        seed=range(SEEDS),
        learning_rate=RATES,
    )
    best = int(result.means.argmin())
    runs = range(best * SEEDS, (best + 1) * SEEDS)
    with torch.no_grad():
        losses = [cross_entropy(result.module(i)(data.x_test), data.y_test) for i in runs]
    curve = result.curves[runs.start : runs.stop].mean(0)
    seconds = time.perf_counter() - begin
    rate = float(RATES[best])
    return Line(name, rate, result.means, curve, torch.stack(losses), seconds)


def ranked(lines: list[Line]) -> list[Line]:
    return sorted(lines, key=lambda line: float(line.held_out.mean()))


def standings(lines: list[Line]) -> Table:
    """The table so far, with a bar for each loss."""
    grid = Table(box=SIMPLE_HEAD)
    for name in ("optimizer", "best lr", "held-out loss", "", "time"):
        justify = "left" if name in ("optimizer", "") else "right"
        grid.add_column(name, justify=justify, no_wrap=True)
    worst = max((float(line.held_out.mean()) for line in lines), default=1.0)
    for line in ranked(lines):
        mean, spread = float(line.held_out.mean()), float(line.held_out.std())
        bar = "█" * max(1, round(WIDTH * mean / worst))
        cells = [f"{line.rate:.2g}", f"{mean:.3f} ± {spread:.3f}", bar]
        grid.add_row(line.name, *cells, f"{line.seconds:.1f} s")
    return grid


def run(out: Path) -> Path:
    title(f"1. A race of {len(OPTIMIZERS)} optimizers")
    number = len(OPTIMIZERS) * len(RATES) * SEEDS
    say(
        f"Each with {len(RATES)} learning rates and {SEEDS} seeds: {number} trainings of "
        f"{STEPS} steps, in {len(OPTIMIZERS)} vmapped runs."
    )
    begin, lines = time.perf_counter(), list[Line]()
    with Live(standings([]), console=console) as live:
        for name in OPTIMIZERS:
            lines.append(enter(name, STEPS))
            live.update(standings(lines))
    seconds = time.perf_counter() - begin
    say("\nAll optimizers, on six tasks, with a protocol: python -m benchmarks race.")
    return save(_draw(lines, number, seconds), out / "1_race.png")


# ---- the picture ---------------------------------------------------------------------------------


def _draw(lines: list[Line], number: int, seconds: float) -> Figure:
    figure = plt.figure(figsize=(14, 5.2))
    left, middle, right = figure.subplots(1, 3, width_ratios=[1.15, 1, 0.75])
    _valleys(left, lines)
    _curves(middle, lines)
    _ends(right, lines)
    text = f"{number} trainings in {seconds:.0f} s: {len(lines)} optimizers, each at its own best"
    figure.suptitle(f"{text} learning rate", x=0.01, ha="left", fontsize=12)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return figure


def _valleys(axes: Axes, lines: list[Line]) -> None:
    """The loss over the learning rate."""
    for line in lines:
        color = OPTIMIZERS[line.name][1]
        shown = torch.where(line.by_rate.isfinite(), line.by_rate, torch.nan)
        axes.plot(RATES, shown, "-o", color=color, ms=3, lw=1.4, label=line.name)
        best = line.by_rate.min()
        axes.plot(line.rate, best, "*", color=color, ms=13, mec=BLACK, zorder=3)
    axes.set(title="Each has its own valley: the best learning rates", xscale="log")
    axes.set(
        xlabel="learning rate", ylabel="validation loss", yscale="log", ylim=(0.08, 5)
    )


def _curves(axes: Axes, lines: list[Line]) -> None:
    for line in lines:
        smooth = line.curve.unfold(0, 6, 1).mean(1)
        steps = range(6, len(line.curve) + 1)
        axes.plot(steps, smooth, color=OPTIMIZERS[line.name][1], lw=1.6)
    axes.set(title="Training at the best one", xlabel="step", ylabel="training loss")
    axes.set(yscale="log", xlim=(0, len(lines[0].curve)))


def _ends(axes: Axes, lines: list[Line]) -> None:
    """Held-out losses of all seeds, the best mean on top."""
    order = ranked(lines)
    for i, line in enumerate(order):
        color = OPTIMIZERS[line.name][1]
        axes.plot(line.held_out, [i] * len(line.held_out), "o", color=color, alpha=0.5)
        axes.plot(line.held_out.mean(), i, "|", color=color, ms=18, mew=3)
    axes.set_yticks(range(len(order)), [line.name for line in order])
    axes.set(
        title="Held-out loss, each seed", xlabel="loss", ylim=(len(order) - 0.5, -0.5)
    )
