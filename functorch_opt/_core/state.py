"""The state of an optimizer.

Here are what one stage keeps, how a value is found by its name, and a table of all values.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any, NamedTuple

from torch import Tensor

from functorch_opt._core.sharding import part_of
from functorch_opt._core.structure import (
    Path,
    PyTree,
    broadcast,
    flatten,
    flatten_tensors,
    paths,
    unflatten,
)

__all__ = ["StageState", "describe", "get", "tree_map_params"]


class StageState(NamedTuple):
    """The state of one stage.

    ``shared`` are values that all parameters have in common, and ``slots`` mirror the parameters.

    ``state.slots["mu"]`` has the structure of the params; ``state.shared["count"]`` is one tensor.
    """

    shared: dict[str, Tensor]
    slots: dict[str, PyTree]


def parts(node: PyTree) -> list[tuple[Any, Any]] | None:
    """What a state has one level below, each with its key, field name or index; None for a leaf."""
    if isinstance(node, dict):
        return [*node.items()]
    if hasattr(node, "_fields"):
        return [*zip(node._fields, node, strict=True)]
    return [*enumerate(node)] if isinstance(node, (list, tuple)) else None


def with_parts(node: PyTree, children: list[Any]) -> PyTree:
    """A state like `node`, with `children` in the place of its `parts`."""
    if isinstance(node, dict):
        return dict(zip(node, children, strict=True))
    return type(node)(*children) if hasattr(node, "_fields") else type(node)(children)


def check_around(
    state: Any, name: str, own: str, shared: Iterable[str], slots: Iterable[str]
) -> None:
    """Raise ValueError for what is not the state of a transformation around another.

    That has the state of the other as ``inner``, and what is its `own`: `shared` and `slots`.
    """
    kept = state.get(own) if isinstance(state, dict) else None
    held = list(state) if isinstance(state, dict) else type(state).__name__
    if isinstance(kept, StageState) and state.keys() == {"inner", own}:
        names = [*kept.shared, *kept.slots]
        if kept.shared.keys() == {*shared} and kept.slots.keys() == {*slots}:
            return
        held = f"{held}, with {names} in {own}"
    raise ValueError(
        f"this is not a state of {name}, which has inner and {own}, "
        f"with {[*shared, *slots]} in {own}: it holds {held}. "
        "Use what its own init or update returned."
    )


def get(
    tree: PyTree,
    key: str,
    default: Any = KeyError,
    filtering: Callable[[Path, Any], bool] | None = None,
) -> Any:
    """The value called `key` in an optimizer state, at any depth.

    In `functorch_opt.tree` the same function is there too, as in optax.

    Args:
        tree: what ``tx.init`` or ``tx.update`` returned.
        key: a slot (``"mu"``), a shared value (``"count"``), a hyperparameter
            (``"learning_rate"``) or a stage; or the end of its path, where the name alone is
            ambiguous (``"scale_by_adam/count"``). If a stage has a value of its own name, as
            `trace` and `ema` have, that is meant.
        default: what to return if nothing has that name. By default that is an error.
        filtering: a function of the path, ``"adam/scale_by_adam/count"``, and of the value. Values
            of which it says False are passed over.

    Returns:
        For a slot, a tree of the structure of the params. Inside of ``masked`` or ``partition`` it
        is a dict from path to tensor, of the leaves of that group only. For a shared value, its
        tensor.

    Raises:
        KeyError: nothing has that name, and there is no `default` (the message lists the names
            there are); or several values have it (the message lists their paths).

    Example:
        >>> import torch, functorch_opt as fo
        >>> params = {"w": torch.ones(2), "b": torch.zeros(())}
        >>> state = fo.chain(fo.clip(1.0), fo.adam(0.1)).init(params)
        >>> fo.get(state, "mu")
        {'w': tensor([0., 0.]), 'b': tensor(0.)}
        >>> fo.get(state, "adam/scale_by_adam/count")
        tensor(0)
        >>> fo.get(state, "hyperparams", None) is None
        True
    """
    known = dict(entries(tree))
    named = [path for path in known if f"/{path}".endswith(f"/{key}")]
    hits = [*dict.fromkeys(_value_at(path, known) for path in named)]
    if key in hits:  # it is a whole path
        hits = [key]
    if filtering is not None:
        hits = [path for path in hits if filtering(path, known[path])]
    if len(hits) == 1:
        return known[hits[0]]
    if hits:
        raise KeyError(
            f"{key!r} is ambiguous in this state: it could be {', '.join(_reprs(hits))}. "
            "Give one of these paths."
        )
    if default is KeyError:
        raise KeyError(_nothing(key, filtering, known))
    return default


def _value_at(path: Path, known: Collection[Path]) -> Path:
    """The path of the value that a stage has under its own name, if there is one."""
    inside = _join(path, path.rpartition("/")[2])
    return inside if inside in known else path


def _nothing(key: str, filtering: Any, known: Iterable[Path]) -> str:
    of = "" if filtering is None else " for which `filtering` says True"
    return f"nothing is called {key!r} in this state{of}; it holds {', '.join(_reprs(known))}."


def _reprs(names: Any) -> list[str]:
    return [repr(name) for name in names]


def entries(node: PyTree, path: Path = "") -> Iterator[tuple[Path, Any]]:
    """Every named value of a state with its path.

    It stops at slots, for what lies below a slot is named by the params.
    """
    if isinstance(node, StageState):
        for name, value in (*node.shared.items(), *node.slots.items()):
            yield _join(path, name), value
        return
    for name, child in parts(node) or ():
        here = _join(path, str(name))
        yield here, child
        yield from entries(child, here)


def _join(path: Path, name: str) -> Path:
    return f"{path}/{name}" if path else name


def rebuilt(node: PyTree, f: Callable[[Path, Any], Any], path: Path = "") -> PyTree:
    """A state in which `f` has made each named value anew, of its path and what it is.

    If `f` returns `NotImplemented`, the value stays, and what is inside of it is looked at. As in
    `entries`, nothing inside of a slot has a name.
    """

    def made(name: str, value: Any) -> Any:
        here = _join(path, name)
        new = f(here, value)
        return rebuilt(value, f, here) if new is NotImplemented else new

    def kept(name: str, value: Any) -> Any:
        new = f(_join(path, name), value)
        return value if new is NotImplemented else new

    if isinstance(node, StageState):
        shared = {name: kept(name, value) for name, value in node.shared.items()}
        slots = {name: kept(name, value) for name, value in node.slots.items()}
        return StageState(shared, slots)
    below = parts(node)
    if below is None:
        return node
    return with_parts(node, [made(str(key), child) for key, child in below])


def set(
    tree: PyTree,
    filtering: Callable[[Path, Any], bool] | None = None,
    /,
    **kwargs: Any,
) -> PyTree:
    """A state in which everything of these names has these values.

    Args:
        tree: what ``tx.init`` or ``tx.update`` returned.
        filtering: a function of the path, ``"adam/scale_by_adam/count"``, and of the value. Values
            of which it says False stay.
        **kwargs: the names, as for `functorch_opt.get`, and what takes the place of what is there.

    Raises:
        KeyError: nothing has such a name, or nothing for which `filtering` says True.

    Example:
        >>> import torch, functorch_opt as fo
        >>> state = fo.inject_hyperparams(fo.sgd)(learning_rate=0.1).init([torch.zeros(1)])
        >>> fo.get(fo.tree.set(state, learning_rate=torch.tensor(0.5)), "learning_rate")
        tensor(0.5000)
    """
    seen: list[str] = []
    known = [path for path, _ in entries(tree)]

    def changed(path: Path, value: Any) -> Any:
        name = path.rpartition("/")[2]
        if name not in kwargs or _value_at(path, known) != path:
            return NotImplemented
        if filtering is not None and not filtering(path, value):
            return NotImplemented
        seen.append(name)
        return kwargs[name]

    new = rebuilt(tree, changed)
    if missing := [name for name in kwargs if name not in seen]:
        raise KeyError(_nothing(missing[0], filtering, known))
    return new


def tree_map_params(
    initable: Any,
    f: Callable[..., Any],
    state: PyTree,
    /,
    *rest: PyTree,
    transform_non_params: Callable[[Tensor], Any] | None = None,
) -> PyTree:
    """`f` of every tensor of a state that belongs to a parameter.

    These are the slots. Some have another shape than their parameter, such as a number for each.
    In `functorch_opt.tree` the same function is called ``map_params``, as in optax.

    Args:
        initable: the transformation. It is not needed, and is here for the order of optax.
        f: a function of the tensor, and of the leaf of each of `rest` for its parameter.
        state: what ``tx.init`` or ``tx.update`` returned.
        *rest: trees of the structure of the params, such as shardings or masks.
        transform_non_params: a function of the tensors that belong to no parameter, such as
            counts; by default they stay.

    Example:
        >>> import torch, functorch_opt as fo
        >>> tx = fo.adam(0.1)
        >>> state = tx.init({"w": torch.zeros(2)})
        >>> state = fo.tree_map_params(tx, torch.Tensor.double, state)
        >>> fo.get(state, "mu"), fo.get(state, "count")
        ({'w': tensor([0., 0.], dtype=torch.float64)}, tensor(0))
    """
    by_path = []
    for tree in rest:
        leaves = flatten(tree)[0]
        by_path.append(dict(zip(paths(tree), leaves, strict=True)))

    def of_slot(slot: PyTree) -> PyTree:
        here, spec = flatten(slot)
        rows = zip(paths(slot), here, strict=True)
        return unflatten(
            spec,
            [
                None if x is None else f(x, *[of[path] for of in by_path])
                for path, x in rows
            ],
        )

    def changed(node: PyTree) -> PyTree:
        if isinstance(node, StageState):
            slots = {name: of_slot(slot) for name, slot in node.slots.items()}
            return StageState(changed(node.shared), slots)
        if isinstance(node, Tensor):
            return node if transform_non_params is None else transform_non_params(node)
        below = parts(node)
        if below is None:
            return node
        return with_parts(node, [changed(child) for _, child in below])

    return changed(state)


def describe(tree: PyTree, in_dims: PyTree = None) -> str:
    """A readable table of `tree`, with a line for each tensor and one for the total.

    A line shows the path, the shape, the dtype, and how many bytes are on this rank.

    With the `in_dims` of a ``torch.vmap`` it also says what each model has for itself. For a mapped
    tensor the shape is that of one model, and the last column says whether the models differ. This
    shows two mistakes at once: tensors that must differ and do not (noise keys, the first
    parameters of an ensemble), and tensors that should have been mapped and are not.

    Args:
        tree: a tree of tensors.
        in_dims: as for ``torch.vmap(f, in_dims)(*tree)``: None, or a tree in which a whole number
            or None stands for all tensors below it. 0 maps all.

    Raises:
        ValueError: a tensor lacks the dimension, or has another number of models than the first;
            the message names its path.

    Example:
        >>> import torch, functorch_opt as fo
        >>> print(fo.describe(fo.trace(0.9).init({"w": torch.zeros(2, 3)})))
        slots/trace/w  (2, 3)  float32  24 B
        total                           24 B
        >>> params = {"w": torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "b": torch.zeros(2)}
        >>> print(fo.describe((params, torch.ones(5)), in_dims=(0, None)))
        0/b    2 x ()    float32   8 B  all 2 equal
        0/w    2 x (2,)  float32  16 B  each its own
        1      (5,)      float32  20 B  shared
        total                     44 B
    """
    rows: list[tuple[str, ...]] = []
    total, models = 0, None
    here = flatten_tensors(tree, "the tree")[0]
    dims = [None] * len(here)
    if in_dims is not None:
        dims = broadcast(in_dims, tree, names=("in_dims", "the tree"))
    for path, leaf, dim in zip(paths(tree), here, dims, strict=True):
        if leaf is None:
            continue
        size = part_of(leaf).nbytes
        total += size
        if dim is None:
            shape = str(tuple(leaf.shape))
            owner = "" if in_dims is None else "shared"
        else:
            models = _models(path, leaf, dim, models)
            shape, owner = _of_models(leaf.movedim(dim, 0))
        dtype = str(leaf.dtype).removeprefix("torch.")
        rows.append((path, shape, dtype, f"{size:,} B", owner))
    return _table([*rows, ("total", "", "", f"{total:,} B", "")])


def _of_models(leaf: Tensor) -> tuple[str, str]:
    """The shape that a tensor has for one model, and whether the models differ."""
    models = leaf.shape[0]
    same = bool((leaf == leaf[:1]).all())
    owner = f"all {models} equal" if same else "each its own"
    return f"{models} x {tuple(leaf.shape[1:])}", owner


def _table(rows: list[tuple[str, ...]]) -> str:
    """Rows of five cells as text; the fourth is a number."""
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = [
        f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c:<{widths[2]}}  {d:>{widths[3]}}  {e}"
        for a, b, c, d, e in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


def _models(path: Path, leaf: Tensor, dim: int, models: int | None) -> int:
    """How many models a tensor is for."""
    if not -leaf.dim() <= dim < leaf.dim():
        raise ValueError(
            f"{path!r} has shape {tuple(leaf.shape)}, and so no dimension {dim} to map over. "
            "Make the state with vmap(tx.init)(params), "
            "or write None in in_dims where all models share a tensor."
        )
    if models is not None and leaf.shape[dim] != models:
        raise ValueError(
            f"{path!r} has shape {tuple(leaf.shape)}: "
            f"{leaf.shape[dim]} models along dimension {dim}, where others have {models}."
        )
    return leaf.shape[dim]
