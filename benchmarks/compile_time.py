"""``benchmarks compile-time``: the first step in a fresh process.

It runs with an empty compile cache, and again with the cache that the first run left on the
disk.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from argparse import Namespace
from typing import Any

from benchmarks import first_step, record, report

ROWS = ("ours", "torch", "optax")
TENSORS = (20, 150, 1000)
TARGET = {"empty cache": 15.0, "warm disk cache": 5.0}


def run(args: Namespace) -> dict[str, Any]:
    result = record.header("compile-time") | {
        "threads": args.threads,
        "limit": args.limit,
        "rows": [],
    }
    cases = [
        (who, n) for n in ((6,) if args.quick else TENSORS) for who in args.rows or ROWS
    ]
    for who, n in report.track(cases, "first steps in fresh processes"):
        result["rows"].append(case(who, n, args.threads[0], args.limit))
    show(result["rows"])
    record.write(args.out / "compile_time.json", result)
    panels = []
    for n in dict.fromkeys(row["tensors"] for row in result["rows"]):
        values = [
            (f"{row['name']}, {key}", row[key]["seconds"])
            for row in result["rows"]
            for key in TARGET
            if "seconds" in row[key]
        ]
        panels.append(
            (
                f"{n} tensors",
                [
                    v
                    for v, row_n in zip(values, _counts(result), strict=True)
                    if row_n == n
                ],
                None,
            )
        )
    report.bars(args.out / "compile_time.png", panels, "first step, seconds")
    return result


def _counts(result: dict[str, Any]) -> list[int]:
    return [
        row["tensors"]
        for row in result["rows"]
        for key in TARGET
        if "seconds" in row[key]
    ]


def case(
    who: str, n: int, threads: int, limit: float, device: str = "cpu"
) -> dict[str, Any]:
    name = first_step.WHO[who].name
    row: dict[str, Any] = {"who": who, "name": name, "tensors": n}
    with tempfile.TemporaryDirectory() as cache:
        env = {
            k: v
            for k, v in os.environ.items()
            if k != "TORCHINDUCTOR_FORCE_DISABLE_CACHES"
        }
        env |= {
            "TORCHINDUCTOR_CACHE_DIR": f"{cache}/inductor",
            "TRITON_CACHE_DIR": f"{cache}/triton",
            "OMP_NUM_THREADS": str(threads),
        }
        env |= {
            "JAX_COMPILATION_CACHE_DIR": f"{cache}/jax",
            "PJRT_NPROC": str(threads),
            "NPROC": str(threads),
        }
        env |= {
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        for key in TARGET:
            row[key] = _first(who, n, threads, limit, device, env)
            if "seconds" not in row[key]:
                row.setdefault("warm disk cache", {"note": "not tried"})
                break
    return row


def _first(
    who: str, n: int, threads: int, limit: float, device: str, env: dict[str, str]
) -> dict[str, Any]:
    command = [
        sys.executable,
        "-m",
        "benchmarks.first_step",
        who,
        str(n),
        str(threads),
        device,
    ]
    try:
        done = subprocess.run(
            command, env=env, capture_output=True, text=True, timeout=limit
        )
    except subprocess.TimeoutExpired:
        return {"note": f"more than {limit:.0f} s"}
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        missing = "ModuleNotFoundError" in last
        return {
            "note": f"not installed ({last.rsplit(' ', 1)[-1]})"
            if missing
            else f"failed: {last[:90]}"
        }
    return json.loads(done.stdout.strip().splitlines()[-1])


def show(found: list[dict[str, Any]]) -> None:
    def cell(entry: dict[str, Any]) -> str:
        return f"{entry['seconds']:.1f}" if "seconds" in entry else entry["note"]

    rows = [
        [row["name"], str(row["tensors"]), *(cell(row[key]) for key in TARGET)]
        for row in found
    ]
    header = [
        "",
        "tensors",
        *(f"{key}, s (to reach: {most:.0f})" for key, most in TARGET.items()),
    ]
    report.table(
        "AdamW: the first step in a fresh process, without imports", header, rows
    )
