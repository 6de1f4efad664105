"""Libraries that wrap an optimizer, or average what it trains: timm's Lookahead, the wrapper of
schedulefree, and torch_ema."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from common import (
    Make,
    accuracy,
    assert_equal,
    assert_same,
    batches,
    each_with_options,
    model,
    torchs,
)
from schedulefree import ScheduleFreeWrapper
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch_ema import ExponentialMovingAverage

Wrap = Callable[[torch.optim.Optimizer], Any]


def lookahead(optimizer: torch.optim.Optimizer) -> Any:
    """timm imports torchvision, which must be built for this very torch; this file of it does
    not."""
    place = importlib.util.find_spec("timm").submodule_search_locations[0]
    file = Path(place) / "optim" / "lookahead.py"
    spec = importlib.util.spec_from_file_location("lookahead_of_timm", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Lookahead(optimizer, alpha=0.5, k=3)


def weights(net: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def train(
    net: nn.Module, optimizer: Any, epochs: int = 1, after: Callable[[], Any] = list
) -> list[Tensor]:
    steps = []
    for _ in range(epochs):
        for x, y in batches():
            optimizer.zero_grad()
            cross_entropy(net(x), y).backward()
            optimizer.step()
            after()
            steps.append(weights(net))
    return steps


def start(make: Make, wrap: Wrap) -> tuple[nn.Module, Any]:
    net = model()
    groups = [
        {"params": net[0].parameters()},
        {"params": net[2].parameters(), "lr": 0.02},
    ]
    return net, wrap(make(groups))


@each_with_options
def test_lookahead_of_timm(make: Make) -> None:
    runs = []
    for one in (make, torchs):
        net, optimizer = start(one, lookahead)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 20, 0.5)
        runs.append(train(net, optimizer, 2, scheduler.step))
        assert accuracy(net) > 0.9
        assert [group["lookahead_step"] for group in optimizer.param_groups] == [56, 56]
    assert_same(*runs)


@each_with_options
def test_lookahead_of_timm_resumes(make: Make) -> None:
    """The slow weights are with the state of the optimizer inside."""
    net, optimizer = start(make, lookahead)
    train(net, optimizer)
    saved = deepcopy((net.state_dict(), optimizer.state_dict()))
    rest = train(net, optimizer)
    other, again = start(make, lookahead)
    other.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    assert_equal(train(other, again), rest)


def schedule_free(optimizer: torch.optim.Optimizer) -> Any:
    return ScheduleFreeWrapper(optimizer, momentum=0.9, weight_decay_at_y=0.1)


def begun(params: Any) -> torch.optim.Optimizer:
    """torch's AdamW takes a parameter with an entry of somebody else for one that has stepped."""
    optimizer = torchs(params)
    for group in optimizer.param_groups:
        for p in group["params"]:
            zeros = {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
            optimizer.state[p].update(zeros, step=torch.tensor(0.0))
    return optimizer


@each_with_options
def test_the_wrapper_of_schedulefree(make: Make) -> None:
    """It swaps the bits of a parameter and of an entry in its state before and after each step."""
    runs = []
    for one in (make, begun):
        net, optimizer = start(one, schedule_free)
        steps = []
        for _ in range(2):
            optimizer.train()
            steps += train(net, optimizer)
            optimizer.eval()
            steps.append(weights(net))
        assert accuracy(net) > 0.9
        runs.append(steps)
    assert_same(*runs)


@each_with_options
def test_the_wrapper_of_schedulefree_resumes(make: Make) -> None:
    net, optimizer = start(make, schedule_free)
    optimizer.train()
    train(net, optimizer)
    saved = deepcopy((net.state_dict(), optimizer.state_dict()))
    rest = train(net, optimizer)
    other, again = start(make, schedule_free)
    again.train()
    other.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    assert_equal(train(other, again), rest)


@each_with_options
def test_averages_of_torch_ema(make: Make) -> None:
    runs = []
    for one in (make, torchs):
        net = model()
        optimizer = one(net.parameters())
        ema = ExponentialMovingAverage(net.parameters(), decay=0.9)
        steps = train(net, optimizer, 1, ema.update)
        own = weights(net)
        with ema.average_parameters():
            steps.append(weights(net))
            assert accuracy(net) > 0.8 and not torch.equal(weights(net), own)
        assert torch.equal(weights(net), own)
        ema.copy_to()
        steps += train(net, optimizer)  # from the averages on
        runs.append(steps)
    assert_same(*runs)
