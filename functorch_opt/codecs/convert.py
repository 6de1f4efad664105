"""Checkpoints whose slots are stored otherwise than here: in float32, or in a code."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from functorch_opt._core.checkpoint import state_dict
from functorch_opt._core.structure import Path
from functorch_opt.codecs.codec import DYNAMIC
from functorch_opt.codecs.coded import SCALE
from functorch_opt.codecs.rounded import KEY
from functorch_opt.tree import PyTree

__all__ = ["recoded"]


def recoded(saved: Mapping[Path, Tensor], state: PyTree) -> dict[Path, Tensor]:
    """A saved state dict, with slots stored as they are in `state`.

    So a float32 checkpoint can be loaded into a state of `stored`, and the reverse. Slots that are
    stored alike are handed on as they are. `fo.optim` does this by itself.

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


def converted(
    saved: Mapping[Any, Any],
    wanted: Mapping[Any, Tensor],
    there: Collection[Any] | None = None,
) -> dict[Any, Any]:
    """The values of `saved`, stored as those of the same name in `wanted` are.

    If `saved` is a part of a checkpoint, `there` has the names of all of it.
    """
    names = {**saved, **wanted}
    there = saved.keys() if there is None else there
    new = _with_keys(saved, wanted, there)
    was_rounded = bool(_lacking(there, wanted))
    for name, x in saved.items():
        scales = scales_of(name, names)
        if name in wanted and isinstance(x, Tensor):
            new[name] = _cast(x, wanted[name], was_rounded)
        if scales is None or not isinstance(x, Tensor):
            continue
        in_code = name in wanted and wanted[name].dtype is DYNAMIC.dtype
        is_in_code = x.dtype is DYNAMIC.dtype and scales in saved
        if is_in_code and not in_code:
            new[name] = DYNAMIC.read_whole(x, saved[scales])
        elif in_code and x.is_floating_point():
            new[name], new[scales] = DYNAMIC.write_whole(x)
        if scales not in wanted:
            new.pop(scales, None)
        elif scales not in new or not in_code:
            new[scales] = torch.zeros(0)
    return new


def _cast(x: Tensor, like: Tensor, was_rounded: bool) -> Tensor:
    """A floating slot in bfloat16 if it is so here; and no longer, if it was rounded at random."""
    if not (x.is_floating_point() and like.is_floating_point()):
        return x
    low = torch.bfloat16
    is_cast = like.dtype is low or (x.dtype is low and was_rounded)
    return x.to(like.dtype) if is_cast else x


def _with_keys(
    saved: Mapping[Any, Any], wanted: Mapping[Any, Tensor], there: Collection[Any]
) -> dict[Any, Any]:
    """The saved values, with and without what rounding at random needs: keys, and counts for them.

    A stage that had no count for itself has it from the optimizer, which calls it ``step``.
    """
    new = dict(saved)
    for key in _lacking(wanted, there):
        if not wanted[key].is_meta:  # an optimizer makes the key that it lacks
            new[key] = wanted[key]
        count = key.removesuffix(KEY) + "count"
        if count in wanted and count not in there:
            step = None if "step" in wanted else new.pop("step", None)
            new[count] = wanted[count] if step is None else step
    for key in _lacking(there, wanted):
        new.pop(key, None)
        count = key.removesuffix(KEY) + "count"
        if count not in wanted and count in new:
            step = new.pop(count)
            if "step" in wanted and "step" not in saved:
                new["step"] = step
    return new


def _lacking(names: Collection[Any], others: Collection[Any]) -> list[str]:
    """The keys of rounding among `names` that the others lack."""
    keys = [name for name in names if isinstance(name, str) and name.endswith(KEY)]
    return [key for key in keys if key not in others]


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
