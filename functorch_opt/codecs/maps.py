"""The dynamic map: 256 levels between -1 and 1, fine near 0 and coarse near 1.

A level is ``10**-e`` times a fraction between 0.1 and 1: seven decades, of which each has twice as
many levels as the one below. Beside these there are 0 and 1. The unsigned map has the levels of
one sign only, and so twice as many of them.

They are the levels of bitsandbytes (``create_dynamic_map``), except for the lowest one of the
signed map. There it is -0.993, and here it is -1. So the largest number of a block is kept as it
is, whatever its sign, and to store a stored block again changes nothing.

Source: Dettmers et al., "8-bit Optimizers via Block-wise Quantization", 2021, arXiv:2110.02861,
section 1.3 and appendix F.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from functorch_opt._core.leaf import Table

SIGNED, UNSIGNED = 0, 256
"""Where the levels of each map begin in the tables."""
DECADES = 7
_SHIFT = 15
"""The bits of a float32 that do not decide where to look: 8 bits of its fraction do."""
_FIRST = (127 - 24) << (23 - _SHIFT)
"""The key of 2**-24. What is smaller rounds to 0, in both maps."""
_KEYS = ((127 << (23 - _SHIFT)) - _FIRST) + 1
"""How many keys there are between 0 and 1."""


def dynamic_map(signed: bool) -> Tensor:
    """The 256 levels of a map in increasing order, float64."""
    means = []
    for decade in range(DECADES):
        n = 2 ** (decade if signed else decade + 1)
        edges = torch.linspace(
            0.1,
            1,
            n + 1,
            dtype=torch.float64,
            device="cpu",
        )
        means.append(10.0 ** (decade + 1 - DECADES) * (edges[1:] + edges[:-1]) / 2)
    positive = torch.cat([*means, means[0].new_ones(1)])
    zero = means[0].new_zeros(1)
    if not signed:
        return torch.cat([zero, positive])
    negative = -torch.cat(means)
    negative[-1] = -1
    return torch.cat([negative.flip(0), zero, positive])


def tables_of(levels: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """What encoding and decoding look up, for a signed and an unsigned map one after the other.

    ``levels``: the level of a code. ``bounds``: the largest number that rounds to it. ``codes``: of
    the first bits of a number the first code that it may round to; the second is the next one.
    """
    bounds = []
    first = []
    for of in levels:
        middle = (of[1:] + of[:-1]) / 2
        bounds.append(torch.cat([middle, middle.new_full((1,), torch.inf)]).float())
        first.append(torch.searchsorted(bounds[-1][:-1].contiguous(), _least_of_keys()))
    return {
        "levels": torch.cat(levels).float(),
        "bounds": torch.cat(bounds),
        "codes": torch.cat(
            [
                codes + at
                for codes, at in zip(
                    first,
                    (SIGNED, UNSIGNED),
                    strict=True,
                )
            ]
        ).to(torch.int16),
    }


def _least_of_keys() -> Tensor:
    """Of each key the least number that has it, from those of -1 to those of 1."""
    keys = torch.arange(_KEYS, device="cpu")
    magnitude = ((keys + _FIRST) << _SHIFT).to(torch.int32).view(torch.float32)
    magnitude[0] = 0
    largest = (((keys + 1 + _FIRST) << _SHIFT) - 1).to(torch.int32).view(torch.float32)
    largest[-1] = 1
    return torch.cat([-largest.flip(0), magnitude])


def key_of(y: Tensor) -> Tensor:
    """Where the first code of each number between -1 and 1 is in the table ``codes``."""
    bits = y.abs().view(torch.int32)
    key = ((bits >> _SHIFT) - _FIRST).clamp(0, _KEYS - 1)
    return (
        torch.where(
            y < 0,
            -1 - key,
            key,
        )
        + _KEYS
    )


BOTH_SIGNS = 2 * _KEYS
"""How many entries of the table ``codes`` belong to a map."""


_DYNAMIC = tables_of((dynamic_map(True), dynamic_map(False)))


def dynamic_tables(device: torch.device) -> dict[str, Table]:
    """The tables of the dynamic map, on `device`."""
    if device.type == "cpu":
        return {f"dynamic_{name}": Table(table) for name, table in _DYNAMIC.items()}
    return _elsewhere(device)


@cache
def _elsewhere(device: torch.device) -> dict[str, Table]:
    return {f"dynamic_{name}": Table(x.to(device)) for name, x in _DYNAMIC.items()}
