"""What waits to be applied to leaves, and gates on the way to it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from functorch_opt import tree
from functorch_opt._core.decision import chosen
from functorch_opt._core.state import StageState
from functorch_opt._execution.body import Entry
from functorch_opt._execution.views import View
from functorch_opt.tree import PyTree

NewState = Callable[[], PyTree]


@dataclass
class Waiting:
    """An entry that waits to be applied to the leaves of a view: its slots and its values."""

    entry: Entry
    view: View
    slots: dict[str, list[Any]] = field(default_factory=dict)
    now: dict[str, Any] = field(default_factory=dict)


@dataclass
class Door:
    """A gate on the way: whether it is open, once that is known."""

    active: Any = None
    shared: dict[str, Tensor] = field(default_factory=dict)


def both(flags: list[Any]) -> Any:
    active = flags[0]
    for flag in flags[1:]:
        active = active & flag
    return active


def after_gate(door: Door, inner: NewState | None, old: PyTree) -> PyTree:
    """The state behind a gate and of the gate. Slots were chosen where they were written."""
    kept = StageState(door.shared, {})
    if door.active is False or inner is None:
        return {"inner": old, "gate": kept}
    new = inner()
    if door.active is not True:
        new = tree.map(lambda x, before: chosen(door.active, x, before), new, old)
    return {"inner": new, "gate": kept}
