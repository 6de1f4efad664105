"""What a transformation reads beside gradients, as far as a closure provides it."""

from __future__ import annotations

from typing import Any

import torch

from functorch_opt._core.transformation import GradientTransformation
from functorch_opt.tree import PyTree

CLOSURE = "Give step a closure that returns the loss."
FUNCTIONAL = (
    "A closure cannot provide it: call update(updates, state, params, ...) of the "
    "transformation itself."
)


def extra_of(
    tx: GradientTransformation,
    loss: Any,
    grads: PyTree,
) -> dict[str, Any]:
    """The extra arguments that `tx` reads. `loss` is what a closure returned.

    Raises:
        TypeError: `tx` reads something that is not there.
    """
    given = {"grad": grads}
    if loss is not None and tx.extra_args:
        given["value"] = torch.as_tensor(loss).detach()
    for name, required in tx.extra_args.items():
        if required and name not in given:
            cure = CLOSURE if name == "value" else FUNCTIONAL
            raise TypeError(f"{tx!r} reads {name}. {cure}")
    return {name: value for name, value in given.items() if name in tx.extra_args}
