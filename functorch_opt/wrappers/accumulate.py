"""Accumulation: the optimizer makes a step with the mean gradient of several small batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from functorch_opt import tree
from functorch_opt._core import numerics
from functorch_opt._core.gate import Gate, gate
from functorch_opt._core.rule import leafwise
from functorch_opt._core.transformation import (
    GradientTransformation,
    check_whole,
    transformation,
)
from functorch_opt._core.wrap import Wrap, wrap
from functorch_opt.tree import PyTree

__all__ = ["MultiSteps", "apply_every"]

K = int | Callable[[Any], Any]


class Asked(GradientTransformation):
    """What can be asked of `MultiSteps`, as in optax."""

    k: K
    inner_opt: GradientTransformation
    """The optimizer that makes the steps."""

    def gradient_transformation(self) -> GradientTransformation:
        """Itself: here it is a transformation already."""
        return self

    def has_updated(self, state: PyTree) -> Tensor:
        """Whether the update before this `state` was a step of the optimizer, a 0-dim bool tensor.

        A gradient that was left out changes no answer.
        """
        mine = "gate" if "gate" in state else "kept"
        shared = state[mine].shared
        if callable(self.k) or "mini_step" in shared:
            gathered = shared["mini_step"]
            steps = shared["gradient_step"]
        else:
            clock = shared["clock"]
            gathered = clock % self.k
            steps = clock // self.k
        return (gathered == 0) & (steps > 0)


class AskedWrap(Asked, Wrap):
    """A `MultiSteps` that is a wrap."""

    def __init__(self, made: Wrap, k: K, opt: GradientTransformation) -> None:
        Wrap.__init__(
            self,
            made.inner,
            made.once,
            made.slots,
            made.before,
            made.after,
            made.point,
            made.init_with,
            made.last,
        )
        self.k, self.inner_opt = k, opt


class AskedGate(Asked, Gate):
    """A `MultiSteps` that leaves gradients out."""

    def __init__(self, made: Gate, k: K, opt: GradientTransformation) -> None:
        Gate.__init__(
            self,
            made.inner,
            made.once,
            made.otherwise,
        )
        self.k, self.inner_opt = k, opt
        self.why = made.why
        self.skips = made.skips


@transformation
def MultiSteps(
    opt: GradientTransformation,
    every_k_schedule: K,
    use_grad_mean: bool = True,
    should_skip_update_fn: Callable[..., Any] | None = None,
    *,
    weighted: bool = False,
    flushes: bool = False,
) -> AskedWrap | AskedGate:
    """Gather the gradients of k steps, and let `opt` make a step with their mean at each k-th.

        acc' = acc + (g - acc) / n        n = 1 ... k
        at n = k:  u = opt(acc'), acc' = 0          before:  u = 0

    The other steps cost one addition. `opt` is not run at them, and its counts and schedules stay
    where they are. The mean is kept in the dtype of the parameters, but at least in float32.

    If a parameter has no gradient at some of the k steps, its mean stays as it is there, and each
    later gradient still counts 1/n. If it has none at the k-th step, the parameter does not move,
    and what it has gathered is not cleared. A sum then goes on in the next k steps. A mean is
    replaced by the gradient of their first step, if there is one.

    With `weighted`, ``update`` takes ``weight``, such as the number of tokens of the small batch.
    The step is then made with the mean over tokens, ``(sum of weight g) / (sum of weight)``. With
    `flushes`, `weighted` or a schedule, ``update`` takes ``flush``. Give ``flush=True`` with the
    last small batch of the training: the step is made with what has been gathered until then, and
    the next k steps begin anew.

    What it returns has what optax's class has: ``has_updated(state)`` says whether the last update
    was a step of `opt`, ``gradient_transformation()`` returns the transformation itself, and
    ``inner_opt`` is `opt`.

    Args:
        opt: the optimizer that makes the steps.
        every_k_schedule: k, 1 or greater; or a function of how many steps `opt` has made.
        use_grad_mean: whether to take the mean of the gradients; if False, their sum.
        should_skip_update_fn: a function of the updates, of how many steps `opt` has made, and of
            the params, or None. It returns a pair whose first part says whether to leave this
            gradient out, a 0-dim bool tensor: `skip_not_finite`, `skip_large_updates`. A gradient
            that is left out does not count as one of the k, and flushes nothing. The state counts
            them as ``skipped``, which optax does not.
        weighted: whether gradients have weights.
        flushes: whether ``update`` takes ``flush``.

    Raises:
        ValueError: `every_k_schedule` is a number that is not whole, or less than 1.
        TypeError: `opt` is not a transformation.

    Source: optax.MultiSteps, which runs `opt` at every step. It has no weights and no flush, and
    keeps the second part of what `should_skip_update_fn` returns.

    Example:
        >>> import torch, functorch_opt as fo
        >>> tx = fo.MultiSteps(fo.sgd(1.0), 2)
        >>> state = tx.init([torch.zeros(1)])
        >>> for g in (1.0, 3.0):
        ...     updates, state = tx.update([torch.tensor([g])], state)
        ...     print(updates)
        [tensor([0.])]
        [tensor([-2.])]
        >>> tx.has_updated(state)
        tensor(True)
        >>> tx = fo.MultiSteps(fo.sgd(1.0), 8, weighted=True)
        >>> _, state = tx.update([torch.ones(1)], tx.init([torch.zeros(1)]), weight=30)
        >>> tx.update([torch.zeros(1)], state, weight=10, flush=True)[0]
        [tensor([-0.7500])]
    """
    k = every_k_schedule
    if not callable(k):
        check_whole(1, every_k_schedule=k)
    if weighted or flushes or callable(k):
        counter = Counter(k)
        tx = with_counter(opt, counter, use_grad_mean, weighted)
    else:
        counter = None
        tx = every_kth(opt, k, use_grad_mean)
    if should_skip_update_fn is None:
        return AskedWrap(tx, k, opt)
    has_flush, counter = counter is not None, counter or Counter(k)
    return AskedGate(left_out(tx, should_skip_update_fn, counter, has_flush), k, opt)


def every_kth(opt: GradientTransformation, k: int, use_grad_mean: bool) -> Wrap:
    """The plain form, which needs nothing but the count."""

    def prepare(count):
        n = count % k
        return {
            "part": 1 / (tree.as_real(n) + 1) if use_grad_mean else 1.0,
            "due": n == k - 1,
        }

    inner = gate(opt, lambda count: count % k == k - 1)
    inner.explained("gathering", lambda shared: shared["clock"] - shared["clock"] // k)
    return gathering(inner, prepare, use_grad_mean, {})


def gathering(
    inner: GradientTransformation, prepare: Any, use_grad_mean: bool, shared: Any
) -> Wrap:
    """A wrap that gathers with the ``part`` of `prepare`, and begins anew where it is ``due``."""

    def added(g, acc, part):
        total = acc + (g - acc) * part if use_grad_mean else acc + g * part
        return total.to(acc.dtype)  # `part` is float64, which a 0-dim tensor would become

    def after(u, g, acc, part, due):
        acc = added(g, acc, part)
        return u, {"acc": torch.where(due, torch.zeros_like(acc), acc)}

    return wrap(
        inner,
        slots={"acc": tree.zeros_like},
        shared=shared,
        prepare=prepare,
        before=added,
        after=after,
    )


# ---- k of a schedule, weights, a flush ---------------------------------------------------------


class Counter:
    """How many gradients have been gathered, and how many steps have been made of them."""

    def __init__(self, k: K) -> None:
        self.k = k
        zero = torch.zeros((), dtype=torch.int64)
        self.shared = {"mini_step": zero, "gradient_step": zero}

    def next(self, mini_step: Any, gradient_step: Any, flush: Any) -> tuple[Any, Any]:
        """Whether a step is due with this gradient, and the next counts."""
        k = self.k(gradient_step) if callable(self.k) else self.k
        due = (mini_step >= k - 1) | numerics.beside(flush, mini_step)
        mini_step = torch.where(due, 0, mini_step + 1)
        return due, {"mini_step": mini_step, "gradient_step": gradient_step + due}


def with_counter(
    opt: GradientTransformation, counter: Counter, use_grad_mean: bool, weighted: bool
) -> Wrap:
    """The form whose steps do not come at every k-th count."""

    def active(mini_step, gradient_step, *, flush=False):
        return counter.next(mini_step, gradient_step, flush)

    def prepare(mini_step, gradient_step, *, flush=False):
        due, counts = counter.next(mini_step, gradient_step, flush)
        part = 1 / (tree.as_real(mini_step) + 1) if use_grad_mean else 1.0
        return {"part": part, "due": due}, counts

    def prepare_weighted(mini_step, gradient_step, gathered, *, weight, flush=False):
        due, counts = counter.next(mini_step, gradient_step, flush)
        weight = numerics.beside(weight, gathered, gathered.dtype)
        gathered = gathered + weight
        part = weight / (gathered + (gathered == 0)) if use_grad_mean else weight
        gathered = torch.where(due, 0.0, gathered)
        return {"part": part, "due": due}, {**counts, "gathered": gathered}

    inner = gate(opt, active, shared=counter.shared).explained("gathering")
    # Where this is built inside of a graph, Dynamo does not know that flush has a default.
    for declared in (inner.once.extra_args, inner.extra_args):
        declared["flush"] = False
    if not weighted:
        return gathering(inner, prepare, use_grad_mean, counter.shared)
    shared = {**counter.shared, "gathered": torch.zeros((), dtype=torch.float64)}
    return gathering(inner, prepare_weighted, use_grad_mean, shared)


def left_out(
    tx: GradientTransformation, skip: Callable[..., Any], counter: Counter, flushes: bool
) -> Gate:
    """A gate around `tx`, which is closed for the gradients that `skip` leaves out."""

    def decided(updates, params, mini_step, gradient_step, skipped, flush):
        out = skip(updates, gradient_step, params)[0]
        _, counts = counter.next(mini_step, gradient_step, flush)
        old = {"mini_step": mini_step, "gradient_step": gradient_step}
        counts = {name: torch.where(out, old[name], new) for name, new in counts.items()}
        return ~out, {**counts, "skipped": torch.where(out, skipped + 1, skipped)}

    def active(updates, mini_step, gradient_step, skipped, params=None):
        return decided(updates, params, mini_step, gradient_step, skipped, False)

    def active_with_flush(
        updates, mini_step, gradient_step, skipped, params=None, *, flush=False
    ):
        return decided(updates, params, mini_step, gradient_step, skipped, flush)

    chosen = active_with_flush if flushes else active
    shared = {**counter.shared, "skipped": torch.zeros((), dtype=torch.int64)}
    why = getattr(skip, "__name__", "skip")
    return gate(tx, chosen, shared=shared).explained(
        why, lambda shared: shared["skipped"]
    )


# ---- inside of a chain --------------------------------------------------------------------------


@transformation
def apply_every(k: int = 1) -> GradientTransformation:
    """Gather k updates, and let their sum pass at each k-th step; the updates between are zero.

    The stages before it in a chain have counted every step, and those after it get zero updates.
    To let a whole optimizer step at each k-th step only, see `MultiSteps`.

    Args:
        k: 1 or greater.

    Raises:
        ValueError: `k` is not a whole number, or less than 1.

    Source: optax.apply_every.

    Example:
        >>> import torch, functorch_opt as fo
        >>> tx = fo.apply_every(2)
        >>> state = tx.init([torch.zeros(1)])
        >>> for g in (1.0, 3.0):
        ...     updates, state = tx.update([torch.tensor([g])], state)
        ...     print(updates)
        [tensor([0.])]
        [tensor([4.])]
    """
    check_whole(1, k=k)

    def prepare(count):
        n = count % k
        return {"first": n == 0, "due": n == k - 1}

    def rule(g, acc, first, due):
        acc = g + torch.where(first, torch.zeros_like(acc), acc)
        return torch.where(due, acc, torch.zeros_like(acc)), {"acc": acc}

    return leafwise(rule, prepare, slots={"acc": tree.zeros_like})
