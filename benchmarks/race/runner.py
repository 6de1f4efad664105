"""All pairs in a few processes with one thread each. What is done stays done.

Each pair has a file of its own in ``FOLDER/pairs``. A race that is started again with the same
budget goes on where it was. A changed task, or other values to try, are run anew.
"""

from __future__ import annotations

import functools
import json
import multiprocessing
import random
import sys
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import report
from benchmarks.race.entries import FIXED, OTHER, competitors
from benchmarks.race.judge import REFERENCE
from benchmarks.race.pair import Budget, race
from benchmarks.race.tasks import TASKS

WEIGHTS = {"text-gpt": 5, "factorization": 3}
"""How much longer a pair of this task takes than one of the others, for the time left."""


class Pair(NamedTuple):
    task: str
    optimizer: str

    def file(self, folder: Path) -> Path:
        return folder / "pairs" / f"{self.task}.{self.optimizer}.json"


def pairs(tasks: list[str], names: list[str]) -> list[Pair]:
    """The reference first, then all others in a mixed order, so that the time left is about right."""
    rest = [Pair(task, name) for task in tasks for name in names if name != REFERENCE]
    random.Random(0).shuffle(rest)
    return [Pair(task, REFERENCE) for task in tasks] + rest


def run_one(pair: Pair, added: list[str], budget: Budget) -> dict[str, Any]:
    """A pair, in a process of its own. Its error is its result."""
    import torch

    torch.set_num_threads(1)
    try:
        entry = competitors(added)[pair.optimizer]
        return race(TASKS[pair.task](), entry, budget)
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        where = traceback.format_exc(limit=-3)
        return {"error": text[:500], "traceback": where}


@functools.cache
def _sizes(task: str) -> dict[str, int]:
    of = TASKS[task]()
    parameters = sum(p.numel() for p in of.model().parameters())
    return {"steps": of.steps, "batch": of.batch, "parameters": parameters}


def conditions(pair: Pair, budget: Budget) -> Any:
    """What a stored result must have been found with to be used again."""
    other = {"other": OTHER.get(pair.optimizer), "fixed": FIXED.get(pair.optimizer)}
    return json.loads(json.dumps(budget.described() | _sizes(pair.task) | other))


def read(file: Path, under: Any) -> dict[str, Any] | None:
    """What is known of a pair, if it was run under these conditions and did not fail."""
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError):
        return None
    same = found.pop("under", None) == under
    return found if same and "error" not in found else None


def write(file: Path, found: dict[str, Any], under: Any) -> None:
    """Whole or not at all."""
    half = file.with_suffix(".part")
    half.write_text(json.dumps(found | {"under": under}))
    half.replace(file)


def run_all(
    todo: list[Pair], folder: Path, budget: Budget, added: list[str], processes: int
) -> dict[Pair, dict[str, Any]]:
    """What is known of each pair, old or new."""
    (folder / "pairs").mkdir(parents=True, exist_ok=True)
    under = {pair: conditions(pair, budget) for pair in todo}
    known = {pair: read(pair.file(folder), under[pair]) for pair in todo}
    found = {pair: old for pair, old in known.items() if old is not None}
    left = [pair for pair in todo if pair not in found]
    if found:
        report.say(
            f"{len(found)} of {len(todo)} pairs are there already, in {folder}/pairs."
        )
    for pair, new in _computed(left, budget, added, processes):
        write(pair.file(folder), new, under[pair])
        found[pair] = new
        if "error" in new:
            report.say(f"FAILED {pair.optimizer} on {pair.task}: {new['error']}")
    return found


def _computed(
    left: list[Pair], budget: Budget, added: list[str], processes: int
) -> Iterator[tuple[Pair, dict[str, Any]]]:
    if processes == 1:
        ended = ((pair, run_one(pair, added, budget)) for pair in left)
        yield from _shown(ended, left)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, mp_context=context)
    try:
        futures = {pool.submit(run_one, pair, added, budget): pair for pair in left}
        ended = ((futures[future], _result(future)) for future in as_completed(futures))
        yield from _shown(ended, left)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _result(future: Future[dict[str, Any]]) -> dict[str, Any]:
    try:
        return future.result()
    except BrokenProcessPool:
        raise SystemExit(
            "A process of the race ended by itself (out of memory?). "
            "Start the race again: it goes on where it was."
        ) from None


def _shown(ended: Any, left: list[Pair]) -> Iterator[tuple[Pair, dict[str, Any]]]:
    """The same pairs, with a bar and the time left."""
    if not report.console or not sys.stdout.isatty():
        yield from _told(ended, len(left))
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.progress import TimeRemainingColumn as Remaining

    columns = (TextColumn("{task.description:<44}"), BarColumn(), TimeElapsedColumn())
    total = sum(WEIGHTS.get(pair.task, 1) for pair in left)
    with Progress(
        *columns, TextColumn("left:"), Remaining(), console=report.console
    ) as bar:
        row = bar.add_task(f"{len(left)} pairs", total=total)
        for n, (pair, found) in enumerate(ended, 1):
            text = f"{n}/{len(left)} {pair.optimizer} on {pair.task}"
            bar.update(row, advance=WEIGHTS.get(pair.task, 1), description=text)
            yield pair, found


def _told(ended: Any, total: int) -> Iterator[tuple[Pair, dict[str, Any]]]:
    """Where there is no terminal, a line now and then."""
    began = last = time.perf_counter()
    for n, (pair, found) in enumerate(ended, 1):
        now = time.perf_counter()
        if now - last > 15 or n == total:
            left = (now - began) / n * (total - n)
            print(f"{n}/{total} pairs, {left:.0f} s left", file=sys.stderr, flush=True)
            last = now
        yield pair, found
