"""The pictures: the paths of an optimizer on two functions, and its curves in the race."""

from __future__ import annotations

import math
from pathlib import Path as File

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from torch.func import vmap

from benchmarks.gallery import style
from benchmarks.gallery.entries import ENTRIES, Entry
from benchmarks.gallery.paths import LANDS, STEPS, Land, Path, best_path
from benchmarks.gallery.race import Race

GRID = 160
LEVELS = 13
COLUMNS = 11


def draw(names: list[str], folder: File, race: Race) -> None:
    """The pictures of some optimizers; or of all, and the one that shows all, if there are no names."""
    on_first: dict[str, Path] = {}
    for entry in ENTRIES:
        if names and entry.name not in names:
            continue
        paths = [best_path(entry, land) for land in LANDS]
        on_first[entry.title] = paths[0]
        draw_paths(paths, folder / f"{entry.name}.png")
        print(entry.name, flush=True)
    draw_races(names, folder, race)
    if not names:
        draw_all(on_first, folder / "all.png")


def draw_races(names: list[str], folder: File, race: Race) -> None:
    for entry in ENTRIES:
        if race.has(entry.name) and (not names or entry.name in names):
            draw_race(entry, race, folder / f"{entry.name}-race.png")


def draw_paths(paths: list[Path], to: File) -> None:
    figure, axes = style.figure(len(LANDS), 2.9)
    for ax, land, path in zip(axes, LANDS, paths, strict=True):
        draw_path(ax, land, path)
        rate = path.learning_rate
        chosen = (
            "its default learning rate" if rate is None else f"learning rate {rate:.2g}"
        )
        ax.set_title(land.title)
        ax.set_xlabel(f"{chosen}; {path.value:.2g} after {STEPS} steps")
    style.save(figure, to)


def draw_all(paths: dict[str, Path], to: File) -> None:
    """Every optimizer on the first function."""
    figure, axes = style.tiles(math.ceil(len(paths) / COLUMNS), COLUMNS)
    for ax in axes[len(paths) :]:
        ax.set_visible(False)
    for ax, (title, path) in zip(axes, paths.items(), strict=False):
        draw_path(ax, LANDS[0], path, size=0.5)
        ax.set_title(title, fontsize=min(5.2, 105 / len(title)), pad=2)
    style.save(figure, to)


def draw_path(ax: Axes, land: Land, path: Path, size: float = 1.0) -> None:
    """The function as land, and the way through it. `size` is that of dots and lines."""
    x0, x1, y0, y1 = land.window
    x, y = torch.linspace(x0, x1, GRID).double(), torch.linspace(y0, y1, GRID).double()
    at = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)
    nothing = torch.zeros(2, dtype=torch.float64)
    height = vmap(vmap(lambda p: land.function(p, nothing)))(at).clamp(min=1e-9)
    highest = math.log10(float(height.max()))
    levels = np.logspace(highest - 4, highest, LEVELS)
    norm = LogNorm(levels[0], levels[-1])
    drawn = ax.contourf(x, y, height, levels, cmap=style.LAND, norm=norm, extend="min")
    drawn.set_antialiased(False)
    points = path.points.nan_to_num(1e9, 1e9, -1e9).clamp(-1e3, 1e3)
    ax.plot(*points.T, color=style.ACCENT, lw=1.1 * size, alpha=0.95)
    ax.plot(*points[:: STEPS // 20].T, "o", color=style.ACCENT, ms=2.4 * size, mew=0)
    ax.plot(*land.goal, "+", color=style.WHITE, ms=9 * size, mew=1.3 * size)
    ax.plot(*points[0], "o", color=style.WHITE, ms=4.5 * size, mew=0)
    end = {"mfc": style.ACCENT, "mec": style.WHITE, "ms": 5.5 * size, "mew": 1.1 * size}
    ax.plot(*points[-1], "o", **end)
    ax.set(xlim=(x0, x1), ylim=(y0, y1), xticks=[], yticks=[])
    ax.spines[:].set_visible(False)


def draw_race(entry: Entry, race: Race, to: File) -> None:
    """Its training loss among those of all others, of which the middle 80% are a band."""
    figure, axes = style.figure(len(race.tasks), 2.3)
    for ax, task in zip(axes, race.tasks, strict=True):
        curves = race.curves(task)
        steps, loss = curves[entry.name]
        everyone = np.array([np.interp(steps, *curve) for curve in curves.values()])
        low, middle, high = np.nanquantile(everyone, [0.1, 0.5, 0.9], axis=0)
        ax.fill_between(steps, low, high, color=style.GREY, alpha=0.25, lw=0)
        ax.plot(steps, middle, color=style.GREY, lw=1, ls=(0, (4, 2)))
        ax.plot(steps, loss, color=style.ACCENT, lw=1.8)
        ax.set_yscale("log")
        lowest = np.nanmin([*low, *loss])
        ax.set_ylim(lowest * 0.9, high[0] * 1.1)
        wide = high[0] > 4 * lowest
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)) if wide else MaxNLocator(4))
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_locator(NullLocator())
        ax.set_title(race.title(task))
        ax.set_xlabel("step")
    axes[0].set_ylabel("training loss")
    style.save(figure, to)
