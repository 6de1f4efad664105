"""The tasks of the race: real data that come with Python and scikit-learn, and small models.

Each task has three parts of its data. The optimizer sees the first. The second chooses the learning
rate. The third gives the loss that is reported.
"""

from __future__ import annotations

import pydoc_data.topics
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from benchmarks.fewer_steps import Block

Data = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Task:
    name: str
    title: str
    model: Callable[[], nn.Module]
    loss: Callable[[Tensor, Tensor], Tensor]
    train: Data
    validation: Data
    test: Data
    batch: int
    steps: int

    def shortened(self, steps: int) -> Task:
        """The same task with fewer steps."""
        return replace(self, steps=min(steps, self.steps))


def parts(x: Tensor, y: Tensor, train: int, held_out: int) -> tuple[Data, Data, Data]:
    """Three parts of the examples, in an order drawn from seed 0."""
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    sizes = [train, held_out, held_out]
    a, b, c = order[: sum(sizes)].split(sizes)
    return (x[a], y[a]), (x[b], y[b]), (x[c], y[c])


# ---- handwritten digits --------------------------------------------------------------------------


def _digits() -> Data:
    from sklearn.datasets import load_digits

    found = load_digits()
    return torch.tensor(found.data, dtype=torch.float32) / 16, torch.tensor(found.target)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def convnet() -> nn.Module:
    first = [
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 8, 3, stride=2, padding=1),
        nn.ReLU(),
    ]
    second = [nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*first, *second, nn.Linear(64, 10))


def digits_mlp() -> Task:
    of = parts(*_digits(), 1197, 300)
    return Task("digits-mlp", "digits, MLP", mlp, cross_entropy, *of, batch=64, steps=300)


def digits_conv() -> Task:
    of = parts(*_digits(), 1197, 300)
    title = "digits, conv net"
    return Task("digits-conv", title, convnet, cross_entropy, *of, batch=32, steps=200)


def noisy_labels() -> Task:
    """Four of ten training labels are replaced by random ones. Those held out are right."""
    (x, y), *held_out = parts(*_digits(), 1197, 300)
    generator = torch.Generator().manual_seed(1)
    is_wrong = torch.rand(len(y), generator=generator) < 0.4
    drawn = torch.randint(10, (len(y),), generator=generator)
    train = x, torch.where(is_wrong, drawn, y)
    title = "digits, 40% random labels"
    data = train, *held_out
    return Task("noisy-labels", title, mlp, cross_entropy, *data, batch=64, steps=300)


# ---- text ----------------------------------------------------------------------------------------

CONTEXT = 16


class GPT(nn.Module):
    """One block over characters: the next character is predicted at each place."""

    def __init__(self, vocabulary: int, width: int = 24) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(CONTEXT, width)
        self.block = Block(width, 4)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens) + self.position(torch.arange(tokens.shape[-1]))
        return self.head(self.norm(self.block(x)))


def of_characters(logits: Tensor, y: Tensor) -> Tensor:
    return cross_entropy(logits.flatten(0, 1), y.flatten())


def text_gpt() -> Task:
    """Windows of 16 characters of Python's own help, in small letters."""
    topics = sorted(pydoc_data.topics.topics.items())
    written = "".join(topic for _, topic in topics).lower()
    kinds = sorted(set(written))
    number = {c: i for i, c in enumerate(kinds)}
    tokens = torch.tensor([number[c] for c in written[: CONTEXT * 8192 + 1]])
    x, y = tokens[:-1].view(-1, CONTEXT), tokens[1:].view(-1, CONTEXT)
    model = partial(GPT, len(kinds))
    of = parts(x, y, 7680, 256)
    title = "characters, small GPT"
    return Task("text-gpt", title, model, of_characters, *of, batch=16, steps=120)


# ---- regression ----------------------------------------------------------------------------------


class Line(nn.Module):
    """A linear model that begins at zero."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.1 * torch.randn(1, inputs))
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.weight.mT + self.bias).squeeze(-1)


def regression() -> Task:
    """One measurement of breast cancer cells, from the 29 others.

    The measurements are standardized. Some are nearly the same, radius and perimeter for example.
    """
    from sklearn.datasets import load_breast_cancer

    x = torch.tensor(load_breast_cancer().data, dtype=torch.float64)
    x = ((x - x.mean(0)) / x.std(0)).float()
    target = 9  # mean fractal dimension
    others = [i for i in range(x.shape[1]) if i != target]
    of = parts(x[:, others], x[:, target], 369, 100)
    title, model = "ill-conditioned regression", partial(Line, len(others))
    return Task("regression", title, model, mse_loss, *of, batch=123, steps=600)


class Factors(nn.Module):
    """The entries of a product of two thin matrices."""

    def __init__(self, rows: int, columns: int, rank: int = 3) -> None:
        super().__init__()
        self.left = nn.Parameter(0.3 * torch.randn(rows, rank))
        self.right = nn.Parameter(0.3 * torch.randn(columns, rank))

    def forward(self, places: Tensor) -> Tensor:
        return (self.left[places[:, 0]] * self.right[places[:, 1]]).sum(-1)


def factorization() -> Task:
    """Missing pixels of 64 images: the matrix of images and pixels as a product of rank 3."""
    x, _ = _digits()
    x = x[:64]
    places = torch.cartesian_prod(torch.arange(x.shape[0]), torch.arange(x.shape[1]))
    of = parts(places, (x - x.mean()).flatten(), 3296, 400)
    title, model = "matrix factorization", partial(Factors, *x.shape)
    return Task("factorization", title, model, mse_loss, *of, batch=412, steps=300)


TASKS: dict[str, Callable[[], Task]] = {
    "digits-mlp": digits_mlp,
    "digits-conv": digits_conv,
    "text-gpt": text_gpt,
    "regression": regression,
    "noisy-labels": noisy_labels,
    "factorization": factorization,
}
