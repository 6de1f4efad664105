"""GaLore around any optimizer: it sees matrices in few dimensions.

    every update_proj_gap steps: B = the leading singular vectors of the gradient X          [r, M]
    u = scale inner(X B') B                                                  X: tall, see `galore`

Source: Zhao, Zhang, Chen, Wang, Anandkumar & Tian, "GaLore: Memory-Efficient LLM Training by
Gradient Low-Rank Projection", 2024, alg. 1.
"""

from __future__ import annotations

from typing import Any

from functorch_opt import tree
from functorch_opt._core import sharding
from functorch_opt._core.decision import chosen
from functorch_opt._core.transformation import (
    GradientTransformation,
    check_range,
    check_whole,
    transformation,
)
from functorch_opt.optimizers.kronecker import on_host
from functorch_opt.optimizers.low_rank import LowRank
from functorch_opt.optimizers.matrices import ORDINARY, MatrixDims

__all__ = ["project_gradients"]


@transformation
def project_gradients(
    inner: GradientTransformation,
    rank: int = 128,
    update_proj_gap: int = 200,
    scale: float = 0.25,
    *,
    dims: MatrixDims = ORDINARY,
) -> GradientTransformation:
    """`inner` in `rank` dimensions of each matrix, which are found anew now and then.

    The rule is at the top of `functorch_opt.optimizers.projected`. All of the state of `inner` is
    small. It sees the parameters in these dimensions too, so weight decay belongs outside. For Adam
    take `scale_by_galore`, which a compiled step compiles; this wrapper runs eagerly there. Choose
    the matrices with `masked` or `partition`.

    Args:
        inner: any transformation, such as ``scale_by_lion()``.
        rank: of the steps, 1 or greater; at most the shorter side of a matrix counts.
        update_proj_gap: after how many steps there is a new basis, 1 or greater.
        scale: multiplies the steps, 0 or greater.
        dims: which dims are a matrix, see `MatrixDims`; without split.

    Raises:
        ValueError: an argument outside its range; a tensor is no matrix.
        TypeError: `inner` is not a transformation; a parameter is sharded.

    Source: Zhao et al., 2024, alg. 1. optax: the ``base_optimizer`` of ``scale_by_galore``, which
    sees no parameters.

    Example:
        >>> import torch, functorch_opt as fo
        >>> tx, params = fo.project_gradients(fo.trace(0.9), rank=4), [torch.zeros(20, 50)]
        >>> fo.get(tx.init(params), "trace")[0].shape
        torch.Size([50, 4])
    """
    if not isinstance(inner, GradientTransformation):
        raise TypeError(
            "project_gradients takes a transformation, e.g. scale_by_adam(); "
            f"got {type(inner).__name__} {inner!r}."
        )
    check_whole(1, rank=rank, update_proj_gap=update_proj_gap)
    check_range(0, float("inf"), scale=scale)
    if dims.split is not None:
        raise ValueError(f"project_gradients takes no fused matrices; dims is {dims}.")
    space = LowRank(rank, dims)
    first = space.slots()

    def back(u, like, basis):
        return scale * space.back(u.to(basis.dtype) @ basis, like)

    def found(basis, g):
        return basis if g is None else space.leading(g.to(basis.dtype), basis)[0]

    def init(params):
        sharding.refuse_sharded("project_gradients", tree.leaves(params))
        small = tree.map(lambda p: space.projected(p, first["basis"](p)), params)
        bases = tree.map(first["basis"], params)
        count = tree.zero_count(params)
        return {"count": count, "basis": bases, "inner": inner.init(small)}

    def update(updates, state, params=None, **extra: Any):
        bases, due = state["basis"], on_host(state["count"] % update_proj_gap == 0)
        if due is not False:
            new = tree.map(found, bases, updates)
            bases = tree.map(lambda x, old: chosen(due, x, old), new, bases)
        small = tree.map(space.projected, updates, bases)
        seen = None if params is None else tree.map(space.projected, params, bases)
        moved, kept = inner.update(small, state["inner"], seen, **extra)
        moved = tree.map(back, moved, updates, bases)
        return moved, {"count": state["count"] + 1, "basis": bases, "inner": kept}

    return GradientTransformation(init, update, extra_args=inner.extra_args)
