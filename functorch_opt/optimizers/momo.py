"""MoMo: momentum with the step that a model of the loss allows, from its values and a lower bound.

    m = b m + (1 - b) g,    f = b f + (1 - b) value,    c = b c + (1 - b) <g, p>
    h = (1 + lr decay) (f - c - bias lower_bound) + <m, p>
    tau = min(lr / bias, max(h, 0) / <m, m/D>)
    p = p / (1 + lr decay) - tau m/D

MoMo:       D = 1, bias = 1, and b = 0 at the first step
MoMo-Adam:  D = sqrt(nu / (1 - b2^t)) + eps, bias = 1 - b1^t

Inner products are over all parameters.

Source: Schaipp, Ohana, Eickenberg, Defazio & Gower, "MoMo: Momentum Models for Adaptive Learning
Rates", 2023.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from functorch_opt import tree
from functorch_opt._core.rule import leafwise
from functorch_opt._core.transformation import (
    GradientTransformation,
    ScalarOrSchedule,
    check_range,
    transformation,
)

__all__ = ["momo", "momo_adam"]

INF = float("inf")
NAMES = ("average", "gamma", "raised")
TOTALS: dict[str, Any] = {"came": lambda g, p: (g * p).sum()}


def shared() -> dict[str, Tensor]:
    """f and c; how far the lower bound is above the one that was given; how many steps were made.

    The means are of all parameters, so their count is not that of one parameter.
    """
    numbers = {name: torch.zeros((), dtype=torch.float64) for name in NAMES}
    return {**numbers, "steps": torch.zeros((), dtype=torch.int64)}


def correction(steps, decay):
    return 1 - decay ** tree.as_real(steps + 1)


def step_size(steps, kept, inner, came, norm, w1, bias, given, value, adapt):
    """What the rule reads, and the next shared values."""
    (average, gamma, raised), (lr, lowest, decay) = kept, given
    average = average + w1 * (value - average)
    gamma = gamma + w1 * (came - gamma)
    shrink, gap, lower = 1 + lr * decay, average - gamma, lowest + raised
    model = shrink * gap + inner
    if adapt:
        reset = (model / (2 * bias * shrink)).clamp(min=lowest)
        lower = torch.where(model < shrink * bias * lower, reset, lower)
    h = (model - shrink * bias * lower).clamp(min=0)
    divisor = norm + (norm == 0)
    tau = torch.where(norm > 2.3e-16, h / divisor, 0.0).clamp(max=lr / bias)
    if adapt:
        raised = ((gap + inner - tau * norm / 2) / bias - lowest).clamp(min=0)
    now = {"tau": tau, "decayed": lr * decay / shrink}
    return now, {
        "average": average,
        "gamma": gamma,
        "raised": raised,
        "steps": steps + 1,
    }


@transformation
def momo(
    learning_rate: ScalarOrSchedule = 1.0,
    beta: ScalarOrSchedule = 0.9,
    lower_bound: ScalarOrSchedule = 0.0,
    weight_decay: ScalarOrSchedule = 0.0,
    adapt_lower_bound: bool = False,
) -> GradientTransformation:
    """Gradient descent with momentum, whose step is at most the learning rate.

    The rule is at the top of `functorch_opt.optimizers.momo`. Extra argument of ``update``:
    ``value``, the loss at the params.

    Args:
        learning_rate: the largest step, 0 or greater, or a schedule.
        beta: decay of the means, in [0, 1).
        lower_bound: a number that the loss does not go below.
        weight_decay: decoupled, multiplied by the learning rate.
        adapt_lower_bound: raise the bound from the values that are seen; `lower_bound` is then the
            first one.

    Raises:
        ValueError: an argument outside its range; ``update`` called without params.
        TypeError: ``update`` called without value.

    Source: Schaipp et al., 2023.

    Example:
        >>> import torch, functorch_opt as fo
        >>> tx, params = fo.momo(beta=0.0), [torch.tensor([3.0, 4.0])]
        >>> value, g = torch.tensor(12.5), [torch.tensor([3.0, 4.0])]
        >>> tx.update(g, tx.init(params), params, value=value)[0]
        [tensor([-1.5000, -2.0000])]
    """
    check_range(0, INF, learning_rate=learning_rate, weight_decay=weight_decay)
    check_range(0, 1, beta=beta)
    check_range(-INF, INF, lower_bound=lower_bound)

    def weight(steps, beta):
        return 1 - beta * tree.as_real(steps > 0)  # 1 at the first step

    def mean(g, mu, steps, beta):
        return mu + weight(steps, beta) * (g - mu)

    def prepare(
        steps, norm, inner, came, average, gamma, raised,
        learning_rate, beta, lower_bound, weight_decay, *, value,
    ):  # fmt: skip
        w1, kept = weight(steps, beta), (average, gamma, raised)
        given = (learning_rate, lower_bound, weight_decay)
        now, new = step_size(
            steps, kept, inner, came, norm, w1, 1.0, given, value, adapt_lower_bound
        )
        return {**now, "w1": w1}, new

    def rule(g, p, mu, w1, tau, decayed):
        mu = torch.lerp(mu, g, w1)
        return -decayed * p - tau * mu, {"mu": mu}

    totals = {
        "norm": lambda g, mu, steps, beta: mean(g, mu, steps, beta).square().sum(),
        "inner": lambda g, p, mu, steps, beta: (mean(g, mu, steps, beta) * p).sum(),
    }
    hyper = {"learning_rate": learning_rate, "beta": beta, "lower_bound": lower_bound}
    return leafwise(
        rule,
        prepare,
        slots={"mu": tree.zeros_like},
        shared=shared(),
        hyper={**hyper, "weight_decay": weight_decay},
        totals={**TOTALS, **totals},
    )


@transformation
def momo_adam(
    learning_rate: ScalarOrSchedule = 1e-2,
    b1: ScalarOrSchedule = 0.9,
    b2: ScalarOrSchedule = 0.999,
    eps: ScalarOrSchedule = 1e-8,
    lower_bound: ScalarOrSchedule = 0.0,
    weight_decay: ScalarOrSchedule = 0.0,
    adapt_lower_bound: bool = False,
) -> GradientTransformation:
    """AdamW, whose step is at most the learning rate.

    The rule is at the top of `functorch_opt.optimizers.momo`. Extra argument of ``update``:
    ``value``, the loss at the params.

    Args:
        learning_rate: the largest step, 0 or greater, or a schedule.
        b1: decay of the means, in [0, 1).
        b2: decay of the second moment, in [0, 1).
        eps: added outside the root, greater than 0.
        lower_bound, weight_decay, adapt_lower_bound: see `momo`.

    Raises:
        ValueError: an argument outside its range; ``update`` called without params.
        TypeError: ``update`` called without value.

    Source: Schaipp et al., 2023.

    Example:
        >>> import torch, functorch_opt as fo
        >>> tx, params = fo.momo_adam(1.0, b1=0.0), [torch.tensor([3.0, 4.0])]
        >>> value, g = torch.tensor(3.5), [torch.tensor([3.0, 4.0])]
        >>> tx.update(g, tx.init(params), params, value=value)[0]
        [tensor([-0.5000, -0.5000])]
    """
    check_range(0, INF, learning_rate=learning_rate, weight_decay=weight_decay)
    check_range(0, 1, b1=b1, b2=b2)
    check_range(0, INF, above=True, eps=eps)
    check_range(-INF, INF, lower_bound=lower_bound)

    def size(g, mu, nu, steps, b1, b2, eps):
        mu, nu = mu + (1 - b1) * (g - mu), nu + (1 - b2) * (g * g - nu)
        root = (nu / correction(steps, b2) + tree.TINY).sqrt()
        return (mu * mu / (root + eps)).sum()

    def prepare(
        steps, norm, inner, came, average, gamma, raised,
        learning_rate, b1, b2, lower_bound, weight_decay, *, value,
    ):  # fmt: skip
        given, c1 = (learning_rate, lower_bound, weight_decay), correction(steps, b1)
        kept, w1, adapt = (average, gamma, raised), 1 - b1, adapt_lower_bound
        now, new = step_size(steps, kept, inner, came, norm, w1, c1, given, value, adapt)
        return {**now, "w1": w1, "w2": 1 - b2, "c2": correction(steps, b2)}, new

    def rule(g, p, mu, nu, w1, w2, c2, eps, tau, decayed):
        mu, nu = torch.lerp(mu, g, w1), torch.lerp(nu, g * g, w2)
        u = mu / ((nu / c2 + tree.TINY).sqrt() + eps)
        return -decayed * p - tau * u, {"mu": mu, "nu": nu}

    hyper = {"learning_rate": learning_rate, "b1": b1, "b2": b2, "eps": eps}
    hyper |= {"lower_bound": lower_bound, "weight_decay": weight_decay}
    inner = {"inner": lambda g, p, mu, b1: ((mu + (1 - b1) * (g - mu)) * p).sum()}
    return leafwise(
        rule,
        prepare,
        slots=dict.fromkeys(("mu", "nu"), tree.zeros_like),
        shared=shared(),
        hyper=hyper,
        totals={**TOTALS, **inner, "norm": size},
    )
