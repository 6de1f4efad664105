"""Decisions of a step: whether the host knows them, and what is done if it does not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def known(flag: Any) -> bool | None:
    """The value of a decision if the host has it, and None if it would have to wait for the value.

    It is not known in a graph, under vmap, and on a device other than the CPU.
    """
    if not isinstance(flag, Tensor):
        return bool(flag)
    if torch.compiler.is_compiling() or flag.device.type != "cpu" or flag.dim():
        return None
    try:
        return bool(flag)
    except RuntimeError:  # vmap and make_fx raise it where a value would be needed
        return None


def chosen(flag: Any, new: Tensor | None, old: Tensor | None) -> Tensor | None:
    """`new` if the decision is true, and `old` otherwise."""
    if new is None or old is None or new is old:
        return old if new is None else new
    if isinstance(flag, bool):
        return new if flag else old
    if flag.device != new.device and flag.device.type != "cpu":
        flag = flag.to(new.device, non_blocking=new.device.type != "cpu")
    return torch.where(
        flag, new, old.to(new.dtype) if old.dtype is not new.dtype else old
    )
