"""Slots in a code, of sharded parameters: the codes and scales are those of one process, to the bit."""

from __future__ import annotations

import codes
import pytest

from functorch_opt.codecs.codec import CODECS

pytestmark = pytest.mark.slow

RUNS = [
    *[(2, name, "rows") for name in codes.CHAINS],
    (2, "adamw", "columns"),
    (2, "adamw", "copies"),
    (4, "adamw", "rows, columns"),
    (4, "adamw", "rows, cut twice"),
    (4, "every other", "copies of columns"),
    (4, "whole tensors", "rows, columns"),
]


OTHERS = [
    (2, "adamw", "rows"),
    (2, "sums", "rows"),
    (4, "adamw", "rows, cut twice"),
    (4, "lion", "rows, columns"),
    (4, "whole tensors", "rows, columns"),
]
"""What other codes than 8 bits go through."""
ALL = [
    *[(*run, "8bit") for run in RUNS],
    *[(*run, code) for code in CODECS if code != "8bit" for run in OTHERS],
    (2, "adamw", "columns", "4bit"),
]


@pytest.mark.parametrize(("world", "name", "layout", "code"), ALL)
def test_shards_have_the_codes_of_whole_tensors(
    ranks, world: int, name: str, layout: str, code: str
) -> None:
    for seen in ranks(world).run(codes.three_steps, name, layout, code):
        assert seen["coded"] >= 3
        assert seen["update"] == {}
        # In place an ordinary float32 tensor may go through other operations, and round otherwise.
        assert max(seen["in place"].values(), default=0.0) < 1e-6
        assert not any("scale/" in key for key in seen["in place"])


def test_a_block_with_a_nan_has_no_finite_number(ranks) -> None:
    for seen in ranks(2).run(codes.with_nan):
        assert all(ours == theirs for ours, theirs in seen), seen
        assert sum(ours >= 256 for ours, _ in seen) >= 4


@pytest.mark.parametrize(
    ("name", "messages"), [("adamw", 1), ("lion", 1), ("one slot of two", 1), ("sums", 2)]
)
def test_the_ranks_send_one_message_for_all_tensors(
    ranks, name: str, messages: int
) -> None:
    """And another one before it for sums."""
    for seen in ranks(2).run(codes.what_is_sent, name):
        assert sum(seen.values()) == messages, seen


def test_codes_lie_with_the_parameter_and_scales_on_every_rank(ranks) -> None:
    seen = ranks(2).run(codes.where_it_lies)
    assert all(found["codes"] and found["scales"] for found in seen)
    assert [found["bytes"] for found in seen] == [19 * 45, 18 * 45]


def test_in_a_graph_it_is_an_error(ranks) -> None:
    for error in ranks(2).run(codes.in_a_graph):
        assert "slots in a code of sharded parameters cannot be in a graph" in error


@pytest.mark.parametrize("code", CODECS)
def test_checkpoints_of_float32_are_converted(ranks, code: str) -> None:
    assert ranks(2).run(codes.recoded, code) == [{}, {}]


def test_half_a_byte_is_an_error(ranks) -> None:
    for error in ranks(2).run(codes.half_a_byte):
        assert "a slot at 'layer/w' cannot be stored as '4bit'" in error
        assert "(8, 46), and the ranks have [23] elements of its last dim" in error


@pytest.mark.parametrize(
    ("world", "code"), [(2, "8bit"), *[(4, code) for code in CODECS]]
)
def test_under_fsdp_a_step_is_that_of_one_process(ranks, world: int, code: str) -> None:
    for seen in ranks(world).run(codes.under_fsdp, "AdamW", False, code):
        assert seen["coded"] == 4
        assert seen["differ"] == {}
        assert seen["warned"] == []


@pytest.mark.parametrize("code", CODECS)
def test_under_fsdp_owners_keep_codes(ranks, code: str) -> None:
    for seen in ranks(2).run(codes.under_fsdp, "Muon", False, code):
        assert seen["coded"] == 2
        assert seen["differ"] == {}


def test_what_is_not_compiled_is_said_once(ranks) -> None:
    for seen in ranks(2).run(codes.under_fsdp, "AdamW", True):
        (warning,) = seen["warned"]
        assert "scale_by_adam has slots in a code, of sharded parameters" in warning


def test_under_tensor_parallelism(ranks) -> None:
    for seen in ranks(2).run(codes.tensor_parallel):
        assert seen["coded"] == 4
        assert seen["codes"] <= 1
        assert seen["parameters"] < 1e-9


@pytest.mark.parametrize(
    ("name", "code"),
    [
        *[("AdamW", code) for code in CODECS],
        ("Muon", "8bit"),
        ("Muon", "4bit"),
    ],
)
def test_saved_on_four_ranks_loaded_on_two_and_on_one(
    ranks, tmp_path, name: str, code: str
) -> None:
    ranks(4).run(codes.save, name, str(tmp_path), code)
    for world in (2, 1):
        assert ranks(world).run(codes.load, name, str(tmp_path), code) == [{}] * world
