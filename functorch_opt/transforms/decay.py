"""Weight decay: ``u + lambda p``.

Before the moments it is L2 regularization; after them, decoupled weight decay.
"""

from __future__ import annotations

import torch

from functorch_opt._core import numerics
from functorch_opt._core.groups import MaskOrFn, masked
from functorch_opt._core.rule import leafwise
from functorch_opt._core.transformation import (
    GradientTransformation,
    ScalarOrSchedule,
    check_range,
    transformation,
)

__all__ = ["add_decayed_weights", "cautious_weight_decay", "corrected_weight_decay"]


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


@transformation
def corrected_weight_decay(
    weight_decay: ScalarOrSchedule,
    learning_rate: ScalarOrSchedule,
    max_learning_rate: ScalarOrSchedule | None = None,
    mask: MaskOrFn | None = None,
) -> GradientTransformation:
    """``u -> u + weight_decay learning_rate / max_learning_rate p``.

    After the learning rate the decay is in proportion to its square. So the norm of weights behind
    a normalization stays where it is when the learning rate falls, and their gradients do not grow
    towards the end. It belongs where `add_decayed_weights` does, and goes onto any optimizer:
    ``chain(scale_by_lion(), corrected_weight_decay(0.1, rate), scale_by_learning_rate(rate))``.

    Args:
        weight_decay: 0 or greater, or a schedule.
        learning_rate: that of the chain, 0 or greater, or a schedule.
        max_learning_rate: the largest one of the training, greater than 0. None means the largest
            one of the steps so far, one number in the state for each tensor. During a warmup the
            decay is then not corrected.
        mask: which parameters decay, see `masked`; by default all.

    Raises:
        ValueError: an argument outside its range; ``update`` called without params.

    Source: Defazio, "Why Gradients Rapidly Increase Near the End of Training", 2025, alg. 1.

    Example:
        >>> import torch, functorch_opt as fo
        >>> tx, params = fo.corrected_weight_decay(0.1, 0.02, 0.08), [torch.tensor(2.0)]
        >>> tx.update([torch.tensor(1.0)], tx.init(params), params)[0]
        [tensor(1.0500)]
    """
    check_range(0, float("inf"), weight_decay=weight_decay, learning_rate=learning_rate)
    check_range(0, float("inf"), above=True, max_learning_rate=max_learning_rate)

    def prepare(weight_decay, learning_rate, max_learning_rate):
        return {"decay": weight_decay * (learning_rate / max_learning_rate)}

    def rule(g, p, decay):
        return g + decay * p

    def of_largest(g, p, largest, learning_rate, weight_decay):
        largest = torch.clamp(largest, min=learning_rate)
        share = learning_rate / torch.where(largest > 0, largest, 1.0)
        return g + weight_decay * share * p, {"largest": largest}

    hyper = {"weight_decay": weight_decay, "learning_rate": learning_rate}
    if max_learning_rate is None:
        slots = {"largest": numerics.scalar_slot(0.0)}
        decay = leafwise(of_largest, slots=slots, hyper=hyper)
    else:
        hyper["max_learning_rate"] = max_learning_rate
        decay = leafwise(rule, prepare, hyper=hyper)
    return decay if mask is None else masked(decay, mask)
