"""Fira: GaLore, and what it leaves out of the gradient, as large as Adam would make it.

    every update_proj_gap steps: B = the leading singular vectors of X                       [r, M]
    s  = X B', and d = Adam's direction of s without corrections                       as in GaLore
    f  = |d| / (|s| + 1e-8)                                                   for each row of s
    w  = f (X - scale s B)
    w  = w / max(1, |w| / (1.01 |w before|))
    u  = sqrt(1 - b2^t) / (1 - b1^t) (scale d B + w)

Source: Chen, Feng, Li, Lai, Yue, Yuan & Wang, "Fira: Can We Achieve Full-rank Training of LLMs
Under Low-rank Constraint?", 2024, alg. 1, and the authors' code.
"""

from __future__ import annotations

from functorch_opt._core.rule import every, leafwise
from functorch_opt._core.transformation import (
    GradientTransformation,
    ScalarOrSchedule,
    transformation,
)
from functorch_opt.optimizers.kronecker import failed_slot
from functorch_opt.optimizers.low_rank import (
    LowRank,
    check_low_rank,
    corrections,
    first_norm,
    growth,
    limited,
    scaled_adam,
    with_adamw,
)
from functorch_opt.optimizers.matrices import ORDINARY, MatrixDims

__all__ = ["fira", "scale_by_fira"]


@transformation
def scale_by_fira(
    rank: int = 128,
    update_proj_gap: int = 200,
    scale: ScalarOrSchedule = 0.25,
    b1: ScalarOrSchedule = 0.9,
    b2: ScalarOrSchedule = 0.999,
    eps: ScalarOrSchedule = 1e-6,
    *,
    dims: MatrixDims = ORDINARY,
) -> GradientTransformation:
    """Adam in `rank` dimensions, and scaled gradients in the others: steps of full rank.

    The rule is at the top of `functorch_opt.optimizers.fira`. The state is that of
    `scale_by_galore`, and ``last``, the norm of the last w. From one step to the next it grows by 1%
    at most.

    Args:
        rank, update_proj_gap, b1, b2, eps, dims: see `scale_by_galore`.
        scale: multiplies what is projected; the authors' alpha.

    Raises:
        ValueError: an argument outside its range; a tensor is no matrix.

    Source: Chen et al., 2024, alg. 1, and the authors' code. There a matrix whose first gradient is
    zero stays where it is for hundreds of steps, since w cannot grow from 0. Here there is no limit
    after a w of 0.

    Example:
        >>> import torch, functorch_opt as fo
        >>> tx, g = fo.scale_by_fira(rank=1, scale=1.0), torch.tensor([[4.0, 0.0], [0.0, 2.0]])
        >>> u, _ = tx.update(g, tx.init(torch.zeros(2, 2)))
        >>> u.round(decimals=3).abs()
        tensor([[1., 0.],
                [0., 0.]])
    """
    given = (b1, b2, eps, rank, update_proj_gap, scale, dims)
    check_low_rank("scale_by_fira", *given)
    space = LowRank(rank, dims)

    def work(g, basis, failed):
        return space.refreshed(g, basis, failed)

    def rule(g, mu, nu, basis, failed, last, w1, w2, eps, scale, correction):
        x = space.tall(g)
        s = x @ basis.mH
        d, mu, nu = scaled_adam(s, mu, nu, w1, w2, eps)
        w, last = limited(growth(d, s) * (x - scale * (s @ basis)), last)
        u = space.back(correction * (scale * (d @ basis) + w), g)
        kept = {"basis": basis.clone(), "failed": failed.real.clone()}
        return u, {"mu": mu, "nu": nu, "last": last, **kept}

    return leafwise(
        rule,
        corrections,
        slots={**space.slots(), "failed": failed_slot, "last": first_norm},
        hyper={"b1": b1, "b2": b2, "eps": eps, "scale": scale},
        every=every(update_proj_gap, work),
        kind="tensorwise",
    )


@transformation
def fira(
    learning_rate: ScalarOrSchedule,
    rank: int = 128,
    update_proj_gap: int = 200,
    scale: ScalarOrSchedule = 0.25,
    b1: ScalarOrSchedule = 0.9,
    b2: ScalarOrSchedule = 0.999,
    eps: ScalarOrSchedule = 1e-6,
    weight_decay: ScalarOrSchedule = 0.0,
    *,
    adam_learning_rate: ScalarOrSchedule | None = None,
) -> GradientTransformation:
    """Fira for the tensors with two dims or more, and `adamw` for the rest.

    To choose by name and type too, take `matrix_labels` and `partition`.

    Args:
        learning_rate, weight_decay, adam_learning_rate: see `galore`.
        rank, update_proj_gap, scale: see `scale_by_fira`.
        b1, b2, eps: see `scale_by_fira`, and those of `adamw`.

    Raises:
        ValueError: an argument outside its range; ``update`` called without params.

    Source: Chen et al., 2024.

    Example:
        >>> import functorch_opt as fo
        >>> fo.fira(0.01, rank=64)
        fira(0.01, rank=64)
    """
    direction = scale_by_fira(rank, update_proj_gap, scale, b1, b2, eps)
    adam = {"learning_rate": adam_learning_rate, "b1": b1, "b2": b2, "eps": eps}
    return with_adamw(direction, learning_rate, weight_decay, adam)
