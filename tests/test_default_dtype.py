"""The data decide the dtype of what is computed; torch's default dtype has no effect."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from registry import ROWS, Row
from torch import Tensor

import functorch_opt as fo
from functorch_opt import tree

CASES = [
    pytest.param(row, variant, id=row.name) for row in ROWS for variant in row.variants
]
DTYPES = [torch.float32, torch.float64, torch.bfloat16]


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    before = torch.get_default_dtype()
    yield
    torch.set_default_dtype(before)


def numbers(dtype: torch.dtype, seed: int) -> dict[str, Tensor | None]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"w": (3, 2), "b": (3,), "s": ()}
    drawn = {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        for name, shape in shapes.items()
    }
    return {**drawn, "none": None}


def trained(row: Row, variant: dict[str, Any], dtype: torch.dtype) -> Any:
    tx, params, made = row.build(variant), numbers(dtype, 0), []
    state = tx.init(params)
    for step in range(3):
        updates, state = tx.update(numbers(dtype, 1 + step), state, params)
        params = fo.apply_updates(params, updates)
        made += [updates, params, state]
    return made


@pytest.mark.parametrize(("row", "variant"), CASES)
def test_every_row_computes_the_same(row: Row, variant: dict[str, Any]) -> None:
    for dtype in DTYPES:
        torch.set_default_dtype(torch.float32)
        wanted = tree.leaves(trained(row, variant, dtype))
        for default in (torch.float64, torch.float16):
            torch.set_default_dtype(default)
            got = tree.leaves(trained(row, variant, dtype))
            for a, b in zip(wanted, got, strict=True):
                assert a.dtype is b.dtype
                assert torch.equal(a.nan_to_num(), b.nan_to_num())


@pytest.mark.parametrize("default", [torch.float64, torch.float16])
def test_numbers_of_empty_trees_are_float32(default: torch.dtype) -> None:
    torch.set_default_dtype(default)
    assert tree.norm({"w": None}).dtype is tree.dot([], []).dtype is torch.float32
    empty = torch.zeros(2, 0, dtype=torch.float32)
    assert fo.clip_and_sum({"w": empty}, 1.0).norms.dtype is torch.float32


def test_python_numbers_keep_all_their_digits_beside_wide_params() -> None:
    params = {"w": torch.zeros(2, dtype=torch.float64)}
    ones = tree.map(torch.ones_like, params)
    polyak = fo.scale_by_polyak(max_learning_rate=10.0)
    updates, _ = polyak.update(ones, polyak.init(params), params, value=0.1)
    assert updates["w"][0].item() == pytest.approx(0.05, rel=1e-15)

    trace = fo.trace(0.0, dampening=0.1)
    _, state = trace.update(ones, trace.init(params))
    updates, _ = trace.update(ones, state)
    assert updates["w"][0].item() == pytest.approx(0.9, rel=1e-15)

    search = fo.scale_by_backtracking_linesearch(1)
    _, state = search.update(
        ones, search.init(params), params, value=0.1, grad=ones, value_fn=lambda p: 0.1
    )
    assert fo.get(state, "value").item() == 0.1


def test_a_decay_just_below_one_decays() -> None:
    schedule = fo.exponential_decay(1.0, 1, 1 - 1e-9, end_value=0.5)
    assert schedule(10**6).item() == pytest.approx(0.999000499833375)
