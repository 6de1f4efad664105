"""Check many random programs: ``python tests/fuzz.py [--count N] [--seed FIRST] [--executions
eager|dynamo|inductor|all|sharded]``.

Prints each failing seed with the smallest program found that fails in the same way, and at the end
how often what failed. The exit status is 1 if anything did. The sharded executions run on two
ranks, each of which has every tensor of the program in some layout.
"""

from __future__ import annotations

import argparse
import collections
import gc
import os
import sys
import time
from pathlib import Path

import torch
from executions import DYNAMO, EAGER, INDUCTOR, LIVES, Unfit, check, smallest
from programs import program

SETS = {"eager": EAGER | LIVES, "dynamo": DYNAMO, "inductor": INDUCTOR}
SETS["all"] = EAGER | LIVES | DYNAMO | INDUCTOR


sys.path.insert(0, str(Path(__file__).parent / "distributed"))
PIECE = 50
"""How many programs two ranks are given at once."""


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--count", type=int, default=10_000)
    arguments.add_argument("--seed", type=int, default=int(os.environ.get("FO_SEED", 0)))
    arguments.add_argument("--executions", choices=[*SETS, "sharded"], default="eager")
    arguments.add_argument(
        "--show", type=int, default=5, help="how many failures to show in full"
    )
    given = arguments.parse_args()
    torch.set_num_threads(1)
    if given.executions == "sharded":
        return on_two_ranks(given.seed, given.count)
    failed: dict[tuple[str, str], list[int]] = collections.defaultdict(list)
    unfit, began = 0, time.monotonic()
    for k in range(given.count):
        seed = given.seed + k
        try:
            failures = check(program(seed), [*SETS[given.executions]])
        except Unfit:
            unfit += 1
            continue
        for failure in failures:
            kind = failure.execution, failure.kind
            failed[kind].append(seed)
            if len(failed[kind]) == 1 and len(failed) <= given.show:
                print(f"FO_SEED={seed}\n\n{smallest(failure)}\n{'=' * 100}", flush=True)
        if k % 50 == 49:
            torch._dynamo.reset()
            gc.collect()
        if k % 500 == 499:
            bad = len({seed for seeds in failed.values() for seed in seeds})
            print(
                f"{k + 1} programs in {time.monotonic() - began:.0f} s, {bad} failed",
                flush=True,
            )
    for (execution, kind), seeds in sorted(failed.items(), key=lambda row: -len(row[1])):
        print(
            f"{len(seeds):6} {execution}: {kind}; seeds {', '.join(map(str, seeds[:8]))}"
        )
    print(
        f"{given.count} programs from seed {given.seed} on, {unfit} of them not to be compared"
    )
    return int(bool(failed))


def on_two_ranks(first: int, count: int) -> int:
    """Those of the programs that are made of what takes sharded tensors."""
    import scenarios
    from ranks import Ranks

    ranks, checked, failed, began = Ranks(2), 0, 0, time.monotonic()
    for k in range(0, count, PIECE):
        seeds = [*range(first + k, first + min(k + PIECE, count))]
        number, failures = ranks.run(scenarios.programs_on_shards, seeds, timeout=600)[0]
        checked, failed = checked + number, failed + len(failures)
        for failure in failures[:2]:
            print(f"{failure}\n{'=' * 100}")
        if (k // PIECE) % 10 == 9:
            spent = time.monotonic() - began
            print(f"{checked} programs in {spent:.0f} s, {failed} differ", flush=True)
    ranks.stop()
    print(f"{checked} programs from seed {first} on, on two ranks: {failed} differ")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
