"""torch.distributed.checkpoint with a fresh optimizer, and a state that goes from 4 ranks to 2 and
to 1.
"""

from __future__ import annotations

import pytest
import scenarios

pytestmark = pytest.mark.slow

OPTIONS = [{}, {"flatten_optimizer_state_dict": True}, {"full_state_dict": True}]
options = pytest.mark.parametrize(
    "options", OPTIONS, ids=lambda given: next(iter(given), "plain")
)


@options
@pytest.mark.parametrize("sharded", [False, True], ids=["one", "sharded"])
@pytest.mark.parametrize("name", ["AdamW", "clip", "lamb"])
def test_33_looking_at_a_fresh_optimizer_leaves_it_unchanged(
    ranks, name: str, sharded: bool, options: dict
) -> None:
    """torch's own counts a step then, and trains differently: pytorch#164929."""
    for seen in ranks(2).run(scenarios.fresh_state, name, options, sharded):
        assert seen["same"] and seen["equal"]
        assert seen["counts"] == {0.0}
        assert len(seen["keys"]) >= 9


@options
def test_33_a_masked_transformation_goes_through_strict_functions(
    ranks, options: dict
) -> None:
    for seen in ranks(2).run(scenarios.masked_round_trip, options):
        assert seen["equal"] and seen["moved"] > 0.01


@pytest.mark.parametrize("name", ["AdamW", "clip", "lamb", "Muon"])
def test_saved_on_four_ranks_loaded_on_two_and_on_one(ranks, tmp_path, name: str) -> None:
    ranks(4).run(scenarios.save, name, str(tmp_path), 3)
    for world in (2, 1):
        for error in ranks(world).run(scenarios.load, name, str(tmp_path), 3):
            assert error < (1e-3 if name == "Muon" else 1e-10)


def test_a_functional_state_saved_on_four_ranks_and_loaded_on_two(
    ranks, tmp_path
) -> None:
    ranks(4).run(scenarios.functional_save, str(tmp_path))
    assert max(ranks(2).run(scenarios.functional_load, str(tmp_path))) < 1e-12


def test_state_is_divided_among_ranks(ranks) -> None:
    """Two moments in float32, of 1,024 x 1,024 weights, and a step."""
    for world in (1, 2, 4):
        assert (
            ranks(world).run(scenarios.bytes_of_state)
            == [2 * 4 * 1024 * 1024 // world + 4] * world
        )
