"""``python -m benchmarks cpu|compile-time|memory|many-models|gpu``: a table here; a picture and a JSON file in the folder of ``--out``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from benchmarks import report


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True)
    cpu = commands.add_parser("cpu", help="step times on the CPU")
    cpu.add_argument("--threads", type=int, nargs="+", default=[1], help="each in a process of its own (default: 1)")
    cpu.add_argument("--rounds", type=int, default=21)
    cpu.add_argument("--limit", type=float, default=300, help="seconds that a contender may take to get ready (default: 300)")
    first = commands.add_parser("compile-time", help="the first step in a fresh process")
    first.add_argument("--threads", type=int, nargs=1, default=[2])
    first.add_argument("--limit", type=float, default=400, help="seconds for a first step (default: 400)")
    memory = commands.add_parser("memory", help="what a step allocates")
    memory.add_argument("--threads", type=int, nargs=1, default=[1])
    many = commands.add_parser("many-models", help="a training step of many small models, vmapped and in a loop")
    many.add_argument("--threads", type=int, nargs=1, default=[1])
    many.add_argument("--rounds", type=int, default=11)
    gpu = commands.add_parser("gpu", help="correctness and step times on a GPU")
    gpu.add_argument("--device", default="cuda", help="cpu for a rehearsal without events (default: cuda)")
    gpu.add_argument("--rounds", type=int, default=21)
    for command in (cpu, first, memory, many, gpu):
        command.add_argument("--rows", nargs="+", metavar="ROW", help="only these (default: all)")
        command.add_argument("--quick", action="store_true", help="tiny shapes, few rounds: a rehearsal, no measurement")
        command.add_argument("--out", type=Path, default=Path("benchmark_output"), help="folder (default: %(default)s)")
    return top


def main(argv: list[str] | None = None) -> dict[str, Any]:
    top = parser()
    args = top.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.command == "cpu":
        from benchmarks import cpu as command
    elif args.command == "compile-time":
        from benchmarks import compile_time as command
    elif args.command == "memory":
        from benchmarks import memory as command
    elif args.command == "many-models":
        from benchmarks import many_models as command
    else:
        from benchmarks import gpu as command
    known = [*command.ROWS, *([command.PYTHON] if hasattr(command, "PYTHON") else [])]
    if unknown := [row for row in args.rows or [] if row not in known]:
        top.error(f"no row {', '.join(unknown)} in {args.command}: there are {', '.join(known)}")
    report.tables.clear()
    result = command.run(args)
    machine, versions = result["machine"], {name: version for name, version in result["versions"].items() if version}
    facts = {"command": f"`{result['command']}`", "date": result["date"], "commit": result["commit"]}
    facts |= {"machine": ", ".join(f"{name} {value}" for name, value in machine.items())}
    facts |= {"versions": ", ".join(f"{name} {value}" for name, value in versions.items())}
    file = args.out / args.command.replace("-", "_")
    report.markdown(file.with_suffix(".md"), facts)
    report.say(f"Numbers: {file.with_suffix('.json')}; tables in Markdown: {file.with_suffix('.md')}")
    return result


def wrong(result: dict[str, Any]) -> list[str]:
    """What of ours failed, or computed other numbers."""
    entries = [(row, name, entry) for row in result["rows"] for name, entry in row.get("results", {row.get("name"): row}).items()]
    return [
        f"{row.get('title', '')}: {name}: {entry['note']}"
        for row, name, entry in entries
        if str(name).startswith("functorch_opt") and str(entry.get("note", "")).startswith(("failed", "DIFFERENT"))
    ]


if __name__ == "__main__":
    sys.exit("\n".join(wrong(main())) or 0)
