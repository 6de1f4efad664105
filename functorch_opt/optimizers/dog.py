"""DoG and DoWG: the step size from how far the parameters have come, and from the gradients.

    moved = norm(p - first p), over all parameters
    DoG:     r = max(r, moved)          G = G + norm(g)^2           u = r / sqrt(G + eps) g
    DoWG:    s = max(s, moved^2)        G = G + s norm(g)^2         u = s / (sqrt(G) + eps) g

Source: Ivgi, Hinder & Carmon, "DoG is SGD's Best Friend: A Parameter-Free Dynamic Step Size
Schedule", 2023; Khaled, Mishchenko & Jin, "DoWG Unleashed: An Efficient Universal Parameter-Free
Gradient Descent Method", 2023, alg. 1.
"""

from __future__ import annotations

import torch

from functorch_opt import tree
from functorch_opt._core import numerics
from functorch_opt._core.chain import chain
from functorch_opt._core.groups import MaskOrFn
from functorch_opt._core.numerics import copied
from functorch_opt._core.rule import leafwise
from functorch_opt._core.transformation import (
    GradientTransformation,
    Scalar,
    ScalarOrSchedule,
    check_range,
    transformation,
)
from functorch_opt.transforms.decay import add_decayed_weights
from functorch_opt.transforms.scale import scale_by_learning_rate

__all__ = [
    "dog",
    "dowg",
    "scale_by_distance_over_gradients",
    "scale_by_dog",
    "scale_by_dowg",
]

KINDS = ("heuristic", "distance", "learning_rate")


def zeros(*names: str) -> dict[str, torch.Tensor]:
    return {name: torch.zeros((), dtype=torch.float64) for name in names}


def rule(g, start, rate):
    return rate * g, {"start": start}


TOTALS = {
    "moved": lambda p, start: (p - start).square().sum(),
    "squares": lambda g: g.square().sum(),
}


@transformation
def scale_by_dog(
    init_step: tuple[str, Scalar] = ("heuristic", 1e-6), eps: ScalarOrSchedule = 1e-8
) -> GradientTransformation:
    """``u = r / sqrt(G + eps) g``, with one step size for all parameters.

    The rule is at the top of `functorch_opt.optimizers.dog`. The authors evaluate with an average
    of the parameters: see `params_ema`. Their code has a step size for each group: for that give
    each its own by `partition`.

    Args:
        init_step: how the first step is chosen. ``("heuristic", a)``: r is at least ``a (1 + norm(first
            p))``, with a = 1e-4 where there is batch normalization. ``("distance", r)``: r is at
            least this. ``("learning_rate", s)``: the first step size is s.
        eps: added to the sum of squares, 0 or greater.

    Raises:
        ValueError: `init_step` is none of these; a negative eps; ``update`` called without params.

    Source: Ivgi et al., 2023.

    Example:
        >>> import torch, functorch_opt as fo
        >>> tx, params = fo.scale_by_dog(("distance", 0.1)), [torch.tensor([3.0, 4.0])]
        >>> tx.update([torch.tensor([0.0, 2.0])], tx.init(params), params)[0]
        [tensor([0.0000, 0.1000])]
    """
    kind, first = init_step
    if kind not in KINDS:
        raise ValueError(
            f"init_step must be a pair of one of {KINDS} and a number; got {init_step!r}."
        )
    check_range(0, float("inf"), init_step=first, eps=eps)

    def prepare(moved, squares, begin, r, gathered, first, eps):
        least = {"heuristic": first * (1 + (begin + tree.TINY).sqrt()), "distance": first}
        r = torch.maximum(r, (moved + tree.TINY).sqrt()).clamp(min=least.get(kind, 0))
        total = gathered + squares
        rate = r / (total + eps + tree.TINY).sqrt()
        if kind == "learning_rate":
            rate = torch.where(gathered == 0, first, rate)
        return {"rate": rate}, {"r": r, "gathered": total}

    return leafwise(
        rule,
        prepare,
        slots={"start": copied},
        shared=zeros("r", "gathered"),
        hyper={"first": first, "eps": eps},
        totals={**TOTALS, "begin": lambda start: start.square().sum()},
    )


@transformation
def scale_by_dowg(
    init_estim_sq_dist: ScalarOrSchedule | None = None, eps: ScalarOrSchedule = 1e-4
) -> GradientTransformation:
    """``u = s / (sqrt(G) + eps) g``, with one step size for all parameters.

    The rule is at the top of `functorch_opt.optimizers.dog`.

    Args:
        init_estim_sq_dist: the smallest s, greater than 0; by default eps.
        eps: added to the root, greater than 0.

    Raises:
        ValueError: an argument outside its range; ``update`` called without params.

    Source: Khaled et al., 2023, alg. 1.

    Example:
        >>> import torch, functorch_opt as fo
        >>> tx, params = fo.scale_by_dowg(0.25, eps=1e-12), [torch.tensor([3.0, 4.0])]
        >>> tx.update([torch.tensor([0.0, 2.0])], tx.init(params), params)[0]
        [tensor([0.0000, 0.5000])]
    """
    least = eps if init_estim_sq_dist is None else init_estim_sq_dist
    check_range(0, float("inf"), above=True, eps=eps, init_estim_sq_dist=least)

    def prepare(moved, squares, s, gathered, least, eps):
        s = torch.maximum(s, moved).clamp(min=least)
        gathered = gathered + s * squares
        rate = s / ((gathered + tree.TINY).sqrt() + eps)
        return {"rate": rate}, {"s": s, "gathered": gathered}

    return leafwise(
        rule,
        prepare,
        slots={"start": copied},
        shared=zeros("s", "gathered"),
        hyper={"least": least, "eps": eps},
        totals=TOTALS,
    )


@transformation
def scale_by_distance_over_gradients(
    reps_rel: Scalar = 1e-6,
    eps: ScalarOrSchedule = 1e-8,
    global_scale: ScalarOrSchedule = 1.0,
) -> GradientTransformation:
    """``u = global_scale r / sqrt(G + eps) g``, with an r and a G for each tensor: L-DoG.

    r is at least ``reps_rel (1 + norm(first p))``.

    Args:
        reps_rel: 0 or greater; the authors have 1e-4 where there is batch normalization.
        eps: added to the sum of squares, 0 or greater.
        global_scale: -1 to descend.

    Raises:
        ValueError: an argument outside its range; ``update`` called without params.

    Source: Ivgi et al., 2023, sec. 4.1 (layer-wise DoG). optax has ``param_dtype=``, the dtype of the
    first parameters, float32 by default; here it is that of the parameters, at least float32.

    Example:
        >>> import torch, functorch_opt as fo
        >>> tx = fo.scale_by_distance_over_gradients(0.1, global_scale=-1.0)
        >>> params = [torch.tensor([3.0, 4.0])]
        >>> tx.update([torch.tensor([0.0, 2.0])], tx.init(params), params)[0]
        [tensor([-0.0000, -0.6000])]
    """
    check_range(0, float("inf"), reps_rel=reps_rel, eps=eps)
    check_range(-float("inf"), float("inf"), global_scale=global_scale)

    def rule(g, r, start, gathered, moved, squares, begin, reps_rel, eps, global_scale):
        least = reps_rel * (1 + (begin + tree.TINY).sqrt())
        r = torch.maximum(torch.maximum(r, (moved + tree.TINY).sqrt()), least)
        gathered = gathered + squares
        rate = global_scale * r / (gathered + eps + tree.TINY).sqrt()
        return rate * g, {"start": start, "r": r, "gathered": gathered}

    zero = numerics.scalar_slot(0.0)
    return leafwise(
        rule,
        slots={"start": copied, "r": zero, "gathered": zero},
        hyper={"reps_rel": reps_rel, "eps": eps, "global_scale": global_scale},
        sums={**TOTALS, "begin": lambda start: start.square().sum()},
    )


@transformation
def dog(
    learning_rate: ScalarOrSchedule = 1.0,
    init_step: tuple[str, Scalar] = ("heuristic", 1e-6),
    eps: ScalarOrSchedule = 1e-8,
    weight_decay: ScalarOrSchedule = 0.0,
    mask: MaskOrFn | None = None,
) -> GradientTransformation:
    """DoG: weight decay, `scale_by_dog`, the learning rate.

    Args:
        learning_rate: multiplies the step size; 1 is the paper's.
        init_step, eps: see `scale_by_dog`.
        weight_decay: added to the gradient, times the parameter.
        mask: which parameters decay, see `masked`; by default all.

    Raises:
        ValueError: an argument outside its range; ``update`` called without params.

    Source: Ivgi et al., 2023.

    Example:
        >>> import functorch_opt as fo
        >>> fo.dog(init_step=("heuristic", 1e-4))
        dog(init_step=('heuristic', 0.0001))
    """
    return chain(
        add_decayed_weights(weight_decay, mask),
        scale_by_dog(init_step, eps),
        scale_by_learning_rate(learning_rate),
    )


@transformation
def dowg(
    learning_rate: ScalarOrSchedule = 1.0,
    init_estim_sq_dist: ScalarOrSchedule | None = None,
    eps: ScalarOrSchedule = 1e-4,
    weight_decay: ScalarOrSchedule = 0.0,
    mask: MaskOrFn | None = None,
) -> GradientTransformation:
    """DoWG: weight decay, `scale_by_dowg`, the learning rate.

    Args:
        learning_rate: multiplies the step size; 1 is the paper's.
        init_estim_sq_dist, eps: see `scale_by_dowg`.
        weight_decay: added to the gradient, times the parameter.
        mask: which parameters decay, see `masked`; by default all.

    Raises:
        ValueError: an argument outside its range; ``update`` called without params.

    Source: Khaled et al., 2023, alg. 1.

    Example:
        >>> import functorch_opt as fo
        >>> fo.dowg(init_estim_sq_dist=1e-2)
        dowg(init_estim_sq_dist=0.01)
    """
    return chain(
        add_decayed_weights(weight_decay, mask),
        scale_by_dowg(init_estim_sq_dist, eps),
        scale_by_learning_rate(learning_rate),
    )
