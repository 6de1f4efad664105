"""Optimistic gradient descent: the gradient, and beyond it what changed since the last one.

    u = alpha g + beta (g - previous g)

In a game, where each player's gradient turns with the moves of the others, it converges where
gradient descent circles.

Source: Mokhtari, Ozdaglar & Pattathil, "A Unified Analysis of Extra-gradient and Optimistic
Gradient Methods for Saddle Point Problems: Proximal Point Approach", 2020 (generalized OGDA).
"""

from __future__ import annotations

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
from functorch_opt.optimizers.adam import scale_by_adam
from functorch_opt.transforms.scale import scale_by_learning_rate

__all__ = [
    "optimistic_adam_v2",
    "optimistic_gradient_descent",
    "scale_by_optimistic_gradient",
]


@transformation
def scale_by_optimistic_gradient(
    alpha: ScalarOrSchedule = 1.0, beta: ScalarOrSchedule = 1.0
) -> GradientTransformation:
    """``u = alpha g + beta (g - previous g)``; at the first step ``u = alpha g``.

    Args:
        alpha: weight of the gradient.
        beta: weight of its change.

    Raises:
        ValueError: an argument is NaN or infinite.

    Source: Mokhtari, Ozdaglar & Pattathil, 2020 (generalized OGDA).

    Example:
        >>> import torch, functorch_opt as fo
        >>> tx = fo.scale_by_optimistic_gradient()
        >>> _, state = tx.update([torch.tensor(1.0)], tx.init([torch.tensor(0.0)]))
        >>> tx.update([torch.tensor(3.0)], state)[0]
        [tensor(5.)]
    """
    check_range(-float("inf"), float("inf"), alpha=alpha, beta=beta)

    def rule(g, previous, count, alpha, beta):
        change = g - torch.where(count == 0, g, previous)
        return alpha * g + beta * change, {"previous": g.clone()}

    hyper = {"alpha": alpha, "beta": beta}
    return leafwise(rule, slots={"previous": tree.zeros_like}, hyper=hyper)


@transformation
def optimistic_gradient_descent(
    learning_rate: ScalarOrSchedule,
    alpha: ScalarOrSchedule = 1.0,
    beta: ScalarOrSchedule = 1.0,
) -> GradientTransformation:
    """`scale_by_optimistic_gradient`, then the learning rate.

    Args:
        learning_rate: 0 or greater, or a schedule.
        alpha, beta: see `scale_by_optimistic_gradient`.

    Raises:
        ValueError: an argument outside its range.

    Source: Mokhtari, Ozdaglar & Pattathil, 2020 (generalized OGDA).

    Example:
        >>> import torch, functorch_opt as fo
        >>> tx = fo.optimistic_gradient_descent(0.5)
        >>> params = torch.tensor([1.0, 1.0])  # x and y: min over x, max over y, of x y
        >>> state = tx.init(params)
        >>> for _ in range(100):
        ...     x, y = params
        ...     updates, state = tx.update(torch.stack([y, -x]), state)
        ...     params = fo.apply_updates(params, updates)
        >>> bool(params.norm() < 1e-3)
        True
    """
    direction = scale_by_optimistic_gradient(alpha, beta)
    return chain(direction, scale_by_learning_rate(learning_rate))


@transformation
def optimistic_adam_v2(
    learning_rate: ScalarOrSchedule,
    *,
    alpha: ScalarOrSchedule = 1.0,
    beta: ScalarOrSchedule = 1.0,
    b1: ScalarOrSchedule = 0.9,
    b2: ScalarOrSchedule = 0.999,
    eps: ScalarOrSchedule = 1e-8,
    eps_root: ScalarOrSchedule = 0.0,
    mu_dtype: torch.dtype | None = None,
    nesterov: bool = True,
) -> GradientTransformation:
    """`scale_by_adam`, `scale_by_optimistic_gradient` of what it makes, then the learning rate.

    Args:
        learning_rate: 0 or greater, or a schedule.
        alpha, beta: see `scale_by_optimistic_gradient`.
        b1, b2, eps, eps_root, mu_dtype, nesterov: see `scale_by_adam`.

    Raises:
        ValueError: an argument outside its range.

    Source: Daskalakis, Ilyas, Syrgkanis & Zeng, "Training GANs with Optimism", 2018, alg. 1; optax
    has a step size for each of its two terms.

    Example:
        >>> import functorch_opt as fo
        >>> fo.optimistic_adam_v2(0.1, alpha=0.5)
        optimistic_adam_v2(0.1, alpha=0.5)
    """
    return chain(
        scale_by_adam(b1, b2, eps, eps_root, mu_dtype, nesterov=nesterov),
        scale_by_optimistic_gradient(alpha, beta),
        scale_by_learning_rate(learning_rate),
    )
