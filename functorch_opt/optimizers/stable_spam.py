"""Stable-SPAM: Adam behind two clips of spikes, which forgets its moments now and then.

    g  = clip_spikes, then scale_to_usual_norm           see `functorch_opt.transforms.spikes`
    every reset_period steps: m = nu = 0 and s = 0
    s  = s + 1
    m  = b1 m + (1 - b1) g
    nu = b2 nu + (1 - b2) g^2
    u  = m / (1 - b1^s) / (sqrt(nu / (1 - b2^s)) + eps)

Source: Huang, Hu, Zhang, Jin, Li, Shen, Chen, Liu, Wen, Wang & Liu, "Stable-SPAM: How to Train in
4-Bit More Stably than 16-Bit Adam", 2025, alg. 1.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from functorch_opt import tree
from functorch_opt._core.chain import chain
from functorch_opt._core.groups import MaskOrFn
from functorch_opt._core.rule import leafwise
from functorch_opt._core.transformation import (
    GradientTransformation,
    ScalarOrSchedule,
    check_range,
    check_whole,
    transformation,
)
from functorch_opt.transforms.decay import add_decayed_weights
from functorch_opt.transforms.scale import scale_by_learning_rate
from functorch_opt.transforms.spikes import clip_spikes, scale_to_usual_norm

__all__ = ["scale_by_stable_spam", "stable_spam"]


@transformation
def scale_by_forgetful_adam(
    b1: ScalarOrSchedule,
    b2: ScalarOrSchedule,
    eps: ScalarOrSchedule,
    mu_dtype: torch.dtype | None,
    period: int,
) -> GradientTransformation:
    """Adam, whose moments begin anew before each step number k `period`, k = 1, 2, ..."""
    check_range(0, 1, b1=b1, b2=b2)
    check_range(0, float("inf"), eps=eps)
    check_whole(0, reset_period=period)

    def prepare(count, b1, b2):
        s = number = count + 1
        if period:
            s = torch.where(number < period, number, number % period + 1)
        s = tree.as_real(s)
        old = torch.where(s > 1, 1.0, 0.0)
        weights = {"w1": 1 - b1, "w2": 1 - b2, "old": old}
        return {**weights, "c1": 1 / (1 - b1**s), "c2": 1 / (1 - b2**s)}

    def rule(g, mu, nu, old, w1, w2, c1, c2, eps):
        mu = torch.lerp(old * mu, g, w1)
        nu = torch.lerp(old * nu, g * g, w2)
        u = c1 * mu / ((c2 * nu + tree.TINY).sqrt() + eps)
        return u, {"mu": mu, "nu": nu}

    slots: dict[str, Any] = {
        "mu": partial(tree.zeros_like, dtype=mu_dtype),
        "nu": tree.zeros_like,
    }
    hyper = {"b1": b1, "b2": b2, "eps": eps}
    return leafwise(rule, prepare, slots=slots, hyper=hyper)


@transformation
def scale_by_stable_spam(
    b1: ScalarOrSchedule = 0.9,
    b2: ScalarOrSchedule = 0.999,
    eps: ScalarOrSchedule = 1e-8,
    mu_dtype: torch.dtype | None = None,
    gamma1: ScalarOrSchedule = 0.7,
    gamma2: ScalarOrSchedule = 0.9,
    theta: ScalarOrSchedule = 0.999,
    reset_period: int = 1000,
) -> GradientTransformation:
    """`clip_spikes`, `scale_to_usual_norm`, and Adam that forgets its moments now and then.

    The rule is at the top of `functorch_opt.optimizers.stable_spam`.

    Args:
        b1: decay of the mean, in [0, 1).
        b2: decay of the second moment, in [0, 1).
        eps: added outside the roots, 0 or greater.
        mu_dtype: dtype of the mean; by default that of the params, at least float32.
        gamma1, gamma2: the decays of `scale_to_usual_norm`. The authors let `b1` and `gamma1` fall
            to a half along a cosine: give them `cosine_decay_schedule`.
        theta: the decay of `clip_spikes`.
        reset_period: after how many steps the moments begin anew; 0: never.

    Raises:
        ValueError: an argument outside its range.

    Source: Huang et al., 2025, alg. 1. At a reset the authors' code makes one more step with the old
    moments, corrected as if they were new, and it corrects the means of the clips as if they were
    new too, so that nothing is clipped for a while. Here a reset is of the moments, and before the
    step.

    Example:
        >>> import torch, functorch_opt as fo
        >>> list(fo.scale_by_stable_spam().init([torch.zeros(2)]))
        ['clip_spikes', 'scale_to_usual_norm', 'scale_by_forgetful_adam']
    """
    check_range(0, 1, gamma1=gamma1, gamma2=gamma2, theta=theta)
    return chain(
        clip_spikes(theta),
        scale_to_usual_norm(gamma1, gamma2, eps),
        scale_by_forgetful_adam(b1, b2, eps, mu_dtype, reset_period),
    )


@transformation
def stable_spam(
    learning_rate: ScalarOrSchedule,
    b1: ScalarOrSchedule = 0.9,
    b2: ScalarOrSchedule = 0.999,
    eps: ScalarOrSchedule = 1e-8,
    mu_dtype: torch.dtype | None = None,
    weight_decay: ScalarOrSchedule = 0.0,
    mask: MaskOrFn | None = None,
    *,
    gamma1: ScalarOrSchedule = 0.7,
    gamma2: ScalarOrSchedule = 0.9,
    theta: ScalarOrSchedule = 0.999,
    reset_period: int = 1000,
) -> GradientTransformation:
    """Stable-SPAM: `scale_by_stable_spam`, decoupled weight decay, the learning rate.

    Args:
        learning_rate: 0 or greater, or a schedule.
        b1, b2, eps, mu_dtype, gamma1, gamma2, theta, reset_period: see `scale_by_stable_spam`.
        weight_decay: multiplied by the learning rate.
        mask: which parameters decay, see `masked`; by default all.

    Raises:
        ValueError: an argument outside its range; ``update`` called without params.

    Source: Huang et al., 2025.

    Example:
        >>> import functorch_opt as fo
        >>> fo.stable_spam(1e-3, reset_period=500)
        stable_spam(0.001, reset_period=500)
    """
    direction = scale_by_stable_spam(
        b1, b2, eps, mu_dtype, gamma1, gamma2, theta, reset_period
    )
    decay = add_decayed_weights(weight_decay, mask)
    return chain(direction, decay, scale_by_learning_rate(learning_rate))
