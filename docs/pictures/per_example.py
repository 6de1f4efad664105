"""The picture of `docs/guide-per-example.md`: ``python docs/pictures/per_example.py`` (needs the
extras demo and privacy).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

import functorch_opt as fo

ORANGE, SKY, BLUE, GREEN = (
    "#E69F00",
    "#56B4E9",
    "#0072B2",
    "#009E73",
)  # Okabe and Ito's
DELTA, BATCH, CLIP = 1e-4, 128, 0.5


def digits() -> tuple[Tensor, Tensor]:
    """1,797 digits of 8x8, in an order that is always the same."""
    data = load_digits()
    order = torch.randperm(
        len(data.target), generator=torch.Generator().manual_seed(0)
    )
    return torch.tensor(data.data, dtype=torch.float32)[order] / 16, torch.tensor(
        data.target
    )[order]


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))


net = model()


def loss(params: Any, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(functional_call(net, params, x), y)


def start() -> dict[str, Tensor]:
    return {name: p.detach() for name, p in net.named_parameters()}


def norms_by_label(steps: int) -> tuple[Tensor, Tensor]:
    """Norms of the gradients after training with 10% wrong labels: of the examples with right
    labels, and of those with wrong ones.
    """
    x, y = digits()
    wrong = torch.rand(len(y), generator=torch.Generator().manual_seed(1)) < 0.1
    y = torch.where(wrong, (y + 1) % 10, y)
    params, tx = start(), fo.adam(0.01)
    state = tx.init(params)
    for _ in range(steps):
        updates, state = tx.update(torch.func.grad(loss)(params, x, y), state, params)
        params = fo.apply_updates(params, updates)
    norms = fo.clipped_grad_sum(loss, float("inf"), chunk_size=256)(
        params, x, y
    ).norms
    return norms[~wrong], norms[wrong]


def private_run(sigma: float, steps: int, every: int) -> list[tuple[float, float]]:
    """Pairs of epsilon and accuracy on the 397 digits that were not trained on."""
    x, y = digits()
    train, test = slice(0, 1400), slice(1400, None)
    tx = fo.dpsgd(0.2, CLIP, sigma, key=2, momentum=0.9, expected_batch_size=BATCH)
    clipped_grads = fo.clipped_grad_sum(loss, CLIP, chunk_size=64)
    params, found, sampling = start(), [], fo.random.key(3)
    state = tx.init(params)
    for step in range(1, steps + 1):
        chosen = fo.poisson_sample(fo.random.fold_in(sampling, step), 1400, BATCH)
        updates, state = tx.update(
            clipped_grads(params, x[train][chosen], y[train][chosen]), state, params
        )
        params = fo.apply_updates(params, updates)
        if step % every == 0:
            right = functional_call(net, params, x[test]).argmax(1) == y[test]
            found.append(
                (
                    fo.privacy_spent(sigma, BATCH / 1400, step, DELTA),
                    float(right.float().mean()),
                )
            )
    return found


def draw(
    path: Path,
    steps: int = 200,
    every: int = 25,
    sigmas: tuple[float, ...] = (8.0, 4.0, 2.0),
) -> Path:
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(
        1, 2, figsize=(9, 3.2), constrained_layout=True
    )
    for norms, label, colour in zip(
        norms_by_label(steps),
        ("right label", "wrong label"),
        (SKY, ORANGE),
        strict=True,
    ):
        left.hist(
            norms.clamp(min=1e-3).log10(),
            bins=40,
            density=True,
            alpha=0.8,
            color=colour,
            label=label,
        )
    left.set_xlabel("log10 of the norm of an example's gradient")
    left.set_yticks([])
    left.set_title("Wrong labels stand out", loc="left", fontsize=10)
    for sigma, colour in zip(sigmas, (BLUE, GREEN, ORANGE), strict=False):
        epsilons, accuracies = zip(*private_run(sigma, steps, every), strict=True)
        right.plot(
            epsilons,
            accuracies,
            "o-",
            ms=4,
            color=colour,
            label=f"$\\sigma$ = {sigma:g}",
        )
    right.set_xlabel(f"$\\epsilon$ spent, at $\\delta$ = {DELTA:g}")
    right.set_ylabel("accuracy on held-out digits")
    right.set_title(f"{steps} private steps", loc="left", fontsize=10)
    for axes in (left, right):
        axes.legend(frameon=False, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=100)
    plt.close(figure)
    return path


if __name__ == "__main__":
    print(draw(Path(__file__).with_suffix(".png")))
