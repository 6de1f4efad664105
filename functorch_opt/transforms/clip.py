"""Clipping of each element, or of all updates together by their norm.

The formulas are ``min(max(u, -c), c)`` and ``u min(1, c / ||u||)``.
"""

from __future__ import annotations

import torch

from functorch_opt import tree
from functorch_opt._core.rule import leafwise
from functorch_opt._core.transformation import (
    GradientTransformation,
    Scalar,
    check_range,
    transformation,
)
from functorch_opt.transforms.scale import rms

__all__ = ["clip", "clip_by_block_rms", "clip_by_global_norm"]


@transformation
def clip(max_delta: Scalar) -> GradientTransformation:
    """Clip every element to ``[-max_delta, max_delta]``.

    Args:
        max_delta: 0 or greater.

    Example:
        >>> import torch, functorch_opt as fo
        >>> tx = fo.clip(1.0)
        >>> tx.update([torch.tensor([-3.0, 0.5])], tx.init([torch.zeros(2)]))[0]
        [tensor([-1.0000,  0.5000])]
    """
    check_range(0, float("inf"), max_delta=max_delta)
    return leafwise(
        lambda g, max_delta: torch.clamp(g, -max_delta, max_delta),
        hyper={"max_delta": max_delta},
    )


@transformation
def clip_by_block_rms(threshold: Scalar) -> GradientTransformation:
    """Scale each tensor by ``min(1, threshold / RMS(u))``, with ``RMS(u) = |u| / sqrt(size of u)``.

    Args:
        threshold: greater than 0.

    Raises:
        ValueError: `threshold` is 0, negative or NaN.

    Source: Shazeer & Stern, "Adafactor: Adaptive Learning Rates with Sublinear Memory Cost", 2018,
    sec. 6.

    Example:
        >>> import torch, functorch_opt as fo
        >>> tx = fo.clip_by_block_rms(1.0)
        >>> tx.update([torch.tensor([1.0, 7.0])], tx.init([torch.zeros(2)]))[0]
        [tensor([0.2000, 1.4000])]
    """
    check_range(0, float("inf"), above=True, threshold=threshold)

    def rule(g, gg, n, threshold):
        return g / (rms(gg, n) / threshold).clamp(min=1)

    sums = {"gg": lambda g: g.square().sum(), "n": lambda g: g.numel()}
    return leafwise(rule, hyper={"threshold": threshold}, sums=sums)


@transformation
def clip_by_global_norm(max_norm: Scalar) -> GradientTransformation:
    """Scale all updates by ``min(1, max_norm / norm)``.

    The norm is the 2-norm of all updates together; inside of `partition` it is that of the group.
    Zero updates stay zero. No epsilon is added, so updates with a smaller norm pass unchanged
    (``torch.nn.utils.clip_grad_norm_`` adds 1e-6).

    Args:
        max_norm: greater than 0. A tensor may be 0; then all updates become 0.

    Raises:
        ValueError: `max_norm` is 0, negative or NaN.

    Source: Pascanu, Mikolov & Bengio, "On the difficulty of training recurrent neural networks",
    2013, alg. 1.

    Example:
        >>> import torch, functorch_opt as fo
        >>> tx = fo.clip_by_global_norm(1.0)
        >>> tx.update([torch.tensor([3.0, 4.0])], tx.init([torch.zeros(2)]))[0]
        [tensor([0.6000, 0.8000])]
    """
    check_range(0, float("inf"), above=True, max_norm=max_norm)

    def prepare(updates, max_norm):
        norm = tree.norm(updates)
        max_norm = torch.as_tensor(max_norm, dtype=norm.dtype, device=norm.device)
        larger = torch.maximum(norm, max_norm)
        # If `max_norm` is a tensor of 0 and all updates are 0, both are 0. The factor must be 0
        # then, and not the NaN of 0 / 0.
        return {"factor": max_norm / torch.where(larger == 0, 1.0, larger)}

    return leafwise(lambda g, factor: g * factor, prepare, hyper={"max_norm": max_norm})
