"""Checkpoints whose slots are stored otherwise than here: in float32, or in a code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from functorch_opt._core.checkpoint import state_dict
from functorch_opt._core.structure import Path
from functorch_opt.codecs import sharded
from functorch_opt.codecs.codec import DYNAMIC
from functorch_opt.codecs.coded import SCALE
from functorch_opt.tree import PyTree

__all__ = ["recoded"]


def recoded(saved: Mapping[Path, Tensor], state: PyTree) -> dict[Path, Tensor]:
    """A saved state dict, with slots stored as they are in `state`.

    So a float32 checkpoint can be loaded into a state of `stored`, and the reverse. Slots that are
    stored alike are handed on as they are. `fo.optim` does this by itself. Of sharded slots call it
    on all ranks.

    Args:
        saved: what `state_dict` gave.
        state: a state into which `saved` is to be loaded.

    Returns:
        What `load_state_dict` takes. Floating slots stay in the dtype in which they were saved.

    Example:
        >>> import torch, functorch_opt as fo
        >>> params, gradients = torch.zeros(64, 64), torch.randn(64, 64)
        >>> tx = fo.trace(0.9)
        >>> _, state = tx.update(gradients, tx.init(params))
        >>> fresh = fo.stored(tx).init(params)
        >>> fresh = fo.load_state_dict(fresh, fo.recoded(fo.state_dict(state), fresh))
        >>> fo.get(fresh, "trace").dtype
        torch.uint8
        >>> back = fo.recoded(fo.state_dict(fresh), state)
        >>> bool((back["slots/trace"] - gradients).abs().max() < 0.03)
        True
    """
    return converted(saved, state_dict(state))


def converted(saved: Mapping[Any, Any], wanted: Mapping[Any, Tensor]) -> dict[Any, Any]:
    """The values of `saved`, stored as those of the same name in `wanted` are."""
    names = {**saved, **wanted}
    new = dict(saved)
    for name, x in saved.items():
        scales = scales_of(name, names)
        if scales is None or not isinstance(x, Tensor):
            continue
        in_code = name in wanted and wanted[name].dtype is DYNAMIC.dtype
        is_in_code = x.dtype is DYNAMIC.dtype and scales in saved
        if is_in_code and not in_code:
            new[name] = sharded.read(DYNAMIC, x, saved[scales])
        elif in_code and x.is_floating_point():
            ((new[name], new[scales]),) = sharded.write(DYNAMIC, [x])
        if scales not in wanted:
            new.pop(scales, None)
        elif scales not in new or not in_code:
            new[scales] = torch.zeros(0)
    return new


def scales_of(name: Any, names: Mapping[Any, Any]) -> Any:
    """The name of the scales of a slot, if it has any: ``a/mu_scale/w`` for ``a/mu/w``."""
    if not isinstance(name, str):
        return None
    parts = name.split("/")
    for i in range(len(parts)):
        other = [*parts]
        other[i] += SCALE
        if "/".join(other) in names:
            return "/".join(other)
    return None
