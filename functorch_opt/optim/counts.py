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

    If they are `capturable`, they lie on the device, and a step writes over them. Whether they are
    all alike is then not asked at every step, for the device would have to answer.
    """

    def __init__(
        self,
        counts: list[str],
        clocks: list[str],
        device: torch.device,
        capturable: bool = False,
    ) -> None:
        self.clocks, self.device, self.capturable = clocks, device, capturable
        self.counts = counts or ([] if clocks else ["step"])
        self.keys = [*self.counts, *clocks]
        self.tallies: dict[str, tuple[Tensor, tuple[Tensor, ...]]] = {}
        self.alike: dict[str, tuple[Tensor, Tensor]] = {}
        """What a tally is expected to hold, and the number that all its elements then are."""
        self.seen_alike: dict[str, int | None] = {}
        """Of a tally whose elements are known to be alike, how often it had been written to."""

    def own(
        self,
        key: str,
        counts: list[Tensor],
        moved: list[int],
        n: int,
    ) -> Tensor:
        """One for each of `n` leaves; one number, where those that `moved` have the same."""
        together = self._together(key, counts)
        if self.capturable:
            number = self._known_alike(key, together)
            if number is not None:
                return number
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
            if self.capturable:
                self.seen_alike[key] = together._version if tallied else None
            elif tallied:
                self.alike[key] = together.clone(), number
            return number
        self.seen_alike.pop(key, None)
        of_moved = of_moved.to(self.device)
        where = torch.tensor(moved, device=self.device)
        return of_moved.new_zeros(n).index_copy(0, where, of_moved)

    def _known_alike(self, key: str, together: Tensor | None) -> Tensor | None:
        """The number that all counts are; None if the device has to be asked."""
        version = None if together is None else together._version
        if together is not None and self.seen_alike.get(key) == version:
            return together[0].to(torch.int64, copy=True)
        if is_capturing(self.device):
            raise RuntimeError(
                "a step is captured as a CUDA graph, and its counts are not known to be alike. Make "
                "two steps before, with gradients of the same parameters."
            )
        return None

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
            if self.capturable:
                self._still_alike(key, together, by)
                return
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
            self._still_alike(key, together, by)
            for entry, count in zip(entries, self.tallies[key][1], strict=True):
                entry[key] = count

    def _still_alike(self, key: str, together: Tensor, by: Any) -> None:
        """What was alike and went on by one number is alike."""
        if key in self.seen_alike and not (isinstance(by, Tensor) and by.dim()):
            self.seen_alike[key] = together._version

    def set_time(self, key: str, time: Tensor, entries: Entries) -> None:
        """Let the parameters that moved have this time."""
        if torch.compiler.is_compiling():
            for entry in entries:
                entry[key].copy_(time)
            return
        if time.is_meta:  # in a dry run it cannot be read, but it goes on
            time = torch.stack([entry[key] for entry in entries]).amax() + 1
        if self.capturable:
            self._write_time(key, time, entries)
            return
        time = time.detach().to("cpu", copy=True)
        shared = _is_shared(entries[0][key])
        for entry in entries:
            if shared:
                entry[key].copy_(time)
            else:
                entry[key] = time

    def _write_time(self, key: str, time: Tensor, entries: Entries) -> None:
        """Write over the clock, which is one tensor from the first step on."""
        clocks = [*{id(entry[key]): entry[key] for entry in entries}.values()]
        if len(clocks) == 1 or is_capturing(self.device):
            torch._foreach_copy_(clocks, [time] * len(clocks))
            return
        time = time.detach().to(self.device, copy=True)
        for entry in entries:
            entry[key] = time

    def first(self, key: str, started: bool) -> Tensor:
        """The count of a parameter that makes its first step.

        A checkpoint of torch's SGD has no step: where there is state, this is not the first one.
        """
        if key != "step":
            return torch.zeros((), dtype=torch.int64, device=self.place)
        wide = torch.get_default_dtype() == torch.float64
        dtype = torch.float64 if wide else torch.float32  # that of torch's own ``step``
        return torch.full((), int(started), dtype=dtype, device=self.place)

    @property
    def place(self) -> torch.device:
        """Where the counts lie."""
        return self.device if self.capturable else torch.device("cpu")

    def move(self, entries: Entries) -> None:
        """Bring capturable counts to the device: a checkpoint may have them elsewhere."""
        for entry in entries if self.capturable else ():
            for key in self.keys:
                if key in entry and entry[key].device != self.place:
                    entry[key] = entry[key].to(self.place)


def is_capturing(device: torch.device) -> bool:
    """Whether what is done on `device` now is being captured as a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _is_shared(x: Tensor) -> bool:
    """Whether other processes may see it."""
    return x.device.type == "cpu" and x.is_shared()
