"""Trees in a graph: flattened without optree, which Dynamo cannot follow everywhere.

With torch 2.13 and optree 0.20, Dynamo fails at a dict that holds no tensor: an empty one, or one
with nothing but ``None``. So inside of a graph the ordinary containers are handled here, in the
same order that optree uses. Classes that are registered with optree are left to it.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import optree
from torch import Tensor

OPTREE: dict[str, Any] = {"none_is_leaf": True, "namespace": "functorch_opt"}
_DICTS = (dict, OrderedDict)


class Spec:
    """The structure of a tree. Inside of a graph it does what a treespec of optree does elsewhere.

    Attributes:
        like: the node itself, for its type and keys; None for a leaf.
        keys: the keys or indices of its children; None for a leaf.
        children: their structures.
    """

    def __init__(self, node: Any, leaves: list[Any]) -> None:
        self.like, self.keys, self.put_together = _looked_into(node)
        self.children: list[Spec] = []
        if self.keys is None:
            leaves.append(node)
            return
        self.children = [Spec(child, leaves) for child in _below(node, self.keys)]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Spec) or type(self.like) is not type(other.like):
            return False
        if self.keys != other.keys:
            return False
        pairs = zip(self.children, other.children, strict=True)
        return all(mine == theirs for mine, theirs in pairs)

    __hash__ = None  # type: ignore[assignment]

    @property
    def num_leaves(self) -> int:
        """How many leaves it has, ``None`` among them."""
        return 1 if self.keys is None else sum([x.num_leaves for x in self.children])

    def flatten_up_to(self, tree: Any) -> list[Any]:
        """What `tree` has in the place of each leaf.

        Raises:
            ValueError: `tree` has another structure.
        """
        if self.keys is None:
            return [tree]
        kind = type(self.like)
        dicts = kind in _DICTS and type(tree) in _DICTS
        if not dicts and type(tree) is not kind:
            raise ValueError(f"expected {kind.__name__}, got {type(tree).__name__}")
        keys = _looked_into(tree)[1]
        if keys is None or (set(keys) != set(self.keys) if dicts else keys != self.keys):
            raise ValueError(f"expected {self.keys}, got {keys}")
        children = _below(tree, self.keys)
        pairs = zip(self.children, children, strict=True)
        return [leaf for spec, child in pairs for leaf in spec.flatten_up_to(child)]

    def unflatten(self, leaves: Any) -> Any:
        """The tree with these leaves."""
        return self._take(list(leaves), 0)[0]

    def _take(self, leaves: list[Any], start: int) -> tuple[Any, int]:
        """The tree whose leaves begin at `start`, and where they end."""
        if self.keys is None:
            return leaves[start], start + 1
        children = []
        for spec in self.children:
            child, start = spec._take(leaves, start)
            children.append(child)
        return self._rebuilt(children), start

    def _rebuilt(self, children: list[Any]) -> Any:
        kind = type(self.like)
        if kind in _DICTS:
            of_key = dict(zip(self.keys or (), children, strict=True))
            pairs = [(key, of_key[key]) for key in self.like]
            return kind(pairs)
        if self.put_together is not None:
            return self.put_together(children)
        if hasattr(kind, "_fields"):
            return kind(*children)
        return kind(children)


def flatten(tree: Any) -> tuple[list[Any], Spec]:
    """The leaves of `tree`, and its structure."""
    leaves: list[Any] = []
    return leaves, Spec(tree, leaves)


def _looked_into(node: Any) -> tuple[Any, list[Any] | None, Any]:
    """The node, the keys of its children, and optree's way to put them together if it has one."""
    if node is None or isinstance(node, Tensor):
        return None, None, None
    kind = type(node)
    if kind in (list, tuple) or hasattr(kind, "_fields"):
        return node, list(range(len(node))), None
    if kind in _DICTS:
        return node, _in_order(node), None
    if optree.tree_is_leaf(node, **OPTREE):
        return None, None, None
    children, metadata, _, unflatten = optree.tree_flatten_one_level(node, **OPTREE)
    keys = list(range(len(children)))
    return node, keys, lambda given: unflatten(metadata, given)


def _in_order(node: Any) -> list[Any]:
    """The keys of a dict in the order of optree: sorted, except for those of an OrderedDict."""
    return list(node) if type(node) is OrderedDict else sorted(node)


def _below(node: Any, keys: list[Any]) -> list[Any]:
    """The children of a node."""
    if type(node) in _DICTS or isinstance(node, (list, tuple)):
        return [node[key] for key in keys]
    return list(optree.tree_flatten_one_level(node, **OPTREE)[0])
