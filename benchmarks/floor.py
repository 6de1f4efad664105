"""The memory floor: a pass in place over the bytes that a step cannot avoid.

A copy would overstate the floor, because the destination of a copy is first read into the cache,
while what is updated in place has been read anyway. Three plain torch operations stream over four
flat buffers of the size of the whole model, whatever its tensors are: read g, read and write p, m
and v, 28 bytes a parameter in float32. A parameter EMA adds 8, the norm for clipping one more read
of g.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def adamw(
    n: int,
    *,
    slots: int = 2,
    norm: bool = False,
    device: str = "cpu",
    dtypes: tuple[torch.dtype, torch.dtype] | None = None,
):
    """The pass, and the bytes it moves: p, g and `slots` of n elements; with `norm`, g is read once
    before.
    """
    p_dtype, m_dtype = dtypes or (torch.float32, torch.float32)
    p, g = (
        torch.randn(n, device=device).to(p_dtype),
        torch.randn(n, device=device).to(p_dtype),
    )
    others = [torch.randn(n, device=device).to(m_dtype) for _ in range(slots)]

    def run() -> None:
        if norm:
            torch.linalg.vector_norm(g)
        p.add_(g, alpha=1e-12)
        for x in others:
            x.neg_()  # exact: never denormal, never overflowing

    size = n * ((4 if norm else 3) * p_dtype.itemsize + 2 * slots * m_dtype.itemsize)
    return run, size


def copy(n: int, device: str) -> tuple[Callable[[], None], int]:
    """A copy of n float32 elements, and the bytes it reads and writes."""
    a: Tensor = torch.randn(n, device=device)
    b = torch.empty_like(a)
    return lambda: b.copy_(a), 8 * n
