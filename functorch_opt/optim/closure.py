"""What a transformation reads beside gradients, as far as a closure provides it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from functorch_opt import tree
from functorch_opt._core.transformation import GradientTransformation
from functorch_opt.optim.evaluation import held
from functorch_opt.optim.numbers import Groups
from functorch_opt.tree import PyTree

if TYPE_CHECKING:
    from functorch_opt.optim.plan import Plan

AGAIN = (
    "Give step a closure, outside of functions that torch compiles: it is called again at other "
    "parameters, and so clears the gradients, calls backward and returns the loss."
)
CURES = {"value": "Give step a closure that returns the loss.", "grad_fn": AGAIN}
FUNCTIONAL = (
    "A closure cannot provide it: call update(updates, state, params, ...) of the "
    "transformation itself."
)

Closure = Callable[[], Any]
GradFn = Callable[[PyTree, int], PyTree]
"""The gradients at other parameters, of the number of the evaluation."""


class Again:
    """A closure that was called, and can be called at other parameters."""

    def __init__(self, loss: Any, closure: Closure, groups: Groups) -> None:
        """`loss` is what it returned, and `groups` has all parameters that it may look at."""
        self.loss = loss
        self.closure = closure
        self.everybody = [p for group in groups for p in group["params"]]

    def grad_fn(self, plan: Plan) -> GradFn:
        """The gradients of the parameters of a plan.

        Raises:
            ValueError: parameters outside of the plan move too, or other ranks own some.
        """
        mine = [p for ref in plan.watched if (p := ref()) is not None]
        if any(p.grad is not None for p in {*self.everybody}.difference(mine)):
            raise ValueError(
                f"{plan.tx!r} evaluates the closure at other parameters, and its groups have other "
                "options that are no numbers, so each would be evaluated by itself. Give all groups "
                "the same, or freeze the others."
            )
        if plan.replicas and plan.replicas.owners:
            raise ValueError(
                f"{plan.tx!r} evaluates the closure at other parameters, which no rank has all of "
                "with owners=True. Leave owners=True out."
            )
        return partial(self._gradients, plan, mine)

    def _gradients(self, plan: Plan, mine: list[Tensor], at: PyTree, _: int) -> PyTree:
        values = dict(zip(plan.order, tree.flatten(at)[0], strict=True))
        moved = [i for i, p in enumerate(mine) if p.grad is not None]
        found = self.at({mine[i]: values[i] for i in moved})
        return plan.tree([found.get(p) for p in mine])

    def at(self, values: dict[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        """The gradients where parameters have these values; zeros where the loss does not depend on
        one. Afterwards parameters and gradients are as they were."""
        before = [p.grad for p in self.everybody]
        for p in self.everybody:
            p.grad = None  # or the closure would write over the first gradients
        try:
            with held(values), torch.enable_grad():
                torch.clear_autocast_cache()  # it has what was cast of the first values
                self.closure()
            return {p: torch.zeros_like(p) if p.grad is None else p.grad for p in values}
        finally:
            torch.clear_autocast_cache()
            for p, g in zip(self.everybody, before, strict=True):
                p.grad = g


class Rehearsed(Again):
    """One that is not called, for a step with a few numbers in the place of each parameter."""

    def __init__(self, called: Again) -> None:
        self.loss = called.loss

    def grad_fn(self, plan: Plan) -> GradFn:
        return lambda at, _: at


def loss_of(closure: Closure | None) -> Any:
    """What a closure returns, called with gradients enabled."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def called(loss: Any, closure: Closure | None, groups: Groups) -> Any:
    """What a closure gives: its loss, and that it can be called again, which no graph knows."""
    if closure is None or torch.compiler.is_compiling():
        return loss
    return Again(loss, closure, groups)


def rehearsed(loss: Any) -> Any:
    return Rehearsed(loss) if isinstance(loss, Again) else loss


def extra_of(plan: Plan, loss: Any, grads: PyTree) -> dict[str, Any]:
    """The extra arguments that a transformation reads. `loss` is what a closure returned, or what
    `called` made of it.

    Raises:
        TypeError: it reads something that is not there.
        ValueError: see `Again.grad_fn`.
    """
    tx, given = plan.tx, {"grad": grads}
    if isinstance(loss, Again):
        if "grad_fn" in tx.extra_args:
            given["grad_fn"] = loss.grad_fn(plan)
        loss = loss.loss
    if loss is not None and tx.extra_args:
        given["value"] = torch.as_tensor(loss).detach()
    for name, required in tx.extra_args.items():
        if required and name not in given:
            raise TypeError(f"{tx!r} reads {name}. {CURES.get(name, FUNCTIONAL)}")
    return {name: value for name, value in given.items() if name in tx.extra_args}


def for_a_rehearsal(tx: GradientTransformation, few: PyTree) -> dict[str, Any]:
    """The extra arguments that `tx` reads, where a few numbers stand for the gradients."""
    given = {"grad": few, "value": torch.ones(()), "grad_fn": lambda at, _: at}
    return {name: given[name] for name in tx.extra_args if name in given}
