"""The one kernel in code that Inductor has generated: an ordinary C function, and its arguments.

Generated code checks its tensors, makes scratch memory, and calls kernels. Where it does no more
than to call one, the kernel is called directly. Which argument is which is seen by calling the
generated code with something that stands in for the kernel.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functorch_opt._execution.table import MOST, address_of, loop

WithSizes = Callable[[list[Tensor]], list[Any]]
"""Puts behind tensors the sizes that code is given beside them, in a list of its own."""

_NAMES = {
    "assert_size_stride",
    "assert_size_stride_grouped",
    "clear",
    "size",
    "empty_strided_cpu",
    "torch",
    "float16",
    "bfloat16",
    "float32",
    "float64",
    "uint8",
    "int8",
    "int16",
    "int32",
    "int64",
    "bool",
}
"""What generated code that does nothing but call a kernel may name beside it."""
_PRIMES = (11, 13, 17, 19, 23, 29, 31)
_OTHERS = (37, 41, 43, 47, 53, 59, 61)
"""Sizes that tell which is which, and others: what stays the same is no size."""
_PAIRS = [*zip(_PRIMES, _OTHERS, strict=True)]


class Buffer(NamedTuple):
    """Memory that a kernel needs: as many elements as a number, times the sizes of these places."""

    number: int
    sizes: list[int]
    dtype: torch.dtype


class _Kernel(NamedTuple):
    """Where a C function is, and which of tensors, scratch and sizes are its arguments."""

    address: int
    order: list[int]
    dims: list[tuple[int, int]]
    buffers: list[Buffer]


def find_kernel(call: Any, with_sizes: WithSizes, inputs: list[Any]) -> _Kernel | None:
    """The kernel, if all that `call` does is to call one; and what of its arguments is which.

    It is called twice, with tensors of sizes that tell which is which.
    """
    dims = symbols_in(inputs)
    name = _only_kernel(call)
    if name is None or len(dims) > len(_PRIMES):
        return None
    if not all(of.is_symbol for of in dims):
        return None
    telling = dict(zip(dims, _PRIMES, strict=False))
    samples = samples_of(inputs, telling)
    given = _given(call, name, with_sizes(samples))
    others = samples_of(inputs, dict(zip(dims, _OTHERS, strict=False)))
    given_others = _given(call, name, with_sizes(others))
    if given is None or given_others is None:
        return None
    buffers = _buffers(given, samples)
    tensors = samples + buffers
    place: dict[int, int] = {id(x): i for i, x in enumerate(tensors)}
    of_size = {n: i for i, n in enumerate(telling.values())}

    def place_of(x: Any) -> int | None:
        is_size = type(x) is int and x in of_size
        return of_size[x] + len(place) if is_size else place.get(id(x))

    order = [place_of(x) for x in given]
    if None in order or len(order) > MOST:
        return None
    pairs = zip(buffers, _buffers(given_others, others), strict=True)
    sizes = [_sizes_of(x, y) for x, y in pairs]
    if None in sizes:
        return None
    try:
        loop()
    except Exception as error:
        warnings.warn(
            f"kernels are called one by one, which is slower, for the loop that calls them cannot "
            f"be compiled: {error}",
            stacklevel=2,
        )
        return None
    address = address_of(_function(call).__globals__[name])
    return _Kernel(address, order, list(dims.values()), sizes)  # type: ignore[arg-type]


def _buffers(given: tuple[Any, ...], samples: list[Tensor]) -> list[Tensor]:
    """The tensors among what a kernel was given that are not the samples."""
    own = {id(x) for x in samples}
    tensors = {id(x): x for x in given if isinstance(x, Tensor)}
    return [x for number, x in tensors.items() if number not in own]


def _sizes_of(x: Tensor, y: Tensor) -> Buffer | None:
    """What a buffer's length is made of, by its shapes for two sets of sizes; None: of more."""
    number = 1
    sizes = []
    for n, other in zip(x.shape, y.shape, strict=True):
        if n == other:
            number *= n
        elif (n, other) in _PAIRS:
            sizes.append(_PRIMES.index(n))
        else:
            return None
    return Buffer(number, sizes, x.dtype)


def symbols_in(inputs: list[Any]) -> dict[Any, tuple[int, int]]:
    """The symbols in the sizes of `inputs`; of each, an input and a dimension that it is of."""
    return {
        size.node.expr: (i, d)
        for i, x in enumerate(inputs)
        for d, size in enumerate(x.shape)
        if isinstance(size, torch.SymInt)
    }


def samples_of(inputs: list[Any], sizes: dict[Any, int]) -> list[Tensor]:
    """Tensors like `inputs`, the symbols in their shapes replaced."""
    shapes = [
        [sizes[n.node.expr] if isinstance(n, torch.SymInt) else n for n in x.shape]
        for x in inputs
    ]
    return [
        torch.empty(shape, dtype=x.dtype, device=x.device)
        for shape, x in zip(shapes, inputs, strict=True)
    ]


def _function(call: Any) -> Any:
    return getattr(call, "__func__", call)


def _only_kernel(call: Any) -> str | None:
    """The name of the kernel that the generated function `call` calls, if it does nothing else."""
    names = getattr(_function(call), "__globals__", {})
    kernels = [name for name in names if name.startswith("cpp_fused")]
    if len(kernels) != 1:
        return None
    used = set(_function(call).__code__.co_names)
    if used - {*kernels, *_NAMES}:
        return None
    return kernels[0]


def _given(call: Any, name: str, samples: list[Any]) -> tuple[Any, ...] | None:
    """What the kernel is given if `call` is given `samples`: what stands in for it looks."""
    names = _function(call).__globals__
    calls = []
    kernel = names[name]
    names[name] = lambda *args: calls.append(args)
    try:
        call(samples)
    finally:
        names[name] = kernel
    return calls[0] if len(calls) == 1 else None
