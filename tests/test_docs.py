"""Every ```python block of the README and of docs/ runs, from top to bottom, in one namespace for
each page.

One page needs the trainers that it is about, so `make clients` runs it.
"""

from __future__ import annotations

import contextlib
import re
import unittest
from pathlib import Path
from typing import Any

import pytest
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser

import functorch_opt

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
    [
        _case(page)
        for page in PAGES
        if "```python" in page.read_text() and page != OF_CLIENTS
    ],
)
def test_the_examples_run(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    """A fence in another form (```py, ~~~, indented) would be shown and not run."""
    for page in PAGES:
        fences = re.findall(
            r"^\s*(```+|~~~+)[ \t]*(\w*)", page.read_text(), flags=re.MULTILINE
        )
        opened = [language for fence, language in fences[::2]]
        assert all(fence == "```" for fence, _ in fences), page
        assert set(opened) <= {"python", "sh", "text"}, (page, opened)


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_links_to_the_site_lead_to_a_page() -> None:
    """The README is shown on package indexes too, so its links are absolute."""
    text = (ROOT / "README.md").read_text()
    site = re.search(
        r"^site_url: (\S+)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE
    )
    assert site is not None
    linked = re.findall(rf"\]\({re.escape(site[1])}([^)#]*)", text)
    assert linked and not re.findall(r"\]\((?!https://)", text)
    for target in linked:
        page = (
            f"{target.rstrip('/')}.md" if target.endswith("/") else target or "index.md"
        )
        assert (ROOT / "docs" / page).exists(), target


PROSE = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]


@pytest.mark.parametrize(
    "page", PROSE, ids=lambda page: page.relative_to(ROOT).as_posix()
)
def test_files_and_folders_that_pages_name_exist(page: Path) -> None:
    """They are named from the root, from the package, or from beside the page."""
    text = page.read_text()
    named = re.findall(r"(?<![\w/.:])[\w][\w./-]*\.py\b", text)
    named += re.findall(r"`([\w.][\w./-]*/)`", text)
    made = (ROOT / ".gitignore").read_text().split()  # by commands that the page is about
    for name in {*named} - {*made}:
        places = [folder / name for folder in (ROOT, ROOT / "functorch_opt", page.parent)]
        assert any(place.exists() for place in places), f"{page.name} names {name}"


@pytest.mark.parametrize(
    "page", PROSE, ids=lambda page: page.relative_to(ROOT).as_posix()
)
def test_modules_that_pages_name_exist(page: Path) -> None:
    for name in set(re.findall(r"\bfunctorch_opt(?:\.\w+)+", page.read_text())):
        value: Any = functorch_opt
        for part in name.split(".")[1:]:
            if part not in ("py", "md"):
                assert hasattr(value, part), f"{page.name} names {name}"
                value = getattr(value, part)


def test_the_design_page_is_short() -> None:
    """New text belongs on the page of decisions."""
    assert len((ROOT / "docs" / "design.md").read_text().split()) <= 1500


@pytest.mark.parametrize(
    "page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix()
)
def test_code_fits_the_page(page: Path) -> None:
    """A line of the site shows 86 columns; what is longer is cut off."""
    shown = re.findall(r"^```\w+\n(.*?)^```$", page.read_text(), flags=re.M | re.S)
    lines = [line for block in shown for line in block.splitlines()]
    assert not [line for line in lines if len(line) > 86]


def test_every_page_is_in_the_navigation_once() -> None:
    text = (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[2]
    listed = re.findall(r"^ *-.* ([\w./-]+\.md)$", text, flags=re.MULTILINE)
    docs = ROOT / "docs"
    assert sorted(listed) == sorted(
        p.relative_to(docs).as_posix() for p in docs.rglob("*.md")
    )
