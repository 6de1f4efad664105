"""What stages work out once a step, as one compiled function.

Counts, schedules and bias corrections are a dozen operations on single numbers. On a GPU each would
be a launch, and the launches would take longer than the pass over all tensors. So what stages work
out without looking at a tensor is traced, all stages in one, and compiled: one launch. It is kept
for as long as the stages compute the same, which is asked at every step.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from functorch_opt._core.rule import Leafwise
from functorch_opt._core.sharding import PLAIN
from functorch_opt._execution.body import written
from functorch_opt._execution.guards import Meaning, surroundings
from functorch_opt._execution.kernel import Program
from functorch_opt._execution.trials import Untraceable, warn_uncompiled

DEVICES = {"cuda", "xpu"}
"""Where an operation on one number costs a launch."""
MOST = 16
"""Programs for the same functions with other numbers, before one stops making more of them."""
KEPT = 256


class Known(OrderedDict[Any, "Joint | None"]):
    """The functions that have been compiled, for the whole process; None if that cannot be."""

    def __init__(self) -> None:
        super().__init__()
        self.made: Counter[Any] = Counter()


KNOWN = Known()


class Share:
    """What one stage works out. `now` and `shared` are filled when all shares are worked out."""

    def __init__(
        self, tx: Leafwise, shared: dict[str, Tensor], extra: Mapping[str, Any], n: int
    ) -> None:
        self.tx, self.old, self.n = tx, shared, n
        self.extra = {name: extra[name] for name in tx.extra_args if name in extra}
        self.inputs = [*shared.values(), *_varying(tx).values(), *self.extra.values()]
        self.now: dict[str, Any] = {}
        self.shared: dict[str, Tensor] = {}

    @property
    def is_alone(self) -> bool:
        """Whether it is made of single numbers on a device where that pays."""
        devices = {x.device for x in self.inputs if type(x) in PLAIN and not x.dim()}
        plain = all(type(x) in PLAIN and not x.dim() for x in self.inputs)
        return plain and len(devices) == 1 and devices.pop().type in DEVICES

    @property
    def key(self) -> Any:
        """What it computes; None if nobody can tell."""
        meanings = _meanings(self.tx)
        of_functions = tuple([meaning.now() for meaning in meanings])
        if any(meaning.unknown for meaning in meanings):
            return None
        kinds = tuple([(x.dtype, x.device) for x in self.inputs])
        names = (
            tuple(self.old),
            tuple(_varying(self.tx)),
            tuple(self.extra),
            self.tx.reads,
        )
        return of_functions, written(self.tx.once.numbers), kinds, names

    def worked_out(
        self, inputs: list[Tensor]
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What the rule reads, and the next shared values, of these inputs."""
        left = iter(inputs)
        old = {name: next(left) for name in self.old}
        varying = {name: next(left) for name in _varying(self.tx)}
        extra = {name: next(left) for name in self.extra}
        nothing = [None] * self.n
        now, shared = self.tx.scalars(
            None, old, None, extra, nothing, nothing, {}, varying
        )
        return {name: now[name] for name in self.tx.reads if name in now}, shared


class Together:
    """The shares of a step. They are collected first, and worked out at once."""

    def __init__(self, backend: Any) -> None:
        self.backend = backend
        self.shares: list[Share] = []

    def takes(
        self, tx: Leafwise, shared: dict[str, Tensor], extra: Mapping[str, Any], n: int
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
        results = _all(shares, inputs)
        KNOWN[key] = _made(shares, inputs, results, self.backend)
        while len(KNOWN) > KEPT:
            KNOWN.popitem(last=False)
        _fill(shares, results)


Results = list[tuple[dict[str, Any], dict[str, Tensor]]]


class Joint:
    """The shares of a step as one program. It has a place for each number that is worked out."""

    def __init__(
        self, shares: list[Share], inputs: list[Tensor], results: Results, backend: Any
    ) -> None:
        old = {id(x): i for i, x in enumerate(inputs)}
        flat = _flat(results)
        self.names = [([*now], [*shared]) for now, shared in results]
        # What is worked out is a new tensor; the rest is a number, or an input as it is.
        self.same = [old.get(id(x)) for x in flat]
        self.fixed = [None if isinstance(x, Tensor) else x for x in flat]
        new = [x for x, i in zip(flat, self.same, strict=True) if i is None]
        self.outputs = [(x.dtype, x.device) for x in new if isinstance(x, Tensor)]
        n = len(inputs)

        def f(args: list[Tensor]) -> list[tuple[int, Tensor]]:
            again = _flat(_all(shares, args[:n]))
            pairs = zip(again, self.same, strict=True)
            values = [x for x, i in pairs if i is None and isinstance(x, Tensor)]
            return [(n + k, x) for k, x in enumerate(values)]

        self.program = Program(f, [*inputs, *self._empty()], 1, backend)

    def _empty(self) -> list[Tensor]:
        return [
            torch.empty((), dtype=dtype, device=device) for dtype, device in self.outputs
        ]

    def __call__(self, inputs: list[Tensor]) -> Results:
        outputs = self._empty()
        self.program([*inputs, *outputs])
        left = iter(outputs)
        flat = [
            inputs[i] if i is not None else next(left) if x is None else x
            for i, x in zip(self.same, self.fixed, strict=True)
        ]
        values = iter(flat)
        return [
            (
                {name: next(values) for name in now},
                {name: next(values) for name in shared},
            )
            for now, shared in self.names
        ]


def _made(
    shares: list[Share], inputs: list[Tensor], results: Results, backend: Any
) -> Joint | None:
    """The shares as one program, or None."""
    functions = [meaning.function for share in shares for meaning in _meanings(share.tx)]
    family = tuple([getattr(f, "__code__", type(f)) for f in functions])
    KNOWN.made[family] += 1
    plain = all(not x.dim() for x in _flat(results) if isinstance(x, Tensor))
    if KNOWN.made[family] > MOST or not plain:
        return None
    try:
        return Joint(shares, inputs, results, backend)
    except Untraceable:
        return None
    except Exception as error:
        what = "compiled_step works out what prepare returns operation by operation"
        warn_uncompiled(what, error)
        return None


def _all(shares: list[Share], inputs: list[Tensor]) -> Results:
    left = iter(inputs)
    return [share.worked_out([next(left) for _ in share.inputs]) for share in shares]


def _fill(shares: list[Share], results: Results) -> None:
    for share, (now, shared) in zip(shares, results, strict=True):
        share.now.update(now)
        share.shared.update(shared)


def _flat(results: Results) -> list[Any]:
    return [x for now, shared in results for x in (*now.values(), *shared.values())]


def _varying(tx: Leafwise) -> dict[str, Any]:
    """The hyperparameters that are tensors."""
    return {name: x for name, x in tx.once.varying.items() if not callable(x)}


def _meanings(tx: Leafwise) -> list[Meaning]:
    """What the functions of a stage compute that are run once a step."""
    kept = vars(tx).get("_once_a_step")
    if kept is None:
        schedules = [x for x in tx.once.varying.values() if callable(x)]
        functions = [*([tx.once.prepare] if tx.once.prepare else []), *schedules]
        kept = tx._once_a_step = [Meaning(f) for f in functions]  # type: ignore[attr-defined]
    return kept
