"""Contenders for ordinary loops: the classes of `fo.optim` as they are by default, beside torch's as
they are by default; small models with one and two groups, compiled, beside torch's fused step.
"""

from __future__ import annotations

import torch
from torch import Tensor

import functorch_opt as fo
from benchmarks.chains import EMA, MAX_NORM, schedule
from benchmarks.contenders import BETAS, DECAY, EPS, LR, Adapter, Fused, TorchOptim

MOMENTUM = 0.9

# ---- the default step ----------------------------------------------------------------------------


class DefaultAdamW(TorchOptim):
    name = "functorch_opt optim.AdamW"

    def make(self) -> torch.optim.Optimizer:
        return fo.optim.AdamW(self.ps, lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY)


class TorchAdamW(TorchOptim):
    name, options = "torch.optim.AdamW", {}


class DefaultSGD(TorchOptim):
    name = "functorch_opt optim.SGD"

    def make(self) -> torch.optim.Optimizer:
        return fo.optim.SGD(self.ps, lr=LR, momentum=MOMENTUM)


class TorchSGD(TorchOptim):
    name = "torch.optim.SGD"

    def make(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.ps, lr=LR, momentum=MOMENTUM)


ADAMW = (DefaultAdamW, TorchAdamW)
SGD = (DefaultSGD, TorchSGD)

# ---- memory of the default step ------------------------------------------------------------------


class Chain(TorchOptim):
    name = "functorch_opt optim.Optimizer: clip, AdamW, schedule, mean"

    def make(self) -> torch.optim.Optimizer:
        tx = fo.chain(
            fo.clip_by_global_norm(MAX_NORM),
            fo.adamw(schedule(), *BETAS, EPS, weight_decay=DECAY),
            fo.params_ema(EMA, debias=False),
        )
        return fo.optim.Optimizer(self.ps, tx)


class BFloat16(DefaultAdamW):
    name = "functorch_opt optim.AdamW, bfloat16 with float32 state"

    def __init__(self, ps: list[Tensor], gs: list[Tensor]) -> None:
        super().__init__([p.bfloat16() for p in ps], [g.bfloat16() for g in gs])


# ---- small models, compiled ----------------------------------------------------------------------


def with_and_without_decay(ps: list[Tensor]) -> list[dict[str, object]]:
    """The two groups that most programs make: matrices decay, and vectors do not."""
    matrices = [p for p in ps if p.dim() > 1]
    vectors = [p for p in ps if p.dim() < 2]
    return [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]


class TwoGroups(TorchOptim):
    name = "functorch_opt optim, compile=True, two groups"

    def make(self) -> torch.optim.Optimizer:
        groups = with_and_without_decay(self.ps)
        options = {"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": DECAY}
        return fo.optim.AdamW(groups, **options, compile=True)


class TwoGroupsFused(TorchOptim):
    name = "torch fused, two groups"

    def make(self) -> torch.optim.Optimizer:
        groups = with_and_without_decay(self.ps)
        options = {"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": DECAY}
        return torch.optim.AdamW(groups, **options, fused=True)


NEWCOMER = (Adapter, Fused)
GROUPS = (TwoGroups, TwoGroupsFused)
