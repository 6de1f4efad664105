"""Where each tensor of a functional state lives in ``state[p]`` of a stateful optimizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from functorch_opt import tree
from functorch_opt._core.state import StageState, parts, with_parts
from functorch_opt._execution.writes import computed, memories
from functorch_opt.tree import PyTree

Kind = Literal["slot", "count", "clock", "joint"]


@dataclass(frozen=True)
class Place:
    """Where a tensor of the functional state lives: ``state[p][key]``.

    slot   With the parameter that it belongs to. `whole`: it is there from the first step of any
           parameter on, for it belongs to a transformation that looks at whole trees.
    count  With each parameter, which has one of its own.
    clock  With each parameter that moved; the largest one is that of the training.
    joint  With the first parameter that is trained, for all.
    """

    kind: Kind
    key: str
    path: str
    """Its place in a fresh functional state."""
    i: int = 0
    """Which parameter it lies with."""
    whole: bool = False


class Places:
    """Gives every tensor of a state its place.

    Args:
        number: which parameter a path belongs to.
        like: a tree of the params: a subtree of a state with its structure lies with each of them.
    """

    def __init__(self, number: dict[str, int], like: PyTree) -> None:
        self.number = number
        leaves, self.spec = tree.flatten(like)
        self.shapes = [None if p is None else p.shape for p in leaves]

    def of(self, state: PyTree, path: str = "", real: str = "") -> PyTree:
        """The tree `state` with a `Place` for every tensor. `path` names it in keys."""
        if isinstance(state, StageState):
            return self._of_stage(state, path, real)
        if state is None:
            return None
        if self._is_like_params(state):
            return self._slot(state, path, real, True)
        children = parts(state)
        if children is None:
            return Place("joint", path, real)
        places = [
            self.of(child, _under(path, name), _under(real, name))
            for name, child in children
        ]
        return with_parts(state, places)

    def _of_stage(self, state: StageState, path: str, real: str) -> Any:
        kinds: dict[str, Kind] = {"count": "count", "clock": "clock"}
        shared = {
            name: Place(
                kinds.get(name, "joint"),
                _under(path, name),
                _under(real, f"shared/{name}"),
            )
            for name in state.shared
        }
        slots = {
            name: self._slot(
                slot, _under(path, name), _under(real, f"slots/{name}"), False
            )
            for name, slot in state.slots.items()
        }
        return StageState(shared, slots)  # type: ignore[arg-type]

    def _slot(self, slot: PyTree, key: str, real: str, whole: bool) -> PyTree:
        leaves, spec = tree.flatten(slot)
        pairs = zip(tree.paths(slot), leaves, strict=True)
        places = [
            None
            if x is None
            else Place("slot", key, _under(real, leaf), self.number[leaf], whole)
            for leaf, x in pairs
        ]
        return tree.unflatten(spec, places)

    def _is_like_params(self, node: PyTree) -> bool:
        """Whether `node` has a tensor for each parameter, or for each of a group of them."""
        if not isinstance(node, (dict, list, tuple)) or not node:
            return False
        leaves, spec = tree.flatten(node)
        if not all(x is None or isinstance(x, Tensor) for x in leaves):
            return False
        if isinstance(node, dict):
            return spec == self.spec or all(name in self.number for name in node)
        shapes = [None if x is None else x.shape for x in leaves]
        return spec == self.spec and shapes == self.shapes


def _under(path: str, name: object) -> str:
    return f"{path}/{name}" if path else str(name)


def assemble(places: PyTree, values: list[Any]) -> PyTree:
    """``tree.unflatten``, with numbers for places.

    torch.compile takes no treespec from outside, and cannot flatten an empty dict.
    """
    if places is None or isinstance(places, int):
        return None if places is None else values[places]
    children = [assemble(child, values) for _, child in parts(places) or ()]
    return with_parts(places, children)


def differences(
    places: PyTree, old: PyTree, new: PyTree, path: str = ""
) -> list[tuple[int, Any]]:
    """The places where `new` has another object than `old`, and that object.

    Raises:
        TypeError: `new` has another form: a stateful optimizer keeps what it began with.
    """
    if not torch.compiler.is_compiling() and old is new:
        return []  # Dynamo cannot compare containers so
    if isinstance(places, int):
        if old is new:
            return []
        check_leaf(path, old, new)
        return [(places, new)]
    if places is None and new is None:
        return []
    before, after = parts(places), parts(new)
    same = before is not None and after is not None
    if not same or {name for name, _ in before} != {name for name, _ in after}:  # type: ignore[union-attr]
        raise TypeError(_another_form(path, old, new))
    found = dict(after)  # type: ignore[arg-type]
    olds = dict(parts(old) or ())
    return [
        pair
        for name, place in before  # type: ignore[union-attr]
        for pair in differences(place, olds[name], found[name], _under(path, name))
    ]


def check_leaf(path: str, old: Any, new: Any) -> None:
    """Raise TypeError where a tensor of the state becomes one of another form."""
    alike = isinstance(old, Tensor) and isinstance(new, Tensor)
    if not alike or old.shape != new.shape or old.dtype != new.dtype:
        counts = alike and not old.is_floating_point() and old.shape != new.shape
        if not (counts and path.rpartition("/")[2] == "count"):
            raise TypeError(_another_form(path, old, new))


def _another_form(path: str, old: Any, new: Any) -> str:
    return (
        f"the state changes its form at {path or 'its root'!r}: it was {_shown(old)} and became "
        f"{_shown(new)}. A stateful optimizer keeps each tensor where it began: let init make all "
        "that update returns, in the same shapes and dtypes."
    )


def _shown(x: Any) -> str:
    if isinstance(x, Tensor):
        return f"{x.dtype} of shape {tuple(x.shape)}"
    children = parts(x)
    return (
        repr(x)
        if children is None
        else f"{type(x).__name__} of {[name for name, _ in children]}"
    )


def apart(values: list[Any], written: list[Any]) -> list[Any]:
    """`values`, with copies of those that lie in memory which is going to be written."""
    if torch.compiler.is_compiling():  # where memory cannot be seen
        return [computed(x) for x in values]
    taken = {*memories(written)} - {0}
    pairs = zip(values, memories(values), strict=True)
    return [x.clone() if memory in taken else x for x, memory in pairs]
