"""``benchmarks codecs``: bytes, time and loss with the slots of optimizers stored in fewer bytes.

An MLP is trained on scikit-learn's digits, from the same seeds with each way to store slots. Its
matrices are stored in a code, and its biases are not.
"""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import functorch_opt as fo
from benchmarks import record, report
from benchmarks.fewer_steps import MLP, digits

CODES = ("float32", "bfloat16", "8bit")
SEEDS, STEPS, BATCH, WINDOW = 5, 400, 64, 20
OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "AdamW": lambda params, code: fo.optim.AdamW(params, lr=3e-3, state=code),
    "Lion": lambda params, code: fo.optim.Lion(params, lr=3e-4, state=code),
    "Muon": lambda params, code: fo.optim.Optimizer(
        params, fo.muon, lr=0.02, adam_learning_rate=3e-3, state=code
    ),
}
ROWS = [*OPTIMIZERS]
SIZE = 1024
"""Rows and columns of the matrix whose step is timed."""


def run(args: Namespace) -> dict[str, Any]:
    """Train, measure, and write the table."""
    torch.set_num_threads(args.threads[0])
    seeds, steps, size = (2, 3, 64) if args.quick else (SEEDS, STEPS, SIZE)
    rows = []
    for name in args.rows or ROWS:
        usual = None
        for code in CODES:
            losses = [
                trained(OPTIMIZERS[name], code, seed, steps) for seed in range(seeds)
            ]
            seconds, stored = step_of(OPTIMIZERS[name], code, size)
            usual = usual or seconds
            loss = torch.tensor(losses, dtype=torch.float64)
            row = {"row": name, "state": code, "bytes": stored, "time": seconds / usual}
            rows.append({**row, "loss": loss.mean().item(), "spread": loss.std().item()})
    result = record.header("codecs") | {"rows": rows}
    shown = [
        (
            row["row"],
            row["state"],
            f"{row['bytes']:.2f}",
            f"{row['time']:.1f}",
            f"{row['loss']:.4f} ± {row['spread']:.4f}",
        )
        for row in rows
    ]
    head = ("", "state", "bytes a parameter", "time of a step", "loss")
    report.table("slots in fewer bytes", head, shown, numbers_from=2)
    record.write(args.out / "codecs.json", result)
    return result


def trained(make: Callable[..., Any], code: str, seed: int, steps: int) -> float:
    """The mean training loss of the last steps."""
    torch.manual_seed(seed)
    model, (x, y) = MLP(), digits().data
    opt = make(model.parameters(), code)
    losses: list[Tensor] = []
    for _ in range(steps):
        batch = torch.randint(len(x), (BATCH,))
        opt.zero_grad()
        loss = nn.functional.cross_entropy(model(x[batch]), y[batch])
        loss.backward()
        opt.step()
        losses.append(loss.detach())
    return torch.stack(losses[-WINDOW:]).mean().item()


def step_of(make: Callable[..., Any], code: str, size: int) -> tuple[float, float]:
    """The seconds of an eager step on one matrix, and the bytes of its slots for each element."""
    p = nn.Parameter(torch.randn(size, size))
    p.grad = torch.randn_like(p)
    opt = make([p], code)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        opt.step()
        seconds.append(time.perf_counter() - start)
    stored = sum(x.nbytes for x in opt.state[p].values() if x.dim())
    return min(seconds), stored / p.numel()
