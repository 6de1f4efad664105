"""What leaves have their own of in a step, and where updates are written in mid-chain."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from functorch_opt._core.leaf import Each
from functorch_opt._execution.launches import is_aligned
from functorch_opt._execution.waiting import Waiting
from functorch_opt._execution.walk import Walk


def rows_of(each: Waiting, walk: Walk) -> list[tuple[list[Any], bool]]:
    """What a leaf has its own of, and whether that is this step's own, to be written over."""
    rows = []
    for name, value in each.now.items():
        if isinstance(value, Each):
            column = each.view.column(walk.ps, value.tree, name)
            rows.append((column, value.own))
        elif isinstance(value, Tensor) and value.dim() == 1:
            rows.append((list(value.unbind()), False))
    return rows


def place_of(
    rows: list[tuple[list[Any], bool]], us: list[Any], dtypes: list[torch.dtype | None]
) -> int:
    """Which row updates can be written over; a new one where there is none."""
    for k, (row, own) in enumerate(rows):
        if own and all(map(_can_hold, row, us, dtypes)):
            return k
    rows.append(([*map(_like, us, dtypes)], True))
    return len(rows) - 1


def _like(u: Any, dtype: torch.dtype | None) -> Any:
    """Where to write the update that becomes of `u`."""
    if u is None:
        return None
    return torch.empty_like(u, dtype=dtype, memory_format=torch.contiguous_format)


def _can_hold(x: Any, u: Any, dtype: torch.dtype | None) -> bool:
    """Whether the update that becomes of `u` can be written over `x`."""
    if u is None:
        return True
    lies = x.is_contiguous() and is_aligned(x)
    return lies and x.dtype is dtype and x.shape == u.shape
