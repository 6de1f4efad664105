"""The leaves that a stage sees: all of them, or those of one group."""

from __future__ import annotations

from contextlib import nullcontext
from functools import cached_property
from typing import Any

from functorch_opt import tree
from functorch_opt._core import structure
from functorch_opt._core.groups import Groups
from functorch_opt._core.leaf import part_of_tree
from functorch_opt.tree import PyTree

MOST_PARTS = 64


class View:
    """Some leaves of the whole tree, in the containers in which a stage sees them.

    Attributes:
        indices: which leaves of the whole tree they are.
        spec: the structure of the tree in which the stage sees them.
        is_root: whether that is the whole tree itself.
        form: of the state of a step for these params, if it has been found.
    """

    def __init__(self, spec: Any, indices: list[int], is_root: bool) -> None:
        self.spec, self.indices, self.is_root = spec, indices, is_root
        self.parts: dict[Any, dict[str | None, View]] = {}
        self.form: Any = None

    @cached_property
    def paths(self) -> list[str]:
        """The path of each leaf, which is the same in every view."""
        no_leaves = [None] * len(self.indices)
        return tree.paths(tree.unflatten(self.spec, no_leaves))

    def fitting(self, given: PyTree) -> list[Any] | None:
        """The leaves of `given`; None if its structure is another, or something in it is no tensor."""
        try:
            found = self.spec.flatten_up_to(given)
        except (ValueError, TypeError):
            return None
        return found if structure.are_tensors(found) else None

    def leaves(self, values: list[Any]) -> list[Any]:
        """Its entries of `values`, which has one for each leaf of the whole tree."""
        return values if self.is_root else [values[i] for i in self.indices]

    def tree(self, values: list[Any]) -> PyTree:
        """Its tree of `values`."""
        return tree.unflatten(self.spec, self.leaves(values))

    def column(self, ps: list[Any], given: PyTree, name: str) -> list[Any]:
        """The leaves of a tree that must have its structure."""
        try:
            found = self.spec.flatten_up_to(given)
        except (ValueError, TypeError):
            found = structure.match(
                self.tree(ps), self.spec, given, names=("params", name)
            )
        return found

    def write(self, values: list[Any], column: list[Any]) -> None:
        """Put its leaves back into `values`."""
        for i, x in zip(self.indices, column, strict=True):
            values[i] = x

    def of_groups(self, groups: Groups, ps: list[Any]) -> dict[str | None, View]:
        """The view of each label; None has the leaves that no transformation is for."""
        mine = self.leaves(ps)
        reference = None if callable(groups.labels) else self.tree(ps)
        with nullcontext() if self.is_root else part_of_tree(self.indices):
            labels = groups.assigned(reference, self.paths, mine, True)
        key = tuple(groups.inside), tuple(labels)
        if key not in self.parts:
            if len(self.parts) >= MOST_PARTS:
                self.parts.clear()
            self.parts[key] = self._divided(groups, labels)
        return self.parts[key]

    def _divided(self, groups: Groups, labels: list[Any]) -> dict[str | None, View]:
        views: dict[str | None, View] = {}
        rest = [k for k, label in enumerate(labels) if label not in groups.inside]
        rows = [*zip(self.paths, self.indices, labels, strict=True)]
        for label in groups.inside:
            mine = {path: i for path, i, of in rows if of == label}
            if mine:
                indices, spec = tree.flatten(mine)
                views[label] = View(spec, indices, False)
        if rest:
            indices = [self.indices[k] for k in rest]
            views[None] = View(None, indices, False)
        return views


def check_shapes(
    tx: Any,
    name: str,
    column: list[Any],
    ps: list[Any],
    paths: list[str],
) -> None:
    """Raise ValueError for a slot that has not the shape which its first value has."""
    for x, p, path in zip(column, ps, paths, strict=True):
        if x is None or p is None or x.shape == p.shape:
            continue
        block = getattr(tx, "blocks", {}).get(name)
        if block and x.numel() in (0, block.size(p.numel())):
            continue  # where it is 0, this leaf has no blocks
        like = p.detach().to("meta")
        if x.shape != tx.slots[name](like).shape:
            raise ValueError(
                f"{tx.name}: the state's {name} at {path!r} has shape {tuple(x.shape)}, its "
                f"parameter {tuple(p.shape)}. Is the state that of other params?"
            )
