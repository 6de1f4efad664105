"""Parameters that stay as they are."""

from __future__ import annotations

from functorch_opt._core import structure
from functorch_opt._core.groups import MaskOrFn, masked
from functorch_opt._core.transformation import GradientTransformation, transformation
from functorch_opt.transforms.scale import set_to_zero

__all__ = ["freeze", "selective_transform"]


@transformation
def freeze(mask: MaskOrFn) -> GradientTransformation:
    """Zero the updates of the chosen parameters, and let the others pass.

    It is ``masked(set_to_zero(), mask)``, for the end of a chain. The stages before it still work
    on the frozen parameters, and keep state for them; `selective_transform` does neither.

    Args:
        mask: which parameters are frozen, see `masked`.

    Raises:
        ValueError: the mask does not fit the params.
        TypeError: the mask holds something other than True and False.

    Source: optax.freeze.

    Example:
        >>> import torch, functorch_opt as fo
        >>> params = {"w": torch.ones(1), "b": torch.ones(1)}
        >>> tx = fo.freeze({"w": True, "b": False})
        >>> tx.update(params, tx.init(params), params)[0]
        {'w': tensor([0.]), 'b': tensor([1.])}
    """
    return masked(set_to_zero(), mask)


@transformation
def selective_transform(
    optimizer: GradientTransformation, *, freeze_mask: MaskOrFn
) -> GradientTransformation:
    """Apply `optimizer` to the parameters that are not frozen; the updates of the others are zero.

    Args:
        optimizer: the transformation. It sees, and has state for, those parameters only.
        freeze_mask: which parameters are frozen, see `masked`.

    Raises:
        ValueError: the mask does not fit the params.
        TypeError: the mask holds something other than True and False.

    Source: optax.selective_transform.

    Example:
        >>> import torch, functorch_opt as fo
        >>> params = {"w": torch.ones(1), "b": torch.ones(1)}
        >>> tx = fo.selective_transform(fo.sgd(0.5), freeze_mask=lambda path, p: path == "w")
        >>> tx.update(params, tx.init(params), params)[0]
        {'w': tensor([0.]), 'b': tensor([-0.5000])}
    """
    return masked(optimizer, negated(freeze_mask), otherwise="zero")


def negated(mask: MaskOrFn) -> MaskOrFn:
    """The mask of the other parameters."""
    if not callable(mask):
        return structure.map_leaves(opposite, mask)

    def trained(path, p):
        return opposite(mask(path, p))

    return trained


def opposite(frozen):
    """The other bool; what is no bool stays, for `masked` to refuse it."""
    return not frozen if isinstance(frozen, bool) else frozen
