"""Where the tensors of a state are among what ``state[p]`` holds of all parameters."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, Any

from functorch_opt._execution.flat import taking

if TYPE_CHECKING:
    from functorch_opt.optim.plan import Plan

Entries = list[dict[str, Any]]


class Contents:
    """All values of the entries, one after another, and which of them a step needs.

    While the entries have the same keys in the same order, nothing has to be looked up by its name.

    Args:
        entries: what there is of each parameter, with nothing missing; `are_plain` is true of them.
        moved: the numbers of the parameters that move.
        where: of each kept tensor, the number of its parameter and the key.
        counts: the keys of the counts.
    """

    def __init__(
        self,
        entries: Entries,
        moved: list[int],
        where: list[tuple[int, str]],
        counts: list[str],
    ) -> None:
        self.keys = [*map(tuple, entries)]
        self.moved = moved
        place: dict[tuple[int, str], int] = {}
        for i, keys in enumerate(self.keys):
            for key in keys:
                place[i, key] = len(place)
        self.kept = taking([place.get(at) for at in where])
        """Takes the kept tensors out of `values`."""
        self.counts = {key: taking([place[i, key] for i in moved]) for key in counts}
        """Takes the counts of the parameters that move out of `values`, for each key."""

    def fit(self, entries: Entries, moved: list[int]) -> bool:
        """Whether all is where it was."""
        if self.moved != moved or not are_plain(entries):
            return False
        return self.keys == [*map(tuple, entries)]

    @staticmethod
    def values(entries: Entries) -> list[Any]:
        """All values, one after another."""
        return [*chain.from_iterable(map(dict.values, entries))]


def are_plain(entries: Entries) -> bool:
    """Whether all entries are dicts, and of no kind that keeps an order of its own."""
    return {dict}.issuperset(map(type, entries))


def leaves_of(
    plan: Plan, entries: Entries, moved: list[int], contents: Contents | None = None
) -> list[Any]:
    """The tensors of the functional state, in the order of its leaves.

    Args:
        plan: knows which they are.
        entries: what there is of each parameter.
        moved: the numbers of the parameters that move.
        contents: where all is, if these are the entries that it was made for.
    """
    if contents is None:
        kept = [entries[i].get(key) for i, key in plan.where]
        counts = {key: [entries[i][key] for i in moved] for _, key in plan.counted}
    else:
        given = contents.values(entries)
        kept = contents.kept(given)
        counts = {key: contents.counts[key](given) for _, key in plan.counted}
    flat: list[Any] = [None] * len(plan.flat)
    for k, x in zip(plan.kept, kept, strict=True):
        flat[k] = x
    leaves = [plan.leaf[i] for i in moved]
    own = {
        key: plan.counts.own(key, of, leaves, len(entries)) for key, of in counts.items()
    }
    for k, key in plan.counted:
        flat[k] = own[key]
    for k, key in plan.clocked:
        flat[k] = plan.counts.time(key, entries)
    return flat
