"""Where the tensors of a state are among what ``state[p]`` holds of all parameters."""

from __future__ import annotations

from typing import Any

from functorch_opt._execution.flat import taking

Entries = list[dict[str, Any]]


class Contents:
    """All values of the entries, one after another, and which of them a step needs.

    While the entries have the same keys in the same order, nothing has to be looked up by its name.

    Args:
        entries: what there is of each parameter, with nothing missing.
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
        self.keys, self.moved = [*map(tuple, entries)], moved
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
        return self.moved == moved and self.keys == [*map(tuple, entries)]

    @staticmethod
    def values(entries: Entries) -> list[Any]:
        """All values, one after another."""
        return [x for entry in entries for x in entry.values()]
