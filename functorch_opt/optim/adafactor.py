"""Adafactor as torch.optim has it: of the second moment of a matrix only the means of rows and of columns are kept.

    b2_t = 1 - t^beta2_decay                     rho = min(lr, 1 / sqrt(t))
    row_var, col_var, variance                   running means, with decay b2_t, of g^2 along the last dim, the one before it, and of g^2
    v    = row_var col_var / max(mean row_var, eps1)     for 2 dims and more, v = variance for fewer
    u    = g / max(sqrt(v), eps1)                        RMS(x) = |x| / sqrt(size of x)
    p   -= rho max(eps2, RMS(p)) u / max(1, RMS(u) / d) + lr weight_decay p

Source: Shazeer & Stern, "Adafactor: Adaptive Learning Rates with Sublinear Memory Cost", 2018, algs. 4 (matrices) and 5 (vectors). There
eps1 is added to g^2; alg. 6 proposes 0.01 for lr.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor

from functorch_opt import tree
from functorch_opt._core.groups import partition
from functorch_opt._core.rule import leafwise
from functorch_opt._core.transformation import GradientTransformation, transformation
from functorch_opt.optim.torch_named import RANGES, Number, TorchNamed, ascend, parts

__all__ = ["Adafactor"]


def _weight(beta2_decay, count):
    """1 - b2_t."""
    return {"weight": tree.as_real(count + 1) ** beta2_decay}


def _by_root(g, v, eps1):
    return g * v.clamp(min=eps1**2).rsqrt()


def _smallest(eps1, g):
    return torch.finfo(g.dtype).eps if eps1 is None else eps1


@transformation
def scale_by_factored_rms(beta2_decay, eps1) -> GradientTransformation:
    def rule(g, row_var, col_var, weight):
        smallest = _smallest(eps1, g)
        row_var = torch.lerp(row_var, (g * g).mean(dim=-1, keepdim=True), weight)  # [..., n, 1]
        col_var = torch.lerp(col_var, (g * g).mean(dim=-2, keepdim=True), weight)  # [..., 1, m]
        v = (
            row_var * col_var / row_var.mean(dim=-2, keepdim=True).clamp(min=smallest)
        )  # [..., n, m]
        return _by_root(g, v, smallest), {"row_var": row_var, "col_var": col_var}

    def row(p):
        return p.new_zeros((*p.shape[:-1], 1), dtype=tree.at_least_float32(p.dtype))

    def col(p):
        return p.new_zeros((*p.shape[:-2], 1, p.shape[-1]), dtype=tree.at_least_float32(p.dtype))

    slots = {"row_var": row, "col_var": col}
    return leafwise(
        rule, _weight, slots=slots, hyper={"beta2_decay": beta2_decay}, kind="tensorwise"
    )


@transformation
def scale_by_full_rms(beta2_decay, eps1) -> GradientTransformation:
    def rule(g, variance, weight):
        variance = torch.lerp(variance, g * g, weight)
        return _by_root(g, variance, _smallest(eps1, g)), {"variance": variance}

    return leafwise(
        rule, _weight, slots={"variance": tree.zeros_like}, hyper={"beta2_decay": beta2_decay}
    )


@transformation
def step_by_adafactor(lr, eps2, d, weight_decay) -> GradientTransformation:
    def prepare(count, lr, weight_decay):
        return {"rho": (tree.as_real(count + 1) ** -0.5).clamp(max=lr), "decay": lr * weight_decay}

    def rule(g, p, gg, pp, n, rho, d, decay):
        size = rho * (pp / n).sqrt().clamp(min=eps2) / ((gg / n).sqrt() / d).clamp(min=1)
        return -size * g - decay * p

    sums = {
        "gg": lambda g: g.square().sum(),
        "pp": lambda p: p.square().sum(),
        "n": lambda g: g.numel(),
    }
    return leafwise(
        rule, prepare, hyper={"lr": lr, "d": d, "weight_decay": weight_decay}, sums=sums
    )


class Adafactor(TorchNamed):
    """torch.optim.Adafactor: of the second moment of a matrix only the means of rows and of columns are kept, and steps are relative.

    The whole rule is at the top of `functorch_opt.optim.adafactor`. Of tensors with more than two dims the last two are the matrix.

    Args:
        params: parameters, named parameters or groups; not complex.
        lr: the largest relative step size (later it is ``1 / sqrt(t)``), and the factor of the weight decay. 0 or greater; a float or a
            1-element tensor.
        beta2_decay: power of t in ``b2 = 1 - t^beta2_decay``, 0 or less.
        eps: ``(eps1, eps2)``, the smallest divisor and the smallest size of a parameter that a step is relative to. None: the eps of the
            dtype that is computed in, which is that of the parameter, but at least float32. (torch: that of the first parameter.)
        d: updates with a greater RMS are scaled down to it; 1 or greater.
        weight_decay: multiplied by `lr`, kept out of the moments; 0 or greater.
        foreach: accepted, without effect: it chooses among torch's implementations.
        maximize: ascend.
        compile: run the step in place through `compiled_step`; see `Optimizer`.

    Raises:
        ValueError: an argument outside its range.
        RuntimeError: a complex parameter.

    Source: Shazeer & Stern, "Adafactor: Adaptive Learning Rates with Sublinear Memory Cost", 2018, algs. 4 and 5.

    Example:
        >>> import torch, functorch_opt as fo
        >>> model = torch.nn.Linear(300, 200)
        >>> opt = fo.optim.Adafactor(model.parameters())
        >>> model(torch.ones(1, 300)).sum().backward()
        >>> opt.step()
        >>> {name: tuple(value.shape) for name, value in sorted(opt.state[model.weight].items())}
        {'col_var': (1, 300), 'row_var': (200, 1), 'step': ()}
        >>> sorted(opt.state[model.bias])
        ['step', 'variance']
    """

    _names: ClassVar = {
        "partition/matrix/row_var": "row_var",
        "partition/matrix/col_var": "col_var",
        "partition/vector/variance": "variance",
        "partition/matrix/count": "step",
        "partition/vector/count": "step",
        "step_by_adafactor/count": "step",
    }
    _fixed: ClassVar = ("eps",)
    _ranges: ClassVar = {name: range for name, range in RANGES.items() if name != "eps"}

    def __init__(
        self,
        params: Iterable[Any],
        lr: Number = 1e-2,
        beta2_decay: float = -0.8,
        eps: tuple[float | None, float] = (None, 1e-3),
        d: float = 1.0,
        weight_decay: float = 0.0,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        compile: bool = False,
    ) -> None:
        options = {
            "lr": lr,
            "beta2_decay": beta2_decay,
            "eps": tuple(eps),
            "d": d,
            "weight_decay": weight_decay,
            "maximize": maximize,
        }
        self._begin(params, options, foreach=foreach, compile=compile)

    def _chain(
        self, lr: Any, beta2_decay: Any, eps: Any, d: Any, weight_decay: Any, maximize: bool
    ) -> GradientTransformation:
        eps1, eps2 = eps
        for what, value, low in (
            ("epsilon1", eps1, 0),
            ("epsilon2", eps2, 0),
            ("Clipping threshold d", d, 1),
        ):
            if isinstance(value, (int, float)) and not value >= low:
                raise ValueError(f"{what} should be >= {low} but is {value}.")
        if not isinstance(beta2_decay, Tensor) and not beta2_decay <= 0:
            raise ValueError(f"beta2_decay should be <= 0 but is {beta2_decay}.")
        roots = {
            "matrix": scale_by_factored_rms(beta2_decay, eps1),
            "vector": scale_by_full_rms(beta2_decay, eps1),
        }
        root = partition(roots, lambda path, p: "matrix" if p.ndim > 1 else "vector")
        return parts(ascend(maximize), root, step_by_adafactor(lr, eps2, d, weight_decay))

    def _check_parameter(self, p: Tensor) -> None:
        if p.is_complex():
            raise RuntimeError(
                f"Adafactor does not support complex parameters; one is {p.dtype} of shape {tuple(p.shape)}."
            )
