"""A step as operations of a graph that somebody else compiles."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from functorch_opt import tree
from functorch_opt._core.transformation import GradientTransformation, apply_updates
from functorch_opt._execution.writes import computed
from functorch_opt.tree import PyTree


def traced(
    tx: GradientTransformation,
    params: PyTree,
    grads: PyTree,
    state: PyTree,
    extra: dict[str, Any],
    donate: bool,
) -> tuple[PyTree, PyTree]:
    """The new params and state of `compiled_step`, called while a graph is made."""
    updates, new = tx.update(grads, state, params, **extra)
    moved = apply_updates(params, updates)
    if not donate:
        return moved, new
    # A slot may be the memory of a parameter, which a graph cannot see. So the state is new.
    new = tree.map(computed, new)
    return tree.map(Tensor.copy_, params, moved), new
