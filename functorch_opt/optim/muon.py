"""Muon as torch.optim has it: momentum, made nearly orthogonal by a few steps of Newton-Schulz in bfloat16.

    momentum_buffer = momentum momentum_buffer + (1 - momentum) g
    b  = (1 - momentum) g + momentum momentum_buffer      with nesterov; otherwise momentum_buffer
    x  = b / |b|, then ns_steps times x = a x + (b (x x') + c (x x')^2) x, with (a, b, c) = ns_coefficients: about u v' of b = u s v'
    p -= lr (ratio x + weight_decay p)                    ratio = sqrt(max(1, n / m)) or 0.2 sqrt(max(n, m)) for p of shape [n, m]

Sources: Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024. Liu et al., "Muon is Scalable for LLM Training",
2025, eq. 4 (weight decay; the ratio ``match_rms_adamw``).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor

from functorch_opt import tree
from functorch_opt._core.rule import leafwise
from functorch_opt._core.transformation import GradientTransformation, transformation
from functorch_opt.optim.torch_named import TorchNamed, l2, parts
from functorch_opt.transforms.scale import scale_by_learning_rate

__all__ = ["Muon"]


def orthogonal(x, coefficients, eps, steps):
    """About the nearest orthogonal matrix, in bfloat16: singular values between 0.5 and 1.5, say, in place of 1."""
    a, b, c = coefficients
    tall = x.shape[0] > x.shape[1]
    x = x.bfloat16()
    x = x.mT if tall else x  # [n, m] with n <= m: the products below are [n, n]
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def _ratio(adjust_lr_fn, n, m):
    if adjust_lr_fn == "match_rms_adamw":
        return 0.2 * max(n, m) ** 0.5
    return max(1.0, n / m) ** 0.5


@transformation
def scale_by_muon(
    momentum, nesterov, ns_coefficients, eps, ns_steps, adjust_lr_fn
) -> GradientTransformation:
    if len(ns_coefficients) != 3:
        raise ValueError(f"ns_coefficients must be three numbers; got {ns_coefficients!r}.")
    if not 0 <= ns_steps < 100:
        raise ValueError(f"ns_steps must be in [0, 100); got {ns_steps}.")
    if adjust_lr_fn not in (None, "original", "match_rms_adamw"):
        known = "None, 'original' or 'match_rms_adamw'"
        raise ValueError(
            f"Adjust learning rate function {adjust_lr_fn} is not supported: adjust_lr_fn must be {known}."
        )

    def prepare(momentum):
        return {"weight": 1 - momentum}

    def rule(g, momentum_buffer, momentum, weight):
        momentum_buffer = torch.lerp(momentum_buffer, g, weight)
        b = torch.lerp(g, momentum_buffer, momentum) if nesterov else momentum_buffer
        x = orthogonal(b, ns_coefficients, eps, ns_steps).to(g.dtype)
        return x * _ratio(adjust_lr_fn, *g.shape), {"momentum_buffer": momentum_buffer}

    return leafwise(
        rule,
        prepare,
        slots={"momentum_buffer": tree.zeros_like},
        hyper={"momentum": momentum},
        kind="tensorwise",
    )


class Muon(TorchNamed):
    """torch.optim.Muon: momentum, made nearly orthogonal. For the matrices of hidden layers; give the rest to `AdamW`.

    The whole rule is at the top of `functorch_opt.optim.muon`. As in torch Newton-Schulz runs in bfloat16, whatever the dtype of the
    parameters: the update has about three digits.

    Args:
        params: parameters, named parameters or groups; each a real matrix.
        lr: learning rate, 0 or greater; a float or a 1-element tensor.
        weight_decay: multiplied by `lr`, kept out of the momentum; 0 or greater.
        momentum: weight of the old momentum; 0 or greater.
        nesterov: look one step ahead.
        ns_coefficients: of the polynomial of Newton-Schulz.
        eps: the smallest norm that is divided by.
        ns_steps: steps of Newton-Schulz, fewer than 100.
        adjust_lr_fn: ``"original"``, or None: multiply by ``sqrt(max(1, n / m))`` for a parameter ``[n, m]``. ``"match_rms_adamw"``: by
            ``0.2 sqrt(max(n, m))``, so that learning rates of AdamW fit. The weight decay is not multiplied.
        compile: run the step in place through `compiled_step`; see `Optimizer`.

    Raises:
        ValueError: an argument outside its range; a parameter that is no matrix.
        RuntimeError: a complex parameter.

    Source: Jordan et al., 2024; Liu et al., "Muon is Scalable for LLM Training", 2025, eq. 4.

    Example:
        >>> import torch, functorch_opt as fo
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
        >>> matrices = [p for p in model.parameters() if p.ndim == 2]
        >>> rest = [p for p in model.parameters() if p.ndim != 2]
        >>> opts = [fo.optim.Muon(matrices, lr=0.02), fo.optim.AdamW(rest)]
        >>> model(torch.ones(1, 4)).sum().backward()
        >>> for opt in opts:
        ...     opt.step()
        >>> sorted(opts[0].state[model[0].weight])
        ['momentum_buffer', 'step']
    """

    _names: ClassVar = {"scale_by_muon/momentum_buffer": "momentum_buffer"}
    _uncounted: ClassVar = ("step",)
    _structural: ClassVar = ("weight_decay",)
    _fixed: ClassVar = ("ns_coefficients", "eps", "ns_steps", "adjust_lr_fn")

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = (3.4445, -4.775, 2.0315),
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        *,
        compile: bool = False,
    ) -> None:
        options = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_coefficients": tuple(ns_coefficients),
            "eps": eps,
            "ns_steps": ns_steps,
            "adjust_lr_fn": adjust_lr_fn,
        }
        self._begin(params, options, compile=compile)

    def _chain(
        self,
        lr: Any,
        weight_decay: Any,
        momentum: Any,
        nesterov: bool,
        ns_coefficients: tuple[float, ...],
        eps: float,
        ns_steps: int,
        adjust_lr_fn: str | None,
    ) -> GradientTransformation:
        muon = scale_by_muon(momentum, nesterov, ns_coefficients, eps, ns_steps, adjust_lr_fn)
        return parts(muon, l2(weight_decay), scale_by_learning_rate(lr))

    def _check_parameter(self, p: Tensor) -> None:
        cure = "Give the rest to another optimizer, e.g. AdamW."
        if p.is_complex():
            raise RuntimeError(
                f"Muon does not support complex parameters; one is {p.dtype} of shape {tuple(p.shape)}. {cure}"
            )
        if p.ndim != 2:
            raise ValueError(
                f"Muon only supports 2D parameters; one has shape {tuple(p.shape)}. {cure}"
            )
