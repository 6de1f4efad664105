"""NAdam as torch.optim has it: Adam with Nesterov momentum, whose decay grows with t.

    mu_t    = b1 (1 - 0.96^(t momentum_decay) / 2)                      mu_product = mu_1 ... mu_t
    exp_avg = b1 exp_avg + (1 - b1) g                                   exp_avg_sq = b2 exp_avg_sq + (1 - b2) g^2
    p      -= lr ((1 - mu_t) / (1 - mu_product) g + mu_(t+1) / (1 - mu_product mu_(t+1)) exp_avg) / (sqrt(exp_avg_sq / (1 - b2^t)) + eps)

Source: Dozat, "Incorporating Nesterov Momentum into Adam", 2016. optax, and so `functorch_opt.nadam`, keep the decay constant.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch

from functorch_opt import tree
from functorch_opt._core.rule import leafwise
from functorch_opt._core.transformation import GradientTransformation, transformation
from functorch_opt.optim.torch_named import Number, TorchNamed, ascend, l2, parts, scalar_slot
from functorch_opt.transforms.scale import scale_by_learning_rate

__all__ = ["NAdam"]


@transformation
def scale_by_nadam(b1, b2, eps, momentum_decay) -> GradientTransformation:
    def prepare(count, b1, b2, momentum_decay):
        t = tree.as_real(count + 1)
        mu, mu_next = (b1 * (1 - 0.5 * 0.96 ** (s * momentum_decay)) for s in (t, t + 1))
        return {"mu": mu, "mu_next": mu_next, "w1": 1 - b1, "w2": 1 - b2, "c2": 1 - b2**t}

    def rule(g, exp_avg, exp_avg_sq, mu_product, mu, mu_next, w1, w2, c2, eps):
        exp_avg = torch.lerp(exp_avg, g, w1)
        exp_avg_sq = torch.lerp(exp_avg_sq, g * g, w2)
        mu_product = mu_product * mu
        m = g * ((1 - mu) / (1 - mu_product)) + exp_avg * (mu_next / (1 - mu_product * mu_next))
        new = {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "mu_product": mu_product}
        return m / ((exp_avg_sq / c2).sqrt() + eps), new

    slots = {
        "exp_avg": tree.zeros_like,
        "exp_avg_sq": tree.zeros_like,
        "mu_product": scalar_slot(1.0),
    }
    return leafwise(
        rule,
        prepare,
        slots=slots,
        hyper={"b1": b1, "b2": b2, "eps": eps, "momentum_decay": momentum_decay},
    )


class NAdam(TorchNamed):
    """torch.optim.NAdam: Adam with Nesterov momentum, whose decay ``b1 (1 - 0.96^(t momentum_decay) / 2)`` grows with t.

    The whole rule is at the top of `functorch_opt.optim.nadam`.

    Args:
        params: parameters, named parameters or groups.
        lr: learning rate, 0 or greater; a float or a 1-element tensor.
        betas: decays of the two moments, in [0, 1).
        eps: 0 or greater.
        weight_decay: 0 or greater.
        momentum_decay: how fast the decay of the momentum grows, 0 or greater.
        decoupled_weight_decay: multiply the weight decay by the learning rate and keep it out of the moments, as in `AdamW`.
        maximize: ascend.
        foreach, capturable: accepted, without effect: they choose among torch's implementations.
        differentiable: must be False; see the functional layer.
        compile: run the step in place through `compiled_step`; see `Optimizer`.

    ``mu_product`` is kept in the dtype of the parameter, at least float32; torch has it in the default dtype. So for float64 parameters it
    is more exact here, unless the default dtype is float64 too.

    Raises:
        ValueError: an argument outside its range.

    Source: Dozat, "Incorporating Nesterov Momentum into Adam", 2016.

    Example:
        >>> import torch, functorch_opt as fo
        >>> w = torch.nn.Parameter(torch.tensor(1.0))
        >>> opt = fo.optim.NAdam([w])
        >>> (w**2).backward()
        >>> opt.step()
        >>> sorted(opt.state[w])
        ['exp_avg', 'exp_avg_sq', 'mu_product', 'step']
    """

    _names: ClassVar = {
        f"scale_by_nadam/{name}": name for name in ("exp_avg", "exp_avg_sq", "mu_product")
    }
    _structural: ClassVar = ("weight_decay",)

    def __init__(
        self,
        params: Iterable[Any],
        lr: Number = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum_decay: float = 4e-3,
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
            "momentum_decay": momentum_decay,
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
        momentum_decay: Any,
        decoupled_weight_decay: bool,
        maximize: bool,
    ) -> GradientTransformation:
        b1, b2 = betas
        nadam, decay = scale_by_nadam(b1, b2, eps, momentum_decay), l2(weight_decay)
        decayed = (nadam, decay) if decoupled_weight_decay else (decay, nadam)
        return parts(ascend(maximize), *decayed, scale_by_learning_rate(lr))
