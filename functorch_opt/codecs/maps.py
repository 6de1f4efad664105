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
    below = [_decade(k, signed) for k in range(DECADES)]
    one = torch.ones(1, dtype=torch.float64, device="cpu")
    zero = torch.zeros_like(one)
    if not signed:
        return torch.cat([zero, *below, one])
    negative = torch.cat([*below]).flip(0).neg()
    negative[0] = -1
    return torch.cat([negative, zero, *below, one])


def _decade(k: int, signed: bool) -> Tensor:
    """The levels of a decade, the lowest being 0: the middles of equal parts of it."""
    n = 2**k if signed else 2 ** (k + 1)
    edges = torch.linspace(0.1, 1, n + 1, dtype=torch.float64, device="cpu")
    twice = edges[1:] + edges[:-1]
    return 10.0 ** (k + 1 - DECADES) * twice / 2


def tables_of(signed: Tensor, unsigned: Tensor) -> dict[str, Tensor]:
    """What encoding and decoding look up, for a signed and an unsigned map one after the other.

    ``levels``: the level of a code. ``bounds``: the largest number that rounds to it. ``codes``: of
    the first bits of a number the first code that it may round to; the second is the next one.
    """
    codes = [_first_codes(signed) + SIGNED, _first_codes(unsigned) + UNSIGNED]
    bounds = [_bounds(signed), _bounds(unsigned)]
    return {
        "levels": torch.cat([signed, unsigned]).float(),
        "bounds": torch.cat(bounds),
        "codes": torch.cat(codes).to(torch.int16),
    }


def _bounds(levels: Tensor) -> Tensor:
    """The largest number that rounds to each level."""
    middle = (levels[1:] + levels[:-1]) / 2
    last = middle.new_full((1,), torch.inf)
    return torch.cat([middle, last]).float()


def _first_codes(levels: Tensor) -> Tensor:
    """The first code that the numbers of each key may round to."""
    bounds = _bounds(levels)[:-1].contiguous()
    return torch.searchsorted(bounds, _least_of_keys())


def _least_of_keys() -> Tensor:
    """Of each key the least number that has it, from those of -1 to those of 1."""
    keys = torch.arange(_KEYS, device="cpu")
    least = _number(keys)
    least[0] = 0
    # A negative number of a key is least where its magnitude is largest: just below the next key.
    largest = _number(keys + 1, less=1)
    largest[-1] = 1
    return torch.cat([-largest.flip(0), least])


def _number(keys: Tensor, less: int = 0) -> Tensor:
    """The positive numbers at which keys begin, less so many units of their last bit."""
    bits = ((keys + _FIRST) << _SHIFT) - less
    return bits.to(torch.int32).view(torch.float32)


def key_of(y: Tensor) -> Tensor:
    """Where the first code of each number between -1 and 1 is in the table ``codes``."""
    bits = y.abs().view(torch.int32)
    key = (bits >> _SHIFT) - _FIRST
    key = key.clamp(0, _KEYS - 1)
    return torch.where(y < 0, -1 - key, key) + _KEYS


BOTH_SIGNS = 2 * _KEYS
"""How many entries of the table ``codes`` belong to a map."""


_DYNAMIC = tables_of(dynamic_map(True), dynamic_map(False))


def dynamic_tables(device: torch.device) -> dict[str, Table]:
    """The tables of the dynamic map, on `device`."""
    return _HERE if device.type == "cpu" else _on(device)


@cache
def _on(device: torch.device) -> dict[str, Table]:
    return {f"dynamic_{name}": Table(x.to(device)) for name, x in _DYNAMIC.items()}


_HERE = _on(torch.device("cpu"))
