"""A rule whose slots are stored in a code.

It reads codes, decodes them, applies the rule, and encodes its new slots, and all that is one rule.
So every execution of rules is an execution of it.

Of sharded tensors the ranks have to know the bounds of all blocks before they encode. So the rule is
worked out twice there: once for the bounds, as sums are, and once for the step.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from functorch_opt import tree
from functorch_opt._core import sharding
from functorch_opt._core.leaf import Each, working_dtype
from functorch_opt._core.one_tensor import OneTensor, leaf_values
from functorch_opt._core.rule import Block, Leafwise
from functorch_opt._core.state import StageState
from functorch_opt._core.structure import Path
from functorch_opt.codecs import sharded
from functorch_opt.codecs.codec import Codec
from functorch_opt.codecs.rounded import Bits
from functorch_opt.tree import PyTree

SCALE = "_scale"
"""What the name of a slot is followed by in the name of its scales."""
BOUNDS = "_bounds"
"""What it is followed by in the name of the bounds of its blocks, where tensors are sharded."""
PART = "_part"
"""The name of what says where this rank's part of a sharded tensor is."""
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
        if tree.is_sharded(codes):
            scales, shape = values[name + SCALE], values["g"].shape
            return sharded.read(codec, codes, scales, shape)
        scales = _real(values[name + SCALE])
        if part := values.get(PART):
            x = sharded.decoded(codes, part, codec, scales.float())
            return x.to(scales.dtype)
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
            x = new[name]
            shape = _shape(codec, codes, values["g"])
            is_coded = codes.dtype is codec.dtype and _fits(x, shape)
            if is_coded and PART in values:
                bounds = values[name + BOUNDS]
                part = values[PART]
                found[name], scales = sharded.encoded(x, part, codec, bounds)
            elif is_coded:
                rows = _laid_out(x, scales)
                rows, scales = codec.write(rows, scales.shape[-1])
                found[name] = rows.reshape(codes.shape)
            found[name + SCALE] = scales
        return found

    def apply(
        self,
        g: Tensor,
        p: Tensor | None,
        slots: dict[str, Tensor],
        now: dict[str, Any],
        dtype: torch.dtype,
        exact: Mapping[str, Any] | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """As for any rule. Of sharded tensors the rule is told which part it sees."""
        if not self._sees_a_part(g):
            return super().apply(g, p, slots, now, dtype, exact)
        now = now | {PART: sharded.part_here(g)}
        u, new = super().apply(g, p, self._unpacked(slots, g), now, dtype, exact)
        return u, self._packed(new, slots)

    def _sees_a_part(self, g: Tensor) -> bool:
        """Whether the rule sees this rank's part of a tensor whose slots are in blocks."""
        is_cut = tree.is_sharded(g) and not sharding.is_owned(g)
        return is_cut and self.kind == "elementwise" and bool(self.blocked)

    def _unpacked(
        self,
        slots: dict[str, Tensor],
        g: Tensor,
    ) -> dict[str, Tensor]:
        """The slots of a sharded tensor, with a code for each element of it."""
        found = dict(slots)
        for name, codec in self.blocked.items():
            if slots[name].dtype is codec.dtype:
                found[name] = sharded.unpacked(codec, slots[name], g.shape)
        return found

    def _packed(
        self,
        new: dict[str, Tensor],
        old: dict[str, Tensor],
    ) -> dict[str, Tensor]:
        """The inverse of `_unpacked`, of new slots."""
        found = dict(new)
        for name, codec in self.blocked.items():
            if old[name].dtype is codec.dtype:
                found[name] = sharded.packed(codec, new[name])
        return found

    def bounds(
        self,
        g: Tensor,
        p: Tensor | None,
        slots: dict[str, Tensor],
        now: dict[str, Any],
        dtype: torch.dtype,
    ) -> dict[str, Tensor]:
        """For each slot of a sharded tensor that is in a code, the bounds of what it becomes here."""
        part = sharded.part_here(g)
        found: dict[str, Tensor] = {}

        def look(
            g: Tensor,
            p: Any,
            slots: dict[str, Tensor],
            now: Any,
        ) -> None:
            values = {**now, **slots, "g": g, "p": p, PART: part}
            values |= self._entered(values, dtype, dtype.is_complex)
            result = self.inner.result(self.decoded(values))
            self.inner.check_pair(result)
            for name, codec in self.blocked.items():
                if slots[name].dtype is codec.dtype:
                    found[name] = sharded.bounds(result[1][name], part, codec)

        sharded.seen(look, g, p, self._unpacked(slots, g), now)
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
        self.on_tensor = self.on_codes = rule
        self.reads = rule.reads
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

    @property
    def exchanges(self) -> bool:
        """Whether the ranks exchange something before the rule: sums, or the bounds of blocks."""
        is_elementwise = self.kind == "elementwise"
        return self.has_sums or (is_elementwise and bool(self.blocks))

    def sums_before(
        self,
        updates: PyTree,
        spec: Any,
        gs: list[Any],
        ps: list[Any],
        slots: dict[str, list[Any]],
        now: dict[str, Any],
    ) -> dict[str, Each]:
        """The sums over sharded tensors, and the bounds of their blocks."""
        before: dict[str, Each] = {}
        if self.has_sums:
            before |= super().sums_before(updates, spec, gs, ps, slots, now)
        now = now | before
        names = (*self.reads, *before)
        per_leaf = leaf_values(updates, now, names)
        columns = self._bounds(gs, ps, slots, per_leaf)
        for name, column in columns.items():
            before[name + BOUNDS] = Each(tree.unflatten(spec, column))
        return before

    def _bounds(
        self,
        gs: list[Any],
        ps: list[Any],
        slots: dict[str, list[Any]],
        per_leaf: Any,
    ) -> dict[str, list[Any]]:
        """For each slot, the bounds of all leaves; a number that nobody reads where it has none."""
        found: dict[tuple[str, int], Tensor] = {}
        for i, g in enumerate(gs):
            if not tree.is_sharded(g) or sharding.is_owned(g):
                continue
            p = ps[i] if "p" in self.reads else None
            mine = {name: column[i] for name, column in slots.items()}
            dtype = working_dtype(g, p, *mine.values())
            now = per_leaf.at(i, dtype)
            of_leaf = self.on_codes.bounds(g, p, mine, now, dtype)
            for name, x in of_leaf.items():
                found[name, i] = x
        leaves = [gs[i] for _, i in found]
        whole = sharded.joined_over_ranks([*found.values()], leaves)
        unread = [None if g is None else torch.zeros(()) for g in gs]
        columns = {}
        for name in self.on_codes.blocked:
            columns[name] = [*unread]
        for (name, i), x in zip(found, whole, strict=True):
            columns[name][i] = x
        return columns

    def encode(self, state: StageState, params: PyTree) -> StageState:
        """The state of the transformation inside, stored."""
        paths = tree.paths(params)
        ps, spec = tree.flatten(params)
        slots = dict(state.slots)
        for name, codec in self.codecs.items():
            column = tree.flatten(state.slots[name])[0]
            rows = zip(paths, ps, column, strict=True)
            chosen = [i for i, row in enumerate(rows) if self._takes(codec, *row)]
            if not codec.block:
                for i in chosen:
                    column[i] = column[i].to(codec.dtype)
                slots[name] = tree.unflatten(spec, column)
                continue
            scales = [x if x is None else _no_scales(codec, x) for x in column]
            stored = sharded.write(codec, [column[i] for i in chosen])
            for i, (codes, of_codes) in zip(chosen, stored, strict=True):
                column[i], scales[i] = codes, of_codes
            slots[name] = tree.unflatten(spec, column)
            slots[name + SCALE] = tree.unflatten(spec, scales)
        first = self.once.first(params) if self.bits.names else {}
        return StageState({**first, **state.shared}, slots)

    def _takes(
        self,
        codec: Codec,
        path: Path,
        p: Tensor | None,
        x: Any,
    ) -> bool:
        """Whether the slot of a leaf is stored in a code."""
        if p is None or not takes(x) or not self.choice(path, p):
            return False
        if tree.is_sharded(x):
            sharded.check_takes(codec, x, path)
        if codec.packed > 1:
            self._check_shape(codec, path, p, x)
        return codec.packed == 1 or not p.is_complex()

    def _check_shape(self, codec: Codec, path: Path, p: Tensor, x: Tensor) -> None:
        """Raise ValueError for a slot whose shape could not be told from packed codes."""
        if x.shape != p.shape:
            raise ValueError(
                f"{self.name}: a slot at {path!r} has shape {tuple(x.shape)}, and the parameter "
                f"{tuple(p.shape)}. The code {codec.name!r} is for slots of the parameter's shape: "
                "name another code for this one."
            )


def _no_scales(codec: Codec, x: Tensor) -> Tensor:
    return torch.zeros(0, dtype=codec.of_scales, device=x.device)


def takes(x: Tensor) -> bool:
    """Whether a slot can be stored in a code: it is real, and of more than one element."""
    return x.is_floating_point() and x.numel() > 1
