"""Section 3: 64 learning rates in one run, vmapped and compiled, beside a loop of 64 torch.optim.Adam."""

import copy
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import optree
import torch
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value
from torch.nn.functional import cross_entropy

import functorch_opt as fo
from demo.common import BLACK, BLUE, RED, console, plt, save, say, smooth, table, title, track
from demo.digits import BATCH, Params, load, minibatches

MODELS, EPOCHS = 64, 15

Batches = list[tuple[Tensor, Tensor]]


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


model = make_model()


def loss_fn(params: Params, x: Tensor, y: Tensor) -> Tensor:
    return cross_entropy(functional_call(model, params, (x,)), y)


# ---- one model, and from it all of them ----------------------------------------------------------------------------------


def train_step(params: Params, state: dict, lr: Tensor, x: Tensor, y: Tensor) -> tuple[Params, dict, Tensor]:
    """One step of one model, written without a thought of the others."""
    grads, loss = grad_and_value(loss_fn)(params, x, y)
    updates, state = fo.adam(lr).update(grads, state, params)
    return fo.apply_updates(params, updates), state, loss


train_steps = torch.vmap(train_step, in_dims=(0, 0, 0, None, None))  # own params, state and lr; the same batch


def start(n: int) -> tuple[Params, dict]:
    """Params and state of `n` equal models: every tensor has a first dimension of `n`."""
    params = {name: p.detach() for name, p in model.named_parameters()}
    return optree.tree_map(lambda t: t.expand(n, *t.shape).clone(), (params, fo.adam(0.0).init(params)))


def train_separately(models: list[nn.Module], optimizers: list[torch.optim.Optimizer], batches: Batches) -> None:
    """The same in an ordinary loop, one model after another."""
    for net, opt in zip(models, optimizers, strict=True):
        for x, y in batches:
            loss = cross_entropy(net(x), y)
            opt.zero_grad()
            loss.backward()
            opt.step()


def evaluate(params: Params, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and accuracy of every model."""
    logits = torch.vmap(lambda own: functional_call(model, own, (x,)))(params)  # [models, n, 10]
    losses = torch.vmap(cross_entropy, in_dims=(0, None))(logits, y)
    return losses, (logits.argmax(-1) == y).double().mean(-1)


# ---- the section -------------------------------------------------------------------------------------------------------


def vmapped(step: Callable[..., tuple[Params, dict, Tensor]], lrs: Tensor, epochs: list[Batches]) -> Iterator[tuple[float, Params, Tensor]]:
    """After every epoch: its time, the params, and the losses, [steps, models]."""
    params, state = start(len(lrs))
    for epoch in epochs:
        losses, begin = [], time.perf_counter()
        for x, y in epoch:
            params, state, loss = step(params, state, lrs, x, y)
            losses.append(loss)
        yield time.perf_counter() - begin, params, torch.stack(losses)


def separately(lrs: Tensor, epochs: list[Batches]) -> Iterator[tuple[float, Params]]:
    """After every epoch: its time, and the params, stacked."""
    models = [copy.deepcopy(model) for _ in lrs]
    optimizers = [torch.optim.Adam(net.parameters(), lr=lr, fused=True) for net, lr in zip(models, lrs.tolist(), strict=True)]
    for epoch in epochs:
        begin = time.perf_counter()
        train_separately(models, optimizers, epoch)
        seconds = time.perf_counter() - begin
        yield seconds, {name: torch.stack([net.get_parameter(name).detach() for net in models]) for name, _ in model.named_parameters()}


def largest_differences(a: Params, b: Params) -> Tensor:
    """Of each model, the largest difference of a parameter."""
    return torch.stack([(a[name] - b[name]).abs().flatten(1).amax(1) for name in a]).amax(0)


def run(out: Path) -> Path:
    title(f"3. {MODELS} learning rates in one run")
    data, lrs = load(), torch.logspace(-5, 1, MODELS)
    batches = minibatches(data, EPOCHS)
    per_epoch = len(batches) // EPOCHS
    epochs = [batches[i : i + per_epoch] for i in range(0, len(batches), per_epoch)]
    step = torch.compile(train_steps, fullgraph=True)
    begin = time.perf_counter()
    with console.status("compiling one step of all models"):
        step(*start(MODELS), lrs, *batches[0])  # pure, so what it returns may be dropped
    first_call = time.perf_counter() - begin
    # An epoch of the one, then an epoch of the other: what else the machine does slows both.
    pairs = list(track(zip(vmapped(step, lrs, epochs), separately(lrs, epochs), strict=True), "epochs, vmapped and separate", EPOCHS))
    together, curves = pairs[-1][0][1], torch.cat([losses for (_, _, losses), _ in pairs])
    separate = pairs[-1][1][1]

    losses, _ = evaluate(together, data.x_train, data.y_train)
    losses_separate, _ = evaluate(separate, data.x_train, data.y_train)
    _, accuracy = evaluate(together, data.x_test, data.y_test)
    early, late = (largest_differences(one[1], other[1]) for one, other in (pairs[0], pairs[-1]))
    shown = sorted({int(losses.argmin()), *(int((lrs.log10() - exponent).abs().argmin()) for exponent in (-4, -3, -2, -1, 1))})
    rows = [
        [f"{lrs[i]:.2g}", f"{losses[i]:.5f}", f"{losses_separate[i]:.5f}", f"{accuracy[i]:.1%}", f"{early[i]:.0e}", f"{late[i]:.0e}"]
        for i in shown
    ]
    table(rows, ["lr", "loss, vmapped", "separate", "accuracy", "difference, epoch 1", f"epoch {EPOCHS}"], numbers_from=0)
    say("Difference: the largest of a parameter, vmapped against trained separately by torch.optim.Adam.")
    say("It begins as float32 rounding; training with a large learning rate is chaotic and amplifies it.")

    ours, theirs = [one[0] for one, _ in pairs], [other[0] for _, other in pairs]
    ratio = statistics.median(slow / fast for fast, slow in zip(ours, theirs, strict=True))
    rows = [
        ["vmapped and compiled", f"{1e3 * statistics.median(ours):,.0f} ms", f"{sum(ours):.1f} s", f"{first_call:.1f} s"],
        ["loop, torch.optim.Adam", f"{1e3 * statistics.median(theirs):,.0f} ms", f"{sum(theirs):.1f} s", "-"],
        ["loop / vmapped", f"{ratio:.1f}", f"{sum(theirs) / sum(ours):.1f}", ""],
    ]
    table(rows, [f"{MODELS} models", "an epoch (median)", f"{EPOCHS} epochs", "first call"])
    threads = torch.get_num_threads()
    say(f"Both train all {MODELS} models for the same {len(batches)} steps of {BATCH} images, threads: {threads}; Adam with fused=True.")
    say("The first call compiles, or reads torch's cache of an earlier run from disk; it is not in the other times.")
    start_loss, _ = evaluate(start(1)[0], data.x_train, data.y_train)
    return save(_draw(lrs, curves, start_loss.item(), losses, accuracy, ratio), out / "3_learning_rates.png")


def _draw(lrs: Tensor, curves: Tensor, start_loss: float, losses: Tensor, accuracy: Tensor, ratio: float) -> Figure:
    figure = plt.figure(figsize=(14, 7))
    left, right = figure.subfigures(1, 2, width_ratios=[1, 1.1])
    upper, lower = left.subplots(2, 1, sharex=True)
    best, diverged = int(losses.argmin()), curves.amax(0) > 2 * start_loss
    for axes, values in ((upper, losses), (lower, 100 * accuracy)):
        axes.plot(lrs, values, color=BLUE, lw=1, alpha=0.5)
        axes.plot(lrs[~diverged], values[~diverged], "o", color=BLUE, ms=4)
        axes.plot(lrs[diverged], values[diverged], "x", color=BLACK, ms=6, label="diverged: loss more than doubled")
        axes.plot(lrs[best], values[best], "*", color=RED, mec=BLACK, ms=17, label=f"best: {lrs[best]:.2g}")
    upper.axhline(start_loss, color=BLACK, lw=1, ls=":")
    upper.text(1e-2, 1.15 * start_loss, "loss at the start", ha="center", va="bottom")
    upper.set(title=f"The best of {len(lrs)} learning rates is {lrs[best]:.2g}", xscale="log", yscale="log", ylabel="final training loss")
    lower.set(title=f"It reads {accuracy[best]:.1%} of the held-out digits", ylim=(0, 103))
    lower.set(xlabel="learning rate", ylabel="held-out accuracy (%)")
    lower.legend(loc="center", bbox_to_anchor=(0.46, 0.3))

    axes, color = right.subplots(), ScalarMappable(LogNorm(lrs[0].item(), lrs[-1].item()), "viridis")
    for i in range(0, len(lrs), 5):
        axes.plot(smooth(curves[:, i].tolist()), color=color.to_rgba(lrs[i].item()), lw=1.5)
    axes.plot(smooth(curves[:, best].tolist()), color=RED, lw=3, label=f"best: {lrs[best]:.2g}")
    axes.set(title=f"All trained in one run, {ratio:.0f} times as fast as one after another", yscale="log", xlim=(0, len(curves)))
    axes.set(xlabel="step", ylabel="training loss")
    axes.legend(loc="upper right")
    right.colorbar(color, ax=axes, label="learning rate")
    return figure
