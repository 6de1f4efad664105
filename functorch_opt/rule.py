"""One rule for one tensor: what is really particular about nearly every optimizer.

`leafwise` makes the pair ``(init, update)`` from two functions: ``prepare``, worked out once a step, and ``rule``, for one tensor. Both say by the *names of their arguments* what they read, and nothing else has to be declared:

    g        the incoming update of this tensor           count    how many updates were made before this one (int64)
    p        the parameter itself                         updates  the whole tree of incoming updates
    <slot>   this tensor's slot, e.g. ``mu``              params   the whole tree of parameters
    <hyper>  a hyperparameter, e.g. ``b1``                <shared> a value all tensors share, e.g. ``key``
    <now>    what ``prepare`` returned under that name    *, value an extra argument of ``update`` (``prepare`` only, after ``*``)
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
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
        self.name = enclosing_name(rule)
        self.rule_reads = positional(rule)
        self.prepare_reads = positional(prepare) if prepare else ()
        self.extra_args = keyword_only(prepare) if prepare else {}
        self.counts = "count" in (*self.rule_reads, *self.prepare_reads) or any(callable(h) for h in hyper.values())
        known = ["count", *slots, *hyper, *shared]
        if len(known) != len(set(known)) or {"g", "p", "updates", "params"} & set(known):
            raise TypeError(f"{self.name}: slots, shared and hyper must have different names, none of them g, p, count, updates or params; got {known[1:]}.")
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

    def _init(self, params: PyTree) -> StageState:  # type: ignore[override]
        for path, p in zip(tree.paths(params), tree.flatten(params)[0], strict=True):
            if p is not None and not (p.is_floating_point() or p.is_complex()):
                raise TypeError(f"the parameter at {path!r} is {p.dtype}: only floating and complex tensors can be optimized. Leave it out with masked or partition.")
        device = tree.leaves(params)[0].device
        shared = {name: value.to(device, copy=True) for name, value in self.shared.items()}
        if self.counts:
            shared["count"] = torch.zeros((), dtype=torch.int64, device=device)
        return StageState(shared, {name: tree.map(make, params) for name, make in self.slots.items()})

    def _update(self, updates: PyTree, state: StageState, params: PyTree | None, **extra: Any) -> tuple[PyTree, StageState]:  # type: ignore[override]
        self._check_state(state)
        if params is None and self.reads_params:
            raise ValueError(f"{self.name} reads the parameters: call update(updates, state, params).")
        gs, spec = tree.flatten(updates)
        ps = [None] * len(gs) if params is None else tree.match(updates, spec, params, names=("updates", "params"))
        old = {name: tree.match(updates, spec, slot, names=("updates", f"the state's {name}")) for name, slot in state.slots.items()}
        now, shared = self.scalars(updates, state.shared, params, extra)
        if any(g is None for g in gs):
            shared = self._keep_counts(shared, state.shared, gs)
        per_leaf = _PerLeaf(updates, spec, len(gs), {name: now[name] for name in self.rule_reads if name in now})
        new: dict[str, list[Any]] = {name: [] for name in old}
        us: list[Any] = []
        for i, (g, p) in enumerate(zip(gs, ps, strict=True)):
            slots = {name: column[i] for name, column in old.items()}
            u = None
            if g is not None:
                dtype = working_dtype(g, p if "p" in self.rule_reads else None, *slots.values())
                try:
                    u, slots = self.apply(g, p, slots, per_leaf.at(i, dtype), dtype)
                except _Misfit as misfit:
                    raise misfit.explain(self.name, tree.paths(updates)[i]) from None
            us.append(u)
            for name, value in slots.items():
                new[name].append(value)
        return tree.unflatten(spec, us), StageState(shared, {name: tree.unflatten(spec, column) for name, column in new.items()})

    def scalars(self, updates: PyTree, shared: dict[str, Tensor], params: PyTree | None, extra: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Everything a rule may read beside ``g``, ``p`` and slots, by name; and the next shared values. Once a step."""
        now: dict[str, Any] = dict(shared)
        for name, value in self.hyper.items():
            now[name] = value(shared["count"]) if callable(value) else value
        shared = dict(shared)
        if self.prepare is not None:
            known = {**now, "updates": updates, "params": params}
            result = self.prepare(*(known[name] for name in self.prepare_reads), **extra)
            result, changed = result if self.shared and isinstance(result, tuple) else (result, {})
            now.update(result)
            shared.update(changed)
        if self.counts:
            shared["count"] = shared["count"] + 1
        return now, shared

    def apply(self, g: Tensor, p: Tensor | None, slots: dict[str, Tensor], now: dict[str, Any], dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor]]:
        """The rule on one tensor, computed in `dtype`; slots come back in the dtype they were stored in.

        An elementwise rule takes a complex tensor for the pairs of reals that it is, as torch.optim does.
        """
        if g.layout is not torch.strided or not (g.is_floating_point() or g.is_complex()):
            raise _Misfit(f"is a {g.layout} tensor of {g.dtype}", "Gradients must be dense and floating or complex (for nn.Embedding: sparse=False).")
        if p is not None and p.shape != g.shape:
            raise _Misfit(f"has shape {tuple(g.shape)} and its parameter {tuple(p.shape)}", "They must be equal: nothing is broadcast.")
        pairs = dtype.is_complex and self.kind == "elementwise"

        def enter(x: Tensor) -> Tensor:
            x = x if x.dtype == dtype else x.to(dtype)
            return torch.view_as_real(x) if pairs else x

        def leave(x: Tensor, like: Tensor) -> Tensor:
            x = torch.view_as_complex(x.contiguous()) if pairs else x
            if x.shape != like.shape:
                raise _Misfit(f"has shape {tuple(g.shape)}, but gave a result of shape {tuple(x.shape)} for a value of shape {tuple(like.shape)}", "Is the state that of other params?")
            return x

        values = {name: enter(value) if isinstance(value, Tensor) and value.is_complex() else value for name, value in now.items()}
        values |= {"g": enter(g), "p": p if p is None or "p" not in self.rule_reads else enter(p)}
        for name, slot in slots.items():
            values[name] = enter(slot) if slot.is_floating_point() or slot.is_complex() else slot
        try:
            result = self.rule(*(values[name] for name in self.rule_reads))
        except KeyError as error:
            raise TypeError(f"{self.name}: rule reads {error.args[0]}, which prepare did not return.") from None
        if not slots:
            return leave(result, g), slots
        u, new = result
        if new.keys() != slots.keys():
            raise TypeError(f"{self.name}: rule returned the slots {sorted(new)}; it declares {sorted(slots)}.")
        return leave(u, g), {name: leave(new[name], old).to(old.dtype) for name, old in slots.items()}

    def _keep_counts(self, shared: dict[str, Tensor], old: dict[str, Tensor], gs: list[Any]) -> dict[str, Tensor]:
        """Where the count has one entry per leaf (as in the stateful adapter), a leaf without gradient keeps its own."""
        if not self.counts or shared["count"].dim() == 0:
            return shared
        present = torch.tensor([g is not None for g in gs], device=shared["count"].device)
        return {**shared, "count": torch.where(present, shared["count"], old["count"])}

    def _check_state(self, state: Any) -> None:
        expected = {*self.shared, *(["count"] if self.counts else [])}
        if not isinstance(state, StageState) or state.shared.keys() != expected or state.slots.keys() != self.slots.keys():
            held = [*state.shared, *state.slots] if isinstance(state, StageState) else type(state).__name__
            raise ValueError(f"this is not a state of {self.name}, which keeps {[*sorted(expected), *self.slots]}: it holds {held}. Use the state that its own init or update returned.")


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
            raise TypeError(f"{name} must be a number, a 0-dim tensor or a schedule (a function of the count); got {type(value).__name__} {value!r}.")
        if isinstance(value, Tensor) and value.dim() > 1:
            raise TypeError(f"{name} must be a 0-dim tensor; got shape {tuple(value.shape)}. To train with many values at once, vmap over it.")
    return Leafwise(rule, prepare, slots or {}, shared or {}, hyper or {}, kind)


class _Misfit(Exception):
    """A tensor that a rule cannot take; the caller knows where it is."""

    def explain(self, name: str, path: str) -> ValueError:
        what, cure = self.args
        return ValueError(f"{name}: the update at {path!r} {what}. {cure}")


class _PerLeaf:
    """The scalars of a step, cast to the dtype a tensor is computed in: a lookup, done once per dtype."""

    def __init__(self, reference: PyTree, spec: Any, n: int, now: dict[str, Any]) -> None:
        self.rows: dict[str, list[Any]] = {}
        self.fixed: dict[str, Any] = {}
        for name, value in now.items():
            if isinstance(value, Each):
                self.rows[name] = tree.match(reference, spec, value.tree, names=("updates", name))
            elif isinstance(value, Tensor) and value.dim() == 1:
                if value.shape[0] != n:
                    raise ValueError(
                        f"{name} has {value.shape[0]} entries for {n} leaves. A hyperparameter is a number or a 0-dim tensor; to train with many values at once, vmap over it."
                    )
                self.rows[name] = list(value.unbind())
            else:
                self.fixed[name] = value
        self.cast: dict[torch.dtype, dict[str, Any]] = {}

    def at(self, i: int, dtype: torch.dtype) -> dict[str, Any]:
        real = dtype.to_real()
        if dtype not in self.cast:
            self.cast[dtype] = {name: _to(value, real) for name, value in self.fixed.items()}
        return {**self.cast[dtype], **{name: _to(row[i], real) for name, row in self.rows.items()}}


def _to(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def working_dtype(*values: Tensor | None) -> torch.dtype:
    """What a rule computes in: the widest of its floating and complex tensors, at least float32."""
    dtypes = {tree.at_least_float32(x.dtype) for x in values if x is not None and (x.is_floating_point() or x.is_complex())}
    return functools.reduce(torch.promote_types, dtypes) if dtypes else torch.float32
