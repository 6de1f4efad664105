"""Several algorithms as one optimizer: its numbers are those of one optimizer for each."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import functorch_opt as fo

Partition = fo.optim.Partition


class Model(nn.Module):
    """Its names are not in the order of the alphabet, and labels alternate."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.wte = nn.Parameter(torch.randn(5, 4, dtype=torch.float64))
        self.up = nn.Linear(4, 6, dtype=torch.float64)
        self.down = nn.Linear(6, 4, dtype=torch.float64)


def transforms() -> dict[str, fo.GradientTransformation]:
    return {
        "muon": fo.muon(0.02, weight_decay=0.05),
        "adamw": fo.adamw(3e-3, b2=0.95, weight_decay=0.1),
    }


def label(path: str, p: Tensor) -> str:
    return "muon" if path.endswith(".weight") else "adamw"


def set_gradients(model: nn.Module, step: int, missing: bool = False) -> None:
    generator = torch.Generator().manual_seed(step)
    for i, p in enumerate(model.parameters()):
        g = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        p.grad = None if missing and (step + i) % 3 == 0 else g


def train(
    model: nn.Module, optimizer, steps: int = 8, start: int = 0, after=None
) -> list[Tensor]:
    for step in range(start, start + steps):
        set_gradients(model, step, missing=True)
        optimizer.step()
        if after is not None:
            after()
    return [p.detach().clone() for p in model.parameters()]


def separate(model: nn.Module) -> list[torch.optim.Optimizer]:
    """One optimizer for each algorithm."""
    named = [*model.named_parameters()]
    muon = [pair for pair in named if label(*pair) == "muon"]
    adamw = [pair for pair in named if label(*pair) == "adamw"]
    return [
        fo.optim.Optimizer(muon, fo.muon, lr=0.02, weight_decay=0.05),
        fo.optim.Optimizer(adamw, fo.adamw, lr=3e-3, b2=0.95, weight_decay=0.1),
    ]


class Both:
    """Several optimizers that step together."""

    def __init__(self, optimizers: list[torch.optim.Optimizer]) -> None:
        self.optimizers = optimizers

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()


# ---- numbers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_numbers_are_those_of_separate_optimizers(compile: bool) -> None:
    model, reference = Model(), Model()
    optimizer = Partition(model.named_parameters(), transforms(), label, compile=compile)
    ours = train(model, optimizer)
    torch.testing.assert_close(
        ours, train(reference, Both(separate(reference))), rtol=1e-10, atol=0
    )


def test_the_numbers_are_those_of_partition() -> None:
    model, reference = Model(), Model()
    optimizer = Partition(model.named_parameters(), transforms(), label)
    functional = fo.optim.Optimizer(
        reference.named_parameters(), fo.partition(transforms(), label)
    )
    ours, theirs = train(model, optimizer), train(reference, functional)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=0)
    assert not torch.equal(ours[0], Model().wte)


@pytest.mark.slow
@pytest.mark.parametrize("compile", [False, True])
def test_in_a_graph(compile: bool) -> None:
    """One graph; a rate of either algorithm changes without compiling again."""
    model, reference = Model(), Model()
    given = {
        "muon": fo.sgd(torch.tensor(0.02, dtype=torch.float64), momentum=0.9),
        "adamw": fo.adamw(torch.tensor(3e-3, dtype=torch.float64)),
    }
    optimizers = [
        Partition(of.named_parameters(), given, label, compile=compile)
        for of in (model, reference)
    ]
    optimizers[0].init_state()
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    step = torch.compile(optimizers[0].step, fullgraph=True, backend=backend)
    for i in range(5):
        set_gradients(model, i)
        set_gradients(reference, i)
        step()
        optimizers[1].step()
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"].mul_(0.5)
    torch.testing.assert_close(
        [*model.parameters()], [*reference.parameters()], rtol=1e-10, atol=1e-14
    )
    assert len(graphs) == 1


def test_a_norm_is_that_of_an_algorithm() -> None:
    a, b = (nn.Parameter(torch.zeros(1)) for _ in range(2))
    clipped = fo.chain(fo.clip_by_global_norm(1.0), fo.scale(-1.0))
    groups = [{"params": [a], "algorithm": "one"}, {"params": [b], "algorithm": "other"}]
    optimizer = Partition(groups, {"one": clipped, "other": fo.sgd(0.1)})
    a.grad, b.grad = torch.tensor([3.0]), torch.tensor([4.0])
    optimizer.step()
    torch.testing.assert_close(torch.cat([a, b]).detach(), torch.tensor([-1.0, -0.4]))


def test_an_error_in_one_algorithm_changes_nothing() -> None:
    def fails(g, p):
        raise ArithmeticError("no")

    model = Model()
    given = {"muon": fo.sgd(0.1), "adamw": fo.leafwise(fails)}
    optimizer = Partition(model.named_parameters(), given, label)
    before = [p.detach().clone() for p in model.parameters()]
    set_gradients(model, 0)
    with pytest.raises(ArithmeticError):
        optimizer.step()
    assert all(map(torch.equal, before, model.parameters()))
    assert not optimizer.state


# ---- options ---------------------------------------------------------------------------------------


def test_every_algorithm_has_its_own_options() -> None:
    optimizer = Partition(Model().named_parameters(), transforms(), label)
    muon, adamw = optimizer.param_groups
    assert muon["param_names"] == ["up.weight", "down.weight"]
    assert adamw["param_names"] == ["wte", "up.bias", "down.bias"]
    assert (muon["algorithm"], muon["lr"], muon["weight_decay"]) == ("muon", 0.02, 0.05)
    assert (adamw["algorithm"], adamw["lr"], adamw["b2"]) == ("adamw", 3e-3, 0.95)
    assert "b2" not in muon and "beta" not in adamw
    assert "algorithm: muon" in repr(optimizer)


def test_an_option_changes_between_steps() -> None:
    model, reference = Model(), Model()
    optimizer = Partition(model.named_parameters(), transforms(), label)
    both = Both(separate(reference))
    for step in range(4):
        set_gradients(model, step)
        set_gradients(reference, step)
        groups = [*optimizer.param_groups, *(o.param_groups[0] for o in both.optimizers)]
        for i, group in enumerate(groups):
            group["lr"] = 0.1 / (1 + step + i % 2)
            group["weight_decay"] = 0.01 * step
        optimizer.step()
        both.step()
    torch.testing.assert_close(
        [*model.parameters()], [*reference.parameters()], rtol=1e-10, atol=0
    )


def test_a_function_takes_its_rate_from_the_groups() -> None:
    model = Model()
    groups = [
        {"params": [model.up.weight], "algorithm": "muon", "lr": 0.5},
        {"params": [model.wte], "algorithm": "adamw", "learning_rate": 0.25, "b1": 0.5},
        {"params": [model.up.bias], "algorithm": "adamw", "lr": 0.125},
    ]
    given = {"muon": fo.muon(0.1), "adamw": fo.adamw(1.0, weight_decay=0.3)}
    optimizer = Partition(groups, given)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.25, 0.125]
    assert [group.get("b1") for group in optimizer.param_groups] == [None, 0.5, 0.9]
    assert "learning_rate" not in optimizer.param_groups[1]
    with pytest.raises(TypeError, match=r"'sgd': .*learning_rate"):
        Partition(groups, {**given, "sgd": fo.sgd})


def test_a_chain_has_a_factor() -> None:
    w = nn.Parameter(torch.zeros(1))
    tx = fo.chain(fo.clip(1.0), fo.sgd(0.5))
    optimizer = Partition([("w", w)], {"clipped": tx}, lambda path, p: "clipped")
    assert optimizer.param_groups[0]["lr"] == 1.0
    optimizer.param_groups[0]["lr"] = 0.5
    w.grad = torch.tensor([3.0])
    optimizer.step()
    assert w.item() == -0.25


def test_a_schedule_stays_in_the_transformation() -> None:
    w = nn.Parameter(torch.zeros(1))
    given = {"sgd": fo.sgd(lambda count: 1.0 / (count + 1))}
    optimizer = Partition([("w", w)], given, {"w": "sgd"})
    assert optimizer.param_groups[0]["lr"] == 1.0
    for _ in range(2):
        w.grad = torch.ones(1)
        optimizer.step()
    assert w.item() == -1.5


def test_groups_give_the_algorithm_and_factors() -> None:
    """The rate of a layer is a factor of that of its algorithm."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    algorithm = {
        lambda path, p: p.ndim == 2: {"algorithm": "muon", "name": "matrices"},
        "*": {"algorithm": "adamw"},
    }
    groups = fo.optim.groups(model, fo.optim.layer_decay(0.5), algorithm)
    optimizer = Partition(groups, {"muon": fo.muon(0.4), "adamw": fo.adamw(0.04)})
    found = {
        group["name"]: (group["algorithm"], group["lr"])
        for group in optimizer.param_groups
    }
    assert found == {
        "layer 1: 0, matrices": ("muon", 0.1),
        "layer 1: 0, rest": ("adamw", 0.01),
        "layer 2: 1, matrices": ("muon", 0.2),
        "layer 2: 1, rest": ("adamw", 0.02),
    }
    tx = fo.partition({"muon": fo.muon(0.4), "adamw": fo.adamw(0.04)}, groups.labels)
    assert [*tx.init(dict(model.named_parameters()))] == ["muon", "adamw"]


def test_groups_without_an_algorithm_are_split_by_labels() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    groups = fo.optim.groups(
        model, {"1.*": {"name": "head"}, "*": {"name": "body"}}, lr=0.5
    )
    optimizer = Partition(groups, transforms(), fo.matrix_labels(model))
    found = [
        (group["name"], group["algorithm"], group["lr"])
        for group in optimizer.param_groups
    ]
    assert found == [
        ("head, muon", "muon", 0.5),
        ("head, adamw", "adamw", 0.5),
        ("body, muon", "muon", 0.5),
        ("body, adamw", "adamw", 0.5),
    ]


def test_parameters_without_names_are_numbered() -> None:
    a, b, c = (nn.Parameter(torch.zeros(1)) for _ in range(3))
    labels = {"0": "muon", "1": "adamw", "2": "muon"}
    optimizer = Partition([{"params": [a]}, {"params": [b, c]}], transforms(), labels)
    found = [(g["algorithm"], [*map(id, g["params"])]) for g in optimizer.param_groups]
    assert found == [("muon", [id(a)]), ("muon", [id(c)]), ("adamw", [id(b)])]


# ---- what torch's tools do -------------------------------------------------------------------------


def test_schedulers_drive_every_algorithm() -> None:
    model, reference = Model(), Model()
    optimizer = Partition(model.named_parameters(), transforms(), label)
    both = Both(separate(reference))
    one = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 8)
    two = [torch.optim.lr_scheduler.CosineAnnealingLR(of, 8) for of in both.optimizers]
    ours = train(model, optimizer, after=one.step)
    theirs = train(reference, both, after=lambda: [of.step() for of in two])
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=0)


def test_one_cycle_writes_the_momentum_of_every_algorithm() -> None:
    model, reference = Model(), Model()
    optimizer = Partition(model.named_parameters(), transforms(), label)
    both = Both(separate(reference))
    cycle = torch.optim.lr_scheduler.OneCycleLR
    one = cycle(optimizer, [0.02, 3e-3], total_steps=20)
    two = [
        cycle(of, rate, total_steps=20)
        for of, rate in zip(both.optimizers, (0.02, 3e-3), strict=True)
    ]
    assert [group["momentum"] for group in optimizer.param_groups] == [0.95, 0.95]
    ours = train(model, optimizer, after=one.step)
    theirs = train(reference, both, after=lambda: [of.step() for of in two])
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=0)
    model = Model()
    without = train(model, Partition(model.named_parameters(), transforms(), label))
    assert not torch.equal(without[0], ours[0])


def test_no_momentum_is_an_error_of_one_cycle() -> None:
    optimizer = Partition(
        [("w", nn.Parameter(torch.zeros(1)))],
        {"sgd": fo.chain(fo.sgd(0.1))},
        {"w": "sgd"},
    )
    with pytest.raises(ValueError, match="momentum"):
        torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.0, 10)


def test_checkpoints_resume_bit_for_bit() -> None:
    model = Model()
    optimizer = Partition(model.named_parameters(), transforms(), label)
    train(model, optimizer)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    wanted = train(model, optimizer, start=8)

    again = Model()
    optimizer = Partition(again.named_parameters(), transforms(), label)
    saved = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    again.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"], strict=True)
    assert all(map(torch.equal, wanted, train(again, optimizer, start=8)))


def test_a_checkpoint_of_other_algorithms_is_an_error() -> None:
    saved = Partition(Model().named_parameters(), transforms(), label).state_dict()
    model = Model()
    swapped = {"adamw": fo.adamw(0.1), "muon": fo.muon(0.1)}
    optimizer = Partition(model.named_parameters(), swapped, label)
    with pytest.raises(
        ValueError, match=r"algorithms \['muon', 'adamw'\], and here they are"
    ):
        optimizer.load_state_dict(saved)
    plain = fo.optim.Optimizer([model.wte], fo.adamw, lr=0.1)
    optimizer = Partition([("wte", model.wte)], transforms(), label)
    with pytest.raises(ValueError, match=r"algorithms \[None\], and here"):
        optimizer.load_state_dict(plain.state_dict())


@pytest.mark.parametrize("flat", [False, True])
def test_distributed_checkpoints(flat: bool) -> None:
    from torch.distributed.checkpoint import state_dict as of_torch

    options = of_torch.StateDictOptions(flatten_optimizer_state_dict=flat)
    model = Model()
    optimizer = Partition(model.named_parameters(), transforms(), label)
    train(model, optimizer)
    saved = of_torch.get_optimizer_state_dict(model, optimizer, options=options)
    again = Model()
    again.load_state_dict(model.state_dict())
    resumed = Partition(again.named_parameters(), transforms(), label)
    of_torch.set_optimizer_state_dict(again, resumed, saved, options=options)
    wanted = train(model, optimizer, start=8)
    assert all(map(torch.equal, wanted, train(again, resumed, start=8)))


@pytest.mark.parametrize("way", ["pickle", "copy"])
def test_copies_go_on(way: str) -> None:
    model = Model()
    optimizer = Partition(model.named_parameters(), transforms(), label)
    train(model, optimizer)
    pair = (model, optimizer)
    other, theirs = (
        pickle.loads(pickle.dumps(pair)) if way == "pickle" else copy.deepcopy(pair)
    )
    assert theirs.param_groups[0]["params"][0] is other.up.weight
    wanted = train(model, optimizer, start=8)
    assert all(map(torch.equal, wanted, train(other, theirs, start=8)))


def test_groups_are_added() -> None:
    model = Model()
    named = dict(model.named_parameters())
    optimizer = Partition([("wte", named["wte"])], transforms(), label)
    optimizer.add_param_group(
        {"params": [(n, p) for n, p in named.items() if n.startswith("up")], "lr": 0.5}
    )
    optimizer.add_param_group(
        {
            "params": [("down.weight", named["down.weight"])],
            "algorithm": "adamw",
            "b1": 0.3,
        }
    )
    found = [(g["algorithm"], g["lr"], g["param_names"]) for g in optimizer.param_groups]
    assert found == [
        ("adamw", 3e-3, ["wte"]),
        ("muon", 0.5, ["up.weight"]),
        ("adamw", 0.5, ["up.bias"]),
        ("adamw", 3e-3, ["down.weight"]),
    ]
    train(model, optimizer)
    mu = optimizer.state[named["down.weight"]]["scale_by_adam/mu"]
    assert bool((mu != 0).all())


def test_an_error_adds_no_group() -> None:
    model = Model()
    optimizer = Partition([("wte", model.wte)], transforms(), label)
    params = [("up.weight", model.up.weight), ("up.bias", model.up.bias)]
    with pytest.raises(ValueError, match="b1"):
        optimizer.add_param_group({"params": params, "b1": 2.0})
    assert len(optimizer.param_groups) == 1


def test_averages_of_one_algorithm() -> None:
    model = Model()
    averaged = fo.chain(fo.sgd(0.1), fo.params_ema(0.5))
    optimizer = Partition(
        model.named_parameters(), {"muon": fo.sgd(0.1), "adamw": averaged}, label
    )
    train(model, optimizer)
    inside = [p.detach().clone() for p in model.parameters()]
    with optimizer.eval_params():
        outside = [
            torch.equal(p, q) for p, q in zip(model.parameters(), inside, strict=True)
        ]
    names = [name for name, _ in model.named_parameters()]
    assert outside == [name.endswith(".weight") for name in names]


def test_a_closure_gives_the_loss_to_who_reads_it() -> None:
    a, b = (nn.Parameter(torch.ones(1, dtype=torch.float64)) for _ in range(2))
    given = {"polyak": fo.polyak_sgd(10.0), "sgd": fo.sgd(0.1)}
    optimizer = Partition([("a", a), ("b", b)], given, {"a": "polyak", "b": "sgd"})

    def closure():
        optimizer.zero_grad()
        loss = (a**2).sum() + (b**2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 2.0
    assert b.item() == pytest.approx(0.8)
    assert a.item() == pytest.approx(1.0 - 2.0 / 4.0 * 2.0)


# ---- errors ----------------------------------------------------------------------------------------


def test_errors_teach() -> None:
    model = Model()
    named = [*model.named_parameters()]
    with pytest.raises(TypeError, match="transforms must be a dict"):
        Partition(named, fo.sgd(0.1))
    with pytest.raises(
        TypeError, match="'muon': tx must be a transformation or a function"
    ):
        Partition(named, {"muon": 3}, label)
    with pytest.raises(ValueError, match="'wte' has no algorithm: give its group one"):
        Partition(named, transforms())
    with pytest.raises(ValueError, match="param_labels gives 'lion' for 'wte'"):
        Partition(named, transforms(), lambda path, p: "lion")
    with pytest.raises(ValueError, match=r"param_labels gives None for 'up\.bias'"):
        Partition(named, transforms(), {"wte": "adamw", "up.weight": "muon"})
    with pytest.raises(
        TypeError, match="param_labels must be a function of path and leaf"
    ):
        Partition(named, transforms(), lambda tree: "muon")
    with pytest.raises(ValueError, match="a group has the algorithm 'lion'"):
        Partition([{"params": named, "algorithm": "lion"}], transforms())
    with pytest.raises(ValueError, match="'muon' has no option 'b2', which another"):
        Partition([{"params": named, "algorithm": "muon", "b2": 0.9}], transforms())
    with pytest.raises(ValueError, match="b1 must be in"):
        Partition([{"params": named, "algorithm": "adamw", "b1": 2.0}], transforms())
    with pytest.raises(ValueError, match="names of parameters must be unique"):
        Partition([("w", model.wte), ("w", model.up.bias)], transforms(), label)
    optimizer = Partition(named, transforms(), label)
    with pytest.raises(TypeError, match="ordered collections"):
        optimizer.add_param_group({"params": {nn.Parameter(torch.zeros(1))}})
    with pytest.raises(TypeError, match="a group must be a dict; got list"):
        optimizer.add_param_group(named)
    with pytest.raises(KeyError, match="params"):
        optimizer.add_param_group({"lr": 0.1})
    assert len(optimizer.param_groups) == 2
    with pytest.raises(ValueError, match="empty parameter list"):
        Partition([], transforms(), label)


# ---- slots in a code -----------------------------------------------------------------------------

TRANSFORMS = {"muon": fo.muon(0.02), "adamw": fo.adamw(0.01)}


def of_labels(path: str, p: torch.Tensor) -> str:
    return "muon" if path == "0.weight" else "adamw"


def trained_in(state: Any, steps: int = 3) -> tuple[Any, Any]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(70, 64), torch.nn.Linear(64, 70))
    named = model.named_parameters()
    opt = fo.optim.Partition(named, TRANSFORMS, of_labels, state=state)
    train_on(model, opt, range(steps))
    return model, opt


def train_on(model: Any, opt: Any, steps: range) -> None:
    for k in steps:
        x = torch.randn(8, 70, generator=torch.Generator().manual_seed(k))
        opt.zero_grad()
        (model(x) - x).square().mean().backward()
        opt.step()


@pytest.mark.parametrize("state", ["8bit", {"muon": "4bit"}, {"adamw": "float8"}])
def test_slots_of_each_algorithm_are_stored_in_its_code(state: Any) -> None:
    """The numbers are those of `partition` around `stored`."""
    model, opt = trained_in(state)
    codes = {
        label: state if state == "8bit" else state.get(label) for label in TRANSFORMS
    }
    groups = {group["algorithm"]: group["state"] for group in opt.param_groups}
    assert groups == {label: code or "float32" for label, code in codes.items()}
    txs = {
        label: fo.stored(tx, codes[label]) if codes[label] else tx
        for label, tx in TRANSFORMS.items()
    }
    torch.manual_seed(0)
    other = torch.nn.Sequential(torch.nn.Linear(70, 64), torch.nn.Linear(64, 70))
    tx = fo.partition(txs, of_labels)
    reference = fo.optim.Optimizer(other.named_parameters(), tx)
    train_on(other, reference, range(3))
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    in_codes = {x.dtype for x in opt.state[model[0].weight].values()}
    assert (torch.uint8 in in_codes) == bool(codes["muon"])
    in_codes = {x.dtype for x in opt.state[model[1].weight].values()}
    assert (torch.uint8 in in_codes) == bool(codes["adamw"])


def test_a_group_of_an_algorithm_says_how_its_slots_are_stored() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(70, 64), torch.nn.Linear(64, 70))
    groups = [
        {"params": [model[0].weight], "algorithm": "adamw", "state": "8bit"},
        {"params": [model[1].weight], "algorithm": "adamw"},
    ]
    opt = fo.optim.Partition(groups, TRANSFORMS, state="float32")
    train_on(model, opt, range(1))
    kinds = [{x.dtype for x in opt.state[layer.weight].values()} for layer in model]
    assert torch.uint8 in kinds[0] and torch.uint8 not in kinds[1]


@pytest.mark.parametrize("there", [None, "8bit", {"muon": "4bit"}])
@pytest.mark.parametrize("here", [None, "8bit", {"adamw": "bfloat16_stochastic"}])
def test_a_checkpoint_in_another_code_is_loaded(here: Any, there: Any) -> None:
    model, opt = trained_in(there)
    other, resumed = trained_in(here, 0)
    other.load_state_dict(model.state_dict())
    saved = opt.state_dict()
    if here != there:
        for group in saved["param_groups"]:
            group.pop("state", None)  # otherwise slots would be stored as they were there
    resumed.load_state_dict(saved, strict=True)
    train_on(other, resumed, range(3, 5))
    train_on(model, opt, range(3, 5))
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert here != there or torch.equal(p, q)
        assert (p - q).abs().max() < 0.1


def test_a_code_of_an_algorithm_that_there_is_not() -> None:
    p = [torch.nn.Parameter(torch.ones(2, 2))]
    with pytest.raises(
        ValueError, match=r"state has the label 'lion'.*\['muon', 'adamw'\]"
    ):
        fo.optim.Partition(p, TRANSFORMS, of_labels, state={"lion": "8bit"})
    with pytest.raises(ValueError, match=r"state must be one of .*got '9bit'"):
        fo.optim.Partition(p, TRANSFORMS, of_labels, state="9bit")
