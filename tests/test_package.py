"""What the package says about itself: one version, extras that exist, no heavy imports."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import lazy_names
import pytest

import functorch_opt as fo

ROOT = Path(__file__).parent.parent
PROJECT = (ROOT / "pyproject.toml").read_text()
CODE = [*(ROOT / "functorch_opt").rglob("*.py")]


def test_the_version_is_written_once() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", fo.__version__)
    assert 'dynamic = ["version"]' in PROJECT
    assert f'"{fo.__version__}"' not in PROJECT
    assert fo.__version__ not in (ROOT / "CITATION.cff").read_text()
    assert f"## {fo.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_every_extra_that_is_named_exists() -> None:
    """An error that says ``pip install "functorch_opt[viz]"`` has to be right."""
    table = PROJECT.partition("[project.optional-dependencies]")[2].partition("\n#")[0]
    extras = set(re.findall(r"^(\w+) = \[", table, flags=re.MULTILINE))
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    text = "\n".join(file.read_text() for file in [*CODE, *pages])
    assert (
        set(re.findall(r"functorch_opt\[(\w+)\]", text)) == extras == {"viz", "privacy"}
    )


def test_every_group_that_make_installs_exists() -> None:
    table = PROJECT.partition("[dependency-groups]")[2].partition("\n[")[0]
    groups = set(re.findall(r"^(\w+) = \[", table, flags=re.MULTILINE))
    used = set(re.findall(r"\$\(VENV\)/\.(\w+)", (ROOT / "Makefile").read_text()))
    used |= set(re.findall(r"\.venv-\w+/\.(\w+)", (ROOT / "Makefile").read_text()))
    assert used - {"torch"} <= groups
    named = "\n".join(
        f.read_text() for f in [ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md")]
    )
    assert set(re.findall(r"--group\s+(\w+)", named)) <= groups


def test_the_list_of_names_is_current() -> None:
    written = lazy_names.FILE.read_text()
    assert written == lazy_names.text(), "run `python -m tests.lazy_names`"


def test_import_loads_no_name_before_it_is_used() -> None:
    """So that it takes no time. A name that is used brings what it needs, and no more."""
    program = (
        "import sys, functorch_opt as fo;"
        "mine = lambda: {m for m in sys.modules if m.startswith('functorch_opt.')};"
        "print(*mine()); fo.adamw(0.1);"
        "print(*[m for m in mine() if '.optim.' in m or '.sweeps' in m])"
    )
    run = [sys.executable, "-W", "ignore", "-c", program]
    found = subprocess.run(run, capture_output=True, text=True, check=True, cwd=ROOT)
    assert found.stdout.splitlines() == ["functorch_opt._names", ""]


def test_a_name_that_is_not_there() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'adan_w'"):
        _ = fo.adan_w
    assert fo.adan is fo.adan


def test_import_brings_nothing_but_torch_and_optree() -> None:
    """Counted in a fresh process: what is imported, besides what torch and optree import."""
    program = (
        "import sys, torch, optree; before = {*sys.modules}; import functorch_opt;"
        "print(*sorted({m.partition('.')[0] for m in {*sys.modules} - before}))"
    )
    run = [sys.executable, "-W", "ignore", "-c", program]
    found = subprocess.run(run, capture_output=True, text=True, check=True, cwd=ROOT)
    assert found.stdout.split() == ["functorch_opt"]
