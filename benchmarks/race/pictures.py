"""The pictures of a race, in one style, from its JSON."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from PIL import Image

STYLE = {
    "figure.constrained_layout.use": True,
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E6E6E6",
    "legend.frameon": False,
}
BLACK, GREY, ORANGE, BLUE = "#000000", "#BBBBBB", "#E69F00", "#0072B2"
SHOWN = {
    "sgd": "#000000",
    "adamw": "#0072B2",
    "lion": "#E69F00",
    "prodigy": "#CC79A7",
    "schedule_free_adamw": "#56B4E9",
    "muon": "#D55E00",
    "soap": "#009E73",
}
"""Well-known optimizers, in the colours of Okabe and Ito. They are named here for their fame, and
not for their places."""
PLACES = LinearSegmentedColormap.from_list("places", ["#0072B2", "#9CCBE8", "#F4F4F4"])


@contextmanager
def styled() -> Iterator[None]:
    with mpl.rc_context(STYLE):
        yield


def note(result: dict[str, Any]) -> str:
    """What a picture says of its origin."""
    torch = result["versions"]["torch"]
    quick = (
        "A REHEARSAL with few steps, no result. " if result["protocol"]["quick"] else ""
    )
    return f"{quick}python -m benchmarks race, {result['date'][:10]}, torch {torch}"


# ---- places --------------------------------------------------------------------------------------


def places(result: dict[str, Any]) -> Figure:
    """Optimizers in the order of their mean place, and their place on each task."""
    order, tasks = result["overall"], result["tasks"]
    names = [line["optimizer"] for line in order]
    table = [[line["places"][task] for task in tasks] for line in order]
    figure = Figure(figsize=(8.5, 1.6 + 0.205 * len(names)))
    axes = figure.subplots()
    axes.imshow(table, cmap=PLACES, aspect="auto", vmin=1, vmax=len(names))
    for i, line in enumerate(order):
        for j, task in enumerate(tasks):
            _place(axes, i, j, line["places"][task], line["optimizer"], tasks[task])
    labels = [textwrap.fill(about["title"], 15) for about in tasks.values()]
    axes.set_xticks(range(len(tasks)), labels, fontsize=8)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.tick_params(top=True, labeltop=True, bottom=False, labelbottom=False, length=0)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    text = (
        "Place by held-out loss. In bold with a frame: the best, and all that the spread"
    )
    axes.set_title(f"{text}\ncannot tell from it", pad=12)
    axes.set_xlabel(note(result), fontsize=8, loc="left")
    return figure


def _place(
    axes: Axes, i: int, j: int, place: int, name: str, about: dict[str, Any]
) -> None:
    leads = name in about["leaders"]
    dark = place <= 18
    color = "white" if dark else BLACK
    weight = "bold" if leads else "normal"
    looks = dict(ha="center", va="center", fontsize=7.5, color=color, weight=weight)
    axes.text(j, i, str(place), **looks)
    if leads:
        box = dict(fill=False, edgecolor=ORANGE, linewidth=1.6)
        corner = (j - 0.49, i - 0.46)
        axes.add_patch(Rectangle(corner, 0.98, 0.92, **box))


# ---- curves --------------------------------------------------------------------------------------


def curves(result: dict[str, Any]) -> Figure:
    """Training loss of the well-known ones in colour, of all others in grey, and the target."""
    figure = Figure(figsize=(12, 7.2))
    panels = figure.subplots(2, 3)
    for axes, (task, about) in zip(panels.flat, result["tasks"].items(), strict=False):
        lines = [line for line in result["results"] if line["task"] == task]
        _curves(axes, lines, about)
        axes.set_title(about["title"])
    handles, labels = panels.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels))
    figure.supxlabel(f"step    ({note(result)})", fontsize=9)
    figure.supylabel("training loss at the best setting, a mean over seeds", fontsize=10)
    return figure


def _curves(axes: Axes, lines: list[dict[str, Any]], about: dict[str, Any]) -> None:
    ends = []
    for line in lines:
        points = [(step, loss) for step, loss in line["curve"] if loss is not None]
        if not points:
            continue
        steps, losses = zip(*points, strict=True)
        color = SHOWN.get(line["optimizer"])
        looks = {"color": color, "lw": 1.8, "zorder": 3, "label": line["optimizer"]}
        grey = {"color": GREY, "lw": 0.5, "zorder": 1}
        axes.plot(steps, losses, **(looks if color else grey))
        ends.append((losses[0], losses[-1]))
    if about["target"] is not None:
        axes.axhline(about["target"], color=BLACK, ls=":", lw=1.2, label="target")
    first = sorted(first for first, _ in ends)
    axes.set(yscale="log", xlim=(0, about["steps"]))
    plain = FuncFormatter(lambda x, _: f"{x:g}")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(plain)
    axes.yaxis.set_minor_formatter(NullFormatter())
    low = min(last for _, last in ends)
    axes.set_ylim(0.8 * low, 1.3 * first[len(first) // 2])


# ---- learning rates ------------------------------------------------------------------------------


def rates(result: dict[str, Any]) -> Figure:
    """The good learning rates of each optimizer, a line for each task."""
    order, tasks = result["overall"], list(result["tasks"])
    colors = dict(zip(tasks, [c for c in SHOWN.values() if c != BLACK], strict=False))
    figure = Figure(figsize=(8.5, 1.4 + 0.26 * len(order)))
    axes = figure.subplots()
    at = {line["optimizer"]: i for i, line in enumerate(order)}
    for line in result["results"]:
        if line["good_range"] is None:
            continue
        shift = 0.13 * (tasks.index(line["task"]) - (len(tasks) - 1) / 2)
        y, color = at[line["optimizer"]] + shift, colors[line["task"]]
        axes.plot(line["good_range"], [y, y], color=color, lw=1.7, solid_capstyle="round")
        axes.plot(line["learning_rate"], y, "o", color=color, ms=2.6)
    for task in tasks:
        axes.plot(
            [], [], "-o", color=colors[task], ms=3, label=result["tasks"][task]["title"]
        )
    axes.set_yticks(range(len(order)), list(at), fontsize=8)
    axes.set(xscale="log", ylim=(len(order) - 0.4, -0.6))
    axes.tick_params(top=True, labeltop=True)
    axes.grid(False, axis="y")
    for i in range(0, len(order), 2):
        axes.axhspan(i - 0.5, i + 0.5, color="#F6F6F6", zorder=0)
    axes.set_xlabel(f"learning rate\n{note(result)}", fontsize=8)
    figure.suptitle(
        "Learning rates that keep nine tenths of the progress; dots: the best"
    )
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)
    return figure


PICTURES: dict[str, Callable[[dict[str, Any]], Figure]] = {
    "race_places": places,
    "race_curves": curves,
    "race_rates": rates,
}


def draw(result: dict[str, Any], folder: Path) -> list[Path]:
    """All pictures, as PNG."""
    written = []
    for name, picture in PICTURES.items():
        with styled():
            file = folder / f"{name}.png"
            _save(picture(result), file)
        written.append(file)
    return written


def _save(figure: Figure, file: Path) -> None:
    """As PNG with 128 colours, which takes a third of the bytes."""
    whole = io.BytesIO()
    figure.savefig(whole, dpi=110)
    Image.open(whole).convert("RGB").quantize(128).save(file, optimize=True)
