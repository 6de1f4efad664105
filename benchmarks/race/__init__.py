"""``python -m benchmarks race``: every optimizer at its own best settings, on the same budget.

The protocol is in docs/race.md. This file reads the arguments and puts the parts together.
"""

from __future__ import annotations

import time
from argparse import ArgumentParser, Namespace
from typing import Any

from benchmarks import record, report
from benchmarks.race import judge
from benchmarks.race.entries import LEFT_OUT, OTHER, entries
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
        "--processes", type=int, default=2, help="of one thread each (default: 2)"
    )


def run(args: Namespace) -> dict[str, Any]:
    """Run what is not there yet, judge all of it, and write tables and JSON."""
    began = time.perf_counter()
    known = entries(args.add)
    names = args.optimizers or list(known)
    if unknown := [name for name in names if name not in known]:
        raise SystemExit(
            f"no optimizer {', '.join(unknown)}: there are {', '.join(known)}"
        )
    budget = QUICK if args.quick else FULL
    todo = pairs(list(args.rows or ROWS), names)
    found = run_all(todo, args.out, budget, args.add, args.processes)
    result = judged(found, budget, quick=args.quick)
    result["seconds"] = round(time.perf_counter() - began, 1)
    record.write(args.out / "race.json", result)
    return result | {"rows": failures(result)}


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
    for task in dict.fromkeys(pair.task for pair in found):
        of = {pair.optimizer: it for pair, it in found.items() if pair.task == task}
        failed = {name: it["error"] for name, it in of.items() if "error" in it}
        rows = [{"task": task, "optimizer": k, "error": v} for k, v in failed.items()]
        result["failed"] += rows
        ended = {name: it for name, it in of.items() if name not in failed}
        target = judge.target_of(ended.get(judge.REFERENCE, {}).get("curve", [None]))
        lines = [judge.result(task, name, ended[name], target) for name in sorted(ended)]
        result["results"] += lines
        result["tasks"][task] = described(task, budget, lines) | {"target": target}
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
