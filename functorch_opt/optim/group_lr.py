"""Where the group option ``lr`` of a ready transformation multiplies.

It is after everything, but before what looks at the new parameters.
"""

from __future__ import annotations

from typing import Any

from functorch_opt._core.chain import Chain
from functorch_opt._core.gate import Gate
from functorch_opt._core.groups import Groups
from functorch_opt._core.rule import Leafwise, leafwise
from functorch_opt._core.transformation import GradientTransformation
from functorch_opt._core.wrap import Wrap


def multiplied(tx: GradientTransformation, lr: Any) -> GradientTransformation:
    """`tx`, and then a stage that multiplies by `lr`; but that stage before an average of the
    parameters, and inside of a wrapper that keeps them.

    A stage whose steps do not depend on the size of the update takes `lr` itself.
    """
    new: GradientTransformation
    if isinstance(tx, Leafwise) and tx.with_lr is not None:
        new = tx.with_lr(lr)
    elif isinstance(tx, Chain):
        stages = list(tx.stages.values())
        at = next((i for i, of in enumerate(stages) if of.last), len(stages))
        if at == len(stages) or _comes_after(stages[at]):
            stages.insert(at, lr_of_group(lr))
        else:
            stages[at] = multiplied(stages[at], lr)
        new = Chain(tuple(stages))
    elif not tx.last or isinstance(tx, Leafwise):
        stage = lr_of_group(lr)
        return Chain((stage, tx) if tx.last else (tx, stage))
    elif isinstance(tx, (Groups, Wrap, Gate)) or hasattr(tx, "rebuilt"):
        new = tx.rebuilt(lambda inner: multiplied(inner, lr))
    else:
        raise TypeError(
            f"the group option lr has no place in {tx.name}, which looks at the new parameters. "
            "Give the function that makes the transformation, "
            "Optimizer(params, function, learning_rate=...), or put what looks at them last in the "
            "outer chain."
        )
    new.name = tx.name
    return new


def _comes_after(stage: GradientTransformation) -> bool:
    """Whether a stage that looks at the new parameters takes the factor in front of it."""
    return isinstance(stage, Leafwise) and stage.with_lr is None


def lr_of_group(lr: Any) -> GradientTransformation:
    """The stage by which the option ``lr`` multiplies what a ready transformation gives."""
    return leafwise(lambda g, lr: g * lr, hyper={"lr": lr})
