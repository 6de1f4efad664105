"""Replicated parameters: DDP, and ZeRO's optimizer, which divides the state of others."""

from __future__ import annotations

import pytest
import scenarios

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", ["AdamW", "clip", "Muon"])
def test_ddp(ranks, name: str) -> None:
    for seen in ranks(2).run(scenarios.ddp, name, False):
        assert seen["error"] < (1e-3 if name == "Muon" else 1e-10)
        assert seen["parameters with state"] == seen["parameters"]


def test_36_zero_redundancy_optimizer(ranks) -> None:
    ours = ranks(2).run(scenarios.ddp, "AdamW", True)
    assert all(seen["error"] < 1e-10 for seen in ours)
    assert sum(seen["parameters with state"] for seen in ours) == ours[0]["parameters"]
    assert all(seen["parameters with state"] for seen in ours)


def test_36_a_consolidated_state_loads(ranks) -> None:
    assert all(ranks(2).run(scenarios.zero_checkpoint))
