"""Writes the notebooks in ``docs/notebooks/`` from the pages they are made of.

Run it by ``python -m tests.notebooks`` when one of these pages has changed; `test_notebooks.py` says
when it is needed.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent.parent / "docs"
FOLDER = DOCS / "notebooks"
PAGES = ("tutorial-linear-regression", "guide-sweep", "write-a-transformation")
SITE = "https://functorch-opt.github.io/functorch_opt/"
BLOCK = re.compile(r"^```python\n(.*?)^```\n", flags=re.MULTILINE | re.DOTALL)
HEAD = "*Made from [this page]({page}). It needs `pip install functorch_opt`.*"


def _lines(text: str) -> list[str]:
    return text.strip("\n").splitlines(keepends=True)


def _words(text: str) -> dict[str, Any]:
    """A cell of text; its links lead to the site."""
    text = re.sub(r"\]\(([\w/-]+)\.md(#[\w-]+)?\)", rf"]({SITE}\1/\2)", text)
    text = re.sub(r"\]\((pictures/[^)]*)\)", rf"]({SITE}\1)", text)
    return {"cell_type": "markdown", "metadata": {}, "source": _lines(text)}


def _code(text: str) -> dict[str, Any]:
    """A cell of code. A dialogue with ``>>>`` becomes what was typed."""
    error = "\nTraceback (" in text
    if text.startswith(">>>"):
        typed = [line[4:] for line in text.splitlines() if line[:3] in (">>>", "...")]
        text = "\n".join(typed)
    tags = {"tags": ["raises-exception"]} if error else {}
    empty = {"metadata": tags, "outputs": [], "execution_count": None}
    return {"cell_type": "code", **empty, "source": _lines(text)}


def notebook(name: str) -> str:
    """The page as a notebook, in JSON."""
    text = (DOCS / f"{name}.md").read_text()
    text = re.sub(r"^\[As a notebook\].*\n\n", "", text, flags=re.MULTILINE)
    title, body = text.split("\n", 1)
    cells = [_words(f"{title}\n\n{HEAD.format(page=f'{SITE}{name}/')}")]
    for i, part in enumerate(BLOCK.split(body)):
        if part.strip():
            cells.append(_code(part) if i % 2 else _words(part))
    for i, cell in enumerate(cells):
        cell["id"] = f"{name[:20]}-{i}"
    python = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": python, "language_info": {"name": "python"}}
    whole = {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(whole, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name in PAGES:
        (FOLDER / f"{name}.ipynb").write_text(notebook(name))
