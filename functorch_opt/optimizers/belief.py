"""AdaBelief: Adam, divided by how far gradients are from their running mean, not by how large.

    mu = b1 mu + (1 - b1) g                          c1 = 1 - b1^t
    nu = b2 nu + (1 - b2) (g - mu)^2 + eps_root      c2 = 1 - b2^t
    u  = mu/c1 / (sqrt(nu/c2) + eps)

Source: Zhuang et al., "AdaBelief Optimizer: Adapting Stepsizes by the Belief in Observed
Gradients", 2020, alg. 2.
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

__all__ = ["adabelief", "scale_by_belief"]


@transformation
def scale_by_belief(
    b1: ScalarOrSchedule = 0.9,
    b2: ScalarOrSchedule = 0.999,
    eps: ScalarOrSchedule = 1e-16,
    eps_root: ScalarOrSchedule = 1e-16,
    *,
    nesterov: bool = False,
) -> GradientTransformation:
    """``u = mu_hat / (sqrt(nu_hat) + eps)``, with ``nu`` the mean of ``(g - mu)^2``.

    Here ``mu_hat = mu / (1 - b1^t)`` and ``nu_hat = nu / (1 - b2^t)``.

    Args:
        b1: decay of the first moment, in [0, 1).
        b2: decay of the second moment around the first, in [0, 1).
        eps: added outside the root, 0 or greater.
        eps_root: added to ``nu`` at every step, and kept there; 0 or greater.
        nesterov: ``mu_hat = b1 mu / (1 - b1^(t+1)) + (1 - b1) g / (1 - b1^t)``, as in Adam.

    Raises:
        ValueError: a decay outside [0, 1) or a negative eps.

    Source: Zhuang et al., 2020, alg. 2.

    Example:
        >>> import torch, functorch_opt as fo
        >>> tx = fo.scale_by_belief()
        >>> tx.update([torch.tensor([0.9, -18.0])], tx.init([torch.zeros(2)]))[0]
        [tensor([ 1.1111, -1.1111])]
    """
    check_range(0, 1, b1=b1, b2=b2)
    check_range(0, float("inf"), eps=eps, eps_root=eps_root)

    def prepare(count, b1, b2):
        t = tree.as_real(count + 1)
        c1, c2 = 1 - b1**t, 1 - b2**t
        ahead = c1 / (1 - b1 ** (t + 1))
        return {"w1": 1 - b1, "w2": 1 - b2, "c1": c1, "c2": c2, "ahead": ahead}

    def rule(g, mu, nu, w1, w2, c1, c2, ahead, eps, eps_root):
        mu = torch.lerp(mu, g, w1)
        nu = torch.lerp(nu, (g - mu).square(), w2) + eps_root
        m = torch.lerp(ahead * mu, g, w1) if nesterov else mu
        u = m / c1 / ((nu / c2 + tree.TINY).sqrt() + eps)
        return u, {"mu": mu, "nu": nu}

    slots = {"mu": tree.zeros_like, "nu": tree.zeros_like}
    hyper = {"b1": b1, "b2": b2, "eps": eps, "eps_root": eps_root}
    return leafwise(rule, prepare, slots=slots, hyper=hyper)


@transformation
def adabelief(
    learning_rate: ScalarOrSchedule,
    b1: ScalarOrSchedule = 0.9,
    b2: ScalarOrSchedule = 0.999,
    eps: ScalarOrSchedule = 1e-16,
    eps_root: ScalarOrSchedule = 1e-16,
    weight_decay: ScalarOrSchedule | None = None,
    weight_decay_mask: MaskOrFn | None = None,
    *,
    nesterov: bool = False,
) -> GradientTransformation:
    """AdaBelief: `scale_by_belief`, decoupled weight decay if one is given, the learning rate.

    Args:
        learning_rate: 0 or greater, or a schedule.
        b1, b2, eps, eps_root, nesterov: see `scale_by_belief`.
        weight_decay: multiplied by the learning rate; None: no decay. optax has it after 0.2.8.
        weight_decay_mask: which parameters decay, see `masked`; by default all.

    Raises:
        ValueError: an argument outside its range.

    Source: Zhuang et al., 2020, alg. 2.

    Example:
        >>> import torch, functorch_opt as fo
        >>> tx, params = fo.adabelief(0.09), {"w": torch.tensor(1.0)}
        >>> updates, state = tx.update({"w": torch.tensor(5.0)}, tx.init(params), params)
        >>> fo.apply_updates(params, updates)
        {'w': tensor(0.9000)}
    """
    stages = [scale_by_belief(b1, b2, eps, eps_root, nesterov=nesterov)]
    if weight_decay is not None:
        stages.append(add_decayed_weights(weight_decay, weight_decay_mask))
    return chain(*stages, scale_by_learning_rate(learning_rate))
