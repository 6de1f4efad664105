"""ADOPT: Adam that divides g by the second moment of the steps before, and then takes the mean.

    first step:   nu = g^2, and nothing moves
    later:        d  = clip(g / max(sqrt(nu), eps), -c_t, c_t)                  c_t = (t - 1)^(1/4)
                  mu = b1 mu + (1 - b1) d                                       u = mu
                  nu = b2 nu + (1 - b2) g^2

So g and what divides it are independent, and it converges for every b2.

Source: Taniguchi et al., "ADOPT: Modified Adam Can Converge with Any beta2 with the Optimal Rate",
2024, algs. 1 and 2 (clipped).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from functorch_opt import tree
from functorch_opt._core.chain import chain
from functorch_opt._core.rule import leafwise
from functorch_opt._core.transformation import (
    GradientTransformation,
    ScalarOrSchedule,
    check_range,
    transformation,
)
from functorch_opt.transforms.scale import scale_by_learning_rate

__all__ = ["adopt", "scale_by_adopt"]


def fourth_root(count: Tensor) -> Tensor:
    return count**0.25


@transformation
def scale_by_adopt(
    b1: ScalarOrSchedule = 0.9,
    b2: ScalarOrSchedule = 0.9999,
    eps: ScalarOrSchedule = 1e-6,
    mu_dtype: torch.dtype | None = None,
    *,
    nesterov: bool = False,
    use_clipping: bool = True,
    clip_value_fn: Callable[[Tensor], Tensor] = fourth_root,
) -> GradientTransformation:
    """``u = mu``, the mean of ``g / max(sqrt(nu), eps)``, where ``nu`` has not seen g yet.

    The first update is 0. A parameter without gradient at that step starts with ``nu = 0``, and is
    held by the clipping alone. (The classes of `functorch_opt.optim` count for each.)

    Args:
        b1: decay of the mean, in [0, 1).
        b2: decay of the second moment, in [0, 1).
        eps: the smallest divisor, greater than 0.
        mu_dtype: dtype in which ``mu`` is stored; by default that of the params, at least float32.
        nesterov: return ``b1 mu + (1 - b1) g / max(sqrt(nu), eps)``, with the new ``mu``.
        use_clipping: whether each element of what is averaged is clipped.
        clip_value_fn: to what, from the number of updates made before, a float64 tensor; by default
            its fourth root.

    Raises:
        ValueError: a decay outside [0, 1); eps is 0 or negative.

    Source: Taniguchi et al., 2024, algs. 1 and 2.

    Example:
        >>> import torch, functorch_opt as fo
        >>> tx = fo.scale_by_adopt(b1=0.0)
        >>> _, state = tx.update([torch.tensor([2.0, 2.0])], tx.init([torch.zeros(2)]))
        >>> tx.update([torch.tensor([1.0, -20.0])], state)[0]
        [tensor([ 0.5000, -1.0000])]
    """
    check_range(0, 1, b1=b1, b2=b2)
    check_range(0, float("inf"), above=True, eps=eps)

    def prepare(count, b1, b2):
        moves = tree.as_real(count > 0)  # 0 at the first step, then 1
        bound = clip_value_fn(tree.as_real(count)) if use_clipping else float("inf")
        return {"w1": moves * (1 - b1), "w2": 1 - moves * b2, "bound": bound}

    def rule(g, mu, nu, w1, w2, eps, bound):
        d = g / (nu + tree.TINY).sqrt().clamp(min=eps)
        d = d.clamp(-bound, bound) if use_clipping else d
        mu = torch.lerp(mu, d, w1)
        u = torch.lerp(mu, d, w1) if nesterov else mu
        return u, {"mu": mu, "nu": torch.lerp(nu, g * g, w2)}

    slots: dict[str, Any] = {
        "mu": partial(tree.zeros_like, dtype=mu_dtype),
        "nu": tree.zeros_like,
    }
    return leafwise(rule, prepare, slots=slots, hyper={"b1": b1, "b2": b2, "eps": eps})


@transformation
def adopt(
    learning_rate: ScalarOrSchedule,
    b1: ScalarOrSchedule = 0.9,
    b2: ScalarOrSchedule = 0.9999,
    eps: ScalarOrSchedule = 1e-6,
    mu_dtype: torch.dtype | None = None,
    *,
    nesterov: bool = False,
    use_clipping: bool = True,
    clip_value_fn: Callable[[Tensor], Tensor] = fourth_root,
) -> GradientTransformation:
    """ADOPT: `scale_by_adopt`, then the learning rate.

    Args:
        learning_rate: 0 or greater, or a schedule.
        b1, b2, eps, mu_dtype, nesterov, use_clipping, clip_value_fn: see `scale_by_adopt`.

    Raises:
        ValueError: an argument outside its range.

    Source: Taniguchi et al., 2024, algs. 1 and 2.

    Example:
        >>> import functorch_opt as fo
        >>> fo.adopt(0.001, b2=0.99)
        adopt(0.001, b2=0.99)
    """
    direction = scale_by_adopt(
        b1,
        b2,
        eps,
        mu_dtype,
        nesterov=nesterov,
        use_clipping=use_clipping,
        clip_value_fn=clip_value_fn,
    )
    return chain(direction, scale_by_learning_rate(learning_rate))
