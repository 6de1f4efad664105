"""Parameters, gradients and loops for the tests of the stateful optimizers."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

import functorch_opt as fo

SHAPES = {
    "conv": (2, 3, 1, 2),
    "bias": (2,),
    "scalar": (),
    "empty": (0, 2),
    "matrix": (4, 3),
}


SHAPES_OF = {
    "Adafactor": {
        "conv": (2, 3, 4, 2),
        "bias": (2,),
        "scalar": (),
        "row": (1, 5),
        "matrix": (4, 3),
    },
    "Muon": {
        "tall": (4, 3),
        "wide": (3, 4),
        "square": (5, 5),
        "row": (1, 6),
        "large": (20, 30),
    },
}
"""The shapes for classes that do not take every shape.

torch's Adafactor divides by the size of a tensor, so it takes no empty ones.
"""


def make_params(
    dtype: torch.dtype = torch.float64, seed: int = 0, of: str = ""
) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    shapes = SHAPES_OF.get(of, SHAPES).values()
    return [
        nn.Parameter(
            torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        )
        for shape in shapes
    ]


def set_grads(
    params: list[nn.Parameter], step: int, missing: tuple[int, ...] = ()
) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for i, p in enumerate(params):
        g = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
        assert g.numel() == 0 or (g != 0).all()
        p.grad = None if i in missing else g


def train(
    opt: torch.optim.Optimizer,
    params: list[nn.Parameter],
    steps: int,
    start: int = 0,
    missing_at: dict[int, tuple[int, ...]] | None = None,
) -> list[Tensor]:
    for step in range(start, start + steps):
        set_grads(params, step, (missing_at or {}).get(step, ()))
        opt.step()
    return [p.detach().clone() for p in params]


TORCH_NAMED = [
    name
    for name, cls in vars(fo.optim).items()
    if isinstance(cls, type)
    and issubclass(cls, fo.optim.Optimizer)
    and hasattr(torch.optim, name)
]
TORCH_NAMED.remove("Optimizer")
"""Our classes with torch's names. LBFGS and SparseAdam are torch's own."""


FREEZE = {2: (0, 1, 2, 3, 4), 4: (1,), 5: (1,), 6: (1, 2)}
"""At step 2 nobody has a gradient; later some have none for a while: their counts must stand
still.
"""


def torchs(name: str, params: list, **options) -> torch.optim.Optimizer:
    """torch's class, as a loop over the parameters."""
    return getattr(torch.optim, name)(
        params, **options, **({} if name == "Muon" else {"foreach": False})
    )


def model_and_loss() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    return (
        nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)),
        torch.randn(32, 4),
        torch.randn(32, 1),
    )


SCHEDULERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda e: 0.9**e),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda e: 0.95),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 3, 0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 5], 0.5),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 8),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 8),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(
        o, 4
    ),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=3),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=24),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.1), lr_scheduler.ExponentialLR(o, 0.9)], [4]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.1), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
}
