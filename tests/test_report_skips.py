"""Steps that are left out: a look says at which stage, how often so far, and why."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import functorch_opt as fo

GOOD, BAD, LARGE = (torch.tensor([x, 1.0]) for x in (2.0, float("nan"), 100.0))


def too_large(updates, gradient_step, params):
    return fo.skip_large_updates(updates, gradient_step, params, 50.0)


def thirds(step):
    return step % 3 == 0


CASES = {
    "finite": (
        fo.apply_if_finite(fo.sgd(0.1), 1),
        "apply_if_finite/not_finite",
        [(GOOD, 0, 0), (BAD, 1, 1), (GOOD, 0, 1), (BAD, 1, 2), (BAD, 0, 2), (GOOD, 0, 2)],
    ),
    "skip_not_finite": (
        fo.MultiSteps(fo.adam(0.1), 1, should_skip_update_fn=fo.skip_not_finite),
        "MultiSteps/skip_not_finite",
        [(BAD, 1, 1), (GOOD, 0, 1), (BAD, 1, 2)],
    ),
    "skip_large_updates": (
        fo.MultiSteps(
            fo.adam(0.1), 2, should_skip_update_fn=too_large, flushes=True, weighted=False
        ),
        "MultiSteps/too_large",
        [(GOOD, 0, 0), (LARGE, 1, 1), (BAD, 1, 2), (GOOD, 0, 2)],
    ),
    "accumulation": (
        fo.MultiSteps(fo.sgd(0.1), 3),
        "gate/gathering",
        [(GOOD, 1, 1), (GOOD, 1, 2), (GOOD, 0, 2), (GOOD, 1, 3), (GOOD, 1, 4)],
    ),
    "accumulation by a schedule": (
        fo.MultiSteps(fo.sgd(0.1), lambda step: 1 + step),
        "gate/gathering",
        [(GOOD, 0, None), (GOOD, 1, None), (GOOD, 0, None)],
    ),
    "chosen": (
        fo.conditionally_mask(fo.adam(0.1), thirds),
        "conditionally_mask/not_thirds",
        [(GOOD, 0, 0), (GOOD, 1, 1), (GOOD, 1, 2), (GOOD, 0, 2)],
    ),
    "chosen by a lambda": (
        fo.chain(fo.conditionally_transform(fo.scale(0.1), lambda s: s > 0), fo.sgd(1.0)),
        "conditionally_transform/not_chosen",
        [(GOOD, 1, None), (GOOD, 0, None)],
    ),
    "inside": (
        fo.partition(
            {"all": fo.lookahead(fo.apply_if_finite(fo.adam(0.1), 5), 2, 0.5)},
            lambda path, p: "all",
        ),
        "apply_if_finite/not_finite",
        [(BAD, 1, 1), (GOOD, 0, 1)],
    ),
}


def skips_in(found: dict[str, Tensor], name: str) -> tuple[float, float | None]:
    """This step and all, of the only stage whose path and reason end so."""
    (whole,) = [of for of in found if of.startswith("skipped/") and of.endswith(name)]
    so_far = found.get(whole.replace("skipped", "skips", 1))
    return found[whole].item(), None if so_far is None else so_far.item()


@pytest.mark.parametrize("case", CASES)
def test_what_is_left_out_is_counted_with_its_reason(case: str) -> None:
    tx, name, steps = CASES[case]
    params = {"w": torch.ones(2)}
    state = tx.init(params)
    w = nn.Parameter(torch.ones(2))
    optimizer = fo.optim.Optimizer([("w", w)], tx)
    for g, now, so_far in steps:
        found = fo.report(tx, {"w": g}, state, params)
        assert skips_in(found, name) == (now, so_far)
        _, state = tx.update({"w": g}, state, params)
        w.grad = g.clone()
        assert skips_in(optimizer.report(), name) == (now, so_far)
        optimizer.step()
    table = fo.report_table(found)
    stage, _, why = name.rpartition("/")
    (row,) = [line for line in table.splitlines() if line.endswith(why)]
    assert row.split()[0].endswith(stage)
    cells = ["yes" if now else "no", *([] if so_far is None else [str(so_far)]), why]
    assert row.split()[1:] == cells


def test_a_gate_says_not_due_by_itself() -> None:
    tx = fo.gate(fo.scale_by_adam(), lambda count: count % 2 == 1)
    params = [torch.ones(2)]
    state, seen = tx.init(params), []
    for _ in range(3):
        found = fo.report(tx, params, state, params)
        seen.append(skips_in(found, "gate/not_due"))
        _, state = tx.update(params, state, params)
    assert seen == [(1.0, 1.0), (0.0, 1.0), (1.0, 2.0)]


def test_each_model_has_its_own_skips() -> None:
    tx = fo.apply_if_finite(fo.sgd(0.1), 5)
    params, grads = {"w": torch.ones(3, 2)}, {"w": torch.stack([GOOD, BAD, GOOD])}
    state = torch.vmap(tx.init)(params)
    look = torch.vmap(lambda g, s, p: fo.report(tx, g, s, p))
    for so_far in (1, 2):
        found = look(grads, state, params)
        assert found["skipped/apply_if_finite/not_finite"].tolist() == [0, 1, 0]
        assert found["skips/apply_if_finite/not_finite"].tolist() == [0, so_far, 0]
        _, state = torch.vmap(tx.update)(grads, state, params)


def test_nothing_that_skips() -> None:
    tx, params = fo.adam(0.1), {"w": torch.ones(2)}
    found = fo.report(tx, params, tx.init(params), params)
    assert not [name for name in found if name.startswith("skip")]
    assert "skipped" not in fo.report_table(found)


# ---- what each stage does, wherever it stands ------------------------------------------------------


def test_clip_decay_and_mask_by_the_name_of_their_stage() -> None:
    """In a part of a partition, inside of a wrapper, and beside another clip of the same name."""
    w, b = torch.tensor([3.0, 4.0]), torch.tensor([2.0, 2.0])
    params = {"w": w, "b": b}
    grads = {"w": torch.tensor([6.0, 8.0]), "b": torch.tensor([30.0, 40.0])}
    of_w = fo.chain(
        fo.clip_by_global_norm(5.0),
        fo.add_decayed_weights(0.1),
        fo.clip_by_global_norm(2.0),
        fo.masked(fo.set_to_zero(), lambda path, p: False),
    )
    of_b = fo.chain(fo.clip_by_global_norm(1.0), fo.freeze(lambda path, p: True))
    tx = fo.apply_if_finite(fo.partition({"w": of_w, "b": of_b}, {"w": "w", "b": "b"}), 3)
    found = fo.report(tx, grads, tx.init(params), params)
    at = "partition/w"
    clipped = 0.5 * grads["w"]
    decayed = clipped + 0.1 * w
    wanted = {
        f"scale/{at}/clip_by_global_norm": 0.5,
        f"share/{at}/add_decayed_weights": (0.1 * w.norm() / decayed.norm()).item(),
        f"scale/{at}/clip_by_global_norm_1": (2.0 / decayed.norm()).item(),
        f"zeroed/{at}/masked": 0.0,
        "scale/partition/b/clip_by_global_norm": 0.02,
        "zeroed/partition/b/freeze": 1.0,
        "zeroed/apply_if_finite": 0.5,
    }
    for name, value in wanted.items():
        assert found[name].item() == pytest.approx(value, rel=1e-6), name


def test_clip_and_decay_in_an_optimizer_of_several_algorithms() -> None:
    w, b = nn.Parameter(torch.tensor([[3.0, 4.0]])), nn.Parameter(torch.tensor([2.0]))
    first = fo.chain(
        fo.clip_by_global_norm(1.0), fo.add_decayed_weights(0.1), fo.sgd(1.0)
    )
    optimizer = fo.optim.Partition(
        [("w", w), ("b", b)],
        {"clipped": first, "plain": fo.sgd(0.1)},
        {"w": "clipped", "b": "plain"},
    )
    w.grad, b.grad = torch.tensor([[0.0, 4.0]]), torch.tensor([3.0])
    found = optimizer.report()
    assert found["scale/clipped/clip_by_global_norm"].item() == 0.25
    decayed = torch.tensor([0.3, 1.4])
    share = found["share/clipped/add_decayed_weights"].item()
    assert share == pytest.approx(0.5 / decayed.norm().item(), rel=1e-6)
