"""AdamC: AdamW, whose weight decay falls with the square of the learning rate.

    u = adam + weight_decay learning_rate / max_learning_rate p

Source: Defazio, "Why Gradients Rapidly Increase Near the End of Training", 2025, alg. 1.
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
from functorch_opt.transforms.decay import corrected_weight_decay
from functorch_opt.transforms.scale import scale_by_learning_rate

__all__ = ["adamc"]


@transformation
def adamc(
    learning_rate: ScalarOrSchedule,
    b1: ScalarOrSchedule = 0.9,
    b2: ScalarOrSchedule = 0.999,
    eps: ScalarOrSchedule = 1e-8,
    eps_root: ScalarOrSchedule = 0.0,
    mu_dtype: torch.dtype | None = None,
    weight_decay: ScalarOrSchedule = 1e-2,
    mask: MaskOrFn | None = None,
    *,
    max_learning_rate: ScalarOrSchedule | None = None,
) -> GradientTransformation:
    """AdamC: `scale_by_adam`, `corrected_weight_decay`, the learning rate.

    With one learning rate for the whole training it is AdamW.

    Args:
        learning_rate: 0 or greater, or a schedule.
        b1, b2, eps, eps_root, mu_dtype: see `scale_by_adam`.
        weight_decay: that at the largest learning rate, multiplied by the learning rate.
        mask: which parameters decay, see `masked`; by default all. The author corrects the decay of
            layers before a normalization, and of others it is that of AdamW.
        max_learning_rate: see `corrected_weight_decay`.

    Raises:
        ValueError: an argument outside its range; ``update`` called without params.

    Source: Defazio, 2025, alg. 1.

    Example:
        >>> import functorch_opt as fo
        >>> rate = fo.linear_schedule(1e-3, 0.0, 100)
        >>> tx = fo.adamc(rate, weight_decay=0.1, max_learning_rate=1e-3)
    """
    return chain(
        scale_by_adam(b1, b2, eps, eps_root, mu_dtype),
        corrected_weight_decay(weight_decay, learning_rate, max_learning_rate, mask),
        scale_by_learning_rate(learning_rate),
    )
