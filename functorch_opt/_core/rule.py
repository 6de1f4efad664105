"""One rule for one tensor: what is really particular about nearly every optimizer.

`leafwise` makes the pair ``(init, update)`` from two functions: ``prepare``, worked out once a
step, and ``rule``, for one tensor. What the rule needs to know of its whole tensor are ``sums``
over it, worked out just before the rule. What it needs to know of all tensors are ``totals``,
worked out before ``prepare``.
All say by the *names of their arguments* what they read, and nothing else has to be declared:

    g         the incoming update of this tensor
    p         the parameter itself
    <slot>    this tensor's slot, e.g. ``mu``
    <hyper>   a hyperparameter, e.g. ``b1``
    <shared>  a value that all tensors share, e.g. ``key``
    count     how many updates were made before this one (int64)
    updates   the whole tree of incoming updates (``prepare`` only)
    params    the whole tree of parameters (``prepare`` only)
    *, value  an extra argument of ``update`` (``prepare`` only, after ``*``)
    <total>   what the function of that name in ``totals`` gives, added over all tensors
    <now>     what ``prepare`` returned under that name
    <sum>     what the function of that name in ``sums`` returned (``rule`` only)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functorch_opt import tree
from functorch_opt._core import owners, sharding, structure
from functorch_opt._core.decision import known
from functorch_opt._core.leaf import Each
from functorch_opt._core.leafwise import update_in_one_pass
from functorch_opt._core.once import (
    Once,
    check_declared,
    check_names,
    check_no_keywords,
    check_reads,
)
from functorch_opt._core.one_tensor import (
    DUE,
    Every,
    Kind,
    OneTensor,
    leaf_values,
    sums_of_leaves,
)
from functorch_opt._core.state import StageState
from functorch_opt._core.sums import Sums
from functorch_opt._core.transformation import (
    GradientTransformation,
    ScalarOrSchedule,
    enclosing_name,
    positional,
    transformation,
)
from functorch_opt.tree import PyTree

__all__ = ["every", "identity", "leafwise"]


class Block(NamedTuple):
    """The size of a slot: so many entries for so many elements, where it has this dtype."""

    entries: int
    elements: int
    dtype: torch.dtype

    def size(self, n: int) -> int:
        """How many entries there are for `n` elements."""
        return -(-n * self.entries // self.elements)


class Leafwise(GradientTransformation):
    """What `leafwise` makes. Its parts are attributes, from which every execution is derived.

    Attributes:
        once: what is worked out once a step.
        on_tensor: the rule, and what belongs to it, on one tensor.
        slots: ``{name: p -> first value}``.
        totals: functions of one tensor that are added over all of them, for `once` to read.
        due: for a rule with work on some steps only, the decision whether this is such a step.
        point: the parameter to evaluate with, from the current one and the slots.
        with_lr: what makes this stage with a factor of its learning rate, where its steps do not
            depend on the size of the update, so that a factor of the update has no effect.
    """

    with_lr: Callable[[Any], Leafwise] | None = None

    def __init__(
        self,
        rule: Callable[..., Any],
        prepare: Callable[..., Any] | None,
        slots: Mapping[str, Callable[[Tensor], Tensor]],
        shared: Mapping[str, Tensor],
        hyper: Mapping[str, ScalarOrSchedule],
        sums: Mapping[str, Any],
        totals: Mapping[str, Any],
        rare: Every | None,
        point: Callable[..., Tensor] | None,
        kind: Kind,
        last: bool,
    ) -> None:
        self.name = name = enclosing_name(rule)
        check_kind(name, kind, bool(sums))
        self.slots, self.kind, self.point, self.last = slots, kind, point, last
        self.due = rare.due if rare else None
        self.due_reads = positional(rare.due) if rare else ()
        self.on_tensor = OneTensor(name, rule, slots, sums, rare, kind)
        self.totals = Sums(name, totals)
        self.reads = self.on_tensor.reads
        read = {*self.reads, *self.totals.reads, *self.due_reads}
        self.once = Once(name, prepare, hyper, shared, "count" in read)
        self.extra_args = self.once.extra_args
        self.has_sums, self.has_totals = bool(sums), bool(totals)
        self.is_constant = self.once.is_constant and not (rare or totals)
        self.blocks: Mapping[str, Block] = {}
        """Slots of other sizes than the parameter."""
        self.stored: Any = None
        """How slots are stored, as a key."""
        self.looks_around = "updates" in self.once.reads or self.has_totals
        """Whether something of it has to see all updates before the rule sees one."""
        self._check(rule, prepare, slots, shared, hyper, sums, totals, rare)

    def _check(self, rule, prepare, slots, shared, hyper, sums, totals, rare) -> None:
        """Raise TypeError for names that clash, and for names that nothing provides."""
        name = self.name
        check_no_keywords(name, "rule", rule)
        check_names(
            name, slots=slots, shared=shared, hyper=hyper, sums=sums, totals=totals
        )
        of_step = {"count", *hyper, *shared}
        of_leaf = {"g", "p", *slots, *of_step, *totals}
        reads = self.once.reads
        check_reads(name, "prepare", reads, {"updates", "params", *totals, *of_step})
        check_reads(name, "due", self.due_reads, of_step)
        for key, names in self.totals.reads_of.items():
            check_reads(name, f"total {key}", names, {"g", "p", *slots, *of_step})
        if prepare is not None:
            return  # what it returns is known at the first step only
        check_reads(name, "rule", self.on_tensor.rule_reads, of_leaf | {*sums})
        check_reads(name, "work", self.on_tensor.work_reads, of_leaf)
        for key, names in self.on_tensor.sums.reads_of.items():
            check_reads(name, f"sum {key}", names, of_leaf)

    @property
    def exchanges(self) -> bool:
        """Whether the ranks of sharded tensors exchange something before the rule."""
        return self.has_sums

    @property
    def reads_params(self) -> bool:
        """Whether ``update`` needs params."""
        return "p" in (*self.reads, *self.totals.reads) or self.once.needs_params

    def _init(self, params: PyTree) -> StageState:
        leaves, spec = tree.flatten(params)
        for path, p in zip(tree.paths(params), leaves, strict=True):
            if p is None or p.is_floating_point() or p.is_complex():
                continue
            raise TypeError(
                f"the parameter at {path!r} is {p.dtype}: only floating and complex tensors "
                "can be optimized. Leave it out with masked or partition."
            )
        whole = self.kind == "tensorwise" and any(map(owners.has_owners, leaves))
        if whole or any(map(sharding.is_owned, leaves)):
            columns = owners.first_slots(self.slots, leaves, whole)
            slots = {name: tree.unflatten(spec, of) for name, of in columns.items()}
        else:
            slots = {name: tree.map(make, params) for name, make in self.slots.items()}
        for name, slot in slots.items():
            structure.flatten_tensors(slot, f"{self.name}'s slot {name}")
        return StageState(self.once.first(params), slots)

    def _update(
        self, updates: PyTree, state: StageState, params: PyTree | None, **extra: Any
    ) -> tuple[PyTree, StageState]:
        updates, (new,) = update_in_one_pass([self], updates, [state], params, extra)
        return updates, new

    def scalars(
        self,
        updates: PyTree,
        shared: dict[str, Tensor],
        params: PyTree | None,
        extra: Mapping[str, Any],
        gs: list[Any],
        ps: list[Any],
        slots: dict[str, list[Any]],
        instead: Mapping[str, Tensor] | None = None,
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What the rule may read of this step, by name; and the next shared values.

        Hyperparameters that are named in `instead` have the values there.
        """
        if self.is_constant:
            return dict(self.once.numbers), shared
        now = self.once.hypers(shared, len(gs), instead)
        if self.has_totals:
            names = self.totals.reads
            per_leaf = leaf_values(updates, now, names)
            rows = self.on_tensor.values_of_leaves(gs, ps, slots, per_leaf, names)
            now |= self.totals.over_all(sums_of_leaves(self.totals, rows, gs))
        due = {}
        if self.due is not None:
            flag = self.due(*[now[name] for name in self.due_reads])
            due = {DUE: flag if (host := known(flag)) is None else host}
        trees = {"updates": updates, "params": params}
        mine = {name: extra[name] for name in self.extra_args if name in extra}
        now, new = self.once.prepared(now, shared, trees, mine)
        now |= self.drawn(now, params if updates is None else updates, slots)
        provided = {"g", "p", DUE, *self.slots, *now}
        if missing := [name for name in self.reads if name not in provided]:
            raise TypeError(
                f"{self.name}: rule reads {', '.join(missing)}, which prepare did not return."
            )
        return now | due, new

    def drawn(
        self, now: Mapping[str, Any], like: PyTree, slots: dict[str, list[Any]]
    ) -> dict[str, Any]:
        """Random numbers of this step that belong to slots, for a tree of the structure of `like`.

        A rule has none; see `functorch_opt.codecs.coded`.
        """
        return {}

    def sums_before(
        self,
        updates: PyTree,
        spec: Any,
        gs: list[Any],
        ps: list[Any],
        slots: dict[str, list[Any]],
        now: dict[str, Any],
    ) -> dict[str, Each]:
        """The sums over sharded tensors, which the ranks exchange before the rule."""
        names = self.on_tensor.reads
        per_leaf = leaf_values(updates, now, names)
        rows = self.on_tensor.values_of_leaves(gs, ps, slots, per_leaf, names)
        rows = [row and row | self.on_tensor.after_work(row) for row in rows]
        columns = sums_of_leaves(self.on_tensor.sums, rows, gs)
        return {
            name: Each(tree.unflatten(spec, column)) for name, column in columns.items()
        }

    def check_state(self, state: Any) -> None:
        expected = set(self.once.keys)
        fits = isinstance(state, StageState) and state.shared.keys() == expected
        if not fits or state.slots.keys() != self.slots.keys():
            is_stage = isinstance(state, StageState)
            held = [*state.shared, *state.slots] if is_stage else type(state).__name__
            raise ValueError(
                f"this is not a state of {self.name}, which keeps "
                f"{[*sorted(expected), *self.slots]}: it holds {held}. "
                "Use the state that its own init or update returned."
            )


def check_kind(name: str, kind: str, has_sums: bool) -> None:
    """Raise ValueError for a kind that there is not, or that has no sums."""
    if kind not in ("elementwise", "tensorwise"):
        whole = "What looks at the whole tree is a GradientTransformation(init, update)."
        raise ValueError(
            f"kind must be 'elementwise' or 'tensorwise'; got {kind!r}. {whole}"
        )
    if has_sums and kind == "tensorwise":
        raise ValueError(
            f"{name}: sums are for elementwise rules; a tensorwise rule sees the whole tensor "
            "and works them out itself."
        )


def every(due: int | Callable[..., Any], work: Callable[..., Any]) -> Every:
    """Work that a rule does on some steps only: an eigenbasis, a projection, a Hessian.

    Give it to `leafwise` as ``every=``. On the steps that are due, ``work`` makes new values of
    slots, and then the rule sees these. On other steps it is not run, where the host knows the
    decision; in a graph, under vmap and on a GPU it is a choice of values.

    Args:
        due: ``k``: the first step, and each k-th after it. Or a function that says so, a 0-dim bool
            tensor, of what it names: ``count``, hyperparameters, shared values.
        work: for one tensor. It reads what a rule may, and returns ``{slot: new value}``.

    Raises:
        ValueError: `due` is a number below 1.

    Example:
        >>> import torch, functorch_opt as fo
        >>> def work(g):
        ...     return {"scale": g.abs().amax()}
        >>> def rule(g, scale):
        ...     return g / scale, {"scale": scale}
        >>> tx = fo.leafwise(
        ...     rule, slots={"scale": lambda p: p.new_ones(())}, every=fo.every(2, work)
        ... )
        >>> state = tx.init([torch.zeros(1)])
        >>> for g in (2.0, 8.0, 4.0):
        ...     updates, state = tx.update([torch.tensor([g])], state)
        ...     print(updates)
        [tensor([1.])]
        [tensor([4.])]
        [tensor([1.])]
    """
    if callable(due):
        return Every(due, work)
    if isinstance(due, bool) or not isinstance(due, int) or due < 1:
        raise ValueError(
            f"due must be a whole number from 1 on, or a function; got {due!r}."
        )
    k = due
    return Every(lambda count: count % k == 0, work)


def leafwise(
    rule: Callable[..., Any],
    prepare: Callable[..., Any] | None = None,
    *,
    slots: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
    shared: Mapping[str, Tensor] | None = None,
    hyper: Mapping[str, ScalarOrSchedule] | None = None,
    sums: Mapping[str, Any] | None = None,
    totals: Mapping[str, Any] | None = None,
    every: Every | None = None,
    point: Callable[..., Tensor] | None = None,
    kind: Kind = "elementwise",
    last: bool = False,
) -> Leafwise:
    """A transformation from one rule for one tensor, and what is worked out once a step.

    The names of their arguments say what the functions read (see the table in
    "Write a transformation"). A rule returns its update, or ``(update, {slot: new value})`` if
    there are slots. ``prepare`` returns ``{name: value}`` for the rule, or ``({...}, {shared: new})``.

    Args:
        rule: for one tensor. It computes in the dtype of its tensors, but at least float32, and
            sees no ``None``. Write it out of place, from ordinary operations, so that it can be
            vmapped, differentiated and compiled.
        prepare: once a step. Its values are numbers, 0-dim tensors, 1-dim tensors with one entry
            per leaf, or `Each` of a tree. It must be elementwise in ``count`` and hyperparameters,
            which may have one entry per leaf: the stateful optimizers count per parameter.
        slots: ``{name: p -> its first value}``, usually `zeros_like`.
        shared: ``{name: first value}``, tensors.
        hyper: ``{name: number, 0-dim tensor, or schedule}``. A schedule is a function of the number
            of steps made.
        sums: ``{name: function}``, what an elementwise rule needs to know of the whole tensor: sums
            over its elements, 0-dim tensors, or how many there are. Of a sharded tensor each rank
            sums over its part, and the sums are added up. For a maximum, see `largest`.
        totals: ``{name: function}``, the same over all tensors together. They are known to
            ``prepare``, and so read no value of it, but slots, hyperparameters and shared values.
        every: work that is done on some steps only; see `every`.
        point: the parameter to evaluate with, a function of ``p``, slots and hyperparameters, for
            stages that keep an average; see `eval_params`.
        kind: "elementwise": any part of a tensor could be computed by itself. "tensorwise": the
            rule needs the whole tensor.
        last: whether the rule looks at the new parameters ``p + g``, so that no stage may change
            the updates after it.

    Raises:
        TypeError: an argument name that nothing provides; a hyperparameter that is no number,
            tensor or function.

    Example:
        >>> import torch, functorch_opt as fo
        >>> def heavy_ball(decay):
        ...     def rule(g, velocity, decay):
        ...         velocity = g + decay * velocity
        ...         return velocity, {"velocity": velocity}
        ...     slots = {"velocity": torch.zeros_like}
        ...     return fo.leafwise(rule, slots=slots, hyper={"decay": decay})
        >>> tx = heavy_ball(0.9)
        >>> state = tx.init([torch.zeros(2)])
        >>> updates, state = tx.update([torch.ones(2)], state)
        >>> tx.update([torch.ones(2)], state)[0]
        [tensor([1.9000, 1.9000])]
    """
    check_declared(slots, shared, hyper)
    declared = (slots or {}, shared or {}, hyper or {}, sums or {}, totals or {})
    return Leafwise(rule, prepare, *declared, every, point, kind, last)


@transformation
def identity() -> Leafwise:
    """Updates pass through.

    Example:
        >>> import functorch_opt as fo
        >>> fo.identity()
        identity()
    """
    return leafwise(lambda g: g)


def at_point(
    tx: Leafwise, p: Tensor, slots: Mapping[str, Any], now: Mapping[str, Any]
) -> Tensor:
    """The parameter that a stage wants to be evaluated with, in the place of `p`."""
    assert tx.point is not None
    values = {**now, **slots, "p": p}
    return torch.as_tensor(tx.point(*[values[name] for name in positional(tx.point)]))
