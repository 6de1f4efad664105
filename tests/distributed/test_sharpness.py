"""`fo.optim.SAM` on several ranks gives the numbers of one process."""

from __future__ import annotations

import pytest
import sharpness

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("how", ["ddp", "ddp, views", "fsdp"])
def test_it_is_the_run_of_one_process(ranks, how: str) -> None:
    for seen in ranks(2).run(sharpness.run, how):
        assert seen["error"] < 1e-10
        assert seen["apart"] > 1e-3


def test_owners_of_several_ranks_are_refused(ranks) -> None:
    for message in ranks(2).run(sharpness.refused):
        assert "owners=True" in message
