"""Where the numbers of a stateful optimizer lie: on the host, if that is possible."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from functorch_opt import tree
from functorch_opt._core.transformation import GradientTransformation
from functorch_opt.optim.closure import for_a_rehearsal
from functorch_opt.optim.counts import is_capturing
from functorch_opt.optim.derived import Recording
from functorch_opt.optim.numbers import Groups, Numbers, is_capturable
from functorch_opt.tree import PyTree


def with_numbers(
    make: Callable[[dict[str, Any]], GradientTransformation],
    names: list[str],
    groups: Groups,
    order: list[int],
    few: PyTree,
) -> tuple[Numbers, GradientTransformation]:
    """The numbers, and the transformation that `make` makes of them; `few` has a few elements in the
    place of each parameter.

    If a step has to be capturable, all of them lie on the device.

    Numbers and counts lie on the host. There an operation on one number costs next to nothing, and
    torch hands it to kernels by value. But not every operation takes a number from there beside
    tensors of a device; where that fails, or where a number is on the device already, all are.
    """
    device = tree.leaves(few)[0].device
    values = [group[name] for group in groups for name in names]
    there = any(isinstance(x, Tensor) and x.device.type != "cpu" for x in values)
    on_device = there or is_capturable(groups) or device.type == "mps"
    hosts = [] if on_device else [torch.device("cpu")]
    for of_numbers in (*hosts, device):
        numbers = Numbers(names, groups, order, of_numbers)
        with Recording(numbers.buffers) as recording:
            tx = make(numbers.buffers)
        numbers.derived = recording.operations
        if of_numbers == device or _works(tx, numbers, groups, few):
            break
    return numbers, tx


def _works(
    tx: GradientTransformation, numbers: Numbers, groups: Groups, few: PyTree
) -> bool:
    """Whether a step of a few numbers for each parameter does not fail."""
    numbers.write(groups)
    extra = for_a_rehearsal(tx, few)
    try:
        state = tree.map(_count_on_host, tx.init(few))
        tx.update(few, state, few, **extra)
    except Exception:
        return False
    return True


def _count_on_host(x: Tensor) -> Tensor:
    return x if x.dim() or x.is_floating_point() else x.to("cpu")


def refuse_capture(capturable: bool, p: Tensor) -> None:
    """Raise RuntimeError where a step is being captured as a CUDA graph, with numbers on the host.

    The graph would repeat the rates and counts of this step for ever.
    """
    if not capturable and is_capturing(p.device):
        raise RuntimeError(
            "a step of this optimizer cannot be captured as a CUDA graph, for its counts lie on the "
            "host. Make the optimizer with capturable=True; and give a learning rate that is to "
            "change between replays as a tensor on the device."
        )
