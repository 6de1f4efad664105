"""A step of parameters that are the same on every rank, and of which each has an owner."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from functorch_opt._core.on_owner import errors_kept
from functorch_opt._core.replicas import Replicas, known_owner
from functorch_opt.optim.step import NOTHING, State, Step


def replicas_of(params: list[Tensor], state: State) -> Replicas | None:
    """The owners of the parameters: where there is state, the rank that has it.

    None if there is nothing to divide: in one process, or where all parameters are sharded.
    """
    known = [known_owner([*state.get(p, NOTHING).values()]) for p in params]
    found = Replicas(params, known)
    return found if found.mine else None


def step_and_send(replicas: Replicas, step: Step, act: Callable[[], None]) -> None:
    """Let the owners write what is theirs, and send it to all ranks.

    Raises:
        NotImplementedError: in a graph.
        RuntimeError: the step of another rank has failed.
    """
    if torch.compiler.is_compiling():
        raise NotImplementedError(
            "owners=True: no graph has the messages of a step. Leave opt.step() out of what is "
            "given to torch.compile, and compile forward and backward alone."
        )
    with errors_kept() as errors:
        try:
            act()
        except Exception as error:
            errors.append(error)
    moved = {*step.moved}
    wanted = [x if i in moved else None for i, x in enumerate(step.tensors)]
    _write(step.params, replicas.taken(wanted, errors), replicas)


def _write(params: list[Tensor], values: list[Any], replicas: Replicas) -> None:
    for i, owner in replicas.owners.items():
        if values[i] is not None and owner != replicas.ranks.me:
            params[i].copy_(values[i])
