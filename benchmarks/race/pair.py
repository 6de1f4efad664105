"""One optimizer on one task: the settings in one vmapped run, then the best one with other seeds."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

import functorch_opt as fo
from benchmarks.race.entries import Entry
from benchmarks.race.tasks import Data, Task
from functorch_opt import tree


@dataclass(frozen=True)
class Budget:
    """What every optimizer gets, on every task."""

    rates: tuple[float, ...]
    choosing_seeds: int
    """Seeds with which the setting is chosen: 0, 1, ..."""
    reported_seeds: int
    """Further seeds, with which the chosen setting is trained again: 100, 101, ..."""
    timed_steps: int
    most_steps: int | None = None
    """At most so many steps, for a rehearsal."""

    def described(self) -> dict[str, Any]:
        return asdict(self) | {"rates": [round(rate, 10) for rate in self.rates]}


def half_decades(low: int, high: int) -> tuple[float, ...]:
    """Two learning rates for each factor of ten, both ends among them."""
    return tuple(10 ** (i / 2) for i in range(2 * low, 2 * high + 1))


FULL = Budget(half_decades(-5, 1), choosing_seeds=2, reported_seeds=8, timed_steps=100)
QUICK = Budget((1e-3, 1e-2, 1e-1, 1.0), 1, 2, timed_steps=4, most_steps=12)
FIRST_REPORTED = 100


def race(task: Task, entry: Entry, budget: Budget) -> dict[str, Any]:
    """Everything that is reported of this pair, before any comparison."""
    began = time.process_time()
    task = task.shortened(budget.most_steps or task.steps)
    axes = {"learning_rate": list(budget.rates)}
    axes |= {name: list(values) for name, values in entry.other.items()}
    chosen = _sweep(task, entry, range(budget.choosing_seeds), axes)
    found: dict[str, Any] = {"settings": _settings(chosen)}
    found["validation"] = [_finite(loss) for loss in chosen.means.tolist()]
    found["start"] = _at_the_start(task, budget)
    if not chosen.means.isfinite().any():
        return found | {"best": None, "cpu": time.process_time() - began}
    best = found["settings"][int(chosen.means.argmin())]
    last = FIRST_REPORTED + budget.reported_seeds
    again = _sweep(
        task, entry, range(FIRST_REPORTED, last), {k: [v] for k, v in best.items()}
    )
    losses = held_out(task, again.params)
    losses = torch.where(again.diverged, math.inf, losses)
    found["best"] = best
    found["held_out"] = [_finite(loss) for loss in losses.tolist()]
    found["curve"] = [_finite(x) for x in smoothed(again.curves).tolist()]
    tx = entry.make(**best)
    found["step_seconds"] = step_seconds(task, tx, budget.timed_steps)
    found["bytes_per_parameter"] = state_bytes(task.model(), tx)
    return found | {"cpu": time.process_time() - began}


def _sweep(
    task: Task, entry: Entry, seeds: range, axes: dict[str, list[float]]
) -> fo.Sweep:
    return fo.sweep(
        task.model,
        task.train,
        entry.make,
        loss=task.loss,
        steps=task.steps,
        batch_size=task.batch,
        seed=seeds,
        validation=task.validation,
        compile=False,
        **axes,
    )


def _settings(of: fo.Sweep) -> list[dict[str, float]]:
    """The hyperparameters of each setting, in the order of `means`."""
    names = [name for name in of.settings if name != "seed"]
    columns = [of.settings[name][:: of.seeds].tolist() for name in names]
    return [
        dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)
    ]


def _finite(x: float) -> float | None:
    """For JSON, which has no infinity."""
    return float(f"{x:.6g}") if math.isfinite(x) else None


# ---- losses --------------------------------------------------------------------------------------


def held_out(task: Task, params: dict[str, Tensor]) -> Tensor:
    """The loss of every run on the last part of the data."""
    return _losses(task, params, task.test)


def _losses(task: Task, params: dict[str, Tensor], data: Data) -> Tensor:
    model, (x, y) = task.model(), data

    def loss(ps: dict[str, Tensor]) -> Tensor:
        return task.loss(functional_call(model, ps, (x,)), y)

    with torch.no_grad():
        return vmap(loss)(params)


def _at_the_start(task: Task, budget: Budget) -> float:
    """The validation loss before training, a mean over seeds."""
    losses = []
    for seed in range(budget.choosing_seeds):
        torch.manual_seed(seed)
        x, y = task.validation
        with torch.no_grad():
            losses.append(float(task.loss(task.model()(x), y)))
    return sum(losses) / len(losses)


def smoothed(curves: Tensor) -> Tensor:
    """The mean over seeds and the last twentieth of the steps; shorter at the beginning. [steps]"""
    mean, steps = curves.mean(0), curves.shape[1]
    window = max(1, steps // 20)
    return torch.stack(
        [mean[max(0, i + 1 - window) : i + 1].mean() for i in range(steps)]
    )


# ---- time and memory -----------------------------------------------------------------------------


def step_seconds(task: Task, tx: fo.GradientTransformation, steps: int) -> float:
    """A step of one model in an ordinary loop: loss, backward and the optimizer's step, a mean.

    The first ten steps, in which plans are made, are not counted.
    """
    torch.manual_seed(0)
    model = task.model()
    opt = fo.optim.Optimizer(model.parameters(), tx)
    x, y = (part[: task.batch] for part in task.train)

    def closure() -> Tensor:
        opt.zero_grad()
        loss = task.loss(model(x), y)
        loss.backward()
        return loss

    return _seconds(lambda: opt.step(closure), min(10, steps), steps)


def _seconds(step: Callable[[], Any], before: int, steps: int) -> float:
    for _ in range(before):
        step()
    began = time.perf_counter()
    for _ in range(steps):
        step()
    return (time.perf_counter() - began) / steps


def state_bytes(model: nn.Module, tx: fo.GradientTransformation) -> float:
    """Bytes of the state a parameter, without single numbers such as the count of steps."""
    params = {name: p.detach() for name, p in model.named_parameters()}
    slots = [x for x in tree.leaves(tx.init(params)) if x.dim()]
    return sum(x.nbytes for x in slots) / sum(p.numel() for p in params.values())
