"""The data of a sweep: batches for all runs, made of what the user gives."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

Batch = tuple[Tensor, ...]


class Batches(NamedTuple):
    """The batches of a whole training."""

    each: Iterator[Batch]
    steps: int
    """How many there are."""
    of_runs: bool
    """Whether batches have a first dimension for the runs, each of which has its own examples."""


def read_batches(
    data: Any,
    size: int | None,
    steps: int | None,
    epochs: int | None,
    seeds: list[int],
    of_seed: Tensor,
) -> Batches:
    """The batches for this many steps or epochs.

    `of_seed` has the index of the seed of each run.
    """
    _check_lengths(size, steps, epochs)
    device = of_seed.device
    arrays = as_batch(data, device) if isinstance(data, (tuple, Tensor)) else None
    if arrays is None and not hasattr(data, "__iter__"):
        as_batch(data, device)
    if arrays is None and size is not None:
        raise TypeError(
            f"data is {type(data).__name__}: its batches are made already. "
            "Leave out batch_size, or give a tuple of tensors."
        )
    length = _given_length(data) if arrays is None else _drawn_length(arrays, size)
    if steps is None and not length:
        raise ValueError(
            f"data of type {type(data).__name__} does not say how long an epoch is: "
            "give steps=, or a list of batches."
        )
    steps = (epochs or 1) * (length or 0) if steps is None else steps
    if arrays is None:
        return Batches(itertools.islice(_in_turn(data, device), steps), steps, False)
    if size is None:
        return Batches(itertools.repeat(arrays, steps), steps, False)
    drawn = itertools.islice(_shuffled(arrays, size, seeds, of_seed), steps)
    return Batches(drawn, steps, len(seeds) > 1)


def _check_lengths(size: int | None, steps: int | None, epochs: int | None) -> None:
    """Raise an error if it is not said how long to train, or not by a whole number."""
    if (steps is None) == (epochs is None):
        raise TypeError(
            "say how long to train: either steps= or epochs=; "
            f"got steps={steps!r} and epochs={epochs!r}."
        )
    for name, value in (("steps", steps), ("epochs", epochs), ("batch_size", size)):
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a whole number, at least 1; got {value!r}.")


def _given_length(data: Any) -> int | None:
    """How many batches an epoch has, if `data` says so."""
    return len(data) if hasattr(data, "__len__") else None


def _drawn_length(arrays: Batch, size: int | None) -> int:
    """How many batches of this size an epoch has; one, of all examples, if it is None."""
    if size is None:
        return 1
    lengths = {len(x) if x.dim() else 0 for x in arrays}
    if len(lengths) != 1 or size > min(lengths):
        raise ValueError(
            f"batch_size={size} takes that many examples of each tensor in data; "
            f"got shapes {[tuple(x.shape) for x in arrays]}."
        )
    return min(lengths) // size


def as_batch(batch: Any, device: torch.device) -> Batch:
    """A batch as a tuple of tensors on this device. Anything else raises TypeError."""
    if not isinstance(batch, (tuple, list)) or not all(
        isinstance(x, Tensor) for x in batch
    ):
        raise TypeError(
            "data must be a tuple of tensors, (x, y), or a list of such tuples; "
            f"got {type(batch).__name__} {batch!r:.200}."
        )
    return tuple(x.to(device) for x in batch)


def _in_turn(data: Any, device: torch.device) -> Iterator[Batch]:
    """The batches of `data`, over and over again."""
    made = 0
    while True:
        before = made
        for batch in data:
            made += 1
            yield as_batch(batch, device)
        if made == before:
            raise ValueError(
                f"data ended after {made} batches, for it can be gone through only once: "
                "give a list, or fewer steps."
            )


def _shuffled(
    arrays: Batch, size: int, seeds: list[int], of_seed: Tensor
) -> Iterator[Batch]:
    """Minibatches, in a new order each epoch. With several seeds they are [runs, size, ...].

    The remainder of an epoch is left out.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    while True:
        orders = torch.stack(
            [torch.randperm(len(arrays[0]), generator=g) for g in generators]
        )
        for rows in orders.to(of_seed.device).split(size, dim=1):  # [seeds, size]
            if rows.shape[1] == size:
                rows = rows[of_seed] if len(seeds) > 1 else rows[0]
                yield tuple(x[rows] for x in arrays)
