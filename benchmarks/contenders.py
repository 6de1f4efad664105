"""The contenders for AdamW: each owns its parameters and gradients, makes a step, and lets its
parameters be read.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

import functorch_opt as fo

LR, BETAS, EPS, DECAY = 1e-3, (0.9, 0.999), 1e-8, 1e-2

OURS = "functorch_opt compiled_step"
OURS_OPTIM = "functorch_opt optim"
FUSED = "torch fused"


class Unavailable(Exception):
    """The reason why a contender cannot take part. Its row shows the reason."""


def draw(
    shapes: Any,
    seed: int,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    scale: float = 1.0,
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (scale * torch.randn(shape, generator=generator)).to(device, dtype)
        for shape in shapes
    ]


def gradients(
    shapes: Any, seed: int, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """Gradients that are not near 0, where eps matters.

    HeavyBall takes the larger of eps and the root, and all others take the sum.
    """
    return [
        x + torch.copysign(torch.full_like(x, 0.01), x)
        for x in draw(shapes, seed, device, dtype)
    ]


class Contender:
    """Copies of the parameters and gradients, and a step on them."""

    name: ClassVar[str]

    def __init__(self, ps: list[Tensor], gs: list[Tensor]) -> None:
        self.ps, self.gs = [p.clone() for p in ps], [g.clone() for g in gs]
        self.start()

    def start(self) -> None:
        """Prepare; raise `Unavailable`, or ImportError, if this cannot run here."""

    def step(self) -> None:
        raise NotImplementedError

    def feed(self, gs: list[Tensor]) -> None:
        """The gradients of the next step."""
        for mine, g in zip(self.gs, gs, strict=True):
            mine.copy_(g)

    def read(self) -> list[Tensor]:
        return [p.detach() for p in self.ps]


def same(results: list[list[Tensor]], rtol: float = 1e-4, atol: float = 1e-5) -> float:
    """The largest difference between the two lists, relative to the tolerance. At most 1 counts as
    the same.
    """
    first, second = results
    return max(
        ((a.float() - b.float()).abs() / (atol + rtol * b.float().abs())).max().item()
        for a, b in zip(second, first, strict=True)
    )


# ---- torch.optim ---------------------------------------------------------------------------------


class TorchOptim(Contender):
    options: ClassVar[dict[str, Any]]

    def start(self) -> None:
        for p, g in zip(self.ps, self.gs, strict=True):
            p.requires_grad_()
            p.grad = g
        self.opt = self.make()

    def make(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(
            self.ps, lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY, **self.options
        )

    def step(self) -> None:
        self.opt.step()


class Fused(TorchOptim):
    name, options = FUSED, {"fused": True}


class Foreach(TorchOptim):
    name, options = "torch foreach", {"foreach": True}


class ForLoop(TorchOptim):
    name, options = "torch for-loop", {"foreach": False, "fused": False}


# ---- functorch_opt -------------------------------------------------------------------------------


def our_adamw() -> fo.GradientTransformation:
    return fo.adamw(LR, *BETAS, EPS, weight_decay=DECAY)


class Compiled(Contender):
    name = OURS

    def chain(self) -> fo.GradientTransformation:
        return our_adamw()

    def start(self) -> None:
        tx = self.chain()
        self.extra: dict[str, Any] = {}
        self.advance, self.state = fo.compiled_step(tx, donate=True), tx.init(self.ps)

    def step(self) -> None:
        self.ps, self.state = self.advance(self.ps, self.gs, self.state, **self.extra)


class Eager(Contender):
    name = "functorch_opt eager"

    def chain(self) -> fo.GradientTransformation:
        return our_adamw()

    def start(self) -> None:
        self.extra: dict[str, Any] = {}
        self.tx = self.chain()
        self.state = self.tx.init(self.ps)

    def step(self) -> None:
        updates, self.state = self.tx.update(self.gs, self.state, self.ps, **self.extra)
        self.ps = fo.apply_updates(self.ps, updates)


class Adapter(TorchOptim):
    """The class with torch's name, its step compiled."""

    name = f"{OURS_OPTIM}, compile=True"

    def make(self) -> torch.optim.Optimizer:
        return fo.optim.AdamW(
            self.ps, lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY, compile=True
        )


# ---- others --------------------------------------------------------------------------------------


class Optax(Contender):
    name = "optax jitted, donated"

    def start(self) -> None:
        import jax
        import optax

        self.jax, device = jax, jax.devices("cpu")[0]
        self.put = lambda xs: jax.device_put([x.numpy().copy() for x in xs], device)
        tx = optax.adamw(LR, *BETAS, eps=EPS, weight_decay=DECAY)

        def advance(ps: Any, gs: Any, state: Any) -> Any:
            updates, state = tx.update(gs, state, ps)
            return optax.apply_updates(ps, updates), state

        self.advance = jax.jit(advance, donate_argnums=(0, 2))
        self.ps, self.gs = self.put(self.ps), self.put(self.gs)
        self.state = jax.jit(tx.init)(self.ps)

    def step(self) -> None:
        self.ps, self.state = self.advance(self.ps, self.gs, self.state)
        self.jax.block_until_ready(self.ps)

    def feed(self, gs: list[Tensor]) -> None:
        self.gs = self.put(gs)

    def read(self) -> list[Tensor]:
        import numpy as np

        return [torch.from_numpy(np.array(p)) for p in self.ps]


class HeavyBall(TorchOptim):
    """It takes the gradients away after every step, so they are given again; that is a pointer per
    tensor.
    """

    name = "HeavyBall AdamW"

    def make(self) -> torch.optim.Optimizer:
        import heavyball

        return heavyball.AdamW(self.ps, lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY)

    def step(self) -> None:
        for p, g in zip(self.ps, self.gs, strict=True):
            p.grad = g
        self.opt.step()


class TorchOpt(Contender):
    """Pure: ``inplace=False``, new parameters and a new state, as `functorch_opt` eager."""

    name = "torchopt functional, pure"
    inplace = False

    def start(self) -> None:
        import torchopt

        self.apply = torchopt.apply_updates
        self.tx = torchopt.adamw(lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY)
        self.params = tuple(self.ps)
        self.state = self.tx.init(self.params)

    def step(self) -> None:
        with torch.no_grad():
            updates, self.state = self.tx.update(
                tuple(self.gs), self.state, params=self.params, inplace=self.inplace
            )
            self.params = self.apply(self.params, updates, inplace=self.inplace)

    def read(self) -> list[Tensor]:
        return list(self.params)


class TorchOptInPlace(TorchOpt):
    name, inplace = "torchopt functional, in place", True


ADAMW = (Compiled, Adapter, Fused, Foreach, ForLoop, Optax, HeavyBall, TorchOpt)
EAGER = (Eager, TorchOpt)
