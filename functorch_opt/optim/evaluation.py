"""What a stateful optimizer evaluates with, put into the parameters for a while."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from functorch_opt import tree
from functorch_opt._core.points import has_point, points
from functorch_opt.optim.contents import leaves_of
from functorch_opt.optim.host import from_card
from functorch_opt.optim.numbers import Groups
from functorch_opt.optim.step import NOTHING, State

if TYPE_CHECKING:
    from functorch_opt.optim.adapter import Optimizer
    from functorch_opt.optim.plan import Plan


def points_in(optimizer: Optimizer) -> dict[Tensor, Tensor]:
    """``{parameter: what to evaluate with}``, for those of an optimizer that have made a step.

    Raises:
        ValueError: nothing in the optimizer averages parameters.
    """
    values: dict[Tensor, Tensor] = {}
    averaging = False
    with torch.no_grad():
        for fixed, groups in optimizer._trained_buckets():
            plan = optimizer._plan(fixed, groups)
            averaging |= has_point(plan.tx)
            values |= points_of(plan, groups, optimizer.state)
    if not averaging:
        raise ValueError(
            "nothing in this optimizer averages the parameters: "
            "put params_ema(decay) last in the chain."
        )
    return values


def points_of(plan: Plan, groups: Groups, state: State) -> dict[Tensor, Tensor]:
    """``{parameter: what to evaluate with}``, for those that have made a step."""
    if not has_point(plan.tx):
        return {}
    plan.numbers.write(groups)
    params = [p for group in groups for p in group["params"]]
    entries = [state.get(p, NOTHING) for p in params]
    first = plan.counts.keys[0]
    moved = [i for i, entry in enumerate(entries) if first in entry]
    if not moved:
        # Two stages for one parameter are an error before the first step too.
        blank = plan.tree([p.detach().to("meta") for p in params])
        points(plan.tx, plan.tx.init(blank), blank)
        return {}
    flat = from_card(plan, leaves_of(plan, entries, moved))
    old = tree.unflatten(plan.spec, flat)
    values = from_card(plan, plan.given([p.detach() for p in params]))
    found = points(plan.tx, old, plan.tree(values))
    by_number = {plan.number[path]: x for path, x in found.items()}
    if plan.replicas:
        taken = plan.replicas.taken([by_number.get(i) for i in range(len(params))])
        by_number = {i: taken[i] for i in by_number}
    return {params[i]: by_number[i] for i in moved if i in by_number}


@contextmanager
def held(values: Mapping[Tensor, Tensor]) -> Iterator[None]:
    """Inside, the parameters have these values; afterwards their own again."""
    own = {p: p.detach().clone() for p in values}
    try:
        _write(values)
        yield
    finally:
        _write(own)


@torch.no_grad()
def _write(values: Mapping[Tensor, Tensor]) -> None:
    for p, value in values.items():
        p.copy_(value)
