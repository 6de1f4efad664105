"""The generator: Philox-4x32-10, the numbers made of its words, and how many are drawn at once.

A block is one call of Philox: of the 128-bit counter ``(offset + i, 0)`` under the 64-bit seed,
where ``(seed, offset)`` is the key and i the number of the block. It gives four 32-bit words, and
of them four numbers. This is the stream of ``torch.func._random``, so that torch's own kernels can
check it and, later, replace it.

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
"""32-bit words in int64, for eager torch has few operations on unsigned integers."""


def philox(k0: Tensor, k1: Tensor, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor) -> Words:
    """Philox-4x32-10 of a key of two words and a counter of four."""
    for _ in range(10):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def _multiply(x: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """High and low word of ``x * m``.

    ``m - 2**32`` is negative and small enough that int64 never overflows, which C++ leaves
    undefined.
    """
    product = x * (m - 2**32)
    return (product >> 32) + x, product & _MASK


def words(key: Tensor, blocks: Tensor) -> Words:
    """The four words of each block."""
    seed, offset = key[0], key[1]
    low = (offset & _MASK) + (blocks & _MASK)
    high = (_high(offset) + _high(blocks) + (low >> 32)) & _MASK
    zero = torch.zeros_like(low)
    return philox(seed & _MASK, _high(seed), low & _MASK, high, zero, zero)


def _high(x: Tensor) -> Tensor:
    return (x >> 32) & _MASK


def join(low: Tensor, high: Tensor) -> Tensor:
    """Two words as one int64, in two's complement."""
    return (torch.where(high >= 2**31, high - 2**32, high) << 32) | low


# ---- what is made of words -----------------------------------------------------------------------
# Of the blocks in `blocks`, or of n of them from the number `blocks` on; four numbers each, [n, 4].


def bits(key: Tensor, blocks: Tensor, n: int | None = None) -> Tensor:
    """The words themselves, int32."""
    unsigned = words(key, _numbers(blocks, n))
    signed = [torch.where(w >= 2**31, w - 2**32, w) for w in unsigned]
    return torch.stack([w.to(torch.int32) for w in signed], -1)


def uniform(key: Tensor, blocks: Tensor, n: int | None = None) -> Tensor:
    """Multiples of 2**-24 in [0, 1), float32."""
    low = [w & 0xFFFFFF for w in words(key, _numbers(blocks, n))]
    return torch.stack([w.to(torch.float32) * 2.0**-24 for w in low], -1)


def normal(key: Tensor, blocks: Tensor, n: int | None = None) -> Tensor:
    """Standard normals, float32, at most 6.77 in size."""
    a, b, c, d = words(key, _numbers(blocks, n))
    return torch.stack([*box_muller(a, b), *box_muller(c, d)], -1)


def _numbers(blocks: Tensor, n: int | None) -> Tensor:
    return blocks if n is None else torch.arange(n, device=blocks.device) + blocks


def box_muller(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Two independent normals of two words."""
    radius = torch.sqrt(-2.0 * torch.log(unit(a)))
    angle = (2 * math.pi) * unit(b)
    return radius * torch.cos(angle), radius * torch.sin(angle)


def unit(word: Tensor) -> Tensor:
    """A word as a float32 in (0, 1]: never 0, so that the logarithm is finite."""
    return word.to(torch.float32) * 2.0**-32 + 2.0**-33


# ---- drawing -------------------------------------------------------------------------------------

Make = Callable[..., Tensor]

CHUNK = 1 << 15
"""Blocks that an eager draw on a CPU makes at once.

What it makes on the way then stays in the cache.
"""


class _Mode(threading.local):
    backend: Any = None


_MODE = _Mode()


@contextmanager
def compiled(backend: Any = "inductor") -> Iterator[None]:
    """Inside, `draw` runs compiled code, for whoever compiles the rest too.

    It is one kernel for any number of blocks, and several times as fast.
    """
    before, _MODE.backend = _MODE.backend, backend
    try:
        yield
    finally:
        _MODE.backend = before


def draw(make: Make, key: Tensor, blocks: Tensor, n: int | None = None) -> Tensor:
    """`bits`, `uniform` or `normal`, eagerly or compiled."""
    if torch.compiler.is_compiling():
        return make(key, blocks, n)
    if _MODE.backend is not None and not torch._C._are_functorch_transforms_active():
        size = len(blocks) if n is None else n
        if size > 1:  # of sizes 0 and 1 torch.compile makes constants
            return _compiled(make, _MODE.backend)(key, blocks, n)
    index = _numbers(blocks, n)
    if key.device.type != "cpu" or len(index) <= CHUNK:
        return make(key, index)
    return torch.cat([make(key, some) for some in index.split(CHUNK)])


@functools.cache
def _compiled(make: Make, backend: Any) -> Make:
    """`make` as one kernel that was tried; after a failure, which is a warning, `make` itself."""
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
"""Blocks that are drawn to try compiled code: some vectors of them, and a rest."""


def _try_out(kernel: Make, make: Make, key: Tensor, blocks: Tensor, n: int | None) -> None:
    few = (key, blocks[:FEW], None) if n is None else (key, blocks, min(n, FEW))
    expected = make(*few)
    try:
        drawn = kernel(*few)
    except torch._dynamo.exc.BackendCompilerFailed:
        raise
    except Exception as error:
        raise WrongCode(f"the compiled code raised {type(error).__name__}: {error}") from error
    tolerance = 1e-4 if drawn.is_floating_point() else 0.0
    if not torch.allclose(drawn, expected, rtol=tolerance, atol=tolerance):
        raise WrongCode("the compiled code drew other numbers than the generator")
