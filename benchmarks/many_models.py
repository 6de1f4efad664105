"""``benchmarks many-models``: a training step of many small models.

It is vmapped, or a loop with torch.optim; the arithmetic alone is measured too.
"""

from __future__ import annotations

import copy
import time
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap
from torch.nn.functional import cross_entropy

import functorch_opt as fo
from benchmarks import record, report
from benchmarks.timing import in_turns, summary

ROWS = {"64": 64, "512": 512}
TARGET = 10.0
PIXELS, HIDDEN, CLASSES, BATCH = 64, 32, 10, 64
OURS, COMPILED, EAGER, LOOP, GRADIENTS = (
    "functorch_opt, compiled_step of models",
    "functorch_opt vmapped, compiled",
    "functorch_opt vmapped",
    "loop, torch fused Adam",
    "the gradients alone, compiled",
)

Params = dict[str, Tensor]
Timed = Callable[[Callable[[], Any], str, int], float]


def make_model() -> nn.Module:
    """The MLP of the demo's digits: 2,410 parameters."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(PIXELS, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, CLASSES))


class Vmapped:
    """All models in one step, each with its learning rate; `how` it is run is one of the names."""

    def __init__(self, lrs: Tensor, x: Tensor, y: Tensor, how: str) -> None:
        model = make_model().to(x.device)

        def loss_fn(params: Params) -> Tensor:
            return cross_entropy(functional_call(model, params, (x,)), y)

        make = fo.inject_hyperparams(fo.adam)
        tx = make(learning_rate=0.0)

        def one(params: Params, state: Any) -> tuple[Params, Any]:
            grads, _ = grad_and_value(loss_fn)(params)
            updates, state = tx.update(grads, state, params)
            return fo.apply_updates(params, updates), state

        self.params = {
            name: p.detach().expand(len(lrs), *p.shape).clone()
            for name, p in model.named_parameters()
        }

        def init(params: Params, lr: Tensor) -> Any:
            return make(learning_rate=lr).init(params)

        self.state = vmap(init)(self.params, lrs)
        self.gradients = vmap(grad_and_value(loss_fn))
        if how in (OURS, GRADIENTS):
            self.gradients = torch.compile(self.gradients, fullgraph=True)
        self.in_place = fo.compiled_step(tx, models=True)
        every = vmap(one)
        self.update = torch.compile(every, fullgraph=True) if how == COMPILED else every
        self.step = {OURS: self.apart, GRADIENTS: self.differentiate}.get(how, self.whole)

    def whole(self) -> None:
        self.params, self.state = self.update(self.params, self.state)

    def apart(self) -> None:
        grads, _ = self.gradients(self.params)
        self.params, self.state = self.in_place(self.params, grads, self.state)

    def differentiate(self) -> None:
        self.gradients(self.params)


class Loop:
    """One model after another, as one would write it with torch.optim."""

    def __init__(self, lrs: Tensor, x: Tensor, y: Tensor) -> None:
        self.models = [copy.deepcopy(make_model()).to(x.device) for _ in lrs]
        self.optimizers = [
            torch.optim.Adam(m.parameters(), lr=lr, fused=True)
            for m, lr in zip(self.models, lrs.tolist(), strict=True)
        ]
        self.x, self.y = x, y

    def step(self) -> None:
        for model, optimizer in zip(self.models, self.optimizers, strict=True):
            loss = cross_entropy(model(self.x), self.y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    @property
    def params(self) -> Params:
        return {
            name: torch.stack([m.get_parameter(name).detach() for m in self.models])
            for name, _ in self.models[0].named_parameters()
        }


def arithmetic(n: int, x: Tensor) -> tuple[Callable[[], None], int]:
    """The matrix products of forward and backward, batched over the models, and nothing else; and
    how many operations they are.
    """
    w1, w2 = torch.randn(n, PIXELS, HIDDEN), torch.randn(n, HIDDEN, CLASSES)
    hidden, d_hidden, d_out = (
        torch.randn(n, BATCH, HIDDEN),
        torch.randn(n, BATCH, HIDDEN),
        torch.randn(n, BATCH, CLASSES),
    )
    xs = x.expand(n, BATCH, PIXELS)

    def run() -> None:
        torch.bmm(xs, w1)
        torch.bmm(hidden, w2)
        torch.bmm(d_out.mT, hidden)
        torch.bmm(d_out, w2.mT)
        torch.bmm(d_hidden.mT, xs)

    return run, 2 * n * BATCH * HIDDEN * (2 * PIXELS + 3 * CLASSES)


def examples(n: int, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """`n` learning rates, and the examples that all models are trained on."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(BATCH, PIXELS, generator=generator)
    y = torch.randint(CLASSES, (BATCH,), generator=generator)
    lrs = torch.logspace(-5, -2, n, dtype=torch.float64)
    return lrs.to(device), x.to(device), y.to(device)


def on_device(device: str, n: int, timed: Timed) -> dict[str, Any]:
    """The milliseconds of a training step of `n` models, by `timed`, which makes some calls."""
    lrs, x, y = examples(n, device)
    steps = {LOOP: Loop(lrs, x, y).step}
    steps |= {name: Vmapped(lrs, x, y, name).step for name in (OURS, COMPILED, EAGER)}
    found: dict[str, Any] = {"models": n}
    for name, step in steps.items():
        timed(step, device, 3)
        found[name] = timed(step, device, 3 if name == LOOP else 20)
    return found


def show_on_device(found: dict[str, Any]) -> None:
    rows = [
        [name, f"{ms:.3f}", f"{found[LOOP] / ms:.1f}"]
        for name, ms in found.items()
        if name != "models"
    ]
    header = ["", "ms a step", "times as fast"]
    report.table(f"{found['models']} models", header, rows, numbers_to=3)


def case(n: int, rounds: int) -> dict[str, Any]:
    lrs, x, y = examples(n)
    loop = Loop(lrs, x, y)
    contenders = {
        name: Vmapped(lrs, x, y, name) for name in (OURS, COMPILED, EAGER, GRADIENTS)
    }
    begin = time.perf_counter()
    contenders[OURS].step()
    first = time.perf_counter() - begin
    for _ in range(2):
        contenders[OURS].step()
    others = [loop, *[contenders[name] for name in (COMPILED, EAGER, GRADIENTS)]]
    for contender in others:
        for _ in range(3):
            contender.step()
    of_loop = loop.params
    run, operations = arithmetic(n, x)
    work = {name: contender.step for name, contender in contenders.items()}
    work |= {LOOP: loop.step, "floor": run}
    results: dict[str, dict[str, Any]] = {}
    for name, contender in contenders.items():
        if name == GRADIENTS:
            continue
        difference = max(
            (contender.params[key] - p).abs().max().item() for key, p in of_loop.items()
        )
        results[name] = {
            "difference": difference,
            **({} if difference < 1e-3 else {"note": "DIFFERENT NUMBERS"}),
        }
    for name, entry in summary(in_turns(work, rounds, f"{n} models"), LOOP).items():
        results.setdefault(name, {}).update(entry)
    title = f"{n} models of {sum(p[0].numel() for p in contenders[OURS].params.values()):,} parameters, {BATCH} examples, Adam"
    return {
        "row": str(n),
        "title": title,
        "models": n,
        "first_call_s": first,
        "operations": operations,
        "results": results,
    }


def show(row: dict[str, Any]) -> None:
    lines = []
    for name, entry in row["results"].items():
        faster = 1 / entry["ratio"]
        slowest, fastest = sorted(1 / ratio for ratio in entry["ratio_quartiles"])
        note = (
            f"to reach: {TARGET:.0f}; first call {row['first_call_s']:.1f} s"
            if name == OURS
            else entry.get("note", "")
        )
        note = (
            f"{row['operations'] / entry['ms'] / 1e6:.0f} GFLOP/s, the matrix products alone"
            if name == "floor"
            else note
        )
        lines.append(
            [
                name,
                f"{entry['ms']:.2f}",
                f"{faster:.1f}",
                f"{slowest:.1f}-{fastest:.1f}",
                f"{entry['over_floor']:.1f}",
                note,
            ]
        )
    threads = f"{torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}"
    header = ["", "ms a step", "times as fast", "quartiles", "over floor", ""]
    report.table(
        f"{row['title']}; {threads}; against {LOOP}", header, lines, numbers_to=5
    )


def run(args: Namespace) -> dict[str, Any]:
    torch.set_num_threads(args.threads[0])
    result = record.header("many-models") | {"threads": args.threads, "rows": []}
    for name in args.rows or ROWS:
        result["rows"].append(
            case(3 if args.quick else ROWS[name], 2 if args.quick else args.rounds)
        )
        show(result["rows"][-1])
    record.write(args.out / "many_models.json", result)
    panels = [
        (
            row["title"],
            [
                (name, entry["over_floor"])
                for name, entry in row["results"].items()
                if name != "floor"
            ],
            1.0,
        )
        for row in result["rows"]
    ]
    report.bars(
        args.out / "many_models.png",
        panels,
        "step time, in multiples of the matrix products alone (the line at 1)",
        log=True,
    )
    return result
