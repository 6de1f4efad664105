"""A chain of rules, and where each has its tensors among the leaves of the chain's state.

A stateful optimizer keeps the state as single tensors. With this a step is made from the list of
them, and no tree of them is built and taken apart again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

from functorch_opt import tree
from functorch_opt._core.chain import Chain
from functorch_opt._core.rule import Leafwise
from functorch_opt._core.transformation import GradientTransformation
from functorch_opt._execution.together import Worked
from functorch_opt._execution.views import View
from functorch_opt._execution.walk import Walk
from functorch_opt.tree import PyTree

New = list[tuple[int, Any]]
"""What of a state is new, by its place in the list of its leaves."""


class RuleAt(NamedTuple):
    """A rule, and the places of its shared values and of the leaves of its slots."""

    tx: Leafwise
    shared: dict[str, int]
    slots: dict[str, list[Any]]


def taking(places: Sequence[int | None]) -> Callable[[list[Any]], list[Any]]:
    """A function that gives the values at these places of a list; None where a place is None."""
    if len(places) < 2 or None in places:
        return lambda values: [None if k is None else values[k] for k in places]
    take = itemgetter(*places)
    return lambda values: [*take(values)]


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


class Form(NamedTuple):
    """The state of a chain of rules, for params of some structure."""

    rules: list[RuleAt]
    spec: Any

    def leaves(self, state: PyTree) -> list[Any] | None:
        """The leaves of a state; None if it has another structure."""
        try:
            return self.spec.flatten_up_to(state)
        except (TypeError, ValueError):
            return None

    def with_new(self, leaves: list[Any], new: New) -> PyTree:
        """The state of these leaves, with others in the place of some."""
        leaves = [*leaves]
        for k, x in new:
            leaves[k] = x
        return tree.unflatten(self.spec, leaves)


def form_of(tx: GradientTransformation, state: PyTree, sharded: bool) -> Form | None:
    """The form of a state of `tx`; None if `tx` is no chain of rules."""
    leaves, spec = tree.flatten(state)
    numbered = tree.unflatten(spec, [*range(len(leaves))])
    rules = rules_at(tx, numbered, sharded)
    return None if rules is None else Form(rules, spec)


def new_of(rules: list[RuleAt], new: list[dict[str, Any]], state: list[Any]) -> New:
    """What of the shared values is new, by its place in the list of the state."""
    return [
        (k, mine[name])
        for rule, mine in zip(rules, new, strict=True)
        for name, k in rule.shared.items()
        if mine[name] is not state[k]
    ]


def go_flat(
    walk: Walk,
    rules: list[RuleAt],
    state: list[Any],
    view: View,
    worked: list[Worked],
) -> list[Any]:
    """Let `rules` wait, with their tensors from the list `state`; their next shared values.

    What has been `worked` out for each of them is not worked out again; the list may be empty.
    """
    new = []
    given: list[Worked | None] = [*worked] or [None] * len(rules)
    for (tx, shared, slots), known in zip(rules, given, strict=True):
        old = {name: state[k] for name, k in shared.items()}
        columns = {
            name: [None if k is None else state[k] for k in column]
            for name, column in slots.items()
        }
        walk.columns += columns.values()
        new.append(walk.rule(tx, old, columns, view, known))
    walk.go()
    return new
