"""Values in the states of both: the table in docs/migrate.md, row by row."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from parity_page import assert_near

import functorch_opt as fo
from functorch_opt import tree

optax = pytest.importorskip("optax", reason="the other column is optax's")
import jax  # noqa: E402

jax.config.update("jax_enable_x64", True)

PAGE = Path(__file__).parents[2] / "docs" / "migrate.md"
HEAD = "| transformation | optax | here |\n|---|---|---|\n"
VALUE = 2.0


def rows() -> list[tuple[str, ...]]:
    table = PAGE.read_text().partition(HEAD)[2].partition("\n\n")[0]
    return [tuple(re.findall(r"`([^`]+)`", row)) for row in table.splitlines()]


def draw(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    options = {"dtype": torch.float64, "generator": generator}
    return {"w": torch.randn(3, 2, **options), "b": torch.randn(2, **options)}


def to_jax(x: Any) -> Any:
    return jax.tree.map(lambda t: jax.numpy.asarray(t.numpy()), x)


class Side:
    """One of the two libraries: its names, and how it holds numbers."""

    def __init__(self, names: dict[str, Any], made: Any) -> None:
        self.made = made
        self.names = {k: names[k] for k in names if not k.startswith("_")}

    def found(self, transformation: str, expression: str) -> Any:
        """What `expression` finds in the state after one step; of a state, what was set in it."""
        params, gradients = self.made(draw(0)), self.made(draw(1))
        tx = eval(transformation, self.names)
        value = self.made([torch.tensor(VALUE)])[0]
        reads = {"value": value} if "plateau" in transformation else {}
        state = tx.update(gradients, tx.init(params), params, **reads)[1]
        found = eval(expression, {**self.names, "state": state})
        written = re.search(r"(count|learning_rate)(?:=|\": )", expression)
        return self.names["tree"].get(found, written.group(1)) if written else found


@pytest.mark.parametrize("row", rows(), ids=" ".join)
def test_both_columns_find_the_same(row: tuple[str, ...]) -> None:
    transformation, theirs, ours = row
    optaxs = Side({**vars(optax), **vars(optax.contrib)}, to_jax)
    here = Side({name: getattr(fo, name) for name in dir(fo)}, lambda x: x)
    expected = jax.tree.leaves(optaxs.found(transformation, theirs))
    found = tree.leaves(here.found(transformation, ours))
    assert len(found) == len(expected) > 0
    for x, y in zip(found, expected, strict=True):
        # optax gathers in float32.
        is_rough = getattr(y, "dtype", None) == "float32"
        assert_near(x, y, 1e-6 if is_rough else 1e-10)


def test_the_table_is_there() -> None:
    assert (
        len(rows())
        == PAGE.read_text().partition(HEAD)[2].split("\n\n")[0].count("\n") + 1
    )
    assert all(len(row) == 3 for row in rows())
