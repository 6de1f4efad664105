"""Rprop as torch.optim has it: every number has a step size of its own, and of the gradient only the sign counts.

    step_size = clamp(step_size * (etaplus where g prev > 0, etaminus where g prev < 0, 1 elsewhere), *step_sizes)
    g         = 0 where g prev < 0
    p        -= sign(g) step_size;  prev = g

Sources: Riedmiller & Braun, "A Direct Adaptive Method for Faster Backpropagation Learning: The RPROP Algorithm", 1993. A step back is not
taken, and after a change of sign there is no step: that is iRprop- of Igel & Huesken, "Improving the Rprop Learning Algorithm", 2000.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor

from functorch_opt import tree
from functorch_opt._core.rule import leafwise
from functorch_opt._core.transformation import GradientTransformation, transformation
from functorch_opt.optim.torch_named import Number, TorchNamed, ascend, parts

__all__ = ["Rprop"]


@transformation
def step_by_rprop(lr, etas, step_sizes) -> GradientTransformation:
    (etaminus, etaplus), (smallest, largest) = etas, step_sizes

    def prepare(count):
        return {"first": count == 0}

    def rule(g, prev, step_size, first, lr, etaminus, etaplus, smallest, largest):
        step_size = torch.where(first, lr, step_size)
        same, changed = g * prev > 0, g * prev < 0
        step_size = torch.where(
            same, step_size * etaplus, torch.where(changed, step_size * etaminus, step_size)
        ).clamp(smallest, largest)
        g = torch.where(changed, 0.0, g)
        return -g.sign() * step_size, {"prev": g, "step_size": step_size}

    hyper = {
        "lr": lr,
        "etaminus": etaminus,
        "etaplus": etaplus,
        "smallest": smallest,
        "largest": largest,
    }
    return leafwise(
        rule, prepare, slots={"prev": tree.zeros_like, "step_size": tree.zeros_like}, hyper=hyper
    )


class Rprop(TorchNamed):
    """torch.optim.Rprop: every number has a step size of its own, which grows while its gradient keeps its sign.

    The whole rule is at the top of `functorch_opt.optim.rprop`. It is meant for gradients of the whole data set.

    Args:
        params: parameters, named parameters or groups.
        lr: the step sizes at the first step of a parameter, and **nothing else**, as in torch: a scheduler has no effect afterwards.
            0 or greater; a float or a 1-element tensor.
        etas: what shrinks a step size, in (0, 1), and what lets it grow, greater than 1.
        step_sizes: the smallest and the largest.
        maximize: ascend.
        capturable, foreach: accepted, without effect: they choose among torch's implementations.
        differentiable: must be False; see the functional layer.
        compile: run the step in place through `compiled_step`; see `Optimizer`.

    Raises:
        ValueError: an argument outside its range.

    Source: Riedmiller & Braun, 1993; Igel & Huesken, 2000 (iRprop-).

    Example:
        >>> import torch, functorch_opt as fo
        >>> w = torch.nn.Parameter(torch.tensor(1.0))
        >>> opt = fo.optim.Rprop([w], lr=0.25, etas=(0.5, 2.0))
        >>> for _ in range(2):
        ...     opt.zero_grad()
        ...     (w**2).backward()
        ...     opt.step()
        >>> w.item()
        0.25
        >>> sorted(opt.state[w])
        ['prev', 'step', 'step_size']
    """

    _names: ClassVar = {f"step_by_rprop/{name}": name for name in ("prev", "step_size")}

    def __init__(
        self,
        params: Iterable[Any],
        lr: Number = 1e-2,
        etas: tuple[float, float] = (0.5, 1.2),
        step_sizes: tuple[float, float] = (1e-6, 50),
        *,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        compile: bool = False,
    ) -> None:
        options = {
            "lr": lr,
            "etas": tuple(etas),
            "step_sizes": tuple(step_sizes),
            "maximize": maximize,
        }
        self._begin(
            params,
            options,
            capturable=capturable,
            foreach=foreach,
            differentiable=differentiable,
            compile=compile,
        )

    def _chain(self, lr: Any, etas: Any, step_sizes: Any, maximize: bool) -> GradientTransformation:
        etaminus, etaplus = etas
        if not (
            isinstance(etaminus, Tensor)
            or isinstance(etaplus, Tensor)
            or 0 < etaminus < 1 < etaplus < float("inf")
        ):
            raise ValueError(
                f"Invalid eta values: {etaminus}, {etaplus}. The first must be in (0, 1), the second greater than 1."
            )
        return parts(ascend(maximize), step_by_rprop(lr, etas, step_sizes))
