"""Codecs: what a slot is stored as, how it is written and how it is read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from functorch_opt.codecs import maps


@dataclass(frozen=True, eq=False)
class Codec:
    """How a slot is stored.

    A codec of a `block` keeps codes of the slot's own shape, and a float32 scale for each block of
    so many elements, in the order of the flat index of the whole tensor. A codec without one keeps
    the slot in another dtype.
    """

    name: str
    dtype: torch.dtype
    """Of what is kept in the slot's place."""
    block: int = 0
    encode: Callable[..., tuple[Tensor, Tensor]] | None = None
    """``x in blocks -> codes, scales``, of a float32 tensor with a block in each row."""
    decode: Callable[..., Tensor] | None = None
    """``(codes in blocks, scales) -> x``."""
    is_random: bool = False
    """Whether numbers are rounded up or down at random, by bits that a step draws."""

    def n_blocks(self, n: int) -> int:
        """How many blocks `n` elements make up, of which the last may not be full."""
        return -(-n // self.block)

    def first_scales(self, p: Tensor) -> Tensor:
        """The scales of a slot of zeros."""
        return p.new_zeros(self.n_blocks(p.numel()), dtype=torch.float32)

    # ---- in rows --------------------------------------------------------------------------------

    def write(self, x: Tensor, columns: int) -> tuple[Tensor, Tensor]:
        """Codes and scales of a slot, of which each row has `columns` blocks."""
        assert self.encode is not None
        blocks = in_blocks(x.float(), columns, self.block)
        codes, scales = self.encode(blocks)
        return out_of_blocks(codes, x.shape[-1]), scales.squeeze(-1)

    def read(self, codes: Tensor, scales: Tensor) -> Tensor:
        """The slot, float32."""
        assert self.decode is not None
        blocks = in_blocks(codes, scales.shape[-1], self.block)
        x = self.decode(blocks, scales.unsqueeze(-1))
        return out_of_blocks(x, codes.shape[-1])

    # ---- of any shape ---------------------------------------------------------------------------

    def write_whole(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Codes of the shape of `x`, and its scales as a vector."""
        codes, scales = self.write(x.reshape(-1), self.n_blocks(x.numel()))
        return codes.reshape(x.shape), scales

    def read_whole(self, codes: Tensor, scales: Tensor) -> Tensor:
        """The inverse of `write_whole`, but for rounding."""
        return self.read(codes.reshape(-1), scales).reshape(codes.shape)


def in_blocks(
    x: Tensor,
    columns: int,
    block: int,
) -> Tensor:
    """The elements of each row of `x` in `columns` blocks; the last one is filled with zeros."""
    missing = columns * block - x.shape[-1]
    if missing and columns == 1:
        return x.unsqueeze(-2)
    if missing:
        x = torch.nn.functional.pad(x, (0, missing))
    return x.unflatten(-1, (columns, block))


def out_of_blocks(x: Tensor, n: int) -> Tensor:
    """The inverse of `in_blocks`: the first `n` elements of each row."""
    x = x.flatten(-2)
    return x if x.shape[-1] == n else x[..., :n]


# ---- dynamic map ---------------------------------------------------------------------------------

_LEAST = 2.75e-7
"""A negative number of this size, in units of the largest, still rounds to 0 in the signed map."""


def _encode_dynamic(x: Tensor) -> tuple[Tensor, Tensor]:
    least = x.amin(-1, keepdim=True)
    largest = torch.maximum(x.amax(-1, keepdim=True), -least)
    has_numbers = largest > 0
    # If no number would round to a negative level, the block has the unsigned map.
    is_unsigned = (least >= -_LEAST * largest) & has_numbers
    y = x / torch.where(has_numbers, largest, 1.0)
    nearest = maps.nearest if maps.is_traced() else maps.nearest_looked_up
    code = nearest(y, is_unsigned.to(torch.float32))
    return code, torch.where(is_unsigned, -largest, largest)


def _decode_dynamic(codes: Tensor, scale: Tensor) -> Tensor:
    levels = maps.levels if maps.is_traced() else maps.levels_looked_up
    return levels(codes, (scale < 0).to(torch.float32)) * scale.abs()


DYNAMIC = Codec("8bit", torch.uint8, 256, _encode_dynamic, _decode_dynamic)
BFLOAT16 = Codec("bfloat16", torch.bfloat16)
ROUNDED = Codec("bfloat16_stochastic", torch.bfloat16, is_random=True)
CODECS = {codec.name: codec for codec in (DYNAMIC, BFLOAT16, ROUNDED)}
