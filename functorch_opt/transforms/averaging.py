"""Averages of the parameters themselves.

The stage looks at the new parameters. `eval_params` reads the average out of a state.
"""

from __future__ import annotations

import torch

from functorch_opt import tree
from functorch_opt._core.rule import leafwise
from functorch_opt._core.transformation import (
    GradientTransformation,
    ScalarOrSchedule,
    check_range,
    transformation,
)

__all__ = ["params_ema"]


@transformation
def params_ema(
    decay: ScalarOrSchedule,
    debias: bool = True,
    accumulator_dtype: torch.dtype | None = None,
) -> GradientTransformation:
    """Exponential moving average of the parameters: ``m = decay m + (1 - decay) (p + u)``.

    The updates ``u`` stay as they are.

    It looks at the new parameters ``p + u``, so it comes last in the chain. `eval_params` reads the
    average out of a state at any depth, and ``with opt.eval_params():`` puts it into the model. The
    slot ``averaged`` is the average itself at every step, already debiased.

    A step at which a parameter has no gradient does not count for its average. Of a low-precision
    parameter it takes the new value before it is rounded; after `keep_master_weights` this is the
    master copy.

    Args:
        decay: in [0, 1). With a schedule, and without `debias`, it makes other averages:
            ``lambda count: 1 - 1 / (count.double() + 1)`` makes the mean of all parameters so far.
        debias: whether to weight the parameters after step i of t by
            ``(1 - decay) decay^(t-i) / (1 - decay^t)``, so that the first average is the first new
            value. If False, the average starts at the initial parameters, as with a
            `torch.optim.swa_utils.AveragedModel` that is updated once before training.
        accumulator_dtype: of the average; by default that of the params, at least float32.

    Raises:
        ValueError: decay outside [0, 1); a schedule together with `debias`; ``update`` called
            without params.

    Source: Polyak & Juditsky, "Acceleration of Stochastic Approximation by Averaging", 1992; the
    debiasing of Kingma & Ba, "Adam: A Method for Stochastic Optimization", 2015, sec. 3.

    Example:
        >>> import torch, functorch_opt as fo
        >>> tx, params = fo.chain(fo.sgd(1.0), fo.params_ema(0.5)), {"w": torch.tensor(0.0)}
        >>> state = tx.init(params)
        >>> for g in (-3.0, -3.0):
        ...     updates, state = tx.update({"w": torch.tensor(g)}, state, params)
        ...     params = fo.apply_updates(params, updates)
        >>> params, fo.eval_params(tx, state, params)
        ({'w': tensor(6.)}, {'w': tensor(5.)})
    """
    check_range(0, 1, decay=decay)
    if debias and callable(decay):
        raise ValueError(
            "a decay that is a schedule cannot be debiased: its powers mean nothing. "
            "Give debias=False."
        )

    def prepare(count, decay):
        return {
            "weight": (1 - decay) / (1 - decay ** tree.as_real(count + 1))
            if debias
            else 1 - decay
        }

    def rule(g, p, averaged, weight):
        return g, {"averaged": torch.lerp(averaged, p + g, weight)}

    def start(p):
        return p.to(accumulator_dtype or tree.at_least_float32(p.dtype), copy=True)

    return leafwise(
        rule,
        prepare,
        slots={"averaged": start},
        hyper={"decay": decay},
        point=lambda averaged: averaged,
        last=True,
    )
