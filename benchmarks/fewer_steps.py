"""``benchmarks fewer-steps``: how many steps Muon and SOAP need for the loss that AdamW reaches.

Each optimizer is trained with several learning rates and seeds in one vmapped run, and is judged at
the rate that is best for itself. AdamW's training loss at its end is the target. A run's loss is the
mean of its last `WINDOW` steps, and seeds are averaged.
"""

from __future__ import annotations

import pydoc_data.topics
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import functorch_opt as fo
from benchmarks import record, report

WINDOW = 20


class MLP(nn.Sequential):
    """For the digits."""

    def __init__(self) -> None:
        hidden = [nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU()]
        super().__init__(*hidden, nn.Linear(128, 10))


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value = (
            nn.Linear(width, width, bias=False) for _ in range(3)
        )
        self.out = nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        q, k, v = (
            f(h).unflatten(-1, (self.heads, -1)).transpose(-3, -2)
            for f in (self.query, self.key, self.value)
        )
        scores = q @ k.mT / q.shape[-1] ** 0.5
        later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        weights = scores.masked_fill(later, -torch.inf).softmax(-1)
        x = x + self.out((weights @ v).transpose(-3, -2).flatten(-2))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """Over characters."""

    def __init__(self, vocabulary: int, width: int = 48, context: int = 32) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(context, width)
        self.blocks = nn.Sequential(Block(width, 4), Block(width, 4))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        place = torch.arange(tokens.shape[-1])
        x = self.token(tokens) + self.position(place)
        return self.head(self.norm(self.blocks(x)))


@dataclass
class Task:
    title: str
    model: Callable[[], nn.Module]
    data: tuple[Tensor, Tensor]
    loss: Callable[[Tensor, Tensor], Tensor]
    batch: int
    steps: int


def digits() -> Task:
    from sklearn.datasets import load_digits

    found = load_digits()
    x = torch.tensor(found.data, dtype=torch.float32) / 16
    y = torch.tensor(found.target)
    return Task("digits, MLP", MLP, (x, y), nn.functional.cross_entropy, 64, 200)


def text() -> Task:
    """Windows of 32 characters of Python's own help, and the characters that follow."""
    written = "".join(topic for _, topic in sorted(pydoc_data.topics.topics.items()))
    kinds = sorted(set(written))
    number = {c: i for i, c in enumerate(kinds)}
    tokens = torch.tensor([number[c] for c in written[: 32 * 8192 + 1]])
    x, y = tokens[:-1].view(-1, 32), tokens[1:].view(-1, 32)
    model = partial(GPT, len(kinds))
    return Task("characters of Python's help, GPT", model, (x, y), _of_tokens, 32, 200)


def _of_tokens(logits: Tensor, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())


TASKS = {"digits": digits, "text": text}
ROWS = tuple(TASKS)


class Optimizer(NamedTuple):
    """A function of the model that gives one of the learning rate, and the rates to try."""

    make: Callable[[nn.Module], Callable[..., fo.GradientTransformation]]
    rates: tuple[float, ...]


def adamw(model: nn.Module) -> Callable[..., fo.GradientTransformation]:
    return lambda learning_rate: fo.adamw(learning_rate, 0.9, 0.95, weight_decay=0.0)


def muon(model: nn.Module) -> Callable[..., fo.GradientTransformation]:
    """With AdamW for the rest, at a rate in a fixed proportion to Muon's."""
    labels = fo.matrix_labels(model)
    return lambda learning_rate: fo.muon_with_adamw(
        learning_rate, 0.2 * learning_rate, labels
    )


def soap(model: nn.Module) -> Callable[..., fo.GradientTransformation]:
    return lambda learning_rate: fo.soap(learning_rate, weight_decay=0.0)


RATES = (2e-3, 4e-3, 8e-3, 16e-3, 32e-3, 64e-3)
OPTIMIZERS = {
    "AdamW": Optimizer(adamw, RATES),
    "Muon with AdamW": Optimizer(muon, (1e-2, 2e-2, 4e-2, 8e-2, 0.16, 0.32)),
    "SOAP": Optimizer(soap, RATES),
}


class Curve(NamedTuple):
    """The loss at the best rate, a mean over seeds; and its spread at the end."""

    rate: float
    at_an_end: bool
    losses: Tensor
    spread: float


def train(task: Task, of: Optimizer, seeds: int, steps: int) -> Curve:
    found = fo.sweep(
        task.model,
        task.data,
        of.make(task.model()),
        loss=task.loss,
        steps=steps,
        batch_size=task.batch,
        seed=list(range(seeds)),
        compile=False,
        learning_rate=list(of.rates),
    )
    curves = found.curves.view(len(of.rates), seeds, steps)
    width = min(WINDOW, steps)
    smooth = curves.unfold(2, width, 1).mean(-1)
    ends = smooth[:, :, -1].mean(1).nan_to_num(torch.inf)
    best = int(ends.argmin())
    at_an_end = best in (0, len(of.rates) - 1)
    spread = float(smooth[best, :, -1].std()) if seeds > 1 else 0.0
    return Curve(of.rates[best], at_an_end, smooth[best].mean(0), spread)


def measure(name: str, quick: bool) -> dict[str, Any]:
    task = TASKS[name]()
    seeds, steps = (1, 25) if quick else (3, task.steps)
    curves = {
        label: train(task, of, seeds, steps)
        for label, of in report.track(OPTIMIZERS.items(), task.title)
    }
    target = float(curves["AdamW"].losses[-1])
    results = {}
    for label, curve in curves.items():
        reached = (curve.losses <= target).nonzero()
        first = int(reached[0]) + min(WINDOW, steps) if len(reached) else None
        results[label] = {
            "rate": curve.rate,
            "at_an_end": curve.at_an_end,
            "loss": float(curve.losses[-1]),
            "spread": curve.spread,
            "steps": first,
        }
    return {
        "row": name,
        "title": task.title,
        "seeds": seeds,
        "steps": steps,
        "results": results,
    }


def show(found: dict[str, Any]) -> None:
    rows = []
    for label, entry in found["results"].items():
        rate = f"{entry['rate']:g}" + (" (the last tried)" if entry["at_an_end"] else "")
        loss = f"{entry['loss']:.4f} ± {entry['spread']:.4f}"
        rows.append([label, rate, loss, str(entry["steps"] or "not reached")])
    title = f"{found['title']}, {found['seeds']} seeds, {found['steps']} steps"
    report.table(
        title, ["", "best rate", "loss at the end", "steps to AdamW's loss"], rows
    )


def run(args: Namespace) -> dict[str, Any]:
    torch.set_num_threads(args.threads[0])
    result = record.header("fewer-steps") | {"rows": []}
    for name in args.rows or ROWS:
        result["rows"].append(measure(name, args.quick))
        show(result["rows"][-1])
    record.write(args.out / "fewer_steps.json", result)
    return result
