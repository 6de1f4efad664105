"""A look at the steps of a trainer, as a callback: for Lightning, and for Hugging Face's Trainer.

The trainers are imported when a callback is made, and not before.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

from functorch_opt._core.transformation import check_whole
from functorch_opt.optim.adapter import Optimizer

__all__ = ["lightning_callback", "trainer_callback"]


def lightning_callback(every: int = 50, prefix: str = "") -> Any:
    """A Lightning callback that logs `Optimizer.report` at each `every`-th step.

    It looks before the step of the optimizer, at gradients that are accumulated and unscaled, and
    before Lightning's own clip. The numbers go to every logger of the trainer, at these steps only,
    and to ``trainer.callback_metrics``. With several optimizers their names begin with the number of the
    optimizer. All ranks look; the numbers are those of the whole.

    Args:
        every: 1 or greater: the first step, and each so many after it.
        prefix: what the names begin with, such as ``"report/"``.

    Returns:
        A ``lightning.pytorch.Callback``, or that of ``pytorch_lightning`` where only this is
        installed.

    Raises:
        ValueError: `every` is not a whole number from 1.
        ModuleNotFoundError: Lightning is not installed.
        TypeError: at a step, an optimizer that is not one of this library.

    Example:
        >>> import functorch_opt as fo
        >>> def make_trainer():
        ...     import lightning
        ...     return lightning.Trainer(callbacks=[fo.optim.lightning_callback(every=100)])
    """
    check_whole(1, every=every)
    return _lightning_class()(every, prefix)


def trainer_callback(trainer: Any, every: int = 50, prefix: str = "") -> Any:
    """A callback for Hugging Face's ``Trainer`` that logs `Optimizer.report` at each `every`-th
    step.

    It looks before the step of the optimizer, at gradients that are accumulated, and after the
    clip of ``Trainer``. It logs with ``trainer.log``, so the numbers reach every integration and
    ``trainer.state.log_history``.

    Args:
        trainer: the ``transformers.Trainer``, whose ``log`` is called.
        every: 1 or greater: the first step, and each so many after it.
        prefix: what the names begin with, such as ``"report/"``.

    Returns:
        A ``transformers.TrainerCallback``.

    Raises:
        ValueError: `every` is not a whole number from 1.
        ModuleNotFoundError: transformers is not installed.
        TypeError: at a step, an optimizer that is not one of this library.

    Example:
        >>> import functorch_opt as fo
        >>> def watch(trainer):
        ...     trainer.add_callback(fo.optim.trainer_callback(trainer, every=100))
    """
    check_whole(1, every=every)
    return _trainer_class()(trainer, every, prefix)


def look_at(optimizer: Any, prefix: str) -> dict[str, Any]:
    """What the optimizer inside of the trainer's wrappers reports."""
    while not isinstance(optimizer, Optimizer):
        inner = getattr(optimizer, "optimizer", None)
        if inner is None:
            raise TypeError(
                f"a {type(optimizer).__name__} has no report: train with an optimizer of fo.optim, "
                "or remove the callback."
            )
        optimizer = inner
    return {prefix + name: value for name, value in optimizer.report().items()}


@functools.cache
def _lightning_class() -> Any:
    try:
        pytorch = importlib.import_module("lightning.pytorch")
    except ModuleNotFoundError:
        pytorch = importlib.import_module("pytorch_lightning")
    base: Any = pytorch.Callback

    class LogReport(base):
        """Logs `Optimizer.report`."""

        def __init__(self, every: int, prefix: str) -> None:
            self.every = every
            self.prefix = prefix

        def on_before_optimizer_step(
            self, trainer: Any, pl_module: Any, optimizer: Any
        ) -> None:
            step = trainer.global_step // len(trainer.optimizers)
            if step % self.every:
                return
            prefix = self.prefix
            if len(trainer.optimizers) > 1:
                same = [one is optimizer for one in trainer.optimizers]
                prefix += f"{same.index(True)}/"
            found = look_at(optimizer, prefix)
            pl_module.log_dict(found, logger=False)
            numbers = {name: value.item() for name, value in found.items()}
            for (
                logger
            ) in trainer.loggers:  # log_dict would repeat them at each step after it
                logger.log_metrics(numbers, step=trainer.global_step)

    return LogReport


@functools.cache
def _trainer_class() -> Any:
    base: Any = importlib.import_module("transformers").TrainerCallback

    class LogReport(base):
        """Logs `Optimizer.report`."""

        def __init__(self, trainer: Any, every: int, prefix: str) -> None:
            self.trainer, self.every, self.prefix = trainer, every, prefix

        def on_pre_optimizer_step(
            self, args: Any, state: Any, control: Any, **kwargs: Any
        ) -> None:
            if state.global_step % self.every == 0:
                found = look_at(kwargs["optimizer"], self.prefix)
                self.trainer.log({name: value.item() for name, value in found.items()})

    return LogReport
