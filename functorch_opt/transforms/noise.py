"""Gaussian noise: ``u + sigma_t z``, z standard normal, ``sigma_t^2 = eta / (1 + t)^gamma``."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from functorch_opt import random, tree
from functorch_opt.base import GradientTransformation, ScalarOrSchedule, check_range, transformation
from functorch_opt.leaf import Each
from functorch_opt.rule import leafwise

__all__ = ["add_noise"]

_STEP_BITS = 36  # one step owns 2**36 blocks of four numbers, so that steps can never overlap
_AT_ONCE = 1 << 22  # blocks drawn together: few operations for many small leaves, bounded memory for large ones


@transformation
def add_noise(eta: ScalarOrSchedule, gamma: ScalarOrSchedule, key: Tensor | int) -> GradientTransformation:
    """Add Gaussian noise of mean 0 and variance ``eta / (1 + t)^gamma``, where t is 0 at the first update.

    The key is kept in the state beside the count; the same key and count give the same noise, eager, compiled or vmapped, on any device up
    to the rounding of its logarithm and cosine. Under vmap give every model its own key: ``random.split(key, n)``.

    Args:
        eta: variance at the first update, 0 or greater.
        gamma: how fast it decays; 0 for a constant variance.
        key: int64 [2], see `functorch_opt.random.key`, or a seed. It has no default: two stages with one key would add the same noise.

    Raises:
        ValueError: negative or NaN `eta` or `gamma`; a gradient that is None in a call without params.
        TypeError: something that is not a key.

    Source: Neelakantan et al., "Adding Gradient Noise Improves Learning for Very Deep Networks", 2015, eq. 1.

    Example:
        >>> import torch, functorch_opt as fo
        >>> tx = fo.add_noise(eta=0.01, gamma=0.0, key=0)
        >>> tx.update([torch.zeros(2)], tx.init([torch.zeros(2)]))[0]
        [tensor([ 0.0991, -0.0925])]
    """
    check_range(0, float("inf"), eta=eta, gamma=gamma)

    def prepare(count, key, eta, gamma, updates, params=None):
        sigma = (eta / (1 + tree.as_real(count)) ** gamma) ** 0.5
        return {"sigma": sigma, "noise": Each(_normals_like(updates, params, key, count))}

    shared = {"key": random.as_key(key)}
    return leafwise(lambda g, noise, sigma: g + sigma * noise, prepare, shared=shared, hyper={"eta": eta, "gamma": gamma})


def _normals_like(updates: Any, params: Any, key: Tensor, count: Tensor) -> Any:
    """Standard normals in the shapes of `updates`.

    A leaf's place in the stream depends on the sizes of the leaves before it, not on which of them have gradients.
    """
    gs, spec = tree.flatten(updates)
    leaves = gs if params is None else tree.match(updates, spec, params, names=("updates", "params"))
    if any(leaf is None for leaf in leaves) and params is None:
        raise ValueError("add_noise needs the size of every leaf, and some gradients are None: call update(updates, state, params).")
    sizes = [0 if leaf is None else leaf.numel() * (2 if leaf.is_complex() else 1) for leaf in leaves]
    blocks = [-(-size // 4) for size in sizes]
    counts = count.expand(len(leaves)).unbind() if count.dim() else [count] * len(leaves)
    pieces: list[Tensor] = []
    for bucket in _buckets(blocks):
        index = torch.cat([torch.arange(begin, begin + blocks[i], device=key.device) + (counts[i] << _STEP_BITS) for i, begin in bucket])
        drawn = random.normal_blocks(key, index).reshape(-1)
        pieces += [piece[: sizes[i]] for (i, _), piece in zip(bucket, drawn.split([4 * blocks[i] for i, _ in bucket]), strict=True)]
    return tree.unflatten(spec, [None if leaf is None else _shaped(z, leaf) for z, leaf in zip(pieces, leaves, strict=True)])


def _buckets(blocks: list[int]) -> list[list[tuple[int, int]]]:
    """Leaves to draw together: lists of (leaf, its first block)."""
    buckets: list[list[tuple[int, int]]] = []
    filled = 0
    for i, begin in enumerate(accumulate([0, *blocks[:-1]])):
        if not buckets or filled + blocks[i] > _AT_ONCE:
            buckets.append([])
            filled = 0
        buckets[-1].append((i, begin))
        filled += blocks[i]
    return buckets


def _shaped(z: Tensor, leaf: Tensor) -> Tensor:
    return torch.view_as_complex(z.reshape(*leaf.shape, 2)) if leaf.is_complex() else z.reshape(leaf.shape)
