"""What a step becomes on a GPU, without one: launches, temporaries, waits, and the numbers.

All rows are looked at in one process, for it changes torch (`pretended.py`).
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from registry import ROWS

import functorch_opt as fo
from functorch_opt._core.chain import Chain
from functorch_opt._core.gate import Gate
from functorch_opt._core.groups import Groups
from functorch_opt._core.inject import Injected
from functorch_opt._core.rule import Leafwise
from functorch_opt._core.wrap import Wrap

HERE = Path(__file__).parent


def is_elementwise(tx: fo.GradientTransformation) -> bool:
    """Whether all of its rules are: others call libraries, which take no fake tensors."""
    if isinstance(tx, Leafwise):
        return tx.kind == "elementwise"
    if isinstance(tx, Injected):
        return is_elementwise(tx.factory(**tx.fixed, **tx.numbers))
    inside = stages_in(tx)
    return bool(inside) and all(map(is_elementwise, inside))


def stages_in(tx: Any) -> list[Any]:
    if isinstance(tx, Chain):
        return [*tx.stages.values()]
    if isinstance(tx, Groups):
        return [*tx.inside.values()]
    return [tx.inner] if isinstance(tx, (Wrap, Gate)) else []


OTHERWISE = {
    "sam": "its gates pass updates on, and look at them between two passes: they run eagerly",
    "asam": "as sam",
    "stored": "slots in a code go through rules some blocks at a time",
}
"""Rows whose steps run in another way on a device, and why."""
NAMES = [
    row.name
    for row in ROWS
    if not (row.apart or row.unrolls or row.keyed or row.name in OTHERWISE)
    and is_elementwise(row.build())
]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None,
        reason="this torch has no Triton: run `make next`",
    ),
]


PARTS = 32
"""Into how many parts a sum over a tensor is divided at most."""
LARGE = ["lamb", "lars", "cautious", "fromage", "stable_adamw", "scale_by_trust_ratio"]
"""Rows with sums over each tensor, one behind the other at most once."""
GATED = (
    "a gate works out its decision and its own counts, and chooses the next ones by it"
)
TOTALS = "a total of a function that a user may write is worked out for each tensor, then added up"
WEIGHTS = "a wrapper works out the weights of its averages, which are not compiled with the rest"
MEASURES = "each measure is a norm of all tensors: an operation for the norms, and three for theirs"
MANY_OPERATIONS = {
    "MultiSteps": GATED,
    "apply_if_finite": GATED,
    "conditionally_mask": GATED,
    "conditionally_transform": GATED,
    "dadapt_adamw": TOTALS,
    "dog": TOTALS,
    "dowg": TOTALS,
    "gate": GATED,
    "largest": TOTALS,
    "monitor": MEASURES,
    "outer_loop": GATED,
    "prodigy": TOTALS,
    "scale_by_dog": TOTALS,
    "scale_by_dowg": TOTALS,
    "schedule_free": WEIGHTS,
    "schedule_free_adamw": WEIGHTS,
    "schedule_free_prodigy": TOTALS,
    "schedule_free_radam": WEIGHTS,
    "schedule_free_sgd": WEIGHTS,
    "snapshot": MEASURES,
}
"""Rows that work out more than three things a step, each in a launch of its own, and why."""


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return looked_at(*NAMES)


@pytest.fixture(scope="module")
def large() -> dict[str, Any]:
    """What is made for tensors of the size that a GPU is worth; the numbers are not compared."""
    return looked_at("--large", *LARGE)


@pytest.fixture(scope="module")
def scaled() -> dict[str, Any]:
    """Stateful optimizers, by themselves and beside a `GradScaler`."""
    return looked_at(script="scaled.py")


def looked_at(*arguments: str, script: str = "rows.py") -> dict[str, Any]:
    path = os.pathsep.join([str(HERE.parent.parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(HERE / script), *arguments]
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    assert lines, done.stderr[-2000:]
    return {entry["name"]: entry for entry in map(json.loads, lines)}


@pytest.mark.parametrize("name", NAMES)
def test_its_kernels_give_the_numbers_of_its_rules(found: Any, name: str) -> None:
    entry = found[name]
    assert "error" not in entry, entry
    assert not entry["warnings"], entry["warnings"]


@pytest.mark.parametrize("name", NAMES)
def test_nobody_waits_for_the_device(found: Any, name: str) -> None:
    assert not found[name].get("waits")


@pytest.mark.parametrize(
    "name", ["sgd", "lion", "adamw", "nadam", "radam", "adopt", "adan"]
)
def test_an_elementwise_chain_is_a_launch_a_block(found: Any, name: str) -> None:
    """Four blocks, and one launch at most for what is worked out once a step."""
    entry = found[name]
    assert 4 <= entry["launches"] <= 5
    assert not entry["operations"]
    assert not entry["temporaries"]


@pytest.mark.parametrize("name", LARGE)
def test_a_chain_with_sums_is_three_launches_a_block(large: Any, name: str) -> None:
    """Sums in parts, sums of these, and what is written: nothing of a tensor's size is kept."""
    entry = large[name]
    assert "error" not in entry, entry
    assert not entry["warnings"], entry["warnings"]
    assert entry["launches"] <= 3 * 4 + 1
    assert entry["temporaries"], "sums over so many elements are made in parts"
    assert max(math.prod(shape) for shape in entry["temporaries"]) <= PARTS


@pytest.mark.parametrize(
    "name", ["chain", "clip_by_global_norm", "normalize", "partition", "zclip"]
)
def test_a_norm_of_all_tensors_is_one_operation_and_one_launch(
    found: Any, name: str
) -> None:
    """The launch works out counts, schedules and bias corrections too."""
    assert found[name]["operations"] == ["aten._foreach_norm.Scalar"]
    assert found[name]["launches"] == 5


def test_what_takes_many_operations_once_a_step_is_listed(found: Any) -> None:
    many = {name for name in NAMES if len(found[name].get("operations", ())) > 3}
    assert many == {*MANY_OPERATIONS}


@pytest.mark.parametrize("name", ["adamw", "chain"])
def test_beside_a_scaler_nobody_waits_and_nothing_is_launched_for_each_tensor(
    scaled: Any, name: str
) -> None:
    """The kernels are as many; what comes on top is worked out once a step."""
    alone, both = scaled[f"{name}, compiled"], scaled[f"{name}, compiled, scaled"]
    assert alone["launches"] == both["launches"] == 5
    assert both["operations"] - alone["operations"] <= 10
    for kind in ("compiled", "eager"):
        entry = scaled[f"{name}, {kind}, scaled"]
        assert entry["hands_over"] and not entry["waits"]


@pytest.mark.parametrize("name", ["adamw", "chain"])
def test_parameters_on_two_devices_are_a_launch_a_block_on_each(
    scaled: Any, name: str
) -> None:
    """Three and one tensors on each are three blocks of two. What is worked out once a step is
    worked out on the first, and brought to the other."""
    entry = scaled[f"{name}, two devices"]
    assert 6 <= entry["launches"] <= 7
    assert not entry["waits"]
