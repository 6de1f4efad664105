"""Averaged gradient descent: a decaying step size, and an average of the parameters.

    p  -= eta (g + lambd p)                eta = lr first, then lr / (1 + lambd lr t)^alpha
    ax += mu (p - ax)                      mu  = 1 first,  then 1 / max(1, t - t0)

Both ``eta`` and ``mu`` are computed after a step, for the next one. So a change of ``lr`` acts one
step late.

Source: Polyak & Juditsky, "Acceleration of Stochastic Approximation by Averaging", 1992 (the
average).
"""

from __future__ import annotations

import torch

from functorch_opt import tree
from functorch_opt._core import numerics
from functorch_opt._core.chain import chain
from functorch_opt._core.rule import leafwise
from functorch_opt._core.transformation import (
    GradientTransformation,
    ScalarOrSchedule,
    check_range,
    transformation,
)

__all__ = ["asgd"]


@transformation
def decaying_step(learning_rate, lambd, alpha) -> GradientTransformation:
    """``u = -eta (g + lambd p)``."""
    check_range(0, float("inf"), learning_rate=learning_rate)
    check_range(-float("inf"), float("inf"), lambd=lambd, alpha=alpha)

    def prepare(count, lr, lambd, alpha):
        t = tree.as_real(count + 1)
        return {"first": count == 0, "next_eta": lr / (1 + lambd * lr * t) ** alpha}

    def rule(g, p, eta, lr, lambd, first, next_eta):
        eta = torch.where(first, lr, eta)
        # It is a copy, because the slots of two tensors must not share their memory.
        return -eta * (g + lambd * p), {"eta": next_eta.clone()}

    hyper = {"lr": learning_rate, "lambd": lambd, "alpha": alpha}
    return leafwise(rule, prepare, slots={"eta": numerics.scalar_slot(0.0)}, hyper=hyper)


@transformation
def average_params(t0) -> GradientTransformation:
    """``ax += mu (p + u - ax)``. The update passes unchanged."""
    check_range(-float("inf"), float("inf"), t0=t0)

    def prepare(count, t0):
        return {"next_mu": 1 / (tree.as_real(count + 1) - t0).clamp(min=1)}

    def rule(g, p, mu, ax, next_mu):
        return g, {"mu": next_mu.clone(), "ax": torch.lerp(ax, p + g, mu)}

    slots = {"mu": numerics.scalar_slot(1.0), "ax": tree.zeros_like}
    tx = leafwise(rule, prepare, slots=slots, hyper={"t0": t0})
    tx.last = True
    return tx


@transformation
def asgd(
    learning_rate: ScalarOrSchedule,
    lambd: ScalarOrSchedule = 1e-4,
    alpha: ScalarOrSchedule = 0.75,
    t0: ScalarOrSchedule = 1e6,
) -> GradientTransformation:
    """Gradient descent with a decaying step size, which keeps an average ``ax`` of the parameters.

    ``u = -eta (g + lambd p)`` and ``ax += mu (p + u - ax)``, where after update t ``eta`` becomes
    ``learning_rate / (1 + lambd learning_rate t)^alpha`` and ``mu`` becomes ``1 / max(1, t - t0)``.
    The variant is that of torch.optim.ASGD; optax has none. The average needs the new parameters,
    so nothing may change the updates after it. ``fo.get(state, "ax")`` reads it.

    Args:
        learning_rate: the first ``eta``, 0 or greater; or a schedule, which acts one update late.
        lambd: decay of the parameters, and of ``eta``.
        alpha: power of the decay of ``eta``.
        t0: the update after which averaging starts. Until then ``ax`` is the parameter itself.

    A parameter whose gradient is missing at the very first update stays where it is for one more
    update, because updates are counted for all parameters together. (The classes of
    `functorch_opt.optim` count for each parameter.)

    Raises:
        ValueError: the learning rate is negative, or a number is NaN.

    Source: Polyak & Juditsky, 1992 (the average).

    Example:
        >>> import torch, functorch_opt as fo
        >>> tx, params = fo.asgd(0.1, t0=0.0), torch.tensor(1.0)
        >>> state = tx.init(params)
        >>> for _ in range(100):
        ...     updates, state = tx.update(2 * params, state, params)
        ...     params = fo.apply_updates(params, updates)
        >>> round(fo.get(state, "ax").item(), 2)
        0.03
    """
    return chain(decaying_step(learning_rate, lambd, alpha), average_params(t0))
