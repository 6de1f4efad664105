"""Clipping of each element, or by a norm: of units, of tensors, of all updates together.

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

__all__ = ["adaptive_grad_clip", "clip", "clip_by_block_rms", "clip_by_global_norm"]


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


def _unit_dims(shape):
    """The dims over which the norm of a unit is taken: all but the first, that of outputs.

    A tensor with one dim at most, but for dims of size 1, is one unit.
    """
    is_vector = sum(n != 1 for n in shape) <= 1
    return tuple(range(0 if is_vector else 1, len(shape)))


def _unit_norm(x, axis):
    dims = _unit_dims(x.shape) if axis is None else axis
    square = (x * x.conj()).real
    if dims != ():  # torch's sum over no dims is over all
        square = square.sum(dims, keepdim=True)
    return (square + tree.TINY).sqrt()  # at 0 the derivative of the root is infinite


@transformation
def adaptive_grad_clip(
    clipping: Scalar, eps: Scalar = 1e-3, axis: int | tuple[int, ...] | None = None
) -> GradientTransformation:
    """Scale each unit by ``min(1, clipping max(|p|, eps) / |u|)``: steps in proportion to weights.

    The units of a weight are its rows, or its output channels: what remains where the first index
    is fixed, for torch's weights are ``[out, in, ...]``. (JAX's are ``[..., in, out]``: optax takes
    norms over the dims before the last, and of three dims over the first.) A tensor with one dim at
    most, but for dims of size 1, is one unit.

    Args:
        clipping: the largest ratio of the norms, 0 or greater.
        eps: a smaller norm of the parameters counts as this one; 0 or greater.
        axis: the dims over which norms are taken, of every tensor; by default as above.

    Raises:
        ValueError: an argument outside its range; ``update`` called without params.
        IndexError: a tensor has no such dim.

    Source: Brock, De, Smith & Simonyan, "High-Performance Large-Scale Image Recognition Without
    Normalization", 2021, eq. 3.

    Example:
        >>> import torch, functorch_opt as fo
        >>> tx, params = fo.adaptive_grad_clip(0.1), [torch.tensor([[3.0, 4.0], [3.0, 4.0]])]
        >>> tx.update([torch.tensor([[6.0, 8.0], [0.1, 0.2]])], tx.init(params), params)[0]
        [tensor([[0.3000, 0.4000],
                [0.1000, 0.2000]])]
    """
    check_range(0, float("inf"), clipping=clipping, eps=eps)

    def rule(g, p, clipping, eps):
        largest = clipping * _unit_norm(p, axis).clamp(min=eps)
        return g * (largest / torch.maximum(largest, _unit_norm(g, axis)))

    hyper = {"clipping": clipping, "eps": eps}
    return leafwise(rule, hyper=hyper, kind="tensorwise")


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
        if not isinstance(max_norm, torch.Tensor):
            target = torch.full_like(norm, max_norm)
            return {"factor": target / norm.clamp(min=max_norm)}
        max_norm = max_norm.to(norm.dtype)
        larger = torch.maximum(norm, max_norm)
        # If `max_norm` is a tensor of 0 and all updates are 0, both are 0. The factor must be 0
        # then, and not the NaN of 0 / 0.
        divisor = torch.where(larger == 0, 1.0, larger)
        return {"factor": max_norm / divisor}

    return leafwise(lambda g, factor: g * factor, prepare, hyper={"max_norm": max_norm})
