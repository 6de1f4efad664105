"""``benchmarks cpu``: step times on the CPU, every contender and the memory floor interleaved in
one run.
"""

from __future__ import annotations

import gc
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import (
    chains,
    containers,
    contenders,
    floor,
    ordinary,
    python_time,
    record,
    report,
    shapes,
)
from benchmarks.contenders import Contender, Unavailable, draw, gradients, same
from benchmarks.timing import in_turns, summary
from functorch_opt._execution import again


class Row(NamedTuple):
    title: str
    shapes: shapes.Shapes
    contenders: tuple[type[Contender], ...]
    against: str
    target: float | None
    floor: dict[str, Any] = {}  # noqa: RUF012 (never written)
    check: tuple[int, ...] = ()
    """Which contenders compute other numbers than the first, and must not be compared with it."""


AVERAGED = {"slots": 3, "norm": True}
ONE_SLOT = {"slots": 1}
SETTLED = 2
"""Steps after which those are timed that a training has after some thousand steps."""
RANDOM = (1,)

ROWS = {
    "newcomer": Row(
        "AdamW, 28 small tensors", shapes.FEW, ordinary.NEWCOMER, contenders.FUSED, 1.2
    ),
    "newcomer-groups": Row(
        "AdamW, 28 small tensors, with and without decay",
        shapes.FEW,
        ordinary.GROUPS,
        ordinary.TwoGroupsFused.name,
        1.4,
    ),
    "gpt": Row(
        "AdamW, 76 tensors of a 12 M GPT",
        shapes.NANOGPT,
        contenders.ADAMW,
        contenders.FUSED,
        1.0,
    ),
    "large": Row(
        "AdamW, 32 tensors of 1024x1024",
        shapes.LARGE,
        contenders.ADAMW,
        contenders.FUSED,
        1.0,
    ),
    "small": Row(
        "AdamW, 150 tensors of 64x64 and 64",
        shapes.SMALL,
        contenders.ADAMW,
        contenders.FUSED,
        1.0,
    ),
    "many": Row(
        "AdamW, 1,000 tensors of 256",
        shapes.MANY,
        contenders.ADAMW,
        contenders.FUSED,
        1.0,
    ),
    "ema": Row(
        "clip + AdamW + warmup-cosine + parameter EMA, 12 M GPT",
        shapes.NANOGPT,
        chains.EMA_CHAIN,
        chains.EmaTorch.name,
        0.70,
        AVERAGED,
    ),
    "research": Row(
        "8-stage research chain, 12 M GPT",
        shapes.NANOGPT,
        chains.RESEARCH,
        chains.ResearchTorch.name,
        0.25,
        AVERAGED,
    ),
    "noise": Row(
        "the same with Gaussian noise first, 12 M GPT",
        shapes.NANOGPT,
        chains.NOISE,
        chains.NoiseTorch.name,
        0.70,
        AVERAGED,
        RANDOM,
    ),
    "eager": Row(
        "eager functional AdamW, 12 M GPT",
        shapes.NANOGPT,
        contenders.EAGER,
        contenders.TorchOpt.name,
        0.6,
    ),
    "eager-small": Row(
        "eager functional AdamW, 150 small tensors",
        shapes.SMALL,
        contenders.EAGER,
        contenders.TorchOpt.name,
        0.6,
    ),
    "containers": Row(
        "AdamW in containers, compiled, 150 tensors of 64x64 and 64",
        shapes.SMALL,
        containers.CONTAINERS,
        containers.Plain.name,
        1.5,
        check=(3,),
    ),
    "accumulation": Row(
        "gradients of four steps in one, compiled, 150 tensors of 64x64 and 64",
        shapes.SMALL,
        containers.ACCUMULATION,
        containers.FourSteps.name,
        None,
        check=(1,),
    ),
    "accumulation-large": Row(
        "gradients of four steps in one, compiled, 32 tensors of 1024x1024",
        shapes.LARGE,
        containers.ACCUMULATION,
        containers.FourSteps.name,
        None,
        check=(1,),
    ),
}
PYTHON = "python"

DEFAULT = {
    "gpt": ("64 tensors of a 9 M GPT", shapes.GPT_9M, 1.4, 1.8),
    "large": ("20 tensors of 900x1000", shapes.SQUARES, 1.4, 1.8),
    "small": ("160 tensors of 48x80 and 48", shapes.HANDY, 0.85, 1.1),
    "many": ("900 tensors of 200", shapes.VECTORS, 0.75, 1.1),
}
"""Tensors for the default step of `fo.optim`, and the ratios to reach with AdamW and SGD."""
for _name, (_title, _shapes, _adamw, _sgd) in DEFAULT.items():
    ROWS[f"default-{_name}"] = Row(
        f"default step of AdamW, {_title}",
        _shapes,
        ordinary.ADAMW,
        ordinary.TorchAdamW.name,
        _adamw,
    )
    ROWS[f"sgd-{_name}"] = Row(
        f"default step of SGD with momentum, {_title}",
        _shapes,
        ordinary.SGD,
        ordinary.TorchSGD.name,
        _sgd,
        ONE_SLOT,
    )


# ---- a row ---------------------------------------------------------------------------------------


@contextmanager
def limit(seconds: float) -> Iterator[None]:
    """Stop what takes longer, where there are signals."""
    if (
        not hasattr(signal, "setitimer")
        or threading.current_thread() is not threading.main_thread()
    ):
        yield
        return

    def stop(*_: object) -> None:
        raise Unavailable(f"not ready after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def prepare(
    row: Row, seconds: float
) -> tuple[dict[str, Contender], dict[str, str], dict[str, float]]:
    """The contenders that can run, after three steps on the same data.

    Also the reasons why the others cannot, and how far each is from the first.
    """
    ps, feeds = (
        draw(row.shapes, 0, scale=0.02),
        [gradients(row.shapes, seed) for seed in (1, 2, 3)],
    )
    ready: dict[str, Contender] = {}
    notes: dict[str, str] = {}
    results: dict[str, list[torch.Tensor]] = {}
    for make in report.track(row.contenders, f"{row.title}: check"):
        try:
            with limit(seconds):
                contender = make(ps, feeds[0])
                for gs in feeds:
                    contender.feed(gs)
                    contender.step()
        except ModuleNotFoundError as error:
            notes[make.name] = f"not installed ({error.name})"
        except Unavailable as why:
            notes[make.name] = str(why)
        except Exception as error:
            limits = [
                e
                for e in (error.__cause__, error.__context__)
                if isinstance(e, Unavailable)
            ]  # raised inside a compiler
            notes[make.name] = (
                str(limits[0]).splitlines()[0]
                if limits
                else f"failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:90]}"
            )
        else:
            ready[make.name], results[make.name] = (
                contender,
                [x.clone() for x in contender.read()],
            )
    compared = [
        make.name
        for i, make in enumerate(row.contenders)
        if i not in row.check and make.name in results
    ]
    differences = {
        name: same([results[compared[0]], results[name]]) for name in compared[1:]
    }
    for name, difference in differences.items():
        if not difference <= 1:
            notes[name] = f"DIFFERENT NUMBERS: {difference:.3g} x the tolerance"
    return ready, notes, differences


def measure(name: str, row: Row, rounds: int, seconds: float) -> dict[str, Any]:
    again.STEPS = SETTLED
    ready, notes, differences = prepare(row, seconds)
    run, size = floor.adamw(shapes.numel(row.shapes), **row.floor)
    work = {**{name: contender.step for name, contender in ready.items()}, "floor": run}
    times = in_turns(work, rounds, f"{row.title}: time") if ready else {}
    found = summary(times, row.against)
    for contender, why in notes.items():
        found.setdefault(contender, {})["note"] = why
    return {
        "row": name,
        "title": row.title,
        "tensors": len(row.shapes),
        "parameters": shapes.numel(row.shapes),
        "threads": torch.get_num_threads(),
        "rounds": rounds,
        "against": row.against,
        "target": row.target,
        "floor_bytes": size,
        "difference_over_tolerance": differences,
        "results": {make.name: found[make.name] for make in row.contenders}
        | {"floor": found.get("floor", {})},
    }


def show(result: dict[str, Any], quiet: bool = False) -> None:
    rows = []
    for name, entry in result["results"].items():
        note = entry.get("note", "")
        if "ms" not in entry:
            rows.append([name, "-", "-", "-", "-", note])
            continue
        ratio = f"{entry['ratio']:.2f}" if "ratio" in entry else "-"
        spread = (
            "{:.2f}-{:.2f}".format(*entry["ratio_quartiles"]) if "ratio" in entry else "-"
        )
        if name == next(iter(result["results"])) and result["target"]:
            note = note or f"to reach: {result['target']:.2f}"
        rows.append(
            [
                name,
                f"{entry['ms']:.3f}",
                ratio,
                spread,
                f"{entry['over_floor']:.2f}",
                note,
            ]
        )
    threads = f"{result['threads']} thread{'s' * (result['threads'] > 1)}"
    header = ["", "ms", "ratio", "quartiles", "over floor", ""]
    report.table(
        f"{result['title']}; {threads}; ratio to {result['against']}",
        header,
        rows,
        numbers_to=5,
        quiet=quiet,
    )


# ---- the program ---------------------------------------------------------------------------------


HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"
"""With this torch asks for huge pages.

With small ones it is chance how well they lie, and the same kernel takes 21 or 31 ms.
"""


def run(args: Namespace) -> dict[str, Any]:
    chosen = args.rows or [*ROWS, PYTHON]
    if len(args.threads) > 1 or (
        not args.quick and (len(chosen) > 1 or HUGE_PAGES not in os.environ)
    ):
        return _each_in_a_process(
            args, [chosen] if args.quick else [[name] for name in chosen]
        )
    torch.set_num_threads(args.threads[0])
    os.environ["PJRT_NPROC"] = os.environ["NPROC"] = str(
        args.threads[0]
    )  # how many threads JAX takes, if it has not started yet
    result = record.header("cpu") | {"threads": args.threads, "rows": []}
    for name in chosen:
        if name == PYTHON:
            result["python"] = [
                python_time.run(
                    shapes.TINY if args.quick else shapes.SMALL, 20 if args.quick else 300
                )
            ]
            continue
        row = ROWS[name]._replace(shapes=shapes.TINY) if args.quick else ROWS[name]
        result["rows"].append(
            measure(name, row, 3 if args.quick else args.rounds, args.limit)
        )
        show(result["rows"][-1])
        gc.collect()
    _keep(args.out, result)
    return result


def _each_in_a_process(args: Namespace, groups: list[list[str]]) -> dict[str, Any]:
    """Run each group of rows in a process of its own.

    JAX takes its threads only once, when it starts, and torch asks only once for its pages. Memory
    that other rows have used is not fresh memory.
    """
    result = record.header("cpu") | {"threads": args.threads, "rows": [], "python": []}
    for threads, names in itertools.product(args.threads, groups):
        out = args.out / f"threads_{threads}" / "_".join(names)
        command = [
            sys.executable,
            "-m",
            "benchmarks",
            "cpu",
            "--threads",
            str(threads),
            "--out",
            str(out),
        ]
        command += [
            "--rounds",
            str(args.rounds),
            "--limit",
            str(args.limit),
            *(["--quick"] if args.quick else []),
        ]
        command += ["--rows", *names]
        subprocess.run(
            command,
            check=True,
            env={HUGE_PAGES: "1", **os.environ, "OMP_NUM_THREADS": str(threads)},
        )
        part = json.loads((out / "cpu.json").read_text())
        result["rows"] += part["rows"]
        result["python"] += part.get("python", [])
    for row in result["rows"]:
        show(row, quiet=True)  # the processes have printed them
    for python in result["python"]:
        python_time.show(python, quiet=True)
    _keep(args.out, result)
    return result


def _keep(out: Path, result: dict[str, Any]) -> None:
    record.write(out / "cpu.json", result)
    panels = []
    for row in result["rows"]:
        values = [
            (name, entry["over_floor"])
            for name, entry in row["results"].items()
            if "ms" in entry and name != "floor"
        ]
        panels.append((f"{row['title']}; threads: {row['threads']}", values, 1.0))
    report.bars(
        out / "cpu.png",
        panels,
        "step time, in multiples of the memory floor (the line at 1)",
        log=True,
    )
