"""Adafactor: it keeps only the row and column means of the second moment of a matrix.

    b2_t  = 1 - t^-decay_rate
    v_row, v_col, v     running means, with decay b2_t, of g^2 + eps along the rows, along the
                        columns, and of g^2 + eps itself
    u     = g / sqrt(v_row v_col / mean v_row)      for a matrix; g / sqrt(v) for the rest
    u     = u / max(1, RMS(u) / clipping_threshold)                 RMS(x) = |x| / sqrt(size of x)
    p    -= learning_rate max(1e-3, RMS(p)) u + weight_decay_rate p

torch's variant does not add eps to g^2 but bounds the divisors from below, and its steps shrink
with t:

    u     = g / max(sqrt(v), eps1), with v = v_row v_col / max(mean v_row, eps1) for a matrix
    p    -= min(lr, 1 / sqrt(t)) max(eps2, RMS(p)) u / max(1, RMS(u) / d) + lr weight_decay p

Sources: Shazeer & Stern, "Adafactor: Adaptive Learning Rates with Sublinear Memory Cost", 2018,
algs. 4 (matrices), 5 (vectors) and 6 (proposed constants).
"""

from __future__ import annotations

from typing import Literal

import torch

from functorch_opt import tree
from functorch_opt._core.chain import chain
from functorch_opt._core.groups import MaskOrFn, partition
from functorch_opt._core.rule import leafwise
from functorch_opt._core.transformation import (
    GradientTransformation,
    Scalar,
    ScalarOrSchedule,
    check_choice,
    check_range,
    transformation,
)
from functorch_opt.transforms.clip import clip_by_block_rms
from functorch_opt.transforms.decay import add_decayed_weights
from functorch_opt.transforms.momentum import ema
from functorch_opt.transforms.scale import (
    rms,
    scale,
    scale_by_learning_rate,
    scale_by_param_block_rms,
)

__all__ = ["adafactor", "scale_by_factored_rms"]


def factored_dims(shape, smallest):
    """The two largest dims, with the larger one last; None if they are not both large enough."""
    if len(shape) < 2:
        return None
    by_size = sorted([(n, i) for i, n in enumerate(shape)])
    second, largest = [i for _, i in by_size[-2:]]
    return (second, largest) if shape[second] >= smallest else None


def mean_slot(dims_of, k):
    """Zeros in the shape of a mean along one of the two dims that `dims_of` finds for a shape."""

    def make(p):
        shape = list(p.shape)
        shape[dims_of(p.shape)[k]] = 1
        return p.new_zeros(shape, dtype=tree.at_least_float32(p.dtype))

    return make


def _prepare(step_offset):
    def prepare(count, decay_rate):
        t = tree.as_real(count + 1 - step_offset)
        return {"weight": t**-decay_rate}  # 1 - b2_t

    return prepare


def _prepare_torchs(count, beta2_decay):
    return {"weight": tree.as_real(count + 1) ** beta2_decay}


def squared(g):
    return g.abs().square() if g.is_complex() else g * g


def next_mean(v, square, dim, weight):
    """The next running mean, of means of squares along `dim`.

    It is real, though a rule sees all values of a complex tensor as complex.
    """
    return torch.lerp(v.real, square.mean(dim, keepdim=True), weight.real)


def _of_matrices(prepare, hyper, epsilon, dims_of):
    """optax's rule for matrices: epsilon is added to g^2."""

    def rule(g, v_row, v_col, weight):
        second, largest = dims_of(g.shape)
        square = squared(g) + epsilon
        v_row = next_mean(v_row, square, largest, weight)
        v_col = next_mean(v_col, square, second, weight)
        # It is not rsqrt, whose derivative at 1e-30 is too large for float32.
        root = (v_row / v_row.mean(second, keepdim=True)).sqrt() * v_col.sqrt()
        return g / root, {"v_row": v_row, "v_col": v_col}

    slots = {"v_row": mean_slot(dims_of, 1), "v_col": mean_slot(dims_of, 0)}
    return leafwise(rule, prepare, slots=slots, hyper=hyper, kind="tensorwise")


def _of_the_rest(prepare, hyper, epsilon):
    def rule(g, v, weight):
        v = torch.lerp(v, g * g + epsilon, weight)
        return g / v.sqrt(), {"v": v}

    return leafwise(rule, prepare, slots={"v": tree.zeros_like}, hyper=hyper)


def is_torchs_matrix(p):
    return p.ndim > 1 and p.numel() > 0  # of nothing there is no mean


def _smallest(epsilon, g):
    return torch.finfo(g.dtype).eps if epsilon is None else epsilon


def _torchs(prepare, hyper, epsilon):
    """torch's two rules: the matrix is the last two dims, and epsilon is the smallest divisor."""

    def of_matrices(g, v_row, v_col, weight):
        square, smallest = squared(g), _smallest(epsilon, g)
        v_row = next_mean(v_row, square, -1, weight)  # [..., n, 1]
        v_col = next_mean(v_col, square, -2, weight)  # [..., 1, m]
        mean = v_row.mean(-2, keepdim=True)  # [..., 1, 1]
        v = v_row * v_col / mean.clamp(min=smallest)  # [..., n, m]
        u = g * v.clamp(min=smallest**2).rsqrt()
        return u, {"v_row": v_row, "v_col": v_col}

    def of_the_rest(g, v, weight):
        v = torch.lerp(v, g * g, weight)
        return g * v.clamp(min=_smallest(epsilon, g) ** 2).rsqrt(), {"v": v}

    def last_two(shape):
        return -2, -1

    slots = {"v_row": mean_slot(last_two, 1), "v_col": mean_slot(last_two, 0)}
    matrix = leafwise(of_matrices, prepare, slots=slots, hyper=hyper, kind="tensorwise")
    rest = leafwise(of_the_rest, prepare, slots={"v": tree.zeros_like}, hyper=hyper)
    return matrix, rest


def by_shape(matrix, rest, is_matrix, name="scale_by_factored_rms"):
    """`matrix` for the parameters of which `is_matrix` is true, and `rest` for the others."""
    matrix.name = rest.name = name  # which errors mention
    stages = {"matrix": matrix, "rest": rest}
    return partition(stages, lambda path, p: "matrix" if is_matrix(p) else "rest")


@transformation
def scale_by_torchs_factored_rms(beta2_decay, eps1) -> GradientTransformation:
    """The stage of torch's class, with torch's names: the decay is ``1 - t^beta2_decay``."""
    matrix, rest = _torchs(_prepare_torchs, {"beta2_decay": beta2_decay}, eps1)
    return by_shape(matrix, rest, is_torchs_matrix)


@transformation
def scale_by_factored_rms(
    factored: bool = True,
    decay_rate: ScalarOrSchedule = 0.8,
    step_offset: int = 0,
    min_dim_size_to_factor: int = 128,
    epsilon: float | None = None,
    *,
    variant: Literal["optax", "torch"] = "optax",
) -> GradientTransformation:
    """``u = g / sqrt(v)``, where ``v`` of a matrix is ``v_row v_col / mean v_row``.

    ``v``, ``v_row`` and ``v_col`` are running means of ``g^2`` and of its means, with the decay
    ``1 - t^-decay_rate``. The state is a dict with the keys "matrix", for the tensors that are
    factored, and "rest".

    Args:
        factored: whether matrices are factored. If False, all of ``v`` is kept for every tensor.
        decay_rate: 0 or greater.
        step_offset: how many of the first updates do not count, for fine-tuning.
        min_dim_size_to_factor: the two largest dims of a tensor are the matrix, if both have at
            least this size. Otherwise the tensor is not factored.
        epsilon: added to ``g^2``, 0 or greater. None means 1e-30.
        variant: "optax" or "torch". With "torch" the last two dims are the matrix, whatever their
            size, and divisors smaller than epsilon count as epsilon. Its default is then the eps of
            the dtype in which the rule computes.

    Raises:
        ValueError: an argument outside its range.

    Source: Shazeer & Stern, 2018, algs. 4 and 5.

    Example:
        >>> import torch, functorch_opt as fo
        >>> params = {"w": torch.zeros(200, 300), "b": torch.zeros(200)}
        >>> state = fo.scale_by_factored_rms().init(params)
        >>> fo.get(state, "v_row")["w"].shape, fo.get(state, "v_col")["w"].shape
        (torch.Size([200, 1]), torch.Size([1, 300]))
    """
    check_range(0, float("inf"), decay_rate=decay_rate, epsilon=epsilon)
    check_choice("optax", "torch", variant=variant)
    prepare, hyper = _prepare(step_offset), {"decay_rate": decay_rate}

    if variant == "torch":
        matrix, rest = _torchs(prepare, hyper, epsilon)
        return by_shape(matrix, rest, lambda p: factored and is_torchs_matrix(p))

    def dims_of(shape):
        return factored_dims(shape, min_dim_size_to_factor)

    epsilon = 1e-30 if epsilon is None else epsilon
    matrix = _of_matrices(prepare, hyper, epsilon, dims_of)
    rest = _of_the_rest(prepare, hyper, epsilon)
    return by_shape(matrix, rest, lambda p: factored and dims_of(p.shape) is not None)


@transformation
def step_by_torchs_adafactor(lr, eps2, d, weight_decay) -> GradientTransformation:
    """torch's step, which is clipped and relative.

    It is one rule, so that the ranks exchange its sums in one message.
    """

    def prepare(count, lr, weight_decay):
        return {
            "rho": (tree.as_real(count + 1) ** -0.5).clamp(max=lr),
            "decay": lr * weight_decay,
        }

    def rule(g, p, gg, pp, n, rho, eps2, d, decay):
        largest = (rms(gg, n) / d).clamp(min=1)
        size = rho * rms(pp, n).clamp(min=eps2) / largest
        return -size * g - decay * p

    sums = {
        "gg": lambda g: g.square().sum(),
        "pp": lambda p: p.square().sum(),
        "n": lambda g: g.numel(),
    }
    hyper = {"lr": lr, "eps2": eps2, "d": d, "weight_decay": weight_decay}
    return leafwise(rule, prepare, hyper=hyper, sums=sums)


@transformation
def adafactor(
    learning_rate: ScalarOrSchedule | None = None,
    min_dim_size_to_factor: int = 128,
    decay_rate: ScalarOrSchedule = 0.8,
    decay_offset: int = 0,
    multiply_by_parameter_scale: bool = True,
    clipping_threshold: Scalar | None = 1.0,
    momentum: ScalarOrSchedule | None = None,
    dtype_momentum: torch.dtype | None = torch.float32,
    weight_decay_rate: ScalarOrSchedule | None = None,
    eps: float | None = None,
    factored: bool = True,
    weight_decay_mask: MaskOrFn | None = None,
) -> GradientTransformation:
    """Adafactor, with optax's names and numbers: its steps are relative to the size of a tensor.

    For the numbers of torch.optim.Adafactor build another chain: `scale_by_factored_rms` with
    ``variant="torch"``, ``clip_by_block_rms(1.0)``, ``scale_by_param_block_rms()``, and
    `scale_by_learning_rate` with the schedule ``min(0.01, 1 / sqrt(count + 1))``.

    Args:
        learning_rate: the relative step size, 0 or greater, or a schedule. None means 1. The paper
            has ``min(0.01, 1 / sqrt(t))``.
        min_dim_size_to_factor, decay_rate, factored: see `scale_by_factored_rms`.
        decay_offset: the step_offset of `scale_by_factored_rms`.
        multiply_by_parameter_scale: whether steps are relative, see `scale_by_param_block_rms`.
        clipping_threshold: the threshold of `clip_by_block_rms`. With None there is no clipping.
        momentum: decay of a mean of the steps, in [0, 1). With None no mean is kept.
        dtype_momentum: dtype in which this mean is kept. None means that of the params, at least
            float32.
        weight_decay_rate: the decay, **not** multiplied by the learning rate. With None there is
            none.
        eps: the epsilon of `scale_by_factored_rms`, added to ``g^2``. None means 1e-30.
        weight_decay_mask: which parameters decay, see `masked`; by default all.

    Raises:
        ValueError: an argument outside its range.

    Source: Shazeer & Stern, 2018, algs. 4, 5 and 6.

    Example:
        >>> import torch, functorch_opt as fo
        >>> tx = fo.adafactor(0.01)
        >>> params = torch.full((4,), 2.0)
        >>> updates, _ = tx.update(torch.tensor([1.0, -1.0, 5.0, -5.0]), tx.init(params), params)
        >>> updates
        tensor([-0.0200,  0.0200, -0.0200,  0.0200])
    """
    check_range(0, float("inf"), above=True, clipping_threshold=clipping_threshold)
    root = scale_by_factored_rms(
        factored, decay_rate, decay_offset, min_dim_size_to_factor, eps
    )
    stages = [root]
    if clipping_threshold is not None:
        stages.append(clip_by_block_rms(clipping_threshold))
    if learning_rate is not None:
        stages.append(scale_by_learning_rate(learning_rate, flip_sign=False))
    if multiply_by_parameter_scale:
        stages.append(scale_by_param_block_rms())
    if momentum is not None:
        stages.append(ema(momentum, debias=False, accumulator_dtype=dtype_momentum))
    if weight_decay_rate is not None:
        stages.append(add_decayed_weights(weight_decay_rate, weight_decay_mask))
    return chain(*stages, scale(-1.0))
