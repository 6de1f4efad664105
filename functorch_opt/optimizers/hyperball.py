"""Hyperball: steps of a fixed share of the norm of a tensor, which stays as it is.

    q = p - lr |p| u / max(|u|, 1e-10)
    p = |p| q / max(|q|, 1e-10)                                        |x|: norm over the tensor

MuonH is Muon with it. There is no weight decay, since the norm stays.

Source: Wen, Dang, Lyu, Ma & Liang, "Fantastic Pretraining Optimizers and Where to Find Them II:
Hyperball Optimization", 2026.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from functorch_opt._core.rule import Leafwise, leafwise
from functorch_opt._core.transformation import (
    GradientTransformation,
    ScalarOrSchedule,
    check_range,
    transformation,
)
from functorch_opt.optimizers.matrices import matrices_and_rest
from functorch_opt.optimizers.muon import scale_by_muon
from functorch_opt.optimizers.orthogonal import Coefficients

__all__ = ["hyperball", "muonh"]

LEAST = 1e-10


@transformation
def hyperball(learning_rate: ScalarOrSchedule) -> GradientTransformation:
    """The last stage of an optimizer, in place of `scale_by_learning_rate` and of weight decay.

    The rule is at the top of `functorch_opt.optimizers.hyperball`. It fits any direction:
    ``chain(scale_by_adam(), hyperball(0.01))`` is AdamH. A parameter of zeros stays zero, so give
    it to matrices that start with other values, by `masked` or `partition`.

    In `fo.optim.Optimizer` the group option ``lr`` of a ready transformation multiplies the learning
    rate: the length of the direction has no effect.

    Args:
        learning_rate: the length of a step as a share of the norm of the parameter; 0 or greater,
            or a schedule.

    Raises:
        ValueError: negative or NaN `learning_rate`; ``update`` called without params; a stage
            follows in a chain.

    Source: Wen et al., 2026.

    Example:
        >>> import torch, functorch_opt as fo
        >>> tx, params = fo.hyperball(1.0), torch.tensor([2.0, 0.0])
        >>> updates, _ = tx.update(torch.tensor([0.0, -9.0]), tx.init(params), params)
        >>> fo.apply_updates(params, updates)
        tensor([1.4142, 1.4142])
    """
    check_range(0, float("inf"), learning_rate=learning_rate)
    return on_the_ball(learning_rate, 1.0)


def on_the_ball(learning_rate: ScalarOrSchedule, lr: Any) -> Leafwise:
    """The stage, whose steps are of length ``learning_rate lr``."""

    def rule(g, p, learning_rate, lr, gg, pp, pg):
        # |q|^2 is a sum of these three, so that no second pass over the tensor is needed.
        length = pp.clamp(min=LEAST**2).sqrt()
        size = gg.clamp(min=LEAST**2).sqrt()
        by = learning_rate * lr * length / size
        qq = pp - 2 * by * pg + by * by * gg
        same = length / qq.clamp(min=LEAST**2).sqrt()
        return (p - by * g) * torch.where(pp > 0, same, 0.0) - p

    sums = {
        "gg": lambda g: g.square().sum(),
        "pp": lambda p: p.square().sum(),
        "pg": lambda g, p: (p * g).sum(),
    }
    hyper = {"learning_rate": learning_rate, "lr": lr}
    tx = leafwise(rule, sums=sums, hyper=hyper, last=True)
    tx.with_lr = partial(on_the_ball, learning_rate)
    return tx


@transformation
def muonh(
    learning_rate: ScalarOrSchedule,
    ns_coeffs: Coefficients = (3.4445, -4.775, 2.0315),
    ns_steps: int = 5,
    beta: ScalarOrSchedule = 0.95,
    eps: float = 1e-8,
    *,
    nesterov: bool = True,
    adam_learning_rate: ScalarOrSchedule | None = None,
    adam_b1: ScalarOrSchedule = 0.9,
    adam_b2: ScalarOrSchedule = 0.95,
    adam_eps: ScalarOrSchedule = 1e-8,
) -> GradientTransformation:
    """MuonH: `scale_by_muon` and `hyperball` for tensors with two dims or more, and `adamw` else.

    Every matrix must start with other values than zeros.

    Args:
        learning_rate: of the matrices, a share of their norm; see `hyperball`.
        ns_coeffs, ns_steps, beta, eps, nesterov: see `scale_by_muon`.
        adam_learning_rate, adam_b1, adam_b2, adam_eps: of `adamw`, without decay. None means
            `learning_rate`.

    Raises:
        ValueError: an argument outside its range; ``update`` called without params.

    Source: Wen et al., 2026.

    Example:
        >>> import functorch_opt as fo
        >>> fo.muonh(0.018, adam_learning_rate=1e-3)
        muonh(0.018, adam_learning_rate=0.001)
    """
    direction = scale_by_muon(
        ns_coeffs, ns_steps, beta, eps, nesterov=nesterov, scaling="none"
    )
    adam: dict[str, Any] = {"b1": adam_b1, "b2": adam_b2, "eps": adam_eps}
    adam["learning_rate"] = adam_learning_rate
    step = hyperball(learning_rate)
    return matrices_and_rest(direction, learning_rate, 0.0, adam, step)
