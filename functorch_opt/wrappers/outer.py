"""Weights behind the weights: an outer optimizer every few steps, and steps ahead along a mean.

    outer_loop     p' = p + inner(g)
                   every k-th step:  q' = q + outer(q - p') and p' = q'           q: the outer weights

    ema_nesterov   q' = p + inner(g)                              p: where the gradient has been taken
                   l' = decay l + (1 - decay) (q' - q)
                   p' = q' + beta l'                              where the next one will be taken

Sources: Douillard et al., "DiLoCo: Distributed Low-Communication Training of Language Models",
2023, alg. 1; Thérien, Huang, Defazio, Rish & Belilovsky, "MuLoCo: Muon is a Practical Inner
Optimizer for DiLoCo", 2025; Kallusky, Rao, Nandavanam & Shi, "SNOO: Step-K Nesterov Outer
Optimizer", 2025; Yau, Li, Glentis, Boreiko, Wai & Hong, "EMA-Nesterov: Stabilizing Nesterov's
Lookahead for Accelerated Deep Learning Optimization", 2026.
"""

from __future__ import annotations

import torch

from functorch_opt import tree
from functorch_opt._core.chain import chain
from functorch_opt._core.gate import gate
from functorch_opt._core.numerics import copied
from functorch_opt._core.transformation import (
    GradientTransformation,
    ScalarOrSchedule,
    check_range,
    check_whole,
    transformation,
)
from functorch_opt._core.wrap import wrap

__all__ = ["ema_nesterov", "outer_loop"]


@transformation
def outer_loop(
    inner: GradientTransformation, outer: GradientTransformation, sync_period: int
) -> GradientTransformation:
    """Every k steps of `inner` their sum is, reversed, a gradient of `outer`, which makes the step.

    The rule is at the top of `functorch_opt.wrappers.outer`. These are outer loops of one worker:

    - SNOO: ``outer_loop(adamw(...), sgd(0.7, momentum=0.5, nesterov=True), 30)``;
    - MuLoCo: ``outer_loop(muon(...), sgd(0.9, momentum=0.8, nesterov=True), 30)``;
    - Reptile: ``outer_loop(sgd(...), sgd(0.5), 5)``, of which `lookahead` has the numbers too.

    Evaluate with the outer weights, which `eval_params` reads out of the state. The wrapper looks at
    the new parameters, so it comes last in a chain.

    Args:
        inner: the optimizer of the steps.
        outer: the optimizer of the outer weights. Its counts and schedules are those of its steps.
        sync_period: k, 1 or greater.

    Raises:
        ValueError: `sync_period` is not a whole number from 1; ``update`` called without params.
        TypeError: `inner` or `outer` is not a transformation.

    Source: Douillard et al., 2023, alg. 1; Kallusky et al., 2025.

    Example:
        >>> import torch, functorch_opt as fo
        >>> tx, params = fo.outer_loop(fo.sgd(1.0), fo.sgd(0.5), 2), torch.tensor(0.0)
        >>> state = tx.init(params)
        >>> for _ in range(2):
        ...     updates, state = tx.update(torch.tensor(-1.0), state, params)
        ...     params = fo.apply_updates(params, updates)
        ...     print(params)
        tensor(1.)
        tensor(1.)
    """
    check_whole(1, sync_period=sync_period)
    for what, tx in (("inner", inner), ("outer", outer)):
        if not isinstance(tx, GradientTransformation):
            raise TypeError(
                f"{what} must be a transformation, e.g. sgd(0.1); "
                f"got {type(tx).__name__} {tx!r}."
            )
    k = sync_period

    def is_due(count):
        return count % k == k - 1

    def before(g, p, kept, due):
        back = (kept - (p + g)).to(g.dtype)
        return torch.where(due, back, g), torch.where(due, kept.to(p.dtype), p)

    def after(u, p, kept, due):
        moved = (kept + u).to(kept.dtype)
        return torch.where(due, moved - p, u), {"kept": torch.where(due, moved, kept)}

    every_k = wrap(
        gate(outer, is_due, otherwise="pass"),
        slots={"kept": copied},
        prepare=lambda count: {"due": is_due(count)},
        before=before,
        after=after,
        point=lambda kept: kept,
        last=True,
    )
    return chain(inner, every_k)


@transformation
def ema_nesterov(
    inner: GradientTransformation,
    beta: ScalarOrSchedule = 0.3,
    decay: ScalarOrSchedule = 0.99,
) -> GradientTransformation:
    """Take gradients ahead of the weights, along the mean of the steps of `inner`.

    The rule is at the top of `functorch_opt.wrappers.outer`. The parameters are where the next
    gradient is taken, and the steps ahead stay. `eval_params` gives q, the weights before the last
    step ahead. The wrapper looks at the new parameters, so it comes last in a chain.

    Args:
        inner: any optimizer.
        beta: how far ahead, 0 or greater. With a schedule, that of count t is for the step ahead
            after t + 1 steps; let it be 0 during a warmup and at the end, and otherwise in proportion
            to the learning rate.
        decay: of the mean of steps, in [0, 1).

    Raises:
        ValueError: an argument outside its range; ``update`` called without params.
        TypeError: `inner` is not a transformation.

    Source: Yau et al., 2026.

    Example:
        >>> import torch, functorch_opt as fo
        >>> tx, params = fo.ema_nesterov(fo.sgd(1.0), 0.5, 0.5), torch.tensor(0.0)
        >>> state = tx.init(params)
        >>> for _ in range(2):
        ...     updates, state = tx.update(torch.tensor(-1.0), state, params)
        ...     params = fo.apply_updates(params, updates)
        >>> params, fo.eval_params(tx, state, params)
        (tensor(2.6875), tensor(2.2500))
    """
    check_range(0, float("inf"), beta=beta)
    check_range(0, 1, decay=decay)

    def after(u, p, behind, lead, beta, decay):
        new = (p + u).to(behind.dtype)
        lead = decay * lead + (1 - decay) * (new - behind)
        return u + beta * lead, {"behind": new, "lead": lead}

    return wrap(
        inner,
        slots={"behind": copied, "lead": tree.zeros_like},
        hyper={"beta": beta, "decay": decay},
        after=after,
        point=lambda behind: behind,
        last=True,
    )
