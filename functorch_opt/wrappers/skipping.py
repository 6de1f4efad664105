"""Steps that are left out: those whose gradients are not finite."""

from __future__ import annotations

import torch

from functorch_opt import tree
from functorch_opt._core.gate import gate
from functorch_opt._core.transformation import GradientTransformation, transformation

__all__ = ["apply_if_finite"]


@transformation
def apply_if_finite(
    inner: GradientTransformation, max_consecutive_errors: int
) -> GradientTransformation:
    """Let `inner` make its step only if all gradients are finite; otherwise nothing moves.

    After `max_consecutive_errors` such steps in a row, the next one is made as it is, with its NaN
    and infinities. Something else is wrong then, and it should be seen. The state has
    ``notfinite_count``, the number of such steps in a row; ``total_notfinite``, the number of all;
    and ``last_finite``, whether the last gradients were finite.

    Args:
        inner: the transformation.
        max_consecutive_errors: 0 or greater.

    Raises:
        ValueError: a negative `max_consecutive_errors`.
        TypeError: `inner` is not a transformation.

    Source: optax.apply_if_finite. As there, a step that is made although it is not finite still
    counts as one of those in a row.

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

    def active(updates, notfinite_count, total_notfinite, last_finite):
        finite = all_finite(updates)
        in_a_row = torch.where(finite, 0, notfinite_count + 1)
        total = torch.where(finite, total_notfinite, total_notfinite + 1)
        counts = {
            "notfinite_count": in_a_row,
            "total_notfinite": total,
            "last_finite": finite,
        }
        return finite | (in_a_row > most), counts

    zero = torch.zeros((), dtype=torch.int64)
    shared = {
        "notfinite_count": zero,
        "total_notfinite": zero,
        "last_finite": torch.ones((), dtype=torch.bool),
    }
    return gate(inner, active, shared=shared)


def all_finite(updates):
    """Whether every element of a tree is finite, a 0-dim bool tensor."""
    flags = [torch.isfinite(tree.whole(x)).all() for x in tree.leaves(updates)]
    return torch.stack(flags).all() if flags else torch.ones((), dtype=torch.bool)
