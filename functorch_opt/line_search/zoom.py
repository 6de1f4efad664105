"""A step size that meets two conditions: widen until a bracket holds one, then zoom into it.

Along the line ``phi(a) = f(p + a u)``, with slope ``phi'(a) = <grad f(p + a u), u>``, a step size a
is good enough if it meets the strong Wolfe conditions:

    phi(a) <= phi(0) + slope_rtol a phi'(0)     the value falls in proportion to the first slope
    |phi'(a)| <= curv_rtol |phi'(0)|            the line is flatter there

Under vmap every problem has its own step size. All problems make their trials together until the
last one has found its step size. A step size that is found stays.

Sources: Nocedal & Wright, "Numerical Optimization", 2nd ed. 2006, algs. 3.5 and 3.6. Hager & Zhang,
"Algorithm 851: CG_DESCENT", 2006, eqs. 23-27 (the approximate condition, for values that differ by
rounding only).
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from functorch_opt._core.state import StageState
from functorch_opt._core.transformation import (
    GradientTransformation,
    Scalar,
    check_number,
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

__all__ = ["scale_by_zoom_linesearch"]


@transformation
def scale_by_zoom_linesearch(
    max_linesearch_steps: int,
    max_learning_rate: Scalar | None = None,
    tol: Scalar = 0.0,
    increase_factor: Scalar = 2.0,
    slope_rtol: Scalar = 1e-4,
    curv_rtol: Scalar = 0.9,
    approx_dec_rtol: Scalar | None = 1e-6,
    stepsize_precision: Scalar = 1e-5,
    initial_guess_strategy: Literal["keep", "one"] = "keep",
) -> GradientTransformation:
    """Scale the updates by a step size that meets the strong Wolfe conditions.

    The updates that come in are the direction, so the sign must be flipped before, as `lbfgs` does.
    If no trial meets both conditions, the best one that decreases the value enough is taken. If
    there is none, it is the last trial, or 0 if the value there is not finite. Inside of
    ``torch.compile`` all `max_linesearch_steps` trials are made.

    Args:
        max_linesearch_steps: how many trials are made at most, each of one value and one gradient.
        max_learning_rate: the largest step size, greater than 0. With None there is no bound.
        tol: by how much the conditions may be missed, 0 or greater.
        increase_factor: the factor by which the size grows until there is a bracket, greater than
            1.
        slope_rtol: of the first condition, in (0, 1).
        curv_rtol: of the second condition, greater than 0; ``math.inf`` leaves it out.
        approx_dec_rtol: near a minimum, where values differ only by rounding, the slopes decide
            instead (Hager & Zhang, eq. 23). They do so if the value rises by no more than this
            share of the first value. With None they never do.
        stepsize_precision: a bracket that is smaller is given up, if some size decreases the value
            enough.
        initial_guess_strategy: the first trial. "one" begins at 1, and "keep" at the last step
            size; after a step of 0 it begins at 1 too (optax stays at 0 for ever).

    Extra arguments of ``update``: ``value`` and ``grad`` at the params, and
    ``value_fn(params) -> value``. Data enters through a closure.

    Raises:
        ValueError: an argument is outside of its range; params are missing; the shapes of updates,
            params and grad differ.

    Source: Nocedal & Wright, algs. 3.5, 3.6. optax has one more argument, ``verbose``; here the
    state shows how the search went.

    Example:
        >>> import torch, functorch_opt as fo
        >>> f, p = lambda p: (p**2).sum(), torch.tensor([1.0, 2.0])
        >>> tx = fo.chain(fo.sgd(1.0), fo.scale_by_zoom_linesearch(max_linesearch_steps=15))
        >>> updates, state = tx.update(2 * p, tx.init(p), p, value=f(p), grad=2 * p, value_fn=f)
        >>> fo.apply_updates(p, updates), fo.get(state, "curvature_error")
        (tensor([0., 0.]), tensor(0.))
    """
    rule = _Rule(
        max_linesearch_steps,
        max_learning_rate,
        tol,
        increase_factor,
        slope_rtol,
        curv_rtol,
        approx_dec_rtol,
        stepsize_precision,
    )
    _check(rule)
    if initial_guess_strategy not in ("keep", "one"):
        raise ValueError(
            f"initial_guess_strategy must be 'keep' or 'one'; got {initial_guess_strategy!r}."
        )
    return _transformation(rule, keep=initial_guess_strategy == "keep")


class _Rule(NamedTuple):
    """The arguments of the search, which are explained at its function."""

    max_steps: int
    max_learning_rate: Scalar | None
    tol: Scalar
    increase_factor: Scalar
    slope_rtol: Scalar
    curv_rtol: Scalar
    approx_dec_rtol: Scalar | None
    stepsize_precision: Scalar


def _check(rule: _Rule) -> None:
    """Raise ValueError for an argument that is outside of its range."""
    infinity = float("inf")
    check_trials("max_linesearch_steps", rule.max_steps)
    check_range(0, infinity, tol=rule.tol, stepsize_precision=rule.stepsize_precision)
    check_range(0, 1, above=True, slope_rtol=rule.slope_rtol)
    check_range(1, infinity, above=True, increase_factor=rule.increase_factor)
    check_number("curv_rtol", rule.curv_rtol)
    if isinstance(rule.curv_rtol, (int, float)) and not rule.curv_rtol > 0:
        raise ValueError(f"curv_rtol must be greater than 0; got {rule.curv_rtol}.")
    check_range(0, infinity, above=True, max_learning_rate=rule.max_learning_rate)
    check_range(0, infinity, approx_dec_rtol=rule.approx_dec_rtol)


_KEPT = (
    "learning_rate",
    "value",
    "num_linesearch_steps",
    "decrease_error",
    "curvature_error",
)


def _transformation(rule: _Rule, keep: bool) -> GradientTransformation:
    """The search as a stage. If `keep`, it begins at the last step size."""

    def init(params: PyTree) -> StageState:
        return first_state(params, True, "decrease_error", "curvature_error")

    def update(
        updates: PyTree,
        state: StageState,
        params: PyTree | None,
        *,
        value: Any,
        grad: PyTree,
        value_fn: Any,
    ) -> Any:
        name = "scale_by_zoom_linesearch"
        check_state(name, state, _KEPT, ("grad",))
        line = Line(name, updates, params, value, grad, value_fn)
        last = state.shared["learning_rate"].to(line.dtype)
        guess = torch.where(last > 0, last, 1.0) if keep else torch.ones_like(line.slope)
        no_steps = torch.zeros_like(state.shared["num_linesearch_steps"])
        now = _begin(line, no_steps)
        for _ in range(rule.max_steps):
            if not any_of(now.searching):
                break
            now = where(now.searching, _step(now, line, guess, rule), now)
        size, value, _ = now.last
        found = (size, value, now.steps, now.decrease_error, now.curvature_error)
        shared = {
            key: x.to(state.shared[key].dtype)
            for key, x in zip(_KEPT, found, strict=True)
        }
        return line.finish(updates, size, now.grads, state, shared)

    return GradientTransformation(init, update)


# ---- the search ----------------------------------------------------------------------------------


class _Trial(NamedTuple):
    """A step size, and what was found there."""

    size: Tensor
    value: Tensor
    slope: Tensor


class _Safe(NamedTuple):
    """The best size that decreases enough, to be taken if no other is found."""

    size: Tensor
    value: Tensor
    grads: list[Tensor]


class _Search(NamedTuple):
    """How far a search has come."""

    steps: Tensor
    found: Tensor
    """Whether there is a bracket, ``[low, high]``, that holds a good step size."""
    searching: Tensor
    last: _Trial
    grads: list[Tensor]
    """The gradients at the last trial."""
    low: _Trial
    """The end of the bracket with the lower value. It may be the greater size."""
    high: _Trial
    third: _Trial
    """The end of the bracket that was given up last. The cubic goes through it."""
    safe: _Safe
    decrease_error: Tensor
    curvature_error: Tensor


def _begin(line: Line, no_steps: Tensor) -> _Search:
    zero = torch.zeros_like(line.slope)
    start = _Trial(zero, line.value, line.slope)
    no = torch.zeros_like(zero, dtype=torch.bool)
    infinite = zero + torch.inf
    return _Search(
        steps=no_steps,
        found=no,
        searching=~no,
        last=start,
        grads=line.gs,
        low=start,
        high=start,
        third=start,
        safe=_Safe(zero, line.value, line.gs),
        decrease_error=infinite,
        curvature_error=infinite,
    )


def _step(now: _Search, line: Line, guess: Tensor, rule: _Rule) -> _Search:
    """One trial, and what it says about where to look next."""
    size, at_most = _next_size(now, guess, rule)
    trial, gs = _at(line, size.to(line.dtype))
    decrease_error, curvature_error = _errors(trial, line, rule)
    good = torch.maximum(decrease_error, curvature_error) <= rule.tol
    bracket, ends = _widened(now, trial, decrease_error)
    found = ends | good
    ends_and_third = where(
        now.found, _zoomed(now, trial, decrease_error), (*bracket, bracket[0])
    )
    low, high, third = ends_and_third

    is_lower = trial.value < now.safe.value
    enough = (decrease_error <= rule.tol) & (~now.found | is_lower)
    safe: _Safe = where(enough, _Safe(trial.size, trial.value, gs), now.safe)
    width = (now.high.size - now.low.size).abs()
    tiny = now.found & (width <= rule.stepsize_precision) & (safe.size > 0)
    done = good | (~now.found & at_most & ~found)
    failed = ~done & (tiny | (now.steps + 1 >= rule.max_steps))
    falls_back = failed & ((safe.size > 0) | decrease_error.isinf())
    tried = (trial.size, trial.value, gs)
    size, value, gs = where(falls_back, tuple(safe), tried)
    return _Search(
        steps=now.steps + 1,
        found=now.found | found,
        searching=~(done | failed),
        last=_Trial(size, value, trial.slope),
        grads=gs,
        low=low,
        high=high,
        third=third,
        safe=safe,
        decrease_error=decrease_error,
        curvature_error=curvature_error,
    )


def _at(line: Line, size: Tensor) -> tuple[_Trial, list[Tensor]]:
    value, slope, gs = line.at(size)
    return _Trial(size, value, slope), gs


def _next_size(now: _Search, guess: Tensor, rule: _Rule) -> tuple[Tensor, Tensor]:
    """The size to try, and whether it is the greatest size that is allowed."""
    size = torch.where(now.steps == 0, guess, rule.increase_factor * now.last.size)
    at_most = torch.zeros_like(now.found)
    if rule.max_learning_rate is not None:
        at_most = size >= rule.max_learning_rate
        size = torch.clamp(size, max=rule.max_learning_rate)
    between = _between(now.low, now.high, now.third)
    return torch.where(now.found, between, size), at_most


def _errors(trial: _Trial, line: Line, rule: _Rule) -> tuple[Tensor, Tensor]:
    """By how much a trial misses the two conditions."""
    decrease = trial.value - line.value - rule.slope_rtol * trial.size * line.slope
    if rule.approx_dec_rtol is not None:
        by_slope = trial.slope - (2 * rule.slope_rtol - 1) * line.slope
        by_value = trial.value - line.value - rule.approx_dec_rtol * line.value.abs()
        decrease = torch.minimum(torch.maximum(by_slope, by_value), decrease)
    curvature = trial.slope.abs() - rule.curv_rtol * line.slope.abs()
    return violation(decrease), violation(curvature)


def _widened(
    now: _Search, trial: _Trial, decrease_error: Tensor
) -> tuple[tuple[_Trial, _Trial], Tensor]:
    """The bracket that ends at a trial, low end first, and whether there is one (alg. 3.5).

    A bracket ends where the value is too high, or where the slope has changed its sign.
    """
    rises = (trial.value >= now.last.value) & (now.steps > 0)
    high = (decrease_error > 0) | rises
    turned = (trial.slope >= 0) & ~high
    return where(turned, (trial, now.last), (now.last, trial)), high | turned


def _zoomed(
    now: _Search, trial: _Trial, decrease_error: Tensor
) -> tuple[_Trial, _Trial, _Trial]:
    """The bracket with a trial in place of one end, and the end that is given up (alg. 3.6).

    The slope says on which side the minimum is.
    """
    worse = (decrease_error > 0) | (trial.value >= now.low.value)
    width = now.high.size - now.low.size
    crossed = (trial.slope * width >= 0) & ~worse
    better = (trial, where(crossed, now.low, now.high))
    low, high = where(worse, (now.low, trial), better)
    return low, high, where(worse | crossed, now.high, now.low)


# ---- between the ends of a bracket ---------------------------------------------------------------


def _between(low: _Trial, high: _Trial, third: _Trial) -> Tensor:
    """A size between the two ends of a bracket.

    It is the first of these that is well inside: the minimum of the cubic through three points,
    that of the parabola through two points, and the middle.
    """
    edges = torch.minimum(low.size, high.size), torch.maximum(low.size, high.size)
    width = (high.size - low.size).abs()

    def inside(x: Tensor, margin: float) -> Tensor:
        away = margin * width
        return (x > edges[0] + away) & (x < edges[1] - away)

    parabola = _of_parabola(low, high)
    cubic, exists = _of_cubic(low, high, third)
    half = (low.size + high.size) / 2
    middle = torch.where(inside(parabola, 0.1), parabola, half)
    return torch.where(inside(cubic, 0.2) & exists, cubic, middle)


def _of_parabola(low: _Trial, high: _Trial) -> Tensor:
    """The minimum of the parabola through both points, with the slope of the first."""
    b = high.size - low.size
    rise = high.value - low.value - low.slope * b
    return low.size - _ratio(low.slope * b**2, 2 * rise)


def _of_cubic(low: _Trial, high: _Trial, third: _Trial) -> tuple[Tensor, Tensor]:
    """The minimum of the cubic through three points, with the slope of the first, if it has one."""
    b, c = high.size - low.size, third.size - low.size
    rise_b = high.value - low.value - low.slope * b
    rise_c = third.value - low.value - low.slope * c
    scale = (b * c) ** 2 * (b - c)
    cube = _ratio(c**2 * rise_b - b**2 * rise_c, scale)
    square = _ratio(b**3 * rise_c - c**3 * rise_b, scale)
    under = square**2 - 3 * cube * low.slope
    root = torch.where(under > 0, under, 1.0).sqrt()
    return low.size + _ratio(root - square, 3 * cube), under >= 0


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """``a / b``, and 0 where b is 0, so that no NaN enters a derivative.

    With 0 the interpolation gives an end of the bracket, which is not inside.
    """
    divisor = torch.where(b == 0, 1.0, b)
    return torch.where(b == 0, 0.0, a / divisor)
