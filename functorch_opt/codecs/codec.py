"""Codecs: what a slot is stored as, how it is written and how it is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from functorch_opt.codecs.maps import BOTH_SIGNS, UNSIGNED, dynamic_tables, key_of

NO_TABLES: Mapping[str, Any] = {}


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

    def write(
        self,
        x: Tensor,
        columns: int,
        tables: Mapping[str, Any],
    ) -> Any:
        """Codes and scales of a slot, of which each row has `columns` blocks."""
        assert self.encode is not None
        codes, scales = self.encode(
            in_blocks(
                x.float(),
                columns,
                self.block,
            ),
            tables,
        )
        return out_of_blocks(codes, x.shape[-1]), scales.squeeze(-1)

    def read(
        self,
        codes: Tensor,
        scales: Tensor,
        tables: Mapping[str, Any],
    ) -> Tensor:
        """The slot, float32."""
        assert self.decode is not None
        blocks = in_blocks(
            codes,
            scales.shape[-1],
            self.block,
        )
        x = self.decode(
            blocks,
            scales.unsqueeze(-1),
            tables,
        )
        return out_of_blocks(x, codes.shape[-1])


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


def _encode_dynamic(
    x: Tensor,
    tables: Mapping[str, Any],
) -> tuple[Tensor, Tensor]:
    largest = x.abs().amax(-1, keepdim=True)
    # If no number would round to a negative level, the block has the unsigned map.
    unsigned = (x.amin(-1, keepdim=True) >= -_LEAST * largest) & (largest > 0)
    y = x / torch.where(
        largest > 0,
        largest,
        1.0,
    )
    which = unsigned.to(torch.int32)
    key = key_of(y) + which * BOTH_SIGNS
    code = tables["dynamic_codes"][key].to(torch.int32)
    code = code + (y > tables["dynamic_bounds"][code]).to(torch.int32)
    scale = torch.where(
        unsigned,
        -largest,
        largest,
    )
    return (code - which * UNSIGNED).to(torch.uint8), scale


def _decode_dynamic(
    codes: Tensor,
    scale: Tensor,
    tables: Mapping[str, Any],
) -> Tensor:
    place = codes.to(torch.int32) + (scale < 0).to(torch.int32) * UNSIGNED
    return tables["dynamic_levels"][place] * scale.abs()


DYNAMIC = Codec(
    "8bit", torch.uint8, 256, _encode_dynamic, _decode_dynamic, dynamic_tables
)
BFLOAT16 = Codec("bfloat16", torch.bfloat16)
CODECS = {codec.name: codec for codec in (DYNAMIC, BFLOAT16)}
