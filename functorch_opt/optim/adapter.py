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
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from functorch_opt import tree
from functorch_opt.base import GradientTransformation
from functorch_opt.combine import chain, hyperparameters
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

    def __init__(self, params: Iterable[Any], tx: GradientTransformation | Callable[..., GradientTransformation], **hyper: Any) -> None:
        if isinstance(tx, GradientTransformation):
            if hyper:
                raise TypeError(f"a ready transformation takes no hyperparameters; got {', '.join(hyper)}. Give the function that makes it: Optimizer(params, adamw, learning_rate=...).")
            defaults, fixed = {"lr": 1.0}, {}
        elif callable(tx):
            tx(**hyper)  # what it does not like about its arguments, it says now
            numbers, fixed = hyperparameters(tx, (), hyper)
            defaults = {name: value for name, value in numbers.items() if not callable(value)}
            fixed |= {name: value for name, value in numbers.items() if callable(value)}
            defaults |= {name: fixed.pop(name) for name, value in list(fixed.items()) if isinstance(value, (bool, int, str, torch.dtype, type(None)))}
            defaults = {"lr": defaults.pop("learning_rate", 1.0), **defaults}
        else:
            raise TypeError(f"tx must be a transformation or a function that returns one; got {type(tx).__name__} {tx!r}.")
        self._recipe = (tx, fixed)
        self._setup(params, defaults)

    def _setup(self, params: Iterable[Any], defaults: dict[str, Any]) -> None:
        self._plans: dict[Any, _Plan] = {}
        super().__init__(params, defaults)

    def _chain(self, **options: Any) -> GradientTransformation:
        """The transformation for these group options, of which numbers may be tensors: 0-dim, or one entry per parameter."""
        tx, fixed = self._recipe
        lr = options.pop("lr")
        if isinstance(tx, GradientTransformation):
            return chain(tx, _group_lr(lr))
        if "learning_rate" in fixed or "learning_rate" not in hyperparameters(tx, (), {**fixed, "learning_rate": 0.0}, ())[0]:
            return chain(tx(**fixed, **options), _group_lr(lr))
        return tx(**fixed, **options, learning_rate=lr)

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

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
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
        return {**super().__getstate__(), "_recipe": self._recipe} if hasattr(self, "_recipe") else super().__getstate__()

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
        steps = [self._plan(static, groups).compute(self.state) for static, groups in self._buckets() if any(p.grad is not None for g in groups for p in g["params"])]
        for fresh, sums, copies in steps:
            for p, name, value in fresh:
                self.state[p][name] = value
            _foreach(torch._foreach_add_, Tensor.add_, sums)
            _foreach(torch._foreach_copy_, Tensor.copy_, copies)

    def _buckets(self) -> Iterable[tuple[tuple[Any, ...], list[dict[str, Any]]]]:
        """The groups, in order, by their options that are not numbers: each bucket is one tree with one transformation."""
        buckets: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
        for group in self.param_groups:
            static = tuple((name, group[name]) for name in self.defaults if name not in _FLAGS and not self._is_number(name, group[name]))
            buckets.setdefault(static, []).append(group)
        return buckets.items()

    def _is_number(self, name: str, value: Any) -> bool:
        if isinstance(value, tuple):
            return all(self._is_number(name, part) for part in value)
        if name in self._structural and not isinstance(value, Tensor) and value == 0:
            return False
        return isinstance(value, Tensor) or (isinstance(value, (int, float)) and not isinstance(value, bool) and isinstance(self.defaults[name], (int, float, Tensor, tuple)) and not isinstance(self.defaults[name], bool))

    def _plan(self, static: tuple[Any, ...], groups: list[dict[str, Any]]) -> _Plan:
        params = [p for group in groups for p in group["params"]]
        plan = self._plans.get(static)
        if plan is None or not plan.fits(groups, params):
            names = [name for name in self.defaults if name not in _FLAGS and name not in dict(static)]
            plan = self._plans[static] = _Plan(lambda numbers: self._chain(**dict(static), **numbers), names, groups, params, self._names)
        plan.read(groups, params)
        return plan


_FLAGS = ("foreach", "fused", "capturable", "differentiable")
"""Options by which torch chooses among its implementations. There is one here."""


def _group_lr(lr: Any) -> GradientTransformation:
    return leafwise(lambda g, lr: g * lr, hyper={"lr": lr})


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
            slots[name] = tree.unflatten(spec, [_Place("slot", under(name), under(f"slots/{name}/{leaf}"), index[leaf]) for leaf in tree.paths(slot)])
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
        self, make: Callable[[dict[str, Any]], GradientTransformation], names: list[str], groups: list[dict[str, Any]], params: list[Tensor], rename: dict[str, str]
    ) -> None:
        self.layout = _layout(groups)
        self.device = params[0].device
        self.group_of = [i for i, group in enumerate(groups) for _ in group["params"]]
        size = () if len(groups) == 1 else (len(params),)
        new = lambda: torch.zeros(size, dtype=tree.real_dtype(self.device), device=self.device)  # noqa: E731
        self.numbers = {name: tuple(new() for _ in groups[0][name]) if isinstance(groups[0][name], tuple) else new() for name in names}
        self.tx = make(self.numbers)
        self.paths = [name for group in groups for name in group.get("param_names", [])]
        self.named = len(set(self.paths)) == len(params)
        self.paths = self.paths if self.named else [str(i) for i in range(len(params))]
        number = {path: i for i, path in enumerate(self.paths)}
        self.order = [number[path] for path in tree.paths(self._tree(params))]
        places = _places(self.tx.init(self._tree([p.to("meta") for p in params])), "", number)
        counts = [place for place in tree.flatten(places)[0] if place is not None and place.kind == "count"]
        rename = {**({counts[0].key: "step"} if counts else {}), **rename}
        self.places = tree.map_leaves(lambda place: place and _Place(place.kind, rename.get(place.key, place.key), place.path, place.i), places)
        self.flat = [place for place in tree.flatten(self.places)[0] if place is not None]

    def fits(self, groups: list[dict[str, Any]], params: list[Tensor]) -> bool:
        return self.layout == _layout(groups)

    def _tree(self, values: list[Any]) -> PyTree:
        return dict(zip(self.paths, values, strict=True)) if self.named else values

    def read(self, groups: list[dict[str, Any]], params: list[Tensor]) -> None:
        """Take hyperparameters and parameters as they are now."""
        self.params = params
        for name, buffer in self.numbers.items():
            for i, part in enumerate(buffer) if isinstance(buffer, tuple) else [(None, buffer)]:
                values = [group[name] if i is None else group[name][i] for group in groups]
                if len(groups) == 1:
                    part.copy_(values[0].reshape(())) if isinstance(values[0], Tensor) else part.fill_(values[0])
                else:
                    part.copy_(torch.tensor([float(values[g]) for g in self.group_of], dtype=part.dtype))

    def compute(self, state: dict[Tensor, dict[str, Any]]) -> tuple[list[Any], list[Any], list[Any]]:
        """New entries of the state, additions to parameters, and copies into the state, for the caller to carry out."""
        params, self.params = self.params, []
        has_grad = [p.grad is not None for p in params]
        fresh = self._missing(state, params, has_grad)
        known = {(id(p), name): value for p, name, value in fresh}

        def fetch(place: _Place | None) -> Any:
            if place is None:
                return None
            if place.kind == "count":
                counts = [self._entry(state, known, p, place.key) for p in params]
                return torch.stack([torch.zeros(()) if c is None else c.detach().cpu() for c in counts]).to(self.device, torch.int64)
            return self._entry(state, known, params[place.i], place.key)

        old = tree.map_leaves(fetch, self.places)
        updates, new = self.tx.update(self._tree([p.grad for p in params]), old, self._tree([p.detach() for p in params]))
        sums = [(params[i], u) for i, u in zip(self.order, tree.flatten(updates)[0], strict=True) if u is not None]
        copies = []
        for place, value in zip(tree.flatten(self.places)[0], tree.flatten(new)[0], strict=True):
            if place is not None and (place.kind == "joint" or (place.kind == "slot" and has_grad[place.i])):
                copies.append((self._entry(state, known, params[place.i], place.key), value))
        counted = {place.key for place in self.flat if place.kind == "count"} | {"step"}
        for p, moved in zip(params, has_grad, strict=True):
            if moved:
                sums += [(c, torch.ones_like(c)) for c in (self._entry(state, known, p, key) for key in counted)]
        return fresh, sums, copies

    @staticmethod
    def _entry(state: dict[Tensor, dict[str, Any]], fresh: dict[tuple[int, str], Tensor], p: Tensor, key: str) -> Any:
        found = fresh.get((id(p), key))
        return found if found is not None else (state[p].get(key) if p in state else None)

    def _missing(self, state: dict[Tensor, dict[str, Any]], params: list[Tensor], has_grad: list[bool]) -> list[tuple[Tensor, str, Tensor]]:
        """First values for parameters that have a gradient and no state yet, and for shared values that nobody has."""
        absent = [place for place in self.flat if place.kind != "count" and (place.kind == "joint" or has_grad[place.i]) and place.key not in state.get(params[place.i], {})]
        started = [bool(state.get(p)) for p in params]
        entries: list[tuple[Tensor, str, Tensor]] = []
        if absent:
            joint = any(place.kind == "joint" for place in absent)
            wanted = {place.i for place in absent}
            first = tree.state_dict(self.tx.init(self._tree([p.detach() if joint or i in wanted else None for i, p in enumerate(params)])))
            entries += [(params[place.i], place.key, first[place.path]) for place in absent]
        dtype = torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32
        for key in {place.key for place in self.flat if place.kind == "count"} | {"step"}:
            for p, moved, before in zip(params, has_grad, started, strict=True):
                if moved and key not in state.get(p, {}):
                    # A checkpoint of torch's SGD has no step: if there is state, this is not the first one.
                    entries.append((p, key, torch.tensor(int(before), dtype=dtype if key == "step" else torch.int64)))
        return entries


def _layout(groups: list[dict[str, Any]]) -> list[Any]:
    return [([id(p) for p in group["params"]], group.get("param_names")) for group in groups]
