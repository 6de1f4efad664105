"""Slots that are rounded at random: bfloat16 that keeps small steps, on average.

The random bits belong to the stage: its state has a key, and they are drawn once a step, as other
noise is. Two slots share the 32 bits of an element, for a float32 has 16 bits more than bfloat16.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from functorch_opt import random, tree
from functorch_opt._core.leaf import Each
from functorch_opt._core.once import Once
from functorch_opt.random import philox
from functorch_opt.transforms.rounding import neighbour, power_below
from functorch_opt.tree import PyTree

KEY = "rounding_key"
"""The shared value of a stage from which the bits are drawn."""
_BFLOAT16 = torch.finfo(torch.bfloat16)


class Bits:
    """The random bits of some slots: their names in a rule, and where each slot finds its own."""

    def __init__(
        self,
        slots: tuple[str, ...],
    ) -> None:
        self.slots = slots
        self.pairs = [slots[k : k + 2] for k in range(0, len(slots), 2)]
        self.names = tuple([f"_bits{k}" for k in range(len(self.pairs))])

    def once(
        self,
        of: Once,
        key: Tensor,
    ) -> Once:
        """What a stage works out once a step, with a key, and with a count to draw by."""
        shared = {**of.shared, KEY: key}
        new = Once(of.name, of.prepare, of.hyper, shared, True, beside=("params",))
        new.read_result = of.read_result
        return new

    def drawn(
        self,
        now: Mapping[str, Any],
        like: PyTree,
        slots: dict[str, list[Any]],
    ) -> dict[str, Any]:
        """The bits of this step: int32 in the shape of a slot, and False where there are none."""
        spec = tree.flatten(like)[1]
        columns = [self._rounded(slots, pair) for pair in self.pairs]
        leaves = [x for column in columns for x in column]
        count = now["count"]
        if count.dim():
            count = count.repeat(len(columns))
        found = random.draw_leaves(philox.bits, now[KEY], leaves, count)
        none = torch.zeros((), dtype=torch.bool, device=now[KEY].device)
        n = len(found) // len(columns)
        rows = [found[k * n : (k + 1) * n] for k in range(len(columns))]
        of_names = zip(self.names, rows, strict=True)
        return {name: Each(_tree(spec, row, slots, none)) for name, row in of_names}

    def _rounded(
        self,
        slots: dict[str, list[Any]],
        pair: tuple[str, ...],
    ) -> list[Any]:
        """Of each leaf a slot of the pair that is rounded, or None."""
        found: list[Any] = []
        for leaf in zip(*[slots[name] for name in pair], strict=True):
            low = [x for x in leaf if x is not None and x.dtype is torch.bfloat16]
            found.append(low[0] if low else None)
        return found

    def rounded(
        self,
        new: dict[str, Any],
        values: Mapping[str, Any],
    ) -> dict[str, Any]:
        """New slots, each rounded to one of its neighbours."""
        found = dict(new)
        for name, pair in zip(self.names, self.pairs, strict=True):
            bits = values[name]
            if bits.dtype is torch.bool:
                continue
            for half, slot in enumerate(pair):
                x = new[slot]
                if isinstance(x, Tensor) and x.shape == bits.shape:
                    found[slot] = to_bfloat16(x, bits, half)
        return found


def _tree(
    spec: Any,
    row: list[Any],
    slots: dict[str, list[Any]],
    none: Tensor,
) -> PyTree:
    """A row of bits as a tree, with nothing where the state has nothing."""
    column = next(iter(slots.values()))
    pairs = zip(row, column, strict=True)
    filled = [none if bits is None and x is not None else bits for bits, x in pairs]
    return tree.unflatten(spec, filled)


def to_bfloat16(
    x: Tensor,
    bits: Tensor,
    half: int,
) -> Tensor:
    """A number that bfloat16 has, on average `x`. Its dtype stays.

    Args:
        x: float32 or wider.
        bits: int32 of the same shape.
        half: 0 for the lower 16 bits, 1 for the upper ones.
    """
    noise = ((bits >> (16 * half)) & 0xFFFF).to(x.dtype) * 2.0**-16
    power = power_below(x).clamp(min=_BFLOAT16.tiny)
    return neighbour(x, power * _BFLOAT16.eps, noise)
