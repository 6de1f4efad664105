"""Any transformation as a `torch.optim.Optimizer`: the same pure update, with its state kept where torch's tools look for it.

A step gathers the gradients and the state into trees, calls ``tx.update``, and writes what came back into the parameters and the state,
in place. Two places are the truth, and are read anew at every step, because schedulers, checkpoints and wrappers write into them:

    opt.state[p]        a flat dict of tensors: this parameter's slots, e.g. ``exp_avg``, and its counts, e.g. ``step``
    opt.param_groups    the hyperparameters; ``lr`` is always among them

Counts are kept per parameter, as torch does: without a gradient a parameter keeps its count. Values that a stage shares among all
parameters (a noise key) are kept with the first one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from functorch_opt import tree
from functorch_opt.base import GradientTransformation
from functorch_opt.combine import Chain, chain, hyperparameters
from functorch_opt.compiled import compiled_step
from functorch_opt.rule import leafwise
from functorch_opt.tree import PyTree, StageState

__all__ = ["Optimizer"]


class Optimizer(torch.optim.Optimizer):
    """A ready transformation, or a factory of one, as a `torch.optim.Optimizer`.

    ``Optimizer(params, tx)``: the group option ``lr``, 1.0 by default, multiplies what `tx` gives; schedulers drive it.
    ``Optimizer(params, factory, **hyper)``: the factory's arguments become group options, ``learning_rate`` under the name ``lr``; numbers
    may differ from group to group and change between steps. All groups make one tree: a global norm is that of all of them. (Groups whose
    other options differ, a bool for example, are updated separately.) A schedule given as ``learning_rate`` stays in the transformation,
    and ``lr`` multiplies it.

    Args:
        params: parameters, ``(name, parameter)`` pairs or group dicts, as for every torch optimizer. With names, masks and labels see
            the tree ``{name: parameter}``, otherwise a list.
        tx: a transformation, or a function that returns one.
        compile: run the step in place through `compiled_step`; the numbers are the same. The first step then takes seconds.
        **hyper: arguments of the function.

    Raises:
        TypeError: `tx` is neither; an argument that the function does not take; a parameter that is not floating or complex.
        ValueError: a hyperparameter outside its range.

    Example:
        >>> import torch, functorch_opt as fo
        >>> model = torch.nn.Linear(2, 1)
        >>> tx = fo.chain(fo.clip_by_global_norm(1.0), fo.adamw(3e-4))
        >>> opt = fo.optim.Optimizer(model.parameters(), tx)
        >>> opt = fo.optim.Optimizer(model.parameters(), fo.adamw, learning_rate=3e-4, weight_decay=0.1)
        >>> opt.param_groups[0]["lr"], opt.param_groups[0]["weight_decay"]
        (0.0003, 0.1)
        >>> model(torch.ones(1, 2)).sum().backward()
        >>> opt.step()
        >>> sorted(opt.state[model.weight])
        ['scale_by_adam/mu', 'scale_by_adam/nu', 'step']
    """

    _names: ClassVar[dict[str, str]] = {}
    """Keys of ``state[p]`` that are called otherwise: {the chain's: torch's}."""
    _structural: ClassVar[tuple[str, ...]] = ()
    """Options that, when zero, leave a stage out."""

    def __init__(
        self,
        params: Iterable[Any],
        tx: GradientTransformation | Callable[..., GradientTransformation],
        *,
        compile: bool = False,
        **hyper: Any,
    ) -> None:
        if isinstance(tx, GradientTransformation):
            if hyper:
                raise TypeError(
                    f"a ready transformation takes no hyperparameters; got {', '.join(hyper)}. "
                    "Give the function that makes it: Optimizer(params, adamw, learning_rate=...)."
                )
            numbers: dict[str, Any] = {}
            others: dict[str, Any] = {}
        elif callable(tx):
            tx(**hyper)  # what it does not like about its arguments, it says now
            numbers, others = hyperparameters(tx, (), hyper)
        else:
            raise TypeError(f"tx must be a transformation or a function that returns one; got {type(tx).__name__} {tx!r}.")
        plain = {name: value for name, value in others.items() if isinstance(value, (bool, int, str, torch.dtype, type(None)))}
        fixed = {name: value for name, value in (others | numbers).items() if name not in plain and callable(value)}
        numbers = {name: value for name, value in numbers.items() if name not in fixed}
        fixed |= {name: value for name, value in others.items() if name not in plain}
        has_lr = "learning_rate" in numbers
        lr = numbers.pop("learning_rate", 1.0)
        self._recipe: tuple[Any, dict[str, Any], bool] = (tx, fixed, has_lr)
        self._setup(params, {"lr": lr, **numbers, **plain}, ("lr", *numbers), compile)

    def _setup(self, params: Iterable[Any], defaults: dict[str, Any], numbers: Iterable[str], compile: bool) -> None:
        """What every constructor ends with; `numbers` names the options that are hyperparameters."""
        self._compile = compile
        self._numbers = frozenset(numbers)
        self._plans: dict[Any, _Plan] = {}
        super().__init__(params, defaults)

    def _chain(self, *args: Any, **options: Any) -> GradientTransformation:
        """The transformation for these group options, of which numbers may be tensors: 0-dim, or one entry per parameter."""
        tx, fixed, has_lr = self._recipe
        lr = options.pop("lr")
        if has_lr:
            return tx(**fixed, **options, learning_rate=lr)
        ready: GradientTransformation = tx if isinstance(tx, GradientTransformation) else tx(**fixed, **options)
        stages = ready.stages.values() if isinstance(ready, Chain) else [ready]
        return chain(*stages, leafwise(lambda g, lr: g * lr, hyper={"lr": lr}))

    # ---- what torch.optim.Optimizer asks for -----------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its parameters start with fresh state. A tensor lr is copied, so that groups do not share it.

        Args:
            param_group: ``{"params": ..., option: value, ...}``; options that are left out take their defaults.

        Raises:
            ValueError: an option outside its range.
            TypeError: a parameter that is not floating or complex.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            if isinstance(group["lr"], Tensor):
                if group["lr"].numel() != 1:
                    raise ValueError(f"Tensor lr must be 1-element; got shape {tuple(group['lr'].shape)}.")
                group["lr"] = group["lr"].clone()
            self._chain(**{name: group[name] for name in self.defaults if name in group and name not in _FLAGS})
        except Exception:
            self.param_groups.pop()
            raise

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient, in place.

        Args:
            closure: evaluates the model anew and returns the loss; called with gradients enabled, before any gradient is read.

        Returns:
            What `closure` returned, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            self._advance()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` gave, or torch's optimizer of the same name. Every tensor is copied, and keeps its dtype.

        Args:
            state_dict: as from ``torch.load``. Options that it lacks keep their defaults.

        Raises:
            ValueError: the groups do not fit.
        """
        final: list[dict[str, Any]] = []

        def see_final(_: Any, given: dict[str, Any]) -> None:
            final.append(given)

        handle = self.register_load_state_dict_pre_hook(see_final)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        # torch casts every tensor but "step" to the dtype of its parameter: a noise key would lose its bits.
        saved = final[0]
        ids = [i for group in saved["param_groups"] for i in group["params"]]
        for i, p in zip(ids, [p for group in self.param_groups for p in group["params"]], strict=True):
            for name, value in saved["state"].get(i, {}).items():
                if isinstance(value, Tensor):
                    self.state[p][name] = value.to(self.state[p][name].device, copy=True)
                elif name == "step":
                    self.state[p][name] = torch.tensor(float(value))

    def __getstate__(self) -> dict[str, Any]:
        private: dict[str, Any] = {name: vars(self)[name] for name in ("_recipe", "_numbers", "_compile") if name in vars(self)}
        return {**super().__getstate__(), **private}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._plans = {}
        for group in self.param_groups:
            for name, value in self.defaults.items():
                if name != "differentiable":
                    group.setdefault(name, value.clone() if isinstance(value, Tensor) else value)

    # ---- a step ------------------------------------------------------------------------------------------------------------

    def _advance(self) -> None:
        """Compute everything, then write everything: an error on the way leaves parameters and state as they were."""
        writes = [
            self._plan(fixed, groups).compute(groups, self.state)
            for fixed, groups in self._buckets()
            if any(p.grad is not None for group in groups for p in group["params"])
        ]
        for write in writes:
            write()

    def _buckets(self) -> Iterable[tuple[tuple[Any, ...], list[dict[str, Any]]]]:
        """The groups, in order, by their options that are not numbers: each bucket is one tree with one transformation."""
        buckets: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
        for group in self.param_groups:
            fixed = tuple((name, group[name]) for name in self._options() if not self._varies(name, group[name]))
            buckets.setdefault(fixed, []).append(group)
        return buckets.items()

    def _options(self) -> list[str]:
        return [name for name in self.defaults if name not in _FLAGS]

    def _varies(self, name: str, value: Any) -> bool:
        """Whether a change of this option leaves the chain as it is: hyperparameters do, unless a zero leaves out a stage."""
        return name in self._numbers and (name not in self._structural or isinstance(value, Tensor) or value != 0)

    def _plan(self, fixed: tuple[Any, ...], groups: list[dict[str, Any]]) -> _Plan:
        plan = self._plans.get(fixed)
        if plan is None or plan.layout != _layout(groups):
            options = dict(fixed)
            varying = [name for name in self._options() if name not in options]
            plan = self._plans[fixed] = _Plan(
                lambda numbers: self._chain(**options, **numbers), varying, groups, self._names, self._compile
            )
        return plan


_FLAGS = ("foreach", "fused", "capturable", "differentiable")
"""Options by which torch chooses among its implementations. There is one here."""


def _foreach(many: Callable[..., Any], one: Callable[..., Any], pairs: list[tuple[Tensor, Tensor]]) -> None:
    """``one(a, b)`` for all pairs, in one call where torch's foreach takes them (it refuses DTensors beside plain ones)."""
    if pairs and all(type(a) in (Tensor, torch.nn.Parameter) for a, _ in pairs):
        many([a for a, _ in pairs], [b for _, b in pairs])
    else:
        for a, b in pairs:
            one(a, b)


# ---- state, taken apart and put together ---------------------------------------------------------------------------------


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
        shared = {name: _Place("count" if name == "count" else "joint", under(name), under(f"shared/{name}")) for name in state.shared}
        slots = {}
        for name, slot in state.slots.items():
            spec = tree.flatten(slot)[1]
            slots[name] = tree.unflatten(
                spec, [_Place("slot", under(name), under(f"slots/{name}/{leaf}"), index[leaf]) for leaf in tree.paths(slot)]
            )
        return StageState(shared, slots)  # type: ignore[arg-type]
    if isinstance(state, dict):
        return {name: _places(child, under(name), index) for name, child in state.items()}
    if isinstance(state, tuple) and hasattr(state, "_fields"):
        return type(state)(*(_places(child, under(name), index) for name, child in zip(state._fields, state, strict=True)))
    if isinstance(state, (list, tuple)):
        return type(state)(_places(child, under(i), index) for i, child in enumerate(state))
    return None if state is None else _Place("joint", path, path)


class _Plan:
    """What is worked out once for a bucket of groups: its transformation, and where each tensor of the state lives."""

    def __init__(
        self,
        make: Callable[[dict[str, Any]], GradientTransformation],
        varying: list[str],
        groups: list[dict[str, Any]],
        rename: dict[str, str],
        compile: bool,
    ) -> None:
        params = [p for group in groups for p in group["params"]]
        self.layout = _layout(groups)
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
        rename = {**dict.fromkeys(counts[:1], "step"), **rename}
        self.places = tree.map(lambda place: replace(place, key=rename.get(place.key, place.key)), places)
        self.flat: list[_Place] = tree.leaves(self.places)
        self.counts = list(dict.fromkeys(["step", *(place.key for place in self.flat if place.kind == "count")]))

    def _tree(self, values: list[Any]) -> PyTree:
        return dict(zip(self.paths, values, strict=True)) if self.named else values

    def compute(self, groups: list[dict[str, Any]], state: dict[Tensor, dict[str, Any]]) -> Callable[[], None]:
        """Work out the step; nothing changes before the function that this returns is called."""
        for name, target in self.numbers.items():
            values = [group[name] for group in groups]
            if isinstance(target, tuple):
                for part, of_groups in zip(target, zip(*values, strict=True), strict=True):
                    _write_number(part, of_groups, groups)
            else:
                _write_number(target, values, groups)
        params = [p for group in groups for p in group["params"]]
        moved = [i for i, p in enumerate(params) if p.grad is not None]
        entries = [dict(state.get(p, ())) for p in params]
        self._complete(entries, params, moved)

        def fetch(place: _Place | None) -> Any:
            if place is None or place.kind != "count":
                return None if place is None else entries[place.i].get(place.key)
            counts = torch.stack([entry.get(place.key, _ZERO).cpu() for entry in entries]).to(self.device, torch.int64)
            # One for each parameter; but nearly always those that have a gradient have the same, and one number is less work.
            same = not torch.compiler.is_compiling() and bool((counts[moved] == counts[moved[0]]).all())
            return counts[moved[0]] if same else counts

        old = tree.map_leaves(fetch, self.places)
        grads = self._tree([p.grad for p in params])
        sums: list[tuple[Tensor, Tensor]] = []
        if self.compiled is None:
            updates, new = self.tx.update(grads, old, self._tree([p.detach() for p in params]))
            us = dict(zip(self.order, tree.flatten(updates)[0], strict=True))
            sums = [(params[i], us[i]) for i in moved]

        def write() -> None:
            for i in {0, *moved}:
                state[params[i]].update(entries[i])
            _foreach(torch._foreach_add_, Tensor.add_, sums)
            after = new if self.compiled is None else self._run_compiled(params, grads, old)
            values = zip(tree.flatten(self.places)[0], tree.flatten(after)[0], strict=True)
            kinds = ("joint", "slot") if self.compiled is None else ("joint",)
            copies = [(entries[place.i][place.key], x) for place, x in values if place and place.kind in kinds and x is not None]
            _foreach(torch._foreach_copy_, Tensor.copy_, [(mine, x) for mine, x in copies if mine is not x])
            torch._foreach_add_([entries[i][key] for i in moved for key in self.counts], 1)

        return write

    def _run_compiled(self, params: list[Tensor], grads: PyTree, old: PyTree) -> PyTree:
        """The new state; parameters and slots are written in place."""
        assert self.compiled is not None
        self.compiled.returned = old if self.checked else None
        self.checked = True
        return self.compiled(self._tree(params), grads, old)[1]

    def _complete(self, entries: list[dict[str, Any]], params: list[Tensor], moved: list[int]) -> None:
        """Give first values to parameters that have a gradient and no state yet, and to shared values that nobody has."""
        has_grad = set(moved)
        absent = [
            place
            for place in self.flat
            if (place.kind == "joint" or (place.kind == "slot" and place.i in has_grad)) and place.key not in entries[place.i]
        ]
        for i in moved:
            # A checkpoint of torch's SGD has no step: where there is state, this is not the first one.
            started = len(entries[i]) > 0
            for key in self.counts:
                if key not in entries[i]:
                    entries[i][key] = torch.tensor(int(started and key == "step"), dtype=_step_dtype() if key == "step" else torch.int64)
        if absent:
            everything = any(place.kind == "joint" for place in absent)
            wanted = {place.i for place in absent}
            first = tree.state_dict(
                self.tx.init(self._tree([p.detach() if everything or i in wanted else None for i, p in enumerate(params)]))
            )
            for place in absent:
                entries[place.i][place.key] = first[place.path]


_ZERO = torch.zeros(())


def _step_dtype() -> torch.dtype:
    """That of torch's own ``step``."""
    return torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32


def _write_number(target: Tensor, values: Iterable[Any], groups: list[dict[str, Any]]) -> None:
    """Write a hyperparameter where the transformation reads it: one number, or with several groups one for each parameter."""
    values = list(values)
    if len(groups) > 1:
        of_params = [float(value) for value, group in zip(values, groups, strict=True) for _ in group["params"]]
        target.copy_(torch.tensor(of_params, dtype=target.dtype))
    elif isinstance(values[0], Tensor):
        target.copy_(values[0].reshape(()))
    else:
        target.fill_(values[0])


def _layout(groups: list[dict[str, Any]]) -> list[Any]:
    return [([id(p) for p in group["params"]], group.get("param_names")) for group in groups]
