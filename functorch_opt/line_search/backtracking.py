"""Backtracking: a step size that is found by making it smaller.

It is the first of a falling sequence of step sizes that is good enough.

Along the line ``phi(a) = f(p + a u)``, with slope ``phi'(a) = <grad f(p + a u), u>``, a step size a
is good enough if the value falls in proportion to the first slope (Armijo):

    phi(a) <= (1 + rtol) phi(0) + slope_rtol a phi'(0) + atol

Under vmap every problem has its own step size. All problems make their trials together until the
last one has found its step size. A step size that is found stays.

Source: Nocedal & Wright, "Numerical Optimization", 2nd ed. 2006, alg. 3.1.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from functorch_opt._core.state import StageState
from functorch_opt._core.transformation import (
    GradientTransformation,
    Scalar,
    check_range,
    transformation,
)
from functorch_opt.line_search.line import (
    Line,
    any_of,
    check_state,
    check_trials,
    first_state,
    violation,
    where,
)
from functorch_opt.tree import PyTree

__all__ = ["scale_by_backtracking_linesearch"]


@transformation
def scale_by_backtracking_linesearch(
    max_backtracking_steps: int,
    slope_rtol: Scalar = 1e-4,
    decrease_factor: Scalar = 0.8,
    increase_factor: Scalar = 1.5,
    max_learning_rate: Scalar = 1.0,
    atol: Scalar = 0.0,
    rtol: Scalar = 0.0,
    store_grad: bool = False,
) -> GradientTransformation:
    """Scale the updates by the first of ``a, a decrease_factor, ...`` that is good enough.

    That means ``phi(a) <= (1 + rtol) phi(0) + slope_rtol a phi'(0) + atol``.

    The first trial a is `increase_factor` times the last step size. The updates that come in are
    the direction, so the sign must be flipped before:
    ``chain(sgd(1.0), scale_by_backtracking_linesearch(15))``. If no trial has a finite value, the
    step is 0, and the next search begins at `max_learning_rate` (in optax the step size stays 0 for
    ever). Inside of ``torch.compile`` all `max_backtracking_steps` trials are made.

    Args:
        max_backtracking_steps: how often the size is decreased at most.
        slope_rtol: the share of the first slope by which the value has to fall, in (0, 1).
        decrease_factor: in (0, 1).
        increase_factor: 1 or greater. With ``math.inf`` every search begins at `max_learning_rate`.
        max_learning_rate: greater than 0.
        atol, rtol: how much the value may rise, 0 or greater.
        store_grad: whether to keep the gradient at the new params, for `value_and_grad_from_state`.
            This costs one gradient.

    Extra arguments of ``update``: ``value`` and ``grad`` at the params, and
    ``value_fn(params) -> value``. Data enters through a closure.

    Raises:
        ValueError: an argument is outside of its range; params are missing; the shapes of updates,
            params and grad differ.

    Source: Nocedal & Wright, alg. 3.1. optax has one more argument, ``verbose``; here the state
    shows how the search went.

    Example:
        >>> import torch, functorch_opt as fo
        >>> f, p = lambda p: (p**2).sum(), torch.tensor([1.0, 2.0])
        >>> tx = fo.chain(fo.sgd(1.0), fo.scale_by_backtracking_linesearch(15))
        >>> updates, state = tx.update(2 * p, tx.init(p), p, value=f(p), grad=2 * p, value_fn=f)
        >>> fo.get(state, "num_linesearch_steps"), fo.get(state, "learning_rate")
        (tensor(2), tensor(0.8000))
    """
    check_trials("max_backtracking_steps", max_backtracking_steps)
    check_range(0, 1, above=True, slope_rtol=slope_rtol, decrease_factor=decrease_factor)
    check_range(0, float("inf"), above=True, max_learning_rate=max_learning_rate)
    check_range(0, float("inf"), atol=atol, rtol=rtol)
    if isinstance(increase_factor, (int, float)) and not increase_factor >= 1:
        raise ValueError(f"increase_factor must be 1 or greater; got {increase_factor}.")
    rule = _Rule(
        max_backtracking_steps,
        slope_rtol,
        decrease_factor,
        increase_factor,
        max_learning_rate,
        atol,
        rtol,
    )
    return _transformation(rule, store_grad)


_KEPT = ("learning_rate", "value", "num_linesearch_steps", "decrease_error")


class _Rule(NamedTuple):
    """The arguments of the search, which are explained at its function."""

    max_steps: int
    slope_rtol: Scalar
    decrease_factor: Scalar
    increase_factor: Scalar
    max_learning_rate: Scalar
    atol: Scalar
    rtol: Scalar


def _transformation(rule: _Rule, store_grad: bool) -> GradientTransformation:
    """The search as a stage."""

    def init(params: PyTree) -> StageState:
        return first_state(params, store_grad, "decrease_error")

    def update(
        updates: PyTree,
        state: StageState,
        params: PyTree | None,
        *,
        value: Any,
        grad: PyTree,
        value_fn: Any,
    ) -> Any:
        name = "scale_by_backtracking_linesearch"
        check_state(name, state, _KEPT, ("grad",) if store_grad else ())
        line = Line(name, updates, params, value, grad, value_fn)
        found = _search(line, state, rule)
        gs = line.at(found[0])[2] if store_grad else None
        shared = dict(zip(_KEPT, found, strict=True))
        return line.finish(updates, found[0], gs, state, shared)

    return GradientTransformation(init, update)


def _search(line: Line, state: StageState, rule: _Rule) -> tuple[Tensor, ...]:
    """What is kept of a search: the step size, its value, the number of trials, and the error."""

    def attempt(size: Tensor) -> tuple[Tensor, Tensor]:
        """The value at a step size, and by how much it is too high."""
        new = line.value_at(size)
        allowed = (1 + rule.rtol) * line.value
        return new, violation(new - allowed - size * rule.slope_rtol * line.slope)

    size = _first_size(state.shared["learning_rate"], rule)
    new, error = attempt(size)
    steps = torch.ones_like(state.shared["num_linesearch_steps"])
    for _ in range(rule.max_steps):
        searching = error > rule.atol
        if not any_of(searching):
            break
        smaller = (rule.decrease_factor * size).to(size.dtype)
        trial = (smaller, *attempt(smaller), steps + 1)
        now = (size, new, error, steps)
        size, new, error, steps = where(searching, trial, now)
    size = torch.where(error.isinf(), 0.0, size)
    return size, new, steps, error.to(size.dtype)


def _first_size(last: Tensor, rule: _Rule) -> Tensor:
    """Somewhat more than the last step size; after a step of 0, the largest size."""
    largest = torch.as_tensor(
        rule.max_learning_rate, dtype=last.dtype, device=last.device
    )
    factor = rule.increase_factor
    if not isinstance(factor, Tensor) and factor == float("inf"):
        return largest.expand_as(last).clone()
    # A factor that is a tensor may be infinite, and inf * 0 would be NaN.
    begun = torch.where(last > 0, last, 1.0)
    wider = torch.minimum(factor * begun, largest)
    return torch.where(last > 0, wider, largest).to(last.dtype)
