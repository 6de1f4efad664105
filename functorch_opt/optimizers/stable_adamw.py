"""StableAdamW: AdamW that takes a smaller step where g is larger than the second moment expects.

    m  = b1 m + (1 - b1) g                                        m_hat = m / (1 - b1^t)
    nu = b2 nu + (1 - b2) g^2                                     nu_hat = nu / (1 - b2^t)
    rms = sqrt(mean(g^2 / max(nu_hat, eps^2)))                    over the tensor
    u  = (m_hat / (sqrt(nu_hat) + eps) + weight_decay p) / max(1, rms)

Source: Wortsman et al., "Stable and low-precision training for large-scale vision-language models",
2023, alg. 2.
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

__all__ = ["scale_by_stable_adamw", "stable_adamw"]


@transformation
def scale_by_stable_adamw(
    b1: ScalarOrSchedule = 0.9,
    b2: ScalarOrSchedule = 0.99,
    eps: ScalarOrSchedule = 1e-6,
    weight_decay: ScalarOrSchedule = 0.0,
    mu_dtype: torch.dtype | None = None,
) -> GradientTransformation:
    """``u = (m_hat / (sqrt(nu_hat) + eps) + weight_decay p) / max(1, rms)``.

    The rule is at the top of `functorch_opt.optimizers.stable_adamw`. A smaller step decays less
    too, so the decay is part of this stage.

    Args:
        b1: decay of the mean, in [0, 1).
        b2: decay of the second moment, in [0, 1).
        eps: added to the root, and the smallest root in rms; greater than 0.
        weight_decay: 0 or greater. To let only some parameters decay, use `partition`.
        mu_dtype: dtype in which the mean is stored; by default that of the params, at least
            float32.

    Raises:
        ValueError: an argument outside its range; ``update`` called without params.

    Source: Wortsman et al., 2023, alg. 2.

    Example:
        >>> import torch, functorch_opt as fo
        >>> tx, params = fo.scale_by_stable_adamw(b1=0.0), [torch.zeros(1)]
        >>> _, state = tx.update([torch.tensor([1.0])], tx.init(params), params)
        >>> tx.update([torch.tensor([100.0])], state, params)[0]
        [tensor([1.])]
    """
    check_range(0, 1, b1=b1, b2=b2)
    check_range(0, float("inf"), weight_decay=weight_decay)
    check_range(0, float("inf"), above=True, eps=eps)

    def prepare(count, b1, b2):
        t = tree.as_real(count + 1)
        return {"w1": 1 - b1, "w2": 1 - b2, "c1": 1 - b1**t, "c2": 1 - b2**t}

    def surprise(g, nu, w2, c2, eps):
        nu_hat = torch.lerp(nu, g * g, w2) / c2
        return (g * g / torch.clamp(nu_hat, min=eps * eps)).sum()

    def rule(g, p, mu, nu, surprise, n, w1, w2, c1, c2, eps, weight_decay):
        mu = torch.lerp(mu, g, w1)
        nu = torch.lerp(nu, g * g, w2)
        rms = (surprise / n).clamp(min=1).sqrt()
        u = mu / c1 / ((nu / c2 + tree.TINY).sqrt() + eps) + weight_decay * p
        return u / rms, {"mu": mu, "nu": nu}

    slots: dict[str, Any] = {
        "mu": partial(tree.zeros_like, dtype=mu_dtype),
        "nu": tree.zeros_like,
    }
    hyper = {"b1": b1, "b2": b2, "eps": eps, "weight_decay": weight_decay}
    sums = {"surprise": surprise, "n": lambda g: g.numel()}
    return leafwise(rule, prepare, slots=slots, hyper=hyper, sums=sums)


@transformation
def stable_adamw(
    learning_rate: ScalarOrSchedule,
    b1: ScalarOrSchedule = 0.9,
    b2: ScalarOrSchedule = 0.99,
    eps: ScalarOrSchedule = 1e-6,
    weight_decay: ScalarOrSchedule = 1e-2,
    mu_dtype: torch.dtype | None = None,
) -> GradientTransformation:
    """StableAdamW: `scale_by_stable_adamw`, then the learning rate. It takes the place of clipping.

    Args:
        learning_rate: 0 or greater, or a schedule.
        b1, b2, eps, mu_dtype: see `scale_by_stable_adamw`.
        weight_decay: multiplied by the learning rate, and divided by the root mean square too.

    Raises:
        ValueError: an argument outside its range; ``update`` called without params.

    Source: Wortsman et al., 2023, alg. 2.

    Example:
        >>> import functorch_opt as fo
        >>> fo.stable_adamw(0.001, weight_decay=0.1)
        stable_adamw(0.001, weight_decay=0.1)
    """
    return chain(
        scale_by_stable_adamw(b1, b2, eps, weight_decay, mu_dtype),
        scale_by_learning_rate(learning_rate),
    )
