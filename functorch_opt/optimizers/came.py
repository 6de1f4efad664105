"""CAME: Adafactor, whose momentum is divided by how much the steps disagree with it.

    v_row, v_col, v    running means, with decay b2, of g^2 + eps along the rows, along the columns,
                       and of g^2 + eps itself
    u   = g / sqrt(v_row v_col / mean v_row)       for a matrix; g / sqrt(v) for the rest
    u   = u / max(1, RMS(u) / clipping_threshold)                     RMS(x) = |x| / sqrt(size of x)
    mu  = b1 mu + (1 - b1) u
    r_row, r_col       running means, with decay b3, of (u - mu)^2 + instability_eps
    u   = mu / sqrt(r_row r_col / mean r_row)      for a matrix; mu for the rest

Source: Luo, Ren, Zheng, Jiang, Jiang & You, "CAME: Confidence-guided Adaptive Memory Efficient
Optimization", 2023, alg. 2, and the authors' code.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from functorch_opt import tree
from functorch_opt._core.chain import chain
from functorch_opt._core.groups import MaskOrFn
from functorch_opt._core.rule import leafwise
from functorch_opt._core.transformation import (
    GradientTransformation,
    ScalarOrSchedule,
    check_range,
    transformation,
)
from functorch_opt.optimizers.adafactor import (
    by_shape,
    is_torchs_matrix,
    mean_slot,
    next_mean,
    squared,
)
from functorch_opt.transforms.decay import add_decayed_weights
from functorch_opt.transforms.scale import rms, scale_by_learning_rate

__all__ = ["came", "scale_by_came"]


def _last_two(shape):
    return -2, -1


def _root(row, col):
    """The root of the matrix that two means stand for."""
    return (row / row.mean(-2, keepdim=True)).sqrt() * col.sqrt()


def _prepare(b1, b2, b3):
    return {"w1": 1 - b1, "w2": 1 - b2, "w3": 1 - b3}


def _of_matrices(hyper: dict[str, Any], mu_slot: Any) -> GradientTransformation:
    def rule(g, mu, v_row, v_col, r_row, r_col, w1, w2, w3, eps, eps_r, clip):
        square = squared(g) + eps
        v_row = next_mean(v_row, square, -1, w2)  # [..., n, 1]
        v_col = next_mean(v_col, square, -2, w2)  # [..., 1, m]
        u = g / _root(v_row, v_col)
        size = rms(squared(u).sum(), u.numel()) / clip
        u = u / size.clamp(min=1)
        mu = torch.lerp(mu, u, w1)
        apart = squared(u - mu) + eps_r
        r_row = next_mean(r_row, apart, -1, w3)
        r_col = next_mean(r_col, apart, -2, w3)
        new = {"mu": mu, "v_row": v_row, "v_col": v_col, "r_row": r_row, "r_col": r_col}
        return mu / _root(r_row, r_col), new

    rows, columns = mean_slot(_last_two, 1), mean_slot(_last_two, 0)
    slots = {"mu": mu_slot, "v_row": rows, "v_col": columns}
    slots |= {"r_row": rows, "r_col": columns}
    return leafwise(rule, _prepare, slots=slots, hyper=hyper, kind="tensorwise")


def _of_the_rest(hyper: dict[str, Any], mu_slot: Any) -> GradientTransformation:
    def direction(g, v, w2, eps):
        return g / torch.lerp(v, g * g + eps, w2).sqrt()

    def uu(g, v, w2, eps):
        return direction(g, v, w2, eps).square().sum()

    def rule(g, mu, v, uu, n, w1, w2, eps, clip):
        u = direction(g, v, w2, eps) / (rms(uu, n) / clip).clamp(min=1)
        mu = torch.lerp(mu, u, w1)
        return mu.clone(), {"mu": mu, "v": torch.lerp(v, g * g + eps, w2)}

    sums = {"uu": uu, "n": lambda g: g.numel()}
    slots = {"mu": mu_slot, "v": tree.zeros_like}
    return leafwise(rule, _prepare, slots=slots, hyper=hyper, sums=sums)


@transformation
def scale_by_came(
    b1: ScalarOrSchedule = 0.9,
    b2: ScalarOrSchedule = 0.999,
    b3: ScalarOrSchedule = 0.9999,
    eps: ScalarOrSchedule = 1e-30,
    instability_eps: ScalarOrSchedule = 1e-16,
    clipping_threshold: ScalarOrSchedule = 1.0,
    mu_dtype: torch.dtype | None = None,
) -> GradientTransformation:
    """Adafactor's steps, their mean, and of matrices the confidence in it.

    The rule is at the top of `functorch_opt.optimizers.came`. A matrix is the last two dims of a
    tensor, and the dims before them are batch. The state is a dict with the keys "matrix" and
    "rest". Nothing is corrected for its start at 0.

    Args:
        b1: decay of the mean of steps, in [0, 1).
        b2: decay of the second moments, in [0, 1).
        b3: decay of the means of disagreement, in [0, 1).
        eps: added to ``g^2``, greater than 0.
        instability_eps: added to ``(u - mu)^2``, greater than 0.
        clipping_threshold: the largest root mean square of a step before its mean, greater than 0.
        mu_dtype: dtype of ``mu``; by default that of the params, at least float32.

    Raises:
        ValueError: an argument outside its range.

    Source: Luo et al., 2023, alg. 2, and the authors' code.

    Example:
        >>> import torch, functorch_opt as fo
        >>> params = {"w": torch.zeros(20, 30), "b": torch.zeros(20)}
        >>> state = fo.scale_by_came().init(params)
        >>> fo.get(state, "r_row")["w"].shape, fo.get(state, "r_col")["w"].shape
        (torch.Size([20, 1]), torch.Size([1, 30]))
    """
    check_range(0, 1, b1=b1, b2=b2, b3=b3)
    check_range(0, float("inf"), above=True, eps=eps, instability_eps=instability_eps)
    check_range(0, float("inf"), above=True, clipping_threshold=clipping_threshold)
    hyper = {"b1": b1, "b2": b2, "b3": b3, "eps": eps, "eps_r": instability_eps}
    hyper["clip"] = clipping_threshold
    mu_slot = partial(tree.zeros_like, dtype=mu_dtype)
    matrix, rest = _of_matrices(hyper, mu_slot), _of_the_rest(hyper, mu_slot)
    return by_shape(matrix, rest, is_torchs_matrix, "scale_by_came")


@transformation
def came(
    learning_rate: ScalarOrSchedule,
    b1: ScalarOrSchedule = 0.9,
    b2: ScalarOrSchedule = 0.999,
    b3: ScalarOrSchedule = 0.9999,
    eps: ScalarOrSchedule = 1e-30,
    instability_eps: ScalarOrSchedule = 1e-16,
    clipping_threshold: ScalarOrSchedule = 1.0,
    mu_dtype: torch.dtype | None = None,
    weight_decay: ScalarOrSchedule = 0.0,
    mask: MaskOrFn | None = None,
) -> GradientTransformation:
    """CAME: `scale_by_came`, decoupled weight decay, the learning rate.

    Args:
        learning_rate: 0 or greater, or a schedule. The authors have 2e-4 for BERT.
        b1, b2, b3, eps, instability_eps, clipping_threshold, mu_dtype: see `scale_by_came`.
        weight_decay: multiplied by the learning rate.
        mask: which parameters decay, see `masked`; by default all.

    Raises:
        ValueError: an argument outside its range; ``update`` called without params.

    Source: Luo et al., 2023.

    Example:
        >>> import functorch_opt as fo
        >>> fo.came(2e-4, weight_decay=0.01)
        came(0.0002, weight_decay=0.01)
    """
    direction = scale_by_came(
        b1, b2, b3, eps, instability_eps, clipping_threshold, mu_dtype
    )
    decay = add_decayed_weights(weight_decay, mask)
    return chain(direction, decay, scale_by_learning_rate(learning_rate))
