"""``benchmarks per-example``: clipped sums of per-example gradients beside Opacus, in time and in
memory.
"""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

import functorch_opt as fo
from benchmarks import record, report, timing
from benchmarks.memory import allocations

BOUND = 1.0
CHUNKS = 32, 64, 128


def conv() -> tuple[nn.Module, tuple[int, ...]]:
    """The net of Opacus's MNIST example: 26,010 parameters."""
    layers = (
        nn.Conv2d(1, 16, 8, 2, padding=3),
        nn.ReLU(),
        nn.MaxPool2d(2, 1),
        nn.Conv2d(16, 32, 4, 2),
        nn.ReLU(),
        nn.MaxPool2d(2, 1),
    )
    return nn.Sequential(
        *layers, nn.Flatten(), nn.Linear(512, 32), nn.ReLU(), nn.Linear(32, 10)
    ), (
        1,
        28,
        28,
    )


def mlp() -> tuple[nn.Module, tuple[int, ...]]:
    """A network of linear layers with 269,322 parameters."""
    return nn.Sequential(
        nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)
    ), (784,)


NETS: dict[str, Callable[[], tuple[nn.Module, tuple[int, ...]]]] = {
    "conv": conv,
    "mlp": mlp,
}
ROWS = tuple(NETS)

Make = Callable[[nn.Module, Tensor, Tensor], Callable[[], list[Tensor]]]


# ---- contenders: a call gives the sum of the clipped gradients -----------------------------------


def ours(chunk: int) -> Make:
    def make(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], list[Tensor]]:
        params = {name: p.detach() for name, p in model.named_parameters()}
        clipped = fo.clipped_grad_sum(
            lambda ps, x, y: F.cross_entropy(functional_call(model, ps, x), y),
            BOUND,
            chunk,
        )
        return lambda: [*clipped(params, x, y).sum.values()]

    return make


def opacus(mode: str) -> Make:
    def make(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], list[Tensor]]:
        from opacus.grad_sample import (
            GradSampleModule,
            GradSampleModuleFastGradientClipping,
        )
        from opacus.optimizers import DPOptimizer
        from opacus.optimizers.optimizer_fast_gradient_clipping import (
            DPOptimizerFastGradientClipping,
        )
        from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping

        given: dict[str, Any] = {
            "noise_multiplier": 0.0,
            "max_grad_norm": BOUND,
            "expected_batch_size": 1,
        }
        criterion: Callable[[Tensor, Tensor], Any] = nn.CrossEntropyLoss()
        if mode == "ghost":
            wrapped: nn.Module = GradSampleModuleFastGradientClipping(
                model, max_grad_norm=BOUND, use_ghost_clipping=True
            )
            optimizer = DPOptimizerFastGradientClipping(
                torch.optim.SGD(wrapped.parameters(), lr=0.0), **given
            )
            criterion = DPLossFastGradientClipping(wrapped, optimizer, criterion)
        else:
            wrapped = GradSampleModule(model, force_functorch=mode == "functorch")
            optimizer = DPOptimizer(
                torch.optim.SGD(wrapped.parameters(), lr=0.0), **given
            )

        def call() -> list[Tensor]:
            optimizer.zero_grad(set_to_none=True)
            criterion(wrapped(x), y).backward()
            optimizer.pre_step()  # clip and add up; with a noise of zero
            return [p.grad for p in wrapped.parameters()]

        return call

    return make


CONTENDERS: dict[str, Make] = {
    **{f"functorch_opt, chunks of {chunk}": ours(chunk) for chunk in CHUNKS},
    "Opacus, hooks": opacus("hooks"),
    "Opacus, functorch": opacus("functorch"),
    "Opacus, ghost": opacus("ghost"),
}


def batch_gradient(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], Any]:
    """The floor: one gradient of the summed loss, without gradients of single examples."""
    params = [*model.parameters()]
    return lambda: torch.autograd.grad(
        F.cross_entropy(model(x), y, reduction="sum"), params
    )


# ---- the run -------------------------------------------------------------------------------------


def run(args: Namespace) -> dict[str, Any]:
    torch.set_num_threads(args.threads[0])
    sizes = (8,) if args.quick else tuple(args.sizes)
    result = record.header("per-example") | {"threads": args.threads, "rows": []}
    for row in args.rows or ROWS:
        for size in sizes:
            result["rows"].append(_measure(row, size, 2 if args.quick else args.rounds))
    names = [*CONTENDERS, "floor"]
    for what, unit, show in (("ms", "milliseconds", "{:.1f}"), ("peak", "MB", "{:.1f}")):
        title = {
            "ms": "Time of the clipped sum",
            "peak": "Most allocated at a time beside the parameters",
        }[what] + f", {unit}"
        lines = [
            [
                row["title"],
                *(
                    show.format(row["results"][name][what])
                    if what in row["results"].get(name, {})
                    else "-"
                    for name in names
                ),
            ]
            for row in result["rows"]
        ]
        report.table(title, ["", *names], lines)
    for row in result["rows"]:
        for name, entry in row["results"].items():
            if "note" in entry:
                report.say(f"{row['title']}: {name}: {entry['note']}")
    record.write(args.out / "per_example.json", result)
    panels = [
        (
            f"{row['title']}: {label}",
            [
                (name, entry[key])
                for name, entry in row["results"].items()
                if key in entry
            ],
            None,
        )
        for row in result["rows"]
        for key, label in (("ms", "ms"), ("peak", "MB at a time"))
    ]
    report.bars(args.out / "per_example.png", panels, "less is better")
    return result


def on_device(
    device: str, size: int, timed: Callable[[Callable[[], Any], str, int], float]
) -> dict[str, Any]:
    """The milliseconds of the clipped sum of a conv net, by `timed`, which makes some calls; and
    how far it is from a loop over the examples."""
    torch.manual_seed(0)
    model, shape = conv()
    x, y = torch.randn(size, *shape).to(device), torch.randint(10, (size,)).to(device)
    model = model.to(device)
    clipped = ours(size)(model, x, y)

    def loop() -> list[Tensor]:
        total = [torch.zeros_like(p) for p in model.parameters()]
        for i in range(size):
            gs = batch_gradient(model, x[i : i + 1], y[i : i + 1])()
            norm = torch.linalg.vector_norm(torch.stack([g.norm() for g in gs]))
            torch._foreach_add_(total, [g * (BOUND / norm).clamp(max=1.0) for g in gs])
        return total

    off = [
        ((a - b).abs().max() / b.abs().max()).item()
        for a, b in zip(clipped(), loop(), strict=True)
    ]
    calls: dict[str, tuple[Callable[[], Any], int]] = {
        "functorch_opt": (clipped, 10),
        "loop": (loop, 1),
        "gradient of the batch": (batch_gradient(model, x, y), 10),
    }
    found: dict[str, Any] = {"examples": size, "difference": max(off)}
    for name, (call, n) in calls.items():
        timed(call, device, 1)
        found[name] = timed(call, device, n)
    if not max(off) <= 1e-3:
        found["note"] = f"DIFFERENT NUMBERS: {max(off):.3g} of the largest"
    return found


def show_on_device(found: dict[str, Any]) -> None:
    names = ("functorch_opt", "loop", "gradient of the batch")
    rows = [
        [name, f"{found[name]:.3f}", f"{found['loop'] / found[name]:.1f}"]
        for name in names
    ]
    header = ["", "ms", "times as fast as a loop"]
    title = f"Clipped gradients of {found['examples']} examples of a conv net"
    report.table(title, header, rows, numbers_to=3)


def _measure(row: str, size: int, rounds: int) -> dict[str, Any]:
    calls: dict[str, Callable[[], Any]] = {}
    results: dict[str, dict[str, Any]] = {}
    first: list[Tensor] = []
    for name, make in CONTENDERS.items():
        torch.manual_seed(0)
        model, shape = NETS[row]()
        try:
            call = make(model, torch.randn(size, *shape), torch.randint(10, (size,)))
            found = [g.detach().clone() for g in call()]
            first = first or found
            if not all(
                torch.allclose(a, b, rtol=1e-3, atol=1e-4 * math.sqrt(size))
                for a, b in zip(found, first, strict=True)
            ):
                results[name] = {"note": "DIFFERENT NUMBERS"}
                continue
            results[name] = {"peak": allocations(call)[1] / 1e6}
            calls[name] = call
        except ModuleNotFoundError as error:
            results[name] = {"note": f"not installed ({error.name})"}
        except Exception as error:
            results[name] = {
                "note": f"failed: {type(error).__name__}: {str(error).splitlines()[0][:90]}"
            }
    torch.manual_seed(0)
    model, shape = NETS[row]()
    calls["floor"] = batch_gradient(
        model, torch.randn(size, *shape), torch.randint(10, (size,))
    )
    results["floor"] = {"peak": allocations(calls["floor"])[1] / 1e6}
    title = f"{row}, batch {size}"
    for name, entry in timing.summary(
        timing.in_turns(calls, rounds, title), next(iter(calls), None)
    ).items():
        results[name] |= entry
    return {"row": row, "title": title, "size": size, "results": results}
