"""The facts without which a result is worth nothing, and the JSON file that holds them.

They are versions, machine, threads, date and command.
"""

import json
import os
import platform
import shlex
import subprocess
import sys
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

PACKAGES = (
    "functorch_opt",
    "torch",
    "optree",
    "triton",
    "jax",
    "jaxlib",
    "optax",
    "torchopt",
    "heavyball",
    "opacus",
    "torchao",
    "bitsandbytes",
    "numpy",
)


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    found["torch"] = torch.__version__  # with its build
    found["functorch_opt"] = found["functorch_opt"] or "from source"
    return found


def commit() -> str | None:
    """Of the working tree the program runs from, if that is a git checkout."""
    folder = Path(__file__).parent
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=folder,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def machine() -> dict[str, Any]:
    facts: dict[str, Any] = {
        "system": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }
    if hasattr(os, "getloadavg"):
        facts["load_before"] = os.getloadavg()[0]
    if torch.cuda.is_available():
        facts |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    return facts


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (
            line.split(":", 1)[1].strip()
            for line in lines
            if line.startswith("model name")
        ),
        platform.processor(),
    )


def header(what: str) -> dict[str, Any]:
    command = f"python -m benchmarks {shlex.join(sys.argv[1:])}"
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return {
        "benchmark": what,
        "command": command,
        "date": now,
        "commit": commit(),
        "machine": machine(),
        "versions": versions(),
    }


def write(path: Path, result: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path
