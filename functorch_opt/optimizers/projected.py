"""GaLore, Fira and APOLLO around any optimizer: it sees matrices in few dimensions.

    every update_proj_gap steps: B = the leading singular vectors of the gradient X          [r, M]
                                     for APOLLO standard normal / sqrt(r)
    s = X B', and d = inner(s)                                               X: tall, see `galore`
    f = |d| / (|s| + 1e-8)                                                   for each row of s

    galore    u = scale d B
    fira      u = scale d B + w                  w = f (X - scale s B)
    apollo    u = sqrt(scale) w                  w = f X

The norm of w grows by 1% a step at most, as in `fira`.

Sources: Zhao, Zhang, Chen, Wang, Anandkumar & Tian, "GaLore: Memory-Efficient LLM Training by
Gradient Low-Rank Projection", 2024, alg. 1; Chen, Feng, Li, Lai, Yue, Yuan & Wang, "Fira: Can We
Achieve Full-rank Training of LLMs Under Low-rank Constraint?", 2024, alg. 1; Zhu, Zhang, Cong, Liu,
Park, Chandra, Long, Pan, Wang & Lee, "APOLLO: SGD-like Memory, AdamW-level Performance", 2024.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

from torch import Tensor

from functorch_opt import random, tree
from functorch_opt._core import sharding
from functorch_opt._core.decision import chosen
from functorch_opt._core.transformation import (
    GradientTransformation,
    check_choice,
    check_range,
    check_whole,
    transformation,
)
from functorch_opt.optimizers.kronecker import on_host
from functorch_opt.optimizers.low_rank import LowRank, first_norm, growth, limited
from functorch_opt.optimizers.matrices import ORDINARY, MatrixDims
from functorch_opt.transforms.noise import sized
from functorch_opt.tree import PyTree

__all__ = ["project_gradients"]

Kind = Literal["galore", "fira", "apollo"]
NAME = "project_gradients"


class Projection(NamedTuple):
    """How gradients are projected, and steps taken back.

    Args:
        space: which matrices there are, and in how many dimensions.
        gap: after how many steps there is a new basis.
        scale, kind: see `project_gradients`.
    """

    space: LowRank
    gap: int
    scale: float
    kind: Kind

    def bases(self, state: Any, updates: PyTree, params: PyTree | None) -> PyTree:
        """The bases of this step."""
        old, due = state["basis"], on_host(state["count"] % self.gap == 0)
        if due is False:
            return old
        if self.kind == "apollo":
            like = tree.map(self.space.like_basis, sized(NAME, updates, params))
            noise = random.normal_like(state["key"], like, state["count"])
            new = tree.map(self.drawn, old, noise, updates)
        else:
            new = tree.map(self.found, old, updates)
        return tree.map(lambda x, old: chosen(due, x, old), new, old)

    def drawn(self, basis: Tensor, noise: Tensor, g: Tensor | None) -> Tensor:
        """A basis of random numbers."""
        return basis if g is None else self.space.of_noise(basis, noise)

    def found(self, basis: Tensor, g: Tensor | None) -> Tensor:
        """The leading singular vectors of a gradient."""
        return basis if g is None else self.space.leading(g.to(basis.dtype), basis)[0]

    def back(self, d: Tensor, like: Tensor, basis: Tensor) -> Tensor:
        """GaLore's step."""
        return self.scale * self.space.back(d.to(basis.dtype) @ basis, like)

    def full(
        self, d: Tensor, s: Tensor, g: Tensor, basis: Tensor, last: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The step of Fira or APOLLO, which has full rank; and the norm of w."""
        x = self.space.tall(g).to(basis.dtype)
        d, s = d.to(basis.dtype), s.to(basis.dtype)
        if self.kind == "apollo":
            w, last = limited(growth(d, s) * x, last)
            return self.space.back(self.scale**0.5 * w, g), last
        w, last = limited(growth(d, s) * (x - self.scale * (s @ basis)), last)
        return self.space.back(self.scale * (d @ basis) + w, g), last

    def all_full(
        self, moved: PyTree, small: PyTree, updates: PyTree, bases: PyTree, last: PyTree
    ) -> tuple[PyTree, PyTree]:
        """`full` of all matrices. One without gradient stays, and so does its norm."""
        trees = moved, small, updates, bases, last
        columns = [tree.flatten(each)[0] for each in trees]
        spec = tree.flatten(updates)[1]
        us, norms = [], []
        for row in zip(*columns, strict=True):
            is_there = row[0] is not None
            u, norm = self.full(*row) if is_there else (None, row[-1])
            us.append(u)
            norms.append(norm)
        return tree.unflatten(spec, us), tree.unflatten(spec, norms)


@transformation
def project_gradients(
    inner: GradientTransformation,
    rank: int = 128,
    update_proj_gap: int = 200,
    scale: float = 0.25,
    *,
    dims: MatrixDims = ORDINARY,
    kind: Kind = "galore",
    key: Tensor | int | None = None,
) -> GradientTransformation:
    """`inner` in `rank` dimensions of each matrix, which are found anew now and then.

    The rule is at the top of `functorch_opt.optimizers.projected`. All of the state of `inner` is
    small. It sees the parameters in these dimensions too, so weight decay belongs outside. For Adam
    take `scale_by_galore`, `scale_by_fira` or `scale_by_apollo`, which a compiled step compiles; this
    wrapper runs eagerly there. Choose the matrices with `masked` or `partition`.

    Args:
        inner: any transformation, such as ``scale_by_lion()``. With "fira" and "apollo" it is a stage
            before the learning rate, for w goes up the gradient.
        rank: of what `inner` sees, 1 or greater; at most the shorter side of a matrix counts.
        update_proj_gap: after how many steps there is a new basis, 1 or greater.
        scale: multiplies the steps of "galore" and what is projected in "fira"; the root of it
            multiplies those of "apollo". 0 or greater.
        dims: which dims are a matrix, see `MatrixDims`; without split.
        kind: "galore", with steps of low rank, "fira" or "apollo".
        key: of the draws of "apollo": int64 [2], see `functorch_opt.random.key`, or a seed.

    Raises:
        ValueError: an argument outside its range; a tensor is no matrix; "apollo" without a key, and
            the others with one.
        TypeError: `inner` is not a transformation; a parameter is sharded.

    Source: Zhao et al., 2024, alg. 1; Chen et al., 2024, alg. 1; Zhu et al., 2024, alg. 1. In optax
    it is the ``base_optimizer`` of ``scale_by_galore``, which sees no parameters. The authors of Fira
    and APOLLO bound w before Adam is corrected for its start at 0, and here it is bounded after.

    Example:
        >>> import torch, functorch_opt as fo
        >>> tx, params = fo.project_gradients(fo.trace(0.9), rank=4), [torch.zeros(20, 50)]
        >>> fo.get(tx.init(params), "trace")[0].shape
        torch.Size([50, 4])
        >>> around = fo.project_gradients(fo.scale_by_lion(), rank=4, kind="fira")
    """
    if not isinstance(inner, GradientTransformation):
        raise TypeError(
            "project_gradients takes a transformation, e.g. scale_by_adam(); "
            f"got {type(inner).__name__} {inner!r}."
        )
    check_whole(1, rank=rank, update_proj_gap=update_proj_gap)
    check_range(0, float("inf"), scale=scale)
    check_choice(*get_args(Kind), kind=kind)
    if dims.split is not None:
        raise ValueError(f"project_gradients takes no fused matrices; dims is {dims}.")
    if (key is None) is (kind == "apollo"):
        raise ValueError(
            f"key is for the draws of kind='apollo' alone; got {key!r} for {kind!r}. "
            "Give it a seed there, and leave it out otherwise."
        )
    space = LowRank(rank, dims)
    projection = Projection(space, update_proj_gap, scale, kind)
    return _projected(inner, projection, None if key is None else random.as_key(key))


def _projected(
    inner: GradientTransformation, projection: Projection, key: Tensor | None
) -> GradientTransformation:
    space = projection.space
    first_basis = space.slots()["basis"]

    def init(params):
        sharding.refuse_sharded(NAME, tree.leaves(params))
        bases = tree.map(first_basis, params)
        small = tree.map(space.projected, params, bases)
        count = tree.zero_count(params)
        state = {"count": count, "basis": bases, "inner": inner.init(small)}
        if projection.kind != "galore":
            state["last"] = tree.map(first_norm, params)
        return state if key is None else {**state, "key": key.clone()}

    def update(updates, state, params=None, **extra: Any):
        bases = projection.bases(state, updates, params)
        small = tree.map(space.projected, updates, bases)
        seen = None if params is None else tree.map(space.projected, params, bases)
        moved, kept = inner.update(small, state["inner"], seen, **extra)
        new = {**state, "count": state["count"] + 1, "basis": bases, "inner": kept}
        if projection.kind == "galore":
            return tree.map(projection.back, moved, updates, bases), new
        given = moved, small, updates, bases, state["last"]
        moved, new["last"] = projection.all_full(*given)
        return moved, new

    return GradientTransformation(init, update, extra_args=inner.extra_args)
