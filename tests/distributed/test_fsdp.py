"""Sharded parameters: FSDP2's, and DTensors of any layout. The numbers are those of one process."""

from __future__ import annotations

import pytest
import scenarios
from registry import ROWS

pytestmark = pytest.mark.slow

RUNS = [
    *[(name, 2, "mixed") for name in scenarios.OURS],
    *[(name, 4, "all") for name in scenarios.OURS],
    *[(name, 4, "hybrid") for name in ("clip", "lamb", "Muon")],
    ("AdamW", 2, "all"),
]


@pytest.mark.parametrize(("name", "world", "how"), RUNS)
def test_34_a_sharded_run_is_the_run_of_one_process(
    ranks, name: str, world: int, how: str
) -> None:
    """AdamW against torch's own in one process; the others against theirs, which have their own
    tests.
    """
    everybody = ranks(world).run(scenarios.trajectory, name, how, False)
    for seen in everybody:
        check(seen, name)
    assert how == "mixed" or world == 2 or any(seen["empty"] for seen in everybody), (
        "on 4 ranks some tensors have no part on some rank"
    )


def check(seen: dict, name: str) -> None:
    # Newton-Schulz is in bfloat16: where a gradient is rounded otherwise, the update differs in its
    # third digit.
    assert seen["error"] < (1e-3 if name == "Muon" else 1e-10)
    assert seen["moved"] > 1e-4
    # Moments lie where their parameter does; what Muon and Adafactor keep of whole matrices, with
    # the owner of the matrix.
    assert all(
        same == (key not in ("row_var", "col_var", "momentum_buffer"))
        for key, same in seen["placements"].items()
    ), seen["placements"]
    assert seen["steps"] == [scenarios.STEPS]


def test_a_look_at_a_sharded_step_is_that_of_one_process(ranks) -> None:
    for seen in ranks(2).run(scenarios.looked_at):
        assert len(seen) > 30
        assert max(seen.values()) < 1e-10


@pytest.mark.parametrize("name", ["AdamW", "clip", "lamb", "Muon", "centralize"])
def test_compiled_and_sharded(ranks, name: str) -> None:
    for seen in ranks(2).run(scenarios.trajectory, name, "all", True):
        check(seen, name)
        assert seen["compiled"]


@pytest.mark.parametrize("name", ["clip", "lamb", "lamb, master", "Adafactor"])
def test_compiled_and_partly_sharded(ranks, name: str) -> None:
    for seen in ranks(2).run(scenarios.trajectory, name, "mixed", True):
        check(seen, name)
        assert seen["compiled"]


def test_the_functional_update_can_be_compiled(ranks) -> None:
    """There is no graph break. It compiles twice: torch looks at which tensors share their
    placements, and after the first step state and params do not.
    """
    assert ranks(2).run(scenarios.in_a_graph) == [(2, 0.0)] * 2


@pytest.mark.parametrize("max_norm", [0.05, 1e6])
def test_35_clipping_is_torchs_clip_grad_norm(ranks, max_norm: float) -> None:
    for seen in ranks(2).run(scenarios.norm_and_clip, max_norm):
        assert seen["ours"] == pytest.approx(
            seen["torchs"], rel=2e-4 if max_norm < 1 else 1e-12
        )
        assert min(seen["ours"]) > 0.05
        assert seen["error"] < (
            1e-5 if max_norm < 1 else 1e-12
        )  # torch divides by norm + 1e-6


@pytest.mark.parametrize("name", [row.name for row in ROWS if row.shards])
@pytest.mark.parametrize("world", [2, 4])
def test_every_row_takes_sharded_tensors(ranks, world: int, name: str) -> None:
    for errors in ranks(world).run(scenarios.row_on_shards, name):
        assert max(errors.values()) < 1e-12, errors


@pytest.mark.parametrize("name", [row.name for row in ROWS if not row.shards])
def test_what_takes_no_sharded_tensors_says_so(ranks, name: str) -> None:
    with pytest.raises(AssertionError, match=r"takes no sharded tensors \(DTensor\)"):
        ranks(2).run(scenarios.row_on_shards, name)


@pytest.mark.parametrize("world", [2, 4])
def test_gradients_that_are_still_to_be_summed(ranks, world: int) -> None:
    assert max(ranks(world).run(scenarios.sums_not_taken)) < 1e-12


def test_derivatives_go_through_sharded_updates(ranks) -> None:
    assert max(ranks(2).run(scenarios.differentiated)) < 1e-12


def test_ordinary_and_sharded_tensors_at_one_place_are_an_error(ranks) -> None:
    for errors in ranks(2).run(scenarios.misplaced):
        assert len(errors) == 6
        assert all(
            "'w' is a" in error and "DTensor" in error and "ordinary tensor" in error
            for error in errors
        ), errors


def test_an_error_on_one_rank_fails_the_test(ranks) -> None:
    with pytest.raises(AssertionError, match=r"rank 1 of 2(?s:.)*only here"):
        ranks(2).run(scenarios.fail_on_one_rank)


def test_a_rank_that_hangs_fails_the_test(ranks) -> None:
    with pytest.raises(AssertionError, match=r"no answer from ranks \[0\]"):
        ranks(2).run(scenarios.hang_on_one_rank, timeout=10)
