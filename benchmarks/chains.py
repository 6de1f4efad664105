"""The longer chains, with `functorch_opt` and by hand in eager torch.

A stage that the library does not have is a leafwise rule here.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

import functorch_opt as fo
from benchmarks.contenders import BETAS, DECAY, EPS, LR, Compiled, Contender, Eager

WARMUP, STEPS, EMA, MAX_NORM, ETA, GAMMA = 10, 100_000, 0.999, 1.0, 0.01, 0.55


def schedule() -> Callable[[torch.Tensor], torch.Tensor]:
    return fo.warmup_cosine_decay_schedule(0.0, LR, WARMUP, STEPS)


def lr_factor(count: int) -> float:
    """The same in Python floats, over the peak: what a torch scheduler is given."""
    if count < WARMUP:
        return count / WARMUP
    return 0.5 * (1 + math.cos(math.pi * min((count - WARMUP) / (STEPS - WARMUP), 1)))


# ---- the stage that functorch_opt lacks ----------------------------------------------------------


def cautious() -> fo.GradientTransformation:
    """Drop what points against the gradient, and scale up the rest (Liang et al., 2024).

    Call the step with ``gradient=grads``.
    """

    def prepare(*, gradient):
        return {"gradient": fo.Each(gradient)}

    def kept(g, gradient):
        return (g * gradient > 0).to(g.dtype).sum()

    def rule(g, gradient, kept, n):
        return torch.where(g * gradient > 0, g * (n / (kept + 1)), 0.0)

    return fo.leafwise(rule, prepare, sums={"kept": kept, "n": lambda g: g.numel()})


# ---- clip + AdamW + warmup-cosine + parameter EMA ------------------------------------------------


def ema_chain() -> fo.GradientTransformation:
    return fo.chain(
        fo.clip_by_global_norm(MAX_NORM),
        fo.adamw(schedule(), *BETAS, EPS, weight_decay=DECAY),
        fo.params_ema(EMA, debias=False),
    )


class EmaCompiled(Compiled):
    def chain(self) -> fo.GradientTransformation:
        return ema_chain()


class EmaEager(Eager):
    def chain(self) -> fo.GradientTransformation:
        return ema_chain()


class EmaTorch(Contender):
    name = "torch clip, fused, scheduler, _foreach_lerp_"

    def start(self) -> None:
        for p, g in zip(self.ps, self.gs, strict=True):
            p.requires_grad_()
            p.grad = g
        self.opt = torch.optim.AdamW(
            self.ps, lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY, fused=True
        )
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.opt, lr_factor)
        self.ema = [p.detach().clone() for p in self.ps]

    def step(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.ps, MAX_NORM)
        self.opt.step()
        self.scheduler.step()
        with torch.no_grad():
            torch._foreach_lerp_(self.ema, self.ps, 1 - EMA)


# ---- the research chain --------------------------------------------------------------------------


def research_chain(noise: bool) -> fo.GradientTransformation:
    return fo.chain(
        *([fo.add_noise(ETA, GAMMA, key=0)] if noise else []),
        fo.clip_by_global_norm(MAX_NORM),
        fo.centralize(),
        fo.scale_by_adam(*BETAS, EPS),
        cautious(),
        fo.scale_by_trust_ratio(),
        fo.add_decayed_weights(DECAY),
        fo.scale_by_learning_rate(schedule()),
        fo.params_ema(EMA, debias=False),
    )


class ResearchCompiled(Compiled):
    noise = False

    def chain(self) -> fo.GradientTransformation:
        return research_chain(self.noise)

    def step(self) -> None:
        self.ps, self.state = self.advance(self.ps, self.gs, self.state, gradient=self.gs)


class ResearchEager(Eager):
    noise = False

    def chain(self) -> fo.GradientTransformation:
        return research_chain(self.noise)

    def step(self) -> None:
        self.extra = {"gradient": self.gs}
        super().step()


class ResearchTorch(Contender):
    """As one would write it by hand: in place, foreach wherever it takes whole lists."""

    name, noise = "torch eager, foreach", False

    def start(self) -> None:
        self.count = 0
        self.mu, self.nu = (
            [torch.zeros_like(p) for p in self.ps],
            [torch.zeros_like(p) for p in self.ps],
        )
        self.ema = [p.clone() for p in self.ps]

    @torch.no_grad()
    def step(self) -> None:
        raw = gs = self.gs
        if self.noise:
            sigma = (ETA / (1 + self.count) ** GAMMA) ** 0.5
            gs = [
                torch.randn(g.shape, device=g.device, dtype=g.dtype).mul_(sigma).add_(g)
                for g in gs
            ]
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gs)))
        gs = torch._foreach_mul(gs, torch.clamp(MAX_NORM / norm, max=1.0))
        for g in gs:
            if g.dim() > 1:
                g.sub_(g.mean(tuple(range(1, g.dim())), keepdim=True))
        lr = LR * lr_factor(self.count)
        self.count += 1
        (b1, b2), t = BETAS, self.count
        torch._foreach_lerp_(self.mu, gs, 1 - b1)
        torch._foreach_mul_(self.nu, b2)
        torch._foreach_addcmul_(self.nu, gs, gs, 1 - b2)
        denominator = torch._foreach_sqrt(self.nu)
        torch._foreach_div_(denominator, math.sqrt(1 - b2**t))
        torch._foreach_add_(denominator, EPS)
        us = torch._foreach_div(self.mu, denominator)
        torch._foreach_div_(us, 1 - b1**t)
        for u, g in zip(us, raw, strict=True):
            keep = (u * g > 0).to(u.dtype)
            u.mul_(keep).mul_(keep.numel() / (keep.sum() + 1))
        of_p, of_u = (
            torch.stack(torch._foreach_norm(self.ps)),
            torch.stack(torch._foreach_norm(us)),
        )
        ratios = torch.where((of_p > 0) & (of_u > 0), of_p / of_u, 1.0)
        torch._foreach_mul_(us, list(ratios.unbind()))
        torch._foreach_add_(us, self.ps, alpha=DECAY)
        torch._foreach_add_(self.ps, us, alpha=-lr)
        torch._foreach_lerp_(self.ema, self.ps, 1 - EMA)


class NoiseCompiled(ResearchCompiled):
    noise = True


class NoiseEager(ResearchEager):
    noise = True


class NoiseTorch(ResearchTorch):
    name, noise = "torch eager with torch.randn", True


EMA_CHAIN = (EmaCompiled, EmaTorch, EmaEager)
RESEARCH = (ResearchCompiled, ResearchTorch, ResearchEager)
NOISE = (NoiseCompiled, NoiseTorch, NoiseEager)
