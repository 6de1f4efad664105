"""The dynamic map: 256 levels between -1 and 1, fine near 0 and coarse near 1.

A level is ``10**-e`` times a fraction between 0.1 and 1: seven decades, of which each has twice as
many levels as the one below. Beside these there are 0 and 1. The unsigned map has the levels of
one sign only, and so twice as many of them.

They are the levels of bitsandbytes (``create_dynamic_map``), except for the lowest one of the
signed map. There it is -0.993, and here it is -1. So the largest number of a block is kept as it
is, whatever its sign, and to store a stored block again changes nothing.

The map is piecewise linear. Give the k-th level above 0 the place ``t = 2 k + 1`` in the signed
map, and ``t = k + 3/2`` in the unsigned one. Then the decade from ``10**(e - 8)`` to
``10**(e - 7)`` is the octave of places from ``2**e`` to ``2**(e + 1)``, and inside of it

    level = (18 t - 16 * 2**e) * 5**(e - 8) / 512

in both maps. So a level is worked out from its code, and a code from its number, with nothing
looked up: in compiled code for a vector of numbers at a time. Eager code has few operations for
this, and looks the same numbers up.

Source: Dettmers et al., "8-bit Optimizers via Block-wise Quantization", 2021, arXiv:2110.02861,
section 1.3 and appendix F.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

DECADES = 7
_UNIT = [5.0 ** (e - 8) / 512 for e in range(9)]
"""What a place of each octave is worth, 18 times."""


def dynamic_map(
    signed: bool,
    decades: int = DECADES,
) -> Tensor:
    """The levels of a map in increasing order, float64: 256 of them, or 16 of three decades."""
    below = [_decade(k, signed, decades) for k in range(decades)]
    one = torch.ones(1, dtype=torch.float64, device="cpu")
    zero = torch.zeros_like(one)
    if not signed:
        return torch.cat([zero, *below, one])
    negative = torch.cat([*below]).flip(0).neg()
    negative[0] = -1
    return torch.cat([negative, zero, *below, one])


def _decade(
    k: int,
    signed: bool,
    decades: int,
) -> Tensor:
    """The levels of a decade, the lowest being 0: the middles of equal parts of it."""
    n = 2**k if signed else 2 ** (k + 1)
    edges = torch.linspace(0.1, 1, n + 1, dtype=torch.float64, device="cpu")
    twice = edges[1:] + edges[:-1]
    return 10.0 ** (k + 1 - decades) * twice / 2


# ---- worked out ----------------------------------------------------------------------------------


def levels(
    codes: Tensor,
    unsigned: Tensor,
) -> Tensor:
    """The level of each code.

    Args:
        codes: uint8.
        unsigned: float32 of a shape that broadcasts, 1 for the unsigned map and 0 for the signed.
    """
    signed_count = codes.to(torch.float32) + (128 * unsigned - 127)
    # How many levels above 0; that of -1, which is in the place of -0.993, is the 128th.
    count = torch.maximum(signed_count.abs(), -2 * signed_count - 126)
    t = (count + 0.5) * (2 - unsigned)
    steps = 18 * t - 16 * _octave(t)
    level = steps * _fives(t) * _UNIT[1]
    level = torch.where(t < 2, 0.0, level.clamp(max=1))
    return torch.copysign(level, signed_count)


def _octave(t: Tensor) -> Tensor:
    """The largest power of two that is at most t: its exponent, without other bits."""
    return (t.view(torch.int32) & 0x7F800000).view(torch.float32)


def _fives(t: Tensor) -> Tensor:
    """``5**(e - 1)`` of the octave e of t, which is between 1 and 8."""
    exponent = t.view(torch.int32) >> 23  # 127 + e, whose last bits are those of e - 1
    once = (exponent & 1) * 4 + 1
    twice = (exponent & 2) * 12 + 1
    four_times = (exponent & 4) * 156 + 1
    return once.float() * twice.float() * four_times.float()


_LINES = [(1 / (18 * _UNIT[e]), 16 / 18 * 2**e) for e in range(1, 8)]
"""The places of numbers in each octave: slopes, and the values at 0."""


class _Top(NamedTuple):
    """From where on numbers are rounded to 1 and to -1: where ``|y - middle|`` is above `half`."""

    middle: float
    half: float


def _top() -> tuple[_Top, float]:
    """The top of the signed map, and `half` of the unsigned one."""
    signed, unsigned = dynamic_map(True), dynamic_map(False)
    one = float(signed[-2:].mean())
    minus_one = float(signed[:2].mean())
    middle = (one + minus_one) / 2
    unsigned_one = float(unsigned[-2:].mean())
    return _Top(middle, one - middle), unsigned_one - middle


_TOP, _TOP_UNSIGNED = _top()


def nearest(
    y: Tensor,
    unsigned: Tensor,
) -> Tensor:
    """The code of the level nearest to each number between -1 and 1, uint8.

    Within the rounding of a few operations: a number may get the second nearest level if it is
    nearer than a millionth of itself to the middle between two.

    Args:
        y: float32.
        unsigned: as in `levels`. In the unsigned map negative numbers become 0.
    """
    size = y.abs()
    slope, begin = _LINES[0]
    t = size * slope + begin
    for slope, begin in _LINES[1:]:
        t = torch.minimum(t, size * slope + begin)
    count = _rounded(t * (0.5 + 0.5 * unsigned))
    # From half of the first level on, which `_rounded` would take for less.
    first = size * (0.5 / _UNIT[1]) + (3.25 * unsigned - 4.5)
    count = torch.maximum(count, torch.minimum(first, 1.9 + unsigned))
    count = torch.copysign(count, y)
    # The last levels but one; then those of 1 and -1.
    count = torch.maximum(count, 127 * unsigned - 126.9)
    count = torch.minimum(count, 127.9 + 128 * unsigned)
    top = _TOP.half + unsigned * (_TOP_UNSIGNED - _TOP.half)
    is_top = (y - _TOP.middle).abs() > top
    count = count + torch.where(is_top, y, 0.0)
    code_of_zero = 127 - 128 * unsigned
    return (count.trunc() + code_of_zero).to(torch.uint8)


def _rounded(t: Tensor) -> Tensor:
    """A number whose whole part is the level that is nearest to place t.

    Levels are in the middle between whole places, so it is t; but below an octave levels lie closer
    to each other. So a fifth of a place above it still belongs to the level below.
    """
    return torch.minimum(t, (t + t - 0.4) - _octave(t))


# ---- looked up -----------------------------------------------------------------------------------

_SHIFT = 15
"""The bits of a float32 that do not decide where to look: its sign and 8 bits of its fraction do."""
_KEYS = 1 << (32 - _SHIFT)


class Tables(NamedTuple):
    """What eager code looks up, for the signed map and then for the unsigned one."""

    levels: Tensor
    """Of each code."""
    first: Tensor
    """Of each key, the place of the first code that its numbers may get. The second is the next."""
    bounds: Tensor
    """The largest number that gets each code."""


def _tables() -> Tables:
    unsigned = torch.tensor([[0.0], [1.0]], device="cpu")
    every_code = torch.arange(256, device="cpu").to(torch.uint8)
    codes = every_code.expand(2, 256)
    keys = torch.arange(_KEYS, device="cpu")
    is_negative = keys >= _KEYS // 2
    # The least number of a key; of negative numbers, that is the one with the largest magnitude.
    bits = (keys << _SHIFT) + is_negative * ((1 << _SHIFT) - 1)
    floats = bits.to(torch.int32).view(torch.float32)
    least = floats.nan_to_num().clamp(-1, 1)
    of_codes = levels(codes, unsigned)
    row = unsigned.to(torch.int32) * 256
    first = nearest(least.expand(2, -1), unsigned) + row
    bounds = _bounds(of_codes, unsigned)
    return Tables(of_codes.flatten(), first.flatten(), bounds.flatten())


def _bounds(
    of_codes: Tensor,
    unsigned: Tensor,
) -> Tensor:
    """The largest number that `nearest` gives each code. It is near the middle between levels."""
    codes = torch.arange(255, device="cpu")
    middle = (of_codes[:, 1:] + of_codes[:, :-1]) / 2
    below, above = (
        middle * (1 - 1e-5 * middle.sign()),
        middle * (1 + 1e-5 * middle.sign()),
    )
    for _ in range(10):  # until the two are neighbours
        between = (below + above) / 2
        is_below = nearest(between, unsigned) <= codes
        below = torch.where(is_below, between, below)
        above = torch.where(is_below, above, between)
    last = torch.full((2, 1), torch.inf, device="cpu")
    return torch.cat([below, last], -1)


@cache
def tables_on(device: torch.device) -> Tables:
    """The tables, on `device`."""
    with torch.inference_mode(False):
        return Tables(*[table.to(device) for table in _tables()])


def is_traced() -> bool:
    """Whether a graph is made of what happens here, which is then to have no look-ups."""
    return torch.compiler.is_compiling() or is_in_torch_dispatch_mode()


def levels_looked_up(
    codes: Tensor,
    unsigned: Tensor,
) -> Tensor:
    """The same as `levels`."""
    place = codes.to(torch.int32)
    place += unsigned.to(torch.int32) * 256
    return _taken(tables_on(codes.device).levels, place)


def nearest_looked_up(
    y: Tensor,
    unsigned: Tensor,
) -> Tensor:
    """The same as `nearest`. What can be worked out in place is: memory is what takes the time."""
    tables, is_unsigned = tables_on(y.device), unsigned.to(torch.int32)
    key = y.view(torch.int32) >> _SHIFT
    key &= _KEYS - 1
    key += is_unsigned * _KEYS
    place = _taken(tables.first, key)
    difference = _taken(tables.bounds, place)
    difference -= y
    # Its sign bit says that y is above the bound. A comparison would take several times as long.
    above = difference.view(torch.int32)
    above >>= 31
    place -= above
    place -= is_unsigned * 256
    return place.to(torch.uint8)


def _taken(
    table: Tensor,
    places: Tensor,
) -> Tensor:
    return table.index_select(0, places.flatten()).view(places.shape)
