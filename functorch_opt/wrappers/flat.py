"""All tensors of a dtype as one long vector."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from functorch_opt import tree
from functorch_opt._core import sharding
from functorch_opt._core.transformation import GradientTransformation, transformation
from functorch_opt.tree import PyTree

__all__ = ["flatten"]


@transformation
def flatten(inner: GradientTransformation) -> GradientTransformation:
    """Show `inner` one vector for each dtype, in which all tensors of it lie one after another.

    For a transformation of your own that costs much for each tensor. Those of this library work on
    small tensors together anyway, and in a compiled step this one runs eagerly. What looks at single
    tensors (block norms, matrices, masks) sees the vector. In a parameter without a gradient the
    gradient counts as zero, and it does not move.

    Args:
        inner: the transformation. Its trees are dicts from the name of a dtype to a vector.

    Raises:
        TypeError: `inner` is not a transformation.
        ValueError: a gradient is missing, and ``update`` is called without params.
        NotImplementedError: some tensor is sharded.

    Source: optax.flatten, which has one vector, in the widest dtype.

    Example:
        >>> import torch, functorch_opt as fo
        >>> tx = fo.flatten(fo.clip_by_block_rms(1.0))
        >>> params = {"w": torch.tensor([2.0, 2.0]), "b": torch.tensor(0.0)}
        >>> state = tx.init(params)
        >>> tx.update({"w": torch.tensor([3.0, 0.0]), "b": torch.tensor(4.0)}, state, params)[0]
        {'w': tensor([1.0392, 0.0000]), 'b': tensor(1.3856)}
    """
    if not isinstance(inner, GradientTransformation):
        raise TypeError(
            "flatten takes a transformation, e.g. adamw(1e-3); "
            f"got {type(inner).__name__} {inner!r}."
        )

    def init(params):
        return inner.init(vectors(tree.leaves(params)))

    def update(updates, state, params=None, **extra: Any):
        us, spec = tree.flatten(updates)
        ps = us if params is None else tree.flatten(params)[0]
        there = [i for i, p in enumerate(ps) if p is not None]
        if params is None and len(there) < len(us):
            raise ValueError(
                "flatten needs the parameters where a gradient is missing: "
                "call update(updates, state, params)."
            )
        like = [ps[i] for i in there]
        gs = [torch.zeros_like(ps[i]) if us[i] is None else us[i] for i in there]
        beside = None if params is None else vectors(like)
        moved, state = inner.update(vectors(gs, like), state, beside, **extra)
        for i, u in zip(there, parts(moved, like), strict=True):
            us[i] = None if us[i] is None else u
        return tree.unflatten(spec, us), state

    return GradientTransformation(
        init, update, extra_args=inner.extra_args, last=inner.last
    )


def name_of(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def vectors(xs: list[Tensor], like: list[Tensor] | None = None) -> dict[str, Tensor]:
    """``{dtype: vector}``; `like` has the tensors whose dtypes decide."""
    sharding.refuse_sharded("flatten", xs)
    gathered: dict[str, list[Tensor]] = {}
    for x, of in zip(xs, like or xs, strict=True):
        gathered.setdefault(name_of(of), []).append(x.flatten())
    return {name: torch.cat(flat) for name, flat in gathered.items()}


def parts(moved: PyTree, like: list[Tensor]) -> list[Tensor]:
    """The tensors that lie in the vectors, in the shapes of `like`."""
    begin, found = dict.fromkeys(moved, 0), []
    for x in like:
        name = name_of(x)
        flat = moved[name].narrow(0, begin[name], x.numel())
        begin[name] += x.numel()
        found.append(flat.reshape(x.shape).clone())
    return found
