"""What a type checker tells a user: right calls pass, and each wrong call is reported at its line.

A user has the installed package and no configuration of ours, so the checkers run that way.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

RIGHT = """\
from typing import Any

import torch
from torch import Tensor

import functorch_opt as fo


@fo.transformation
def halved(factor: float = 0.5) -> fo.GradientTransformation:
    return fo.leafwise(lambda g, factor: g * factor, hyper={"factor": factor})


model = torch.nn.Linear(2, 1)
params = {name: p.detach().clone() for name, p in model.named_parameters()}
ones = fo.tree.map(torch.ones_like, params)

# Factories, chains and wrappers.
tx: fo.GradientTransformation = fo.chain(fo.clip(1.0), halved(0.25), fo.adam(1e-3))
tx = fo.adam(torch.tensor(1e-3), b1=0.9, nesterov=True)
tx = fo.sgd(fo.cosine_decay_schedule(0.1, 100), momentum=0.9)
tx = fo.sgd(lambda count: 0.1 / (1 + count))
tx = fo.masked(fo.lion(1e-4), lambda path, p: p.dim() > 1)
tx = fo.keep_master_weights(fo.adam(1e-3))
tx = fo.inject_hyperparams(fo.adamw)(learning_rate=1e-3)

# The pair, and what becomes of its results.
state = tx.init(params)
updates, state = tx.update(ones, state, params)
moved: dict[str, Tensor] = fo.apply_updates(params, updates)
saved: dict[str, Tensor] = fo.state_dict(state)
step = fo.compiled_step(tx, donate=False)

# Schedules, trees and random numbers.
value: Tensor = fo.cosine_decay_schedule(0.1, 100)(3)
joined = fo.join_schedules([fo.constant_schedule(0.1), lambda count: 0.1], [10])
value = joined(torch.tensor(3))
hyper: fo.ScalarOrSchedule = 0.5 * joined + 0.1
length: Tensor = fo.tree.norm(params) + fo.tree.zeros_like(params["weight"]).sum()
paths: list[str] = fo.tree.paths(params)
noise: Tensor = fo.random.normal(fo.random.key(0), (3,))

# Names of optax for annotations.
def rescaled(
    updates: fo.Updates,
    state: fo.EmptyState,
    params: fo.Params | None = None,
    *,
    value: Tensor,
    **extra_args: Any,
) -> tuple[fo.Updates, fo.EmptyState]:
    return {name: u * value for name, u in updates.items()}, fo.EmptyState()


init: fo.TransformInitFn = fo.init_empty_state
change: fo.TransformUpdateExtraArgsFn = rescaled
reads_value: fo.GradientTransformation = fo.GradientTransformationExtraArgs(init, change)
kept: fo.OptState = reads_value.init(params)
curve: fo.Schedule = lambda count: 0.1
chosen: fo.MaskOrFn = lambda path, p: p.dim() > 1
flipped = fo.stateless_with_tree_map(lambda u, p: -u)

# Stateful optimizers.
optimizer: torch.optim.Optimizer = fo.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.99))
optimizer = fo.optim.SGD([{"params": model.parameters(), "lr": 0.1}], lr=0.2, nesterov=False)
optimizer = fo.optim.Optimizer(model.named_parameters(), fo.lion, learning_rate=1e-4)
optimizer = fo.optim.Optimizer(model.parameters(), tx)
optimizer = fo.optim.Lion(model.parameters(), lr=1e-4, weight_decay=0.1, compile=False)
optimizer = fo.optim.Prodigy([{"params": model.parameters()}], betas=(0.9, 0.99))
prodigy: fo.optim.Prodigy = fo.optim.Prodigy(model.parameters())
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10)
"""

WRONG = """\
halved("0.5")
halved(factr=0.5)
halved(0.5).step()
fo.adam("0.001")
fo.adam(1e-3, beta1=0.9)
fo.adam()
fo.adamv(1e-3)
fo.sgd(lambda: 0.1)
fo.chain(fo.adam)
fo.chain([fo.clip(1.0), fo.adam(0.1)])
fo.masked(fo.adam, True)
fo.keep_master_weights(fo.adamw)
fo.inject_hyperparams(fo.adam(0.1))
tx.udpate(params, state)
as_pair: tuple[Any, Any] = fo.adam(1e-3)
fo.tree.norm(params).nope()
fo.tree.norm()
fo.tree.norms(params)
as_tensor: Tensor = fo.tree.paths(params)
fo.cosine_decay_schedule("0.1", 100)
fo.cosine_decay_schedule(0.1, steps=100)
as_text: str = fo.cosine_decay_schedule(0.1, 100)(3)
fo.compiled_step(fo.adam)
fo.compiled_step(fo.adam(0.1), donat=True)
fo.compiled_step(fo.adam(0.1))(params)
one, two, three = fo.compiled_step(fo.adam(0.1))(params, params, state)
fo.optim.AdamW(model.parameters(), lr="0.1")
fo.optim.AdamW(model.parameters(), learning_rate=0.1)
fo.optim.AdamW(model.parameters(), betas=0.9)
fo.optim.SGD(model.parameters(), 0.1, nestrov=True)
fo.optim.Lion(model.parameters(), learning_rate=0.1)
fo.optim.Lion(model.parameters())
fo.optim.Lion(model.parameters(), lr="0.1")
fo.optim.Lino(model.parameters(), lr=0.1)
fo.optim.Optimizer(model.parameters())
fo.optim.Optimizer(model.parameters(), "adam")
fo.random.normal(3, (2,))
fo.get(state, 3)
"""

CHECKERS = ("mypy", "pyright")


@functools.cache
def _reports(checker: str, cache: Path) -> dict[int, str]:
    """``{line: message}`` of the errors that a checker sees in the script of a user."""
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "script.py"
        script.write_text(RIGHT + WRONG)
        command = {
            "mypy": ["--config-file=", "--cache-dir", str(cache), "--no-error-summary"],
            "pyright": ["--pythonpath", sys.executable, "--outputjson"],
        }[checker]
        done = subprocess.run(
            [sys.executable, "-m", checker, *command, str(script)],
            cwd=folder,
            env={
                **os.environ,
                "PYTHONPATH": str(ROOT),
                "PYRIGHT_PYTHON_IGNORE_WARNINGS": "1",
            },
            capture_output=True,
            text=True,
        )
    if checker == "pyright":
        if not done.stdout.startswith("{"):
            pytest.skip(f"pyright does not start; it needs node: {done.stderr[-500:]}")
        return {
            report["range"]["start"]["line"] + 1: report["message"]
            for report in json.loads(done.stdout)["generalDiagnostics"]
            if report["severity"] == "error"
        }
    assert done.returncode in (0, 1), done.stderr
    found = re.findall(
        r"^script\.py:(\d+): error: (.*)$", done.stdout, flags=re.MULTILINE
    )
    return {int(line): message for line, message in found}


@pytest.fixture
def reports(checker: str, pytestconfig: pytest.Config) -> dict[int, str]:
    if importlib.util.find_spec(checker) is None:
        pytest.skip(f"{checker} is not installed")
    return _reports(checker, Path(pytestconfig.cache.mkdir("types")))


@pytest.mark.slow
@pytest.mark.parametrize("checker", CHECKERS)
def test_right_calls_pass(reports: dict[int, str]) -> None:
    lines = RIGHT.splitlines()
    assert not {lines[n - 1]: what for n, what in reports.items() if n <= len(lines)}


@pytest.mark.slow
@pytest.mark.parametrize("checker", CHECKERS)
def test_each_wrong_call_is_reported_at_its_line(reports: dict[int, str]) -> None:
    first = len(RIGHT.splitlines()) + 1
    unseen = [
        line for n, line in enumerate(WRONG.splitlines(), first) if n not in reports
    ]
    assert not unseen


def test_right_calls_are_right() -> None:
    """The script of the user runs, so what the checkers must accept is accepted by the library."""
    exec(RIGHT, {"__name__": "script"})


def test_the_package_says_that_it_is_typed() -> None:
    assert (ROOT / "functorch_opt" / "py.typed").exists()
