"""State dicts of torchao's and bitsandbytes' optimizers, whose slots are in 4 or 8 bits.

Their codes become float32, by the map that lies beside them. The slots are then stored as they are
here. Neither library is imported: the layout is read.

    torchao        exp_avg, exp_avg_sq   tensors of a class with codes, scale, and dequantize()
    bitsandbytes   state1, state2        codes; with qmap1 and absmax1, one for each block of 256

Source: torchao 0.18, ``torchao/optim``; bitsandbytes 0.50, ``bitsandbytes/optim/optimizer.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from functorch_opt.codecs.coded import SCALE
from functorch_opt.optim.checkpoint import Expected

BLOCK = 256
"""Elements of a block of bitsandbytes."""
WRAPPED = "__bnb_optimizer_quant_state__"
"""Where ``state_dict`` of bitsandbytes puts what must not be cast."""
MOMENTS = ("state1", "state2")


def in_float32(
    entry: Mapping[str, Any],
    keys: Mapping[str, Expected],
    number: Any,
) -> Mapping[str, Any]:
    """What is saved of a parameter, without the codes of another library.

    Raises:
        ValueError: a layout that cannot be read, or that has other slots than there are here.
    """
    if any(map(_is_torchaos, entry.values())):
        return {key: _of_torchao(x) for key, x in entry.items()}
    if "state1" in entry or WRAPPED in entry:
        return _of_bitsandbytes(entry, keys, f"the state of parameter {number!r}")
    return entry


def _is_torchaos(x: Any) -> bool:
    return isinstance(x, Tensor) and all(map(x.__class__.__dict__.__contains__, TORCHAOS))


TORCHAOS = ("dequantize", "__tensor_flatten__")


def _of_torchao(x: Any) -> Any:
    return x.dequantize() if _is_torchaos(x) else x


def _of_bitsandbytes(
    entry: Mapping[str, Any],
    keys: Mapping[str, Expected],
    where: str,
) -> dict[str, Any]:
    """An entry of bitsandbytes with the names that its slots have here, in their order."""
    held = {**entry, **entry.get(WRAPPED, {})}
    theirs = [name for name in MOMENTS if name in held]
    slots = [k for k, of in keys.items() if of.kind == "slot" and SCALE not in k]
    if len(theirs) != len(slots):
        raise ValueError(
            f"{where} was saved by bitsandbytes and has {len(theirs)} slots, {theirs}; here there "
            f"are {len(slots)}, {slots}. Load it into the optimizer of the same rule."
        )
    new: dict[str, Any] = {"step": float(held["step"])} if "step" in held else {}
    for name, slot in zip(theirs, slots, strict=True):
        x = _decoded(held, name, where)
        like = keys[slot].like
        if x.numel() != like.numel() and like.is_floating_point():
            raise ValueError(
                f"{where}: {name} of bitsandbytes has shape {tuple(x.shape)}, and {slot} here has "
                f"{tuple(like.shape)}. AdEMAMix keeps two slots in one there, and paged or sharded "
                "states are cut; neither can be told apart."
            )
        new[slot] = x
    return new


def _decoded(
    held: Mapping[str, Any],
    name: str,
    where: str,
) -> Tensor:
    """A slot of bitsandbytes, float32."""
    x: Tensor = held[name]
    if x.dtype is not torch.uint8:
        return x
    qmap, absmax = (held.get(key + name[-1]) for key in ("qmap", "absmax"))
    if qmap is None or absmax is None or absmax.numel() != -(-x.numel() // BLOCK):
        raise ValueError(
            f"{where}: {name} is in 8 bits and has no absmax{name[-1]} for each block of {BLOCK}: "
            "it was saved with block_wise=False, or without its maps. Save it with block_wise=True."
        )
    scale = absmax.repeat_interleave(BLOCK)[: x.numel()]
    return (qmap[x.flatten().int()] * scale).view(x.shape)
