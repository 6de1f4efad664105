"""RAdam as torch.optim has it: Adam, but gradient descent with momentum until the second moment can be trusted.

    exp_avg = b1 exp_avg + (1 - b1) g          exp_avg_sq = b2 exp_avg_sq + (1 - b2) g^2
    rho_inf = 2 / (1 - b2) - 1                 rho = rho_inf - 2 t b2^t / (1 - b2^t)
    r       = sqrt((rho - 4) (rho - 2) rho_inf / ((rho_inf - 4) (rho_inf - 2) rho))
    l       = sqrt(1 - b2^t) / (sqrt(exp_avg_sq) + eps)
    p      -= lr exp_avg / (1 - b1^t) r l      where rho > 5, without r and l elsewhere

Source: Liu et al., "On the Variance of the Adaptive Learning Rate and Beyond", 2020, alg. 2, which asks for rho > 4. optax corrects the
second moment before it adds eps, and asks for rho >= 5.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch

from functorch_opt import tree
from functorch_opt._core.rule import leafwise
from functorch_opt._core.transformation import GradientTransformation, transformation
from functorch_opt.optim.torch_named import Number, TorchNamed, ascend, l2, parts
from functorch_opt.transforms.scale import scale_by_learning_rate

__all__ = ["RAdam"]


@transformation
def scale_by_radam(b1, b2, eps) -> GradientTransformation:
    def prepare(count, b1, b2):
        t = tree.as_real(count + 1)
        c2 = 1 - b2**t
        rho_inf = 2 / (1 - b2) - 1
        rho = rho_inf - 2 * t * b2**t / c2
        trusted = rho > 5
        r_squared = (rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho)
        r = torch.where(trusted, r_squared, 1.0).sqrt()  # elsewhere r_squared may be negative
        return {
            "trusted": trusted,
            "rl": r * c2.sqrt(),
            "w1": 1 - b1,
            "w2": 1 - b2,
            "c1": 1 - b1**t,
        }

    def rule(g, exp_avg, exp_avg_sq, w1, w2, c1, eps, trusted, rl):
        exp_avg = torch.lerp(exp_avg, g, w1)
        exp_avg_sq = torch.lerp(exp_avg_sq, g * g, w2)
        u = exp_avg / c1 * torch.where(trusted, rl / (exp_avg_sq.sqrt() + eps), 1.0)
        return u, {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}

    slots = {"exp_avg": tree.zeros_like, "exp_avg_sq": tree.zeros_like}
    return leafwise(rule, prepare, slots=slots, hyper={"b1": b1, "b2": b2, "eps": eps})


class RAdam(TorchNamed):
    """torch.optim.RAdam: Adam, but gradient descent with momentum until the second moment can be trusted (five steps with b2 = 0.999).

    The whole rule is at the top of `functorch_opt.optim.radam`.

    Args:
        params: parameters, named parameters or groups.
        lr: learning rate, 0 or greater; a float or a 1-element tensor.
        betas: decays of the two moments, in [0, 1).
        eps: added to the root of the uncorrected second moment, 0 or greater.
        weight_decay: 0 or greater.
        decoupled_weight_decay: multiply the weight decay by the learning rate and keep it out of the moments, as in `AdamW`.
        maximize: ascend.
        foreach, capturable: accepted, without effect: they choose among torch's implementations.
        differentiable: must be False; see the functional layer.
        compile: run the step in place through `compiled_step`; see `Optimizer`.

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

    _names: ClassVar = {f"scale_by_radam/{name}": name for name in ("exp_avg", "exp_avg_sq")}
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
    ) -> None:
        options = {
            "lr": lr,
            "betas": tuple(betas),
            "eps": eps,
            "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
            "maximize": maximize,
        }
        self._begin(
            params,
            options,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            compile=compile,
        )

    def _chain(
        self,
        lr: Any,
        betas: Any,
        eps: Any,
        weight_decay: Any,
        decoupled_weight_decay: bool,
        maximize: bool,
    ) -> GradientTransformation:
        b1, b2 = betas
        radam, decay = scale_by_radam(b1, b2, eps), l2(weight_decay)
        decayed = (radam, decay) if decoupled_weight_decay else (decay, radam)
        return parts(ascend(maximize), *decayed, scale_by_learning_rate(lr))
