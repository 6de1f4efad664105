"""Section 2, handwritten digits: one chain, run as pure functions and as a torch optimizer.

torch's own AdamW is the reference.
"""

import copy
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value
from torch.nn.functional import cross_entropy

import functorch_opt as fo
from demo.common import (
    BLACK,
    BLUE,
    ORANGE,
    RED,
    plt,
    save,
    say,
    smooth,
    table,
    title,
    track,
)

EPOCHS, BATCH, PEAK_LR, WEIGHT_DECAY = 12, 64, 1e-2, 1e-2

Params = dict[str, Tensor]
Steps = Iterator[tuple[Tensor, Params]]  # after every step: the loss, and the params


class Data(NamedTuple):
    x_train: Tensor  # [1437, 8, 8], between 0 and 1
    y_train: Tensor
    x_test: Tensor  # [360, 8, 8]
    y_test: Tensor


def load() -> Data:
    """scikit-learn's digits (they come with it), four fifths of them to train on."""
    digits = load_digits()
    x, y = (
        torch.tensor(digits.images / 16, dtype=torch.float32),
        torch.tensor(digits.target),
    )
    train, test = torch.randperm(
        len(x), generator=torch.Generator().manual_seed(0)
    ).split([1437, 360])
    return Data(x[train], y[train], x[test], y[test])


def minibatches(
    data: Data, epochs: int, batch: int = BATCH, seed: int = 0
) -> list[tuple[Tensor, Tensor]]:
    """The batches of all epochs, each in a new order. The remainder of an epoch is dropped."""
    generator = torch.Generator().manual_seed(seed)
    orders = [
        torch.randperm(len(data.x_train), generator=generator) for _ in range(epochs)
    ]
    return [
        (data.x_train[i], data.y_train[i])
        for order in orders
        for i in order.split(batch)
        if len(i) == batch
    ]


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1, stride=2)
        self.head = nn.Linear(32 * 4 * 4, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv1(x.unsqueeze(1)))  # [n, 16, 8, 8]
        x = torch.relu(self.conv2(x))  # [n, 32, 4, 4]
        return self.head(x.flatten(1))  # [n, 10]


# ---- one chain, trained three ways ---------------------------------------------------------------


def is_weight(path: str, p: Tensor) -> bool:
    return p.ndim > 1


def make_chain(steps: int, eta: float = 1e-6) -> fo.GradientTransformation:
    schedule = fo.warmup_cosine_decay_schedule(
        0.0, PEAK_LR, warmup_steps=steps // 10, decay_steps=steps
    )
    return fo.chain(
        fo.clip_by_global_norm(1.0),
        fo.add_noise(eta=eta, gamma=0.55, key=0),
        fo.scale_by_adam(),
        fo.add_decayed_weights(WEIGHT_DECAY, mask=is_weight),
        fo.scale_by_learning_rate(schedule),
    )


def functional(
    model: nn.Module,
    tx: fo.GradientTransformation,
    batches: Iterable[tuple[Tensor, Tensor]],
) -> Steps:
    """Pure functions: params and state go in, new ones come out."""

    def loss_fn(params: Params, x: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(functional_call(model, params, (x,)), y)

    params = {name: p.detach() for name, p in model.named_parameters()}
    state = tx.init(params)
    for x, y in batches:
        grads, loss = grad_and_value(loss_fn)(params, x, y)
        updates, state = tx.update(grads, state, params)
        params = fo.apply_updates(params, updates)
        yield loss, params


def stateful(
    model: nn.Module,
    tx: fo.GradientTransformation,
    batches: Iterable[tuple[Tensor, Tensor]],
) -> Steps:
    """The same chain as a torch.optim.Optimizer, in an ordinary loop."""
    opt = fo.optim.Optimizer(model.named_parameters(), tx)
    for x, y in batches:
        loss = cross_entropy(model(x), y)
        opt.zero_grad()
        loss.backward()
        opt.step()
        yield loss, dict(model.named_parameters())


def torch_adamw(
    model: nn.Module, steps: int, batches: Iterable[tuple[Tensor, Tensor]]
) -> Steps:
    """The reference, without functorch_opt: the same steps, but for the noise, which torch does not
    have.
    """
    weights, rest = (
        [p for p in model.parameters() if p.ndim > 1],
        [p for p in model.parameters() if p.ndim <= 1],
    )
    opt = torch.optim.AdamW(
        [
            {"params": weights, "weight_decay": WEIGHT_DECAY},
            {"params": rest, "weight_decay": 0.0},
        ],
        lr=PEAK_LR,
    )
    warmup = steps // 10

    def factor(step: int) -> float:
        return (
            step / warmup
            if step < warmup
            else 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))
        )

    scheduler = torch.optim.lr_scheduler.LambdaLR(opt, factor)
    for x, y in batches:
        loss = cross_entropy(model(x), y)
        opt.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        scheduler.step()
        yield loss, dict(model.named_parameters())


# ---- the section ---------------------------------------------------------------------------------


class Record(NamedTuple):
    """What is kept of a run."""

    losses: list[float]  # one per step
    accuracy: list[float]  # held out, one per epoch
    trajectory: Tensor  # [steps, parameters]
    params: Params


def record(steps: Steps, model: nn.Module, data: Data) -> Record:
    per_epoch = len(data.x_train) // BATCH
    losses, accuracy, trajectory, params = [], [], [], {}
    for loss, params in steps:
        losses.append(loss.item())
        trajectory.append(torch.cat([p.detach().flatten() for p in params.values()]))
        if len(losses) % per_epoch == 0:
            accuracy.append(
                (predict(model, params, data.x_test) == data.y_test)
                .double()
                .mean()
                .item()
            )
    return Record(losses, accuracy, torch.stack(trajectory), params)


def largest_difference(a: Record, b: Record) -> float:
    return (a.trajectory - b.trajectory).abs().max().item()


@torch.no_grad()
def predict(model: nn.Module, params: Params, x: Tensor) -> Tensor:
    return functional_call(model, params, (x,)).argmax(-1)


def run(out: Path) -> Path:
    title("2. Handwritten digits: one chain, three ways to train")
    data = load()
    batches = minibatches(data, EPOCHS)
    steps = len(batches)
    torch.manual_seed(0)
    models = [ConvNet()]
    models += [
        copy.deepcopy(models[0]) for _ in range(3)
    ]  # all start from the same parameters
    tx, quiet = make_chain(steps), make_chain(steps, eta=0.0)
    say(str(tx))
    trainings = {
        "functional": functional(models[0], tx, track(batches, "functional", steps)),
        "fo.optim.Optimizer": stateful(
            models[1], tx, track(batches, "fo.optim.Optimizer", steps)
        ),
        "torch.optim.AdamW": torch_adamw(
            models[2], steps, track(batches, "torch.optim.AdamW", steps)
        ),
        "functional, no noise": functional(
            models[3], quiet, track(batches, "functional, no noise", steps)
        ),
    }
    runs = {
        name: record(training, models[0], data) for name, training in trainings.items()
    }

    rows = [
        [name, f"{it.accuracy[-1]:.1%}", f"{smooth(it.losses)[-1]:.4f}"]
        for name, it in runs.items()
    ]
    table(rows, ["trained by", "held-out accuracy", "final training loss"])
    size = runs["functional"].trajectory.shape[1]
    say(
        f"{steps} steps of {BATCH} images, {size:,} parameters. Largest difference of a parameter at any step:"
    )
    for a, b in (
        ("functional", "fo.optim.Optimizer"),
        ("functional, no noise", "torch.optim.AdamW"),
    ):
        say(f"  {a} against {b}: {largest_difference(runs[a], runs[b]):.2g}")
    del runs["functional, no noise"]
    return save(
        _draw(runs, data, predict(models[0], runs["functional"].params, data.x_test)),
        out / "2_digits.png",
    )


def _draw(runs: dict[str, Record], data: Data, predicted: Tensor) -> Figure:
    figure = plt.figure(figsize=(14, 9))
    upper, lower = figure.subfigures(2, 1, height_ratios=[1, 1.05])
    loss, accuracy = upper.subplots(1, 2)
    styles = [
        {"color": BLUE, "lw": 5, "alpha": 0.5},
        {"color": BLACK, "lw": 1.5, "ls": "--"},
        {"color": ORANGE, "lw": 1.8},
    ]
    for (name, it), style in zip(runs.items(), styles, strict=True):
        loss.plot(it.losses, color=style["color"], lw=0.6, alpha=0.25)
        loss.plot(smooth(it.losses), **style, label=name)
        accuracy.plot(
            range(1, EPOCHS + 1),
            [100 * a for a in it.accuracy],
            **style,
            marker="o",
            ms=4,
            label=name,
        )
    gap = largest_difference(runs["functional"], runs["fo.optim.Optimizer"])
    same = "bit for bit the same run" if gap == 0 else f"the same run to {gap:.0e}"
    loss.set(
        title=f"One chain, as functions and as an optimizer: {same}",
        yscale="log",
        xlim=(0, len(runs["functional"].losses)),
    )
    loss.set(xlabel="step", ylabel="training loss")
    least = min(it.accuracy[-1] for it in runs.values())
    accuracy.set(
        title=f"Each ends at {least:.1%} or more on digits it has not seen",
        xlabel="epoch",
        ylabel="held-out accuracy (%)",
    )
    loss.legend()
    accuracy.legend(loc="lower right")

    correct = predicted == data.y_test
    wrong, right = (
        (~correct).nonzero().flatten().tolist(),
        correct.nonzero().flatten().tolist(),
    )
    text = f"What the network reads: its {len(wrong)} mistakes among the {len(predicted)} held-out digits, then others"
    lower.suptitle(text, x=0.005, ha="left", fontsize=11)
    for axes, i in zip(lower.subplots(4, 14).flat, wrong + right, strict=False):
        color = RED if i in wrong else BLACK
        axes.imshow(data.x_test[i].numpy(), cmap="gray_r")
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set(visible=True, color=color if i in wrong else "#CCCCCC")
        label = (
            f"{predicted[i]}, not {data.y_test[i]}" if i in wrong else f"{predicted[i]}"
        )
        axes.set_title(label, color=color, loc="center", fontsize=10, pad=3)
    return figure
