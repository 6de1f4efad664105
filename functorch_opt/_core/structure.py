"""Trees of tensors. Only this file and `in_graph` import optree.

A *tree* is a tensor, ``None``, or a container of trees: dict, OrderedDict, list, tuple, NamedTuple,
or any class registered with optree (globally or in the namespace ``"functorch_opt"``). ``None`` is
a leaf, and it means *nothing here*: no gradient for this parameter, or no parameter. This is
settled once, in this file: every function below passes ``None`` leaves on untouched.

A leaf has a *path*, written ``"encoder/0/weight"``: dict keys, sequence indices and field names,
joined by ``/``. A tree is always flattened and put together again inside of the same call, because
a treespec may not enter compiled code from outside.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import optree
import torch
from torch import Tensor

from functorch_opt._core import in_graph
from functorch_opt._core.in_graph import OPTREE

PyTree = Any
"""A tensor, ``None``, or a container of trees. The name tells readers what a type cannot say."""
Path = str


def flatten(tree: PyTree) -> tuple[list[Any], optree.PyTreeSpec]:
    """The leaves of `tree`, ``None`` among them, and the spec that puts them together again.

    Put the tree together in the same call: a spec may not enter compiled code from outside.

    Args:
        tree: any tree.

    Returns:
        ``(leaves, spec)``, for `unflatten`.

    Example:
        >>> import functorch_opt as fo
        >>> leaves, spec = fo.tree.flatten({"b": 1, "w": None})
        >>> leaves
        [1, None]
        >>> fo.tree.unflatten(spec, [2, None])
        {'b': 2, 'w': None}
    """
    if torch.compiler.is_compiling():
        return in_graph.flatten(tree)  # type: ignore[return-value]
    return optree.tree_flatten(tree, **OPTREE)


def flatten_tensors(
    tree: PyTree, name: str
) -> tuple[list[Tensor | None], optree.PyTreeSpec]:
    """`flatten`, for a tree that must hold nothing but tensors and ``None``.

    The error calls the tree `name`.
    """
    here, spec = flatten(tree)
    if are_tensors(here):
        return here, spec
    for i, leaf in enumerate(here):
        if not (leaf is None or isinstance(leaf, Tensor)):
            path = paths(tree)[i]
            if path:
                raise TypeError(
                    f"{name} holds {type(leaf).__name__} {leaf!r} at {path!r}; "
                    "every leaf must be a tensor or None."
                )
            given = f"{type(leaf).__name__} {leaf!r}"
            raise TypeError(
                f"{name} must be a tree of tensors, "
                f"e.g. dict(model.named_parameters()) or a list; got {given}."
            )
    return here, spec


def unflatten(spec: optree.PyTreeSpec, leaves: list[Any]) -> PyTree:
    """The tree of structure `spec` with these `leaves`; the inverse of `flatten`.

    Args:
        spec: what `flatten` gave.
        leaves: a list of as many leaves as the tree had, ``None`` among them.

    Example:
        >>> import functorch_opt as fo
        >>> leaves, spec = fo.tree.flatten((1, {"w": 2}))
        >>> fo.tree.unflatten(spec, [10 * leaf for leaf in leaves])
        (10, {'w': 20})
    """
    return spec.unflatten(leaves)


def leaves(tree: PyTree) -> list[Any]:
    """The leaves of `tree` that are not ``None``.

    Args:
        tree: any tree.

    Example:
        >>> import functorch_opt as fo
        >>> fo.tree.leaves({"b": None, "w": 3, "x": (4, 5)})
        [3, 4, 5]
    """
    return [leaf for leaf in flatten(tree)[0] if leaf is not None]


def match(
    reference: PyTree, spec: optree.PyTreeSpec, tree: PyTree, *, names: tuple[str, str]
) -> list[Any]:
    """The leaves of `tree`, which must have the structure `spec` of `reference`.

    The error calls the two trees by these `names`.
    """
    try:
        matched = spec.flatten_up_to(tree)
    except (ValueError, TypeError):
        raise ValueError(_difference(reference, tree, names)) from None
    if not are_tensors(matched):
        flatten_tensors(tree, names[1])
        raise ValueError(_difference(reference, tree, names))
    return matched


_USUAL = {Tensor, torch.nn.Parameter, type(None)}


def are_tensors(leaves: list[Any]) -> bool:
    """Whether all of `leaves` are tensors or None."""
    if {type(leaf) for leaf in leaves} <= _USUAL:
        return True
    return all(x is None or isinstance(x, Tensor) for x in leaves)


def like(reference: PyTree, spec: optree.PyTreeSpec, leaves: list[Any]) -> PyTree:
    """The tree of these `leaves`, whose structure is `spec`, in the containers of `reference`.

    It is needed because gradients may come as an OrderedDict where the params are a dict.
    """
    own = flatten(reference)[1]
    tree = unflatten(spec, leaves)
    if own == spec:
        return tree
    names = ("the state", "the new state")
    return unflatten(own, match(reference, own, tree, names=names))


def map(
    f: Callable[..., Any], tree: PyTree, *rest: PyTree, names: tuple[str, ...] = ()
) -> PyTree:
    """Apply `f` to every leaf of `tree` that is not ``None``, with the same leaves of `rest`.

    Args:
        f: a function that takes one leaf of each tree, and returns a leaf.
        tree: a tree of tensors.
        rest: trees of the same structure.
        names: what an error calls the trees, one name for each.

    Returns:
        A tree of the structure of `tree`. It is ``None`` where `tree` is.

    Raises:
        ValueError: two structures differ; the message names the first place where they do.

    Example:
        >>> import torch, functorch_opt as fo
        >>> fo.tree.map(torch.add, {"w": torch.ones(2), "b": None}, {"w": torch.ones(2), "b": None})
        {'w': tensor([2., 2.]), 'b': None}
    """
    first, spec = flatten(tree)
    names = names or ("the first tree", *(f"tree {i + 2}" for i in range(len(rest))))
    columns = [
        match(tree, spec, other, names=(names[0], name))
        for other, name in zip(rest, names[1:], strict=True)
    ]
    return unflatten(
        spec,
        [
            None if row[0] is None else f(*row)
            for row in zip(first, *columns, strict=True)
        ],
    )


def map_leaves(f: Callable[[Any], Any], tree: PyTree) -> PyTree:
    """Apply `f` to every leaf of a tree of anything (bools, labels), ``None`` among them."""
    here, spec = flatten(tree)
    return unflatten(spec, [f(leaf) for leaf in here])


def paths(tree: PyTree) -> list[Path]:
    """The path of every leaf, also of ``None`` leaves, in the order of `flatten`.

    A path is what leads to a leaf, joined by ``/``: dict keys, indices and field names.

    Args:
        tree: any tree.

    Example:
        >>> import functorch_opt as fo
        >>> fo.tree.paths({"encoder": [{"weight": 1}, {"weight": 2}], "bias": None})
        ['bias', 'encoder/0/weight', 'encoder/1/weight']
    """
    return list(_walk_paths(tree, ()))


def _walk_paths(tree: PyTree, prefix: tuple[Any, ...]) -> Iterator[Path]:
    children = _children(tree)
    if children is None:
        yield _path(prefix)
        return
    for entry, child in children.items():
        yield from _walk_paths(child, (*prefix, entry))


def _children(node: PyTree) -> dict[Any, PyTree] | None:
    """What is one level below `node`, by key, index or field name; None for a leaf."""
    if node is None or isinstance(node, Tensor) or optree.tree_is_leaf(node, **OPTREE):
        return None
    # Compiled code cannot ask optree about a tree that it did not get as an argument, such as a
    # mask. So the ordinary containers are handled here, in the same order that optree uses.
    if type(node) in (list, tuple):
        return dict(enumerate(node))
    if type(node) is dict and all(isinstance(key, str) for key in node):
        return {key: node[key] for key in sorted(node)}
    one = optree.tree_flatten_one_level(node, **OPTREE)
    entries = type(node)._fields if optree.is_namedtuple_instance(node) else one.entries
    return dict(zip(entries, one.children, strict=True))


def _path(entries: tuple[Any, ...]) -> Path:
    return "/".join(str(entry) for entry in entries)


def unique_paths(tree: PyTree) -> list[Path]:
    """`paths`, for use as keys. It is an error if two leaves have the same path."""
    seen: set[Path] = set()
    for path in (all_paths := paths(tree)):
        if path in seen:
            raise ValueError(
                f"two leaves have the path {path!r}: "
                "rename a dict key (one contains '/', or is a number beside its own string)."
            )
        seen.add(path)
    return all_paths


_ABSENT = object()


def _difference(
    upper: PyTree, lower: PyTree, names: tuple[str, str], *, prefix: bool = False
) -> str:
    """The message for trees that differ in structure, with the first place where they do."""
    entries, above, below = _first_difference(upper, lower, prefix) or ((), upper, lower)
    place = f"at {_path(entries)!r}" if entries else "at the root"
    here = f"{names[0]} has {_shown(above)} and {names[1]} has {_shown(below)}"
    same = "Give both the same structure; write None where a parameter has no gradient."
    cure = (
        "Write one value for each, or one for all that is below a place."
        if prefix
        else same
    )
    here = f"{place} {names[0]} has {_shown(above)} and {names[1]} has {_shown(below)}"
    return f"{names[0]} and {names[1]} differ in structure: {here}. {cure}"


def _first_difference(
    upper: PyTree, lower: PyTree, prefix: bool
) -> tuple[tuple[Any, ...], PyTree, PyTree] | None:
    """The first place where `lower` differs in structure from `upper`, and what the two have there.

    If `upper` is a `prefix`, anything may come below its leaves.
    """
    above, below = _children(upper), _children(lower)
    if above is None and (prefix or below is None):
        return None
    if (
        above is None
        or below is None
        or not (
            type(upper) is type(lower)
            or (isinstance(upper, dict) and isinstance(lower, dict))
        )
    ):
        return (), upper, lower
    for entry in {**above, **below}:
        if entry not in above or entry not in below:
            return (entry,), above.get(entry, _ABSENT), below.get(entry, _ABSENT)
        found = _first_difference(above[entry], below[entry], prefix)
        if found:
            return (entry, *found[0]), *found[1:]
    return None


def _shown(node: PyTree) -> str:
    children = _children(node)
    if children is not None:
        return f"{type(node).__name__} of {shorten(list(children))}"
    if isinstance(node, Tensor):
        return f"a tensor of shape {tuple(node.shape)}"
    return "nothing" if node is _ABSENT else f"{node!r}"


def shorten(names: list[Any], most: int = 8) -> str:
    shown = ", ".join(repr(name) for name in names[:most])
    return f"[{shown}{', ...' if len(names) > most else ''}]"


def broadcast(prefix: PyTree, tree: PyTree, *, names: tuple[str, str]) -> list[Any]:
    """For every leaf of `tree`, the leaf of `prefix` at or above it.

    ``{"a": True}`` speaks for all of ``{"a": {...}}``.
    """
    if _first_difference(prefix, tree, prefix=True):
        raise ValueError(_difference(prefix, tree, names, prefix=True))
    return list(_spread(prefix, tree))


def _spread(prefix: PyTree, tree: PyTree) -> Iterator[Any]:
    above, below = _children(prefix), _children(tree)
    if above is None or below is None:
        yield from [prefix] * len(flatten(tree)[0])
        return
    for entry, child in below.items():
        yield from _spread(above[entry], child)
