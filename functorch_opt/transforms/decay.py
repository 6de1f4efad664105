"""Weight decay: ``u + lambda p``.

Before the moments it is L2 regularization; after them, decoupled weight decay.
"""

from __future__ import annotations

import torch

from functorch_opt._core.groups import MaskOrFn, masked
from functorch_opt._core.rule import leafwise
from functorch_opt._core.transformation import (
    GradientTransformation,
    ScalarOrSchedule,
    check_range,
    transformation,
)

__all__ = ["add_decayed_weights", "cautious_weight_decay"]


@transformation
def add_decayed_weights(
    weight_decay: ScalarOrSchedule = 0.0, mask: MaskOrFn | None = None
) -> GradientTransformation:
    """``u -> u + weight_decay * p``.

    What follows in the chain, such as the learning rate, also multiplies the decay.

    Args:
        weight_decay: 0 or greater, or a schedule.
        mask: which parameters decay, see `masked`; by default all.

    Raises:
        ValueError: a negative or NaN weight decay; ``update`` called without params.

    Source: Loshchilov & Hutter, "Decoupled Weight Decay Regularization", 2019, alg. 2, line 12.

    Example:
        >>> import torch, functorch_opt as fo
        >>> tx, params = fo.add_decayed_weights(0.1), [torch.tensor(2.0)]
        >>> tx.update([torch.tensor(1.0)], tx.init(params), params)[0]
        [tensor(1.2000)]
    """
    check_range(0, float("inf"), weight_decay=weight_decay)
    if isinstance(weight_decay, (int, float)):
        # This saves one pass over memory.
        decay = leafwise(lambda g, p: torch.add(g, p, alpha=weight_decay))
    else:
        decay = leafwise(
            lambda g, p, weight_decay: g + weight_decay * p,
            hyper={"weight_decay": weight_decay},
        )
    return decay if mask is None else masked(decay, mask)


@transformation
def cautious_weight_decay(
    weight_decay: ScalarOrSchedule = 0.0, mask: MaskOrFn | None = None
) -> GradientTransformation:
    """``u -> u + weight_decay * p`` where u and p have the same sign or one is 0; elsewhere u.

    So only elements decay that the step moves towards 0 already. It belongs where
    `add_decayed_weights` does: after the moments and before the learning rate.

    Args:
        weight_decay: 0 or greater, or a schedule.
        mask: which parameters decay, see `masked`; by default all.

    Raises:
        ValueError: a negative or NaN weight decay; ``update`` called without params.

    Source: Chen et al., "Cautious Weight Decay", 2025.

    Example:
        >>> import torch, functorch_opt as fo
        >>> tx, params = fo.cautious_weight_decay(0.1), [torch.tensor([2.0, -2.0])]
        >>> tx.update([torch.tensor([1.0, 1.0])], tx.init(params), params)[0]
        [tensor([1.2000, 1.0000])]
    """
    check_range(0, float("inf"), weight_decay=weight_decay)

    def rule(g, p, weight_decay):
        return torch.where(g * p >= 0, g + weight_decay * p, g)

    decay = leafwise(rule, hyper={"weight_decay": weight_decay})
    return decay if mask is None else masked(decay, mask)
