"""How much privacy a training spends, and how much noise a budget asks for."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

from functorch_opt._core.transformation import check_range

__all__ = ["noise_for", "privacy_spent"]

FIRST_GUESS = 8.0
"""A noise multiplier that few trainings need. Little noise takes long to account for, so the search
comes from above."""
TOLERANCE = 1e-3
"""`noise_for` is this near to the least noise, as a part of it."""


def privacy_spent(
    noise_multiplier: float, sampling_rate: float, steps: int, delta: float
) -> float:
    """The epsilon of (epsilon, delta)-differential privacy after `steps` of private descent.

    The batches must have been drawn by Poisson sampling.

    Two data sets are neighbours if one of them has one more example. The bound is computed by
    Google's dp-accounting, from the distribution of the privacy loss. It holds for `poisson_sample`
    and for a constant `noise_multiplier`, not for shuffled batches.

    Args:
        noise_multiplier: sigma, greater than 0.
        sampling_rate: ``expected_batch_size / len(data)``, in (0, 1].
        steps: how many updates were made:
            ``int(fo.get(state, "differentially_private_aggregate/count"))``.
        delta: in (0, 1); usually well below ``1 / len(data)``.

    Raises:
        ValueError: a number out of its range.
        ModuleNotFoundError: dp-accounting is not installed.

    Source: Koskela, Jalko & Honkela, "Computing Tight Differential Privacy Guarantees Using FFT",
    2020; Google's dp-accounting.

    Example:
        >>> import functorch_opt as fo
        >>> epsilon = fo.privacy_spent(1.1, sampling_rate=256 / 50_000, steps=11_700, delta=1e-5)
        >>> round(epsilon, 2)
        2.64
    """
    check_range(0, math.inf, above=True, noise_multiplier=noise_multiplier)
    _check(sampling_rate, steps, delta)
    accounting, pld = _library("privacy_spent")
    step = _step(accounting, noise_multiplier, sampling_rate)
    return float(pld.PLDAccountant().compose(step, int(steps)).get_epsilon(delta))


def noise_for(epsilon: float, sampling_rate: float, steps: int, delta: float) -> float:
    """The noise multiplier with which `steps` of private descent spend `epsilon`.

    It is the inverse of `privacy_spent`: the least sigma that spends no more, and at most 0.1% more
    than that. The search is that of dp-accounting.

    Args:
        epsilon: the budget, greater than 0.
        sampling_rate: ``expected_batch_size / len(data)``, in (0, 1].
        steps: how many updates will be made, 1 or more.
        delta: in (0, 1); usually well below ``1 / len(data)``.

    Raises:
        ValueError: a number out of its range.
        ModuleNotFoundError: dp-accounting is not installed.

    Source: Google's dp-accounting, ``calibrate_dp_mechanism``.

    Example:
        >>> import functorch_opt as fo
        >>> sigma = fo.noise_for(1.0, sampling_rate=0.01, steps=500, delta=1e-5)
        >>> 0.99 < fo.privacy_spent(sigma, 0.01, 500, 1e-5) <= 1.0
        True
    """
    check_range(0, math.inf, above=True, epsilon=epsilon)
    _check(sampling_rate, steps, delta)
    if steps < 1:
        raise ValueError(f"steps must be 1 or more: no step needs no noise; got {steps}.")
    accounting, pld = _library("noise_for")
    low, high = _bracket(epsilon, sampling_rate, steps, delta)

    def descent(sigma: float) -> Any:
        return accounting.SelfComposedDpEvent(
            _step(accounting, sigma, sampling_rate), int(steps)
        )

    found = accounting.calibrate_dp_mechanism(
        pld.PLDAccountant,
        descent,
        epsilon,
        delta,
        accounting.ExplicitBracketInterval(low, high),
        tol=TOLERANCE * low,
    )
    return float(found)


def _bracket(
    epsilon: float, sampling_rate: float, steps: int, delta: float
) -> tuple[float, float]:
    """A noise multiplier that spends more than `epsilon`, and twice as much, which does not."""
    high = FIRST_GUESS
    while privacy_spent(high, sampling_rate, steps, delta) > epsilon:
        high *= 2
    while privacy_spent(high / 2, sampling_rate, steps, delta) <= epsilon:
        high /= 2
    return high / 2, high


def _step(accounting: ModuleType, sigma: float, rate: float) -> Any:
    return accounting.PoissonSampledDpEvent(rate, accounting.GaussianDpEvent(sigma))


def _check(sampling_rate: float, steps: int, delta: float) -> None:
    if not (
        0 < sampling_rate <= 1 and 0 < delta < 1 and steps >= 0 and steps == int(steps)
    ):
        raise ValueError(
            "sampling_rate must be in (0, 1], delta in (0, 1) and steps a whole number, "
            "0 or greater; "
            f"got sampling_rate={sampling_rate}, delta={delta}, steps={steps}."
        )


def _library(what: str) -> tuple[ModuleType, ModuleType]:
    try:
        import dp_accounting
        from dp_accounting import pld
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'{what} needs dp-accounting: pip install "functorch_opt[privacy]"',
            name=error.name,
        ) from error
    return dp_accounting, pld
