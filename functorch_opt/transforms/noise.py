"""Gaussian noise: ``u + sigma_t z``, z standard normal, ``sigma_t^2 = eta / (1 + t)^gamma``."""

from __future__ import annotations

from torch import Tensor

from functorch_opt import random, tree
from functorch_opt._core.leaf import Each
from functorch_opt._core.rule import leafwise
from functorch_opt._core.transformation import (
    GradientTransformation,
    ScalarOrSchedule,
    check_range,
    transformation,
)
from functorch_opt.tree import PyTree

__all__ = ["add_noise"]


@transformation
def add_noise(
    eta: ScalarOrSchedule, gamma: ScalarOrSchedule, key: Tensor | int
) -> GradientTransformation:
    """Add Gaussian noise of mean 0 and variance ``eta / (1 + t)^gamma``.

    At the first update t is 0.

    The key is kept in the state beside the count. The same key and count give the same noise:
    eager, compiled, vmapped or sharded, and on any device up to the rounding of its logarithm and
    cosine. Under vmap give every model its own key: ``random.split(key, n)``.

    Args:
        eta: variance at the first update, 0 or greater.
        gamma: how fast the variance decays, 0 or greater. With 0 it is constant.
        key: int64 [2], see `functorch_opt.random.key`, or a seed. There is no default, because two
            stages with the same key would add the same noise.

    Raises:
        ValueError: negative or NaN `eta` or `gamma`; a gradient that is None in a call without
            params.
        TypeError: something that is not a key.

    Source: Neelakantan et al., "Adding Gradient Noise Improves Learning for Very Deep Networks",
    2015, eq. 1.

    Example:
        >>> import torch, functorch_opt as fo
        >>> tx = fo.add_noise(eta=0.01, gamma=0.0, key=0)
        >>> tx.update([torch.zeros(2)], tx.init([torch.zeros(2)]))[0]
        [tensor([ 0.0991, -0.0925])]
    """
    check_range(0, float("inf"), eta=eta, gamma=gamma)

    def prepare(count, key, eta, gamma, updates, params=None):
        sigma = (eta / (1 + tree.as_real(count)) ** gamma) ** 0.5
        return {
            "sigma": sigma,
            "noise": Each(
                random.normal_like(key, sized("add_noise", updates, params), count),
                own=True,
            ),
        }

    shared = {"key": random.as_key(key)}
    return leafwise(
        lambda g, noise, sigma: g + sigma * noise,
        prepare,
        shared=shared,
        hyper={"eta": eta, "gamma": gamma},
    )


def sized(name: str, updates: PyTree, params: PyTree | None) -> PyTree:
    """The tree in whose shapes the noise is drawn.

    It is that of the params, if they are given, so that a leaf without gradient does not move the
    streams of the others.
    """
    if params is None and any(leaf is None for leaf in tree.flatten(updates)[0]):
        raise ValueError(
            f"{name} needs the size of every leaf, and some gradients are None: "
            "call update(updates, state, params)."
        )
    return updates if params is None else params
