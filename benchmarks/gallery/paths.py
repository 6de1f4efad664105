"""Each optimizer on two functions of two numbers, all learning rates in one vmapped run.

The protocol is the same for all: `STEPS` steps from one start, with each learning rate of `RATES`.
The one that is drawn has the lowest mean of the function over all steps, so that jumps count. An
optimizer that is meant to be used without a learning rate runs once, with its defaults.

An optimizer of matrices gets a matrix of 2 x 2, whose diagonal is the two numbers. The squares of the
other two are added to the function.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import grad_and_value, vmap

import functorch_opt as fo
from benchmarks.gallery.entries import Entry

STEPS = 200
RATES = torch.logspace(-4, 1, 61, dtype=torch.float64)
EXAMPLES = 4
OF_EXAMPLES = {"dpsgd", "dp_adam"}


@dataclass(frozen=True)
class Land:
    """A function of two numbers and of an example, [2], which is noise."""

    name: str
    title: str
    function: Callable[[Tensor, Tensor], Tensor]
    start: tuple[float, float]
    goal: tuple[float, float]
    window: tuple[float, float, float, float]
    """x from, x to, y from, y to."""
    noise: float

    def examples(self) -> Tensor:
        """The same for every optimizer, [steps, examples, 2]."""
        generator = torch.Generator().manual_seed(0)
        draws = torch.randn(STEPS, EXAMPLES, 2, generator=generator, dtype=torch.float64)
        return self.noise * draws


def rosenbrock(p: Tensor, example: Tensor) -> Tensor:
    return (1 - p[0]) ** 2 + 100 * (p[1] - p[0] ** 2) ** 2 + 0 * example.sum()


def valley(p: Tensor, example: Tensor) -> Tensor:
    """A bowl, 50 times as steep along one direction as along the other, and turned by 30 degrees."""
    x, y = p - example
    cos, sin = math.cos(math.pi / 6), math.sin(math.pi / 6)
    along, across = cos * x + sin * y, cos * y - sin * x
    return (0.1 * along**2 + 5 * across**2) / 2


LANDS = (
    Land(
        "rosenbrock",
        "Rosenbrock's function",
        rosenbrock,
        start=(-1.2, 1.0),
        goal=(1.0, 1.0),
        window=(-1.7, 1.7, -0.7, 1.9),
        noise=0.0,
    ),
    Land(
        "valley",
        "a narrow valley, noisy gradients",
        valley,
        start=(-2.0, 1.2),
        goal=(0.0, 0.0),
        window=(-2.6, 1.6, -1.7, 1.7),
        noise=0.3,
    ),
)


@dataclass(frozen=True)
class Path:
    points: Tensor
    """[steps + 1, 2]"""
    learning_rate: float | None
    value: float
    """Of the function at the end: the mean over the last tenth of the steps."""


def best_path(entry: Entry, land: Land) -> Path:
    """The path with the best learning rate."""
    rates = [None] if entry.free else RATES
    points = all_paths(entry, land)  # [steps + 1, rates, 2]
    nothing = torch.zeros(2, dtype=torch.float64)
    values = vmap(vmap(lambda p: land.function(p, nothing)))(points)
    best = int(values.mean(0).nan_to_num(math.inf, math.inf).argmin())
    end = float(values[-STEPS // 10 :, best].mean())
    rate = rates[best]
    return Path(points[:, best], None if rate is None else float(rate), end)


def all_paths(entry: Entry, land: Land) -> Tensor:
    """Where each learning rate leads, [steps + 1, rates, 2]."""
    factory = getattr(fo, entry.name)

    def build(rate: Tensor) -> fo.GradientTransformation:
        given = {} if entry.free else {"learning_rate": rate}
        return factory(**given, **entry.settings)

    def one(params: dict[str, Tensor], example: Tensor) -> Tensor:
        w = params["w"]
        if not entry.matrices:
            return land.function(w, example)
        apart = w[0, 1] ** 2 + w[1, 0] ** 2
        return land.function(w.diagonal(), example) + apart

    def step(
        rate: Tensor, params: dict, state: Any, examples: Tensor
    ) -> tuple[dict, Any]:
        def loss(params: dict[str, Tensor]) -> Tensor:
            return vmap(one, (None, 0))(params, examples).mean()

        tx = build(rate)
        grads, value = grad_and_value(loss)(params)
        if entry.name in OF_EXAMPLES:
            grads = vmap(torch.func.grad(one), (None, 0))(params, examples)
        known = {"value": value, "grad": grads, "value_fn": loss, "obj_fn": loss}
        extra = {name: known[name] for name in tx.extra_args}
        updates, state = tx.update(grads, state, params, **extra)
        return fo.apply_updates(params, updates), state

    many = 1 if entry.free else len(RATES)
    rates = RATES[:many]
    first = torch.tensor(land.start, dtype=torch.float64)
    if entry.matrices:
        first = torch.tensor([[land.start[0], 0.5], [-0.5, land.start[1]]]).double()
    params = {"w": first.expand(many, *first.shape).clone()}
    state = vmap(lambda rate, params: build(rate).init(params))(rates, params)

    def evaluated(rate: Tensor, state: Any, params: dict[str, Tensor]) -> dict:
        """Where to evaluate: the average, if the optimizer is meant to be used with it."""
        if entry.family != "schedule-free":
            return params
        return fo.eval_params(build(rate), state, params)

    step_all = vmap(step, (0, 0, 0, None), randomness="different")
    shown = [params["w"]]
    for examples in land.examples():
        params, state = step_all(rates, params, state, examples)
        shown.append(vmap(evaluated)(rates, state, params)["w"])
    points = torch.stack(shown)
    return points.diagonal(dim1=-2, dim2=-1) if entry.matrices else points
