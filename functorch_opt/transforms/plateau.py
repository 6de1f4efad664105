"""A factor that falls when the loss has stopped falling."""

from __future__ import annotations

import torch
from torch import Tensor

from functorch_opt._core.rule import leafwise
from functorch_opt._core.transformation import (
    GradientTransformation,
    Scalar,
    check_range,
    check_whole,
    transformation,
)

__all__ = ["reduce_on_plateau"]

COUNTS = ("plateau_count", "cooldown_count", "gathered")


@transformation
def reduce_on_plateau(
    factor: Scalar = 0.1,
    patience: int = 10,
    rtol: Scalar = 1e-4,
    atol: Scalar = 0.0,
    cooldown: int = 0,
    accumulation_size: int = 1,
    min_scale: Scalar = 0.0,
) -> GradientTransformation:
    """``u -> scale u``, where the scale is multiplied by `factor` when the loss stops improving.

    A value is better if it is below ``best - rtol |best| - atol``. After `patience` values in a row
    that are not, the scale falls, and then `cooldown` values are not looked at. Extra argument of
    ``update``: ``value``, the loss. The state has ``scale`` and ``best_value``.

    Args:
        factor: in (0, 1).
        patience: 1 or greater.
        rtol: in [0, 1].
        atol: 0 or greater; one of the two is greater than 0.
        cooldown: 0 or greater.
        accumulation_size: how many losses are averaged to one value, 1 or greater; for the losses
            of small batches.
        min_scale: the scale does not fall below this, 0 or greater.

    Raises:
        ValueError: an argument outside its range.
        TypeError: ``update`` called without value.

    Source: optax.contrib.reduce_on_plateau. optax 0.2.8 has ``(1 - rtol) best``, which is above a
    negative best value, so that a loss that stays below zero always improves.

    Example:
        >>> import torch, functorch_opt as fo
        >>> tx = fo.chain(fo.sgd(1.0), fo.reduce_on_plateau(0.5, patience=2))
        >>> state = tx.init([torch.zeros(1)])
        >>> for value in (3.0, 3.0, 3.0):
        ...     updates, state = tx.update([torch.ones(1)], state, value=value)
        ...     print(updates)
        [tensor([-1.])]
        [tensor([-1.])]
        [tensor([-0.5000])]
    """
    check_arguments(factor, patience, rtol, atol, cooldown, accumulation_size, min_scale)

    def prepare(
        scale, best_value, plateau_count, cooldown_count, gathered, mean,
        factor, rtol, atol, min_scale, *, value,
    ):  # fmt: skip
        gathered = gathered + 1
        mean = mean + (value - mean) / gathered
        counts = {"plateau_count": plateau_count, "cooldown_count": cooldown_count}
        old = {"scale": scale, "best_value": best_value, **counts}
        given = {"factor": factor, "rtol": rtol, "atol": atol, "min_scale": min_scale}
        given["cooldown"], given["patience"] = cooldown, patience
        new = judged(mean, **old, **given)
        due = gathered >= accumulation_size
        new = {name: torch.where(due, new[name], old[name]) for name in old}
        new["gathered"] = torch.where(due, 0, gathered)
        new["mean"] = torch.where(due, 0.0, mean)
        return {"by": new["scale"].clone()}, new

    return leafwise(
        lambda g, by: g * by,
        prepare,
        shared={
            "scale": number(1.0),
            "best_value": number(float("inf")),
            "mean": number(0.0),
            **dict.fromkeys(COUNTS, torch.zeros((), dtype=torch.int64)),
        },
        hyper={"factor": factor, "rtol": rtol, "atol": atol, "min_scale": min_scale},
    )


def judged(value, scale, best_value, plateau_count, cooldown_count, factor, **kept):
    """The next scale, best value and counts, where there is a value to judge."""
    finite = torch.where(best_value.isinf(), 0.0, best_value)
    bar = finite - kept["rtol"] * finite.abs() - kept["atol"]
    is_first = best_value.isinf() & (value < best_value)
    better = (value < bar) | is_first
    waiting = cooldown_count > 0
    bad = torch.where(better | waiting, 0, plateau_count + 1)
    falls = bad >= kept["patience"]
    fallen = torch.maximum(scale * factor, kept["min_scale"] + 0 * scale)
    cooled = torch.where(
        waiting, cooldown_count - 1, torch.where(falls, kept["cooldown"], 0)
    )
    return {
        "scale": torch.where(falls, fallen, scale),
        "best_value": torch.where(better, value, best_value),
        "plateau_count": torch.where(falls, 0, bad),
        "cooldown_count": cooled,
    }


def number(x: float) -> Tensor:
    return torch.full((), x, dtype=torch.float64)


def check_arguments(factor, patience, rtol, atol, cooldown, size, min_scale):
    """Raise ValueError for an argument outside its range."""
    check_range(0, 1, above=True, factor=factor)
    check_range(0, 1, closed=True, rtol=rtol)
    check_range(0, float("inf"), atol=atol, min_scale=min_scale)
    if isinstance(rtol, (int, float)) and isinstance(atol, (int, float)):
        check_range(0, float("inf"), above=True, **{"rtol + atol": rtol + atol})
    check_whole(1, patience=patience, accumulation_size=size)
    check_whole(0, cooldown=cooldown)
