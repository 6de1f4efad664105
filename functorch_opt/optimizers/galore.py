"""GaLore: Adam of the projection of a matrix onto its leading singular vectors.

    every update_proj_gap steps: B = the leading singular vectors of X                       [r, M]
    s  = X B'
    mu = b1 mu + (1 - b1) s
    nu = b2 nu + (1 - b2) s^2
    d  = mu / (sqrt(nu) + eps)
    u  = scale sqrt(1 - b2^t) / (1 - b1^t) d B

X is the gradient, turned so that it is tall. The moments stay as they are when the basis changes.

Source: Zhao, Zhang, Chen, Wang, Anandkumar & Tian, "GaLore: Memory-Efficient LLM Training by
Gradient Low-Rank Projection", 2024, alg. 2, and the authors' code.
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
    scaled_adam,
    with_adamw,
)
from functorch_opt.optimizers.matrices import ORDINARY, MatrixDims

__all__ = ["galore", "scale_by_galore"]


@transformation
def scale_by_galore(
    rank: int = 128,
    update_proj_gap: int = 200,
    scale: ScalarOrSchedule = 0.25,
    b1: ScalarOrSchedule = 0.9,
    b2: ScalarOrSchedule = 0.999,
    eps: ScalarOrSchedule = 1e-6,
    *,
    dims: MatrixDims = ORDINARY,
) -> GradientTransformation:
    """Adam in `rank` dimensions, which are found anew now and then.

    The rule is at the top of `functorch_opt.optimizers.galore`. For a matrix ``[n, m]`` the state is
    ``mu`` and ``nu``, with `rank` times the longer side, ``basis``, with `rank` times the shorter
    one, and ``failed``: how often there was no basis, so that the last one was kept.

    Args:
        rank: of the steps, 1 or greater; at most the shorter side of a matrix counts.
        update_proj_gap: after how many steps there is a new basis, 1 or greater.
        scale: multiplies the steps, 0 or greater.
        b1: decay of the mean, in [0, 1).
        b2: decay of the second moment, in [0, 1).
        eps: added outside the root, before the moments are corrected; 0 or greater.
        dims: which dims are a matrix, see `MatrixDims`; without split.

    Raises:
        ValueError: an argument outside its range; a tensor is no matrix.

    Source: Zhao et al., 2024, alg. 2, and the authors' code with ``proj_type="std"``. optax has a
    scale of 1, and adds eps after the correction.

    Example:
        >>> import torch, functorch_opt as fo
        >>> tx, params = fo.scale_by_galore(rank=4), [torch.zeros(20, 50)]
        >>> state = tx.init(params)
        >>> fo.get(state, "mu")[0].shape, fo.get(state, "basis")[0].shape
        (torch.Size([50, 4]), torch.Size([4, 20]))
    """
    given = (b1, b2, eps, rank, update_proj_gap, scale, dims)
    check_low_rank("scale_by_galore", *given)
    space = LowRank(rank, dims)

    def work(g, basis, failed):
        return space.refreshed(g, basis, failed)

    def rule(g, mu, nu, basis, failed, w1, w2, eps, scale, correction):
        s = space.tall(g) @ basis.mH
        d, mu, nu = scaled_adam(s, mu, nu, w1, w2, eps)
        u = space.back(scale * correction * (d @ basis), g)
        kept = {"basis": basis.clone(), "failed": failed.real.clone()}
        return u, {"mu": mu, "nu": nu, **kept}

    return leafwise(
        rule,
        corrections,
        slots={**space.slots(), "failed": failed_slot},
        hyper={"b1": b1, "b2": b2, "eps": eps, "scale": scale},
        every=every(update_proj_gap, work),
        kind="tensorwise",
    )


@transformation
def galore(
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
    """GaLore for the tensors with two dims or more, and `adamw` for the rest.

    To choose by name and type too, take `matrix_labels` and `partition`: the authors leave the
    embedding and the output layer to AdamW.

    Args:
        learning_rate: 0 or greater, or a schedule; the authors have 0.01.
        rank, update_proj_gap, scale: see `scale_by_galore`.
        b1, b2, eps: see `scale_by_galore`, and those of `adamw`.
        weight_decay: the decay of the matrices, multiplied by the learning rate. As in the authors'
            code it shrinks the parameters after the step.
        adam_learning_rate: of `adamw`, without decay. None means `learning_rate`.

    Raises:
        ValueError: an argument outside its range; ``update`` called without params.

    Source: Zhao et al., 2024.

    Example:
        >>> import functorch_opt as fo
        >>> fo.galore(0.01, rank=64)
        galore(0.01, rank=64)
    """
    direction = scale_by_galore(rank, update_proj_gap, scale, b1, b2, eps)
    adam = {"learning_rate": adam_learning_rate, "b1": b1, "b2": b2, "eps": eps}
    return with_adamw(direction, learning_rate, weight_decay, adam)
