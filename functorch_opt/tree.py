"""Trees of tensors. This is the only file that imports optree.

A *tree* is a tensor, ``None``, or a container of trees: dict, OrderedDict, list, tuple, NamedTuple, or any class registered with
optree (globally or in the namespace ``"functorch_opt"``). ``None`` is a leaf, and it means *nothing here*: no gradient for this
parameter, or no parameter. It is settled in this file, once: every function below hands ``None`` leaves through untouched.

A leaf has a *path*, written ``"encoder/0/weight"``: dict keys, sequence indices and field names, joined by ``/``.
A tree is flattened and put together again inside the same call, always: a treespec may not enter compiled code from outside.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import optree
import torch
from torch import Tensor

__all__ = ["StageState", "describe", "get", "load_state_dict", "state_dict"]

PyTree = Any
Path = str

_OPTREE: dict[str, Any] = {"none_is_leaf": True, "namespace": "functorch_opt"}


class StageState(NamedTuple):
    """The state of one stage: ``shared`` values that all parameters have in common, and ``slots`` that mirror the parameters.

    ``state.slots["mu"]`` has the structure of the params; ``state.shared["count"]`` is one tensor.
    """

    shared: dict[str, Tensor]
    slots: dict[str, PyTree]


# ---- structure -------------------------------------------------------------------------------------------------------


def flatten(tree: PyTree) -> tuple[list[Any], optree.PyTreeSpec]:
    """The leaves of `tree`, ``None`` among them, and the spec that puts them together again."""
    return optree.tree_flatten(tree, **_OPTREE)


def flatten_tensors(tree: PyTree, name: str) -> tuple[list[Tensor | None], optree.PyTreeSpec]:
    """`flatten`, for a tree that must hold nothing but tensors and ``None``; `name` is what the error calls it."""
    here, spec = flatten(tree)
    for i, leaf in enumerate(here):
        if not (leaf is None or isinstance(leaf, Tensor)):
            path = paths(tree)[i]
            if path:
                raise TypeError(f"{name} holds {type(leaf).__name__} {leaf!r} at {path!r}; every leaf must be a tensor or None.")
            given = f"{type(leaf).__name__} {leaf!r}"
            raise TypeError(f"{name} must be a tree of tensors, e.g. dict(model.named_parameters()) or a list; got {given}.")
    return here, spec


def unflatten(spec: optree.PyTreeSpec, leaves: list[Any]) -> PyTree:
    """The tree of structure `spec` with these `leaves`."""
    return optree.tree_unflatten(spec, leaves)


def leaves(tree: PyTree) -> list[Any]:
    """The leaves of `tree` that are not ``None``."""
    return [leaf for leaf in flatten(tree)[0] if leaf is not None]


def match(reference: PyTree, spec: optree.PyTreeSpec, tree: PyTree, *, names: tuple[str, str]) -> list[Any]:
    """The leaves of `tree`, which must have the structure `spec` of `reference`; `names` are what the error calls the two."""
    try:
        matched = spec.flatten_up_to(tree)
    except (ValueError, TypeError):
        raise ValueError(_difference(reference, tree, names)) from None
    for leaf in matched:
        if not (leaf is None or isinstance(leaf, Tensor)):
            flatten_tensors(tree, names[1])
            raise ValueError(_difference(reference, tree, names))
    return matched


def like(reference: PyTree, tree: PyTree) -> PyTree:
    """`tree` in the containers of `reference`: gradients may come as an OrderedDict where the params are a dict."""
    spec = flatten(reference)[1]
    return unflatten(spec, match(reference, spec, tree, names=("the state", "the new state")))


def map(f: Callable[..., Any], tree: PyTree, *rest: PyTree, names: tuple[str, ...] = ()) -> PyTree:
    """Apply `f` to every leaf of `tree` that is not ``None``, together with the leaves of `rest` at the same place."""
    first, spec = flatten(tree)
    names = names or ("the first tree", *(f"tree {i + 2}" for i in range(len(rest))))
    columns = [match(tree, spec, other, names=(names[0], name)) for other, name in zip(rest, names[1:], strict=True)]
    return unflatten(spec, [None if row[0] is None else f(*row) for row in zip(first, *columns, strict=True)])


def map_leaves(f: Callable[[Any], Any], tree: PyTree) -> PyTree:
    """Apply `f` to every leaf of a tree of anything (bools, labels), ``None`` among them."""
    here, spec = flatten(tree)
    return unflatten(spec, [f(leaf) for leaf in here])


def paths(tree: PyTree) -> list[Path]:
    """The path of every leaf (``None`` leaves too), in the order of `flatten`."""
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
    if node is None or isinstance(node, Tensor) or optree.tree_is_leaf(node, **_OPTREE):
        return None
    one = optree.tree_flatten_one_level(node, **_OPTREE)
    entries = type(node)._fields if optree.is_namedtuple_instance(node) else one.entries
    return dict(zip(entries, one.children, strict=True))


def _path(entries: tuple[Any, ...]) -> Path:
    return "/".join(str(entry) for entry in entries)


def unique_paths(tree: PyTree) -> list[Path]:
    """`paths`, for use as keys: two leaves with the same one are an error."""
    seen: set[Path] = set()
    for path in (all_paths := paths(tree)):
        if path in seen:
            raise ValueError(
                f"two leaves have the path {path!r}: rename a dict key (one contains '/', or is a number beside its own string)."
            )
        seen.add(path)
    return all_paths


_ABSENT = object()


def _difference(upper: PyTree, lower: PyTree, names: tuple[str, str], *, prefix: bool = False) -> str:
    """What to tell somebody whose trees `upper` and `lower` differ in structure: the first place where they do."""
    entries, above, below = _first_difference(upper, lower, prefix) or ((), upper, lower)
    place = f"at {_path(entries)!r}" if entries else "at the root"
    same = "Give both the same structure; write None where a parameter has no gradient."
    cure = "Write one value for each, or one for all that is below a place." if prefix else same
    return (
        f"{names[0]} and {names[1]} differ in structure: {place} {names[0]} has {_shown(above)} and {names[1]} has {_shown(below)}. {cure}"
    )


def _first_difference(upper: PyTree, lower: PyTree, prefix: bool) -> tuple[tuple[Any, ...], PyTree, PyTree] | None:
    """Where `lower` does not go on as `upper` does, and what the two have there. Below a leaf of a `prefix` anything may come."""
    above, below = _children(upper), _children(lower)
    if above is None and (prefix or below is None):
        return None
    if above is None or below is None or not (type(upper) is type(lower) or (isinstance(upper, dict) and isinstance(lower, dict))):
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
        return f"{type(node).__name__} of {_shorten(list(children))}"
    if isinstance(node, Tensor):
        return f"a tensor of shape {tuple(node.shape)}"
    return "nothing" if node is _ABSENT else f"{node!r}"


def _shorten(names: list[Any], most: int = 8) -> str:
    shown = ", ".join(repr(name) for name in names[:most])
    return f"[{shown}{', ...' if len(names) > most else ''}]"


def broadcast(prefix: PyTree, tree: PyTree, *, names: tuple[str, str]) -> list[Any]:
    """For every leaf of `tree`, the leaf of `prefix` at or above it: ``{"a": True}`` speaks for all of ``{"a": {...}}``."""
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


# ---- numbers ---------------------------------------------------------------------------------------------------------


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """float32 for the floating types below it (bfloat16, float16, the 8-bit floats); any other dtype is itself."""
    return torch.float32 if dtype.is_floating_point and dtype.itemsize < 4 else dtype


def real_dtype(device: torch.device) -> torch.dtype:
    """The dtype for scalars that are worked out once a step: float64, where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def zero_count(params: PyTree) -> Tensor:
    """A count of 0, int64, on the device of the params.

    Under vmap it is batched as they are: an unbatched one would come out as a view with stride 0, and compiled code that has seen that
    would compile again at the second step.
    """
    p = leaves(params)[0]
    if type(p) in (Tensor, torch.nn.Parameter):
        return p.new_zeros((), dtype=torch.int64)
    return torch.zeros((), dtype=torch.int64, device=p.device)  # beside sharded tensors: an ordinary one


def as_real(count: Tensor) -> Tensor:
    """A count as a floating tensor, wide enough for ``1 - b2**count``: in float32 that is off by 3e-5 at the first step."""
    return count.to(real_dtype(count.device))


TINY = torch.finfo(torch.float32).tiny
"""Added to squares under a root, 1.2e-38: at 0 the derivative of the root is infinite, and what comes to it is 0; their product is NaN.

The root it makes of 0, 1.1e-19, is lost beside any eps above 1e-12, so updates are the same numbers.
"""


def zeros_like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Zeros in the shape of `x`, in `dtype`; by default in the dtype of `x`, but at least float32.

    In bfloat16 ``0.999`` rounds to 1 and a second moment never decays; hence the float32.
    """
    if dtype is not None and (dtype.is_complex != x.is_complex() or not (dtype.is_floating_point or dtype.is_complex)):
        wanted = "complex" if x.is_complex() else "floating"
        raise TypeError(f"a slot of dtype {dtype} cannot hold what is worked out for {x.dtype}: give a {wanted} dtype, or None.")
    return torch.zeros_like(x, dtype=at_least_float32(x.dtype) if dtype is None else dtype)


def cast(tree: PyTree, dtype: torch.dtype | None) -> PyTree:
    """`tree` with its floating leaves in `dtype`; other leaves, and everything when `dtype` is None, as they are."""
    if dtype is None:
        return tree
    return map(lambda x: x.to(dtype) if x.is_floating_point() else x, tree)


def sum_over_ranks(values: list[Any], leaves: list[Any]) -> list[Any]:
    """Numbers, each a sum over this rank's part of the leaf beside it: those of sharded leaves summed over the ranks, in one message."""
    values = list(values)
    for like, indices in _by_layout(leaves):
        everybodys = _everybodys([values[i] for i in indices], like)
        for i, whole in zip(indices, everybodys.sum(tuple(range(like.device_mesh.ndim))).unbind(), strict=True):
            values[i] = whole
    return values


def norm(tree: PyTree) -> Tensor:
    """The 2-norm of all leaves together, ``sqrt(sum |x|^2)``, a 0-dim tensor, computed in float32 or wider.

    ``None`` leaves count as nothing; a tree without tensors has norm 0. The gradient at a zero tree is zero, not NaN. Sharded leaves count
    as wholes: the ranks exchange one number each, and the norm is an ordinary tensor, the same on all.
    """
    here = leaves(tree)
    norms = [_norm(part_of(x)) for x in here]
    if not norms:
        return torch.zeros(())
    groups = _by_layout(here)
    of_parts = {i for _, indices in groups for i in indices}
    plain = [n for i, n in enumerate(norms) if i not in of_parts]
    # Those of other ranks are gathered and not summed, so that no square can overflow.
    return _norm_of(plain + [_norm_of([*_everybodys([_norm_of([norms[i] for i in indices])], like).flatten()]) for like, indices in groups])


def dot(tree: PyTree, other: PyTree) -> Tensor:
    """The inner product of two trees, a 0-dim tensor, computed in float32 or wider; complex numbers count as pairs of reals."""
    products = [torch.vdot(_wide(x), _wide(y).to(_wide(x).dtype)).real for x, y in zip(leaves(tree), leaves(other), strict=True)]
    return _stack(products).sum() if products else torch.zeros(())


def _wide(x: Tensor) -> Tensor:
    return x.to(at_least_float32(x.dtype)).flatten()


def _norm(x: Tensor) -> Tensor:
    dtype = at_least_float32(x.dtype)
    return torch.linalg.vector_norm(x if x.dtype is dtype else x.to(dtype))


def _norm_of(norms: list[Tensor]) -> Tensor:
    return torch.linalg.vector_norm(_stack(norms))


def _stack(norms: list[Tensor]) -> Tensor:
    widest = torch.float64 if torch.float64 in [n.dtype for n in norms] else torch.float32
    return torch.stack([n if n.dtype is widest else n.to(widest) for n in norms])


# ---- sharded tensors -------------------------------------------------------------------------------------------------

PLAIN = (Tensor, torch.nn.Parameter)


def is_sharded(x: Any) -> bool:
    """Whether `x` is a DTensor: a tensor whose parts, or copies, lie on the ranks of a device mesh, as FSDP2 makes them."""
    if type(x) in PLAIN:
        return False
    module = sys.modules.get("torch.distributed.tensor")  # where nobody has imported it there are none, and importing it takes a second
    return module is not None and isinstance(x, module.DTensor)


def whole(x: Any) -> Any:
    """All of a sharded tensor, gathered on every rank; anything else as it is."""
    return x.full_tensor() if is_sharded(x) else x


def part_of(x: Any, like: Any = None) -> Any:
    """This rank's part of `x`, laid out as `like` is, by default as it is itself. What has another shape than `like` has no parts."""
    like = x if like is None else like
    if not is_sharded(like) or not isinstance(x, Tensor) or x.shape != like.shape:
        return whole(x)
    x = x if is_sharded(x) else cut(x, like)
    placements = _settled(like)
    return (x if list(x.placements) == placements else x.redistribute(placements=placements)).to_local()


def join(part: Tensor, like: Any) -> Tensor:
    """The inverse of `part_of`: the sharded tensor, laid out as `like`, of which this rank has `part`."""
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(part, like.device_mesh, _settled(like), run_check=False, shape=like.shape, stride=like.stride())


def cut(x: Tensor, like: Any) -> Tensor:
    """`x`, which every rank has whole, laid out as `like`: each keeps its part, and nothing is sent."""
    from torch.distributed.tensor import DTensor, Replicate

    everywhere = [Replicate()] * like.device_mesh.ndim
    return DTensor.from_local(x, like.device_mesh, everywhere, run_check=False).redistribute(placements=_settled(like))


def on_shards(
    apply: Callable[..., Any], in_parts: bool, g: Any, p: Any, slots: dict[str, Any], now: dict[str, Any], *rest: Any
) -> tuple[Any, dict[str, Any]]:
    """``apply(g, p, slots, now, *rest) -> (update, slots)`` on this rank's parts of sharded tensors, or on gathered wholes."""
    like = g if p is None else p

    def enter(x: Any) -> Any:
        x = part_of(x, like) if in_parts else whole(x)
        return _gradient_summed(x, like) if in_parts and isinstance(x, Tensor) and not x.dim() and x.requires_grad else x

    def leave(x: Any, old: Any) -> Any:
        if in_parts and old.shape == like.shape:
            return join(x, like)
        return cut(x, old) if is_sharded(old) else x

    u, new = apply(enter(g), enter(p), {n: enter(x) for n, x in slots.items()}, {n: enter(x) for n, x in now.items()}, *rest)
    return leave(u, g), {name: leave(new[name], old) for name, old in slots.items()}


def _gradient_summed(x: Tensor, like: Any) -> Tensor:
    """`x` itself, a number that meets a part of a tensor on each rank; its gradient is the sum of what comes from the parts."""
    from torch.distributed.tensor import DTensor, Partial, Replicate

    everywhere = [Replicate()] * like.device_mesh.ndim
    terms = [placement if placement.is_replicate() else Partial() for placement in _settled(like)]
    return DTensor.from_local(x, like.device_mesh, everywhere, run_check=False).to_local(grad_placements=terms)


def unlike(g: Any, p: Any, slots: Sequence[Any]) -> str | None:
    """What is wrong where some of these tensors are sharded and others are not; None if nothing is."""
    given = is_sharded(g)
    for name, x in (("its parameter", p), *(("the state there", slot) for slot in slots if slot.dim() and slot.shape == g.shape)):
        if is_sharded(x) != given:
            kinds = ("a DTensor", "an ordinary tensor")
            return f"is {kinds[not given]} and {name} {kinds[given]}. Shard the parameters first; then init, and take gradients."
    return None


def _settled(x: Any) -> list[Any]:
    """How `x` is laid out; where the ranks hold terms of a sum that was not taken yet, as if it had been."""
    from torch.distributed.tensor import Replicate

    return [Replicate() if placement.is_partial() else placement for placement in x.placements]


def _by_layout(tensors: list[Any]) -> list[tuple[Any, list[int]]]:
    """The numbers of the sharded tensors, together where they are split over the same dims of the same mesh; with one of each kind."""
    groups: dict[Any, tuple[Any, list[int]]] = {}
    for i, x in enumerate(tensors):
        if is_sharded(x):
            split = tuple([not placement.is_replicate() for placement in _settled(x)])
            groups.setdefault((x.device_mesh, split), (x, []))[1].append(i)
    return list(groups.values())


def _everybodys(mine: list[Tensor], like: Any) -> Tensor:
    """The numbers of all ranks that hold different parts: a dim for each of the mesh, and one for the numbers."""
    from torch.distributed.tensor import DTensor, Replicate, Shard

    mesh = like.device_mesh
    placements = [Replicate() if placement.is_replicate() else Shard(dim) for dim, placement in enumerate(_settled(like))]
    row = _stack(mine).reshape([1] * mesh.ndim + [len(mine)])
    return DTensor.from_local(row, mesh, placements, run_check=False).full_tensor()


def refuse_sharded(name: str, leaves: list[Any]) -> None:
    """Raise TypeError if a leaf is sharded; for what mixes the elements of all leaves, and is not written for ranks."""
    if any(is_sharded(x) for x in leaves):
        raise TypeError(f"{name} takes no sharded tensors (DTensor): it needs all elements on one rank. Give it x.full_tensor().")


# ---- reading a state -------------------------------------------------------------------------------------------------


def get(state: PyTree, name: str) -> Any:
    """The value called `name` in an optimizer state, at any depth.

    Args:
        state: what ``tx.init`` or ``tx.update`` returned.
        name: a slot (``"mu"``), a shared value (``"count"``), a hyperparameter (``"learning_rate"``) or a stage; or the end of its
            path, where the name alone is ambiguous (``"scale_by_adam/count"``).

    Returns:
        For a slot a tree of the structure of the params (of the part of them that a ``masked`` or ``partition`` group holds, keyed by
        path); for a shared value its tensor.

    Raises:
        KeyError: nothing has that name (the message lists what there is), or several have (it lists their paths).

    Example:
        >>> import torch, functorch_opt as fo
        >>> params = {"w": torch.ones(2), "b": torch.zeros(())}
        >>> state = fo.chain(fo.clip(1.0), fo.adam(0.1)).init(params)
        >>> fo.get(state, "mu")
        {'w': tensor([0., 0.]), 'b': tensor(0.)}
        >>> fo.get(state, "adam/scale_by_adam/count")
        tensor(0)
    """
    known = dict(entries(state))
    hits = [name] if name in known else [path for path in known if path.endswith("/" + name)]
    if len(hits) == 1:
        return known[hits[0]]
    if hits:
        raise KeyError(f"{name!r} is ambiguous in this state: it could be {', '.join(_reprs(hits))}. Give one of these paths.")
    raise KeyError(f"nothing is called {name!r} in this state; it holds {', '.join(_reprs(known))}.")


def _reprs(names: Any) -> list[str]:
    return [repr(name) for name in names]


def entries(node: PyTree, path: Path = "") -> Iterator[tuple[Path, Any]]:
    """Every named value of a state with its path. It stops at slots: what lies below is named by the params."""
    if isinstance(node, StageState):
        for name, value in (*node.shared.items(), *node.slots.items()):
            yield _join(path, name), value
        return
    if isinstance(node, dict):
        children: Any = node.items()
    elif optree.is_namedtuple_instance(node):
        children = zip(node._fields, node, strict=True)
    elif isinstance(node, (list, tuple)):
        children = enumerate(node)
    else:
        return
    for name, child in children:
        here = _join(path, str(name))
        yield here, child
        yield from entries(child, here)


def _join(path: Path, name: str) -> Path:
    return f"{path}/{name}" if path else name


def describe(tree: PyTree, in_dims: PyTree = None) -> str:
    """A table of `tree` for people: a line per tensor with path, shape, dtype and bytes on this rank, and the total.

    With the `in_dims` of a ``torch.vmap`` it says what each model has of its own: for a mapped tensor the shape is that of one model, and
    the last column says whether the models differ. Two that must differ and do not (noise keys, the first parameters of an ensemble),
    and one that should have been mapped, are seen at once.

    Args:
        tree: a tree of tensors.
        in_dims: as for ``torch.vmap(f, in_dims)(*tree)``: None, or a whole number or None for all that is below a place. 0 maps all.

    Raises:
        ValueError: a tensor lacks the dimension, or has another number of models than the first; the message has its path.

    Example:
        >>> import torch, functorch_opt as fo
        >>> print(fo.describe(fo.trace(0.9).init({"w": torch.zeros(2, 3)})))
        slots/trace/w  (2, 3)  float32  24 B
        total                           24 B
        >>> params, x = {"w": torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "b": torch.zeros(2)}, torch.ones(5)
        >>> print(fo.describe((params, x), in_dims=(0, None)))
        0/b    2 x ()    float32   8 B  all 2 equal
        0/w    2 x (2,)  float32  16 B  each its own
        1      (5,)      float32  20 B  shared
        total                     44 B
    """
    rows = []
    total, models = 0, None
    here = flatten_tensors(tree, "the tree")[0]
    dims = [None] * len(here) if in_dims is None else broadcast(in_dims, tree, names=("in_dims", "the tree"))
    for path, leaf, dim in zip(paths(tree), here, dims, strict=True):
        if leaf is not None:
            size = part_of(leaf).nbytes
            total += size
            shape, owner = str(tuple(leaf.shape)), "" if in_dims is None else "shared"
            if dim is not None:
                models = _models(path, leaf, dim, models)
                leaf = leaf.movedim(dim, 0)
                same = bool((leaf == leaf[:1]).all())
                shape, owner = f"{models} x {tuple(leaf.shape[1:])}", f"all {models} equal" if same else "each its own"
            rows.append((path, shape, str(leaf.dtype).removeprefix("torch."), f"{size:,} B", owner))
    rows.append(("total", "", "", f"{total:,} B", ""))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = [f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c:<{widths[2]}}  {d:>{widths[3]}}  {e}" for a, b, c, d, e in rows]
    return "\n".join(line.rstrip() for line in lines)


def _models(path: Path, leaf: Tensor, dim: int, models: int | None) -> int:
    """How many models a tensor is for."""
    if not -leaf.dim() <= dim < leaf.dim():
        raise ValueError(
            f"{path!r} has shape {tuple(leaf.shape)}, and so no dimension {dim} to map over. Make the state with vmap(tx.init)(params), "
            "or write None in in_dims where all models share a tensor."
        )
    if models is not None and leaf.shape[dim] != models:
        raise ValueError(
            f"{path!r} has shape {tuple(leaf.shape)}: {leaf.shape[dim]} models along dimension {dim}, where others have {models}."
        )
    return leaf.shape[dim]


# ---- checkpoints -----------------------------------------------------------------------------------------------------


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
    return {path: leaf for path, leaf in zip(unique_paths(state), here, strict=True) if leaf is not None}


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
        parts = {"missing": self.missing, "not expected": self.unexpected, "under another name": moved}
        listed = "; ".join(f"{what} {_shorten(names, 20)}" for what, names in parts.items() if names)
        return f"This state dict does not fit exactly: {listed}."


LEFT_OVER = "What is missing starts afresh, and the rest is left out."


def fit(here: Iterable[Path], there: Iterable[Path]) -> Fit:
    """Match names: equal ones, and then those of which one is the end of the other, if neither is the end of, or has, another partner.

    So the state of ``adam(...)`` is found again as that of ``chain(clip(...), adam(...))``, where it is called ``adam/...``.
    """
    here, there = list(dict.fromkeys(here)), list(dict.fromkeys(there))
    known, given = set(here), set(there)
    source = {name: name for name in here if name in given}
    missing, unexpected = [name for name in here if name not in given], [name for name in there if name not in known]
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
    source |= {name: partners[name][0] for name in missing if len(partners.get(name, ())) == 1 == len(partners[partners[name][0]])}
    taken = set(source.values())
    return Fit(source, [name for name in missing if name not in source], [name for name in unexpected if name not in taken])


def _ends(name: Path) -> list[Path]:
    """``"a/b/c"`` -> ``["b/c", "c"]``."""
    parts = name.split("/") if isinstance(name, str) else []  # a file may hold anything
    return ["/".join(parts[i:]) for i in range(1, len(parts))]


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
        raise TypeError(f"a state dict is a dict from path to tensor, as state_dict gives; got {type(saved).__name__}.")
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
            raise TypeError(f"{there!r} is {given} in the state dict; it must be a tensor, as state_dict gives.")
        if value.shape != leaf.shape:
            raise ValueError(
                f"{there!r} has shape {tuple(value.shape)} in the state dict and {tuple(leaf.shape)} here. "
                "Load it into the state of the params that it was saved with."
            )
        new[path] = value.to(leaf.device, copy=True)
    if found.missing or found.unexpected:
        warnings.warn(f"{found} {LEFT_OVER}", stacklevel=2)
    return unflatten(spec, [None if leaf is None else new[path] for path, leaf in zip(paths(state), here, strict=True)])
