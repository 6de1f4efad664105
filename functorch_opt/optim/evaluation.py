"""The averages of the parameters that a stateful optimizer keeps, put into the parameters for a while."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from functorch_opt.optim.plan import Plan
from functorch_opt.transforms.averaging import AVERAGED


def averages(
    plans: Iterable[tuple[Plan, list[Tensor]]], state: Mapping[Tensor, dict[str, Any]]
) -> dict[Tensor, Tensor]:
    """``{parameter: its average}`` for those that have made a step."""
    keys: dict[Tensor, str] = {}
    for plan, params in plans:
        for place in plan.flat:
            if place and place.kind == "slot" and place.key.rpartition("/")[2] == AVERAGED:
                if params[place.i] in keys:
                    both = f"{keys[params[place.i]]!r} and {place.key!r}"
                    raise ValueError(
                        f"two stages average the parameter {plan.paths[place.i]!r}: read {both} in opt.state[p]."
                    )
                keys[params[place.i]] = place.key
    if not keys:
        raise ValueError(
            "nothing in this optimizer averages the parameters: put params_ema(decay) last in the chain."
        )
    return {p: state[p][key] for p, key in keys.items() if key in state.get(p, ())}


@contextmanager
def held(values: Mapping[Tensor, Tensor]) -> Iterator[None]:
    """Inside, the parameters have these values; afterwards their own again."""
    own = {p: p.detach().clone() for p in values}
    try:
        _write(values)
        yield
    finally:
        _write(own)


@torch.no_grad()
def _write(values: Mapping[Tensor, Tensor]) -> None:
    for p, value in values.items():
        p.copy_(value)
