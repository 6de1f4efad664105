"""LaProp: Adam that takes the mean of the normalized gradients, and does not normalize the mean.

    nu = b2 nu + (1 - b2) g^2                                     c2 = 1 - b2^t
    m  = b1 m + (1 - b1) g / (sqrt(nu/c2 + eps_root) + eps)       c1 = 1 - b1^t
    u  = m / c1

Source: Ziyin, Wang & Ueda, "LaProp: Separating Momentum and Adaptivity in Adam", 2020.
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
    transformation,
)
from functorch_opt.transforms.decay import add_decayed_weights
from functorch_opt.transforms.scale import scale_by_learning_rate

__all__ = ["laprop", "scale_by_laprop"]


@transformation
def scale_by_laprop(
    b1: ScalarOrSchedule = 0.9,
    b2: ScalarOrSchedule = 0.999,
    eps: ScalarOrSchedule = 1e-15,
    eps_root: ScalarOrSchedule = 0.0,
    mu_dtype: torch.dtype | None = None,
) -> GradientTransformation:
    """``u`` is the corrected mean of ``g / (sqrt(nu_hat + eps_root) + eps)``.

    The rule is at the top of `functorch_opt.optimizers.laprop`. No element of the update is larger
    than ``1 / sqrt(1 - b2)``, whatever b1 is.

    Args:
        b1: decay of the mean, in [0, 1).
        b2: decay of the second moment, in [0, 1).
        eps: added outside the root, 0 or greater.
        eps_root: added inside the root, 0 or greater.
        mu_dtype: dtype in which the mean is stored; by default that of the params, at least
            float32.

    Raises:
        ValueError: a decay outside [0, 1) or a negative eps.

    Source: Ziyin et al., 2020.

    Example:
        >>> import torch, functorch_opt as fo
        >>> tx = fo.scale_by_laprop()
        >>> tx.update([torch.tensor([0.1, -20.0])], tx.init([torch.zeros(2)]))[0]
        [tensor([ 1., -1.])]
    """
    check_range(0, 1, b1=b1, b2=b2)
    check_range(0, float("inf"), eps=eps, eps_root=eps_root)

    def prepare(count, b1, b2, eps_root):
        t = tree.as_real(count + 1)
        corrections = {"c1": 1 - b1**t, "c2": 1 - b2**t}
        return {"w1": 1 - b1, "w2": 1 - b2, **corrections, "root": eps_root + tree.TINY}

    def rule(g, mu, nu, w1, w2, c1, c2, root, eps):
        nu = torch.lerp(nu, g * g, w2)
        mu = torch.lerp(mu, g / ((nu / c2 + root).sqrt() + eps), w1)
        return mu / c1, {"mu": mu, "nu": nu}

    slots: dict[str, Any] = {
        "mu": partial(tree.zeros_like, dtype=mu_dtype),
        "nu": tree.zeros_like,
    }
    hyper = {"b1": b1, "b2": b2, "eps": eps, "eps_root": eps_root}
    return leafwise(rule, prepare, slots=slots, hyper=hyper)


@transformation
def laprop(
    learning_rate: ScalarOrSchedule,
    b1: ScalarOrSchedule = 0.9,
    b2: ScalarOrSchedule = 0.999,
    eps: ScalarOrSchedule = 1e-15,
    eps_root: ScalarOrSchedule = 0.0,
    mu_dtype: torch.dtype | None = None,
    weight_decay: ScalarOrSchedule = 0.0,
    mask: MaskOrFn | None = None,
) -> GradientTransformation:
    """LaProp: `scale_by_laprop`, decoupled weight decay, the learning rate.

    The authors' code has the learning rate inside of the mean, which is the same as long as it is
    constant.

    Args:
        learning_rate: 0 or greater, or a schedule.
        b1, b2, eps, eps_root, mu_dtype: see `scale_by_laprop`.
        weight_decay: multiplied by the learning rate.
        mask: which parameters decay, see `masked`; by default all.

    Raises:
        ValueError: an argument outside its range; ``update`` called without params.

    Source: Ziyin et al., 2020.

    Example:
        >>> import functorch_opt as fo
        >>> fo.laprop(4e-4, weight_decay=0.1)
        laprop(0.0004, weight_decay=0.1)
    """
    return chain(
        scale_by_laprop(b1, b2, eps, eps_root, mu_dtype),
        add_decayed_weights(weight_decay, mask),
        scale_by_learning_rate(learning_rate),
    )
