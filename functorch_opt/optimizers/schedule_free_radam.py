"""Schedule-Free RAdam: it warms up by itself, and so needs no schedule at all.

    y = p                                        where the gradient is taken: the parameters
    nu = b2 nu + (1 - b2) g^2                    c2 = 1 - b2^t
    d = g / (sqrt(nu/c2) + eps)                  where rho > 4, g elsewhere
    a = r learning_rate                          where rho > 4, 0 elsewhere
    z = z - a (d + weight_decay y)
    x = (1 - c) x + c z                          where to evaluate
    y = (1 - b1) z + b1 x

    c = w / (sum of all w)      w = t^power (largest a so far)^weight_lr_power

The numbers rho and r of a step are those of RAdam, see `functorch_opt.optimizers.radam`.
Only nu and z are kept, since x = z + (y - z) / b1.

Source: Defazio et al., "The Road Less Scheduled", 2024; Liu et al., "On the Variance of the Adaptive
Learning Rate and Beyond", 2020; the authors' ``RAdamScheduleFree``.
"""

from __future__ import annotations

import torch

from functorch_opt import tree
from functorch_opt._core.chain import chain
from functorch_opt._core.groups import MaskOrFn
from functorch_opt._core.rule import leafwise
from functorch_opt._core.transformation import (
    GradientTransformation,
    ScalarOrSchedule,
    check_range,
    transformation,
)
from functorch_opt.optimizers.radam import rectification
from functorch_opt.optimizers.schedule_free import averaged
from functorch_opt.transforms.decay import add_decayed_weights
from functorch_opt.transforms.scale import scale_by_learning_rate

__all__ = ["schedule_free_radam"]


@transformation
def schedule_free_radam(
    learning_rate: ScalarOrSchedule = 0.0025,
    b1: ScalarOrSchedule = 0.9,
    b2: ScalarOrSchedule = 0.999,
    eps: ScalarOrSchedule = 1e-8,
    weight_decay: ScalarOrSchedule = 0.0,
    weight_lr_power: ScalarOrSchedule = 2.0,
    state_dtype: torch.dtype | None = None,
    *,
    silent_sgd_phase: bool = True,
    r: ScalarOrSchedule = 0.0,
    mask: MaskOrFn | None = None,
) -> GradientTransformation:
    """`schedule_free` of RAdam without a mean. Evaluate with `eval_params`.

    The rule is at the top of `functorch_opt.optimizers.schedule_free_radam`. With b2 = 0.999 the
    first four steps move nothing, and the next ones are small, so there is no warm-up to choose.

    Args:
        learning_rate: 0 or greater, and constant.
        b1: how near to the average the gradient is taken, in (0, 1). It takes the place of a
            momentum.
        b2: decay of the second moment, in [0, 1). Where it is 0.6 or less, rho never exceeds 4.
        eps: added outside the root, 0 or greater.
        weight_decay: multiplied by the learning rate; it decays y.
        weight_lr_power: power of the largest learning rate in a weight.
        state_dtype: dtype of z; by default that of the params, at least float32.
        silent_sgd_phase: whether a is 0 as long as ``rho <= 4``. If False, it is the learning rate
            there: the first steps are those of gradient descent.
        r: power of the step t in a weight.
        mask: which parameters decay, see `masked`; by default all.

    Raises:
        ValueError: an argument outside its range; ``update`` called without params.

    Source: ``RAdamScheduleFree`` of schedulefree 1.4. optax has none.

    Example:
        >>> import torch, functorch_opt as fo
        >>> tx, params = fo.schedule_free_radam(0.1), [torch.tensor([8.0])]
        >>> state = tx.init(params)
        >>> for t in range(1, 6):
        ...     updates, state = tx.update([torch.tensor([3.0])], state, params)
        ...     params = fo.apply_updates(params, updates)
        ...     if t > 3:
        ...         print(params)
        [tensor([8.])]
        [tensor([7.9983])]
    """
    check_range(0, 1, b2=b2)
    check_range(0, float("inf"), eps=eps)
    base = chain(
        normalized(b2, eps),
        add_decayed_weights(weight_decay, mask),
        scale_by_learning_rate(learning_rate),
    )

    def warmed(t, b2):
        trusted, r_squared = trust(t, b2)
        first = 0.0 if silent_sgd_phase else 1.0
        return torch.where(trusted, r_squared.sqrt(), first)

    hyper = {"learning_rate": learning_rate, "b1": b1, "b2": b2}
    hyper |= {"weight_lr_power": weight_lr_power, "r": r}
    return averaged(base, hyper, warmed, state_dtype)


def trust(t, b2):
    """Whether rho > 4; and r squared, or 1."""
    rho, r_squared = rectification(t, b2)
    return rho > 4, torch.where(rho > 4, r_squared, 1.0)


def normalized(b2: ScalarOrSchedule, eps: ScalarOrSchedule) -> GradientTransformation:
    """The direction d of the rule."""

    def prepare(count, b2, eps):
        t = tree.as_real(count + 1)
        return {"w2": 1 - b2, "c2": 1 - b2**t, "trusted": trust(t, b2)[0]}

    def rule(g, nu, w2, c2, trusted, eps):
        nu = torch.lerp(nu, g * g, w2)
        size = (nu / c2 + tree.TINY).sqrt() + eps
        return torch.where(trusted, g / size, g), {"nu": nu}

    slots, hyper = {"nu": tree.zeros_like}, {"b2": b2, "eps": eps}
    return leafwise(rule, prepare, slots=slots, hyper=hyper)
