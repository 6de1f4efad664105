"""Numbers of eight bits with an exponent of their own: e4m3fn, with a scale for each block of 128.

A number has 3 bits of fraction, so it is off by at most 1/16 of itself, down to 2**-14 of the
largest of its block. The scale is a power of two, by which nothing is rounded. So to store a stored
block again changes nothing. It is kept in bfloat16, which has all powers of two. In a block
without negative numbers, as in second moments, no positive number becomes 0, by which an update
would be divided.

Source: Micikevicius et al., "FP8 Formats for Deep Learning", 2022, arXiv:2209.05433, section 3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from functorch_opt.transforms.rounding import power_below

BLOCK = 128
E4M3 = torch.float8_e4m3fn
_LEAST = 2.0**-118
"""The scale of smaller blocks is that of this number: it must not be denormal."""


def encode(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes as bytes, and scales, with which the largest number of a block is at most 448."""
    least = x.amin(-1, keepdim=True)
    largest = torch.maximum(x.amax(-1, keepdim=True), -least)
    power = power_below(largest).clamp(min=_LEAST)
    scale = torch.where(largest > 1.75 * power, 2 * power, power) / 256
    codes = (x / scale).to(E4M3).view(torch.uint8)
    kept = (least >= 0) & (x > 0)
    return torch.where(kept, codes.clamp(min=1), codes), scale


def decode(
    codes: Tensor,
    scale: Tensor,
) -> Tensor:
    """The inverse of `encode`, but for rounding."""
    return codes.view(E4M3).to(torch.float32) * scale
