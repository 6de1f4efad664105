"""Adam of matrices in few dimensions: what GaLore, Fira and APOLLO have in common.

A matrix is turned so that it is tall, X [N, M] with N >= M. A basis B [r, M] projects its rows, and
the moments are those of the projection:

    s  = X B'                                                                              [N, r]
    mu = b1 mu + (1 - b1) s
    nu = b2 nu + (1 - b2) s^2
    d  = mu / (sqrt(nu) + eps)                                         and back with d B   [N, M]
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functorch_opt import tree
from functorch_opt._core import numerics
from functorch_opt._core.transformation import (
    GradientTransformation,
    ScalarOrSchedule,
    check_range,
    check_whole,
)
from functorch_opt.optimizers.kronecker import (
    attempted,
    kept_if_not_found,
    step_then_decay,
)
from functorch_opt.optimizers.matrices import (
    MatrixDims,
    as_matrix,
    as_tensor,
    matrices_and_rest,
    real_part,
    shapes_of,
)


class LowRank(NamedTuple):
    """Which matrices there are, and in how many dimensions.

    Args:
        rank: r; at most the shorter side of a matrix counts.
        dims: which dims are a matrix.
    """

    rank: int
    dims: MatrixDims

    def sides(self, shape: Any) -> tuple[list[int], int, int, int]:
        """Of the matrices in a tensor: the batch, N, M and r."""
        ((*batch, n, m),) = shapes_of(shape, self.dims)
        return batch, max(n, m), min(n, m), min(self.rank, n, m)

    def tall(self, x: Tensor) -> Tensor:
        """The matrices, turned so that they are tall."""
        x = as_matrix(x, self.dims)
        return x.mH.resolve_conj() if x.shape[-2] < x.shape[-1] else x

    def projected(self, x: Tensor, basis: Tensor) -> Tensor:
        """The rows of the matrices in the coordinates of `basis`, in the dtype of `x`."""
        tall = self.tall(x).to(basis.dtype)
        return (tall @ basis.mH).to(x.dtype)

    def back(self, y: Tensor, like: Tensor) -> Tensor:
        """The inverse of `tall`."""
        n, m = as_matrix(like, self.dims).shape[-2:]
        y = y.mH.resolve_conj() if n < m else y
        return as_tensor(y, like, self.dims).contiguous()

    # ---- slots -------------------------------------------------------------------------------

    def slots(self) -> dict[str, Callable[[Tensor], Tensor]]:
        def zeros(p: Tensor, *shape: int) -> Tensor:
            dtype = tree.at_least_float32(p.dtype)
            return p.new_zeros(shape, dtype=dtype)

        def mu(p: Tensor) -> Tensor:
            batch, n, _, r = self.sides(p.shape)
            return zeros(p, *batch, n, r)

        def nu(p: Tensor) -> Tensor:
            return mu(p.real)

        def basis(p: Tensor) -> Tensor:
            # Of zeros nothing would move, where there is no gradient at the first step.
            batch, _, m, r = self.sides(p.shape)
            one = torch.eye(r, m, dtype=zeros(p, 0).dtype, device=p.device)
            return one.expand(*batch, r, m).clone()

        return {"mu": mu, "nu": nu, "basis": basis}

    # ---- bases -------------------------------------------------------------------------------

    def like_basis(self, p: Tensor) -> Tensor:
        """A tensor in the shape of a basis, whose draws are those of every dtype."""
        batch, _, m, r = self.sides(p.shape)
        dtype = torch.complex64 if p.is_complex() else torch.float32
        return torch.empty((*batch, r, m), dtype=dtype, device=p.device)

    def of_noise(self, basis: Tensor, noise: Tensor) -> Tensor:
        """The basis that is made of standard normal numbers."""
        return noise.to(basis.dtype) / max(basis.shape[-2], 1) ** 0.5

    def leading(self, g: Tensor, old: Tensor) -> tuple[Tensor, Tensor]:
        """The leading singular vectors of the matrices, and whether they could be found."""
        x = as_matrix(g, self.dims)
        u, _, vh = attempted(lambda y: torch.linalg.svd(y, full_matrices=False), x)
        rows = u.mH if x.shape[-2] < x.shape[-1] else vh
        rows = rows[..., : old.shape[-2], :].resolve_conj()
        return kept_if_not_found(rows.contiguous(), old)

    def refreshed(self, g: Tensor, basis: Tensor, failed: Tensor) -> dict[str, Tensor]:
        """The next basis, and how often there was none: the rare work of a rule."""
        basis, found = self.leading(g, basis)
        return {"basis": basis, "failed": failed.real + (~found).to(failed.real.dtype)}


def scaled_adam(
    s: Tensor, mu: Tensor, nu: Tensor, w1: Any, w2: Any, eps: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Adam's direction without its corrections, and the moments."""
    mu = torch.lerp(mu, s, w1)
    nu = torch.lerp(real_part(nu), s.abs().square(), w2.real)
    return mu / ((nu + tree.TINY).sqrt() + eps), mu, nu


def corrections(count: Tensor, b1: Any, b2: Any) -> dict[str, Any]:
    """The weights of the moments, and what corrects the direction. It multiplies eps too."""
    t = tree.as_real(count + 1)
    by = (1 - b2**t) ** 0.5 / (1 - b1**t)
    return {"w1": 1 - b1, "w2": 1 - b2, "correction": by}


def norm(x: Tensor, dims: tuple[int, ...] | None = None) -> Tensor:
    """The norm along dims, or of the whole, whose slope at 0 is finite."""
    square = x.abs().square()
    total = square.sum() if dims is None else square.sum(dims, keepdim=True)
    return (total + tree.TINY).sqrt()


def growth(d: Tensor, s: Tensor, by_tensor: bool = False) -> Tensor:
    """How much Adam makes of a projected gradient: per row of the tall matrix, or in all."""
    dims = None if by_tensor else (-1,)
    return norm(d, dims) / (norm(s, dims) + 1e-8)


def limited(w: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
    """`w`, whose norm is at most 1.01 times the last one; and its norm.

    Where the last one is 0 there is no limit: nothing would ever grow from there.
    """
    size = torch.where((w == 0).all(), 0.0, norm(w))
    too_large = (size / (last.real + 1e-8)).clamp(min=1.01) / 1.01
    too_large = torch.where(last.real == 0, 1.0, too_large)
    return w / too_large, size / too_large


first_norm = numerics.scalar_slot(0.0)


def check_low_rank(
    name: str,
    b1: ScalarOrSchedule,
    b2: ScalarOrSchedule,
    eps: ScalarOrSchedule,
    rank: int,
    gap: int,
    scale: ScalarOrSchedule,
    dims: MatrixDims,
) -> None:
    """Raise ValueError for an argument outside its range."""
    check_range(0, 1, b1=b1, b2=b2)
    check_range(0, float("inf"), eps=eps, scale=scale)
    check_whole(1, rank=rank, update_proj_gap=gap)
    if dims.split is not None:
        raise ValueError(f"{name} takes no fused matrices; dims is {dims}.")


def with_adamw(
    direction: GradientTransformation,
    learning_rate: ScalarOrSchedule,
    weight_decay: ScalarOrSchedule,
    adam: Mapping[str, Any],
) -> GradientTransformation:
    """`direction`, a step and then decay for matrices, and `adamw` for the rest."""
    step = step_then_decay(learning_rate, weight_decay, False)
    return matrices_and_rest(direction, learning_rate, weight_decay, adam, step)
