"""Averaged gradient descent as torch.optim has it: a decaying step size, and beside the parameters their average.

    p  -= eta (g + lambd p)                      eta = lr first, afterwards lr / (1 + lambd lr t)^alpha
    ax += mu (p - ax)                            mu  = 1 first,  afterwards 1 / max(1, t - t0)

Both are worked out after a step, for the next: a change of ``lr`` acts one step late.

Source: Polyak & Juditsky, "Acceleration of Stochastic Approximation by Averaging", 1992 (the average).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch

from functorch_opt import tree
from functorch_opt._core.rule import leafwise
from functorch_opt._core.transformation import GradientTransformation, check_range, transformation
from functorch_opt.optim.torch_named import Number, TorchNamed, ascend, l2, parts, scalar_slot

__all__ = ["ASGD"]


@transformation
def step_by_asgd(lr, lambd, alpha, t0) -> GradientTransformation:
    check_range(-float("inf"), float("inf"), lambd=lambd, alpha=alpha, t0=t0)

    def prepare(count, lr, lambd, alpha, t0):
        t = tree.as_real(count + 1)
        return {
            "first": count == 0,
            "eta_next": lr / (1 + lambd * lr * t) ** alpha,
            "mu_next": 1 / (t - t0).clamp(min=1),
        }

    def rule(g, p, eta, mu, ax, lr, lambd, first, eta_next, mu_next):
        eta = torch.where(first, lr, eta)
        u = -eta * (g + lambd * p)
        return u, {"eta": eta_next, "mu": mu_next, "ax": torch.lerp(ax, p + u, mu)}

    slots = {"eta": scalar_slot(0.0), "mu": scalar_slot(1.0), "ax": tree.zeros_like}
    return leafwise(
        rule, prepare, slots=slots, hyper={"lr": lr, "lambd": lambd, "alpha": alpha, "t0": t0}
    )


class ASGD(TorchNamed):
    """torch.optim.ASGD: gradient descent with a decaying step size ``eta``, which keeps the average ``ax`` of the parameters in its state.

    ``p -= eta (g + lambd p)``; ``ax += mu (p - ax)``; ``eta = lr / (1 + lambd lr t)^alpha``; ``mu = 1 / max(1, t - t0)``. The first ``eta``
    is ``lr``, and ``eta`` and ``mu`` are worked out after a step, for the next: a change of ``lr`` acts one step late, as in torch. The
    average is ``opt.state[p]["ax"]``; nothing puts it into the parameters.

    Args:
        params: parameters, named parameters or groups.
        lr: learning rate, 0 or greater; a float or a 1-element tensor.
        lambd: decay of the parameters, and of ``eta``.
        alpha: power of the decay of ``eta``.
        t0: the step after which averaging starts; until then ``ax`` is the parameter.
        weight_decay: L2, 0 or greater.
        maximize: ascend.
        foreach, capturable: accepted, without effect: they choose among torch's implementations.
        differentiable: must be False; see the functional layer.
        compile: run the step in place through `compiled_step`; see `Optimizer`.

    ``eta`` and ``mu`` are kept in the dtype of the parameter, at least float32; torch has them in the default dtype. So for float64
    parameters they are more exact here, unless the default dtype is float64 too.

    Raises:
        ValueError: an argument outside its range.

    Source: Polyak & Juditsky, "Acceleration of Stochastic Approximation by Averaging", 1992 (the average).

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

    _names: ClassVar = {f"step_by_asgd/{name}": name for name in ("eta", "mu", "ax")}
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
    ) -> None:
        options = {
            "lr": lr,
            "lambd": lambd,
            "alpha": alpha,
            "t0": t0,
            "weight_decay": weight_decay,
            "maximize": maximize,
        }
        self._begin(
            params,
            options,
            foreach=foreach,
            differentiable=differentiable,
            capturable=capturable,
            compile=compile,
        )

    def _chain(
        self, lr: Any, lambd: Any, alpha: Any, t0: Any, weight_decay: Any, maximize: bool
    ) -> GradientTransformation:
        return parts(ascend(maximize), l2(weight_decay), step_by_asgd(lr, lambd, alpha, t0))
