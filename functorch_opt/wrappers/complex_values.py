"""Complex parameters as pairs of real ones."""

from __future__ import annotations

from typing import Any

import torch

from functorch_opt import tree
from functorch_opt._core import sharding
from functorch_opt._core.transformation import GradientTransformation, transformation
from functorch_opt.tree import PyTree

__all__ = ["split_real_and_imaginary"]


@transformation
def split_real_and_imaginary(inner: GradientTransformation) -> GradientTransformation:
    """Show `inner` the real and the imaginary part of complex tensors as two tensors.

    The optimizers of this library see complex numbers as pairs of reals anyway, as those of torch
    do. This is for a transformation that looks at whole tensors, such as a matrix or its norm, and
    is to look at each part by itself; and for your own, if it cannot take complex tensors.

    Args:
        inner: the transformation. In its trees there is ``{"real": tensor, "imaginary": tensor}``
            in the place of a complex tensor. In a compiled step it runs eagerly.

    Raises:
        TypeError: `inner` is not a transformation.
        NotImplementedError: some tensor is sharded.

    Source: optax.contrib.split_real_and_imaginary. The gradients of torch are conjugates already.

    Example:
        >>> import torch, functorch_opt as fo
        >>> tx = fo.split_real_and_imaginary(fo.clip_by_block_rms(1.0))
        >>> g = [torch.tensor([0.5 + 4.0j])]
        >>> tx.update(g, tx.init(g))[0]
        [tensor([0.5000+1.j])]
    """
    if not isinstance(inner, GradientTransformation):
        raise TypeError(
            "split_real_and_imaginary takes a transformation, e.g. adamw(1e-3); "
            f"got {type(inner).__name__} {inner!r}."
        )

    def init(params):
        return inner.init(parts(params))

    def update(updates, state, params=None, **extra: Any):
        ps = None if params is None else parts(params)
        split, state = inner.update(parts(updates, params), state, ps, **extra)
        return joined(updates, split), state

    return GradientTransformation(
        init, update, extra_args=inner.extra_args, last=inner.last
    )


def parts(given: PyTree, like: PyTree | None = None) -> PyTree:
    """A tree with a pair in the place of every complex tensor, and of what is None beside one."""
    here, spec = tree.flatten(given)
    beside = here if like is None else tree.flatten(like)[0]
    sharding.refuse_sharded("split_real_and_imaginary", here)
    both = zip(here, beside, strict=True)
    return tree.unflatten(spec, [_pair(x, y) for x, y in both])


def _pair(x: Any, beside: Any) -> Any:
    shown = beside if x is None else x
    if shown is None or not shown.is_complex():
        return x
    if x is None:
        return {"real": None, "imaginary": None}
    return {"real": x.real.clone(), "imaginary": x.imag.clone()}


def joined(updates: PyTree, split: PyTree) -> PyTree:
    """The tree of `updates`, with what `split` holds for it."""
    us, spec = tree.flatten(updates)
    new, found = [], iter(tree.flatten(split)[0])
    for u in us:
        x = next(found)
        if u is not None and u.is_complex():
            # In a dict of two, the imaginary part comes first.
            x = torch.complex(next(found), x)
        new.append(x)
    return tree.unflatten(spec, new)
