"""accelerate: a loop of one's own, prepared by an `Accelerator`."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from common import (
    Make,
    accuracy,
    assert_equal,
    assert_same,
    batches,
    each_optimizer,
    model,
    torchs,
    watched,
)
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LambdaLR

CLIP = 0.003


def train(
    make: Make, epochs: range, *, load: str | None = None, save: str | None = None
) -> tuple[torch.nn.Module, list[Tensor]]:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    net = model()
    optimizer = make(net.parameters())
    scheduler = LambdaLR(optimizer, lambda step: 1 / (1 + 0.01 * step))
    net, optimizer, loader, scheduler = accelerator.prepare(
        net, optimizer, batches(), scheduler
    )
    assert type(optimizer) is AcceleratedOptimizer
    if load is not None:
        accelerator.load_state(load)
    with watched() as steps:
        for _ in epochs:
            optimizer.train()
            for x, y in loader:
                with accelerator.accumulate(net):
                    accelerator.backward(cross_entropy(net(x), y))
                    if accelerator.sync_gradients:
                        assert any((p.grad.abs() > CLIP).any() for p in net.parameters())
                        accelerator.clip_grad_value_(net.parameters(), CLIP)
                    optimizer.step()
                    scheduler.step()
                    optimizer.zero_grad()
            optimizer.eval()
    if save is not None:
        accelerator.save_state(save)
    return net, steps


@each_optimizer
def test_46_train(make: Make) -> None:
    """Accumulation, clipping and a scheduler; `train` and `eval`, which do nothing."""
    runs: list[Any] = []
    for one in (make, torchs):
        net, steps = train(one, range(4))
        assert len(steps) == 4 * 14
        assert accuracy(net) > 0.9
        runs.append(steps)
    assert_same(*runs)


@each_optimizer
def test_46_resume(make: Make) -> None:
    _, whole = train(make, range(2))
    _, start = train(make, range(1), save="state")
    _, rest = train(make, range(1, 2), load="state")
    assert_equal(start + rest, whole)
