"""``python -m benchmarks COMMAND`` prints a table.

It writes a picture, a JSON file and tables in Markdown into the folder of ``--out``.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path
from typing import Any

from benchmarks import race, report

COMMANDS: dict[str, tuple[str, str, int | None]] = {
    "cpu": ("cpu", "step times on the CPU", 21),
    "compile-time": ("compile_time", "the first step in a fresh process", None),
    "memory": ("memory", "what a step allocates", None),
    "random": (
        "random_numbers",
        "random numbers from a key, beside torch's generator",
        21,
    ),
    "many-models": (
        "many_models",
        "a training step of many small models, vmapped and in a loop",
        11,
    ),
    "per-example": (
        "per_example",
        "clipped sums of per-example gradients, beside Opacus",
        7,
    ),
    "through": ("through", "derivatives through training, beside torchopt", 21),
    "fewer-steps": (
        "fewer_steps",
        "steps that Muon and SOAP need for the loss that AdamW reaches",
        None,
    ),
    "monitor": ("monitored", "what a monitor of layers costs of a training step", 21),
    "codecs": ("codecs", "bytes, time and loss with slots in fewer bytes", None),
    "race": ("race", "every optimizer at its own best settings, on six tasks", None),
    "gpu": ("gpu", "correctness and step times on a GPU", 21),
}
"""The module, what it measures, and in how many rounds."""


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True)
    of = {
        name: commands.add_parser(name, help=what)
        for name, (_, what, _) in COMMANDS.items()
    }
    for name, command in of.items():
        rounds = COMMANDS[name][2]
        if rounds:
            command.add_argument("--rounds", type=int, default=rounds)
        if name not in ("cpu", "gpu"):
            command.add_argument(
                "--threads",
                type=int,
                nargs=1,
                default=[2 if name == "compile-time" else 1],
            )
        command.add_argument(
            "--rows", nargs="+", metavar="ROW", help="only these (default: all)"
        )
        command.add_argument(
            "--quick",
            action="store_true",
            help="tiny shapes, few rounds: a rehearsal, no measurement",
        )
        command.add_argument(
            "--out",
            type=Path,
            default=Path("benchmark_output"),
            help="folder (default: %(default)s)",
        )
    of["cpu"].add_argument(
        "--threads",
        type=int,
        nargs="+",
        default=[1],
        help="each in a process of its own (default: 1)",
    )
    of["cpu"].add_argument(
        "--limit",
        type=float,
        default=300,
        help="seconds that a contender may take to get ready (default: 300)",
    )
    of["compile-time"].add_argument(
        "--limit", type=float, default=400, help="seconds for a first step (default: 400)"
    )
    of["per-example"].add_argument(
        "--sizes",
        type=int,
        nargs="+",
        default=[64, 256, 1024],
        help="of the batch (default: 64 256 1024)",
    )
    of["gpu"].add_argument(
        "--device",
        default="cuda",
        help="cpu for a rehearsal without events (default: cuda)",
    )
    of["gpu"].add_argument(
        "--short",
        action="store_true",
        help="two minutes, for after tuning: few rows, contenders and rounds",
    )
    race.arguments(of["race"])
    return top


def main(argv: list[str] | None = None) -> dict[str, Any]:
    top = parser()
    args = top.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    command: Any = importlib.import_module(f"benchmarks.{COMMANDS[args.command][0]}")
    known = [*command.ROWS, *([command.PYTHON] if hasattr(command, "PYTHON") else [])]
    if unknown := [row for row in args.rows or [] if row not in known]:
        top.error(
            f"no row {', '.join(unknown)} in {args.command}: there are {', '.join(known)}"
        )
    report.tables.clear()
    result = command.run(args)
    if "machine" not in result:  # nothing was measured
        return result
    machine, versions = (
        result["machine"],
        {name: version for name, version in result["versions"].items() if version},
    )
    facts = {
        "command": f"`{result['command']}`",
        "date": result["date"],
        "commit": result["commit"],
    }
    facts |= {"machine": ", ".join(f"{name} {value}" for name, value in machine.items())}
    facts |= {
        "versions": ", ".join(f"{name} {value}" for name, value in versions.items())
    }
    file = args.out / args.command.replace("-", "_")
    report.markdown(file.with_suffix(".md"), facts)
    report.say(
        f"Numbers: {file.with_suffix('.json')}; tables in Markdown: {file.with_suffix('.md')}"
    )
    return result


def wrong(result: dict[str, Any]) -> list[str]:
    """Our contenders that failed, or computed other numbers, and checks that raised an error."""
    checks = result.get("check", {}).get("found", ())
    failed = [entry for entry in checks if "error" in entry]
    entries = [
        (row, name, entry)
        for row in result["rows"]
        for name, entry in row.get("results", {row.get("name"): row}).items()
    ]
    of_examples = result.get("per_example", {})
    entries.append(({"title": "per-example"}, "functorch_opt", of_examples))
    return [
        f"check of {entry['name']}, {entry['dtype']}: {entry['error']}"
        for entry in failed
    ] + [
        f"{row.get('title', '')}: {name}: {entry['note']}"
        for row, name, entry in entries
        if str(name).startswith("functorch_opt")
        and str(entry.get("note", "")).startswith(("failed", "DIFFERENT"))
    ]


if __name__ == "__main__":
    sys.exit("\n".join(wrong(main())) or 0)
