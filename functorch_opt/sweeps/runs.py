"""The runs of a sweep: all combinations of the hyperparameters, times all seeds."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from functorch_opt import random
from functorch_opt._core import numerics
from functorch_opt._core.transformation import GradientTransformation


class Runs:
    """The hyperparameters of every run, and the transformation that they make."""

    def __init__(
        self,
        optimizer: Callable[..., GradientTransformation],
        axes: dict[str, list[float]],
        fixed: dict[str, Any],
        seeds: list[int],
        device: torch.device,
    ) -> None:
        self.optimizer, self.fixed, self.seeds = optimizer, fixed, seeds
        combinations = itertools.product(*axes.values())
        settings = [dict(zip(axes, values, strict=True)) for values in combinations]
        made = [self._made_of_numbers(setting) for setting in settings]
        self.evaluates = "value_fn" in made[0].extra_args
        """Whether an update evaluates the loss itself."""
        self.settings = len(settings)
        self.number = len(settings) * len(seeds)
        self.of_seed = torch.arange(self.number, device=device) % len(seeds)
        """The index of the seed of each run."""
        self.columns = {}
        for name in axes:
            values = [setting[name] for setting in settings]
            self.columns[name] = self._column(values)
        """The values of each hyperparameter, [runs], as they are reported."""
        self.hyper = self._on_device(device)
        """The values of each hyperparameter, and the keys, as the runs take them."""
        self.rest = {
            name: value for name, value in fixed.items() if name not in self.hyper
        }

    def _made_of_numbers(self, setting: dict[str, float]) -> GradientTransformation:
        """The transformation of plain numbers. One that is out of range is an error now."""
        made = self.optimizer(**self.fixed, **setting)
        if not isinstance(made, GradientTransformation):
            raise TypeError(
                "optimizer must return a transformation, e.g. adam(...); "
                f"it returned {type(made).__name__} {made!r}."
            )
        return made

    def _column(self, values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64).repeat_interleave(
            len(self.seeds)
        )

    def _on_device(self, device: torch.device) -> dict[str, Tensor]:
        dtype = numerics.real_dtype(device)
        columns = self.columns.items()
        hyper = {name: column.to(device, dtype) for name, column in columns}
        if "key" in self.fixed:
            key = random.as_key(self.fixed["key"])
            keys = random.fold_in(key, torch.tensor(self.seeds))
            hyper["key"] = keys.to(device)[self.of_seed]
        return hyper

    def make(self, hyper: dict[str, Tensor]) -> GradientTransformation:
        """The transformation of one run, from its hyperparameters."""
        return self.optimizer(**self.rest, **hyper)

    def reported(self) -> dict[str, Tensor]:
        """The values of each hyperparameter, [runs], and the seeds if there are several."""
        if len(self.seeds) == 1:
            return self.columns
        seeds = torch.tensor(self.seeds).repeat(self.settings)
        return {**self.columns, "seed": seeds}


def read_seeds(seed: Any) -> list[int]:
    """The seeds that the argument names, one or several."""
    given = seed.tolist() if isinstance(seed, Tensor) else seed
    seeds = [given] if isinstance(given, int) else given
    seeds = list(seeds) if isinstance(seeds, (list, tuple, range)) else []

    def is_wrong(seed: Any) -> bool:
        is_whole = isinstance(seed, int) and not isinstance(seed, bool)
        return not is_whole or seed < 0

    if not seeds or any(map(is_wrong, seeds)) or len(set(seeds)) < len(seeds):
        raise TypeError(
            "seed must be a whole number, 0 or greater, or several different ones, e.g. range(5); "
            f"got {seed!r}."
        )
    return seeds


def read_hyperparameters(
    optimizer: Any, given: Mapping[str, Any]
) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """The hyperparameters that vary, with their values, and the others."""
    if isinstance(optimizer, GradientTransformation) or not callable(optimizer):
        raise TypeError(
            "optimizer must be a function that makes a transformation, e.g. adamw and not "
            f"adamw(0.1); got {optimizer!r}."
        )
    signature = inspect.signature(optimizer)
    name = getattr(optimizer, "__name__", "optimizer")
    try:
        signature.bind(**given)
    except TypeError as error:
        raise TypeError(
            f"{name}: {error}; its arguments are {list(signature.parameters)}, "
            f"and sweep was given {list(given)}."
        ) from None
    axes: dict[str, list[float]] = {}
    fixed: dict[str, Any] = {}
    for argument, value in given.items():
        values = None if argument == "key" else _values(argument, value)
        if values is None:
            fixed[argument] = value
        else:
            axes[argument] = values
    return axes, fixed


def _values(name: str, value: Any) -> list[float] | None:
    """The values of a hyperparameter that varies; None if it does not."""
    if hasattr(value, "__array__"):  # a tensor, or of numpy
        shape = tuple(value.shape)
        if not shape:
            return None
        if len(shape) > 1 or 0 in shape:
            raise TypeError(
                f"{name} has shape {shape}; give its values as a list or 1-dim tensor, "
                "one run for each."
            )
        value = value.tolist()
    if not isinstance(value, (list, tuple, range)):
        return None
    if not value or any(
        isinstance(v, bool) or not isinstance(v, (int, float)) for v in value
    ):
        raise TypeError(
            f"{name}={value!r} must be numbers, one run for each. What chooses between rules "
            "(bools, strings) cannot vary within a sweep: make a sweep for each. What belongs to "
            "a single run, such as a mask in a list, goes in with functools.partial."
        )
    return [float(v) for v in value]
