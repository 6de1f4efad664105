"""ACProp: AdaBelief that divides g by the second moment of the steps before.

    u = g / (sqrt(s/c2) + eps)                       c2 = 1 - b2^(t-1);   u = g at the first step
    m = b1 m + (1 - b1) g
    s = b2 s + (1 - b2) (g - m)^2 + eps_root

Source: Zhuang, Ding, Tang, Dvornek, Tatikonda & Duncan, "Momentum Centering and Asynchronous Update
for Adaptive Gradient Methods", 2021; the authors' code.
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

__all__ = ["acprop", "scale_by_acprop"]


@transformation
def scale_by_acprop(
    b1: ScalarOrSchedule = 0.9,
    b2: ScalarOrSchedule = 0.999,
    eps: ScalarOrSchedule = 1e-16,
    eps_root: ScalarOrSchedule = 1e-16,
) -> GradientTransformation:
    """``u = g / (sqrt(s_hat) + eps)``, where ``s_hat`` has not seen g yet.

    The rule is at the top of `functorch_opt.optimizers.acprop`, and is that of the authors' code.
    optax 0.2.8 has ``g - m`` with the mean m of the step before.

    Args:
        b1: decay of the mean, in [0, 1).
        b2: decay of the second moment around it, in [0, 1).
        eps: added outside the root, 0 or greater.
        eps_root: added to the second moment at each step, 0 or greater.

    Raises:
        ValueError: a decay outside [0, 1) or a negative eps.

    Source: Zhuang et al., 2021, the authors' code.

    Example:
        >>> import torch, functorch_opt as fo
        >>> tx = fo.scale_by_acprop(b1=0.5)
        >>> _, state = tx.update([torch.tensor([2.0])], tx.init([torch.zeros(1)]))
        >>> tx.update([torch.tensor([10.0])], state)[0]
        [tensor([10.])]
    """
    check_range(0, 1, b1=b1, b2=b2)
    check_range(0, float("inf"), eps=eps, eps_root=eps_root)

    def prepare(count, b1, b2):
        first = count == 0
        c2 = 1 - b2 ** tree.as_real(count) + first
        return {"w1": 1 - b1, "w2": 1 - b2, "c2": c2, "first": first}

    def rule(g, mu, nu, first, w1, w2, c2, eps, eps_root):
        u = g / torch.where(first, 1.0, (nu / c2 + tree.TINY).sqrt() + eps)
        mu = torch.lerp(mu, g, w1)
        nu = torch.lerp(nu, (g - mu).square(), w2) + eps_root
        return u, {"mu": mu, "nu": nu}

    slots = {"mu": tree.zeros_like, "nu": tree.zeros_like}
    hyper = {"b1": b1, "b2": b2, "eps": eps, "eps_root": eps_root}
    return leafwise(rule, prepare, slots=slots, hyper=hyper)


@transformation
def acprop(
    learning_rate: ScalarOrSchedule,
    b1: ScalarOrSchedule = 0.9,
    b2: ScalarOrSchedule = 0.999,
    eps: ScalarOrSchedule = 1e-16,
    eps_root: ScalarOrSchedule = 1e-16,
    weight_decay: ScalarOrSchedule = 0.0,
    mask: MaskOrFn | None = None,
) -> GradientTransformation:
    """ACProp: `scale_by_acprop`, decoupled weight decay, the learning rate.

    Args:
        learning_rate: 0 or greater, or a schedule.
        b1, b2, eps, eps_root: see `scale_by_acprop`. The authors have one eps for both.
        weight_decay: multiplied by the learning rate.
        mask: which parameters decay, see `masked`; by default all.

    Raises:
        ValueError: an argument outside its range; ``update`` called without params.

    Source: Zhuang et al., 2021, the authors' code.

    Example:
        >>> import functorch_opt as fo
        >>> fo.acprop(0.001, weight_decay=0.1)
        acprop(0.001, weight_decay=0.1)
    """
    return chain(
        scale_by_acprop(b1, b2, eps, eps_root),
        add_decayed_weights(weight_decay, mask),
        scale_by_learning_rate(learning_rate),
    )
