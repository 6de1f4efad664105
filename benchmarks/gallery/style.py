"""How every picture of the gallery looks. Surroundings are transparent and words are of a middle grey,
so that a picture can stand on a light page and on a dark one.
"""

from __future__ import annotations

import io
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from PIL import Image

GREY = "#868e9c"
ACCENT = "#f08c2e"
WHITE = "#ffffff"
LAND = LinearSegmentedColormap.from_list(
    "land", ["#141d33", "#2b4570", "#6f93b8", "#c9d8e6"]
)
DOTS_PER_INCH = 150

mpl.rcParams.update(
    {
        "font.family": "DejaVu Sans",
        "font.size": 9,
        "axes.edgecolor": GREY,
        "axes.labelcolor": GREY,
        "axes.titlecolor": GREY,
        "axes.titlesize": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "xtick.color": GREY,
        "ytick.color": GREY,
        "text.color": GREY,
        "figure.constrained_layout.use": True,
    }
)


def figure(panels: int, height: float = 2.7) -> tuple[Figure, list[Axes]]:
    """A row of panels, as wide as a page."""
    made = Figure(figsize=(7.4, height))
    axes = made.subplots(1, panels, squeeze=False)[0]
    return made, list(axes)


def tiles(rows: int, columns: int) -> tuple[Figure, list[Axes]]:
    """Many small panels."""
    made = Figure(figsize=(columns * 0.92, rows * 0.98))
    made.get_layout_engine().set(w_pad=0.015, h_pad=0.015, wspace=0.02, hspace=0.02)
    axes = made.subplots(rows, columns, squeeze=False)
    return made, list(axes.flat)


def save(made: Figure, path: Path) -> None:
    """As PNG with 64 colours, which are enough, and take few bytes."""
    path.parent.mkdir(exist_ok=True)
    drawn = io.BytesIO()
    made.savefig(drawn, format="png", dpi=DOTS_PER_INCH, transparent=True)
    image = Image.open(drawn).convert("RGBA")
    few = image.quantize(64, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    few.save(path, optimize=True)
