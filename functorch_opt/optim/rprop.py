"""Rprop, whose rule is that of `functorch_opt.scale_by_rprop`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

from torch import Tensor

from functorch_opt._core.transformation import GradientTransformation
from functorch_opt.optim.torch_named import Number, TorchNamed, ascend, parts
from functorch_opt.optimizers.rprop import scale_by_rprop
from functorch_opt.transforms.scale import scale

__all__ = ["Rprop"]


class Rprop(TorchNamed):
    """torch.optim.Rprop: every number has a step size of its own, which grows while its gradient
    keeps its sign.

    The whole rule is at the top of `functorch_opt.optimizers.rprop`. It is meant for gradients of
    the whole data set.

    Args:
        params: parameters, named parameters or groups.
        lr: the step sizes at the first step of a parameter, and **nothing else**, as in torch: a
            scheduler has no effect afterwards. 0 or greater; a float or a 1-element tensor.
        etas: what shrinks a step size, in (0, 1), and what lets it grow, greater than 1.
        step_sizes: the smallest and the largest.
        maximize: ascend.
        foreach: accepted, without effect: it chooses among torch's implementations.
        capturable: let a step be captured as a CUDA graph; see `Optimizer`.
        differentiable: must be False; see the functional layer.
        compile: run the step in place through `compiled_step`; see `Optimizer`.
        state: how slots are stored, such as ``"8bit"``; see `Optimizer`.
        owners: whether each parameter is stepped by one rank of many; see `Optimizer`.

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

    _names: ClassVar = {f"scale_by_rprop/{name}": name for name in ("prev", "step_size")}

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
        state: str | None = None,
        owners: bool = False,
    ) -> None:
        self._begin(locals())

    def _chain(
        self, lr: Any, etas: Any, step_sizes: Any, maximize: bool
    ) -> GradientTransformation:
        etaminus, etaplus = etas
        tensors = isinstance(etaminus, Tensor) or isinstance(etaplus, Tensor)
        if not (tensors or 0 < etaminus < 1 < etaplus < float("inf")):
            raise ValueError(
                f"Invalid eta values: {etaminus}, {etaplus}. The first must be in (0, 1), the "
                "second greater than 1."
            )
        return parts(
            ascend(maximize), scale_by_rprop(lr, *etas, *step_sizes), scale(-1.0)
        )
