"""Four bits: 16 levels for blocks of 128, and two codes in a byte.

A block in which a number is negative has the dynamic map of three decades. A block of positive
numbers, as in second moments, has the linear map: 1/16, 2/16, ..., 1 times the largest. It has no
0, so that no second moment becomes 0, by which an update would be divided.

Zeros stay zeros: a block of positive numbers and zeros has the dynamic map, and in it no positive
number becomes 0.

The levels are those of torchao, except for the lowest one of the dynamic map: there it is -0.8875,
and here it is -1. So the largest number of a block is kept as it is, whatever its sign.

Source: Li et al., "Memory Efficient Optimizers with 4-bit States", 2023, arXiv:2309.01507,
sections 3 and 4.
"""

from __future__ import annotations

from functools import cache
from itertools import pairwise

import torch
from torch import Tensor

from functorch_opt.codecs import maps

BLOCK = 128
LEVELS = maps.dynamic_map(True, decades=3).tolist()
"""Of the dynamic map, in increasing order."""
ZERO = LEVELS.index(0.0)
_BOUNDS = [(a + b) / 2 for a, b in pairwise(LEVELS)]


def encode(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes below 16, and scales: negative for the linear map."""
    least = x.amin(-1, keepdim=True)
    largest = torch.maximum(x.amax(-1, keepdim=True), -least)
    y = x / torch.where(largest > 0, largest, 1.0)
    code = _nearest(y)
    kept = (least >= 0) & (x > 0)
    code = torch.where(kept, code.clamp(min=ZERO + 1), code)
    is_linear = least > 0
    linear = (y * 16 - 0.5).ceil().clamp(1, 16) - 1
    code = torch.where(is_linear, linear, code)
    return code.to(torch.uint8), torch.where(is_linear, -largest, largest)


def decode(
    codes: Tensor,
    scale: Tensor,
) -> Tensor:
    """The inverse of `encode`, but for rounding."""
    linear = (codes.to(torch.float32) + 1) / 16
    return torch.where(scale < 0, linear, _level(codes)) * scale.abs()


def _nearest(y: Tensor) -> Tensor:
    """The place of the nearest level, float32: how many bounds are below."""
    if not _is_traced(y):
        return torch.bucketize(y, _table(y.device)[1]).to(torch.float32)
    code = torch.zeros_like(y)
    for bound in _table(torch.device("cpu"))[1].tolist():
        code = code + (y > bound).to(torch.float32)
    return code


def _level(codes: Tensor) -> Tensor:
    """The level of each code in the dynamic map."""
    if not _is_traced(codes):
        levels = _table(codes.device)[0]
        return levels.index_select(0, codes.flatten().int()).view(codes.shape)
    level = torch.full_like(codes, LEVELS[0], dtype=torch.float32)
    for k, one in enumerate(LEVELS[1:], start=1):
        level = torch.where(codes >= k, one, level)
    return level


def _is_traced(x: Tensor) -> bool:
    """Whether a graph is made, which is then to have no look-ups."""
    return x.is_meta or maps.is_traced()


@cache
def _table(device: torch.device) -> tuple[Tensor, Tensor]:
    """The levels and the bounds between them, float32."""
    with torch.inference_mode(False):
        rows = [torch.tensor(row, device=device) for row in (LEVELS, _BOUNDS)]
        return rows[0], rows[1]


# ---- two in a byte -------------------------------------------------------------------------------


def packed(codes: Tensor) -> Tensor:
    """Two codes in a byte along the last dimension, the first one in the upper bits."""
    if codes.shape[-1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    pairs = codes.unflatten(-1, (-1, 2))
    return pairs[..., 0] * 16 + pairs[..., 1]


def unpacked(
    both: Tensor,
    n: int,
) -> Tensor:
    """The inverse of `packed`: the `n` codes of each row."""
    codes = torch.stack([both >> 4, both & 15], -1).flatten(-2)
    return codes if codes.shape[-1] == n else codes[..., :n]
