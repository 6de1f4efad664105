"""What stages work out once a step, as one compiled function.

Counts, schedules and bias corrections are a dozen operations on single numbers. On a GPU each would
be a launch, and the launches would take longer than the pass over all tensors. So what stages work
out without looking at a tensor is traced, all stages in one, and compiled: one launch. It is kept
for as long as the stages compute the same, which is asked at every step.

A stage may also ask for the norm of all updates, as a clip does. The norms of single tensors are
one operation for all of them (`lengths`), and what is made of them is in the one launch.
"""

from __future__ import annotations

import itertools
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from functorch_opt._core.numerics import Lengths, lengths
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
        self.asks_norm: OrderedDict[Any, bool] = OrderedDict()
        """Of stages that read ``updates``, whether they ask for nothing but the norm."""


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
        asked: int,
    ) -> None:
        self.tx, self.n = tx, n
        self.old = shared
        self.asked = asked
        """Of how many tensors it asks the norms; they are the last of its inputs."""
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
        if not all(map(is_number, self.inputs)):
            return False
        devices = {x.device for x in self.inputs}
        if not devices:
            return self.asked > 0
        return len(devices) == 1 and all(map(costs_a_launch, devices))

    @property
    def key(self) -> Any:
        """What it computes; None if nobody can tell."""
        meanings = meanings_of(self.tx)
        functions = tuple([meaning.now() for meaning in meanings])
        if any(meaning.unknown for meaning in meanings):
            return None
        kinds = tuple([(x.dtype, x.device) for x in self.inputs])
        schedules = self.tx.once.schedules
        given = self.old, self.varying, schedules, self.extra
        names = [*itertools.chain(*given), *self.tx.reads]
        lengths = tuple([len(part) for part in given])
        numbers = written(self.tx.once.numbers)
        return functions, numbers, kinds, lengths, tuple(names), self.asked

    def worked_out(self, inputs: list[Tensor]) -> Worked:
        """What comes of these inputs."""
        left = iter(inputs)
        old = {name: next(left) for name in self.old}
        instead = {name: next(left) for name in self.varying}
        extra = {name: next(left) for name in self.extra}
        updates = Lengths([*left]) if self.asked else None
        leaves: list[Any] = [None] * self.n
        given: Any = (updates, old, None, extra, leaves, leaves, {}, instead)
        now, shared = self.tx.scalars(*given)
        read = {name: now[name] for name in self.tx.reads if name in now}
        return Worked(read, shared)


class Updates(NamedTuple):
    """The updates that a stage sees: as leaves, and as a tree, which a function makes."""

    leaves: list[Any]
    tree: Callable[[], Any]
    are_settled: bool
    """Whether they are those that came in, on one rank."""


class Together:
    """The shares of a step. They are collected first, and worked out at once."""

    def __init__(self, backend: Any) -> None:
        self.backend = backend
        self.shares: list[Share] = []
        self.known_norms: dict[Any, list[Tensor]] = {}

    def takes(
        self,
        tx: Leafwise,
        shared: dict[str, Tensor],
        extra: Mapping[str, Any],
        updates: Updates,
    ) -> Share | None:
        """The share of a stage; None if it has to be worked out by itself.

        A stage that looks at all `updates` gets a share if they are those that came in.
        """
        looks = tx.has_totals or "params" in tx.once.reads or tx.due is not None
        if self.backend is None or looks or tx.is_constant:
            return None
        gs = [x for x in updates.leaves if x is not None] if tx.looks_around else []
        if tx.looks_around and not (updates.are_settled and gs):
            return None
        varying = [x for x in tx.once.varying.values() if isinstance(x, Tensor)]
        if not any(
            costs_a_launch(x.device) for x in (*gs[:1], *shared.values(), *varying)
        ):
            return None
        share = Share(tx, shared, extra, len(updates.leaves), len(gs))
        if not share.is_alone or (gs and not _asks_norm(share, updates)):
            return None
        if gs:
            share.inputs += self._norms(gs)
        self.shares.append(share)
        return share

    def _norms(self, gs: list[Tensor]) -> list[Tensor]:
        """The norms of these tensors. Two stages that ask for those of the same get the same."""
        key = tuple(map(id, gs))
        if key not in self.known_norms:
            self.known_norms[key] = lengths(gs)
        return self.known_norms[key]

    def work_out(self) -> None:
        """Fill the shares."""
        shares, self.shares = self.shares, []
        if not shares:
            return
        inputs = [x for share in shares for x in share.inputs]
        joint = program_of(shares, inputs, self.backend)
        _fill(shares, joint(inputs) if joint else _all(shares, inputs))


def program_of(shares: list[Share], inputs: list[Tensor], backend: Any) -> Joint | None:
    """The shares as one program, kept for as long as they compute the same; None: there is none.

    Args:
        shares: what is worked out.
        inputs: those of all shares.
        backend: compiles.
    """
    keys = [share.key for share in shares]
    if None in keys:
        return None
    key = tuple(keys), str(backend), surroundings()
    if key not in KNOWN:
        inputs = told_apart(inputs)
        with Reads() as reads:
            results = _all(shares, inputs)
        KNOWN[key] = None if reads.seen else _made(shares, inputs, results, backend)
        while len(KNOWN) > KEPT:
            KNOWN.popitem(last=False)
    KNOWN.move_to_end(key)
    return KNOWN[key]


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

        examples = [*inputs, *self.empty()]
        self.program = Program(f, examples, 1, backend)
        for k in (*self.same, *self.new):
            self.values[k] = None

    def empty(self) -> list[Tensor]:
        """Where what is new is written."""
        return [
            torch.empty((), dtype=dtype, device=device) for dtype, device in self.kinds
        ]

    def values_of(self, inputs: list[Tensor], outputs: list[Tensor]) -> list[Any]:
        """What all shares work out of their inputs, in a row. What is new is in `outputs`."""
        self.program([*inputs, *outputs])
        values = [*self.values]
        for k, i in self.same.items():
            values[k] = inputs[i]
        for k, x in zip(self.new, outputs, strict=True):
            values[k] = x
        return values

    def __call__(self, inputs: list[Tensor]) -> Results:
        left = iter(self.values_of(inputs, self.empty()))
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
        functions = [meaning.function for meaning in meanings_of(share.tx)]
        family += [getattr(f, "__code__", type(f)) for f in functions]
    KNOWN.made[tuple(family)] += 1
    if KNOWN.made[tuple(family)] > MOST:
        warn_uncompiled(WHAT, TooMany())
        return None
    tensors = [x for x in _flat(results) if isinstance(x, Tensor)]
    if not all(map(is_number, tensors)):
        return None
    try:
        return Joint(shares, inputs, results, backend)
    except Untraceable:
        return None
    except Exception as error:
        warn_uncompiled(WHAT, error)
        return None


def _asks_norm(share: Share, updates: Updates) -> bool:
    """Whether nothing is asked of the updates but their norm.

    What the stage makes of the tree is compared once with what it makes of the norms alone.
    """
    key = share.key
    if key is None:
        return False
    if key not in KNOWN.asks_norm:
        KNOWN.asks_norm[key] = _is_the_same_of_norms(share, updates)
        while len(KNOWN.asks_norm) > KEPT:
            KNOWN.asks_norm.popitem(last=False)
    return KNOWN.asks_norm[key]


def _is_the_same_of_norms(share: Share, updates: Updates) -> bool:
    gs, tx = updates.leaves, share.tx
    norms = lengths([x for x in gs if x is not None])
    with Reads() as reads:
        real = tx.scalars(updates.tree(), share.old, None, share.extra, gs, gs, {})
        try:
            of_norms = share.worked_out([*share.inputs, *norms])
        except Exception:  # it needs more of the updates, whatever that is
            return False
    pairs = [(real[0].get(name), x) for name, x in of_norms.now.items()]
    pairs += [(real[1].get(name), x) for name, x in of_norms.shared.items()]
    return not reads.seen and all(same(x, y) for x, y in pairs)


def same(x: Any, y: Any) -> bool:
    """Whether two values are equal up to rounding."""
    if not (isinstance(x, Tensor) and isinstance(y, Tensor)):
        return bool(x == y)
    alike = x.dtype is y.dtype and x.shape == y.shape
    return alike and torch.allclose(x, y, rtol=1e-5, atol=0, equal_nan=True)


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


def costs_a_launch(device: torch.device) -> bool:
    """Whether an operation on one number is a launch there."""
    return device.type in DEVICES


def is_number(x: Any) -> bool:
    return type(x) in PLAIN and not x.dim()


def meanings_of(tx: Leafwise) -> list[Meaning]:
    """What the functions of a stage compute that are run once a step."""
    kept = vars(tx).get("_once_a_step")
    if kept is None:
        schedules = [x for x in tx.once.varying.values() if callable(x)]
        functions = [*([tx.once.prepare] if tx.once.prepare else []), *schedules]
        kept = tx._once_a_step = [Meaning(f) for f in functions]  # type: ignore[attr-defined]
    return kept
