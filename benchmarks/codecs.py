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
from functorch_opt.codecs.codec import CODECS

CODES = ("float32", *CODECS)
SEEDS, STEPS, BATCH, WINDOW = 5, 400, 64, 20
OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "AdamW": lambda params, **given: fo.optim.AdamW(params, lr=3e-3, **given),
    "Lion": lambda params, **given: fo.optim.Lion(params, lr=3e-4, **given),
    "Muon": lambda params, **given: fo.optim.Optimizer(
        params, fo.muon, lr=0.02, adam_learning_rate=3e-3, **given
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
        usual, stored_usually = None, 0.0
        for code in CODES:
            losses = [
                trained(OPTIMIZERS[name], code, seed, steps) for seed in range(seeds)
            ]
            eager, stored = step_of(OPTIMIZERS[name], code, size, compile=False)
            compiled, _ = step_of(OPTIMIZERS[name], code, size, compile=True)
            usual = usual or (eager, compiled)
            stored_usually = stored_usually or stored
            loss = torch.tensor(losses, dtype=torch.float64)
            expected = round(stored_usually / 4) * bytes_of(code)
            row = {"row": name, "state": code, "bytes": stored, "predicted": expected}
            row |= {"time": eager / usual[0], "compiled": compiled / usual[1]}
            rows.append({**row, "loss": loss.mean().item(), "spread": loss.std().item()})
    result = record.header("codecs") | {"rows": rows}
    shown = [
        (
            row["row"],
            row["state"],
            f"{row['predicted']:.2f}",
            f"{row['bytes']:.2f}",
            f"{row['time']:.1f}",
            f"{row['compiled']:.1f}",
            f"{row['loss']:.4f} ± {row['spread']:.4f}",
        )
        for row in rows
    ]
    head = ("", "state", "predicted", "bytes", "eager step", "compiled step", "loss")
    report.table("slots in fewer bytes", head, shown, numbers_from=2)
    record.write(args.out / "codecs.json", result)
    return result


def bytes_of(code: str) -> float:
    """The bytes of a slot for each element of a large tensor."""
    if code not in CODECS:
        return 4
    codec = CODECS[code]
    of_scales = codec.of_scales.itemsize / codec.block if codec.block else 0
    return codec.dtype.itemsize / codec.packed + of_scales


def trained(make: Callable[..., Any], code: str, seed: int, steps: int) -> float:
    """The mean training loss of the last steps."""
    torch.manual_seed(seed)
    model, (x, y) = MLP(), digits().data
    opt = make(model.parameters(), state=code)
    losses: list[Tensor] = []
    for _ in range(steps):
        batch = torch.randint(len(x), (BATCH,))
        opt.zero_grad()
        loss = nn.functional.cross_entropy(model(x[batch]), y[batch])
        loss.backward()
        opt.step()
        losses.append(loss.detach())
    return torch.stack(losses[-WINDOW:]).mean().item()


def step_of(
    make: Callable[..., Any], code: str, size: int, compile: bool
) -> tuple[float, float]:
    """The CPU seconds of a step on one matrix, and the bytes of its slots for each element."""
    p = nn.Parameter(torch.randn(size, size))
    p.grad = torch.randn_like(p)
    opt = make([p], state=code, compile=compile)
    opt.step()
    seconds = []
    for _ in range(20):
        start = time.thread_time()  # others on this machine do not count
        opt.step()
        seconds.append(time.thread_time() - start)
    stored = sum(x.nbytes for x in opt.state[p].values() if x.dim())
    return min(seconds), stored / p.numel()
