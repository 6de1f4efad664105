"""COCOB: each element bets on the outcome of a coin, its gradient, with what it has won so far.

    L = max(L, |g|)                     the largest gradient
    G = G + |g|                         the sum of their sizes
    R = max(R - g (p - first p), 0)     the reward
    C = C - g                           minus the sum of the gradients
    p = first p + C (L + R) / (L max(G + L, alpha L))

Source: Orabona & Tommasi, "Training Deep Networks without Learning Rates Through Coin Betting",
2017, alg. 2.
"""

from __future__ import annotations

import torch

from functorch_opt import tree
from functorch_opt._core.chain import chain
from functorch_opt._core.groups import MaskOrFn
from functorch_opt._core.numerics import copied
from functorch_opt._core.rule import leafwise
from functorch_opt._core.transformation import (
    GradientTransformation,
    Scalar,
    ScalarOrSchedule,
    check_range,
    transformation,
)
from functorch_opt.transforms.decay import add_decayed_weights
from functorch_opt.transforms.scale import scale_by_learning_rate

__all__ = ["cocob", "scale_by_cocob"]


@transformation
def scale_by_cocob(
    alpha: ScalarOrSchedule = 100.0, eps: Scalar = 1e-8
) -> GradientTransformation:
    """The step from p to where COCOB puts the parameter. It takes gradients, not yet negated.

    The rule is at the top of `functorch_opt.optimizers.cocob`. The stage looks at the parameters
    that it makes, so it comes last in a chain.

    Args:
        alpha: keeps the first bets small, 0 or greater.
        eps: the first L, greater than 0.

    Raises:
        ValueError: an argument outside its range; ``update`` called without params.

    Source: Orabona & Tommasi, 2017, alg. 2.

    Example:
        >>> import torch, functorch_opt as fo
        >>> tx, params = fo.scale_by_cocob(alpha=1.0), [torch.tensor([1.0, 1.0])]
        >>> tx.update([torch.tensor([2.0, -5.0])], tx.init(params), params)[0]
        [tensor([-0.5000,  0.5000])]
    """
    check_range(0, float("inf"), alpha=alpha)
    check_range(0, float("inf"), above=True, eps=eps)

    def rule(g, p, start, gathered, size, sum_of_sizes, reward, alpha, eps):
        size = torch.maximum(torch.clamp(size, min=eps), g.abs())
        sum_of_sizes = sum_of_sizes + g.abs()
        reward = torch.clamp(reward - g * (p - start), min=0)
        gathered = gathered - g
        bet = gathered / (size * torch.maximum(sum_of_sizes + size, alpha * size))
        new = {"gathered": gathered, "size": size, "sum_of_sizes": sum_of_sizes}
        return start + bet * (size + reward) - p, {
            "start": start,
            "reward": reward,
            **new,
        }

    zeros = ("gathered", "size", "sum_of_sizes", "reward")
    return leafwise(
        rule,
        slots={"start": copied, **dict.fromkeys(zeros, tree.zeros_like)},
        hyper={"alpha": alpha, "eps": eps},
        last=True,
    )


@transformation
def cocob(
    learning_rate: ScalarOrSchedule = 1.0,
    alpha: ScalarOrSchedule = 100.0,
    eps: Scalar = 1e-8,
    weight_decay: ScalarOrSchedule = 0.0,
    mask: MaskOrFn | None = None,
) -> GradientTransformation:
    """COCOB: weight decay, the learning rate, `scale_by_cocob`.

    Args:
        learning_rate: multiplies the gradients; 1 is the paper's.
        alpha, eps: see `scale_by_cocob`.
        weight_decay: added to the gradient, times the parameter.
        mask: which parameters decay, see `masked`; by default all.

    Raises:
        ValueError: an argument outside its range; ``update`` called without params.

    Source: Orabona & Tommasi, 2017, alg. 2.

    Example:
        >>> import functorch_opt as fo
        >>> fo.cocob(weight_decay=1e-4)
        cocob(weight_decay=0.0001)
    """
    return chain(
        add_decayed_weights(weight_decay, mask),
        scale_by_learning_rate(learning_rate, flip_sign=False),
        scale_by_cocob(alpha, eps),
    )
