"""``benchmarks memory``: what a step allocates beside parameters, gradients and state.

The numbers are exact: they count every allocation that torch reports.
"""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import chains, contenders, ordinary, record, report, shapes
from benchmarks.contenders import Contender, Optax, Unavailable, draw

ORDINARY = (
    *ordinary.ADAMW,
    *ordinary.SGD,
    ordinary.Chain,
    ordinary.BFloat16,
)
CONTENDERS: dict[str, tuple[str, tuple[type[Contender], ...]]] = {
    "adamw": ("AdamW", contenders.ADAMW),
    "ema": ("clip + AdamW + warmup-cosine + parameter EMA", chains.EMA_CHAIN),
    "research": ("8-stage research chain", chains.RESEARCH),
    "default": ("AdamW, SGD, a chain: the default step of optim", ORDINARY),
    "noise": ("8-stage research chain, noise first", chains.NOISE),
}
ROWS = tuple(CONTENDERS)


def allocations(step: Any) -> tuple[int, int]:
    """The bytes that one step allocates in all, and the most bytes alive at a time beside those
    before.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = [
        event
        for event in profiler.profiler.kineto_results.events()
        if event.name() == "[memory]"
    ]
    total = alive = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        total += max(0, event.nbytes())
        alive += event.nbytes()
        most = max(most, alive)
    return total, most


def run(args: Namespace) -> dict[str, Any]:
    torch.set_num_threads(args.threads[0])
    of = shapes.TINY if args.quick else shapes.NANOGPT
    n = shapes.numel(of)
    result = record.header("memory") | {
        "threads": args.threads,
        "tensors": len(of),
        "parameters": n,
        "rows": [],
    }
    for row in args.rows or ROWS:
        title, makes = CONTENDERS[row]
        for make in report.track(makes, title):
            result["rows"].append(
                {"row": row, "title": title, "name": make.name} | _measure(make, of)
            )
    rows = [
        [
            row["title"],
            row["name"],
            *(
                [f"{100 * row[key]:.3f}%" for key in ("allocated", "peak")]
                if "peak" in row
                else ["-", "-"]
            ),
        ]
        + [row.get("note", "")]
        for row in result["rows"]
    ]
    title = f"Allocated by a step, as a share of the bytes of the parameters ({len(of)} tensors, {n:,} parameters; to reach: under 1%)"
    report.table(
        title,
        ["", "", "allocated in all", "most at a time", ""],
        rows,
        numbers_from=2,
        numbers_to=4,
    )
    record.write(args.out / "memory.json", result)
    panels = []
    for row in args.rows or ROWS:
        mine = [
            (r["name"], 100 * r["peak"])
            for r in result["rows"]
            if r["row"] == row and "peak" in r
        ]
        panels.append((CONTENDERS[row][0], mine, 1.0))
    report.bars(
        args.out / "memory.png",
        panels,
        "most allocated at a time, % of the parameters' bytes (the line at 1%)",
    )
    return result


def _measure(make: type[Contender], of: shapes.Shapes) -> dict[str, Any]:
    try:
        contender = make(draw(of, 0), draw(of, 1))
        size = sum(p.nbytes for p in contender.read())
        if isinstance(contender, Optax):
            stats = (
                contender.advance.lower(contender.ps, contender.gs, contender.state)
                .compile()
                .memory_analysis()
            )
            extra = (
                stats.temp_size_in_bytes
                + stats.output_size_in_bytes
                - stats.alias_size_in_bytes
            )
            return {
                "allocated": extra / size,
                "peak": extra / size,
                "note": "XLA's own analysis",
            }
        for _ in range(4):
            contender.step()
        total, most = allocations(contender.step)
    except ModuleNotFoundError as error:
        return {"note": f"not installed ({error.name})"}
    except Unavailable as why:
        return {"note": str(why)}
    except Exception as error:
        return {
            "note": f"failed: {type(error).__name__}: {str(error).splitlines()[0][:90]}"
        }
    return {"allocated": total / size, "peak": most / size}
