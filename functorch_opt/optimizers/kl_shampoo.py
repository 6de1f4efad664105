"""KL-Shampoo and KL-SOAP: each factor sees the gradient as the others have already scaled it.

    first update    L_k = (1 - b3) G_k G_k' / (number of columns); Q_k its eigenvectors; u = 0
    later           h   = G along each dim multiplied by Q_k'
    KL-SOAP         mu  = b1 mu + (1 - b1) G, and mh = mu in the same basis
                    nu  = b2 nu + (1 - b2) h^2
                    u   = mh / (sqrt(nu) + eps),                          turned back by Q_k
    KL-Shampoo      u   = mh w / (1 + eps w),  w = a_1 a_2 ...,           turned back by Q_k
    then            X   = G along each dim j but k multiplied by Q_j', and by a_j
                    L_k = b3 L_k + (1 - b3) X_k X_k' / (number of columns)
                    a_k = 1 / sqrt(b3 / a_k^2 + (1 - b3) s),  s: the mean over the dims j but k of
                          the squares of h a_j...
    every frequency Q_k = the orthonormal columns of L_k Q_k

``a_k`` holds inverse roots of eigenvalues: one for each index of dim k. It starts as
``init^(-1/2)`` and is at most ``max(10, min(size of dim k, 4000))``.

Source: Lin, Lowe, Dangel, Eschenhagen, Xu & Grosse, "Understanding and Improving Shampoo and SOAP
via Kullback-Leibler Minimization", 2025, and the authors' code.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from functorch_opt import tree
from functorch_opt._core.rule import every, leafwise
from functorch_opt._core.transformation import (
    GradientTransformation,
    ScalarOrSchedule,
    check_range,
    check_whole,
    transformation,
)
from functorch_opt.optimizers.kronecker import (
    Cutting,
    after_first,
    along,
    either,
    failed_slot,
    next_bases,
    of_first,
    outer,
    step_then_decay,
    turned,
    turned_back,
)
from functorch_opt.optimizers.matrices import matrices_and_rest, real_part

__all__ = ["kl_shampoo", "kl_soap", "scale_by_kl_shampoo", "scale_by_kl_soap"]


def _scaled(x, scales, skip=None):
    """`x` multiplied by the vector of each dim."""
    for dim, a in enumerate(scales):
        if a is not None and dim != skip:
            x = x * along(a, dim, x)
    return x


def _next_scale(a, square, b3, w3):
    """The next inverse roots of eigenvalues, of which `square` are those of this gradient."""
    new = (b3 / (a * a) + w3 * square).rsqrt()
    largest = float(max(10, min(a.shape[0], 4000)))
    return torch.nan_to_num(new, nan=0.0, posinf=0.0).clamp(max=largest)


def _statistics(x, h, q, factors, scales, b3, w3):
    """The next factors and scales of one block, whose gradient is x, and h in the basis q."""
    new_factors, new_scales = [], []
    for dim, (f, a) in enumerate(zip(factors, scales, strict=True)):
        if f is not None:
            n = x.numel() // x.shape[dim]
            seen = _scaled(turned(x, q, skip=dim), scales, skip=dim)
            f = b3 * f + w3 * outer(seen, dim) / n
            others = [i for i in range(x.dim()) if i != dim]
            scaled = _scaled(h, scales, skip=dim)
            square = (scaled * scaled.conj()).real.mean(others)
            a = _next_scale(a, square, b3, w3)
        new_factors.append(f)
        new_scales.append(a)
    return new_factors, new_scales


def _first_factors(cutting, g, factors, w3):
    """The factors after the first update."""
    found = []
    old = cutting.taken(factors, g.shape)
    for block, x in zip(old, cutting.cut(g), strict=True):
        first = list(block)
        for k, f in enumerate(block):
            if f is not None:
                first[k] = w3 * outer(x, k) * len(f) / x.numel()
        found.append(first)
    return found


def _moved(cutting, g, mu, nu, factors, bases, scales, direction, b3, w3):
    """The update, and all slots, of an update that is not the first."""
    shape = g.shape
    columns = [cutting.cut(x) for x in (g, mu)]
    columns += [cutting.cut(nu) if nu.numel() else [nu] * len(columns[0])]
    columns += [cutting.taken(x, shape) for x in (factors, bases)]
    columns += [cutting.taken(scales, shape, power=1)]
    us, nus, new_factors, new_scales = [], [], [], []
    for x, m, v, fs, q, a in zip(*columns, strict=True):
        h = turned(x, q)
        u, v = direction(turned(m, q), h, v, a)
        fs, a = _statistics(x, h, q, fs, a, b3, w3)
        us.append(turned_back(u, q))
        nus.append(v)
        new_factors.append(fs)
        new_scales.append(a)
    next_nu = cutting.joined(nus, g) if nu.numel() else nu
    kept = cutting.kept(new_factors, factors), cutting.kept(new_scales, scales)
    return cutting.joined(us, g), next_nu, *kept


def _rule(cutting: Cutting, direction_of: Callable[..., Any]) -> Callable[..., Any]:
    def rule(g, mu, nu, factors, bases, scales, failed, w1, w2, b3, w3, eps, moves):
        scales, nu = real_part(scales), real_part(nu)
        next_mu = torch.lerp(mu, g, w1)

        def moved():
            given = g, next_mu, nu, factors, bases, scales, direction_of(w2, eps)
            u, new_nu, *new = _moved(cutting, *given, b3, w3)
            return u, next_mu, new_nu, *new

        def rested():
            first = cutting.kept(_first_factors(cutting, g, factors, w3), factors)
            return torch.zeros_like(g), mu.clone(), nu.clone(), first, scales.clone()

        u, *new = either(moves, moved, rested)
        names = "mu", "nu", "factors", "scales"
        rest = {"bases": bases.clone(), "failed": failed.real.clone()}
        return u, {**dict(zip(names, new, strict=True)), **rest}

    return rule


def _adams(w2, eps):
    """KL-SOAP's direction."""

    def direction(mh, h, v, a):
        v = torch.lerp(v, (h * h.conj()).real, w2)
        return mh / (v.sqrt() + eps), v

    return direction


def _shampoos(w2, eps):
    """KL-Shampoo's direction."""

    def direction(mh, h, v, a):
        w = _scaled(torch.ones_like(mh.real), a)
        return mh * (w / (1 + eps * w)), v.clone()

    return direction


def _stage(cutting, direction_of, has_nu, init, frequency, hyper):
    def prepare(count, b1, b2, b3):
        weights = {"w1": 1 - b1, "w2": 1 - b2, "w3": 1 - b3}
        return {**weights, **of_first(count)}

    def work(g, factors, bases, failed, fresh):
        new, failed = next_bases(cutting, g.shape, factors, bases, failed.real, fresh)
        return {"bases": new, "failed": failed}

    def second_moment(p):
        zeros = tree.zeros_like(p.real)
        return zeros if has_nu else zeros.new_zeros(0)

    slots = {
        "mu": tree.zeros_like,
        "nu": second_moment,
        "factors": cutting.zeros(),
        "bases": cutting.ones,
        "scales": lambda p: cutting.zeros(1)(p) + init**-0.5,
        "failed": failed_slot,
    }
    rare = every(after_first(frequency), work)
    rule = _rule(cutting, direction_of)
    return leafwise(
        rule, prepare, slots=slots, hyper=hyper, every=rare, kind="tensorwise"
    )


def _checked(b1, b2, b3, eps, frequency, init, max_size, merged):
    """The hyperparameters, after their ranges are checked."""
    check_range(0, 1, b1=b1, b2=b2, b3=b3)
    check_range(0, float("inf"), eps=eps)
    check_whole(1, frequency=frequency, max_size=max_size)
    check_whole(0, merged=merged)
    check_range(0, float("inf"), above=True, init=init)
    return {"b1": b1, "b2": b2, "b3": b2 if b3 is None else b3, "eps": eps}


@transformation
def scale_by_kl_shampoo(
    b1: ScalarOrSchedule = 0.9,
    b2: ScalarOrSchedule = 0.98,
    eps: ScalarOrSchedule = 1e-8,
    frequency: int = 10,
    *,
    b3: ScalarOrSchedule | None = None,
    init: float = 0.1,
    max_size: int = 10000,
    blocks: bool = False,
    merged: int = 0,
) -> GradientTransformation:
    """The mean, multiplied in a basis by inverse roots of eigenvalues. It needs no grafting.

    The rule is at the top of `functorch_opt.optimizers.kl_shampoo`. Tensors with fewer than two
    dims, not counting those of size 1, have no factors: their update is the mean. The state is as
    that of `scale_by_soap`, and ``scales``, the vectors a_k.

    Args:
        b1: decay of the mean, in [0, 1).
        b2: decay of factors and eigenvalues, in [0, 1).
        eps: bounds the weights in the basis by its inverse; 0 or greater.
        frequency, max_size, blocks, merged: see `scale_by_soap`.
        b3: the decay of factors and eigenvalues in place of `b2`.
        init: the first eigenvalues, above 0.

    Raises:
        ValueError: an argument outside its range.

    Source: Lin et al., 2025, and the authors' code. Other collections have other rules by this name:
    NVIDIA's, which refreshes before the update, and that of modded-nanogpt.

    Example:
        >>> import torch, functorch_opt as fo
        >>> tx, g = fo.scale_by_kl_shampoo(b1=0.0), [torch.tensor([[2.0, 0.0], [0.0, 1.0]])]
        >>> _, state = tx.update(g, tx.init([torch.zeros(2, 2)]))
        >>> tx.update(g, state)[0][0].round(decimals=3)          # a_1 a_2 = 1 / 0.1 at first
        tensor([[20.,  0.],
                [ 0., 10.]])
    """
    hyper = _checked(b1, b2, b3, eps, frequency, init, max_size, merged)
    cutting = Cutting(max_size, blocks, merged)
    return _stage(cutting, _shampoos, False, init, frequency, hyper)


@transformation
def scale_by_kl_soap(
    b1: ScalarOrSchedule = 0.9,
    b2: ScalarOrSchedule = 0.98,
    eps: ScalarOrSchedule = 1e-8,
    frequency: int = 10,
    *,
    b3: ScalarOrSchedule | None = None,
    init: float = 0.1,
    max_size: int = 10000,
    blocks: bool = False,
    merged: int = 0,
) -> GradientTransformation:
    """Adam in the eigenbasis of the factors of KL-Shampoo, without correction for its start at 0.

    The rule is at the top of `functorch_opt.optimizers.kl_shampoo`.

    Args:
        b1, frequency, init, max_size, blocks, merged: see `scale_by_kl_shampoo`.
        b2: decay of the second moment, in [0, 1).
        eps: added outside the root, 0 or greater.
        b3: decay of factors and eigenvalues, in [0, 1). None means `b2`.

    Raises:
        ValueError: an argument outside its range.

    Source: Lin et al., 2025, and the authors' code. NVIDIA's and modded-nanogpt's rules by this name
    are others: they correct for the start, or refresh before the update.

    Example:
        >>> import torch, functorch_opt as fo
        >>> tx, g = fo.scale_by_kl_soap(0.0, 0.75), [torch.tensor([[2.0, 0.0], [0.0, 1.0]])]
        >>> _, state = tx.update(g, tx.init([torch.zeros(2, 2)]))
        >>> tx.update(g, state)[0][0].round(decimals=3)
        tensor([[2., 0.],
                [0., 2.]])
    """
    hyper = _checked(b1, b2, b3, eps, frequency, init, max_size, merged)
    cutting = Cutting(max_size, blocks, merged)
    return _stage(cutting, _adams, True, init, frequency, hyper)


def _optimizer(direction, learning_rate, weight_decay, adam):
    step = step_then_decay(learning_rate, weight_decay)
    return matrices_and_rest(direction, learning_rate, 0.0, adam, step, count_ones=False)


@transformation
def kl_shampoo(
    learning_rate: ScalarOrSchedule,
    b1: ScalarOrSchedule = 0.9,
    b2: ScalarOrSchedule = 0.98,
    eps: ScalarOrSchedule = 1e-8,
    weight_decay: ScalarOrSchedule = 0.01,
    frequency: int = 10,
    *,
    b3: ScalarOrSchedule | None = None,
    init: float = 0.1,
    max_size: int = 10000,
    blocks: bool = False,
    merged: int = 0,
    adam_learning_rate: ScalarOrSchedule | None = None,
) -> GradientTransformation:
    """KL-Shampoo for the tensors with two dims or more, and `adamw` for the rest.

    Dims of size 1 do not count: a matrix with one row or one column is for `adamw`.

    Args:
        learning_rate: 0 or greater, or a schedule.
        b1, b2, eps, frequency, b3, init, max_size, blocks, merged: see `scale_by_kl_shampoo`. The
            first three are those of `adamw` too.
        weight_decay: multiplied by the learning rate; of the matrices, after the step.
        adam_learning_rate: of `adamw`, without decay. None means `learning_rate`.

    Raises:
        ValueError: an argument outside its range; ``update`` called without params.

    Source: Lin et al., 2025, and the authors' code.

    Example:
        >>> import functorch_opt as fo
        >>> fo.kl_shampoo(1e-3)
        kl_shampoo(0.001)
    """
    options: dict[str, Any] = {"b3": b3, "init": init, "max_size": max_size}
    options |= {"blocks": blocks, "merged": merged}
    direction = scale_by_kl_shampoo(b1, b2, eps, frequency, **options)
    adam = {"learning_rate": adam_learning_rate, "b1": b1, "b2": b2, "eps": eps}
    return _optimizer(direction, learning_rate, weight_decay, adam)


@transformation
def kl_soap(
    learning_rate: ScalarOrSchedule,
    b1: ScalarOrSchedule = 0.9,
    b2: ScalarOrSchedule = 0.98,
    eps: ScalarOrSchedule = 1e-8,
    weight_decay: ScalarOrSchedule = 0.01,
    frequency: int = 10,
    *,
    b3: ScalarOrSchedule | None = None,
    init: float = 0.1,
    max_size: int = 10000,
    blocks: bool = False,
    merged: int = 0,
    adam_learning_rate: ScalarOrSchedule | None = None,
) -> GradientTransformation:
    """KL-SOAP for the tensors with two dims or more, and `adamw` for the rest.

    Dims of size 1 do not count, as in `kl_shampoo`.

    Args:
        learning_rate, weight_decay, adam_learning_rate: see `kl_shampoo`.
        b1, b2, eps, frequency, b3, init, max_size, blocks, merged: see `scale_by_kl_soap`. The
            first three are those of `adamw` too.

    Raises:
        ValueError: an argument outside its range; ``update`` called without params.

    Source: Lin et al., 2025, and the authors' code.

    Example:
        >>> import functorch_opt as fo
        >>> fo.kl_soap(1e-3)
        kl_soap(0.001)
    """
    options: dict[str, Any] = {"b3": b3, "init": init, "max_size": max_size}
    options |= {"blocks": blocks, "merged": merged}
    direction = scale_by_kl_soap(b1, b2, eps, frequency, **options)
    adam = {"learning_rate": adam_learning_rate, "b1": b1, "b2": b2, "eps": eps}
    return _optimizer(direction, learning_rate, weight_decay, adam)
