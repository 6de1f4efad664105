"""Yogi: Adam, but the second moment moves towards g^2 by steps of ``(1 - b2) g^2``, not by a mean.

    mu = b1 mu + (1 - b1) g                          c1 = 1 - b1^t
    nu = nu - (1 - b2) sign(nu - g^2) g^2            c2 = 1 - b2^t
    u  = mu/c1 / (sqrt(nu/c2 + eps_root) + eps)

So ``nu`` cannot fall fast, and the learning rate cannot jump.

Source: Zaheer et al., "Adaptive Methods for Nonconvex Optimization", 2018, alg. 2.
"""

from __future__ import annotations

import torch

from functorch_opt._core.chain import chain
from functorch_opt._core.rule import leafwise
from functorch_opt._core.transformation import (
    GradientTransformation,
    ScalarOrSchedule,
    check_range,
    transformation,
)
from functorch_opt.optimizers.adagrad import constant_like
from functorch_opt.optimizers.adam import prepare_adam
from functorch_opt.transforms.scale import scale_by_learning_rate

__all__ = ["scale_by_yogi", "yogi"]


def yogi_rule(g, mu, nu, w1, w2, k, root, floor):
    mu = torch.lerp(mu, g, w1)
    nu = nu - w2 * torch.sign(nu - g * g) * (g * g)
    u = mu / (k * (nu + root).sqrt() + floor)
    return u, {"mu": mu, "nu": nu}


@transformation
def scale_by_yogi(
    b1: ScalarOrSchedule = 0.9,
    b2: ScalarOrSchedule = 0.999,
    eps: ScalarOrSchedule = 1e-3,
    eps_root: ScalarOrSchedule = 0.0,
    initial_accumulator_value: float = 1e-6,
) -> GradientTransformation:
    """``u = mu_hat / (sqrt(nu_hat + eps_root) + eps)``; ``nu -= (1 - b2) sign(nu - g^2) g^2``.

    Here ``mu_hat = mu / (1 - b1^t)`` and ``nu_hat = nu / (1 - b2^t)``, as in Adam. The paper
    corrects neither.

    Args:
        b1: decay of the first moment, in [0, 1).
        b2: 1 less the size of the steps of ``nu``, in [0, 1).
        eps: added outside the root, 0 or greater.
        eps_root: added inside the root, 0 or greater.
        initial_accumulator_value: first value of ``nu``, and of ``mu`` too, as in optax.

    Raises:
        ValueError: a decay outside [0, 1); another argument is negative.

    Source: Zaheer et al., 2018, alg. 2.

    Example:
        >>> import torch, functorch_opt as fo
        >>> tx = fo.scale_by_yogi(eps=0.0, initial_accumulator_value=0.0)
        >>> tx.update([torch.tensor([0.1, -20.0])], tx.init([torch.zeros(2)]))[0]
        [tensor([ 1., -1.])]
    """
    check_range(0, 1, b1=b1, b2=b2)
    check_range(0, float("inf"), eps=eps, eps_root=eps_root)
    check_range(0, float("inf"), initial_accumulator_value=initial_accumulator_value)
    start = constant_like(initial_accumulator_value)
    hyper = {"b1": b1, "b2": b2, "eps": eps, "eps_root": eps_root}
    return leafwise(
        yogi_rule, prepare_adam, slots={"mu": start, "nu": start}, hyper=hyper
    )


@transformation
def yogi(
    learning_rate: ScalarOrSchedule,
    b1: ScalarOrSchedule = 0.9,
    b2: ScalarOrSchedule = 0.999,
    eps: ScalarOrSchedule = 1e-3,
) -> GradientTransformation:
    """Yogi: `scale_by_yogi`, then the learning rate.

    Args:
        learning_rate: 0 or greater, or a schedule.
        b1, b2, eps: see `scale_by_yogi`.

    Raises:
        ValueError: an argument outside its range.

    Source: Zaheer et al., 2018, alg. 2.

    Example:
        >>> import functorch_opt as fo
        >>> fo.yogi(0.01)
        yogi(0.01)
    """
    return chain(scale_by_yogi(b1, b2, eps), scale_by_learning_rate(learning_rate))
