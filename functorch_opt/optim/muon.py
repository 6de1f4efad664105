"""Muon, whose rule is torch's variant of `functorch_opt.scale_by_muon`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor

from functorch_opt._core.transformation import GradientTransformation
from functorch_opt.optim.torch_named import TorchNamed, descent
from functorch_opt.optimizers.matrices import (
    ORDINARY,
    MatrixDims,
    Scaling,
    shapes_of,
)
from functorch_opt.optimizers.muon import scale_by_muon
from functorch_opt.optimizers.orthogonal import Coefficients

__all__ = ["Muon"]

SCALINGS: dict[str | None, Scaling] = {
    None: "original",
    "original": "original",
    "match_rms_adamw": "match_rms_adamw",
    "spectral_unclamped": "rms_to_rms",
}
"""What torch's names mean here."""


class Muon(TorchNamed):
    """torch.optim.Muon: momentum, made nearly orthogonal. For the matrices of hidden layers; give
    the rest to `AdamW`.

    The whole rule is at the top of `functorch_opt.optimizers.muon`. As in torch Newton-Schulz runs
    in bfloat16, whatever the dtype of the parameters: the update has about three digits. What torch
    does not have is `dims`, for convolutions, experts and fused matrices, and names of coefficients.
    `MuonWithAdamW` also takes what is no matrix.

    Args:
        params: parameters, named parameters or groups; each a real matrix, or what `dims` says.
        lr: learning rate, 0 or greater; a float or a 1-element tensor.
        weight_decay: multiplied by `lr`, kept out of the momentum; 0 or greater.
        momentum: weight of the old momentum; 0 or greater.
        nesterov: look one step ahead.
        ns_coefficients: of the polynomial of Newton-Schulz: three numbers, three for each step, or
            a name, see `functorch_opt.scale_by_muon`.
        eps: the smallest norm that is divided by.
        ns_steps: steps of Newton-Schulz, fewer than 100.
        adjust_lr_fn: ``"original"``, or None: multiply by ``sqrt(max(1, n / m))`` for a parameter
            ``[n, m]``. ``"match_rms_adamw"``: by ``0.2 sqrt(max(n, m))``, so that learning rates of
            AdamW fit. ``"spectral_unclamped"``, which is in torch from 2.14 on: by ``sqrt(n / m)``.
            The weight decay is not multiplied. With `dims` it is the shape of each matrix.
        dims: a `functorch_opt.MatrixDims`, which dims of a parameter are its matrices; in a group it
            may be another one, and it is kept there as a plain tuple, which checkpoints can hold.
            None: parameters have two dims, as in torch. ``MatrixDims()`` is for convolutions,
            ``MatrixDims(-2, -1)`` for experts, ``MatrixDims(split=(64, 16, 16))`` for fused ones.
        ns_dtype: dtype of Newton-Schulz; None: bfloat16, as in torch.
        compile: run the step in place through `compiled_step`; see `Optimizer`.
        state: how slots are stored, such as ``"8bit"``; see `Optimizer`.
        owners: whether each parameter is stepped by one rank of many; see `Optimizer`.

    Raises:
        ValueError: an argument outside its range; a parameter that is no matrix, or none with these
            `dims`.
        TypeError: `dims` that are no `MatrixDims`.
        RuntimeError: a complex parameter.

    Source: Jordan et al., 2024; Liu et al., "Muon is Scalable for LLM Training", 2025, eq. 4.

    Example:
        >>> import torch, functorch_opt as fo
        >>> layers = torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)
        >>> model = torch.nn.Sequential(*layers)
        >>> matrices = [p for p in model.parameters() if p.ndim == 2]
        >>> rest = [p for p in model.parameters() if p.ndim != 2]
        >>> opts = [fo.optim.Muon(matrices, lr=0.02), fo.optim.AdamW(rest)]
        >>> model(torch.ones(1, 4)).sum().backward()
        >>> for opt in opts:
        ...     opt.step()
        >>> sorted(opts[0].state[model[0].weight])
        ['momentum_buffer', 'step']
    """

    _names: ClassVar = {"scale_by_muon/mu": "momentum_buffer"}
    _uncounted: ClassVar = ("step",)
    _structural: ClassVar = ("weight_decay",)
    _fixed: ClassVar = (
        "ns_coefficients",
        "eps",
        "ns_steps",
        "adjust_lr_fn",
        "dims",
        "ns_dtype",
    )

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: Coefficients = (3.4445, -4.775, 2.0315),
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        *,
        dims: MatrixDims | None = None,
        ns_dtype: torch.dtype | None = None,
        compile: bool = False,
        state: str | None = None,
        owners: bool = False,
    ) -> None:
        self._begin(locals())

    def _chain(
        self,
        momentum: Any,
        nesterov: bool,
        ns_coefficients: Coefficients,
        eps: float,
        ns_steps: int,
        adjust_lr_fn: str | None,
        dims: Any,
        ns_dtype: torch.dtype | None,
        **rest: Any,
    ) -> GradientTransformation:
        if adjust_lr_fn not in SCALINGS:
            raise ValueError(
                f"Adjust learning rate function {adjust_lr_fn} is not supported: adjust_lr_fn must "
                f"be one of {[*SCALINGS]}."
            )
        muon = scale_by_muon(
            ns_coefficients,
            ns_steps,
            momentum,
            eps,
            nesterov=nesterov,
            scaling=SCALINGS[adjust_lr_fn],
            dims=dims_of(dims),
            ns_dtype=ns_dtype,
            variant="torch",
        )
        return descent(muon, decoupled_weight_decay=True, **rest)

    def _check_option(self, of: Any, name: str, value: Any) -> None:
        """Coefficients and dims are of several types; what is none of them, `_chain` refuses."""
        if name not in ("dims", "ns_coefficients"):
            super()._check_option(of, name, value)

    def _check_parameter(self, p: Tensor, group: dict[str, Any]) -> None:
        cure = "Give the rest to another optimizer, e.g. AdamW."
        if p.is_complex():
            raise RuntimeError(
                "Muon does not support complex parameters; "
                f"one is {p.dtype} of shape {tuple(p.shape)}. {cure}"
            )
        if group["dims"] is not None:
            shapes_of(p.shape, dims_of(group["dims"]))
        elif p.ndim != 2:
            raise ValueError(
                f"Muon only supports 2D parameters; one has shape {tuple(p.shape)}. {cure} Or say "
                "which of its dims are a matrix: dims=functorch_opt.MatrixDims() takes the first as "
                "the rows and all others as the columns."
            )


def dims_of(given: Any) -> MatrixDims:
    """The option `dims`, which is a plain tuple in a group.

    Raises:
        TypeError: it is neither that nor None.
    """
    if given is None:
        return ORDINARY
    if not (isinstance(given, tuple) and len(given) == len(ORDINARY)):
        raise TypeError(
            "dims must be a MatrixDims, such as functorch_opt.MatrixDims(-2, -1), or None; "
            f"got {type(given).__name__} {given!r}."
        )
    return MatrixDims(*given)
