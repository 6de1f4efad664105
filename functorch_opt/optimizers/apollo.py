"""APOLLO: gradients, as large as Adam would make them in a random projection.

    every update_proj_gap steps: B = standard normal / sqrt(r)                               [r, M]
    s  = X B', and d = Adam's direction of s without corrections                       as in GaLore
    f  = |d| / (|s| + 1e-8)                                for each row of s, or for the tensor
    w  = f X
    w  = w / max(1, |w| / (1.01 |w before|))
    u  = sqrt(scale) sqrt(1 - b2^t) / (1 - b1^t) w

X is the gradient, turned so that it is tall.

Source: Zhu, Zhang, Cong, Liu, Park, Chandra, Long, Pan, Wang & Lee, "APOLLO: SGD-like Memory,
AdamW-level Performance", 2024, alg. 1, and the authors' code.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor

from functorch_opt import random, tree
from functorch_opt._core.leaf import Each
from functorch_opt._core.rule import every, leafwise
from functorch_opt._core.transformation import (
    GradientTransformation,
    ScalarOrSchedule,
    check_choice,
    transformation,
)
from functorch_opt.optimizers.kronecker import on_host
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
from functorch_opt.transforms.noise import sized

__all__ = ["apollo", "scale_by_apollo"]


def _prepare(space: LowRank, update_proj_gap: int) -> Callable[..., Any]:
    def prepare(count, key, b1, b2, scale, updates, params=None):
        due = on_host((count % update_proj_gap == 0).any())
        noise: Any = 0.0
        if due is not False:
            like = tree.map(space.like_basis, sized("scale_by_apollo", updates, params))
            noise = Each(random.normal_like(key, like, count))
        return {**corrections(count, b1, b2), "noise": noise, "root": scale**0.5}

    return prepare


@transformation
def scale_by_apollo(
    rank: int = 256,
    update_proj_gap: int = 200,
    scale: ScalarOrSchedule = 1.0,
    b1: ScalarOrSchedule = 0.9,
    b2: ScalarOrSchedule = 0.999,
    eps: ScalarOrSchedule = 1e-6,
    *,
    key: Tensor | int,
    scaling: Literal["channel", "tensor"] = "channel",
    dims: MatrixDims = ORDINARY,
) -> GradientTransformation:
    """The gradient, each channel of which is scaled as Adam would in a random projection.

    The rule is at the top of `functorch_opt.optimizers.apollo`. No decomposition is made. The state
    is ``mu`` and ``nu``, with `rank` times the longer side of a matrix, ``basis``, with `rank` times
    the shorter one, and ``last``, the norm of the last w: it grows by 1% a step at most.

    Args:
        rank: of the projection, 1 or greater; at most the shorter side of a matrix counts. The
            authors have a quarter of the width.
        update_proj_gap: after how many steps there is a new projection, 1 or greater.
        scale: its root multiplies the steps; 0 or greater.
        b1: decay of the mean, in [0, 1).
        b2: decay of the second moment, in [0, 1).
        eps: added outside the root, before the moments are corrected; 0 or greater.
        key: int64 [2], see `functorch_opt.random.key`, or a seed.
        scaling: whether each channel along the longer side is scaled for itself, or the tensor.
            APOLLO-Mini is ``rank=1, scale=128.0, scaling="tensor"``.
        dims: which dims are a matrix, see `MatrixDims`; without split.

    Raises:
        ValueError: an argument outside its range; a tensor is no matrix; a gradient that is None in
            a call without params.
        TypeError: something that is not a key.

    Source: Zhu et al., 2024, alg. 1, and the authors' code, with other random numbers.
    pytorch_optimizer scales the projected gradient in place of the gradient. As in `scale_by_fira`
    there is no limit after a w of 0.

    Example:
        >>> import torch, functorch_opt as fo
        >>> tx = fo.scale_by_apollo(rank=1, scaling="tensor", key=0)
        >>> g = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1.0, 1.0]])
        >>> u, state = tx.update(g, tx.init(torch.zeros(3, 2)))
        >>> (u / g)[0], fo.get(state, "mu").shape
        (tensor([1.9414, 1.9414]), torch.Size([3, 1]))
    """
    given = (b1, b2, eps, rank, update_proj_gap, scale, dims)
    check_low_rank("scale_by_apollo", *given)
    check_choice("channel", "tensor", scaling=scaling)
    space = LowRank(rank, dims)

    def work(g, basis, noise):
        return {"basis": space.of_noise(basis, noise)}

    def rule(g, mu, nu, basis, last, w1, w2, eps, root, correction):
        x = space.tall(g)
        s = x @ basis.mH
        d, mu, nu = scaled_adam(s, mu, nu, w1, w2, eps)
        w, last = limited(growth(d, s, scaling == "tensor") * x, last)
        u = space.back(root * correction * w, g)
        return u, {"mu": mu, "nu": nu, "basis": basis.clone(), "last": last}

    return leafwise(
        rule,
        _prepare(space, update_proj_gap),
        slots={**space.slots(), "last": first_norm},
        shared={"key": random.as_key(key)},
        hyper={"b1": b1, "b2": b2, "eps": eps, "scale": scale},
        every=every(update_proj_gap, work),
        kind="tensorwise",
    )


@transformation
def apollo(
    learning_rate: ScalarOrSchedule,
    rank: int = 256,
    update_proj_gap: int = 200,
    scale: ScalarOrSchedule = 1.0,
    b1: ScalarOrSchedule = 0.9,
    b2: ScalarOrSchedule = 0.999,
    eps: ScalarOrSchedule = 1e-6,
    weight_decay: ScalarOrSchedule = 0.0,
    *,
    key: Tensor | int,
    scaling: Literal["channel", "tensor"] = "channel",
    adam_learning_rate: ScalarOrSchedule | None = None,
) -> GradientTransformation:
    """APOLLO for the tensors with two dims or more, and `adamw` for the rest.

    To choose by name and type too, take `matrix_labels` and `partition`: the authors leave the
    embedding and the output layer to AdamW.

    Args:
        learning_rate, weight_decay, adam_learning_rate: see `galore`.
        rank, update_proj_gap, scale, key, scaling: see `scale_by_apollo`.
        b1, b2, eps: see `scale_by_apollo`, and those of `adamw`.

    Raises:
        ValueError: an argument outside its range; ``update`` called without params.
        TypeError: something that is not a key.

    Source: Zhu et al., 2024.

    Example:
        >>> import functorch_opt as fo
        >>> fo.apollo(0.01, rank=1, scale=128.0, scaling="tensor", key=0)      # APOLLO-Mini
        apollo(0.01, rank=1, scale=128.0, scaling='tensor', key=0)
    """
    direction = scale_by_apollo(
        rank, update_proj_gap, scale, b1, b2, eps, key=key, scaling=scaling
    )
    adam = {"learning_rate": adam_learning_rate, "b1": b1, "b2": b2, "eps": eps}
    return with_adamw(direction, learning_rate, weight_decay, adam)
