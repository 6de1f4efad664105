"""AdEMAMix: Adam whose momentum is a mix of a fast and of a slow mean, or of a mean and g.

    m1 = b1 m1 + (1 - b1) g                          c1 = 1 - b1^t
    m2 = b3 m2 + (1 - b3) g                          not corrected: it fills slowly
    nu = b2 nu + (1 - b2) g^2                        c2 = 1 - b2^t
    u  = (m1/c1 + alpha m2) / (sqrt(nu/c2 + eps_root) + eps)

The simplified one has one momentum, a sum and not a mean:

    m = b1 m + g                u = (m + alpha g) / (sqrt(nu/c2 + eps_root) + eps)

Sources: Pagliardini, Ablin & Grangier, "The AdEMAMix Optimizer: Better, Faster, Older", 2024, alg.
1. Morwani, Vyas, Zhang & Kakade, "Connections between Schedule-Free Optimizers, AdEMAMix, and
Accelerated SGD Variants", 2025 (the simplified one).
"""

from __future__ import annotations

from functools import partial

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

__all__ = [
    "ademamix",
    "scale_by_ademamix",
    "scale_by_simplified_ademamix",
    "simplified_ademamix",
]


@transformation
def scale_by_ademamix(
    b1: ScalarOrSchedule = 0.9,
    b2: ScalarOrSchedule = 0.999,
    b3: ScalarOrSchedule = 0.9999,
    alpha: ScalarOrSchedule = 6.0,
    eps: ScalarOrSchedule = 1e-8,
    eps_root: ScalarOrSchedule = 0.0,
    mu_dtype: torch.dtype | None = None,
) -> GradientTransformation:
    """``u = (m1_hat + alpha m2) / (sqrt(nu_hat + eps_root) + eps)``.

    Here ``m1_hat = m1 / (1 - b1^t)`` and ``nu_hat = nu / (1 - b2^t)``. The authors' code lets alpha
    and b3 grow during the first T steps, alpha linearly, and b3 so that the half-life of the mean
    grows linearly from that of b1. Give schedules for that, as in the example.

    Args:
        b1: decay of the fast mean, in [0, 1).
        b2: decay of the second moment, in [0, 1).
        b3: decay of the slow mean, in [0, 1).
        alpha: weight of the slow mean, 0 or greater. The default is that of optax here, 6, and 5
            in `ademamix`.
        eps: added outside the root, 0 or greater.
        eps_root: added inside the root, 0 or greater.
        mu_dtype: dtype in which ``m1`` and ``m2`` are stored; by default that of the params, at
            least float32. In optax it is that of ``nu`` too.

    Raises:
        ValueError: an argument outside its range.

    Source: Pagliardini, Ablin & Grangier, 2024, alg. 1.

    Example:
        >>> import torch, functorch_opt as fo
        >>> tx = fo.scale_by_ademamix(b3=0.9, alpha=5.0)
        >>> tx.update([torch.tensor([0.1, -20.0])], tx.init([torch.zeros(2)]))[0]
        [tensor([ 1.5000, -1.5000])]
        >>> half_life = fo.linear_schedule(6.58, 6931.1, 1000)     # log(0.5) / log(b1), and of b3
        >>> slow = lambda count: 0.5 ** (1 / half_life(count + 1))
        >>> growing = fo.linear_schedule(0.0, 5.0, 1000)
        >>> tx = fo.scale_by_ademamix(b3=slow, alpha=lambda count: growing(count + 1))
    """
    check_range(0, 1, b1=b1, b2=b2, b3=b3)
    check_range(0, float("inf"), alpha=alpha, eps=eps, eps_root=eps_root)

    def prepare(count, b1, b2, b3, eps_root):
        t = tree.as_real(count + 1)
        weights = {"w1": 1 - b1, "w2": 1 - b2, "w3": 1 - b3, "root": eps_root + tree.TINY}
        return {**weights, "c1": 1 - b1**t, "c2": 1 - b2**t}

    def rule(g, m1, m2, nu, w1, w2, w3, c1, c2, alpha, root, eps):
        m1 = torch.lerp(m1, g, w1)
        m2 = torch.lerp(m2, g, w3)
        nu = torch.lerp(nu, g * g, w2)
        u = (m1 / c1 + alpha * m2) / ((nu / c2 + root).sqrt() + eps)
        return u, {"m1": m1, "m2": m2, "nu": nu}

    first = partial(tree.zeros_like, dtype=mu_dtype)
    hyper = {"b1": b1, "b2": b2, "b3": b3, "alpha": alpha}
    return leafwise(
        rule,
        prepare,
        slots={"m1": first, "m2": first, "nu": tree.zeros_like},
        hyper={**hyper, "eps": eps, "eps_root": eps_root},
    )


@transformation
def scale_by_simplified_ademamix(
    b1: ScalarOrSchedule = 0.99,
    b2: ScalarOrSchedule = 0.95,
    alpha: ScalarOrSchedule = 0.0,
    eps: ScalarOrSchedule = 1e-8,
    eps_root: ScalarOrSchedule = 0.0,
) -> GradientTransformation:
    """``u = (m + alpha g) / (sqrt(nu_hat + eps_root) + eps)``, where ``m = b1 m + g``.

    Here ``nu_hat = nu / (1 - b2^t)``. ``m`` is a sum, up to ``1 / (1 - b1)`` times as large as a
    mean: learning rates are smaller than Adam's by that.

    Args:
        b1: decay of the momentum, in [0, 1).
        b2: decay of the second moment, in [0, 1).
        alpha: weight of the gradient of this step, 0 or greater.
        eps: added outside the root, 0 or greater.
        eps_root: added inside the root, 0 or greater.

    Raises:
        ValueError: an argument outside its range.

    Source: Morwani, Vyas, Zhang & Kakade, 2025.

    Example:
        >>> import torch, functorch_opt as fo
        >>> tx = fo.scale_by_simplified_ademamix(alpha=2.0)
        >>> tx.update([torch.tensor([0.1, -20.0])], tx.init([torch.zeros(2)]))[0]
        [tensor([ 3.0000, -3.0000])]
    """
    check_range(0, 1, b1=b1, b2=b2)
    check_range(0, float("inf"), alpha=alpha, eps=eps, eps_root=eps_root)

    def prepare(count, b2, eps_root):
        c2 = 1 - b2 ** tree.as_real(count + 1)
        return {"w2": 1 - b2, "c2": c2, "root": eps_root + tree.TINY}

    def rule(g, m, nu, b1, w2, c2, alpha, root, eps):
        m = b1 * m + g
        nu = torch.lerp(nu, g * g, w2)
        u = (m + alpha * g) / ((nu / c2 + root).sqrt() + eps)
        return u, {"m": m, "nu": nu}

    slots = {"m": tree.zeros_like, "nu": tree.zeros_like}
    hyper = {"b1": b1, "b2": b2, "alpha": alpha, "eps": eps, "eps_root": eps_root}
    return leafwise(rule, prepare, slots=slots, hyper=hyper)


@transformation
def ademamix(
    learning_rate: ScalarOrSchedule,
    b1: ScalarOrSchedule = 0.9,
    b2: ScalarOrSchedule = 0.999,
    b3: ScalarOrSchedule = 0.9999,
    alpha: ScalarOrSchedule = 5.0,
    eps: ScalarOrSchedule = 1e-8,
    eps_root: ScalarOrSchedule = 0.0,
    mu_dtype: torch.dtype | None = None,
    weight_decay: ScalarOrSchedule = 0.0,
    mask: MaskOrFn | None = None,
) -> GradientTransformation:
    """AdEMAMix: `scale_by_ademamix`, decoupled weight decay, the learning rate.

    Args:
        learning_rate: 0 or greater, or a schedule.
        b1, b2, b3, alpha, eps, eps_root, mu_dtype: see `scale_by_ademamix`.
        weight_decay: multiplied by the learning rate.
        mask: which parameters decay, see `masked`; by default all.

    Raises:
        ValueError: an argument outside its range; ``update`` called without params.

    Source: Pagliardini, Ablin & Grangier, 2024, alg. 1.

    Example:
        >>> import functorch_opt as fo
        >>> fo.ademamix(0.001, b3=0.999, weight_decay=0.1)
        ademamix(0.001, b3=0.999, weight_decay=0.1)
    """
    return chain(
        scale_by_ademamix(b1, b2, b3, alpha, eps, eps_root, mu_dtype),
        add_decayed_weights(weight_decay, mask),
        scale_by_learning_rate(learning_rate),
    )


@transformation
def simplified_ademamix(
    learning_rate: ScalarOrSchedule,
    b1: ScalarOrSchedule = 0.99,
    b2: ScalarOrSchedule = 0.95,
    alpha: ScalarOrSchedule = 0.0,
    eps: ScalarOrSchedule = 1e-8,
    eps_root: ScalarOrSchedule = 0.0,
    weight_decay: ScalarOrSchedule = 0.0,
    mask: MaskOrFn | None = None,
) -> GradientTransformation:
    """`scale_by_simplified_ademamix`, decoupled weight decay, the learning rate.

    Args:
        learning_rate: 0 or greater, or a schedule.
        b1, b2, alpha, eps, eps_root: see `scale_by_simplified_ademamix`.
        weight_decay: multiplied by the learning rate.
        mask: which parameters decay, see `masked`; by default all.

    Raises:
        ValueError: an argument outside its range; ``update`` called without params.

    Source: Morwani, Vyas, Zhang & Kakade, 2025.

    Example:
        >>> import functorch_opt as fo
        >>> fo.simplified_ademamix(1e-5, alpha=100.0)
        simplified_ademamix(1e-05, alpha=100.0)
    """
    return chain(
        scale_by_simplified_ademamix(b1, b2, alpha, eps, eps_root),
        add_decayed_weights(weight_decay, mask),
        scale_by_learning_rate(learning_rate),
    )
