"""An optimizer for every parameter, which steps inside of the backward pass.

So no two gradients are alive at the same time.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import scenarios
import torch
from torch import Tensor, nn
from torch.distributed.optim import _apply_optimizer_in_backward

import functorch_opt as fo
from functorch_opt._execution import programs, segments

STEPS = 4
OPTIONS: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.1}


def make_net() -> nn.Module:
    """120 parameters in 60 layers, of which no two neighbours have the same sizes."""
    torch.manual_seed(0)
    sizes = [4 + i % 7 for i in range(61)]
    return nn.Sequential(
        *[
            nn.Sequential(nn.Linear(n, m), nn.LayerNorm(m, elementwise_affine=False))
            for n, m in pairwise(sizes)
        ]
    )


def train(net: nn.Module, opt: torch.optim.Optimizer | None = None) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        x = torch.randn(16, 4, generator=generator)
        (net(x) ** 3).mean().backward()
        if opt:
            opt.step()
            opt.zero_grad()
        assert all(p.grad is None for p in net.parameters())
    return [p.detach().clone() for p in net.parameters()]


def by_hand(net: nn.Module, **options: Any) -> None:
    opts = {p: fo.optim.AdamW([p], **OPTIONS, **options) for p in net.parameters()}

    def step(p: Tensor) -> None:
        opts[p].step()
        opts[p].zero_grad()

    for p in opts:
        p.register_post_accumulate_grad_hook(step)


def by_torch(net: nn.Module, **options: Any) -> None:
    _apply_optimizer_in_backward(fo.optim.AdamW, net.parameters(), {**OPTIONS, **options})


@pytest.mark.parametrize("apply", [by_hand, by_torch])
def test_37_an_optimizer_for_each_parameter_is_one_for_all(apply) -> None:
    one, many = make_net(), make_net()
    start = [p.detach().clone() for p in one.parameters()]
    assert len(start) == 120
    apply(many)
    for before, expected, p in zip(
        start,
        train(one, fo.optim.AdamW(one.parameters(), **OPTIONS)),
        train(many),
        strict=True,
    ):
        assert torch.equal(p, expected)
        assert not torch.equal(p, before)


@pytest.mark.slow
def test_37_all_of_them_share_one_compilation(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []

    class Counted(segments.Program):
        def __init__(self, *args: Any) -> None:
            compiled.append(args)
            super().__init__(*args)

    monkeypatch.setattr(segments, "Program", Counted)
    monkeypatch.setattr(segments, "PROGRAMS", programs.Programs())
    one, many = make_net(), make_net()
    # With the default eps a gradient near 0 makes a step of any size of its rounding.
    options = {**OPTIONS, "eps": 1e-4}
    by_hand(many, compile=True, eps=1e-4)
    pairs = zip(
        train(many), train(one, fo.optim.AdamW(one.parameters(), **options)), strict=True
    )
    for p, expected in pairs:
        torch.testing.assert_close(p, expected, rtol=1e-5, atol=1e-6)
    assert len(compiled) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["AdamW", "lamb", "Muon"])
def test_under_fsdp_it_is_a_step_after_backward(ranks, name: str) -> None:
    """FSDP2 averages a gradient, and then calls the hooks of its parameter."""
    for seen in ranks(2).run(scenarios.in_backward, name):
        assert seen["error"] <= (1e-3 if name == "Muon" else 0.0)
        assert seen["moved"] > 1e-4
        assert seen["hooks"] == scenarios.STEPS
        # FSDP2 makes the gradients of a layer together: a weight and a bias.
        assert seen["gradients"] <= 2
