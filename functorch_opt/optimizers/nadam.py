"""NAdam: Adam with Nesterov momentum. The decay of the momentum is constant, or it grows with t.

In optax it is constant; these are the numbers of `functorch_opt.scale_by_adam` with
``nesterov=True``. In Dozat's paper and in torch it grows:

    mu_t    = b1 (1 - 0.96^(t momentum_decay) / 2)       mu_product = mu_1 ... mu_t
    mu      = b1 mu + (1 - b1) g                         nu = b2 nu + (1 - b2) g^2
    m       = (1 - mu_t) / (1 - mu_product) g + mu_(t+1) / (1 - mu_product mu_(t+1)) mu
    u       = m / (sqrt(nu / (1 - b2^t)) + eps)

Source: Dozat, "Incorporating Nesterov Momentum into Adam", 2016.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from functorch_opt import tree
from functorch_opt._core import numerics
from functorch_opt._core.chain import chain
from functorch_opt._core.groups import MaskOrFn
from functorch_opt._core.rule import leafwise
from functorch_opt._core.transformation import (
    GradientTransformation,
    ScalarOrSchedule,
    check_range,
    transformation,
)
from functorch_opt.optimizers.adam import scale_by_adam
from functorch_opt.transforms.decay import add_decayed_weights
from functorch_opt.transforms.scale import scale_by_learning_rate

__all__ = ["nadam", "nadamw", "scale_by_nadam"]


@transformation
def scale_by_nadam(
    b1: ScalarOrSchedule = 0.9,
    b2: ScalarOrSchedule = 0.999,
    eps: ScalarOrSchedule = 1e-8,
    eps_root: ScalarOrSchedule = 0.0,
    mu_dtype: torch.dtype | None = None,
    *,
    momentum_decay: ScalarOrSchedule = 4e-3,
) -> GradientTransformation:
    """Adam with a Nesterov momentum that decays with ``b1 (1 - 0.96^(t momentum_decay) / 2)``.

    This decay starts near b1 / 2 and grows to b1. The numbers are those of torch.optim.NAdam. The
    whole rule is at the top of `functorch_opt.optimizers.nadam`. optax has no stage of this name;
    with a constant decay the stage is ``scale_by_adam(nesterov=True)``.

    Args:
        b1: decay of the first moment, in [0, 1).
        b2: decay of the second moment, in [0, 1).
        eps: added outside the root, 0 or greater.
        eps_root: added inside the root, 0 or greater.
        mu_dtype: dtype in which ``mu`` is stored; by default that of the params, at least float32.
        momentum_decay: how fast the decay of the momentum grows, 0 or greater.

    Raises:
        ValueError: an argument outside its range.

    Example:
        >>> import torch, functorch_opt as fo
        >>> tx = fo.scale_by_nadam()
        >>> state = tx.init([torch.zeros(2)])
        >>> updates, state = tx.update([torch.tensor([0.1, -20.0])], state)
        >>> fo.get(state, "mu_product")
        [tensor(0.4501)]
    """
    check_range(0, 1, b1=b1, b2=b2)
    check_range(
        0, float("inf"), eps=eps, eps_root=eps_root, momentum_decay=momentum_decay
    )

    def prepare(count, b1, b2, eps_root, momentum_decay):
        t = tree.as_real(count + 1)
        mu_t, mu_next = (
            b1 * (1 - 0.5 * 0.96 ** (s * momentum_decay)) for s in (t, t + 1)
        )
        c2, root = 1 - b2**t, eps_root + tree.TINY
        weights = {"w1": 1 - b1, "w2": 1 - b2, "c2": c2, "root": root}
        return {**weights, "mu_t": mu_t, "mu_next": mu_next}

    def rule(g, mu, nu, mu_product, mu_t, mu_next, w1, w2, c2, root, eps):
        mu = torch.lerp(mu, g, w1)
        nu = torch.lerp(nu, g * g, w2)
        mu_product = mu_product * mu_t
        of_g = (1 - mu_t) / (1 - mu_product)
        of_mu = mu_next / (1 - mu_product * mu_next)
        u = (of_g * g + of_mu * mu) / ((nu / c2 + root).sqrt() + eps)
        return u, {"mu": mu, "nu": nu, "mu_product": mu_product}

    slots: dict[str, Any] = {
        "mu": partial(tree.zeros_like, dtype=mu_dtype),
        "nu": tree.zeros_like,
        "mu_product": numerics.scalar_slot(1.0),
    }
    decays = {"b1": b1, "b2": b2, "momentum_decay": momentum_decay}
    return leafwise(
        rule, prepare, slots=slots, hyper={**decays, "eps": eps, "eps_root": eps_root}
    )


@transformation
def nadam(
    learning_rate: ScalarOrSchedule,
    b1: ScalarOrSchedule = 0.9,
    b2: ScalarOrSchedule = 0.999,
    eps: ScalarOrSchedule = 1e-8,
    eps_root: ScalarOrSchedule = 0.0,
    mu_dtype: torch.dtype | None = None,
    *,
    momentum_decay: ScalarOrSchedule | None = None,
) -> GradientTransformation:
    """Adam with Nesterov momentum, then the learning rate.

    Args:
        learning_rate: 0 or greater, or a schedule.
        b1, b2, eps, eps_root, mu_dtype: see `scale_by_adam`.
        momentum_decay: with None the decay of the momentum is constant, as in optax. With a number
            it grows with t, see `scale_by_nadam`; with 4e-3 the numbers are those of
            torch.optim.NAdam.

    Raises:
        ValueError: an argument outside its range.

    Source: Dozat, 2016.

    Example:
        >>> import functorch_opt as fo
        >>> fo.nadam(0.002, momentum_decay=4e-3)
        nadam(0.002, momentum_decay=0.004)
    """
    direction = _direction(momentum_decay, b1, b2, eps, eps_root, mu_dtype)
    return chain(direction, scale_by_learning_rate(learning_rate))


@transformation
def nadamw(
    learning_rate: ScalarOrSchedule,
    b1: ScalarOrSchedule = 0.9,
    b2: ScalarOrSchedule = 0.999,
    eps: ScalarOrSchedule = 1e-8,
    eps_root: ScalarOrSchedule = 0.0,
    mu_dtype: torch.dtype | None = None,
    weight_decay: ScalarOrSchedule = 1e-4,
    mask: MaskOrFn | None = None,
    *,
    momentum_decay: ScalarOrSchedule | None = None,
) -> GradientTransformation:
    """`nadam` with decoupled weight decay: ``p -> p - learning_rate (nadam + weight_decay p)``.

    Args:
        learning_rate: 0 or greater, or a schedule.
        b1, b2, eps, eps_root, mu_dtype: see `scale_by_adam`.
        weight_decay: multiplied by the learning rate.
        mask: which parameters decay, see `masked`; by default all.
        momentum_decay: as in `nadam`; with 4e-3 these are the numbers of torch.optim.NAdam with
            ``decoupled_weight_decay=True``.

    Raises:
        ValueError: an argument outside its range; ``update`` called without params.

    Source: Dozat, 2016; Loshchilov & Hutter, "Decoupled Weight Decay Regularization", 2019, alg. 2.

    Example:
        >>> import functorch_opt as fo
        >>> fo.nadamw(0.002, weight_decay=0.01)
        nadamw(0.002, weight_decay=0.01)
    """
    return chain(
        _direction(momentum_decay, b1, b2, eps, eps_root, mu_dtype),
        add_decayed_weights(weight_decay, mask),
        scale_by_learning_rate(learning_rate),
    )


def _direction(momentum_decay, *options):
    if momentum_decay is None:
        return scale_by_adam(*options, nesterov=True)
    return scale_by_nadam(*options, momentum_decay=momentum_decay)
