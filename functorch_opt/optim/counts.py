"""The counts of a stateful optimizer: each parameter's own, and the clock of the training."""

from __future__ import annotations

from operator import is_
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

Entries = list[dict[str, Any]]


class Counts:
    """Reads and writes the counts under some keys of ``state[p]``.

    A count is one of its parameter: who has no gradient at a step is not counted. A clock is one of
    the training. It lies with each parameter that moved, and the largest is what time it is.
    """

    def __init__(
        self, counts: list[str], clocks: list[str], device: torch.device
    ) -> None:
        self.clocks, self.device = clocks, device
        self.counts = counts or ([] if clocks else ["step"])
        self.keys = [*self.counts, *clocks]
        self.tallies: dict[str, tuple[Tensor, tuple[Tensor, ...]]] = {}
        self.alike: dict[str, tuple[Tensor, Tensor]] = {}
        """What a tally is expected to hold, and the number that all its elements then are."""

    def own(
        self,
        key: str,
        counts: list[Tensor],
        moved: list[int],
        n: int,
    ) -> Tensor:
        """One for each of `n` leaves; one number, where those that `moved` have the same."""
        together = self._together(key, counts)
        traced = torch.compiler.is_compiling() or is_in_torch_dispatch_mode()
        tallied = together is not None
        if together is None:
            if len({count.device for count in counts}) > 1:
                counts = [count.cpu() for count in counts]
            together = torch.stack(counts)
        elif key in self.alike and not traced:
            expected, number = self.alike[key]
            if torch.equal(together, expected):
                return number
        of_moved = together.to(torch.int64, copy=True)
        if not traced and bool((of_moved == of_moved[0]).all()):
            number = of_moved[0].to(self.device)
            if tallied:
                self.alike[key] = together.clone(), number
            return number
        of_moved = of_moved.to(self.device)
        where = torch.tensor(moved, device=self.device)
        return of_moved.new_zeros(n).index_copy(0, where, of_moved)

    def time(self, key: str, entries: Entries) -> Tensor:
        """What time it is: the latest step that any parameter made."""
        seen = {id(x): x for x in (entry.get(key) for entry in entries) if x is not None}
        clocks = [x.to(self.device, torch.int64) for x in seen.values()]
        if not clocks:
            return torch.zeros((), dtype=torch.int64, device=self.device)
        return clocks[0].clone() if len(clocks) == 1 else torch.stack(clocks).amax()

    def _together(self, key: str, counts: list[Tensor]) -> Tensor | None:
        """The tensor whose elements these counts are, if they are all of it."""
        together, views = self.tallies.get(key, (None, ()))
        if len(views) == len(counts) and all(map(is_, views, counts)):
            return together
        return None

    def advance(
        self,
        key: str,
        counts: list[Tensor],
        by: Any,
        entries: Entries | None,
        in_place: bool,
    ) -> None:
        """Add `by`, a number or one for each, to these counts.

        `in_place`, those of all parameters become elements of one tensor: one operation. Not those
        that lie in shared memory, where other processes see them.
        """
        if (together := self._together(key, counts)) is not None:
            together.add_(by)
            expected, number = self.alike.pop(key, (together, by))
            if expected is not together and isinstance(by, int):
                self.alike[key] = expected.add_(by), number + by
            return
        if isinstance(by, int):
            torch._foreach_add_(counts, by)
        else:
            shares = by.to(counts[0].device).expand(len(counts)).unbind()
            torch._foreach_add_(
                counts, [x.to(c.dtype) for x, c in zip(shares, counts, strict=True)]
            )
        kinds = {(type(count), count.dtype, count.device) for count in counts}
        if entries and in_place and len(kinds) == 1 and not any(map(_is_shared, counts)):
            together = torch.stack(counts)
            self.tallies[key] = together, together.unbind()
            self.alike.pop(key, None)
            for entry, count in zip(entries, self.tallies[key][1], strict=True):
                entry[key] = count

    def set_time(self, key: str, time: Tensor, entries: Entries) -> None:
        """Let the parameters that moved have this time."""
        if torch.compiler.is_compiling():
            for entry in entries:
                entry[key].copy_(time)
            return
        if time.is_meta:  # in a dry run it cannot be read, but it goes on
            time = torch.stack([entry[key] for entry in entries]).amax() + 1
        time = time.detach().to("cpu", copy=True)
        shared = _is_shared(entries[0][key])
        for entry in entries:
            if shared:
                entry[key].copy_(time)
            else:
                entry[key] = time

    def first(self, key: str, started: bool) -> Tensor:
        """The count of a parameter that makes its first step.

        A checkpoint of torch's SGD has no step: where there is state, this is not the first one.
        """
        if key != "step":
            return torch.zeros((), dtype=torch.int64)
        wide = torch.get_default_dtype() == torch.float64
        dtype = torch.float64 if wide else torch.float32  # that of torch's own ``step``
        return torch.tensor(int(started), dtype=dtype)


def _is_shared(x: Tensor) -> bool:
    """Whether other processes may see it."""
    return x.device.type == "cpu" and x.is_shared()
