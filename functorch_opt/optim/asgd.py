"""Averaged gradient descent, whose rule is that of `functorch_opt.asgd`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

from functorch_opt._core.transformation import GradientTransformation
from functorch_opt.optim.torch_named import Number, TorchNamed, ascend, l2, parts
from functorch_opt.optimizers.asgd import average_params, decaying_step

__all__ = ["ASGD"]


class ASGD(TorchNamed):
    """torch.optim.ASGD: gradient descent with a decaying step size ``eta``, which keeps the average
    ``ax`` of the parameters in its state.

    ``p -= eta (g + lambd p)``; ``ax += mu (p - ax)``; ``eta = lr / (1 + lambd lr t)^alpha``; ``mu =
    1 / max(1, t - t0)``. The first ``eta`` is ``lr``, and ``eta`` and ``mu`` are worked out after a
    step, for the next: a change of ``lr`` acts one step late, as in torch. The average is
    ``opt.state[p]["ax"]``; nothing puts it into the parameters.

    Args:
        params: parameters, named parameters or groups.
        lr: learning rate, 0 or greater; a float or a 1-element tensor.
        lambd: decay of the parameters, and of ``eta``.
        alpha: power of the decay of ``eta``.
        t0: the step after which averaging starts; until then ``ax`` is the parameter.
        weight_decay: L2, 0 or greater.
        maximize: ascend.
        foreach: accepted, without effect: it chooses among torch's implementations.
        capturable: let a step be captured as a CUDA graph; see `Optimizer`.
        differentiable: must be False; see the functional layer.
        compile: run the step in place through `compiled_step`; see `Optimizer`.
        state: how slots are stored, such as ``"8bit"``; see `Optimizer`.
        owners: whether each parameter is stepped by one rank of many; see `Optimizer`.

    ``eta`` and ``mu`` are kept in the dtype of the parameter, at least float32; torch has them in
    the default dtype. So for float64 parameters they are more exact here, unless the default dtype
    is float64 too.

    Raises:
        ValueError: an argument outside its range.

    Source: Polyak & Juditsky, "Acceleration of Stochastic Approximation by Averaging", 1992 (the
        average).

    Example:
        >>> import torch, functorch_opt as fo
        >>> w = torch.nn.Parameter(torch.tensor(1.0))
        >>> opt = fo.optim.ASGD([w], lr=0.1, t0=0)
        >>> for _ in range(100):
        ...     opt.zero_grad()
        ...     (w**2).backward()
        ...     opt.step()
        >>> sorted(opt.state[w])
        ['ax', 'eta', 'mu', 'step']
        >>> average = opt.state[w]["ax"]
        >>> round(average.item(), 2)
        0.03
    """

    _names: ClassVar = {
        "decaying_step/eta": "eta",
        "average_params/mu": "mu",
        "average_params/ax": "ax",
        "decaying_step/count": "step",
        "average_params/count": "step",
    }
    _structural: ClassVar = ("weight_decay",)

    def __init__(
        self,
        params: Iterable[Any],
        lr: Number = 1e-2,
        lambd: float = 1e-4,
        alpha: float = 0.75,
        t0: float = 1e6,
        weight_decay: float = 0,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        capturable: bool = False,
        *,
        compile: bool = False,
        state: str | None = None,
        owners: bool = False,
    ) -> None:
        self._begin(locals())

    def _chain(
        self, lr: Any, lambd: Any, alpha: Any, t0: Any, weight_decay: Any, maximize: bool
    ) -> GradientTransformation:
        step, average = decaying_step(lr, lambd, alpha), average_params(t0)
        return parts(ascend(maximize), l2(weight_decay), step, average)
