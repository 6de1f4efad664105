"""The writes of one step of a stateful optimizer: parameters, slots and counts, in place."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from functorch_opt import tree
from functorch_opt._core import sharding
from functorch_opt._core.transformation import GradientTransformation
from functorch_opt.optim.loss_scale import updated
from functorch_opt.optim.places import apart, assemble, check_leaf, differences
from functorch_opt.tree import PyTree

if TYPE_CHECKING:
    from functorch_opt.optim.plan import Plan

State = dict[Tensor, dict[str, Any]]
Pairs = list[tuple[Tensor, Tensor]]
Changed = list[tuple[int, Any]]
"""What of a state is another tensor now, by its place in the list of its leaves."""
NOTHING: dict[str, Any] = {}


class Step:
    """What one step reads and writes."""

    def __init__(
        self,
        plan: Plan,
        params: list[Tensor],
        moved: list[int],
        entries: list[dict[str, Any]],
        flat: list[Any],
        tensors: list[Any],
        active: Tensor | None = None,
    ) -> None:
        self.plan, self.params, self.moved = plan, params, moved
        self.active = active
        """Whether the step is made, where only the device knows it; None: it is."""
        self.tensors = tensors
        """The parameters, or what this rank owns of them."""
        self.entries = entries
        self.flat = flat
        self._old: PyTree = None

    @property
    def old(self) -> PyTree:
        """The functional state that the step begins with.

        No `cached_property`: up to Python 3.11 it has a lock, which Dynamo cannot trace.
        """
        if self._old is None and torch.compiler.is_compiling():
            self._old = assemble(self.plan.numbered, self.flat)
        elif self._old is None:
            self._old = tree.unflatten(self.plan.spec, self.flat)
        return self._old

    def keep(self, state: State) -> None:
        """Keep state that begins with this step."""
        for p, entry in zip(self.params, self.entries, strict=True):
            if entry:
                state[p].update(entry)
        self.entries = [state.get(p, NOTHING) for p in self.params]

    def worked_out(
        self,
        tx: GradientTransformation,
        grads: PyTree,
        extra: dict[str, Any],
    ) -> Callable[[], None]:
        """Work out the update of the whole tree. What is returned writes it."""
        plan = self.plan
        ps = plan.tree([p.detach() for p in self.tensors])
        updates, new = updated(tx, (grads, self.old, ps), extra, self.active)
        us = dict(zip(plan.order, tree.flatten(updates)[0], strict=True))
        return self.writes([us[i] for i in self.moved], self.changed(new))

    def writes(self, us: list[Tensor], changed: Changed) -> Callable[[], None]:
        """What writes updates and state, once nothing can fail any more.

        All is read before anything is overwritten: a rule may return what it was given.
        """
        targets = [self.tensors[i] for i in self.moved]
        us, changed = self.kept_apart(us, changed, targets)

        def write() -> None:
            pairs = list(zip(targets, us, strict=True))
            _foreach(torch._foreach_add_, Tensor.add_, pairs)
            self.write_state(changed, False)

        return write

    def kept_apart(
        self, us: list[Tensor], changed: Changed, targets: list[Tensor]
    ) -> tuple[list[Tensor], Changed]:
        """The updates, and what of the state is another tensor now, in memory that nothing
        writes."""
        kept = [k for k, _ in changed if self.plan.flat[k].kind in ("slot", "joint")]
        if not (kept or us):
            return us, changed
        found = dict(changed)
        written = [*targets, *[self.flat[k] for k in kept]]
        values = apart([*us, *[found[k] for k in kept]], written)
        found.update(zip(kept, values[len(us) :], strict=True))
        return values[: len(us)], [*found.items()]

    def checked(self, changed: Changed) -> Changed:
        """`changed`, if nothing of it changes the form of the state; else TypeError."""
        for k, x in changed:
            check_leaf(self.plan.flat[k].path, self.flat[k], x)
        return changed

    def changed(self, new: PyTree) -> Changed:
        """The places where `new` has another tensor than the state that the step began with."""
        try:
            assert (
                not torch.compiler.is_compiling()
            )  # which takes no treespec from outside
            after = self.plan.spec.flatten_up_to(new)
        except (AssertionError, TypeError, ValueError):
            return differences(self.plan.numbered, self.old, new)
        pairs = zip(self.flat, after, strict=True)
        changed = [(k, x) for k, (old, x) in enumerate(pairs) if x is not old]
        olds = [self.flat[k] for k, _ in changed]
        news = [x for _, x in changed]
        if _forms(olds) == _forms(news):
            return changed
        return differences(self.plan.numbered, self.old, new)

    def write_state(self, changed: Changed, in_place: bool) -> None:
        """Write slots and counts."""
        plan = self.plan
        counts = self.plan.counts
        kinds = {k: plan.flat[k].kind for k, _ in changed}
        copies = [(self.flat[k], x) for k, x in changed if kinds[k] in ("slot", "joint")]
        _foreach(torch._foreach_copy_, Tensor.copy_, copies)
        found = dict(changed)
        mine = [self.entries[i] for i in self.moved]
        of_all = counts.capturable or len(mine) == len(self.params)
        everybody = mine if of_all else None
        number = {key: k for k, key in plan.counted}
        for key in counts.counts:
            by = self._advance(number.get(key), found)
            if not (isinstance(by, int) and by == 0):
                counts.advance(
                    key, [entry[key] for entry in mine], by, everybody, in_place
                )
        for k, key in plan.clocked:
            if k in found:
                counts.set_time(key, found[k], mine)

    def _advance(self, k: int | None, found: dict[int, Any]) -> Any:
        """By how much a count went on: what update returned, less what it was given."""
        if k is None or (self.plan.always_counts and k in found):
            return 1 if self.active is None else self.active.to(torch.int64)
        if k not in found:
            return 0
        by = found[k] - self.flat[k]
        leaves = [self.plan.leaf[i] for i in self.moved]
        if not by.dim():
            return by
        return by[torch.tensor(leaves, device=by.device)]


def _forms(xs: list[Any]) -> list[Any]:
    """Of each tensor what a write over another one must not change."""
    return [(x.dtype, x.shape) if isinstance(x, Tensor) else None for x in xs]


def _foreach(many: Callable[..., Any], one: Callable[..., Any], pairs: Pairs) -> None:
    """``one(a, b)`` for all pairs, in one call where torch's foreach takes them.

    It refuses DTensors beside plain ones. In a graph one by one, but by foreach (torch 2.13):
    together, Inductor loses a write of amsgrad; and of a plain write to a 0-dim float64 tensor
    Dynamo may lose any.
    """
    if torch.compiler.is_compiling():
        for a, b in pairs:
            many([a], [b])
    elif pairs and all(type(a) in sharding.PLAIN for a, _ in pairs):
        many([a for a, _ in pairs], [b for _, b in pairs])
    else:
        for a, b in pairs:
            one(a, b)
