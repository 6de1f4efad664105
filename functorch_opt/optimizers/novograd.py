"""NovoGrad: gradients are normalized tensor by tensor, and then gathered as momentum.

    nu = b2 nu + (1 - b2) |g|^2            one number per tensor; at the first step nu = |g|^2
    mu = b1 mu + g / (sqrt(nu + eps_root) + eps) + weight_decay p                        u = mu

Source: Ginsburg et al., "Stochastic Gradient Methods with Layer-wise Adaptive Moments for Training
of Deep Networks", 2019, alg. 1.
"""

from __future__ import annotations

from functools import partial
from typing import Any

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
from functorch_opt.transforms.scale import scale_by_learning_rate

__all__ = ["novograd", "scale_by_novograd"]


@transformation
def scale_by_novograd(
    b1: ScalarOrSchedule = 0.9,
    b2: ScalarOrSchedule = 0.25,
    eps: ScalarOrSchedule = 1e-8,
    eps_root: ScalarOrSchedule = 0.0,
    weight_decay: ScalarOrSchedule = 0.0,
    mu_dtype: torch.dtype | None = None,
) -> GradientTransformation:
    """``u = mu = b1 mu + g / (sqrt(nu + eps_root) + eps) + weight_decay p``.

    Here ``nu`` is the running mean of ``|g|^2``, one number for each tensor, and ``|g|^2`` itself
    at the first step.

    Args:
        b1: decay of the momentum, in [0, 1).
        b2: decay of the second moment, in [0, 1).
        eps: added outside the root, 0 or greater.
        eps_root: added inside the root, 0 or greater.
        weight_decay: part of the momentum; 0 or greater.
        mu_dtype: dtype in which ``mu`` is stored; by default that of the params, at least float32.

    Raises:
        ValueError: an argument outside its range; ``update`` called without params.

    Source: Ginsburg et al., 2019, alg. 1.

    Example:
        >>> import torch, functorch_opt as fo
        >>> tx, params = fo.scale_by_novograd(), [torch.zeros(2)]
        >>> tx.update([torch.tensor([3.0, -4.0])], tx.init(params), params)[0]
        [tensor([ 0.6000, -0.8000])]
    """
    check_range(0, 1, b1=b1, b2=b2)
    check_range(0, float("inf"), eps=eps, eps_root=eps_root, weight_decay=weight_decay)

    def prepare(count, b2, eps_root):
        weight = 1 - b2 * tree.as_real(count > 0)
        return {"weight": weight, "root": eps_root + tree.TINY}

    def rule(g, p, mu, nu, gg, b1, weight, root, eps, weight_decay):
        nu = torch.lerp(nu, gg, weight)
        mu = b1 * mu + g / ((nu + root).sqrt() + eps) + weight_decay * p
        return mu, {"mu": mu, "nu": nu}

    slots: dict[str, Any] = {
        "mu": partial(tree.zeros_like, dtype=mu_dtype),
        "nu": numerics.scalar_slot(0.0),
    }
    hyper = {"b1": b1, "b2": b2, "eps": eps, "eps_root": eps_root}
    hyper["weight_decay"] = weight_decay
    sums = {"gg": lambda g: g.square().sum()}
    return leafwise(rule, prepare, slots=slots, hyper=hyper, sums=sums)


@transformation
def novograd(
    learning_rate: ScalarOrSchedule,
    b1: ScalarOrSchedule = 0.9,
    b2: ScalarOrSchedule = 0.25,
    eps: ScalarOrSchedule = 1e-6,
    eps_root: ScalarOrSchedule = 0.0,
    weight_decay: ScalarOrSchedule = 0.0,
) -> GradientTransformation:
    """NovoGrad: `scale_by_novograd`, then the learning rate.

    Args:
        learning_rate: 0 or greater, or a schedule.
        b1, b2, eps, eps_root, weight_decay: see `scale_by_novograd`.

    Raises:
        ValueError: an argument outside its range; ``update`` called without params.

    Source: Ginsburg et al., 2019, alg. 1.

    Example:
        >>> import functorch_opt as fo
        >>> fo.novograd(0.01, weight_decay=1e-3)
        novograd(0.01, weight_decay=0.001)
    """
    direction = scale_by_novograd(b1, b2, eps, eps_root, weight_decay)
    return chain(direction, scale_by_learning_rate(learning_rate))
