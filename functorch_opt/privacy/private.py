"""Differentially private descent.

The gradient of each example is clipped to norm C, and noise of standard deviation ``sigma C`` is
added to their sum:

    g_i <- g_i / max(1, ||g_i|| / C);    u = (sum_i g_i + sigma C z) / B,    z standard normal

Source: Abadi et al., "Deep Learning with Differential Privacy", CCS 2016, alg. 1.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from functorch_opt import random, tree
from functorch_opt._core import structure
from functorch_opt._core.chain import chain
from functorch_opt._core.transformation import (
    GradientTransformation,
    ScalarOrSchedule,
    check_range,
    transformation,
)
from functorch_opt.optimizers.adam import scale_by_adam
from functorch_opt.privacy.aggregate import ClippedSum, Norms, check_bounds, clip_and_sum
from functorch_opt.privacy.ranks import laid_out
from functorch_opt.transforms.momentum import trace
from functorch_opt.transforms.noise import add_noise
from functorch_opt.transforms.scale import scale_by_learning_rate
from functorch_opt.tree import PyTree

__all__ = [
    "differentially_private_aggregate",
    "dp_adam",
    "dpsgd",
    "poisson_sample",
]


# ---- the transformation --------------------------------------------------------------------------


@transformation
def differentially_private_aggregate(
    l2_norm_clip: Norms,
    noise_multiplier: ScalarOrSchedule,
    key: Tensor | int,
    *,
    expected_batch_size: float | None = None,
) -> GradientTransformation:
    """Clip each example, sum, add noise, average: ``(sum_i clip(g_i) + sigma C z) / B``.

    It is the first stage of a chain.

    Its updates are gradients with an axis of examples in front, as `per_example_grads` returns
    them. They may also be a `ClippedSum`, which `clipped_grad_sum` computes without ever holding
    all gradients. If the ranks divide the examples (DTensors with ``Shard(0)``), their sum is taken
    over all ranks, laid out as the parameters are, and the noise is added once.

    Args:
        l2_norm_clip: C, greater than 0. With a tree of them, parts of an example are clipped by
            their own norms (see `clip_and_sum`), and the noise is that of
            ``C = sqrt(sum_k C_k^2)``.
        noise_multiplier: sigma, the standard deviation of the noise divided by C; 0 or greater, or
            a schedule.
        key: int64 [2], or a seed; see `add_noise`. Anyone who knows the key can remove the noise,
            so draw the seed with ``secrets.randbits(63)``.
        expected_batch_size: B. None means the number of examples there are, as in optax. Under
            Poisson sampling this number depends on the data, and may be 0; then give
            ``sampling_rate * len(data)``.

    Raises:
        ValueError: a number is out of its range; updates have no axis of examples; a sum was
            clipped to another norm; there is no example and no `expected_batch_size`; the examples
            are divided on another mesh than the parameters.

    Source: Abadi et al., 2016, alg. 1; optax.contrib. In optax an example whose gradient is not
    finite is not clipped; here it makes the update NaN.

    Example:
        >>> import torch, functorch_opt as fo
        >>> tx = fo.differentially_private_aggregate(l2_norm_clip=1.0, noise_multiplier=0.0, key=0)
        >>> params = {"w": torch.zeros(2)}
        >>> tx.update({"w": torch.tensor([[3.0, 4.0], [0.3, 0.4]])}, tx.init(params), params)[0]
        {'w': tensor([0.4500, 0.6000])}
    """
    check_bounds(l2_norm_clip, finite=True)
    check_range(0, math.inf, noise_multiplier=noise_multiplier)
    if expected_batch_size is not None:
        check_range(0, math.inf, above=True, expected_batch_size=expected_batch_size)
    sensitivity = _norm_of(tree.flatten(l2_norm_clip)[0])
    noise = add_noise(_square(noise_multiplier, sensitivity), gamma=0.0, key=key)

    def update(updates, state, params=None):
        if not isinstance(updates, ClippedSum):
            if not tree.leaves(updates):  # no parameter has a gradient, and none is moved
                return noise.update(updates, state, params)
            updates = clip_and_sum(_with_examples(updates, params), l2_norm_clip)
        clipped = updates
        if _differ(clipped.l2_norm_clip, l2_norm_clip):
            raise ValueError(
                f"the sum was clipped to l2_norm_clip={clipped.l2_norm_clip!r}, "
                f"and the noise is for {l2_norm_clip!r}. Give both the same."
            )
        size = (
            tree.leaves(clipped.norms)[0].shape[0]
            if expected_batch_size is None
            else expected_batch_size
        )
        if expected_batch_size is None and not size:
            raise ValueError(
                "there is no example to average over. "
                "Give expected_batch_size: the update of an empty batch is noise alone."
            )
        total = _laid_out(clipped.sum, params)
        total, state = noise.update(total, state, params)
        return tree.map(lambda g: g / size, total), state

    return GradientTransformation(noise.init, update)


def _laid_out(sums: PyTree, params: PyTree | None) -> PyTree:
    """The sums over the examples of all ranks, each laid out as its parameter."""
    if params is None:
        return sums
    xs, spec = structure.flatten_tensors(sums, "updates")
    ps = structure.match(sums, spec, params, names=("updates", "params"))
    return tree.unflatten(spec, laid_out(xs, ps))


def _norm_of(bounds: list[Any]) -> float | Tensor:
    """``sqrt(sum_k C_k^2)``: by how much one example can move the sum."""
    if any(isinstance(bound, Tensor) for bound in bounds):
        return torch.linalg.vector_norm(
            torch.stack([torch.as_tensor(bound, dtype=torch.float64) for bound in bounds])
        )
    return math.hypot(*bounds)


def _square(
    noise_multiplier: ScalarOrSchedule, sensitivity: float | Tensor
) -> ScalarOrSchedule:
    """The variance that `add_noise` takes."""
    if callable(noise_multiplier):
        return lambda count: (noise_multiplier(count) * sensitivity) ** 2
    return (noise_multiplier * sensitivity) ** 2


def _differ(a: Norms, b: Norms) -> bool:
    """Whether they are different numbers. The value of a tensor is not checked."""
    xs, x_spec = tree.flatten(a)
    ys, y_spec = tree.flatten(b)
    return x_spec != y_spec or any(
        x != y
        for x, y in zip(xs, ys, strict=True)
        if not (isinstance(x, Tensor) or isinstance(y, Tensor))
    )


def _with_examples(updates: PyTree, params: PyTree | None) -> PyTree:
    if params is not None:
        gs, spec = structure.flatten_tensors(updates, "updates")
        for path, g, p in zip(
            tree.paths(updates),
            gs,
            structure.match(updates, spec, params, names=("updates", "params")),
            strict=True,
        ):
            if g is not None and p is not None and g.shape[1:] != p.shape:
                raise ValueError(
                    f"the update at {path!r} has shape {tuple(g.shape)} and its parameter "
                    f"{tuple(p.shape)}. "
                    f"Needed is the gradient of every example, {('B', *p.shape)}, "
                    "as per_example_grads gives."
                )
    return updates


# ---- optimizers ----------------------------------------------------------------------------------


@transformation
def dpsgd(
    learning_rate: ScalarOrSchedule,
    l2_norm_clip: Norms,
    noise_multiplier: ScalarOrSchedule,
    key: Tensor | int,
    momentum: ScalarOrSchedule | None = None,
    nesterov: bool = False,
    *,
    expected_batch_size: float | None = None,
) -> GradientTransformation:
    """Private gradient descent.

    It is `differentially_private_aggregate`, then momentum if it is given, then the learning rate.

    Args:
        learning_rate: 0 or greater, or a schedule.
        l2_norm_clip: C, greater than 0, or a tree of them.
        noise_multiplier: sigma, 0 or greater, or a schedule.
        key: int64 [2], or a seed.
        momentum: decay of the trace. With None no trace is kept.
        nesterov: look one step ahead.
        expected_batch_size: B; needed under Poisson sampling.

    Source: Abadi et al., 2016, alg. 1. It is optax.contrib.dpsgd.

    Example:
        >>> import torch, functorch_opt as fo
        >>> noise = {"l2_norm_clip": 1.0, "noise_multiplier": 1.1, "key": 0}
        >>> tx = fo.dpsgd(0.1, **noise, expected_batch_size=2)
        >>> params = torch.zeros(2)
        >>> updates, _ = tx.update(torch.tensor([[3.0, 4.0], [0.3, 0.4]]), tx.init(params), params)
        >>> updates
        tensor([-0.0995, -0.0091])
    """
    check_range(0, math.inf, momentum=momentum)
    private = differentially_private_aggregate(
        l2_norm_clip, noise_multiplier, key, expected_batch_size=expected_batch_size
    )
    step = scale_by_learning_rate(learning_rate)
    return (
        chain(private, step)
        if momentum is None
        else chain(private, trace(momentum, nesterov), step)
    )


@transformation
def dp_adam(
    learning_rate: ScalarOrSchedule,
    l2_norm_clip: Norms,
    noise_multiplier: ScalarOrSchedule,
    key: Tensor | int,
    b1: ScalarOrSchedule = 0.9,
    b2: ScalarOrSchedule = 0.999,
    eps: ScalarOrSchedule = 1e-8,
    *,
    expected_batch_size: float | None = None,
) -> GradientTransformation:
    """Adam on private gradients.

    It is `differentially_private_aggregate`, `scale_by_adam`, then the learning rate.

    What is computed from a private gradient is private too. The second moment sees the noise too.
    With much noise, ``sqrt(nu)`` is near ``sigma C / B`` for every parameter.

    Args:
        learning_rate: 0 or greater, or a schedule.
        l2_norm_clip: C, greater than 0, or a tree of them.
        noise_multiplier: sigma, 0 or greater, or a schedule.
        key: int64 [2], or a seed.
        b1: decay of the mean, in [0, 1).
        b2: decay of the mean of squares, in [0, 1).
        eps: added to the root, 0 or greater.
        expected_batch_size: B; needed under Poisson sampling.

    Source: Abadi et al., 2016, alg. 1, whose gradient takes the place of that in Kingma & Ba,
    "Adam", 2015.

    Example:
        >>> import functorch_opt as fo
        >>> fo.dp_adam(1e-3, l2_norm_clip=1.0, noise_multiplier=1.1, key=0)
        dp_adam(0.001, l2_norm_clip=1.0, noise_multiplier=1.1, key=0)
    """
    private = differentially_private_aggregate(
        l2_norm_clip, noise_multiplier, key, expected_batch_size=expected_batch_size
    )
    return chain(
        private, scale_by_adam(b1, b2, eps), scale_by_learning_rate(learning_rate)
    )


# ---- sampling and accounting ---------------------------------------------------------------------


def poisson_sample(key: Tensor, size: int, expected_batch_size: float) -> Tensor:
    """The examples of one batch, drawn independently of each other.

    Each of `size` examples is in it with probability ``expected_batch_size / size``.

    `privacy_spent` assumes this sampling. The batch has another size every time, and may be empty.

    Args:
        key: int64 [2], a new one for each step, such as ``random.fold_in(key, step)``. It must be
            secret, and must not be the key of the noise.
        size: how many examples the data have.
        expected_batch_size: in [0, size].

    Returns:
        Indices in ascending order, int64.

    Raises:
        ValueError: `expected_batch_size` is out of its range.

    Source: Abadi et al., 2016, sec. 3.1; Mironov, Talwar & Zhang, "Renyi Differential Privacy of
    the Sampled Gaussian Mechanism", 2019.

    Example:
        >>> import functorch_opt as fo
        >>> fo.poisson_sample(fo.random.key(0), size=10, expected_batch_size=3)
        tensor([4, 8])
    """
    if not 0 <= expected_batch_size <= size:
        raise ValueError(
            f"expected_batch_size must be from 0 to size, which is {size}; "
            f"got {expected_batch_size}."
        )
    words = random.fold_in(key, torch.arange(size))[:, 0]
    # The numbers are in [0, 1), so with probability 0 none is below it, and with 1 all are.
    uniform = ((words >> 11) + 2**52).double() * 2.0**-53
    probability = expected_batch_size / max(size, 1)
    return (uniform < probability).nonzero().squeeze(1)
