"""Transformations for parts of a tree: for one part, `masked`, and for each label, `partition`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from functorch_opt import tree
from functorch_opt._core import structure
from functorch_opt._core.leaf import is_part, part_of_tree
from functorch_opt._core.rule import identity
from functorch_opt._core.structure import Path
from functorch_opt._core.transformation import GradientTransformation, transformation
from functorch_opt.tree import PyTree

__all__ = ["MaskOrFn", "masked", "partition"]

MaskOrFn = PyTree | Callable[[Path, Tensor], bool]
"""Which parameters: a tree of bools like the params or above them, or a function of path and leaf."""
LabelsOrFn = PyTree | Callable[[Path, Tensor], str]


_NO_LEAF = object()
"""The label of a parameter that is None."""
Otherwise = Literal["pass", "zero", "error"]


class Groups(GradientTransformation):
    """A transformation for the leaves of each label.

    Each transformation sees its leaves as a flat dict from path to leaf, which is a tree without
    holes. The updates of leaves whose label has no transformation pass, become zero, or are an
    error.

    Args:
        inside: ``{label: transformation}``.
        labels: a tree of labels, or a function of path and leaf.
        what: the name that errors give to the labels.
        otherwise: what becomes of the updates of leaves without a transformation.
        read: a function that makes a label of a leaf of `labels`.
    """

    def __init__(
        self,
        inside: Mapping[str, GradientTransformation],
        labels: LabelsOrFn | MaskOrFn,
        what: str,
        otherwise: Otherwise,
        read: Callable[[Any], Any] = lambda label: label,
    ) -> None:
        for label, tx in inside.items():
            if not isinstance(tx, GradientTransformation):
                raise TypeError(
                    f"{label!r} must be a transformation, e.g. scale_by_adam(); "
                    f"got {type(tx).__name__} {tx!r}."
                )
        self.inside, self.labels, self.what = dict(inside), labels, what
        self.otherwise = otherwise
        self.read = read
        self.name, self.last = "groups", any(tx.last for tx in inside.values())
        self.extra_args = joined_arguments(inside.values())

    def rebuilt(
        self, f: Callable[[GradientTransformation], GradientTransformation]
    ) -> Groups:
        """The same groups with `f` applied to what is inside, also for the leaves that pass."""
        rest = {"rest": f(identity())} if self.otherwise == "pass" else {}
        inside = {label: f(tx) for label, tx in self.inside.items()} | rest
        return Groups(inside, self.labels, self.what, self.otherwise, self.read)

    def assigned(
        self, updates: PyTree, paths: list[Path], ps: list[Any], known: bool
    ) -> list[Any]:
        """The label of every leaf.

        If the params are `known` they are `ps`, and decide; so a label is the same at every step.
        Otherwise `ps` are the updates.
        """
        if callable(self.labels):
            if not known and None in ps:
                missing = paths[ps.index(None)]
                raise ValueError(
                    f"{self.what} is a function of path and leaf, but the gradient at {missing!r} "
                    "is None: call update(updates, state, params)."
                )
            check_takes_path_and_leaf(self.what, self.labels)
            found = [
                None if p is None else self.labels(q, p)
                for q, p in zip(paths, ps, strict=True)
            ]
        else:
            found = labels_of(self.labels, updates, paths, self.what)
        absent = [p is None and (known or callable(self.labels)) for p in ps]
        labels = [
            _NO_LEAF if gone else self.read(label)
            for label, gone in zip(found, absent, strict=True)
        ]
        self._check(paths, labels)
        return labels

    def _check(self, paths: list[Path], labels: list[Any]) -> None:
        known = [*self.inside, _NO_LEAF]
        pairs = zip(labels, paths, strict=True)
        unknown = {repr(x): path for x, path in pairs if x not in known}
        if unknown and self.otherwise == "error":
            given = ", ".join(f"{label} (at {path!r})" for label, path in unknown.items())
            raise ValueError(
                f"{self.what} gives {given}; the transformations are for {[*self.inside]}. "
                "Add a transformation or mend the label."
            )

    def part_of_state(self, state: Any, label: str) -> PyTree:
        """The state of one label."""
        if not isinstance(state, dict) or label not in state:
            held = list(state) if isinstance(state, dict) else type(state).__name__
            raise ValueError(
                f"this state has no part for {label!r}; it has {held}. "
                "Use what its own init or update returned."
            )
        return state[label]

    def _init(self, params: PyTree) -> dict[str, PyTree]:
        structure.unique_paths(params)
        leaves = structure.flatten_tensors(params, "params")[0]
        paths = tree.paths(params)
        labels = self.assigned(params, paths, leaves, True)
        state = {}
        for label, tx in self.inside.items():
            part = _part(paths, leaves, labels, label)
            if part:
                with part_of_tree(_numbers(paths, part)):
                    state[label] = tx.init(part)
        return state

    def _update(
        self,
        updates: PyTree,
        state: dict[str, PyTree],
        params: PyTree | None,
        **extra: Any,
    ) -> tuple[PyTree, dict[str, PyTree]]:
        us, spec = structure.flatten_tensors(updates, "updates")
        paths, known = tree.paths(updates), params is not None
        names = ("updates", "params")
        ps = structure.match(updates, spec, params, names=names) if known else us
        labels = self.assigned(updates, paths, ps, known)
        new_state, changed = {}, {}
        for label, tx in self.inside.items():
            part = _part(paths, us, labels, label)
            if part:
                part_params = _part(paths, ps, labels, label) if known else None
                part_state = self.part_of_state(state, label)
                mine = {name: extra[name] for name in tx.extra_args if name in extra}
                with part_of_tree(_numbers(paths, part)):
                    part, new_state[label] = tx.update(
                        part, part_state, part_params, **mine
                    )
                changed.update(part)
        if self.otherwise == "zero":
            us = [None if u is None else torch.zeros_like(u) for u in us]
        pairs = zip(paths, us, strict=True)
        merged = [changed.get(path, u) for path, u in pairs]
        return tree.unflatten(spec, merged), new_state


def check_takes_path_and_leaf(what: str, f: Any) -> None:
    """Raise TypeError for a function of fewer than two arguments: optax gives it the whole tree."""
    code = getattr(f, "__code__", None)
    if code is None or code.co_flags & 0x04 or code.co_argcount >= 2:
        return
    raise TypeError(
        f"{what} must be a function of path and leaf, called for every leaf, "
        f"e.g. lambda path, p: p.ndim > 1; got {f.__qualname__} of "
        f"{code.co_argcount} argument(s). If it makes a tree of the whole params, as in optax, "
        "give that tree itself."
    )


def joined_arguments(
    transformations: Iterable[GradientTransformation],
) -> dict[str, bool]:
    """The extra arguments that any of these reads. One is required if any of these requires it."""
    declared: dict[str, bool] = {}
    for tx in transformations:
        for name, required in tx.extra_args.items():
            declared[name] = required or declared.get(name, False)
    return declared


def labels_of(
    labels: PyTree,
    updates: PyTree,
    paths: list[Path],
    what: str,
) -> list[Any]:
    """For every leaf of `updates`, the label at or above it.

    Inside of another group, `updates` is a flat dict from path to leaf, but the tree of labels may
    still be that of all params. Then a label is found by its path.
    """
    try:
        return structure.broadcast(labels, updates, names=(what, "params"))
    except ValueError:
        found = _labels_by_path(labels, paths) if is_part() else None
        if found is None:
            raise
        return found


def _labels_by_path(labels: PyTree, paths: list[Path]) -> list[Any] | None:
    """For every path, the label that `labels` has at or above it; None if any path has no label."""
    known = dict(
        zip(structure.unique_paths(labels), tree.flatten(labels)[0], strict=True)
    )
    found = [
        [place for place in _at_or_above(path) if place in known][:1] for path in paths
    ]
    return [known[place] for (place,) in found] if all(found) else None


def _at_or_above(path: Path) -> list[Path]:
    """``"a/b/c"`` -> ``["a/b/c", "a/b", "a"]``."""
    parts = path.split("/")
    return ["/".join(parts[:i]) for i in range(len(parts), 0, -1)]


def _part(
    paths: list[Path], leaves: list[Any], labels: list[Any], label: Any
) -> dict[Path, Any]:
    rows = zip(paths, leaves, labels, strict=True)
    return {path: leaf for path, leaf, mine in rows if mine == label}


def _numbers(paths: list[Path], part: dict[Path, Any]) -> list[int]:
    """The indices that the leaves of a part have in the whole tree."""
    number = {path: i for i, path in enumerate(paths)}
    return [number[path] for path in tree.paths(part)]


@transformation
def masked(
    inner: GradientTransformation,
    mask: MaskOrFn,
    otherwise: Literal["pass", "zero"] = "pass",
) -> GradientTransformation:
    """Apply `inner` to the chosen leaves only.

    `inner` sees these leaves as a flat dict from path to leaf, and its state has no entries for the
    others.

    Args:
        inner: the transformation.
        mask: a tree of bools with the structure of the params, in which one bool may stand for all
            that is below it; or a function of path (``"encoder/0/weight"``) and leaf. Inside of
            `partition` or another `masked`, the tree may still be that of all params.
        otherwise: what becomes of the updates of the other leaves. With ``"pass"`` they go through
            **as they came in**; at the start of a chain that is the raw gradient, which
            `apply_updates` would add. With ``"zero"`` these parameters are frozen.

    Raises:
        ValueError: the mask does not fit the params.
        TypeError: the mask holds something other than True and False.

    Example:
        >>> import torch, functorch_opt as fo
        >>> tx = fo.masked(fo.scale(10.0), lambda path, p: p.ndim > 0)
        >>> params = {"w": torch.ones(2), "b": torch.tensor(1.0)}
        >>> tx.update(params, tx.init(params))[0]
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
        # What is not a bool is an error now, and not only at the first use.
        structure.map_leaves(label, mask)
    return Groups({"inner": inner}, mask, "mask", otherwise, label)


@transformation
def partition(
    transforms: Mapping[str, GradientTransformation], param_labels: LabelsOrFn
) -> GradientTransformation:
    """Apply to each leaf the transformation of its label.

    Each transformation sees its leaves as a flat dict from path to leaf. So a norm is that of the
    group, and no state has holes.

    Args:
        transforms: ``{label: transformation}``.
        param_labels: a tree of labels with the structure of the params, in which one label may
            stand for all that is below it; or a function of path and leaf that returns a label.
            Inside of `masked` or another `partition`, the tree may still be that of all params.

    Returns:
        A transformation whose state is ``{label: state}``.

    Raises:
        ValueError: a label has no entry in `transforms` (the message shows both sides); the labels
            do not fit the params.

    Example:
        >>> import torch, functorch_opt as fo
        >>> transforms = {"fast": fo.sgd(1.0), "slow": fo.sgd(0.1)}
        >>> tx = fo.partition(transforms, {"w": "fast", "b": "slow"})
        >>> params = {"w": torch.zeros(1), "b": torch.zeros(1)}
        >>> tx.update({"w": torch.ones(1), "b": torch.ones(1)}, tx.init(params))[0]
        {'w': tensor([-1.]), 'b': tensor([-0.1000])}
    """
    if not isinstance(transforms, Mapping):
        raise TypeError(
            "transforms must be a dict from label to transformation; "
            f"got {type(transforms).__name__} {transforms!r}."
        )
    return Groups(transforms, param_labels, "labels", "error")
