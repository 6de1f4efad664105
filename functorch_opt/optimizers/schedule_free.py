"""Schedule-Free: an average of all steps in place of a schedule that falls to 0.

    y = p                                        where the gradient is taken: the parameters
    z = z + u                                    u = base_optimizer(g, y), with its learning rate
    x = (1 - c) x + c z                          where to evaluate
    y = (1 - b1) z + b1 x

    c = w / (sum of all w)      w = t^r (largest learning rate so far)^weight_lr_power

Only z is kept, since x = z + (y - z) / b1.

Source: Defazio, Yang, Mehta, Mishchenko, Khaled & Cutkosky, "The Road Less Scheduled", 2024, alg. 1;
the authors' code.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from functorch_opt import tree
from functorch_opt._core.chain import chain
from functorch_opt._core.groups import MaskOrFn
from functorch_opt._core.transformation import (
    GradientTransformation,
    ScalarOrSchedule,
    check_range,
    check_whole,
    transformation,
)
from functorch_opt._core.wrap import wrap
from functorch_opt.optimizers.adagrad import scale_by_rms
from functorch_opt.transforms.decay import add_decayed_weights
from functorch_opt.transforms.scale import scale_by_learning_rate

__all__ = ["schedule_free", "schedule_free_adamw", "schedule_free_sgd"]


@transformation
def schedule_free(
    base_optimizer: GradientTransformation,
    learning_rate: ScalarOrSchedule,
    b1: ScalarOrSchedule = 0.9,
    weight_lr_power: ScalarOrSchedule = 2.0,
    state_dtype: torch.dtype | None = None,
    *,
    warmup_steps: int = 0,
    r: ScalarOrSchedule = 0.0,
) -> GradientTransformation:
    """The steps of `base_optimizer`, averaged, with gradients between the last one and the average.

    The rule is at the top of `functorch_opt.optimizers.schedule_free`. Evaluate with the average x,
    which `eval_params` gives. The wrapper looks at the new parameters, so it comes last in a chain.

    Args:
        base_optimizer: an optimizer without momentum. Its decay sees y.
        learning_rate: that of `base_optimizer`, for the weights w. In groups with other rates it is
            the largest one; as long as they are in proportion, each group has the weights that it
            would have by itself.
        b1: how near to the average the gradient is taken, in (0, 1). It takes the place of a
            momentum.
        weight_lr_power: power of the largest learning rate in a weight.
        state_dtype: dtype of z; by default that of the params, at least float32.
        warmup_steps: the learning rate and the updates of `base_optimizer` are multiplied by
            ``min(1, t / warmup_steps)``. A schedule of your own takes its place.
        r: power of the step t in a weight.

    Raises:
        ValueError: an argument outside its range; ``update`` called without params.
        TypeError: `base_optimizer` is not a transformation.

    Source: Defazio et al., 2024, alg. 1, and the authors' code. In optax 0.2.8 the learning rates
    of the weights are one step ahead of those of `base_optimizer`.

    Example:
        >>> import torch, functorch_opt as fo
        >>> tx, params = fo.schedule_free(fo.sgd(1.0), 1.0, b1=0.5), [torch.tensor(0.0)]
        >>> state = tx.init(params)
        >>> for _ in range(2):
        ...     updates, state = tx.update([torch.tensor(-1.0)], state, params)
        ...     params = fo.apply_updates(params, updates)
        ...     print(params, fo.eval_params(tx, state, params))
        [tensor(1.)] [tensor(1.)]
        [tensor(1.7500)] [tensor(1.5000)]
    """
    check_whole(0, warmup_steps=warmup_steps)

    def warmed(t):
        return (t / warmup_steps).clamp(max=1) if warmup_steps else 1.0

    hyper = {"learning_rate": learning_rate, "b1": b1, "r": r}
    hyper["weight_lr_power"] = weight_lr_power
    return averaged(base_optimizer, hyper, warmed, state_dtype)


def averaged(
    base_optimizer: GradientTransformation,
    hyper: dict[str, ScalarOrSchedule],
    warmed: Callable[..., Any],
    state_dtype: torch.dtype | None,
) -> GradientTransformation:
    """The rule. `warmed` is what the learning rate is multiplied by: a function of t, or of t and b2,
    which is then in `hyper`.
    """
    check_range(0, 1, above=True, b1=hyper["b1"])
    check_range(0, float("inf"), weight_lr_power=hyper["weight_lr_power"], r=hyper["r"])

    def first(p):
        return p.to(state_dtype or tree.at_least_float32(p.dtype), copy=True)

    def weights(t, warm, learning_rate, weight_lr_power, r, largest, total):
        largest = largest.clamp(min=largest_of(learning_rate * warm))
        w = t**r * largest**weight_lr_power
        total = total + w
        c = w / (total + (total == 0))
        return {"c": c, "warm": warm}, {"largest": largest, "total": total}

    def prepare(count, learning_rate, weight_lr_power, r, largest, total):
        t = tree.as_real(count + 1)
        given = (learning_rate, weight_lr_power, r, largest, total)
        return weights(t, warmed(t), *given)

    def prepare_with_b2(count, b2, learning_rate, weight_lr_power, r, largest, total):
        t = tree.as_real(count + 1)
        given = (learning_rate, weight_lr_power, r, largest, total)
        return weights(t, warmed(t, b2), *given)

    def after(u, p, z, b1, c, warm):
        u = warm * u
        moved = c * (z - p) + (1 - b1 * (1 - c)) * u
        return moved.to(tree.at_least_float32(p.dtype)), {"z": z + u}

    zero = torch.zeros((), dtype=torch.float64)
    return wrap(
        base_optimizer,
        slots={"z": first},
        shared={"largest": zero, "total": zero},
        hyper=hyper,
        prepare=prepare_with_b2 if "b2" in hyper else prepare,
        after=after,
        point=lambda p, z, b1: z + (p - z) / b1,
        last=True,
    )


def largest_of(x: Any) -> Any:
    """The largest one, if groups have other learning rates: there is one average for all."""
    return x.amax() if isinstance(x, Tensor) and x.dim() else x


@transformation
def schedule_free_adamw(
    learning_rate: ScalarOrSchedule = 0.0025,
    warmup_steps: int | None = None,
    b1: ScalarOrSchedule = 0.9,
    b2: ScalarOrSchedule = 0.999,
    eps: ScalarOrSchedule = 1e-8,
    weight_decay: ScalarOrSchedule = 0.0,
    weight_lr_power: ScalarOrSchedule = 2.0,
    state_dtype: torch.dtype | None = None,
    *,
    r: ScalarOrSchedule = 0.0,
    mask: MaskOrFn | None = None,
) -> GradientTransformation:
    """`schedule_free` of AdamW without a mean. Evaluate with `eval_params`.

    Args:
        learning_rate: 0 or greater; usually larger than that of AdamW, and constant.
        warmup_steps, b1, weight_lr_power, state_dtype, r: see `schedule_free`.
        b2: decay of the second moment, in [0, 1).
        eps: added outside the root, 0 or greater.
        weight_decay: multiplied by the learning rate; it decays y.
        mask: which parameters decay, see `masked`; by default all.

    Raises:
        ValueError: an argument outside its range; ``update`` called without params.

    Source: Defazio et al., 2024, the authors' code. optax 0.2.8 has other numbers under warm-up.

    Example:
        >>> import functorch_opt as fo
        >>> fo.schedule_free_adamw(0.01, warmup_steps=100)
        schedule_free_adamw(0.01, warmup_steps=100)
    """
    check_range(0, 1, b2=b2)
    base = chain(
        scale_by_rms(b2, eps, eps_in_sqrt=False, bias_correction=True),
        add_decayed_weights(weight_decay, mask),
        scale_by_learning_rate(learning_rate),
    )
    given = (learning_rate, b1, weight_lr_power, state_dtype)
    return schedule_free(base, *given, warmup_steps=warmup_steps or 0, r=r)


@transformation
def schedule_free_sgd(
    learning_rate: ScalarOrSchedule = 1.0,
    warmup_steps: int | None = None,
    b1: ScalarOrSchedule = 0.9,
    weight_decay: ScalarOrSchedule = 0.0,
    weight_lr_power: ScalarOrSchedule = 2.0,
    state_dtype: torch.dtype | None = None,
    *,
    r: ScalarOrSchedule = 0.0,
    mask: MaskOrFn | None = None,
) -> GradientTransformation:
    """`schedule_free` of gradient descent. Evaluate with `eval_params`.

    Args:
        learning_rate: 0 or greater; often 10 to 50 times that of SGD with momentum.
        warmup_steps, b1, weight_lr_power, state_dtype, r: see `schedule_free`.
        weight_decay: multiplied by the learning rate; it decays y.
        mask: which parameters decay, see `masked`; by default all.

    Raises:
        ValueError: an argument outside its range; ``update`` called without params.

    Source: Defazio et al., 2024, alg. 1, and the authors' code.

    Example:
        >>> import functorch_opt as fo
        >>> fo.schedule_free_sgd(5.0, warmup_steps=100)
        schedule_free_sgd(5.0, warmup_steps=100)
    """
    base = chain(
        add_decayed_weights(weight_decay, mask), scale_by_learning_rate(learning_rate)
    )
    given = (learning_rate, b1, weight_lr_power, state_dtype)
    return schedule_free(base, *given, warmup_steps=warmup_steps or 0, r=r)
