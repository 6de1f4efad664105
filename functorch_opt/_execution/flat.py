"""A chain of rules, and where each has its tensors among the leaves of the chain's state.

A stateful optimizer keeps the state as single tensors. With this a step is made from the list of
them, and no tree of them is built and taken apart again.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from functorch_opt import tree
from functorch_opt._core.chain import Chain
from functorch_opt._core.rule import Leafwise
from functorch_opt._core.transformation import GradientTransformation
from functorch_opt._execution.views import View
from functorch_opt._execution.walk import Walk
from functorch_opt.tree import PyTree


class RuleAt(NamedTuple):
    """A rule, and the places of its shared values and of the leaves of its slots."""

    tx: Leafwise
    shared: dict[str, int]
    slots: dict[str, list[Any]]


def rules_at(
    tx: GradientTransformation, places: PyTree, sharded: bool
) -> list[RuleAt] | None:
    """The rules of a chain; None if something in it is no rule, or is worked out by owners.

    Args:
        tx: a transformation.
        places: its state, with the place of each tensor in the list in the place of the tensor.
        sharded: whether any parameter lies on several ranks.
    """
    if isinstance(tx, Leafwise):
        if sharded and tx.kind == "tensorwise":
            return None
        slots = {name: tree.flatten(of)[0] for name, of in places.slots.items()}
        return [RuleAt(tx, places.shared, slots)]
    if not isinstance(tx, Chain):
        return None
    rules: list[RuleAt] = []
    for name, stage in tx.stages.items():
        found = rules_at(stage, places[name], sharded)
        if found is None:
            return None
        rules += found
    return rules


def go_flat(
    walk: Walk,
    rules: list[RuleAt],
    state: list[Any],
    view: View,
) -> list[Any]:
    """Let `rules` wait, with their tensors from the list `state`; their next shared values."""
    new = []
    for tx, shared, slots in rules:
        old = {name: state[k] for name, k in shared.items()}
        columns = {
            name: [None if k is None else state[k] for k in column]
            for name, column in slots.items()
        }
        walk.columns += columns.values()
        new.append(walk.rule(tx, old, columns, view))
    walk.go()
    return new
