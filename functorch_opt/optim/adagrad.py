"""Division by the root of an average of squared gradients: chains of
`functorch_opt.optimizers.adagrad`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

from functorch_opt._core.rule import leafwise
from functorch_opt._core.transformation import GradientTransformation
from functorch_opt.optim.torch_named import (
    RANGES,
    Number,
    TorchNamed,
    ascend,
    descent,
    is_zero,
    l2,
    parts,
)
from functorch_opt.optimizers.adagrad import (
    scale_by_adadelta,
    scale_by_rms,
    scale_by_rss,
    scale_by_stddev,
)
from functorch_opt.transforms.momentum import trace

__all__ = ["Adadelta", "Adagrad", "RMSprop"]


class RMSprop(TorchNamed):
    """torch.optim.RMSprop: ``p -= lr g / (sqrt(square_avg) + eps)``, with momentum (before the
    learning rate), centered, L2 weight decay.

    Args:
        params: parameters, named parameters or groups.
        lr: learning rate, 0 or greater; a float or a 1-element tensor.
        alpha: decay of the mean square, in [0, 1).
        eps: 0 or greater.
        weight_decay: L2, 0 or greater.
        momentum: 0 or greater.
        centered: subtract the squared mean gradient.
        maximize: ascend.
        foreach: accepted, without effect: it chooses among torch's implementations.
        capturable: let a step be captured as a CUDA graph; see `Optimizer`.
        differentiable: must be False; see the functional layer.
        compile: run the step in place through `compiled_step`; see `Optimizer`.
        state: how slots are stored, such as ``"8bit"``; see `Optimizer`.
        owners: whether each parameter is stepped by one rank of many; see `Optimizer`.

    Raises:
        ValueError: an argument outside its range.

    Example:
        >>> import torch, functorch_opt as fo
        >>> model = torch.nn.Linear(2, 1)
        >>> opt = fo.optim.RMSprop(model.parameters(), lr=0.01, momentum=0.9, centered=True)
    """

    _names: ClassVar = {
        "scale_by_rms/nu": "square_avg",
        "scale_by_stddev/nu": "square_avg",
        "scale_by_stddev/mu": "grad_avg",
        "trace/trace": "momentum_buffer",
    }
    _structural: ClassVar = ("weight_decay", "momentum")
    _ranges: ClassVar = {**RANGES, "alpha": ("alpha value", 0, 1)}

    def __init__(
        self,
        params: Iterable[Any],
        lr: Number = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum: float = 0,
        centered: bool = False,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        *,
        compile: bool = False,
        state: str | None = None,
        owners: bool = False,
    ) -> None:
        self._begin(locals())

    def _chain(
        self, alpha: Any, eps: Any, momentum: Any, centered: bool, **rest: Any
    ) -> GradientTransformation:
        root = (scale_by_stddev if centered else scale_by_rms)(
            alpha, eps, eps_in_sqrt=False
        )
        return descent(root, None if is_zero(momentum) else trace(momentum), **rest)


class Adagrad(TorchNamed):
    """torch.optim.Adagrad: ``p -= lr / (1 + (step - 1) lr_decay) g / (sqrt(sum) + eps)``.

    As in torch its state is there from construction on, so that `share_memory` can put it where
    other processes see it.

    Args:
        params: parameters, named parameters or groups.
        lr: learning rate, 0 or greater; a float or a 1-element tensor.
        lr_decay: 0 or greater.
        weight_decay: L2, 0 or greater.
        initial_accumulator_value: first value of ``sum``, 0 or greater.
        eps: 0 or greater.
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
        >>> opt = fo.optim.Adagrad(torch.nn.Linear(2, 1).parameters(), lr=0.1, lr_decay=1e-3)
    """

    _names: ClassVar = {"scale_by_rss/sum": "sum"}
    _structural: ClassVar = ("weight_decay",)
    _fixed: ClassVar = ("initial_accumulator_value",)

    def __init__(
        self,
        params: Iterable[Any],
        lr: Number = 1e-2,
        lr_decay: float = 0,
        weight_decay: float = 0,
        initial_accumulator_value: float = 0,
        eps: float = 1e-10,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        compile: bool = False,
        state: str | None = None,
        owners: bool = False,
    ) -> None:
        self._begin(locals())
        self.init_state()

    def share_memory(self) -> None:
        """Put the sums of squares into shared memory, for processes that train one model."""
        for entry in self.state.values():
            entry["sum"].share_memory_()

    def _chain(
        self,
        lr: Any,
        lr_decay: Any,
        weight_decay: Any,
        initial_accumulator_value: float,
        eps: Any,
        maximize: bool,
    ) -> GradientTransformation:
        root = scale_by_rss(initial_accumulator_value, eps, eps_in_sqrt=False)
        step = leafwise(
            lambda g, step_size: g * step_size,
            lambda count, lr, lr_decay: {"step_size": -lr / (1 + count * lr_decay)},
            hyper={"lr": lr, "lr_decay": lr_decay},
        )
        return parts(ascend(maximize), l2(weight_decay), root, step)


class Adadelta(TorchNamed):
    """torch.optim.Adadelta: steps in the units of the parameter; the rule is that of
    `functorch_opt.scale_by_adadelta`.

    ``u = g sqrt(acc_delta + eps) / sqrt(square_avg + eps)``; ``p -= lr u``. ``square_avg`` is the
    running mean of ``g^2``, ``acc_delta`` that of ``u^2``.

    Args:
        params: parameters, named parameters or groups.
        lr: multiplies the step of the paper, 0 or greater; a float or a 1-element tensor.
        rho: decay of both means, in [0, 1). torch takes 1 as well, with which the means stay 0.
        eps: greater than 0. torch takes 0 as well, with which nothing ever moves.
        weight_decay: L2, 0 or greater.
        maximize: ascend.
        foreach: accepted, without effect: it chooses among torch's implementations.
        capturable: let a step be captured as a CUDA graph; see `Optimizer`.
        differentiable: must be False; see the functional layer.
        compile: run the step in place through `compiled_step`; see `Optimizer`.
        state: how slots are stored, such as ``"8bit"``; see `Optimizer`.
        owners: whether each parameter is stepped by one rank of many; see `Optimizer`.

    Raises:
        ValueError: an argument outside its range.

    Source: Zeiler, "ADADELTA: An Adaptive Learning Rate Method", 2012, alg. 1.

    Example:
        >>> import torch, functorch_opt as fo
        >>> w = torch.nn.Parameter(torch.tensor(1.0))
        >>> opt = fo.optim.Adadelta([w])
        >>> (w**2).backward()
        >>> opt.step()
        >>> sorted(opt.state[w])
        ['acc_delta', 'square_avg', 'step']
    """

    _names: ClassVar = {
        "scale_by_adadelta/e_g": "square_avg",
        "scale_by_adadelta/e_x": "acc_delta",
    }
    _structural: ClassVar = ("weight_decay",)

    def __init__(
        self,
        params: Iterable[Any],
        lr: Number = 1.0,
        rho: float = 0.9,
        eps: float = 1e-6,
        weight_decay: float = 0,
        foreach: bool | None = None,
        *,
        capturable: bool = False,
        maximize: bool = False,
        differentiable: bool = False,
        compile: bool = False,
        state: str | None = None,
        owners: bool = False,
    ) -> None:
        self._begin(locals())

    def _chain(self, rho: Any, eps: Any, **rest: Any) -> GradientTransformation:
        return descent(scale_by_adadelta(rho, eps), **rest)
