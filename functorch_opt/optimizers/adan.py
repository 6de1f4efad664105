"""Adan: Adam with a Nesterov momentum that needs no gradient elsewhere, but the last change of it.

    d = g - previous g                               0 at the first step
    m = b1 m + (1 - b1) g                            c1 = 1 - b1^t
    v = b2 v + (1 - b2) d                            c2 = 1 - b2^t
    n = b3 n + (1 - b3) (g + b2 d)^2                 c3 = 1 - b3^t
    u = (m/c1 + b2 v/c2) / (sqrt(n/c3 + eps_root) + eps)

Source: Xie, Zhou, Li, Lin & Yan, "Adan: Adaptive Nesterov Momentum Algorithm for Faster Optimizing
Deep Models", 2022, alg. 1. The paper calls 1 - b1, 1 - b2, 1 - b3 its betas.
"""

from __future__ import annotations

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

__all__ = ["adan", "scale_by_adan"]


@transformation
def scale_by_adan(
    b1: ScalarOrSchedule = 0.98,
    b2: ScalarOrSchedule = 0.92,
    b3: ScalarOrSchedule = 0.99,
    eps: ScalarOrSchedule = 1e-8,
    eps_root: ScalarOrSchedule = 0.0,
) -> GradientTransformation:
    """``u = (m_hat + b2 v_hat) / (sqrt(n_hat + eps_root) + eps)``.

    The rule is at the top of `functorch_opt.optimizers.adan`, and is that of the paper and of the
    authors' code. optax 0.2.8 has ``1 - b2`` where b2 is the factor of d and of v, 0.08 in place of
    0.92: it takes the paper's beta for a decay there.

    Args:
        b1: decay of the mean of gradients, in [0, 1).
        b2: decay of the mean of their changes, and weight of a change, in [0, 1).
        b3: decay of the second moment, in [0, 1).
        eps: added outside the root, 0 or greater.
        eps_root: added inside the root, 0 or greater.

    Raises:
        ValueError: a decay outside [0, 1) or a negative eps.

    Source: Xie et al., 2022, alg. 1.

    Example:
        >>> import torch, functorch_opt as fo
        >>> tx = fo.scale_by_adan()
        >>> tx.update([torch.tensor([0.1, -20.0])], tx.init([torch.zeros(2)]))[0]
        [tensor([ 1., -1.])]
    """
    check_range(0, 1, b1=b1, b2=b2, b3=b3)
    check_range(0, float("inf"), eps=eps, eps_root=eps_root)

    def prepare(count, b1, b2, b3, eps_root):
        t = tree.as_real(count + 1)
        weights = {"w1": 1 - b1, "w2": 1 - b2, "w3": 1 - b3, "root": eps_root + tree.TINY}
        corrections = {"c1": 1 - b1**t, "c2": 1 - b2**t, "c3": 1 - b3**t}
        return {**weights, **corrections, "first": count == 0}

    def rule(g, m, v, n, previous, first, b2, w1, w2, w3, c1, c2, c3, root, eps):
        d = g - torch.where(first, g, previous)
        m = torch.lerp(m, g, w1)
        v = torch.lerp(v, d, w2)
        n = torch.lerp(n, (g + b2 * d).square(), w3)
        u = (m / c1 + b2 / c2 * v) / ((n / c3 + root).sqrt() + eps)
        return u, {"m": m, "v": v, "n": n, "previous": g.clone()}

    slots = dict.fromkeys(("m", "v", "n", "previous"), tree.zeros_like)
    hyper = {"b1": b1, "b2": b2, "b3": b3, "eps": eps, "eps_root": eps_root}
    return leafwise(rule, prepare, slots=slots, hyper=hyper)


@transformation
def adan(
    learning_rate: ScalarOrSchedule,
    b1: ScalarOrSchedule = 0.98,
    b2: ScalarOrSchedule = 0.92,
    b3: ScalarOrSchedule = 0.99,
    eps: ScalarOrSchedule = 1e-8,
    eps_root: ScalarOrSchedule = 1e-8,
    weight_decay: ScalarOrSchedule = 0.0,
    mask: MaskOrFn | None = None,
) -> GradientTransformation:
    """Adan: `scale_by_adan`, decoupled weight decay, the learning rate.

    The numbers are the authors', not those of optax 0.2.8: see `scale_by_adan`.

    Args:
        learning_rate: 0 or greater, or a schedule.
        b1, b2, b3, eps, eps_root: see `scale_by_adan`. The authors' code has no eps_root.
        weight_decay: multiplied by the learning rate, as in optax and with ``no_prox`` in the
            authors' code; in the paper p is divided by ``1 + learning_rate weight_decay``.
        mask: which parameters decay, see `masked`; by default all.

    Raises:
        ValueError: an argument outside its range; ``update`` called without params.

    Source: Xie et al., 2022, alg. 1.

    Example:
        >>> import functorch_opt as fo
        >>> fo.adan(0.01, weight_decay=0.02)
        adan(0.01, weight_decay=0.02)
    """
    return chain(
        scale_by_adan(b1, b2, b3, eps, eps_root),
        add_decayed_weights(weight_decay, mask),
        scale_by_learning_rate(learning_rate),
    )
