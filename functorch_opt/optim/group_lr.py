"""Where the group option ``lr`` of a ready transformation multiplies.

It is after everything, but before what looks at the new parameters.
"""

from __future__ import annotations

from functorch_opt._core.chain import Chain
from functorch_opt._core.gate import Gate
from functorch_opt._core.groups import Groups
from functorch_opt._core.rule import Leafwise
from functorch_opt._core.transformation import GradientTransformation
from functorch_opt._core.wrap import Wrap


def then(
    tx: GradientTransformation, stage: GradientTransformation
) -> GradientTransformation:
    """`tx` and then `stage`; but `stage` before an average of the parameters, and inside of a
    wrapper that keeps them."""
    if isinstance(tx, Chain):
        stages = list(tx.stages.values())
        at = next((i for i, of in enumerate(stages) if of.last), len(stages))
        if at == len(stages) or isinstance(stages[at], Leafwise):
            stages.insert(at, stage)
        else:
            stages[at] = then(stages[at], stage)
        new: GradientTransformation = Chain(tuple(stages))
    elif not tx.last or isinstance(tx, Leafwise):
        return Chain((stage, tx) if tx.last else (tx, stage))
    elif isinstance(tx, (Groups, Wrap, Gate)) or hasattr(tx, "rebuilt"):
        new = tx.rebuilt(lambda inner: then(inner, stage))
    else:
        raise TypeError(
            f"the group option lr has no place in {tx.name}, which looks at the new parameters. "
            "Give the function that makes the transformation, "
            "Optimizer(params, function, learning_rate=...), or put what looks at them last in the "
            "outer chain."
        )
    new.name = tx.name
    return new
