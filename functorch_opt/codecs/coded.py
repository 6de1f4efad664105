"""A rule whose slots are stored in a code.

It reads codes, decodes them, applies the rule, and encodes its new slots, and all that is one rule.
So every execution of rules is an execution of it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from functorch_opt import tree
from functorch_opt._core.one_tensor import OneTensor
from functorch_opt._core.rule import Block, Leafwise
from functorch_opt._core.sharding import refuse_sharded
from functorch_opt._core.state import StageState
from functorch_opt._core.structure import Path
from functorch_opt.codecs.codec import Codec
from functorch_opt.codecs.rounded import Bits
from functorch_opt.tree import PyTree

SCALE = "_scale"
"""What the name of a slot is followed by in the name of its scales."""
Choice = Callable[[Path, Tensor], bool]


class Stored(OneTensor):
    """A rule on one tensor, with slots in a code."""

    def __init__(self, inner: OneTensor, codecs: Mapping[str, Codec]) -> None:
        self.__dict__.update(vars(inner))
        self.inner, self.codecs = inner, codecs
        self.blocked = {name: codec for name, codec in codecs.items() if codec.block}
        scales = tuple(name + SCALE for name in self.blocked)
        self.bits = Bits(tuple([name for name in codecs if codecs[name].is_random]))
        self.slot_names = (*inner.slot_names, *scales)
        reads = (*inner.reads, *self.blocked, *scales, *self.bits.names)
        self.reads = tuple(dict.fromkeys(reads))
        self.is_plain = False

    def decoded(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """What the rule reads, with its slots as it knows them."""
        found = dict(values)
        for name in self.blocked:
            if name in values:
                found[name] = self._decoded_slot(name, values)
        return found

    def _decoded_slot(self, name: str, values: Mapping[str, Any]) -> Tensor | None:
        codec = self.blocked[name]
        codes = values[name]
        if values["g"] is None or codes is None or codes.dtype is not codec.dtype:
            return codes
        scales = _real(values[name + SCALE])
        shape = _shape(codec, codes, values["g"])
        n = shape[-1] if scales.dim() == 2 else shape.numel()
        x = codec.read(_laid_out(codes, scales), scales.float(), n)
        return x.reshape(shape).to(scales.dtype)

    def encoded(self, new: dict[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
        """New slots as they are stored, in the form in which `values` has the old ones."""
        found = self.bits.rounded(new, values)
        for name, codec in self.blocked.items():
            codes = values[name]
            scales = _real(values[name + SCALE])
            shape = _shape(codec, codes, values["g"])
            if codes.dtype is codec.dtype and _fits(new[name], shape):
                rows = _laid_out(new[name], scales)
                rows, scales = codec.write(rows, scales.shape[-1])
                found[name] = rows.reshape(codes.shape)
            found[name + SCALE] = scales
        return found

    def result(self, values: dict[str, Any]) -> Any:
        result = self.inner.result(self.decoded(values))
        self.inner.check_pair(result)
        u, new = result
        return u, self.encoded(new, values)

    def values_of_leaves(
        self,
        gs: Any,
        ps: Any,
        slots: Any,
        per_leaf: Any,
        names: Any,
    ) -> Any:
        columns = dict(slots)
        for name in self.blocked:
            if name in names:
                columns[name] = self._decoded_column(name, slots, gs)
        return self.inner.values_of_leaves(gs, ps, columns, per_leaf, names)

    def _decoded_column(self, name: str, slots: Any, gs: Any) -> list[Tensor | None]:
        """A slot of all leaves that have an update."""
        both = (name, name + SCALE, "g")
        rows = zip(slots[both[0]], slots[both[1]], gs, strict=True)
        leaves = [dict(zip(both, row, strict=True)) for row in rows]
        return [self._decoded_slot(name, leaf) for leaf in leaves]


def _real(x: Tensor) -> Tensor:
    """A real slot, which a rule for complex tensors reads as complex numbers."""
    return x.real if x.is_complex() else x


def _laid_out(x: Tensor, scales: Tensor) -> Tensor:
    """A slot as its codec sees it: in the rows in which an execution has laid it out, or flat."""
    in_rows = scales.dim() == 2  # in a state, scales are a vector
    return x if in_rows else x.reshape(-1)


def _shape(codec: Codec, codes: Tensor, g: Tensor) -> torch.Size:
    """The shape of a slot: that of its codes, or where these are packed that of the update."""
    return codes.shape if codec.packed == 1 else g.shape


def _fits(x: Any, shape: torch.Size) -> bool:
    """Whether a rule has returned a slot of the right shape. If not, `OneTensor` says so."""
    return isinstance(x, Tensor) and x.shape == shape


class Coded(Leafwise):
    """A stage whose slots are stored in a code, on the leaves that `choice` chooses."""

    def __init__(
        self,
        inner: Leafwise,
        codecs: Mapping[str, Codec],
        choice: Choice,
        key: Tensor,
    ) -> None:
        self.__dict__.update(vars(copy.copy(inner)))
        for kept in ("_entries", "_once_a_step"):
            vars(self).pop(kept, None)
        rule = Stored(inner.on_tensor, codecs)
        self.inner, self.codecs, self.choice = inner, codecs, choice
        self.on_tensor, self.reads = rule, rule.reads
        self.slots, self.blocks = dict(inner.slots), {}
        for name, codec in rule.blocked.items():
            self.slots[name + SCALE] = codec.first_scales
            self.blocks[name + SCALE] = Block(1, codec.block, codec.of_scales)
            if codec.packed > 1:
                self.blocks[name] = Block(1, codec.packed, codec.dtype)
        self.stored = tuple(codecs.items())
        self.bits = rule.bits
        if self.bits.names:
            self.once, self.is_constant = self.bits.once(inner.once, key), False

    def drawn(
        self, now: Mapping[str, Any], like: PyTree, slots: dict[str, list[Any]]
    ) -> dict[str, Any]:
        return self.bits.drawn(now, like, slots) if self.bits.names else {}

    def _init(self, params: PyTree) -> StageState:
        return self.encode(self.inner.init(params), params)

    def encode(self, state: StageState, params: PyTree) -> StageState:
        """The state of the transformation inside, stored."""
        paths = tree.paths(params)
        ps, spec = tree.flatten(params)
        slots = dict(state.slots)
        for name, codec in self.codecs.items():
            column = tree.flatten(state.slots[name])[0]
            rows = zip(paths, ps, column, strict=True)
            stored = [self._stored(codec, *row) for row in rows]
            codes = [x for x, _ in stored]
            slots[name] = tree.unflatten(spec, codes)
            if codec.block:
                scales = [s for _, s in stored]
                slots[name + SCALE] = tree.unflatten(spec, scales)
        first = self.once.first(params) if self.bits.names else {}
        return StageState({**first, **state.shared}, slots)

    def _stored(
        self,
        codec: Codec,
        path: Path,
        p: Tensor | None,
        x: Tensor,
    ) -> Any:
        """A slot as it is stored, and its scales; None where a codec has no scales."""
        if p is None:
            return None, None
        chosen = takes(x) and self.choice(path, p)
        if chosen and codec.packed > 1:
            chosen = x.numel() > 1 and not p.is_complex()
            self._check_shape(codec, path, p, x)
        if chosen:
            refuse_sharded("stored", [x])
        if not codec.block:
            return x.to(codec.dtype) if chosen else x, None
        if chosen:
            return codec.write_whole(x)
        return x, torch.zeros(0, dtype=codec.of_scales, device=x.device)

    def _check_shape(self, codec: Codec, path: Path, p: Tensor, x: Tensor) -> None:
        """Raise ValueError for a slot whose shape could not be told from packed codes."""
        if x.shape != p.shape:
            raise ValueError(
                f"{self.name}: a slot at {path!r} has shape {tuple(x.shape)}, and the parameter "
                f"{tuple(p.shape)}. The code {codec.name!r} is for slots of the parameter's shape: "
                "name another code for this one."
            )


def takes(x: Tensor) -> bool:
    """Whether a slot can be stored in a code: it is real, and not empty."""
    return x.is_floating_point() and x.numel() > 0
