"""A look at one step: the numbers are those of the step, and looking changes nothing."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from registry import ROWS, Row
from torch import Tensor, nn

import functorch_opt as fo

CASES = [
    pytest.param(row, variant, id=f"{row.id}{i or ''}")
    for row in ROWS
    for i, variant in enumerate(row.variants)
]


def draw(seed: int, dtype: torch.dtype = torch.float64) -> dict:
    generator = torch.Generator().manual_seed(seed)

    def tensor(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    return {
        "conv": {"w": tensor(2, 3, 1, 2), "b": tensor(2)},
        "heads": [tensor(3, 2), tensor()],
    }


def assert_same(a, b) -> None:
    assert fo.tree.flatten(a)[1] == fo.tree.flatten(b)[1]
    for x, y in zip(fo.tree.leaves(a), fo.tree.leaves(b), strict=True):
        assert torch.equal(x, y)


def numbers(found: dict[str, Tensor]) -> dict[str, float]:
    assert all(value.dim() == 0 for value in found.values())
    return {name: value.item() for name, value in found.items()}


# ---- every transformation ----------------------------------------------------------------------------


@pytest.mark.parametrize(("row", "variant"), CASES)
def test_the_update_is_that_of_the_step(row: Row, variant: dict) -> None:
    """And nothing is changed by looking, whatever the stages are."""
    tx, params = row.build(variant), draw(0)
    state = tx.init(params)
    extra_of = reads(tx, params)
    updates, state = tx.update(draw(1), state, params, **extra_of(draw(1)))
    params = fo.apply_updates(params, updates)
    grads = draw(2)
    inputs = (grads, state, params)
    before = copy.deepcopy(inputs)
    found = fo.report(tx, *inputs, **extra_of(grads))
    assert_same(inputs, before)
    updates, _ = tx.update(*inputs, **extra_of(grads))
    wanted = sum(float((u.abs() ** 2).sum()) for u in fo.tree.leaves(updates)) ** 0.5
    assert found["update_norm"].item() == pytest.approx(wanted, rel=1e-12, abs=1e-300)
    assert all(
        value.dim() == 0 and value.dtype == torch.float64 for value in found.values()
    )
    again = fo.report(tx, *inputs, **extra_of(grads))
    assert found.keys() == again.keys()
    assert all(x.equal(again[name]) or x.isnan() for name, x in found.items())


def reads(tx: fo.GradientTransformation, params: dict):
    """What a transformation reads beside gradients, of a bowl around the params."""

    def extra_of(grads):
        def value_fn(at):
            apart = fo.tree.map(
                lambda g, q, p: g * (q - p) + (q - p) ** 2, grads, at, params
            )
            return 3 + sum(x.sum() for x in fo.tree.leaves(apart))

        given = {
            "value": value_fn(params),
            "grad": grads,
            "value_fn": value_fn,
            "obj_fn": value_fn,
        }
        return {name: given[name] for name in tx.extra_args if name in given}

    return extra_of


# ---- the numbers ---------------------------------------------------------------------------------------


def test_the_numbers_of_layers() -> None:
    params, grads = draw(0), draw(1)
    grads["conv"]["w"][0] = 0.0
    tx = fo.chain(fo.trace(0.9), fo.add_decayed_weights(0.1), fo.scale(-0.3))
    _, state = tx.update(draw(2), tx.init(params), params)
    found = numbers(fo.report(tx, grads, state, params))
    updates, _ = tx.update(grads, state, params)
    paths = ["conv/b", "conv/w", "heads/0", "heads/1"]
    flat = {}
    for name, of in (("p", params), ("g", grads), ("u", updates)):
        flat[name] = [x.flatten() for x in fo.tree.leaves(of)]
        flat[name].append(torch.cat(flat[name]))
    for path, p, g, u in zip(
        [*paths, None], flat["p"], flat["g"], flat["u"], strict=True
    ):
        end = f"/{path}" if path else ""
        assert found[f"param_norm{end}"] == pytest.approx((p @ p).sqrt().item())
        assert found[f"grad_norm{end}"] == pytest.approx((g @ g).sqrt().item())
        assert found[f"update_norm{end}"] == pytest.approx((u @ u).sqrt().item())
        assert found[f"ratio{end}"] == pytest.approx(((u @ u) / (p @ p)).sqrt().item())
        cosine = -(g @ u) / ((g @ g) * (u @ u)).sqrt()
        assert found[f"cosine{end}"] == pytest.approx(cosine.item())
        assert found[f"grad_zeros{end}"] == pytest.approx((g == 0).double().mean().item())
    assert found["grad_zeros/conv/w"] == 0.5


def test_the_numbers_of_stages() -> None:
    params = {"w": torch.tensor([3.0, 4.0]), "b": torch.tensor([2.0])}
    grads = {"w": torch.tensor([3.0, 0.0]), "b": torch.tensor([4.0])}
    tx = fo.chain(
        fo.clip_by_global_norm(1.0),
        fo.add_decayed_weights(0.1),
        fo.freeze({"w": True, "b": False}),
        fo.scale_by_learning_rate(0.5),
    )
    found = numbers(fo.report(tx, grads, tx.init(params), params))
    assert found["scale/clip_by_global_norm"] == pytest.approx(0.2)
    decay = torch.tensor([0.3, 0.4, 0.2])
    out = torch.tensor([0.6, 0.0, 0.8]) + decay
    share = (decay.norm() / out.norm()).item()
    assert found["share/add_decayed_weights"] == pytest.approx(share, rel=1e-6)
    assert found["zeroed/freeze"] == pytest.approx(2 / 3)
    assert found["zeroed/add_decayed_weights"] == 0
    assert found["scale/scale_by_learning_rate"] == pytest.approx(0.5)
    assert found["hyper/scale_by_learning_rate/learning_rate"] == 0.5
    assert found["hyper/clip_by_global_norm/max_norm"] == 1.0


def test_a_zero_gradient_has_finite_numbers() -> None:
    params = {"w": torch.zeros(2)}
    tx = fo.chain(fo.clip_by_global_norm(1.0), fo.adamw(0.1))
    found = numbers(fo.report(tx, {"w": torch.zeros(2)}, tx.init(params), params))
    assert found["ratio/w"] == found["cosine/w"] == 0.0
    assert found["grad_zeros"] == 1.0
    assert all(value == value for value in found.values()), "no NaN"


def test_schedules_have_the_value_of_this_step() -> None:
    schedule = fo.linear_schedule(1.0, 0.0, 10)
    tx = fo.chain(fo.scale_by_adam(), fo.scale_by_learning_rate(schedule))
    params = {"w": torch.ones(2)}
    state = tx.init(params)
    for step in range(3):
        found = numbers(fo.report(tx, params, state, params))
        assert found["hyper/scale_by_learning_rate/learning_rate"] == pytest.approx(
            1 - step / 10
        )
        assert found["state/scale_by_adam/count"] == step + 1
        _, state = tx.update(params, state, params)


def test_what_is_inside_is_seen() -> None:
    """Labels of a partition, the inside of a mask, of a wrapper and of injected hyperparameters."""
    params = {"w": torch.ones(2, 2), "b": torch.ones(2)}
    of_matrices = fo.masked(fo.chain(fo.clip(0.5), fo.sgd(0.1)), lambda path, p: True)
    tx = fo.partition(
        {
            "matrix": of_matrices,
            "rest": fo.lookahead(
                fo.inject_hyperparams(fo.sgd)(learning_rate=0.3), 5, 0.5
            ),
        },
        lambda path, p: "matrix" if p.ndim == 2 else "rest",
    )
    found = numbers(fo.report(tx, params, tx.init(params), params))
    assert [name for name in found if name.startswith("scale/")] == [
        "scale/matrix/inner/clip",
        "scale/matrix/inner/sgd/scale_by_learning_rate",
        "scale/matrix",
        "scale/rest/sgd",
        "scale/rest",
    ]
    assert found["scale/matrix/inner/clip"] == 0.5
    assert found["scale/matrix"] == pytest.approx(0.05)
    assert found["hyper/rest/sgd/learning_rate"] == pytest.approx(0.3)
    assert found["hyper/rest/slow_step_size"] == 0.5


def test_a_closed_gate_has_no_inside_and_says_why() -> None:
    tx = fo.apply_if_finite(fo.sgd(0.1), 3)
    params = {"w": torch.ones(2)}
    state = tx.init(params)
    open_one = fo.report(tx, params, state, params)
    bad = {"w": torch.tensor([1.0, float("nan")])}
    closed = numbers(fo.report(tx, bad, state, params))
    assert closed["update_norm"] == 0.0
    assert not [name for name in closed if "scale_by_learning_rate" in name]
    assert [name for name in open_one if "scale/sgd/scale_by_learning_rate" in name]
    assert closed["state/apply_if_finite/total_notfinite"] == 1.0


def test_parameters_without_gradient_are_left_out() -> None:
    params = {"w": torch.ones(2), "b": torch.ones(1)}
    tx = fo.adamw(0.1)
    found = fo.report(tx, {"w": torch.ones(2), "b": None}, tx.init(params), params)
    assert "grad_norm/w" in found and "grad_norm/b" not in found
    none = fo.report(tx, {"w": None, "b": None}, tx.init(params), params)
    assert "grad_norm" not in none


def test_one_look_for_each_model() -> None:
    tx = fo.chain(fo.clip_by_global_norm(1.0), fo.adamw(lambda count: 0.1 / (count + 1)))
    params = torch.randn(3, 4)
    grads = torch.randn(3, 4)

    def look(g, p):
        return fo.report(tx, {"w": g}, tx.init({"w": p}), {"w": p})

    together = torch.vmap(look)(grads, params)
    for i in range(3):
        for name, value in look(grads[i], params[i]).items():
            torch.testing.assert_close(together[name][i], value)
    with pytest.raises(ValueError, match=r"param_norm has shape \(3,\): this is of one"):
        fo.report_table(together)
    one = {name: x[1] for name, x in together.items()}
    assert fo.report_table(one) == fo.report_table(look(grads[1], params[1]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.complex64], ids=str)
def test_other_dtypes(dtype: torch.dtype) -> None:
    params, grads = draw(0, dtype), draw(1, dtype)
    tx = fo.chain(fo.clip_by_global_norm(1.0), fo.sgd(0.1))
    found = numbers(fo.report(tx, grads, tx.init(params), params))
    assert found["update_norm"] == pytest.approx(0.1, rel=1e-2)
    assert found["cosine"] == pytest.approx(1.0, abs=1e-4)


# ---- the stateful optimizers ---------------------------------------------------------------------------


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 3, dtype=torch.float64), nn.Linear(3, 2, dtype=torch.float64)
    )


def set_gradients(of: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for p in of.parameters():
        p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)


def label(path: str, p: Tensor) -> str:
    return "muon" if p.ndim == 2 else "adamw"


def groups(of: nn.Module) -> list[dict]:
    first, last = of
    return [
        {"params": [*first.parameters()], "lr": 0.1},
        {"params": [*last.parameters()], "lr": 0.01, "nesterov": True},
    ]


OPTIMIZERS = {
    "class": lambda of: fo.optim.AdamW(of.named_parameters(), lr=0.1),
    "chain": lambda of: fo.optim.Optimizer(
        of.named_parameters(),
        fo.chain(fo.clip_by_global_norm(1.0), fo.adamw(0.1)),
        lr=0.5,
    ),
    "without names": lambda of: fo.optim.Lion(of.parameters(), lr=0.1),
    "two updates": lambda of: fo.optim.SGD(groups(of), momentum=0.9),
    "partition": lambda of: fo.optim.Partition(
        of.named_parameters(), {"muon": fo.muon(0.1), "adamw": fo.adamw(0.01)}, label
    ),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_look_of_an_optimizer_is_its_next_step(name: str) -> None:
    looked_at, other = model(), model()
    optimizers = [OPTIMIZERS[name](of) for of in (looked_at, other)]
    for step in range(4):
        before = [p.detach().clone() for p in looked_at.parameters()]
        set_gradients(looked_at, step)
        set_gradients(other, step)
        state = copy.deepcopy(
            {
                i: optimizers[0].state[p]
                for i, p in enumerate(looked_at.parameters())
                if p in optimizers[0].state
            }
        )
        found = numbers(optimizers[0].report())
        after = {
            i: optimizers[0].state[p]
            for i, p in enumerate(looked_at.parameters())
            if p in optimizers[0].state
        }
        assert state.keys() == after.keys()
        assert all(
            torch.equal(x, after[i][key])
            for i, entry in state.items()
            for key, x in entry.items()
        )
        assert all(map(torch.equal, before, looked_at.parameters()))
        for optimizer in optimizers:
            optimizer.step()
        shown = [n for n, _ in looked_at.named_parameters()]
        if name in ("without names", "two updates"):
            shown = ["0", "1", "2", "3"]
        moved = [
            p.detach() - q for p, q in zip(looked_at.parameters(), before, strict=True)
        ]
        for path, u, p in zip(shown, moved, before, strict=True):
            assert found[f"update_norm/{path}"] == pytest.approx(
                u.norm().item(), rel=1e-9
            )
            assert found[f"param_norm/{path}"] == pytest.approx(
                p.norm().item(), rel=1e-12
            )
        total = torch.cat([u.flatten() for u in moved]).norm().item()
        assert found["update_norm"] == pytest.approx(total, rel=1e-9)
    assert all(map(torch.equal, looked_at.parameters(), other.parameters()))


def test_rates_in_force() -> None:
    """``param_groups["lr"]`` says 1.0 where the schedule is in the chain."""
    of = model()
    tx = fo.chain(
        fo.scale_by_adam(), fo.scale_by_learning_rate(lambda count: 0.5 / (count + 1))
    )
    optimizer = fo.optim.Optimizer(of.parameters(), tx)
    for step in range(3):
        set_gradients(of, step)
        found = numbers(optimizer.report())
        assert found["lr/0"] == 1.0
        rate = found["hyper/scale_by_learning_rate/learning_rate"]
        assert rate == pytest.approx(0.5 / (step + 1))
        optimizer.step()


def test_groups_have_their_names_and_their_own_numbers() -> None:
    of = model()
    given = fo.optim.groups(of, fo.optim.layer_decay(0.5), lr=0.4)
    optimizer = fo.optim.Optimizer(given, fo.adamw, lr=1.0)
    set_gradients(of, 0)
    found = numbers(optimizer.report())
    assert found["lr/layer 1: 0"] == pytest.approx(0.1)
    start = "hyper/scale_by_learning_rate/learning_rate"
    assert found[f"{start}/0.weight"] == pytest.approx(0.1)
    assert found[f"{start}/1.bias"] == pytest.approx(0.2)
    assert "learning_rate=0.1 to 0.2" in fo.report_table(optimizer.report())


def test_stages_of_algorithms_have_their_names() -> None:
    of = model()
    optimizer = OPTIMIZERS["partition"](of)
    set_gradients(of, 0)
    found = numbers(optimizer.report())
    stages = [name for name in found if name.startswith("scale/")]
    assert "scale/muon/muon/scale_by_muon" in stages
    assert "scale/adamw/scale_by_adam" in stages
    assert found["lr/0"] == 0.1 and found["lr/1"] == 0.01


def test_the_numbers_stay_as_they_were() -> None:
    of = model()
    optimizer = fo.optim.AdamW(of.parameters(), lr=torch.tensor(0.1))
    set_gradients(of, 0)
    found = optimizer.report()
    before = {name: x.clone() for name, x in found.items()}
    optimizer.param_groups[0]["lr"].fill_(0.7)
    for step in range(2):
        set_gradients(of, step)
        optimizer.step()
    assert all(torch.equal(x, before[name]) for name, x in found.items())


def test_nothing_to_look_at() -> None:
    optimizer = fo.optim.AdamW(model().parameters(), lr=0.1)
    assert numbers(optimizer.report()) == {"lr/0": pytest.approx(0.1)}


def test_a_loss_for_who_reads_it() -> None:
    w = nn.Parameter(torch.tensor([3.0]))
    optimizer = fo.optim.Optimizer([w], fo.polyak_sgd, max_learning_rate=10.0)
    w.grad = torch.tensor([6.0])
    with pytest.raises(TypeError, match="reads value"):
        optimizer.report()
    assert numbers(optimizer.report(torch.tensor(9.0)))["update_norm"] == pytest.approx(
        1.5, rel=1e-4
    )


def test_errors_are_those_of_step() -> None:
    of = model()
    optimizer = fo.optim.Optimizer(
        of.parameters(), fo.chain(fo.sgd(0.1), fo.params_ema(0.9))
    )
    set_gradients(of, 0)
    optimizer.step()
    with (
        optimizer.eval_params(),
        pytest.raises(RuntimeError, match="report after leaving"),
    ):
        optimizer.report()
    table = nn.Embedding(4, 2, sparse=True)
    sparse = fo.optim.Optimizer(table.parameters(), fo.sgd(0.1))
    table(torch.tensor([1])).sum().backward()
    with pytest.raises((TypeError, ValueError), match="sparse"):
        sparse.report()


def test_looking_does_not_compile() -> None:
    of = model()
    optimizer = fo.optim.AdamW(of.parameters(), lr=0.1, compile=True)
    set_gradients(of, 0)
    torch._dynamo.utils.counters.clear()
    assert numbers(optimizer.report())["update_norm"] > 0
    assert not torch._dynamo.utils.counters["stats"]


def test_a_picture_of_many_looks(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    of = model()
    optimizer = fo.optim.AdamW(of.named_parameters(), lr=0.1)
    looks = {}
    for step in range(20):
        set_gradients(of, step)
        of[1].bias.grad = None if step < 10 else of[1].bias.grad
        looks[step] = optimizer.report()
        optimizer.step()
    for quantity in ("ratio", "cosine", "grad_zeros"):
        figure = fo.report_plot(looks, quantity)
        axes, colors = figure.axes
        paths = [label.get_text() for label in axes.get_yticklabels()]
        assert paths == ["0.bias", "0.weight", "1.weight", "1.bias"]
        assert axes.get_xticklabels()[1].get_text() == "2"
        assert colors.get_ylabel() == quantity
        grid = axes.images[0].get_array()
        assert grid.shape == (4, 20) and grid.mask.sum() == 10
        assert grid[1, 7] == pytest.approx(looks[7][f"{quantity}/0.weight"].item())
        figure.savefig(tmp_path / "looks.png")
    nothing = {name: torch.zeros_like(x) for name, x in looks[0].items()}
    fo.report_plot({0: nothing}).savefig(tmp_path / "nothing.png")


def test_a_picture_refuses() -> None:
    tx, params = fo.adam(0.1), {"w": torch.ones(2)}
    found = fo.report(tx, params, tx.init(params), params)
    with pytest.raises(ValueError, match="quantity must be"):
        fo.report_plot({0: found}, "loss")
    with pytest.raises(ValueError, match="there is no report"):
        fo.report_plot({})
    with pytest.raises(ValueError, match="this is of one model"):
        fo.report_plot({0: {name: x.expand(3) for name, x in found.items()}})
