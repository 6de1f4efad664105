"""Lightning: `Trainer.fit` with automatic and with manual optimization."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from common import (
    LR,
    WEIGHT_DECAY,
    Make,
    accuracy,
    assert_equal,
    assert_same,
    batches,
    decayed,
    each_optimizer,
    model,
    named,
    named_compiled,
    torchs,
    watched,
)
from lightning.fabric.utilities.optimizer import _optimizer_to_device
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LambdaLR

import functorch_opt as fo

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*LeafSpec:FutureWarning"
)  # of Lightning about itself

CLIP = 0.003
"""Of the single numbers of a gradient: nearly every step has larger ones."""


class Automatic(lightning.LightningModule):
    def __init__(self, make: Make) -> None:
        super().__init__()
        self.net, self.make = model(), make
        self.clipped = 0

    def training_step(self, batch: list[Tensor], i: int) -> Tensor:
        x, y = batch
        return cross_entropy(self.net(x), y)

    def configure_optimizers(self) -> Any:
        optimizer = self.make(self.parameters())
        scheduler = LambdaLR(optimizer, lambda step: 1 / (1 + 0.01 * step))
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.clipped += any((p.grad.abs() > CLIP).any() for p in self.parameters())


def fit(
    module: lightning.LightningModule,
    epochs: int = 2,
    ckpt_path: Path | None = None,
    **options: Any,
) -> lightning.Trainer:
    trainer = lightning.Trainer(
        accelerator="cpu",
        precision="64-true",
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(module, batches(), ckpt_path=ckpt_path)
    return trainer


@each_optimizer
def test_44_automatic(make: Make) -> None:
    """The closure, accumulation, clipping and a scheduler."""
    runs = []
    for one in (make, torchs):
        module = Automatic(one)
        with watched() as steps:
            fit(
                module,
                epochs=4,
                accumulate_grad_batches=2,
                gradient_clip_val=CLIP,
                gradient_clip_algorithm="value",
            )
        assert module.clipped == len(steps) == 4 * 14
        assert accuracy(module.net) > 0.9
        runs.append(steps)
    assert_same(*runs)


class Manual(Automatic):
    """The same training, written by hand."""

    automatic_optimization = False

    def training_step(self, batch: list[Tensor], i: int) -> None:
        x, y = batch
        optimizer, scheduler = self.optimizers(), self.lr_schedulers()
        self.manual_backward(cross_entropy(self.net(x), y) / 2)
        if i % 2 == 1:
            self.clip_gradients(optimizer, CLIP, "value")
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()


def automatic(make: Make, **options: Any) -> list[Tensor]:
    with watched() as steps:
        fit(Automatic(make), accumulate_grad_batches=2, **options)
    return steps


@each_optimizer
def test_44_manual(make: Make) -> None:
    with watched() as steps:
        fit(Manual(make))
    assert_same(
        steps, automatic(torchs, gradient_clip_val=CLIP, gradient_clip_algorithm="value")
    )


def test_44_a_clip_in_the_chain_sees_the_accumulated_gradient() -> None:
    def clips_itself(params: Any) -> torch.optim.Optimizer:
        return fo.optim.Optimizer(
            params, fo.chain(fo.clip(CLIP), decayed(LR, WEIGHT_DECAY))
        )

    assert_same(
        automatic(clips_itself),
        automatic(torchs, gradient_clip_val=CLIP, gradient_clip_algorithm="value"),
    )


@each_optimizer
def test_44_resume(make: Make, tmp_path: Path) -> None:
    with watched() as whole:
        fit(Automatic(make))
    fit(Automatic(make), epochs=1).save_checkpoint("one.ckpt")
    with watched() as rest:
        fit(Automatic(make), ckpt_path=tmp_path / "one.ckpt")
    assert_equal(rest, whole[28:])


def test_44_a_checkpoint_of_torchs_class_goes_on_in_ours(tmp_path: Path) -> None:
    with watched() as whole:
        fit(Automatic(torchs))
    fit(Automatic(torchs), epochs=1).save_checkpoint("one.ckpt")
    with watched() as rest:
        fit(Automatic(named), ckpt_path=tmp_path / "one.ckpt")
    assert_same(rest, whole[28:])


class Unfreezing(Manual):
    """The second layer joins at the tenth batch, through Lightning's wrapper of the optimizer."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.make(self.net[0].parameters())

    def training_step(self, batch: list[Tensor], i: int) -> None:
        x, y = batch
        optimizer = self.optimizers()
        assert isinstance(optimizer, LightningOptimizer)
        assert isinstance(optimizer, type(optimizer.optimizer))
        if self.global_step == 10:
            optimizer.add_param_group(
                {"params": self.net[2].parameters(), "weight_decay": 0.0}
            )
        optimizer.zero_grad()

        def closure() -> Tensor:
            loss = cross_entropy(self.net(x), y)
            self.manual_backward(loss)
            return loss

        assert optimizer.step(closure=closure).requires_grad
        ours, inner = optimizer.state_dict(), optimizer.optimizer.state_dict()
        assert ours["param_groups"] == inner["param_groups"]
        assert ours["state"].keys() == inner["state"].keys()
        assert all(
            value is inner["state"][i][name]
            for i, slots in ours["state"].items()
            for name, value in slots.items()
        )


@pytest.mark.parametrize("make", [named, named_compiled])
def test_44_through_the_wrapper(make: Make) -> None:
    runs = []
    for one in (make, torchs):
        with watched() as steps:
            fit(Unfreezing(one), epochs=1)
        assert len(steps) == 28
        assert steps[9].numel() < steps[10].numel()
        runs.append(steps)
    assert_same(*runs)


@pytest.mark.parametrize("make", [named, torchs])
def test_44_loading_into_the_wrapper_alone(make: Make) -> None:
    """As with torch's own optimizers it replaces the wrapper's state, and not that of the optimizer inside, which steps."""

    def step() -> None:
        net(torch.ones(1, 64, dtype=torch.float64)).sum().backward()
        optimizer.step()

    net = model()
    optimizer = make(net.parameters())
    wrapper = LightningOptimizer(optimizer)
    step()
    saved = deepcopy(wrapper.state_dict())
    step()
    wrapper.load_state_dict(saved)
    assert optimizer.state[net[0].weight]["step"] == 2
    wrapper.optimizer.load_state_dict(saved)
    assert optimizer.state[net[0].weight]["step"] == 1


@pytest.mark.parametrize("compile", [False, True], ids=["eager", "compiled"])
def test_45_state_that_was_moved_is_the_state(compile: bool) -> None:
    """Lightning moves every tensor of the state but ``step``, by assignment: the step reads, and writes, the new ones."""
    start = [torch.randn(4, 3, dtype=torch.float64), torch.randn(5, dtype=torch.float64)]
    params, twins = ([nn.Parameter(x.clone()) for x in start] for _ in range(2))
    opt, twin = fo.optim.AdamW(params, compile=compile), fo.optim.AdamW(twins)

    def train(opt: torch.optim.Optimizer, ps: list[nn.Parameter], steps: range) -> None:
        for k in steps:
            for p in ps:
                p.grad = (p.detach() * (k + 1.0)).sin()
            opt.step()

    train(opt, params, range(2))
    train(twin, twins, range(2))
    old = [opt.state[p]["exp_avg"] for p in params]
    kept = [x.clone() for x in old]
    _optimizer_to_device(opt, torch.device("cpu"))
    for (
        p
    ) in params:  # on one device `to` gives the same tensors: clones stand for moved ones
        opt.state[p] = {
            key: value if key == "step" else value.clone()
            for key, value in opt.state[p].items()
        }
    moved = [opt.state[p]["exp_avg"] for p in params]
    train(opt, params, range(2, 4))
    train(twin, twins, range(2, 4))
    for p, q in zip(params, twins, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-10)
    assert all(torch.equal(x, y) for x, y in zip(old, kept, strict=True))
    assert all(opt.state[p]["exp_avg"] is x for p, x in zip(params, moved, strict=True))
    assert not any(torch.equal(x, y) for x, y in zip(moved, kept, strict=True))


# ---- a look at the steps ---------------------------------------------------------------------------------


class Watched(Automatic):
    """What the callback should log, by hand, at every step."""

    def __init__(self, make: Make) -> None:
        super().__init__(make)
        self.seen: list[dict[str, float]] = []

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        found = optimizer.report()
        self.seen.append({name: value.item() for name, value in found.items()})


class Keep(lightning.pytorch.loggers.logger.DummyLogger):
    """Logs to a list."""

    def __init__(self) -> None:
        super().__init__()
        self.logged: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.logged.append((step, dict(metrics)))


def logged(module: lightning.LightningModule, callback: Any, logger: Keep) -> None:
    lightning.Trainer(
        accelerator="cpu",
        precision="64-true",
        max_epochs=1,
        logger=logger,
        callbacks=[callback],
        log_every_n_steps=1,
        accumulate_grad_batches=2,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(module, batches())


@each_optimizer
def test_44_the_callback_logs_reports(make: Make) -> None:
    """At the steps that are asked, with the gradients that are accumulated."""
    module, logger = Watched(make), Keep()
    logged(module, fo.optim.lightning_callback(every=5, prefix="report/"), logger)
    assert len(module.seen) == 14
    assert [step for step, _ in logger.logged] == [0, 5, 10]
    looks = [metrics for _, metrics in logger.logged]
    for look, i in zip(looks, (0, 5, 10), strict=True):
        for name, value in module.seen[i].items():
            assert look[f"report/{name}"] == pytest.approx(value, rel=1e-9, abs=1e-12)


def test_44_the_callback_and_two_optimizers() -> None:
    class Two(Manual):
        def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
            pass

        def configure_optimizers(self) -> Any:
            return [named(self.net[0].parameters()), named(self.net[2].parameters())]

        def training_step(self, batch: list[Tensor], i: int) -> None:
            x, y = batch
            self.manual_backward(cross_entropy(self.net(x), y))
            for optimizer in self.optimizers():
                optimizer.step()
                optimizer.zero_grad()

    logger, module = Keep(), Two(named)
    trainer = lightning.Trainer(
        accelerator="cpu",
        precision="64-true",
        max_epochs=1,
        logger=logger,
        callbacks=[fo.optim.lightning_callback(every=10)],
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, batches())
    first = [metrics for _, metrics in logger.logged if "0/ratio" in metrics]
    second = [metrics for _, metrics in logger.logged if "1/ratio" in metrics]
    assert len(first) == len(second) == 3


def test_44_the_callback_needs_an_optimizer_of_ours() -> None:
    with pytest.raises(
        TypeError, match="AdamW has no report: train with an optimizer of"
    ):
        logged(Automatic(torchs), fo.optim.lightning_callback(), Keep())
    with pytest.raises(ValueError, match="every must be a whole number from 1"):
        fo.optim.lightning_callback(every=0)
