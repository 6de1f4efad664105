"""A step in place whose slots lie on the host, in windows that are copied to the device and back.

The leaves are divided into windows of about 64 MB of slots. While a window is stepped, the slots of
the next one are on the way to the device, and those of the one before are on the way back. So the
slots of two windows are on the device at a time.
"""

from __future__ import annotations

import functools
import itertools
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor

from functorch_opt import tree
from functorch_opt._core.state import StageState, parts
from functorch_opt._execution.again import MISSES, Job, Ways
from functorch_opt._execution.body import Body, Columns
from functorch_opt._execution.compiled import MODELS, CompiledStep
from functorch_opt._execution.flat import RuleAt
from functorch_opt._execution.routes import Route
from functorch_opt._execution.segments import Segment
from functorch_opt._execution.waiting import NewState, Waiting
from functorch_opt._execution.walk import Walk
from functorch_opt.codecs.coded import Coded

BYTES = 64 << 20
"""Of the slots of a window. A tensor with more is a window by itself."""


class Card:
    """The copies between the host and a card, on streams of their own: one there, one back."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.there = torch.cuda.Stream(device)
        self.back = torch.cuda.Stream(device)

    def fetch(self, hosts: list[Tensor]) -> tuple[list[Tensor], Any]:
        """Begin to copy tensors to the card. The copies, and what says that they are made."""
        # All windows but the last one are on the way back by now. When they have arrived, their
        # memory is free, and two windows are on the card.
        self.there.wait_stream(self.back)
        with torch.cuda.stream(self.there):
            copies = [x.to(self.device, non_blocking=True) for x in hosts]
        return copies, self.there.record_event()

    def wait(self, made: Any) -> None:
        """What is launched from now on begins when the copies are made."""
        torch.cuda.current_stream(self.device).wait_event(made)

    def put(self, copies: list[Tensor], hosts: list[Tensor]) -> None:
        """Begin to copy tensors back, when what has been launched so far is done."""
        self.back.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.back):
            for host, copy in zip(hosts, copies, strict=True):
                host.copy_(copy, non_blocking=True)

    def finish(self) -> None:
        """Wait until all is back. Whoever reads the state then reads the numbers of this step."""
        self.back.synchronize()


@functools.cache
def card(device: torch.device) -> Card:
    """The copies to and from a device."""
    return Card(device)


def card_of(p: Tensor) -> Card | None:
    """The copies to and from the device of a parameter; None if that is the host."""
    return None if p.device.type == "cpu" else card(p.device)


class Window:
    """Some leaves of one device, whose slots lie on the host."""

    def __init__(self, job: Job) -> None:
        self.segment, self.columns, self.body = job
        us, ps = self.columns[:2]
        moved = [i for i, u in enumerate(us) if u is not None]
        numbers = range(2, 2 + self.body.n_slots)
        places = [(c, i) for c in numbers for i in moved]
        self.places = [(c, i) for c, i in places if self.columns[c][i] is not None]
        self.hosts = [self.columns[c][i] for c, i in self.places]
        self.card = card_of(ps[moved[0]]) if self.hosts else None
        self.fetched: tuple[list[Tensor], Any] = [], None

    def fetch(self) -> None:
        """Begin to fetch the slots."""
        if self.card is not None:
            self.fetched = self.card.fetch(self.hosts)

    def step(self) -> None:
        """Make the step, and begin to put the slots back."""
        if self.card is None:
            self.segment.run(self.columns, self.body)
            return
        copies, made = self.fetched
        columns = [[*column] for column in self.columns]
        for (c, i), x in zip(self.places, copies, strict=True):
            columns[c][i] = x
        self.card.wait(made)
        self.segment.run(columns, self.body)
        self.card.put(copies, self.hosts)
        self.fetched = [], None


class WalkFromHost(Walk):
    """A walk that refuses, before anything is written, what would look at slots in between."""

    def rule(
        self,
        tx: Any,
        old: dict[str, Tensor],
        columns: dict[str, list[Any]],
        view: Any,
        worked: Any = None,
    ) -> dict[str, Tensor]:
        read = sorted({*tx.totals.reads} & columns.keys())
        if read:
            raise _refused(tx, f"adds {', '.join(read)} up over all parameters")
        if isinstance(tx, Coded) and tx.bits.names:
            raise _refused(tx, "draws bits for all of its slots at once")
        return super().rule(tx, old, columns, view, worked)

    def _other(self, tx: Any, state: Any, view: Any) -> NewState:
        if _has_slots(state):
            raise _refused(tx, "is not made of rules that can run in windows")
        return super()._other(tx, state, view)

    def _wrap_apart(self, tx: Any, state: Any, view: Any) -> NewState:
        if _has_slots(state):
            raise _refused(tx, "shows whole trees to what is inside")
        return super()._wrap_apart(tx, state, view)


class StepFromHost(CompiledStep):
    """A step in place for slots that lie on the host.

    Args:
        tx: any transformation. A stage with slots that sees more than one tensor of them at a time
            is an error, before anything is written.
        backend: as in `CompiledStep`.
    """

    walks = WalkFromHost

    def __init__(self, tx: Any, backend: Any) -> None:
        super().__init__(tx, True, backend)
        self.divided: OrderedDict[Any, tuple[list[Route], list[Route]]] = OrderedDict()

    def _ways(self, rules: list[RuleAt]) -> Ways:
        """The way of a step goes around windows, so none is kept."""
        ways = super()._ways(rules)
        ways.missed = MISSES
        return ways

    def _routes(self, walk: Walk, waiting: list[Waiting]) -> list[Route]:
        """The leaves by what they go through, in windows."""
        routes = super()._routes(walk, waiting)
        sizes = _bytes(waiting, len(walk.ps))
        devices = [None if p is None else p.device for p in walk.ps]
        key = id(routes), (*sizes,), (*devices,)
        found = self.divided.get(key)
        if found is None:
            windows = [each for of in routes for each in in_windows(of, sizes, devices)]
            found = routes, windows
            with self.lock:
                self.divided[key] = found
                while len(self.divided) > 8 * MODELS:
                    self.divided.popitem(last=False)
        return found[1]

    def _segment(
        self,
        mine: list[Waiting],
        into: int | None,
        columns: Columns,
        walk: Walk,
        route: Route,
    ) -> tuple[Segment, Body]:
        """What knows these tensors, with slots that lie where they will be stepped."""
        end = 2 + sum(len(each.slots) for each in mine)
        there = [[*map(_like, column, columns[1])] for column in columns[2:end]]
        columns = [*columns[:2], *there, *columns[end:]]
        return super()._segment(mine, into, columns, walk, route)

    def _key(self, body: Body, route: Route) -> Any:
        """Each window has segments of its own, for its leaves."""
        return body.key, *(route.leaves or ())

    def _run(self, jobs: list[Job]) -> None:
        windows = [*map(Window, jobs)]
        try:
            for window, following in itertools.pairwise([None, *windows, None]):
                if following is not None:
                    following.fetch()
                if window is not None:
                    window.step()
        finally:
            for used in {window.card for window in windows}:
                if used is not None:
                    used.finish()


def in_windows(
    route: Route,
    sizes: list[int],
    devices: list[Any],
) -> list[Route]:
    """A route, divided into windows of one device each and of about `BYTES` bytes of slots."""
    leaves = [*range(len(sizes))] if route.leaves is None else route.leaves
    by_device: dict[Any, list[int]] = {}
    for k, leaf in enumerate(leaves):
        by_device.setdefault(devices[leaf], []).append(k)
    windows: list[list[int]] = []
    for alike in by_device.values():
        windows.append([])
        full = 0
        for k in alike:
            size = sizes[leaves[k]]
            if full and full + size > BYTES:
                windows.append([])
                full = 0
            windows[-1].append(k)
            full += size
    return [_part(route, leaves, mine) for mine in windows]


def _part(
    route: Route,
    leaves: list[int],
    mine: list[int],
) -> Route:
    """The route of some of its leaves."""
    places: list[Any] = [
        mine if of is None else [of[k] for k in mine] for of in route.places
    ]
    return Route(route.waiting, [leaves[k] for k in mine], places, {})


def _bytes(waiting: list[Waiting], n: int) -> list[int]:
    """How many bytes the slots of each leaf have."""
    sizes = [0] * n
    for each in waiting:
        for column in each.slots.values():
            for i, x in zip(each.view.indices, column, strict=True):
                sizes[i] += 0 if x is None else x.nbytes
    return sizes


def _like(x: Any, p: Any) -> Any:
    """What a slot will be, on the device of its parameter; nobody reads its numbers."""
    if x is None or x.device == p.device:
        return x
    return torch.empty_like(x, device=p.device)


def _has_slots(state: Any) -> bool:
    """Whether a state has a slot of any stage."""
    if isinstance(state, StageState):
        return bool(tree.leaves(state.slots))
    return any(_has_slots(child) for _, child in parts(state) or ())


def _refused(tx: Any, why: str) -> ValueError:
    return ValueError(
        f"{tx.name} {why}, and its slots lie on the host, from where some are fetched at a time. "
        "Leave slots_on_host away, or the stage."
    )
