"""The picture of the performance page, from the table on it: ``python docs/pictures/performance.py``.

It reads the first table of AdamW with one thread, so the figures are written in one place.
"""

import re
from pathlib import Path

from matplotlib.figure import Figure

HERE = Path(__file__).parent
PAGE = HERE.parent / "performance.md"
SHOWN = {
    "`compiled_step`": "compiled_step",
    "`fo.optim`, `compile=True`": "fo.optim, compile=True",
    "torch foreach": "torch foreach",
    "`optax.adamw`, jitted, donated": "optax, jitted",
    "torchopt `adamw`, pure": "torchopt, pure",
}
"""The rows of the table that are drawn."""
CELL = re.compile(r"\**([\d.]+)\** \(([\d.]+)-([\d.]+)\)")


def table() -> tuple[list[str], dict[str, list[tuple[float, ...]]]]:
    """The columns, and of each row the median and quartiles in each column."""
    text = PAGE.read_text()
    head, rows = re.findall(
        r"^\| AdamW, 1 thread (\|.*)\n\|[-|]+\n((?:\|.*\n)+)", text, re.M
    )[0]
    found = {}
    for row in rows.splitlines():
        name, *cells = [cell.strip() for cell in row.strip("|").split("|")]
        if name in SHOWN:
            found[name] = [
                tuple(map(float, cell)) for cell in CELL.findall("|".join(cells))
            ]
    return [column.strip() for column in head.strip("|").split("|")], found


def times() -> Figure:
    """The time of a step as a part of that of torch's fused AdamW."""
    columns, rows = table()
    figure = Figure(figsize=(10, 3.3), layout="constrained")
    ax = figure.subplots()
    colors = ["#5b2a86", "#b565c9", "0.55", "0.7", "0.83"]
    wide = 0.8 / len(rows)
    for k, ((name, cells), color) in enumerate(
        zip(rows.items(), colors, strict=True)
    ):
        at = [i - 0.4 + wide * (k + 0.5) for i in range(len(columns))]
        middle = [cell[0] for cell in cells]
        spread = [
            [m - low for m, low, _ in cells],
            [high - m for m, _, high in cells],
        ]
        ax.bar(
            at,
            middle,
            wide * 0.92,
            yerr=spread,
            color=color,
            label=SHOWN[name],
            ecolor="0.3",
        )
    ax.axhline(1, color="black", linewidth=1)
    ax.text(-0.74, 1.08, "torch fused = 1", va="bottom", fontsize=8)
    ax.set(yscale="log", ylabel="time of a step", ylim=(0.2, 40), xlim=(-0.75, 3.5))
    ax.set_yticks(
        [0.25, 0.5, 1, 2, 4, 8, 16, 32],
        ["1/4", "1/2", "1", "2", "4", "8", "16", "32"],
    )
    ax.set_xticks(range(len(columns)), columns)
    ax.minorticks_off()
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, ncols=len(rows), loc="upper left", fontsize=8)
    return figure


if __name__ == "__main__":
    times().savefig(HERE / "performance.png", dpi=110)
