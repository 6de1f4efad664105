"""What may stand in a group: types of options, and the flags of torch that mean nothing here."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from functorch_opt import tree
from functorch_opt._core.inject import hyperparameters
from functorch_opt._core.transformation import GradientTransformation


def check_number(name: str, value: Any) -> None:
    """Raise TypeError for what is no number, no tensor and no tuple of these; ValueError for a tensor that does not hold one number."""
    if isinstance(value, tuple):
        for part in value:
            check_number(name, part)
    elif isinstance(value, bool) or not isinstance(value, (int, float, Tensor)):
        raise TypeError(
            f"{name} must be a number or a 1-element tensor; got {type(value).__name__} {value!r}."
        )
    elif isinstance(value, Tensor) and (value.numel() != 1 or value.is_complex()):
        raise ValueError(
            f"Tensor {name} must be 1-element and real; got {value.dtype} of shape {tuple(value.shape)}."
        )


def check_like(name: str, value: Any, default: Any) -> None:
    """Raise TypeError for an option that is no hyperparameter, and is of another type than its default."""
    if isinstance(default, tuple) and isinstance(value, tuple):
        for part in value:
            check_like(name, part, None if part is None else 0.0)
        return
    wanted: Any = (
        (bool, int, float, str, tuple, torch.dtype, type(None))
        if default is None
        else type(default)
    )
    number = wanted in (int, float)
    if not isinstance(value, (int, float) if number else wanted) or (
        isinstance(value, bool) and number
    ):
        raise TypeError(
            f"{name} must be of the type of {default!r}; got {type(value).__name__} {value!r}."
        )


FLAGS = ("foreach", "fused", "capturable", "differentiable")
"""Options by which torch chooses among its implementations. There is one here."""


def only_sets_up(groups: list[dict[str, Any]], state: dict[Any, Any]) -> bool:
    """Whether this is the step by which torch.distributed.checkpoint has a fresh optimizer make its state: zero lr, zero gradients.

    If it were counted, looking at the state of an optimizer would change its training (pytorch#164929).
    """
    if state or any(group["lr"] != 0 for group in groups):
        return False
    return bool(tree.norm([p.grad for group in groups for p in group["params"]]) == 0)


Options = dict[str, Any]


def arguments(tx: Any, hyper: Options) -> tuple[Options, Options, Options]:
    """The arguments of a factory: hyperparameters, other options of groups, and what is fixed.

    Raises:
        TypeError: `tx` is no transformation and no function; a transformation with arguments.
    """
    if isinstance(tx, GradientTransformation):
        if hyper:
            raise TypeError(
                f"a ready transformation takes no hyperparameters; got {', '.join(hyper)}. "
                "Give the function that makes it: Optimizer(params, adamw, learning_rate=...)."
            )
        numbers: dict[str, Any] = {}
        others: dict[str, Any] = {}
    elif callable(tx):
        tx(**hyper)  # what it does not like about its arguments, it says now
        numbers, others = hyperparameters(tx, (), hyper)
    else:
        raise TypeError(
            f"tx must be a transformation or a function that returns one; got {type(tx).__name__} {tx!r}."
        )
    plain = {
        name: value
        for name, value in others.items()
        if isinstance(value, (bool, int, str, torch.dtype, type(None)))
    }
    fixed = {
        name: value
        for name, value in (others | numbers).items()
        if name not in plain and callable(value)
    }
    numbers = {name: value for name, value in numbers.items() if name not in fixed}
    fixed |= {name: value for name, value in others.items() if name not in plain}
    return numbers, plain, fixed
