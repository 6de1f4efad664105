"""FOCUS: signs of the momentum, and a pull towards the mean of the parameters.

    m  = b1 m + (1 - b1) g
    x  = b2 x + (1 - b2) p                                              x_hat = x / (1 - b2^t)
    u  = sign(m) + gamma sign(p - x_hat) + weight_decay x_hat

Source: Liu, Liu & Gore, "FOCUS: First Order Concentrated Updating Scheme", 2025, alg. 1, and the
authors' code.
"""

from __future__ import annotations

from functools import partial
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
from functorch_opt.transforms.scale import scale_by_learning_rate

__all__ = ["focus", "scale_by_focus"]


@transformation
def scale_by_focus(
    b1: ScalarOrSchedule = 0.9,
    b2: ScalarOrSchedule = 0.999,
    gamma: ScalarOrSchedule = 0.1,
    weight_decay: ScalarOrSchedule = 0.0,
    mu_dtype: torch.dtype | None = None,
) -> GradientTransformation:
    """``u = sign(m) + gamma sign(p - x_hat) + weight_decay x_hat``, with means m of g and x of p.

    The rule is at the top of `functorch_opt.optimizers.focus`. The slot ``averaged`` is x_hat. At the
    first step it is p to the bit, so that nothing is pulled; by the authors' code the sign is that
    of a rounding there. What decays is the mean, so the decay is part of this stage.

    Args:
        b1: decay of the mean of gradients, in [0, 1).
        b2: decay of the mean of parameters, in [0, 1).
        gamma: the strength of the pull, 0 or greater.
        weight_decay: 0 or greater. To let only some parameters decay, use `partition`.
        mu_dtype: dtype of ``mu``; by default that of the params, at least float32.

    Raises:
        ValueError: an argument outside its range; ``update`` called without params.

    Source: Liu et al., 2025, alg. 1, and the authors' code. pytorch_optimizer decays first, so that
    there the pull is that of the parameter which has decayed.

    Example:
        >>> import torch, functorch_opt as fo
        >>> tx, params = fo.scale_by_focus(), torch.tensor([1.0, 1.0])
        >>> updates, state = tx.update(torch.tensor([2.0, -3.0]), tx.init(params), params)
        >>> updates
        tensor([ 1., -1.])
        >>> tx.update(torch.tensor([2.0, -3.0]), state, params - updates)[0]
        tensor([ 0.9000, -0.9000])
    """
    check_range(0, 1, b1=b1, b2=b2)
    check_range(0, float("inf"), gamma=gamma, weight_decay=weight_decay)

    def prepare(count, b1, b2):
        t = tree.as_real(count + 1)
        # At the first step it is 1, of which a quotient may be off by a rounding.
        w2 = torch.where(t == 1, 1.0, (1 - b2) / (1 - b2**t))
        return {"w1": 1 - b1, "w2": w2}

    def rule(g, p, mu, averaged, w1, w2, gamma, weight_decay):
        mu = torch.lerp(mu, g, w1)
        averaged = torch.lerp(averaged, p, w2)
        u = torch.sign(mu) + gamma * torch.sign(p - averaged) + weight_decay * averaged
        return u, {"mu": mu, "averaged": averaged}

    slots: dict[str, Any] = {
        "mu": partial(tree.zeros_like, dtype=mu_dtype),
        "averaged": tree.zeros_like,
    }
    hyper = {"b1": b1, "b2": b2, "gamma": gamma, "weight_decay": weight_decay}
    return leafwise(rule, prepare, slots=slots, hyper=hyper)


@transformation
def focus(
    learning_rate: ScalarOrSchedule,
    b1: ScalarOrSchedule = 0.9,
    b2: ScalarOrSchedule = 0.999,
    gamma: ScalarOrSchedule = 0.1,
    weight_decay: ScalarOrSchedule = 0.0,
    mu_dtype: torch.dtype | None = None,
) -> GradientTransformation:
    """FOCUS: `scale_by_focus`, then the learning rate.

    Args:
        learning_rate: 0 or greater, or a schedule. As with `lion`, smaller than that of Adam.
        b1, b2, gamma, mu_dtype: see `scale_by_focus`.
        weight_decay: multiplied by the learning rate; of the mean of the parameters.

    Raises:
        ValueError: an argument outside its range; ``update`` called without params.

    Source: Liu et al., 2025.

    Example:
        >>> import functorch_opt as fo
        >>> fo.focus(1e-4, gamma=0.2)
        focus(0.0001, gamma=0.2)
    """
    direction = scale_by_focus(b1, b2, gamma, weight_decay, mu_dtype)
    return chain(direction, scale_by_learning_rate(learning_rate))
