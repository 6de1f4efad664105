"""RAdam: momentum alone until the second moment can be trusted, and Adam from then on.

    mu      = b1 mu + (1 - b1) g               c1 = 1 - b1^t
    nu      = b2 nu + (1 - b2) g^2             c2 = 1 - b2^t
    rho_inf = 2 / (1 - b2) - 1                 rho = rho_inf - 2 t b2^t / c2
    r       = sqrt((rho - 4) (rho - 2) rho_inf / ((rho_inf - 4) (rho_inf - 2) rho))
    u       = mu/c1 r / (sqrt(nu/c2) + eps)    where rho >= threshold, mu/c1 elsewhere

Source: Liu et al., "On the Variance of the Adaptive Learning Rate and Beyond", 2020, alg. 2, which
has no eps and asks for rho > 4.
"""

from __future__ import annotations

from typing import Literal

import torch

from functorch_opt import tree
from functorch_opt._core.chain import chain
from functorch_opt._core.rule import leafwise
from functorch_opt._core.transformation import (
    GradientTransformation,
    ScalarOrSchedule,
    check_choice,
    check_range,
    transformation,
)
from functorch_opt.transforms.scale import scale_by_learning_rate

__all__ = ["radam", "scale_by_radam"]


def rectification(t, b2):
    """rho of step t, and the square of r, which has no meaning where rho is 4 or less."""
    rho_inf = 2 / (1 - b2) - 1
    rho = rho_inf - 2 * t * b2**t / (1 - b2**t)
    r_squared = (rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho)
    return rho, r_squared


def _prepare(of_torch):
    def prepare(count, b1, b2, eps, eps_root, threshold):
        t = tree.as_real(count + 1)
        c1, c2 = 1 - b1**t, 1 - b2**t
        rho, r_squared = rectification(t, b2)
        trusted = rho > threshold if of_torch else rho >= threshold
        # Where it is not trusted, r_squared may be negative.
        r = torch.where(trusted, r_squared, 1.0).sqrt()
        # r / (sqrt(nu/c2 + eps_root) + eps)  =  k / (sqrt(nu + root) + floor)
        k, root = r * c2.sqrt(), eps_root * c2 + tree.TINY
        floor = eps if of_torch else eps * c2.sqrt()
        weights = {
            "w1": 1 - b1,
            "w2": 1 - b2,
            "c1": c1,
            "ahead": c1 / (1 - b1 ** (t + 1)),
        }
        return {**weights, "trusted": trusted, "k": k, "root": root, "floor": floor}

    return prepare


def radam_rule(g, mu, nu, w1, w2, c1, trusted, k, root, floor):
    mu = torch.lerp(mu, g, w1)
    nu = torch.lerp(nu, g * g, w2)
    l = torch.where(trusted, k / ((nu + root).sqrt() + floor), 1.0)
    return mu / c1 * l, {"mu": mu, "nu": nu}


def nesterov_rule(g, mu, nu, w1, w2, c1, ahead, trusted, k, root, floor):
    mu = torch.lerp(mu, g, w1)
    nu = torch.lerp(nu, g * g, w2)
    m = torch.lerp(ahead * mu, g, w1)  # as in Adam
    l = torch.where(trusted, k / ((nu + root).sqrt() + floor), 1.0)
    return m / c1 * l, {"mu": mu, "nu": nu}


@transformation
def scale_by_radam(
    b1: ScalarOrSchedule = 0.9,
    b2: ScalarOrSchedule = 0.999,
    eps: ScalarOrSchedule = 1e-8,
    eps_root: ScalarOrSchedule = 0.0,
    threshold: ScalarOrSchedule = 5.0,
    *,
    nesterov: bool = False,
    variant: Literal["optax", "torch"] = "optax",
) -> GradientTransformation:
    """``u = mu_hat r / (sqrt(nu_hat + eps_root) + eps)`` as soon as ``rho >= threshold``.

    Here ``mu_hat = mu / (1 - b1^t)`` and ``nu_hat = nu / (1 - b2^t)``. As long as
    ``rho < threshold``, u is ``mu_hat``. The numbers ``rho`` and ``r`` depend on b2 and t only;
    their formulas are at the top of `functorch_opt.optimizers.radam`.

    Args:
        b1: decay of the first moment, in [0, 1).
        b2: decay of the second moment, in [0, 1).
        eps: added outside the root, 0 or greater.
        eps_root: added inside the root, 0 or greater.
        threshold: the smallest ``rho`` at which the second moment is used, 4 or greater; below 4
            there is no ``r``. With b2 = 0.999, ``rho`` reaches 5 at the sixth update.
        nesterov: whether ``mu_hat`` is ``b1 mu / (1 - b1^(t+1)) + (1 - b1) g / (1 - b1^t)``.
        variant: "optax" or "torch". With "torch" the numbers are those of torch.optim.RAdam: eps is
            added to the root of ``nu`` before it is corrected, and ``rho`` must be greater than the
            threshold.

    Raises:
        ValueError: a decay is outside of [0, 1), an eps is negative, or the variant is unknown.

    Example:
        >>> import torch, functorch_opt as fo
        >>> tx = fo.scale_by_radam()
        >>> tx.update([torch.tensor([0.1, -20.0])], tx.init([torch.zeros(2)]))[0]
        [tensor([  0.1000, -20.0000])]
    """
    check_range(0, 1, b1=b1, b2=b2)
    check_range(0, float("inf"), eps=eps, eps_root=eps_root)
    check_range(4, float("inf"), threshold=threshold)
    check_choice("optax", "torch", variant=variant)
    return leafwise(
        nesterov_rule if nesterov else radam_rule,
        _prepare(variant == "torch"),
        slots={"mu": tree.zeros_like, "nu": tree.zeros_like},
        hyper={
            "b1": b1,
            "b2": b2,
            "eps": eps,
            "eps_root": eps_root,
            "threshold": threshold,
        },
    )


@transformation
def radam(
    learning_rate: ScalarOrSchedule,
    b1: ScalarOrSchedule = 0.9,
    b2: ScalarOrSchedule = 0.999,
    eps: ScalarOrSchedule = 1e-8,
    eps_root: ScalarOrSchedule = 0.0,
    threshold: ScalarOrSchedule = 5.0,
    *,
    nesterov: bool = False,
    variant: Literal["optax", "torch"] = "optax",
) -> GradientTransformation:
    """RAdam: `scale_by_radam`, then the learning rate.

    Args:
        learning_rate: 0 or greater, or a schedule.
        b1, b2, eps, eps_root, threshold, nesterov: see `scale_by_radam`.
        variant: "torch" for the numbers of torch.optim.RAdam, which adds eps in another place.

    Raises:
        ValueError: an argument outside its range.

    Source: Liu et al., 2020, alg. 2.

    Example:
        >>> import torch, functorch_opt as fo
        >>> tx, params = fo.radam(0.1), {"w": torch.tensor(1.0)}
        >>> updates, state = tx.update({"w": torch.tensor(5.0)}, tx.init(params), params)
        >>> fo.apply_updates(params, updates)
        {'w': tensor(0.5000)}
    """
    direction = scale_by_radam(
        b1, b2, eps, eps_root, threshold, nesterov=nesterov, variant=variant
    )
    return chain(direction, scale_by_learning_rate(learning_rate))
