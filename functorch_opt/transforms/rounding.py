"""Stochastic rounding: ``p + u`` becomes one of its two neighbours in the dtype of p.

The nearer one is chosen more often, so that the average is ``p + u`` itself.

Source: Gupta et al., "Deep Learning with Limited Numerical Precision", ICML 2015, section 3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from functorch_opt import random, tree
from functorch_opt._core.leaf import Each
from functorch_opt._core.rule import leafwise
from functorch_opt._core.transformation import GradientTransformation, transformation
from functorch_opt.random import philox

__all__ = ["stochastic_round"]


@transformation
def stochastic_round(key: Tensor | int) -> GradientTransformation:
    """Let low-precision parameters keep small updates.

    As the last stage of a chain, it moves ``p + u`` to one of its two neighbours, at random.

    In bfloat16 the neighbours of 1 are 1 - 1/256 and 1 + 1/128. An update of 0.001 is rounded away
    at every step, and training stalls. Here it moves the parameter by 1/128 in one step of eight:
    ``E[p + u']`` is ``p + u``. The update u' that it returns leads exactly to the neighbour, so
    that `apply_updates`, which rounds to nearest, has nothing left to round. Parameters of 32 bits
    and more are left alone.

    Put it last. A later stage, or the ``lr`` of a group in `fo.optim.Optimizer`, would move
    ``p + u'`` away from the numbers to which it was rounded.

    Args:
        key: int64 [2], see `functorch_opt.random.key`, or a seed.

    Raises:
        ValueError: (by update) params are missing.
        TypeError: something that is not a key.

    Source: Gupta et al., 2015, section 3.

    Example:
        >>> import torch, functorch_opt as fo
        >>> params = torch.ones(10000, dtype=torch.bfloat16)
        >>> u = torch.full((10000,), 0.001)
        >>> fo.apply_updates(params, u).float().mean()  # all of it is lost
        tensor(1.)
        >>> tx = fo.stochastic_round(key=0)
        >>> rounded, _ = tx.update(u, tx.init(params), params)
        >>> new = fo.apply_updates(params, rounded).float()
        >>> new.unique(), bool((new.mean() - 1.001).abs() < 1e-4)
        (tensor([1.0000, 1.0078]), True)
    """

    def prepare(count, key, params):
        ps, spec = tree.flatten(params)
        low = [
            p
            if p is not None and p.is_floating_point() and p.dtype.itemsize < 4
            else None
            for p in ps
        ]
        noise = random.draw_leaves(philox.uniform, key, low, count)
        noise = [
            torch.zeros_like(p) if z is None and p is not None else z
            for p, z in zip(ps, noise, strict=True)
        ]
        infos = [None if p is None else torch.finfo(p.dtype) for p in low]
        eps, tiny = (
            torch.tensor(
                [getattr(info, name, 0.0) for info in infos],
                dtype=torch.float32,
                device=key.device,
            )
            for name in ("eps", "tiny")
        )
        return {"noise": Each(tree.unflatten(spec, noise)), "eps": eps, "tiny": tiny}

    def rule(g, p, noise, eps, tiny):
        exact = p + g
        power = torch.maximum(power_below(exact), tiny)
        spacing = torch.where(eps > 0, power * eps, 1.0)
        new = neighbour(exact, spacing, noise)
        return torch.where(eps > 0, new - p, g)

    return leafwise(rule, prepare, shared={"key": random.as_key(key)})


def power_below(x: Tensor) -> Tensor:
    """The largest power of two that is at most ``|x|``: its exponent, with no other bits."""
    exponent = x.to(torch.float32).view(torch.int32) & 0x7F800000
    return exponent.view(torch.float32)


def neighbour(exact: Tensor, spacing: Tensor, noise: Tensor) -> Tensor:
    """One of the two multiples of `spacing` around each number, whose average is the number.

    Args:
        exact: what is rounded.
        spacing: how far the numbers of the other dtype are apart there.
        noise: uniform in [0, 1).
    """
    steps = exact / spacing
    below = torch.floor(steps)
    rounded = (below + (noise < steps - below)) * spacing
    return torch.where(exact.isfinite(), rounded, exact)
