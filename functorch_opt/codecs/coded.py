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
from functorch_opt._core.leaf import Table
from functorch_opt._core.one_tensor import OneTensor
from functorch_opt._core.rule import Leafwise
from functorch_opt._core.sharding import refuse_sharded
from functorch_opt._core.state import StageState
from functorch_opt._core.structure import Path
from functorch_opt.codecs.codec import Codec
from functorch_opt.tree import PyTree

SCALE = "_scale"
"""What the name of a slot is followed by in the name of its scales."""
Choice = Callable[[Path, Tensor], bool]


class Stored(OneTensor):
    """A rule on one tensor, with slots in a code."""

    def __init__(
        self,
        inner: OneTensor,
        codecs: Mapping[str, Codec],
    ) -> None:
        self.__dict__.update(vars(inner))
        self.inner, self.codecs = inner, codecs
        self.blocked = {name: codec for name, codec in codecs.items() if codec.block}
        scales = tuple(name + SCALE for name in self.blocked)
        self.slot_names = (*inner.slot_names, *scales)
        self.reads = tuple(dict.fromkeys((*inner.reads, *self.blocked, *scales)))
        self.is_plain = False

    def tables(
        self,
        device: torch.device,
    ) -> dict[str, Any]:
        """What the codecs look up."""
        found: dict[str, Any] = {}
        for codec in self.blocked.values():
            found.update(codec.tables(device))
        return found

    def decoded(
        self,
        slots: Mapping[str, Any],
    ) -> dict[str, Any]:
        """The slots as the rule knows them. There may be other values among them."""
        found = dict(slots)
        for name, codec in self.blocked.items():
            codes = slots.get(name)
            if codes is not None and codes.dtype is codec.dtype:
                found[name] = self._read(name, slots)
        return found

    def _read(
        self,
        name: str,
        values: Mapping[str, Any],
    ) -> Tensor:
        codes, scales = values[name], _real(values[name + SCALE])
        given = self._tables_of(codes, values)
        rows = codes if _in_rows(scales) else codes.reshape(-1)
        x = self.blocked[name].read(
            rows,
            scales.float(),
            given,
        )
        return x.reshape(codes.shape).to(scales.dtype)

    def _tables_of(
        self,
        x: Tensor,
        values: Mapping[str, Any],
    ) -> dict[str, Tensor]:
        tables = self.tables(x.device)
        return {n: values.get(n, table.tensor) for n, table in tables.items()}

    def encoded(
        self,
        new: dict[str, Any],
        values: Mapping[str, Any],
    ) -> dict[str, Any]:
        """New slots as they are stored, in the form in which `values` has the old ones."""
        new = dict(new)
        for name, codec in self.blocked.items():
            codes, scales = values[name], _real(values[name + SCALE])
            new[name + SCALE] = scales
            if codes.dtype is not codec.dtype or not isinstance(new[name], Tensor):
                continue
            x, given = new[name], self._tables_of(codes, values)
            if x.shape != codes.shape:
                continue  # which is an error, and is said so
            rows = x if _in_rows(scales) else x.reshape(-1)
            flat, new[name + SCALE] = codec.write(
                rows,
                scales.shape[-1],
                given,
            )
            new[name] = flat.reshape(x.shape)
        return new

    def result(
        self,
        values: dict[str, Any],
    ) -> Any:
        result = self.inner.result(self.decoded(values))
        self.inner.check_pair(result)
        u, new = result
        return u, self.encoded(new, values)

    def values_of_leaves(
        self, gs: Any, ps: Any, slots: Any, per_leaf: Any, names: Any
    ) -> Any:
        read = {name for name in self.blocked if name in names}
        columns = dict(slots)
        for name in read:
            pairs = zip(
                slots[name],
                slots[name + SCALE],
                strict=True,
            )
            columns[name] = [
                None if x is None else self.decoded({name: x, name + SCALE: s})[name]
                for x, s in pairs
            ]
        return self.inner.values_of_leaves(
            gs,
            ps,
            columns,
            per_leaf,
            names,
        )


def _real(x: Tensor) -> Tensor:
    """A real slot, which a rule for complex tensors reads as complex numbers."""
    return x.real if x.is_complex() else x


def _in_rows(scales: Tensor) -> bool:
    """Whether an execution has laid the tensors out in rows. In a state, scales are a vector."""
    return scales.dim() == 2


class Coded(Leafwise):
    """A stage whose slots are stored in a code, on the leaves that `choice` chooses."""

    def __init__(
        self, inner: Leafwise, codecs: Mapping[str, Codec], choice: Choice
    ) -> None:
        self.__dict__.update(vars(copy.copy(inner)))
        for kept in ("_entries", "_once_a_step"):
            vars(self).pop(kept, None)
        self.inner, self.codecs, self.choice = inner, codecs, choice
        rule = Stored(inner.on_tensor, codecs)
        self.on_tensor, self.reads = rule, rule.reads
        scales: dict[str, Any] = {n + SCALE: _scales(c) for n, c in rule.blocked.items()}
        self.slots = {**inner.slots, **scales}
        self.blocks = {n + SCALE: (1, c.block) for n, c in rule.blocked.items()}
        self.stored = tuple(codecs.items())

    def tables(
        self,
        device: torch.device,
    ) -> dict[str, Table]:
        return self.on_tensor.tables(device)  # type: ignore[attr-defined]

    def _init(
        self,
        params: PyTree,
    ) -> StageState:
        return self.encode(self.inner.init(params), params)

    def encode(
        self,
        state: StageState,
        params: PyTree,
    ) -> StageState:
        """The state of the transformation inside, stored."""
        paths, (ps, spec) = tree.paths(params), tree.flatten(params)
        slots = dict(state.slots)
        for name, codec in self.codecs.items():
            column = tree.flatten(state.slots[name])[0]
            rows = zip(
                paths,
                ps,
                column,
                strict=True,
            )
            stored = [
                (None, None)
                if p is None
                else self._stored(
                    codec,
                    path,
                    p,
                    x,
                )
                for path, p, x in rows
            ]
            slots[name] = tree.unflatten(spec, [x for x, _ in stored])
            if codec.block:
                slots[name + SCALE] = tree.unflatten(spec, [s for _, s in stored])
        return StageState(state.shared, slots)

    def _stored(
        self,
        codec: Codec,
        path: Path,
        p: Tensor,
        x: Tensor,
    ) -> Any:
        chosen = takes(x) and self.choice(path, p)
        if chosen:
            refuse_sharded("stored", [x])
        if not codec.block:
            return (x.to(codec.dtype) if chosen else x), None
        n = -(-x.numel() // codec.block) if chosen else 0
        scales = torch.zeros(
            n,
            dtype=torch.float32,
            device=x.device,
        )
        if not chosen:
            return x, scales
        tables = {name: of.tensor for name, of in codec.tables(x.device).items()}
        flat, scales = codec.write(
            x.reshape(-1),
            n,
            tables,
        )
        return flat.reshape(x.shape), scales

    def decode(
        self,
        state: StageState,
    ) -> StageState:
        """The state of the transformation inside."""
        self.check_state(state)
        slots = {name: state.slots[name] for name in self.inner.slots}
        rule: Any = self.on_tensor
        for name, codec in self.codecs.items():
            like = tree.flatten(slots[name])

            def read(x: Any, s: Any, name: str = name) -> Any:
                return rule.decoded({name: x, name + SCALE: s})[name]

            if codec.block:
                scales = tree.flatten(state.slots[name + SCALE])[0]
                column = [
                    read(x, s)
                    for x, s in zip(
                        like[0],
                        scales,
                        strict=True,
                    )
                ]
            else:
                column = [
                    None if x is None else x.to(tree.at_least_float32(x.dtype))
                    for x in like[0]
                ]
            slots[name] = tree.unflatten(like[1], column)
        return StageState(state.shared, slots)


def _scales(codec: Codec) -> Callable[[Tensor], Tensor]:
    def first(p: Tensor) -> Tensor:
        return p.new_zeros(-(-p.numel() // codec.block), dtype=torch.float32)

    return first


def takes(x: Tensor) -> bool:
    """Whether a slot can be stored in a code: it is real, and not empty."""
    return x.is_floating_point() and x.numel() > 0
