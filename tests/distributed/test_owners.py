"""Rules that see whole tensors, on sharded ones: each tensor is worked on by one rank.

A sample; `make owners` runs all of it.
"""

from __future__ import annotations

from pathlib import Path

import owners
import pytest

from functorch_opt._core.owners import assigned, work_of

WORLDS = [2, pytest.param(4, marks=pytest.mark.slow)]


def test_the_work_is_shared_out_by_the_shapes() -> None:
    shapes = [
        (4096, 4096),
        (4096, 1024),
        (1024, 4096),
        (4096, 14336),
        (4096,),
        (8, 3, 3, 3),
    ]
    assert assigned(shapes, 2) == [1, 1, 1, 0, 1, 1]
    loads = [0, 0, 0]
    for shape, owner in zip(shapes * 6, assigned(shapes * 6, 3), strict=True):
        loads[owner] += work_of(shape)
    assert max(loads) < 1.01 * min(loads)


@pytest.mark.parametrize("rule", owners.RULES)
@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.slow
def test_work_bytes_and_messages_of_a_step(ranks, world: int, rule: str) -> None:
    """Of 16 matrices of 8 x 4 doubles each rank works on its share. It sends its part of the others'
    once, and the others' parts of its own once; and a number to each, that nothing has failed.
    """
    for seen in ranks(world).run(owners.counted, rule, False):
        mine, each = 16 // world, 8 * 4 * 8
        assert seen["worked"] == mine
        assert seen["messages"] == 2
        assert seen["gathers"] == 0
        there = each // world * (16 - mine)
        back = mine * (each - each // world)
        assert seen["bytes"] == there + back + 8 * (world - 1)


def test_a_stateful_step_does_the_same(ranks) -> None:
    for seen in ranks(2).run(owners.counted, "muon", True):
        assert (seen["worked"], seen["messages"], seen["gathers"]) == (8, 2, 0)
        assert seen["bytes"] == 2 * 8 * 8 * 4 * 8 // 2 + 8


def test_fewer_matrices_than_ranks(ranks) -> None:
    seen = ranks(2).run(owners.fewer_matrices_than_ranks)
    assert [worked for worked, _ in seen] == [1, 1]
    assert max(error for _, error in seen) < 1e-12


@pytest.mark.slow
def test_two_matrices_on_four_ranks(ranks) -> None:
    seen = ranks(4).run(owners.fewer_matrices_than_ranks)
    assert sorted(worked for worked, _ in seen) == [0, 0, 1, 1]
    assert max(error for _, error in seen) < 1e-12


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout",
    [
        "FSDP2",
        "HSDP",
        "columns of tensor parallelism",
        "rows of tensor parallelism",
        "rows of rows",
        "copies",
    ],
)
def test_however_a_mesh_cuts_its_tensors(ranks, layout: str) -> None:
    """Three steps of SOAP for eight matrices on four ranks, two for each."""
    seen = ranks(4).run(owners.laid_out, layout)
    assert sum(worked for worked, _, _ in seen) == 3 * 8
    assert max(worked for worked, _, _ in seen) <= 3 * 3
    assert [gathers for _, gathers, _ in seen] == [0] * 4
    assert max(error for _, _, error in seen) < 1e-12


def test_an_error_of_the_owner_is_raised_on_every_rank(ranks) -> None:
    errors = ranks(2).run(owners.fails_on_the_owner, timeout=60)
    assert sorted(errors) == [
        "RuntimeError: fails_on_the_owner: the rule failed on rank 0.",
        "ValueError: five rows",
    ]


@pytest.mark.parametrize(
    ("kind", "where", "stateful"),
    [
        ("totals", "sharded", False),
        ("totals", "sharded", True),
        ("totals", "owners", False),
        ("totals", "owners", True),
        ("sums", "sharded", False),
        ("sums", "sharded", True),
    ],
)
def test_an_error_in_a_sum_is_raised_on_every_rank(
    ranks, kind: str, where: str, stateful: bool
) -> None:
    """Nobody waits for a message that never comes, and the next step is an ordinary one."""
    seen = ranks(2).run(owners.fails_in_a_sum, kind, where, stateful, timeout=60)
    errors, afterwards = zip(*seen, strict=True)
    assert sum("ValueError: three columns" in error for error in errors) == 1
    assert (
        sum(
            "RuntimeError: fails_in_a_sum: a function in sums or totals failed on another"
            in error
            for error in errors
        )
        == 1
    )
    assert afterwards == ("", "")


# ---- checkpoints ---------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("rule", owners.RUNS)
def test_a_rank_is_killed_and_meshes_of_another_form_go_on(
    ranks, tmp_path: Path, rule: str
) -> None:
    """All go on from the last checkpoint, bit for bit, and on fewer ranks too."""
    (tmp_path / "run").mkdir()
    (tmp_path / "whole").mkdir()
    run, whole = str(tmp_path / "run"), str(tmp_path / "whole")
    train = owners.train
    with pytest.raises(AssertionError, match=r"has died|no answer|closed|reset"):
        ranks(4).run(train, rule, (4,), range(5), run, True, timeout=60)
    assert sorted(x.name for x in (tmp_path / "run").iterdir()) == ["2", "4"]
    expected = ranks(4).run(train, rule, (4,), range(6), whole, False)
    assert ranks(4).run(train, rule, (2, 2), range(6), run, False) == expected
    assert (
        ranks(2).run(train, rule, (2,), range(8), run, False)
        == ranks(4).run(train, rule, (4,), range(8), whole, False)[:2]
    )
    assert (
        ranks(1).run(train, rule, (1,), range(10), run, False)
        == ranks(4).run(train, rule, (2, 2), range(10), whole, False)[:1]
    )


@pytest.mark.slow
def test_a_functional_state_goes_from_four_ranks_to_two_and_to_one(
    ranks, tmp_path: Path
) -> None:
    ranks(4).run(owners.functional, str(tmp_path), True)
    for world in (4, 2, 1):
        assert max(ranks(world).run(owners.functional, str(tmp_path), False)) < 1e-12
