"""Grams: the sizes of Adam's steps, and the signs of the gradient.

    u = |m/c1| / (sqrt(nu/c2) + eps) sign(g)            m, nu, c1, c2 as in Adam

Source: Cao, Li, Liang, Sha, Song & Zhang, "Grams: Gradient Descent with Adaptive Momentum Scaling",
2024.
"""

from __future__ import annotations

import torch

from functorch_opt._core.chain import chain
from functorch_opt._core.groups import MaskOrFn
from functorch_opt._core.transformation import (
    GradientTransformation,
    ScalarOrSchedule,
    transformation,
)
from functorch_opt.optimizers.adam import scale_by_adam
from functorch_opt.transforms.cautious import gradient_signs
from functorch_opt.transforms.decay import add_decayed_weights
from functorch_opt.transforms.scale import scale_by_learning_rate

__all__ = ["grams", "scale_by_grams"]


@transformation
def scale_by_grams(
    b1: ScalarOrSchedule = 0.9,
    b2: ScalarOrSchedule = 0.999,
    eps: ScalarOrSchedule = 1e-6,
    eps_root: ScalarOrSchedule = 0.0,
    mu_dtype: torch.dtype | None = None,
) -> GradientTransformation:
    """``u = |m/c1| / (sqrt(nu/c2) + eps) sign(g)``: `gradient_signs` of `scale_by_adam`.

    The rule is at the top of `functorch_opt.optimizers.grams`. For another optimizer than Adam
    take `gradient_signs`.

    Args:
        b1, b2, eps, eps_root, mu_dtype: see `scale_by_adam`.

    Raises:
        ValueError: an argument outside its range.

    Source: Cao et al., 2024.

    Example:
        >>> import torch, functorch_opt as fo
        >>> tx = fo.scale_by_grams()
        >>> _, state = tx.update([torch.tensor([1.0, 1.0])], tx.init([torch.zeros(2)]))
        >>> tx.update([torch.tensor([1.0, -1.0])], state)[0]
        [tensor([ 1.0000, -0.0526])]
    """
    return gradient_signs(scale_by_adam(b1, b2, eps, eps_root, mu_dtype), flip_sign=False)


@transformation
def grams(
    learning_rate: ScalarOrSchedule,
    b1: ScalarOrSchedule = 0.9,
    b2: ScalarOrSchedule = 0.999,
    eps: ScalarOrSchedule = 1e-6,
    eps_root: ScalarOrSchedule = 0.0,
    mu_dtype: torch.dtype | None = None,
    weight_decay: ScalarOrSchedule = 0.0,
    mask: MaskOrFn | None = None,
) -> GradientTransformation:
    """Grams: `scale_by_grams`, decoupled weight decay, the learning rate.

    Args:
        learning_rate: 0 or greater, or a schedule.
        b1, b2, eps, eps_root, mu_dtype: see `scale_by_adam`. The authors add eps to the root before
            it is corrected, so that it counts ``1 / sqrt(1 - b2^t)`` times as much.
        weight_decay: multiplied by the learning rate.
        mask: which parameters decay, see `masked`; by default all.

    Raises:
        ValueError: an argument outside its range; ``update`` called without params.

    Source: Cao et al., 2024.

    Example:
        >>> import torch, functorch_opt as fo
        >>> tx, params = fo.grams(1.0), [torch.tensor([0.0, 0.0])]
        >>> _, state = tx.update([torch.tensor([1.0, 1.0])], tx.init(params), params)
        >>> tx.update([torch.tensor([1.0, -1.0])], state, params)[0]
        [tensor([-1.0000,  0.0526])]
    """
    return chain(
        scale_by_grams(b1, b2, eps, eps_root, mu_dtype),
        add_decayed_weights(weight_decay, mask),
        scale_by_learning_rate(learning_rate),
    )
