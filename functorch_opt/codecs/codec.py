"""Codecs: what a slot is stored as, how it is written and how it is read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from functorch_opt.codecs import float8, four_bit, maps


@dataclass(frozen=True, eq=False)
class Codec:
    """How a slot is stored.

    A codec of a `block` keeps codes of the slot's own shape, and a scale for each block of so many
    elements, in the order of the flat index of the whole tensor. Where codes are `packed`, the last
    dimension is shorter; see `shape_of_codes`. A codec without a block keeps the slot in another dtype.
    """

    name: str
    dtype: torch.dtype
    """Of what is kept in the slot's place."""
    block: int = 0
    encode: Callable[..., tuple[Tensor, Tensor]] | None = None
    """``x in blocks -> codes, scales``, of a float32 tensor with a block in each row."""
    decode: Callable[..., Tensor] | None = None
    """``(codes in blocks, scales) -> x``."""
    packed: int = 1
    """How many codes are in a byte."""
    of_scales: torch.dtype = torch.float32
    is_random: bool = False
    """Whether numbers are rounded up or down at random, by bits that a step draws."""

    def n_blocks(
        self,
        n: int,
    ) -> int:
        """How many blocks `n` elements make up, of which the last may not be full."""
        return -(-n // self.block)

    def first_scales(
        self,
        p: Tensor,
    ) -> Tensor:
        """The scales of a slot of zeros."""
        return p.new_zeros(self.n_blocks(p.numel()), dtype=self.of_scales)

    def shape_of_codes(
        self,
        shape: torch.Size,
    ) -> torch.Size:
        """The shape of the codes of a slot.

        Packed codes have a part of its last dimension, if that can be divided; otherwise they are a
        vector.
        """
        if self.packed == 1:
            return shape
        if shape[-1] % self.packed:
            return torch.Size([-(-shape.numel() // self.packed)])
        return torch.Size([*shape[:-1], shape[-1] // self.packed])

    # ---- in rows --------------------------------------------------------------------------------

    def write(
        self,
        x: Tensor,
        columns: int,
    ) -> tuple[Tensor, Tensor]:
        """Codes and scales of a slot, of which each row has `columns` blocks."""
        assert self.encode is not None
        blocks = in_blocks(x.float(), columns, self.block)
        codes, scales = self.encode(blocks)
        codes = out_of_blocks(codes, x.shape[-1])
        if self.packed > 1:
            codes = four_bit.packed(codes)
        return codes, scales.squeeze(-1)

    def read(
        self,
        codes: Tensor,
        scales: Tensor,
        n: int,
    ) -> Tensor:
        """The slot, float32, with `n` elements in each row."""
        assert self.decode is not None
        if self.packed > 1:
            codes = four_bit.unpacked(codes, n)
        blocks = in_blocks(codes, scales.shape[-1], self.block)
        x = self.decode(blocks, scales.unsqueeze(-1))
        return out_of_blocks(x, n)

    # ---- of any shape ---------------------------------------------------------------------------

    def write_whole(
        self,
        x: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Codes, and scales as a vector."""
        codes, scales = self.write(x.reshape(-1), self.n_blocks(x.numel()))
        codes = codes.reshape(self.shape_of_codes(x.shape))
        return codes, scales.to(self.of_scales)

    def read_whole(
        self,
        codes: Tensor,
        scales: Tensor,
        shape: torch.Size,
    ) -> Tensor:
        """The inverse of `write_whole`, but for rounding: a slot of `shape`."""
        x = self.read(codes.reshape(-1), scales.float(), shape.numel())
        return x.reshape(shape)


def in_blocks(
    x: Tensor,
    columns: int,
    block: int,
) -> Tensor:
    """The elements of each row of `x` in `columns` blocks; the last one is filled.

    It is filled with its last element, so that the signs and the largest number stay.
    """
    missing = columns * block - x.shape[-1]
    if missing and columns == 1:
        return x.unsqueeze(-2)
    if missing:
        last = x[..., -1:].expand(*x.shape[:-1], missing)
        x = torch.cat([x, last], -1)
    return x.unflatten(-1, (columns, block))


def out_of_blocks(
    x: Tensor,
    n: int,
) -> Tensor:
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


def _decode_dynamic(
    codes: Tensor,
    scale: Tensor,
) -> Tensor:
    levels = maps.levels if maps.is_traced() else maps.levels_looked_up
    return levels(codes, (scale < 0).to(torch.float32)) * scale.abs()


DYNAMIC = Codec("8bit", torch.uint8, 256, _encode_dynamic, _decode_dynamic)
FOUR_BITS = Codec(
    "4bit", torch.uint8, four_bit.BLOCK, four_bit.encode, four_bit.decode, packed=2
)
FLOAT8 = Codec(
    "float8",
    torch.uint8,
    float8.BLOCK,
    float8.encode,
    float8.decode,
    of_scales=torch.bfloat16,
)
BFLOAT16 = Codec("bfloat16", torch.bfloat16)
ROUNDED = Codec("bfloat16_stochastic", torch.bfloat16, is_random=True)
CODECS = {codec.name: codec for codec in (DYNAMIC, FOUR_BITS, FLOAT8, BFLOAT16, ROUNDED)}
