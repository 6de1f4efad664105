"""What the gallery reads of docs/race.json, which ``python -m benchmarks race`` writes.

A rehearsal (``--quick``) says nothing about optimizers, and counts as if there were no file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FILE = Path(__file__).parents[2] / "docs" / "race.json"
TASKS = ("digits-mlp", "text-gpt")
"""The two that the pictures and the table show."""

Curve = tuple[list[float], list[float]]


class Race:
    """The results, by task and optimizer. It may be empty."""

    def __init__(self, file: Path = FILE, rehearsal: bool = False) -> None:
        found: Mapping[str, Any] = json.loads(file.read_text()) if file.exists() else {}
        quick = found.get("protocol", {}).get("quick", False)
        found = {} if quick and not rehearsal else found
        self.found = found
        self.tasks = [task for task in TASKS if task in found.get("tasks", ())]
        results = found.get("results", ())
        self.of = {(line["task"], line["optimizer"]): line for line in results}
        self.places = {line["optimizer"]: line for line in found.get("overall", ())}

    def __bool__(self) -> bool:
        return bool(self.tasks)

    def has(self, optimizer: str) -> bool:
        """Whether it has a curve for each of the tasks that are drawn."""
        lines = [self.of.get((task, optimizer)) for task in self.tasks]
        return bool(lines) and all(line and line["curve"] for line in lines)

    def title(self, task: str) -> str:
        title = str(self.found["tasks"][task]["title"])
        return title[:1].upper() + title[1:]

    def curves(self, task: str) -> dict[str, Curve]:
        """Steps and training losses of every optimizer; a loss that is none is NaN."""
        curves = {}
        for (of_task, optimizer), line in self.of.items():
            if of_task == task and line["curve"]:
                steps, losses = zip(*line["curve"], strict=True)
                losses = [math.nan if loss is None else loss for loss in losses]
                curves[optimizer] = (list(steps), losses)
        return curves

    def steps(self, task: str, optimizer: str) -> int | None:
        """How many steps it took to the target."""
        return self.of.get((task, optimizer), {}).get("steps_to_target")

    def place(self, optimizer: str) -> float | None:
        """The mean of its places in all tasks."""
        return self.places.get(optimizer, {}).get("mean_place")

    def why_not(self, optimizer: str) -> str | None:
        """Why it does not take part."""
        return self.found.get("left_out", {}).get(optimizer)
