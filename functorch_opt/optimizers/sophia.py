"""Sophia: the mean gradient over the diagonal of the Hessian, clipped.

    mu = b1 mu + (1 - b1) g                                mu_hat = mu / (1 - b1^t)
    u  = clip(mu_hat / max(gamma nu, eps), -clip_threshold, clip_threshold)
    every k-th step:  nu = b2 nu + (1 - b2) h              h: an estimate of the diagonal

The nu of a step is that of the step before, as in optax.

Source: Liu, Li, Hall, Liang & Ma, "Sophia: A Scalable Stochastic Second-order Optimizer for Language
Model Pre-training", 2023, alg. 3, with alg. 1 for h (Hutchinson). There mu is not corrected, and nu
is brought up to date before it is used.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.func import grad, jvp

from functorch_opt import random, tree
from functorch_opt._core import sharding
from functorch_opt._core.chain import chain
from functorch_opt._core.decision import known
from functorch_opt._core.groups import MaskOrFn
from functorch_opt._core.leaf import Each
from functorch_opt._core.rule import leafwise
from functorch_opt._core.transformation import (
    GradientTransformation,
    Scalar,
    ScalarOrSchedule,
    check_range,
    check_whole,
    transformation,
)
from functorch_opt.transforms.decay import add_decayed_weights
from functorch_opt.transforms.scale import scale_by_learning_rate
from functorch_opt.tree import PyTree

__all__ = ["hutchinson_estimator_diag_hessian", "scale_by_sophia", "sophia"]

Estimator = Callable[[Callable[[PyTree], Tensor], PyTree, Tensor], PyTree]


def hutchinson_estimator_diag_hessian(
    obj_fn: Callable[[PyTree], Tensor], params: PyTree, key: Tensor | int
) -> PyTree:
    """An unbiased estimate of the diagonal of the Hessian, ``z * (H z)`` with random signs z.

    Args:
        obj_fn: the loss as a function of the params.
        params: a tree of tensors; complex numbers count as pairs of reals.
        key: a key of `functorch_opt.random`, or a seed.

    Returns:
        A tree of the structure of the params.

    Raises:
        TypeError: `key` is no key.
        NotImplementedError: some parameter is sharded.

    Source: Liu et al., 2023, alg. 1, with signs in place of normal numbers, as optax has it, where
    this is a transformation.

    Example:
        >>> import torch, functorch_opt as fo
        >>> def loss(x):
        ...     return (torch.tensor([1.0, 3.0]) * x**2).sum()
        >>> fo.hutchinson_estimator_diag_hessian(loss, torch.ones(2), 0)
        tensor([2., 6.])
    """
    ps, spec = tree.flatten(params)
    sharding.refuse_sharded("hutchinson_estimator_diag_hessian", ps)
    key = random.as_key(key)
    there = [i for i, p in enumerate(ps) if p is not None]
    reals = [torch.view_as_real(p) if p.is_complex() else p for p in tree.leaves(params)]

    def as_given(xs):
        """The tree of the params, of real tensors in which complex numbers are pairs."""
        filled = list(ps)
        for i, x in zip(there, xs, strict=True):
            if ps[i].is_complex():
                x = torch.complex(*x.unbind(-1))
            filled[i] = x
        return tree.unflatten(spec, filled)

    def objective(xs: list[Tensor]) -> Tensor:
        return obj_fn(as_given(xs))

    keys = [random.fold_in(key, i) for i in there]
    z = [signs_like(x, each) for x, each in zip(reals, keys, strict=True)]
    product = jvp(grad(objective), (reals,), (z,))[1]
    return as_given([x * y for x, y in zip(product, z, strict=True)])


def signs_like(p: Tensor, key: Tensor) -> Tensor:
    """Each element is 1 or -1."""
    bits = random.bits(key, tuple(p.shape))
    return torch.where(bits < 0, -1.0, 1.0).to(p.dtype)


@transformation
def scale_by_sophia(
    b1: ScalarOrSchedule = 0.965,
    b2: ScalarOrSchedule = 0.99,
    eps: ScalarOrSchedule = 1e-8,
    gamma: ScalarOrSchedule = 0.01,
    clip_threshold: Scalar | None = 1.0,
    update_interval: int = 10,
    hessian_diagonal_fn: Estimator = hutchinson_estimator_diag_hessian,
    mu_dtype: torch.dtype | None = None,
    *,
    key: Tensor | int,
) -> GradientTransformation:
    """``u = clip(mu_hat / max(gamma nu, eps))``, where nu is a mean of estimated Hessian diagonals.

    The rule is at the top of `functorch_opt.optimizers.sophia`. Extra argument of ``update``:
    ``obj_fn``, the loss as a function of the params. It is called at each k-th step only, if the
    host knows the count; otherwise at each.

    Args:
        b1: decay of the mean gradient, in [0, 1).
        b2: decay of the mean diagonal, in [0, 1).
        eps: the smallest divisor, greater than 0.
        gamma: multiplies the diagonal, 0 or greater.
        clip_threshold: the largest element of an update, greater than 0; None does not clip.
        update_interval: k, 1 or greater.
        hessian_diagonal_fn: a function of ``obj_fn``, the params and a key, that returns a tree like
            the params: the diagonal of the Hessian, or an estimate of it such as Gauss-Newton's.
        mu_dtype: dtype in which ``mu`` is stored; by default that of the params, at least float32.
        key: of the random signs, a key of `functorch_opt.random` or a seed.

    Raises:
        ValueError: an argument outside its range; ``update`` called without params.
        TypeError: ``update`` called without obj_fn.

    Source: Liu et al., 2023, alg. 3; optax has the same numbers.

    Example:
        >>> import torch, functorch_opt as fo
        >>> def loss(x):
        ...     return (torch.tensor([1.0, 3.0]) * x**2).sum()
        >>> tx = fo.scale_by_sophia(b2=0.0, gamma=1.0, update_interval=1, key=0)
        >>> p, g = torch.tensor([1.0, -0.5]), torch.tensor([2.0, -3.0])
        >>> _, state = tx.update(g, tx.init(p), p, obj_fn=loss)
        >>> tx.update(g, state, p, obj_fn=loss)[0]
        tensor([ 1.0000, -0.5000])
    """
    check_range(0, 1, b1=b1, b2=b2)
    check_range(0, float("inf"), gamma=gamma)
    check_range(0, float("inf"), above=True, eps=eps)
    if clip_threshold is not None:
        check_range(0, float("inf"), above=True, clip_threshold=clip_threshold)
    check_whole(1, update_interval=update_interval)

    def prepare(updates, params, count, key, b1, *, obj_fn):
        due, h = count % update_interval == 0, updates
        if known(due) is not False:
            h = hessian_diagonal_fn(obj_fn, params, random.fold_in(key, count))
        c1 = 1 - b1 ** tree.as_real(count + 1)
        return {"h": Each(h), "due": due, "c1": c1}

    def rule(g, mu, nu, h, due, c1, b1, b2, eps, gamma, bound):
        mu = torch.lerp(mu, g, 1 - b1)
        u = mu / c1 / torch.clamp(gamma * nu, min=eps)
        u = u if clip_threshold is None else torch.clamp(u, -bound, bound)
        return u, {"mu": mu, "nu": torch.where(due, torch.lerp(nu, h, 1 - b2), nu)}

    bound = 1.0 if clip_threshold is None else clip_threshold
    return leafwise(
        rule,
        prepare,
        slots={"mu": partial(tree.zeros_like, dtype=mu_dtype), "nu": tree.zeros_like},
        shared={"key": random.as_key(key)},
        hyper={"b1": b1, "b2": b2, "eps": eps, "gamma": gamma, "bound": bound},
    )


@transformation
def sophia(
    learning_rate: ScalarOrSchedule,
    b1: ScalarOrSchedule = 0.965,
    b2: ScalarOrSchedule = 0.99,
    eps: ScalarOrSchedule = 1e-8,
    weight_decay: ScalarOrSchedule = 1e-4,
    weight_decay_mask: MaskOrFn | None = None,
    gamma: ScalarOrSchedule = 0.01,
    clip_threshold: Scalar | None = 1.0,
    update_interval: int = 10,
    hessian_diagonal_fn: Estimator = hutchinson_estimator_diag_hessian,
    mu_dtype: torch.dtype | None = None,
    *,
    key: Tensor | int,
) -> GradientTransformation:
    """Sophia: `scale_by_sophia`, decoupled weight decay, then the learning rate.

    Args:
        learning_rate: 0 or greater, or a schedule.
        b1, b2, eps, gamma, clip_threshold, update_interval: see `scale_by_sophia`.
        weight_decay: multiplied by the learning rate.
        weight_decay_mask: which parameters decay, see `masked`; by default all.
        hessian_diagonal_fn, mu_dtype, key: see `scale_by_sophia`.

    Raises:
        ValueError: an argument outside its range; ``update`` called without params.
        TypeError: ``update`` called without obj_fn.

    Source: Liu et al., 2023, alg. 3.

    Example:
        >>> import torch, functorch_opt as fo
        >>> def loss(x):
        ...     return (torch.tensor([1.0, 300.0]) * x**2).sum()
        >>> tx, p = fo.sophia(0.05, key=0), torch.tensor([1.0, 1.0])
        >>> state = tx.init(p)
        >>> for _ in range(200):
        ...     updates, state = tx.update(torch.func.grad(loss)(p), state, p, obj_fn=loss)
        ...     p = fo.apply_updates(p, updates)
        >>> bool(p.abs().max() < 0.1)
        True
    """
    direction = scale_by_sophia(
        b1,
        b2,
        eps,
        gamma,
        clip_threshold,
        update_interval,
        hessian_diagonal_fn,
        mu_dtype,
        key=key,
    )
    return chain(
        direction,
        add_decayed_weights(weight_decay, weight_decay_mask),
        scale_by_learning_rate(learning_rate),
    )
