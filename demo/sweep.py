"""Section 3: 64 learning rates in one run, with `fo.sweep`, beside a loop of 64
torch.optim.Adam.
"""

import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import functorch_opt as fo
from demo.common import console, save, say, table, title
from demo.digits import BATCH, Params, load, minibatches, predict

MODELS, EPOCHS = 64, 12

Batches = list[tuple[Tensor, Tensor]]


def make_model() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def train_alone(lr: float, batches: Batches, seed: int = 0) -> tuple[nn.Module, Tensor]:
    """One model in an ordinary loop, and its losses."""
    torch.manual_seed(seed)
    net, losses = make_model().to(batches[0][0].dtype), []
    opt = torch.optim.Adam(net.parameters(), lr=lr, fused=True)
    for x, y in batches:
        loss = cross_entropy(net(x), y)
        opt.zero_grad()
        loss.backward()
        opt.step()
        losses.append(loss.detach())
    return net, torch.stack(losses)


def sweep(data: tuple[Tensor, Tensor], lrs: Tensor, epochs: int) -> fo.Sweep:
    """All learning rates at once. Each run is that of `train_alone`."""
    make = lambda: make_model().to(data[0].dtype)  # noqa: E731
    return fo.sweep(
        make,
        data,
        fo.adam,
        loss=cross_entropy,
        learning_rate=lrs,
        epochs=epochs,
        batch_size=BATCH,
        bound=10.0,
    )


def accuracy(params: Params, x: Tensor, y: Tensor) -> float:
    return (predict(make_model(), params, x) == y).double().mean().item()


def run(out: Path) -> Path:
    title(f"3. {MODELS} learning rates in one run")
    data, lrs = load(), torch.logspace(-5, 1, MODELS, dtype=torch.float64)
    with console.status(
        f"{MODELS} learning rates, first in one run, then one after another"
    ):
        begin = time.perf_counter()
        result = sweep((data.x_train, data.y_train), lrs, EPOCHS)
        together = time.perf_counter() - begin
        batches = minibatches(data, EPOCHS)
        begin = time.perf_counter()
        alone = torch.stack([train_alone(lr, batches)[1] for lr in lrs.tolist()])
        one_by_one = time.perf_counter() - begin

    per_epoch = len(batches) // EPOCHS
    shown = sorted(
        {
            result.best_run,
            *(
                int((lrs.log10() - exponent).abs().argmin())
                for exponent in (-4, -3, -2, -1, 1)
            ),
        }
    )
    rows = []
    for i in shown:
        apart = (result.curves[i, :per_epoch] - alone[i, :per_epoch]).abs().max()
        read = (
            "diverged"
            if result.diverged[i]
            else f"{accuracy(result.params_of(i), data.x_test, data.y_test):.1%}"
        )
        rows.append(
            [
                f"{lrs[i]:.2g}",
                f"{result.losses[i]:.5f}",
                read,
                f"{apart.nan_to_num(0):.0e}",
            ]
        )
    table(
        rows,
        [
            "lr",
            "training loss",
            "held-out accuracy",
            "difference to torch.optim, epoch 1",
        ],
        numbers_from=0,
    )
    say(
        "Difference: the largest of the loss of a step, in one run against one after another. It is float32 rounding."
    )
    say(
        f"{int(result.diverged.sum())} runs diverged (a loss above 10; at the start it is 2.3); they were frozen there."
    )
    say(
        f"In one run: {together:.1f} s, nothing compiled. One after another, Adam with fused=True: {one_by_one:.1f} s, "
    )
    say(
        f"which is {one_by_one / together:.1f} times as long. Threads: {torch.get_num_threads()}."
    )
    return save(result.plot(), out / "3_learning_rates.png")
