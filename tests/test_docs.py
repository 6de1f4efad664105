"""Every ```python block of the README and of docs/ runs, page by page, from top to bottom, in one namespace a page.

One page needs the trainers that it is about: `make clients` runs it.
"""

from __future__ import annotations

import contextlib
import re
import unittest
from pathlib import Path

import pytest
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
OF_CLIENTS = ROOT / "docs" / "guide-clients.md"
SYBIL = Sybil([PythonCodeBlockParser(), SkipParser()])


def _case(page: Path):
    text = page.read_text()
    marks = [pytest.mark.slow] if "= torch.compile(" in text else []
    return pytest.param(page, id=page.relative_to(ROOT).as_posix(), marks=marks)


@pytest.mark.parametrize(
    "page",
    [_case(page) for page in PAGES if "```python" in page.read_text() and page != OF_CLIENTS],
)
def test_the_examples_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    document = SYBIL.parse(page)
    examples = list(document.examples())
    assert examples
    for example in examples:
        with contextlib.suppress(
            unittest.SkipTest
        ):  # a block that says it needs a library which is not here; the others run
            example.evaluate()


def test_every_example_is_found() -> None:
    """A fence that is written otherwise (```py, ~~~, indented) would be shown and not run."""
    for page in PAGES:
        fences = re.findall(r"^\s*(```+|~~~+)[ \t]*(\w*)", page.read_text(), flags=re.MULTILINE)
        opened = [language for fence, language in fences[::2]]
        assert all(fence == "```" for fence, _ in fences), page
        assert set(opened) <= {"python", "sh", "text"}, (page, opened)


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"
