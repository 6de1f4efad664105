"""The eager execution: a leaf goes through the rules of all consecutive stages, then the next leaf.

So a leaf stays in the cache on its way. For small tensors looking at them takes longer than
computing with them. That is why leaves whose tensors all have one dtype take the short way: one
rule after another, with nothing between (`_quickly`). Only where that gives something unusual,
they take the long way, which checks everything and knows what to say.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor

from functorch_opt import tree
from functorch_opt._core import owners, sharding, structure
from functorch_opt._core.leaf import (
    Misfit,
    PerLeaf,
    places_of,
    uniform_dtype,
    working_dtype,
    wrong_update,
)
from functorch_opt._core.state import StageState
from functorch_opt.tree import PyTree


class OnTensor(Protocol):
    """What this execution needs of a rule on one tensor."""

    rule: Callable[..., Any]
    rule_reads: tuple[str, ...]
    kind: Any
    reads: tuple[str, ...]
    is_plain: bool
    sums: Any

    def result(self, values: dict[str, Any]) -> Any:
        """What the rule returns of these values."""

    def apply(
        self, g: Tensor, p: Any, slots: Any, now: Any, dtype: torch.dtype
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The update and the slots, computed in `dtype` and checked."""


class Declared(Protocol):
    """What this execution needs of a stage that is made of a rule."""

    name: str

    @property
    def exchanges(self) -> bool:
        """Whether the ranks of sharded tensors exchange something before the rule."""

    @property
    def on_tensor(self) -> OnTensor:
        """The rule on one tensor."""

    @property
    def reads_params(self) -> bool:
        """Whether it needs params."""

    def check_state(self, state: Any) -> None:
        """Raise ValueError for a state that is not one of it."""

    def scalars(
        self,
        updates: Any,
        shared: Any,
        params: Any,
        extra: Any,
        gs: Any,
        ps: Any,
        slots: Any,
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What the rule may read of this step, and the next shared values."""

    def sums_before(
        self, updates: Any, spec: Any, gs: Any, ps: Any, slots: Any, now: Any
    ) -> Mapping[str, Any]:
        """What the ranks have exchanged, such as the sums over sharded tensors."""


def update_in_one_pass(
    stages: Sequence[Declared],
    updates: PyTree,
    states: Sequence[StageState],
    params: PyTree | None,
    extra: Mapping[str, Any],
) -> tuple[PyTree, list[StageState]]:
    """``update`` of consecutive stages, leaf by leaf.

    Only the first stage may look at all updates. If tensors are sharded, only the first may have
    sums, for the ranks exchange the sums over all tensors in one message, and a stage that sees
    whole tensors is alone, for the ranks exchange all tensors in one message too. A later stage
    then begins a pass of its own.
    """
    gs, spec = structure.flatten_tensors(updates, "updates")
    later = _end_of_pass(stages) if sharding.any_sharded(gs) else None
    if later:
        updates, first = update_in_one_pass(
            stages[:later], updates, states[:later], params, extra
        )
        updates, rest = update_in_one_pass(
            stages[later:], updates, states[later:], params, extra
        )
        return updates, first + rest
    names = ("updates", "params")
    no_params = params is None
    ps = (
        [None] * len(gs)
        if no_params
        else structure.match(updates, spec, params, names=names)
    )
    states_of = zip(stages, states, strict=True)
    running = [_Stage(tx, state, updates, spec, params) for tx, state in states_of]
    dtypes = _uniform_dtypes(running, updates, gs, gs if no_params else ps)
    for stage in running:
        stage.prepare(updates, spec, gs, ps, params, extra)
    us = _leaf_by_leaf(running, updates, gs, ps, dtypes)
    return tree.unflatten(spec, us), [stage.next_state(spec) for stage in running]


def _end_of_pass(stages: Sequence[Declared]) -> int | None:
    """The first stage that sharded tensors do not go through in the pass of those before it."""
    whole = [tx.on_tensor.kind == "tensorwise" for tx in stages]
    for k, tx in enumerate(stages):
        if k and (tx.exchanges or whole[k] or whole[k - 1]):
            return k
    return None


def _uniform_dtypes(
    running: list[_Stage], updates: PyTree, gs: list[Any], ps: list[Any]
) -> list[torch.dtype | None]:
    """The dtype of each leaf whose tensors all have one. A leaf that does not fit is an error."""
    columns = [column for stage in running for column in stage.old.values()]
    dtypes: list[torch.dtype | None] = []
    for g, p, *slots in zip(gs, ps, *columns, strict=True):
        dtypes.append(None if g is None else uniform_dtype(g, p, slots))
        if g is not None and dtypes[-1] is None and wrong_update(g, p, slots):
            _refuse(running, updates, gs, ps)
    return dtypes


def _leaf_by_leaf(
    running: list[_Stage],
    updates: PyTree,
    gs: list[Any],
    ps: list[Any],
    dtypes: list[torch.dtype | None],
) -> list[Any]:
    """The updates that the rules make of all leaves; the new slots are kept in `running`."""
    kinds = [*zip(dtypes, places_of(gs), strict=True)]
    arguments: dict[Any, Any] = {
        (dtype, device): [stage.arguments(dtype, device, ps) for stage in running]
        for dtype, device in {*kinds}
        if dtype is not None
    }
    new_columns = [column for stage in running for column in stage.new.values()]
    us: list[Any] = []
    stage = running[0]
    try:
        for i, (g, p, kind) in enumerate(zip(gs, ps, kinds, strict=True)):
            rows = arguments.get(kind)
            done = None if rows is None else _quickly(running, rows, i, g)
            if done is None:
                u = g
                for stage in running:
                    u = stage.leaf(i, u, p, kind[1])
            else:
                u = done[0]
                for column, x in zip(new_columns, done[1], strict=True):
                    column.append(x)
            us.append(u)
    except Misfit as misfit:
        path = tree.paths(updates)[len(us)]
        raise ValueError(
            f"{stage.tx.name}: the update at {path!r} {misfit}"
        ) from misfit.__cause__
    return us


class _Stage:
    """A stage in the middle of an update: its slots, old and new, and what its rule may read."""

    def __init__(
        self,
        tx: Declared,
        state: StageState,
        updates: PyTree,
        spec: Any,
        params: PyTree | None,
    ) -> None:
        tx.check_state(state)
        if params is None and tx.reads_params:
            raise ValueError(
                f"{tx.name} reads the parameters: call update(updates, state, params)."
            )
        self.tx, self.state = tx, state
        self.old = {
            name: structure.match(
                updates, spec, slot, names=("updates", f"the state's {name}")
            )
            for name, slot in state.slots.items()
        }
        self.new: dict[str, list[Any]] = {name: [] for name in self.old}
        rule: OnTensor = tx.on_tensor
        self.reads_p = "p" in rule.reads
        self.done: dict[int, owners.Done] = {}
        """What the owners of sharded tensors have worked out, by leaf."""
        self.behind_g = [name for name in rule.reads if name != "g"]
        as_it_is = rule.is_plain and rule.rule_reads == ("g", *self.behind_g)
        self.rule = rule.rule if as_it_is else self._by_name

    def _by_name(self, g: Tensor, *behind_g: Any) -> Any:
        """The rule, where it needs more than itself, or does not read ``g`` first."""
        values = {"g": g, **dict(zip(self.behind_g, behind_g, strict=True))}
        return self.tx.on_tensor.result(values)

    def prepare(
        self,
        updates: PyTree,
        spec: Any,
        gs: list[Any],
        ps: list[Any],
        params: PyTree | None,
        extra: Mapping[str, Any],
    ) -> None:
        tx, names = self.tx, self.tx.on_tensor.reads
        shared = self.state.shared
        now, self.shared = tx.scalars(updates, shared, params, extra, gs, ps, self.old)
        # An owner has the whole of its tensors, and adds up what it needs by itself.
        if tx.exchanges and sharding.any_cut(gs):
            before = tx.sums_before(updates, spec, gs, ps, self.old, now)
            now |= before
            names += tuple(before)
        self.per_leaf = PerLeaf(
            updates, spec, {name: now[name] for name in names if name in now}
        )
        if tx.on_tensor.kind == "tensorwise" and owners.apart(gs, self.old):
            given = partial(self._given, gs, ps)
            step = owners.Step(tx.name, tx.on_tensor, gs, ps, self.old, given)
            self.done = owners.divided(step)

    def _given(
        self, gs: list[Any], ps: list[Any], i: int
    ) -> tuple[torch.dtype, dict[str, Any]]:
        """The dtype in which the rule computes for leaf `i`, and what it reads of this step."""
        slots = [column[i] for column in self.old.values()]
        dtype = working_dtype(gs[i], ps[i] if self.reads_p else None, *slots)
        return dtype, self.per_leaf.at(i, dtype)

    def arguments(
        self, dtype: torch.dtype, device: torch.device | None, ps: list[Any]
    ) -> list[tuple[Any, ...]]:
        """What the rule, and its sums, read beside ``g``, for each leaf that is of `dtype`, and on
        `device` if there are several."""
        fixed, rows = self.per_leaf.of(dtype, device)
        of_leaves = {"p": ps, **self.old, **rows}
        columns = [
            of_leaves[name] if name in of_leaves else [fixed[name]] * len(ps)
            for name in self.behind_g
        ]
        return list(zip(*columns, strict=True)) if columns else [()] * len(ps)

    def leaf(
        self,
        i: int,
        g: Tensor | None,
        p: Tensor | None,
        device: torch.device | None,
    ) -> Tensor | None:
        """The update that the rule makes of `g`; the new slots are kept."""
        slots = {name: column[i] for name, column in self.old.items()}
        u = None
        if i in self.done:
            u, slots = owners.result(self.done[i])
        elif g is not None:
            dtype = working_dtype(g, p if self.reads_p else None, *slots.values())
            u, slots = self.tx.on_tensor.apply(
                g, p, slots, self.per_leaf.at(i, dtype, device), dtype
            )
        for name, value in slots.items():
            self.new[name].append(value)
        return u

    def next_state(self, spec: Any) -> StageState:
        slots = {
            name: structure.like(self.state.slots[name], spec, column)
            for name, column in self.new.items()
        }
        return StageState(self.shared, slots)


def _quickly(
    stages: list[_Stage],
    arguments: list[list[tuple[Any, ...]]],
    i: int,
    g: Tensor,
) -> tuple[Tensor, list[Tensor]] | None:
    """The update that the rules make of `g`, and the new slots; None if anything is unusual.

    It is for tensors of one dtype. It says nothing of what may be wrong: `_Stage.leaf` does.
    """
    u = g
    kept = []
    try:
        for stage, rows in zip(stages, arguments, strict=True):
            result = stage.rule(u, *rows[i])
            if stage.old:
                if not (
                    type(result) is tuple
                    and len(result) == 2
                    and type(result[1]) is dict
                    and result[1].keys() == stage.old.keys()
                ):
                    return None
                result, new = result
                for name, column in stage.old.items():
                    x, old = new[name], column[i]
                    if (
                        type(x) is not Tensor
                        or x.dtype is not old.dtype
                        or x.shape != old.shape
                    ):
                        return None
                    kept.append(x)
            if (
                type(result) is not Tensor
                or result.dtype is not g.dtype
                or result.shape != g.shape
            ):
                return None
            u = result
    except RuntimeError:
        return None
    return u, kept


def _refuse(
    running: list[_Stage], updates: PyTree, gs: list[Any], ps: list[Any]
) -> NoReturn:
    """Say which update is wrong, and for which stage."""
    for stage in running:
        for i, (g, p) in enumerate(zip(gs, ps, strict=True)):
            if g is not None and (
                wrong := wrong_update(g, p, [column[i] for column in stage.old.values()])
            ):
                raise ValueError(
                    f"{stage.tx.name}: the update at {tree.paths(updates)[i]!r} {wrong}"
                )
    raise AssertionError("an update was found wrong that is not")
