"""One step of the stateful optimizers: state taken out of ``state[p]``, put together into trees, and written back."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from operator import is_
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from functorch_opt import tree
from functorch_opt._core.transformation import GradientTransformation
from functorch_opt._execution.compiled import compiled_step
from functorch_opt.tree import PyTree, StageState


def _foreach(
    many: Callable[..., Any], one: Callable[..., Any], pairs: list[tuple[Tensor, Tensor]]
) -> None:
    """``one(a, b)`` for all pairs, in one call where torch's foreach takes them (it refuses DTensors beside plain ones).

    In a graph one by one, but by foreach (torch 2.13): together, Inductor loses a write of amsgrad; and of a plain write to a 0-dim float64
    tensor Dynamo may lose any.
    """
    if torch.compiler.is_compiling():
        for a, b in pairs:
            many([a], [b])
    elif pairs and all(type(a) in (Tensor, torch.nn.Parameter) for a, _ in pairs):
        many([a for a, _ in pairs], [b for _, b in pairs])
    else:
        for a, b in pairs:
            one(a, b)


@dataclass(frozen=True)
class _Place:
    """Where a tensor of the functional state lives: ``state[p][key]``; `path` is its place in a fresh functional state."""

    kind: str  # "slot": of parameter i; "count": one for every parameter; "joint": with the first parameter
    key: str
    path: str
    i: int = 0


def _places(state: PyTree, path: str, index: dict[str, int]) -> PyTree:
    """The tree `state` with a `_Place` for every tensor; `index` maps the path of a parameter to its number."""

    def under(name: object) -> str:
        return f"{path}/{name}" if path else str(name)

    if isinstance(state, StageState):
        shared = {
            name: _Place(
                "count" if name == "count" else "joint", under(name), under(f"shared/{name}")
            )
            for name in state.shared
        }
        slots = {}
        for name, slot in state.slots.items():
            spec = tree.flatten(slot)[1]
            slots[name] = tree.unflatten(
                spec,
                [
                    _Place("slot", under(name), under(f"slots/{name}/{leaf}"), index[leaf])
                    for leaf in tree.paths(slot)
                ],
            )
        return StageState(shared, slots)  # type: ignore[arg-type]
    if isinstance(state, dict):
        return {name: _places(child, under(name), index) for name, child in state.items()}
    if isinstance(state, tuple) and hasattr(state, "_fields"):
        return type(state)(
            *(
                _places(child, under(name), index)
                for name, child in zip(state._fields, state, strict=True)
            )
        )
    if isinstance(state, (list, tuple)):
        return type(state)(_places(child, under(i), index) for i, child in enumerate(state))
    return None if state is None else _Place("joint", path, path)


def _assemble(places: PyTree, values: list[Any]) -> PyTree:
    """``tree.unflatten``, with numbers for places. torch.compile takes no treespec from outside, and cannot flatten an empty dict."""
    if places is None or isinstance(places, int):
        return None if places is None else values[places]
    if isinstance(places, dict):
        return {name: _assemble(child, values) for name, child in places.items()}
    children = [_assemble(child, values) for child in places]
    return type(places)(*children) if hasattr(places, "_fields") else type(places)(children)


def _differences(places: PyTree, old: PyTree, new: PyTree) -> list[tuple[int, Any]]:
    """The places where `new` has another object than `old`, and that object."""
    if places is None or old is new:
        return []
    if isinstance(places, int):
        return [(places, new)]
    names = places if isinstance(places, dict) else range(len(places))
    return [found for name in names for found in _differences(places[name], old[name], new[name])]


Make = Callable[[dict[str, Any]], GradientTransformation]
"""The transformation of a bucket, from its hyperparameters."""


class Plan:
    """What is worked out once for a bucket of groups: its transformation, and where each tensor of the state lives."""

    def __init__(
        self,
        make: Make,
        varying: list[str],
        groups: list[dict[str, Any]],
        rename: dict[str, str],
        compile: bool,
    ) -> None:
        params = [p for group in groups for p in group["params"]]
        self.layout = layout(groups)
        self.device = params[0].device
        shape = () if len(groups) == 1 else (len(params),)

        def buffer(value: Any) -> Any:
            """Where a hyperparameter is written at every step; the transformation reads it there."""
            if isinstance(value, tuple):
                return tuple(buffer(part) for part in value)
            return torch.zeros(shape, dtype=tree.real_dtype(self.device), device=self.device)

        self.numbers = {name: buffer(groups[0][name]) for name in varying}
        self.tx = make(self.numbers)
        self.compiled = compiled_step(self.tx) if compile else None
        self.checked = False

        names = [name for group in groups for name in group.get("param_names", [])]
        self.named = len(set(names)) == len(params)
        self.paths = names if self.named else [str(i) for i in range(len(params))]
        number = {path: i for i, path in enumerate(self.paths)}
        self.order = [number[path] for path in tree.paths(self._tree(params))]

        places = _places(self.tx.init(self._tree([p.to("meta") for p in params])), "", number)
        counts = [place.key for place in tree.leaves(places) if place.kind == "count"]
        if rename:  # torch's classes have one count, called step; any other chain's counts keep their stage's name, which outlives a change
            rename = {**dict.fromkeys(counts[:1], "step"), **rename}
        self.places = tree.map(
            lambda place: replace(place, key=rename.get(place.key, place.key)), places
        )
        self.flat, self.spec = tree.flatten(self.places)
        self.numbered = tree.unflatten(self.spec, list(range(len(self.flat))))
        kinds = [place and place.kind for place in self.flat]
        self.kept = [k for k, kind in enumerate(kinds) if kind in ("slot", "joint")]
        self.where = [(self.flat[k].i, self.flat[k].key) for k in self.kept]
        self.counted = [(k, self.flat[k].key) for k, kind in enumerate(kinds) if kind == "count"]
        self.counts = list(dict.fromkeys(key for _, key in self.counted)) or ["step"]
        self.written: dict[str, list[Any]] = {}
        self.tallies: dict[str, tuple[Tensor, tuple[Tensor, ...]]] = {}

    def _tree(self, values: list[Any]) -> PyTree:
        return dict(zip(self.paths, values, strict=True)) if self.named else values

    def initialize(self, groups: list[dict[str, Any]], state: dict[Tensor, dict[str, Any]]) -> None:
        """Give every parameter that can be trained its first state, where it has none."""
        params = [p for group in groups for p in group["params"]]
        trained = [i for i, p in enumerate(params) if p.requires_grad]
        entries = [dict(state.get(p, ())) for p in params]
        self._complete(entries, params, trained)
        for i in {0, *trained}:
            state[params[i]].update(entries[i])

    def serves(self, groups: list[dict[str, Any]], state: dict[Tensor, dict[str, Any]]) -> bool:
        """Whether it was made for these groups, and nothing is missing for a step."""
        if self.layout != layout(groups):
            return False
        params = [p for group in groups for p in group["params"]]
        slots = [
            key in state.get(params[i], _NOTHING)
            for i, key in self.where
            if params[i].grad is not None
        ]
        return all(slots) and all(
            key in state.get(p, _NOTHING)
            for p in params
            if p.grad is not None
            for key in self.counts
        )

    def compute(
        self,
        groups: list[dict[str, Any]],
        state: dict[Tensor, dict[str, Any]],
        make: Make,
        loss: Any = None,
    ) -> Callable[[], None]:
        """Work out the step; nothing changes before the function that this returns is called. `loss` is what a closure returned."""
        dynamo = torch.compiler.is_compiling()
        if dynamo or is_in_torch_dispatch_mode():
            # Traced. Into new tensors: Dynamo may drop a write to a 0-dim float64 buffer (torch 2.13), and a fake mode takes no real one.
            tx = make(self._read_numbers(groups))
        else:
            tx = self.tx
            self._write_numbers(groups)
        params = [p for group in groups for p in group["params"]]
        gradients = [p.grad for p in params]
        moved = [i for i, g in enumerate(gradients) if g is not None]
        entries = [state.get(p, _NOTHING) for p in params]
        kept, counts = self._held(entries, moved)
        began = any(x is None for of in (kept, *counts.values()) for x in of) and self._lacks(
            entries, gradients, moved
        )
        if began:  # the first step of some parameter
            entries = [dict(entry) for entry in entries]
            self._complete(entries, params, moved)
            kept, counts = self._held(entries, moved)

        flat: list[Any] = [None] * len(self.flat)
        for k, x in zip(self.kept, kept, strict=True):
            flat[k] = x
        of_key = {key: self._count(key, counts[key], moved, len(params)) for _, key in self.counted}
        for k, key in self.counted:
            flat[k] = of_key[key]
        old = _assemble(self.numbered, flat) if dynamo else tree.unflatten(self.spec, flat)
        grads = self._tree(gradients)
        extra = self._extra(loss, grads)
        in_place = self.compiled is not None and tx is self.tx
        sums: list[tuple[Tensor, Tensor]] = []
        if not in_place:
            updates, new = tx.update(grads, old, self._tree([p.detach() for p in params]), **extra)
            us = dict(zip(self.order, tree.flatten(updates)[0], strict=True))
            sums = [(params[i], us[i]) for i in moved]

        def write() -> None:
            if began:
                for i in {0, *moved}:
                    state[params[i]].update(entries[i])
            _foreach(torch._foreach_add_, Tensor.add_, sums)
            result = self._run_compiled(params, grads, old, extra) if in_place else new
            # Compiled stages have written their slots, and return the same objects. Stages that ran eagerly return new ones.
            changed = _differences(self.numbered, old, result)
            copies = [
                (flat[k], x) for k, x in changed if self.flat[k].kind != "count" and x is not None
            ]
            _foreach(torch._foreach_copy_, Tensor.copy_, copies)
            for key in self.counts:
                self._increment(
                    key,
                    counts[key],
                    [state[params[i]] for i in moved] if len(moved) == len(params) else None,
                    in_place,
                )

        return write

    def _held(
        self, entries: list[dict[str, Any]], moved: list[int]
    ) -> tuple[list[Any], dict[str, list[Any]]]:
        """What the parameters keep, in the order of `where`, and the counts of those that have a gradient; None where there is nothing."""
        return [entries[i].get(key) for i, key in self.where], {
            key: [entries[i].get(key) for i in moved] for key in self.counts
        }

    def _lacks(self, entries: list[dict[str, Any]], gradients: list[Any], moved: list[int]) -> bool:
        """Whether a value has to be made: of a parameter that has a gradient, or one that all share."""
        if any(key not in entries[i] for key in self.counts for i in moved):
            return True
        absent = [
            k for k, (i, key) in zip(self.kept, self.where, strict=True) if key not in entries[i]
        ]
        return any(
            self.flat[k].kind == "joint" or gradients[self.flat[k].i] is not None for k in absent
        )

    def _write_numbers(self, groups: list[dict[str, Any]]) -> None:
        """Write the hyperparameters where the transformation reads them."""
        for name, target in self.numbers.items():
            values = [group[name] for group in groups]
            if values == self.written.get(name) and not any(
                isinstance(value, Tensor) for value in values
            ):
                continue
            if isinstance(target, tuple):
                for part, of_groups in zip(target, zip(*values, strict=True), strict=True):
                    _write_number(part, of_groups, groups)
            else:
                _write_number(target, values, groups)
            plain = all(
                isinstance(value, (int, float)) for value in values
            )  # a tensor may be changed without our seeing it
            self.written[name] = values if plain else []

    def _read_numbers(self, groups: list[dict[str, Any]]) -> dict[str, Any]:
        """The hyperparameters as `_write_numbers` writes them, in new tensors."""
        numbers: dict[str, Any] = {}
        for name, target in self.numbers.items():
            values = [group[name] for group in groups]
            if isinstance(target, tuple):
                pairs = zip(target, zip(*values, strict=True), strict=True)
                numbers[name] = tuple(
                    [_read_number(part, of_groups, groups) for part, of_groups in pairs]
                )
            else:
                numbers[name] = _read_number(target, values, groups)
        return numbers

    def _count(self, key: str, counts: list[Tensor], moved: list[int], n: int) -> Tensor:
        """One for each parameter; but nearly always those that have a gradient have the same, and one number is less work."""
        of_moved = self._together(key, counts)
        if of_moved is None:
            if len({count.device for count in counts}) > 1:
                counts = [count.cpu() for count in counts]
            of_moved = torch.stack(counts)
        of_moved = of_moved.to(self.device, torch.int64, copy=True)
        if not (torch.compiler.is_compiling() or is_in_torch_dispatch_mode()) and bool(
            (of_moved == of_moved[0]).all()
        ):
            return of_moved[0]
        return of_moved.new_zeros(n).index_copy(
            0, torch.tensor(moved, device=self.device), of_moved
        )

    def _together(self, key: str, counts: list[Tensor]) -> Tensor | None:
        """The tensor whose elements these counts are, if they are all of it."""
        together, views = self.tallies.get(key, (None, ()))
        return together if len(views) == len(counts) and all(map(is_, views, counts)) else None

    def _increment(
        self, key: str, counts: list[Tensor], entries: list[dict[str, Any]] | None, in_place: bool
    ) -> None:
        """Add one to these counts. `in_place`, those of all parameters become elements of one tensor: then it is one operation."""
        if (together := self._together(key, counts)) is not None:
            together.add_(1)
            return
        torch._foreach_add_(counts, 1)
        if (
            entries
            and in_place
            and len({(type(count), count.dtype, count.device) for count in counts}) == 1
        ):
            together = torch.stack(counts)
            self.tallies[key] = together, together.unbind()
            for entry, count in zip(entries, self.tallies[key][1], strict=True):
                entry[key] = count

    def _extra(self, loss: Any, grads: PyTree) -> dict[str, Any]:
        """What the transformation reads beside gradients, state and parameters, as far as a closure provides it."""
        reads = self.tx.extra_args
        if not reads:
            return {}
        given = {
            "grad": grads,
            **({} if loss is None else {"value": torch.as_tensor(loss).detach()}),
        }
        for name, required in reads.items():
            if required and name not in given:
                closure = "Give step a closure that returns the loss."
                functional = "A closure cannot provide it: call update(updates, state, params, ...) of the transformation itself."
                raise TypeError(
                    f"{self.tx!r} reads {name}. {closure if name == 'value' else functional}"
                )
        return {name: value for name, value in given.items() if name in reads}

    def _run_compiled(
        self, params: list[Tensor], grads: PyTree, old: PyTree, extra: dict[str, Any]
    ) -> PyTree:
        """The new state; parameters and slots are written in place."""
        assert self.compiled is not None
        self.compiled.returned = old if self.checked else None
        self.checked = True
        return self.compiled(self._tree(params), grads, old, **extra)[1]

    def _complete(
        self, entries: list[dict[str, Any]], params: list[Tensor], moved: list[int]
    ) -> None:
        """Give first values to parameters that have a gradient and no state yet, and to shared values that nobody has."""
        has_grad = set(moved)
        absent = [
            place
            for place in self.flat
            if place
            and (place.kind == "joint" or (place.kind == "slot" and place.i in has_grad))
            and place.key not in entries[place.i]
        ]
        for i in moved:
            # A checkpoint of torch's SGD has no step: where there is state, this is not the first one.
            started = len(entries[i]) > 0
            for key in self.counts:
                if key not in entries[i]:
                    entries[i][key] = torch.tensor(
                        int(started and key == "step"),
                        dtype=_step_dtype() if key == "step" else torch.int64,
                    )
        if absent:
            everything = any(place.kind == "joint" for place in absent)
            wanted = {place.i for place in absent}
            first = tree.state_dict(
                self.tx.init(
                    self._tree(
                        [
                            p.detach() if everything or i in wanted else None
                            for i, p in enumerate(params)
                        ]
                    )
                )
            )
            for place in absent:
                entries[place.i][place.key] = first[place.path]


_NOTHING: dict[str, Any] = {}


def _step_dtype() -> torch.dtype:
    """That of torch's own ``step``."""
    return torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32


def _write_number(target: Tensor, values: Iterable[Any], groups: list[dict[str, Any]]) -> None:
    """Write a hyperparameter where the transformation reads it: one number, or with several groups one for each parameter."""
    values = list(values)
    if len(groups) > 1:
        of_params = [
            float(value)
            for value, group in zip(values, groups, strict=True)
            for _ in group["params"]
        ]
        target.copy_(torch.tensor(of_params, dtype=target.dtype))
    elif isinstance(values[0], Tensor):
        target.copy_(values[0].reshape(()))
    else:
        target.fill_(values[0])


def _read_number(target: Tensor, values: Iterable[Any], groups: list[dict[str, Any]]) -> Tensor:
    """As `_write_number`, in a new tensor. A float is multiplied in, for so it can change without compiling again."""
    one = torch.ones((), dtype=target.dtype, device=target.device)
    numbers = [
        value.to(target).reshape(()) if isinstance(value, Tensor) else one * value
        for value in values
    ]
    if len(groups) == 1:
        return numbers[0]
    return torch.stack(
        [number for number, group in zip(numbers, groups, strict=True) for _ in group["params"]]
    )


def layout(groups: list[dict[str, Any]]) -> list[Any]:
    return [([id(p) for p in group["params"]], group.get("param_names")) for group in groups]
