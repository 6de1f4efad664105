"""The loss scale of a `torch.amp.GradScaler`, without waiting for the device.

A scaler sets two attributes of an optimizer before it calls ``step``: ``found_inf``, a 0-dim tensor
that is not 0 where a gradient is not finite, and ``grad_scale``, by which gradients are still to be
divided. Then the step is made behind a gate, as that of `apply_if_finite`: values are chosen on the
device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from functorch_opt._core.gate import Gate, gate
from functorch_opt._core.numerics import real_dtype
from functorch_opt._core.state import StageState
from functorch_opt._core.transformation import GradientTransformation
from functorch_opt.optim.numbers import Groups
from functorch_opt.tree import PyTree

if TYPE_CHECKING:
    from functorch_opt.optim.adapter import Optimizer

Grads = list[Tensor]


def leaves_it_to_the_step(groups: Groups) -> bool:
    """Whether a scaler should hand over its decision, and not read it and leave out the step.

    To leave counts as they are without reading the decision, they must lie on the device. And where
    all parameters lie on a CPU, nobody waits.
    """
    if not counts_on_device(groups):
        return False
    return any(p.device.type != "cpu" for group in groups for p in group["params"])


def counts_on_device(groups: Groups) -> bool:
    return all(group.get("capturable") for group in groups)


def step_scaled(optimizer: Optimizer, loss: Any) -> None:
    """The step that a scaler has asked for: divide the gradients, in place, and go on if nothing
    was found in them.

    A scaler takes its attributes back, but not after an error. So this is done here: gradients have
    their scale again, and the scaler can be asked once more.

    Raises:
        RuntimeError: in a function that is compiled.
        ValueError: a gradient that is to be divided is float16.
        Exception: what the step raises.
    """
    if torch.compiler.is_compiling():
        raise RuntimeError(
            "scaler.step(optimizer) cannot be part of a compiled function, which would keep the "
            "scale of the step it was traced at. Compile forward and backward, and call "
            "scaler.step outside."
        )
    groups = optimizer._groups
    scale: Any = vars(optimizer).get("grad_scale")
    scaled: Grads = []
    try:
        if scale is not None:
            scaled = unscaled_(_strided_gradients(groups), scale)
        active = torch.as_tensor(optimizer.found_inf) == 0
        optimizer._advance(loss, active if counts_on_device(groups) else active.cpu())
    except Exception:
        for g in scaled:
            g.mul_(scale.to(g.device, non_blocking=True))
        for name in vars(optimizer).keys() & {"found_inf", "grad_scale"}:
            delattr(optimizer, name)
        raise


def _strided_gradients(groups: Groups) -> Grads:
    grads = [p.grad for group in groups for p in group["params"] if p.grad is not None]
    for g in grads:
        if g.dtype is torch.float16:
            raise ValueError(
                "a gradient is float16, in which small numbers would be lost when they are divided "
                "by the scale of a GradScaler. Keep parameters in float32, and run the model under "
                "torch.autocast; or use bfloat16, which needs no scale."
            )
    return [g for g in grads if g.layout is torch.strided]


def unscaled_(grads: Grads, scale: Tensor) -> Grads:
    """The same gradients, divided by the scale, in place and as ``GradScaler.unscale_`` does, to the bit."""
    kinds: dict[Any, Grads] = {}
    for g in grads:
        kinds.setdefault((g.device, g.dtype), []).append(g)
    inverse = scale.to(real_dtype(scale.device)).reciprocal().float()
    for (device, _), alike in kinds.items():
        there = inverse.to(device, non_blocking=True)
        found = torch.zeros((), device=device)
        torch._amp_foreach_non_finite_check_and_unscale_(alike, found, there)
    return grads


def if_finite(tx: GradientTransformation) -> Gate:
    """`tx`, at the steps at which the extra argument ``is_finite`` is true."""
    return gate(tx, _is_finite)


def _is_finite(*, is_finite: Tensor) -> Tensor:
    return is_finite


def behind(state: PyTree) -> PyTree:
    """A state of `tx`, as that of ``if_finite(tx)``."""
    return {"inner": state, "gate": StageState({}, {})}


def updated(
    tx: GradientTransformation,
    trees: tuple[PyTree, PyTree, PyTree],
    extra: dict[str, Any],
    active: Tensor | None,
) -> tuple[PyTree, PyTree]:
    """``tx.update`` of updates, state and params, if it is `active`; None: it is."""
    if active is None:
        return tx.update(*trees, **extra)
    us, state, ps = trees
    given = {**extra, "is_finite": active}
    updates, new = if_finite(tx).update(us, behind(state), ps, **given)
    return updates, new["inner"]
