"""Kronecker factors: for each dim of a tensor, a matrix of what its slices have in common.

    factor of dim k  =  mean of  X X'          X: the tensor as a matrix, with dim k for its rows

Here are how a tensor is cut into blocks, the slots that hold the factors of all blocks, and the
bases (eigenvectors) of factors. A slot is one vector with all matrices one after another, since
tensors have other numbers of dims and blocks. If a basis cannot be worked out, the last one stays,
and ``failed`` counts it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functorch_opt import tree
from functorch_opt._core.decision import known
from functorch_opt._core.rule import leafwise
from functorch_opt._core.transformation import (
    GradientTransformation,
    ScalarOrSchedule,
    check_range,
    transformation,
)

Matrices = list[Tensor | None]
"""One for each dim of a block, and None for a dim without."""


class Cutting(NamedTuple):
    """How tensors are cut into blocks.

    Args:
        largest: the largest dim that has a factor.
        blocks: whether larger dims are cut into blocks of this size. Otherwise they have no factor.
        merged: neighbouring dims are one as long as it has at most this size; 0: none are.
        least_dims: tensors with fewer dims have no factors.
        count_ones: whether dims of size 1 count there.
    """

    largest: int
    blocks: bool = False
    merged: int = 0
    least_dims: int = 2
    count_ones: bool = False

    def dims(self, shape: Any) -> list[int]:
        """The dims of a tensor without those of size 1, and with small ones merged."""
        dims: list[int] = []
        for n in shape:
            if n != 1 and dims and 0 < dims[-1] * n <= self.merged:
                dims[-1] *= n
            elif n != 1:
                dims.append(n)
        return dims

    def pieces(self, shape: Any) -> list[list[int]]:
        """For each dim the sizes of its blocks."""
        dims = self.dims(shape)
        largest = self.largest if self.blocks else max([1, *dims])
        return [_cut_evenly(n, largest) for n in dims]

    def factors(self, shape: Any) -> list[list[int]]:
        """For each block the size of the factor of each dim; 0 where it has none."""
        pieces = self.pieces(shape)
        counted = [n for n in shape if n != 1 or self.count_ones]
        enough = len(counted) >= self.least_dims and math.prod(shape)
        largest = self.largest if enough else 0
        factors = [[n if n <= largest else 0 for n in sizes] for sizes in pieces]
        return [[*block] for block in itertools.product(*factors)]

    def cut(self, x: Tensor) -> list[Tensor]:
        """The blocks of a tensor."""
        blocks = [x.reshape(self.dims(x.shape))]
        for dim, sizes in enumerate(self.pieces(x.shape)):
            if len(sizes) > 1:
                blocks = [part for block in blocks for part in block.split(sizes, dim)]
        return blocks

    def joined(self, blocks: list[Tensor], like: Tensor) -> Tensor:
        """The inverse of `cut`."""
        for dim, sizes in reversed([*enumerate(self.pieces(like.shape))]):
            n = len(sizes)
            if n > 1:
                starts = range(0, len(blocks), n)
                rows = [blocks[i : i + n] for i in starts]
                blocks = [torch.cat(row, dim) for row in rows]
        return blocks[0].reshape(like.shape)

    # ---- slots -------------------------------------------------------------------------------

    def zeros(self, power: int = 2) -> Callable[[Tensor], Tensor]:
        """A function that makes of a parameter zeros for its factors, or with 1 for vectors."""

        def make(p: Tensor) -> Tensor:
            factors = self.factors(p.shape)
            n = sum(n**power for block in factors for n in block)
            dtype = p.dtype if power == 2 else p.real.dtype
            return p.new_zeros(n, dtype=tree.at_least_float32(dtype))

        return make

    def ones(self, p: Tensor) -> Tensor:
        """The unit matrices."""
        like = self.zeros()(p)
        factors = self.factors(p.shape)
        sizes = [n for block in factors for n in block if n]
        ones = [torch.eye(n, dtype=like.dtype, device=p.device) for n in sizes]
        return torch.cat([one.flatten() for one in ones]) if ones else like

    def taken(self, flat: Tensor, shape: Any, power: int = 2) -> list[Matrices]:
        """The matrices, or vectors, that a slot holds: for each block a list."""
        sizes = self.factors(shape)
        lengths = [n**power for block in sizes for n in block]
        parts = iter(flat.split(lengths) if lengths else ())
        return [
            [_square(next(parts), n, power) for n in block] if block else []
            for block in sizes
        ]

    def kept(self, matrices: list[Matrices], old: Tensor) -> Tensor:
        """The slot that holds these."""
        several = itertools.chain.from_iterable(matrices)
        parts = [x.reshape(-1) for x in several if x is not None]
        return torch.cat(parts) if parts else old.clone()


def _cut_evenly(n: int, largest: int) -> list[int]:
    """The sizes of the blocks of a dim, of which only the last may be smaller."""
    sizes = [min(largest, n - start) for start in range(0, n, largest)]
    return sizes or [0]


def _square(part: Tensor, n: int, power: int) -> Tensor | None:
    return None if not n else part.reshape([n] * power)


def failed_slot(p: Tensor) -> Tensor:
    """How many bases could not be worked out."""
    return p.new_zeros((), dtype=tree.at_least_float32(p.real.dtype))


# ---- along dims ----------------------------------------------------------------------------------


def along(v: Tensor, dim: int, x: Tensor) -> Tensor:
    """A vector, whose index is that of `dim` of x."""
    shape = [1] * x.dim()
    shape[dim] = -1
    return v.reshape(shape)


def unfolded(x: Tensor, dim: int) -> Tensor:
    """The tensor as a matrix, with `dim` for its rows."""
    return x.movedim(dim, 0).reshape(x.shape[dim], -1)


def outer(x: Tensor, dim: int) -> Tensor:
    """``X X'`` of the slices along `dim`."""
    matrix = unfolded(x, dim)
    return matrix @ matrix.mH


def turned(x: Tensor, bases: Matrices, skip: int | None = None) -> Tensor:
    """`x` in the coordinates of `bases`: along each dim multiplied by ``Q'``."""
    for dim, q in enumerate(bases):
        if q is not None and dim != skip:
            x = torch.tensordot(x, q.conj(), ([dim], [0]))
            x = x.movedim(-1, dim)
    return x


def turned_back(x: Tensor, bases: Matrices) -> Tensor:
    """The inverse of `turned`; of other matrices the product along each dim."""
    for dim, q in enumerate(bases):
        if q is not None:
            x = torch.tensordot(x, q, ([dim], [1]))
            x = x.movedim(-1, dim)
    return x


def next_factors(
    cutting: Cutting, g: Tensor, factors: Tensor, keep: Any, add: Any
) -> list[Matrices]:
    """The next factors of all blocks: ``keep`` times the old ones, plus ``add X X'``."""
    found = []
    old = cutting.taken(factors, g.shape)
    for block, x in zip(old, cutting.cut(g), strict=True):
        new: Matrices = []
        for dim, f in enumerate(block):
            new.append(None if f is None else keep * f + add * outer(x, dim))
        found.append(new)
    return found


# ---- bases ---------------------------------------------------------------------------------------


def attempted(f: Callable[[Tensor], Any], x: Tensor) -> tuple[Tensor, ...]:
    """The tensors that `f` makes of a matrix; NaN where it cannot."""
    finite = x.isfinite().all()
    one = torch.eye(*x.shape[-2:], dtype=x.dtype, device=x.device)
    try:
        found = f(torch.where(finite, x, one))
    except torch.linalg.LinAlgError:
        found = f(one.expand(x.shape))
        finite = torch.zeros_like(finite)
    return tuple([torch.where(finite, y, torch.nan) for y in found])


def eigh(x: Tensor) -> tuple[Tensor, ...]:
    """Eigenvalues, the smallest first, and eigenvectors; NaN if they cannot be found."""
    return attempted(torch.linalg.eigh, x)


def qr(x: Tensor) -> Tensor:
    """The orthonormal columns; NaN if they cannot be found."""
    return attempted(torch.linalg.qr, x)[0]


def descending_basis(factor: Tensor, eps: float = 1e-30) -> Tensor:
    """Eigenvectors of a factor, that of the largest eigenvalue first."""
    one = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
    _values, ascending = eigh(factor + eps * one)
    return ascending.flip(-1)


def kept_if_not_found(new: Tensor, old: Tensor) -> tuple[Tensor, Tensor]:
    """`new` where it is finite and `old` otherwise; and whether it is."""
    found = new.isfinite().all()
    return torch.where(found, new, old), found


def power_iteration(factor: Tensor, q: Tensor) -> Tensor:
    """The next basis from the last one: one step towards the eigenvectors."""
    return qr(factor @ q)


def next_bases(
    cutting: Cutting,
    shape: Any,
    factors: Tensor,
    bases: Tensor,
    failed: Tensor,
    fresh: Any,
    eps: float = 1e-30,
) -> tuple[Tensor, Tensor]:
    """The next bases of all blocks, and how many could not be found so far.

    Where `fresh`, they are eigenvectors, of factors with `eps` added to their diagonals.
    """
    found = []
    all_factors = cutting.taken(factors, shape)
    all_bases = cutting.taken(bases, shape)
    rows = zip(all_factors, all_bases, strict=True)
    for fs, qs in rows:
        block: Matrices = []
        for f, q in zip(fs, qs, strict=True):
            if f is not None and q is not None:
                q, is_found = kept_if_not_found(_next_basis(f, q, fresh, eps), q)
                failed = failed + (~is_found).to(failed.dtype)
            block.append(q)
        found.append(block)
    return cutting.kept(found, bases), failed


def _next_basis(factor: Tensor, q: Tensor, fresh: Any, eps: float) -> Tensor:
    """The first basis of a factor, or the next one."""

    def first():
        return (descending_basis(factor, eps),)

    def later():
        return (power_iteration(factor, q),)

    return either(fresh, first, later)[0]


def on_host(flag: Tensor) -> Tensor | bool:
    """A decision, as a bool if the host knows it."""
    host = known(flag)
    return flag if host is None else host


def either(flag: Any, one: Callable[[], Any], other: Callable[[], Any]) -> Any:
    """The tensors that one of two functions returns. Where nobody knows which, both are run."""
    if isinstance(flag, bool):
        return one() if flag else other()
    pairs = zip(one(), other(), strict=True)
    return tuple([torch.where(flag, x, y) for x, y in pairs])


def after_first(frequency: int) -> Callable[[Tensor], Tensor]:
    """Whether bases are due: after the first update, and after each `frequency` of the others."""

    def due(count):
        is_multiple = (count - 1) % frequency == 0
        return (count == 1) | ((count > 1) & is_multiple)

    return due


def of_first(count: Tensor) -> dict[str, Tensor | bool]:
    """Whether there is a basis yet, so that the tensor moves; and whether the first one is due."""
    return {"moves": on_host(count > 0), "fresh": on_host(count == 1)}


# ---- the step ------------------------------------------------------------------------------------


@transformation
def step_then_decay(
    learning_rate: ScalarOrSchedule,
    weight_decay: ScalarOrSchedule,
    rests_first: bool = True,
) -> GradientTransformation:
    """``p -> (p - lr u) (1 - lr weight_decay)``: the decay is of the new parameters.

    With `rests_first` there is none at the first update, which only finds a basis.
    """
    check_range(0, float("inf"), learning_rate=learning_rate, weight_decay=weight_decay)

    def prepare(count, learning_rate, weight_decay):
        moves = tree.as_real(count).clamp(max=1) if rests_first else 1.0
        decay = learning_rate * weight_decay * moves
        return {"by": -learning_rate * (1 - decay), "decay": decay}

    def rule(g, p, by, decay):
        return by * g - decay * p

    hyper = {"learning_rate": learning_rate, "weight_decay": weight_decay}
    return leafwise(rule, prepare, hyper=hyper)
