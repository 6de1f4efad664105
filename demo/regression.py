"""Section 1, y = 2x: gradient descent by hand, then four optimizers under three learning-rate
policies.
"""

from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from torch.func import grad_and_value

import functorch_opt as fo
from demo.common import (
    BLACK,
    BLUE,
    GREEN,
    ORANGE,
    PINK,
    RED,
    SKY,
    plt,
    save,
    say,
    table,
    title,
    track,
)

ITERATIONS = 1_000
SIGMA = 0.3  # standard deviation of the noise on every gradient
X = torch.linspace(-1, 1, 100)
Y = 2 * X

POLICIES = {
    "constant": fo.constant_schedule(0.1),
    "exponential decay": fo.exponential_decay(0.1, transition_steps=250, decay_rate=0.1),
    "step decay": fo.exponential_decay(
        0.1, transition_steps=250, decay_rate=0.1, staircase=True
    ),
}
OPTIMIZERS = {
    "gradient descent": fo.sgd,
    "noisy SGD": lambda learning_rate: fo.noisy_sgd(
        learning_rate, eta=SIGMA**2, gamma=0.0, key=0
    ),
    "Adam": fo.adam,
    "RMSprop": fo.rmsprop,
}

Params = dict[str, Tensor]
Run = tuple[Params, list[float]]  # the params learned, and the loss at every iteration


def initial_params() -> Params:
    return {"w": torch.tensor(-1.0), "b": torch.tensor(1.0)}


def loss_fn(params: Params) -> Tensor:
    return torch.mean((params["w"] * X + params["b"] - Y) ** 2)


def train_by_hand(learning_rate: float, iterations: int) -> Run:
    params, losses = initial_params(), []
    for _ in range(iterations):
        grads, loss = grad_and_value(loss_fn)(params)
        params = {name: params[name] - learning_rate * grads[name] for name in params}
        losses.append(loss.item())
    return params, losses


def train(tx: fo.GradientTransformation, iterations: int) -> Run:
    params, losses = initial_params(), []
    state = tx.init(params)
    for _ in range(iterations):
        grads, loss = grad_and_value(loss_fn)(params)
        updates, state = tx.update(grads, state, params)
        params = fo.apply_updates(params, updates)
        losses.append(loss.item())
    return params, losses


# ---- the section ---------------------------------------------------------------------------------


def run(out: Path) -> Path:
    title("1. Linear regression: y = 2x")
    by_hand, sgd = train_by_hand(0.1, ITERATIONS), train(fo.sgd(0.1), ITERATIONS)
    pairs = [(optimizer, policy) for optimizer in OPTIMIZERS for policy in POLICIES]
    runs = {
        (o, p): train(OPTIMIZERS[o](POLICIES[p]), ITERATIONS)
        for o, p in track(pairs, "4 optimizers, 3 policies", len(pairs))
    }

    named = {
        ("gradient descent by hand", "constant"): by_hand,
        ("fo.sgd(0.1)", "constant"): sgd,
        **runs,
    }
    rows = [
        [*name, f"{losses[-1]:.1e}", f"{params['w'].item():.6f}"]
        for name, (params, losses) in named.items()
    ]
    table(
        rows,
        ["optimizer", "learning rate 0.1", "final loss", "learned weight"],
        numbers_from=2,
    )
    difference = max(abs(a - b) for a, b in zip(by_hand[1], sgd[1], strict=True))
    say(
        f"{ITERATIONS:,} iterations each; the noise on the gradients of noisy SGD has mean 0 and standard deviation {SIGMA}."
    )
    say(
        f"Largest difference in loss, by hand against fo.sgd(0.1), over all iterations: {difference:g}."
    )
    return save(
        _draw(by_hand[1], {name: losses for name, (_, losses) in runs.items()}),
        out / "1_regression.png",
    )


def _draw(by_hand: list[float], losses: dict[tuple[str, str], list[float]]) -> Figure:
    colors = dict(zip(OPTIMIZERS, [BLUE, ORANGE, GREEN, RED], strict=True))
    styles = dict(
        zip(
            POLICIES,
            [
                {"color": BLACK, "lw": 2},
                {"color": SKY, "lw": 1.8},
                {"color": PINK, "lw": 1.2},
            ],
            strict=True,
        )
    )
    figure = plt.figure(figsize=(14, 8))
    grid = figure.add_gridspec(2, 4, height_ratios=[1.2, 1])

    everyone = figure.add_subplot(grid[0, :3])
    everyone.set(
        title="Constant learning rate: all but the noisy one go down to rounding; noise leaves a floor"
    )
    everyone.set_ylabel("mean squared error")
    for name, color in colors.items():
        everyone.plot(_visible(losses[name, "constant"]), color=color, lw=1.5, label=name)
    everyone.plot(
        by_hand,
        color=BLACK,
        lw=2,
        ls=(0, (1, 3)),
        label="gradient descent by hand: the same line",
    )
    everyone.text(ITERATIONS, 1.4e-15, "exactly 0", ha="right", va="bottom")
    everyone.legend(loc="center right", bbox_to_anchor=(1, 0.45))
    _loss_axes(everyone)

    rates = figure.add_subplot(grid[0, 3], title="The three policies")
    rates.set(
        xlabel="iteration", ylabel="learning rate", yscale="log", xlim=(0, ITERATIONS)
    )
    for policy, schedule in POLICIES.items():
        rates.plot(
            schedule(torch.arange(ITERATIONS)).numpy(), **styles[policy], label=policy
        )
    rates.legend(loc="lower left")

    findings = [
        "decay stops it early",
        "decay lowers the floor",
        "needs no decay here",
        "exact under every policy",
    ]
    for column, (name, finding) in enumerate(zip(OPTIMIZERS, findings, strict=True)):
        panel = figure.add_subplot(grid[1, column], title=f"{name}: {finding}")
        for policy in POLICIES:
            panel.plot(_visible(losses[name, policy]), **styles[policy], label=policy)
        _loss_axes(panel)
    figure.axes[2].set_ylabel("mean squared error")
    figure.axes[-1].legend(loc="center right")
    return figure


def _visible(losses: list[float]) -> list[float]:
    """The losses with 0 at the lower edge, because a logarithmic axis has no 0."""
    return [max(loss, 1e-15) for loss in losses]


def _loss_axes(axes: Axes) -> None:
    axes.set(yscale="log", ylim=(5e-16, 10), xlim=(0, ITERATIONS), xlabel="iteration")
