"""docs/parity.md: what each name was compared with, and how far apart the two were at most.

A test that compares with a reference which is not ours says so by a mark, and hands what it
compares to `assert_near`:

    @pytest.mark.compares("adan", reference="its authors' code, transcribed")
    @pytest.mark.parametrize("options", [...])
    def test_adan_is_that_of_its_authors(options): ...

Each case of such a test is one configuration. ``pytest tests -m compares --parity-page`` runs them
all and writes the page; `test_parity_page.py` says when that is needed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

PAGE = Path(__file__).parents[1] / "docs" / "parity.md"
HEAD = """# Parity

Each name was trained beside a reference that is not ours: 100 steps in float64 on random trees
without zeros, unless the last column says otherwise. A configuration is one choice of arguments.
The difference is the largest of `|ours - theirs| / (1 + |theirs|)` over all updates, parameters and
steps that were compared; a test fails where it is above the bound. The classes in `fo.optim` that
torch.optim does not have are those of the functions, to the bit.

`make parity` runs the comparisons and writes this page. No name is without a run.

| name | configurations | largest difference | bound | reference | remarks |
|---|---|---|---|---|---|
"""
FOOT = """
`plain` is a transcription of the paper or of its authors' code into scalar or per-tensor
arithmetic, written in the tests without a look at the rule.
"""


@dataclass
class Line:
    """One line of the page: a name against one reference."""

    name: str
    reference: str
    bound: float
    remark: str
    configurations: int = 0
    difference: float = 0.0

    @property
    def key(self) -> tuple[str, str, float, str]:
        return self.name, self.reference, self.bound, self.remark

    def written(self) -> str:
        cells = (
            f"`{self.name}`",
            str(self.configurations),
            f"{self.difference:.0e}" if self.difference else "0",
            f"{self.bound:.0e}" if self.bound else "0",
            self.reference,
            self.remark,
        )
        return f"| {' | '.join(cells)} |"


# ---- what a test hands over ----------------------------------------------------------------------

_seen: list[float] = []


def assert_near(ours: Any, theirs: Any, bound: float = 1e-10, where: str = "") -> None:
    """Two arrays are equal up to `bound`, relative and absolute; the page gets their difference."""
    a, b = np.asarray(ours), np.asarray(theirs)
    assert a.shape == b.shape, (where, a.shape, b.shape)
    np.testing.assert_allclose(a, b, rtol=bound, atol=bound, err_msg=where)
    finite = np.isfinite(b)
    relative = np.abs(a[finite] - b[finite]) / (1 + np.abs(b[finite]))
    _seen.append(float(relative.max(initial=0.0)))


def compares(*names: str, reference: str, bound: float = 1e-10, remark: str = "") -> Any:
    """The mark of a test that compares these names with a reference."""
    return pytest.mark.compares(*names, reference=reference, bound=bound, remark=remark)


# ---- the lines -----------------------------------------------------------------------------------


class Lines:
    """A plugin of pytest: the lines of the tests that were collected, and what their runs gave."""

    def __init__(self) -> None:
        self.lines: dict[tuple, Line] = {}

    def of(self, item: pytest.Item) -> list[Line]:
        found = []
        for mark in item.iter_markers("compares"):
            for name in mark.args:
                line = Line(name, **mark.kwargs)
                found.append(self.lines.setdefault(line.key, line))
        return found

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            for line in self.of(item):
                line.configurations += 1

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Any:
        _seen.clear()
        result = yield
        lines = self.of(item)
        assert _seen or not lines, "it is marked as a comparison, and compares nothing"
        for line in lines:
            line.difference = max(line.difference, *_seen)
        return result

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        found = sorted(self.lines.values(), key=lambda line: line.key)
        if file := session.config.getoption("--parity-lines", None):
            Path(file).write_text(json.dumps([asdict(line) for line in found]))
        if session.config.getoption("--parity-page", False) and exitstatus == 0:
            PAGE.write_text(page(found))


def page(lines: Iterable[Line]) -> str:
    return f"{HEAD}{chr(10).join(line.written() for line in lines)}\n{FOOT}"


def without_digits(text: str) -> str:
    """The page without the differences, which are others on another machine."""
    return re.sub(r"^(\| `[\w.]+` \| \d+ \|)[^|]*\|", r"\1 |", text, flags=re.MULTILINE)
