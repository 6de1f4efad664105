"""Slots on the host: a model whose optimizer state does not fit on the card."""

from __future__ import annotations

import torch

from functorch_opt.optim.adapter import Optimizer
from functorch_opt.optim.host import lies_apart, to_host
from functorch_opt.optim.step import NOTHING

__all__ = ["slots_on_host"]


@torch.no_grad()
def slots_on_host(optimizer: Optimizer) -> None:
    """Keep the slots of `optimizer` in the memory of the host, while parameters lie on a card.

    A step fetches them in windows of about 64 MB, in the order of the parameters. While one window
    is stepped, the next one is on the way to the card, and the one before on the way back. So the
    card has the slots of two windows, and never all of them; a tensor whose slots are larger is a
    window by itself. The numbers are those of slots on the card.

    It stays one optimizer: schedulers write into its groups, a global norm is that of all
    parameters, and a checkpoint is loaded to the host. Slots in a code (``state="8bit"``) make the
    copies smaller. At the end of a step the host waits until all is back, so that ``state[p]`` can be
    read. Of parameters on the CPU nothing changes.

    Call it when the parameters are where they will be trained, and the optimizer is new: then no slot
    is ever on the card. Slots that are there already are moved. A copy by pickle has slots in memory
    that a card cannot copy from beside other work: call it again. `Optimizer.eval_params` works
    averages out on the host.

    Args:
        optimizer: any optimizer of `fo.optim`, with ``compile=True`` or without.

    Raises:
        TypeError: no optimizer of `fo.optim`.
        ValueError: parameters on a device that is neither CUDA nor the CPU, or sharded ones;
            ``owners=True`` on many ranks; ``capturable=True``; a stage that looks at whole trees, or
            (by `step`, before anything is written) one that adds slots up over all parameters or is
            not made of rules; a step that has to be worked out as a whole, or inside of a graph
            without ``compile=True``; by `Optimizer.report` and `step_in_backward`.

    Source: Rajbhandari et al., "ZeRO-Offload", 2021, arXiv:2101.06840, moves the slots to the host and
    makes the step there. Here the step is made on the card.

    Example:
        >>> import torch, functorch_opt as fo
        >>> device = "cuda" if torch.cuda.is_available() else "cpu"
        >>> model = torch.nn.Linear(2, 1, device=device)
        >>> opt = fo.optim.AdamW(model.parameters(), lr=0.1)
        >>> fo.optim.slots_on_host(opt)
        >>> model(torch.ones(1, 2, device=device)).sum().backward()
        >>> opt.step()
        >>> opt.state[model.weight]["exp_avg"].device
        device(type='cpu')
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            "slots_on_host takes an optimizer of fo.optim; "
            f"got {type(optimizer).__name__}. fo.optim has the names of torch.optim."
        )
    before = optimizer._slots_on_host, optimizer._plans
    optimizer._slots_on_host, optimizer._plans = True, {}
    try:
        buckets = optimizer._trained_buckets()
        plans = [optimizer._plan(fixed, groups) for fixed, groups in buckets]
    except Exception:
        optimizer._slots_on_host, optimizer._plans = before
        raise
    for plan, (_, groups) in zip(plans, buckets, strict=True):
        params = [p for group in groups for p in group["params"]]
        for place in filter(None, plan.flat):
            p = params[place.i]
            x = optimizer.state.get(p, NOTHING).get(place.key)
            if x is not None and lies_apart(plan, place, p):
                optimizer.state[p][place.key] = to_host(x)
