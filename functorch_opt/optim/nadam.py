"""NAdam, whose rule is that of `functorch_opt.scale_by_nadam`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

from functorch_opt._core.transformation import GradientTransformation
from functorch_opt.optim.torch_named import Number, TorchNamed, descent
from functorch_opt.optimizers.nadam import scale_by_nadam

__all__ = ["NAdam"]


class NAdam(TorchNamed):
    """torch.optim.NAdam: Adam with Nesterov momentum, whose decay ``b1 (1 - 0.96^(t momentum_decay)
    / 2)`` grows with t.

    The whole rule is at the top of `functorch_opt.optimizers.nadam`.

    Args:
        params: parameters, named parameters or groups.
        lr: learning rate, 0 or greater; a float or a 1-element tensor.
        betas: decays of the two moments, in [0, 1).
        eps: 0 or greater.
        weight_decay: 0 or greater.
        momentum_decay: how fast the decay of the momentum grows, 0 or greater.
        decoupled_weight_decay: multiply the weight decay by the learning rate and keep it out of
            the moments, as in `AdamW`.
        maximize: ascend.
        foreach: accepted, without effect: it chooses among torch's implementations.
        capturable: let a step be captured as a CUDA graph; see `Optimizer`.
        differentiable: must be False; see the functional layer.
        compile: run the step in place through `compiled_step`; see `Optimizer`.
        state: how slots are stored, such as ``"8bit"``; see `Optimizer`.
        owners: whether each parameter is stepped by one rank of many; see `Optimizer`.

    ``mu_product`` is kept in the dtype of the parameter, at least float32; torch has it in the
    default dtype. So for float64 parameters it is more exact here, unless the default dtype is
    float64 too.

    Raises:
        ValueError: an argument outside its range.

    Source: Dozat, "Incorporating Nesterov Momentum into Adam", 2016.

    Example:
        >>> import torch, functorch_opt as fo
        >>> w = torch.nn.Parameter(torch.tensor(1.0))
        >>> opt = fo.optim.NAdam([w])
        >>> (w**2).backward()
        >>> opt.step()
        >>> sorted(opt.state[w])
        ['exp_avg', 'exp_avg_sq', 'mu_product', 'step']
    """

    _names: ClassVar = {
        "scale_by_nadam/mu": "exp_avg",
        "scale_by_nadam/nu": "exp_avg_sq",
        "scale_by_nadam/mu_product": "mu_product",
    }
    _structural: ClassVar = ("weight_decay",)

    def __init__(
        self,
        params: Iterable[Any],
        lr: Number = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum_decay: float = 4e-3,
        decoupled_weight_decay: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        compile: bool = False,
        state: str | None = None,
        owners: bool = False,
    ) -> None:
        self._begin(locals())

    def _chain(
        self, betas: Any, eps: Any, momentum_decay: Any, **rest: Any
    ) -> GradientTransformation:
        b1, b2 = betas
        return descent(scale_by_nadam(b1, b2, eps, momentum_decay=momentum_decay), **rest)
