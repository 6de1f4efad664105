"""Adafactor, whose rule is torch's variant of `functorch_opt.scale_by_factored_rms`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

from torch import Tensor

from functorch_opt._core.transformation import GradientTransformation
from functorch_opt.optim.torch_named import RANGES, Number, TorchNamed, ascend, parts
from functorch_opt.optimizers.adafactor import (
    scale_by_torchs_factored_rms,
    step_by_torchs_adafactor,
)

__all__ = ["Adafactor"]


class Adafactor(TorchNamed):
    """torch.optim.Adafactor: of the second moment of a matrix only the means of rows and of columns
    are kept, and steps are relative.

    The whole rule is at the top of `functorch_opt.optimizers.adafactor`. Of tensors with more than
    two dims the last two are the matrix.

    Args:
        params: parameters, named parameters or groups; not complex.
        lr: the largest relative step size (later it is ``1 / sqrt(t)``), and the factor of the
            weight decay. 0 or greater; a float or a 1-element tensor.
        beta2_decay: power of t in ``b2 = 1 - t^beta2_decay``, 0 or less.
        eps: ``(eps1, eps2)``, the smallest divisor and the smallest size of a parameter that a step
            is relative to. None: the eps of the dtype that is computed in, which is that of the
            parameter, but at least float32. (torch: that of the first parameter.)
        d: updates with a greater RMS are scaled down to it; 1 or greater.
        weight_decay: multiplied by `lr`, kept out of the moments; 0 or greater.
        foreach: accepted, without effect: it chooses among torch's implementations.
        maximize: ascend.
        compile: run the step in place through `compiled_step`; see `Optimizer`.
        state: how slots are stored, such as ``"8bit"``; see `Optimizer`.
        owners: whether each parameter is stepped by one rank of many; see `Optimizer`.

    Raises:
        ValueError: an argument outside its range.
        RuntimeError: a complex parameter.

    Source: Shazeer & Stern, "Adafactor: Adaptive Learning Rates with Sublinear Memory Cost", 2018,
        algs. 4 and 5.

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
        "scale_by_torchs_factored_rms/matrix/v_row": "row_var",
        "scale_by_torchs_factored_rms/matrix/v_col": "col_var",
        "scale_by_torchs_factored_rms/rest/v": "variance",
        "scale_by_torchs_factored_rms/matrix/count": "step",
        "scale_by_torchs_factored_rms/rest/count": "step",
        "step_by_torchs_adafactor/count": "step",
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
        state: str | None = None,
        owners: bool = False,
    ) -> None:
        self._begin(locals())

    def _chain(
        self,
        lr: Any,
        beta2_decay: Any,
        eps: Any,
        d: Any,
        weight_decay: Any,
        maximize: bool,
    ) -> GradientTransformation:
        eps1, eps2 = eps
        lowest = {
            "epsilon1": (eps1, 0),
            "epsilon2": (eps2, 0),
            "Clipping threshold d": (d, 1),
        }
        for what, (value, low) in lowest.items():
            if isinstance(value, (int, float)) and not value >= low:
                raise ValueError(f"{what} should be >= {low} but is {value}.")
        if not isinstance(beta2_decay, Tensor) and not beta2_decay <= 0:
            raise ValueError(f"beta2_decay should be <= 0 but is {beta2_decay}.")
        return parts(
            ascend(maximize),
            scale_by_torchs_factored_rms(beta2_decay, eps1),
            step_by_torchs_adafactor(lr, eps2, d, weight_decay),
        )

    def _check_parameter(self, p: Tensor, group: dict[str, Any]) -> None:
        if p.is_complex():
            raise RuntimeError(
                "Adafactor does not support complex parameters; "
                f"one is {p.dtype} of shape {tuple(p.shape)}."
            )
