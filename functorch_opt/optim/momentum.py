"""The group option ``momentum``, which torch's OneCycleLR and CyclicLR write, for any chain.

A transformation knows the call that made it. So the momentum in it can be set: the argument is
found in the call, or in those of the transformations that it was given, and the call is made again.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from functorch_opt._core.transformation import GradientTransformation
from functorch_opt.optimizers.muon import muon, scale_by_muon
from functorch_opt.transforms.momentum import trace

NAMES = ("b1", "momentum")
"""What a momentum is called as an argument of a transformation."""
OTHERWISE: dict[Any, str] = {trace: "decay", muon: "beta", scale_by_muon: "beta"}
"""Where it is called otherwise."""


def has_momentum(tx: Any) -> bool:
    """Whether there is a momentum in `tx`."""
    return with_momentum(tx, 0.5) is not tx


def with_momentum(tx: Any, momentum: Any) -> Any:
    """`tx` with this in place of every momentum in it, or `tx` itself where there is none."""
    if isinstance(tx, Mapping):
        inside = {label: with_momentum(inner, momentum) for label, inner in tx.items()}
        return tx if all(inside[label] is tx[label] for label in tx) else inside
    if not isinstance(tx, GradientTransformation) or tx.call is None:
        return tx
    function, args, kwargs = tx.call
    try:
        bound = inspect.signature(function).bind(*args, **kwargs)
    except (TypeError, ValueError):
        return tx
    bound.apply_defaults()
    for name in (*NAMES, OTHERWISE.get(function, "")):
        if _is_number(bound.arguments.get(name)):
            bound.arguments[name] = momentum
            return function(*bound.args, **bound.kwargs)
    # No momentum of its own: those of what it was given.
    new_args = [with_momentum(arg, momentum) for arg in args]
    new_kwargs = {name: with_momentum(arg, momentum) for name, arg in kwargs.items()}
    pairs = [*zip(new_args, args, strict=True)]
    pairs += [(new_kwargs[name], kwargs[name]) for name in kwargs]
    if all(new is old for new, old in pairs):
        return tx
    return function(*new_args, **new_kwargs)


def _is_number(value: Any) -> bool:
    """Whether it is a hyperparameter: a number, or a schedule of it."""
    number = isinstance(value, (int, float, Tensor)) and not isinstance(value, bool)
    return number or callable(value)
