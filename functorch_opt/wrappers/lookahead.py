"""Lookahead: fast weights run ahead, and slow weights follow them every few steps."""

from __future__ import annotations

from typing import Any

import torch

from functorch_opt import tree
from functorch_opt._core.decision import chosen, known
from functorch_opt._core.transformation import (
    GradientTransformation,
    ScalarOrSchedule,
    check_range,
    transformation,
)
from functorch_opt._core.wrap import wrap

__all__ = ["lookahead"]


@transformation
def lookahead(
    fast_optimizer: GradientTransformation,
    sync_period: int,
    slow_step_size: ScalarOrSchedule,
    reset_state: bool = False,
) -> GradientTransformation:
    """Every k steps the slow weights move towards the fast ones, which then start again from there.

        p' = p + fast(g)                       the fast weights: the parameters
        every k-th step:  s' = s + a (p' - s)  the slow weights, a slot; and p' = s'

    Evaluate with the slow weights, which `eval_params` reads out of the state. The wrapper looks at
    the new parameters, so it comes last in a chain.

    Args:
        fast_optimizer: the optimizer of the fast weights.
        sync_period: k, 1 or greater.
        slow_step_size: a, in [0, 1], or a schedule.
        reset_state: whether `fast_optimizer` begins with a new state after each k-th step, also
            with its counts. A compiled step runs this eagerly, and says so.

    Raises:
        ValueError: an argument is outside of its range; ``update`` is called without params.
        TypeError: `fast_optimizer` is not a transformation.

    Source: Zhang et al., "Lookahead Optimizer: k steps forward, 1 step back", 2019, alg. 1. optax
    has pairs of parameters, `LookaheadParams`; here the slow ones are in the state.

    Example:
        >>> import torch, functorch_opt as fo
        >>> tx, params = fo.lookahead(fo.sgd(1.0), 2, 0.5), {"w": torch.tensor(0.0)}
        >>> state = tx.init(params)
        >>> for _ in range(2):
        ...     updates, state = tx.update({"w": torch.tensor(-1.0)}, state, params)
        ...     params = fo.apply_updates(params, updates)
        ...     print(params["w"])
        tensor(1.)
        tensor(1.)
    """
    k = sync_period
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ValueError(f"sync_period must be a whole number from 1; got {k!r}.")
    check_range(0, 1, closed=True, slow_step_size=slow_step_size)

    def first(p):
        return p.to(tree.at_least_float32(p.dtype), copy=True)

    def prepare(count, slow_step_size):
        return {"due": count % k == k - 1}

    def after(u, p, slow, due, slow_step_size):
        moved = slow + slow_step_size * (p + u - slow)
        slow = torch.where(due, moved.to(slow.dtype), slow)
        return torch.where(due, slow - p, u), {"slow": slow}

    return wrap(
        beginning_anew(fast_optimizer, k) if reset_state else fast_optimizer,
        slots={"slow": first},
        hyper={"slow_step_size": slow_step_size},
        prepare=prepare,
        after=after,
        point=lambda slow: slow,
        last=True,
    )


def beginning_anew(inner: GradientTransformation, k: int) -> GradientTransformation:
    """`inner`, with a new state after each k-th step."""
    if not isinstance(inner, GradientTransformation):
        raise TypeError(
            "lookahead takes a transformation, e.g. adamw(1e-3); "
            f"got {type(inner).__name__} {inner!r}."
        )

    def init(params):
        return {"count": tree.zero_count(params), "inner": inner.init(params)}

    def update(updates, state, params=None, **extra: Any):
        moved, kept = inner.update(updates, state["inner"], params, **extra)
        due = state["count"] % k == k - 1
        host = known(due)
        if host is not False:
            first = inner.init(params)
            kept = tree.map(lambda x, old: chosen(due, x, old), first, kept)
        return moved, {"count": state["count"] + 1, "inner": kept}

    return GradientTransformation(init, update, extra_args=inner.extra_args)
