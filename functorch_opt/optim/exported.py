"""Our state in the layouts of torchao and bitsandbytes: the reverse of `functorch_opt.optim.foreign`.

Codes stay as they are, with the map that they mean beside them. There a slot has one map, and here
each block has its own. So where a slot has blocks of both maps, it gets the signed one, and blocks
of the other are stored anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functorch_opt._core.sharding import is_sharded
from functorch_opt.codecs import four_bit, maps
from functorch_opt.codecs.codec import DYNAMIC, FLOAT8, FOUR_BITS, Codec
from functorch_opt.codecs.coded import SCALE
from functorch_opt.codecs.convert import Slot
from functorch_opt.optim.loading import _expected

__all__ = ["exported"]

TORCHAOS_SLOTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")


def exported(
    optimizer: Any,
    theirs: torch.optim.Optimizer,
) -> dict[str, Any]:
    """The state of `optimizer` as a state dict for an optimizer of torchao or bitsandbytes.

    Load it with ``theirs.load_state_dict``, and the training goes on there. Codes of 8 and 4 bits and
    of ``"float8"`` are handed on as they are, with their map; those that its library does not have
    are an error. Where blocks of a slot have different maps, the slot gets the signed one, and the
    other blocks are off by up to a level of it. Slots in float32 stay so. The groups are
    those of `theirs`. The reverse needs nothing: ``optimizer.load_state_dict(theirs.state_dict())``.

    Args:
        optimizer: one of `fo.optim`, with the state of ordinary tensors.
        theirs: an optimizer of the same rule, with parameters of the same shapes in the same order.
            Of torchao, codes are for tensors whose blocks are full; the slots of others become
            float32.

    Raises:
        TypeError: `theirs` is of another library; slots are sharded, or in a code that the library
            does not have.
        ValueError: the parameters have other shapes; the rule has another number of slots.

    Source: torchao 0.18, ``torchao/optim``; bitsandbytes 0.50, ``bitsandbytes/optim/optimizer.py``.

    Example:
        >>> import torch, functorch_opt as fo
        >>> w = torch.nn.Parameter(torch.ones(64, 64))
        >>> opt = fo.optim.Lion([w], lr=1e-4, state="8bit")
        >>> try:
        ...     fo.optim.exported(opt, torch.optim.SGD([w]))
        ... except TypeError as error:
        ...     print(str(error)[:40])
        exported: SGD is an optimizer of neither
    """
    entry_of = _layout(theirs)
    params, others = _params(optimizer), _params(theirs)
    shapes, wanted = [p.shape for p in params], [p.shape for p in others]
    if shapes != wanted:
        raise ValueError(
            f"exported: the parameters have the shapes {[*map(tuple, shapes)]}, and those of "
            f"{type(theirs).__name__} {[*map(tuple, wanted)]}. Give both the same ones, in one order."
        )
    expected = _expected(optimizer)
    state = {}
    for number, p in enumerate(params):
        entry = optimizer.state.get(p, {})
        slots = [*_slots(entry, expected.get(p, {}), p.shape, number)]
        if slots:
            steps = _count(entry)
            state[number] = entry_of(theirs, others[number], slots, steps)
    groups = theirs.state_dict()["param_groups"]
    return {"state": state, "param_groups": groups}


class Named(NamedTuple):
    """A slot of a parameter, and where it is, for errors."""

    where: str
    x: Tensor
    scales: Tensor | None
    codec: Codec | None


EntryOf = Callable[[Any, Tensor, list[Named], float], dict[str, Any]]


def _layout(theirs: Any) -> EntryOf:
    """What makes the state of a parameter in the layout of `theirs`."""
    if hasattr(theirs, "_new_buffer"):
        return _of_torchao
    if hasattr(theirs, "name2qmap"):
        return _of_bitsandbytes
    raise TypeError(
        f"exported: {type(theirs).__name__} is an optimizer of neither torchao nor bitsandbytes. "
        "torch's own take optimizer.state_dict() if the slots are in float32."
    )


def _params(optimizer: Any) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _count(entry: dict[str, Any]) -> float:
    """How many steps were made with a parameter."""
    counts = [
        x for key, x in entry.items() if key.rpartition("/")[2] in ("step", "count")
    ]
    return max(map(float, counts), default=0.0)


def _slots(
    entry: dict[str, Any],
    keys: dict[str, Any],
    shape: torch.Size,
    number: int,
) -> Iterator[Named]:
    """The slots of a parameter, in the order of the rule."""
    for key, of in keys.items():
        if of.kind != "slot" or SCALE in key or key not in entry:
            continue
        x, scales = entry[key], entry.get(key + SCALE)
        where = f"{key!r} of parameter {number}"
        if is_sharded(x):
            raise TypeError(
                f"exported: {where} is a DTensor. Load opt.state_dict() into an optimizer of "
                "ordinary parameters, and give that."
            )
        like = torch.empty(shape, device="meta")
        yield Named(where, x, scales, Slot(x, scales).codec(Slot(like, None)))


def _refuse(slot: Named, library: str, known: list[str]) -> None:
    code = slot.codec.name if slot.codec else str(slot.x.dtype)
    raise TypeError(
        f"exported: {slot.where} is stored as {code}, and {library} has {known} and float32. Load the "
        "state dict into an optimizer whose slots are stored as one of these, and give that."
    )


# ---- maps ----------------------------------------------------------------------------------------


class OneMap(NamedTuple):
    """A slot with one map for all its blocks."""

    codes: Tensor
    scale: Tensor
    qmap: Tensor


def _with_one_map(slot: Named) -> OneMap:
    """The codes of 8 or 4 bits of a slot, flat and not packed, with the map that all blocks have."""
    assert slot.scales is not None
    assert slot.codec is not None
    codes = slot.x.flatten()
    codec, scale = slot.codec, slot.scales.abs()
    if codec.packed > 1:
        codes = four_bit.unpacked(codes, codec.packed * codes.numel())
    is_other = (slot.scales < 0).repeat_interleave(codec.block)[: codes.numel()]
    used = scale > 0
    if bool((slot.scales[used] < 0).all()) and bool(used.any()):
        return OneMap(codes, scale, _map(codec, False))
    qmap = _map(codec, True)
    if bool(is_other.any()):
        levels = _map(codec, False)[codes.int()]
        middles = (qmap[1:] + qmap[:-1]) / 2
        anew = torch.bucketize(levels, middles).to(codes.dtype)
        codes = torch.where(is_other, anew, codes)
    return OneMap(codes, scale, qmap.to(codes.device))


def _map(codec: Codec, signed: bool) -> Tensor:
    """The levels of a code, float32."""
    if codec is DYNAMIC:
        return maps.dynamic_map(signed).float()
    linear = torch.arange(1, 17, dtype=torch.float32) / 16
    return torch.tensor(four_bit.LEVELS) if signed else linear


# ---- layouts -------------------------------------------------------------------------------------


def _of_bitsandbytes(
    theirs: Any,
    p: Tensor,
    slots: list[Named],
    steps: float,
) -> dict[str, Any]:
    """``state1`` and ``state2``, with ``qmap1`` and ``absmax1`` where they are in 8 bits."""
    if len(slots) > 2:
        raise ValueError(_too_many(theirs, slots, 2))
    entry: dict[str, Any] = {"step": int(steps)}
    for k, slot in enumerate(slots, start=1):
        entry[f"state{k}"] = slot.x.clone()
        if slot.codec is DYNAMIC:
            found = _with_one_map(slot)
            entry[f"state{k}"] = found.codes.view(slot.x.shape)
            entry[f"qmap{k}"], entry[f"absmax{k}"] = found.qmap, found.scale
        elif slot.codec or slot.x.dtype is not torch.float32:
            _refuse(slot, "bitsandbytes", [DYNAMIC.name])
    return entry


def _of_torchao(
    theirs: Any,
    p: Tensor,
    slots: list[Named],
    steps: float,
) -> dict[str, Any]:
    """``exp_avg`` and ``exp_avg_sq``, of the class that the optimizer makes for this parameter."""
    if len(slots) > len(TORCHAOS_SLOTS):
        raise ValueError(_too_many(theirs, slots, len(TORCHAOS_SLOTS)))
    entry: dict[str, Any] = {"step": torch.tensor(steps)}
    for k, slot in enumerate(slots):
        buffer = theirs._new_buffer(p, k == 0)
        entry[TORCHAOS_SLOTS[k]] = _like_torchaos(buffer, slot)
    return entry


def _like_torchaos(buffer: Any, slot: Named) -> Tensor:
    """A slot as a tensor of the class of `buffer`, which is ordinary where blocks are not full."""
    if slot.codec is None:
        if slot.x.dtype is not torch.float32:
            _refuse(slot, "torchao", [DYNAMIC.name, FOUR_BITS.name, FLOAT8.name])
        return slot.x.clone()
    if not hasattr(buffer, "__tensor_flatten__"):
        assert slot.scales is not None
        return slot.codec.read_whole(slot.x, slot.scales, buffer.shape)
    names, rest = buffer.__tensor_flatten__()
    made = _parts(slot)
    like = buffer.codes
    if made["codes"].dtype is not like.dtype or made["codes"].numel() != like.numel():
        raise TypeError(
            f"exported: {slot.where} is stored as {slot.codec.name!r}, and the optimizer of torchao "
            f"has {type(buffer).__name__}. Give one with the same code."
        )
    made["codes"] = made["codes"].view(like.shape)
    parts = {name: made[name] for name in names}
    new: Tensor = type(buffer).__tensor_unflatten__(parts, rest)
    return new


def _parts(slot: Named) -> dict[str, Tensor]:
    """What torchao keeps of a slot: codes, scales, and their map if there is one."""
    assert slot.scales is not None
    if slot.codec is FLOAT8:
        codes = slot.x.flatten().view(torch.float8_e4m3fn)
        return {"codes": codes, "scale": slot.scales.float()}
    found = _with_one_map(slot)
    codes = four_bit.packed(found.codes) if slot.codec is FOUR_BITS else found.codes
    return {"codes": codes, "scale": found.scale, "qmap": found.qmap}


def _too_many(theirs: Any, slots: list[Named], most: int) -> str:
    names = [slot.where for slot in slots]
    return (
        f"exported: {type(theirs).__name__} keeps at most {most} slots, and here there are "
        f"{len(names)}: {names}. Give an optimizer of the same rule."
    )
