"""``benchmarks codecs``: bytes, time and loss with the slots of optimizers stored in fewer bytes.

An MLP is trained on scikit-learn's digits, and a GPT of two layers on characters, from the same
seeds with each way to store slots. Their large matrices are stored in a code, and all else is not.
Optimizers of torchao and bitsandbytes are trained beside ours, where they are installed.
"""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

import functorch_opt as fo
from benchmarks import record, report, slot_bytes
from benchmarks.fewer_steps import GPT, Task, digits, text
from functorch_opt.codecs.codec import CODECS

CODES = ("float32", *CODECS)
SEEDS, WINDOW = 3, 20
STEPS, BATCHES = {"digits": 400, "text": 120}, {"digits": 64, "text": 16}
"""Of the trainings, by the task."""
SIZE = 1024
"""Rows and columns of the matrix whose step is timed."""
WIDTH = 64
"""Of the GPT. So even its smallest matrices have the 4,096 elements from which codes begin."""
Make = Callable[..., Any]
OPTIMIZERS: dict[str, Make] = {
    "AdamW": lambda params, **given: fo.optim.AdamW(params, lr=3e-3, **given),
    "Lion": lambda params, **given: fo.optim.Lion(params, lr=3e-4, **given),
    "Muon": lambda params, **given: fo.optim.Optimizer(
        params, fo.muon, lr=0.02, adam_learning_rate=3e-3, **given
    ),
}
ROWS = [*OPTIMIZERS]

# ---- other libraries -----------------------------------------------------------------------------


def of_torchao(name: str, params: Any) -> Any:
    """A class of torchao, whose steps are compiled."""
    import torchao.optim

    return getattr(torchao.optim, name)(params, lr=3e-3, weight_decay=0.01)


def of_bitsandbytes(name: str, params: Any, **given: float) -> Any:
    """A class of bitsandbytes."""
    import bitsandbytes.optim

    return getattr(bitsandbytes.optim, name)(params, **given)


PEERS: dict[str, dict[str, Make]] = {
    "AdamW": {
        "torchao 8bit": partial(of_torchao, "AdamW8bit"),
        "torchao 4bit": partial(of_torchao, "AdamW4bit"),
        "torchao float8": partial(of_torchao, "AdamWFp8"),
        "bitsandbytes 8bit": partial(
            of_bitsandbytes, "AdamW8bit", lr=3e-3, weight_decay=0.01
        ),
    },
    "Lion": {
        "bitsandbytes 8bit": partial(
            of_bitsandbytes, "Lion8bit", lr=3e-4, weight_decay=1e-3
        ),
    },
}
"""Optimizers of the same rule and numbers in other libraries, by their library and code."""


def peers_of(name: str) -> dict[str, Make]:
    """Those whose library is installed."""
    found = {}
    for state, make in PEERS.get(name, {}).items():
        library = state.split()[0]
        if find_spec(library) is not None:
            found[state] = make
        else:
            report.say(f"{name}, {state}: {library} is not installed.")
    return found


# ---- the command ---------------------------------------------------------------------------------


def run(args: Namespace) -> dict[str, Any]:
    """Train, measure, and write the tables."""
    torch.set_num_threads(args.threads[0])
    result = record.header("codecs") | {"rows": []}
    seeds, size = (2, 64) if args.quick else (SEEDS, SIZE)
    tasks = {}
    for task, of in {"digits": digits(), "text": replace(text(), model=gpt())}.items():
        steps = 3 if args.quick else STEPS[task]
        tasks[task] = replace(of, steps=steps, batch=BATCHES[task])
    for name in args.rows or ROWS:
        result["rows"] += rows_of(name, tasks, seeds, size)
        record.write(args.out / "codecs.json", result)  # for those who stop it
    show(result["rows"])
    result["bytes"] = slot_bytes.measured(CODES, args.rows)
    slot_bytes.show(result["bytes"], CODES)
    record.write(args.out / "codecs.json", result)
    return result


def gpt() -> Callable[[], nn.Module]:
    """The text's GPT, of our width."""
    return partial(GPT, text().model().head.out_features, WIDTH)  # type: ignore[union-attr]


def rows_of(
    name: str, tasks: dict[str, Task], seeds: int, size: int
) -> list[dict[str, Any]]:
    """What was found of an optimizer, with each code and in each library."""
    ours = {code: partial(OPTIMIZERS[name], state=code) for code in CODES}
    peers = peers_of(name)
    rows = []
    for state, make in report.track([*ours.items(), *peers.items()], name):
        report.say(f"{name}, {state}")
        row = {"row": name, "state": state}
        row |= times(make, size, is_ours=state in ours)
        if state in ours:
            row["predicted"] = slot_bytes.predicted(OPTIMIZERS[name], state)
        for task, of in tasks.items():
            losses = [trained(make, of, seed) for seed in range(seeds)]
            found = torch.tensor(losses, dtype=torch.float64)
            row[task] = {"loss": found.mean().item(), "spread": found.std().item()}
        rows.append(row)
    return rows


def times(make: Make, size: int, is_ours: bool) -> dict[str, float]:
    """The seconds of a step, and the bytes of slots for each element."""
    if is_ours:
        eager, stored = step_of(partial(make, compile=False), size)
        compiled, _ = step_of(partial(make, compile=True), size)
        return {"bytes": stored, "eager": eager, "compiled": compiled}
    seconds, stored = step_of(make, size)
    is_compiled = getattr(make, "func", None) is of_torchao
    return {"bytes": stored, "compiled" if is_compiled else "eager": seconds}


def trained(make: Make, task: Task, seed: int) -> float:
    """The mean training loss of the last steps."""
    torch.manual_seed(seed)
    model, (x, y) = task.model(), task.data
    opt = make(model.parameters())
    losses: list[Tensor] = []
    for _ in range(task.steps):
        batch = torch.randint(len(x), (task.batch,))
        opt.zero_grad()
        loss = task.loss(model(x[batch]), y[batch])
        loss.backward()
        opt.step()
        losses.append(loss.detach())
    return torch.stack(losses[-WINDOW:]).mean().item()


def step_of(make: Make, size: int) -> tuple[float, float]:
    """The CPU seconds of a step on one matrix, and the bytes of its slots for each element."""
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(size, size))
    p.grad = torch.randn_like(p)
    opt = make([p])
    opt.step()
    seconds = []
    for _ in range(20):
        start = time.process_time()  # others on this machine do not count
        opt.step()
        seconds.append(time.process_time() - start)
    return min(seconds), slot_bytes.kept(opt, p)


def show(rows: list[dict[str, Any]]) -> None:
    """The table of optimizers and codes; times are those in float32 of the same optimizer."""
    shown = []
    for row in rows:
        usual = next(of for of in rows if of["row"] == row["row"])
        expected = f"{row['predicted']:.2f}" if "predicted" in row else "-"
        kinds = ("eager", "compiled")
        slower = [f"{row[k] / usual[k]:.1f}" if k in row else "-" for k in kinds]
        losses = [f"{row[k]['loss']:.4f} ± {row[k]['spread']:.4f}" for k in STEPS]
        cells = [row["row"], row["state"], expected, f"{row['bytes']:.2f}"]
        cells += [*slower, *losses]
        shown.append(cells)
    head = ["", "state", "predicted", "bytes", "eager step", "compiled step", *STEPS]
    report.table("slots in fewer bytes", head, shown, numbers_from=2)
