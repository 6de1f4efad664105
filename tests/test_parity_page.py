"""docs/parity.md has a line for every public name, with enough configurations, and is not stale."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import pytest
from parity_page import PAGE, Line, page, without_digits
from registry import ROWS
from training import TORCH_NAMED

from functorch_opt import schedules

ROOT = Path(__file__).parents[1]
LEAST = 4
"""The defaults, and three other configurations."""

WITHOUT_OPTIONS = {"centralize", "identity", "scale_by_sign", "set_to_zero", "zero_nans"}
"""There is one way to call them."""
FEW = {"stateless": "it takes a function, and does what this says"}
"""Fewer configurations, and why."""


@functools.cache
def collected() -> tuple[Line, ...]:
    """The lines of all comparisons in the tests, without a run."""
    pytest.importorskip("optax")
    files = [
        str(file)
        for file in sorted((ROOT / "tests").rglob("test_*.py"))
        if "parity_page import" in file.read_text() and file != Path(__file__)
    ]
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "lines.json"
        command = ["-m", "pytest", "-q", "--collect-only", "-m", "compares"]
        options = ["-p", "no:cacheprovider", f"--parity-lines={found}"]
        done = subprocess.run(
            [sys.executable, *command, *options, *files],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return tuple(Line(**line) for line in json.loads(found.read_text()))


def test_no_name_is_without_a_run() -> None:
    compared = {line.name for line in collected()}
    wanted = {row.name for row in ROWS} | {f"optim.{name}" for name in TORCH_NAMED}
    curves = {*schedules.__all__} - {"preview"}  # a picture of them
    missing = (wanted | curves) - compared
    assert not missing, f"{sorted(missing)} are compared with nothing; see parity_page.py"


def test_each_name_is_compared_in_enough_configurations() -> None:
    count: Counter[str] = Counter()
    for line in collected():
        count[line.name] += line.configurations
    curves = {*schedules.__all__} - {"preview"}
    names = ({row.name for row in ROWS} | curves) - WITHOUT_OPTIONS - FEW.keys()
    few = {name: count[name] for name in names if count[name] < LEAST}
    assert not few, f"compared in fewer than {LEAST} configurations: {few}"
    assert all(count[name] < LEAST for name in FEW), "FEW lists a name that has enough"


def test_the_page_is_of_these_comparisons() -> None:
    written, now = (
        without_digits(text) for text in (PAGE.read_text(), page(collected()))
    )
    assert written == now, "docs/parity.md is stale: run `make parity`"


def test_differences_on_the_page_are_within_their_bounds() -> None:
    rows = [line.split("|") for line in PAGE.read_text().splitlines() if "| `" in line]
    assert len(rows) > 100
    for _, name, _, difference, bound, *_ in rows:
        assert float(difference) <= float(bound), name
