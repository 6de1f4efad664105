"""Slots of a stateful optimizer that lie on the host, while their parameters lie on a card."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from functorch_opt._core.sharding import any_sharded
from functorch_opt.optim.params import can_be_trained
from functorch_opt.optim.places import Place

if TYPE_CHECKING:
    from functorch_opt.optim.plan import Plan


def to_host(x: Tensor) -> Tensor:
    """A copy on the host, in memory that a card copies to and from beside other work."""
    there = x.detach().to("cpu", copy=True)
    return there.pin_memory() if torch.cuda.is_available() and x.numel() else there


def lies_apart(plan: Plan, place: Place, p: Tensor) -> bool:
    """Whether a tensor of the state lies on the host, and its parameter does not."""
    return plan.on_host and place.kind == "slot" and p.device.type != "cpu"


def kept(plan: Plan, place: Place, x: Tensor, p: Tensor) -> Tensor:
    """A first value, where it is to lie. With slots on the host all are made there."""
    if not plan.on_host:
        return x
    return to_host(x) if lies_apart(plan, place, p) else x.to(p.device)


def from_card(plan: Plan, values: list[Any]) -> list[Any]:
    """The values, on the host if slots lie there."""
    if not plan.on_host:
        return values
    return [None if x is None else x.to("cpu") for x in values]


def is_needed(params: list[Tensor]) -> bool:
    """Whether some parameters do not lie on the host, which all slots can be on.

    Raises:
        ValueError: they lie on a device that this is not for.
    """
    kinds = {p.device.type for p in params if can_be_trained(p)} - {"cpu", "meta"}
    if kinds - {"cuda"}:
        raise ValueError(
            f"slots_on_host is for parameters on CUDA devices and on the CPU; these lie on "
            f"{', '.join(sorted(kinds))}. Leave slots_on_host away."
        )
    return bool(kinds)


def check(plan: Plan, params: list[Tensor]) -> None:
    """Raise ValueError for an optimizer whose slots cannot lie on the host."""
    whole = [place.path for place in plan.flat if place and place.whole]
    if whole:
        raise ValueError(
            f"the state at {whole[0]!r} belongs to a stage that looks at whole trees, and slots on "
            "the host are fetched some at a time. Write the stage with leafwise, or leave "
            "slots_on_host away."
        )
    if plan.counts.capturable:
        raise ValueError(
            "a step with slots on the host cannot be captured as a CUDA graph, for the host waits "
            "for it. Leave capturable=True or slots_on_host away."
        )
    if plan.replicas or any_sharded(plan.given(params)):
        raise ValueError(
            "slots on the host are for parameters that lie on one rank. For sharded ones FSDP2 has "
            "CPUOffloadPolicy; with owners=True each rank keeps less state already."
        )


def refuse_in_graph(plan: Plan) -> None:
    """Raise ValueError if slots lie on the host, for a step that is traced."""
    refuse_on_host(
        plan,
        "a step in a graph of yours takes all slots",
        "Give compile=True, with which the step is one operation there. ",
    )


def refuse_on_host(plan: Plan, what: str, cure: str = "") -> None:
    """Raise ValueError if slots lie on the host, for what does not fetch them some at a time."""
    if plan.on_host:
        raise ValueError(
            f"{what}, and its slots lie on the host, from where a step fetches some at a time. "
            f"{cure}Leave slots_on_host away."
        )
