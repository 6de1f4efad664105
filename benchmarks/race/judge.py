"""What the numbers of all pairs say: settings, targets, ranges, and wins beyond the spread."""

from __future__ import annotations

import math
import statistics
from typing import Any

REFERENCE = "adamw"
"""Its training loss at half of the steps is the target."""
TOLERANCE = 0.1
"""A learning rate is good if at most this part of the best one's progress is lost."""
ERRORS = 2.0
"""Two means differ if they are further apart than this many standard errors of the difference."""
POINTS = 50

Found = dict[str, Any]


def result(task: str, optimizer: str, found: Found, target: float | None) -> Found:
    """The public line of a pair."""
    line: Found = {"task": task, "optimizer": optimizer}
    best = found["best"]
    if best is None:
        empty = ("learning_rate", "steps_to_target", "seconds_to_target", "held_out_mean")
        line |= {**dict.fromkeys(empty), "held_out_sd": None, "other": {}, "seeds": 0}
        line |= {
            "held_out": [],
            "good_range": None,
            "bytes_per_parameter": None,
            "at_an_end": False,
        }
        return line | {"step_seconds": None, "curve": []}
    rates = sorted({setting["learning_rate"] for setting in found["settings"]})
    mean, sd = moments(found["held_out"])
    steps = steps_to(found["curve"], target)
    line["learning_rate"] = best["learning_rate"]
    line["at_an_end"] = best["learning_rate"] in (rates[0], rates[-1])
    line["other"] = {k: v for k, v in best.items() if k != "learning_rate"}
    line["steps_to_target"] = steps
    line["seconds_to_target"] = None if steps is None else steps * found["step_seconds"]
    line |= {"held_out_mean": mean, "held_out_sd": sd, "seeds": len(found["held_out"])}
    line |= {"held_out": found["held_out"], "good_range": good_range(found)}
    line["bytes_per_parameter"] = found["bytes_per_parameter"]
    line["step_seconds"] = found["step_seconds"]
    return line | {"curve": thinned(found["curve"])}


def moments(losses: list[float | None]) -> tuple[float | None, float | None]:
    """Mean and standard deviation; none if a run diverged."""
    ended = [loss for loss in losses if loss is not None]
    if len(ended) < len(losses) or not ended:
        return None, None
    sd = statistics.stdev(ended) if len(ended) > 1 else 0.0
    return statistics.fmean(ended), sd


def target_of(curve: list[float | None]) -> float | None:
    """The reference's training loss at half of the steps."""
    return curve[(len(curve) - 1) // 2]


def steps_to(curve: list[float | None], target: float | None) -> int | None:
    """The first step with a loss not above the target, counted from 1."""
    if target is None:
        return None
    for i, loss in enumerate(curve, 1):
        if loss is not None and loss <= target:
            return i
    return None


def good_range(found: Found) -> list[float]:
    """The learning rates around the best one, without a gap, that keep nearly all of its progress.

    The other hyperparameter stays at its best.
    """
    best = found["best"]
    others = {k: v for k, v in best.items() if k != "learning_rate"}
    losses = {}
    for setting, loss in zip(found["settings"], found["validation"], strict=True):
        if all(setting[name] == value for name, value in others.items()):
            losses[setting["learning_rate"]] = math.inf if loss is None else loss
    rates = sorted(losses)
    at = rates.index(best["learning_rate"])
    least = losses[rates[at]]
    limit = least + TOLERANCE * max(0.0, found["start"] - least)
    low = high = at
    while low > 0 and losses[rates[low - 1]] <= limit:
        low -= 1
    while high < len(rates) - 1 and losses[rates[high + 1]] <= limit:
        high += 1
    return [rates[low], rates[high]]


def thinned(curve: list[float | None]) -> list[list[float | None]]:
    """At most `POINTS` of the curve, the last among them: ``[step, loss]``."""
    every = math.ceil(len(curve) / POINTS)
    shown = range(len(curve) - 1, -1, -every)
    return [[i + 1, curve[i]] for i in reversed(shown)]


# ---- wins ----------------------------------------------------------------------------------------


def differ(a: Found, b: Found) -> bool:
    """Whether the means of two lines are further apart than chance makes them.

    They also differ if every seed of one is better than every seed of the other: otherwise a run
    that nearly diverged, and its large spread, would make an optimizer as good as any.
    """
    if max(a["held_out"]) < min(b["held_out"]) or max(b["held_out"]) < min(a["held_out"]):
        return True
    gap = abs(a["held_out_mean"] - b["held_out_mean"])
    squared = [line["held_out_sd"] ** 2 / line["seeds"] for line in (a, b)]
    return gap > ERRORS * math.sqrt(sum(squared))


def ranked(lines: list[Found]) -> list[Found]:
    """The lines of a task that ended, the lowest held-out loss first."""
    ended = [line for line in lines if line["held_out_mean"] is not None]
    return sorted(ended, key=lambda line: line["held_out_mean"])


def leaders(lines: list[Found]) -> list[str]:
    """The best of a task, and all that the spread cannot tell from it.

    There is a winner if there is one name.
    """
    order = ranked(lines)
    return [line["optimizer"] for line in order if not differ(order[0], line)]


def overall(results: list[Found], tasks: dict[str, Any]) -> list[Found]:
    """Each optimizer over all tasks, the lowest mean place first.

    Whoever did not end a task shares its last place.
    """
    names = list(dict.fromkeys(line["optimizer"] for line in results))
    of: dict[str, Found] = {}
    for name in names:
        of[name] = {"optimizer": name, "places": {}, "among_the_best": 0}
    for task in tasks:
        lines = [line for line in results if line["task"] == task]
        order = [line["optimizer"] for line in ranked(lines)]
        best = leaders(lines)
        for name in names:
            of[name]["places"][task] = (
                order.index(name) + 1 if name in order else len(names)
            )
            of[name]["among_the_best"] += name in best
    for line in of.values():
        line["mean_place"] = statistics.fmean(line["places"].values())
    return sorted(of.values(), key=lambda line: line["mean_place"])
