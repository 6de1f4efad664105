"""QK-Clip: after a step, shrink the queries and keys of heads whose attention logits are too large.

    gamma = threshold / S  if S > threshold, otherwise 1      S: the largest logit of a head in the
                                                              last forward pass
    W     = gamma^power W                                     for the rows of this head

Source: Kimi Team, "Kimi K2: Open Agentic Intelligence", 2025, alg. 1 (MuonClip).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from functorch_opt import tree
from functorch_opt._core.groups import masked
from functorch_opt._core.leaf import Each
from functorch_opt._core.rule import leafwise
from functorch_opt._core.transformation import (
    GradientTransformation,
    Scalar,
    check_range,
    transformation,
)

__all__ = ["qk_clip"]


def layer_of(path: str, powers: Mapping[str, float]) -> tuple[str, float] | None:
    """What ``*`` stands for in the first pattern that `path` fits, and the power of this pattern."""
    for pattern, power in powers.items():
        begin, end = pattern.split("*")
        fits = path.startswith(begin) and path.endswith(end)
        if fits and len(path) >= len(begin) + len(end):
            return path[len(begin) : len(path) - len(end)], power
    return None


def check_powers(powers: Mapping[str, float]) -> None:
    """Raise ValueError for a pattern without exactly one ``*``, and for a negative power."""
    for pattern, power in powers.items():
        if pattern.count("*") != 1:
            raise ValueError(
                f"{pattern!r} must have one *, which stands for the name of an attention layer, "
                'as in "*.q_proj.weight".'
            )
        if not power >= 0:
            raise ValueError(
                f"the power of {pattern!r} must be 0 or greater; got {power}."
            )


def shrinking(
    path: str,
    like: Tensor,
    powers: Mapping[str, float],
    max_logits: Mapping[str, Tensor],
    threshold: Any,
) -> Tensor:
    """What the parameter at `path` is multiplied by, ``[rows, 1, ...]``."""
    found = layer_of(path, powers)
    assert found is not None
    layer, power = found
    if layer not in max_logits:
        raise ValueError(
            f"max_logits has nothing for {layer!r}, to which {path!r} belongs; "
            f"it has {[*max_logits]}."
        )
    logits = max_logits[layer]
    heads = logits.numel()
    rows = like.shape[0] if like.dim() else 1
    if rows % max(heads, 1):
        raise ValueError(f"the {rows} rows of {path!r} cannot be those of {heads} heads.")
    real = tree.at_least_float32(like.real.dtype)
    size = logits.detach().reshape(-1, 1)
    size = size.to(like.device, real)
    too_large = (size > threshold) & size.isfinite()
    divisor = torch.where(too_large, size, 1.0)
    gamma = torch.where(too_large, threshold / divisor, 1.0)
    rows_of_head = rows // max(heads, 1)
    of_rows = (gamma**power).expand(heads, rows_of_head)
    ones = [1] * like.dim()
    return of_rows.reshape([rows, *ones[1:]] if ones else [])


@transformation
def qk_clip(
    powers: Mapping[str, float], threshold: Scalar = 100.0
) -> GradientTransformation:
    """The last stage of an optimizer: it bounds attention logits by the weights that make them.

    The rule is at the top of `functorch_opt.transforms.qk_clip`. ``update`` takes the extra argument
    ``max_logits``: ``{name of an attention layer: tensor [heads]}``, the largest logit of each head
    over all of the last batch (and over all ranks). What is not finite there does nothing. In an
    ordinary loop use `functorch_opt.optim.qk_clip_hook`, which has the same arguments.

    Args:
        powers: ``{pattern: power}``. A pattern is for the whole path of a parameter, and its ``*``
            stands for the name of the layer in ``max_logits``. Multi-head attention:
            ``{"*.q_proj.weight": 0.5, "*.k_proj.weight": 0.5}``. Where heads share keys, shrink the
            queries alone: ``{"*.q_proj.weight": 1.0}``. Latent attention: 0.5 for what is not
            rotated, and 1.0 for rotated queries.
        threshold: the largest logit that may be, greater than 0.

    Raises:
        ValueError: an argument outside its range; a pattern without exactly one ``*``; a layer that
            ``max_logits`` does not have; rows that cannot be shared out to the heads; ``update``
            called without params; a stage follows in a chain.

    Source: Kimi Team, 2025, alg. 1.

    Example:
        >>> import torch, functorch_opt as fo
        >>> tx = fo.chain(fo.sgd(0.1), fo.qk_clip({"*.q": 0.5, "*.k": 0.5}, threshold=25.0))
        >>> params = {"attn.q": torch.ones(4, 1), "attn.k": torch.ones(2, 1), "up": torch.ones(2)}
        >>> zero, logits = fo.tree.map(torch.zeros_like, params), torch.tensor([100.0, 9.0])
        >>> u, _ = tx.update(zero, tx.init(params), params, max_logits={"attn": logits})
        >>> fo.apply_updates(params, u)["attn.q"].flatten()
        tensor([0.5000, 0.5000, 1.0000, 1.0000])
    """
    check_powers(powers)
    check_range(0, float("inf"), above=True, threshold=threshold)

    def prepare(params, threshold, *, max_logits):
        leaves, spec = tree.flatten(params)
        factors = []
        for path, p in zip(tree.paths(params), leaves, strict=True):
            by = None
            if p is not None:
                by = shrinking(path, p, powers, max_logits, threshold)
            factors.append(by)
        return {"factor": Each(tree.unflatten(spec, factors))}

    def rule(g, p, factor):
        return (p + g) * factor - p

    hyper = {"threshold": threshold}
    clip = leafwise(rule, prepare, hyper=hyper, kind="tensorwise", last=True)
    return masked(clip, lambda path, p: layer_of(path, powers) is not None)
