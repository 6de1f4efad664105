"""The compiled, in-place execution: the rules of a chain as one pass over every tensor, compiled once for all sizes.

`compiled_step` does what ``update`` and ``apply_updates`` do, in one pass over memory. The stages of a chain are taken apart into
``prepare`` and ``rule``. Scalars are worked out first, eagerly, once a step. Then the rules of consecutive stages, composed for one
tensor, run as one compiled function that writes slots and parameters in place. Sizes are symbols in it, so compile time does not grow
with the model, and models of the same dtypes share the code. What is not made of rules runs eagerly between, and a ``prepare`` that looks
at updates in mid-chain begins a new pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from functorch_opt import tree
from functorch_opt._core.chain import Chain
from functorch_opt._core.leaf import Each
from functorch_opt._core.rule import Leafwise
from functorch_opt._core.transformation import GradientTransformation, apply_updates
from functorch_opt._execution.blocks import Body, Enter, Leave, Segment
from functorch_opt.random import philox
from functorch_opt.tree import PyTree, StageState
from functorch_opt.wrappers.precision import MasterWeights

__all__ = ["compiled_step"]


def compiled_step(tx: GradientTransformation, *, donate: bool = True) -> CompiledStep:
    """The step ``params, state = step(params, grads, state)`` of `tx`, compiled: ``update`` and ``apply_updates`` in one pass.

    Args:
        tx: any transformation. The rules of a chain run as one pass over every tensor; stages that are not rules run eagerly between.
        donate: overwrite the tensors of `params` and of the state's slots and return them, as JAX does with donated arguments. False:
            they stay as they are, at the price of a copy.

    Returns:
        ``step(params, grads, state, **extra)``, which returns the new params and state. It must not be differentiated or vmapped; for
        that there is ``update``.

    Raises:
        ValueError: (by the step) two parameters share memory, so that an update in place would move both; what ``update`` raises.

    Example:
        >>> import torch, functorch_opt as fo
        >>> tx, params = fo.adamw(0.1), {"w": torch.ones(3)}
        >>> step, state = fo.compiled_step(tx), tx.init(params)
        >>> params, state = step(params, {"w": torch.ones(3)}, state)
    """
    return CompiledStep(tx, donate)


# ---- a step ------------------------------------------------------------------------------------------------------------


@dataclass
class _Pending:
    """A stage whose rule has not run yet: its slots, a column each, and its scalars."""

    stage: Leafwise | Enter | Leave
    slots: dict[str, list[Any]]
    now: dict[str, Any]


class CompiledStep:
    """What `compiled_step` makes. It keeps which code serves which leaf, and what the tensors were that it was found for."""

    def __init__(self, tx: GradientTransformation, donate: bool, backend: str = "inductor") -> None:
        self.tx, self.donate, self.backend = tx, donate, backend
        self.segments: dict[Any, Segment] = {}
        self.constants: dict[Any, Any] = {}
        self.returned: PyTree = None

    def __repr__(self) -> str:
        return f"compiled_step({self.tx!r}{'' if self.donate else ', donate=False'})"

    @torch.no_grad()
    def __call__(
        self, params: PyTree, grads: PyTree, state: PyTree, **extra: Any
    ) -> tuple[PyTree, PyTree]:
        self.tx.check_extra(extra)
        if torch.compiler.is_compiling():
            return self._traced(params, grads, state, extra)
        if not self.donate:
            params, state = tree.map(torch.clone, params), tree.map(torch.clone, state)
        ps, spec = tree.flatten_tensors(params, "params")
        us = tree.match(params, spec, grads, names=("params", "grads"))
        if state is not self.returned:
            _check_slots(self.tx, state, params, ps, spec)
        run = _Run(self, params, spec, ps, us, extra)
        with philox.compiled(self.backend):
            self.returned = run.stage(self.tx, state)
        run.finish()
        return params, self.returned

    def _traced(
        self, params: PyTree, grads: PyTree, state: PyTree, extra: dict[str, Any]
    ) -> tuple[PyTree, PyTree]:
        """The step as operations of a graph that somebody else compiles."""
        updates, new = self.tx.update(grads, state, params, **extra)
        moved = apply_updates(params, updates)
        if not self.donate:
            return moved, new
        return tree.map(Tensor.copy_, params, moved), _donated(state, new)

    def body(self, pending: list[_Pending], into: int | None) -> Body:
        """The rules to run. Numbers are constants of the compiled code; if ``prepare`` gives another one at another step, inputs."""
        stages = [each.stage for each in pending]
        body = Body(stages, [stage.now for stage in pending], into)
        where = (
            tuple([id(stage) if isinstance(stage, Leafwise) else stage for stage in stages]),
            into,
        )
        if self.constants.setdefault(where, body.fixed) != body.fixed:
            self.constants[where] = None
            now = [
                {
                    name: torch.tensor(v, dtype=torch.float64) if isinstance(v, float) else v
                    for name, v in stage.now.items()
                }
                for stage in pending
            ]
            body = Body(stages, now, into)
        return body


def _like(u: Tensor) -> Tensor:
    """Where to write the update that becomes of `u`."""
    return torch.empty_like(
        u, dtype=tree.at_least_float32(u.dtype), memory_format=torch.contiguous_format
    )


def _can_hold(x: Any, u: Any) -> bool:
    """Whether the update that becomes of `u` can be written over `x`."""
    return u is None or (
        x.dtype is tree.at_least_float32(u.dtype) and x.shape == u.shape and x.is_contiguous()
    )


def _donated(old: PyTree, new: PyTree) -> PyTree:
    """`new`, its slots written into the tensors of `old`."""
    if isinstance(old, StageState):
        return StageState(
            new.shared,
            {
                name: tree.map(Tensor.copy_, slot, new.slots[name])
                for name, slot in old.slots.items()
            },
        )
    return {name: _donated(old[name], new[name]) for name in old} if isinstance(old, dict) else new


def _rules(tx: GradientTransformation) -> list[Any]:
    """The stages of `tx`, those of chains in it too."""
    return (
        [rule for stage in tx.stages.values() for rule in _rules(stage)]
        if isinstance(tx, Chain)
        else [tx]
    )


def _in_one_pass(tx: GradientTransformation, sharded: bool) -> bool:
    """Whether `tx` is nothing but rules, of which only the first may look at the whole tree, and that at the updates.

    Sums over `sharded` parameters end a pass, which is too late for a master copy.
    """
    rules = _rules(tx)
    if not rules or not all(
        isinstance(rule, Leafwise) and "params" not in rule.prepare_reads for rule in rules
    ):
        return False
    if sharded and any(rule.sums for rule in rules):
        return False
    return not any("updates" in rule.prepare_reads for rule in rules[1:])


def _check_slots(
    tx: GradientTransformation, state: PyTree, params: PyTree, ps: list[Any], spec: Any
) -> None:
    """That a state which comes from elsewhere fits, before anything is written."""
    if isinstance(tx, Chain):
        tx.check_state(state)
        for name, stage in tx.stages.items():
            _check_slots(stage, state[name], params, ps, spec)
    elif isinstance(tx, MasterWeights):
        tx.check_state(state)
        _check_slots(tx.inner, state["inner"], params, ps, spec)
        _check_shapes(
            tx.name, "master", torch.clone, state["weights"].slots["master"], params, ps, spec
        )
    elif isinstance(tx, Leafwise):
        tx.check_state(state)
        for name, slot in state.slots.items():
            _check_shapes(tx.name, name, tx.slots[name], slot, params, ps, spec)


def _check_shapes(
    stage: str,
    name: str,
    first: Callable[..., Any],
    slot: PyTree,
    params: PyTree,
    ps: list[Any],
    spec: Any,
) -> None:
    for i, (x, p) in enumerate(
        zip(
            tree.match(params, spec, slot, names=("params", f"the state's {name}")), ps, strict=True
        )
    ):
        if (
            x is not None
            and p is not None
            and x.shape != p.shape
            and x.shape != first(p.to("meta")).shape
        ):
            raise ValueError(
                f"{stage}: the state's {name} at {tree.paths(params)[i]!r} has shape {tuple(x.shape)}, "
                f"its parameter {tuple(p.shape)}. Is the state that of other params?"
            )


@dataclass
class _Run:
    """One step. `us` are the updates as far as they are worked out; `pending` the rules that are still to be applied to them."""

    step: CompiledStep
    params: PyTree
    spec: Any
    ps: list[Any]
    us: list[Any]
    extra: dict[str, Any]
    pending: list[_Pending] = field(default_factory=list)

    @cached_property
    def sharded(self) -> bool:
        return any(map(tree.is_sharded, self.ps))

    def stage(self, tx: GradientTransformation, state: PyTree) -> PyTree:
        """Take in one stage; return its next state, whose slots are written when the rules run."""
        if isinstance(tx, Chain):
            tx.check_state(state)
            return {name: self.stage(stage, state[name]) for name, stage in tx.stages.items()}
        if isinstance(tx, MasterWeights) and _in_one_pass(tx.inner, self.sharded):
            return self.master_weights(tx, state)
        extra = {name: self.extra[name] for name in tx.extra_args if name in self.extra}
        if not isinstance(tx, Leafwise):
            self.flush()
            updates, new = tx.update(
                tree.unflatten(self.spec, self.us), state, self.params, **extra
            )
            self.us = tree.match(self.params, self.spec, updates, names=("params", "updates"))
            return new
        tx.check_state(state)
        if (
            "updates" in tx.prepare_reads
            and self.pending
            and not isinstance(self.pending[-1].stage, Enter)
        ):
            self.flush()
        updates = tree.unflatten(self.spec, self.us)
        now, shared = tx.scalars(updates, state.shared, self.params, extra)
        columns = {
            name: tree.match(self.params, self.spec, slot, names=("params", f"the state's {name}"))
            for name, slot in state.slots.items()
        }
        now = {name: now[name] for name in tx.reads if name in now}
        if tx.sums and self.sharded:
            self.flush()
            now |= tx.sums_of_parts(
                tree.unflatten(self.spec, self.us), self.spec, self.us, self.ps, columns, now
            )
        self.pending.append(_Pending(tx, columns, now))
        return StageState(shared, state.slots)

    def master_weights(self, tx: MasterWeights, state: PyTree) -> PyTree:
        """Take in `keep_master_weights`, whose rules see the master copy for the parameter."""
        tx.check_state(state)
        if "updates" in _rules(tx.inner)[0].prepare_reads:
            self.flush()
        master = tree.match(
            self.params,
            self.spec,
            state["weights"].slots["master"],
            names=("params", "the state's master"),
        )
        self.pending.append(_Pending(Enter(tx.enter), {"held": master}, {}))
        inner = self.stage(tx.inner, state["inner"])
        self.pending.append(_Pending(Leave(tx.leave), {}, {}))
        return {"inner": inner, "weights": state["weights"]}

    def flush(self) -> None:
        """Apply the pending rules to the updates."""
        if self.pending:
            rows = self._rows()
            into = next(
                (
                    k
                    for k, (row, own) in enumerate(rows)
                    if own and all(map(_can_hold, row, self.us))
                ),
                len(rows),
            )
            if into == len(rows):
                rows.append(([None if u is None else _like(u) for u in self.us], True))
            self._apply(rows, into)
            self.us = [
                None if u is None else x for u, x in zip(self.us, rows[into][0], strict=True)
            ]

    def finish(self) -> None:
        """Apply the pending rules, and add the updates to the params."""
        if self.pending:
            self._apply(self._rows(), None)
        else:
            for p, u in zip(self.ps, self.us, strict=True):
                if u is not None:
                    p.add_(u)

    def _rows(self) -> list[tuple[list[Any], bool]]:
        """What pending rules read that every leaf has its own of; and whether that is this step's own, to be written over."""
        rows = []
        for name, value in [of for stage in self.pending for of in stage.now.items()]:
            if isinstance(value, Each):
                rows.append(
                    (
                        tree.match(self.params, self.spec, value.tree, names=("params", name)),
                        value.own,
                    )
                )
            elif isinstance(value, Tensor) and value.dim() == 1:
                rows.append((list(value.unbind()), False))
        return rows

    def _apply(self, rows: list[tuple[list[Any], bool]], into: int | None) -> None:
        """Run the pending rules for every leaf that has an update."""
        pending, self.pending = self.pending, []
        body = self.step.body(pending, into)
        slots = [column for stage in pending for column in stage.slots.values()]
        columns = [self.us, self.ps, *slots, *[row for row, _ in rows]]
        segment = self.step.segments.get(body.key)
        if segment is None or not segment.run(columns, body.scalars):
            segment = self.step.segments[body.key] = Segment(
                self.step.backend, body, self.params, columns
            )
            if not segment.run(columns, body.scalars):
                raise RuntimeError(
                    "compiled_step does not know the tensors again that it was made for: a defect. Use update and apply_updates."
                )
