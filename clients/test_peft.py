"""peft: LoRA over a base of 8-bit integers, which is frozen and in the groups."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from common import Make, assert_equal, assert_same, batches, each_optimizer, model, torchs
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear


class Int8Linear(nn.Linear):
    """A layer whose weight is kept as integers with one scale a row, as libraries that quantise
    do."""

    def __init__(self, of: nn.Linear) -> None:
        super().__init__(of.in_features, of.out_features, dtype=torch.float64)
        scale = of.weight.detach().abs().amax(1, keepdim=True) / 127
        whole = (of.weight.detach() / scale).round().to(torch.int8)
        self.weight = nn.Parameter(whole, requires_grad=False)
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight * self.scale, self.bias)


def adapted() -> nn.Module:
    net = model()
    for i in (0, 2):
        net[i] = Int8Linear(net[i])
    torch.manual_seed(1)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["0", "2"], modules_to_save=[])
    return get_peft_model(net, config).double()


def train(net: nn.Module, optimizer: Any, epochs: int = 1) -> list[Tensor]:
    steps = []
    for _ in range(epochs):
        for x, y in batches():
            optimizer.zero_grad()
            cross_entropy(net(x), y).backward()
            optimizer.step()
            trained = [p.detach().flatten() for p in net.parameters() if p.requires_grad]
            steps.append(torch.cat(trained))
    return steps


@each_optimizer
@pytest.mark.parametrize("all_of_them", [True, False])
def test_lora_over_integers(make: Make, all_of_them: bool) -> None:
    """People give the optimizer all parameters, or those that are trained."""
    runs = []
    for one in (make, torchs):
        net = adapted()
        params = [p for p in net.parameters() if all_of_them or p.requires_grad]
        bases = {name: p for name, p in net.named_parameters() if p.dtype is torch.int8}
        before = {name: p.clone() for name, p in bases.items()}
        assert len(bases) == 2 and len(get_peft_model_state_dict(net)) == 4
        optimizer = one(params)
        steps = train(net, optimizer, 2)
        assert all(torch.equal(p, before[name]) for name, p in bases.items())
        assert len(optimizer.state) == 4
        runs.append(steps)
    assert not torch.equal(runs[0][0], runs[0][-1])
    assert_same(*runs)


@each_optimizer
def test_lora_over_integers_resumes(make: Make) -> None:
    net = adapted()
    optimizer = make(net.parameters())
    train(net, optimizer)
    file = io.BytesIO()
    torch.save((net.state_dict(), optimizer.state_dict()), file)
    rest = train(net, optimizer)
    other = adapted()
    again = make(other.parameters())
    file.seek(0)
    weights, state = torch.load(file)
    other.load_state_dict(weights)
    again.load_state_dict(state, strict=True)
    assert_equal(train(other, again), rest)
