"""``benchmarks through``: the hypergradient of k steps of Adam, beside torchopt: the same number,
time and memory; and with checkpoints.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import functorch_opt as fo
from benchmarks import record, report
from benchmarks.memory import allocations
from benchmarks.timing import in_turns, summary

ROWS = {"small": (32, 10), "large": (256, 10), "long": (64, 50)}
"""Width of the network and number of steps."""


class Problem:
    """A network of three layers; the derivative of its loss after some steps of Adam with respect
    to the logarithm of the learning rate.

    All contenders take the inner gradient with ``torch.autograd.grad(..., create_graph=True)``,
    which torchopt needs.
    """

    def __init__(self, width: int, steps: int) -> None:
        generator = torch.Generator().manual_seed(0)
        sizes = [16, width, width, 1]
        self.steps = steps
        self.x = torch.randn(128, 16, generator=generator)
        self.y = torch.sin(self.x.sum(1, keepdim=True))
        self.start = [
            torch.randn(m, n, generator=generator) / m**0.5 for m, n in pairwise(sizes)
        ]
        self.log_rate = torch.tensor(-4.0, requires_grad=True)

    def loss(self, ps: list[Tensor]) -> Tensor:
        x = self.x
        for w in ps[:-1]:
            x = torch.tanh(x @ w)
        return ((x @ ps[-1] - self.y) ** 2).mean()

    def gradient(self, ps: list[Tensor]) -> list[Tensor]:
        with torch.enable_grad():
            return list(torch.autograd.grad(self.loss(ps), ps, create_graph=True))

    def through(
        self, advance: Callable[[Any, Any], Any], init: Callable[[Any], Any]
    ) -> Tensor:
        ps = [p.clone().requires_grad_() for p in self.start]
        state = init([p.detach() for p in ps])
        for _ in range(self.steps):
            ps, state = advance(ps, state)
        return torch.autograd.grad(self.loss(ps), self.log_rate)[0]

    def ours(self, wrap: Callable[..., Any] = lambda f, *args: f(*args)) -> Tensor:
        tx = fo.adam(self.log_rate.exp())

        def step(ps: list[Tensor], state: Any) -> Any:
            updates, state = tx.update(self.gradient(ps), state, ps)
            return fo.apply_updates(ps, updates), state

        return self.through(lambda ps, state: wrap(step, ps, state), tx.init)

    def ours_recomputed(self) -> Tensor:
        return self.ours(lambda f, *args: checkpoint(f, *args, use_reentrant=False))

    def torchopt(self) -> Tensor:
        import torchopt

        # A learning rate that is a tensor is refused, so it multiplies what is left.
        tx = torchopt.adam(lr=1.0)

        def step(ps: list[Tensor], state: Any) -> Any:
            updates, state = tx.update(self.gradient(ps), state, params=ps, inplace=False)
            return [
                p + self.log_rate.exp() * u for p, u in zip(ps, updates, strict=True)
            ], state

        return self.through(step, tx.init)


def run(args: Namespace) -> dict[str, Any]:
    torch.set_num_threads(args.threads[0])
    result = record.header("through") | {"threads": args.threads, "rows": []}
    for name in args.rows or ROWS:
        width, steps = (8, 3) if args.quick else ROWS[name]
        problem = Problem(width, steps)
        work: dict[str, Callable[[], Any]] = {
            "torchopt": problem.torchopt,
            "functorch_opt": problem.ours,
            "functorch_opt, checkpoints": problem.ours_recomputed,
        }
        notes, numbers, peaks = {}, {}, {}
        for contender in list(work):
            try:
                numbers[contender] = work[contender]().item()
                peaks[contender] = allocations(work[contender])[1]
            except ModuleNotFoundError as error:
                notes[contender] = f"not installed ({error.name})"
                del work[contender]
        for contender, number in numbers.items():
            if abs(number - numbers["functorch_opt"]) > 1e-3 * abs(
                numbers["functorch_opt"]
            ):
                notes[contender] = (
                    f"DIFFERENT NUMBERS: {number:.6g}, not {numbers['functorch_opt']:.6g}"
                )
        title = f"derivative through {steps} steps of Adam, width {width}"
        found = summary(
            in_turns(work, 3 if args.quick else args.rounds, title), "torchopt"
        )
        for contender, note in notes.items():
            found.setdefault(contender, {})["note"] = note
        for contender, peak in peaks.items():
            found[contender] |= {"peak": peak, "derivative": numbers[contender]}
        result["rows"].append(
            {
                "row": name,
                "title": title,
                "width": width,
                "steps": steps,
                "results": found,
            }
        )
        rows = [
            [
                contender,
                f"{entry['ms']:.1f}",
                f"{entry.get('ratio', 1):.2f}",
                f"{entry['peak'] / 2**20:.2f}",
                f"{entry['derivative']:.6g}",
            ]
            for contender, entry in found.items()
            if "ms" in entry
        ]
        report.table(
            title,
            ["", "ms", "ratio to torchopt", "most at a time, MiB", "derivative"],
            rows,
            numbers_to=5,
        )
    record.write(args.out / "through.json", result)
    return result
