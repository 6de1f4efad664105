"""The tables of a race, for the terminal and for the page."""

from __future__ import annotations

import math
from typing import Any

from benchmarks.race import judge

Rows = list[list[str]]
MARK = "•"
"""Marks the best of a task and all that the spread cannot tell from it."""

OVERALL = ("mean place", "among the best")
TASK = (
    "optimizer",
    "held-out loss",
    "learning rate",
    "good rates",
    "steps to target",
    "seconds",
    "bytes",
)


def overall(result: dict[str, Any]) -> tuple[list[str], Rows]:
    """Places of each optimizer on all tasks."""
    tasks = result["tasks"]
    rows = []
    for line in result["overall"]:
        name = line["optimizer"]
        row = [
            name,
            f"{line['mean_place']:.1f}",
            f"{line['among_the_best']}/{len(tasks)}",
        ]
        for task, place in line["places"].items():
            row.append(
                f"{place} {MARK}" if name in tasks[task]["leaders"] else str(place)
            )
        rows.append(row)
    return ["optimizer", *OVERALL, *tasks], rows


def of_task(result: dict[str, Any], task: str, most: int | None) -> Rows:
    """The best of a task, the best one first; all if `most` is None, with those that diverged."""
    lines = [line for line in result["results"] if line["task"] == task]
    leaders = result["tasks"][task]["leaders"]
    order = judge.ranked(lines)
    rows = [row(line, line["optimizer"] in leaders) for line in order[:most]]
    if most is None:
        names = [line["optimizer"] for line in order]
        lost = [line for line in lines if line["optimizer"] not in names]
        rows += [row(line, False) for line in lost]
    return rows


def row(line: dict[str, Any], leads: bool) -> list[str]:
    name = f"{line['optimizer']} {MARK}" if leads else line["optimizer"]
    if line["learning_rate"] is None:
        return [name, "diverged", *[""] * (len(TASK) - 2)]
    loss = "diverged"
    if line["held_out_mean"] is not None:
        loss = f"{line['held_out_mean']:#.3g} ± {line['held_out_sd']:.2g}"
    other = [f"{key} {value:g}" for key, value in line["other"].items()]
    end = " (the last tried)" if line["at_an_end"] else ""
    rate = ", ".join([f"{line['learning_rate']:.2g}{end}", *other])
    steps, seconds = line["steps_to_target"], line["seconds_to_target"]
    reached = [str(steps), f"{seconds:.2g}"] if steps else ["not reached", ""]
    size = f"{line['bytes_per_parameter']:.3g}"
    return [name, loss, rate, good(line["good_range"]), *reached, size]


def good(of: list[float]) -> str:
    """The width in factors of ten, and both ends."""
    low, high = of
    if low == high:
        return f"only {low:.2g}"
    return f"{math.log10(high / low):.1f} ({low:.2g} to {high:.2g})"


def verdict(result: dict[str, Any], task: str) -> str:
    """Who won, if anyone."""
    leaders = result["tasks"][task]["leaders"]
    if len(leaders) == 1:
        return f"{leaders[0]} wins."
    if not leaders:
        return "Nobody ended."
    return f"No winner: the spread does not tell {len(leaders)} apart."
