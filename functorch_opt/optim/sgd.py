"""Gradient descent."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

from functorch_opt._core.transformation import GradientTransformation
from functorch_opt.optim.torch_named import Number, TorchNamed, descent, is_zero
from functorch_opt.transforms.momentum import trace

__all__ = ["SGD"]


class SGD(TorchNamed):
    """torch.optim.SGD: gradient descent with momentum, dampening, Nesterov momentum and L2 weight
    decay.

    ``g += weight_decay p``; ``buf = momentum buf + (1 - dampening) g`` (the first ``buf`` is
    ``g``); ``p -= lr buf``.

    Args:
        params: parameters, named parameters or groups.
        lr: learning rate, 0 or greater; a float or a 1-element tensor.
        momentum: 0 or greater.
        dampening: of the gradient's part in the momentum.
        weight_decay: L2, 0 or greater.
        nesterov: needs a momentum and no dampening.
        maximize: ascend.
        foreach, fused: accepted, without effect: they choose among torch's implementations.
        differentiable: must be False; see the functional layer.
        compile: run the step in place through `compiled_step`; see `Optimizer`.
        state: how slots are stored, such as ``"8bit"``; see `Optimizer`.
        owners: whether each parameter is stepped by one rank of many; see `Optimizer`.

    Raises:
        ValueError: an argument outside its range.

    Example:
        >>> import torch, functorch_opt as fo
        >>> w = torch.nn.Parameter(torch.tensor(1.0))
        >>> opt = fo.optim.SGD([w], lr=0.1, momentum=0.9)
        >>> (w**2).backward()
        >>> opt.step()
        >>> w.item()
        0.800000011920929
        >>> sorted(opt.state[w])
        ['momentum_buffer', 'step']
    """

    _names: ClassVar = {"trace/trace": "momentum_buffer"}
    _uncounted: ClassVar = ("step",)
    _structural: ClassVar = ("momentum", "dampening", "weight_decay")

    def __init__(
        self,
        params: Iterable[Any],
        lr: Number = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: Number = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        compile: bool = False,
        state: str | None = None,
        owners: bool = False,
    ) -> None:
        self._begin(locals())

    def _chain(
        self, momentum: Any, dampening: Any, nesterov: bool, **rest: Any
    ) -> GradientTransformation:
        still = is_zero(momentum)
        damped = not is_zero(dampening)
        if nesterov and (still or damped):
            given = "momentum 0" if still else "a dampening that is not 0"
            raise ValueError(
                f"Nesterov momentum requires a momentum and zero dampening; got {given}."
            )
        return descent(
            None if still else trace(momentum, nesterov, dampening=dampening), **rest
        )
