"""LARS, LAMB, Fromage: each tensor moves in proportion to its own size, ``u |p| / |u|``.

This allows the large learning rates that large batches need.

Sources: You, Gitman & Ginsburg, "Large Batch Training of Convolutional Networks", 2017 (LARS). You
et al., "Large Batch Optimization for Deep Learning: Training BERT in 76 minutes", 2020 (LAMB).
Bernstein, Vahdat, Yue & Liu, "On the distance between two neural networks and the stability of
learning", 2020 (Fromage).
"""

from __future__ import annotations

import torch
from torch import Tensor

from functorch_opt._core.chain import chain
from functorch_opt._core.groups import MaskOrFn, masked
from functorch_opt._core.rule import leafwise
from functorch_opt._core.transformation import (
    GradientTransformation,
    Scalar,
    ScalarOrSchedule,
    check_range,
    transformation,
)
from functorch_opt.optimizers.adam import scale_by_adam
from functorch_opt.transforms.decay import add_decayed_weights
from functorch_opt.transforms.momentum import trace
from functorch_opt.transforms.scale import scale_by_learning_rate

__all__ = ["fromage", "lamb", "lars", "scale_by_norm_floor", "scale_by_trust_ratio"]

SQUARES = {"pp": lambda p: p.square().sum(), "gg": lambda g: g.square().sum()}
"""The squared norms of a parameter and its update."""


@transformation
def scale_by_trust_ratio(
    min_norm: Scalar = 0.0, trust_coefficient: Scalar = 1.0, eps: Scalar = 0.0
) -> GradientTransformation:
    """``u -> u * trust_coefficient |p| / (|u| + eps)``, with the 2-norms of each tensor.

    If one of the norms is 0, u passes unchanged.

    Args:
        min_norm: a smaller norm counts as this one; 0 or greater.
        trust_coefficient: factor, 0 or greater.
        eps: 0 or greater.

    Raises:
        ValueError: an argument outside its range; ``update`` called without params.

    Source: You, Gitman & Ginsburg, "Large Batch Training of Convolutional Networks", 2017, eq. 6.

    Example:
        >>> import torch, functorch_opt as fo
        >>> tx, params = fo.scale_by_trust_ratio(), [torch.tensor([3.0, 4.0])]
        >>> tx.update([torch.tensor([0.0, 0.1])], tx.init(params), params)[0]
        [tensor([0., 5.])]
    """
    check_range(
        0, float("inf"), min_norm=min_norm, trust_coefficient=trust_coefficient, eps=eps
    )

    def rule(g, pp, gg, min_norm, trust_coefficient, eps):
        p_norm = torch.clamp(_root(pp), min=min_norm)
        g_norm = torch.clamp(_root(gg), min=min_norm)
        either_is_zero = (p_norm == 0) | (g_norm == 0)
        # The divisor is never 0, because the derivative of the value that is not chosen would be
        # NaN.
        divisor = torch.where(either_is_zero, 1.0, g_norm + eps)
        return g * torch.where(either_is_zero, 1.0, trust_coefficient * p_norm / divisor)

    hyper = {"min_norm": min_norm, "trust_coefficient": trust_coefficient, "eps": eps}
    return leafwise(rule, hyper=hyper, sums=SQUARES)


@transformation
def scale_by_norm_floor(
    floor: ScalarOrSchedule = 0.35, rows: bool = False
) -> GradientTransformation:
    """``u -> u max(1, floor |p| / |u|)``: no update is shorter than a share of its parameter.

    In speedruns of small GPTs it takes the place of weight decay, behind an orthogonalized
    momentum: ``chain(scale_by_muon(), scale_by_norm_floor(), scale_by_learning_rate(0.02))``. An
    update of zeros stays zero.

    Args:
        floor: the least ``|u| / |p|``, 0 or greater, or a schedule.
        rows: whether the norms are those of rows, which are everything but the first dim. A tensor
            of fewer than two dims is one row. By default they are those of the whole tensor.

    Raises:
        ValueError: negative or NaN `floor`; ``update`` called without params.

    Source: modded-nanogpt's optimizer track, 2026, "u/w floor" and "RowFloor".

    Example:
        >>> import torch, functorch_opt as fo
        >>> tx, params = fo.scale_by_norm_floor(0.5), [torch.tensor([3.0, 4.0])]
        >>> tx.update([torch.tensor([0.0, 0.1])], tx.init(params), params)[0]
        [tensor([0.0000, 2.5000])]
    """
    check_range(0, float("inf"), floor=floor)

    def factor(pp, gg, floor):
        is_zero = gg == 0
        divisor = torch.where(is_zero, 1.0, _root(gg))
        return torch.where(is_zero, 1.0, (floor * _root(pp) / divisor).clamp(min=1))

    def rule(g, pp, gg, floor):
        return g * factor(pp, gg, floor)

    def rule_of_rows(g, p, floor):
        dims = [*range(1, g.dim())] or None
        pp = p.abs().square().sum(dims, keepdim=True)
        gg = g.abs().square().sum(dims, keepdim=True)
        return g * factor(pp, gg, floor)

    if rows:
        return leafwise(rule_of_rows, hyper={"floor": floor}, kind="tensorwise")
    return leafwise(rule, hyper={"floor": floor}, sums=SQUARES)


def _root(square: Tensor) -> Tensor:
    """The root of `square`, whose derivative at 0 is 0."""
    return torch.where(square == 0, square, torch.where(square == 0, 1.0, square).sqrt())


@transformation
def lamb(
    learning_rate: ScalarOrSchedule,
    b1: ScalarOrSchedule = 0.9,
    b2: ScalarOrSchedule = 0.999,
    eps: ScalarOrSchedule = 1e-6,
    eps_root: ScalarOrSchedule = 0.0,
    weight_decay: ScalarOrSchedule = 0.0,
    mask: MaskOrFn | None = None,
) -> GradientTransformation:
    """LAMB: `scale_by_adam`, decoupled decay, `scale_by_trust_ratio`, then the learning rate.

    Args:
        learning_rate: 0 or greater, or a schedule.
        b1, b2, eps, eps_root: see `scale_by_adam`.
        weight_decay: 0 or greater; part of the update whose norm is taken.
        mask: which parameters decay, see `masked`; by default all.

    Raises:
        ValueError: an argument outside its range; ``update`` called without params.

    Source: You et al., "Large Batch Optimization for Deep Learning: Training BERT in 76 minutes",
    2020, alg. 2, with the identity for phi.

    Example:
        >>> import functorch_opt as fo
        >>> fo.lamb(1e-2, weight_decay=0.01)
        lamb(0.01, weight_decay=0.01)
    """
    return chain(
        scale_by_adam(b1, b2, eps, eps_root),
        add_decayed_weights(weight_decay, mask),
        scale_by_trust_ratio(),
        scale_by_learning_rate(learning_rate),
    )


@transformation
def lars(
    learning_rate: ScalarOrSchedule,
    weight_decay: ScalarOrSchedule = 0.0,
    weight_decay_mask: MaskOrFn = True,
    trust_coefficient: Scalar = 0.001,
    eps: Scalar = 0.0,
    trust_ratio_mask: MaskOrFn = True,
    momentum: ScalarOrSchedule = 0.9,
    nesterov: bool = False,
) -> GradientTransformation:
    """LARS: weight decay, `scale_by_trust_ratio`, the learning rate, and then momentum.

    So the learning rate is inside of the momentum.

    Args:
        learning_rate: 0 or greater, or a schedule.
        weight_decay: 0 or greater; part of the update whose norm is taken.
        weight_decay_mask: which parameters decay, see `masked`. True means all.
        trust_coefficient, eps: see `scale_by_trust_ratio`.
        trust_ratio_mask: which parameters are scaled by their trust ratio, see `masked`. True means
            all.
        momentum: decay of `trace`, 0 or greater.
        nesterov: see `trace`.

    Raises:
        ValueError: an argument outside its range; ``update`` called without params.

    Source: You, Gitman & Ginsburg, "Large Batch Training of Convolutional Networks", 2017, alg. 1.

    Example:
        >>> import functorch_opt as fo
        >>> fo.lars(0.1, weight_decay=1e-4, trust_ratio_mask=lambda path, p: p.ndim > 1)
        lars(0.1, weight_decay=0.0001, trust_ratio_mask=<lambda>)
    """
    check_range(0, float("inf"), momentum=momentum)
    return chain(
        add_decayed_weights(weight_decay, weight_decay_mask),
        masked(
            scale_by_trust_ratio(trust_coefficient=trust_coefficient, eps=eps),
            trust_ratio_mask,
        ),
        scale_by_learning_rate(learning_rate),
        trace(momentum, nesterov),
    )


@transformation
def step_and_shrink(learning_rate) -> GradientTransformation:
    """``p + u = (p - eta g) / sqrt(1 + eta^2)``.

    So weights keep their size where g is as long as p and at right angles to it.
    """
    check_range(0, float("inf"), learning_rate=learning_rate)

    def prepare(learning_rate):
        shrink = (1 + learning_rate**2) ** -0.5
        return {"step": shrink * learning_rate, "loss": 1 - shrink}

    hyper = {"learning_rate": learning_rate}
    return leafwise(lambda g, p, step, loss: -step * g - loss * p, prepare, hyper=hyper)


@transformation
def fromage(
    learning_rate: ScalarOrSchedule, min_norm: Scalar = 1e-6
) -> GradientTransformation:
    """Fromage: ``p -> (p - learning_rate g |p| / |g|) / sqrt(1 + learning_rate^2)``.

    It is `scale_by_trust_ratio`, the learning rate, and the shrinking that keeps weights from
    growing with every step.

    Args:
        learning_rate: 0 or greater, or a schedule.
        min_norm: a smaller norm counts as this one; 0 or greater.

    Raises:
        ValueError: an argument outside its range; ``update`` called without params.

    Source: Bernstein, Vahdat, Yue & Liu, 2020, alg. 1.

    Example:
        >>> import torch, functorch_opt as fo
        >>> tx, params = fo.fromage(0.75), [torch.tensor([5.0, 0.0])]
        >>> updates, _ = tx.update([torch.tensor([0.0, 2.0])], tx.init(params), params)
        >>> fo.apply_updates(params, updates)
        [tensor([ 4., -3.])]
    """
    return chain(scale_by_trust_ratio(min_norm), step_and_shrink(learning_rate))
