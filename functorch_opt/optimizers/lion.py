"""Lion: the sign of a mix of gradient and momentum, ``u = sign((1 - b1) g + b1 mu)``.

The momentum ``mu`` itself decays with b2.

Source: Chen et al., "Symbolic Discovery of Optimization Algorithms", 2023, alg. 2.
"""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch

from functorch_opt import tree
from functorch_opt._core.chain import chain
from functorch_opt._core.groups import MaskOrFn
from functorch_opt._core.rule import leafwise
from functorch_opt._core.transformation import (
    GradientTransformation,
    ScalarOrSchedule,
    check_choice,
    check_range,
    transformation,
)
from functorch_opt.transforms.decay import add_decayed_weights
from functorch_opt.transforms.scale import scale_by_learning_rate

__all__ = ["lion", "scale_by_lion"]


def hard(c, steepness):
    return torch.sign(c)


def smooth(c, steepness):
    return torch.tanh(steepness * c)


def refined(c, steepness):
    return torch.clamp(c, -1, 1)


SIGNS = {"hard": hard, "smooth": smooth, "refined": refined}


@transformation
def scale_by_lion(
    b1: ScalarOrSchedule = 0.9,
    b2: ScalarOrSchedule = 0.99,
    mu_dtype: torch.dtype | None = None,
    *,
    mode: Literal["hard", "smooth", "refined"] = "hard",
    smooth_beta: ScalarOrSchedule = 1.0,
) -> GradientTransformation:
    """``u = sign(c)`` with ``c = (1 - b1) g + b1 mu``; then ``mu = b2 mu + (1 - b2) g``.

    Args:
        b1: weight of the momentum in the update, in [0, 1).
        b2: decay of the momentum, in [0, 1).
        mu_dtype: dtype in which ``mu`` is stored; by default that of the params, at least float32.
        mode: ``"hard"`` is the sign; ``"smooth"`` is ``tanh(smooth_beta c)``; ``"refined"`` is c
            where it is smaller than 1, and its sign elsewhere.
        smooth_beta: how steep the smooth sign is.

    Raises:
        ValueError: a decay outside of [0, 1); another mode.

    Example:
        >>> import torch, functorch_opt as fo
        >>> tx = fo.scale_by_lion()
        >>> tx.update([torch.tensor([0.1, -20.0])], tx.init([torch.zeros(2)]))[0]
        [tensor([ 1., -1.])]
    """
    check_range(0, 1, b1=b1, b2=b2)
    check_range(-float("inf"), float("inf"), smooth_beta=smooth_beta)
    check_choice(*SIGNS, mode=mode)
    sign_of = SIGNS[mode]

    def prepare(b1, b2):
        return {"w1": 1 - b1, "w2": 1 - b2}

    def rule(g, mu, w1, w2, smooth_beta):
        u = sign_of(torch.lerp(mu, g, w1), smooth_beta)
        return u, {"mu": torch.lerp(mu, g, w2)}

    return leafwise(
        rule,
        prepare,
        slots={"mu": partial(tree.zeros_like, dtype=mu_dtype)},
        hyper={"b1": b1, "b2": b2, "smooth_beta": smooth_beta},
    )


@transformation
def lion(
    learning_rate: ScalarOrSchedule,
    b1: ScalarOrSchedule = 0.9,
    b2: ScalarOrSchedule = 0.99,
    mu_dtype: torch.dtype | None = None,
    weight_decay: ScalarOrSchedule = 1e-3,
    mask: MaskOrFn | None = None,
) -> GradientTransformation:
    """Lion: `scale_by_lion`, decoupled weight decay, then the learning rate.

    The paper says that the learning rate should be 3 to 10 times smaller than that of Adam.

    Args:
        learning_rate: 0 or greater, or a schedule.
        b1, b2, mu_dtype: see `scale_by_lion`.
        weight_decay: multiplied by the learning rate.
        mask: which parameters decay, see `masked`; by default all.

    Example:
        >>> import functorch_opt as fo
        >>> fo.lion(1e-4, weight_decay=0.1)
        lion(0.0001, weight_decay=0.1)
    """
    return chain(
        scale_by_lion(b1, b2, mu_dtype),
        add_decayed_weights(weight_decay, mask),
        scale_by_learning_rate(learning_rate),
    )
