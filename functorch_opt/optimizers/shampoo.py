"""Shampoo: for each dim a matrix of second moments, whose inverse root multiplies the gradient.

    L_k = b2 L_k + (1 - b2) G_k G_k'                   for each dim k; with b2 = 1 the sum of G_k G_k'
    mu  = b1 mu + (1 - b1) G                           and m = mu / (1 - b1^t)
    every frequency    R_k = (L_k / (1 - b2^t) + eps)^(-1 / (2 k's))
    s   = m along each dim multiplied by R_k                            (for a matrix R m R)
    d   = the direction of another optimizer: m / (sqrt(nu / (1 - b^t)) + graft_eps) of Adam
    u   = s |d| / |s|, by blocks; and d until the first root

Grafting takes the direction of Shampoo and the size of the other optimizer's step.

Sources: Gupta, Koren & Singer, "Shampoo: Preconditioned Stochastic Tensor Optimization", 2018,
alg. 2; Anil et al., "Scalable Second Order Optimization for Deep Learning", 2020 (grafting, blocks);
Shi et al., "A Distributed Data-Parallel PyTorch Implementation of the Distributed Shampoo
Optimizer", 2023, and its code, whose numbers these are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch

from functorch_opt import tree
from functorch_opt._core.chain import chain
from functorch_opt._core.groups import MaskOrFn
from functorch_opt._core.rule import every, leafwise
from functorch_opt._core.transformation import (
    GradientTransformation,
    ScalarOrSchedule,
    check_choice,
    check_range,
    check_whole,
    transformation,
)
from functorch_opt.optimizers.kronecker import (
    Cutting,
    eigh,
    either,
    failed_slot,
    kept_if_not_found,
    next_factors,
    on_host,
    turned_back,
)
from functorch_opt.optimizers.matrices import real_part
from functorch_opt.transforms.decay import add_decayed_weights
from functorch_opt.transforms.scale import scale_by_learning_rate

__all__ = ["scale_by_shampoo", "shampoo"]

Grafting = Literal["none", "sgd", "adagrad", "rmsprop", "adam"]
MOMENTS = ("adagrad", "rmsprop", "adam")


def inverse_root(a, eps, order):
    """``(a + eps)^(-1 / order)`` of a matrix whose negative eigenvalues are rounding."""
    values, vectors = eigh(a)
    least = values.amin().clamp(max=0)
    powers = (values - least + eps) ** (-1 / order)
    return (vectors * powers.to(vectors.dtype)) @ vectors.mH


def _new_roots(cutting, g, factors, roots, failed, weights):
    """What the rare work makes: the roots of the factors with this gradient."""
    b2, w2, c2, eps = weights
    new_factors = next_factors(cutting, g, factors, b2, w2)
    found = []
    for fs, rs in zip(new_factors, cutting.taken(roots, g.shape), strict=True):
        order = 2 * sum(f is not None for f in fs)
        block = []
        for f, r in zip(fs, rs, strict=True):
            if f is not None:
                r, is_found = kept_if_not_found(inverse_root(f * c2, eps, order), r)
                failed = failed + (~is_found).to(failed.dtype)
            block.append(r)
        found.append(block)
    return {"roots": cutting.kept(found, roots), "failed": failed}


def _size(x):
    return torch.linalg.vector_norm(x)


def _preconditioned(cutting, m, d, roots, is_grafted):
    """The direction of Shampoo; if it is grafted, with the size of `d`, block by block."""
    us = []
    columns = cutting.taken(roots, m.shape), cutting.cut(m), cutting.cut(d)
    for rs, x, y in zip(*columns, strict=True):
        s = turned_back(x, rs)
        us.append(s * (_size(y) / (_size(s) + 1e-16)) if is_grafted else s)
    return cutting.joined(us, m)


def _prepare(grafting: Grafting, start: int) -> Callable[..., dict[str, Any]]:
    def prepare(count, b1, b2, graft_b2):
        t = tree.as_real(count + 1)
        summed, graft_summed = b2 == 1, grafting == "adagrad"
        return {
            "w1": 1 - b1,
            "c1": 1 / (1 - b1**t),
            "w2": 1 - b2 + summed,
            "c2": 1 / (1 - b2**t + summed),
            "graft_keep": 1.0 if graft_summed else graft_b2,
            "graft_add": 1.0 if graft_summed else 1 - graft_b2,
            "graft_c": 1 / (1 - graft_b2**t) if grafting == "adam" else 1.0,
            "started": on_host(count + 1 >= start),
        }

    return prepare


def _rule(cutting: Cutting, grafting: Grafting) -> Callable[..., Any]:
    def rule(
        g,
        mu,
        nu,
        factors,
        roots,
        failed,
        w1,
        c1,
        b2,
        w2,
        started,
        graft_keep,
        graft_add,
        graft_c,
        graft_eps,
    ):
        mu = torch.lerp(mu, g, w1)
        m, nu = c1 * mu, real_part(nu).clone()
        d = m
        if grafting in MOMENTS:
            nu = graft_keep * nu + graft_add * (g * g.conj()).real
            d = m / ((graft_c * nu + tree.TINY).sqrt() + graft_eps)
        is_grafted = grafting != "none"

        def with_roots():
            return (_preconditioned(cutting, m, d, roots, is_grafted),)

        (u,) = either(started, with_roots, lambda: (d,))
        kept = cutting.kept(next_factors(cutting, g, factors, b2, w2), factors)
        new = {"mu": mu, "nu": nu, "factors": kept, "roots": roots.clone()}
        return u, {**new, "failed": failed.real.clone()}

    return rule


@transformation
def scale_by_shampoo(
    b1: ScalarOrSchedule = 0.9,
    b2: ScalarOrSchedule = 1.0,
    eps: ScalarOrSchedule = 1e-12,
    frequency: int = 1,
    *,
    start: int | None = None,
    grafting: Grafting = "adam",
    graft_b2: ScalarOrSchedule = 0.999,
    graft_eps: ScalarOrSchedule = 1e-8,
    max_size: int = 1024,
    merged: int = 0,
) -> GradientTransformation:
    """The momentum, multiplied along each dim by an inverse root of a matrix of second moments.

    The rule is at the top of `functorch_opt.optimizers.shampoo`. Between refreshes no decomposition
    is made. The state is ``mu``, ``nu`` (of grafting), ``factors``, ``roots`` (vectors with all
    matrices of a tensor) and ``failed``: how often a root could not be worked out, so that the last
    one was kept.

    Args:
        b1: decay of the mean, in [0, 1).
        b2: decay of the factors, in [0, 1]; 1: they are sums, as in the first paper.
        eps: added to the eigenvalues, 0 or greater.
        frequency: the roots are brought up to date at each update whose number it divides; 1 or
            more.
        start: from which update on there are roots. Before, the updates are those of grafting. None
            means `frequency`.
        grafting: "adam", "rmsprop" (no correction for the start at 0), "adagrad" (sums), "sgd" (the
            size of the momentum), or "none".
        graft_b2: decay of the second moment of grafting, in [0, 1).
        graft_eps: added to its root, 0 or greater.
        max_size: larger dims are cut into blocks of this size. The roots and the size of the step
            are those of each block.
        merged: merge neighbouring dims while they have at most this size. 0: none.

    Raises:
        ValueError: an argument outside its range.

    Source: Gupta, Koren & Singer, 2018, alg. 2; Shi et al., 2023, and its code.

    Example:
        >>> import torch, functorch_opt as fo
        >>> tx = fo.scale_by_shampoo(grafting="none")
        >>> g = torch.tensor([[3.0, 0.0], [0.0, -0.5]])
        >>> tx.update([g], tx.init([torch.zeros(2, 2)]))[0][0].round(decimals=4)
        tensor([[ 1.,  0.],
                [ 0., -1.]])
    """
    check_range(0, 1, b1=b1, graft_b2=graft_b2)
    check_range(0, 1, closed=True, b2=b2)
    check_range(0, float("inf"), eps=eps, graft_eps=graft_eps)
    start = frequency if start is None else start
    check_whole(1, frequency=frequency, start=start, max_size=max_size)
    check_whole(0, merged=merged)
    check_choice(*get_args(Grafting), grafting=grafting)
    cutting = Cutting(max_size, True, merged, 1)

    def due(count):
        return ((count + 1) % frequency == 0) & (count + 1 >= start)

    def work(g, factors, roots, failed, b2, w2, c2, eps):
        return _new_roots(cutting, g, factors, roots, failed.real, (b2, w2, c2, eps))

    return leafwise(
        _rule(cutting, grafting),
        _prepare(grafting, start),
        slots=_slots(cutting, grafting),
        hyper={
            "b1": b1,
            "b2": b2,
            "eps": eps,
            "graft_b2": graft_b2,
            "graft_eps": graft_eps,
        },
        every=every(due, work),
        kind="tensorwise",
    )


def _slots(cutting, grafting):
    def second_moment(p):
        zeros = tree.zeros_like(p.real)
        return zeros if grafting in MOMENTS else zeros.new_zeros(0)

    return {
        "mu": tree.zeros_like,
        "nu": second_moment,
        "factors": cutting.zeros(),
        "roots": cutting.ones,
        "failed": failed_slot,
    }


@transformation
def shampoo(
    learning_rate: ScalarOrSchedule,
    b1: ScalarOrSchedule = 0.9,
    b2: ScalarOrSchedule = 1.0,
    eps: ScalarOrSchedule = 1e-12,
    weight_decay: ScalarOrSchedule = 0.0,
    frequency: int = 1,
    mask: MaskOrFn | None = None,
    *,
    start: int | None = None,
    grafting: Grafting = "adam",
    graft_b2: ScalarOrSchedule = 0.999,
    graft_eps: ScalarOrSchedule = 1e-8,
    max_size: int = 1024,
    merged: int = 0,
) -> GradientTransformation:
    """Shampoo: `scale_by_shampoo`, decoupled weight decay, the learning rate.

    With grafting the learning rates of the other optimizer fit. For large models a `frequency` of
    10 to 100 is usual, with `b2` below 1.

    Args:
        learning_rate: 0 or greater, or a schedule.
        b1, b2, eps, frequency, start, grafting, graft_b2, graft_eps, max_size, merged: see
            `scale_by_shampoo`.
        weight_decay: multiplied by the learning rate.
        mask: which parameters decay, see `masked`; by default all.

    Raises:
        ValueError: an argument outside its range; ``update`` called without params.

    Source: Shi et al., 2023, and its code.

    Example:
        >>> import functorch_opt as fo
        >>> fo.shampoo(1e-3, b2=0.999, frequency=10)
        shampoo(0.001, b2=0.999, frequency=10)
    """
    direction = scale_by_shampoo(
        b1,
        b2,
        eps,
        frequency,
        start=start,
        grafting=grafting,
        graft_b2=graft_b2,
        graft_eps=graft_eps,
        max_size=max_size,
        merged=merged,
    )
    decay = add_decayed_weights(weight_decay, mask)
    return chain(direction, decay, scale_by_learning_rate(learning_rate))
