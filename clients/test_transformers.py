"""Hugging Face's `Trainer`: a small GPT-2 on the text of Python's help."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
from common import LR, WEIGHT_DECAY, assert_equal, assert_same, decayed, watched
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import functorch_opt as fo

LENGTH, CLIP = 32, 0.5

Choice = tuple[Callable[..., torch.optim.Optimizer], dict[str, Any]]


TORCHS: Choice = (torch.optim.AdamW, {"lr": LR})
OURS: dict[str, Choice] = {
    f"{name}_compiled" if compile else name: (cls, {**kwargs, "compile": compile})
    for compile in (False, True)
    for name, (cls, kwargs) in {
        "named": (fo.optim.AdamW, {"lr": LR}),
        "chained": (fo.optim.Optimizer, {"tx": decayed, "learning_rate": LR}),
    }.items()
}
each_choice = pytest.mark.parametrize("choice", OURS.values(), ids=OURS)


def text() -> list[dict[str, Tensor]]:
    """Its bytes, in pieces."""
    pieces = torch.tensor(list("\n".join(topics.values()).encode())).split(LENGTH)[:-1]
    return [{"input_ids": piece, "labels": piece} for piece in pieces]


def loss_of(
    outputs: Any, labels: Tensor, num_items_in_batch: Tensor | None = None
) -> Tensor:
    """The model's own loss is in float32."""
    return cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def make_trainer(choice: Choice, **options: Any) -> Trainer:
    torch.manual_seed(0)
    size = {
        "vocab_size": 256,
        "n_positions": LENGTH,
        "n_embd": 16,
        "n_layer": 1,
        "n_head": 2,
    }
    config = GPT2Config(
        **size, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, bos_token_id=0, eos_token_id=0
    )
    args = TrainingArguments(
        output_dir="out",
        use_cpu=True,
        max_steps=20,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        lr_scheduler_type="cosine",
        warmup_steps=4,
        weight_decay=WEIGHT_DECAY,
        logging_strategy="no",
        disable_tqdm=True,
        report_to=[],
        **{"save_strategy": "no", **options},
    )
    return Trainer(
        GPT2LMHeadModel(config).double(),
        args,
        train_dataset=text(),
        compute_loss_func=loss_of,
        optimizer_cls_and_kwargs=choice,
    )


def loss(trainer: Trainer) -> float:
    batch = torch.stack([piece["input_ids"] for piece in text()[:100]])
    with torch.no_grad():
        return loss_of(trainer.model(batch), batch).item()


@each_choice
def test_47_train(choice: Choice) -> None:
    """Two groups, of which one is not decayed; accumulation, the clip of the norm, warmup and decay of the learning rate."""
    runs = []
    for one in (choice, TORCHS):
        trainer = make_trainer(one)
        before = loss(trainer)
        with watched() as steps:
            trainer.train()
        assert [group["weight_decay"] for group in trainer.optimizer.param_groups] == [
            WEIGHT_DECAY,
            0.0,
        ]
        assert all(group["params"] for group in trainer.optimizer.param_groups)
        assert len(steps) == 20
        assert loss(trainer) < 0.8 * before
        runs.append(steps)
    assert_same(*runs)


def test_47_a_ready_chain() -> None:
    """It has no option ``weight_decay`` for `Trainer` to set: its own decay is for all. And it may clip in `Trainer`'s place."""

    class OneDecay(torch.optim.AdamW):
        def __init__(self, groups: list[dict[str, Any]]) -> None:
            super().__init__(
                [{"params": group["params"]} for group in groups],
                lr=LR,
                weight_decay=WEIGHT_DECAY,
            )

    def run(choice: Choice, max_grad_norm: float) -> list[Tensor]:
        with watched() as steps:
            make_trainer(choice, max_grad_norm=max_grad_norm).train()
        return steps

    tx = fo.chain(fo.clip_by_global_norm(CLIP), decayed(LR, WEIGHT_DECAY))
    ours = run((fo.optim.Optimizer, {"tx": tx}), 0.0)
    assert_same(
        ours, run((OneDecay, {}), CLIP), tolerance=1e-5
    )  # torch adds 1e-6 to a norm that it clips
    with pytest.raises(AssertionError):
        assert_same(ours, run((OneDecay, {}), 0.0), tolerance=1e-3)


@each_choice
def test_47_resume(choice: Choice, tmp_path: Path) -> None:
    with watched() as whole:
        make_trainer(choice, save_strategy="steps", save_steps=10).train()
    with watched() as rest:
        make_trainer(choice).train(
            resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-10")
        )
    assert_equal(rest, whole[10:])


@each_choice
def test_47_the_callback_logs_reports(choice: Choice) -> None:
    """At the steps that are asked, what a look by hand says."""
    trainer = make_trainer(choice)
    seen: list[dict[str, float]] = []

    class ByHand(TrainerCallback):
        def on_pre_optimizer_step(
            self, args: Any, state: Any, control: Any, **kwargs: Any
        ) -> None:
            found = kwargs["optimizer"].optimizer.report()
            seen.append({name: value.item() for name, value in found.items()})

    trainer.add_callback(ByHand())
    trainer.add_callback(fo.optim.trainer_callback(trainer, every=7, prefix="report/"))
    trainer.train()
    looks = [entry for entry in trainer.state.log_history if "report/ratio" in entry]
    assert [entry["step"] for entry in looks] == [0, 7, 14]
    for look in looks:
        for name, value in seen[look["step"]].items():
            assert look[f"report/{name}"] == pytest.approx(value, rel=1e-12)


def test_47_the_callback_needs_an_optimizer_of_ours() -> None:
    trainer = make_trainer(TORCHS)
    trainer.add_callback(fo.optim.trainer_callback(trainer))
    with pytest.raises(
        TypeError, match="AdamW has no report: train with an optimizer of"
    ):
        trainer.train()
    with pytest.raises(ValueError, match="every must be a whole number from 1"):
        fo.optim.trainer_callback(trainer, every=0)
