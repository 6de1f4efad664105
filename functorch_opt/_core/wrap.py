"""Transformations around other transformations, made from a declaration.

The declaration says what the inner transformation sees, and what becomes of its update.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from functorch_opt import tree
from functorch_opt._core import sharding, structure
from functorch_opt._core.once import (
    Once,
    check_declared,
    check_names,
    check_no_keywords,
    check_reads,
)
from functorch_opt._core.state import StageState, check_around
from functorch_opt._core.transformation import (
    GradientTransformation,
    ScalarOrSchedule,
    positional,
)
from functorch_opt._core.wrapped import Leaves, called
from functorch_opt.tree import PyTree

__all__ = ["wrap"]


class Wrap(GradientTransformation):
    """What `wrap` makes. Its parts are attributes, from which every execution is derived."""

    def __init__(
        self,
        inner: GradientTransformation,
        once: Once,
        slots: Mapping[str, Callable[[Tensor], Tensor]],
        before: Callable[..., Any] | None,
        after: Callable[..., Any] | None,
        point: Callable[..., Tensor] | None,
        init_with: str | Callable[[Tensor], Tensor] | None,
        last: bool,
    ) -> None:
        self.inner, self.once, self.slots, self.point = inner, once, slots, point
        self.before, self.after, self.init_with = before, after, init_with
        self.before_reads = positional(before) if before else ()
        self.after_reads = positional(after) if after else ()
        self.name, self.last = once.name, last or inner.last
        self.extra_args = {**once.extra_args, **inner.extra_args}

    @property
    def changes_g(self) -> bool:
        """Whether the inner transformation sees another update than the one that comes in."""
        return "g" in self.before_reads

    @property
    def changes_p(self) -> bool:
        """Whether the inner transformation sees other parameters."""
        return self.before is not None and (
            "p" in self.before_reads or not self.changes_g
        )

    @property
    def reads(self) -> tuple[str, ...]:
        """The names that `before` and `after` read, of the values of a step and of slots."""
        names = dict.fromkeys((*self.before_reads, *self.after_reads))
        return tuple(name for name in names if name not in ("u", "g", "p"))

    @property
    def reads_params(self) -> bool:
        """Whether ``update`` needs params."""
        return "p" in (*self.before_reads, *self.after_reads) or self.once.needs_params

    def rebuilt(
        self, f: Callable[[GradientTransformation], GradientTransformation]
    ) -> Wrap:
        """The same wrap, around what `f` makes of the inner transformation."""
        return Wrap(
            f(self.inner),
            self.once,
            self.slots,
            self.before,
            self.after,
            self.point,
            self.init_with,
            self.last,
        )

    # ---- one leaf -------------------------------------------------------------------------------

    def seen(
        self,
        g: Any,
        p: Any,
        slots: Mapping[str, Tensor],
        now: Mapping[str, Any],
    ) -> tuple[Any, Any]:
        """The update and the parameter of one leaf, as the inner transformation sees them."""
        if self.before is None or (g is None and self.changes_g):
            return g, p
        given = {**slots, "g": g, "p": p}
        result = called(self.before, self.before_reads, given, now)
        if self.changes_g and self.changes_p:
            if not (isinstance(result, tuple) and len(result) == 2):
                raise TypeError(
                    f"{self.name}: before reads g and p, and so must return (g, p), what the inner "
                    f"transformation sees of both; it returned {type(result).__name__}."
                )
            return result
        return (result, p) if self.changes_g else (g, result)

    def left(
        self,
        u: Tensor,
        g: Tensor,
        p: Any,
        slots: Mapping[str, Tensor],
        now: Mapping[str, Any],
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The update of one leaf, and its new slots."""
        if self.after is None:
            return u, dict(slots)
        given = {**slots, "u": u, "g": g, "p": p}
        result = called(self.after, self.after_reads, given, now)
        if not slots:
            return self._checked(result, g, "the update"), {}
        pair = (
            isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], dict)
        )
        if not pair or result[1].keys() != slots.keys():
            raise TypeError(
                f"{self.name}: after must return (update, {{slot: new value}}) "
                f"with the slots {sorted(slots)}."
            )
        u, new = result
        kept = {}
        for name, old in slots.items():
            x = self._checked(new[name], old, name)
            kept[name] = x if x.dtype is old.dtype else x.to(old.dtype)
        return self._checked(u, g, "the update"), kept

    def _checked(self, x: Any, like: Tensor, what: str) -> Tensor:
        if isinstance(x, Tensor) and x.shape == like.shape:
            return x
        given = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(
            f"{self.name}: after must return a tensor of shape {tuple(like.shape)} for {what}; "
            f"it returned {given}."
        )

    def on_parts(self, f: Callable[..., Any], like: Any, *given: Any) -> Any:
        """``f`` of tensors and dicts of tensors. It gets this rank's parts of sharded ones."""
        if not tree.is_sharded(like):
            return f(*given)

        def enter(x: Any) -> Any:
            if isinstance(x, dict):
                return {name: enter(of) for name, of in x.items()}
            return tree.part_of(x, like)

        def leave(x: Any) -> Any:
            if isinstance(x, dict):
                return {name: leave(of) for name, of in x.items()}
            return sharding.join(x, like) if isinstance(x, Tensor) else x

        first, second = f(*map(enter, given))
        return leave(first), leave(second)

    # ---- whole trees ----------------------------------------------------------------------------

    def check_state(self, state: Any) -> None:
        check_around(state, self.name, "kept", self.once.keys, self.slots)

    def _init(self, params: PyTree) -> dict[str, PyTree]:
        slots = {name: tree.map(make, params) for name, make in self.slots.items()}
        inner = params
        if callable(self.init_with):
            inner = tree.map(self.init_with, params)
        elif self.init_with is not None:
            inner = slots[self.init_with]
        kept = StageState(self.once.first(params), slots)
        return {"inner": self.inner.init(inner), "kept": kept}

    def scalars(
        self, updates: PyTree, shared: Any, params: PyTree | None, extra: Any, n: int
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What `before` and `after` may read of this step, and the next shared values."""
        now = self.once.hypers(shared, n)
        mine = {name: extra[name] for name in self.once.extra_args if name in extra}
        now, new = self.once.prepared(
            now, shared, {"updates": updates, "params": params}, mine
        )
        if missing := [n for n in self.reads if n not in now and n not in self.slots]:
            names = ", ".join(missing)
            raise TypeError(f"{self.name} reads {names}, which prepare did not return.")
        return now, new

    def leaves(
        self,
        updates: PyTree,
        params: PyTree | None,
        slots: Mapping[str, PyTree],
        now: Mapping[str, Any],
    ) -> Leaves:
        """The leaves of a step, with the values that are read for each."""
        gs, spec = structure.flatten_tensors(updates, "updates")
        return Leaves(self, updates, spec, gs, params, slots, now)

    def _update(
        self,
        updates: PyTree,
        state: dict[str, PyTree],
        params: PyTree | None,
        **extra: Any,
    ) -> tuple[PyTree, dict[str, PyTree]]:
        self.check_state(state)
        if params is None and self.reads_params:
            raise ValueError(
                f"{self.name} reads the parameters: call update(updates, state, params)."
            )
        kept = state["kept"]
        now, shared = self.scalars(
            updates, kept.shared, params, extra, len(tree.flatten(updates)[0])
        )
        leaves = self.leaves(updates, params, kept.slots, now)
        seen, seen_params = leaves.before()
        mine = {name: extra[name] for name in self.inner.extra_args if name in extra}
        inner_updates, inner = self.inner.update(
            seen, state["inner"], seen_params, **mine
        )
        names = ("updates", "the inner updates")
        us = structure.match(updates, leaves.spec, inner_updates, names=names)
        updates, slots = leaves.after(us)
        return updates, {"inner": inner, "kept": StageState(shared, slots)}


def wrap(
    inner: GradientTransformation,
    *,
    slots: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
    shared: Mapping[str, Tensor] | None = None,
    hyper: Mapping[str, ScalarOrSchedule] | None = None,
    prepare: Callable[..., Any] | None = None,
    before: Callable[..., Any] | None = None,
    after: Callable[..., Any] | None = None,
    point: Callable[..., Tensor] | None = None,
    init_with: str | Callable[[Tensor], Tensor] | None = None,
    last: bool = False,
) -> Wrap:
    """A transformation around another one.

    It says what `inner` sees of each tensor, and what becomes of its update.

    As in `leafwise`, the functions say by the names of their arguments what they read: ``g`` and
    ``p``, the update and the parameter that come in; ``u``, the update of `inner`; slots;
    hyperparameters; shared values; what `prepare` returned. They see each tensor in its own dtype.
    A ``count`` counts the steps of the training, and is the same for all tensors.

    Args:
        inner: the transformation inside.
        slots: ``{name: p -> its first value}``.
        shared: ``{name: first value}``; the values are tensors.
        hyper: ``{name: number, 0-dim tensor, or schedule}``.
        prepare: a function that is called once a step, as in `leafwise`.
        before: what `inner` sees of one tensor. It returns ``(g, p)`` where it reads both, the new
            ``g`` where it reads no ``p``, and the new ``p`` where it reads no ``g``.
        after: what becomes of the update. It returns ``u``, or ``(u, {slot: new value})`` if there
            are slots.
        point: the parameter to evaluate with, a function of ``p``, slots and hyperparameters.
        init_with: what `inner` is initialized with, in place of the params: the slot whose first
            values these are, or a function of a parameter.
        last: whether it looks at the new parameters ``p + u``, so that no stage may change the
            updates after it.

    Returns:
        A transformation whose state is ``{"inner": state, "kept": StageState(shared, slots)}``.

    Raises:
        TypeError: `inner` is not a transformation; a function reads a name that nothing provides.

    Example:
        >>> import torch, functorch_opt as fo
        >>> def twice_as_far(inner):
        ...     return fo.wrap(inner, after=lambda u: 2 * u)
        >>> tx = twice_as_far(fo.sgd(0.1))
        >>> tx.update([torch.ones(1)], tx.init([torch.zeros(1)]))[0]
        [tensor([-0.2000])]
    """
    if not isinstance(inner, GradientTransformation):
        raise TypeError(
            f"wrap takes a transformation, e.g. adamw(1e-3); got {type(inner).__name__} {inner!r}."
        )
    check_declared(slots, shared, hyper)
    slots, shared, hyper = slots or {}, shared or {}, hyper or {}
    reads = {
        "before": positional(before) if before else (),
        "after": positional(after) if after else (),
    }
    counts = any("count" in names for names in reads.values())
    once = Once("wrap", prepare, hyper, shared, counts, one_clock=True)
    check_names("wrap", slots=slots, shared=shared, hyper=hyper)
    of_step = {"count", *hyper, *shared}
    check_reads("wrap", "prepare", once.reads, {"updates", "params", *of_step})
    for what, f, also in (
        ("before", before, {"g", "p"}),
        ("after", after, {"u", "g", "p"}),
    ):
        if f is not None:
            check_no_keywords("wrap", what, f)
            if prepare is None:
                check_reads("wrap", what, reads[what], {*also, *slots, *of_step})
    return Wrap(inner, once, slots, before, after, point, init_with, last)
