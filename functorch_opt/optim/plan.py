"""One step of the stateful optimizers: the state is taken out of ``state[p]``, and written back."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from functorch_opt import tree
from functorch_opt._core.on_owner import has_failed
from functorch_opt._core.sharding import any_sharded
from functorch_opt._core.transformation import GradientTransformation
from functorch_opt._execution.compiled import CompiledStep
from functorch_opt._execution.flat import rules_at
from functorch_opt._execution.from_host import StepFromHost
from functorch_opt._execution.fusing import always_counts
from functorch_opt._execution.segments import IN_PIECES
from functorch_opt.optim.alike import check_groups
from functorch_opt.optim.beginning import complete, lacks
from functorch_opt.optim.closure import extra_of, rehearsed
from functorch_opt.optim.contents import Contents, are_plain, leaves_of
from functorch_opt.optim.counts import Counts
from functorch_opt.optim.host import check, is_needed, refuse_in_graph, refuse_on_host
from functorch_opt.optim.hosts import refuse_capture, with_numbers
from functorch_opt.optim.loss_scale import behind, if_finite
from functorch_opt.optim.numbers import Groups
from functorch_opt.optim.params import (
    can_be_trained,
    entries_of,
    layout,
    on_meta,
    overlap,
    refuse_gradient,
    small,
)
from functorch_opt.optim.places import Places, differences
from functorch_opt.optim.replicas import replicas_of, step_and_send
from functorch_opt.optim.step import NOTHING, State, Step
from functorch_opt.tree import PyTree

Make = Callable[[dict[str, Any]], GradientTransformation]
"""The transformation of a bucket, from its hyperparameters."""


class Plan:
    """What is worked out once for a bucket of groups: its transformation, and where its state
    lives."""

    contents: Contents | None = None
    """Where the state is among what the entries of the last step held."""

    def __init__(
        self,
        make: Make,
        varying: list[str],
        groups: Groups,
        rename: dict[str, str],
        compile: bool,
        state: State,
        everybody: list[Tensor],
        owners: bool = False,
        slots_on_host: bool = False,
    ) -> None:
        params = [p for group in groups for p in group["params"]]
        self.replicas = replicas_of(params, state) if owners else None
        self.slots_on_host = slots_on_host
        self.on_host = slots_on_host and is_needed(params)
        """Whether some slots lie on the host, and their parameters do not."""
        self.layout = layout(groups)
        self.gone: list[Any] = []
        """Parameters that are no more; another one may have the id of such a one."""
        self.watched = [weakref.ref(p, self.gone.append) for p in params]
        self.left_out = {i for i, p in enumerate(params) if not can_be_trained(p)}
        if len(self.left_out) == len(params):
            raise TypeError(
                f"all parameters of a group are {params[0].dtype}, and one has a gradient: only "
                "floating and complex tensors can be optimized. Set its grad to None."
            )
        self._name(groups, params)
        few = self.tree([*map(small, params)])
        self.numbers, self.tx = with_numbers(make, varying, groups, self.order, few)
        self.in_place = self._stepping(self.tx, "inductor" if compile else IN_PIECES)
        self.view = self.in_place.view(few)[0]
        self.checked = False
        self.is_whole = True if not compile and overlap(params) else None
        """Whether all is worked out before anything is written; None: that is not known yet."""
        self.always_counts = always_counts(self.tx)

        check_groups(make, self.numbers, groups, self.tx, few)
        self._lay_out(on_meta(params), rename)
        if self.on_host:
            check(self, params)
        self.rules = rules_at(self.tx, self.numbered, any_sharded(self.given(params)))
        self._settle(params, state)
        # Two buckets draw from one key: each after the first folds its place into it.
        self.place = next(i for i, p in enumerate(everybody) if p is params[0])

    def _name(self, groups: Groups, params: list[Tensor]) -> None:
        """Find the path of each parameter, and its place among the leaves of the tree."""
        names = [name for group in groups for name in group.get("param_names", [])]
        self.named = len(set(names)) == len(params)
        self.paths = names if self.named else [str(i) for i in range(len(params))]
        self.number = {path: i for i, path in enumerate(self.paths)}
        # A dict is a tree with its leaves by name: the numbers of parameters are in that order.
        self.order = [self.number[path] for path in tree.paths(self.tree(params))]
        self.leaf = sorted(range(len(params)), key=self.order.__getitem__)

    def _lay_out(self, params: list[Tensor | None], rename: dict[str, str]) -> None:
        """Find a place for each tensor of the state."""
        like = self.tree(params)
        places = Places(self.number, like).of(self.tx.init(like))
        counts = [place.key for place in tree.leaves(places) if place.kind == "count"]
        if rename:
            # torch's classes have one count, called step. Any other chain's counts keep the name of
            # their stage, which outlives a change of the chain.
            rename = {**dict.fromkeys(counts[:1], "step"), **rename}
        places = tree.map(lambda at: replace(at, key=rename.get(at.key, at.key)), places)
        self.flat, self.spec = tree.flatten(places)
        self.numbered = tree.unflatten(self.spec, list(range(len(self.flat))))
        kinds = [place and place.kind for place in self.flat]
        self.kept = [k for k, kind in enumerate(kinds) if kind in ("slot", "joint")]
        self.counted, self.clocked = (
            [(k, self.flat[k].key) for k, kind in enumerate(kinds) if kind == wanted]
            for wanted in ("count", "clock")
        )
        own, clocks = (
            [*dict.fromkeys(key for _, key in of)] for of in (self.counted, self.clocked)
        )
        self.counts = Counts(own, clocks, self.numbers.device, self.numbers.capturable)

    def _settle(self, params: list[Tensor], state: State) -> None:
        """Find the parameter that has what all share: the one that has it, or the first that is
        trained, for tools that save a state leave out those that are frozen."""
        joint = [k for k in self.kept if self.flat[k].kind == "joint"]
        keys = {self.flat[k].key for k in joint}
        having = (i for i, p in enumerate(params) if keys & state.get(p, NOTHING).keys())
        trained = (i for i, p in enumerate(params) if p.requires_grad)
        home = next(having, next(trained, 0))
        for k in joint:
            self.flat[k] = replace(self.flat[k], i=home)
        self.where = [(self.flat[k].i, self.flat[k].key) for k in self.kept]

    def _without(self, values: list[Any]) -> list[Any]:
        if self.left_out:
            return [None if i in self.left_out else x for i, x in enumerate(values)]
        return values

    def _leaves(self, values: list[Any]) -> list[Any]:
        """The leaves of the tree of `values`."""
        values = self._without(values)
        return [values[i] for i in self.order] if self.named else values

    def tree(self, values: list[Any]) -> PyTree:
        values = self._without(values)
        return dict(zip(self.paths, values, strict=True)) if self.named else values

    def initialize(self, groups: Groups, state: State) -> None:
        """Give every parameter that can be trained its first state, where it has none."""
        self.numbers.write(groups)  # a first state may be made of them
        params = [p for group in groups for p in group["params"]]
        trained = [i for i, p in enumerate(params) if p.requires_grad]
        entries = [dict(state.get(p, ())) for p in params]
        complete(self, entries, params, trained)
        for p, entry in zip(params, entries, strict=True):
            if entry:
                state[p].update(entry)

    def fits(self, groups: Groups) -> bool:
        """Whether it was made for these groups. A graph has one number for each parameter, so
        there it does not matter which groups are alike."""
        if self.gone or self.layout != layout(groups):
            return False
        params = [p for group in groups for p in group["params"]]
        if self.slots_on_host and self.on_host != is_needed(params):
            return False  # they have been moved
        return torch.compiler.is_compiling() or self.numbers.fit(groups)

    def serves(self, groups: Groups, state: State) -> bool:
        """Whether it was made for these groups, and nothing is missing for a step."""
        if self.gone or self.layout != layout(groups):
            return False
        params = [p for group in groups for p in group["params"]]
        moved = [p for p in params if p.grad is not None]
        kept = zip(self.kept, self.where, strict=True)
        slots = [
            key in state.get(params[i], NOTHING)
            for k, (i, key) in kept
            if params[i].grad is not None or self.flat[k].whole
        ]
        counts = [key in state.get(p, NOTHING) for p in moved for key in self.counts.keys]
        return all(slots) and all(counts)

    # ---- a step ----------------------------------------------------------------------------------

    def _stepping(self, tx: GradientTransformation, backend: str) -> CompiledStep:
        """What makes steps of `tx` in place."""
        if self.on_host:
            return StepFromHost(tx, backend)
        return CompiledStep(tx, True, backend)

    def compute(
        self,
        groups: Groups,
        state: State,
        make: Make,
        loss: Any = None,
        active: Tensor | None = None,
    ) -> Callable[[], None]:
        """Work out the step; nothing changes before the function that this returns is called.

        `loss` is what a closure returned. Where `active` is given and false, nothing is to change
        then either.
        """
        if torch.compiler.is_compiling() or is_in_torch_dispatch_mode():
            # Traced. Into new tensors: Dynamo may drop a write to a 0-dim float64 buffer
            # (torch 2.13), and a fake mode takes no real one.
            refuse_in_graph(self)
            tx = make(self.numbers.read(groups))
        else:
            tx = self.tx
            self.numbers.write(groups)
        params = [p for group in groups for p in group["params"]]
        refuse_capture(self.counts.capturable, params[0])
        gradients = [p.grad for p in params]
        moved = [i for i, g in enumerate(gradients) if g is not None]
        layouts = {gradients[i].layout for i in moved}
        for i in moved if self.left_out or layouts != {torch.strided} else ():
            if i in self.left_out or gradients[i].layout is not torch.strided:
                refuse_gradient(self.tx.name, self.paths[i], params[i], gradients[i])
        entries, contents, began = self.entries(state, params, moved)
        flat = leaves_of(self, entries, moved, contents)
        tensors, gradients = self.given(params), self.given(gradients)
        step = Step(self, params, moved, entries, flat, tensors, active)
        extra = self._extra(loss, gradients)
        if tx is self.tx and self._goes_in_place(params, loss):
            in_place = self._in_place(step, gradients, extra, state if began else None)
            return self._sent_to_all(step, in_place)
        work = partial(step.worked_out, tx, self.tree(gradients), extra)
        # With owners another rank may be making its step in place, and waits for an error in act.
        write = None if self.replicas else work()

        def act() -> None:
            last = write or work()
            if has_failed():
                return
            if began:
                step.keep(state)
            last()

        return self._sent_to_all(step, act)

    def given(self, values: list[Any]) -> list[Any]:
        """The values of all parameters; with owners each rank has those that it owns."""
        return self.replicas.given(values) if self.replicas else values

    def _sent_to_all(self, step: Step, act: Callable[[], None]) -> Callable[[], None]:
        """`act`, and then the owners send what they have made of the parameters."""
        if not self.replicas:
            return act
        return partial(step_and_send, self.replicas, step, act)

    def _goes_in_place(self, params: list[Tensor], loss: Any) -> bool:
        """Whether the step can be made in place, tensor by tensor.

        Before it is made for the first time, it is rehearsed with a few numbers for each tensor. If
        that raises, all is worked out before anything is written. So an error in a rule leaves
        everything as it was.
        """
        if self.is_whole is None:
            try:
                self._rehearse(params, loss)
                self.is_whole = False
            except Exception as error:
                self.is_whole = True
                if self.in_place.backend != IN_PIECES:
                    warnings.warn(
                        "the step is not compiled, for with a few numbers in the place of each "
                        f"parameter {self.tx.name} raised {type(error).__name__}: {error}",
                        stacklevel=6,
                    )
        if self.is_whole:
            what = "the step has to be worked out before any of it is written"
            refuse_on_host(self, what)
        return not self.is_whole

    def _rehearse(self, params: list[Tensor], loss: Any) -> None:
        few = [*map(small, params)]
        ps = self.tree(few)
        state = self.tx.init(ps)
        extra = self._extra(rehearsed(loss), few)
        new = self.tx.update(ps, state, ps, **extra)[1]
        differences(self.numbered, state, new)

    def _in_place(
        self,
        step: Step,
        gradients: list[Any],
        extra: dict[str, Any],
        state: State | None,
    ) -> Callable[[], None]:
        """The step as one pass over memory. Whatever can fail by then has not failed."""
        extra = self.tx.read_of(extra)

        def act() -> None:
            params, run = step.tensors, self.in_place
            if step.active is not None:
                changed = step.changed(self._if_active(step, gradients, extra))
            elif self.checked and self.rules is not None:
                ps, us = self._leaves(params), self._leaves(gradients)
                new = run.run_flat(self.rules, self.view, ps, us, step.flat, extra)
                changed = step.checked(new)
            else:
                trees = self.tree(params), self.tree(gradients)
                changed = step.changed(run.run(*trees, step.old, extra, self.checked))
            self.checked = True
            if state is not None:
                step.keep(state)
            step.write_state(step.kept_apart([], changed, [])[1], True)

        return act

    @cached_property
    def _gated(self) -> CompiledStep:
        return self._stepping(if_finite(self.tx), self.in_place.backend)

    def _if_active(
        self, step: Step, gradients: list[Any], extra: dict[str, Any]
    ) -> PyTree:
        """The new state of a step behind a gate."""
        trees = self.tree(step.tensors), self.tree(gradients)
        given = {**extra, "is_finite": step.active}
        return self._gated.run(*trees, behind(step.old), given, self.checked)["inner"]

    def entries(
        self, state: State, params: list[Tensor], moved: list[int]
    ) -> tuple[list[dict[str, Any]], Contents | None, bool]:
        """The state of each parameter, where its tensors are if that is known, and whether some of
        it begins with this step."""
        entries = entries_of(state, params)
        self.counts.move(entries)
        traced = torch.compiler.is_compiling()
        contents = None if traced else self.contents
        if contents is not None and contents.fit(entries, moved):
            return entries, contents, False
        if lacks(self, entries, set(moved)):
            entries = [dict(entry) for entry in entries]
            complete(self, entries, params, moved)
            return entries, None, True
        if traced or not are_plain(entries):
            return entries, None, False
        self.contents = Contents(entries, moved, self.where, self.counts.keys)
        return entries, self.contents, False

    def _extra(self, loss: Any, grads: list[Any]) -> dict[str, Any]:
        """What the transformation reads beside gradients, as far as a closure provides it."""
        return extra_of(self, loss, self.tree(grads)) if self.tx.extra_args else {}
