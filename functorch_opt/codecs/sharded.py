"""Slots in a code, of tensors of which each rank has a part.

Blocks are those of the whole tensor, in the order of its flat index. So neither the number of ranks
nor the layout changes a code. A block may lie on several ranks. Its scale depends on nothing but its
largest and its least number, its bounds. Each rank finds the bounds of what it has, and the ranks
join those of all tensors in one message, before anything is encoded.

Codes lie with the parameter. Scales lie on every rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functorch_opt._core import sharding
from functorch_opt._core.exchange import Ranks, _places, _rows_at, layout_of
from functorch_opt._core.owned import _on, joined, owner_of
from functorch_opt._core.structure import Path
from functorch_opt.codecs import four_bit
from functorch_opt.codecs.codec import DYNAMIC, Codec

PIECE = 131_072
"""How many elements are encoded at a time."""


class Part:
    """Where this rank's part of a sharded tensor is in the whole."""

    def __init__(self, like: Any) -> None:
        layout = layout_of(like, sharding._settled(like))
        place = _places(layout.sizes)[Ranks(like.device_mesh).me]
        rows = _rows_at(place, layout)
        device = like.to_local().device
        self.n = like.numel()
        self.rows = []
        step = self.n
        for row, size in zip(rows, layout.shape, strict=True):
            step //= max(1, size)
            self.rows.append(row.to(device) * step)
        self.device = device

    def indices(
        self,
        begin: int,
        end: int,
    ) -> Tensor:
        """The flat indices in the whole of the elements `begin` to `end` of the part."""
        *outer, inner = self.rows
        width = len(inner)
        first = begin // width
        last = (end - 1) // width
        at = torch.arange(first, last + 1, device=self.device)
        lines = torch.zeros_like(at)
        for row in reversed(outer):
            lines += row[at % len(row)]
            at = at.div(len(row), rounding_mode="floor")
        begin -= first * width
        end -= first * width
        if first == last:
            return lines + inner[begin:end]
        index = lines.unsqueeze(-1) + inner
        return index.view(-1)[begin:end]


def part_here(g: Any) -> Part:
    """Where this rank's part of `g` is in the whole."""
    if torch.compiler.is_compiling():
        raise NotImplementedError(
            "slots in a code of sharded parameters cannot be in a graph: their ranks exchange the "
            "bounds of blocks. Leave this update out of torch.compile, or use fo.optim or "
            "compiled_step."
        )
    return Part(g)


class _Piece(NamedTuple):
    """Some elements of a part: where they begin and end, their blocks, and their places there."""

    begin: int
    end: int
    block: Tensor
    place: Tensor

    def of(self, x: Tensor) -> Tensor:
        return x.reshape(-1)[self.begin : self.end]


def _pieces(
    x: Tensor,
    part: Part,
    codec: Codec,
) -> Iterator[_Piece]:
    for begin in range(0, x.numel(), PIECE):
        end = min(begin + PIECE, x.numel())
        index = part.indices(begin, end)
        block = index.div(codec.block, rounding_mode="floor")
        place = index - block * codec.block
        yield _Piece(begin, end, block, place)


# ---- one tensor ----------------------------------------------------------------------------------


def bounds(
    x: Tensor,
    part: Part,
    codec: Codec,
) -> Tensor:
    """For each block of the whole the largest number of this part, and minus the least one.

    Both are minus infinity where this rank has nothing of a block. Ranks may order NaN otherwise, so
    it is taken for an infinity: the block has no finite number either way.
    """
    n_blocks = codec.n_blocks(part.n)
    found = torch.full((n_blocks, 2), -torch.inf, device=x.device)
    for piece in _pieces(x, part, codec):
        y = piece.of(x).float()
        both = torch.stack([y, -y], -1)
        both = both.nan_to_num(torch.inf, torch.inf, -torch.inf)
        rows = piece.block.unsqueeze(-1).expand(-1, 2)
        found.scatter_reduce_(0, rows, both, "amax")
    return found


def encoded(
    x: Tensor,
    part: Part,
    codec: Codec,
    bounds: Tensor,
) -> tuple[Tensor, Tensor]:
    """The codes of this part, and the scales of all blocks.

    `bounds` are those of the whole. To encode what there is of a block together with its bounds gives
    what the whole block would.
    """
    assert codec.encode is not None
    signs = torch.tensor([1.0, -1.0], device=bounds.device)
    ends = bounds.float() * signs
    codes = torch.empty(x.numel(), dtype=codec.dtype, device=x.device)
    width = codec.block + 2
    for piece in _pieces(x, part, codec):
        blocks, row = piece.block.unique_consecutive(return_inverse=True)
        cells = row * width + piece.place
        # What this rank has not of a block is filled with its largest number.
        rows = ends[blocks, :1].repeat(1, width)
        rows[:, codec.block :] = ends[blocks]
        rows.view(-1).scatter_(0, cells, piece.of(x).float())
        of_rows, _ = codec.encode(rows)
        mine = of_rows.view(-1).index_select(0, cells)
        codes[piece.begin : piece.end] = mine
    _, scales = codec.encode(ends)
    return codes.view(x.shape), scales.squeeze(-1)


def decoded(
    codes: Tensor,
    part: Part,
    codec: Codec,
    scales: Tensor,
) -> Tensor:
    """The part of the slot, float32."""
    assert codec.decode is not None
    x = torch.empty(codes.numel(), device=codes.device)
    for piece in _pieces(codes, part, codec):
        of_each = scales[piece.block].unsqueeze(-1)
        numbers = codec.decode(piece.of(codes).unsqueeze(-1), of_each)
        x[piece.begin : piece.end] = numbers.squeeze(-1)
    return x.view(codes.shape)


# ---- all tensors ---------------------------------------------------------------------------------


def joined_over_ranks(
    found: Sequence[Tensor],
    leaves: Sequence[Any],
) -> list[Tensor]:
    """The bounds of whole tensors, from those of the parts of `leaves`: one message a layout."""
    joined = list(found)
    for like, indices in sharding.by_layout(list(leaves)):
        mine = [found[i] for i in indices]
        row = _largest(torch.cat(mine), like)
        parts = row.split([len(x) for x in mine])
        for i, x in zip(indices, parts, strict=True):
            joined[i] = x
    return joined


def _largest(
    row: Tensor,
    like: Any,
) -> Tensor:
    """The largest of the numbers of the ranks that hold different parts of `like`."""
    from torch.distributed.tensor import DTensor, Partial, Replicate

    placements = sharding._settled(like)
    terms = [at if at.is_replicate() else Partial("max") for at in placements]
    mesh = like.device_mesh
    given = DTensor.from_local(row, mesh, terms, run_check=False)
    return given.redistribute(placements=[Replicate()] * mesh.ndim).to_local()


def write(
    codec: Codec,
    xs: Sequence[Any],
) -> list[tuple[Any, Any]]:
    """Codes and scales of whole slots, ordinary or sharded."""
    parted = [i for i, x in enumerate(xs) if is_parted(x)]
    found = []
    for i in parted:
        part = Part(xs[i])
        mine = sharding.part_of(xs[i])
        found.append(bounds(mine, part, codec))
    leaves = [xs[i] for i in parted]
    of_all = joined_over_ranks(found, leaves)
    known = dict(zip(parted, of_all, strict=True))
    return [_written(codec, x, known.get(i)) for i, x in enumerate(xs)]


def _written(
    codec: Codec,
    x: Any,
    bounds: Tensor | None,
) -> tuple[Any, Any]:
    if bounds is not None:
        mine = sharding.part_of(x)
        codes, scales = encoded(mine, Part(x), codec, bounds)
        scales = scales.to(codec.of_scales)
        codes = packed(codec, sharding.join(codes, x))
        return codes, sharding._everywhere(scales, x)
    if not sharding.is_sharded(x):
        return codec.write_whole(x)
    if owner_of(x) is not None:
        return _written_by_owner(codec, x)
    # Only shapes are asked for.
    n_blocks = codec.n_blocks(x.numel())
    scales = torch.empty(n_blocks, dtype=codec.of_scales, device="meta")
    codes = packed(codec, x.to(codec.dtype))
    return codes, sharding._everywhere(scales, x)


def _written_by_owner(
    codec: Codec,
    x: Any,
) -> tuple[Any, Any]:
    """The codes and the scales lie where the slot does, on one rank."""
    n_blocks = codec.n_blocks(x.numel())
    local = x.to_local()
    codes = local.to(codec.dtype)
    scales = local.new_empty(0, dtype=codec.of_scales)
    if local.numel():
        codes, scales = codec.write_whole(local)
    one = x.device_mesh
    n_scales = torch.Size([n_blocks])
    shape = codec.shape_of_codes(x.shape)
    return _on(one, codes, shape), _on(one, scales, n_scales)


def read(
    codec: Codec,
    codes: Any,
    scales: Any,
    shape: torch.Size | None = None,
) -> Any:
    """The inverse of `write`, of one slot, but for rounding.

    `shape` is that of the slot. Only packed codes have another one.
    """
    shape = codes.shape if shape is None else shape
    if is_parted(codes):
        given = sharding.whole(scales).float()
        codes = unpacked(codec, codes, shape)
        mine = sharding.part_of(codes)
        x = decoded(mine, Part(codes), codec, given)
        return sharding.join(x, codes)
    if not sharding.is_sharded(codes):
        return codec.read_whole(codes, sharding.whole(scales), shape)
    local = codes.to_local()
    x = local.float()
    if local.numel():
        x = codec.read_whole(local, scales.to_local(), shape)
    return _on(codes.device_mesh, x, shape)


# ---- two codes in a byte -------------------------------------------------------------------------


def packed(
    codec: Codec,
    codes: Any,
) -> Any:
    """Codes of the shape of a sharded slot, as they are kept. Each rank packs its part."""
    if codec.packed == 1:
        return codes
    mine = codes.to_local()
    mine = mine[..., ::2] if mine.is_meta else four_bit.packed(mine)
    return _laid_out_as(codes, mine, codec.shape_of_codes(codes.shape))


def unpacked(
    codec: Codec,
    codes: Any,
    shape: torch.Size,
) -> Any:
    """The inverse of `packed`: a code for each element of a slot of this `shape`."""
    if codec.packed == 1:
        return codes
    mine = codes.to_local()
    mine = four_bit.unpacked(mine, codec.packed * mine.shape[-1])
    return _laid_out_as(codes, mine, shape)


def _laid_out_as(
    like: Any,
    mine: Tensor,
    shape: torch.Size,
) -> Any:
    """The DTensor of this shape of which `mine` is this rank's part, with the layout of `like`."""
    whole = torch.empty(shape, device="meta")
    placements = sharding._settled(like)
    return joined(mine.contiguous(), like.device_mesh, placements, whole)


def _parts_of_last_dim(x: Any) -> list[int]:
    """How many elements of the last dimension of a sharded tensor there are on its ranks."""
    last = x.dim() - 1
    sizes = [x.shape[-1]]
    for n, at in zip(x.device_mesh.shape, sharding._settled(x), strict=True):
        if at.is_shard(last):
            sizes = [part for size in sizes for part in _cut(size, n)]
    return sizes


def _cut(
    size: int,
    n: int,
) -> list[int]:
    """The sizes of the parts that `n` ranks have of so many elements."""
    most = -(-size // n)
    return [min(most, max(0, size - k * most)) for k in range(n)]


def check_takes(
    codec: Codec,
    x: Any,
    path: Path,
) -> None:
    """Raise TypeError if the ranks have parts of this slot that cannot be packed."""
    if owner_of(x) is not None:
        return
    sizes = _parts_of_last_dim(x)
    if any(size % codec.packed for size in sizes):
        raise TypeError(
            f"stored: a slot at {path!r} cannot be stored as {codec.name!r}. Its shape is "
            f"{tuple(x.shape)}, and the ranks have {sorted({*sizes})} elements of its last "
            f"dimension. Two codes lie in a byte, so these must be even. Write {DYNAMIC.name!r}, or "
            "leave the parameter out by `where`."
        )


def is_parted(x: Any) -> bool:
    """Whether `x` is sharded, and no rank has it alone."""
    if not sharding.is_sharded(x):
        return False
    return owner_of(x) is None and not x.to_local().is_meta


Look = Callable[[Tensor, Tensor | None, dict[str, Tensor], dict[str, Any]], Any]


def seen(
    look: Look,
    g: Any,
    p: Any,
    slots: dict[str, Any],
    now: dict[str, Any],
) -> None:
    """Show `look` this rank's parts."""

    def shown(*given: Any) -> Any:
        look(*given)
        return given[0], given[2]

    sharding.on_shards(shown, True, g, p, slots, now)
