"""The gallery of the docs: ``python -m benchmarks.gallery [--pages | --races] [NAME ...]``.

Draws the pictures of all optimizers, or of those named, into docs/gallery/pictures, and writes the pages.
With --pages it draws nothing, and with --races only the curves of docs/race.json, which takes a
minute, and not ten. Needs the extra ``demo``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from benchmarks.gallery.pages import pages
from benchmarks.gallery.race import FILE, Race

DOCS = Path(__file__).parents[2] / "docs"
PICTURES = DOCS / "gallery" / "pictures"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gallery")
    parser.add_argument("names", nargs="*", help="optimizers to draw; all by default")
    parser.add_argument("--pages", action="store_true", help="write the pages only")
    parser.add_argument("--races", action="store_true", help="draw the curves only")
    parser.add_argument("--race", type=Path, default=FILE, help="results to read")
    parser.add_argument("--rehearsal", action="store_true", help="take a quick race too")
    given = parser.parse_args()
    race = Race(given.race, given.rehearsal)
    if not given.pages:
        from benchmarks.gallery.draw import draw, draw_races  # they need matplotlib

        torch.set_num_threads(1)
        (draw_races if given.races else draw)(given.names, PICTURES, race)
    for name, text in pages(race, PICTURES).items():
        (DOCS / name).parent.mkdir(exist_ok=True)
        (DOCS / name).write_text(text)


if __name__ == "__main__":
    main()
