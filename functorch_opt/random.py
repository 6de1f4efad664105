"""Randomness as a function of a key: the same numbers in eager, compiled and vmapped runs, and after a restart.

A key is an int64 tensor ``[2] = (seed, offset)``. What is drawn from it is Philox-4x32-10 of the 128-bit counter ``(offset + i, 0)``
under the 64-bit seed: four 32-bit words for each block ``i``. The stream is that of ``torch.func._random``, so that torch's own kernels
can check it and, later, replace it.

Draw from a key once; make new ones with `split` and `fold_in`, which read the words that a draw would. Under vmap give each member its
own key (``split(key, n)``): one key for all means the same numbers for all.

Source: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["fold_in", "key", "normal", "split"]

_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_WEYL = 0x9E3779B9, 0xBB67AE85
_MASK = 0xFFFFFFFF


def key(seed: int, device: torch.device | str | None = None) -> Tensor:
    """The key of `seed`, an int64 tensor of shape [2].

    Args:
        seed: any whole number; taken modulo 2**64.
        device: where the key lives.

    Example:
        >>> import functorch_opt as fo
        >>> fo.random.key(42)
        tensor([42,  0])
    """
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed must be a whole number; got {type(seed).__name__} {seed!r}.")
    seed %= 2**64
    return torch.tensor([seed - 2**64 if seed >= 2**63 else seed, 0], dtype=torch.int64, device=device)


def as_key(key_or_seed: Tensor | int) -> Tensor:
    """A key from a key or a seed, checked."""
    if isinstance(key_or_seed, Tensor):
        return _checked(key_or_seed)
    return key(key_or_seed)


def _checked(key: Tensor) -> Tensor:
    if not isinstance(key, Tensor) or key.dtype != torch.int64 or key.shape != (2,):
        given = f"{key.dtype} of shape {tuple(key.shape)}" if isinstance(key, Tensor) else f"{type(key).__name__} {key!r}"
        raise TypeError(
            f"key must be an int64 tensor of shape (2,), as random.key(seed) gives; got {given}. "
            "For several models vmap over the keys of random.split(key, n)."
        )
    return key


def fold_in(key: Tensor, data: Tensor | int) -> Tensor:
    """A new key from `key` and a number: the same pair gives the same key, another number an independent one.

    Args:
        key: int64 [2].
        data: 0 or greater; an int or an integer tensor of any shape, which gives as many keys.

    Returns:
        int64, the shape of `data` and [2].

    Example:
        >>> import functorch_opt as fo
        >>> fo.random.fold_in(fo.random.key(0), 3).shape
        torch.Size([2])
    """
    numbers = torch.as_tensor(data, device=_checked(key).device)
    if numbers.dtype in (torch.bool, torch.uint64) or numbers.is_floating_point() or numbers.is_complex():
        raise TypeError(f"data must be a whole number or an integer tensor; got {data!r}.")
    if isinstance(data, int) and data < 0:
        raise ValueError(f"data must be 0 or greater; got {data}.")
    words = _words(key, numbers.to(torch.int64))
    return torch.stack([_join(words[0], words[1]), _join(words[2], words[3])], -1)


def split(key: Tensor, num: int = 2) -> Tensor:
    """`num` independent keys, int64 ``[num, 2]``.

    Example:
        >>> import functorch_opt as fo
        >>> a, b = fo.random.split(fo.random.key(0))
    """
    if num < 0:
        raise ValueError(f"num must be 0 or greater; got {num}.")
    return fold_in(key, torch.arange(num, device=_checked(key).device))


def normal(key: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Independent standard normal numbers, float32.

    Args:
        key: int64 [2].
        shape: of the result.

    Example:
        >>> import functorch_opt as fo
        >>> fo.random.normal(fo.random.key(42), (2,))
        tensor([-0.9702,  0.1940])
    """
    if not isinstance(shape, (tuple, list)):
        raise TypeError(f"shape must be a tuple of sizes, e.g. ({shape!r},); got {type(shape).__name__} {shape!r}.")
    n = math.prod(shape)
    return normal_blocks(key, torch.arange(-(-n // 4), device=_checked(key).device)).reshape(-1)[:n].reshape(shape)


def normal_blocks(key: Tensor, blocks: Tensor) -> Tensor:
    """The four normal numbers of each block, float32 ``[*blocks.shape, 4]``, by Box and Muller's method."""
    w = _words(key, blocks)
    return torch.stack([*_box_muller(w[0], w[1]), *_box_muller(w[2], w[3])], -1)


def _box_muller(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    radius = torch.sqrt(-2.0 * torch.log(_unit(a)))
    angle = (2 * math.pi) * _unit(b)
    return radius * torch.cos(angle), radius * torch.sin(angle)


def _unit(word: Tensor) -> Tensor:
    """A 32-bit word as a float32 in (0, 1]: never 0, so that the logarithm is finite."""
    return word.to(torch.float32) * 2.0**-32 + 2.0**-33


def _words(key: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four words of each block, 0 <= word < 2**32, int64."""
    seed, offset = key[0], key[1]
    low = (offset & _MASK) + (blocks & _MASK)
    high = (_high(offset) + _high(blocks) + (low >> 32)) & _MASK
    zero = torch.zeros_like(low)
    return philox(seed & _MASK, _high(seed), low & _MASK, high, zero, zero)


def philox(k0: Tensor, k1: Tensor, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox-4x32-10; keys and counters are 32-bit words in int64."""
    for _ in range(10):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def _multiply(x: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """High and low word of ``x * m``. ``m - 2**32`` is negative and small enough that int64 never overflows, which C++ leaves undefined."""
    product = x * (m - 2**32)
    return (product >> 32) + x, product & _MASK


def _high(x: Tensor) -> Tensor:
    return (x >> 32) & _MASK


def _join(low: Tensor, high: Tensor) -> Tensor:
    """Two words as one int64, in two's complement."""
    return (torch.where(high >= 2**31, high - 2**32, high) << 32) | low
