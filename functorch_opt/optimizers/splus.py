"""SPlus: the sign of the momentum in Shampoo's eigenbasis, and an average of the parameters.

    mu  = b1 mu + (1 - b1) G
    u   = 2 / (n + m) Q_l sign(Q_l' mu Q_r) Q_r'              for a matrix [n, m]
    u   = scale sign(mu)                                      for the rest
    L   = b2 L + (1 - b2) G G',  R = b2 R + (1 - b2) G' G
    p   = p - lr u
    x   = ema x + (1 - ema) p                                 where to evaluate: x / (1 - ema^t)
    p   = (1 - lr weight_decay 2 / (n + m)) p                 and with scale for the rest

After the first update, and after each `frequency`, Q_l and Q_r are the eigenvectors of L and R.
Before, they are 1, and for large dims they stay 1. A matrix with a large dim has the scale of the rest.

Source: Frans, Levine & Abbeel, "A Stable Whitening Optimizer for Efficient Neural Network Training",
2025, alg. 1, and the authors' code.
"""

from __future__ import annotations

import torch

from functorch_opt import tree
from functorch_opt._core.chain import chain
from functorch_opt._core.rule import every, leafwise
from functorch_opt._core.transformation import (
    GradientTransformation,
    ScalarOrSchedule,
    check_range,
    check_whole,
    transformation,
)
from functorch_opt.optimizers.kronecker import (
    Cutting,
    failed_slot,
    next_bases,
    next_factors,
    turned,
    turned_back,
)

__all__ = ["scale_by_splus", "splus"]


def _scale(shape, max_size, scale):
    if len(shape) == 2 and max(shape) <= max_size:
        return 2 / max(sum(shape), 1)
    return scale


class _Matrices(Cutting):
    """Only tensors with two dims have factors."""

    def factors(self, shape):
        if len(shape) == 2:
            return super().factors(shape)
        return [[0 for _ in self.dims(shape)]]


@transformation
def scale_by_splus(
    b1: ScalarOrSchedule = 0.9,
    b2: ScalarOrSchedule = 0.999,
    eps: ScalarOrSchedule = 1e-30,
    frequency: int = 100,
    *,
    max_size: int = 10000,
    scale: ScalarOrSchedule = 1e-3,
) -> GradientTransformation:
    """The sign of the momentum in an eigenbasis, scaled by the shape of the matrix.

    The rule is at the top of `functorch_opt.optimizers.splus`. The state is ``mu``, ``factors``,
    ``bases`` (vectors with all matrices of a tensor) and ``failed``: how often a basis could not be
    worked out, so that the last one was kept.

    Args:
        b1: decay of the momentum, in [0, 1).
        b2: decay of the factors, in [0, 1).
        eps: added to the diagonal of the factors, 0 or greater.
        frequency: after how many updates the bases are brought up to date, 1 or more.
        max_size: the largest dim of a matrix that has a basis.
        scale: in place of ``2 / (n + m)`` for tensors with other than two dims, and for those with a
            dim above `max_size`.

    Raises:
        ValueError: an argument outside its range.

    Source: Frans, Levine & Abbeel, 2025, alg. 1, and the authors' code.

    Example:
        >>> import torch, functorch_opt as fo
        >>> tx = fo.scale_by_splus()
        >>> tx.update([torch.tensor([[3.0, -0.1], [0.2, 2.0]])], tx.init([torch.zeros(2, 2)]))[0]
        [tensor([[ 0.5000, -0.5000],
                [ 0.5000,  0.5000]])]
    """
    check_range(0, 1, b1=b1, b2=b2)
    check_range(0, float("inf"), eps=eps, scale=scale)
    check_whole(1, frequency=frequency, max_size=max_size)
    cutting = _Matrices(max_size, count_ones=True)

    def due(count):
        return (count == 1) | ((count > 0) & (count % frequency == 0))

    def work(g, factors, bases, failed, eps):
        new, failed = next_bases(cutting, g.shape, factors, bases, failed.real, True, eps)
        return {"bases": new, "failed": failed}

    def rule(g, mu, factors, bases, failed, w1, b2, w2, scale):
        mu = torch.lerp(mu, g, w1)
        pairs = zip(cutting.taken(bases, g.shape), cutting.cut(mu), strict=True)
        signs = [turned_back(torch.sgn(turned(m, q)), q) for q, m in pairs]
        u = cutting.joined(signs, g) * _scale(g.shape, max_size, scale)
        kept = cutting.kept(next_factors(cutting, g, factors, b2, w2), factors)
        new = {"mu": mu, "factors": kept, "bases": bases.clone()}
        return u, {**new, "failed": failed.real.clone()}

    slots = {"mu": tree.zeros_like, "factors": cutting.zeros(), "bases": cutting.ones}
    return leafwise(
        rule,
        lambda b1, b2: {"w1": 1 - b1, "w2": 1 - b2},
        slots={**slots, "failed": failed_slot},
        hyper={"b1": b1, "b2": b2, "eps": eps, "scale": scale},
        every=every(due, work),
        kind="tensorwise",
    )


@transformation
def step_and_average(
    learning_rate, weight_decay, ema, max_size, scale
) -> GradientTransformation:
    """SPlus's step, its average, and then the decay, which is scaled as the step is."""
    check_range(0, float("inf"), learning_rate=learning_rate, weight_decay=weight_decay)
    check_range(0, 1, ema=ema)

    def prepare(count, learning_rate, weight_decay, ema):
        weight = (1 - ema) / (1 - ema ** tree.as_real(count + 1))
        return {"weight": weight, "decay": learning_rate * weight_decay}

    def rule(g, p, averaged, learning_rate, decay, weight, scale):
        new = p - learning_rate * g
        averaged = torch.lerp(averaged, new, weight)
        shrunk = decay * _scale(g.shape, max_size, scale)
        return -learning_rate * g - shrunk * new, {"averaged": averaged}

    return leafwise(
        rule,
        prepare,
        slots={"averaged": lambda p: p.to(tree.at_least_float32(p.dtype), copy=True)},
        hyper={
            "learning_rate": learning_rate,
            "weight_decay": weight_decay,
            "ema": ema,
            "scale": scale,
        },
        point=lambda averaged: averaged,
        kind="tensorwise",
        last=True,
    )


@transformation
def splus(
    learning_rate: ScalarOrSchedule = 0.1,
    b1: ScalarOrSchedule = 0.9,
    b2: ScalarOrSchedule = 0.999,
    eps: ScalarOrSchedule = 1e-30,
    weight_decay: ScalarOrSchedule = 0.01,
    frequency: int = 100,
    *,
    ema: ScalarOrSchedule = 0.999,
    max_size: int = 10000,
    scale: ScalarOrSchedule = 1e-3,
) -> GradientTransformation:
    """SPlus: `scale_by_splus`, the learning rate, an average, and decay. Evaluate with `eval_params`.

    It looks at the new parameters, so it comes last in a chain. In `fo.optim.Optimizer` give the
    function and the learning rate: the group option ``lr`` of a ready transformation multiplies the
    step, and not the decay, which comes after the average.

    Args:
        learning_rate: 0 or greater, or a schedule.
        b1, b2, eps, frequency, max_size, scale: see `scale_by_splus`.
        weight_decay: multiplied by the learning rate and by the scale of the tensor. As in the
            authors' code the average does not have the decay of this step.
        ema: decay of the average of the parameters, in [0, 1).

    Raises:
        ValueError: an argument outside its range; ``update`` called without params; a stage follows
            in a chain.

    Source: Frans, Levine & Abbeel, 2025, alg. 1, and the authors' code.

    Example:
        >>> import functorch_opt as fo
        >>> fo.splus(0.1, frequency=10)
        splus(0.1, frequency=10)
    """
    direction = scale_by_splus(b1, b2, eps, frequency, max_size=max_size, scale=scale)
    step = step_and_average(learning_rate, weight_decay, ema, max_size, scale)
    return chain(direction, step)
