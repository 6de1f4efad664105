"""Which dims of a tensor are a matrix: for the optimizers that work with matrices."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from functorch_opt._core.chain import chain
from functorch_opt._core.groups import partition
from functorch_opt._core.transformation import (
    GradientTransformation,
    ScalarOrSchedule,
    check_choice,
    check_range,
)
from functorch_opt.optimizers.adam import adamw
from functorch_opt.transforms.decay import add_decayed_weights
from functorch_opt.transforms.scale import scale_by_learning_rate

__all__ = ["MatrixDims"]

Shape = Sequence[int]
Scaling = Literal["original", "match_rms_adamw", "rms_to_rms", "spectral", "none"]


class MatrixDims(NamedTuple):
    """Which dims of a tensor are the rows of a matrix, and which its columns.

    Dims that are neither are batch: every index of them has a matrix of its own. If rows or columns
    are several dims, they are taken as one. By default the rows are the first dim, which has the
    outputs in torch, and the columns are all others. That fits ``Linear`` and convolutions.

    Args:
        rows: one dim, or several.
        columns: one dim, or several. None means all dims that are not rows.
        split: matrices that are fused along the rows. A number is how many of one size there are,
            such as heads. A tuple has the size of each, such as ``(q, k, v)``. Each then is a
            matrix of its own.

    Example:
        >>> import functorch_opt as fo
        >>> fo.MatrixDims(rows=-2, columns=-1)                     # [experts, out, in]
        MatrixDims(rows=-2, columns=-1, split=None)
        >>> fused = fo.MatrixDims(split=(64, 16, 16))              # [64 + 16 + 16, in]
        >>> muon = fo.scale_by_muon(dims=fused)
    """

    rows: int | tuple[int, ...] = 0
    columns: int | tuple[int, ...] | None = None
    split: int | tuple[int, ...] | None = None

    def order(self, ndim: int) -> tuple[list[int], list[int], list[int]]:
        """The dims of a tensor with `ndim` dims that are batch, rows and columns.

        Raises:
            ValueError: the tensor has no such dims; one is both rows and columns.
        """
        rows = _dims_of(self.rows, ndim, self)
        others = [i for i in range(ndim) if i not in rows]
        columns = others
        if self.columns is not None:
            columns = _dims_of(self.columns, ndim, self)
        shared = set(rows) & set(columns)
        if not columns or shared or len({*rows}) < len(rows):
            raise ValueError(
                f"a tensor with {ndim} dims is no matrix with {self}. "
                "Choose the matrices with masked or partition."
            )
        return [i for i in others if i not in columns], rows, columns


def _dims_of(given: int | tuple[int, ...], ndim: int, dims: MatrixDims) -> list[int]:
    several = given if isinstance(given, tuple) else (given,)
    if any(not -ndim <= i < ndim for i in several):
        raise ValueError(
            f"a tensor with {ndim} dims has not the dims of {dims}. "
            "Choose the matrices with masked or partition."
        )
    return [i % ndim for i in several]


ORDINARY = MatrixDims()


def as_matrix(x: Tensor, dims: MatrixDims) -> Tensor:
    """`x` as ``[batch..., rows, columns]``."""
    if x.dim() == 2 and dims[:2] == (0, None):
        return x
    batch, rows, columns = dims.order(x.dim())
    lengths = [x.shape[i] for i in batch]
    sides = _product(x.shape, rows), _product(x.shape, columns)
    ordered = x.permute(batch + rows + columns)
    return ordered.reshape([*lengths, *sides])


def _product(shape: Shape, dims: list[int]) -> int:
    """The size of some dims that are taken as one."""
    return math.prod([shape[i] for i in dims])


def as_tensor(y: Tensor, like: Tensor, dims: MatrixDims) -> Tensor:
    """The inverse of `as_matrix`, in the shape of `like`."""
    if y.shape == like.shape and dims[:2] == (0, None):
        return y
    batch, rows, columns = dims.order(like.dim())
    order = batch + rows + columns
    back = sorted(range(like.dim()), key=order.__getitem__)
    y = y.reshape([like.shape[i] for i in order])
    return y.permute(back).contiguous()


def shapes_of(shape: Shape, dims: MatrixDims) -> list[list[int]]:
    """The shapes of the tensors that `blocks_of` makes, of the shape of a tensor.

    Raises:
        ValueError: the tensor is no matrix with these dims, or cannot be split.
    """
    batch, rows, columns = dims.order(len(shape))
    lengths = [shape[i] for i in batch]
    n, m = _product(shape, rows), _product(shape, columns)
    split = dims.split
    sizes = sizes_of(n, split)
    if isinstance(split, int):
        return [[*lengths, split, n // split, m]]
    return [[*lengths, k, m] for k in sizes]


def sizes_of(n: int, split: int | tuple[int, ...] | None) -> tuple[int, ...]:
    """The rows of each matrix, of `n` rows that are fused.

    Raises:
        ValueError: they cannot be split like this.
    """
    if split is None:
        return (n,)
    if isinstance(split, int):
        several = split > 0 and not isinstance(split, bool)
        sizes = (n // split,) * split if several else ()
    else:
        sizes = split if isinstance(split, tuple) else ()
    if not sizes or min(sizes) < 0 or sum(sizes) != n:
        raise ValueError(
            f"{n} rows cannot be split into {split!r}. Write how many matrices of one size there "
            f"are, or a tuple with the rows of each, which are {n} in all."
        )
    return sizes


def blocks_of(y: Tensor, split: int | tuple[int, ...] | None) -> list[Tensor]:
    """The matrices that are fused along the rows of `y`; those of one size as one tensor."""
    if split is None:
        return [y]
    if isinstance(split, int):
        return [y.unflatten(-2, (split, -1))]
    return list(y.split(split, -2))


def joined(blocks: list[Tensor], split: int | tuple[int, ...] | None) -> Tensor:
    """The inverse of `blocks_of`."""
    if split is None:
        return blocks[0]
    if isinstance(split, int):
        return blocks[0].flatten(-3, -2)
    return torch.cat(blocks, -2)


def on_matrices(
    f: Callable[..., Tensor], dims: MatrixDims, x: Tensor, *others: Tensor
) -> Tensor:
    """`f` of every matrix in `x`, and of those at the same places in other tensors."""
    split = dims.split
    columns = [blocks_of(as_matrix(y, dims), split) for y in (x, *others)]
    found = [f(*row) for row in zip(*columns, strict=True)]
    return as_tensor(joined(found, split), x, dims)


def real_part(x: Tensor) -> Tensor:
    """The real part of a slot.

    It is a copy, for the strides of a view are twice as large. If there are no elements, no
    operation makes them small again, and after 62 steps they are beyond what torch can count.
    """
    if not x.is_complex():
        return x
    return x.real.clone(memory_format=torch.contiguous_format)


def matrix_slot(
    make: Callable[[Tensor], Tensor], dims: MatrixDims
) -> Callable[[Tensor], Tensor]:
    """`make` for a slot, which refuses parameters that are no matrices."""

    def checked(p: Tensor) -> Tensor:
        shapes_of(p.shape, dims)
        return make(p)

    return checked


def check_scaling(scaling: str) -> None:
    """Raise ValueError for a scale that there is not."""
    check_choice(*get_args(Scaling), scaling=scaling)


def scale_of(shape: Shape, scaling: Scaling) -> float:
    """The factor of a step, which makes one learning rate fit matrices of any shape."""
    n, m = shape[-2], max(shape[-1], 1)
    if scaling == "original":
        return max(1.0, n / m) ** 0.5
    if scaling == "match_rms_adamw":
        return 0.2 * max(n, m) ** 0.5
    if scaling == "rms_to_rms":
        return (n / m) ** 0.5
    return max(n, m) ** 0.5 if scaling == "spectral" else 1.0


def matrices_and_rest(
    direction: GradientTransformation,
    learning_rate: ScalarOrSchedule,
    weight_decay: ScalarOrSchedule,
    adam: Mapping[str, Any],
    last: GradientTransformation | None = None,
    *,
    count_ones: bool = True,
) -> GradientTransformation:
    """`direction` for the tensors with two dims or more, and `adamw` for the rest.

    Args:
        direction: a stage for matrices.
        learning_rate, weight_decay: of the matrices.
        adam: of `adamw`. Its learning rate is that of the matrices, if it is None.
        last: what takes the place of decay and learning rate.
        count_ones: whether dims of size 1 count.
    """
    mine = {f"adam_{name}": value for name, value in adam.items()}
    above_zero = {name: mine.pop(name) for name in ("adam_learning_rate", "adam_eps")}
    check_range(0, float("inf"), **above_zero)
    check_range(0, 1, **mine)
    decay = add_decayed_weights(weight_decay)
    step = scale_by_learning_rate(learning_rate)
    of_matrices = chain(direction, last) if last else chain(direction, decay, step)
    rate = adam["learning_rate"]
    rate = learning_rate if rate is None else rate
    rest = adamw(**{**adam, "learning_rate": rate, "weight_decay": 0.0})
    stages = {"matrices": of_matrices, "rest": rest}

    def label(path: str, p: Tensor) -> str:
        dims = [n for n in p.shape if n != 1 or count_ones]
        return "matrices" if len(dims) >= 2 else "rest"

    return partition(stages, label)
