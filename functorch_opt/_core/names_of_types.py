"""The names that optax has for the types of trees and functions, for the annotations of a script."""

from __future__ import annotations

from collections.abc import Callable

from functorch_opt._core.structure import PyTree

__all__ = [
    "ArrayTree",
    "OptState",
    "Params",
    "TransformInitFn",
    "TransformUpdateExtraArgsFn",
    "TransformUpdateFn",
    "Updates",
]

ArrayTree = PyTree
"""Any tree of tensors."""
Params = PyTree
"""A tree of the parameters, which are tensors, or None."""
Updates = PyTree
"""A tree of gradients, or of what a transformation makes of them, like the parameters."""
OptState = PyTree
"""The state of a transformation: a tree of tensors."""
TransformInitFn = Callable[[Params], OptState]
"""The ``init`` of a transformation: ``params -> state``."""
TransformUpdateFn = Callable[..., tuple[Updates, OptState]]
"""The ``update`` of a transformation: ``(updates, state, params=None) -> (updates, state)``."""
TransformUpdateExtraArgsFn = Callable[..., tuple[Updates, OptState]]
"""An ``update`` that reads extra arguments, which it names after ``params``."""
