"""The generator Philox-4x32-10, the numbers made of its words, and how many are drawn at once.

A block is one call of Philox, with the 128-bit counter ``(offset + i, 0)`` and the 64-bit seed;
``(seed, offset)`` is the key, and i is the number of the block. It gives four 32-bit words, of
which four numbers are made. The stream is that of ``torch.func._random``, so torch's own kernels
can check it and may later replace it.

Sources: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011, section 4.3. Box &
Muller, "A Note on the Generation of Random Normal Deviates", 1958.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from functorch_opt._execution.trials import LOCK, WrongCode, warn_uncompiled

_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_WEYL = 0x9E3779B9, 0xBB67AE85
_MASK = 0xFFFFFFFF

Words = tuple[Tensor, Tensor, Tensor, Tensor]
"""32-bit words, kept in int64 because eager torch has few operations on unsigned integers."""


def philox(
    k0: Tensor, k1: Tensor, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor
) -> Words:
    """Philox-4x32-10 of a key of two words and a counter of four."""
    for _ in range(10):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0 = high1 ^ c1 ^ k0
        c1 = low1
        c2 = high0 ^ c3 ^ k1
        c3 = low0
        k0 = (k0 + _WEYL[0]) & _MASK
        k1 = (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def _multiply(x: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """The high and the low word of ``x * m``.

    The factor ``m - 2**32`` is negative, and so small that int64 never overflows. C++ would leave
    an overflow undefined.
    """
    product = x * (m - 2**32)
    return (product >> 32) + x, product & _MASK


def words(key: Tensor, blocks: Tensor) -> Words:
    """The four words of each block."""
    seed, offset = key[0], key[1]
    low = (offset & _MASK) + (blocks & _MASK)
    carry = low >> 32
    high = (_high(offset) + _high(blocks) + carry) & _MASK
    zero = torch.zeros_like(low)
    return philox(seed & _MASK, _high(seed), low & _MASK, high, zero, zero)


def _high(x: Tensor) -> Tensor:
    return (x >> 32) & _MASK


def join(low: Tensor, high: Tensor) -> Tensor:
    """Two words as one int64, in two's complement."""
    signed = torch.where(high >= 2**31, high - 2**32, high)
    return (signed << 32) | low


# ---- what is made of words -----------------------------------------------------------------------
# Each function takes the blocks whose numbers are in `blocks`, or n blocks from the number `blocks`
# on. The result is [n, 4], four numbers for each block.


def bits(key: Tensor, blocks: Tensor, n: int | None = None) -> Tensor:
    """The words themselves, as int32."""
    unsigned = words(key, _numbers(blocks, n))
    signed = [torch.where(w >= 2**31, w - 2**32, w) for w in unsigned]
    narrow = [w.to(torch.int32) for w in signed]
    return torch.stack(narrow, -1)


def uniform(key: Tensor, blocks: Tensor, n: int | None = None) -> Tensor:
    """Uniform numbers in [0, 1), which are multiples of 2**-24, as float32."""
    low = [w & 0xFFFFFF for w in words(key, _numbers(blocks, n))]
    fractions = [w.to(torch.float32) * 2.0**-24 for w in low]
    return torch.stack(fractions, -1)


def normal(key: Tensor, blocks: Tensor, n: int | None = None) -> Tensor:
    """Standard normal numbers, at most 6.77 in size, as float32."""
    a, b, c, d = words(key, _numbers(blocks, n))
    return torch.stack([*box_muller(a, b), *box_muller(c, d)], -1)


def _numbers(blocks: Tensor, n: int | None) -> Tensor:
    if n is None:
        return blocks
    return torch.arange(n, device=blocks.device) + blocks


def box_muller(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Two independent standard normal numbers, made of two words."""
    radius = torch.sqrt(-2.0 * torch.log(unit(a)))
    angle = (2 * math.pi) * unit(b)
    return radius * torch.cos(angle), radius * torch.sin(angle)


def unit(word: Tensor) -> Tensor:
    """A word as a float32 in (0, 1]: never 0, so that the logarithm is finite."""
    return word.to(torch.float32) * 2.0**-32 + 2.0**-33


# ---- drawing -------------------------------------------------------------------------------------

Make = Callable[..., Tensor]

CHUNK = 1 << 15
"""How many blocks an eager draw on a CPU makes at once.

With so few, the intermediate results stay in the cache.
"""


class _Mode(threading.local):
    backend: Any = None


_MODE = _Mode()


@contextmanager
def compiled(backend: Any = "inductor") -> Iterator[None]:
    """Inside of it `draw` runs compiled code. It is for callers who compile the rest too.

    There is one kernel for any number of blocks, which is several times as fast as eager code.
    """
    before, _MODE.backend = _MODE.backend, backend
    try:
        yield
    finally:
        _MODE.backend = before


def draw(make: Make, key: Tensor, blocks: Tensor, n: int | None = None) -> Tensor:
    """The numbers that `make` (`bits`, `uniform` or `normal`) draws, eagerly or compiled."""
    if torch.compiler.is_compiling():
        return make(key, blocks, n)
    if _MODE.backend is not None and not torch._C._are_functorch_transforms_active():
        size = len(blocks) if n is None else n
        if size > 1:  # of sizes 0 and 1 torch.compile makes constants
            return _compiled(make, _MODE.backend)(key, blocks, n)
    index = _numbers(blocks, n)
    if key.device.type != "cpu" or len(index) <= CHUNK:
        return make(key, index)
    chunks = [make(key, some) for some in index.split(CHUNK)]
    return torch.cat(chunks)


@functools.cache
def _compiled(make: Make, backend: Any) -> Make:
    """`make` as one kernel, which is tried first. If it fails, it warns and runs `make`."""
    kernel: Make = torch.compile(make, dynamic=True, backend=backend)
    tried = False

    def run(*args: Any) -> Tensor:
        nonlocal kernel, tried
        try:
            if not tried:
                with LOCK:
                    _try_out(kernel, make, *args)
            tried = True
            return kernel(*args)
        except (torch._dynamo.exc.BackendCompilerFailed, WrongCode) as error:
            warn_uncompiled("random numbers are drawn eagerly", error)
            kernel, tried = make, True
            return make(*args)

    return run


FEW = 37
"""How many blocks are drawn to try compiled code: some full vectors, and a remainder."""


def _try_out(
    kernel: Make, make: Make, key: Tensor, blocks: Tensor, n: int | None
) -> None:
    few = (key, blocks[:FEW], None) if n is None else (key, blocks, min(n, FEW))
    expected = make(*few)
    try:
        drawn = kernel(*few)
    except torch._dynamo.exc.BackendCompilerFailed:
        raise
    except Exception as error:
        raise WrongCode(
            f"the compiled code raised {type(error).__name__}: {error}"
        ) from error
    tolerance = 1e-4 if drawn.is_floating_point() else 0.0
    if not torch.allclose(drawn, expected, rtol=tolerance, atol=tolerance):
        raise WrongCode("the compiled code drew other numbers than the generator")
