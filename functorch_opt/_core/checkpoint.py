"""Checkpoints: a state as a flat dict of tensors, and back.

A checkpoint can still be read if the chain has changed in the meantime.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functorch_opt._core.structure import (
    Path,
    PyTree,
    flatten,
    flatten_tensors,
    paths,
    shorten,
    unflatten,
    unique_paths,
)

__all__ = ["load_state_dict", "state_dict"]


def state_dict(state: PyTree) -> dict[Path, Tensor]:
    """A state (or any tree) as a flat dict from path to tensor.

    ``torch.save`` and ``torch.load`` write and read such a dict with their default arguments.

    Args:
        state: what ``tx.init`` or ``tx.update`` returned.

    Returns:
        ``{path: tensor}``. The tensors are those of `state`, not copies; ``None`` leaves are left
        out.

    Raises:
        ValueError: two leaves have the same path (a dict key that contains ``/``).
        TypeError: a leaf is not a tensor or None.

    Example:
        >>> import torch, functorch_opt as fo
        >>> sorted(fo.state_dict(fo.adam(0.1).init({"w": torch.zeros(2)})))
        ['scale_by_adam/shared/count', 'scale_by_adam/slots/mu/w', 'scale_by_adam/slots/nu/w']
    """
    here, _ = flatten_tensors(state, "state")
    named = zip(unique_paths(state), here, strict=True)
    return {path: leaf for path, leaf in named if leaf is not None}


# ---- which saved value belongs where -------------------------------------------------------------


class Fit(NamedTuple):
    """Which saved value each name takes, and which names are left over on either side."""

    source: dict[Path, Path]
    """``{name here: name there}``."""
    missing: list[Path]
    unexpected: list[Path]

    @property
    def moved(self) -> dict[Path, Path]:
        return {here: there for here, there in self.source.items() if here != there}

    @property
    def exact(self) -> bool:
        return not (self.missing or self.unexpected or self.moved)

    def __str__(self) -> str:
        moved = [f"{there} as {here}" for here, there in self.moved.items()]
        left = {
            "missing": self.missing,
            "not expected": self.unexpected,
            "under another name": moved,
        }
        listed = "; ".join(
            f"{what} {shorten(names, 20)}" for what, names in left.items() if names
        )
        return f"This state dict does not fit exactly: {listed}."


LEFT_OVER = "What is missing starts afresh, and the rest is left out."


def fit(here: Iterable[Path], there: Iterable[Path]) -> Fit:
    """Match the names here with the names there.

    Equal names belong together. Two of the other names belong together if one is the end of the
    other, and neither of them fits a third name in this way. So the state of ``adam(...)`` is found
    again in that of ``chain(clip(...), adam(...))``, where it is called ``adam/...``.
    """
    here = list(dict.fromkeys(here))
    there = list(dict.fromkeys(there))
    known, given = set(here), set(there)
    source = {name: name for name in here if name in given}
    missing = [name for name in here if name not in given]
    unexpected = [name for name in there if name not in known]
    source |= _by_their_ends(missing, unexpected)
    taken = set(source.values())
    return Fit(
        source,
        [name for name in missing if name not in source],
        [name for name in unexpected if name not in taken],
    )


def _by_their_ends(missing: list[Path], unexpected: list[Path]) -> dict[Path, Path]:
    """``{name here: name there}`` for the pairs in which one name is the end of the other."""
    ends: dict[Path, list[Path]] = {}
    for name in missing:
        for end in _ends(name):
            ends.setdefault(end, []).append(name)
    names = (*missing, *unexpected)
    partners: dict[Path, list[Path]] = {name: [] for name in names}
    whole = set(missing)
    for name in unexpected:
        shorter = [end for end in _ends(name) if end in whole]
        for other in [*ends.get(name, ()), *shorter]:
            partners[name].append(other)
            partners[other].append(name)
    alone = {name for name in names if len(partners[name]) == 1}
    source = {name: partners[name][0] for name in missing if name in alone}
    return {name: other for name, other in source.items() if other in alone}


def _ends(name: Path) -> list[Path]:
    """``"a/b/c"`` -> ``["b/c", "c"]``."""
    names = name.split("/") if isinstance(name, str) else []  # a file may hold anything
    return ["/".join(names[i:]) for i in range(1, len(names))]


# ---- loading -------------------------------------------------------------------------------------


def load_state_dict(
    state: PyTree, saved: dict[Path, Tensor], *, strict: bool = True
) -> PyTree:
    """A state with the structure of `state` and the values of `saved`: the inverse of `state_dict`.

    Args:
        state: a state of the right structure, usually a fresh ``tx.init(params)``. It is left as
            it is.
        saved: what `state_dict` gave, from this process or from a file.
        strict: whether the paths must be the same. False is for a chain with a stage more or less.
            Then values with the same path are loaded; for a chain that was put into another one,
            those whose paths have the same end. The rest of `state` stays as it is, and a warning
            says what was left over.

    Returns:
        A new state. Floating and complex values keep the dtype in which they were saved. Whole
        numbers take the dtype of the tensor that they replace. All values go to the device of that
        tensor.

    Raises:
        KeyError: if strict, a path is missing in `saved`, or `saved` has one that `state` does not
            have.
        ValueError: a shape differs; a number that must be whole is not whole; a count is negative.
        TypeError: `saved` is not a dict of tensors; a tensor is of another kind than the one that
            it replaces (bool, whole, floating or complex).

    Example:
        >>> import torch, functorch_opt as fo
        >>> tx, params = fo.adam(0.1), {"w": torch.zeros(2)}
        >>> _, state = tx.update({"w": torch.ones(2)}, tx.init(params))
        >>> fo.get(fo.load_state_dict(tx.init(params), fo.state_dict(state)), "mu")
        {'w': tensor([0.1000, 0.1000])}
    """
    here, spec = flatten(state)
    if not isinstance(saved, Mapping):
        given = type(saved).__name__
        raise TypeError(
            f"a state dict is a dict from path to tensor, as state_dict gives; got {given}."
        )
    named = list(zip(paths(state), here, strict=True))
    wanted = {path: leaf for path, leaf in named if leaf is not None}
    found = fit(wanted, saved)
    if strict and not found.exact:
        raise KeyError(
            f"{found} Load it into the state of the same transformation and params "
            "that it was saved from, or with strict=False."
        )
    new = {path: wanted[path].clone() for path in found.missing}
    for path, there in found.source.items():
        new[path] = _loaded(saved[there], wanted[path], there)
    if found.missing or found.unexpected:
        warnings.warn(f"{found} {LEFT_OVER}", stacklevel=2)
    leaves = [None if leaf is None else new[path] for path, leaf in named]
    return unflatten(spec, leaves)


def _loaded(value: Any, leaf: Tensor, name: Path) -> Tensor:
    """A copy of the saved `value` that can stand where `leaf` does."""
    if not isinstance(value, Tensor):
        given = f"{type(value).__name__} {value!r}"
        raise TypeError(
            f"{name!r} is {given} in the state dict; it must be a tensor, as state_dict gives."
        )
    if value.shape != leaf.shape:
        raise ValueError(
            f"{name!r} has shape {tuple(value.shape)} in the state dict and {tuple(leaf.shape)} "
            "here. Load it into the state of the params that it was saved with."
        )
    kinds = kind(value), kind(leaf)
    if kinds[0] != kinds[1] and kinds != ("floating", "whole"):
        raise TypeError(
            f"{name!r} is {value.dtype} in the state dict, and here it is {leaf.dtype}, "
            "which cannot be made of it. Is it the state of another transformation?"
        )
    if kinds[1] == "whole":
        value = _whole(value, leaf.dtype, name)
    return value.to(leaf.device, copy=True)


def kind(x: Tensor) -> str:
    """The kind of a dtype. Tensors may replace each other if their dtypes are of the same kind."""
    if x.is_floating_point():
        return "floating"
    if x.is_complex():
        return "complex"
    return "bool" if x.dtype is torch.bool else "whole"


def _whole(value: Tensor, dtype: torch.dtype, name: Path) -> Tensor:
    """`value` as whole numbers of this dtype, which must be exactly the same numbers."""
    numbers = value.to(dtype)
    if value.is_meta:
        return numbers
    again = numbers.to(value.dtype)
    if not bool((again == value).all()):
        raise ValueError(
            f"{name!r} must hold whole numbers that {dtype} can hold; "
            f"the state dict has {value.tolist()}."
        )
    is_count = name.rpartition("/")[2] == "count"
    if is_count and bool((numbers < 0).any()):
        raise ValueError(
            f"{name!r} must be 0 or greater: it counts the steps that were made; "
            f"the state dict has {value.tolist()}."
        )
    return numbers
