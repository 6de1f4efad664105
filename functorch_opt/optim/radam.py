"""RAdam, whose rule is torch's variant of `functorch_opt.scale_by_radam`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

from functorch_opt._core.transformation import GradientTransformation
from functorch_opt.optim.torch_named import Number, TorchNamed, descent
from functorch_opt.optimizers.radam import scale_by_radam

__all__ = ["RAdam"]


class RAdam(TorchNamed):
    """torch.optim.RAdam: Adam, but gradient descent with momentum until the second moment can be
    trusted (five steps with b2 = 0.999).

    The whole rule is at the top of `functorch_opt.optimizers.radam`.

    Args:
        params: parameters, named parameters or groups.
        lr: learning rate, 0 or greater; a float or a 1-element tensor.
        betas: decays of the two moments, in [0, 1).
        eps: added to the root of the uncorrected second moment, 0 or greater.
        weight_decay: 0 or greater.
        decoupled_weight_decay: multiply the weight decay by the learning rate and keep it out of
            the moments, as in `AdamW`.
        maximize: ascend.
        foreach: accepted, without effect: it chooses among torch's implementations.
        capturable: let a step be captured as a CUDA graph; see `Optimizer`.
        differentiable: must be False; see the functional layer.
        compile: run the step in place through `compiled_step`; see `Optimizer`.
        state: how slots are stored, such as ``"8bit"``; see `Optimizer`.
        owners: whether each parameter is stepped by one rank of many; see `Optimizer`.

    Raises:
        ValueError: an argument outside its range.

    Source: Liu et al., "On the Variance of the Adaptive Learning Rate and Beyond", 2020, alg. 2.

    Example:
        >>> import torch, functorch_opt as fo
        >>> w = torch.nn.Parameter(torch.tensor(1.0))
        >>> opt = fo.optim.RAdam([w], lr=0.25)
        >>> (w**2).backward()
        >>> opt.step()
        >>> w.item()
        0.5
        >>> sorted(opt.state[w])
        ['exp_avg', 'exp_avg_sq', 'step']
    """

    _names: ClassVar = {"scale_by_radam/mu": "exp_avg", "scale_by_radam/nu": "exp_avg_sq"}
    _structural: ClassVar = ("weight_decay",)

    def __init__(
        self,
        params: Iterable[Any],
        lr: Number = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
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

    def _chain(self, betas: Any, eps: Any, **rest: Any) -> GradientTransformation:
        b1, b2 = betas
        return descent(scale_by_radam(b1, b2, eps, variant="torch"), **rest)
