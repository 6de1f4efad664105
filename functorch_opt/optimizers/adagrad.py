"""Gradients divided by the root of an average of their squares.

The average is the sum (Adagrad), a running mean (RMSprop), or a ratio of two (Adadelta).

Sources: Duchi, Hazan & Singer, "Adaptive Subgradient Methods for Online Learning and Stochastic
Optimization", 2011. Tieleman & Hinton, "Lecture 6.5: RMSProp", 2012; Graves, "Generating Sequences
With Recurrent Neural Networks", 2013 (centered). Zeiler, "ADADELTA: An Adaptive Learning Rate
Method", 2012.
"""

from __future__ import annotations

import torch

from functorch_opt import tree
from functorch_opt._core.chain import chain
from functorch_opt._core.groups import MaskOrFn
from functorch_opt._core.rule import leafwise
from functorch_opt._core.transformation import (
    GradientTransformation,
    ScalarOrSchedule,
    check_range,
    transformation,
)
from functorch_opt.transforms.decay import add_decayed_weights
from functorch_opt.transforms.momentum import trace
from functorch_opt.transforms.scale import scale_by_learning_rate

__all__ = [
    "adadelta",
    "adagrad",
    "rmsprop",
    "scale_by_adadelta",
    "scale_by_rms",
    "scale_by_rss",
    "scale_by_stddev",
]


def constant_like(value):
    """A function that makes a slot of `value`, a number or a tensor, in both parts if complex."""

    def start(p):
        return tree.zeros_like(p) + (value * (1 + 1j) if p.is_complex() else value)

    return start


def _by_root(g, square, eps, eps_in_sqrt):
    return (
        g * (square + (eps + tree.TINY)).rsqrt()
        if eps_in_sqrt
        else g / ((square + tree.TINY).sqrt() + eps)
    )


def _weights(bias_correction):
    """What the running means need once a step.

    It is the weight of the new value, and the correction for the start at 0.
    """

    def prepare(decay):
        return {"weight": 1 - decay, "correction": 1.0}

    def prepare_corrected(decay, count):
        return {
            "weight": 1 - decay,
            "correction": 1 / (1 - decay ** tree.as_real(count + 1)),
        }

    return prepare_corrected if bias_correction else prepare


@transformation
def scale_by_rms(
    decay: ScalarOrSchedule = 0.9,
    eps: ScalarOrSchedule = 1e-8,
    initial_scale: float = 0.0,
    eps_in_sqrt: bool = True,
    bias_correction: bool = False,
) -> GradientTransformation:
    """``nu = decay nu + (1 - decay) g^2``; ``u = g / sqrt(nu + eps)``.

    Args:
        decay: in [0, 1).
        eps: 0 or greater.
        initial_scale: first value of ``nu``.
        eps_in_sqrt: whether eps is inside of the root. If False, ``u = g / (sqrt(nu) + eps)``, as
            in torch.
        bias_correction: whether to divide ``nu`` by ``1 - decay^t``.

    Source: Tieleman & Hinton, 2012.

    Example:
        >>> import torch, functorch_opt as fo
        >>> tx = fo.scale_by_rms(decay=0.75, eps=0.0)
        >>> tx.update([torch.tensor(3.0)], tx.init([torch.tensor(0.0)]))[0]
        [tensor(2.)]
    """
    check_range(0, 1, decay=decay)
    check_range(0, float("inf"), eps=eps, initial_scale=initial_scale)

    def rule(g, nu, weight, eps, correction):
        nu = torch.lerp(nu, g * g, weight)
        u = _by_root(g, nu * correction, eps, eps_in_sqrt)
        return u, {"nu": nu}

    slots = {"nu": constant_like(initial_scale)}
    return leafwise(
        rule, _weights(bias_correction), slots=slots, hyper={"decay": decay, "eps": eps}
    )


@transformation
def scale_by_stddev(
    decay: ScalarOrSchedule = 0.9,
    eps: ScalarOrSchedule = 1e-8,
    initial_scale: float = 0.0,
    eps_in_sqrt: bool = True,
    bias_correction: bool = False,
) -> GradientTransformation:
    """`scale_by_rms`, centered: ``u = g / sqrt(nu - mu^2 + eps)``.

    Here ``mu = decay mu + (1 - decay) g`` is the running mean of the gradient.

    The arguments are those of `scale_by_rms`. The bias correction divides ``mu`` as well.

    Source: Graves, 2013, eqs. 38-40.

    Example:
        >>> import functorch_opt as fo
        >>> fo.scale_by_stddev(decay=0.99)
        scale_by_stddev(decay=0.99)
    """
    check_range(0, 1, decay=decay)
    check_range(0, float("inf"), eps=eps, initial_scale=initial_scale)

    def rule(g, mu, nu, weight, eps, correction):
        mu = torch.lerp(mu, g, weight)
        nu = torch.lerp(nu, g * g, weight)
        # At the first step the variance is 0, and rounding may make it negative.
        variance = (nu * correction - (mu * correction) ** 2).clamp(min=0)
        return _by_root(g, variance, eps, eps_in_sqrt), {"mu": mu, "nu": nu}

    slots = {"mu": tree.zeros_like, "nu": constant_like(initial_scale)}
    return leafwise(
        rule, _weights(bias_correction), slots=slots, hyper={"decay": decay, "eps": eps}
    )


@transformation
def scale_by_rss(
    initial_accumulator_value: float = 0.1,
    eps: ScalarOrSchedule = 1e-7,
    *,
    eps_in_sqrt: bool = True,
) -> GradientTransformation:
    """``sum = sum + g^2``; ``u = g / sqrt(sum + eps)``, which is 0 where the sum is 0.

    Args:
        initial_accumulator_value: first value of the sum, 0 or greater.
        eps: 0 or greater.
        eps_in_sqrt: whether eps is inside of the root. If False, ``u = g / (sqrt(sum) + eps)``, as
            in torch.

    Source: Duchi, Hazan & Singer, 2011, fig. 1 (diagonal).

    Example:
        >>> import torch, functorch_opt as fo
        >>> tx = fo.scale_by_rss(initial_accumulator_value=16.0, eps=0.0)
        >>> tx.update([torch.tensor(3.0)], tx.init([torch.tensor(0.0)]))[0]
        [tensor(0.6000)]
    """
    check_range(
        0, float("inf"), initial_accumulator_value=initial_accumulator_value, eps=eps
    )

    def rule(g, sum, eps):
        sum = sum + g * g
        return _by_root(g, sum, eps, eps_in_sqrt), {"sum": sum}

    return leafwise(
        rule, slots={"sum": constant_like(initial_accumulator_value)}, hyper={"eps": eps}
    )


@transformation
def scale_by_adadelta(
    rho: ScalarOrSchedule = 0.9, eps: ScalarOrSchedule = 1e-6
) -> GradientTransformation:
    """``u = g sqrt(e_x + eps) / sqrt(e_g + eps)``.

    ``e_g`` is the running mean of ``g^2``, and ``e_x`` that of ``u^2``.

    Args:
        rho: decay of both means, in [0, 1).
        eps: greater than 0; otherwise nothing would ever move.

    Source: Zeiler, 2012, alg. 1.

    Example:
        >>> import functorch_opt as fo
        >>> fo.scale_by_adadelta(rho=0.95)
        scale_by_adadelta(rho=0.95)
    """
    check_range(0, 1, rho=rho)
    check_range(0, float("inf"), above=True, eps=eps)

    def prepare(rho):
        return {"weight": 1 - rho}

    def rule(g, e_g, e_x, weight, eps):
        e_g = torch.lerp(e_g, g * g, weight)
        inside = eps + tree.TINY
        u = g * (e_x + inside).sqrt() / (e_g + inside).sqrt()
        return u, {"e_g": e_g, "e_x": torch.lerp(e_x, u * u, weight)}

    return leafwise(
        rule,
        prepare,
        slots={"e_g": tree.zeros_like, "e_x": tree.zeros_like},
        hyper={"rho": rho, "eps": eps},
    )


# ---- ready-made ----------------------------------------------------------------------------------


@transformation
def rmsprop(
    learning_rate: ScalarOrSchedule,
    decay: ScalarOrSchedule = 0.9,
    eps: ScalarOrSchedule = 1e-8,
    initial_scale: float = 0.0,
    eps_in_sqrt: bool = True,
    centered: bool = False,
    momentum: ScalarOrSchedule | None = None,
    nesterov: bool = False,
    bias_correction: bool = False,
) -> GradientTransformation:
    """RMSprop: `scale_by_rms` (or `scale_by_stddev`), then the learning rate.

    If a momentum is given, `trace` follows.

    Args:
        learning_rate: 0 or greater, or a schedule. It acts before the momentum, as in optax; in
            torch.optim.RMSprop it acts after it.
        decay, eps, initial_scale, eps_in_sqrt, bias_correction: see `scale_by_rms`.
            torch.optim.RMSprop has a decay of 0.99, and eps outside of the root.
        centered: whether to divide by the standard deviation, with `scale_by_stddev`.
        momentum: decay of the trace. With None no trace is kept.
        nesterov: see `trace`.

    Source: Tieleman & Hinton, 2012; Graves, 2013, eqs. 38-41.

    Example:
        >>> import functorch_opt as fo
        >>> fo.rmsprop(0.01, centered=True)
        rmsprop(0.01, centered=True)
    """
    root = (scale_by_stddev if centered else scale_by_rms)(
        decay, eps, initial_scale, eps_in_sqrt, bias_correction
    )
    check_range(0, float("inf"), momentum=momentum)
    step = scale_by_learning_rate(learning_rate)
    return (
        chain(root, step)
        if momentum is None
        else chain(root, step, trace(momentum, nesterov))
    )


@transformation
def adagrad(
    learning_rate: ScalarOrSchedule,
    initial_accumulator_value: float = 0.1,
    eps: ScalarOrSchedule = 1e-7,
) -> GradientTransformation:
    """Adagrad: `scale_by_rss`, then the learning rate.

    Args:
        learning_rate: 0 or greater, or a schedule.
        initial_accumulator_value, eps: see `scale_by_rss`. torch.optim.Adagrad has 0 and 1e-10, and
            eps outside of the root.

    Source: Duchi, Hazan & Singer, 2011, fig. 1 (diagonal).

    Example:
        >>> import functorch_opt as fo
        >>> fo.adagrad(0.1)
        adagrad(0.1)
    """
    return chain(
        scale_by_rss(initial_accumulator_value, eps),
        scale_by_learning_rate(learning_rate),
    )


@transformation
def adadelta(
    learning_rate: ScalarOrSchedule | None = None,
    rho: ScalarOrSchedule = 0.9,
    eps: ScalarOrSchedule = 1e-6,
    weight_decay: ScalarOrSchedule = 0.0,
    weight_decay_mask: MaskOrFn | None = None,
) -> GradientTransformation:
    """Adadelta: L2 regularization, `scale_by_adadelta`, then the learning rate.

    Args:
        learning_rate: 0 or greater, or a schedule. None, as in optax, scales nothing and **flips no
            sign**. The paper has 1.0.
        rho, eps: see `scale_by_adadelta`.
        weight_decay: of the L2 term, which enters the means; 0 or greater.
        weight_decay_mask: which parameters decay, see `masked`; by default all.

    Source: Zeiler, 2012, alg. 1.

    Example:
        >>> import functorch_opt as fo
        >>> fo.adadelta(1.0)
        adadelta(1.0)
    """
    return chain(
        add_decayed_weights(weight_decay, weight_decay_mask),
        scale_by_adadelta(rho, eps),
        scale_by_learning_rate(learning_rate),
    )
