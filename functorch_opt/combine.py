"""Transformations made of transformations: one after another, on a part of the tree, by group, with hyperparameters in the state."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from functorch_opt import tree
from functorch_opt.base import Expression, GradientTransformation, Scalar, ScalarOrSchedule, identity, transformation
from functorch_opt.leaf import part_of_tree
from functorch_opt.one_pass import update_in_one_pass
from functorch_opt.rule import Leafwise
from functorch_opt.tree import Path, PyTree

__all__ = ["chain", "inject_hyperparams", "masked", "partition"]


# ---- one after another -----------------------------------------------------------------------------------------------


class Chain(GradientTransformation):
    """What `chain` makes; ``stages`` maps the name of each stage to its transformation, in order."""

    def __init__(self, stages: tuple[GradientTransformation, ...]) -> None:
        self.name = "chain"
        self.stages: dict[str, GradientTransformation] = {}
        self.extra_args: dict[str, bool] = {}
        for i, stage in enumerate(stages):
            if not isinstance(stage, GradientTransformation):
                raise TypeError(
                    f"stage {i} of a chain must be a transformation, e.g. scale_by_adam(); got {type(stage).__name__} {stage!r}."
                )
            name, n = stage.name, 0
            while name in self.stages:
                n += 1
                name = f"{stage.name}_{n}"
            self.stages[name] = stage
            for extra, required in stage.extra_args.items():
                self.extra_args[extra] = required or self.extra_args.get(extra, False)
            if self.last and not stage.last:
                looking = next(before.name for before in stages if before.last)
                raise ValueError(
                    f"{looking} looks at the new parameters, so it must come last in the chain; {stage.name} after it would change them."
                )
            self.last = stage.last
        self.passes = self._passes()

    def _init(self, params: PyTree) -> dict[str, PyTree]:
        return {name: stage.init(params) for name, stage in self.stages.items()}

    def check_state(self, state: Any) -> None:
        if not isinstance(state, dict) or state.keys() != self.stages.keys():
            held = list(state) if isinstance(state, dict) else type(state).__name__
            raise ValueError(
                f"this is not a state of this chain: its stages are {list(self.stages)}, the state is of {held}. "
                "Use what its own init or update returned."
            )

    def _update(self, updates: PyTree, state: dict[str, PyTree], params: PyTree | None, **extra: Any) -> tuple[PyTree, dict[str, PyTree]]:
        self.check_state(state)
        new: dict[str, PyTree] = {}
        for names in self.passes:
            stages: list[Any] = [self.stages[name] for name in names]
            if len(stages) > 1:
                updates, states = update_in_one_pass(stages, updates, [state[name] for name in names], params, extra)
                new |= dict(zip(names, states, strict=True))
            else:
                mine = {e: extra[e] for e in stages[0].extra_args if e in extra}
                updates, new[names[0]] = stages[0].update(updates, state[names[0]], params, **mine)
        return updates, new

    def _passes(self) -> list[list[str]]:
        """Stages that are worked out together, leaf by leaf: consecutive rules, of which only the first may look at the whole tree."""
        passes: list[list[str]] = []
        goes_on = False
        for name, stage in self.stages.items():
            if goes_on and isinstance(stage, Leafwise) and "updates" not in stage.prepare_reads:
                passes[-1].append(name)
            else:
                passes.append([name])
            goes_on = isinstance(stage, Leafwise)
        return passes


@transformation
def chain(*stages: GradientTransformation) -> Chain:
    """Apply `stages` one after another: each takes the updates of the one before it.

    The state is a dict, keyed by the name of the stage (a repeated name gets ``_1``, ``_2``, ...). Extra arguments of ``update`` reach
    just the stages that declare them.

    Args:
        *stages: transformations, chains among them.

    Raises:
        TypeError: a stage that is not a transformation.
        ValueError: a stage after one that looks at the new parameters, e.g. `params_ema`.

    Example:
        >>> import torch, functorch_opt as fo
        >>> tx = fo.chain(fo.clip_by_global_norm(1.0), fo.scale_by_adam(), fo.scale_by_learning_rate(0.1))
        >>> list(tx.init({"w": torch.zeros(3)}))
        ['clip_by_global_norm', 'scale_by_adam', 'scale_by_learning_rate']
    """
    return Chain(stages)


# ---- a part of the tree ----------------------------------------------------------------------------------------------

MaskOrFn = PyTree | Callable[[Path, Tensor], bool]
LabelsOrFn = PyTree | Callable[[Path, Tensor], str]


_NO_LEAF = object()
"""The label of a parameter that is None."""


def _by_group(
    transforms: Mapping[str, GradientTransformation],
    labels: LabelsOrFn | MaskOrFn,
    name: str,
    otherwise: Literal["pass", "zero", "error"],
    read: Callable[[Any], Any] = lambda label: label,
) -> GradientTransformation:
    """Give each label's leaves to its transformation as a flat dict from path to leaf: a tree without holes.

    Leaves with a label that is not in `transforms` pass, become zero, or are an error. `read` makes a label of what `labels` has.
    """

    for label, tx in transforms.items():
        if not isinstance(tx, GradientTransformation):
            raise TypeError(f"{label!r} must be a transformation, e.g. scale_by_adam(); got {type(tx).__name__} {tx!r}.")

    def assign(updates: PyTree, params: PyTree | None) -> tuple[list[Path], list[Any], list[Any]]:
        """The path, parameter and label of every leaf. Decided by the params where they are given: so it is the same at every step."""
        us, spec = tree.flatten_tensors(updates, "updates")
        paths = tree.paths(updates)
        ps = us if params is None else tree.match(updates, spec, params, names=("updates", "params"))
        if not callable(labels):
            given = tree.broadcast(labels, updates, names=(name, "params"))
            return paths, ps, [_NO_LEAF if params is not None and p is None else read(label) for label, p in zip(given, ps, strict=True)]
        if params is None and any(leaf is None for leaf in ps):
            missing = next(path for path, leaf in zip(paths, ps, strict=True) if leaf is None)
            raise ValueError(
                f"{name} is a function of path and leaf, but the gradient at {missing!r} is None: call update(updates, state, params)."
            )
        return paths, ps, [_NO_LEAF if p is None else read(labels(path, p)) for path, p in zip(paths, ps, strict=True)]

    def check(paths: list[Path], assigned: list[Any]) -> None:
        known = list(transforms)
        unknown = {repr(label): path for path, label in zip(paths, assigned, strict=True) if label is not _NO_LEAF and label not in known}
        if unknown and otherwise == "error":
            raise ValueError(
                f"{name} gives {', '.join(f'{label} (at {path!r})' for label, path in unknown.items())}; "
                f"the transformations are for {known}. Add a transformation or mend the label."
            )

    def init(params: PyTree) -> dict[str, PyTree]:
        tree.unique_paths(params)
        paths, leaves, assigned = assign(params, params)
        check(paths, assigned)
        parts = {label: _part(paths, leaves, assigned, label) for label in transforms}
        return {label: transforms[label].init(part) for label, part in parts.items() if part}

    def update(updates: PyTree, state: dict[str, PyTree], params: PyTree | None, **extra: Any) -> tuple[PyTree, dict[str, PyTree]]:
        paths, ps, assigned = assign(updates, params)
        check(paths, assigned)
        us, spec = tree.flatten(updates)
        number = {path: i for i, path in enumerate(paths)}
        new_state, changed = {}, {}
        for label, tx in transforms.items():
            part = _part(paths, us, assigned, label)
            if not part:
                continue
            if not isinstance(state, dict) or label not in state:
                held = list(state) if isinstance(state, dict) else type(state).__name__
                raise ValueError(f"this state has no part for {label!r}; it has {held}. Use what its own init or update returned.")
            part_params = None if params is None else _part(paths, ps, assigned, label)
            mine = {e: extra[e] for e in tx.extra_args if e in extra}
            with part_of_tree([number[path] for path in tree.paths(part)]):
                part, new_state[label] = tx.update(part, state[label], part_params, **mine)
            changed.update(part)
        if otherwise == "zero":
            us = [None if u is None else torch.zeros_like(u) for u in us]
        return tree.unflatten(spec, [changed.get(path, u) for path, u in zip(paths, us, strict=True)]), new_state

    declared: dict[str, bool] = {}
    for tx in transforms.values():
        declared |= {e: required or declared.get(e, False) for e, required in tx.extra_args.items()}

    def rebuilt(f: Callable[[GradientTransformation], GradientTransformation]) -> GradientTransformation:
        rest = {"rest": f(identity())} if otherwise == "pass" else {}
        return _by_group({**{label: f(tx) for label, tx in transforms.items()}, **rest}, labels, name, otherwise, read)

    groups = GradientTransformation(init, update, extra_args=declared)
    groups.last, groups.rebuilt = any(tx.last for tx in transforms.values()), rebuilt
    return groups


def _part(paths: list[Path], leaves: list[Any], assigned: list[Any], label: Any) -> dict[Path, Any]:
    return {path: leaf for path, leaf, mine in zip(paths, leaves, assigned, strict=True) if mine == label}


@transformation
def masked(inner: GradientTransformation, mask: MaskOrFn, otherwise: Literal["pass", "zero"] = "pass") -> GradientTransformation:
    """Apply `inner` to the chosen leaves only.

    `inner` sees them as a flat dict from path to leaf, and its state has no entry for the others.

    Args:
        inner: the transformation.
        mask: a tree of bools of the structure of the params (a bool may stand for all that is below it), or a function of path
            (``"encoder/0/weight"``) and leaf.
        otherwise: what becomes of the other leaves: ``"pass"``, the update goes through **as it came in** (at the start of a chain that is
            the raw gradient, which `apply_updates` would add); ``"zero"``, the parameter is frozen.

    Raises:
        ValueError: the mask does not fit the params.
        TypeError: the mask holds something other than True and False.

    Example:
        >>> import torch, functorch_opt as fo
        >>> tx = fo.masked(fo.scale(10.0), lambda path, p: p.ndim > 0)
        >>> tx.update({"w": torch.ones(2), "b": torch.tensor(1.0)}, {"inner": tx.init({"w": torch.ones(2)})["inner"]})[0]
        {'w': tensor([10., 10.]), 'b': tensor(1.)}
    """
    if otherwise not in ("pass", "zero"):
        raise ValueError(f"otherwise must be 'pass' or 'zero'; got {otherwise!r}.")

    def label(value: Any) -> str:
        if not isinstance(value, bool):
            raise TypeError(f"a mask must hold True and False; got {type(value).__name__} {value!r}.")
        return "inner" if value else "rest"

    if not callable(mask):
        tree.map_leaves(label, mask)  # what is no bool is an error now, not at the first use
    return _by_group({"inner": inner}, mask, "mask", otherwise, label)


@transformation
def partition(transforms: Mapping[str, GradientTransformation], param_labels: LabelsOrFn) -> GradientTransformation:
    """Apply to each leaf the transformation of its label.

    Each transformation sees its leaves as a flat dict from path to leaf, so a norm is that of the group, and no state has holes.

    Args:
        transforms: ``{label: transformation}``.
        param_labels: a tree of labels of the structure of the params (one label may stand for all that is below it), or a function of
            path and leaf that returns one.

    Returns:
        A transformation whose state is ``{label: state}``.

    Raises:
        ValueError: a label that `transforms` does not have (the message shows both sides); labels that do not fit the params.

    Example:
        >>> import torch, functorch_opt as fo
        >>> tx = fo.partition({"fast": fo.sgd(1.0), "slow": fo.sgd(0.1)}, {"w": "fast", "b": "slow"})
        >>> params = {"w": torch.zeros(1), "b": torch.zeros(1)}
        >>> tx.update({"w": torch.ones(1), "b": torch.ones(1)}, tx.init(params))[0]
        {'w': tensor([-1.]), 'b': tensor([-0.1000])}
    """
    if not isinstance(transforms, Mapping):
        raise TypeError(f"transforms must be a dict from label to transformation; got {type(transforms).__name__} {transforms!r}.")
    return _by_group(dict(transforms), param_labels, "labels", "error")


# ---- hyperparameters in the state ------------------------------------------------------------------------------------


class _Injected(Expression):
    """A factory whose transformations keep their hyperparameters in the state."""

    def __init__(self, factory: Callable[..., GradientTransformation], static_args: tuple[str, ...]) -> None:
        self.factory, self.static_args = factory, static_args
        self.call = (inject_hyperparams, (factory,), {"static_args": static_args} if static_args else {})

    def __call__(self, *args: Any, **kwargs: Any) -> GradientTransformation:
        numbers, fixed = hyperparameters(self.factory, args, kwargs, self.static_args)
        schedules = {name: value for name, value in numbers.items() if callable(value)}

        def init(params: PyTree) -> dict[str, PyTree]:
            device = tree.leaves(params)[0].device
            count = tree.zero_count(params)
            values = {name: value(count) if callable(value) else value for name, value in numbers.items()}
            values = {name: _as_tensor(value, device) for name, value in values.items()}
            counter = {"count": count} if schedules else {}
            return {"hyperparams": values, "inner": self.factory(**fixed, **values).init(params), **counter}

        def update(updates: PyTree, state: dict[str, PyTree], params: PyTree | None, **extra: Any) -> tuple[PyTree, dict[str, PyTree]]:
            expected = {"hyperparams", "inner", *(["count"] if schedules else [])}
            hyperparams = state["hyperparams"] if isinstance(state, dict) and state.keys() == expected else None
            if not isinstance(hyperparams, dict) or hyperparams.keys() != numbers.keys():
                held = list(state) if isinstance(state, dict) else type(state).__name__
                raise ValueError(
                    f"this is not a state of {tx!r}, which has {sorted(expected)} with the hyperparams {list(numbers)}: it holds {held}. "
                    "Use what its own init or update returned."
                )
            values, counter = dict(state["hyperparams"]), {}
            if schedules:
                count = state["count"]
                values |= {name: _as_tensor(schedule(count), count.device) for name, schedule in schedules.items()}
                counter = {"count": count + 1}
            updates, inner = self.factory(**fixed, **values).update(updates, state["inner"], params, **extra)
            return updates, {"hyperparams": values, "inner": inner, **counter}

        inner = self.factory(*args, **kwargs)
        if not isinstance(inner, GradientTransformation):
            raise TypeError(f"{self.factory.__name__} must return a transformation; it returned {type(inner).__name__} {inner!r}.")
        tx = GradientTransformation(init, update, extra_args=inner.extra_args)
        tx.last = inner.last
        tx.name, tx.call = self.factory.__name__, (self, args, kwargs)
        return tx


def _as_tensor(value: Any, device: torch.device) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach().clone() if value.is_leaf and not value.requires_grad else value.clone()
    return torch.tensor(float(value), dtype=tree.real_dtype(device), device=device)


def inject_hyperparams(
    inner_factory: Callable[..., GradientTransformation], static_args: tuple[str, ...] = ()
) -> Callable[..., GradientTransformation]:
    """Keep the hyperparameters of a factory in the state: to log them, set them between steps, vmap over them, differentiate them.

    ``inject_hyperparams(adamw)(learning_rate=0.1)`` is `adamw` with the state
    ``{"hyperparams": {"learning_rate": tensor, "b1": tensor, ...}, "inner": ...}``. What is a number (a float, a 0-dim tensor, or an
    argument annotated ``Scalar``) becomes a tensor, float64 where the device has it; a schedule is evaluated at every update and its value
    stored, so setting a scheduled one has no effect; everything else stays fixed. Changing a value does not recompile.

    Args:
        inner_factory: a function that returns a transformation.
        static_args: names of arguments to leave alone.

    Returns:
        A function of the arguments of `inner_factory`.

    Example:
        >>> import torch, functorch_opt as fo
        >>> tx = fo.inject_hyperparams(fo.sgd)(learning_rate=0.1)
        >>> tx
        inject_hyperparams(sgd)(learning_rate=0.1)
        >>> state = tx.init([torch.zeros(1)])
        >>> state["hyperparams"]["learning_rate"] = torch.tensor(0.5)
        >>> tx.update([torch.ones(1)], state)[0]
        [tensor([-0.5000])]
    """
    if not callable(inner_factory):
        raise TypeError(
            f"inject_hyperparams takes the function that makes a transformation; got {inner_factory!r}. "
            "Write inject_hyperparams(adamw)(learning_rate=0.1)."
        )
    known = list(inspect.signature(inner_factory).parameters)
    unknown = [name for name in static_args if name not in known]
    if isinstance(static_args, str) or unknown:
        raise TypeError(
            f"static_args must be a tuple of names among {known}, which are the arguments of {inner_factory.__name__}; got {static_args!r}."
        )
    return _Injected(inner_factory, static_args)


def hyperparameters(
    factory: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], static_args: tuple[str, ...] = ()
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments of a call of `factory`, defaults included, in two dicts: the hyperparameters (numbers and schedules), and the rest."""
    signature = inspect.signature(factory)
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        given = [*map(repr, args), *(f"{name}=" for name in kwargs)]
        raise TypeError(f"{factory.__name__}: {error}; got ({', '.join(given)}); its arguments are {list(signature.parameters)}.") from None
    bound.apply_defaults()
    numbers: dict[str, Any] = {}
    fixed: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        parameter = signature.parameters[name]
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.POSITIONAL_ONLY):
            raise TypeError(f"{factory.__name__} takes {parameter}; hyperparameters need names. Wrap it in a function that names them.")
        annotated = parameter.annotation in (Scalar, ScalarOrSchedule) or "Scalar" in str(parameter.annotation)
        number = isinstance(value, float | Tensor) or (
            annotated and (callable(value) or (isinstance(value, int) and not isinstance(value, bool)))
        )
        (numbers if number and name not in static_args else fixed)[name] = value
    return numbers, fixed
