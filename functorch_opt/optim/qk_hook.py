"""QK-Clip for ordinary loops: a hook that is called after every step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from functorch_opt import tree
from functorch_opt._core import sharding
from functorch_opt._core.transformation import check_range
from functorch_opt.transforms.qk_clip import check_powers, layer_of, shrinking

__all__ = ["qk_clip_hook"]


def qk_clip_hook(
    model: nn.Module,
    max_logits: Callable[[], Mapping[str, Tensor]],
    powers: Mapping[str, float],
    threshold: float = 100.0,
) -> Callable[..., None]:
    """A hook for ``register_step_post_hook`` of any optimizer that does what `qk_clip` does.

    It multiplies the parameters in place. What keeps a copy of them, such as `keep_master_weights`,
    does not see it: there use `qk_clip` inside.

    Args:
        model: whose parameters are shrunk. They may be sharded.
        max_logits: a function that is called after every step. It returns
            ``{name of an attention layer: tensor [heads]}``, the largest logits of the last batch.
        powers: ``{pattern: power}``, as in `qk_clip`. The patterns are for names of parameters.
        threshold: the largest logit that may be, greater than 0.

    Raises:
        ValueError: an argument outside its range; a pattern without exactly one ``*``; no parameter
            fits a pattern. In the hook: a layer that ``max_logits`` does not have; rows that cannot
            be shared out to the heads.

    Source: Kimi Team, "Kimi K2: Open Agentic Intelligence", 2025, alg. 1.

    Example:
        >>> import torch, functorch_opt as fo
        >>> model = torch.nn.ModuleDict({"q": torch.nn.Linear(1, 2, bias=False)})
        >>> _ = torch.nn.init.ones_(model["q"].weight)
        >>> opt = fo.optim.AdamW(model.parameters(), lr=0.0)
        >>> logits = {"q": torch.tensor([200.0, 50.0])}
        >>> hook = fo.optim.qk_clip_hook(model, lambda: logits, {"*.weight": 1.0})
        >>> handle = opt.register_step_post_hook(hook)
        >>> model["q"](torch.ones(1)).sum().backward()
        >>> opt.step()
        >>> model["q"].weight.detach().flatten()
        tensor([0.5000, 1.0000])
    """
    check_powers(powers)
    check_range(0, float("inf"), above=True, threshold=threshold)
    named = dict(model.named_parameters())
    clipped = {path: p for path, p in named.items() if layer_of(path, powers)}
    if not clipped:
        raise ValueError(
            f"no parameter fits {[*powers]}; the model has {[*named][:5]} and so on."
        )

    @torch.no_grad()
    def hook(optimizer: Any, args: Any, kwargs: Any) -> None:
        now = max_logits()
        for path, p in clipped.items():
            factor = shrinking(path, p, powers, now, threshold).to(p.dtype)
            if tree.is_sharded(p):
                factor = sharding.cut(factor.expand(p.shape).contiguous(), p)
            p.mul_(factor)

    return hook
