"""A stage that lets the updates pass, and keeps a tree of tensors that was made of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from functorch_opt import tree
from functorch_opt._core.transformation import GradientTransformation
from functorch_opt.tree import PyTree


def keeping(name: str, measure: Callable[[PyTree], Any]) -> GradientTransformation:
    """Its form is that of the measure of the params, so that it does not change at the first step."""

    def init(params):
        return {name: tree.map(_blank, _checked(name, measure(params)))}

    def update(updates, state, params):
        old, new = state[name], _checked(name, measure(updates))
        if _form(old) != _form(new):
            raise TypeError(
                f"the measure {name!r} must return the same tree for the updates as for the params: "
                f"it has {_form(old)} there, and now {_form(new)}."
            )
        # A copy, for what is kept may be no part of the updates.
        return updates, {name: tree.map(lambda x: x.clone(), new)}

    return GradientTransformation(init, update)


def _checked(name: str, measured: Any) -> PyTree:
    if not all(isinstance(x, Tensor) for x in tree.leaves(measured)):
        raise TypeError(
            f"the measure {name!r} must return a tree of tensors; got {measured!r}."
        )
    return measured


def _form(measured: PyTree) -> list[tuple[str, torch.Size, torch.dtype]]:
    rows = zip(tree.paths(measured), tree.flatten(measured)[0], strict=True)
    return [(path, x.shape, x.dtype) for path, x in rows if x is not None]


def _blank(x: Tensor) -> Tensor:
    """NaN, or 0 where there is none."""
    has_nan = x.dtype.is_floating_point or x.dtype.is_complex
    return torch.full_like(x, float("nan") if has_nan else 0)
