"""Which stages leave out a step, how often they have done so, and why."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from functorch_opt._core.chain import Chain
from functorch_opt._core.gate import Gate
from functorch_opt._core.groups import Groups
from functorch_opt._core.state import StageState
from functorch_opt._core.transformation import GradientTransformation
from functorch_opt._core.wrap import Wrap

__all__: list[str] = []

CLOCKS = ("clock", "count")


def shared_of(tx: GradientTransformation, state: Any) -> Mapping[str, Tensor]:
    """What a stage shares among all parameters."""
    if isinstance(tx, (Gate, Wrap)):
        state = state["gate" if isinstance(tx, Gate) else "kept"]
    return state.shared if isinstance(state, StageState) else {}


def skipped(tx: Gate, closed: Any, new: Any) -> dict[str, Any]:
    """Whether a gate leaves out this step, and how many it has left out after it.

    Args:
        tx: the gate.
        closed: whether it is closed.
        new: its state after the step.
    """
    found = {"skipped": closed}
    so_far = count_of_skips(tx, new)
    if so_far is not None:
        found["skips"] = so_far
    return found


def count_of_skips(tx: Gate, state: Any) -> Tensor | None:
    """What the gate counts; or all steps less those that something inside has made."""
    shared = shared_of(tx, state)
    if tx.skips is not None:
        return tx.skips(shared)
    made = steps_of(tx.inner, state["inner"])
    if "clock" not in shared or made is None:
        return None
    clock = shared["clock"]
    return torch.clamp(clock - made.to(clock.device), min=0)


def steps_of(tx: GradientTransformation, state: Any) -> Tensor | None:
    """How many steps `tx` has made, if one of its stages counts each of them."""
    if isinstance(tx, Chain):
        pairs = [(stage, state.get(name)) for name, stage in tx.stages.items()]
    elif isinstance(tx, Groups):
        pairs = [(of, state.get(label)) for label, of in tx.inside.items()]
    else:
        shared = shared_of(tx, state)
        counts = [shared[name] for name in CLOCKS if name in shared]
        whole = [count for count in counts if count.dim() == 0]
        return whole[0] if whole else None
    found = [steps_of(stage, of) for stage, of in pairs if of is not None]
    known = [count for count in found if count is not None]
    return known[0] if known else None
