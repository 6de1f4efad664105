"""What the sections share: one console, tables, a progress bar, and how pictures look."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table

T = TypeVar("T")

# The palette of Okabe and Ito, whose colours can be told apart with any kind of colour vision.
BLACK, ORANGE, SKY, GREEN, BLUE, RED, PINK = (
    "#000000",
    "#E69F00",
    "#56B4E9",
    "#009E73",
    "#0072B2",
    "#D55E00",
    "#CC79A7",
)

plt.rcParams.update(
    {
        "figure.dpi": 110,
        "figure.constrained_layout.use": True,
        "font.size": 10,
        "axes.titlesize": 11,
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": "#E6E6E6",
        "legend.frameon": False,
    }
)

console = Console(highlight=False)


def title(text: str) -> None:
    console.print()
    console.rule(f"[bold]{text}", align="left")


def say(text: str) -> None:
    console.print(text, soft_wrap=True)


def table(
    rows: Iterable[Iterable[str]], header: list[str], numbers_from: int = 1
) -> None:
    """Print a table; the columns from `numbers_from` on are aligned to the right."""
    grid = Table(box=SIMPLE_HEAD)
    for i, name in enumerate(header):
        grid.add_column(name, justify="right" if i >= numbers_from else "left")
    for row in rows:
        grid.add_row(*row)
    console.print(grid)


def track(items: Iterable[T], description: str, total: int) -> Iterator[T]:
    """Go through `items` with a progress bar."""
    columns = (
        TextColumn(f"{description:<36}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        yield from progress.track(items, total=total)


def smooth(losses: list[float], window: int = 15) -> list[float]:
    """The mean of `window` values around each."""
    half = window // 2
    return [
        sum(part) / len(part)
        for i in range(len(losses))
        if (part := losses[max(0, i - half) : i + half + 1])
    ]


def save(figure: Figure, path: Path) -> Path:
    figure.savefig(path)
    plt.close(figure)
    say(f"Picture: {path}")
    return path
