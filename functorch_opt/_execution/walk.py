"""From a declaration to what is to be done with each leaf.

`Walk.look` goes through a transformation once, before anything is written: it lists what is to be
done, in order, and works out every schedule, decision and `prepare` that can be worked out by then.
`Walk.go` does it: rules wait in a line until something has to see the updates, and then they run,
all that wait for a leaf as one body.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import cached_property, partial
from operator import attrgetter, is_not
from typing import Any

from torch import Tensor

from functorch_opt._core import sharding
from functorch_opt._core.chain import Chain
from functorch_opt._core.gate import Gate
from functorch_opt._core.groups import Groups
from functorch_opt._core.inject import Injected
from functorch_opt._core.leaf import part_of_tree
from functorch_opt._core.rule import Leafwise
from functorch_opt._core.state import StageState
from functorch_opt._core.transformation import GradientTransformation
from functorch_opt._core.wrap import Wrap
from functorch_opt._execution.apart import run_apart
from functorch_opt._execution.body import ACTIVE, Columns, Entry, entry_of
from functorch_opt._execution.fusing import (
    can_be_fused,
    gate_fits,
    looks_first,
    made_once,
)
from functorch_opt._execution.together import Together, Updates, Worked
from functorch_opt._execution.views import View, check_shapes
from functorch_opt._execution.waiting import Door, NewState, Waiting, after_gate, both
from functorch_opt.tree import PyTree

_IS_THERE, _IS_CPU = partial(is_not, None), attrgetter("is_cpu")


class Walk:
    """One step of a transformation: `us` are the updates as far as they are worked out.

    Args:
        root: all leaves.
        ps: the parameters, as the stages see them.
        us: the updates.
        extra: extra arguments of the step.
        flush: applies what waits to the updates.
        aside: runs a stage that cannot be taken apart, and says so.
        known: whether the state is known to fit.
        backend: compiles what is worked out once a step; None if that is not to be compiled.
    """

    def __init__(
        self,
        root: View,
        ps: list[Any],
        us: list[Any],
        extra: dict[str, Any],
        flush: Callable[[Walk], None],
        aside: Callable[[Walk, View, GradientTransformation, PyTree], PyTree],
        known: bool,
        backend: Any,
    ) -> None:
        self.together = Together(backend)
        self.ps = ps
        self.us = us
        self.extra = extra
        self.flush = flush
        self.aside = aside
        self.root = root
        self.known = known
        self.waiting: list[Waiting] = []
        self.todo: list[tuple[list[Door], Callable[[], None]]] = []
        self.doors: list[Door] = []
        self.columns: Columns = []
        self.settled = True
        self.writes_params = True

    @cached_property
    def sharded(self) -> bool:
        """Whether any parameter lies on several ranks."""
        return sharding.any_sharded(self.ps)

    @cached_property
    def on_host(self) -> bool:
        """Whether the host can read what is decided."""
        return all(map(_IS_CPU, filter(_IS_THERE, self.ps)))

    @property
    def paths(self) -> list[str]:
        """The path of every leaf."""
        return self.root.paths

    # ---- before anything is written --------------------------------------------------------------

    def look(self, tx: GradientTransformation, state: PyTree, view: View) -> NewState:
        """List what `tx` does. The function that is returned gives the new state afterwards."""
        if isinstance(tx, Chain):
            tx.check_state(state)
            stages = tx.stages.items()
            new = {name: self.look(stage, state[name], view) for name, stage in stages}
            return lambda: {name: of() for name, of in new.items()}
        if isinstance(tx, Leafwise):
            # Of whole tensors that are sharded the owners work out the update, all at once.
            alone = tx.kind == "tensorwise" and sharding.any_sharded(view.leaves(self.ps))
            return (self._other if alone else self._rule)(tx, state, view)
        if isinstance(tx, Groups):
            return self._groups(tx, state, view)
        if isinstance(tx, Injected):
            values, counter = tx.next(state, self.extra)
            inner = self.look(made_once(tx, values), state["inner"], view)
            return lambda: {"hyperparams": values, "inner": inner(), **counter}
        if isinstance(tx, Gate) and (self.on_host or gate_fits(tx, self.sharded)):
            return self._gate(tx, state, view)
        if isinstance(tx, Wrap):
            return self._wrap(tx, state, view)
        return self._other(tx, state, view)

    def _do(self, action: Callable[[], None], writes: bool = False) -> None:
        """Do it now, if it writes nothing and nothing is listed before it; else list it."""
        if writes or self.todo:
            self.todo.append(([*self.doors], action))
        else:
            self.doors_now = self.doors
            action()

    def _columns(
        self, tx: Any, slots: dict[str, PyTree], view: View
    ) -> dict[str, list[Any]]:
        """The slots of a stage, a list of leaves for each."""
        columns = {
            name: view.column(self.ps, slot, f"the state's {name}")
            for name, slot in slots.items()
        }
        if not self.known:
            for name, column in columns.items():
                check_shapes(tx, name, column, view.leaves(self.ps), view.paths)
        self.columns += columns.values()
        return columns

    def inside(self, view: View) -> Any:
        """Where values have one entry for each leaf, a stage takes those of its leaves."""
        return nullcontext() if view.is_root else part_of_tree(view.indices)

    def _rule(self, tx: Leafwise, state: PyTree, view: View) -> NewState:
        tx.check_state(state)
        columns = self._columns(tx, state.slots, view)
        shared = self.rule(tx, state.shared, columns, view)
        return lambda: StageState(shared, state.slots)

    def rule(
        self,
        tx: Leafwise,
        old: dict[str, Tensor],
        columns: dict[str, list[Any]],
        view: View,
        worked: Worked | None = None,
    ) -> dict[str, Tensor]:
        """List a rule with these shared values and slots; the next shared values, once it is done.

        `worked` is what it works out once a step, if that has been done.
        """
        first, self.settled = self.settled, False
        settled = first and self._is_certain() and not self.sharded
        us = Updates(view.leaves(self.us), lambda: view.tree(self.us), settled)
        share = worked or self.together.takes(tx, old, self.extra, us)
        now: dict[str, Any] = share.now if share else {}
        shared: dict[str, Tensor] = share.shared if share else {}
        known = [share is not None]

        def scalars() -> None:
            values, new = self._scalars(tx, old, columns, view)
            now.update({name: values[name] for name in tx.reads if name in values})
            shared.update(new)
            known[0] = True

        def act() -> None:
            if self._ends_pass(tx, first):
                self.flush(self)
            if not known[0]:
                scalars()
            us, ps = view.leaves(self.us), view.leaves(self.ps)
            if tx.exchanges and self.sharded:
                trees = view.tree(self.us), view.spec
                now.update(tx.sums_before(*trees, us, ps, columns, now))
            self._wait(entry_of("rule", tx), view, columns, now)

        if not known[0] and self._is_certain() and (first or not tx.looks_around):
            scalars()
        self._do(act, writes=self._ends_pass(tx, first))
        return shared

    def _scalars(
        self, tx: Leafwise, old: dict[str, Tensor], columns: Any, view: View
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        us, ps = view.leaves(self.us), view.leaves(self.ps)
        updates = view.tree(self.us) if tx.looks_around else None
        params = view.tree(self.ps) if "params" in tx.once.reads else None
        with self.inside(view):
            return tx.scalars(updates, old, params, self.extra, us, ps, columns)

    def _ends_pass(self, tx: Leafwise, settled: bool) -> bool:
        """Whether what waits has to be applied before `tx` can be worked out.

        It has to see updates that are not `settled`. Or tensors are sharded, and the ranks exchange
        something before it, or it sees whole tensors where a rule that waits sees parts, or the
        reverse.
        """
        kinds = {x.entry.kind for x in self.waiting} if tx.looks_around else set()
        if not settled and kinds - {"enter", "open"}:
            return True
        return (tx.exchanges and self.sharded) or self._mixes(tx.kind)

    def _mixes(self, kind: str) -> bool:
        """Whether tensors are sharded, and a rule waits that is not of this kind."""
        if not self.sharded:
            return False
        kinds = {x.entry.rule_kind for x in self.waiting}
        return bool(kinds - {None, kind})

    def _begin_elementwise(self) -> None:
        """A wrapper, or a gate, begins and ends in one pass; on several ranks it is elementwise."""
        if self._mixes("elementwise"):
            self.flush(self)

    def _is_certain(self) -> bool:
        """Whether no gate on the way waits for its decision."""
        return all(door.active is not None for door in self.doors)

    def _is_undecided(self) -> bool:
        """Whether the host will not know either if what is behind the gates works."""
        flags = [door.active for door in self.doors]
        return any(
            isinstance(x, Tensor) or (x is None and not self.on_host) for x in flags
        )

    def _wait(self, entry: Entry, view: View, slots: Any = None, now: Any = None) -> None:
        flags = [door.active for door in self.doors_now if door.active is not True]
        now = {} if now is None else now
        if flags:
            now[ACTIVE] = both(flags)
        self.waiting.append(Waiting(entry, view, slots or {}, now))

    def _groups(self, tx: Groups, state: PyTree, view: View) -> NewState:
        views = view.of_groups(tx, self.ps)
        new: dict[str, NewState] = {}
        began, ended = self.settled, False
        for label, inner in tx.inside.items():
            if label in views:
                self.settled = began
                new[label] = self.look(
                    inner, tx.part_of_state(state, label), views[label]
                )
                ended |= not self.settled
        self.settled = began and not ended
        if None in views and tx.otherwise == "zero":
            self.settled = False
            self._do(lambda: self._wait(Entry("zero"), views[None]))
        return lambda: {label: of() for label, of in new.items()}

    def _gate(self, tx: Gate, state: PyTree, view: View) -> NewState:
        door, first = Door(), self.settled
        reads = "updates" in tx.once.reads

        def decide() -> None:
            us = view.tree(self.us) if reads else None
            ps = view.tree(self.ps) if "params" in tx.once.reads else None
            door.active, door.shared = tx.decided(us, state, ps, self.extra)

        tx.check_state(state)
        if self._is_certain() and (first or not reads):
            decide()
        else:
            if reads:
                self._do(lambda: self.flush(self), writes=True)
            self._do(decide)
        known, passes = isinstance(door.active, bool), tx.otherwise == "pass"
        if passes and not known:
            self._do(
                lambda: self._open(tx, door, view), writes=self._mixes("elementwise")
            )
        self.doors.append(door)
        inner: NewState | None = None
        if door.active is not False:
            self.settled = self.settled and (known or not passes)
            inner = self.look(tx.inner, state["inner"], view)
        elif tx.otherwise == "zero":
            self.settled = False
        self.doors.pop()
        self._do(lambda: self._close(tx, door, view))
        return lambda: after_gate(door, inner, state["inner"])

    def _open(self, tx: Gate, door: Door, view: View) -> None:
        if not isinstance(door.active, bool):
            self._begin_elementwise()
            self.waiting.append(
                Waiting(entry_of("open", tx), view, {}, {ACTIVE: door.active})
            )

    def _close(self, tx: Gate, door: Door, view: View) -> None:
        if door.active is True:
            return
        if tx.otherwise == "pass":
            if door.active is not False:
                self.waiting.append(Waiting(entry_of("close", tx), view))
        elif door.active is False:
            self.waiting.append(Waiting(Entry("zero"), view))
        else:
            now = {ACTIVE: door.active}
            self.waiting.append(Waiting(Entry("shut"), view, {}, now))

    def _wrap(self, tx: Wrap, state: PyTree, view: View) -> NewState:
        tx.check_state(state)
        if not can_be_fused(tx, self.sharded):
            apart = self._other if self._is_undecided() else self._wrap_apart
            return apart(tx, state, view)
        kept = state["kept"]
        columns = self._columns(tx, kept.slots, view)
        now, shared = self.wrap_scalars(tx, state, view)
        mine = {name: x for name, x in now.items() if name in tx.reads}
        if looks_first(tx.inner) and not self.settled:
            self._do(lambda: self.flush(self), writes=True)

        def enter() -> None:
            self._begin_elementwise()
            self._wait(entry_of("enter", tx), view, columns, mine)

        self._do(enter, writes=self._mixes("elementwise"))
        inner = self.look(tx.inner, state["inner"], view)
        self._do(lambda: self.waiting.append(Waiting(entry_of("leave", tx), view)))
        self.settled = False
        return lambda: {"inner": inner(), "kept": StageState(shared, kept.slots)}

    def wrap_scalars(self, tx: Wrap, state: PyTree, view: View) -> Any:
        us = view.tree(self.us) if "updates" in tx.once.reads else None
        ps = view.tree(self.ps) if "params" in tx.once.reads else None
        with self.inside(view):
            return tx.scalars(us, state["kept"].shared, ps, self.extra, len(view.indices))

    def _wrap_apart(self, tx: Wrap, state: PyTree, view: View) -> NewState:
        """What is inside sees tensors of its own, for something of it looks at whole trees."""
        box: list[PyTree] = []

        def act() -> None:
            self.flush(self)
            box.append(run_apart(self, tx, state, view))

        self.settled = False
        self._do(act, writes=True)
        return lambda: box[0]

    def _other(self, tx: GradientTransformation, state: PyTree, view: View) -> NewState:
        box: list[PyTree] = []

        def act() -> None:
            self.flush(self)
            with self.inside(view):
                box.append(self.aside(self, view, tx, state))

        self.settled = False
        self._do(act, writes=True)
        return lambda: box[0]

    # ---- a step ----------------------------------------------------------------------------------

    def go(self) -> None:
        """Do what was listed. What waits in the end is left to be applied."""
        self.together.work_out()
        for doors, action in self.todo:
            if all(door.active is not False for door in doors):
                self.doors_now = doors
                action()
        self.todo = []
