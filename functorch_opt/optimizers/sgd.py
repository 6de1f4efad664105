"""Gradient descent, ``p -> p - eta g``.

Its variants have momentum, noise, only the sign of the gradient, or a step size that comes from the
value.

Sources: Robbins & Monro, "A Stochastic Approximation Method", 1951. Sutskever et al., "On the
importance of initialization and momentum in deep learning", 2013. Neelakantan et al., "Adding
Gradient Noise Improves Learning for Very Deep Networks", 2015. Bernstein et al., "signSGD:
Compressed Optimisation for Non-Convex Problems", 2018. Polyak, "Introduction to Optimization",
1987, sec. 5.3; Loizou, Vaswani, Laradji & Lacoste-Julien, "Stochastic Polyak Step-size for SGD",
2021, eq. 4 (SPS_max).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from functorch_opt import tree
from functorch_opt._core.chain import chain
from functorch_opt._core.rule import leafwise
from functorch_opt._core.transformation import (
    GradientTransformation,
    Scalar,
    ScalarOrSchedule,
    check_range,
    transformation,
)
from functorch_opt.transforms.momentum import ema, trace
from functorch_opt.transforms.noise import add_noise
from functorch_opt.transforms.scale import scale_by_learning_rate, scale_by_sign

__all__ = ["noisy_sgd", "polyak_sgd", "scale_by_polyak", "sgd", "sign_sgd", "signum"]


@transformation
def sgd(
    learning_rate: ScalarOrSchedule,
    momentum: ScalarOrSchedule | None = None,
    nesterov: bool = False,
    accumulator_dtype: torch.dtype | None = None,
) -> GradientTransformation:
    """Gradient descent, with momentum if one is given: `trace`, then the learning rate.

    Args:
        learning_rate: 0 or greater, or a schedule.
        momentum: decay of the trace. With None no trace is kept.
        nesterov: look one step ahead.
        accumulator_dtype: of the trace; by default that of the params, at least float32.

    Source: Sutskever et al., 2013, eqs. 1-4.

    Example:
        >>> import torch, functorch_opt as fo
        >>> tx, params = fo.sgd(0.1), torch.tensor(1.0)
        >>> updates, _ = tx.update(torch.tensor(2.0), tx.init(params))
        >>> fo.apply_updates(params, updates)
        tensor(0.8000)
    """
    check_range(0, float("inf"), momentum=momentum)
    step = scale_by_learning_rate(learning_rate)
    return (
        chain(step)
        if momentum is None
        else chain(trace(momentum, nesterov, accumulator_dtype), step)
    )


@transformation
def noisy_sgd(
    learning_rate: ScalarOrSchedule,
    eta: ScalarOrSchedule = 0.01,
    gamma: ScalarOrSchedule = 0.55,
    *,
    key: Tensor | int,
) -> GradientTransformation:
    """Gradient descent with Gaussian noise on the gradient: `add_noise`, then the learning rate.

    Args:
        learning_rate: 0 or greater, or a schedule; it multiplies the noise too.
        eta: variance of the noise at the first update.
        gamma: how fast this variance decays. With 0 it is constant.
        key: int64 [2], or a seed; see `add_noise`.

    Source: Neelakantan et al., 2015, eq. 1.

    Example:
        >>> import functorch_opt as fo
        >>> fo.noisy_sgd(0.1, eta=0.01, gamma=0.0, key=0)
        noisy_sgd(0.1, eta=0.01, gamma=0.0, key=0)
    """
    return chain(add_noise(eta, gamma, key), scale_by_learning_rate(learning_rate))


@transformation
def sign_sgd(learning_rate: ScalarOrSchedule) -> GradientTransformation:
    """Descent by the sign of the gradient: `scale_by_sign`, then the learning rate.

    Source: Bernstein et al., 2018, alg. 1.

    Example:
        >>> import functorch_opt as fo
        >>> fo.sign_sgd(0.1)
        sign_sgd(0.1)
    """
    return chain(scale_by_sign(), scale_by_learning_rate(learning_rate))


@transformation
def signum(
    learning_rate: ScalarOrSchedule,
    beta: ScalarOrSchedule = 0.9,
    accumulator_dtype: torch.dtype | None = None,
) -> GradientTransformation:
    """Descent by the sign of the momentum: `ema`, `scale_by_sign`, then the learning rate.

    Args:
        learning_rate: 0 or greater, or a schedule.
        beta: decay of the mean, in [0, 1).
        accumulator_dtype: of the mean; by default that of the params, at least float32.

    Raises:
        ValueError: an argument outside its range.

    Source: Bernstein et al., 2018, alg. 2.

    Example:
        >>> import torch, functorch_opt as fo
        >>> tx = fo.signum(0.1)
        >>> updates, state = tx.update(torch.tensor(5.0), tx.init(torch.tensor(0.0)))
        >>> tx.update(torch.tensor(-1.0), state)[0]
        tensor(-0.1000)
    """
    check_range(0, 1, beta=beta)
    # The sign of a mean is that of the mean corrected for its start.
    mean = ema(beta, debias=False, accumulator_dtype=accumulator_dtype)
    return chain(mean, scale_by_sign(), scale_by_learning_rate(learning_rate))


@transformation
def scale_by_polyak(
    f_min: Scalar = 0.0,
    max_learning_rate: Scalar = 1.0,
    eps: Scalar = 0.0,
    variant: Literal["sps", "sps+"] = "sps",
) -> GradientTransformation:
    """``u -> min(max_learning_rate, (value - f_min) / (|u|^2 + eps)) u``.

    It is 0 where ``|u|^2 + eps`` is 0.

    Args:
        f_min: the minimum of the function, or a lower bound of it.
        max_learning_rate: greater than 0.
        eps: 0 or greater.
        variant: with "sps+" a value below `f_min` gives no step; with "sps" it gives a step
            upwards.

    Extra argument of ``update``: ``value``, the function at the params.

    Source: Loizou et al., 2021, eq. 4. optax gives no step if ``|u|^2 + eps`` is below 2.2e-16;
    here the step is what the formula says.

    Example:
        >>> import torch, functorch_opt as fo
        >>> tx = fo.scale_by_polyak()
        >>> state, value = tx.init([torch.zeros(2)]), torch.tensor(5.0)
        >>> tx.update([torch.tensor([3.0, 4.0])], state, value=value)[0]
        [tensor([0.6000, 0.8000])]
    """
    check_range(-float("inf"), float("inf"), f_min=f_min)
    check_range(0, float("inf"), above=True, max_learning_rate=max_learning_rate)
    check_range(0, float("inf"), eps=eps)
    if variant not in ("sps", "sps+"):
        raise ValueError(f"variant must be 'sps' or 'sps+'; got {variant!r}.")

    def prepare(updates, f_min, max_learning_rate, eps, *, value):
        square = tree.norm(updates) ** 2 + eps
        gap = torch.as_tensor(value, dtype=square.dtype, device=square.device) - f_min
        gap = gap.clamp(min=0) if variant == "sps+" else gap
        moves = square > 0
        size = torch.clamp(gap / torch.where(moves, square, 1.0), max=max_learning_rate)
        return {"size": torch.where(moves, size, 0.0)}

    hyper = {"f_min": f_min, "max_learning_rate": max_learning_rate, "eps": eps}
    return leafwise(lambda g, size: g * size, prepare, hyper=hyper)


@transformation
def polyak_sgd(
    max_learning_rate: Scalar = 1.0,
    scaling: ScalarOrSchedule = 1.0,
    f_min: Scalar = 0.0,
    eps: Scalar = 0.0,
    variant: Literal["sps", "sps+"] = "sps",
) -> GradientTransformation:
    """Gradient descent with Polyak's step size.

    It is `sgd` with the learning rate `scaling`, then `scale_by_polyak`.

    Args:
        max_learning_rate, f_min, eps, variant: see `scale_by_polyak`.
        scaling: the factor of the gradient, before its norm is taken.

    Extra argument of ``update``: ``value``, the function at the params.

    Source: Loizou et al., 2021, eq. 4.

    Example:
        >>> import torch, functorch_opt as fo
        >>> f, p = lambda p: (p**2).sum(), torch.tensor([1.0, 2.0])
        >>> tx = fo.polyak_sgd()
        >>> for _ in range(10):
        ...     updates, _ = tx.update(2 * p, tx.init(p), p, value=f(p))
        ...     p = fo.apply_updates(p, updates)
        >>> bool(f(p) < 1e-5)
        True
    """
    check_range(0, float("inf"), scaling=scaling)
    return chain(sgd(scaling), scale_by_polyak(f_min, max_learning_rate, eps, variant))
