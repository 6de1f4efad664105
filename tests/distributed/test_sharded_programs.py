"""The law over random transformations, on two ranks: sharded tensors give what whole ones give."""

from __future__ import annotations

import os
import random

import pytest
import scenarios

pytestmark = pytest.mark.slow

BEGIN = int(os.environ.get("FO_SEED") or random.SystemRandom().randrange(10**6, 10**9))


@pytest.mark.parametrize("first", [30_000, 30_060, BEGIN])
def test_programs_on_two_ranks(ranks, first: int) -> None:
    """Those of sixty seeds that are made of what takes sharded tensors. Where the last sixty begin is
    drawn for the run, or FO_SEED sets it.
    """
    seeds = [*range(first, first + 60)]
    for checked, failures in ranks(2).run(
        scenarios.programs_on_shards, seeds, timeout=300
    ):
        assert checked > 20
        if failures:
            pytest.fail(
                f"FO_SEED={first}\n\n{len(failures)} failures; the first is\n\n{failures[0]}",
                pytrace=False,
            )


@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("name", scenarios.PASSES)
def test_where_a_pass_ends_on_two_ranks(ranks, name: str, layout: str) -> None:
    """What was once divided between two passes, and a message that ranks gave different dtypes."""
    assert max(ranks(2).run(scenarios.passes_on_shards, name, layout)) < 1e-6
