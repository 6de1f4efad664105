"""``benchmarks random``: random numbers from a key, beside those of torch's generator."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import torch

from benchmarks import record, report
from benchmarks.timing import in_turns, summary
from functorch_opt import random
from functorch_opt.random import philox

ROWS = {
    "normal": ("standard normals", torch.randn),
    "uniform": ("uniform numbers", torch.rand),
}
N, QUICK = 10_000_000, 1000
TARGET = 1.5
"""Times torch.randn, for compiled normals."""


def run(args: Namespace) -> dict[str, Any]:
    torch.set_num_threads(args.threads[0])
    n, rounds = (QUICK, 3) if args.quick else (N, args.rounds)
    result = record.header("random") | {
        "threads": args.threads[0],
        "numbers": n,
        "rounds": rounds,
        "rows": [],
    }
    for row in args.rows or ROWS:
        result["rows"].append(_measure(row, n, rounds) | {"threads": args.threads[0]})
        _show(result["rows"][-1])
    record.write(args.out / "random.json", result)
    panels: list[Any] = [
        (
            row["title"],
            [(name, entry["ratio"]) for name, entry in row["results"].items()],
            1.0,
        )
        for row in result["rows"]
    ]
    report.bars(
        args.out / "random.png",
        panels,
        "time, in multiples of torch's generator (the line at 1)",
    )
    return result


def _measure(row: str, n: int, rounds: int) -> dict[str, Any]:
    what, theirs = ROWS[row]
    key, make = random.key(0), getattr(random, row)

    def ours(draw: Any) -> None:
        with philox.compiled():
            draw(key, (n,))

    work = {
        "functorch_opt compiled": lambda: ours(make),
        "functorch_opt compiled, the bits alone": lambda: ours(random.bits),
        "functorch_opt eager": lambda: make(key, (n,)),
        f"torch.{theirs.__name__}": lambda: theirs(n),
    }
    title = f"{n:,} {what}"
    return {
        "row": row,
        "title": title,
        "results": summary(in_turns(work, rounds, title), f"torch.{theirs.__name__}"),
    }


def _show(row: dict[str, Any]) -> None:
    against = next(reversed(row["results"]))
    lines = [
        [
            name,
            f"{entry['ms']:.2f}",
            f"{entry['ratio']:.2f}",
            "{:.2f}-{:.2f}".format(*entry["ratio_quartiles"]),
            "",
        ]
        for name, entry in row["results"].items()
    ]
    if row["row"] == "normal":
        lines[0][-1] = f"to reach: {TARGET:.2f}"
    threads = f"{row['threads']} thread{'s' * (row['threads'] > 1)}"
    report.table(
        f"{row['title']}; {threads}; ratio to {against}",
        ["", "ms", "ratio", "quartiles", ""],
        lines,
        numbers_to=4,
    )
