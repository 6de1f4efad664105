"""Checkpoints: a state as a flat dict of tensors, and back, also where the chain has changed in between."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import NamedTuple

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
    """A state (or any tree) as a flat dict from path to tensor, which ``torch.save`` writes and ``torch.load`` reads by default.

    Args:
        state: what ``tx.init`` or ``tx.update`` returned.

    Returns:
        ``{path: tensor}``. The tensors are those of `state`, not copies; ``None`` leaves are left out.

    Raises:
        ValueError: two leaves have the same path (a dict key that contains ``/``).
        TypeError: a leaf is not a tensor or None.

    Example:
        >>> import torch, functorch_opt as fo
        >>> sorted(fo.state_dict(fo.adam(0.1).init({"w": torch.zeros(2)})))
        ['scale_by_adam/shared/count', 'scale_by_adam/slots/mu/w', 'scale_by_adam/slots/nu/w']
    """
    here, _ = flatten_tensors(state, "state")
    return {
        path: leaf for path, leaf in zip(unique_paths(state), here, strict=True) if leaf is not None
    }


class Fit(NamedTuple):
    """Which saved value each name takes, and what is left over on either side."""

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
        listed = "; ".join(f"{what} {shorten(names, 20)}" for what, names in left.items() if names)
        return f"This state dict does not fit exactly: {listed}."


LEFT_OVER = "What is missing starts afresh, and the rest is left out."


def fit(here: Iterable[Path], there: Iterable[Path]) -> Fit:
    """Match names: equal ones, and then those of which one is the end of the other, if neither is the end of, or has, another partner.

    So the state of ``adam(...)`` is found again as that of ``chain(clip(...), adam(...))``, where it is called ``adam/...``.
    """
    here, there = list(dict.fromkeys(here)), list(dict.fromkeys(there))
    known, given = set(here), set(there)
    source = {name: name for name in here if name in given}
    missing, unexpected = (
        [name for name in here if name not in given],
        [name for name in there if name not in known],
    )
    partners: dict[Path, list[Path]] = {}
    ends: dict[Path, list[Path]] = {}
    for name in missing:
        for end in _ends(name):
            ends.setdefault(end, []).append(name)
    whole = set(missing)
    for name in unexpected:
        for other in [*ends.get(name, ()), *(end for end in _ends(name) if end in whole)]:
            partners.setdefault(name, []).append(other)
            partners.setdefault(other, []).append(name)
    source |= {
        name: partners[name][0]
        for name in missing
        if len(partners.get(name, ())) == 1 == len(partners[partners[name][0]])
    }
    taken = set(source.values())
    return Fit(
        source,
        [name for name in missing if name not in source],
        [name for name in unexpected if name not in taken],
    )


def _ends(name: Path) -> list[Path]:
    """``"a/b/c"`` -> ``["b/c", "c"]``."""
    names = name.split("/") if isinstance(name, str) else []  # a file may hold anything
    return ["/".join(names[i:]) for i in range(1, len(names))]


def load_state_dict(state: PyTree, saved: dict[Path, Tensor], *, strict: bool = True) -> PyTree:
    """A state of the structure of `state` with the values of `saved`; the inverse of `state_dict`.

    Args:
        state: a state of the right structure, usually a fresh ``tx.init(params)``. It is left as it is.
        saved: what `state_dict` gave, from this process or from a file.
        strict: whether the paths must be the same. False, for a chain with a stage more or less: load what has the same path (or, for a
            chain that was put into another, the same end of it), leave the rest of `state` as it is, and warn of what was left over.

    Returns:
        A new state. Values keep the dtype they were saved in and go to the device of the tensor they replace.

    Raises:
        KeyError: if strict, a path is missing in `saved`, or `saved` has one that `state` has not.
        ValueError: a shape differs.
        TypeError: `saved` is not a dict of tensors.

    Example:
        >>> import torch, functorch_opt as fo
        >>> tx, params = fo.adam(0.1), {"w": torch.zeros(2)}
        >>> _, state = tx.update({"w": torch.ones(2)}, tx.init(params))
        >>> fo.get(fo.load_state_dict(tx.init(params), fo.state_dict(state)), "mu")
        {'w': tensor([0.1000, 0.1000])}
    """
    here, spec = flatten(state)
    if not isinstance(saved, Mapping):
        raise TypeError(
            f"a state dict is a dict from path to tensor, as state_dict gives; got {type(saved).__name__}."
        )
    wanted = {path: leaf for path, leaf in zip(paths(state), here, strict=True) if leaf is not None}
    found = fit(wanted, saved)
    if strict and not found.exact:
        raise KeyError(
            f"{found} Load it into the state of the same transformation and params that it was saved from, or with strict=False."
        )
    new = {path: wanted[path].clone() for path in found.missing}
    for path, there in found.source.items():
        value, leaf = saved[there], wanted[path]
        if not isinstance(value, Tensor):
            given = f"{type(value).__name__} {value!r}"
            raise TypeError(
                f"{there!r} is {given} in the state dict; it must be a tensor, as state_dict gives."
            )
        if value.shape != leaf.shape:
            raise ValueError(
                f"{there!r} has shape {tuple(value.shape)} in the state dict and {tuple(leaf.shape)} here. "
                "Load it into the state of the params that it was saved with."
            )
        new[path] = value.to(leaf.device, copy=True)
    if found.missing or found.unexpected:
        warnings.warn(f"{found} {LEFT_OVER}", stacklevel=2)
    return unflatten(
        spec,
        [
            None if leaf is None else new[path]
            for path, leaf in zip(paths(state), here, strict=True)
        ],
    )
