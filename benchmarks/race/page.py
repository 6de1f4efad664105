"""What the documentation shows of a race: ``docs/race.json``, the tables of ``docs/race.md``, pictures.

``python -m benchmarks race --page FOLDER`` writes them from ``FOLDER/race.json``.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.race import tables

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
    kept["machine"] = {name: result["machine"][name] for name in ("processor", "cores")}
    kept["versions"] = {name: v for name, v in result["versions"].items() if v}
    quick = " --quick" if result["protocol"]["quick"] else ""
    kept["command"] = f"python -m benchmarks race{quick} --out FOLDER"
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


# ---- the page ------------------------------------------------------------------------------------

BEGIN, END = "<!-- results: from docs/race.json -->", "<!-- end of the results -->"
FIRST = 12
"""Lines of a table of a task."""


def rendered(result: dict[str, Any]) -> str:
    """The results as they stand in docs/race.md."""
    parts = [_facts(result), "### All tasks", _said_overall(result)]
    head, rows = tables.overall(result)
    parts.append(_table(head, rows))
    for task, about in result["tasks"].items():
        parts += [f"### {_capital(about['title'])}", _said_task(result, task)]
        rows = tables.of_task(result, task, FIRST)
        parts.append(_table(list(tables.TASK), rows))
    parts.append(_failed(result))
    return "\n\n".join([part for part in parts if part]) + "\n"


def _facts(result: dict[str, Any]) -> str:
    versions = result["versions"]
    known = ", ".join(f"{name} {versions[name]}" for name in ("torch", "python"))
    machine = result["machine"]
    facts = (
        f"`{result['command']}`, {result['date'][:10]}, {known}, {machine['processor']}, "
        f"{machine['cores']} cores, {result['cpu_seconds'] / 60:.0f} minutes of one core. "
        "Not measured on a GPU."
    )
    if not result["protocol"]["quick"]:
        return facts
    warning = (
        "**These are figures of a rehearsal (`--quick`) with a dozen steps: no results.**"
    )
    return f"{warning}\n\n{facts}"


def _said_overall(result: dict[str, Any]) -> str:
    number, tasks = len(result["overall"]), len(result["tasks"])
    return (
        f"{number} optimizers on {tasks} tasks, in the order of their mean place by held-out loss. "
        f"{tables.MARK}: the best of the task, or one that the spread over seeds does not tell from "
        "it. Neighbours in this table are mostly not told apart."
    )


def _said_task(result: dict[str, Any], task: str) -> str:
    about = result["tasks"][task]
    train, validation, test = about["examples"]
    target = about["target"]
    aim = "" if target is None else f" Target: a training loss of {target:.3g}."
    return (
        f"{tables.verdict(result, task)} {about['parameters']:,} parameters, {about['steps']} steps "
        f"of {about['batch']} examples; {train:,} to train, {validation} to choose, {test} held "
        f"out.{aim}"
    )


def _failed(result: dict[str, Any]) -> str:
    if not result["failed"]:
        return ""
    lines = [f"- {x['optimizer']} on {x['task']}: {x['error']}" for x in result["failed"]]
    return "\n".join(["### Failed", "", *lines])


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _table(head: list[str], rows: list[list[str]]) -> str:
    rule = ["---", *["--:"] * (len(head) - 1)]
    return "\n".join([f"| {' | '.join(line)} |" for line in (head, rule, *rows)])


def updated(page: str, result: dict[str, Any]) -> str:
    """The page with these results between its two marks."""
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n\n{rendered(result)}\n{END}{after}"


def write(result: dict[str, Any], docs: Path = DOCS) -> None:
    """The copy, the page and the pictures."""
    from benchmarks.race import pictures  # needs matplotlib

    copy = compact(result)
    (docs / "race.json").write_text(written(copy))
    page = docs / "race.md"
    page.write_text(updated(page.read_text(), copy))
    files = [docs / "race.json", page, *pictures.draw(copy, docs / "pictures")]
    for file in files:
        report.say(f"Written: {file}")
