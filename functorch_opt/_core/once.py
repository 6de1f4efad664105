"""What a stage works out once a step: counts, hyperparameters, and what `prepare` makes of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from functorch_opt import tree
from functorch_opt._core.leaf import check_entries, of_this_part, outline
from functorch_opt._core.transformation import (
    ScalarOrSchedule,
    check_number,
    keyword_only,
    positional,
)
from functorch_opt.tree import PyTree

OF_THE_TREE = frozenset({"g", "p", "updates", "params", "count", "clock"})
"""Names with a meaning of their own, which nothing that is declared may have."""


class Once:
    """What a stage shares among all tensors, and what it works out of that once a step.

    A stage has up to two counts, both of the updates made before this one. They differ in a
    stateful optimizer only, where a parameter may have missed steps:

        count   is read by name. It is one of the parameter: bias correction needs that.
        clock   is what schedules are given. It is one of the training, the same for all tensors.

    Wrappers and gates have `one_clock`: what they read by the name ``count`` is the clock.
    """

    def __init__(
        self,
        name: str,
        prepare: Callable[..., Any] | None,
        hyper: Mapping[str, ScalarOrSchedule],
        shared: Mapping[str, Tensor],
        counts: bool = False,
        one_clock: bool = False,
        beside: tuple[str, ...] = (),
    ) -> None:
        self.name, self.prepare, self.hyper, self.shared = name, prepare, hyper, shared
        self.asked = positional(prepare) if prepare else ()
        self.reads = (*self.asked, *beside)
        """What `prepare` asks for, and what else has to be there at its time."""
        self.extra_args = keyword_only(prepare) if prepare else {}
        self.read_result: Callable[[Any], Any] | None = None
        self.numbers = {n: x for n, x in hyper.items() if isinstance(x, (int, float))}
        self.varying = {n: x for n, x in hyper.items() if n not in self.numbers}
        self.schedules = tuple(name for name, value in hyper.items() if callable(value))
        self.counts = counts or "count" in self.reads
        self.count_from = "clock" if one_clock else "count"
        kept = ([self.count_from] if self.counts else []) + (
            ["clock"] if self.schedules else []
        )
        self.keys = tuple(dict.fromkeys((*shared, *kept)))
        # Dynamo cannot negate a function that is made inside of the graph.
        self.is_constant = prepare is None and not self.varying and not self.keys

    @property
    def needs_params(self) -> bool:
        """Whether `prepare` reads ``params`` without a default."""
        defaults = getattr(self.prepare, "__defaults__", None) or ()
        return "params" in self.asked[: len(self.asked) - len(defaults)]

    def first(self, params: PyTree) -> dict[str, Tensor]:
        """The shared values and counts before the first step."""
        device = tree.leaves(params)[0].device
        shared = {
            name: value.to(device, copy=True) for name, value in self.shared.items()
        }
        counts = {
            name: tree.zero_count(params) for name in self.keys if name not in shared
        }
        return shared | counts

    def hypers(
        self,
        shared: Mapping[str, Tensor],
        n: int,
        instead: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Any]:
        """The hyperparameters of this step for `n` leaves, beside shared values and the count.

        Those that are named in `instead` have the values there.
        """
        now: dict[str, Any] = {**shared, **self.numbers}
        clock = now.pop("clock", None)
        if self.counts:
            now["count"] = of_this_part(shared[self.count_from])
        for name, value in {**self.varying, **(instead or {})}.items():
            now[name] = value(clock) if callable(value) else of_this_part(value)
            self._check_hyper(name, now[name])
            check_entries(name, now[name], n)
        return now

    def _check_hyper(self, name: str, value: Any) -> None:
        if isinstance(value, Tensor):
            if value.dim() <= 1:
                return
            given = f"a tensor of shape {tuple(value.shape)}"
        elif isinstance(value, (int, float)):
            return
        else:
            given = f"{type(value).__name__} {value!r}"
        raise TypeError(
            f"{self.name}: the schedule {name} returned {given}; "
            "it must return a number or a 0-dim tensor."
        )

    def prepared(
        self,
        known: dict[str, Any],
        shared: Mapping[str, Tensor],
        trees: Mapping[str, PyTree],
        extra: Mapping[str, Any],
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What a rule may read of this step, and the next shared values.

        `known` is what `hypers` gave, and totals; `trees` has the ``updates`` and ``params``.
        """
        now, new = dict(known), dict(shared)
        if self.prepare is not None:
            values = {**known, **trees}
            result = self.prepare(*[values[name] for name in self.asked], **extra)
            if self.read_result is not None:
                result = self.read_result(result)
            if type(result) is dict:
                now.update(_gathered(result))
            else:
                result, changed = self._checked(result)
                now.update(_gathered(result))
                new.update(_gathered(changed))
        for name in ("count", "clock"):
            if name in self.keys:
                new[name] = shared[name] + 1
        return now, new

    def _checked(self, result: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
        pair = isinstance(result, tuple) and len(result) == 2
        result, changed = result if pair else (result, {})
        dicts = isinstance(result, dict) and isinstance(changed, dict)
        if not dicts or changed.keys() - self.shared.keys():
            given = outline(result) if changed == {} else outline((result, changed))
            raise TypeError(
                f"{self.name}: prepare must return {{name: value}} for the rule, or "
                f"({{name: value}}, {{shared: new value}}) with shared values among "
                f"{sorted(self.shared)}; it returned {given}."
            )
        return result, changed


def _gathered(values: dict[str, Any]) -> dict[str, Any]:
    """`values`, with sharded tensors as wholes."""
    if all(type(x) in (float, Tensor) for x in values.values()):
        return values
    return {name: tree.whole(x) for name, x in values.items()}


def check_names(name: str, **declared: Mapping[str, Any]) -> None:
    """Raise TypeError where two things that a stage declares have one name, or a reserved one."""
    known = [key for of in declared.values() for key in of]
    if len(known) != len(set(known)) or OF_THE_TREE & set(known):
        raise TypeError(
            f"{name}: {', '.join(declared)} must have different names, "
            f"none of them g, p, count, clock, updates or params; got {known}."
        )


def check_reads(
    name: str, reader: str, reads: tuple[str, ...], allowed: set[str]
) -> None:
    """Raise TypeError where a function reads a name that nothing provides."""
    if unknown := [each for each in reads if each not in allowed]:
        raise TypeError(
            f"{name}: {reader} reads {', '.join(unknown)}, "
            f"which is not among {', '.join(sorted(allowed))}."
        )


def check_no_keywords(name: str, what: str, f: Callable[..., Any]) -> None:
    """Raise TypeError where a function of one tensor takes arguments after ``*``."""
    if names := ", ".join(keyword_only(f)):
        raise TypeError(
            f"{name}: {what} takes {names} after '*'. Let prepare take it there, "
            f"and return it for {what} to read by name."
        )


def check_declared(
    slots: Mapping[str, Any] | None,
    shared: Mapping[str, Any] | None,
    hyper: Mapping[str, Any] | None,
) -> None:
    """Raise TypeError for a first value, or a hyperparameter, that cannot be one."""
    for name, value in (hyper or {}).items():
        check_number(name, value)
    for name, make in (slots or {}).items():
        if not callable(make):
            raise TypeError(
                f"slot {name} must be a function of its parameter, e.g. torch.zeros_like; "
                f"got {outline(make)}."
            )
    for name, first in (shared or {}).items():
        if not isinstance(first, Tensor):
            raise TypeError(
                f"shared {name} must be a tensor; got {type(first).__name__} {first!r}."
            )
