"""Groups that are frozen and thawed at a step: who is trained when, and what becomes of the state."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import functorch_opt as fo

groups, FreezeSchedule = fo.optim.groups, fo.optim.FreezeSchedule
STEPS = 12
X = torch.randn(16, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Linear(3, 4)
        self.blocks = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        self.head = nn.Linear(4, 1)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.blocks(torch.tanh(self.stem(x)))))


def grouped(net: Net, **options) -> fo.optim.ParamGroups:
    rules = fo.optim.layer_decay(0.5), fo.optim.no_decay()
    return groups(net, *rules, **{"lr": 0.1, "weight_decay": 0.1, **options})


OPTIMIZERS = {
    "ours": lambda net: fo.optim.AdamW(grouped(net)),
    "compiled": lambda net: fo.optim.AdamW(grouped(net), compile=True),
    "torch": lambda net: torch.optim.AdamW(grouped(net)),
    "chain": lambda net: fo.optim.Optimizer(
        groups(net, fo.optim.layer_decay(0.5), lr=1.0),
        fo.chain(fo.clip_by_global_norm(1.0), fo.adamw(0.1)),
    ),
    "partition": lambda net: fo.optim.Partition(
        groups(
            net,
            fo.optim.layer_decay(0.5),
            {
                lambda path, p: p.ndim > 1: {"algorithm": "muon", "name": "m"},
                "*": {"algorithm": "adam"},
            },
        ),
        {"muon": fo.muon(0.02), "adam": fo.adam(0.1)},
    ),
}


def training_step(net: Net, optimizer, freeze, scheduler=None) -> list[str]:
    """The names of the parameters that moved."""
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    optimizer.zero_grad()
    (net(X) - 1.0).square().mean().backward()
    optimizer.step()
    if scheduler is not None:
        scheduler.step()
    freeze.step()
    return [n for n, p in net.named_parameters() if not torch.equal(p, before[n])]


def layers_of(names: list[str]) -> list[str]:
    return [*dict.fromkeys(name.rsplit(".", 1)[0] for name in names)]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_one_layer_more_from_time_to_time(name: str) -> None:
    net = Net()
    optimizer = OPTIMIZERS[name](net)
    freeze = FreezeSchedule(optimizer, fo.optim.from_the_head_down(optimizer, every=3))
    order = ["head", "blocks.1", "blocks.0", "stem"]
    for step in range(STEPS + 2):
        moved = layers_of(training_step(net, optimizer, freeze))
        assert sorted(moved) == sorted(order[: 1 + step // 3]), step


@pytest.mark.parametrize("name", ["ours", "torch"])
def test_no_schedule_starts_anew(name: str) -> None:
    """The learning rates are those of a training without freezing, at each step."""
    rates = []
    for trained in ({}, {"layer 0*": 5, "layer 1*": (2, 7)}):
        net = Net()
        optimizer = OPTIMIZERS[name](net)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
        freeze = FreezeSchedule(optimizer, trained)
        seen = []
        for _ in range(STEPS):
            seen.append([group["lr"] for group in optimizer.param_groups])
            training_step(net, optimizer, freeze, scheduler)
        rates.append(seen)
    assert rates[0] == rates[1]
    assert optimizer.state[net.stem.weight]["step"] == STEPS - 5
    assert optimizer.state[net.blocks[0].weight]["step"] == 5
    assert optimizer.state[net.head.weight]["step"] == STEPS


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("state", ["keep", "drop"])
def test_the_state_is_kept_or_dropped(name: str, state: str) -> None:
    net = Net()
    optimizer = OPTIMIZERS[name](net)
    freeze = FreezeSchedule(optimizer, {"layer 3*": (0, 4)}, state=state)
    held = []
    for step in range(6):
        held.append(copy.deepcopy(optimizer.state.get(net.head.weight)))
        moved = training_step(net, optimizer, freeze)
        assert ("head.weight" in moved) == (step < 4)
    if state == "drop":
        assert net.head.weight not in optimizer.state
        assert net.stem.weight in optimizer.state
    else:
        assert held[5].keys() == held[3].keys()
        now = optimizer.state[net.head.weight]
        assert all(torch.equal(torch.as_tensor(x), now[k]) for k, x in held[5].items())


@pytest.mark.parametrize("name", ["ours", "torch"])
@pytest.mark.parametrize("state", ["keep", "drop"])
def test_a_group_that_is_thawed_again(name: str, state: str) -> None:
    """It goes on where it was, or starts anew."""
    net = Net()
    optimizer = OPTIMIZERS[name](net)
    freeze = FreezeSchedule(optimizer, {"layer 3*": (0, 3)}, state=state)
    for _ in range(5):
        training_step(net, optimizer, freeze)
    again = FreezeSchedule(optimizer, {"layer 3*": 0}, state=state)
    training_step(net, optimizer, again)
    steps = optimizer.state[net.head.weight]["step"]
    assert steps == (4 if state == "keep" else 1)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("stop", [1, 4, 8])
def test_saved_in_the_middle(name: str, stop: int) -> None:
    """What is resumed goes on bit for bit."""

    def begin():
        net = Net()
        optimizer = OPTIMIZERS[name](net)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
        trained = {**fo.optim.from_the_head_down(optimizer, every=3)}
        for called in trained:
            if called.startswith("layer 3"):
                trained[called] = (0, 6)
        freeze = FreezeSchedule(optimizer, trained, state="drop")
        return net, optimizer, freeze, scheduler

    whole = begin()
    for step in range(STEPS):
        if step == stop:
            saved = [copy.deepcopy(part.state_dict()) for part in whole]
        training_step(*whole)
    resumed = begin()
    for part, of in zip(resumed, saved, strict=True):
        part.load_state_dict(of)
    for _ in range(stop, STEPS):
        training_step(*resumed)
    assert all(map(torch.equal, whole[0].parameters(), resumed[0].parameters()))


def test_epochs_are_what_is_counted_once_an_epoch() -> None:
    net = Net()
    optimizer = OPTIMIZERS["ours"](net)
    freeze = FreezeSchedule(optimizer, fo.optim.from_the_head_down(optimizer, 1, first=2))
    shown = []
    for _ in range(3):
        shown.append([p.requires_grad for p in (net.stem.weight, net.blocks[0].weight)])
        freeze.step()
    assert shown == [[False, False], [False, True], [True, True]]


def test_a_frozen_parameter_neither_decays_nor_has_a_gradient() -> None:
    net = Net()
    optimizer = OPTIMIZERS["ours"](net)
    (net(X) - 1.0).square().mean().backward()
    assert net.stem.weight.grad is not None
    FreezeSchedule(optimizer, {"layer 0*": 5})
    assert net.stem.weight.grad is None
    before = net.stem.weight.detach().clone()
    optimizer.step()
    assert torch.equal(before, net.stem.weight)


def test_frozen_integers_stay_frozen() -> None:
    table = nn.Parameter(torch.ones(2, dtype=torch.int8), requires_grad=False)
    w = nn.Parameter(torch.ones(2))
    optimizer = fo.optim.SGD([{"params": [w, table], "name": "all"}], lr=0.1)
    freeze = FreezeSchedule(optimizer, {"all": 1})
    freeze.step()
    assert w.requires_grad and not table.requires_grad


def test_unfreezing_in_the_functional_layer() -> None:
    """A gate in a partition; the schedule is outside of it, and does not wait."""
    schedule = fo.linear_schedule(1.0, 0.0, 10)
    parts = {
        "head": fo.scale_by_adam(),
        "body": fo.conditionally_mask(fo.scale_by_adam(), lambda step: step >= 3),
    }
    tx = fo.chain(
        fo.partition(parts, lambda path, p: path), fo.scale_by_learning_rate(schedule)
    )
    params = {"head": torch.ones(2), "body": torch.ones(2)}
    state = tx.init(params)
    for step in range(5):
        updates, state = tx.update(params, state, params)
        rate = 1 - step / 10
        torch.testing.assert_close(updates["head"], torch.full((2,), -rate))
        wanted = torch.full((2,), -rate if step >= 3 else 0.0)
        torch.testing.assert_close(updates["body"], wanted)


@pytest.mark.parametrize(
    ("trained", "message"),
    [
        ({"tail": 3}, "no group is called 'tail'; there are 'layer 0: before"),
        ({"layer 0*": 3, "*decay": 2}, "all stand for the group 'layer 0"),
        ({"layer 0*": -1}, r"when 'layer 0\*' is trained must be a whole number"),
        ({"layer 0*": 1.5}, r"when 'layer 0\*' is trained must be a whole number"),
        ({"layer 0*": (4, 4)}, r"the end of 'layer 0\*' must be a whole number from 5"),
    ],
)
def test_what_cannot_be_scheduled(trained, message) -> None:
    with pytest.raises(ValueError, match=message):
        FreezeSchedule(OPTIMIZERS["ours"](Net()), trained)


def test_more_refusals() -> None:
    optimizer = torch.optim.SGD(Net().parameters(), lr=0.1)
    with pytest.raises(ValueError, match="each group needs a name of its own"):
        fo.optim.from_the_head_down(optimizer, 3)
    with pytest.raises(ValueError, match="state must be 'keep' or 'drop'"):
        FreezeSchedule(optimizer, {}, state="lose")
    with pytest.raises(ValueError, match="every must be a whole number from 1"):
        fo.optim.from_the_head_down(optimizer, 0)
