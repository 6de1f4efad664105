"""Tables, progress and pictures.

With rich and matplotlib they are prettier; without these libraries they are plain text.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

if find_spec("rich"):
    from rich.console import Console

    console = Console(
        highlight=False,
        width=None if sys.stdout.isatty() else int(os.environ.get("COLUMNS", "140")),
    )
else:
    console = None

# The palette of Okabe and Ito, whose colours can be told apart with any kind of colour vision.
BLACK, ORANGE, SKY, BLUE = "#000000", "#E69F00", "#56B4E9", "#0072B2"


tables: list[str] = []
"""Every table so far, in Markdown: for the file beside the numbers, and from there for the
documentation.
"""


def say(text: str) -> None:
    if console:
        console.print(text, soft_wrap=True, markup=False)
    else:
        print(text, flush=True)


def table(
    title: str,
    header: Sequence[str],
    rows: Iterable[Sequence[str]],
    numbers_from: int = 1,
    numbers_to: int | None = None,
    quiet: bool = False,
) -> None:
    """Print a table, and keep it in Markdown; the columns from `numbers_from` to `numbers_to` are
    aligned to the right.
    """
    rows = [list(row) for row in rows]
    right = range(len(header))[numbers_from:numbers_to]
    lines = [header, ["--:" if i in right else "---" for i in range(len(header))], *rows]
    tables.append(
        "\n".join([f"**{title}**", "", *(f"| {' | '.join(line)} |" for line in lines)])
    )
    if quiet:
        return
    if console:
        from rich.box import SIMPLE_HEAD
        from rich.markup import escape
        from rich.table import Table

        grid = Table(
            box=SIMPLE_HEAD, title=title, title_justify="left", title_style="bold"
        )
        for i, name in enumerate(header):
            grid.add_column(
                name, justify="right" if i in right else "left", overflow="fold"
            )
        for row in rows:
            grid.add_row(*map(escape, row))
        console.print(grid)
        return
    widths = [
        max(len(row[i]) for row in [list(header), *rows]) for i in range(len(header))
    ]
    print(f"\n{title}")
    for row in [list(header), ["-" * width for width in widths], *rows]:
        print(
            "  ".join(
                cell.rjust(w) if i in right else cell.ljust(w)
                for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            )
        )
    sys.stdout.flush()


def track(items: Sequence[T], description: str) -> Iterator[T]:
    """Go through `items` with a progress bar."""
    if console and sys.stdout.isatty():
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
        )

        with Progress(
            TextColumn(f"{description:<44}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
        ) as progress:
            yield from progress.track(items, total=len(items))
        return
    for i, item in enumerate(items, 1):
        if sys.stderr.isatty():
            print(
                f"\r{description:<44} {i}/{len(items)}",
                end="\n" if i == len(items) else "",
                file=sys.stderr,
                flush=True,
            )
        yield item
    if not sys.stderr.isatty():
        print(f"{description} ({len(items)})", file=sys.stderr, flush=True)


def bars(
    path: Path,
    panels: Sequence[tuple[str, Sequence[tuple[str, float]], float | None]],
    label: str,
    log: bool = False,
) -> Path | None:
    """A picture: a panel per row of bars, the first of each in colour, with a line at the floor.

    None without matplotlib.
    """
    panels = [panel for panel in panels if panel[1]]
    if not find_spec("matplotlib") or not panels:
        say(
            "No picture: matplotlib is not installed."
            if panels
            else "No picture: nothing was measured."
        )
        return None
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    heights = [len(values) + 1.6 for _, values, _ in panels]
    figure, axes = plt.subplots(
        len(panels),
        1,
        figsize=(9, 0.27 * sum(heights)),
        height_ratios=heights,
        squeeze=False,
        constrained_layout=True,
    )
    for ax, (title, values, floor) in zip(axes[:, 0], panels, strict=True):
        names, numbers = [name for name, _ in values], [number for _, number in values]
        ax.barh(
            names,
            numbers,
            color=[BLUE if name.startswith("functorch_opt") else SKY for name in names],
            log=log,
        )
        if floor is not None:
            ax.axvline(floor, color=ORANGE, lw=2)
        for i, number in enumerate(numbers):
            ax.text(number, i, f" {number:.3g}", va="center", fontsize=8)
        ax.invert_yaxis()
        ax.margins(x=0.12)
        if log:
            ax.set_xlim(left=min(0.5, *numbers))
        ax.set_title(title, loc="left", fontsize=10)
        ax.tick_params(labelsize=8)
        ax.spines[["top", "right"]].set_visible(False)
    axes[-1, 0].set_xlabel(label)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    say(f"Picture: {path}")
    return path


def markdown(path: Path, facts: dict[str, object]) -> Path:
    """The tables of this run, and what they were measured with."""
    about = "\n".join(f"- {name}: {value}" for name, value in facts.items())
    path.write_text("\n\n".join([about, *tables]) + "\n")
    tables.clear()
    return path
