"""A chain whose stages have names of one's own."""

from __future__ import annotations

import copy

from functorch_opt._core.chain import Chain
from functorch_opt._core.transformation import GradientTransformation, transformation

__all__ = ["named_chain"]


@transformation
def named_chain(*transforms: tuple[str, GradientTransformation]) -> Chain:
    """`chain`, with names for the stages, under which the state keeps what they remember.

    Args:
        *transforms: pairs of a name and a transformation.

    Raises:
        TypeError: an argument is not such a pair.
        ValueError: two stages have one name; a stage after one that looks at the new parameters.

    Source: optax.named_chain.

    Example:
        >>> import torch, functorch_opt as fo
        >>> tx = fo.named_chain(("momentum", fo.trace(0.9)), ("step", fo.scale(-0.1)))
        >>> state = tx.init({"w": torch.zeros(2)})
        >>> list(state), fo.get(state, "momentum/trace")
        (['momentum', 'step'], {'w': tensor([0., 0.])})
    """
    stages: dict[str, GradientTransformation] = {}
    for pair in transforms:
        if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str)):
            raise TypeError(
                "named_chain takes pairs of a name and a transformation, "
                f"e.g. ('clip', clip(1.0)); got {pair!r}."
            )
        name, stage = pair
        if not isinstance(stage, GradientTransformation):
            raise TypeError(
                f"{name!r} must be a transformation, e.g. scale_by_adam(); "
                f"got {type(stage).__name__} {stage!r}."
            )
        if name in stages:
            raise ValueError(
                f"two stages are called {name!r}: give each a name of its own."
            )
        stages[name] = copy.copy(stage)
        stages[name].name = name
    return Chain(tuple(stages.values()))
