"""Rules of papers, written out as they stand there: where optax has another one, or fails."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import functorch_opt as fo

STEPS = 100


def draw(seed: int) -> dict[str, Tensor]:
    """No entry near zero."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"kernel": (2, 3, 2), "w": (3, 4), "b": (4,), "scale": ()}
    xs = {
        name: torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in shapes.items()
    }
    return {name: x + 0.01 * torch.sign(x) for name, x in xs.items()}


def train(tx: fo.GradientTransformation) -> dict[str, Tensor]:
    params = draw(0)
    state = tx.init(params)
    for step in range(1, STEPS + 1):
        updates, state = tx.update(draw(step), state, params)
        params = fo.apply_updates(params, updates)
    return params


def train_plainly(make: Callable[[Tensor], Callable]) -> dict[str, Tensor]:
    """`make` gets the first value of a parameter, and returns ``(t, g, p) -> next p``."""
    params = draw(0)
    steps = {name: make(p) for name, p in params.items()}
    for t in range(1, STEPS + 1):
        gs = draw(t)
        params = {name: steps[name](t, gs[name], p) for name, p in params.items()}
    return params


def assert_same(
    ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float = 1e-10
) -> None:
    assert not torch.equal(ours["w"], draw(0)["w"])
    for name in theirs:
        torch.testing.assert_close(
            ours[name], theirs[name], rtol=tolerance, atol=tolerance
        )


# ---- Adan, alg. 1, with the decays of the authors' code --------------------------------------------------------------------


def plain_adan(lr: float, b1: float, b2: float, b3: float, eps: float, wd: float):
    def make(p: Tensor) -> Callable:
        m, v, n, last = (torch.zeros_like(p) for _ in range(4))

        def step(t: int, g: Tensor, p: Tensor) -> Tensor:
            nonlocal m, v, n, last
            change = torch.zeros_like(g) if t == 1 else g - last
            m = b1 * m + (1 - b1) * g
            v = b2 * v + (1 - b2) * change
            n = b3 * n + (1 - b3) * (g + b2 * change) ** 2
            last = g
            eta = lr / ((n / (1 - b3**t)).sqrt() + eps)
            return (1 - lr * wd) * p - eta * (m / (1 - b1**t) + b2 * v / (1 - b2**t))

        return step

    return make


@pytest.mark.parametrize(
    "options",
    [
        (0.1, 0.98, 0.92, 0.99, 1e-8, 0.0),
        (0.05, 0.9, 0.7, 0.95, 1e-2, 0.1),
        (0.1, 0.0, 0.9, 0.5, 1e-3, 0.02),
        (0.01, 0.99, 0.0, 0.999, 1e-8, 0.0),
    ],
)
def test_adan_is_that_of_its_authors(options: tuple[float, ...]) -> None:
    lr, b1, b2, b3, eps, wd = options
    ours = train(fo.adan(lr, b1, b2, b3, eps, 0.0, wd))
    assert_same(ours, train_plainly(plain_adan(lr, b1, b2, b3, eps, wd)))


# ---- the weights that Fromage keeps, and torch's NAdamW ------------------------------------------------------------------------


def test_fromage_keeps_the_norm_where_the_gradient_is_at_right_angles() -> None:
    tx, p = fo.fromage(0.3), torch.tensor([3.0, 4.0], dtype=torch.float64)
    for _ in range(10):
        updates, _ = tx.update(torch.stack([-p[1], p[0]]), tx.init(p), p)
        p = fo.apply_updates(p, updates)
    torch.testing.assert_close(p.norm().item(), 5.0, rtol=1e-12, atol=0)


@pytest.mark.parametrize("momentum_decay", [4e-3, 0.1])
def test_nadamw_is_torchs_nadam_with_decoupled_decay(momentum_decay: float) -> None:
    theirs = {name: torch.nn.Parameter(p.clone()) for name, p in draw(0).items()}
    options = {"weight_decay": 0.1, "momentum_decay": momentum_decay}
    optimizer = torch.optim.NAdam(
        theirs.values(), lr=0.01, decoupled_weight_decay=True, **options
    )
    for step in range(1, STEPS + 1):
        for name, g in draw(step).items():
            theirs[name].grad = g
        optimizer.step()
    ours = train(fo.nadamw(0.01, **options))
    # torch multiplies the decays of the momentum in float32.
    assert_same(ours, {name: p.detach() for name, p in theirs.items()}, 1e-8)
