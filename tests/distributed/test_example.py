"""`docs/examples/fsdp_train.py`, started as a user starts it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]


def torchrun(ranks: int, *arguments: str) -> str:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={ranks}",
        "docs/examples/fsdp_train.py",
    ]
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "CUDA_VISIBLE_DEVICES": "",
    }
    done = subprocess.run(
        [*command, *arguments],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=90,
    )
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr, done.stderr
    return done.stdout


def losses(out: str) -> dict[int, float]:
    return {
        int(step): float(loss)
        for step, loss in re.findall(
            r"^step +(\d+)  loss (\S+)$", out, flags=re.MULTILINE
        )
    }


def test_the_example_trains_saves_and_goes_on_with_another_number_of_ranks(
    tmp_path: Path,
) -> None:
    options = ["--steps", "12", "--every", "4", "--folder", str(tmp_path)]
    first = torchrun(2, *options)
    assert "ranks: 2, device: cpu, from step 0" in first
    assert 5.0 > losses(first)[4] > losses(first)[8] > losses(first)[12]
    state = [int(n) for n in re.findall(r"\d+", first.rpartition(":")[2])]
    assert len(state) == 2 and max(state) < 0.51 * sum(state)

    shutil.rmtree(tmp_path / "00000012")
    again = torchrun(1, *options, "--compile")
    assert "ranks: 1, device: cpu, from step 8" in again
    assert losses(again) == pytest.approx({12: losses(first)[12]}, abs=2e-3)
