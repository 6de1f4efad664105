"""One rule for one tensor: what is really particular about nearly every optimizer.

`leafwise` makes the pair ``(init, update)`` from two functions: ``prepare``, worked out once a step, and ``rule``, for one tensor.
Both say by the *names of their arguments* what they read, and nothing else has to be declared:

    g        the incoming update of this tensor           count    how many updates were made before this one (int64)
    p        the parameter itself                         updates  the whole tree of incoming updates
    <slot>   this tensor's slot, e.g. ``mu``              params   the whole tree of parameters
    <hyper>  a hyperparameter, e.g. ``b1``                <shared> a value all tensors share, e.g. ``key``
    <now>    what ``prepare`` returned under that name    *, value an extra argument of ``update`` (``prepare`` only, after ``*``)
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from functorch_opt import tree
from functorch_opt.base import GradientTransformation, ScalarOrSchedule, enclosing_name, keyword_only, positional
from functorch_opt.tree import PyTree, StageState

__all__ = ["Each", "leafwise"]


class Each(NamedTuple):
    """Wraps what ``prepare`` hands to every tensor separately: a tree of the structure of the params (a slice of noise, a mask)."""

    tree: PyTree


Kind = Literal["elementwise", "tensorwise"]


class Leafwise(GradientTransformation):
    """What `leafwise` makes. Its parts are attributes, so that other executions (in place, compiled, sharded) can be derived from them."""

    def __init__(
        self,
        rule: Callable[..., Any],
        prepare: Callable[..., Any] | None,
        slots: Mapping[str, Callable[[Tensor], Tensor]],
        shared: Mapping[str, Tensor],
        hyper: Mapping[str, ScalarOrSchedule],
        kind: Kind,
    ) -> None:
        self.rule, self.prepare, self.slots, self.shared, self.hyper, self.kind = rule, prepare, slots, shared, hyper, kind
        if kind not in ("elementwise", "tensorwise"):
            whole = "What looks at the whole tree is a GradientTransformation(init, update)."
            raise ValueError(f"kind must be 'elementwise' or 'tensorwise'; got {kind!r}. {whole}")
        self.name = enclosing_name(rule)
        self.rule_reads = positional(rule)
        self.prepare_reads = positional(prepare) if prepare else ()
        self.extra_args = keyword_only(prepare) if prepare else {}
        if keyword_only(rule):
            names = ", ".join(keyword_only(rule))
            raise TypeError(
                f"{self.name}: rule takes {names} after '*'. Let prepare take it there, and return it for rule to read by name."
            )
        self.counts = "count" in (*self.rule_reads, *self.prepare_reads) or any(callable(h) for h in hyper.values())
        known = ["count", *slots, *hyper, *shared]
        if len(known) != len(set(known)) or {"g", "p", "updates", "params"} & set(known):
            raise TypeError(
                f"{self.name}: slots, shared and hyper must have different names, "
                f"none of them g, p, count, updates or params; got {known[1:]}."
            )
        for reader, reads, allowed in (
            ("prepare", self.prepare_reads, {"updates", "params", "count", *hyper, *shared}),
            ("rule", () if prepare else self.rule_reads, {"g", "p", *known}),
        ):
            unknown = [name for name in reads if name not in allowed]
            if unknown:
                raise TypeError(f"{self.name}: {reader} reads {', '.join(unknown)}, which is not among {', '.join(sorted(allowed))}.")

    @property
    def reads_params(self) -> bool:
        """Whether ``update`` needs params: the rule reads ``p``, or ``prepare`` reads ``params`` without a default."""
        required = self.prepare_reads[: len(self.prepare_reads) - len(getattr(self.prepare, "__defaults__", None) or ())]
        return "p" in self.rule_reads or "params" in required

    def _init(self, params: PyTree) -> StageState:
        for path, p in zip(tree.paths(params), tree.flatten(params)[0], strict=True):
            if p is not None and not (p.is_floating_point() or p.is_complex()):
                raise TypeError(
                    f"the parameter at {path!r} is {p.dtype}: only floating and complex tensors can be optimized. "
                    "Leave it out with masked or partition."
                )
        device = tree.leaves(params)[0].device
        shared = {name: value.to(device, copy=True) for name, value in self.shared.items()}
        if self.counts:
            shared["count"] = tree.zero_count(params)
        slots = {name: tree.map(make, params) for name, make in self.slots.items()}
        for name, slot in slots.items():
            tree.flatten_tensors(slot, f"{self.name}'s slot {name}")
        return StageState(shared, slots)

    def _update(self, updates: PyTree, state: StageState, params: PyTree | None, **extra: Any) -> tuple[PyTree, StageState]:
        self.check_state(state)
        if params is None and self.reads_params:
            raise ValueError(f"{self.name} reads the parameters: call update(updates, state, params).")
        gs, spec = tree.flatten_tensors(updates, "updates")
        ps = [None] * len(gs) if params is None else tree.match(updates, spec, params, names=("updates", "params"))
        old = {name: tree.match(updates, spec, slot, names=("updates", f"the state's {name}")) for name, slot in state.slots.items()}
        for i, (g, p) in enumerate(zip(gs, ps, strict=True)):
            wrong = g is not None and wrong_update(g, g if params is None else p, [column[i] for column in old.values()])
            if wrong:
                raise ValueError(f"{self.name}: the update at {tree.paths(updates)[i]!r} {wrong}")
        now, shared = self.scalars(updates, state.shared, params, extra)
        missing = [name for name in self.rule_reads if name not in ("g", "p", *old, *now)]
        if missing:
            raise TypeError(f"{self.name}: rule reads {', '.join(missing)}, which prepare did not return.")
        per_leaf = _PerLeaf(updates, spec, {name: now[name] for name in self.rule_reads if name in now})
        new: dict[str, list[Any]] = {name: [] for name in old}
        us: list[Any] = []
        for i, (g, p) in enumerate(zip(gs, ps, strict=True)):
            slots = {name: column[i] for name, column in old.items()}
            u = None
            if g is not None:
                dtype = working_dtype(g, p if "p" in self.rule_reads else None, *slots.values())
                try:
                    u, slots = self.apply(g, p, slots, per_leaf.at(i, dtype), dtype)
                except Misfit as misfit:
                    raise ValueError(f"{self.name}: the update at {tree.paths(updates)[i]!r} {misfit}") from misfit.__cause__
            us.append(u)
            for name, value in slots.items():
                new[name].append(value)
        slots = {name: tree.like(state.slots[name], tree.unflatten(spec, column)) for name, column in new.items()}
        return tree.unflatten(spec, us), StageState(shared, slots)

    def scalars(
        self, updates: PyTree, shared: dict[str, Tensor], params: PyTree | None, extra: dict[str, Any]
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Everything a rule may read beside ``g``, ``p`` and slots, by name; and the next shared values. Once a step."""
        now: dict[str, Any] = dict(shared)
        if self.counts:
            now["count"] = _of_this_part(shared["count"])
        for name, value in self.hyper.items():
            now[name] = value(now["count"]) if callable(value) else _of_this_part(value)
            if not isinstance(now[name], (int, float, Tensor)) or (isinstance(now[name], Tensor) and now[name].dim() > 1):
                shape = f"a tensor of shape {tuple(now[name].shape)}" if isinstance(now[name], Tensor) else None
                given = shape or f"{type(now[name]).__name__} {now[name]!r}"
                raise TypeError(f"{self.name}: the schedule {name} returned {given}; it must return a number or a 0-dim tensor.")
            _check_entries(name, now[name], updates)
        shared = dict(shared)
        if self.prepare is not None:
            known = {**now, "updates": updates, "params": params}
            result = self.prepare(*(known[name] for name in self.prepare_reads), **extra)
            result, changed = result if isinstance(result, tuple) and len(result) == 2 else (result, {})
            if not isinstance(result, dict) or not isinstance(changed, dict) or changed.keys() - self.shared.keys():
                given = _outline(result) if changed == {} else _outline((result, changed))
                raise TypeError(
                    f"{self.name}: prepare must return {{name: value}} for the rule, or ({{name: value}}, {{shared: new value}}) "
                    f"with shared values among {sorted(self.shared)}; it returned {given}."
                )
            now.update(result)
            shared.update(changed)
        if self.counts:
            shared["count"] = shared["count"] + 1
        return now, shared

    def apply(
        self, g: Tensor, p: Tensor | None, slots: dict[str, Tensor], now: dict[str, Any], dtype: torch.dtype
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The rule on one tensor, computed in `dtype`; slots come back in the dtype they were stored in.

        An elementwise rule takes a complex tensor for the pairs of reals that it is, as torch.optim does.
        """
        pairs = dtype.is_complex and self.kind == "elementwise"
        values = {**now, **slots, "g": g, "p": p}
        args = [values[name] for name in self.rule_reads]
        if pairs or any(isinstance(x, Tensor) and x.dtype != dtype for x in args):
            args = [_enter(x, dtype, pairs) for x in args]
        try:
            result = self.rule(*args)
        except RuntimeError as error:
            others = [name for name, slot in slots.items() if slot.shape != g.shape or slot.is_complex() != dtype.is_complex]
            if others:
                held = ", ".join(f"{name}, {slots[name].dtype} of shape {tuple(slots[name].shape)}" for name in others)
                raise Misfit(
                    f"is {g.dtype} of shape {tuple(g.shape)}, and the state has {held}. Is the state that of other params?"
                ) from error
            raise
        if not slots:
            return self._leave(result, g, "the update", g, pairs), slots
        if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], dict) and result[1].keys() == slots.keys()):
            wanted = f"(update, {{slot: new value}}) with the slots {sorted(slots)}"
            raise TypeError(f"{self.name}: rule must return {wanted}; it returned {_outline(result)}.")
        u, new = result
        new = {name: self._leave(new[name], old, f"slot {name}", g, pairs).to(old.dtype) for name, old in slots.items()}
        return self._leave(u, g, "the update", g, pairs), new

    def _leave(self, x: Any, like: Tensor, name: str, g: Tensor, pairs: bool) -> Tensor:
        """What the rule returned for `like`, checked: a rule that broadcasts has met a state of other params, or is wrong."""
        if not isinstance(x, Tensor):
            raise TypeError(f"{self.name}: rule returned {type(x).__name__} {x!r} as {name}; it must be a tensor.")
        if pairs and like.is_complex():
            x = torch.view_as_complex(x.contiguous())
        if x.shape != like.shape or (x.is_complex() and not like.is_complex()):
            raise Misfit(
                f"is {g.dtype} of shape {tuple(g.shape)}, and the rule made of {name}, {like.dtype} of shape {tuple(like.shape)}, "
                f"{x.dtype} of shape {tuple(x.shape)}. Is the state that of other params?"
            )
        return x

    def check_state(self, state: Any) -> None:
        expected = {*self.shared, *(["count"] if self.counts else [])}
        if not isinstance(state, StageState) or state.shared.keys() != expected or state.slots.keys() != self.slots.keys():
            held = [*state.shared, *state.slots] if isinstance(state, StageState) else type(state).__name__
            raise ValueError(
                f"this is not a state of {self.name}, which keeps {[*sorted(expected), *self.slots]}: it holds {held}. "
                "Use the state that its own init or update returned."
            )


def leafwise(
    rule: Callable[..., Any],
    prepare: Callable[..., Any] | None = None,
    *,
    slots: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
    shared: Mapping[str, Tensor] | None = None,
    hyper: Mapping[str, ScalarOrSchedule] | None = None,
    kind: Kind = "elementwise",
) -> Leafwise:
    """A transformation from one rule for one tensor, and what is worked out once a step.

    The names of their arguments say what `rule` and `prepare` read (see the top of `functorch_opt.rule`). A rule returns its update, or
    ``(update, {slot: new value})`` if there are slots. ``prepare`` returns ``{name: value}`` for the rule, or ``({...}, {shared: new})``.

    Args:
        rule: for one tensor. It computes in the dtype of its tensors, but at least float32, and sees no ``None``, so it needs no code for
            either. Out of place, from ordinary operations, so that it can be vmapped, differentiated and compiled.
        prepare: once a step. Its values are numbers, 0-dim tensors, 1-dim tensors with one entry per leaf, or `Each` of a tree.
            It must be elementwise in ``count``, shared values and hyperparameters, which may have one entry per leaf too: the stateful
            adapter counts per parameter.
        slots: ``{name: p -> its first value}``, usually `zeros_like`.
        shared: ``{name: first value}``, tensors.
        hyper: ``{name: number, 0-dim tensor, or schedule of the count}``.
        kind: "elementwise": any part of a tensor could be computed by itself. "tensorwise": the rule needs the whole tensor.

    Raises:
        TypeError: an argument name that nothing provides; a hyperparameter that is no number, tensor or function.

    Example:
        >>> import torch, functorch_opt as fo
        >>> def heavy_ball(decay):
        ...     def rule(g, velocity, decay):
        ...         velocity = g + decay * velocity
        ...         return velocity, {"velocity": velocity}
        ...     return fo.leafwise(rule, slots={"velocity": torch.zeros_like}, hyper={"decay": decay})
        >>> tx = heavy_ball(0.9)
        >>> state = tx.init([torch.zeros(2)])
        >>> updates, state = tx.update([torch.ones(2)], state)
        >>> tx.update([torch.ones(2)], state)[0]
        [tensor([1.9000, 1.9000])]
    """
    for name, value in (hyper or {}).items():
        if isinstance(value, bool) or not (isinstance(value, (int, float, Tensor)) or callable(value)):
            raise TypeError(
                f"{name} must be a number, a 0-dim tensor or a schedule (a function of the count); got {type(value).__name__} {value!r}."
            )
        if isinstance(value, Tensor) and value.dim() > 1:
            raise TypeError(
                f"{name} must be a 0-dim tensor; got shape {tuple(value.shape)}. To train with many values at once, vmap over it."
            )
    for name, make in (slots or {}).items():
        if not callable(make):
            raise TypeError(f"slot {name} must be a function of its parameter, e.g. torch.zeros_like; got {_outline(make)}.")
    for name, first in (shared or {}).items():
        if not isinstance(first, Tensor):
            raise TypeError(f"shared {name} must be a tensor; got {type(first).__name__} {first!r}.")
    return Leafwise(rule, prepare, slots or {}, shared or {}, hyper or {}, kind)


# ---- one entry per leaf --------------------------------------------------------------------------------------------------


class _Parts(threading.local):
    """The parts of the tree that this thread is inside of, the innermost last."""

    def __init__(self) -> None:
        self.stack: list[list[int]] = []


_PARTS = _Parts()


@contextmanager
def part_of_tree(indices: list[int]) -> Iterator[None]:
    """Inside, a transformation sees only these leaves: of a 1-dim count or hyperparameter, one entry per leaf, it takes these entries."""
    _PARTS.stack.append([_PARTS.stack[-1][i] for i in indices] if _PARTS.stack else indices)
    try:
        yield
    finally:
        _PARTS.stack.pop()


def _of_this_part(value: Any) -> Any:
    return value[_PARTS.stack[-1]] if _PARTS.stack and isinstance(value, Tensor) and value.dim() == 1 else value


def _check_entries(name: str, value: Any, updates: PyTree) -> None:
    if isinstance(value, Tensor) and value.dim() == 1 and value.shape[0] != (n := len(tree.flatten(updates)[0])):
        raise ValueError(
            f"{name} has {value.shape[0]} entries for {n} leaves. A hyperparameter is a number or a 0-dim tensor; "
            "to train with many values at once, vmap over it."
        )


class Misfit(Exception):
    """What is wrong with a tensor, said by somebody who does not know where it is."""


def wrong_update(g: Tensor, p: Tensor | None, slots: Sequence[Tensor | None] = ()) -> str | None:
    """What is wrong with an update, and its cure; None if nothing is."""
    if g.layout is not torch.strided or not (g.is_floating_point() or g.is_complex()):
        return f"is a {g.layout} tensor of {g.dtype}. Gradients must be dense and floating or complex (for nn.Embedding: sparse=False)."
    if p is None or any(slot is None for slot in slots):
        holder = "params" if p is None else "the state"
        return f"is a tensor, but {holder} has None there. Give None for the update too, or init with this parameter."
    if p.shape != g.shape:
        return f"has shape {tuple(g.shape)} and its parameter {tuple(p.shape)}. They must be equal: nothing is broadcast."
    if g.is_complex() and not p.is_complex():
        return f"is {g.dtype} and its parameter {p.dtype}. Give its real part."
    return None


def _outline(value: Any) -> str:
    """A returned value in a few words: types, and the names in a dict."""
    if isinstance(value, dict):
        return f"a dict of {[*value]}"
    return f"({', '.join(map(_outline, value))})" if type(value) is tuple else type(value).__name__


class _PerLeaf:
    """The scalars of a step, cast to the dtype a tensor is computed in: a lookup, done once per dtype."""

    def __init__(self, reference: PyTree, spec: Any, now: dict[str, Any]) -> None:
        self.fixed: dict[str, Any] = {}
        self.rows: dict[str, Any] = {}
        for name, value in now.items():
            if isinstance(value, Each):
                self.rows[name] = tree.match(reference, spec, value.tree, names=("updates", name))
            elif not isinstance(value, (int, float, Tensor)) or (isinstance(value, Tensor) and value.dim() > 1):
                given = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else _outline(value)
                wanted = "a number, a 0-dim tensor, a 1-dim tensor with one entry per leaf, or Each(a tree of tensors)"
                raise TypeError(f"{name} is {given}; what a rule may read is {wanted}.")
            elif isinstance(value, Tensor) and value.dim() == 1:
                _check_entries(name, value, reference)
                self.rows[name] = value
            else:
                self.fixed[name] = value
        self.cast: dict[torch.dtype, tuple[dict[str, Any], dict[str, list[Any]]]] = {}

    def at(self, i: int, dtype: torch.dtype) -> dict[str, Any]:
        if dtype not in self.cast:
            real = _REAL.get(dtype, dtype)
            rows = {
                name: [_to(x, real) for x in row] if isinstance(row, list) else list(_to(row, real).unbind())
                for name, row in self.rows.items()
            }
            self.cast[dtype] = {name: _to(value, real) for name, value in self.fixed.items()}, rows
        fixed, rows = self.cast[dtype]
        return {**fixed, **{name: row[i] for name, row in rows.items()}}


def _enter(x: Any, dtype: torch.dtype, pairs: bool) -> Any:
    """A value as a rule computes with it: numbers in `dtype`, or the real part of it; complex ones as pairs. Bools and integers stay."""
    if not isinstance(x, Tensor) or not (x.is_floating_point() or x.is_complex()):
        return x
    x = x.to(dtype if x.is_complex() or not pairs else _REAL[dtype])
    return torch.view_as_real(x) if pairs and x.is_complex() else x


_REAL = {torch.complex64: torch.float32, torch.complex128: torch.float64}


def _to(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def working_dtype(*values: Tensor | None) -> torch.dtype:
    """What a rule computes in: the widest of its floating and complex tensors, at least float32."""
    found: torch.dtype | None = None
    for x in values:
        if x is not None and x.dtype != found and (x.is_floating_point() or x.is_complex()):
            dtype = tree.at_least_float32(x.dtype)
            found = dtype if found is None else torch.promote_types(found, dtype)
    return found or torch.float32
