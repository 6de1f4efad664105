"""Whose memory a tensor is: what is written in place must not be read as somebody else's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from functorch_opt import tree
from functorch_opt._core import sharding
from functorch_opt._execution.table import addresses, overlap
from functorch_opt._execution.walk import Walk
from functorch_opt._execution.writes import apart_from, memory_of
from functorch_opt.tree import PyTree


def with_memory_of_its_own(state: PyTree, others: list[Any]) -> PyTree:
    """`state`, with copies of tensors that share memory with `others`, or with one another."""
    taken = {memory_of(x) for x in others} - {0}

    def own(x: Tensor) -> Tensor:
        memory = memory_of(x)
        local = getattr(x, "_local_tensor", x)
        overlaps = type(local) is Tensor and torch._debug_has_internal_overlap(local) == 1
        if memory in taken or overlaps:
            return x.clone(memory_format=torch.contiguous_format)
        if memory:
            taken.add(memory)
        return x

    return tree.map(own, state)


def apart_from_params(us: list[Any], ps: list[Any]) -> list[Any]:
    """The gradients, with copies of those that are a parameter's memory."""
    try:
        if not overlap(ps, us):
            return us
    except RuntimeError:
        return us  # sparse tensors have no memory of their own; they are refused later
    written = addresses(ps)
    return [u.clone() if u is not None and u.data_ptr() in written else u for u in us]


def check_memory(walk: Walk) -> None:
    """Raise ValueError where two parameters share memory."""
    seen: dict[int, int] = {}
    for i, p in enumerate(walk.ps):
        if type(p) in sharding.PLAIN and p.numel():
            first = seen.setdefault(p.data_ptr(), i)
            if first != i:
                raise ValueError(
                    f"the parameters at {walk.paths[first]!r} and {walk.paths[i]!r} share memory, "
                    "so an update in place would move both. Give it once."
                )


def overwritten(old: PyTree, new: PyTree) -> PyTree:
    """`old`, with the values of `new` written over it, which are all read before."""
    pairs = zip(tree.flatten(old)[0], tree.flatten(new)[0], strict=True)
    changed = [(x, y) for x, y in pairs if x is not y]
    written = {memory_of(x) for x, _ in changed} - {0}
    values = [apart_from(written, y) for _, y in changed]
    if changed:
        torch._foreach_copy_([x for x, _ in changed], values)
    return old


def is_captured(params: PyTree) -> bool:
    """Whether what is done with these params now is being captured as a CUDA graph."""
    if not (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()):
        return False
    return any(x.device.type == "cuda" for x in tree.leaves(params))
