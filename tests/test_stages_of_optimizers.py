"""Every ready-made optimizer has a stage of its name, or a row in the docs that says what it has."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import functorch_opt as fo
from functorch_opt._core.points import _inside
from functorch_opt._core.transformation import GradientTransformation

PAGE = Path(__file__).parent.parent / "docs" / "api" / "stages.md"
ROW = re.compile(r"^\| `(\w+)` \| (.*?) \| (.*?) \|$", flags=re.MULTILINE)
HEAD = "## The stage of an optimizer"


def factories() -> Iterator[str]:
    """The functions that make an optimizer of a learning rate."""
    for name in dir(fo):
        function = getattr(fo, name)
        if name.startswith("scale_by_") or not inspect.isfunction(function):
            continue
        if next(iter(inspect.signature(function).parameters), None) == "learning_rate":
            yield name


FACTORIES = [*factories()]


def made(name: str) -> GradientTransformation:
    """The optimizer, with its defaults and a number for whatever has none."""
    given = inspect.signature(getattr(fo, name)).parameters.values()
    required = {p.name: 1 for p in given if p.default is p.empty}
    return getattr(fo, name)(**required)


def stages(tx: GradientTransformation) -> set[str]:
    """The names of a transformation and of all that it is made of."""
    return {tx.name}.union(*map(stages, _inside(tx)))


def table() -> dict[str, tuple[list[str], str]]:
    """What the docs say: ``{optimizer: (its stages, why)}``."""
    text = PAGE.read_text()
    rows = ROW.findall(text[text.index(HEAD) :])
    return {name: (re.findall(r"`(\w+)`", of), why) for name, of, why in rows}


TABLE = table()


def test_every_optimizer_has_a_stage_of_its_name_or_a_row() -> None:
    own = {name for name in FACTORIES if f"scale_by_{name}" in stages(made(name))}
    assert len(own) > 40
    assert set(FACTORIES) - own == set(TABLE)


@pytest.mark.parametrize("name", FACTORIES)
def test_the_stages_of_a_row_are_in_the_optimizer(name: str) -> None:
    of, why = TABLE.get(name, ([f"scale_by_{name}"], ""))
    assert of or why, f"no stage and no reason for {name}"
    assert set(of) <= stages(made(name)) & set(dir(fo))
