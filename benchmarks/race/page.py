"""What the documentation shows of a race: ``docs/race.json``, the tables of ``docs/race.md``, pictures.

``python -m benchmarks race --page FOLDER`` writes them from ``FOLDER/race.json``.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[2] / "docs"
POINTS = 25
"""Points of a curve in the small copy."""


def compact(result: dict[str, Any]) -> dict[str, Any]:
    """A small copy: four digits, short curves, and no word about the machine but its processor."""
    kept = {name: value for name, value in result.items() if name != "results"}
    lines = []
    for line in result["results"]:
        every = math.ceil(len(line["curve"]) / POINTS) or 1
        shown = line["curve"][::-1][::every][::-1]
        lines.append(line | {"curve": shown})
    kept["machine"] = {
        name: result["machine"][name] for name in ("processor", "cores", "system")
    }
    return _rounded(kept | {"results": lines})


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    return [_rounded(inner) for inner in value] if isinstance(value, list) else value


def written(result: dict[str, Any]) -> str:
    """The copy as text: a line for each pair, so that differences can be read."""
    lines = [json.dumps(line, separators=(",", ":")) for line in result["results"]]
    rest = {name: value for name, value in result.items() if name != "results"}
    head = json.dumps(rest, separators=(",", ":"))[:-1]
    return head + ',\n"results":[\n' + ",\n".join(lines) + "\n]}\n"
