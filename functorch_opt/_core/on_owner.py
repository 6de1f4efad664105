"""A rule on a tensor that has an owner: the owner alone does anything, and all ranks go on."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from functorch_opt._core.owned import is_here
from functorch_opt._core.sharding import is_sharded, join, part_of


class _Errors(threading.local):
    """What rules have raised in this thread; None where errors are raised at once."""

    found: list[Exception] | None = None


_ERRORS = _Errors()


@contextmanager
def errors_kept() -> Iterator[list[Exception]]:
    """Inside, what a rule raises on its owner is kept in a list, and the step goes on.

    The other ranks know nothing of it, and this one must take part in the messages that they wait
    for.
    """
    outside = _ERRORS.found
    _ERRORS.found = []
    try:
        yield _ERRORS.found
    finally:
        _ERRORS.found = outside


def has_failed() -> bool:
    """Whether an error is kept, so that what has been worked out is of no use."""
    return bool(_ERRORS.found)


def on_owner(
    apply: Callable[..., Any],
    g: Any,
    p: Any,
    slots: dict[str, Any],
    now: dict[str, Any],
    dtype: torch.dtype,
    *rest: Any,
) -> tuple[Any, dict[str, Any]]:
    """``apply(g, p, slots, now, dtype, *rest)`` of a tensor that has an owner, on its owner."""
    unchanged = join(g.to_local().to(update_dtype(g, dtype)), g), slots
    if not is_here(g):
        return unchanged
    near = {name: part_of(x, g) for name, x in now.items()}
    # The scales of a slot that is in no code are an empty tensor, which has no owner.
    mine = {name: x.to_local() if is_sharded(x) else x for name, x in slots.items()}
    near_p = None if p is None else p.to_local()
    try:
        u, new = apply(g.to_local(), near_p, mine, near, dtype, *rest)
    except Exception as error:
        if _ERRORS.found is None:
            raise
        _ERRORS.found.append(error)
        return unchanged
    kept = {}
    for name, old in slots.items():
        kept[name] = join(new[name], old) if is_sharded(old) else old
    return join(u, g), kept


def update_dtype(g: Any, dtype: torch.dtype) -> torch.dtype:
    """The dtype of the update that a rule makes of `g` in `dtype`."""
    if g.is_complex() or not dtype.is_complex:
        return dtype
    return dtype.to_real()
