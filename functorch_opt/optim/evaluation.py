"""What a stateful optimizer evaluates with, put into the parameters for a while."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def held(values: Mapping[Tensor, Tensor]) -> Iterator[None]:
    """Inside, the parameters have these values; afterwards their own again."""
    own = {p: p.detach().clone() for p in values}
    try:
        _write(values)
        yield
    finally:
        _write(own)


@torch.no_grad()
def _write(values: Mapping[Tensor, Tensor]) -> None:
    for p, value in values.items():
        p.copy_(value)
