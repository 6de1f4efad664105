"""Langevin dynamics: gradient descent with so much noise that the parameters are samples.

The formula is ``p -> p - eta g + sqrt(2 eta T) z``.

Source: Welling & Teh, "Bayesian Learning via Stochastic Gradient Langevin Dynamics", ICML 2011.
"""

from __future__ import annotations

from torch import Tensor

from functorch_opt import random
from functorch_opt._core.leaf import Each
from functorch_opt._core.rule import leafwise
from functorch_opt._core.transformation import (
    GradientTransformation,
    ScalarOrSchedule,
    check_range,
    transformation,
)
from functorch_opt.transforms.noise import sized

__all__ = ["sgld"]


@transformation
def sgld(
    learning_rate: ScalarOrSchedule,
    temperature: ScalarOrSchedule = 1.0,
    *,
    key: Tensor | int,
) -> GradientTransformation:
    """Stochastic gradient Langevin dynamics: ``u = -eta g + sqrt(2 eta T) z``, z standard normal.

    If g is the gradient of an energy U, the parameters become samples of ``exp(-U / T)`` as the
    learning rate goes to 0. To sample a posterior, U is the negative logarithm of the prior times
    the likelihood of *all* data, so the loss of a minibatch must be scaled up. The noise is added
    after the learning rate, and is proportional to its root; the noise of `noisy_sgd` is multiplied
    by the learning rate.

    Args:
        learning_rate: eta, 0 or greater, or a schedule. It is half of the paper's epsilon.
        temperature: T, 0 or greater, or a schedule; 1 for the posterior, 0 for gradient descent.
        key: int64 [2], or a seed; see `add_noise`.

    Raises:
        ValueError: `learning_rate` or `temperature` is negative or NaN; a gradient is None in a
            call without params.
        TypeError: `key` is not a key or a seed.

    Source: Welling & Teh, 2011, eq. 4.

    Example:
        >>> import torch, functorch_opt as fo
        >>> params = torch.zeros(1000)  # 1000 samples at once of exp(-p^2 / 2)
        >>> tx = fo.sgld(0.01, key=0)
        >>> state = tx.init(params)
        >>> for _ in range(300):
        ...     updates, state = tx.update(params, state)
        ...     params = fo.apply_updates(params, updates)
        >>> bool(0.9 < params.std() < 1.1)
        True
    """
    check_range(0, float("inf"), learning_rate=learning_rate, temperature=temperature)

    def prepare(count, key, learning_rate, temperature, updates, params=None):
        sigma = (2 * learning_rate * temperature) ** 0.5
        return {
            "sigma": sigma,
            "noise": Each(
                random.normal_like(key, sized("sgld", updates, params), count), own=True
            ),
        }

    def rule(g, noise, learning_rate, sigma):
        return sigma * noise - learning_rate * g

    hyper = {"learning_rate": learning_rate, "temperature": temperature}
    return leafwise(rule, prepare, shared={"key": random.as_key(key)}, hyper=hyper)
