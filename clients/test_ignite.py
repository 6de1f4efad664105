"""ignite: its schedulers of any option, and its checkpoints."""

from __future__ import annotations

from typing import Any

import torch
from common import (
    LR,
    WEIGHT_DECAY,
    Make,
    accuracy,
    assert_equal,
    assert_same,
    batches,
    each_with_options,
    model,
    torchs,
    watched,
)
from ignite.engine import Engine, Events, create_supervised_trainer
from ignite.handlers import Checkpoint, DiskSaver, PiecewiseLinear
from torch import Tensor
from torch.nn.functional import cross_entropy


class Run:
    """A training whose learning rate and weight decay are driven; the decay is 0 for a while."""

    def __init__(self, make: Make) -> None:
        self.net = model()
        self.optimizer = make(self.net.parameters())
        self.trainer: Engine = create_supervised_trainer(
            self.net, self.optimizer, cross_entropy
        )
        self.schedulers = {
            "lr": PiecewiseLinear(
                self.optimizer, "lr", [(0, LR / 10), (14, LR), (56, LR / 10)]
            ),
            "weight_decay": PiecewiseLinear(
                self.optimizer,
                "weight_decay",
                [(10, 0.0), (20, 2 * WEIGHT_DECAY), (35, 0.0)],
            ),
        }
        self.seen: list[tuple[float, float]] = []
        for scheduler in self.schedulers.values():
            self.trainer.add_event_handler(Events.ITERATION_STARTED, scheduler)
        self.trainer.add_event_handler(Events.ITERATION_COMPLETED, self.look)

    def look(self) -> None:
        (group,) = self.optimizer.param_groups
        self.seen.append((group["lr"], group["weight_decay"]))

    def parts(self) -> dict[str, Any]:
        return {
            "net": self.net,
            "optimizer": self.optimizer,
            "trainer": self.trainer,
            **self.schedulers,
        }

    def train(self, epochs: int = 2) -> list[Tensor]:
        with watched() as steps:
            self.trainer.run(batches(), max_epochs=epochs)
        return steps


@each_with_options
def test_48_schedulers(make: Make) -> None:
    ours, theirs = Run(make), Run(torchs)
    steps = ours.train()
    assert_same(steps, theirs.train())
    assert len(steps) == 56
    assert accuracy(ours.net) > 0.9
    assert ours.seen == theirs.seen
    assert len({lr for lr, _ in ours.seen}) > 50
    decays = [decay for _, decay in ours.seen]
    assert decays[0] == decays[-1] == 0
    assert max(decays) == 2 * WEIGHT_DECAY


@each_with_options
def test_48_checkpoint_and_resume(make: Make) -> None:
    first = Run(make)
    saver = Checkpoint(first.parts(), DiskSaver("checkpoints"), n_saved=None)
    first.trainer.add_event_handler(Events.EPOCH_COMPLETED(once=1), saver)
    whole = first.train()

    second = Run(make)
    Checkpoint.load_objects(second.parts(), torch.load(saver.last_checkpoint))
    rest = second.train()
    assert_equal(rest, whole[28:])
