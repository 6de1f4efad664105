"""Averages of past updates.

They are the decaying sum ``t = g + decay t`` and the weighted mean ``m = (1 - decay) g + decay m``.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from functorch_opt import tree
from functorch_opt._core import numerics
from functorch_opt._core.rule import leafwise
from functorch_opt._core.transformation import (
    GradientTransformation,
    ScalarOrSchedule,
    check_range,
    transformation,
)

__all__ = ["ema", "trace"]


@transformation
def trace(
    decay: ScalarOrSchedule,
    nesterov: bool = False,
    accumulator_dtype: torch.dtype | None = None,
    *,
    dampening: ScalarOrSchedule = 0.0,
) -> GradientTransformation:
    """Momentum, as a decaying sum: ``t = decay t + (1 - dampening) g``.

    The first ``t`` is ``g`` without dampening, as in torch.optim.SGD.

    Args:
        decay: 0 or greater.
        nesterov: return ``g + decay t`` in place of ``t``.
        accumulator_dtype: of the trace; by default that of the params, at least float32.
        dampening: as in torch. optax has none, which is the same as 0.

    Raises:
        ValueError: decay is negative or NaN; nesterov together with a dampening that is a schedule
            or a number other than 0. The value of a tensor is not checked.

    Source: Sutskever et al., "On the importance of initialization and momentum in deep learning",
    2013, eqs. 1-4.

    Example:
        >>> import torch, functorch_opt as fo
        >>> tx = fo.trace(0.9)
        >>> _, state = tx.update([torch.tensor(1.0)], tx.init([torch.tensor(0.0)]))
        >>> tx.update([torch.tensor(1.0)], state)[0]
        [tensor(1.9000)]
    """
    check_range(0, float("inf"), decay=decay)
    check_range(-float("inf"), float("inf"), dampening=dampening)
    undamped = not isinstance(dampening, Tensor) and dampening == 0
    if nesterov and not undamped and not isinstance(dampening, Tensor):
        raise ValueError(
            f"Nesterov momentum needs a dampening of zero; got {dampening!r}."
        )
    slots = {"trace": partial(tree.zeros_like, dtype=accumulator_dtype)}

    def rule(g, trace, decay):
        trace = g + decay * trace
        return g + decay * trace if nesterov else trace, {"trace": trace}

    def prepare(count, dampening):
        dampening = torch.as_tensor(dampening, dtype=numerics.real_dtype(count.device))
        return {"fresh": torch.where(count == 0, 1.0, 1.0 - dampening)}

    def damped(g, trace, decay, fresh):
        trace = fresh * g + decay * trace
        return g + decay * trace if nesterov else trace, {"trace": trace}

    if undamped:
        return leafwise(rule, slots=slots, hyper={"decay": decay})
    return leafwise(
        damped, prepare, slots=slots, hyper={"decay": decay, "dampening": dampening}
    )


@transformation
def ema(
    decay: ScalarOrSchedule,
    debias: bool = True,
    accumulator_dtype: torch.dtype | None = None,
) -> GradientTransformation:
    """Exponential moving average of the updates: ``m = decay m + (1 - decay) g``.

    It is debiased by ``m / (1 - decay^t)``.

    Args:
        decay: in [0, 1).
        debias: divide by ``1 - decay^t``, so that the first average is the first update.
        accumulator_dtype: of the average; by default that of the params, at least float32.

    Raises:
        ValueError: decay outside [0, 1).

    Example:
        >>> import torch, functorch_opt as fo
        >>> tx = fo.ema(0.9)
        >>> tx.update([torch.tensor(3.0)], tx.init([torch.tensor(0.0)]))[0]
        [tensor(3.)]
    """
    check_range(0, 1, decay=decay)

    def prepare(count, decay):
        return {
            "weight": 1 - decay,
            "correction": 1 / (1 - decay ** tree.as_real(count + 1)) if debias else 1.0,
        }

    def rule(g, ema, weight, correction):
        ema = torch.lerp(ema, g, weight)
        return ema * correction, {"ema": ema}

    return leafwise(
        rule,
        prepare,
        slots={"ema": partial(tree.zeros_like, dtype=accumulator_dtype)},
        hyper={"decay": decay},
    )
