"""The notebooks are the pages they are made of, and run from top to bottom."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import notebooks
import pytest


@pytest.mark.parametrize("name", notebooks.PAGES)
def test_a_notebook_is_its_page(name: str) -> None:
    written = (notebooks.FOLDER / f"{name}.ipynb").read_text()
    assert written == notebooks.notebook(name), "run `python -m tests.notebooks`"
    page = (notebooks.DOCS / f"{name}.md").read_text()
    assert f"[As a notebook](notebooks/{name}.ipynb)" in page


def test_every_notebook_is_made() -> None:
    assert sorted(p.stem for p in notebooks.FOLDER.iterdir()) == sorted(notebooks.PAGES)


@pytest.mark.parametrize("name", notebooks.PAGES)
def test_a_notebook_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its cells one after another in one namespace, as a kernel runs them."""
    monkeypatch.chdir(tmp_path)
    cells = json.loads((notebooks.FOLDER / f"{name}.ipynb").read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert code
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for k, cell in enumerate(code):
        source = compile("".join(cell["source"]), f"{name}, cell {k}", "exec")
        fails = "raises-exception" in cell["metadata"].get("tags", ())
        with pytest.raises(TypeError) if fails else contextlib.nullcontext():
            exec(source, namespace)
