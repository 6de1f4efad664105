"""Step sizes found by trying: the largest of a falling sequence that is good enough, or a bracket that closes in on one.

Along the line ``phi(a) = f(p + a u)``, with slope ``phi'(a) = <grad f(p + a u), u>``, a step size a is good enough if

    phi(a) <= phi(0) + slope_rtol a phi'(0)     the value falls in proportion to the first slope (Armijo)
    |phi'(a)| <= curv_rtol |phi'(0)|            the line is flatter there (strong Wolfe; zoom only)

Under vmap every problem has its own step size. All are tried together until the last one is found; what is found stays.

Sources: Nocedal & Wright, "Numerical Optimization", 2nd ed. 2006, algs. 3.1, 3.5, 3.6. Hager & Zhang, "Algorithm 851: CG_DESCENT", 2006,
eqs. 23-27 (the approximate condition, for values that differ by rounding only).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.func import grad_and_value

from functorch_opt import tree
from functorch_opt._core.transformation import (
    GradientTransformation,
    Scalar,
    check_range,
    transformation,
)
from functorch_opt.line_search.line import Line, any_of, check_state, first_state, where
from functorch_opt.tree import PyTree, StageState

__all__ = [
    "scale_by_backtracking_linesearch",
    "scale_by_zoom_linesearch",
    "value_and_grad_from_state",
]


def _violation(x: Tensor) -> Tensor:
    """By how much ``x <= 0`` is violated; where x is NaN, infinitely."""
    return torch.where(x.isnan(), torch.inf, x.clamp(min=0))


def _check_steps(name: str, steps: Any) -> None:
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(
            f"{name} must be a whole number, 1 or greater: it bounds the loop; got {steps!r}."
        )


# ---- backtracking ----------------------------------------------------------------------------------------------------------


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
    """Scale the updates by the first of ``a, a decrease_factor, a decrease_factor^2, ...`` with
    ``phi(a) <= (1 + rtol) phi(0) + slope_rtol a phi'(0) + atol``, beginning at ``increase_factor`` times the last one.

    The updates that come in are the direction, so the sign is flipped before: ``chain(sgd(1.0), scale_by_backtracking_linesearch(15))``.
    If no trial has a finite value the step is 0, and the next search begins at `max_learning_rate` (in optax it stays 0 for ever).
    Inside ``torch.compile`` all `max_backtracking_steps` trials are made.

    Args:
        max_backtracking_steps: how often the size is decreased at most.
        slope_rtol: share of the first slope by which the value has to fall, in (0, 1).
        decrease_factor: in (0, 1).
        increase_factor: 1 or greater; ``math.inf``: begin at `max_learning_rate` every time.
        max_learning_rate: greater than 0.
        atol, rtol: how much the value may rise, 0 or greater.
        store_grad: keep the gradient at the new params, for `value_and_grad_from_state`; costs one gradient.

    Extra arguments of ``update``: ``value`` and ``grad`` at the params, and ``value_fn(params) -> value``. Data enters through a closure.

    Raises:
        ValueError: an argument outside its range; params missing; shapes of updates, params and grad that differ.

    Source: Nocedal & Wright, alg. 3.1. optax has another argument, ``verbose``; here the state says how it went.

    Example:
        >>> import torch, functorch_opt as fo
        >>> f, p = lambda p: (p**2).sum(), torch.tensor([1.0, 2.0])
        >>> tx = fo.chain(fo.sgd(1.0), fo.scale_by_backtracking_linesearch(max_backtracking_steps=15))
        >>> updates, state = tx.update(2 * p, tx.init(p), p, value=f(p), grad=2 * p, value_fn=f)
        >>> fo.get(state, "num_linesearch_steps"), fo.get(state, "learning_rate")
        (tensor(2), tensor(0.8000))
    """
    _check_steps("max_backtracking_steps", max_backtracking_steps)
    check_range(0, 1, above=True, slope_rtol=slope_rtol, decrease_factor=decrease_factor)
    check_range(0, float("inf"), above=True, max_learning_rate=max_learning_rate)
    check_range(0, float("inf"), atol=atol, rtol=rtol)
    if isinstance(increase_factor, (int, float)) and not increase_factor >= 1:
        raise ValueError(f"increase_factor must be 1 or greater; got {increase_factor}.")
    unbounded = not isinstance(increase_factor, Tensor) and increase_factor == float("inf")
    name = "scale_by_backtracking_linesearch"
    kept = ("learning_rate", "value", "num_linesearch_steps", "decrease_error")

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
        check_state(name, state, kept, ("grad",) if store_grad else ())
        line = Line(name, updates, params, value, grad, value_fn)

        def attempt(size: Tensor) -> tuple[Tensor, Tensor]:
            new = line.value_at(size)
            return new, _violation(new - (1 + rtol) * line.value - size * slope_rtol * line.slope)

        last = state.shared["learning_rate"]
        largest = torch.as_tensor(max_learning_rate, dtype=last.dtype, device=last.device)
        # Where the last size is 0 the search begins at the largest; inf * 0 would be NaN there.
        before = torch.where(last > 0, last, 1.0)
        wider = largest if unbounded else torch.minimum(increase_factor * before, largest)
        size = torch.where(last > 0, wider, largest).to(last.dtype)
        new, error = attempt(size)
        steps = torch.ones_like(state.shared["num_linesearch_steps"])
        for _ in range(max_backtracking_steps):
            searching = error > atol
            if not any_of(searching):
                break
            smaller = (decrease_factor * size).to(size.dtype)
            size, new, error, steps = where(
                searching, (smaller, *attempt(smaller), steps + 1), (size, new, error, steps)
            )
        size = torch.where(error.isinf(), 0.0, size)
        gs = line.at(size)[2] if store_grad else None
        shared = dict(zip(kept, (size, new, steps, error.to(size.dtype)), strict=True))
        return line.finish(updates, size, gs, state, shared)

    return GradientTransformation(init, update)


# ---- zoom ------------------------------------------------------------------------------------------------------------------


class _Trial(NamedTuple):
    size: Tensor
    value: Tensor
    slope: Tensor


class _Search(NamedTuple):
    steps: Tensor
    found: Tensor  # a bracket [low, high] that holds a good step size
    searching: Tensor
    last: _Trial
    grads: list[Tensor]  # at the last trial
    low: _Trial  # the lower end by value, not by size
    high: _Trial
    third: _Trial  # the end that was given up last, for the cubic
    safe_size: Tensor  # the best size that decreases enough, if no other is found
    safe_value: Tensor
    safe_grads: list[Tensor]
    decrease_error: Tensor
    curvature_error: Tensor


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """``a / b``, and 0 where b is 0: an interpolation of 0 is an end of the bracket, which is not inside. No NaN enters the derivative."""
    return torch.where(b == 0, 0.0, a / torch.where(b == 0, 1.0, b))


def _between(low: _Trial, high: _Trial, third: _Trial) -> Tensor:
    """The minimum of the cubic through three points, else of the parabola through two, else the middle: the first that is well inside."""
    b, c = high.size - low.size, third.size - low.size
    rise_b, rise_c = high.value - low.value - low.slope * b, third.value - low.value - low.slope * c
    scale = (b * c) ** 2 * (b - c)
    cube, square = (
        _ratio(c**2 * rise_b - b**2 * rise_c, scale),
        _ratio(b**3 * rise_c - c**3 * rise_b, scale),
    )
    under = square**2 - 3 * cube * low.slope
    cubic = low.size + _ratio(torch.where(under > 0, under, 1.0).sqrt() - square, 3 * cube)
    parabola = low.size - _ratio(low.slope * b**2, 2 * rise_b)

    def inside(x: Tensor, margin: float) -> Tensor:
        edge = margin * b.abs()
        return (x > torch.minimum(low.size, high.size) + edge) & (
            x < torch.maximum(low.size, high.size) - edge
        )

    middle = torch.where(inside(parabola, 0.1), parabola, (low.size + high.size) / 2)
    return torch.where(inside(cubic, 0.2) & (under >= 0), cubic, middle)


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
    """Scale the updates by a step size that meets both conditions (strong Wolfe): widen until a bracket holds one, then zoom into it.

    The updates that come in are the direction, so the sign is flipped before, as `lbfgs` does. If no trial meets both conditions, the best
    that decreases enough is taken; if there is none, the last trial, or 0 where its value is not finite. Inside ``torch.compile`` all
    `max_linesearch_steps` trials are made.

    Args:
        max_linesearch_steps: how many trials at most, each of one value and one gradient.
        max_learning_rate: greater than 0; None: unbounded.
        tol: by how much the conditions may be missed, 0 or greater.
        increase_factor: greater than 1, by which the size grows until there is a bracket.
        slope_rtol: of the first condition, in (0, 1).
        curv_rtol: of the second, greater than 0; ``math.inf`` leaves it out.
        approx_dec_rtol: near a minimum, where values differ by rounding, the slopes decide instead (Hager & Zhang, eq. 23): if the value
            rises by no more than this share of it. None: never.
        stepsize_precision: a bracket this small is given up, if some size decreases enough.
        initial_guess_strategy: first trial: "one", or "keep", the last step size (1 after a step of 0, where optax stays for ever).

    Extra arguments of ``update``: ``value`` and ``grad`` at the params, and ``value_fn(params) -> value``. Data enters through a closure.

    Raises:
        ValueError: an argument outside its range; params missing; shapes of updates, params and grad that differ.

    Source: Nocedal & Wright, algs. 3.5, 3.6. optax has another argument, ``verbose``; here the state says how it went.

    Example:
        >>> import torch, functorch_opt as fo
        >>> f, p = lambda p: (p**2).sum(), torch.tensor([1.0, 2.0])
        >>> tx = fo.chain(fo.sgd(1.0), fo.scale_by_zoom_linesearch(max_linesearch_steps=15))
        >>> updates, state = tx.update(2 * p, tx.init(p), p, value=f(p), grad=2 * p, value_fn=f)
        >>> fo.apply_updates(p, updates), fo.get(state, "curvature_error")
        (tensor([0., 0.]), tensor(0.))
    """
    _check_steps("max_linesearch_steps", max_linesearch_steps)
    check_range(0, float("inf"), tol=tol, stepsize_precision=stepsize_precision)
    check_range(0, 1, above=True, slope_rtol=slope_rtol)
    check_range(1, float("inf"), above=True, increase_factor=increase_factor)
    if isinstance(curv_rtol, (int, float)) and not curv_rtol > 0:
        raise ValueError(f"curv_rtol must be greater than 0; got {curv_rtol}.")
    for argument, given in (
        ("max_learning_rate", max_learning_rate),
        ("approx_dec_rtol", approx_dec_rtol),
    ):
        if given is not None:
            check_range(0, float("inf"), above=argument == "max_learning_rate", **{argument: given})
    if initial_guess_strategy not in ("keep", "one"):
        raise ValueError(
            f"initial_guess_strategy must be 'keep' or 'one'; got {initial_guess_strategy!r}."
        )
    name = "scale_by_zoom_linesearch"
    kept = ("learning_rate", "value", "num_linesearch_steps", "decrease_error", "curvature_error")

    def errors(trial: _Trial, line: Line) -> tuple[Tensor, Tensor]:
        decrease = trial.value - line.value - slope_rtol * trial.size * line.slope
        if approx_dec_rtol is not None:
            by_slope = trial.slope - (2 * slope_rtol - 1) * line.slope
            decrease = torch.minimum(
                torch.maximum(
                    by_slope, trial.value - line.value - approx_dec_rtol * line.value.abs()
                ),
                decrease,
            )
        return _violation(decrease), _violation(trial.slope.abs() - curv_rtol * line.slope.abs())

    def step(now: _Search, line: Line, guess: Tensor) -> _Search:
        size = torch.where(now.steps == 0, guess, increase_factor * now.last.size)
        at_most = torch.zeros_like(now.found)
        if max_learning_rate is not None:
            at_most = size >= max_learning_rate
            size = torch.clamp(size, max=max_learning_rate)
        size = torch.where(now.found, _between(now.low, now.high, now.third), size).to(line.dtype)
        value, slope, gs = line.at(size)
        trial = _Trial(size, value, slope)
        decrease_error, curvature_error = errors(trial, line)
        good = torch.maximum(decrease_error, curvature_error) <= tol

        # Widening (alg. 3.5): a bracket ends where the value is too high, or where the slope has turned.
        high = (decrease_error > 0) | ((value >= now.last.value) & (now.steps > 0))
        turned = (slope >= 0) & ~high
        bracket = where(turned, (trial, now.last), (now.last, trial))
        found = high | turned | good
        # Zooming (alg. 3.6): the trial replaces one end, on which side the slope says.
        worse = (decrease_error > 0) | (value >= now.low.value)
        crossed = (slope * (now.high.size - now.low.size) >= 0) & ~worse
        shrunk = where(worse, (now.low, trial), (trial, where(crossed, now.low, now.high)))
        third = where(worse | crossed, now.high, now.low)
        low, high_end = where(now.found, shrunk, bracket)

        enough = (decrease_error <= tol) & (~now.found | (value < now.safe_value))
        safe_size, safe_value, safe_grads = where(
            enough, (size, value, gs), (now.safe_size, now.safe_value, now.safe_grads)
        )
        tiny = (
            now.found
            & ((now.high.size - now.low.size).abs() <= stepsize_precision)
            & (safe_size > 0)
        )
        done = good | (~now.found & at_most & ~found)
        failed = ~done & (tiny | (now.steps + 1 >= max_linesearch_steps))
        fall_back = failed & ((safe_size > 0) | decrease_error.isinf())
        size, value, gs = where(fall_back, (safe_size, safe_value, safe_grads), (size, value, gs))
        return _Search(
            steps=now.steps + 1,
            found=now.found | found,
            searching=~(done | failed),
            last=_Trial(size, value, slope),
            grads=gs,
            low=low,
            high=high_end,
            third=where(now.found, third, low),
            safe_size=safe_size,
            safe_value=safe_value,
            safe_grads=safe_grads,
            decrease_error=decrease_error,
            curvature_error=curvature_error,
        )

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
        check_state(name, state, kept, ("grad",))
        line = Line(name, updates, params, value, grad, value_fn)
        zero = torch.zeros_like(line.slope)
        start = _Trial(zero, line.value, line.slope)
        no, infinite = torch.zeros_like(zero, dtype=torch.bool), zero + torch.inf
        search = _Search(
            torch.zeros_like(state.shared["num_linesearch_steps"]), no, ~no, start, line.gs, start, start, start,
            zero, line.value, line.gs, infinite, infinite,
        )  # fmt: skip
        last = state.shared["learning_rate"].to(line.dtype)
        guess = (
            torch.ones_like(zero)
            if initial_guess_strategy == "one"
            else torch.where(last > 0, last, 1.0)
        )
        for _ in range(max_linesearch_steps):
            if not any_of(search.searching):
                break
            search = where(search.searching, step(search, line, guess), search)
        found = (
            search.last.size,
            search.last.value,
            search.steps,
            search.decrease_error,
            search.curvature_error,
        )
        shared = {key: x.to(state.shared[key].dtype) for key, x in zip(kept, found, strict=True)}
        return line.finish(updates, search.last.size, search.grads, state, shared)

    return GradientTransformation(init, update)


# ---- what a search has already worked out ------------------------------------------------------------------------------------


def value_and_grad_from_state(
    value_fn: Callable[[PyTree], Tensor],
) -> Callable[..., tuple[Tensor, PyTree]]:
    """Value and gradient at the params, from the state of a line search that has worked them out; computed where it has not.

    A line search ends with the value and the gradient at the new params. Where the function is the same at every step, taking them from
    there saves one evaluation of both a step. At the first step, or if the last value was not finite, they are computed.

    Args:
        value_fn: ``params -> value``.

    Returns:
        ``(params, state) -> (value, grad)``.

    Raises:
        KeyError: the state holds no ``value`` or no ``grad`` (backtracking keeps it with ``store_grad=True``).

    Example:
        >>> import torch, functorch_opt as fo
        >>> f, p = lambda p: ((p - 3) ** 2).sum(), torch.zeros(2)
        >>> tx = fo.lbfgs()
        >>> state, value_and_grad = tx.init(p), fo.value_and_grad_from_state(f)
        >>> for _ in range(3):
        ...     value, grad = value_and_grad(p, state=state)
        ...     updates, state = tx.update(grad, state, p, value=value, grad=grad, value_fn=f)
        ...     p = fo.apply_updates(p, updates)
        >>> p
        tensor([3., 3.])
    """

    def value_and_grad(params: PyTree, state: PyTree) -> tuple[Tensor, PyTree]:
        value, grad = tree.get(state, "value"), tree.get(state, "grad")
        unknown = ~value.isfinite()
        if not any_of(unknown):
            return value, grad
        gs, fresh = grad_and_value(value_fn)(params)
        return torch.where(unknown, fresh.to(value.dtype), value), tree.map(
            lambda g, old: torch.where(unknown, g, old), gs, grad
        )

    return value_and_grad
