"""Randomness as a function of a key.

The numbers are the same in eager, compiled, vmapped and sharded runs, and after a restart.

A key is an int64 tensor ``[2] = (seed, offset)``. It stands for a fixed, endless stream of numbers,
four to a block (see `functorch_opt.random.philox`). A tensor takes numbers from the stream in the
order of its elements, so any part of a draw can be drawn by itself.

Draw from a key only once, and do not draw from one that was given to `split` or `fold_in`: they
make new keys of the same words that a draw would take. Under vmap give each model its own key
(``split(key, n)``), because one key for all means the same numbers for all.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate

import torch
from torch import Tensor

from functorch_opt._core import sharding, structure
from functorch_opt._core.structure import PyTree
from functorch_opt.random import philox
from functorch_opt.random.places import NOWHERE, Region, blocks_of, place_in, place_of

__all__ = [
    "bits",
    "fold_in",
    "key",
    "normal",
    "normal_like",
    "split",
    "uniform",
    "uniform_like",
]

_STEP_BITS = 36  # one count owns 2**36 blocks, so that the draws of two can never overlap


# ---- keys ----------------------------------------------------------------------------------------


def key(seed: int, device: torch.device | str | None = None) -> Tensor:
    """The key of `seed`, an int64 tensor of shape [2].

    Args:
        seed: any whole number. It is taken modulo 2**64.
        device: the device of the key, and of what is drawn from it.

    Example:
        >>> import functorch_opt as fo
        >>> fo.random.key(42)
        tensor([42,  0])
    """
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(
            f"seed must be a whole number; got {type(seed).__name__} {seed!r}."
        )
    seed %= 2**64
    if seed >= 2**63:
        seed -= 2**64
    return torch.tensor([seed, 0], dtype=torch.int64, device=device)


def as_key(key_or_seed: Tensor | int) -> Tensor:
    """A key, checked, from a key or a seed."""
    if isinstance(key_or_seed, Tensor):
        return _checked(key_or_seed)
    return key(key_or_seed)


def _checked(key: Tensor) -> Tensor:
    if not isinstance(key, Tensor) or key.dtype != torch.int64 or key.shape != (2,):
        given = (
            f"{key.dtype} of shape {tuple(key.shape)}"
            if isinstance(key, Tensor)
            else f"{type(key).__name__} {key!r}"
        )
        raise TypeError(
            f"key must be an int64 tensor of shape (2,), as random.key(seed) gives; got {given}. "
            "For several models vmap over the keys of random.split(key, n)."
        )
    return key


def fold_in(key: Tensor, data: Tensor | int) -> Tensor:
    """A new key from `key` and a number.

    The same pair always gives the same key, and another number gives an independent one.

    Args:
        key: int64 [2].
        data: an int or an integer tensor, 0 or greater. A tensor may have any shape, and gives one
            key for each of its elements.

    Returns:
        An int64 tensor, whose shape is that of `data` followed by 2.

    Example:
        >>> import functorch_opt as fo
        >>> fo.random.fold_in(fo.random.key(0), 3).shape
        torch.Size([2])
    """
    numbers = _whole("data", data, _checked(key).device)
    a, b, c, d = philox.words(key, numbers)
    words = philox.join(a, b), philox.join(c, d)
    return torch.stack(words, -1)


def _whole(name: str, value: Tensor | int, device: torch.device) -> Tensor:
    numbers = torch.as_tensor(value).to(device, non_blocking=True)
    if (
        numbers.dtype in (torch.bool, torch.uint64)
        or numbers.is_floating_point()
        or numbers.is_complex()
    ):
        raise TypeError(
            f"{name} must be a whole number or an integer tensor; got {value!r}."
        )
    if isinstance(value, int) and value < 0:
        raise ValueError(f"{name} must be 0 or greater; got {value}.")
    return numbers.to(torch.int64)


def split(key: Tensor, num: int = 2) -> Tensor:
    """`num` independent keys, int64 ``[num, 2]``.

    Example:
        >>> import functorch_opt as fo
        >>> a, b = fo.random.split(fo.random.key(0))
    """
    if num < 0:
        raise ValueError(f"num must be 0 or greater; got {num}.")
    numbers = torch.arange(num, device=_checked(key).device)
    return fold_in(key, numbers)


# ---- one tensor ----------------------------------------------------------------------------------


def bits(
    key: Tensor, shape: tuple[int, ...], part: tuple[slice, ...] | None = None
) -> Tensor:
    """Independent random bits, 32 in each int32. The arguments are those of `normal`.

    Example:
        >>> import functorch_opt as fo
        >>> fo.random.bits(fo.random.key(42), (2,))
        tensor([-1662324653,  2012563771], dtype=torch.int32)
    """
    return _tensor(philox.bits, key, shape, part)


def uniform(
    key: Tensor, shape: tuple[int, ...], part: tuple[slice, ...] | None = None
) -> Tensor:
    """Independent uniform numbers in [0, 1), float32, multiples of 2**-24.

    The arguments are those of `normal`.

    Example:
        >>> import functorch_opt as fo
        >>> fo.random.uniform(fo.random.key(42), (2,))
        tensor([0.9177, 0.9581])
    """
    return _tensor(philox.uniform, key, shape, part)


def normal(
    key: Tensor, shape: tuple[int, ...], part: tuple[slice, ...] | None = None
) -> Tensor:
    """Independent standard normal numbers, float32.

    The random bits behind them are the same everywhere. The logarithm and the cosine that make
    normal numbers of them differ by rounding between eager and compiled code, and between devices.

    Args:
        key: int64 [2].
        shape: the shape of the whole tensor.
        part: a tuple of slices without step, one for each dimension. Then only
            ``normal(key, shape)[part]`` is drawn, with the same numbers.

    Raises:
        TypeError: a shape or a part is of another kind.

    Example:
        >>> import functorch_opt as fo
        >>> key = fo.random.key(42)
        >>> fo.random.normal(key, (4,))
        tensor([-0.9702,  0.1940, -1.2356,  1.9239])
        >>> fo.random.normal(key, (4,), part=(slice(1, 3),))
        tensor([ 0.1940, -1.2356])
    """
    return _tensor(philox.normal, key, shape, part)


def _tensor(
    make: philox.Make,
    key: Tensor,
    shape: tuple[int, ...],
    part: tuple[slice, ...] | None,
) -> Tensor:
    if not isinstance(shape, (tuple, list)):
        raise TypeError(
            f"shape must be a tuple of sizes, e.g. ({shape!r},); "
            f"got {type(shape).__name__} {shape!r}."
        )
    device = _checked(key).device
    shape = tuple(shape)
    region = None if part is None else _region(shape, part)
    place = place_in(shape, region)
    if place.dims:
        numbers = place.numbers(0, device)
        return place.take(philox.draw(make, key, numbers))
    block = place.first // 4
    begin = torch.full((), block, dtype=torch.int64, device=device)
    return place.take(philox.draw(make, key, begin, place.blocks))


def _region(shape: tuple[int, ...], part: tuple[slice, ...]) -> Region:
    """The offsets and sizes that the slices of `part` stand for."""

    def is_plain(s: object) -> bool:
        return isinstance(s, slice) and s.step in (None, 1)

    fits = isinstance(part, tuple) and len(part) == len(shape)
    if not fits or not all(map(is_plain, part)):
        raise TypeError(
            f"part must be a tuple of slices without step, one for each dimension of {shape}; "
            f"got {part!r}."
        )
    pairs = zip(part, shape, strict=True)
    ranges = [range(*s.indices(n)) for s, n in pairs]
    offsets = tuple([r.start for r in ranges])
    sizes = tuple([len(r) for r in ranges])
    return offsets, sizes


# ---- a tree of tensors ---------------------------------------------------------------------------


def normal_like(key: Tensor, tree: PyTree, count: Tensor | int = 0) -> PyTree:
    """Independent standard normals in the shapes of `tree`, float32.

    For a complex leaf they are complex64, and each complex number is made of two normals.

    The leaves take their numbers from one stream, one leaf after another. So what a leaf gets
    depends on the sizes of the leaves before it. Of a sharded leaf (a DTensor) each rank draws its
    own part. Together the parts are what one process would draw.

    Args:
        key: int64 [2].
        tree: a tree of tensors. None stays None.
        count: the number of this draw, if there are many from one key; or a 1-dim tensor of such
            numbers, one for each leaf. A count is 0 or greater, and below 2**28. The draws of
            different counts never overlap, as long as a tree has fewer than 2**38 numbers.

    Raises:
        TypeError: a leaf of `tree` is not a tensor or None; something that is not a key or a whole
            number.

    Example:
        >>> import torch, functorch_opt as fo
        >>> params = {"w": torch.zeros(2), "b": torch.zeros(())}
        >>> fo.random.normal_like(fo.random.key(0), params)
        {'w': tensor([-0.1536,  0.1808]), 'b': tensor(0.9911)}
    """
    return _tree(philox.normal, key, tree, count)


def uniform_like(key: Tensor, tree: PyTree, count: Tensor | int = 0) -> PyTree:
    """`uniform` numbers in the shapes of `tree`; the arguments are those of `normal_like`.

    Example:
        >>> import torch, functorch_opt as fo
        >>> fo.random.uniform_like(fo.random.key(42), [torch.zeros(2), None])
        [tensor([0.9177, 0.9581]), None]
    """
    return _tree(philox.uniform, key, tree, count)


def _tree(make: philox.Make, key: Tensor, values: PyTree, count: Tensor | int) -> PyTree:
    leaves, spec = structure.flatten_tensors(values, "tree")
    return structure.unflatten(spec, draw_leaves(make, key, leaves, count))


def draw_leaves(
    make: philox.Make, key: Tensor, leaves: list[Tensor | None], count: Tensor | int
) -> list[Tensor | None]:
    """`normal_like` and `uniform_like`, for the leaves of a tree."""
    device = _checked(key).device
    begin = _whole("count", count, device) << _STEP_BITS
    places = [NOWHERE if leaf is None else place_of(leaf) for leaf in leaves]
    blocks = [blocks_of(leaf) for leaf in leaves]
    *begins, end = accumulate(blocks, initial=0)
    if begin.dim() == 0 and not any(map(sharding.is_sharded, leaves)):
        drawn = philox.draw(make, key, begin, end)
    else:
        of_leaves = begin.expand(len(leaves)).unbind()
        numbers = [
            place.numbers(base, device) + of_leaf
            for place, base, of_leaf in zip(places, begins, of_leaves, strict=True)
        ]
        drawn = philox.draw(make, key, torch.cat(numbers))
    pieces = drawn.split([place.blocks for place in places])
    return [
        None if leaf is None else _finish(place.take(x), leaf)
        for leaf, place, x in zip(leaves, places, pieces, strict=True)
    ]


def _finish(x: Tensor, leaf: Tensor) -> Tensor:
    if leaf.is_complex():
        x = torch.view_as_complex(x)
    x = x.to(leaf.device)
    return sharding.join(x, leaf) if sharding.is_sharded(leaf) else x


def random_like(
    rng_key: Tensor,
    target_tree: PyTree,
    sampler: Callable[..., Tensor] = normal,
    dtype: torch.dtype | None = None,
) -> PyTree:
    """Draws in the shapes, dtypes and devices of a tree. Each leaf has a key of its own.

    `functorch_opt.random.normal_like` needs one draw for the whole tree, and takes sharded tensors.

    Args:
        rng_key: int64 [2].
        target_tree: a tree of tensors. None stays None. A complex leaf gets two draws for each
            element.
        sampler: ``(key, shape) -> tensor``, such as `functorch_opt.random.uniform`.
        dtype: the dtype of the draws; by default that of each leaf.

    Raises:
        TypeError: a leaf is sharded, or no tensor; something that is not a key.

    Source: optax.tree.random_like. The numbers are those of the keys here.

    Example:
        >>> import torch, functorch_opt as fo
        >>> params = {"w": torch.zeros(2, dtype=torch.float64), "b": torch.zeros(())}
        >>> drawn = fo.tree.random_like(fo.random.key(0), params)
        >>> drawn["w"].dtype, drawn["w"].shape, drawn["b"].shape
        (torch.float64, torch.Size([2]), torch.Size([]))
    """
    leaves, spec = structure.flatten_tensors(target_tree, "target_tree")
    if any(x is not None and sharding.is_sharded(x) for x in leaves):
        raise TypeError(
            "random_like cannot draw for sharded tensors: write random.normal_like(key, tree)."
        )
    keys = split(rng_key, len(leaves)).unbind()
    drawn = [
        None if x is None else _drawn_like(x, sampler, key, dtype or x.dtype)
        for x, key in zip(leaves, keys, strict=True)
    ]
    return structure.unflatten(spec, drawn)


def _drawn_like(
    x: Tensor, sampler: Callable[..., Tensor], key: Tensor, dtype: torch.dtype
) -> Tensor:
    if not dtype.is_complex:
        return sampler(key, tuple(x.shape)).to(x.device, dtype)
    pairs = sampler(key, (*x.shape, 2))
    return torch.view_as_complex(pairs.contiguous()).to(x.device, dtype)
