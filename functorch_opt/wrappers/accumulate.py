"""Accumulation: the optimizer makes a step with the mean gradient of several small batches."""

from __future__ import annotations

import torch

from functorch_opt import tree
from functorch_opt._core.gate import gate
from functorch_opt._core.transformation import GradientTransformation, transformation
from functorch_opt._core.wrap import wrap

__all__ = ["MultiSteps"]


@transformation
def MultiSteps(
    opt: GradientTransformation, every_k_schedule: int, use_grad_mean: bool = True
) -> GradientTransformation:
    """Gather the gradients of k steps, and let `opt` make a step with their mean at each k-th.

        acc' = acc + (g - acc) / n        n = 1 ... k
        at n = k:  u = opt(acc'), acc' = 0          before:  u = 0

    The other steps cost one addition. `opt` is not run at them, and its counts and schedules stay
    where they are. The mean is kept in the dtype of the parameters, but at least in float32.

    If a parameter has no gradient at some of the k steps, its mean stays as it is there, and each
    later gradient still counts 1/n. If it has none at the k-th step, the parameter does not move,
    and what it has gathered is not cleared. A sum then goes on in the next k steps. A mean is
    replaced by the gradient of their first step, if there is one.

    Args:
        opt: the optimizer that makes the steps.
        every_k_schedule: k, 1 or greater.
        use_grad_mean: whether to take the mean of the gradients; if False, their sum.

    Raises:
        ValueError: `every_k_schedule` is not a whole number, or less than 1.
        TypeError: `opt` is not a transformation.

    Source: optax.MultiSteps.

    Example:
        >>> import torch, functorch_opt as fo
        >>> tx = fo.MultiSteps(fo.sgd(1.0), 2)
        >>> state = tx.init([torch.zeros(1)])
        >>> for g in (1.0, 3.0):
        ...     updates, state = tx.update([torch.tensor([g])], state)
        ...     print(updates)
        [tensor([0.])]
        [tensor([-2.])]
    """
    k = every_k_schedule
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ValueError(f"every_k_schedule must be a whole number from 1; got {k!r}.")

    def prepare(count):
        n = count % k
        return {
            "part": 1 / (tree.as_real(n) + 1) if use_grad_mean else 1.0,
            "due": n == k - 1,
        }

    def added(g, acc, part):
        total = acc + (g - acc) * part if use_grad_mean else acc + g
        return total.to(acc.dtype)  # `part` is float64, which a 0-dim tensor would become

    def after(u, g, acc, part, due):
        acc = added(g, acc, part)
        return u, {"acc": torch.where(due, torch.zeros_like(acc), acc)}

    inner = gate(opt, lambda count: count % k == k - 1)
    return wrap(
        inner, slots={"acc": tree.zeros_like}, prepare=prepare, before=added, after=after
    )
