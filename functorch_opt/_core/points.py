"""The parameters to evaluate with.

A stage that keeps an average of the parameters, or other weights, has a `point`, which returns
them.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from functorch_opt import tree
from functorch_opt._core import structure
from functorch_opt._core.chain import Chain
from functorch_opt._core.gate import Gate
from functorch_opt._core.groups import Groups
from functorch_opt._core.inject import Injected
from functorch_opt._core.leaf import PerLeaf
from functorch_opt._core.rule import Leafwise
from functorch_opt._core.structure import Path
from functorch_opt._core.transformation import GradientTransformation, positional
from functorch_opt._core.wrap import Wrap
from functorch_opt.tree import PyTree

__all__ = ["eval_params"]

Found = dict[Path, Tensor]


def has_point(tx: GradientTransformation) -> bool:
    """Whether any stage of `tx` says where to evaluate."""
    if isinstance(tx, (Leafwise, Wrap)) and tx.point is not None:
        return True
    if isinstance(tx, Injected):
        return has_point(tx.factory(**tx.fixed, **tx.numbers))
    return any(map(has_point, _inside(tx)))


def _inside(tx: GradientTransformation) -> list[GradientTransformation]:
    if isinstance(tx, Chain):
        return [*tx.stages.values()]
    if isinstance(tx, Groups):
        return [*tx.inside.values()]
    return [tx.inner] if isinstance(tx, (Wrap, Gate)) else []


def points(tx: GradientTransformation, state: Any, params: PyTree) -> Found:
    """``{path: the tensor to evaluate with}``, for the parameters for which a stage has a point.

    Raises:
        ValueError: two stages have a point for the same parameter; the state is that of other
            params.
    """
    found: Found = {}
    if isinstance(tx, (Leafwise, Wrap)) and tx.point is not None:
        _add(
            found,
            _of_stage(tx, state if isinstance(tx, Leafwise) else state["kept"], params),
        )
    if isinstance(tx, Chain):
        tx.check_state(state)
        for name, stage in tx.stages.items():
            _add(found, points(stage, state[name], params))
    elif isinstance(tx, Groups):
        paths, ps = tree.paths(params), tree.flatten(params)[0]
        labels = tx.assigned(params, paths, ps, True)
        for label, inner in tx.inside.items():
            rows = zip(paths, ps, labels, strict=True)
            part = {path: p for path, p, mine in rows if mine == label}
            if part:
                _add(found, points(inner, tx.part_of_state(state, label), part))
    elif isinstance(tx, Injected):
        now, _ = tx.next(state)
        _add(found, points(tx.made(now), state["inner"], params))
    elif isinstance(tx, (Wrap, Gate)):
        tx.check_state(state)
        _add(found, points(tx.inner, state["inner"], params))
    return found


def _add(found: Found, more: Found) -> None:
    for path, x in more.items():
        if path in found:
            raise ValueError(
                f"two stages average the parameter at {path!r}: "
                "read the one you mean with get(state, ...)."
            )
        found[path] = x


def _of_stage(tx: Leafwise | Wrap, state: Any, params: PyTree) -> Found:
    ps, spec = structure.flatten_tensors(params, "params")
    columns = {
        name: structure.match(params, spec, slot, names=("params", f"the state's {name}"))
        for name, slot in state.slots.items()
    }
    now = tx.once.hypers(state.shared, len(ps))
    assert tx.point is not None
    reads = positional(tx.point)
    read = {name: now[name] for name in reads if name in now}
    per_leaf = PerLeaf(params, spec, read)
    found: Found = {}
    pairs = zip(tree.paths(params), ps, strict=True)
    for i, (path, p) in enumerate(pairs):
        slots = {name: column[i] for name, column in columns.items() if name in reads}
        if p is None or any(x is None for x in slots.values()):
            continue
        values = {**per_leaf.raw(i, p.device), **slots, "p": p}
        x = tx.point(*[values[name] for name in reads])
        if x.shape != p.shape:
            raise ValueError(
                f"the average at {path!r} has shape {tuple(x.shape)}, and its parameter has "
                f"{tuple(p.shape)}. Is the state that of other params?"
            )
        found[path] = x
    return found


def eval_params(tx: GradientTransformation, state: PyTree, params: PyTree) -> PyTree:
    """The parameters to evaluate with: the averages, or other weights, that `tx` keeps.

    Args:
        tx: a transformation with a stage that has a point, such as `params_ema` or `lookahead`. The
            stage may also be inside of `masked`, `partition` and wrappers.
        state: its state.
        params: the current parameters. Those for which no stage has a point are returned as they
            are.

    Returns:
        A tree of the structure of `params`, each leaf rounded to the dtype of its parameter.

    Raises:
        ValueError: nothing in `tx` has a point; two stages have one for the same parameter; the
            state is that of other parameters.

    Example:
        >>> import torch, functorch_opt as fo
        >>> tx = fo.masked(fo.params_ema(0.9, debias=False), {"w": True, "b": False})
        >>> params = {"w": torch.tensor(1.0), "b": torch.tensor(5.0)}
        >>> g = {"w": torch.tensor(1.0), "b": torch.tensor(1.0)}
        >>> _, state = tx.update(g, tx.init(params), params)
        >>> fo.eval_params(tx, state, params)
        {'w': tensor(1.1000), 'b': tensor(5.)}
    """
    if not isinstance(tx, GradientTransformation):
        raise TypeError(
            "eval_params takes the transformation first: eval_params(tx, state, params); "
            f"got {type(tx).__name__}."
        )
    if not has_point(tx):
        raise ValueError(
            "nothing in this transformation averages the parameters: "
            "put params_ema(decay) last in the chain."
        )
    found = points(tx, state, params)
    ps, spec = structure.flatten_tensors(params, "params")
    here = zip(tree.paths(params), ps, strict=True)
    return tree.unflatten(
        spec,
        [
            p if p is None or path not in found else found[path].to(p.dtype)
            for path, p in here
        ],
    )
