"""MARS: the change of the gradient is added to it, so that its noise has less variance.

    c = g + gamma b1 / (1 - b1) (g - previous g)             previous g = 0 at the first step
    c = c / max(1, norm(c))                                  over the tensor

Then any optimizer of c. That of `mars_adamw` is AdamW with the same b1.

Source: Yuan, Liu, Wu, Zhou & Gu, "MARS: Unleashing the Power of Variance Reduction for Training
Large Models", 2024, in the approximate form, which takes no second gradient.
"""

from __future__ import annotations

import torch

from functorch_opt import tree
from functorch_opt._core.chain import chain
from functorch_opt._core.groups import MaskOrFn
from functorch_opt._core.rule import leafwise
from functorch_opt._core.transformation import (
    GradientTransformation,
    ScalarOrSchedule,
    check_range,
    transformation,
)
from functorch_opt.optimizers.adam import scale_by_adam
from functorch_opt.transforms.decay import add_decayed_weights
from functorch_opt.transforms.scale import scale_by_learning_rate

__all__ = ["mars_adamw", "scale_by_mars"]


@transformation
def scale_by_mars(
    b1: ScalarOrSchedule = 0.95, gamma: ScalarOrSchedule = 0.025
) -> GradientTransformation:
    """``u = c``: the gradient with less variance, in front of any optimizer with a momentum b1.

    The rule is at the top of `functorch_opt.optimizers.mars`. MARS-Lion is
    ``chain(scale_by_mars(0.95), lion(learning_rate, b1=0.95, b2=0.95))``.

    Args:
        b1: decay of the momentum that follows, in [0, 1).
        gamma: weight of the change, 0 or greater.

    Raises:
        ValueError: an argument outside its range.

    Source: Yuan et al., 2024.

    Example:
        >>> import torch, functorch_opt as fo
        >>> tx = fo.scale_by_mars(b1=0.5, gamma=0.5)
        >>> _, state = tx.update([torch.tensor([0.5])], tx.init([torch.zeros(1)]))
        >>> tx.update([torch.tensor([0.25])], state)[0]
        [tensor([0.1250])]
    """
    check_range(0, 1, b1=b1)
    check_range(0, float("inf"), gamma=gamma)

    def corrected(g, previous, factor):
        return g + factor * (g - previous)

    def rule(g, previous, factor, square):
        c = corrected(g, previous, factor)
        return c / square.clamp(min=1).sqrt(), {"previous": g.clone()}

    return leafwise(
        rule,
        lambda b1, gamma: {"factor": gamma * b1 / (1 - b1)},
        slots={"previous": tree.zeros_like},
        hyper={"b1": b1, "gamma": gamma},
        sums={
            "square": lambda g, previous, factor: (
                corrected(g, previous, factor).square().sum()
            )
        },
    )


@transformation
def mars_adamw(
    learning_rate: ScalarOrSchedule,
    b1: ScalarOrSchedule = 0.95,
    b2: ScalarOrSchedule = 0.99,
    eps: ScalarOrSchedule = 1e-8,
    eps_root: ScalarOrSchedule = 0.0,
    mu_dtype: torch.dtype | None = None,
    weight_decay: ScalarOrSchedule = 0.0,
    mask: MaskOrFn | None = None,
    *,
    gamma: ScalarOrSchedule = 0.025,
) -> GradientTransformation:
    """MARS-AdamW: `scale_by_mars`, `scale_by_adam`, decoupled weight decay, the learning rate.

    The authors use it for matrices and AdamW for the rest: see `partition`.

    Args:
        learning_rate: 0 or greater, or a schedule.
        b1, b2, eps, eps_root, mu_dtype: see `scale_by_adam`.
        weight_decay: multiplied by the learning rate.
        mask: which parameters decay, see `masked`; by default all.
        gamma: see `scale_by_mars`.

    Raises:
        ValueError: an argument outside its range; ``update`` called without params.

    Source: Yuan et al., 2024.

    Example:
        >>> import functorch_opt as fo
        >>> fo.mars_adamw(3e-3, weight_decay=0.1)
        mars_adamw(0.003, weight_decay=0.1)
    """
    return chain(
        scale_by_mars(b1, gamma),
        scale_by_adam(b1, b2, eps, eps_root, mu_dtype),
        add_decayed_weights(weight_decay, mask),
        scale_by_learning_rate(learning_rate),
    )
