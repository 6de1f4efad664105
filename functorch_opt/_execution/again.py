"""A step that goes the way of the one before.

Most steps of a training differ in numbers only. To find the way of a step anew (which rules there
are, which tensors they get, which code serves these) takes longer than small tensors take to be
stepped. So the way is kept, and what it depends on is asked at every step: what the functions of
all stages compute, what the tensors are, and of what kind is what the stages work out.
"""

from __future__ import annotations

import threading
from itertools import count
from operator import is_
from typing import Any

import torch
from torch import Tensor

from functorch_opt._core.rule import Leafwise
from functorch_opt._core.sharding import PLAIN
from functorch_opt._execution.body import Body, Columns, entry_of, is_of_kind
from functorch_opt._execution.flat import New, RuleAt, taking
from functorch_opt._execution.guards import Meaning
from functorch_opt._execution.segments import IN_PIECES, Segment, Watched
from functorch_opt._execution.together import (
    Joint,
    Share,
    Worked,
    costs_a_launch,
    is_number,
    meanings_of,
    program_of,
)
from functorch_opt._execution.waiting import Waiting
from functorch_opt._execution.walk import Walk

STEPS = 5000
"""After so many steps what stages work out once a step is compiled, on a CPU too.

To compile takes as long as thousands of steps save by it, unless the code lies on disk.
"""
MISSES = 8
"""After so many steps in a row that went another way, the way of a step is not kept any more."""

Job = tuple[Segment, Columns, Body]
"""Code, the leaves that it gets, and the rules with their values."""


class Ways:
    """The way of the last step of a chain of `rules`. `backend` compiles."""

    def __init__(self, rules: list[RuleAt], backend: Any) -> None:
        self.rules = rules
        self.backend = backend
        self.again: Again | None = None
        self.went: list[Segment] = []
        """The code that the last step went through."""
        self.missed = 0
        """How often in a row a step went another way than the one before."""

    def go(
        self,
        us: list[Any],
        ps: list[Any],
        state: list[Any],
        worked: list[Worked],
    ) -> New | None:
        """As `Again.go`, if the way of a step is known."""
        if self.again is None:
            return None
        new = self.again.go(us, ps, state, worked)
        if new is None:
            self.again = None
        self.missed = self.missed + 1 if new is None else 0
        return new

    def remember(
        self,
        walk: Walk,
        waiting: list[Waiting],
        jobs: list[Job],
        state: list[Any],
    ) -> None:
        """Keep the way of this step, if the one before went through the same code.

        Args:
            walk: the step.
            waiting: the rules with their values, as they waited in the end.
            jobs: what was done then.
            state: the leaves of the state that the step began with.
        """
        before, self.went = self.went, [segment for segment, _, _ in jobs]
        if len(jobs) != 1 or before != self.went or self.missed == MISSES:
            return
        if goes_one_way(self.rules, walk, waiting):
            self.again = Again(self.rules, waiting, jobs[0], state, self.backend)


class Again:
    """The steps of a chain that go one way.

    Args:
        rules: the rules of the chain; `goes_one_way` is true of them.
        waiting: the rules with the values of a step.
        job: what that step did.
        state: the leaves of the state that the step began with.
        backend: compiles.
    """

    def __init__(
        self,
        rules: list[RuleAt],
        waiting: list[Waiting],
        job: Job,
        state: list[Any],
        backend: Any,
    ) -> None:
        self.rules = rules
        self.segment, _, self.body = job
        self.backend = backend
        self.lock = threading.Lock()
        n = len(self.segment.where)
        self.shares = [Share(at.tx, _shared(at, state), {}, n, 0) for at in rules]
        self.slots = [taking(of) for at in rules for of in at.slots.values()]
        self.inputs = Watched(self._inputs(state))
        self.meanings = [meaning for at in rules for meaning in _meanings(at.tx)]
        self.keys = [meaning.now() for meaning in self.meanings]
        self.now = [each.now for each in waiting]
        known = [x for now in self.now for x in now.values()]
        self.wide = [x for x in known if _has_entries(x)]
        self.rows = [[*x.unbind()] for x in self.wide]
        self.memory = [x.data_ptr() for x in self.wide]
        self.joint: Joint | None = None
        self.kept: list[tuple[Tensor, bool]] = []
        """What it writes; True for shared values, which are new tensors after every step."""
        self.joined: list[int] = []
        """The shares that the joint program works out; the others are worked out behind them."""
        tensors = [x for x in known if isinstance(x, Tensor)]
        self.left = 0 if any(costs_a_launch(x.device) for x in tensors) else STEPS
        """How many steps are made before what is worked out once a step is compiled."""
        self._lay_out()

    def _lay_out(self) -> None:
        """Find the place of each value among those that all shares give."""
        self.apart = [k for k in range(len(self.shares)) if k not in self.joined]
        self.asked = [k for k in self.apart if not self.shares[k].tx.is_constant]
        """Those of them whose values may be of another kind at a step."""
        self.read: list[dict[str, int]] = [{} for _ in self.shares]
        self.next: list[dict[str, int]] = [{} for _ in self.shares]
        place = count()
        for k in (*self.joined, *self.apart):
            self.read[k] = dict(zip(self.now[k], place, strict=False))
            self.next[k] = dict(zip(self.rules[k].shared, place, strict=False))
        self.new: list[tuple[int, int]] = []
        for at, new in zip(self.rules, self.next, strict=True):
            self.new += zip(at.shared.values(), new.values(), strict=True)
        self.constants = [x for of in self.body.exact for x in of.values()]
        self.scalars: list[int] = []
        for read, shared, exact in zip(
            self.read, self.body.shared, self.body.exact, strict=True
        ):
            self.scalars += [read[name] for name in shared]
            self.scalars += [next(place) for _ in exact]

    def go(
        self,
        us: list[Any],
        ps: list[Any],
        state: list[Any],
        worked: list[Worked],
    ) -> New | None:
        """Make a step, and return what of the state is new. None: it goes another way.

        Args:
            us: the gradients.
            ps: the parameters. They are overwritten, and so are the slots.
            state: the leaves of the state.
            worked: an empty list. If the step goes another way, it gets what each stage has worked
                out, as far as this has been done: a `prepare` runs once a step.
        """
        inputs = self._inputs(state)
        if not (self._means_the_same() and self.inputs.are_like(inputs)):
            return None
        slots = [take(state) for take in self.slots]
        columns = [us, ps, *slots, *self.rows]
        if not self.segment.knows(columns):
            return None
        with self.lock:  # numbers may be written where those of the last step were
            values = self._values(inputs)
            if not self._are_of_kind(values):
                worked += self._of_each(values)
                return None
            self.segment.check(columns)
            self.segment.run(columns, self._filled(values))
        return [(k, values[i]) for k, i in self.new if values[i] is not state[k]]

    def _inputs(self, state: list[Any]) -> Columns:
        """What each share is worked out of."""
        return [
            [*[state[k] for k in at.shared.values()], *share.varying.values()]
            for at, share in zip(self.rules, self.shares, strict=True)
        ]

    def _means_the_same(self) -> bool:
        """Whether all functions compute what they did, of the same numbers of each leaf's own."""
        if [meaning.now() for meaning in self.meanings] != self.keys:
            return False
        return not self.wide or self.memory == [x.data_ptr() for x in self.wide]

    def _are_of_kind(self, values: list[Any]) -> bool:
        """Whether the code takes these values in the place of those that it was made for."""
        for k in self.asked:
            now = [values[i] for i in self.read[k].values()]
            if not all(map(_can_replace, self.now[k].values(), now)):
                return False
        return True

    def _of_each(self, values: list[Any]) -> list[Worked]:
        """The values, by stage and name."""
        found = []
        for read, new in zip(self.read, self.next, strict=True):
            now = {name: values[i] for name, i in read.items()}
            found.append(Worked(now, {name: values[i] for name, i in new.items()}))
        return found

    def _filled(self, values: list[Any]) -> Body:
        """The rules with these values."""
        if not self.segment.is_direct:
            places = [read.items() for read in self.read]
            now = [{name: values[i] for name, i in of} for of in places]
            return self.body.filled(now)
        given = [*values, *self.constants]
        scalars = [given[i] for i in self.scalars]
        if all(map(is_, scalars, self.body.scalars)):
            self.body.forget_values()
        else:
            self.body = self.body.given_scalars(scalars)
        return self.body

    def _values(self, inputs: Columns) -> list[Any]:
        """What all stages work out once a step: what rules read, and the next shared values."""
        self.left -= 1
        if self.left == -1:
            self._join(inputs)
        values = self._of_joint(self.joint, inputs) if self.joint else []
        for k in self.apart:
            now, shared = self.shares[k].worked_out(inputs[k])
            values += now.values()
            values += shared.values()
        return values

    def _of_joint(self, joint: Joint, inputs: Columns) -> list[Any]:
        """What the joint program works out."""
        of_all = [x for k in self.joined for x in inputs[k]]
        outputs = []
        for x, is_new in self.kept:
            outputs.append(torch.empty_like(x) if is_new else x)
        return joint.values_of(of_all, outputs)

    def _join(self, inputs: Columns) -> None:
        """Make one program of the shares that are made of single numbers, if it can be made."""
        joined = [k for k, share in enumerate(self.shares) if _is_of_numbers(share)]
        of_all = [x for k in joined for x in inputs[k]]
        devices = {x.device for x in of_all}
        if self.backend == IN_PIECES or len(devices) != 1:
            return
        shares = [self.shares[k] for k in joined]
        joint = program_of(shares, of_all, self.backend)
        if joint is None:
            return
        self.joint = joint
        self.joined = joined
        self._lay_out()
        new = {i for _, i in self.new}
        for x, i in zip(joint.empty(), joint.new, strict=True):
            self.kept.append((x, i in new))


def goes_one_way(rules: list[RuleAt], walk: Walk, waiting: list[Waiting]) -> bool:
    """Whether nothing of these rules depends on what tensors hold, and all wait for one pass."""
    if len(waiting) != len(rules) or walk.sharded or walk.extra:
        return False
    return all(map(_works_alone, rules, waiting))


def _works_alone(at: RuleAt, each: Waiting) -> bool:
    """Whether what a rule reads is made of its shared values and hyperparameters."""
    tx = at.tx
    if tx.looks_around or tx.due is not None or "params" in tx.once.reads:
        return False
    if each.entry is not entry_of("rule", tx):
        return False
    given = {id(x) for x in tx.once.varying.values()}
    others = [x for x in each.now.values() if not _is_plain(x)]
    return all(map(_has_entries, others)) and given.issuperset(map(id, others))


def _shared(at: RuleAt, state: list[Any]) -> dict[str, Any]:
    return {name: state[k] for name, k in at.shared.items()}


def _meanings(tx: Leafwise) -> list[Meaning]:
    return [*meanings_of(tx), *entry_of("rule", tx).meanings]


def _has_entries(x: Any) -> bool:
    """Whether it has an entry for each leaf."""
    return type(x) in PLAIN and x.dim() == 1


def _is_plain(x: Any) -> bool:
    return is_number(x) or isinstance(x, (bool, int, float))


def _can_replace(before: Any, x: Any) -> bool:
    """Whether code that was made for one value takes the other."""
    return x is before or (is_of_kind(before, x) and not _has_entries(x))


def _is_of_numbers(share: Share) -> bool:
    """Whether it can be worked out by a program: of single numbers on one device."""
    if not all(map(is_number, share.inputs)):
        return False
    return len({x.device for x in share.inputs}) == 1
