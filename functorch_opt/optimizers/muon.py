"""Muon: momentum, made nearly orthogonal by a few steps of Newton-Schulz.

    mu = beta mu + (1 - beta) g
    m  = beta mu / (1 - beta^(t+1)) + (1 - beta) g / (1 - beta^t)             with nesterov
    m  = mu / (1 - beta^t)                                                    without
    u  = scale orthogonal(m)                             times the sum of m u, if adaptive

The iteration of ``orthogonal`` is at the top of `functorch_opt.optimizers.orthogonal`. A weight of
torch is ``[out, in]``. The scale of a matrix ``[n, m]`` is

    original          sqrt(max(1, n / m))          Jordan
    match_rms_adamw   0.2 sqrt(max(n, m))          Liu et al.: learning rates of AdamW fit
    rms_to_rms        sqrt(n / m)                  Bernstein; Scion and Dion use it too
    spectral          sqrt(max(n, m))
    none              1

Sources: Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024. Liu et al.,
"Muon is Scalable for LLM Training", 2025, eq. 4 (weight decay, and the scale match_rms_adamw).
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, get_args

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
from functorch_opt.optimizers.matrices import (
    ORDINARY,
    MatrixDims,
    Scaling,
    check_scaling,
    matrix_slot,
    on_matrices,
    scale_of,
)
from functorch_opt.optimizers.orthogonal import (
    Coefficients,
    Preconditioning,
    orthogonalizer,
)
from functorch_opt.transforms.decay import add_decayed_weights
from functorch_opt.transforms.scale import scale_by_learning_rate

__all__ = ["muon", "scale_by_muon"]


@transformation
def scale_by_muon(
    ns_coeffs: Coefficients = (3.4445, -4.775, 2.0315),
    ns_steps: int = 5,
    beta: ScalarOrSchedule = 0.95,
    eps: float = 1e-8,
    mu_dtype: torch.dtype | None = None,
    *,
    nesterov: bool = True,
    adaptive: bool = False,
    preconditioning: Preconditioning = "frobenius",
    consistent_rms: Scalar | None = None,
    scaling: Scaling = "original",
    dims: MatrixDims = ORDINARY,
    ns_dtype: torch.dtype | None = None,
    variant: Literal["optax", "torch"] = "optax",
) -> GradientTransformation:
    """The momentum of a matrix, made nearly orthogonal. Every tensor must hold matrices.

    The whole rule is at the top of `functorch_opt.optimizers.muon`. Choose the matrices with
    `masked` or `partition`, as `muon` and `muon_with_adamw` do.

    Args:
        ns_coeffs: the coefficients of Newton-Schulz: a name, three numbers, or three for each step.
            The names are "jordan", "you" (its five steps give singular values nearer to 1),
            "polar_express", "cans", and "gram", which has the numbers of "polar_express" and is
            faster for matrices that are far from square.
        ns_steps: how many steps of Newton-Schulz to make, fewer than 100. It has no effect if there
            are coefficients for each step.
        beta: weight of the old momentum, 0 or greater, and usually below 1.
        eps: added to the norm by which the momentum is divided, 0 or greater.
        mu_dtype: dtype in which ``mu`` is stored; by default that of the params, at least float32.
        nesterov: look one step ahead.
        adaptive: whether a matrix is multiplied by the sum of ``m u``, which is nearly the sum of
            the singular values of m. optax takes one sum of all matrices of a tensor.
        preconditioning: what makes the singular values at most 1 before Newton-Schulz. By default
            the norm. "schatten" and "aol" divide by less, and so need fewer steps; "spectral" by
            the largest singular value, which takes long to find. The formulas are at the top of
            `functorch_opt.optimizers.orthogonal`. With "schatten" and "aol", `eps` is the least
            divisor.
        consistent_rms: with a number a matrix ``[n, m]`` is multiplied by ``consistent_rms
            sqrt(max(n, m))``, so that the RMS of a step is about this number whatever the shape.
            None means what `scaling` says. In optax this is a separate stage; here it is part of
            the rule, so that a sharded matrix is gathered only once.
        scaling: "original", "match_rms_adamw", "rms_to_rms", "spectral" or "none". It is that of
            each matrix, also of those that are fused into one tensor.
        dims: which dims are a matrix. By default the first is the rows, and the others are the
            columns.
        ns_dtype: dtype of Newton-Schulz. None means bfloat16 for float32 on a GPU, and elsewhere
            that of the rule.
        variant: "optax" or "torch". With "torch" the numbers are those of torch.optim.Muon:
            Newton-Schulz runs in bfloat16, whatever the dtype of the parameters; the momentum of
            nesterov is not corrected for its start at 0; and norms below `eps` count as `eps`.

    Raises:
        ValueError: an argument is outside of its range; there are not three coefficients; a tensor
            is no matrix.

    Example:
        >>> import torch, functorch_opt as fo
        >>> tx = fo.scale_by_muon(ns_coeffs=(2.0, -1.5, 0.5), ns_steps=12)
        >>> tx.update([torch.tensor([[3.0, 0.0], [0.0, -0.5]])], tx.init([torch.zeros(2, 2)]))[0]
        [tensor([[ 1.,  0.],
                [ 0., -1.]])]
    """
    check_range(0, float("inf"), beta=beta, eps=eps)
    check_choice("optax", "torch", variant=variant)
    check_choice(*get_args(Preconditioning), preconditioning=preconditioning)
    check_scaling(scaling)
    of_torch = variant == "torch"
    ns_dtype = ns_dtype or (torch.bfloat16 if of_torch else None)
    given = (ns_coeffs, ns_steps, ns_dtype, of_torch, preconditioning)
    orthogonal = orthogonalizer(*given)

    def scaled(m, floor, c):
        def step(x):
            u = orthogonal(x, floor)
            if adaptive:
                u = u * dual_norm(x / c, u)
            if consistent_rms is None:
                return u * scale_of(x.shape, scaling)
            return u * consistent_scale(x.shape, consistent_rms)

        return on_matrices(step, dims, m)

    def rule(g, mu, weight, ahead, floor, c):
        mu = torch.lerp(mu, g, weight)
        m = torch.lerp(ahead * mu, g, weight) if nesterov else mu
        return scaled(m, floor, c), {"mu": mu}

    return _of_matrices(rule, of_torch, mu_dtype, dims, {"beta": beta, "eps": eps})


def _of_matrices(rule, of_torch, mu_dtype, dims, hyper):
    """The stage of a rule with this momentum."""
    first = partial(tree.zeros_like, dtype=mu_dtype)
    return leafwise(
        rule,
        _not_corrected if of_torch else _corrected,
        slots={"mu": matrix_slot(first, dims)},
        hyper=hyper,
        kind="tensorwise",
    )


def dual_norm(m, u):
    """The sum of ``m u`` of each matrix, nearly that of the singular values of m."""
    product = m.conj() * u
    return product.real.sum((-2, -1), keepdim=True)


def consistent_scale(shape, rms):
    longer = max(shape[-2:])
    return rms * longer**0.5


def _corrected(count, beta, eps):
    """What the momentum is corrected with, for its start at 0.

    beta mu / (1 - beta^(t+1)) + (1 - beta) g / c  =  (beta ahead mu + (1 - beta) g) / c, and the
    orthogonal matrix is the same for c m and c eps.
    """
    c = 1 - beta ** tree.as_real(count + 1)
    ahead = c / (1 - beta ** tree.as_real(count + 2))
    return {
        "weight": 1 - beta,
        "ahead": ahead,
        "floor": eps * c,
        "c": c,
    }


def _not_corrected(beta, eps):
    return {
        "weight": 1 - beta,
        "ahead": 1.0,
        "floor": eps,
        "c": 1.0,
    }


@transformation
def muon(
    learning_rate: ScalarOrSchedule,
    ns_coeffs: Coefficients = (3.4445, -4.775, 2.0315),
    ns_steps: int = 5,
    beta: ScalarOrSchedule = 0.95,
    eps: float = 1e-8,
    weight_decay: ScalarOrSchedule = 0.0,
    weight_decay_mask: MaskOrFn | None = None,
    mu_dtype: torch.dtype | None = None,
    *,
    nesterov: bool = True,
    adaptive: bool = False,
    preconditioning: Preconditioning = "frobenius",
    adam_b1: ScalarOrSchedule = 0.9,
    adam_b2: ScalarOrSchedule = 0.999,
    adam_eps_root: ScalarOrSchedule = 0.0,
    adam_weight_decay: ScalarOrSchedule = 0.0,
    adam_learning_rate: ScalarOrSchedule | None = None,
    consistent_rms: Scalar | None = None,
    scaling: Scaling = "original",
    dims: MatrixDims | None = None,
    ns_dtype: torch.dtype | None = None,
    variant: Literal["optax", "torch"] = "optax",
) -> GradientTransformation:
    """Muon for the matrices of a model, and `adamw` for the rest. In optax it is contrib.muon.

    Muon is meant for hidden layers. If the first and the last layer are matrices too, take
    `muon_with_adamw`, which also looks at names.

    Args:
        learning_rate: 0 or greater, or a schedule.
        ns_coeffs, ns_steps, beta, eps, mu_dtype, nesterov, adaptive, preconditioning: see
            `scale_by_muon`.
        consistent_rms, scaling, ns_dtype: see `scale_by_muon`.
        dims: which dims are a matrix, see `scale_by_muon`. Then all tensors with two dims or more
            are matrices. None means that only those with two dims are.
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
    options |= {"nesterov": nesterov, "scaling": scaling, "ns_dtype": ns_dtype}
    options |= {"adaptive": adaptive, "preconditioning": preconditioning}
    given = ns_coeffs, ns_steps, beta, eps, mu_dtype
    direction = scale_by_muon(*given, dims=dims or ORDINARY, **options)
    decay = add_decayed_weights(weight_decay, weight_decay_mask)
    of_matrices = chain(direction, decay, scale_by_learning_rate(learning_rate))
    rate = learning_rate if adam_learning_rate is None else adam_learning_rate
    of_adam = adam_b1, adam_b2, eps, adam_eps_root, mu_dtype, adam_weight_decay
    of_the_rest = adamw(rate, *of_adam, nesterov=nesterov)
    stages = {"muon": of_matrices, "adam": of_the_rest}
    is_matrix = (lambda p: p.ndim == 2) if dims is None else (lambda p: p.ndim >= 2)
    return partition(stages, lambda path, p: "muon" if is_matrix(p) else "adam")
