"""Mechanic: learns by how much to multiply the updates of any optimizer.

With the size s, a sum of n parts, one for each decay b of 0.9, 0.99, ..., and u, the updates of the
optimizer inside:

    D = (first p - p) / (s + eps)             the updates so far, negated
    h = <g + weight_decay s norm(g) / (norm(p) + eps) p, D>             over all parameters
    in each part:   m' = max(b m, |h| + eps)         v = b^2 v + h^2
                    r = b r + clip(h, -m, m) s_b     s_b = (s_init m'/n + max(r, 0)) / (sqrt(v) + eps)
    p = first p - s' (D - u)

Source: Cutkosky, Defazio & Mehta, "Mechanic: A Learning Rate Tuner", 2023, alg. 1, with the bound of
h that the authors added later.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from functorch_opt import tree
from functorch_opt._core.leaf import Each
from functorch_opt._core.numerics import copied
from functorch_opt._core.rule import leafwise
from functorch_opt._core.transformation import (
    GradientTransformation,
    Scalar,
    check_range,
    check_whole,
    transformation,
)
from functorch_opt.tree import PyTree

__all__ = ["mechanize"]


@transformation
def mechanize(
    base_optimizer: GradientTransformation,
    weight_decay: Scalar = 1e-2,
    eps: Scalar = 1e-8,
    s_init: Scalar = 1e-6,
    num_betas: int = 6,
) -> GradientTransformation:
    """Learn the factor of the updates of `base_optimizer`, while it trains.

    Give the optimizer a learning rate of 1, or a schedule whose peak is 1. The rule is at the top of
    `functorch_opt.wrappers.mechanic`. It looks at the parameters that it makes, so it comes last in
    a chain.

    Args:
        base_optimizer: the optimizer.
        weight_decay: multiplies the parameters in h only, and is no decay of the weights.
        eps: greater than 0.
        s_init: the first s of each part, greater than 0.
        num_betas: n, 1 or greater: the decays are 0.9, 0.99, ... with as many nines.

    Raises:
        ValueError: an argument outside its range; ``update`` called without params.
        TypeError: `base_optimizer` is not a transformation.

    Source: Cutkosky et al., 2023, alg. 1, and optax.contrib, which is the authors' code. The first
    p is that of ``init``; optax takes it at the first update. Their older package for torch,
    mechanic_pytorch 0.0.1, has other numbers: h without a bound, and the norm of the parameters
    after the step of the optimizer.

    Example:
        >>> import torch, functorch_opt as fo
        >>> tx, params = fo.mechanize(fo.adam(1.0)), [torch.tensor([3.0, -2.0])]
        >>> state = tx.init(params)
        >>> for _ in range(400):
        ...     updates, state = tx.update([params[0] / 100], state, params)
        ...     params = fo.apply_updates(params, updates)
        >>> bool(params[0].norm() < 0.1)
        True
    """
    if not isinstance(base_optimizer, GradientTransformation):
        raise TypeError(
            "mechanize takes a transformation, e.g. sgd(1.0); "
            f"got {type(base_optimizer).__name__} {base_optimizer!r}."
        )
    check_range(0, float("inf"), weight_decay=weight_decay)
    check_range(0, float("inf"), above=True, eps=eps, s_init=s_init)
    check_whole(1, num_betas=num_betas)
    tuner = tuned({"decay": weight_decay, "eps": eps, "s_init": s_init}, num_betas)

    return Mechanized(base_optimizer, tuner)


class Mechanized(GradientTransformation):
    """The optimizer inside, and the stage that takes the gradient and what was made of it."""

    def __init__(
        self, inner: GradientTransformation, tuner: GradientTransformation
    ) -> None:
        self.inner, self.tuner = inner, tuner
        self.name, self.last, self.extra_args = "mechanize", True, inner.extra_args

    def rebuilt(
        self, f: Callable[[GradientTransformation], GradientTransformation]
    ) -> Mechanized:
        """The same, around what `f` makes of the optimizer inside."""
        return Mechanized(f(self.inner), self.tuner)

    def _init(self, params: PyTree) -> dict[str, PyTree]:
        return {"inner": self.inner.init(params), "mechanic": self.tuner.init(params)}

    def _update(
        self, updates: PyTree, state: Any, params: PyTree | None, **extra: Any
    ) -> tuple[PyTree, dict[str, PyTree]]:
        if params is None:
            raise ValueError(
                "mechanize reads the parameters: call update(updates, state, params)."
            )
        moves, inner = self.inner.update(updates, state["inner"], params, **extra)
        updates, mine = self.tuner.update(updates, state["mechanic"], params, moves=moves)
        return updates, {"inner": inner, "mechanic": mine}


def tuned(hyper: dict[str, Any], n: int) -> GradientTransformation:
    """The stage that makes an update of a gradient, and of what the optimizer made of it."""

    def prepare(came, drift, gg, pp, r, m, v, s, factor, decay, eps, s_init, *, moves):
        b = 1 - 0.1 ** torch.arange(1, n + 1, dtype=s.dtype, device=s.device)
        # s is kept in units of s_init, which may be a tensor that is mapped over.
        s, total = s * s_init, factor * s_init * n
        norm_g, norm_p = (gg + tree.TINY).sqrt(), (pp + tree.TINY).sqrt()
        weight = decay * total * norm_g / (norm_p + eps)
        h = (came + weight * drift) / (total + eps)
        bounded = torch.minimum(torch.maximum(h, -m), m)
        m = torch.maximum(b * m, h.abs() + eps)
        v = b**2 * v + h**2
        r = b * r + bounded * s
        wealth = s_init * m / n + r.clamp(min=0)
        s = wealth / ((v + tree.TINY).sqrt() + eps)
        now = {"u": Each(moves), "before": total + eps, "now": s.sum()}
        new = {"r": r, "m": m, "v": v, "s": s / s_init}
        return now, {**new, "factor": s.sum() / s_init / n}

    def rule(g, p, start, u, before, now):
        return start - now * ((start - p) / before - u) - p, {"start": start}

    many = torch.zeros(n, dtype=torch.float64)
    return leafwise(
        rule,
        prepare,
        slots={"start": copied},
        shared={
            **dict.fromkeys(("r", "m", "v"), many),
            "s": torch.ones_like(many),
            "factor": torch.ones((), dtype=torch.float64),
        },
        hyper=hyper,
        totals={
            "came": lambda g, p, start: (g * (start - p)).sum(),
            "drift": lambda p, start: (p * (start - p)).sum(),
            "gg": lambda g: g.square().sum(),
            "pp": lambda p: p.square().sum(),
        },
        last=True,
    )
