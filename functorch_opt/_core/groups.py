"""A part of the tree, and every part by its label: `masked` and `partition`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from functorch_opt import tree
from functorch_opt._core.leaf import _PARTS, part_of_tree
from functorch_opt._core.transformation import GradientTransformation, identity, transformation
from functorch_opt.tree import Path, PyTree

__all__ = ["masked", "partition"]

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
            raise TypeError(
                f"{label!r} must be a transformation, e.g. scale_by_adam(); got {type(tx).__name__} {tx!r}."
            )

    def assign(updates: PyTree, params: PyTree | None) -> tuple[list[Path], list[Any], list[Any]]:
        """The path, parameter and label of every leaf. Decided by the params where they are given: so it is the same at every step."""
        us, spec = tree.flatten_tensors(updates, "updates")
        paths = tree.paths(updates)
        ps = (
            us if params is None else tree.match(updates, spec, params, names=("updates", "params"))
        )
        if not callable(labels):
            given = _labels_of(labels, updates, name)
            return (
                paths,
                ps,
                [
                    _NO_LEAF if params is not None and p is None else read(label)
                    for label, p in zip(given, ps, strict=True)
                ],
            )
        if params is None and any(leaf is None for leaf in ps):
            missing = next(path for path, leaf in zip(paths, ps, strict=True) if leaf is None)
            raise ValueError(
                f"{name} is a function of path and leaf, but the gradient at {missing!r} is None: call update(updates, state, params)."
            )
        return (
            paths,
            ps,
            [
                _NO_LEAF if p is None else read(labels(path, p))
                for path, p in zip(paths, ps, strict=True)
            ],
        )

    def check(paths: list[Path], assigned: list[Any]) -> None:
        known = list(transforms)
        unknown = {
            repr(label): path
            for path, label in zip(paths, assigned, strict=True)
            if label is not _NO_LEAF and label not in known
        }
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
        number = {path: i for i, path in enumerate(paths)}
        state = {}
        for label, part in parts.items():
            if part:
                with part_of_tree([number[path] for path in tree.paths(part)]):
                    state[label] = transforms[label].init(part)
        return state

    def update(
        updates: PyTree, state: dict[str, PyTree], params: PyTree | None, **extra: Any
    ) -> tuple[PyTree, dict[str, PyTree]]:
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
                raise ValueError(
                    f"this state has no part for {label!r}; it has {held}. Use what its own init or update returned."
                )
            part_params = None if params is None else _part(paths, ps, assigned, label)
            mine = {e: extra[e] for e in tx.extra_args if e in extra}
            with part_of_tree([number[path] for path in tree.paths(part)]):
                part, new_state[label] = tx.update(part, state[label], part_params, **mine)
            changed.update(part)
        if otherwise == "zero":
            us = [None if u is None else torch.zeros_like(u) for u in us]
        return tree.unflatten(
            spec, [changed.get(path, u) for path, u in zip(paths, us, strict=True)]
        ), new_state

    declared: dict[str, bool] = {}
    for tx in transforms.values():
        declared |= {e: required or declared.get(e, False) for e, required in tx.extra_args.items()}

    def rebuilt(
        f: Callable[[GradientTransformation], GradientTransformation],
    ) -> GradientTransformation:
        rest = {"rest": f(identity())} if otherwise == "pass" else {}
        return _by_group(
            {**{label: f(tx) for label, tx in transforms.items()}, **rest},
            labels,
            name,
            otherwise,
            read,
        )

    groups = GradientTransformation(init, update, extra_args=declared)
    groups.last, groups.rebuilt = any(tx.last for tx in transforms.values()), rebuilt
    return groups


def _labels_of(labels: PyTree, updates: PyTree, name: str) -> list[Any]:
    """For every leaf of `updates` the label at or above it.

    Inside of another group `updates` is a flat dict from path to leaf, where a tree of labels may
    still be that of the whole params: there the label is found by the path.
    """
    try:
        return tree.broadcast(labels, updates, names=(name, "params"))
    except ValueError:
        found = _labels_by_path(labels, tree.paths(updates)) if _PARTS.stack else None
        if found is None:
            raise
        return found


def _labels_by_path(labels: PyTree, paths: list[Path]) -> list[Any] | None:
    """For every path the label that `labels` has there or above; None if one of them has none."""
    known = dict(zip(tree.unique_paths(labels), tree.flatten(labels)[0], strict=True))
    places = [
        next((place for place in _at_or_above(path) if place in known), None) for path in paths
    ]
    return None if None in places else [known[place] for place in places if place is not None]


def _at_or_above(path: Path) -> list[Path]:
    """``"a/b/c"`` -> ``["a/b/c", "a/b", "a"]``."""
    parts = path.split("/")
    return ["/".join(parts[:i]) for i in range(len(parts), 0, -1)]


def _part(paths: list[Path], leaves: list[Any], assigned: list[Any], label: Any) -> dict[Path, Any]:
    return {
        path: leaf
        for path, leaf, mine in zip(paths, leaves, assigned, strict=True)
        if mine == label
    }


@transformation
def masked(
    inner: GradientTransformation, mask: MaskOrFn, otherwise: Literal["pass", "zero"] = "pass"
) -> GradientTransformation:
    """Apply `inner` to the chosen leaves only.

    `inner` sees them as a flat dict from path to leaf, and its state has no entry for the others.

    Args:
        inner: the transformation.
        mask: a tree of bools of the structure of the params (a bool may stand for all that is below it), or a function of path
            (``"encoder/0/weight"``) and leaf. Inside of `partition` or another `masked` it may be the tree of all params.
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
            raise TypeError(
                f"a mask must hold True and False; got {type(value).__name__} {value!r}."
            )
        return "inner" if value else "rest"

    if not callable(mask):
        tree.map_leaves(label, mask)  # what is no bool is an error now, not at the first use
    return _by_group({"inner": inner}, mask, "mask", otherwise, label)


@transformation
def partition(
    transforms: Mapping[str, GradientTransformation], param_labels: LabelsOrFn
) -> GradientTransformation:
    """Apply to each leaf the transformation of its label.

    Each transformation sees its leaves as a flat dict from path to leaf, so a norm is that of the group, and no state has holes.

    Args:
        transforms: ``{label: transformation}``.
        param_labels: a tree of labels of the structure of the params (one label may stand for all that is below it), or a function of
            path and leaf that returns one. Inside of `masked` or another `partition` it may be the tree of all params.

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
        raise TypeError(
            f"transforms must be a dict from label to transformation; got {type(transforms).__name__} {transforms!r}."
        )
    return _by_group(dict(transforms), param_labels, "labels", "error")
