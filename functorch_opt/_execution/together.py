"""What stages work out once a step, as one compiled function.

Counts, schedules and bias corrections are a dozen operations on single numbers. On a GPU each would
be a launch, and the launches would take longer than the pass over all tensors. So what stages work
out without looking at a tensor is traced, all stages in one, and compiled: one launch. It is kept
for as long as the stages compute the same, which is asked at every step.
"""

from __future__ import annotations

import itertools
from collections import Counter, OrderedDict
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from functorch_opt._core.rule import Leafwise
from functorch_opt._core.sharding import PLAIN
from functorch_opt._execution.body import written
from functorch_opt._execution.guards import Meaning, surroundings
from functorch_opt._execution.kernel import Program, told_apart
from functorch_opt._execution.trials import Untraceable, warn_uncompiled

DEVICES = {"cuda", "xpu"}
"""Where an operation on one number costs a launch."""
MOST = 16
"""Programs for the same functions with other numbers, before one stops making more of them."""
KEPT = 256
WHAT = "compiled_step works out what prepare returns operation by operation"


class Known(OrderedDict[Any, "Joint | None"]):
    """The functions that have been compiled, for the whole process; None if that cannot be."""

    def __init__(self) -> None:
        super().__init__()
        self.made: Counter[Any] = Counter()


KNOWN = Known()


class Reads(TorchDispatchMode):
    """Sees whether Python reads a number out of a tensor: what it does then is no program."""

    seen = False

    def __torch_dispatch__(
        self, f: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.seen |= f is torch.ops.aten._local_scalar_dense.default
        return f(*args, **(kwargs or {}))


class Worked(NamedTuple):
    """What a rule reads of a step, and the next shared values."""

    now: dict[str, Any]
    shared: dict[str, Tensor]


class TooMany(RuntimeError):
    """Functions with other numbers at every step are not compiled for ever."""

    cure = "Give a number that changes as a tensor."

    def __init__(self) -> None:
        super().__init__(f"it was compiled for {MOST} settings of the same functions")


class Share:
    """What one stage works out. `now` and `shared` are filled when all shares are worked out."""

    def __init__(
        self,
        tx: Leafwise,
        shared: dict[str, Tensor],
        extra: Mapping[str, Any],
        n: int,
    ) -> None:
        self.tx, self.n = tx, n
        self.old = shared
        varying = tx.once.varying
        self.varying = {name: x for name, x in varying.items() if not callable(x)}
        self.extra = {name: extra[name] for name in tx.extra_args if name in extra}
        self.inputs = [
            *self.old.values(),
            *self.varying.values(),
            *self.extra.values(),
        ]
        self.now: dict[str, Any] = {}
        self.shared: dict[str, Tensor] = {}

    @property
    def is_alone(self) -> bool:
        """Whether it is made of single numbers on a device where that pays."""
        if not all(map(_is_number, self.inputs)):
            return False
        devices = {x.device for x in self.inputs}
        return len(devices) == 1 and devices.pop().type in DEVICES

    @property
    def key(self) -> Any:
        """What it computes; None if nobody can tell."""
        meanings = _meanings(self.tx)
        functions = tuple([meaning.now() for meaning in meanings])
        if any(meaning.unknown for meaning in meanings):
            return None
        kinds = tuple([(x.dtype, x.device) for x in self.inputs])
        schedules = self.tx.once.schedules
        given = self.old, self.varying, schedules, self.extra
        names = [*itertools.chain(*given), *self.tx.reads]
        lengths = tuple([len(part) for part in given])
        numbers = written(self.tx.once.numbers)
        return functions, numbers, kinds, lengths, tuple(names)

    def worked_out(self, inputs: list[Tensor]) -> Worked:
        """What comes of these inputs."""
        left = iter(inputs)
        old = {name: next(left) for name in self.old}
        instead = {name: next(left) for name in self.varying}
        extra = {name: next(left) for name in self.extra}
        leaves: list[Any] = [None] * self.n
        given: Any = (None, old, None, extra, leaves, leaves, {}, instead)
        now, shared = self.tx.scalars(*given)
        read = {name: now[name] for name in self.tx.reads if name in now}
        return Worked(read, shared)


class Together:
    """The shares of a step. They are collected first, and worked out at once."""

    def __init__(self, backend: Any) -> None:
        self.backend = backend
        self.shares: list[Share] = []

    def takes(
        self,
        tx: Leafwise,
        shared: dict[str, Tensor],
        extra: Mapping[str, Any],
        n: int,
    ) -> Share | None:
        """The share of a stage; None if it has to be worked out by itself."""
        looks = tx.looks_around or "params" in tx.once.reads or tx.due is not None
        if self.backend is None or looks or tx.is_constant:
            return None
        if not any(x.device.type in DEVICES for x in shared.values()):
            return None
        share = Share(tx, shared, extra, n)
        if not share.is_alone:
            return None
        self.shares.append(share)
        return share

    def work_out(self) -> None:
        """Fill the shares."""
        shares, self.shares = self.shares, []
        if not shares:
            return
        keys = [share.key for share in shares]
        inputs = [x for share in shares for x in share.inputs]
        if None in keys:
            _fill(shares, _all(shares, inputs))
            return
        key = tuple(keys), str(self.backend), surroundings()
        if key in KNOWN:
            KNOWN.move_to_end(key)
            joint = KNOWN[key]
            _fill(shares, joint(inputs) if joint else _all(shares, inputs))
            return
        inputs = told_apart(inputs)
        with Reads() as reads:
            results = _all(shares, inputs)
        made = None if reads.seen else _made(shares, inputs, results, self.backend)
        KNOWN[key] = made
        while len(KNOWN) > KEPT:
            KNOWN.popitem(last=False)
        _fill(shares, results)


Results = list[Worked]


class Joint:
    """The shares of a step as one program. It has a place for each number that is worked out."""

    def __init__(
        self, shares: list[Share], inputs: list[Tensor], results: Results, backend: Any
    ) -> None:
        self.names = [([*one.now], [*one.shared]) for one in results]
        values = _flat(results)
        self.values = values
        """What is worked out; of that, inputs and new tensors are another at every step."""
        places = {id(x): i for i, x in enumerate(inputs)}
        self.same: dict[int, int] = {}
        self.new: list[int] = []
        for k, x in enumerate(self.values):
            if id(x) in places:
                self.same[k] = places[id(x)]
            elif isinstance(x, Tensor):
                self.new.append(k)
        self.kinds = [(values[k].dtype, values[k].device) for k in self.new]
        n = len(inputs)

        def f(args: list[Tensor]) -> list[tuple[int, Tensor]]:
            again = _flat(_all(shares, args[:n]))
            return [(n + i, again[k]) for i, k in enumerate(self.new)]

        examples = [*inputs, *self._empty()]
        self.program = Program(f, examples, 1, backend)
        for k in (*self.same, *self.new):
            self.values[k] = None

    def _empty(self) -> list[Tensor]:
        return [
            torch.empty((), dtype=dtype, device=device) for dtype, device in self.kinds
        ]

    def __call__(self, inputs: list[Tensor]) -> Results:
        outputs = self._empty()
        self.program([*inputs, *outputs])
        values = [*self.values]
        for k, i in self.same.items():
            values[k] = inputs[i]
        for k, x in zip(self.new, outputs, strict=True):
            values[k] = x
        left = iter(values)
        found = []
        for now, shared in self.names:
            read = {name: next(left) for name in now}
            new = {name: next(left) for name in shared}
            found.append(Worked(read, new))
        return found


def _made(
    shares: list[Share], inputs: list[Tensor], results: Results, backend: Any
) -> Joint | None:
    """The shares as one program, or None."""
    family = []
    for share in shares:
        functions = [meaning.function for meaning in _meanings(share.tx)]
        family += [getattr(f, "__code__", type(f)) for f in functions]
    KNOWN.made[tuple(family)] += 1
    if KNOWN.made[tuple(family)] > MOST:
        warn_uncompiled(WHAT, TooMany())
        return None
    tensors = [x for x in _flat(results) if isinstance(x, Tensor)]
    if not all(map(_is_number, tensors)):
        return None
    try:
        return Joint(shares, inputs, results, backend)
    except Untraceable:
        return None
    except Exception as error:
        warn_uncompiled(WHAT, error)
        return None


def _all(shares: list[Share], inputs: list[Tensor]) -> Results:
    found, begin = [], 0
    for share in shares:
        end = begin + len(share.inputs)
        found.append(share.worked_out(inputs[begin:end]))
        begin = end
    return found


def _fill(shares: list[Share], results: Results) -> None:
    for share, worked in zip(shares, results, strict=True):
        share.now.update(worked.now)
        share.shared.update(worked.shared)


def _flat(results: Results) -> list[Any]:
    values: list[Any] = []
    for worked in results:
        values += worked.now.values()
        values += worked.shared.values()
    return values


def _is_number(x: Any) -> bool:
    return type(x) in PLAIN and not x.dim()


def _meanings(tx: Leafwise) -> list[Meaning]:
    """What the functions of a stage compute that are run once a step."""
    kept = vars(tx).get("_once_a_step")
    if kept is None:
        schedules = [x for x in tx.once.varying.values() if callable(x)]
        functions = [*([tx.once.prepare] if tx.once.prepare else []), *schedules]
        kept = tx._once_a_step = [Meaning(f) for f in functions]  # type: ignore[attr-defined]
    return kept
