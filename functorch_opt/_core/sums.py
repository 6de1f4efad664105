"""What a rule must know of a whole tensor, or of all tensors: sums and maxima over elements."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functorch_opt._core import numerics, sharding
from functorch_opt._core.sharding import largest_over_ranks
from functorch_opt._core.transformation import positional

__all__ = ["largest"]


class Largest(NamedTuple):
    """Marks a function in ``sums`` or ``totals`` whose result is a maximum."""

    of: Callable[..., Any]


def largest(of: Callable[..., Any]) -> Largest:
    """Mark a function in ``sums`` or ``totals`` of a rule: parts are joined by their maximum.

    Args:
        of: a function that may read whatever a rule may read. It returns a 0-dim tensor, which is a
            maximum over all elements.

    Example:
        >>> import torch, functorch_opt as fo
        >>> tx = fo.leafwise(
        ...     lambda g, top: g / top, totals={"top": fo.largest(lambda g: g.abs().amax())}
        ... )
        >>> params = [torch.zeros(2), torch.zeros(1)]
        >>> tx.update([torch.tensor([1.0, -4.0]), torch.tensor([2.0])], tx.init(params))[0]
        [tensor([ 0.2500, -1.0000]), tensor([0.5000])]
    """
    return Largest(of)


class Sums:
    """Functions of one tensor, with the names that each reads, and how its results are joined."""

    def __init__(self, name: str, functions: Mapping[str, Any]) -> None:
        self.name = name
        self.functions = {
            key: f.of if isinstance(f, Largest) else f for key, f in functions.items()
        }
        self.largest = [isinstance(f, Largest) for f in functions.values()]
        self.reads_of = {key: positional(f) for key, f in self.functions.items()}
        read = itertools.chain(*self.reads_of.values())
        self.reads = tuple(dict.fromkeys(read))

    def __bool__(self) -> bool:
        return bool(self.functions)

    def of(self, values: Mapping[str, Any], in_parts: bool = False) -> dict[str, Any]:
        """The sums over one tensor that `values` does not have yet.

        If `in_parts`, the tensor may be an empty part of a larger one. Then it has no largest
        element, and its maximum is minus infinity.
        """
        found: dict[str, Any] = {}
        empty = in_parts and not values["g"].numel()
        for (key, f), maximum in zip(self.functions.items(), self.largest, strict=True):
            names = self.reads_of[key]
            if empty and maximum:
                found[key] = _least(
                    f(*[_with_an_element(values[name]) for name in names])
                )
            elif key not in values:
                found[key] = f(*[values[name] for name in names])
                self._check(key, found[key])
        return found

    def _check(self, key: str, value: Any) -> None:
        if isinstance(value, Tensor) and value.dim():
            raise TypeError(
                f"{self.name}: the sum {key} has shape {tuple(value.shape)}; "
                "it must be a 0-dim tensor: a sum over all elements."
            )

    def joined_over_ranks(
        self,
        rows: list[dict[str, Any]],
        leaves: list[Any],
        errors: list[Exception],
    ) -> dict[str, list[Any]]:
        """The sums over whole leaves, from those of the ranks.

        Sums go in one message, and maxima in another. Every message ends with a number that says
        whether a function has failed on its sender, so that no rank goes on alone.

        Raises:
            RuntimeError: there were `errors` on another rank. The first own one is raised as it is.
        """
        whole: dict[str, list[Any]] = {}
        failed: list[Any] = []
        likes, flags = _flags(leaves, bool(errors))
        for maximum, join in (
            (False, sharding.sum_over_ranks),
            (True, largest_over_ranks),
        ):
            pairs = zip(self.functions, self.largest, strict=True)
            names = [key for key, is_largest in pairs if is_largest is maximum]
            if not names:
                continue
            mine = [row[key] for key in names for row in rows]
            values = join([*mine, *flags], [*leaves * len(names), *likes])
            columns = [
                values[k * len(leaves) :][: len(leaves)] for k in range(len(names))
            ]
            whole |= dict(zip(names, columns, strict=True))
            failed = values[len(mine) :]
        if errors:
            raise errors[0]
        if any(_is_raised(flag) for flag in failed):
            raise RuntimeError(
                f"{self.name}: a function in sums or totals failed on another rank, whose own "
                "error says why."
            )
        return whole

    def over_all(self, columns: Mapping[str, list[Any]]) -> dict[str, Tensor]:
        """The totals over all leaves, from the values for each leaf."""
        totals = {}
        for (key, column), maximum in zip(
            columns.items(), self._order(columns), strict=True
        ):
            present = [torch.as_tensor(x) for x in column if x is not None]
            if not present:  # no tensor has an update
                totals[key] = torch.zeros((), dtype=torch.float64)
                continue
            values = sharding.stacked([x.to(_wide(x)) for x in present])
            totals[key] = values.amax() if maximum else values.sum()
        return totals

    def _order(self, columns: Mapping[str, list[Any]]) -> list[bool]:
        of = dict(zip(self.functions, self.largest, strict=True))
        return [of[key] for key in columns]


def _flags(leaves: list[Any], failed: bool) -> tuple[list[Any], list[Tensor]]:
    """For each layout a leaf that has it, and a number of this rank: 1 if something has `failed`.

    The number is in the widest dtype, and so is the message. A rank that has failed does not know
    the dtypes of the others' numbers. In a graph there are none, for a graph cannot look at them.
    """
    if torch.compiler.is_compiling():
        return [], []
    likes = [like for like, _ in sharding.by_layout(leaves)]
    devices = [like.device for like in likes]
    flags = [
        torch.full((), float(failed), dtype=numerics.real_dtype(device), device=device)
        for device in devices
    ]
    return likes, flags


def _is_raised(flag: Tensor) -> bool:
    """Whether a rank has failed. Elsewhere than on a CPU to look would wait for the device."""
    return flag.device.type == "cpu" and bool(flag > 0)


def _with_an_element(x: Any) -> Any:
    """A tensor as `x`, but not empty."""
    is_empty = isinstance(x, Tensor) and not x.numel()
    return x.new_ones([1] * x.dim()) if is_empty else x


def _least(x: Any) -> Tensor:
    """The maximum of nothing, in the dtype that the maximum `x` of something has: every rank must
    send the same."""
    x = torch.as_tensor(x)
    least = -float("inf") if x.is_floating_point() else torch.iinfo(x.dtype).min
    return x.new_full((), least)


def _wide(x: Tensor) -> torch.dtype:
    return numerics.real_dtype(x.device) if x.is_floating_point() else x.dtype
