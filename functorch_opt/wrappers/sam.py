"""Sharpness-aware minimization: the gradient is taken where the loss is worst nearby.

    q = p + rho g(p) / norm(g(p))        the adversarial step, of another optimizer
    p = p + optimizer(g(q))

ASAM measures nearness relative to the parameters:

    q = p + rho T^2 g(p) / norm(T g(p))                      T = |p| + eta, for each element

Sources: Foret, Kleiner, Mobahi & Neyshabur, "Sharpness-Aware Minimization for Efficiently Improving
Generalization", 2021, alg. 1; Kwon, Kim, Park & Choi, "ASAM: Adaptive Sharpness-Aware
Minimization for Scale-Invariant Learning of Deep Neural Networks", 2021, alg. 1.
"""

from __future__ import annotations

from typing import Any

import torch

from functorch_opt import tree
from functorch_opt._core.chain import chain
from functorch_opt._core.gate import gate
from functorch_opt._core.groups import MaskOrFn, masked
from functorch_opt._core.leaf import Each
from functorch_opt._core.numerics import copied
from functorch_opt._core.transformation import (
    GradientTransformation,
    Scalar,
    apply_updates,
    check_range,
    check_whole,
    transformation,
)
from functorch_opt._core.wrap import wrap
from functorch_opt.transforms.scale import (
    normalize,
    scale_by_learning_rate,
    scale_by_param_size,
)

__all__ = ["asam", "sam"]


@transformation
def sam(
    optimizer: GradientTransformation,
    adv_optimizer: GradientTransformation,
    sync_period: int = 2,
    reset_state: bool = True,
    opaque_mode: bool = False,
) -> GradientTransformation:
    """`optimizer`, with gradients of where `adv_optimizer`, reversed, has led.

    Of k updates the first k - 1 move the parameters by the adversarial steps. The k-th one takes
    them back to where they were, and from there by a step of `optimizer`, with the gradient of
    where they have been. In between, `eval_params` gives the parameters as they were. The paper's
    method is ``sam(opt, chain(normalize(), sgd(rho)))``.

    With `opaque_mode` each update does it all, and calls ``grad_fn`` k - 1 times, an extra argument
    of ``update``: a function of the params and of the number of the adversarial step.

    Args:
        optimizer: it makes the steps that remain.
        adv_optimizer: its steps are taken with the other sign, upwards.
        sync_period: k, 1 or greater.
        reset_state: whether the state of `adv_optimizer` begins anew after every k updates. If it
            has a state, this part of a compiled step runs eagerly.
        opaque_mode: whether all of it is one update.

    Raises:
        ValueError: `sync_period` is not a whole number from 1; `opaque_mode` without `reset_state`;
            ``update`` called without params.
        TypeError: an optimizer is not a transformation; ``update`` called without grad_fn in
            `opaque_mode`.

    Source: Foret et al., 2021, alg. 1. optax 0.2.8 takes the parameters of the last step for those
    of this one if k is 1. Ranks average ``grad_fn`` themselves: there is no ``batch_axis_name``.

    Example:
        >>> import torch, functorch_opt as fo
        >>> tx = fo.sam(fo.sgd(0.5), fo.chain(fo.normalize(), fo.sgd(0.1)), opaque_mode=True)
        >>> gradient = torch.func.grad(lambda p: (p**2).sum() / 2)
        >>> p = torch.tensor([3.0, 4.0])
        >>> updates, _ = tx.update(gradient(p), tx.init(p), p, grad_fn=lambda q, i: gradient(q))
        >>> updates
        tensor([-1.5300, -2.0400])
    """
    for what, tx in (("optimizer", optimizer), ("adv_optimizer", adv_optimizer)):
        if not isinstance(tx, GradientTransformation):
            raise TypeError(
                f"{what} must be a transformation, e.g. sgd(0.1); "
                f"got {type(tx).__name__} {tx!r}."
            )
    check_whole(1, sync_period=sync_period)
    if opaque_mode:
        if not reset_state:
            raise ValueError(
                "with opaque_mode=True the adversarial steps begin anew at every update: "
                "leave reset_state=False out, or write opaque_mode=False."
            )
        return at_once(optimizer, adv_optimizer, sync_period)
    if reset_state and sync_period > 1 and has_state(adv_optimizer):
        adv_optimizer = begun_anew(adv_optimizer, sync_period - 1)
    return one_by_one(optimizer, adv_optimizer, sync_period)


@transformation
def asam(
    optimizer: GradientTransformation,
    rho: Scalar = 0.5,
    eta: Scalar = 0.01,
    mask: MaskOrFn | None = None,
    sync_period: int = 2,
    opaque_mode: bool = False,
) -> GradientTransformation:
    """`sam`, whose adversarial step is longer for large parameters, so that their scale is nothing.

    The rule is at the top of `functorch_opt.wrappers.sam`. The adversarial step is that of
    ``chain(scale_by_param_size(eta), normalize(), scale_by_param_size(eta),
    scale_by_learning_rate(rho))``.

    Args:
        optimizer: it makes the steps that remain.
        rho: the length of the adversarial step, 0 or greater.
        eta: added to the size of a parameter, 0 or greater.
        mask: for which parameters T is as above, see `masked`; by default all. For others it is 1;
            the authors' code has it so for all whose names lack "weight".
        sync_period, opaque_mode: see `sam`.

    Raises:
        ValueError: an argument outside its range; ``update`` called without params.
        TypeError: `optimizer` is not a transformation.

    Source: Kwon et al., 2021, alg. 1.

    Example:
        >>> import torch, functorch_opt as fo
        >>> tx = fo.asam(fo.sgd(0.5), rho=0.1, eta=0.0, opaque_mode=True)
        >>> gradient = torch.func.grad(lambda p: (p**2).sum() / 2)
        >>> p = torch.tensor([3.0, 4.0])
        >>> updates, _ = tx.update(gradient(p), tx.init(p), p, grad_fn=lambda q, i: gradient(q))
        >>> updates
        tensor([-1.5735, -2.1743])
    """
    check_range(0, float("inf"), rho=rho, eta=eta)
    sized = scale_by_param_size(eta)
    if mask is not None:
        sized = masked(sized, mask)
    adversary = chain(sized, normalize(), sized, scale_by_learning_rate(rho))
    return sam(optimizer, adversary, sync_period, True, opaque_mode)


def one_by_one(
    optimizer: GradientTransformation, adversary: GradientTransformation, k: int
) -> GradientTransformation:
    """Every update is an adversarial step, or that of the optimizer."""

    def prepare(count):
        return {"first": count % k == 0, "due": count % k == k - 1}

    def before(p, kept, first, due):
        # The parameters as they were: if they are set from outside, it is at the first step.
        return torch.where(due & ~first, kept.to(p.dtype), p)

    def after(u, p, kept, first, due):
        kept = torch.where(first, p.to(kept.dtype), kept)
        moved = (kept + u).to(kept.dtype)
        return torch.where(due, moved - p, -u), {"kept": torch.where(due, moved, kept)}

    descent = wrap(
        gate(optimizer, lambda count: count % k == k - 1, otherwise="pass"),
        slots={"kept": copied},
        prepare=prepare,
        before=before,
        after=after,
        point=lambda kept: kept,
        last=True,
    )
    ascent = gate(adversary, lambda count: count % k != k - 1, otherwise="pass")
    return chain(ascent, descent)


def at_once(
    optimizer: GradientTransformation, adversary: GradientTransformation, k: int
) -> GradientTransformation:
    """Every update makes all steps."""

    def prepare(updates, params, *, grad_fn):
        state, at, g = adversary.init(params), params, updates
        for i in range(k - 1):
            moves, state = adversary.update(g, state, at)
            at = apply_updates(at, tree.map(torch.neg, moves))
            g = grad_fn(at, i)
        return {"sharp": Each(g)}

    return wrap(optimizer, prepare=prepare, before=lambda g, sharp: sharp)


def has_state(tx: GradientTransformation) -> bool:
    """Whether a transformation remembers anything; if it cannot be asked, it may."""
    try:
        return bool(tree.leaves(tx.init(torch.zeros(1))))
    except (TypeError, ValueError):  # it has masks or labels for other params
        return True


def begun_anew(tx: GradientTransformation, k: int) -> GradientTransformation:
    """`tx`, whose state is the first one again at each k-th update."""

    def init(params):
        return {"count": tree.zero_count(params), "inner": tx.init(params)}

    def update(updates, state, params=None, **extra: Any):
        first = state["count"] % k == 0
        inner = tree.map(
            lambda new, old: torch.where(first, new, old),
            tx.init(updates if params is None else params),
            state["inner"],
        )
        updates, inner = tx.update(updates, inner, params, **extra)
        return updates, {"count": state["count"] + 1, "inner": inner}

    return GradientTransformation(init, update, extra_args=tx.extra_args)
