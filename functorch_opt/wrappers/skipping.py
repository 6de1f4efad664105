"""Steps that are left out: those whose gradients are not finite, or too large."""

from __future__ import annotations

import torch
from torch import Tensor

from functorch_opt import tree
from functorch_opt._core.gate import gate
from functorch_opt._core.sharding import stacked
from functorch_opt._core.transformation import (
    GradientTransformation,
    Scalar,
    transformation,
)
from functorch_opt.tree import PyTree

__all__ = ["apply_if_finite", "skip_large_updates", "skip_not_finite"]

Skip = tuple[Tensor, dict[str, Tensor]]


@transformation
def apply_if_finite(
    inner: GradientTransformation, max_consecutive_errors: int
) -> GradientTransformation:
    """Let `inner` make its step only if all gradients are finite; otherwise nothing moves.

    After `max_consecutive_errors` such steps in a row, the next one is made as it is, with its NaN
    and infinities. Something else is wrong then, and it should be seen. The state has
    ``notfinite_count``, the number of such steps in a row; ``total_notfinite``, the number of all;
    ``skipped``, how many of them were left out; and ``last_finite``, whether the last gradients
    were finite.

    Args:
        inner: the transformation.
        max_consecutive_errors: 0 or greater.

    Raises:
        ValueError: a negative `max_consecutive_errors`.
        TypeError: `inner` is not a transformation.

    Source: optax.apply_if_finite. As there, a step that is made although it is not finite still
    counts as one of those in a row. optax has no ``skipped``.

    Example:
        >>> import torch, functorch_opt as fo
        >>> tx = fo.apply_if_finite(fo.sgd(1.0), 5)
        >>> state = tx.init([torch.zeros(1)])
        >>> tx.update([torch.tensor([float("nan")])], state)[0]
        [tensor([0.])]
    """
    most = max_consecutive_errors
    if isinstance(most, bool) or not isinstance(most, int) or most < 0:
        raise ValueError(
            f"max_consecutive_errors must be a whole number from 0; got {most!r}."
        )

    def active(updates, notfinite_count, total_notfinite, skipped, last_finite):
        finite = all_finite(updates)
        in_a_row = torch.where(finite, 0, notfinite_count + 1)
        total = torch.where(finite, total_notfinite, total_notfinite + 1)
        made = finite | (in_a_row > most)
        counts = {
            "notfinite_count": in_a_row,
            "total_notfinite": total,
            "skipped": torch.where(made, skipped, skipped + 1),
            "last_finite": finite,
        }
        return made, counts

    zero = torch.zeros((), dtype=torch.int64)
    shared = {
        "notfinite_count": zero,
        "total_notfinite": zero,
        "skipped": zero,
        "last_finite": torch.ones((), dtype=torch.bool),
    }
    made = gate(inner, active, shared=shared)
    return made.explained("not_finite", lambda shared: shared["skipped"])


def all_finite(updates):
    """Whether every element of a tree is finite, a 0-dim bool tensor."""
    parts: list[Tensor] = []
    for x in map(tree.whole, tree.leaves(updates)):  # the length of a number may overflow
        parts += [x.real, x.imag] if x.is_complex() else [x]
    return torch.isfinite(tree.norm(parts, torch.inf))


def skip_not_finite(
    updates: PyTree, gradient_step: Tensor | int, params: PyTree | None
) -> Skip:
    """Whether some element of the updates is infinite or NaN: for `MultiSteps`.

    Args:
        updates: a tree of tensors.
        gradient_step, params: not read.

    Returns:
        A pair: the 0-dim bool tensor; and a dict with it as ``should_skip``, and with
        ``num_not_finite``, the number of such elements.

    Example:
        >>> import torch, functorch_opt as fo
        >>> fo.skip_not_finite([torch.tensor([1.0, float("nan")])], 0, None)[0]
        tensor(True)
        >>> tx = fo.MultiSteps(fo.sgd(1.0), 1, should_skip_update_fn=fo.skip_not_finite)
        >>> tx.update([torch.tensor([float("inf")])], tx.init([torch.zeros(1)]))[0]
        [tensor([0.])]
    """
    leaves = map(tree.whole, tree.leaves(updates))
    counts = [(~torch.isfinite(x)).sum() for x in leaves]
    number = stacked(counts).sum() if counts else torch.zeros((), dtype=torch.int64)
    return number > 0, {"should_skip": number > 0, "num_not_finite": number}


def skip_large_updates(
    updates: PyTree,
    gradient_step: Tensor | int,
    params: PyTree | None,
    max_squared_norm: Scalar,
) -> Skip:
    """Whether the squared 2-norm of all updates is not below a bound: for `MultiSteps`.

    Updates with NaN are not below it.

    Args:
        updates: a tree of tensors.
        gradient_step, params: not read.
        max_squared_norm: the bound.

    Returns:
        A pair: the 0-dim bool tensor; and a dict with it as ``should_skip``, and with
        ``norm_squared``.

    Example:
        >>> import torch, functorch_opt as fo
        >>> def skip(updates, gradient_step, params):
        ...     return fo.skip_large_updates(updates, gradient_step, params, 20.0)
        >>> tx = fo.MultiSteps(fo.sgd(1.0), 1, should_skip_update_fn=skip)
        >>> tx.update([torch.tensor([3.0, 4.0])], tx.init([torch.zeros(2)]))[0]
        [tensor([0., 0.])]
    """
    squared = tree.norm(updates) ** 2
    should_skip = ~(squared < max_squared_norm)
    return should_skip, {"should_skip": should_skip, "norm_squared": squared}
