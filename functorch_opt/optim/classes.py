"""torch.optim's optimizers by name: its arguments, defaults, numbers and state keys; each is a short chain.

What chooses among torch's implementations (``foreach``, ``fused``, ``capturable``) is accepted and has no effect. ``differentiable``
belongs to the functional layer.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

from torch import Tensor

from functorch_opt.algorithms.adagrad import scale_by_rms, scale_by_rss, scale_by_stddev
from functorch_opt.algorithms.adam import scale_by_adam
from functorch_opt.base import GradientTransformation, check_range
from functorch_opt.combine import chain
from functorch_opt.optim.adapter import Optimizer
from functorch_opt.rule import leafwise
from functorch_opt.transforms.decay import add_decayed_weights
from functorch_opt.transforms.momentum import trace
from functorch_opt.transforms.scale import scale, scale_by_learning_rate

__all__ = ["SGD", "Adagrad", "Adam", "AdamW", "RMSprop"]

Number = float | Tensor


class _TorchNamed(Optimizer):
    def _begin(self, params: Iterable[Any], options: dict[str, Any], *, differentiable: bool, compile: bool = False, **flags: Any) -> None:
        """Take torch's arguments: `options` say what is computed, `flags` how."""
        if differentiable:
            raise ValueError(
                f"{type(self).__name__} updates in place. To differentiate through updates use the functional layer: "
                "tx.update and apply_updates."
            )
        numbers = [name for name, value in options.items() if not isinstance(value, bool)]
        self._setup(params, {**options, **flags}, numbers, compile)


def _parts(*stages: GradientTransformation | None) -> GradientTransformation:
    return chain(*(stage for stage in stages if stage is not None))


def _ascend(maximize: bool) -> GradientTransformation | None:
    return scale(-1.0) if maximize else None


def _l2(weight_decay: Number) -> GradientTransformation | None:
    return None if isinstance(weight_decay, (int, float)) and weight_decay == 0 else add_decayed_weights(weight_decay)


class SGD(_TorchNamed):
    """torch.optim.SGD: gradient descent with momentum, dampening, Nesterov momentum and L2 weight decay.

    ``g += weight_decay p``; ``buf = momentum buf + (1 - dampening) g`` (the first ``buf`` is ``g``); ``p -= lr buf``.

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
    ) -> None:
        options = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
        }
        self._begin(params, options, foreach=foreach, differentiable=differentiable, fused=fused)

    def _chain(self, lr: Any, momentum: Any, dampening: Any, weight_decay: Any, nesterov: bool, maximize: bool) -> GradientTransformation:
        still = not isinstance(momentum, Tensor) and momentum == 0
        if nesterov and still:
            raise ValueError("Nesterov momentum requires a momentum and zero dampening; got momentum 0.")
        momentum_stage = None if still else trace(momentum, nesterov, dampening=dampening)
        return _parts(_ascend(maximize), _l2(weight_decay), momentum_stage, scale_by_learning_rate(lr))


class Adam(_TorchNamed):
    """torch.optim.Adam, with L2 weight decay (or decoupled, as in `AdamW`).

    The rule is that of `functorch_opt.scale_by_adam`; with `amsgrad` the divisor is the largest ``exp_avg_sq`` so far, corrected
    afterwards.

    Args:
        params: parameters, named parameters or groups.
        lr: learning rate, 0 or greater; a float or a 1-element tensor.
        betas: decays of the two moments, in [0, 1).
        eps: 0 or greater.
        weight_decay: 0 or greater.
        amsgrad: keep the maximum.
        maximize: ascend.
        decoupled_weight_decay: multiply the decay by the learning rate and keep it out of the moments.
        foreach, capturable, fused: accepted, without effect: they choose among torch's implementations.
        differentiable: must be False; see the functional layer.

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

    _names: ClassVar = {"scale_by_adam/mu": "exp_avg", "scale_by_adam/nu": "exp_avg_sq", "scale_by_adam/nu_max": "max_exp_avg_sq"}
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
    ) -> None:
        options = {
            "lr": lr,
            "betas": tuple(betas),
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "decoupled_weight_decay": decoupled_weight_decay,
        }
        self._begin(params, options, foreach=foreach, capturable=capturable, differentiable=differentiable, fused=fused)

    def _chain(
        self, lr: Any, betas: Any, eps: Any, weight_decay: Any, amsgrad: bool, maximize: bool, decoupled_weight_decay: bool
    ) -> GradientTransformation:
        decay = _l2(weight_decay)
        b1, b2 = betas
        adam = scale_by_adam(b1, b2, eps, amsgrad="torch" if amsgrad else False)
        decayed = (adam, decay) if decoupled_weight_decay else (decay, adam)
        return _parts(_ascend(maximize), *decayed, scale_by_learning_rate(lr))


class AdamW(Adam):
    """torch.optim.AdamW: `Adam` with decoupled weight decay, 1e-2 by default.

    Args:
        params: parameters, named parameters or groups.
        lr, betas, eps, amsgrad, maximize: as in `Adam`.
        weight_decay: multiplied by the learning rate; 0 or greater.
        foreach, capturable, fused: accepted, without effect: they choose among torch's implementations.
        differentiable: must be False; see the functional layer.

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
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=True,
        )


class RMSprop(_TorchNamed):
    """torch.optim.RMSprop: ``p -= lr g / (sqrt(square_avg) + eps)``, with momentum (before the learning rate), centered, L2 weight decay.

    Args:
        params: parameters, named parameters or groups.
        lr: learning rate, 0 or greater; a float or a 1-element tensor.
        alpha: decay of the mean square, in [0, 1).
        eps: 0 or greater.
        weight_decay: L2, 0 or greater.
        momentum: 0 or greater.
        centered: subtract the squared mean gradient.
        maximize: ascend.
        capturable, foreach: accepted, without effect: they choose among torch's implementations.
        differentiable: must be False; see the functional layer.

    Raises:
        ValueError: an argument outside its range.

    Example:
        >>> import torch, functorch_opt as fo
        >>> opt = fo.optim.RMSprop(torch.nn.Linear(2, 1).parameters(), lr=0.01, momentum=0.9, centered=True)
    """

    _names: ClassVar = {
        "scale_by_rms/nu": "square_avg",
        "scale_by_stddev/nu": "square_avg",
        "scale_by_stddev/mu": "grad_avg",
        "trace/trace": "momentum_buffer",
    }
    _structural: ClassVar = ("weight_decay", "momentum")

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
    ) -> None:
        options = {
            "lr": lr,
            "alpha": alpha,
            "eps": eps,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "centered": centered,
            "maximize": maximize,
        }
        self._begin(params, options, capturable=capturable, foreach=foreach, differentiable=differentiable)

    def _chain(
        self, lr: Any, alpha: Any, eps: Any, weight_decay: Any, momentum: Any, centered: bool, maximize: bool
    ) -> GradientTransformation:
        root = (scale_by_stddev if centered else scale_by_rms)(alpha, eps, eps_in_sqrt=False)
        momentum_stage = None if not isinstance(momentum, Tensor) and momentum == 0 else trace(momentum)
        return _parts(_ascend(maximize), _l2(weight_decay), root, momentum_stage, scale_by_learning_rate(lr))


class Adagrad(_TorchNamed):
    """torch.optim.Adagrad: ``p -= lr / (1 + (step - 1) lr_decay) g / (sqrt(sum) + eps)``.

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

    Raises:
        ValueError: an argument outside its range.

    Example:
        >>> import torch, functorch_opt as fo
        >>> opt = fo.optim.Adagrad(torch.nn.Linear(2, 1).parameters(), lr=0.1, lr_decay=1e-3)
    """

    _names: ClassVar = {"scale_by_rss/sum": "sum"}
    _structural: ClassVar = ("weight_decay",)

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
    ) -> None:
        options = {
            "lr": lr,
            "lr_decay": lr_decay,
            "weight_decay": weight_decay,
            "initial_accumulator_value": initial_accumulator_value,
            "eps": eps,
            "maximize": maximize,
        }
        self._begin(params, options, foreach=foreach, differentiable=differentiable, fused=fused)

    def _chain(
        self, lr: Any, lr_decay: Any, weight_decay: Any, initial_accumulator_value: float, eps: Any, maximize: bool
    ) -> GradientTransformation:
        check_range(0, float("inf"), lr=lr, lr_decay=lr_decay)
        root = scale_by_rss(initial_accumulator_value, eps, eps_in_sqrt=False)
        step = leafwise(
            lambda g, step_size: g * step_size,
            lambda count, lr, lr_decay: {"step_size": -lr / (1 + count * lr_decay)},
            hyper={"lr": lr, "lr_decay": lr_decay},
        )
        return _parts(_ascend(maximize), _l2(weight_decay), root, step)
