"""``benchmarks monitor``: what a monitor of norms and ratios costs of a training step.

In each round the optimizer's step is timed without a monitor, with one at every step and with one at
each 50th; and a whole training step, which is forward, backward and the step of AdamW. What a
monitor adds to the optimizer's step is given as a share of the training step. It is a median over
rounds.
"""

from __future__ import annotations

import statistics
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import functorch_opt as fo
from benchmarks import record, report
from benchmarks.fewer_steps import GPT
from benchmarks.timing import in_turns

NONE = "without a monitor"
WHOLE = "training step"
EVERY = {NONE: 0, "at every step": 1, "at each 50th step": 50}


def ratio(u: Tensor, p: Tensor) -> Tensor:
    return u.norm() / p.norm()


def chain(every: int) -> fo.GradientTransformation:
    """By layer, the norms of gradients, and how far each one moves."""
    before = fo.monitor(layers={"grad_norm": torch.norm}, every=every)
    after = fo.monitor(layers={"ratio": ratio}, every=every)
    return fo.chain(before, fo.adamw(1e-3, weight_decay=0.1), after)


def gpt(quick: bool) -> tuple[Callable[[], nn.Module], Tensor, Tensor]:
    """Two layers of width 256, 1.6 million parameters; 32 windows of 128 tokens."""
    width, context, batch = (16, 8, 2) if quick else (256, 128, 32)
    x, y = (torch.randint(65, (batch, context)) for _ in range(2))
    return partial(GPT, 65, width, context), x, y


def mlp(quick: bool) -> tuple[Callable[[], nn.Module], Tensor, Tensor]:
    """Three layers, 1.1 million parameters; a batch of 1024."""
    width, batch = (8, 4) if quick else (1024, 1024)

    def make() -> nn.Module:
        hidden = [nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
        return nn.Sequential(*hidden, nn.Linear(width, 10))

    return make, torch.randn(batch, 64), torch.randint(10, (batch,))


TASKS = {"gpt": ("GPT", gpt), "mlp": ("MLP", mlp)}
ROWS = tuple(TASKS)


def works(
    make: Callable[[], nn.Module], x: Tensor, y: Tensor, compile: bool
) -> dict[str, Callable[[], None]]:
    """A training step, and the optimizer's part of it with each of the chains."""
    found: dict[str, Callable[[], None]] = {}
    for label, every in EVERY.items():
        torch.manual_seed(0)
        model = make()
        optimizer = fo.optim.Optimizer(
            model.named_parameters(), chain(every), compile=compile
        )

        def step(model: nn.Module = model, optimizer: Any = optimizer) -> None:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x).flatten(0, -2), y.flatten()).backward()
            optimizer.step()

        step()
        found[label] = optimizer.step
        if every == 0:
            found[WHOLE] = step
    return found


def measure(name: str, quick: bool, rounds: int) -> dict[str, Any]:
    title, task = TASKS[name]
    torch.manual_seed(0)
    make, x, y = task(quick)
    results: dict[str, Any] = {}
    for compile in (False, True):
        times = in_turns(
            works(make, x, y, compile), 3 if quick else rounds, f"{title}, {compile=}"
        )
        kind = "compiled" if compile else "eager"
        whole = statistics.median(times[WHOLE])
        results[f"{kind}, {WHOLE}"] = {"ms": 1e3 * whole}
        for label in EVERY:
            pairs = zip(times[label], times[NONE], strict=True)
            more = statistics.median([a - b for a, b in pairs])
            entry = {"ms": 1e3 * statistics.median(times[label]), "share": more / whole}
            results[f"{kind}, {label}"] = entry
    return {"row": name, "title": title, "results": results}


def show(found: dict[str, Any]) -> None:
    rows = []
    for label, entry in found["results"].items():
        share = f"{entry['share']:.1%}" if "share" in entry else ""
        rows.append([label, f"{entry['ms']:.2f}", share])
    report.table(found["title"], ["", "ms", "more, of a training step"], rows)


def run(args: Namespace) -> dict[str, Any]:
    torch.set_num_threads(args.threads[0])
    result = record.header("monitor") | {"rows": []}
    for name in args.rows or ROWS:
        result["rows"].append(measure(name, args.quick, args.rounds))
        show(result["rows"][-1])
    record.write(args.out / "monitor.json", result)
    return result
