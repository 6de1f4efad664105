"""``benchmarks race --check``: the optimizers of the race beside torch's own classes.

`fo.sweep` trains in one vmapped run what a plain loop with ``torch.optim`` trains one after the
other: the MLP of the digits, in float64, from the same parameters and with the same minibatches. The
losses of all steps must be equal.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import functorch_opt as fo
from benchmarks import report
from benchmarks.race.tasks import digits_mlp

STEPS, BATCH, RATES = 50, 64, (1e-3, 1e-2)
TOLERANCE = 1e-9
"""The largest difference of a loss, over the loss. torch's NAdam keeps a product in float32."""
HALF_PRECISION = 5e-3
"""The same for Muon, whose iteration is in bfloat16: one rounding there is seen."""

Ours = Callable[..., fo.GradientTransformation]
Theirs = Callable[..., torch.optim.Optimizer]
SAME: dict[str, tuple[Ours, Theirs]] = {
    "sgd": (partial(fo.sgd, momentum=0.9), partial(torch.optim.SGD, momentum=0.9)),
    "adam": (fo.adam, torch.optim.Adam),
    "adamw": (partial(fo.adamw, weight_decay=0.01), torch.optim.AdamW),
    "adamax": (fo.adamax, torch.optim.Adamax),
    "nadam": (partial(fo.nadam, momentum_decay=4e-3), torch.optim.NAdam),
    "radam": (partial(fo.radam, variant="torch"), torch.optim.RAdam),
    "rmsprop": (partial(fo.rmsprop, decay=0.99, eps_in_sqrt=False), torch.optim.RMSprop),
    "adagrad": (
        partial(fo.adagrad, eps=0.0),
        partial(torch.optim.Adagrad, initial_accumulator_value=0.1, eps=0.0),
    ),
    "adadelta": (fo.adadelta, torch.optim.Adadelta),
    "asgd": (partial(fo.asgd, t0=1e6), torch.optim.ASGD),
    "rprop": (fo.rprop, torch.optim.Rprop),
    "muon": (
        partial(fo.muon, variant="torch", weight_decay=0.1),
        partial(torch.optim.Muon, weight_decay=0.1),
    ),
}
"""The same rule with the same numbers. What differs in meaning (eps) is set to be the same."""


def matrices() -> nn.Module:
    """The MLP, with matrices only, for torch's Muon takes nothing else."""
    first, last = nn.Linear(64, 32, bias=False), nn.Linear(32, 10, bias=False)
    return nn.Sequential(first, nn.ReLU(), last).double()


def differences(names: list[str] | None = None, steps: int = STEPS) -> dict[str, float]:
    """The largest difference of a loss, over the loss, for each optimizer."""
    return {name: _difference(*SAME[name], steps) for name in names or SAME}


def _difference(ours: Ours, theirs: Theirs, steps: int) -> float:
    x, y = digits_mlp().train
    found = fo.sweep(
        matrices,
        (x.double(), y),
        ours,
        loss=cross_entropy,
        steps=steps,
        batch_size=BATCH,
        compile=False,
        learning_rate=list(RATES),
    )
    alone = [plain_loop(theirs, rate, (x.double(), y), steps) for rate in RATES]
    expected = torch.stack(alone)
    return float(((found.curves - expected).abs() / expected).max())


def plain_loop(
    make: Theirs, rate: float, data: tuple[Tensor, Tensor], steps: int
) -> Tensor:
    """The losses of one model, trained as anyone would."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = matrices()
    x, y = data
    opt, order = make(model.parameters(), lr=rate), torch.Generator().manual_seed(0)
    losses: list[Tensor] = []
    while len(losses) < steps:
        whole = torch.randperm(len(x), generator=order).split(BATCH)
        for rows in whole[: min(len(x) // BATCH, steps - len(losses))]:
            opt.zero_grad()
            loss = cross_entropy(model(x[rows]), y[rows])
            loss.backward()
            opt.step()
            losses.append(loss.detach())
    return torch.stack(losses)


def tolerance(name: str) -> float:
    return HALF_PRECISION if name == "muon" else TOLERANCE


def run() -> dict[str, Any]:
    """Compare all, show it, and return it with the names of those that differ."""
    found = differences()
    wrong = [name for name, apart in found.items() if not apart <= tolerance(name)]
    rows = []
    for name, apart in found.items():
        theirs = SAME[name][1]
        cls = theirs.func if isinstance(theirs, partial) else theirs
        verdict = "DIFFERENT" if name in wrong else "equal"
        other = f"torch.optim.{cls.__name__}"
        rows.append([name, other, f"{apart:.1e}", f"{tolerance(name):.0e}", verdict])
    head = ["", "beside", "largest difference of a loss", "allowed", ""]
    title = f"the race's runs beside torch's classes, {STEPS} steps, float64"
    report.table(title, head, rows, numbers_from=2, numbers_to=4)
    return {"differences": found, "wrong": wrong}
