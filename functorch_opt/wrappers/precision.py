"""A float32 copy of low-precision parameters, in which small steps add up."""

from __future__ import annotations

import torch

from functorch_opt import tree
from functorch_opt._core.transformation import GradientTransformation, transformation
from functorch_opt._core.wrap import wrap

__all__ = ["keep_master_weights"]


@transformation
def keep_master_weights(inner: GradientTransformation) -> GradientTransformation:
    """Run `inner` on a float32 copy of the parameters. They are always this copy, rounded once.

        m' = m + inner(g, m)        u = m' - p        p + u = m'  is rounded to the dtype of p

    The copy is in the state. Every stage of `inner`, weight decay too, sees it as the parameters.
    So bfloat16 training takes the steps that float32 training would take with the same gradients.
    Without the copy, ``p + u`` would lose every step below 1/512 of ``p``.

    The new copy is ``p + u``, computed in float32. If a step changes a parameter to less than half
    or more than twice of what it was, this is ``m'`` rounded once more, at the scale of the larger
    of the two. A parameter that was set from outside (clamped or loaded) is no longer the rounded
    copy, and is taken as it is. A parameter that overflows its dtype is lost together with its
    copy: it becomes inf, and then NaN.

    It looks at the new parameters, so it comes last in a chain. Only `params_ema` may follow, which
    then averages the copy. For parameters of float32 and wider it makes a plain copy, which costs
    memory and changes nothing else; leave them out with `partition`.

    Args:
        inner: a whole optimizer, with its learning rate.

    Raises:
        TypeError: `inner` is not a transformation.
        ValueError: ``update`` called without params.

    Source: Micikevicius et al., "Mixed Precision Training", 2018, sec. 3.1.

    Example:
        >>> import torch, functorch_opt as fo
        >>> params = {"w": torch.tensor(1.0, dtype=torch.bfloat16)}
        >>> def after_1000_steps(tx, p):
        ...     state = tx.init(p)
        ...     for _ in range(1000):
        ...         updates, state = tx.update({"w": torch.ones_like(p["w"])}, state, p)
        ...         p = fo.apply_updates(p, updates)
        ...     return p["w"]
        >>> after_1000_steps(fo.sgd(5e-4), params)
        tensor(1., dtype=torch.bfloat16)
        >>> after_1000_steps(fo.keep_master_weights(fo.sgd(5e-4)), params)
        tensor(0.5000, dtype=torch.bfloat16)
    """
    if not isinstance(inner, GradientTransformation):
        raise TypeError(
            "keep_master_weights takes a transformation, e.g. adamw(1e-3); "
            f"got {type(inner).__name__} {inner!r}."
        )

    def first(p):
        return p.to(tree.at_least_float32(p.dtype), copy=True)

    def before(p, master):
        # If p is not what the copy rounds to, somebody has set it from outside, and p counts.
        return torch.where(master.to(p.dtype) == p, master, p.to(master.dtype))

    def after(u, p, master):
        # The new copy is p + u in float32, before it is rounded.
        wide = p.to(master.dtype)
        u = (before(p, master) + u).to(master.dtype) - wide
        return u, {"master": wide + u}

    slots = {"master": first}
    return wrap(
        inner, slots=slots, before=before, after=after, init_with="master", last=True
    )
