"""What the clients train, with which optimizers, and how two trainings are compared.

A client trains twice: with one of our optimizers and with torch's AdamW. After every step all parameters must agree, in float64 up to
rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import DataLoader, TensorDataset

import functorch_opt as fo

LR, WEIGHT_DECAY, BATCH = 0.01, 0.1, 64

Make = Callable[[Iterable[Any]], torch.optim.Optimizer]


def torchs(params: Iterable[Any]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=LR, weight_decay=WEIGHT_DECAY)


def named(params: Iterable[Any], compile: bool = False) -> fo.optim.Optimizer:
    return fo.optim.AdamW(params, lr=LR, weight_decay=WEIGHT_DECAY, compile=compile)


def decayed(learning_rate: float, weight_decay: float = 0.0) -> fo.GradientTransformation:
    """AdamW again, as a chain of its stages."""
    return fo.chain(
        fo.scale_by_adam(),
        fo.add_decayed_weights(weight_decay),
        fo.scale_by_learning_rate(learning_rate),
    )


def chained(params: Iterable[Any], compile: bool = False) -> fo.optim.Optimizer:
    return fo.optim.Optimizer(params, decayed(LR, WEIGHT_DECAY), compile=compile)


def optioned(params: Iterable[Any], compile: bool = False) -> fo.optim.Optimizer:
    """The same chain, whose numbers are options of the groups."""
    return fo.optim.Optimizer(
        params, decayed, compile=compile, learning_rate=LR, weight_decay=WEIGHT_DECAY
    )


def named_compiled(params: Iterable[Any]) -> fo.optim.Optimizer:
    return named(params, compile=True)


def chained_compiled(params: Iterable[Any]) -> fo.optim.Optimizer:
    return chained(params, compile=True)


def optioned_compiled(params: Iterable[Any]) -> fo.optim.Optimizer:
    return optioned(params, compile=True)


each_optimizer = pytest.mark.parametrize(
    "make",
    [named, chained, named_compiled, chained_compiled],
    ids=lambda make: make.__name__,
)

each_with_options = pytest.mark.parametrize(
    "make",
    [named, optioned, named_compiled, optioned_compiled],
    ids=lambda make: make.__name__,
)


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10)).double()


def digits() -> TensorDataset:
    """scikit-learn's handwritten digits: 1,797 images [64], between 0 and 1."""
    x, y = load_digits(return_X_y=True)
    return TensorDataset(torch.tensor(x / 16), torch.tensor(y))


def batches() -> DataLoader:
    """28 of them; not shuffled, so that an epoch is the same whoever runs it. The images are in no order."""
    return DataLoader(digits(), BATCH, drop_last=True)


def accuracy(net: nn.Module) -> float:
    x, y = digits().tensors
    with torch.no_grad():
        return (net(x).argmax(1) == y).double().mean().item()


@contextmanager
def watched() -> Iterator[list[Tensor]]:
    """All parameters of an optimizer, in one vector, after each step that is taken inside."""
    seen: list[Tensor] = []

    def look(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        seen.append(
            torch.cat(
                [
                    p.detach().flatten()
                    for group in optimizer.param_groups
                    for p in group["params"]
                ]
            )
        )

    handle = register_optimizer_step_post_hook(look)
    try:
        yield seen
    finally:
        handle.remove()


def assert_same(
    ours: list[Tensor], theirs: list[Tensor], tolerance: float = 1e-10
) -> None:
    assert len(ours) == len(theirs) > 0
    for step, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        torch.testing.assert_close(
            a,
            b,
            rtol=tolerance,
            atol=tolerance,
            msg=lambda text, step=step: f"step {step}: {text}",
        )


def assert_equal(ours: list[Tensor], theirs: list[Tensor]) -> None:
    """Bit for bit."""
    assert_same(ours, theirs, tolerance=0.0)
