"""Whether every transformation and optimizer gives on a device what it gives on the CPU.

`check` shares the rows of the tests' registry, and the classes of `fo.optim`, out to processes,
for compiling is what takes the time.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import functorch_opt as fo
from functorch_opt import tree
from functorch_opt._execution import segments

TESTS = Path(__file__).parent.parent / "tests"
SHAPES = {"matrix": (16, 24), "vector": (33,), "kernel": (8, 3, 2, 2), "number": ()}
STEPS = 3
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOLERANCES = {"fp32": (1e-4, 1e-5), "bf16": (2**-6, 1e-3)}
CLASSES: dict[str, dict[str, Any]] = {
    "AdamW": {},
    "Adam": {"amsgrad": True},
    "SGD": {"momentum": 0.9, "nesterov": True},
    "RMSprop": {"momentum": 0.9, "centered": True},
    "Adagrad": {},
    "Adamax": {},
    "NAdam": {},
    "RAdam": {},
    "Rprop": {},
    "ASGD": {},
    "Adadelta": {},
    "Adafactor": {},
    "Lion": {},
    "LAMB": {},
    "ADOPT": {},
    "Prodigy": {},
    "ScheduleFreeAdamW": {},
}
"""Classes of `fo.optim`, and options with which they do more than by default."""

Values = list[torch.Tensor]


def drawn(seed: int, device: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator).to(device, dtype)
        for name, shape in SHAPES.items()
    }


def functional(
    tx: fo.GradientTransformation, device: str, dtype: torch.dtype, compiled: bool
) -> Values:
    """Parameters and state after some steps."""
    params, state = drawn(0, device, dtype), tx.init(drawn(0, device, dtype))
    step = fo.compiled_step(tx)
    for seed in range(1, STEPS + 1):
        grads = drawn(seed, device, dtype)
        if compiled:
            params, state = step(params, grads, state)
        else:
            updates, state = tx.update(grads, state, params)
            params = fo.apply_updates(params, updates)
    return tree.leaves((params, state))


def stateful(
    name: str, options: dict[str, Any], device: str, dtype: torch.dtype, compiled: bool
) -> Values:
    """Parameters after some steps, in two groups with rates of their own."""
    params = [p.requires_grad_() for p in drawn(0, device, dtype).values()]
    groups = [{"params": params[:2]}, {"params": params[2:], "lr": 3e-3}]
    one_rate = name in ("Prodigy", "ScheduleFreeAdamW")
    kind = getattr(fo.optim, name)
    opt = kind(params if one_rate else groups, lr=1e-2, compile=compiled, **options)
    for seed in range(1, STEPS + 1):
        for p, g in zip(params, drawn(seed, device, dtype).values(), strict=True):
            p.grad = g
        opt.step()
    return [p.detach() for p in params]


def off(found: Values, wanted: Values, kind: str) -> float:
    """The largest difference, relative to what the dtype allows."""
    rtol, atol = TOLERANCES[kind]
    worst = 0.0
    for a, b in zip(found, wanted, strict=True):
        if b.numel() and not b.is_complex():
            a, b = a.detach().double().cpu(), b.detach().double().cpu()
            same = (a == b) | (a.isnan() & b.isnan())
            difference = torch.where(same, 0.0, (a - b).abs() / (atol + rtol * b.abs()))
            worst = max(worst, float(difference.max()))
    return worst


def cases(device: str) -> Iterator[tuple[str, str, Callable[[str, bool], Values]]]:
    """A name, a dtype, and what gives values on a device, compiled or not."""
    sys.path.insert(0, str(TESTS))
    from registry import ROWS  # type: ignore[import-not-found]

    for kind, dtype in DTYPES.items():
        for row in ROWS:
            if not row.unrolls and not row.apart:
                tx = row.build()
                yield (
                    row.name,
                    kind,
                    lambda at, compiled, tx=tx, dtype=dtype: functional(
                        tx, at, dtype, compiled
                    ),
                )
        for name, options in CLASSES.items():
            yield (
                f"optim.{name}",
                kind,
                lambda at, compiled, name=name, options=options, dtype=dtype: stateful(
                    name, options, at, dtype, compiled
                ),
            )


def look(name: str, kind: str, run: Callable[[str, bool], Values], device: str) -> Any:
    """What comes of one case."""
    began, entry = time.perf_counter(), {"name": name, "dtype": kind}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            expected = run("cpu", False)
            eager = run(device, False)
            entry["eager"] = off(eager, expected, kind)
            entry["compiled"] = off(run(device, True), eager, kind)
        except Exception as error:
            where = error.__traceback__
            while where is not None and where.tb_next is not None:
                where = where.tb_next
            line = (
                where
                and f"{Path(where.tb_frame.f_code.co_filename).name}:{where.tb_lineno}"
            )
            entry["error"] = f"{type(error).__name__}: {str(error)[:200]} ({line})"
    about = [str(w.message) for w in said if "eagerly" in str(w.message)]
    return entry | {"warning": about[:1], "s": time.perf_counter() - began}


def share(k: int, n: int, device: str) -> None:
    """Look at every n-th case, and print what comes of it, a line each."""
    segments.LAUNCH = 4  # what is tested does not depend on it, and compiles faster
    for i, (name, kind, run) in enumerate(cases(device)):
        if i % n == k:
            print(json.dumps(look(name, kind, run, device)), flush=True)


def check(args: Namespace, limit: float, processes: int) -> dict[str, Any]:
    """Look at all cases in so many processes, which end after `limit` seconds."""
    folder = args.out / "checks"
    folder.mkdir(parents=True, exist_ok=True)
    here = [sys.executable, "-m", "benchmarks.on_device", args.device, str(processes)]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
    }
    running, files = [], []
    for k in range(processes):
        files.append(folder / f"{k}.txt")
        out = files[-1].open("w")
        running.append(
            subprocess.Popen([*here, str(k)], stdout=out, stderr=out, env=environment)
        )
    end = time.monotonic() + limit
    for process in running:
        try:
            process.wait(max(0.1, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
    lines = [line for file in files for line in file.read_text().splitlines()]
    found = [json.loads(line) for line in lines if line.startswith("{")]
    number = sum(1 for _ in cases(args.device))
    others = [line for line in lines if not line.startswith("{")]
    return {"cases": number, "found": found, "others": others[-20:]}


def show(result: dict[str, Any]) -> None:
    """Say what is not as it should be, and how many cases are."""
    good = 0
    for entry in result["found"]:
        worst = max(entry.get("eager", 0.0), entry.get("compiled", 0.0))
        if "error" in entry or entry["warning"] or not worst <= 1:
            print({key: x for key, x in entry.items() if key != "s"}, flush=True)
        else:
            good += 1
    print(f"{good} of {result['cases']} cases are right; {len(result['found'])} were run")


if __name__ == "__main__":
    share(int(sys.argv[3]), int(sys.argv[2]), sys.argv[1])
