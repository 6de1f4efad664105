"""Keeping parameters where they must be: stages that look at what they become, ``p + u``."""

from __future__ import annotations

import torch

from functorch_opt._core.rule import leafwise
from functorch_opt._core.transformation import GradientTransformation, transformation

__all__ = ["keep_params_nonnegative"]


@transformation
def keep_params_nonnegative() -> GradientTransformation:
    """``u -> -p`` where ``p + u`` is negative, u elsewhere: so ``p + u`` is 0 or greater.

    It is the last stage, for nothing may change the updates after it. Parameters that are negative
    and would stay so become 0. Of complex parameters both parts are kept from being negative.

    Raises:
        ValueError: ``update`` called without params; a stage follows in a chain.

    Source: Goldstein, "Convex Programming in Hilbert Space", 1964 (projected gradients).

    Example:
        >>> import torch, functorch_opt as fo
        >>> tx, params = fo.keep_params_nonnegative(), torch.tensor([1.0, 1.0])
        >>> updates, _ = tx.update(torch.tensor([-3.0, -0.5]), tx.init(params), params)
        >>> fo.apply_updates(params, updates)
        tensor([0.0000, 0.5000])
    """
    return leafwise(lambda g, p: torch.where(p + g < 0, -p, g), last=True)
