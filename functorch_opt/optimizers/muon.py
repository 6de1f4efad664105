"""Muon: momentum, made nearly orthogonal by a few steps of Newton-Schulz.

    mu = beta mu + (1 - beta) g
    m  = beta mu / (1 - beta^(t+1)) + (1 - beta) g / (1 - beta^t)             with nesterov
    m  = mu / (1 - beta^t)                                                    without
    x  = m / (|m| + eps)
    x  = a x + (b (x x') + c (x x')^2) x          ns_steps times, with (a, b, c) = ns_coeffs
    u  = ratio x                      ratio = sqrt(max(1, n / m)) for a parameter of shape [n, m]

If m = U S V', x is about U V'. A weight of torch is ``[out, in]``.

Sources: Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024. Liu et al.,
"Muon is Scalable for LLM Training", 2025, eq. 4 (weight decay, and the ratio of consistent_rms).
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch

from functorch_opt import tree
from functorch_opt._core.chain import chain
from functorch_opt._core.groups import MaskOrFn, partition
from functorch_opt._core.rule import leafwise
from functorch_opt._core.transformation import (
    GradientTransformation,
    Scalar,
    ScalarOrSchedule,
    check_choice,
    check_range,
    transformation,
)
from functorch_opt.optimizers.adam import adamw
from functorch_opt.transforms.decay import add_decayed_weights
from functorch_opt.transforms.scale import scale_by_learning_rate

__all__ = ["muon", "scale_by_muon"]

Triple = tuple[float, float, float]


def newton_schulz(x, coefficients):
    """Roughly the orthogonal matrix nearest to `x`, whose singular values must be at most 1.

    With Jordan's coefficients, singular values above 0.01 or so come out between 0.7 and 1.2.
    """
    tall = x.shape[0] > x.shape[1]
    x = x.mT if tall else x  # [n, m] with n <= m: the products below are [n, n]
    for a, b, c in coefficients:
        gram = x @ x.mH
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def shape_ratio(shape, consistent_rms):
    """The factor of a step, which makes one learning rate fit matrices of any shape."""
    n, m = shape
    if consistent_rms is None:
        return max(1.0, n / max(m, 1)) ** 0.5
    return consistent_rms * max(n, m) ** 0.5


def _of_each_step(ns_coeffs, ns_steps):
    """The three coefficients of each step."""
    if not 0 <= ns_steps < 100:
        raise ValueError(f"ns_steps must be in [0, 100); got {ns_steps}.")
    one_for_all = not isinstance(ns_coeffs[0], (tuple, list))
    triples = (tuple(ns_coeffs),) * ns_steps if one_for_all else ns_coeffs
    if any(len(triple) != 3 for triple in triples):
        raise ValueError(
            f"ns_coeffs must be three numbers, or three for each step; got {ns_coeffs!r}."
        )
    return triples


@transformation
def scale_by_muon(
    ns_coeffs: Triple | tuple[Triple, ...] = (3.4445, -4.775, 2.0315),
    ns_steps: int = 5,
    beta: ScalarOrSchedule = 0.95,
    eps: float = 1e-8,
    mu_dtype: torch.dtype | None = None,
    *,
    nesterov: bool = True,
    consistent_rms: Scalar | None = None,
    variant: Literal["optax", "torch"] = "optax",
) -> GradientTransformation:
    """The momentum of a matrix, made nearly orthogonal. Every tensor must be a real matrix.

    The whole rule is at the top of `functorch_opt.optimizers.muon`. Choose the matrices with
    `masked` or `partition`, as `muon` does.

    Args:
        ns_coeffs: the three coefficients of the polynomial of Newton-Schulz, or three for each
            step.
        ns_steps: how many steps of Newton-Schulz to make, fewer than 100. It has no effect if there
            are coefficients for each step.
        beta: weight of the old momentum, 0 or greater, and usually below 1.
        eps: added to the norm by which the momentum is divided, 0 or greater.
        mu_dtype: dtype in which ``mu`` is stored; by default that of the params, at least float32.
        nesterov: look one step ahead.
        consistent_rms: with None a parameter ``[n, m]`` is multiplied by ``sqrt(max(1, n / m))``.
            With a number it is multiplied by ``consistent_rms sqrt(max(n, m))``, so that the RMS of
            a step is about this number whatever the shape; with 0.2 the learning rates of AdamW
            fit. In optax this is a separate stage; here it is part of the rule, so that a sharded
            matrix is gathered only once.
        variant: "optax" or "torch". With "torch" the numbers are those of torch.optim.Muon:
            Newton-Schulz runs in bfloat16, whatever the dtype of the parameters; the momentum of
            nesterov is not corrected for its start at 0; and norms below `eps` count as `eps`.

    Raises:
        ValueError: an argument is outside of its range; there are not three coefficients.

    Example:
        >>> import torch, functorch_opt as fo
        >>> tx = fo.scale_by_muon(ns_coeffs=(2.0, -1.5, 0.5), ns_steps=12)
        >>> tx.update([torch.tensor([[3.0, 0.0], [0.0, -0.5]])], tx.init([torch.zeros(2, 2)]))[0]
        [tensor([[ 1.,  0.],
                [ 0., -1.]])]
    """
    check_range(0, float("inf"), beta=beta, eps=eps)
    check_choice("optax", "torch", variant=variant)
    of_torch, of_steps = variant == "torch", _of_each_step(ns_coeffs, ns_steps)

    def prepare(count, beta, eps):
        t = tree.as_real(count + 1)
        c = 1 - beta**t
        # beta mu / (1 - beta^(t+1)) + (1 - beta) g / c  =  (beta ahead mu + (1 - beta) g) / c, and
        # x is the same for c m and c eps.
        return {"weight": 1 - beta, "ahead": c / (1 - beta ** (t + 1)), "floor": eps * c}

    def rule(g, mu, weight, ahead, floor):
        mu = torch.lerp(mu, g, weight)
        m = torch.lerp(ahead * mu, g, weight) if nesterov else mu
        x = newton_schulz(m / (m.norm() + floor), of_steps)
        return x * shape_ratio(g.shape, consistent_rms), {"mu": mu}

    def torchs_prepare(beta):
        return {"weight": 1 - beta}

    def torchs_rule(g, mu, beta, weight, eps):
        mu = torch.lerp(mu, g, weight)
        m = torch.lerp(g, mu, beta) if nesterov else mu
        x = m.bfloat16()
        x = newton_schulz(x / x.norm().clamp(min=eps), of_steps).to(g.dtype)
        return x * shape_ratio(g.shape, consistent_rms), {"mu": mu}

    return leafwise(
        torchs_rule if of_torch else rule,
        torchs_prepare if of_torch else prepare,
        slots={"mu": partial(tree.zeros_like, dtype=mu_dtype)},
        hyper={"beta": beta, "eps": eps},
        kind="tensorwise",
    )


@transformation
def muon(
    learning_rate: ScalarOrSchedule,
    ns_coeffs: Triple | tuple[Triple, ...] = (3.4445, -4.775, 2.0315),
    ns_steps: int = 5,
    beta: ScalarOrSchedule = 0.95,
    eps: float = 1e-8,
    weight_decay: ScalarOrSchedule = 0.0,
    weight_decay_mask: MaskOrFn | None = None,
    mu_dtype: torch.dtype | None = None,
    *,
    nesterov: bool = True,
    adam_b1: ScalarOrSchedule = 0.9,
    adam_b2: ScalarOrSchedule = 0.999,
    adam_eps_root: ScalarOrSchedule = 0.0,
    adam_weight_decay: ScalarOrSchedule = 0.0,
    adam_learning_rate: ScalarOrSchedule | None = None,
    consistent_rms: Scalar | None = None,
    variant: Literal["optax", "torch"] = "optax",
) -> GradientTransformation:
    """Muon for the matrices of a model, and `adamw` for the rest. In optax it is contrib.muon.

    Muon is meant for hidden layers. If the first and the last layer are matrices too, build this
    `partition` yourself, with labels that give them to `adamw`.

    Args:
        learning_rate: 0 or greater, or a schedule.
        ns_coeffs, ns_steps, beta, eps, mu_dtype, nesterov, consistent_rms: see `scale_by_muon`.
        weight_decay: the decay of the matrices, multiplied by the learning rate; 0 or greater.
        weight_decay_mask: which of the matrices decay, see `masked`; by default all. It sees the
            matrices as a flat dict from path to matrix.
        adam_b1, adam_b2, adam_eps_root, adam_weight_decay: of `adamw`. Its eps, mu_dtype and
            nesterov are those above.
        adam_learning_rate: of `adamw`. None means `learning_rate`.
        variant: "torch" for the momentum of torch.optim.Muon, see `scale_by_muon`. torch's defaults
            are a weight decay of 0.1 and an eps of 1e-7, and torch takes matrices only.

    Raises:
        ValueError: an argument outside its range.

    Source: Jordan et al., 2024; Liu et al., 2025, eq. 4.

    Example:
        >>> import torch, functorch_opt as fo
        >>> params = {"weight": torch.zeros(2, 3), "bias": torch.zeros(2)}
        >>> state = fo.muon(0.02).init(params)
        >>> list(state["muon"]), list(fo.get(state, "scale_by_muon/mu"))
        (['scale_by_muon', 'add_decayed_weights', 'scale_by_learning_rate'], ['weight'])
    """
    options: dict[str, Any] = {"consistent_rms": consistent_rms, "variant": variant}
    direction = scale_by_muon(
        ns_coeffs, ns_steps, beta, eps, mu_dtype, nesterov=nesterov, **options
    )
    decay = add_decayed_weights(weight_decay, weight_decay_mask)
    of_matrices = chain(direction, decay, scale_by_learning_rate(learning_rate))
    of_the_rest = adamw(
        learning_rate if adam_learning_rate is None else adam_learning_rate,
        *(adam_b1, adam_b2, eps, adam_eps_root, mu_dtype, adam_weight_decay),
        nesterov=nesterov,
    )
    stages = {"muon": of_matrices, "adam": of_the_rest}
    return partition(stages, lambda path, p: "muon" if p.ndim == 2 else "adam")
