"""Codecs: what a slot is stored as, how it is written and how it is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from functorch_opt.codecs.maps import BOTH_SIGNS, UNSIGNED, dynamic_tables, key_of

NO_TABLES: Mapping[str, Any] = {}
"""What a codec looks up that looks nothing up."""


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
    """``(x in blocks, tables) -> codes, scales``, of a float32 tensor with a block in each row."""
    decode: Callable[..., Tensor] | None = None
    """``(codes in blocks, scales, tables) -> x``."""
    tables: Callable[[torch.device], Mapping[str, Any]] = lambda device: NO_TABLES

    def n_blocks(self, n: int) -> int:
        """How many blocks `n` elements make up, of which the last may not be full."""
        return -(-n // self.block)

    def first_scales(self, p: Tensor) -> Tensor:
        """The scales of a slot of zeros."""
        return p.new_zeros(self.n_blocks(p.numel()), dtype=torch.float32)

    # ---- in rows --------------------------------------------------------------------------------

    def write(
        self,
        x: Tensor,
        columns: int,
        tables: Mapping[str, Any],
    ) -> Any:
        """Codes and scales of a slot, of which each row has `columns` blocks."""
        assert self.encode is not None
        blocks = in_blocks(x.float(), columns, self.block)
        codes, scales = self.encode(blocks, tables)
        return out_of_blocks(codes, x.shape[-1]), scales.squeeze(-1)

    def read(
        self,
        codes: Tensor,
        scales: Tensor,
        tables: Mapping[str, Any],
    ) -> Tensor:
        """The slot, float32."""
        assert self.decode is not None
        blocks = in_blocks(codes, scales.shape[-1], self.block)
        x = self.decode(blocks, scales.unsqueeze(-1), tables)
        return out_of_blocks(x, codes.shape[-1])

    # ---- of any shape ---------------------------------------------------------------------------

    def _tensors(self, device: torch.device) -> dict[str, Tensor]:
        tables = self.tables(device)
        return {name: table.tensor for name, table in tables.items()}

    def write_whole(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Codes of the shape of `x`, and its scales as a vector."""
        tables = self._tensors(x.device)
        columns = self.n_blocks(x.numel())
        codes, scales = self.write(x.reshape(-1), columns, tables)
        return codes.reshape(x.shape), scales

    def read_whole(self, codes: Tensor, scales: Tensor) -> Tensor:
        """The inverse of `write_whole`, but for rounding."""
        tables = self._tensors(codes.device)
        x = self.read(codes.reshape(-1), scales, tables)
        return x.reshape(codes.shape)


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


def _encode_dynamic(x: Tensor, tables: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    largest = x.abs().amax(-1, keepdim=True)
    least = x.amin(-1, keepdim=True)
    has_numbers = largest > 0
    # If no number would round to a negative level, the block has the unsigned map.
    unsigned = (least >= -_LEAST * largest) & has_numbers
    y = x / torch.where(has_numbers, largest, 1.0)
    code = _nearest(y, unsigned.to(torch.int32), tables)
    return code.to(torch.uint8), torch.where(unsigned, -largest, largest)


def _nearest(
    y: Tensor,
    unsigned: Tensor,
    tables: Mapping[str, Any],
) -> Tensor:
    """The codes of the levels nearest to numbers between -1 and 1, in one of the two maps."""
    key = key_of(y) + unsigned * BOTH_SIGNS
    place = tables["dynamic_codes"][key].to(torch.int32)
    is_above = y > tables["dynamic_bounds"][place]
    place = place + is_above.to(torch.int32)
    return place - unsigned * UNSIGNED


def _decode_dynamic(
    codes: Tensor,
    scale: Tensor,
    tables: Mapping[str, Any],
) -> Tensor:
    unsigned = (scale < 0).to(torch.int32)
    place = codes.to(torch.int32) + unsigned * UNSIGNED
    return tables["dynamic_levels"][place] * scale.abs()


DYNAMIC = Codec(
    name="8bit",
    dtype=torch.uint8,
    block=256,
    encode=_encode_dynamic,
    decode=_decode_dynamic,
    tables=dynamic_tables,
)
BFLOAT16 = Codec("bfloat16", torch.bfloat16)
CODECS = {codec.name: codec for codec in (DYNAMIC, BFLOAT16)}
