"""Which leaves go through the same entries, and are worked out together."""

from __future__ import annotations

from typing import Any, NamedTuple

from functorch_opt._execution.body import Body
from functorch_opt._execution.segments import Segment
from functorch_opt._execution.views import View


class Route(NamedTuple):
    """Leaves that go through the same entries."""

    waiting: list[int]
    """Which of those that wait they go through."""
    leaves: list[int] | None
    """Which leaves of the whole tree they are; None: all."""
    places: list[list[int] | None]
    """For each entry, where it has these leaves; None: where the leaves are themselves."""
    last: dict[int | None, tuple[Segment, Body]]
    """What they went through last, by the row that updates were written into."""


def picked(values: list[Any], indices: list[int] | None) -> list[Any]:
    """The values with these indices; None: all."""
    return values if indices is None else [values[i] for i in indices]


def sorted_by_way(n: int, views: list[View]) -> list[Route]:
    """For each leaf which views it is in; leaves that are in the same go together."""
    where = [{leaf: place for place, leaf in enumerate(view.indices)} for view in views]
    ways: dict[tuple[int, ...], list[int]] = {}
    for leaf in range(n):
        way = tuple([k for k, places in enumerate(where) if leaf in places])
        ways.setdefault(way, []).append(leaf)
    routes = []
    for way, leaves in ways.items():
        places = [
            _unless_all([where[k][leaf] for leaf in leaves], len(where[k])) for k in way
        ]
        routes.append(Route([*way], _unless_all(leaves, n), places, {}))
    return routes


def _unless_all(indices: list[int], n: int) -> list[int] | None:
    return None if indices == [*range(n)] else indices
