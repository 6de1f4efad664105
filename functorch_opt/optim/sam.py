"""Sharpness-aware minimization in an ordinary loop, whose step calls its closure twice."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from functorch_opt._core.chain import chain
from functorch_opt._core.transformation import GradientTransformation
from functorch_opt.optim.adapter import Optimizer
from functorch_opt.optim.options import arguments
from functorch_opt.optim.recipe import made, shown
from functorch_opt.transforms.scale import normalize, scale_by_learning_rate
from functorch_opt.wrappers.sam import asam, sam

__all__ = ["SAM"]

OWN = ("rho", "adaptive")


class SAM(Optimizer):
    """`functorch_opt.sam` as a class: any optimizer, with gradients of where the loss is worst nearby.

    ``opt.step(closure)`` calls the closure, moves the parameters by `rho` up the gradient, calls it
    again, moves them back, and makes the step of the optimizer with the second gradients. The norm of
    the gradient is that of all groups. The step returns the first loss. The closure must
    clear the gradients, call ``backward`` and return the loss; what else it does (dropout, the
    averages of batch norm) happens twice. Under DDP and FSDP2 it averages both gradients over the
    ranks.

    torch's `GradScaler` takes no closure, so train in bfloat16, or make two steps in turn with
    ``Optimizer(params, functorch_opt.sam(...))``, which needs none.

    Args:
        params: parameters, named parameters or groups. `rho` may differ between groups; a group
            whose learning rate is 0 is still moved up the gradient for the second evaluation.
        tx: the optimizer, a transformation or a function that returns one, as in `Optimizer`.
        rho: the length of the step up the gradient, 0 or greater.
        adaptive: whether it is that of `functorch_opt.asam`, with its eta, which does not depend on
            the scale of the parameters. Then `rho` is usually 10 times as large.
        compile, state: see `Optimizer`.
        **hyper: arguments of the function; see `Optimizer`.

    Raises:
        TypeError: as `Optimizer`; (by `step`) there is no closure.
        ValueError: a number outside its range; the function has an argument of the name `rho` or
            `adaptive` itself; (by `step`) groups whose options differ and are no numbers.

    Source: Foret et al., "Sharpness-Aware Minimization for Efficiently Improving Generalization",
    2021, alg. 1; Kwon et al., "ASAM", 2021, alg. 1.

    Example:
        >>> import torch, functorch_opt as fo
        >>> w = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> opt = fo.optim.SAM([w], fo.sgd, rho=0.1, lr=0.5)
        >>> def closure():
        ...     opt.zero_grad()
        ...     loss = (w**2).sum() / 2
        ...     loss.backward()
        ...     return loss
        >>> opt.step(closure).item(), w.detach()
        (12.5, tensor([1.4700, 1.9600]))
    """

    def __init__(
        self,
        params: Iterable[Any],
        tx: GradientTransformation | Callable[..., GradientTransformation],
        rho: float = 0.05,
        adaptive: bool = False,
        *,
        compile: bool = False,
        state: str | None = None,
        **hyper: Any,
    ) -> None:
        given = arguments(tx, hyper)
        recipe = (tx, given.fixed, given.rate, given.has_momentum)
        if taken := [name for name in OWN if name in given.defaults | given.fixed]:
            raise ValueError(
                f"{', '.join(taken)} would be that of SAM, and {shown(recipe)} has an argument of "
                "that name: give a function without it, such as lambda learning_rate: "
                f"{shown(recipe)}(learning_rate)."
            )
        defaults = {**given.defaults, "rho": rho, "adaptive": adaptive}
        numbers = ("lr", *given.numbers, "rho")
        self._setup(params, defaults, numbers, compile, recipe, state)

    def _chain(self, rho: Any, adaptive: bool, **options: Any) -> GradientTransformation:
        optimizer = made(self._recipe, options)
        if adaptive:
            return asam(optimizer, rho, opaque_mode=True)
        adversary = chain(normalize(), scale_by_learning_rate(rho))
        return sam(optimizer, adversary, opaque_mode=True)
