"""How the transformation of a stateful optimizer is made of the options of a group."""

from __future__ import annotations

from typing import Any

from functorch_opt._core.chain import Chain, chain
from functorch_opt._core.transformation import GradientTransformation
from functorch_opt.optim.group_lr import multiplied
from functorch_opt.optim.momentum import with_momentum

Recipe = tuple[Any, dict[str, Any], str | None, bool]
"""A transformation or a factory, its fixed arguments, what it calls the learning rate, and whether
the option ``momentum`` is set in what it gives."""


def shown(recipe: Recipe) -> Any:
    """What a recipe is called: a transformation, or the name of a factory."""
    tx = recipe[0]
    if isinstance(tx, GradientTransformation):
        return tx
    return getattr(tx, "__name__", tx)


def made(recipe: Recipe, options: dict[str, Any]) -> GradientTransformation:
    """The transformation of a recipe for these group options."""
    tx, fixed, rate, has_momentum = recipe
    momentum = options.pop("momentum") if has_momentum else None
    lr = options.pop("lr")
    if rate is not None:
        options[rate] = lr
    ready: GradientTransformation = (
        tx if isinstance(tx, GradientTransformation) else tx(**fixed, **options)
    )
    if momentum is not None:
        ready = with_momentum(ready, momentum)
    if rate is not None:
        return ready
    scaled = multiplied(ready, lr)
    return scaled if isinstance(scaled, Chain) else chain(scaled)
