"""A stage that lets the updates pass, and keeps trees of tensors that were made of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from functorch_opt import tree
from functorch_opt._core.transformation import GradientTransformation
from functorch_opt.tree import PyTree


def keeping(measures: Mapping[str, Callable[[PyTree], Any]]) -> GradientTransformation:
    """Their form is that of the measures of the params, so that it does not change at the first
    step.
    """

    def init(params):
        measured = {name: _checked(name, f(params)) for name, f in measures.items()}
        return tree.map(_blank, measured)

    def update(updates, state, params):
        measured = {name: _checked(name, f(updates)) for name, f in measures.items()}
        for name, new in measured.items():
            old = state[name]
            if _form(old) != _form(new):
                raise TypeError(
                    f"the measure {name!r} must return the same tree for the updates as for the "
                    f"params: it has {_form(old)} there, and now {_form(new)}."
                )
        # A copy, for what is kept may be no part of the updates.
        return updates, tree.map(lambda x: x.clone(), measured)

    return GradientTransformation(init, update)


def _checked(name: str, measured: Any) -> PyTree:
    if not all(isinstance(x, Tensor) for x in tree.leaves(measured)):
        raise TypeError(
            f"the measure {name!r} must return a tree of tensors; got {measured!r}."
        )
    return measured


def _form(measured: PyTree) -> list[tuple[str, torch.Size, torch.dtype]]:
    leaves = tree.flatten(measured)[0]
    rows = zip(tree.paths(measured), leaves, strict=True)
    return [(path, x.shape, x.dtype) for path, x in rows if x is not None]


def _blank(x: Tensor) -> Tensor:
    """NaN, or 0 where there is none."""
    has_nan = x.dtype.is_floating_point or x.dtype.is_complex
    return torch.full_like(x, float("nan") if has_nan else 0)
