"""Scion: steps as long as a radius, in a norm that fits the role of the layer.

    mu = b1 mu + (1 - b1) g
    u  = radius lmo(mu)
    p  = p - lr u - lr p               the last term only with constrained: p stays within the radius

lmo, for a weight ``[n, m]`` or a convolution ``[n, m, k, ...]`` with k... elements in its kernel:

    spectral    sqrt(n / m) / (k...) orthogonal(mu)                   hidden layers, as in Muon
    sign        sign(mu) / m                                          the head, embeddings as heads
    column      mu / (|column| / sqrt(n))                             embeddings of one-hot inputs
    row         mu / (|row| sqrt(m))                                  heads
    rms         mu / RMS(mu)                                          biases, norms, numbers

Source: Pethick, Xie, Antonakopoulos, Zhu, Silveti-Falls & Cevher, "Training Deep Learning Models
with Norm-Constrained LMOs", 2025, algs. 1 and 2, tab. 2, and the authors' code.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from functorch_opt import tree
from functorch_opt._core.chain import chain
from functorch_opt._core.groups import LabelsOrFn, partition
from functorch_opt._core.rule import leafwise
from functorch_opt._core.transformation import (
    GradientTransformation,
    ScalarOrSchedule,
    check_choice,
    check_range,
    transformation,
)
from functorch_opt.optimizers.orthogonal import Coefficients, orthogonalizer
from functorch_opt.transforms.decay import add_decayed_weights
from functorch_opt.transforms.scale import scale_by_learning_rate

__all__ = ["scale_by_scion", "scion"]

Norm = Literal["spectral", "sign", "column", "row", "rms"]
EPS = 1e-8


def _length(x: Tensor, dim: int) -> Tensor:
    """The norms along `dim`, of which the slope at 0 is finite."""
    square = (x * x.conj()).real.sum(dim, keepdim=True)
    return (square + tree.TINY).sqrt()


def _sign(x: Tensor) -> Tensor:
    sign = torch.sgn(x)
    return sign / x.shape[1] if x.dim() > 1 else sign


def _column(x: Tensor) -> Tensor:
    y = x.flatten(1)
    rms = _length(y, 0) / y.shape[0] ** 0.5
    return (y / (rms + EPS)).reshape(x.shape)


def _row(x: Tensor) -> Tensor:
    y = x.flatten(1)
    length = _length(y, 1) * y.shape[1] ** 0.5
    return (y / (length + EPS)).reshape(x.shape)


def _rms(x: Tensor) -> Tensor:
    square = ((x * x.conj()).real + tree.TINY).mean() if x.numel() else 1.0
    return x / (square**0.5 + EPS)


def _spectral(ns_coeffs: Coefficients, ns_steps: int) -> Callable[[Tensor], Tensor]:
    orthogonal = orthogonalizer(ns_coeffs, ns_steps)

    def lmo(x: Tensor) -> Tensor:
        n = x.shape[0]
        m = max(x.shape[1], 1)
        kernel = x.shape[2:].numel()
        scale = (n / m) ** 0.5 / kernel
        return orthogonal(x.flatten(1), 1e-7).reshape(x.shape) * scale

    return lmo


OF_VECTORS: dict[str, Callable[[Tensor], Tensor]] = {"sign": _sign, "rms": _rms}
OF_MATRICES: dict[str, Callable[[Tensor], Tensor]] = {"column": _column, "row": _row}


@transformation
def scale_by_scion(
    norm: Norm = "spectral",
    b1: ScalarOrSchedule = 0.9,
    radius: ScalarOrSchedule = 1.0,
    mu_dtype: torch.dtype | None = None,
    *,
    ns_coeffs: Coefficients = (3.4445, -4.775, 2.0315),
    ns_steps: int = 5,
) -> GradientTransformation:
    """A step of length `radius` in the direction that the norm makes of the momentum.

    The rule is at the top of `functorch_opt.optimizers.scion`.

    Args:
        norm: "spectral", "sign", "column", "row" or "rms". All but "sign" and "rms" are for tensors
            with two dims or more.
        b1: weight of the old momentum, in [0, 1). The authors' argument is ``1 - b1``.
        radius: 0 or greater.
        mu_dtype: dtype of ``mu``; by default that of the params, at least float32.
        ns_coeffs, ns_steps: see `scale_by_muon`.

    Raises:
        ValueError: an argument outside its range; a tensor is no matrix.

    Source: Pethick et al., 2025, tab. 2, and the authors' code.

    Example:
        >>> import torch, functorch_opt as fo
        >>> tx = fo.scale_by_scion("sign", radius=10.0)
        >>> tx.update([torch.tensor([[3.0, -0.1]])], tx.init([torch.zeros(1, 2)]))[0]
        [tensor([[ 5., -5.]])]
    """
    check_choice(*get_args(Norm), norm=norm)
    check_range(0, 1, b1=b1)
    check_range(0, float("inf"), radius=radius)
    known = {**OF_VECTORS, **OF_MATRICES, "spectral": _spectral(ns_coeffs, ns_steps)}
    lmo = known[norm]

    def first(p):
        if p.dim() < 2 and norm not in OF_VECTORS:
            raise ValueError(
                f"norm={norm!r} is for tensors with two dims or more; one has shape "
                f"{tuple(p.shape)}. Choose the matrices with masked or partition."
            )
        return tree.zeros_like(p, dtype=mu_dtype)

    def rule(g, mu, weight, radius):
        mu = torch.lerp(mu, g, weight)
        return radius * lmo(mu), {"mu": mu}

    return leafwise(
        rule,
        lambda b1: {"weight": 1 - b1},
        slots={"mu": first},
        hyper={"b1": b1, "radius": radius},
        kind="tensorwise",
    )


@transformation
def scion(
    learning_rate: ScalarOrSchedule,
    b1: ScalarOrSchedule = 0.9,
    radius: ScalarOrSchedule = 50.0,
    head_radius: ScalarOrSchedule = 3000.0,
    vector_radius: ScalarOrSchedule = 1.0,
    labels: LabelsOrFn | None = None,
    *,
    constrained: bool = True,
    head_norm: Norm = "sign",
    ns_coeffs: Coefficients = (3.4445, -4.775, 2.0315),
    ns_steps: int = 5,
) -> GradientTransformation:
    """Scion, by the role of each layer: hidden, head, or vector.

    The authors also start weights on their radius (orthogonal, times it): that is part of the
    method, and a matter of the model.

    Args:
        learning_rate: 0 or greater, or a schedule; the authors have ``2**-12`` for GPT.
        b1: see `scale_by_scion`.
        radius: of hidden layers, whose norm is "spectral".
        head_radius: of the head, and of embeddings that share its weight.
        vector_radius: of biases, norms and numbers, whose norm is "rms".
        labels: "hidden", "head" or "vector" for each parameter, as in `partition`. None means
            "hidden" for tensors with two dims or more, and "vector" for the rest.
        constrained: whether parameters shrink by the learning rate, so that they stay within their
            radius. Without it there is no decay at all (the authors' unconstrained).
        head_norm: see `scale_by_scion`.
        ns_coeffs, ns_steps: see `scale_by_muon`.

    Raises:
        ValueError: an argument outside its range.

    Source: Pethick et al., 2025, algs. 1 and 2, and the authors' code.

    Example:
        >>> import functorch_opt as fo
        >>> def role(path, p):
        ...     return "head" if path.startswith("head") else "hidden" if p.ndim > 1 else "vector"
        >>> tx = fo.scion(2**-12, labels=role)
    """
    check_range(0, float("inf"), head_radius=head_radius, vector_radius=vector_radius)

    def of_layers(norm: Norm, radius: ScalarOrSchedule) -> GradientTransformation:
        options = {"ns_coeffs": ns_coeffs, "ns_steps": ns_steps}
        direction = scale_by_scion(norm, b1, radius, **options)  # type: ignore[arg-type]
        decay = [add_decayed_weights(1.0)] if constrained else []
        return chain(direction, *decay, scale_by_learning_rate(learning_rate))

    stages = {
        "hidden": of_layers("spectral", radius),
        "head": of_layers(head_norm, head_radius),
        "vector": of_layers("rms", vector_radius),
    }
    by_shape = lambda path, p: "hidden" if p.ndim > 1 else "vector"  # noqa: E731
    return partition(stages, by_shape if labels is None else labels)
