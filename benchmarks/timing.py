"""Interleaved timing: in every round each contender has its turn.

So noise that lasts for a while affects all of them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks import report

TURN = 0.02
"""Seconds of timed calls in a turn, at least: one call is too short to time with small tensors."""


def in_turns(
    work: Mapping[str, Callable[[], None]],
    rounds: int,
    description: str,
    turn: float = TURN,
) -> dict[str, list[float]]:
    """Seconds per call, ``{name: one for each round}``.

    A turn begins with an untimed call; the order changes from round to round.
    """
    calls = {}
    for name, call in work.items():
        call()
        begin = time.perf_counter()
        call()
        calls[name] = max(1, round(turn / max(time.perf_counter() - begin, 1e-7)))
    times: dict[str, list[float]] = {name: [] for name in work}
    names = list(work)
    for i in report.track(range(rounds), description):
        k = i % len(names)
        for name in names[k:] + names[:k]:
            call, n = work[name], calls[name]
            call()
            begin = time.perf_counter()
            for _ in range(n):
                call()
            times[name].append((time.perf_counter() - begin) / n)
    return times


def summary(
    times: Mapping[str, Sequence[float]], against: str | None, floor: str = "floor"
) -> dict[str, dict[str, Any]]:
    """Medians: milliseconds, and of the ratios of paired rounds to `against` and to the floor; with
    quartiles.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, of in times.items():
        entry: dict[str, Any] = {
            "ms": 1e3 * statistics.median(of),
            "all_ms": [1e3 * t for t in of],
        }
        for key, other in (("ratio", against), ("over_floor", floor)):
            if other in times:
                ratios = [a / b for a, b in zip(of, times[other], strict=True)]
                entry[key] = statistics.median(ratios)
                entry[f"{key}_quartiles"] = (
                    statistics.quantiles(ratios, n=4)[::2]
                    if len(ratios) > 1
                    else ratios * 2
                )
        found[name] = entry
    return found
