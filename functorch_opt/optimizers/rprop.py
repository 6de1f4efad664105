"""Rprop: every number has a step size of its own, and only the sign of the gradient counts.

    step_size = clamp(step_size (eta_plus where g prev > 0, eta_minus where g prev < 0, else 1))
    g         = 0 where g prev < 0
    u         = sign(g) step_size;  prev = g

Sources: Riedmiller & Braun, "A Direct Adaptive Method for Faster Backpropagation Learning: The
RPROP Algorithm", 1993. After a change of sign no step is taken, neither forward nor back; this is
iRprop- of Igel & Huesken, "Improving the Rprop Learning Algorithm", 2000.
"""

from __future__ import annotations

import torch

from functorch_opt import tree
from functorch_opt._core.chain import chain
from functorch_opt._core.rule import leafwise
from functorch_opt._core.transformation import (
    GradientTransformation,
    ScalarOrSchedule,
    check_range,
    transformation,
)
from functorch_opt.transforms.scale import scale

__all__ = ["rprop", "scale_by_rprop"]


@transformation
def scale_by_rprop(
    learning_rate: ScalarOrSchedule,
    eta_minus: ScalarOrSchedule = 0.5,
    eta_plus: ScalarOrSchedule = 1.2,
    min_step_size: ScalarOrSchedule = 1e-6,
    max_step_size: ScalarOrSchedule = 50.0,
) -> GradientTransformation:
    """``u = sign(g) step_size``, with a step size for each number; 0 where g changes its sign.

    It is meant for gradients of the whole data set. The numbers are those of torch.optim.Rprop.
    optax 0.2.8 has the same step sizes, but returns the step of the update before. It also lets a
    learning rate outside of the bounds stand until a sign is compared; here it is clamped.

    Args:
        learning_rate: the first step sizes, and **nothing else**; 0 or greater.
        eta_minus: the factor of a step size where the sign has changed, in (0, 1).
        eta_plus: the factor of a step size where the sign has not changed, greater than 1.
        min_step_size: 0 or greater.
        max_step_size: greater than 0.

    Raises:
        ValueError: an argument outside its range.

    Example:
        >>> import torch, functorch_opt as fo
        >>> tx = fo.scale_by_rprop(0.5)
        >>> state = tx.init([torch.zeros(2)])
        >>> updates, state = tx.update([torch.tensor([0.1, -20.0])], state)
        >>> updates, state = tx.update([torch.tensor([0.1, 20.0])], state)
        >>> updates, fo.get(state, "step_size")
        ([tensor([0.6000, 0.0000])], [tensor([0.6000, 0.2500])])
    """
    check_range(0, float("inf"), learning_rate=learning_rate, min_step_size=min_step_size)
    check_range(0, 1, above=True, eta_minus=eta_minus)
    check_range(1, float("inf"), above=True, eta_plus=eta_plus)
    check_range(0, float("inf"), above=True, max_step_size=max_step_size)

    def rule(
        g,
        prev,
        step_size,
        learning_rate,
        eta_minus,
        eta_plus,
        min_step_size,
        max_step_size,
    ):
        # A step size of 0 means that there was no step yet.
        step_size = torch.where(step_size == 0, learning_rate, step_size)
        same, changed = g * prev > 0, g * prev < 0
        shrunk = torch.where(changed, step_size * eta_minus, step_size)
        step_size = torch.where(same, step_size * eta_plus, shrunk)
        step_size = step_size.clamp(min_step_size, max_step_size)
        g = torch.where(changed, 0.0, g)
        return g.sign() * step_size, {"prev": g, "step_size": step_size}

    etas = {"eta_minus": eta_minus, "eta_plus": eta_plus}
    bounds = {"min_step_size": min_step_size, "max_step_size": max_step_size}
    return leafwise(
        rule,
        slots={"prev": tree.zeros_like, "step_size": tree.zeros_like},
        hyper={"learning_rate": learning_rate, **etas, **bounds},
    )


@transformation
def rprop(
    learning_rate: ScalarOrSchedule,
    eta_minus: ScalarOrSchedule = 0.5,
    eta_plus: ScalarOrSchedule = 1.2,
    min_step_size: ScalarOrSchedule = 1e-6,
    max_step_size: ScalarOrSchedule = 50.0,
) -> GradientTransformation:
    """Rprop: `scale_by_rprop` with the sign flipped. The numbers are those of torch.optim.Rprop.

    Args:
        learning_rate: the first step sizes, and nothing else.
        eta_minus, eta_plus, min_step_size, max_step_size: see `scale_by_rprop`.

    Raises:
        ValueError: an argument outside its range.

    Source: Riedmiller & Braun, 1993; Igel & Huesken, 2000 (iRprop-).

    Example:
        >>> import torch, functorch_opt as fo
        >>> tx, params = fo.rprop(0.25), torch.tensor(1.0)
        >>> updates, _ = tx.update(torch.tensor(100.0), tx.init(params))
        >>> fo.apply_updates(params, updates)
        tensor(0.7500)
    """
    return chain(
        scale_by_rprop(learning_rate, eta_minus, eta_plus, min_step_size, max_step_size),
        scale(-1.0),
    )
