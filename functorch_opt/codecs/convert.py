"""Checkpoints whose slots are stored otherwise than here: in float32, or in a code."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functorch_opt._core.checkpoint import state_dict
from functorch_opt._core.structure import Path
from functorch_opt.codecs import sharded
from functorch_opt.codecs.codec import DYNAMIC, FLOAT8, FOUR_BITS, Codec
from functorch_opt.codecs.coded import SCALE
from functorch_opt.codecs.rounded import KEY
from functorch_opt.tree import PyTree

__all__ = ["recoded"]


def recoded(
    saved: Mapping[Path, Tensor],
    state: PyTree,
) -> dict[Path, Tensor]:
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
        if not isinstance(x, Tensor):
            continue
        if scales is not None:
            like = Slot(wanted.get(name), wanted.get(scales))
            _recode(new, name, scales, Slot(x, saved.get(scales)), like)
        if name in wanted:
            new[name] = _cast(new[name], wanted[name], was_rounded)
    return new


class Slot(NamedTuple):
    """A slot as it is stored: its codes or numbers, and its scales, if it has any."""

    x: Tensor | None
    scales: Tensor | None

    def codec(
        self,
        other: Slot,
    ) -> Codec | None:
        """Its code, beside the same slot that is stored otherwise; None if it is in none.

        Bytes with bfloat16 scales are of ``float8``. Packed codes are fewer than the others.
        """
        x, scales = self
        if x is None or scales is None or x.dtype is not torch.uint8:
            return None
        if scales.dtype is FLOAT8.of_scales:
            return FLOAT8
        n = x.numel()
        if other.x is not None and other.x.shape != x.shape:
            return FOUR_BITS if n < other.x.numel() else DYNAMIC
        fits = [of for of in BYTES if scales.numel() == of.n_blocks(n * of.packed)]
        return fits[0] if fits else None


BYTES = (DYNAMIC, FOUR_BITS)


def _recode(
    new: dict[Any, Any],
    name: Any,
    scales: Any,
    saved: Slot,
    wanted: Slot,
) -> None:
    """Put a slot that is in a code, there or here, into `new` as it is `wanted`."""
    old, code = saved.codec(wanted), wanted.codec(saved)
    if old is not None and old is not code:
        shape = _shape(old, saved, wanted)
        if shape is None:
            return  # the loader says that it does not fit
        new[name] = sharded.read(old, saved.x, saved.scales, shape)
    x = new[name]
    if code is not None and x.is_floating_point():
        ((new[name], new[scales]),) = sharded.write(code, [x])
    elif code is None and wanted.scales is None:
        new.pop(scales, None)
    elif code is None:
        new[scales] = torch.zeros(0, dtype=wanted.scales.dtype)  # type: ignore[union-attr]


def _shape(
    codec: Codec,
    saved: Slot,
    wanted: Slot,
) -> torch.Size | None:
    """The shape of a slot, if it can be told: packed codes have another one."""
    assert saved.x is not None
    if codec.packed == 1:
        return saved.x.shape
    return None if wanted.x is None else wanted.x.shape


def _cast(
    x: Tensor,
    like: Tensor,
    was_rounded: bool,
) -> Tensor:
    """A floating slot in bfloat16 if it is so here; and no longer, if it was rounded at random."""
    if not (x.is_floating_point() and like.is_floating_point()):
        return x
    low = torch.bfloat16
    is_cast = like.dtype is low or (x.dtype is low and was_rounded)
    return x.to(like.dtype) if is_cast else x


def _with_keys(
    saved: Mapping[Any, Any],
    wanted: Mapping[Any, Tensor],
    there: Collection[Any],
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


def _lacking(
    names: Collection[Any],
    others: Collection[Any],
) -> list[str]:
    """The keys of rounding among `names` that the others lack."""
    keys = [name for name in names if isinstance(name, str) and name.endswith(KEY)]
    return [key for key in keys if key not in others]


def scales_of(
    name: Any,
    names: Mapping[Any, Any],
) -> Any:
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
