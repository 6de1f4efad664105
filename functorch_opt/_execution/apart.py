"""A wrapper whose inner transformation has to see whole trees of what only the wrapper shows it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from functorch_opt import tree
from functorch_opt._core.state import StageState
from functorch_opt._core.wrap import Wrap
from functorch_opt._execution.views import View
from functorch_opt._execution.writes import apart_from, memory_of, run_eagerly
from functorch_opt.tree import PyTree

if TYPE_CHECKING:
    from functorch_opt._execution.walk import Walk


def run_apart(outer: Walk, tx: Wrap, state: PyTree, view: View) -> PyTree:
    """A wrapper whose inner transformation sees trees of its own, in a walk of its own."""
    kept = state["kept"]
    now, shared = outer.wrap_scalars(tx, state, view)
    leaves = tx.leaves(view.tree(outer.us), view.tree(outer.ps), kept.slots, now)
    seen, seen_params = leaves.before()
    us, ps = [*outer.us], [*outer.ps]
    view.write(us, tree.flatten(seen)[0])
    view.write(ps, tree.flatten(seen_params)[0])
    backend = outer.together.backend
    walk = type(outer)(
        outer.root, ps, us, outer.extra, outer.flush, outer.aside, outer.known, backend
    )
    walk.writes_params = False
    walk.columns = [outer.ps, *outer.columns, *leaves.columns.values()]
    inner = walk.look(tx.inner, state["inner"], view)
    walk.go()
    walk.flush(walk)
    updates, slots = leaves.after(view.leaves(walk.us))
    old = [x for column in leaves.columns.values() for x in column]
    new = [x for name in leaves.columns for x in tree.flatten(slots[name])[0]]
    written = {memory_of(x) for x in old} - {0}
    moved = [apart_from(written, u) for u in tree.flatten(updates)[0]]
    view.write(outer.us, moved)
    writes = [(i, x) for i, x in enumerate(new) if x is not None]
    run_eagerly(lambda _: writes, old)
    return {"inner": inner(), "kept": StageState(shared, kept.slots)}
