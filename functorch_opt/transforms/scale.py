"""Multiplication, and other simple stages that change one update at a time.

Their formulas are ``u -> s u``, ``u |p|``, ``u / |u|``, ``sign u``, ``0`` and ``u - mean u``.
"""

from __future__ import annotations

import torch

from functorch_opt import tree
from functorch_opt._core import numerics
from functorch_opt._core.rule import identity, leafwise
from functorch_opt._core.transformation import (
    GradientTransformation,
    Scalar,
    ScalarOrSchedule,
    check_range,
    transformation,
)
from functorch_opt.schedules.schedule import Schedule

__all__ = [
    "centralize",
    "normalize",
    "normalize_by_update_norm",
    "scale",
    "scale_by_learning_rate",
    "scale_by_param_block_norm",
    "scale_by_param_block_rms",
    "scale_by_param_size",
    "scale_by_schedule",
    "scale_by_sign",
    "set_to_zero",
    "zero_nans",
]


@transformation
def scale(step_size: Scalar) -> GradientTransformation:
    """``u -> step_size * u``.

    Args:
        step_size: factor; negative to descend.

    Example:
        >>> import torch, functorch_opt as fo
        >>> tx = fo.scale(-0.5)
        >>> tx.update([torch.tensor(2.0)], tx.init([torch.tensor(0.0)]))[0]
        [tensor(-1.)]
    """
    check_range(-float("inf"), float("inf"), step_size=step_size)
    return leafwise(lambda g, step_size: g * step_size, hyper={"step_size": step_size})


@transformation
def scale_by_schedule(step_size_fn: Schedule) -> GradientTransformation:
    """``u -> step_size_fn(count) * u``, where count is 0 at the first update.

    Args:
        step_size_fn: a function of the count; see `functorch_opt.schedules`. It may be negative.

    Raises:
        TypeError: not a function.

    Example:
        >>> import torch, functorch_opt as fo
        >>> tx = fo.scale_by_schedule(fo.linear_schedule(1.0, 0.0, 2))
        >>> state = tx.init([torch.tensor(0.0)])
        >>> _, state = tx.update([torch.tensor(1.0)], state)
        >>> tx.update([torch.tensor(1.0)], state)[0]
        [tensor(0.5000)]
    """
    if not callable(step_size_fn):
        raise TypeError(
            f"scale_by_schedule takes a function of the count; got {step_size_fn!r}. "
            "For a number use scale."
        )
    return leafwise(lambda g, step_size: g * step_size, hyper={"step_size": step_size_fn})


@transformation
def scale_by_learning_rate(
    learning_rate: ScalarOrSchedule | None = None, *, flip_sign: bool = True
) -> GradientTransformation:
    """``u -> -learning_rate * u``: the stage that turns a direction into a step, usually the last.

    Args:
        learning_rate: 0 or greater, or a schedule. None means 1, and that no sign is flipped (as in
            optax).
        flip_sign: whether to descend.

    Raises:
        ValueError: a negative or NaN learning rate.

    Example:
        >>> import torch, functorch_opt as fo
        >>> tx = fo.scale_by_learning_rate(0.1)
        >>> tx.update([torch.tensor(2.0)], tx.init([torch.tensor(0.0)]))[0]
        [tensor(-0.2000)]
    """
    if learning_rate is None:
        return identity()
    check_range(0, float("inf"), learning_rate=learning_rate)
    sign = -1 if flip_sign else 1

    def prepare(learning_rate):
        return {"step_size": sign * learning_rate}

    return leafwise(
        lambda g, step_size: g * step_size,
        prepare,
        hyper={"learning_rate": learning_rate},
    )


def rms(square, n):
    """The root of the mean of squares, from their sum and their number. Of no squares it is 0."""
    # The sum over an empty tensor is divided by 1, as 0 / 0 is NaN. TINY makes the derivative at 0
    # finite; it would be NaN too.
    return (square / (n + (n == 0)) + tree.TINY).sqrt()


@transformation
def scale_by_param_block_rms(min_scale: Scalar = 1e-3) -> GradientTransformation:
    """``u -> u max(RMS(p), min_scale)``, with ``RMS(p) = |p| / sqrt(size of p)`` of each tensor.

    Args:
        min_scale: 0 or greater.

    Raises:
        ValueError: a negative or NaN `min_scale`; ``update`` called without params.

    Source: Shazeer & Stern, "Adafactor: Adaptive Learning Rates with Sublinear Memory Cost", 2018,
    alg. 4.

    Example:
        >>> import torch, functorch_opt as fo
        >>> tx, params = fo.scale_by_param_block_rms(), [torch.tensor([1.0, 7.0])]
        >>> tx.update([torch.tensor([0.1, 0.2])], tx.init(params), params)[0]
        [tensor([0.5000, 1.0000])]
    """
    check_range(0, float("inf"), min_scale=min_scale)

    def rule(g, pp, n, min_scale):
        return g * rms(pp, n).clamp(min=min_scale)

    sums = {"pp": lambda p: p.square().sum(), "n": lambda g: g.numel()}
    return leafwise(rule, hyper={"min_scale": min_scale}, sums=sums)


@transformation
def scale_by_param_block_norm(min_scale: Scalar = 1e-3) -> GradientTransformation:
    """``u -> u max(|p|, min_scale)``, with the 2-norm of each tensor.

    Args:
        min_scale: 0 or greater.

    Raises:
        ValueError: a negative or NaN `min_scale`; ``update`` called without params.

    Source: You, Gitman & Ginsburg, "Large Batch Training of Convolutional Networks", 2017, eq. 6,
    the factor of the parameters.

    Example:
        >>> import torch, functorch_opt as fo
        >>> tx, params = fo.scale_by_param_block_norm(), [torch.tensor([3.0, 4.0])]
        >>> tx.update([torch.tensor([0.1, 0.2])], tx.init(params), params)[0]
        [tensor([0.5000, 1.0000])]
    """
    check_range(0, float("inf"), min_scale=min_scale)

    def rule(g, pp, min_scale):
        return g * rms(pp, 1).clamp(min=min_scale)

    sums = {"pp": lambda p: p.square().sum()}
    return leafwise(rule, hyper={"min_scale": min_scale}, sums=sums)


@transformation
def scale_by_param_size(eta: Scalar = 0.01) -> GradientTransformation:
    """``u -> (|p| + eta) u`` for each element: updates relative to the parameters.

    Args:
        eta: 0 or greater.

    Raises:
        ValueError: negative or NaN `eta`; ``update`` called without params.

    Source: Kwon, Kim, Park & Choi, "ASAM: Adaptive Sharpness-Aware Minimization for Scale-Invariant
    Learning of Deep Neural Networks", 2021, sec. 3; see `asam`.

    Example:
        >>> import torch, functorch_opt as fo
        >>> tx, params = fo.scale_by_param_size(0.5), [torch.tensor([-2.0, 0.0])]
        >>> tx.update([torch.tensor([1.0, 1.0])], tx.init(params), params)[0]
        [tensor([2.5000, 0.5000])]
    """
    check_range(0, float("inf"), eta=eta)
    return leafwise(lambda g, p, eta: (p.abs() + eta) * g, hyper={"eta": eta})


@transformation
def normalize_by_update_norm(
    scale_factor: Scalar = 1.0, eps: Scalar = 1e-6
) -> GradientTransformation:
    """``u -> u * scale_factor / (norm + eps)``, where norm is the 2-norm of all updates together.

    Zero updates stay zero, also where eps is 0. Inside `partition` the norm is that of the group.

    Args:
        scale_factor: the norm of what comes out, less what eps takes; negative to descend.
        eps: 0 or greater.

    Raises:
        ValueError: an argument outside its range.

    Source: Hazan, Levy & Shalev-Shwartz, "Beyond Convexity: Stochastic Quasi-Convex Optimization",
    2015, alg. 1.

    Example:
        >>> import torch, functorch_opt as fo
        >>> tx = fo.normalize_by_update_norm(-1.0)
        >>> tx.update([torch.tensor([3.0, 4.0])], tx.init([torch.zeros(2)]))[0]
        [tensor([-0.6000, -0.8000])]
    """
    check_range(-float("inf"), float("inf"), scale_factor=scale_factor)
    check_range(0, float("inf"), eps=eps)

    def prepare(updates, scale_factor, eps):
        norm = tree.norm(updates)
        divisor = norm.to(numerics.real_dtype(norm.device)) + eps
        return {"factor": scale_factor / torch.where(divisor == 0, 1.0, divisor)}

    return leafwise(
        lambda g, factor: g * factor,
        prepare,
        hyper={"scale_factor": scale_factor, "eps": eps},
    )


@transformation
def normalize() -> GradientTransformation:
    """``u -> u / norm``, where norm is the 2-norm of all updates together; zero updates stay zero.

    Inside `partition` the norm is that of the group.

    Source: optax.contrib.normalize, which makes NaN of zero updates in version 0.2.8.

    Example:
        >>> import torch, functorch_opt as fo
        >>> tx = fo.normalize()
        >>> tx.update([torch.tensor([3.0, 4.0])], tx.init([torch.zeros(2)]))[0]
        [tensor([0.6000, 0.8000])]
        >>> tx.update([torch.zeros(2)], tx.init([torch.zeros(2)]))[0]
        [tensor([0., 0.])]
    """
    return normalize_by_update_norm(eps=0.0)


@transformation
def scale_by_sign() -> GradientTransformation:
    """``u -> sign(u)``; 0 stays 0.

    Source: Bernstein et al., "signSGD: Compressed Optimisation for Non-Convex Problems", 2018, alg.
    1.

    Example:
        >>> import torch, functorch_opt as fo
        >>> tx = fo.scale_by_sign()
        >>> tx.update([torch.tensor([-3.0, 0.0])], tx.init([torch.zeros(2)]))[0]
        [tensor([-1.,  0.])]
    """
    return leafwise(lambda g: torch.sign(g))


@transformation
def set_to_zero() -> GradientTransformation:
    """``u -> 0``: freezes parameters, together with `masked` or `partition`.

    Example:
        >>> import torch, functorch_opt as fo
        >>> tx = fo.set_to_zero()
        >>> tx.update([torch.tensor(2.0)], tx.init([torch.tensor(0.0)]))[0]
        [tensor(0.)]
    """
    return leafwise(lambda g: torch.zeros_like(g))


@transformation
def zero_nans() -> GradientTransformation:
    """``u -> 0`` where u is NaN, u elsewhere (infinities too).

    Example:
        >>> import torch, functorch_opt as fo
        >>> tx = fo.zero_nans()
        >>> tx.update([torch.tensor([float("nan"), 1.0])], tx.init([torch.zeros(2)]))[0]
        [tensor([0., 1.])]
    """
    return leafwise(lambda g: torch.where(torch.isnan(g), torch.zeros_like(g), g))


@transformation
def centralize() -> GradientTransformation:
    """Gradient centralization: subtract its mean from each output's row of a weight.

    The formula is ``u - mean(u, dims 1, 2, ...)``.

    Tensors with fewer than two dims pass unchanged. torch keeps weights as ``[out, in, ...]``, so
    dims 1, 2, ... are those of the paper.

    Source: Yong et al., "Gradient Centralization: A New Optimization Technique for Deep Neural
    Networks", 2020, eq. 1.

    Example:
        >>> import torch, functorch_opt as fo
        >>> tx = fo.centralize()
        >>> tx.update([torch.tensor([[1.0, 3.0]])], tx.init([torch.zeros(1, 2)]))[0]
        [tensor([[-1.,  1.]])]
    """

    def rule(g):
        if g.dim() < 2:
            return g
        columns = tuple(range(1, g.dim()))
        return g - g.mean(dim=columns, keepdim=True)

    return leafwise(rule, kind="tensorwise")
