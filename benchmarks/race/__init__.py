"""``python -m benchmarks race``: every optimizer at its own best settings, on the same budget.

The protocol is in docs/race.md. This file reads the arguments and puts the parts together.
"""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

import torch

from benchmarks import record, report
from benchmarks.race import check, judge, page, tables
from benchmarks.race.entries import LEFT_OUT, OTHER, competitors
from benchmarks.race.pair import FULL, QUICK, Budget
from benchmarks.race.runner import Pair, pairs, run_all
from benchmarks.race.tasks import TASKS

ROWS = tuple(TASKS)


def arguments(command: ArgumentParser) -> None:
    command.add_argument(
        "--add",
        action="append",
        metavar="MODULE:FUNCTION",
        default=[],
        help="your own optimizer: a function of learning_rate that returns a transformation",
    )
    command.add_argument(
        "--optimizers",
        nargs="+",
        metavar="NAME",
        help="only these, and adamw (default: all)",
    )
    command.add_argument(
        "--check",
        action="store_true",
        help="compare a dozen optimizers with torch's classes, and do nothing else",
    )
    command.add_argument(
        "--page",
        type=Path,
        metavar="FOLDER",
        help="write docs/race.json, docs/race.md and its pictures from a race, and nothing else",
    )
    command.add_argument(
        "--processes", type=int, default=2, help="of one thread each (default: 2)"
    )


def run(args: Namespace) -> dict[str, Any]:
    """Do what the arguments say."""
    torch.set_num_threads(1)
    if args.check:
        wrong = check.run()["wrong"]
        failed = [{"task": "check", "optimizer": x, "error": "differs"} for x in wrong]
        return {"rows": failures({"failed": failed})}
    if args.page:
        page.write(json.loads((args.page / "race.json").read_text()))
        return {"rows": []}
    return raced(args)


def raced(args: Namespace) -> dict[str, Any]:
    """Run what is not there yet, judge all of it, and write tables and JSON."""
    known = competitors(args.add)
    names = args.optimizers or list(known)
    if unknown := [name for name in names if name not in known]:
        raise SystemExit(
            f"no optimizer {', '.join(unknown)}: there are {', '.join(known)}"
        )
    budget = QUICK if args.quick else FULL
    todo = pairs(list(args.rows or ROWS), names)
    found = run_all(todo, args.out, budget, args.add, args.processes)
    result = judged(found, budget, quick=args.quick)
    record.write(args.out / "race.json", result)
    show(result)
    return result | {"rows": failures(result)}


def show(result: dict[str, Any]) -> None:
    """The tables."""
    for task, about in result["tasks"].items():
        said = f"{about['title']}, {about['steps']} steps. {tables.verdict(result, task)}"
        rows = tables.of_task(result, task, None)
        report.table(said, tables.TASK, rows, quiet=True)
        report.table(f"{said} The first 12", tables.TASK, rows[:12])
    head, rows = tables.overall(result)
    report.table(f"places on all tasks; {tables.MARK}: among the best", head, rows)


def protocol(budget: Budget, quick: bool) -> dict[str, Any]:
    """The rules, as numbers."""
    rules = {"quick": quick, "reference": judge.REFERENCE, "tolerance": judge.TOLERANCE}
    rules |= {"standard_errors": judge.ERRORS, "other": OTHER}
    return budget.described() | rules


def judged(
    found: dict[Pair, dict[str, Any]], budget: Budget, quick: bool
) -> dict[str, Any]:
    """The race as it is written."""
    result = record.header("race")
    result |= {"protocol": protocol(budget, quick), "tasks": {}, "results": []}
    result["failed"] = []
    raced = {pair.task for pair in found}
    for task in [name for name in TASKS if name in raced]:
        of = {pair.optimizer: it for pair, it in found.items() if pair.task == task}
        failed = {name: it["error"] for name, it in of.items() if "error" in it}
        rows = [{"task": task, "optimizer": k, "error": v} for k, v in failed.items()]
        result["failed"] += rows
        ended = {name: it for name, it in of.items() if name not in failed}
        target = judge.target_of(ended.get(judge.REFERENCE, {}).get("curve", [None]))
        lines = [judge.result(task, name, ended[name], target) for name in sorted(ended)]
        result["results"] += lines
        result["tasks"][task] = described(task, budget, lines) | {"target": target}
    result["cpu_seconds"] = sum(it.get("cpu", 0.0) for it in found.values())
    result["overall"] = judge.overall(result["results"], result["tasks"])
    return result | {"left_out": LEFT_OUT}


def described(task: str, budget: Budget, lines: list[dict[str, Any]]) -> dict[str, Any]:
    """What a task is, and who leads it."""
    of = TASKS[task]().shortened(budget.most_steps or 10**9)
    about = {"title": of.title, "steps": of.steps, "batch": of.batch, "held_out": "loss"}
    about["parameters"] = sum(p.numel() for p in of.model().parameters())
    about["examples"] = [len(part[0]) for part in (of.train, of.validation, of.test)]
    best = judge.leaders(lines)
    return about | {"leaders": best, "winner": best[0] if len(best) == 1 else None}


def failures(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The pairs that failed, as `benchmarks` reports what is wrong."""
    return [
        {
            "title": row["task"],
            "name": f"functorch_opt {row['optimizer']}",
            "note": f"failed: {row['error']}",
        }
        for row in result["failed"]
    ]
