"""Transformations that work at the steps that a function chooses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from functorch_opt._core.gate import gate
from functorch_opt._core.transformation import (
    GradientTransformation,
    keyword_only,
    positional,
    transformation,
)

__all__ = ["conditionally_mask", "conditionally_transform"]


@transformation
def conditionally_transform(
    inner: GradientTransformation,
    should_transform_fn: Callable[..., Any],
    forward_extra_args: bool = False,
) -> GradientTransformation:
    """`inner` at the steps that the function chooses; at the others the updates pass unchanged.

    The state inside, with its counts and schedules, stays as it is at the other steps. It is
    `gate` with ``otherwise="pass"``.

    Args:
        inner: the transformation.
        should_transform_fn: a function of the number of updates before this one, an int64 tensor.
            It returns a 0-dim bool tensor, or a bool.
        forward_extra_args: whether the function reads extra arguments of ``update``. Then its first
            argument is called ``count``, and it names the others after ``*``.

    Raises:
        TypeError: `inner` is not a transformation; the function has another form.

    Source: optax.conditionally_transform.

    Example:
        >>> import torch, functorch_opt as fo
        >>> tx = fo.conditionally_transform(fo.scale(0.1), lambda step: step >= 1)
        >>> state = tx.init([torch.zeros(1)])
        >>> for _ in range(2):
        ...     updates, state = tx.update([torch.ones(1)], state)
        ...     print(updates)
        [tensor([1.])]
        [tensor([0.1000])]
    """
    return chosen(inner, should_transform_fn, forward_extra_args, "pass")


@transformation
def conditionally_mask(
    inner: GradientTransformation,
    should_transform_fn: Callable[..., Any],
    forward_extra_args: bool = False,
) -> GradientTransformation:
    """`inner` at the steps that the function chooses; at the others the updates are zero.

    The state inside, with its counts and schedules, stays as it is at the other steps. It is
    `gate` with ``otherwise="zero"``.

    Args:
        inner, should_transform_fn, forward_extra_args: see `conditionally_transform`.

    Raises:
        TypeError: `inner` is not a transformation; the function has another form.

    Source: optax.conditionally_mask.

    Example:
        >>> import torch, functorch_opt as fo
        >>> def is_low(count, *, value):
        ...     return value < 2.0
        >>> tx = fo.conditionally_mask(fo.sgd(1.0), is_low, forward_extra_args=True)
        >>> state = tx.init([torch.zeros(1)])
        >>> for value in (3.0, 1.0):
        ...     updates, state = tx.update([torch.ones(1)], state, value=torch.tensor(value))
        ...     print(updates)
        [tensor([0.])]
        [tensor([-1.])]
    """
    return chosen(inner, should_transform_fn, forward_extra_args, "zero")


def chosen(
    inner: GradientTransformation,
    f: Callable[..., Any],
    forward_extra_args: bool,
    otherwise: Literal["zero", "pass"],
) -> GradientTransformation:
    """The gate whose decision is `f` of the count."""
    if not callable(f):
        raise TypeError(
            f"should_transform_fn must be a function of the count; got {f!r}. "
            "Write e.g. lambda step: step >= 100."
        )
    if not forward_extra_args:
        made = gate(inner, lambda count: f(count), otherwise=otherwise)
        return made.explained(name_of(f))
    if positional(f) != ("count",) or not keyword_only(f):
        raise TypeError(
            "with forward_extra_args=True, should_transform_fn names the extra arguments it "
            "reads after '*': def f(count, *, value); got one of "
            f"{[*positional(f), *keyword_only(f)]}."
        )
    return gate(inner, f, otherwise=otherwise).explained(name_of(f))


def name_of(f: Callable[..., Any]) -> str:
    """What a report says of a step that `f` has not chosen."""
    name = getattr(f, "__name__", "<lambda>")
    return "not_chosen" if name == "<lambda>" else f"not_{name}"
