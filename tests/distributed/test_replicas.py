"""Replicated parameters with owners: each is stepped by one rank, as in ZeRO."""

from __future__ import annotations

from pathlib import Path

import pytest
import replicas
import scenarios
import torch
from parity_page import assert_near, compares
from registry import ROWS
from scenarios import values

import functorch_opt as fo
from functorch_opt.codecs.codec import CODECS

BYTES = 8 * sum(p.numel() for p in scenarios.make_net().parameters())
"""Bytes of the parameters of the small network."""
REFUSED = {
    "lbfgs",
    "scale_by_lbfgs",
    *("scale_by_backtracking_linesearch", "scale_by_zoom_linesearch"),
    *("differentially_private_aggregate", "dp_adam", "dpsgd"),
}
"""What needs all parameters on one rank, or cut, or gradients of examples in front of it."""


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [row.name for row in ROWS if row.shards and row.name not in REFUSED],
)
def test_every_row_gives_the_numbers_of_one_process(ranks, name: str) -> None:
    """Updates, parameters and the whole state, to rounding."""
    for errors in ranks(2).run(replicas.row_with_owners, name):
        assert max(errors.values()) < 1e-12, errors


@pytest.mark.parametrize(
    "name",
    ["clip", *[pytest.param(n, marks=pytest.mark.slow) for n in scenarios.OURS]],
)
def test_a_run_under_ddp_is_that_of_one_process(ranks, name: str) -> None:
    everybody = ranks(2).run(replicas.trajectory, name, False)
    check(everybody, name, 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["AdamW", "lamb", "Muon"])
def test_a_run_on_four_ranks(ranks, name: str) -> None:
    check(ranks(4).run(replicas.trajectory, name, False), name, 4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["AdamW", "clip", "lamb", "Muon"])
def test_compiled(ranks, name: str) -> None:
    check(ranks(2).run(replicas.trajectory, name, True), name, 2)


def check(everybody: list[dict], name: str, world: int) -> None:
    """The numbers are those of one process, and nothing is done or kept twice."""
    tensorwise = name in ("centralize", "Muon", "Adafactor")
    matrices = {"centralize": 9, "Muon": 3, "Adafactor": 3}.get(name, 0)
    buckets = 2 if name == "Muon" else 1
    for seen in everybody:
        assert seen["error"] < (1e-3 if name == "Muon" else 1e-10)
        assert seen["alike"]
        assert seen["messages"] == buckets + tensorwise
    kept = {seen["numbers of one process"] for seen in everybody}
    assert sum(seen["numbers"] for seen in everybody) in kept | {
        numbers + 9
        for numbers in kept  # the products of NAdam, one for each parameter
    }
    assert sum(seen["worked"] for seen in everybody) == matrices
    # Each owner sends its parameters to the others, and each rank a number with each message.
    flags = 8 * (buckets + tensorwise) * (world - 1)
    sent = sum(seen["bytes"] - flags for seen in everybody)
    assert sent == BYTES * (world - 1)
    assert max(seen["bytes"] for seen in everybody) < 0.7 * sent


@compares("with_owners", reference="torch.optim", remark="on 2 ranks")
@pytest.mark.parametrize("decay", [0.0, 0.01, 0.1, 0.5])
def test_a_functional_training_is_torchs(ranks, decay: float) -> None:
    twins = [torch.nn.Parameter(values(0)[name]) for name in sorted(values(0))]
    theirs = torch.optim.AdamW(twins, lr=0.01, weight_decay=decay)
    for step in range(1, 101):
        for name, p in zip(sorted(values(step)), twins, strict=True):
            p.grad = values(step)[name]
        theirs.step()
    for ours in ranks(2).run(replicas.trained, decay):
        for x, p in zip(ours, twins, strict=True):
            assert_near(x, p.tolist())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["AdamW", "Muon"])
def test_saved_on_four_ranks_loaded_on_two_and_on_one(
    ranks, tmp_path: Path, name: str
) -> None:
    ranks(4).run(replicas.save, name, str(tmp_path), 3)
    for world in (2, 1):
        for error in ranks(world).run(replicas.load, name, str(tmp_path), 3):
            assert error < (1e-3 if name == "Muon" else 1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["AdamW", "Muon", "NAdam"])
def test_whole_checkpoints_go_to_one_process_and_back(ranks, name: str) -> None:
    for seen in ranks(2).run(replicas.whole_checkpoint, name):
        assert seen["plain"] and seen["equal"] and seen["moved"] > 0.01
        assert seen["error"] < (1e-3 if name == "Muon" else 1e-10)


def test_a_group_that_comes_later(ranks) -> None:
    assert max(ranks(2).run(replicas.a_group_comes_later)) < 1e-12


def test_averages_and_reports(ranks) -> None:
    assert max(ranks(2).run(replicas.averages)) < 1e-12
    for n, error in ranks(2).run(replicas.looked_at):
        assert n > 30 and error < 1e-12


@pytest.mark.parametrize(
    ("kind", "stateful"),
    [("elementwise", False), ("tensorwise", False), ("tensorwise", True)],
)
def test_an_error_of_an_owner_is_raised_on_every_rank(
    ranks, kind: str, stateful: bool
) -> None:
    """Also where messages come after it: nobody waits for one that never comes."""
    errors = ranks(2).run(replicas.a_rule_fails, kind, stateful, timeout=60)
    assert sum(error == "ValueError: five rows" for error in errors) == 1
    assert sum("failed on rank" in error for error in errors) == 1


def test_an_error_of_a_step_that_is_worked_out_first(ranks) -> None:
    errors, unchanged = zip(
        *ranks(2).run(replicas.a_whole_step_fails, timeout=60), strict=True
    )
    assert sum(error == "ValueError: fifty rows" for error in errors) == 1
    assert sum("failed on rank" in error for error in errors) == 1
    assert all(unchanged)


@pytest.mark.parametrize("code", CODECS)
def test_owners_keep_the_codes_of_one_process(ranks, code: str) -> None:
    """To the bit; and so do the steps of the stateful optimizers."""
    assert ranks(2).run(replicas.coded, code) == [{}, {}]
    assert ranks(2).run(replicas.coded_step, code, False) == [{}, {}]


@pytest.mark.slow
@pytest.mark.parametrize("code", ["8bit", "4bit"])
def test_owners_keep_codes_in_a_compiled_step(ranks, code: str) -> None:
    for seen in ranks(2).run(replicas.coded_step, code, True):
        assert max(seen.values(), default=0) == 0


def test_what_it_cannot_do_is_an_error(ranks) -> None:
    derivative, no_params, function, memory = ranks(2).run(replicas.refused)[0]
    assert "TypeError: scale_by_lbfgs takes no parameters with owners" in memory
    assert "NotImplementedError: with_owners: no derivative" in derivative
    assert "ValueError: with_owners needs the parameters" in no_params
    assert "TypeError: with_owners: value_fn is a function" in function


def test_in_one_process_nothing_is_divided() -> None:
    ps = {"w": torch.tensor([2.0, -1.0]), "b": torch.tensor(0.5)}
    tx = fo.adamw(0.1)
    ours = fo.with_owners(tx)
    assert str(ours.init(ps)) == str(tx.init(ps))
    found, _ = ours.update(ps, ours.init(ps), ps)
    expected, _ = tx.update(ps, tx.init(ps), ps)
    assert all(torch.equal(found[n], u) for n, u in expected.items())
    with pytest.raises(TypeError, match="with_owners takes a transformation"):
        fo.with_owners(fo.adamw)  # type: ignore[arg-type]
