"""The Adam family: a running mean of the gradient over the root of a running mean of its square.

The means ``mu`` and ``nu`` start at 0, and are corrected for it:

    mu = b1 mu + (1 - b1) g        c1 = 1 - b1^t
    nu = b2 nu + (1 - b2) g^2      c2 = 1 - b2^t        u = mu/c1 / (sqrt(nu/c2) + eps)

Sources: Kingma & Ba, "Adam: A Method for Stochastic Optimization", 2015, alg. 1 and (Adamax)
alg. 2. Reddi, Kale & Kumar, "On the Convergence of Adam and Beyond", 2018, alg. 2 (AMSGrad). Dozat,
"Incorporating Nesterov Momentum into Adam", 2016 (NAdam). Loshchilov & Hutter, "Decoupled Weight
Decay Regularization", 2019, alg. 2 (AdamW).
"""

from __future__ import annotations

from functools import partial
from typing import Literal

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
    "adam",
    "adamax",
    "adamaxw",
    "adamw",
    "scale_by_adam",
    "scale_by_adamax",
]


# ---- the rules: Adam, with Nesterov momentum, and with either maximum of AMSGrad ---------------


def prepare_adam(count, b1, b2, eps, eps_root):
    t = tree.as_real(count + 1)
    c1, c2 = 1 - b1**t, 1 - b2**t
    # mu/c1 / (sqrt(nu/c2 + eps_root) + eps)  =  mu / (k sqrt(nu + root) + floor), and
    # the right side saves two passes over memory.
    k = c1 / c2.sqrt()
    root = eps_root * c2 + tree.TINY
    floor = eps * c1
    return {"w1": 1 - b1, "w2": 1 - b2, "k": k, "root": root, "floor": floor}


def adam_rule(g, mu, nu, w1, w2, k, root, floor):
    mu = torch.lerp(mu, g, w1)
    nu = torch.lerp(nu, g * g, w2)
    u = mu / (k * (nu + root).sqrt() + floor)
    return u, {"mu": mu, "nu": nu}


def prepare_nesterov(count, b1, b2, eps, eps_root):
    t = tree.as_real(count + 1)
    # b1 mu/(1 - b1^(t+1)) + (1 - b1) g/c1  =  (b1 ahead mu + (1 - b1) g) / c1
    ahead = (1 - b1**t) / (1 - b1 ** (t + 1))
    return {**prepare_adam(count, b1, b2, eps, eps_root), "ahead": ahead}


def nesterov_rule(g, mu, nu, w1, w2, ahead, k, root, floor):
    mu = torch.lerp(mu, g, w1)
    nu = torch.lerp(nu, g * g, w2)
    m = torch.lerp(ahead * mu, g, w1)
    u = m / (k * (nu + root).sqrt() + floor)
    return u, {"mu": mu, "nu": nu}


def torchs_amsgrad_rule(g, mu, nu, nu_max, w1, w2, k, root, floor):
    mu = torch.lerp(mu, g, w1)
    nu = torch.lerp(nu, g * g, w2)
    nu_max = torch.maximum(nu_max, nu)
    u = mu / (k * (nu_max + root).sqrt() + floor)
    return u, {"mu": mu, "nu": nu, "nu_max": nu_max}


def prepare_amsgrad(count, b1, b2, eps, eps_root):
    t = tree.as_real(count + 1)
    c1, c2 = 1 - b1**t, 1 - b2**t
    # It is as Adam's, but nu is corrected before its maximum is taken, and not under the root.
    k, root, floor = c1, eps_root + tree.TINY, eps * c1
    return {"w1": 1 - b1, "w2": 1 - b2, "c2": c2, "k": k, "root": root, "floor": floor}


def amsgrad_rule(g, mu, nu, nu_max, w1, w2, c2, k, root, floor):
    mu = torch.lerp(mu, g, w1)
    nu = torch.lerp(nu, g * g, w2)
    nu_max = torch.maximum(nu_max, nu / c2)
    u = mu / (k * (nu_max + root).sqrt() + floor)
    return u, {"mu": mu, "nu": nu, "nu_max": nu_max}


@transformation
def scale_by_adam(
    b1: ScalarOrSchedule = 0.9,
    b2: ScalarOrSchedule = 0.999,
    eps: ScalarOrSchedule = 1e-8,
    eps_root: ScalarOrSchedule = 0.0,
    mu_dtype: torch.dtype | None = None,
    *,
    nesterov: bool = False,
    amsgrad: bool | Literal["torch"] = False,
    nu_dtype: torch.dtype | None = None,
) -> GradientTransformation:
    """``u = mu_hat / (sqrt(nu_hat + eps_root) + eps)``.

    Here ``mu_hat = mu / (1 - b1^t)`` and ``nu_hat = nu / (1 - b2^t)``.

    Args:
        b1: decay of the first moment, in [0, 1).
        b2: decay of the second moment, in [0, 1).
        eps: added outside the root, 0 or greater.
        eps_root: added inside the root, 0 or greater. It is not needed for derivatives through the
            update: at zero gradients they are finite without it, about ``1 / eps`` (in optax and
            torch they are NaN).
        mu_dtype: dtype in which ``mu`` is stored; by default that of the params, at least float32.
        nesterov: whether to take NAdam's
            ``mu_hat = b1 mu / (1 - b1^(t+1)) + (1 - b1) g / (1 - b1^t)``. Dozat's paper lets b1
            grow with t; here it is constant, as in optax. The numbers of torch.optim.NAdam are
            those of `scale_by_nadam`.
        amsgrad: whether to divide by the largest ``nu_hat`` so far, as optax does. With ``"torch"``
            it is the largest ``nu``, which is corrected afterwards, as torch.optim does.
        nu_dtype: the same as `mu_dtype`, for ``nu`` and its maximum.

    Raises:
        ValueError: a decay is outside of [0, 1), an eps is negative, or both nesterov and amsgrad
            are given.

    Example:
        >>> import torch, functorch_opt as fo
        >>> tx = fo.scale_by_adam()
        >>> tx.update([torch.tensor([0.1, -20.0])], tx.init([torch.zeros(2)]))[0]
        [tensor([ 1.0000, -1.0000])]
    """
    check_range(0, 1, b1=b1, b2=b2)
    check_range(0, float("inf"), eps=eps, eps_root=eps_root)
    if amsgrad not in (True, False, "torch"):
        raise ValueError(f"amsgrad must be True, False or 'torch'; got {amsgrad!r}.")
    if nesterov and amsgrad:
        raise ValueError(
            f"nesterov=True and amsgrad={amsgrad!r} are two methods, and no paper joins them: "
            "leave one of them out."
        )
    hyper = {"b1": b1, "b2": b2, "eps": eps, "eps_root": eps_root}
    second = partial(tree.zeros_like, dtype=nu_dtype)
    slots = {"mu": partial(tree.zeros_like, dtype=mu_dtype), "nu": second}
    if nesterov:
        return leafwise(nesterov_rule, prepare_nesterov, slots=slots, hyper=hyper)
    if not amsgrad:
        return leafwise(adam_rule, prepare_adam, slots=slots, hyper=hyper)
    slots["nu_max"] = second
    if amsgrad == "torch":
        return leafwise(torchs_amsgrad_rule, prepare_adam, slots=slots, hyper=hyper)
    return leafwise(amsgrad_rule, prepare_amsgrad, slots=slots, hyper=hyper)


@transformation
def scale_by_adamax(
    b1: ScalarOrSchedule = 0.9, b2: ScalarOrSchedule = 0.999, eps: ScalarOrSchedule = 1e-8
) -> GradientTransformation:
    """``u = mu_hat / nu`` with the decaying maximum ``nu = max(b2 nu, |g| + eps)``.

    Only ``mu`` needs a correction for its start.

    Args:
        b1: decay of the first moment, in [0, 1).
        b2: decay of the maximum, in [0, 1).
        eps: 0 or greater.

    Source: Kingma & Ba, 2015, alg. 2 (which has no eps; this place for it is torch's and optax's).

    Example:
        >>> import torch, functorch_opt as fo
        >>> tx = fo.scale_by_adamax()
        >>> tx.update([torch.tensor([0.1, -20.0])], tx.init([torch.zeros(2)]))[0]
        [tensor([ 1., -1.])]
    """
    check_range(0, 1, b1=b1, b2=b2)
    check_range(0, float("inf"), eps=eps)

    def prepare(count, b1):
        return {"w1": 1 - b1, "c1": 1 / (1 - b1 ** tree.as_real(count + 1))}

    def rule(g, mu, nu, w1, b2, eps, c1):
        mu = torch.lerp(mu, g, w1)
        nu = torch.maximum(b2 * nu, g.abs() + eps)
        return mu * c1 / nu, {"mu": mu, "nu": nu}

    slots = {"mu": tree.zeros_like, "nu": tree.zeros_like}
    return leafwise(rule, prepare, slots=slots, hyper={"b1": b1, "b2": b2, "eps": eps})


# ---- ready-made --------------------------------------------------------------------------------


@transformation
def adam(
    learning_rate: ScalarOrSchedule,
    b1: ScalarOrSchedule = 0.9,
    b2: ScalarOrSchedule = 0.999,
    eps: ScalarOrSchedule = 1e-8,
    eps_root: ScalarOrSchedule = 0.0,
    mu_dtype: torch.dtype | None = None,
    *,
    nesterov: bool = False,
) -> GradientTransformation:
    """Adam: `scale_by_adam`, then the learning rate. Its numbers are those of torch.optim.Adam.

    Args:
        learning_rate: 0 or greater, or a schedule.
        b1, b2, eps, eps_root, mu_dtype, nesterov: see `scale_by_adam`.

    Source: Kingma & Ba, 2015, alg. 1.

    Example:
        >>> import torch, functorch_opt as fo
        >>> tx, params = fo.adam(0.1), {"w": torch.tensor(1.0)}
        >>> updates, state = tx.update({"w": torch.tensor(5.0)}, tx.init(params), params)
        >>> fo.apply_updates(params, updates)
        {'w': tensor(0.9000)}
    """
    return chain(
        scale_by_adam(b1, b2, eps, eps_root, mu_dtype, nesterov=nesterov),
        scale_by_learning_rate(learning_rate),
    )


@transformation
def adamw(
    learning_rate: ScalarOrSchedule,
    b1: ScalarOrSchedule = 0.9,
    b2: ScalarOrSchedule = 0.999,
    eps: ScalarOrSchedule = 1e-8,
    eps_root: ScalarOrSchedule = 0.0,
    mu_dtype: torch.dtype | None = None,
    weight_decay: ScalarOrSchedule = 1e-4,
    mask: MaskOrFn | None = None,
    *,
    nesterov: bool = False,
) -> GradientTransformation:
    """Adam with decoupled weight decay: ``p -> p - learning_rate (adam + weight_decay p)``.

    Args:
        learning_rate: 0 or greater, or a schedule.
        b1, b2, eps, eps_root, mu_dtype, nesterov: see `scale_by_adam`.
        weight_decay: multiplied by the learning rate. The default is optax's 1e-4; that of
            torch.optim.AdamW is 1e-2.
        mask: which parameters decay, see `masked`; by default all.

    Source: Loshchilov & Hutter, 2019, alg. 2; there the decay is multiplied by the schedule only,
    not by the learning rate.

    Example:
        >>> import torch, functorch_opt as fo
        >>> tx = fo.adamw(0.1, weight_decay=0.01, mask=lambda path, p: p.ndim > 1)
        >>> list(tx.init({"w": torch.zeros(2, 2)}))
        ['scale_by_adam', 'add_decayed_weights', 'scale_by_learning_rate']
    """
    return chain(
        scale_by_adam(b1, b2, eps, eps_root, mu_dtype, nesterov=nesterov),
        add_decayed_weights(weight_decay, mask),
        scale_by_learning_rate(learning_rate),
    )


@transformation
def adamax(
    learning_rate: ScalarOrSchedule,
    b1: ScalarOrSchedule = 0.9,
    b2: ScalarOrSchedule = 0.999,
    eps: ScalarOrSchedule = 1e-8,
) -> GradientTransformation:
    """Adam with a decaying maximum in place of the second moment.

    It is `scale_by_adamax`, then the learning rate.

    Source: Kingma & Ba, 2015, alg. 2.

    Example:
        >>> import functorch_opt as fo
        >>> fo.adamax(0.002)
        adamax(0.002)
    """
    return chain(scale_by_adamax(b1, b2, eps), scale_by_learning_rate(learning_rate))


@transformation
def adamaxw(
    learning_rate: ScalarOrSchedule,
    b1: ScalarOrSchedule = 0.9,
    b2: ScalarOrSchedule = 0.999,
    eps: ScalarOrSchedule = 1e-8,
    weight_decay: ScalarOrSchedule = 1e-4,
    mask: MaskOrFn | None = None,
) -> GradientTransformation:
    """Adamax with decoupled weight decay: ``p -> p - learning_rate (adamax + weight_decay p)``.

    Args:
        learning_rate: 0 or greater, or a schedule.
        b1, b2, eps: see `scale_by_adamax`.
        weight_decay: multiplied by the learning rate.
        mask: which parameters decay, see `masked`; by default all.

    Raises:
        ValueError: an argument outside its range; ``update`` called without params.

    Source: Kingma & Ba, 2015, alg. 2; Loshchilov & Hutter, 2019, alg. 2.

    Example:
        >>> import functorch_opt as fo
        >>> fo.adamaxw(0.002, weight_decay=0.01)
        adamaxw(0.002, weight_decay=0.01)
    """
    return chain(
        scale_by_adamax(b1, b2, eps),
        add_decayed_weights(weight_decay, mask),
        scale_by_learning_rate(learning_rate),
    )
