"""One rule for one tensor: what is really particular about nearly every optimizer.

`leafwise` makes the pair ``(init, update)`` from two functions: ``prepare``, worked out once a step, and ``rule``, for one tensor.
What the rule needs to know of the whole tensor are ``sums`` over it, worked out just before the rule.
All say by the *names of their arguments* what they read, and nothing else has to be declared:

    g        the incoming update of this tensor           count    how many updates were made before this one (int64)
    p        the parameter itself                         updates  the whole tree of incoming updates
    <slot>   this tensor's slot, e.g. ``mu``              params   the whole tree of parameters
    <hyper>  a hyperparameter, e.g. ``b1``                <shared> a value all tensors share, e.g. ``key``
    <now>    what ``prepare`` returned under that name    *, value an extra argument of ``update`` (``prepare`` only, after ``*``)
    <sum>    what the function of that name in ``sums`` returned (``rule`` only)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from functorch_opt import tree
from functorch_opt._core.leaf import (
    Each,
    Misfit,
    PerLeaf,
    check_entries,
    enter,
    of_this_part,
    outline,
    working_dtype,
)
from functorch_opt._core.leafwise import update_in_one_pass
from functorch_opt._core.transformation import (
    GradientTransformation,
    ScalarOrSchedule,
    enclosing_name,
    keyword_only,
    positional,
)
from functorch_opt.tree import PyTree, StageState

__all__ = ["leafwise"]


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
        sums: Mapping[str, Callable[..., Any]],
        kind: Kind,
    ) -> None:
        self.rule, self.prepare, self.slots, self.shared, self.hyper, self.kind = (
            rule,
            prepare,
            slots,
            shared,
            hyper,
            kind,
        )
        self.sums = sums
        if kind not in ("elementwise", "tensorwise"):
            whole = "What looks at the whole tree is a GradientTransformation(init, update)."
            raise ValueError(f"kind must be 'elementwise' or 'tensorwise'; got {kind!r}. {whole}")
        self.name = enclosing_name(rule)
        if sums and kind == "tensorwise":
            raise ValueError(
                f"{self.name}: sums are for elementwise rules; a tensorwise rule sees the whole tensor and works them out itself."
            )
        self.rule_reads = positional(rule)
        self.sum_reads = {name: positional(of) for name, of in sums.items()}
        self.reads = tuple(
            dict.fromkeys(
                [
                    n
                    for reads in (self.rule_reads, *self.sum_reads.values())
                    for n in reads
                    if n not in sums
                ]
            )
        )
        self.prepare_reads = positional(prepare) if prepare else ()
        self.extra_args = keyword_only(prepare) if prepare else {}
        if keyword_only(rule):
            names = ", ".join(keyword_only(rule))
            raise TypeError(
                f"{self.name}: rule takes {names} after '*'. Let prepare take it there, and return it for rule to read by name."
            )
        self.counts = "count" in (*self.rule_reads, *self.prepare_reads) or any(
            callable(h) for h in hyper.values()
        )
        known = ["count", *slots, *hyper, *shared, *sums]
        if len(known) != len(set(known)) or {"g", "p", "updates", "params"} & set(known):
            raise TypeError(
                f"{self.name}: slots, shared, hyper and sums must have different names, "
                f"none of them g, p, count, updates or params; got {known[1:]}."
            )
        of_leaf = {"g", "p", *known}
        for reader, reads, allowed in (
            ("prepare", self.prepare_reads, {"updates", "params", "count", *hyper, *shared}),
            ("rule", () if prepare else self.rule_reads, of_leaf),
            *(
                (f"sum {name}", () if prepare else reads, of_leaf - sums.keys())
                for name, reads in self.sum_reads.items()
            ),
        ):
            unknown = [name for name in reads if name not in allowed]
            if unknown:
                raise TypeError(
                    f"{self.name}: {reader} reads {', '.join(unknown)}, which is not among {', '.join(sorted(allowed))}."
                )

    @property
    def reads_params(self) -> bool:
        """Whether ``update`` needs params: the rule reads ``p``, or ``prepare`` reads ``params`` without a default."""
        required = self.prepare_reads[
            : len(self.prepare_reads) - len(getattr(self.prepare, "__defaults__", None) or ())
        ]
        return "p" in self.reads or "params" in required

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
        extra: dict[str, Any],
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Everything a rule may read beside ``g``, ``p`` and slots, by name; and the next shared values. Once a step."""
        now: dict[str, Any] = dict(shared)
        if self.counts:
            now["count"] = of_this_part(shared["count"])
        for name, value in self.hyper.items():
            now[name] = value(now["count"]) if callable(value) else of_this_part(value)
            if not isinstance(now[name], (int, float, Tensor)) or (
                isinstance(now[name], Tensor) and now[name].dim() > 1
            ):
                shape = (
                    f"a tensor of shape {tuple(now[name].shape)}"
                    if isinstance(now[name], Tensor)
                    else None
                )
                given = shape or f"{type(now[name]).__name__} {now[name]!r}"
                raise TypeError(
                    f"{self.name}: the schedule {name} returned {given}; it must return a number or a 0-dim tensor."
                )
            check_entries(name, now[name], updates)
        shared = dict(shared)
        if self.prepare is not None:
            known = {**now, "updates": updates, "params": params}
            result = self.prepare(*(known[name] for name in self.prepare_reads), **extra)
            result, changed = (
                result if isinstance(result, tuple) and len(result) == 2 else (result, {})
            )
            if (
                not isinstance(result, dict)
                or not isinstance(changed, dict)
                or changed.keys() - self.shared.keys()
            ):
                given = outline(result) if changed == {} else outline((result, changed))
                raise TypeError(
                    f"{self.name}: prepare must return {{name: value}} for the rule, or ({{name: value}}, {{shared: new value}}) "
                    f"with shared values among {sorted(self.shared)}; it returned {given}."
                )
            now.update({name: tree.whole(value) for name, value in result.items()})
            shared.update({name: tree.whole(value) for name, value in changed.items()})
        if self.counts:
            shared["count"] = shared["count"] + 1
        return now, shared

    def apply(
        self,
        g: Tensor,
        p: Tensor | None,
        slots: dict[str, Tensor],
        now: dict[str, Any],
        dtype: torch.dtype,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The rule on one tensor, computed in `dtype`; slots come back in the dtype they were stored in.

        An elementwise rule takes a complex tensor for the pairs of reals that it is, as torch.optim does; of sharded tensors it takes this
        rank's parts, where a tensorwise rule takes wholes.
        """
        if type(g) is not Tensor and tree.is_sharded(g):
            p = p if "p" in self.reads else None
            return tree.on_shards(self.apply, self.kind == "elementwise", g, p, slots, now, dtype)
        values = {**now, **slots, "g": g, "p": p}
        pairs = dtype.is_complex and self.kind == "elementwise"
        values |= self._entered(values, dtype, pairs)
        try:
            if self.sums:
                values |= self.sums_of(values)
            result = self.rule(*[values[name] for name in self.rule_reads])
        except RuntimeError as error:
            others = [
                name
                for name, slot in slots.items()
                if slot.shape != g.shape or slot.is_complex() != dtype.is_complex
            ]
            if others:
                held = ", ".join(
                    f"{name}, {slots[name].dtype} of shape {tuple(slots[name].shape)}"
                    for name in others
                )
                raise Misfit(
                    f"is {g.dtype} of shape {tuple(g.shape)}, and the state has {held}. Is the state that of other params?"
                ) from error
            raise
        if not slots:
            return self._leave(result, g, "the update", g, pairs), {}
        if not (
            isinstance(result, tuple)
            and len(result) == 2
            and isinstance(result[1], dict)
            and result[1].keys() == slots.keys()
        ):
            wanted = f"(update, {{slot: new value}}) with the slots {sorted(slots)}"
            raise TypeError(
                f"{self.name}: rule must return {wanted}; it returned {outline(result)}."
            )
        u, new = result
        kept = {}
        for name, old in slots.items():
            x = self._leave(new[name], old, name, g, pairs)
            kept[name] = x if x.dtype is old.dtype else x.to(old.dtype)
        return self._leave(u, g, "the update", g, pairs), kept

    def _entered(self, values: dict[str, Any], dtype: torch.dtype, pairs: bool) -> dict[str, Any]:
        """What rule and sums read, as they compute with it."""
        if not pairs and all(
            not isinstance(x := values[name], Tensor) or x.dtype == dtype for name in self.reads
        ):
            return {}
        return {name: enter(values[name], dtype, pairs) for name in self.reads}

    def sums_of(self, values: dict[str, Any]) -> dict[str, Any]:
        """The sums over this tensor, those that are not known."""
        sums = {
            name: self.sums[name](*[values[n] for n in reads])
            for name, reads in self.sum_reads.items()
            if name not in values
        }
        for name, x in sums.items():
            if isinstance(x, Tensor) and x.dim():
                raise TypeError(
                    f"{self.name}: the sum {name} has shape {tuple(x.shape)}; it must be a 0-dim tensor: a sum over all elements."
                )
        return sums

    def sums_of_parts(
        self,
        updates: PyTree,
        spec: Any,
        gs: list[Any],
        ps: list[Any],
        slots: dict[str, list[Any]],
        now: dict[str, Any],
    ) -> dict[str, Each]:
        """The sums over sharded tensors: each rank's over its parts, and those added up in one message for all tensors."""
        per_leaf = PerLeaf(updates, spec, {name: now[name] for name in self.reads if name in now})
        rows: list[dict[str, Any]] = []
        for i, (g, p) in enumerate(zip(gs, ps, strict=True)):
            if g is None:
                rows.append(dict.fromkeys(self.sums))
                continue
            held = {name: column[i] for name, column in slots.items()}
            dtype = working_dtype(g, p if "p" in self.reads else None, *held.values())
            values = {
                name: tree.part_of(x, g)
                for name, x in {**per_leaf.at(i, dtype), **held, "g": g, "p": p}.items()
            }
            sums = self.sums_of(values | self._entered(values, dtype, dtype.is_complex))
            rows.append(
                {name: torch.as_tensor(x, device=values["g"].device) for name, x in sums.items()}
            )
        whole = tree.sum_over_ranks(
            [row[name] for name in self.sums for row in rows], gs * len(self.sums)
        )
        n = len(gs)
        return {
            name: Each(tree.unflatten(spec, whole[k * n : (k + 1) * n]))
            for k, name in enumerate(self.sums)
        }

    def _leave(self, x: Any, like: Tensor, name: str, g: Tensor, pairs: bool) -> Tensor:
        """What the rule returned for `like`, checked: a rule that broadcasts has met a state of other params, or is wrong."""
        if type(x) is Tensor and x.dtype is like.dtype and x.shape == like.shape and not pairs:
            return x
        name = name if like is g else f"slot {name}"
        if not isinstance(x, Tensor):
            raise TypeError(
                f"{self.name}: rule returned {type(x).__name__} {x!r} as {name}; it must be a tensor."
            )
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
        if (
            not isinstance(state, StageState)
            or state.shared.keys() != expected
            or state.slots.keys() != self.slots.keys()
        ):
            held = (
                [*state.shared, *state.slots]
                if isinstance(state, StageState)
                else type(state).__name__
            )
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
    sums: Mapping[str, Callable[..., Any]] | None = None,
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
        sums: ``{name: function}``, what an elementwise rule needs to know of the whole tensor: sums over its elements, 0-dim tensors, or
            how many there are. The functions read what a rule may, and see what it sees. Of a sharded tensor each rank sums over its
            part, and the sums are added up.
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
        if isinstance(value, bool) or not (
            isinstance(value, (int, float, Tensor)) or callable(value)
        ):
            raise TypeError(
                f"{name} must be a number, a 0-dim tensor or a schedule (a function of the count); got {type(value).__name__} {value!r}."
            )
        if isinstance(value, Tensor) and value.dim() > 1:
            raise TypeError(
                f"{name} must be a 0-dim tensor; got shape {tuple(value.shape)}. To train with many values at once, vmap over it."
            )
    for name, make in (slots or {}).items():
        if not callable(make):
            raise TypeError(
                f"slot {name} must be a function of its parameter, e.g. torch.zeros_like; got {outline(make)}."
            )
    for name, first in (shared or {}).items():
        if not isinstance(first, Tensor):
            raise TypeError(
                f"shared {name} must be a tensor; got {type(first).__name__} {first!r}."
            )
    return Leafwise(rule, prepare, slots or {}, shared or {}, hyper or {}, sums or {}, kind)
