"""Prodigy made Schedule-Free: neither a learning rate nor a schedule.

    y = p                                        where the gradient is taken: the parameters
    v, s, r, d    as in Prodigy, with z in place of p
    z = z - a weight_decay z - a d g / (sqrt(v) + d eps)                     a has the old d
    x = (1 - c) x + c z                          where to evaluate
    y = (1 - b1) z + b1 x

    c = w / (sum of all w)      w = (largest learning_rate d so far)^weight_lr_power

Only z is kept, since x = z + (y - z) / b1.

Source: Mishchenko & Defazio, "Prodigy: An Expeditiously Adaptive Parameter-Free Learner", 2023;
Defazio et al., "The Road Less Scheduled", 2024; the authors' wrapper, which knows d.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from functorch_opt import tree
from functorch_opt._core.numerics import copied
from functorch_opt._core.rule import Leafwise, leafwise
from functorch_opt._core.transformation import (
    GradientTransformation,
    Scalar,
    ScalarOrSchedule,
    check_range,
    transformation,
)
from functorch_opt.optimizers.prodigy import Estimate, estimated, first_estimate, number
from functorch_opt.optimizers.schedule_free import largest_of

__all__ = ["schedule_free_prodigy"]


@transformation
def schedule_free_prodigy(
    learning_rate: ScalarOrSchedule = 1.0,
    betas: tuple[Scalar, Scalar] = (0.9, 0.999),
    beta3: Scalar | None = None,
    eps: ScalarOrSchedule = 1e-8,
    estim_lr0: Scalar = 1e-6,
    estim_lr_coef: ScalarOrSchedule = 1.0,
    weight_decay: ScalarOrSchedule = 0.0,
    safeguard_warmup: bool = False,
    weight_lr_power: ScalarOrSchedule = 2.0,
    *,
    growth_rate: ScalarOrSchedule | None = None,
) -> GradientTransformation:
    """`prodigy` without a mean, and Schedule-Free around it. Evaluate with `eval_params`.

    The rule is at the top of `functorch_opt.optimizers.schedule_free_prodigy`. There is one d for
    all parameters, ``get(state, "d") * estim_lr0``.

    `schedule_free` around `prodigy` is something else: its weights do not know d, and d is the
    distance of y.

    Args:
        learning_rate: 0 or greater; 1 is the authors'. It is constant, or a warm-up.
        betas: b1, how near to the average the gradient is taken, in (0, 1); and the decay of the
            second moment, in [0, 1).
        beta3, eps, estim_lr0, estim_lr_coef, safeguard_warmup, growth_rate: see `prodigy`.
        weight_decay: decoupled, multiplied by the learning rate and d. It decays z.
        weight_lr_power: power of the largest step size in a weight.

    Raises:
        ValueError: an argument outside its range; ``update`` called without params.

    Source: Mishchenko & Defazio, 2023, and Defazio et al., 2024: ``ScheduleFreeWrapper`` of
    schedulefree 1.4 around ``Prodigy`` of prodigyopt 1.1 without a mean.

    Example:
        >>> import torch, functorch_opt as fo
        >>> tx, params = fo.schedule_free_prodigy(), [torch.tensor([8.0])]
        >>> state = tx.init(params)
        >>> for _ in range(200):
        ...     updates, state = tx.update([2 * params[0]], state, params)
        ...     params = fo.apply_updates(params, updates)
        >>> bool(fo.eval_params(tx, state, params)[0].abs() < 0.1)
        True
    """
    b1, b2 = betas
    b3 = b2**0.5 if beta3 is None else beta3
    check_range(0, 1, above=True, betas=b1)
    check_range(0, 1, betas=b2, beta3=b3)
    check_range(0, float("inf"), learning_rate=learning_rate, eps=eps)
    check_range(0, float("inf"), weight_decay=weight_decay, estim_lr_coef=estim_lr_coef)
    check_range(0, float("inf"), weight_lr_power=weight_lr_power)
    check_range(0, float("inf"), above=True, estim_lr0=estim_lr0)
    hyper = {
        "learning_rate": learning_rate,
        "b1": b1,
        "b2": b2,
        "b3": b3,
        "eps": eps,
        "d0": estim_lr0,
        "coef": estim_lr_coef,
        "weight_decay": weight_decay,
        "power": weight_lr_power,
    }
    if growth_rate is not None:
        check_range(1, float("inf"), growth_rate=growth_rate)
        hyper["growth_rate"] = growth_rate
    return averaged(hyper, safeguard_warmup)


SLOTS: dict[str, Callable[[Tensor], Tensor]] = {
    "z": copied,
    "start": copied,
    "nu": tree.zeros_like,
    "s": tree.zeros_like,
}


def averaged(
    hyper: dict[str, Any], safeguard_warmup: bool, lr: ScalarOrSchedule = 1.0
) -> Leafwise:
    """The rule; `lr` is a factor of the learning rate."""
    of = estimated("growth_rate" in hyper, safeguard_warmup, False)

    def prepare(
        came, size, steps, d, top, r, largest, total,
        d0, learning_rate, b2, b3, coef, power, growth_rate, lr,
    ):  # fmt: skip
        learning_rate = learning_rate * lr
        given = (d0, learning_rate, 0.0, b2, b3, coef, growth_rate)
        now, new = of.prepare(came, size, steps, d, top, r, *given)
        largest = torch.maximum(largest, largest_of(learning_rate) * new["d"])
        w = largest**power
        total = total + w
        c = w / (total + (total == 0))
        new = {**new, "largest": largest, "total": total}
        return {**now, "d_new": now["eps_d"], "c": c}, new

    def rule(
        g, p, z, nu, s, start, d_new, w2, ws, a, c,
        b1, b2, b3, eps, weight_decay,
    ):  # fmt: skip
        nu, s = b2 * nu + w2 * g * g, b3 * s + ws * g
        direction = d_new * g / ((nu + tree.TINY).sqrt() + eps * d_new)
        u = -a * (direction + weight_decay * z)
        moved = c * (z - p) + (1 - b1 * (1 - c)) * u
        return moved, {"z": z + u, "nu": nu, "s": s, "start": start}

    tx = leafwise(
        rule,
        prepare,
        slots=SLOTS,
        shared={**first_estimate(), "largest": number(0), "total": number(0)},
        hyper={"growth_rate": 1.0, **hyper, "lr": lr},
        totals=totals_of(of),
        point=lambda p, z, b1: z + (p - z) / b1,
        last=True,
    )
    # The average is of steps that have been made, and so the factor belongs into the rule.
    tx.with_lr = partial(averaged, hyper, safeguard_warmup)
    return tx


def totals_of(of: Estimate) -> dict[str, Callable[..., Tensor]]:
    """The sums over all parameters, in which each has its own learning rate."""

    def came(g, z, start, steps, d, d0, learning_rate, lr, b1, b2):
        a = of.a(steps, d, d0, learning_rate * lr, b1, b2)
        return a * (g * (start - z)).sum()

    def size(g, s, steps, d, d0, learning_rate, lr, b1, b2, b3):
        return of.size(g, s, steps, d, d0, learning_rate * lr, b1, b2, b3)

    return {"came": came, "size": size}
