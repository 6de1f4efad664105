"""SOAP: Adam in the eigenbasis of Shampoo's factors.

    first update      L_k = (1 - b3) G_k G_k'            for each dim k; Q_k its eigenvectors; u = 0
    later             h  = G along each dim multiplied by Q_k'                  (for a matrix Q' G Q)
                      mu = b1 mu + (1 - b1) G                          and mh = mu in the same basis
                      nu = b2 nu + (1 - b2) h^2
                      u  = sqrt(1 - b2^t) / (1 - b1^t) mh / (sqrt(nu) + eps),  turned back by Q_k
                      L_k = b3 L_k + (1 - b3) G_k G_k'
    every frequency   Q_k = the orthonormal columns of L_k Q_k, in the order of diag(Q_k' L_k Q_k)

The first update only finds a basis, and t counts those after it.

Source: Vyas, Morwani, Zhao, Kwun, Shapira, Brandfonbrener, Janson & Kakade, "SOAP: Improving and
Stabilizing Shampoo using Adam", 2024, alg. 3, and the authors' code.
"""

from __future__ import annotations

import torch

from functorch_opt import tree
from functorch_opt._core.chain import chain
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
    descending_basis,
    either,
    failed_slot,
    kept_if_not_found,
    next_factors,
    of_first,
    power_iteration,
    step_then_decay,
    turned,
    turned_back,
)

__all__ = ["scale_by_soap", "soap"]


def _next_basis(factor, q, v, dim, fresh):
    """The next basis, and the second moment in its order; the old ones if there is none."""

    def first():
        return descending_basis(factor), v

    def later():
        estimates = (q.mH @ factor @ q).diagonal().real
        order = estimates.argsort(descending=True)
        ordered = q.index_select(-1, order)
        return power_iteration(factor, ordered), v.index_select(dim, order)

    new, turned_v = either(fresh, first, later)
    new, found = kept_if_not_found(new, q)
    return new, torch.where(found, turned_v, v), found


def _refreshed(cutting, like, nu, factors, bases, failed, fresh):
    """What the rare work makes: new bases, and nu in their order."""
    shape, old = like.shape, bases
    taken = cutting.taken(factors, shape), cutting.taken(bases, shape)
    new_bases, vs = [], []
    for fs, qs, v in zip(*taken, cutting.cut(nu), strict=True):
        block = []
        for dim, (f, q) in enumerate(zip(fs, qs, strict=True)):
            if q is not None:
                q, v, found = _next_basis(f, q, v, dim, fresh)
                failed = failed + (~found).to(failed.dtype)
            block.append(q)
        new_bases.append(block)
        vs.append(v)
    kept = cutting.kept(new_bases, old)
    return {"bases": kept, "nu": cutting.joined(vs, like), "failed": failed}


def _in_basis(cutting, g, mu, nu, bases, w1, w2, eps):
    """Adam's update in the basis, turned back; and the moments."""
    mu = torch.lerp(mu, g, w1)
    us, nus = [], []
    columns = [cutting.cut(x) for x in (g, mu, nu)]
    qs = cutting.taken(bases, g.shape)
    for q, x, m, v in zip(qs, *columns, strict=True):
        h = turned(x, q)
        v = torch.lerp(v, (h * h.conj()).real, w2)
        u = turned(m, q) / (v.sqrt() + eps)
        us.append(turned_back(u, q))
        nus.append(v)
    return cutting.joined(us, g), mu, cutting.joined(nus, g)


def _prepare(bias_correction):
    def prepare(count, b1, b2, b3):
        t = tree.as_real(count.clamp(min=1))
        scale = (1 - b2**t) ** 0.5 / (1 - b1**t) if bias_correction else 1.0
        weights = {"w1": 1 - b1, "w2": 1 - b2, "w3": 1 - b3}
        return {**weights, "scale": scale, **of_first(count)}

    return prepare


@transformation
def scale_by_soap(
    b1: ScalarOrSchedule = 0.95,
    b2: ScalarOrSchedule = 0.95,
    eps: ScalarOrSchedule = 1e-8,
    frequency: int = 10,
    *,
    b3: ScalarOrSchedule | None = None,
    max_size: int = 10000,
    blocks: bool = False,
    merged: int = 0,
    vectors: bool = False,
    bias_correction: bool = True,
) -> GradientTransformation:
    """Adam in the eigenbasis of Shampoo's factors; the basis is brought up to date now and then.

    The rule is at the top of `functorch_opt.optimizers.soap`. Between refreshes no decomposition is
    made. The state is ``mu``, ``nu``, ``factors``, ``bases`` (vectors with all matrices of a tensor)
    and ``failed``: how often a basis could not be worked out, so that the last one was kept. The
    authors keep mu in the eigenbasis and turn it at each refresh, which is the same.

    Args:
        b1: decay of the mean, in [0, 1).
        b2: decay of the second moment, in [0, 1).
        eps: added outside the root, 0 or greater.
        frequency: after how many updates the basis is brought up to date, 1 or more.
        b3: decay of the factors, in [0, 1). None means `b2`.
        max_size: the largest dim that has a factor.
        blocks: cut larger dims into blocks of `max_size`. Without it they have no factor.
        merged: merge neighbouring dims while they have at most this size, such as the kernel of a
            convolution. 0: none.
        vectors: whether tensors with one dim have a factor. Without it the rule is Adam for them. A
            matrix with one row or one column has a factor in any case.
        bias_correction: correct the moments for their start at 0.

    Raises:
        ValueError: an argument outside its range.

    Source: Vyas et al., 2024, alg. 3, and the authors' code.

    Example:
        >>> import torch, functorch_opt as fo
        >>> tx, g = fo.scale_by_soap(), [torch.tensor([[3.0, 0.0], [0.0, -0.5]])]
        >>> u, state = tx.update(g, tx.init([torch.zeros(2, 2)]))
        >>> u
        [tensor([[0., 0.],
                [0., 0.]])]
        >>> tx.update(g, state)[0][0].round(decimals=4)
        tensor([[ 1.,  0.],
                [ 0., -1.]])
    """
    check_range(0, 1, b1=b1, b2=b2, b3=b3)
    check_range(0, float("inf"), eps=eps)
    check_whole(1, frequency=frequency, max_size=max_size)
    check_whole(0, merged=merged)
    cutting = Cutting(max_size, blocks, merged, 1 if vectors else 2, count_ones=True)

    def work(g, nu, factors, bases, failed, fresh):
        return _refreshed(cutting, g, nu.real, factors, bases, failed.real, fresh)

    def rule(g, mu, nu, factors, bases, failed, w1, w2, w3, b3, eps, scale, moves):
        def moved():
            u, new_mu, new_nu = _in_basis(cutting, g, mu, nu.real, bases, w1, w2, eps)
            return scale * u, new_mu, new_nu

        def rested():
            return torch.zeros_like(g), mu.clone(), nu.real.clone()

        u, new_mu, new_nu = either(moves, moved, rested)
        new = {"mu": new_mu, "nu": new_nu, "bases": bases.clone()}
        new_factors = next_factors(cutting, g, factors, b3, w3)
        new["factors"] = cutting.kept(new_factors, factors)
        return u, {**new, "failed": failed.real.clone()}

    hyper = {"b1": b1, "b2": b2, "eps": eps, "b3": b2 if b3 is None else b3}
    rare = every(after_first(frequency), work)
    prepare = _prepare(bias_correction)
    slots = _slots(cutting)
    return leafwise(
        rule, prepare, slots=slots, hyper=hyper, every=rare, kind="tensorwise"
    )


def _slots(cutting):
    return {
        "mu": tree.zeros_like,
        "nu": lambda p: tree.zeros_like(p.real),
        "factors": cutting.zeros(),
        "bases": cutting.ones,
        "failed": failed_slot,
    }


@transformation
def soap(
    learning_rate: ScalarOrSchedule,
    b1: ScalarOrSchedule = 0.95,
    b2: ScalarOrSchedule = 0.95,
    eps: ScalarOrSchedule = 1e-8,
    weight_decay: ScalarOrSchedule = 0.01,
    frequency: int = 10,
    *,
    b3: ScalarOrSchedule | None = None,
    max_size: int = 10000,
    blocks: bool = False,
    merged: int = 0,
    vectors: bool = False,
    bias_correction: bool = True,
) -> GradientTransformation:
    """SOAP: `scale_by_soap`, the learning rate, and then weight decay of the new parameters.

    Args:
        learning_rate: 0 or greater, or a schedule; the authors have 3e-3.
        b1, b2, eps, frequency, b3, max_size, blocks, merged, vectors, bias_correction: see
            `scale_by_soap`.
        weight_decay: multiplied by the learning rate. As in the authors' code it shrinks the
            parameters after the step, and not at the first update.

    Raises:
        ValueError: an argument outside its range; ``update`` called without params.

    Source: Vyas et al., 2024, and the authors' code.

    Example:
        >>> import functorch_opt as fo
        >>> fo.soap(3e-3, frequency=1)
        soap(0.003, frequency=1)
    """
    direction = scale_by_soap(
        b1,
        b2,
        eps,
        frequency,
        b3=b3,
        max_size=max_size,
        blocks=blocks,
        merged=merged,
        vectors=vectors,
        bias_correction=bias_correction,
    )
    return chain(direction, step_then_decay(learning_rate, weight_decay))
