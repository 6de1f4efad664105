"""What a line search has already computed, so that it need not be computed again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import grad_and_value

from functorch_opt import tree
from functorch_opt._core.state import get
from functorch_opt.line_search.line import any_of
from functorch_opt.tree import PyTree

__all__ = ["value_and_grad_from_state"]


def value_and_grad_from_state(
    value_fn: Callable[..., Tensor],
) -> Callable[..., tuple[Tensor, PyTree]]:
    """Take the value and the gradient at the params from the state of a line search.

    A line search ends with the value and the gradient at the new params. If the function is the
    same at every step, taking them from there saves one evaluation of both at each step. They are
    computed at the first step, and if the last value was not finite.

    Args:
        value_fn: ``params -> value``; it may have other arguments after the params.

    Returns:
        ``(params, *arguments, state=state, **more) -> (value, grad)``. `value_fn` gets the arguments.
        A search calls its ``value_fn`` with the params only: ``value_fn=lambda p: f(p, x)``.

    Raises:
        KeyError: the state holds no ``value`` or no ``grad`` (the backtracking search keeps
            ``grad`` only with ``store_grad=True``).

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

    def value_and_grad(
        params: PyTree, *arguments: Any, state: PyTree, **more: Any
    ) -> tuple[Tensor, PyTree]:
        value, grad = get(state, "value"), get(state, "grad")
        unknown = ~value.isfinite()
        if not any_of(unknown):
            return value, grad
        fresh_grad, fresh = grad_and_value(value_fn)(params, *arguments, **more)
        grad = tree.map(lambda new, old: torch.where(unknown, new, old), fresh_grad, grad)
        return torch.where(unknown, fresh.to(value.dtype), value), grad

    return value_and_grad
