"""Adam and its relatives that are chains of `functorch_opt.optimizers.adam`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

from functorch_opt._core.transformation import GradientTransformation
from functorch_opt.optim.torch_named import Number, TorchNamed, descent
from functorch_opt.optimizers.adam import scale_by_adam, scale_by_adamax

__all__ = ["Adam", "AdamW", "Adamax"]


class Adam(TorchNamed):
    """torch.optim.Adam, with L2 weight decay (or decoupled, as in `AdamW`).

    The rule is that of `functorch_opt.scale_by_adam`; with `amsgrad` the divisor is the largest
    ``exp_avg_sq`` so far, corrected afterwards.

    Args:
        params: parameters, named parameters or groups.
        lr: learning rate, 0 or greater; a float or a 1-element tensor.
        betas: decays of the two moments, in [0, 1).
        eps: 0 or greater.
        weight_decay: 0 or greater.
        amsgrad: keep the maximum.
        maximize: ascend.
        decoupled_weight_decay: multiply the decay by the learning rate and keep it out of the
            moments.
        foreach, fused: accepted, without effect: they choose among torch's implementations.
        capturable: let a step be captured as a CUDA graph; see `Optimizer`.
        differentiable: must be False; see the functional layer.
        compile: run the step in place through `compiled_step`; see `Optimizer`.
        state: how slots are stored, such as ``"8bit"``; see `Optimizer`.
        owners: whether each parameter is stepped by one rank of many; see `Optimizer`.

    Raises:
        ValueError: an argument outside its range.

    Example:
        >>> import torch, functorch_opt as fo
        >>> w = torch.nn.Parameter(torch.tensor(1.0))
        >>> opt = fo.optim.Adam([w], lr=0.1)
        >>> (w**2).backward()
        >>> opt.step()
        >>> w.item()
        0.8999999761581421
        >>> sorted(opt.state[w])
        ['exp_avg', 'exp_avg_sq', 'step']
    """

    _names: ClassVar = {
        "scale_by_adam/mu": "exp_avg",
        "scale_by_adam/nu": "exp_avg_sq",
        "scale_by_adam/nu_max": "max_exp_avg_sq",
    }
    _structural: ClassVar = ("weight_decay",)

    def __init__(
        self,
        params: Iterable[Any],
        lr: Number = 1e-3,
        betas: tuple[Number, Number] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        compile: bool = False,
        state: str | None = None,
        owners: bool = False,
    ) -> None:
        self._begin(locals())

    def _chain(
        self, betas: Any, eps: Any, amsgrad: bool, **rest: Any
    ) -> GradientTransformation:
        b1, b2 = betas
        adam = scale_by_adam(b1, b2, eps, amsgrad="torch" if amsgrad else False)
        return descent(adam, **rest)


class AdamW(Adam):
    """torch.optim.AdamW: `Adam` with decoupled weight decay, 1e-2 by default.

    Args:
        params: parameters, named parameters or groups.
        lr, betas, eps, amsgrad, maximize: as in `Adam`.
        weight_decay: multiplied by the learning rate; 0 or greater.
        foreach, fused: accepted, without effect: they choose among torch's implementations.
        capturable: let a step be captured as a CUDA graph; see `Optimizer`.
        differentiable: must be False; see the functional layer.
        compile: run the step in place through `compiled_step`; see `Optimizer`.
        state: how slots are stored, such as ``"8bit"``; see `Optimizer`.
        owners: whether each parameter is stepped by one rank of many; see `Optimizer`.

    Raises:
        ValueError: an argument outside its range.

    Example:
        >>> import torch, functorch_opt as fo
        >>> opt = fo.optim.AdamW(torch.nn.Linear(2, 1).parameters(), lr=3e-4)
        >>> scheduler = torch.optim.lr_scheduler.OneCycleLR(opt, max_lr=1e-3, total_steps=100)
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: Number = 1e-3,
        betas: tuple[Number, Number] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        compile: bool = False,
        state: str | None = None,
        owners: bool = False,
    ) -> None:
        self._begin(locals(), decoupled_weight_decay=True)


class Adamax(TorchNamed):
    """torch.optim.Adamax: Adam with a decaying maximum in place of the second moment; the rule is
    that of `functorch_opt.scale_by_adamax`.

    ``exp_inf = max(b2 exp_inf, |g| + eps)``; ``p -= lr / (1 - b1^t) exp_avg / exp_inf``.

    Args:
        params: parameters, named parameters or groups.
        lr: learning rate, 0 or greater; a float or a 1-element tensor.
        betas: decays of the moment and of the maximum, in [0, 1).
        eps: 0 or greater.
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

    Source: Kingma & Ba, "Adam: A Method for Stochastic Optimization", 2015, alg. 2.

    Example:
        >>> import torch, functorch_opt as fo
        >>> w = torch.nn.Parameter(torch.tensor(1.0))
        >>> opt = fo.optim.Adamax([w], lr=0.5)
        >>> (w**2).backward()
        >>> opt.step()
        >>> w.item()
        0.5
        >>> sorted(opt.state[w])
        ['exp_avg', 'exp_inf', 'step']
    """

    _names: ClassVar = {"scale_by_adamax/mu": "exp_avg", "scale_by_adamax/nu": "exp_inf"}
    _structural: ClassVar = ("weight_decay",)

    def __init__(
        self,
        params: Iterable[Any],
        lr: Number = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        capturable: bool = False,
        compile: bool = False,
        state: str | None = None,
        owners: bool = False,
    ) -> None:
        self._begin(locals())

    def _chain(self, betas: Any, eps: Any, **rest: Any) -> GradientTransformation:
        b1, b2 = betas
        return descent(scale_by_adamax(b1, b2, eps), **rest)
