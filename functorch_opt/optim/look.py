"""A look at the next step of a stateful optimizer, without making it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from functorch_opt import tree
from functorch_opt.optim.contents import leaves_of
from functorch_opt.optim.host import refuse_on_host
from functorch_opt.optim.numbers import Groups
from functorch_opt.optim.params import refuse_gradient
from functorch_opt.optim.plan import Plan
from functorch_opt.optim.step import State
from functorch_opt.transforms.report import Look, as_number, gathered


def look(optimizer: Any, loss: Any) -> dict[str, Tensor]:
    """The numbers of all groups that have a gradient."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    number = {p: str(i) for i, p in enumerate(params)}
    buckets = []
    for fixed, groups in optimizer._buckets():
        mine = [p for group in groups for p in group["params"]]
        if any(p.grad is not None for p in mine):
            buckets.append((fixed, groups, [number[p] for p in mine]))
    names = distinct([dict(fixed).get("algorithm") for fixed, _, _ in buckets])
    looks = []
    for name, (fixed, groups, numbers) in zip(names, buckets, strict=True):
        plan = optimizer._plan(fixed, groups)
        shown = plan.paths if plan.named else numbers
        called = dict(zip(plan.paths, shown, strict=True))
        of_bucket = Look(called.__getitem__, f"{name}/" if len(buckets) > 1 else "")
        look_at(of_bucket, plan, groups, optimizer.state, loss)
        looks.append(of_bucket)
    rates = {}
    of_groups = distinct([group.get("name") for group in optimizer.param_groups])
    for name, group in zip(of_groups, optimizer.param_groups, strict=True):
        rates[f"lr/{name}"] = as_number(group["lr"]).reshape(())
    return gathered(looks) | rates


def distinct(names: list[Any]) -> list[str]:
    """Names that differ: a number is added to those that do not, and stands for none."""
    found = []
    for i, name in enumerate(names):
        if name is None:
            found.append(str(i))
        elif names.count(name) > 1:
            found.append(f"{name} {i}")
        else:
            found.append(str(name))
    return found


def look_at(
    look: Look,
    plan: Plan,
    groups: Groups,
    state: State,
    loss: Any,
) -> None:
    """Look at what the transformation of a bucket does. Its state is taken out as for a step."""
    refuse_on_host(plan, "report() looks at the whole optimizer")
    plan.numbers.write(groups)
    params = [p for group in groups for p in group["params"]]
    gradients = [p.grad for p in params]
    moved = [i for i, g in enumerate(gradients) if g is not None]
    for i in moved:
        if i in plan.left_out or gradients[i].layout is not torch.strided:
            refuse_gradient(plan.tx.name, plan.paths[i], params[i], gradients[i])
    entries, _, _ = plan.entries(state, params, moved)
    old = tree.unflatten(plan.spec, leaves_of(plan, entries, moved))
    grads = plan.tree(plan.given(gradients))
    values = plan.tree(plan.given([p.detach() for p in params]))
    look.step(plan.tx, grads, old, values, plan._extra(loss, grads))
