"""What low-precision parameters have lost, so that small steps add up: a copy, or the lost bits."""

from __future__ import annotations

import torch
from torch import Tensor

from functorch_opt import tree
from functorch_opt._core.transformation import GradientTransformation, transformation
from functorch_opt._core.wrap import wrap

__all__ = ["keep_error_bits", "keep_master_weights"]


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


@transformation
def keep_error_bits(
    inner: GradientTransformation, bits: int = 16
) -> GradientTransformation:
    """Run `inner` on wider copies of bfloat16 parameters, of which only the missing bits are kept.

        m = p and its error bits        m' = m + inner(g, m)        p + u  is m' rounded

    A bfloat16 number is the first half of a float32. With 16 more bits a parameter is the exact
    float32 copy of `keep_master_weights`, in two bytes instead of four: 4 bytes for both, as for a
    float32 parameter alone. With 8 bits the copy has 16 bits of precision instead of 24, and steps
    below 1/131,072 of a parameter are lost.

    The bits are the distance from the parameter to the copy, in units of the last place of a
    float32, or of 256 such units. So a parameter that was set from outside is off by half of its
    own rounding error at most. If one step takes a parameter to less than 1/65,536 of what it was,
    the copy is rounded.

    It looks at the new parameters, so it comes last in a chain. Parameters of other dtypes are
    updated as they are, but have error bits too; leave them out with `partition`.

    Args:
        inner: a whole optimizer, with its learning rate.
        bits: 16 or 8.

    Raises:
        TypeError: `inner` is not a transformation.
        ValueError: other bits; ``update`` called without params.

    Source: nanoGPT speedruns keep 16 bits ("mantissa"). Compared with them, and with "bf16+8" of
    heavyball, parameters are rounded to nearest here, and halves away from zero.

    Example:
        >>> import torch, functorch_opt as fo
        >>> p, wide = torch.ones(3, dtype=torch.bfloat16), torch.ones(3)
        >>> tx = fo.keep_error_bits(fo.sgd(5e-4))
        >>> state = tx.init(p)
        >>> for _ in range(1000):
        ...     updates, state = tx.update(torch.ones(3), state, p)
        ...     p = fo.apply_updates(p, updates)
        >>> p
        tensor([0.5000, 0.5000, 0.5000], dtype=torch.bfloat16)
        >>> fo.get(state, "error").dtype
        torch.int16
    """
    if not isinstance(inner, GradientTransformation):
        raise TypeError(
            "keep_error_bits takes a transformation, e.g. adamw(1e-3); "
            f"got {type(inner).__name__} {inner!r}."
        )
    if bits not in (8, 16):
        raise ValueError(f"bits must be 8 or 16; got {bits!r}.")
    dtype = torch.int16 if bits == 16 else torch.int8
    unit = 16 - bits

    def first(p: Tensor) -> Tensor:
        return torch.zeros_like(p, dtype=dtype)

    def before(p, error):
        if p.dtype is not torch.bfloat16:
            return p
        return (_bits(p) + (error.to(torch.int32) << unit)).view(torch.float32)

    def after(u, p, error):
        if p.dtype is not torch.bfloat16:
            return u, {"error": error}
        copy = (before(p, error) + u).to(torch.float32)
        u = _to_bfloat16(copy) - p.to(torch.float32)
        new = (p.to(torch.float32) + u).to(torch.bfloat16)
        off = _bits(copy) - _bits(new)
        if unit:
            off = (off + (1 << (unit - 1))) >> unit
        limits = torch.iinfo(dtype)
        error = torch.where(copy.isfinite(), off, 0).clamp(limits.min, limits.max)
        return u, {"error": error.to(dtype)}

    return wrap(
        inner,
        slots={"error": first},
        before=before,
        after=after,
        init_with=_at_least_float32,
        last=True,
    )


def _at_least_float32(p: Tensor) -> Tensor:
    return p.to(tree.at_least_float32(p.dtype))


def _bits(x: Tensor) -> Tensor:
    """The bits of a number as float32, as an int32."""
    return x.to(torch.float32).view(torch.int32)


def _to_bfloat16(x: Tensor) -> Tensor:
    """The nearest number that bfloat16 has, halves away from zero, as float32.

    So the distance to it always fits into 16 bits. It would not if halves went to even numbers.
    """
    nearest = ((_bits(x) + 0x8000) & ~0xFFFF).view(torch.float32)
    return torch.where(x.isfinite(), nearest, x)
