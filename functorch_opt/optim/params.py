"""The parameters of a stateful optimizer: which can be trained, and what stands in for them."""

from __future__ import annotations

import itertools
import math
from operator import is_
from typing import Any

import torch
from torch import Tensor

from functorch_opt._core import sharding
from functorch_opt._core.leaf import wrong_update
from functorch_opt.optim.numbers import Groups
from functorch_opt.optim.step import NOTHING, State


def can_be_trained(p: Tensor) -> bool:
    """Whether there can be a gradient of it; a tensor of integers is frozen for ever."""
    return p.is_floating_point() or p.is_complex()


def some_can_be_trained(groups: list[dict[str, Any]]) -> bool:
    """Whether there can be a gradient of any parameter of these groups."""
    return any(can_be_trained(p) for group in groups for p in group["params"])


def refuse_gradient(name: str, path: str, p: Tensor, g: Tensor) -> None:
    """Raise an error for a gradient that cannot be used: of integers, or sparse.

    torch lets no gradient differ from its parameter in more than its layout.
    """
    if not can_be_trained(p):
        raise TypeError(
            f"the parameter at {path!r} is {p.dtype} and has a gradient: only "
            "floating and complex tensors can be optimized. Set its grad to None."
        )
    raise ValueError(f"{name}: the update at {path!r} {wrong_update(g, p)}")


def on_meta(params: list[Tensor]) -> list[Tensor | None]:
    """Their shapes and dtypes, without what is no part of the trees: a quantised one may be of a
    class that does not go there."""
    return [p.to("meta") if can_be_trained(p) else None for p in params]


def small(p: Tensor) -> Tensor | None:
    """A few numbers in the place of `p`."""
    if not can_be_trained(p):
        return None
    shape = [min(n, 3) for n in p.shape]
    numbers = torch.linspace(0.1, 1.0, math.prod(shape), device=p.device)
    return numbers.to(p.dtype).reshape(shape)


def overlap(params: list[Tensor]) -> bool:
    """Whether two of them have elements in common."""
    plain = [p for p in params if type(p) in sharding.PLAIN and p.numel()]
    ends = sorted((p.data_ptr(), p.data_ptr() + p.nbytes) for p in plain)
    neighbours = itertools.pairwise(ends)
    return any(end > begin for (_, end), (begin, _) in neighbours)


def layout(groups: Groups) -> list[Any]:
    """What a plan was made for."""
    return [([*map(id, group["params"])], group.get("param_names")) for group in groups]


def entries_of(state: State, params: list[Tensor]) -> list[dict[str, Any]]:
    """What `state` has of each parameter. Mostly it has just these, in this order.

    Looking a tensor up in a dict takes a call of Python's, so it is looked at in order first.
    """
    in_order = not torch.compiler.is_compiling() and len(state) == len(params)
    if in_order and all(map(is_, state, params)):
        return [*state.values()]
    return [state.get(p, NOTHING) for p in params]
