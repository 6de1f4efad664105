"""Prodigy: Adam whose step size grows with an estimate d of the distance to the solution.

    a  = d learning_rate bias                       bias = 1, or sqrt(1 - b2^t) / (1 - b1^t)
    m  = b1 m + (1 - b1) d g
    v  = b2 v + (1 - b2) (d g)^2
    s  = b3 s + (d/d0) a g
    r  = b3 r + (d/d0) sum of a <g, first p - p>    over all parameters
    d' = coef r / (sum of all |s|)                  d = d' if it is larger, with the bounds below
    p  = p - a weight_decay p - a m / (sqrt(v) + d eps)

The first two lines have the old d, and the last one has the new d beside eps only.

Source: Mishchenko & Defazio, "Prodigy: An Expeditiously Adaptive Parameter-Free Learner", 2023; the
authors' code.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functorch_opt import tree
from functorch_opt._core.groups import MaskOrFn, masked
from functorch_opt._core.numerics import copied
from functorch_opt._core.rule import identity, leafwise
from functorch_opt._core.transformation import (
    GradientTransformation,
    Scalar,
    ScalarOrSchedule,
    check_range,
    transformation,
)

__all__ = ["prodigy"]


@transformation
def prodigy(
    learning_rate: ScalarOrSchedule = 1.0,
    betas: tuple[Scalar, Scalar] = (0.9, 0.999),
    beta3: Scalar | None = None,
    eps: ScalarOrSchedule = 1e-8,
    estim_lr0: Scalar = 1e-6,
    estim_lr_coef: ScalarOrSchedule = 1.0,
    weight_decay: ScalarOrSchedule = 0.0,
    safeguard_warmup: bool = False,
    weight_decay_mask: MaskOrFn | None = None,
    *,
    growth_rate: ScalarOrSchedule | None = None,
    use_bias_correction: bool = False,
) -> GradientTransformation:
    """Prodigy, with one d for all parameters. ``get(state, "d") * estim_lr0`` is the d.

    The rule is at the top of `functorch_opt.optimizers.prodigy`. The numbers are the authors', and
    not those of optax 0.2.8. A d that is still ``estim_lr0`` may grow at once; a later one grows at
    most by `growth_rate`. For a d for each group, give each its own by `partition`.

    In groups with other learning rates each has its own a. One with a rate of 0 rests, and says
    nothing of d. The authors' code takes no other rates than one and 0.

    Args:
        learning_rate: 0 or greater; 1 is the authors'. A schedule that falls to 0 is usual.
        betas: decays of the mean and of the second moment, in [0, 1).
        beta3: decay of s and r, in [0, 1); by default the root of the second decay.
        eps: added to the root, times d; 0 or greater.
        estim_lr0: the first d, greater than 0.
        estim_lr_coef: multiplies the estimate.
        weight_decay: decoupled, multiplied by the learning rate and d.
        safeguard_warmup: leave the learning rate out of s, for a long warm-up.
        weight_decay_mask: which parameters decay, see `masked`; by default all.
        growth_rate: how many times larger d may become in one step, 1 or greater; by default there
            is no bound.
        use_bias_correction: as in Adam.

    Raises:
        ValueError: an argument outside its range; ``update`` called without params.

    Source: Mishchenko & Defazio, 2023, the authors' code. Where the first decay is 0, theirs
    multiplies the gradient by the new d, and not by the old one as for every other decay.

    Example:
        >>> import torch, functorch_opt as fo
        >>> tx, params = fo.prodigy(), [torch.tensor([8.0])]
        >>> state = tx.init(params)
        >>> for _ in range(200):
        ...     updates, state = tx.update([2 * params[0]], state, params)
        ...     params = fo.apply_updates(params, updates)
        >>> bool(params[0].abs() < 0.01)
        True
    """
    b1, b2 = betas
    b3 = b2**0.5 if beta3 is None else beta3
    for beta in (b1, b2, b3):
        check_range(0, 1, betas=beta)
    if growth_rate is not None:
        check_range(1, float("inf"), growth_rate=growth_rate)
    check_range(0, float("inf"), learning_rate=learning_rate, eps=eps)
    check_range(0, float("inf"), weight_decay=weight_decay, estim_lr_coef=estim_lr_coef)
    check_range(0, float("inf"), above=True, estim_lr0=estim_lr0)
    hyper = {"learning_rate": learning_rate, "b1": b1, "b2": b2, "b3": b3, "eps": eps}
    hyper |= {"d0": estim_lr0, "coef": estim_lr_coef, "weight_decay": weight_decay}
    hyper |= {} if growth_rate is None else {"growth_rate": growth_rate}
    return with_estimate(hyper, safeguard_warmup, use_bias_correction, weight_decay_mask)


class Estimate(NamedTuple):
    """How d is found. All are functions; ``d`` is kept as a multiple of d0."""

    a: Callable[..., Any]
    """The step size of a parameter."""
    size: Callable[..., Any]
    """The sum of ``|s|``."""
    prepare: Callable[..., Any]
    """What is worked out once a step: d and the weights."""


def estimated(
    bounded: bool, safeguard_warmup: bool, use_bias_correction: bool
) -> Estimate:
    """The functions that Prodigy and Schedule-Free Prodigy have in common."""

    def step_size(steps, d, d0, learning_rate, b1, b2):
        t = tree.as_real(steps + 1)
        bias = (1 - b2**t) ** 0.5 / (1 - b1**t) if use_bias_correction else 1.0
        return d * d0 * learning_rate * bias

    def weight_of_s(steps, d, d0, learning_rate, b1, b2):
        if safeguard_warmup:
            return d * d * d0 * (learning_rate != 0)
        return d * step_size(steps, d, d0, learning_rate, b1, b2)

    def size(g, s, steps, d, d0, learning_rate, b1, b2, b3):
        return (b3 * s + weight_of_s(steps, d, d0, learning_rate, b1, b2) * g).abs().sum()

    def with_bound(d, top, estimate, growth_rate):
        first = torch.where(d == 1, torch.maximum(d, estimate), d)
        return torch.minimum(top, first * growth_rate)

    def prepare(
        came, size, steps, d, top, r, d0, learning_rate, b1, b2, b3, coef, growth_rate
    ):
        given = (steps, d, d0, learning_rate, b1, b2)
        a, ws = step_size(*given), weight_of_s(*given)
        weights = {"w1": (1 - b1) * d * d0, "w2": (1 - b2) * (d * d0) ** 2, "ws": ws}
        r = b3 * r + d * came
        estimate = torch.where(size > 0, coef * r / (size + (size == 0)) / d0, d)
        top = torch.maximum(top, estimate)
        d = with_bound(d, top, estimate, growth_rate) if bounded else top.clone()
        new = {"d": d, "top": top, "r": r, "steps": steps + 1}
        return {**weights, "a": a, "eps_d": d * d0}, new

    return Estimate(step_size, size, prepare)


def of_masked(prepare: Callable[..., Any], mask: MaskOrFn) -> Callable[..., Any]:
    """`prepare`, which gives each parameter its own decay: none if the mask leaves it out."""
    choice = masked(identity(), mask)

    def prepare_each(
        params,
        weight_decay,
        came,
        size,
        steps,
        d,
        top,
        r,
        d0,
        learning_rate,
        b1,
        b2,
        b3,
        coef,
        growth_rate,
    ):
        now, new = prepare(
            came, size, steps, d, top, r, d0, learning_rate, b1, b2, b3, coef, growth_rate
        )
        ps = tree.flatten(params)[0]
        labels = choice.assigned(params, tree.paths(params), ps, True)
        decays = torch.tensor([float(label == "inner") for label in labels])
        decays = decays.to(device=d.device, dtype=d.dtype)
        return {**now, "weight_decay": weight_decay * decays}, new

    return prepare_each


def with_estimate(
    hyper: dict[str, ScalarOrSchedule],
    safeguard_warmup: bool,
    use_bias_correction: bool,
    weight_decay_mask: MaskOrFn | None,
) -> GradientTransformation:
    """The rule."""
    bounded = "growth_rate" in hyper
    of = estimated(bounded, safeguard_warmup, use_bias_correction)
    prepare = of.prepare
    if weight_decay_mask is not None:
        prepare = of_masked(prepare, weight_decay_mask)

    def came(g, p, start, steps, d, d0, learning_rate, b1, b2):
        a = of.a(steps, d, d0, learning_rate, b1, b2)
        return a * (g * (start - p)).sum()

    def rule(g, p, mu, nu, s, start, w1, w2, ws, a, b1, b2, b3, eps, eps_d, weight_decay):
        mu, nu, s = b1 * mu + w1 * g, b2 * nu + w2 * g * g, b3 * s + ws * g
        u = mu / ((nu + tree.TINY).sqrt() + eps * eps_d) + weight_decay * p
        return -a * u, {"mu": mu, "nu": nu, "s": s, "start": start}

    return leafwise(
        rule,
        prepare,
        slots={**dict.fromkeys(("mu", "nu", "s"), tree.zeros_like), "start": copied},
        shared=first_estimate(),
        hyper={"growth_rate": 1.0, **hyper},
        totals={"came": came, "size": of.size},
    )


def first_estimate() -> dict[str, Tensor]:
    return {"d": number(1), "top": number(1), "r": number(0), "steps": no_steps()}


def no_steps() -> Tensor:
    """How many steps were made: the bias of d is that of all parameters, and so is this count."""
    return torch.zeros((), dtype=torch.int64)


def number(x: int) -> Tensor:
    return torch.full((), x, dtype=torch.float64)
