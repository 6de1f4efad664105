"""Gradient descent, ``p -> p - eta g``: with momentum, with noise, or by the sign alone.

Sources: Robbins & Monro, "A Stochastic Approximation Method", 1951. Sutskever et al., "On the importance of initialization and momentum in
deep learning", 2013. Neelakantan et al., "Adding Gradient Noise Improves Learning for Very Deep Networks", 2015. Bernstein et al.,
"signSGD: Compressed Optimisation for Non-Convex Problems", 2018.
"""

from __future__ import annotations

import torch
from torch import Tensor

from functorch_opt.base import GradientTransformation, ScalarOrSchedule, check_range, transformation
from functorch_opt.combine import chain
from functorch_opt.transforms.momentum import trace
from functorch_opt.transforms.noise import add_noise
from functorch_opt.transforms.scale import scale_by_learning_rate, sign

__all__ = ["noisy_sgd", "sgd", "sign_sgd"]


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
        momentum: decay of the trace; None: no trace is kept.
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
    return chain(step) if momentum is None else chain(trace(momentum, nesterov, accumulator_dtype), step)


@transformation
def noisy_sgd(
    learning_rate: ScalarOrSchedule, eta: ScalarOrSchedule = 0.01, gamma: ScalarOrSchedule = 0.55, *, key: Tensor | int
) -> GradientTransformation:
    """Gradient descent with Gaussian noise on the gradient: `add_noise`, then the learning rate.

    Args:
        learning_rate: 0 or greater, or a schedule; it multiplies the noise too.
        eta: variance of the noise at the first update.
        gamma: how fast it decays; 0: constant.
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
    """Descent by the sign of the gradient: `sign`, then the learning rate.

    Source: Bernstein et al., 2018, alg. 1.

    Example:
        >>> import functorch_opt as fo
        >>> fo.sign_sgd(0.1)
        sign_sgd(0.1)
    """
    return chain(sign(), scale_by_learning_rate(learning_rate))
