"""A compiled step in a graph that somebody else compiles: one operation of that graph.

Traced, a step is operations for every tensor, which take seconds to compile, although they are
compiled already. So with ``compile=True`` the graph only says which optimizer makes a step, with
which gradients. When it runs, the optimizer reads its groups and its state as ever: a rate or a
count that changes compiles nothing.
"""

from __future__ import annotations

import itertools
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from functorch_opt._core import sharding

_OPTIMIZERS: WeakValueDictionary[int, Any] = WeakValueDictionary()
_NUMBERS = itertools.count()


def number_of(optimizer: Any) -> int:
    """A number for a new optimizer, by which the operation finds it."""
    number = next(_NUMBERS)
    _OPTIMIZERS[number] = optimizer
    return number


@torch.library.custom_op(
    "functorch_opt::step",
    mutates_args=("params",),
    schema="(Tensor(a!)[] params, Tensor[] grads, Tensor? loss, int[] where, int number) -> ()",
    # It reads numbers on the host at every step, which a CUDA graph would not.
    tags=[tag] if (tag := getattr(torch.Tag, "cudagraph_unsafe", None)) else [],
)
@torch.no_grad()
def step(
    params: list[Tensor],
    grads: list[Tensor],
    loss: Tensor | None,
    where: list[int],
    number: int,
) -> None:
    """Make a step of an optimizer.

    Args:
        params: the parameters that have a gradient, as the graph has them: mostly the memory of
            the optimizer's own.
        grads: their gradients.
        loss: what a closure returned.
        where: which of the optimizer's parameters they are.
        number: of the optimizer.
    """
    optimizer = _OPTIMIZERS[number]
    everybody = [p for group in optimizer.param_groups for p in group["params"]]
    before = [p.grad for p in everybody]
    mine = [everybody[i] for i in where]
    pairs = zip(mine, params, strict=True)
    apart = [(p, given) for p, given in pairs if p.data_ptr() != given.data_ptr()]
    for p, given in apart:
        p.copy_(given)
    for p in everybody:
        p.grad = None
    try:
        for p, g in zip(mine, grads, strict=True):
            p.grad = g
        optimizer._advance(loss)
    finally:
        for p, g in zip(everybody, before, strict=True):
            p.grad = g
    for p, given in apart:
        given.copy_(p)


def as_one(groups: list[dict[str, Any]], loss: Any, number: int) -> bool:
    """Make the step as one operation of the graph that is traced. False where it cannot be one, for
    the operation takes no sharded parameters."""
    params = [p for group in groups for p in group["params"]]
    if not all(type(p) in sharding.PLAIN for p in params):
        return False
    where = [i for i, p in enumerate(params) if p.grad is not None]
    moved = [params[i] for i in where]
    if loss is not None:
        loss = torch.as_tensor(loss).detach()
    if moved:
        step(moved, [p.grad for p in moved], loss, where, number)
    return True


@step.register_fake
def _(params: Any, grads: Any, loss: Any, where: Any, number: Any) -> None:
    return None
