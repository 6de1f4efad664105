"""The compiled, in-place execution: ``update`` and ``apply_updates`` in one pass over memory.

A `Walk` takes a transformation apart into what happens to each leaf. Scalars are worked out first,
eagerly, once a step. Then everything that waits for a leaf runs as one compiled function, which
writes slots and parameters in place. Sizes are symbols in it, so compile time does not grow with the
model, and models of the same dtypes share the code. What is no rule runs eagerly between, and what
looks at all updates in mid-chain begins a new pass.
"""

from __future__ import annotations

import threading
import warnings
from collections import OrderedDict
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch

from functorch_opt import tree
from functorch_opt._core import structure
from functorch_opt._core.rule import Leafwise
from functorch_opt._core.transformation import GradientTransformation
from functorch_opt._execution.again import Job, Ways
from functorch_opt._execution.as_operations import traced
from functorch_opt._execution.body import Body, Columns
from functorch_opt._execution.flat import New, RuleAt, form_of, go_flat, new_of
from functorch_opt._execution.memory import (
    apart_from_params,
    check_memory,
    is_captured,
    overwritten,
    with_memory_of_its_own,
)
from functorch_opt._execution.models import ModelsStep
from functorch_opt._execution.routes import Route, picked, sorted_by_way
from functorch_opt._execution.rows import place_of, rows_of
from functorch_opt._execution.segments import (
    IN_PIECES,
    PROGRAMS,
    NeedsConstants,
    Segment,
    let_go,
)
from functorch_opt._execution.together import Worked
from functorch_opt._execution.views import View
from functorch_opt._execution.walk import Waiting, Walk
from functorch_opt._execution.writes import apart_from, memory_of
from functorch_opt.random import philox
from functorch_opt.tree import PyTree

__all__ = ["compiled_step"]

MODELS = 8
"""How many models a step remembers, for which it is used in turn."""


def compiled_step(
    tx: GradientTransformation,
    *,
    donate: bool = True,
    models: bool = False,
    capturable: bool = False,
) -> CompiledStep | ModelsStep:
    """The step ``params, state = step(params, grads, state)`` of `tx`, compiled.

    It does what ``update`` and ``apply_updates`` do, in one pass over memory.

    Args:
        tx: any transformation. What is made of rules (`chain`, `masked`, `partition`, wrappers and
            gates among them) runs as one pass over every tensor; a stage that is not made of rules
            runs eagerly between, and a warning names it.
        donate: overwrite the tensors of `params` and of the state's slots and return them, as JAX
            does with donated arguments. False: they stay as they are, at the price of a copy.
            In a function that you compile yourself only the params are overwritten; the state that
            comes back is new.
        models: whether this is a step of many models. Then every tensor of params, grads, state and
            extra arguments has a first dimension with an entry for each model, and the step does
            what ``vmap`` of one model's step does. The state is that of ``vmap(tx.init)(params)``.
            Hyperparameters of each model's own are in it with `inject_hyperparams`.
        capturable: write counts, and what else stages share, over the old ones too. Then a step can
            be captured as a CUDA graph, after an ordinary one, and replays go on with the same
            params and state. False: a step that is being captured is an error.

    Returns:
        ``step(params, grads, state, **extra)``, which returns the new params and state. It must not
        be differentiated or vmapped; for that there is ``update``.

    Raises:
        ValueError: (by the step) two parameters share memory, so that an update in place would move
            both; with `models`, first dimensions differ; what ``update`` raises. `capturable`
            beside ``donate=False`` or ``models=True``.
        RuntimeError: (by the step) it is being captured as a CUDA graph, and not `capturable`.
        TypeError: with `models`, a hyperparameter is a tensor and not in the state, or tensors are
            sharded.

    Example:
        >>> import torch, functorch_opt as fo
        >>> tx, params = fo.adamw(0.1), {"w": torch.ones(3)}
        >>> step, state = fo.compiled_step(tx), tx.init(params)
        >>> params, state = step(params, {"w": torch.ones(3)}, state)
    """
    if capturable and (models or not donate):
        raise ValueError(
            "a capturable step writes over its params and state: it takes neither donate=False "
            "nor models=True."
        )
    if models:
        return ModelsStep(tx, donate)
    return CompiledStep(tx, donate, capturable=capturable)


class CompiledStep:
    """What `compiled_step` makes. It keeps which code serves which leaf of which model."""

    walks = Walk

    def __init__(
        self,
        tx: GradientTransformation,
        donate: bool,
        backend: Any = "inductor",
        capturable: bool = False,
    ) -> None:
        self.tx, self.donate, self.backend = tx, donate, backend
        self.capturable = capturable
        self.segments: dict[Any, list[Segment]] = {}
        self.views: OrderedDict[Any, View] = OrderedDict()
        self.last: View | None = None
        self.dtypes: OrderedDict[Any, torch.dtype | None] = OrderedDict()
        self.routes: OrderedDict[Any, tuple[list[View], list[Route]]] = OrderedDict()
        self.returned: list[PyTree] = []
        self.ways: OrderedDict[int, Ways] = OrderedDict()
        self.said: set[str] = set()
        self.lock = threading.Lock()

    def __repr__(self) -> str:
        options = "" if self.donate else ", donate=False"
        options += ", capturable=True" if self.capturable else ""
        return f"compiled_step({self.tx!r}{options})"

    @torch.no_grad()
    def __call__(
        self, params: PyTree, grads: PyTree, state: PyTree, **extra: Any
    ) -> tuple[PyTree, PyTree]:
        extra = self.tx.read_of(extra)
        if torch.compiler.is_compiling():
            return traced(self.tx, params, grads, state, extra, self.donate)
        if not self.donate:
            params = tree.map(torch.clone, params)
            state = tree.map(torch.clone, state)
        if not self.capturable and is_captured(params):
            raise RuntimeError(
                "a step is being captured as a CUDA graph, which would repeat its counts for ever: "
                "they are new tensors after every step. Use compiled_step(tx, capturable=True)."
            )
        known = any(state is one for one in self.returned)
        new = self.run(params, grads, state, extra, known)
        if self.donate:
            self.returned = [new, *self.returned[: MODELS - 1]]
        return params, new

    def run(
        self,
        params: PyTree,
        grads: PyTree,
        state: PyTree,
        extra: dict[str, Any],
        known: bool,
    ) -> PyTree:
        """The new state; parameters and slots are overwritten.

        A state that is not `known`, for it did not come from this step, may share memory with
        parameters or gradients, or within itself. Such tensors are replaced by copies.
        """
        view, ps = self.view(params)
        us = structure.match(params, view.spec, grads, names=("params", "grads"))
        form = view.form if known else None
        leaves = form.leaves(state) if form else None
        if form and leaves is not None:
            new = self.run_flat(form.rules, view, ps, us, leaves, extra)
            moved = form.with_new(leaves, new)
            return overwritten(state, moved) if self.capturable else moved
        if not known:
            state = with_memory_of_its_own(state, [*ps, *us])
        walk = self._walk(view, ps, apart_from_params(us, ps), extra, known)
        with self._drawing():
            after = walk.look(self.tx, state, view)
            walk.go()
            self._apply(walk, add=True)
        if known or view.form is None:
            view.form = form_of(self.tx, state, walk.sharded)
        return overwritten(state, after()) if self.capturable else after()

    def run_flat(
        self,
        rules: list[RuleAt],
        view: View,
        ps: list[Any],
        us: list[Any],
        state: list[Any],
        extra: dict[str, Any],
    ) -> New:
        """What `run` does, for the `rules` of a chain and leaves that are in lists.

        Returns:
            What of the state is new, by its place in the list. Slots are overwritten.
        """
        us = apart_from_params(us, ps)
        ways = self._ways(rules)
        worked: list[Worked] = []
        with self._drawing():
            if not extra and (new := ways.go(us, ps, state, worked)) is not None:
                return new
            walk = self._walk(view, ps, us, extra, True)
            shared = go_flat(walk, rules, state, view, worked)
            waiting = walk.waiting
            jobs = self._apply(walk, add=True)
        ways.remember(walk, waiting, jobs, state)
        return new_of(rules, shared, state)

    def _ways(self, rules: list[RuleAt]) -> Ways:
        """What is kept of the steps of these rules."""
        with self.lock:
            if len(self.ways) == MODELS and id(rules) not in self.ways:
                self.ways.popitem(last=False)
            return self.ways.setdefault(id(rules), Ways(rules, self.backend))

    def _walk(
        self,
        view: View,
        ps: list[Any],
        us: list[Any],
        extra: dict[str, Any],
        known: bool,
    ) -> Walk:
        flush: Any = partial(self._apply, add=False)
        once = None if self.backend == IN_PIECES else self.backend
        return self.walks(view, ps, us, extra, flush, self._aside, known, once)

    def _drawing(self) -> AbstractContextManager[Any]:
        """Where random numbers are drawn by compiled code, if anything is compiled."""
        backend = self.backend
        return nullcontext() if backend == IN_PIECES else philox.compiled(backend)

    def view(self, params: PyTree) -> tuple[View, list[Any]]:
        """The view of all of `params`, and its leaves. Mostly it is that of the last step."""
        view = self.last
        if view is not None and (ps := view.fitting(params)) is not None:
            return view, ps
        ps, spec = structure.flatten_tensors(params, "params")
        with self.lock:
            view = self.views.get(spec) or View(spec, [*range(len(ps))], True)
            self.last = self.views[spec] = view
            while len(self.views) > MODELS:
                self.views.popitem(last=False)
        return view, ps

    # ---- what waits ------------------------------------------------------------------------------

    def _apply(self, walk: Walk, add: bool) -> list[Job]:
        """Apply what waits to the updates; `add` them to the parameters. What was done for that."""
        waiting, walk.waiting = walk.waiting, []
        if not waiting and not add:
            return []
        jobs = [
            self._job(walk, waiting, route, add) for route in self._routes(walk, waiting)
        ]
        for segment, columns, _ in jobs:
            segment.check(columns)
        self._run(jobs)
        return jobs

    def _run(self, jobs: list[Job]) -> None:
        for segment, columns, body in jobs:
            segment.run(columns, body)

    def _job(self, walk: Walk, waiting: list[Waiting], route: Route, add: bool) -> Job:
        """The code for a route, the leaves that it gets, and their scalars."""
        mine = [waiting[k] for k in route.waiting]
        us = [*picked(walk.us, route.leaves)]
        ps = picked(walk.ps, route.leaves)
        slots: Columns = []
        rows: list[tuple[list[Any], bool]] = []
        for each, places in zip(mine, route.places, strict=True):
            slots += [picked(column, places) for column in each.slots.values()]
            rows += [(picked(row, places), own) for row, own in rows_of(each, walk)]
        into = None
        if not add:
            dtypes = self._dtypes(mine, [us, ps, *slots, *[row for row, _ in rows]])
            into = place_of(rows, us, dtypes)
        if into is not None:
            written = rows[into][0]
            leaves = range(len(us)) if route.leaves is None else route.leaves
            for i, x, u in zip(leaves, written, us, strict=True):
                walk.us[i] = None if u is None else x
        columns = [us, ps, *slots, *[row for row, _ in rows]]
        segment, body = self._segment(mine, into, columns, walk, route)
        return segment, columns, body

    def _dtypes(self, mine: list[Waiting], columns: Columns) -> list[torch.dtype | None]:
        """The dtype of each update that is written to memory of its own."""
        body = Body(
            [each.entry for each in mine], [each.now for each in mine], None, False
        )
        found = []
        for leaf in zip(*columns, strict=True):
            key = body.base, tuple([x is not None and (x.dtype, x.dim()) for x in leaf])
            if key not in self.dtypes:
                missing = leaf[0] is None
                self.dtypes[key] = None if missing else body.dtype_of_update([*leaf])
                while len(self.dtypes) > 8 * MODELS:
                    self.dtypes.popitem(last=False)
            found.append(self.dtypes[key])
        return found

    def _segment(
        self,
        mine: list[Waiting],
        into: int | None,
        columns: Columns,
        walk: Walk,
        route: Route,
    ) -> tuple[Segment, Body]:
        """What knows these tensors, made if there is no such thing yet."""
        entries = [each.entry for each in mine]
        now = [each.now for each in mine]
        if into in route.last:
            segment, last = route.last[into]
            again = last.renewed(now) if last.entries == entries else None
            if again is not None and segment.knows(columns):
                return segment, again
        body = Body(entries, now, into, False)
        if PROGRAMS.wants_inputs(body):
            body = Body(entries, now, into, True)
        key = self._key(body, route)
        known = self.segments.get(key, ())
        for segment in known:
            if segment.knows(columns):
                let_go(known, segment)
                route.last[into] = segment, body
                return segment, body
        if walk.writes_params:
            check_memory(walk)
        where = picked(walk.paths, route.leaves)
        try:
            segment = Segment(self.backend, body, columns, where, self.donate)
        except NeedsConstants:
            PROGRAMS.constant_only.add(body.base)
            return self._segment(mine, into, columns, walk, route)
        let_go(known, segment)
        with self.lock:
            self.segments[key] = [segment, *known][:MODELS]
        return segment, body

    def _key(self, body: Body, route: Route) -> Any:
        """By what segments are looked up."""
        return body.key

    def _routes(self, walk: Walk, waiting: list[Waiting]) -> list[Route]:
        """The leaves, by what they go through. It is the same as long as the views are."""
        views = [each.view for each in waiting]
        key = (len(walk.ps), *map(id, views))
        found = self.routes.get(key)
        if found is None:
            found = views, sorted_by_way(len(walk.ps), views)
            with self.lock:
                self.routes[key] = found
                while len(self.routes) > 8 * MODELS:
                    self.routes.popitem(last=False)
        return found[1]

    # ---- what is not made of rules ---------------------------------------------------------------

    def _aside(
        self, walk: Walk, view: View, tx: GradientTransformation, state: PyTree
    ) -> PyTree:
        """Run a stage that cannot be taken apart, eagerly."""
        self._say(tx)
        extra = {name: walk.extra[name] for name in tx.extra_args if name in walk.extra}
        updates, new = tx.update(view.tree(walk.us), state, view.tree(walk.ps), **extra)
        reference, names = view.tree(walk.ps), ("params", "updates")
        moved = structure.match(reference, view.spec, updates, names=names)
        columns = [walk.ps, *walk.columns]
        written = {
            memory_of(x) for column in columns for x in column if x is not None
        } - {0}
        view.write(walk.us, [apart_from(written, u) for u in moved])
        return tree.map(partial(apart_from, written), new)

    def _say(self, tx: GradientTransformation) -> None:
        made_of_rules = isinstance(tx, Leafwise)
        if not made_of_rules and tx.name not in self.said and self.backend != IN_PIECES:
            self.said.add(tx.name)
            warnings.warn(
                f"compiled_step runs {tx.name} eagerly, between the compiled rest: it is not made "
                "of rules. If it can be, write it with leafwise, wrap or gate.",
                stacklevel=2,
            )
