"""D-Adaptation: AdamW whose step size is an estimate d of the distance to the solution.

    a  = d learning_rate sqrt(1 - b2^t) / (1 - b1^t)              b3 = sqrt(b2)
    r  = b3 r + (1 - b3) a <g, s / (sqrt(v) + eps)>               over all parameters
    m  = b1 m + (1 - b1) a g
    v  = b2 v + (1 - b2) g^2
    s  = b3 s + (1 - b3) a g
    d' = r / ((1 - b3) sum of all |s|)                            d = d' if it is larger
    p  = p - a weight_decay p - m / (sqrt(v) + eps)

The a of a step has the old d, and r the old s and v.

Source: Defazio & Mishchenko, "Learning-Rate-Free Learning by D-Adaptation", 2023, alg. 5; the
authors' code, with its ``use_bias_correction``.
"""

from __future__ import annotations

import torch

from functorch_opt import tree
from functorch_opt._core.rule import leafwise
from functorch_opt._core.transformation import (
    GradientTransformation,
    Scalar,
    ScalarOrSchedule,
    check_range,
    transformation,
)
from functorch_opt.optimizers.prodigy import no_steps, number

__all__ = ["dadapt_adamw"]


@transformation
def dadapt_adamw(
    learning_rate: ScalarOrSchedule = 1.0,
    betas: tuple[Scalar, Scalar] = (0.9, 0.999),
    eps: ScalarOrSchedule = 1e-8,
    estim_lr0: Scalar = 1e-6,
    weight_decay: ScalarOrSchedule = 0.0,
) -> GradientTransformation:
    """AdamW by D-Adaptation, with one d for all parameters: ``get(state, "d") * estim_lr0``.

    The rule is at the top of `functorch_opt.optimizers.dadapt`. Where all gradients so far are
    zero, d stays; in optax 0.2.8 it becomes NaN.

    Args:
        learning_rate: 0 or greater; 1 is the authors'. A schedule that falls to 0 is usual.
        betas: decays of the mean and of the second moment, in [0, 1).
        eps: added to the root, greater than 0.
        estim_lr0: the first d, greater than 0.
        weight_decay: decoupled, multiplied by a.

    Raises:
        ValueError: an argument outside its range; ``update`` called without params.

    Source: Defazio & Mishchenko, 2023, alg. 5, and the authors' code: ``DAdaptAdam`` of dadaptation
    3.2 with ``decouple`` and ``use_bias_correction``.

    Example:
        >>> import torch, functorch_opt as fo
        >>> tx, params = fo.dadapt_adamw(), [torch.tensor([8.0])]
        >>> state = tx.init(params)
        >>> for _ in range(400):
        ...     updates, state = tx.update([2 * params[0]], state, params)
        ...     params = fo.apply_updates(params, updates)
        >>> bool(params[0].abs() < 1.0)
        True
    """
    b1, b2 = betas
    for beta in betas:
        check_range(0, 1, betas=beta)
    check_range(0, float("inf"), learning_rate=learning_rate, weight_decay=weight_decay)
    check_range(0, float("inf"), above=True, eps=eps, estim_lr0=estim_lr0)

    hyper = {"learning_rate": learning_rate, "b1": b1, "b2": b2, "eps": eps}
    return with_estimate({**hyper, "d0": estim_lr0, "weight_decay": weight_decay})


def with_estimate(hyper: dict[str, ScalarOrSchedule]) -> GradientTransformation:
    """The rule; ``d`` is kept as a multiple of d0, which may be a tensor that is mapped over."""

    def step_size(steps, d, d0, learning_rate, b1, b2):
        t = tree.as_real(steps + 1)
        return d * d0 * learning_rate * (1 - b2**t) ** 0.5 / (1 - b1**t)

    def came(g, s, nu, eps, steps, d, d0, learning_rate, b1, b2):
        a = step_size(steps, d, d0, learning_rate, b1, b2)
        return a * (g * s / ((nu + tree.TINY).sqrt() + eps)).sum()

    def size(g, s, steps, d, d0, learning_rate, b1, b2):
        b3 = b2**0.5
        a = step_size(steps, d, d0, learning_rate, b1, b2)
        return (b3 * s + (1 - b3) * a * g).abs().sum()

    def prepare(came, size, steps, d, r, d0, learning_rate, b1, b2):
        b3 = b2**0.5
        a = step_size(steps, d, d0, learning_rate, b1, b2)
        r = b3 * r + (1 - b3) * came
        estimate = r / ((1 - b3) * (size + (size == 0))) / d0
        d = torch.where(size > 0, torch.maximum(d, estimate), d)
        return {"a": a, "w1": (1 - b1) * a, "ws": (1 - b3) * a, "b3": b3}, {
            "d": d,
            "r": r,
            "steps": steps + 1,
        }

    def rule(g, p, mu, nu, s, a, w1, ws, b1, b2, b3, eps, weight_decay):
        mu = b1 * mu + w1 * g
        nu = torch.lerp(nu, g * g, 1 - b2)
        s = b3 * s + ws * g
        u = mu / ((nu + tree.TINY).sqrt() + eps)
        return -a * weight_decay * p - u, {"mu": mu, "nu": nu, "s": s}

    return leafwise(
        rule,
        prepare,
        slots=dict.fromkeys(("mu", "nu", "s"), tree.zeros_like),
        shared={"d": number(1), "r": number(0), "steps": no_steps()},
        hyper=hyper,
        totals={"came": came, "size": size},
    )
