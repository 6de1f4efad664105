"""MADGRAD: from where the parameters started, against the weighted sum of all gradients.

    lamb  = (learning_rate + eps) sqrt(t)            0 where the learning rate is
    s     = s + lamb g
    nu    = nu + lamb g^2
    z     = x0 - s / (nu^(1/3) + eps)                x0: the parameters at first
    p     = momentum p + (1 - momentum) z

Source: Defazio & Jelassi, "Adaptivity without Compromise: A Momentumized, Adaptive, Dual Averaged
Gradient Method for Stochastic Optimization", 2021, alg. 1.
"""

from __future__ import annotations

from typing import Any

import torch

from functorch_opt import tree
from functorch_opt._core.chain import chain
from functorch_opt._core.rule import leafwise
from functorch_opt._core.transformation import (
    GradientTransformation,
    ScalarOrSchedule,
    check_range,
    transformation,
)
from functorch_opt.transforms.decay import add_decayed_weights

__all__ = ["madgrad", "scale_by_madgrad"]


@transformation
def scale_by_madgrad(
    learning_rate: ScalarOrSchedule,
    momentum: ScalarOrSchedule = 0.9,
    eps: ScalarOrSchedule = 1e-6,
) -> GradientTransformation:
    """``p + u = momentum p + (1 - momentum) (x0 - s / (nu^(1/3) + eps))``.

    The whole rule is at the top of `functorch_opt.optimizers.madgrad`. It is a step, not a
    direction: no learning rate may follow.

    Args:
        learning_rate: 0 or greater, or a schedule.
        momentum: weight of the parameters as they are, in [0, 1).
        eps: added to the cube root, and to the learning rate as in the authors' code, unless that
            is 0; 0 or greater.

    Raises:
        ValueError: an argument outside its range; ``update`` called without params.

    Source: Defazio & Jelassi, 2021, alg. 1.

    Example:
        >>> import torch, functorch_opt as fo
        >>> tx, params = fo.scale_by_madgrad(0.125, momentum=0.0), [torch.tensor(1.0)]
        >>> tx.update([torch.tensor(1.0)], tx.init(params), params)[0]
        [tensor(-0.2500)]
    """
    check_range(0, float("inf"), learning_rate=learning_rate, eps=eps)
    check_range(0, 1, momentum=momentum)

    def prepare(count, learning_rate, momentum, eps):
        lamb = (learning_rate + eps) * (learning_rate != 0)
        root_of_t = tree.as_real(count + 1).sqrt()
        return {"lamb": lamb * root_of_t, "weight": 1 - momentum}

    def rule(g, p, s, nu, x0, lamb, weight, eps):
        s = s + lamb * g
        nu = nu + lamb * g * g
        z = x0 - s / ((nu + tree.TINY) ** (1 / 3) + eps)
        return weight * (z - p), {"s": s, "nu": nu, "x0": x0.clone()}

    slots: dict[str, Any] = {
        "s": tree.zeros_like,
        "nu": tree.zeros_like,
        "x0": torch.clone,
    }
    hyper = {"learning_rate": learning_rate, "momentum": momentum, "eps": eps}
    return leafwise(rule, prepare, slots=slots, hyper=hyper)


@transformation
def madgrad(
    learning_rate: ScalarOrSchedule,
    momentum: ScalarOrSchedule = 0.9,
    weight_decay: ScalarOrSchedule = 0.0,
    eps: ScalarOrSchedule = 1e-6,
) -> GradientTransformation:
    """MADGRAD: weight decay, added to the gradient, then `scale_by_madgrad`.

    The learning rate is of the size of that of gradient descent, not of Adam's, says the paper.

    Args:
        learning_rate, momentum, eps: see `scale_by_madgrad`.
        weight_decay: 0 or greater; part of what is summed.

    Raises:
        ValueError: an argument outside its range; ``update`` called without params.

    Source: Defazio & Jelassi, 2021, alg. 1.

    Example:
        >>> import functorch_opt as fo
        >>> fo.madgrad(0.01, weight_decay=1e-4)
        madgrad(0.01, weight_decay=0.0001)
    """
    direction = scale_by_madgrad(learning_rate, momentum, eps)
    return chain(add_decayed_weights(weight_decay), direction)
