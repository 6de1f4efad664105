"""skorch: the class and its arguments, as of scikit-learn."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from common import LR, WEIGHT_DECAY, assert_equal, assert_same, decayed, digits, watched
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV
from skorch import NeuralNetClassifier
from skorch.callbacks import GradientNormClipping, LRScheduler
from torch import Tensor, nn
from torch.optim.lr_scheduler import StepLR

import functorch_opt as fo

TORCHS: dict[str, Any] = {"optimizer": torch.optim.AdamW}
OURS: dict[str, dict[str, Any]] = {
    f"{name}_compiled" if compile else name: {**chosen, "optimizer__compile": compile}
    for compile in (False, True)
    for name, chosen in {
        "named": {"optimizer": fo.optim.AdamW},
        "chained": {"optimizer": fo.optim.Optimizer, "optimizer__tx": decayed},
    }.items()
}
each_choice = pytest.mark.parametrize("choice", OURS.values(), ids=OURS)


class Net(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(64, width), nn.Tanh()).double()
        self.head = nn.Linear(width, 10).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def make(choice: dict[str, Any], **options: Any) -> NeuralNetClassifier:
    torch.manual_seed(0)
    chosen = {
        "criterion": nn.CrossEntropyLoss,
        "lr": LR,
        "optimizer__weight_decay": WEIGHT_DECAY,
        "optimizer__param_groups": [("head.*", {"weight_decay": 0.0})],
        "max_epochs": 3,
        "batch_size": 64,
        "train_split": None,
        "iterator_train__drop_last": True,
        "verbose": 0,
        "callbacks": [
            GradientNormClipping(0.5),
            LRScheduler(StepLR, step_size=30, gamma=0.5, step_every="batch"),
        ],
    }
    return NeuralNetClassifier(Net, **chosen | choice | options)


def data() -> tuple[np.ndarray, np.ndarray]:
    x, y = digits().tensors
    return x.numpy(), y.numpy()


@each_choice
def test_skorch_trains(choice: dict[str, Any]) -> None:
    x, y = data()
    runs = []
    for one in (choice, TORCHS):
        net = clone(make(one))
        torch.manual_seed(0)
        with watched() as steps:
            net.fit(x, y)
        decays = [group["weight_decay"] for group in net.optimizer_.param_groups]
        assert decays == [0.0, WEIGHT_DECAY]
        assert net.score(x, y) > 0.9
        net.set_params(lr=0.001, optimizer__weight_decay=0.2)
        with watched() as more:
            net.partial_fit(x, y)
        runs.append(steps + more)
    assert len(runs[0]) == 6 * 28
    assert_same(*runs)


@each_choice
def test_skorch_resumes(choice: dict[str, Any]) -> None:
    x, y = data()
    first = make(choice, callbacks=[]).fit(x, y)
    first.save_params("params.pt", "optimizer.pt")
    with watched() as rest:
        first.partial_fit(x, y)
    second = make(choice, callbacks=[]).initialize()
    second.load_params("params.pt", "optimizer.pt")
    with watched() as more:
        second.partial_fit(x, y)
    assert len(more) == 3 * 28
    assert_equal(more, rest)


@pytest.mark.parametrize("name", ["named", "chained"])
def test_skorch_searches_a_grid(name: str) -> None:
    x, y = data()
    net = make(OURS[name], callbacks=[], max_epochs=2)
    grid = {"lr": [1e-5, 0.01], "optimizer__weight_decay": [0.0, 0.1]}
    search = GridSearchCV(net, grid, cv=2, scoring="accuracy").fit(x, y)
    assert search.best_params_["lr"] == 0.01 and search.best_score_ > 0.7
