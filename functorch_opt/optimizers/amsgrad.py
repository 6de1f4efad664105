"""AMSGrad: Adam, divided by the largest second moment so far, which never shrinks.

    mu = b1 mu + (1 - b1) g            mu_hat = mu / (1 - b1^t), or mu
    nu = b2 nu + (1 - b2) g^2          nu_hat = nu / (1 - b2^t), or nu
    top = max(top, nu_hat)             u = mu_hat / (sqrt(top + eps_root) + eps)

torch.optim takes the maximum of nu, and corrects it afterwards: ``scale_by_adam(amsgrad="torch")``.

Source: Reddi, Kale & Kumar, "On the Convergence of Adam and Beyond", 2018, alg. 2, which corrects
neither moment.
"""

from __future__ import annotations

from functools import partial

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
from functorch_opt.optimizers.adam import amsgrad_rule
from functorch_opt.transforms.scale import scale_by_learning_rate

__all__ = ["amsgrad", "scale_by_amsgrad"]


@transformation
def scale_by_amsgrad(
    b1: ScalarOrSchedule = 0.9,
    b2: ScalarOrSchedule = 0.999,
    eps: ScalarOrSchedule = 1e-8,
    eps_root: ScalarOrSchedule = 0.0,
    mu_dtype: torch.dtype | None = None,
    bias_correction_mu: bool = True,
    bias_correction_nu: bool = True,
) -> GradientTransformation:
    """``u = mu_hat / (sqrt(largest nu_hat so far + eps_root) + eps)``.

    Args:
        b1: decay of the first moment, in [0, 1).
        b2: decay of the second moment, in [0, 1).
        eps: added outside the root, 0 or greater.
        eps_root: added inside the root, 0 or greater.
        mu_dtype: dtype in which ``mu`` is stored; by default that of the params, at least float32.
        bias_correction_mu: whether the first moment is corrected for having started at 0.
        bias_correction_nu: the same for the second one, before its maximum is taken.

    Raises:
        ValueError: an argument outside its range.

    Source: Reddi, Kale & Kumar, 2018, alg. 2; the paper has neither correction.

    Example:
        >>> import torch, functorch_opt as fo
        >>> tx = fo.scale_by_amsgrad(bias_correction_mu=False)
        >>> tx.update([torch.tensor([0.1, -20.0])], tx.init([torch.zeros(2)]))[0]
        [tensor([ 0.1000, -0.1000])]
    """
    check_range(0, 1, b1=b1, b2=b2)
    check_range(0, float("inf"), eps=eps, eps_root=eps_root)

    def prepare(count, b1, b2, eps, eps_root):
        t = tree.as_real(count + 1)
        c1 = 1 - b1**t if bias_correction_mu else torch.ones_like(t)
        c2 = 1 - b2**t if bias_correction_nu else torch.ones_like(t)
        now = {"k": c1, "root": eps_root + tree.TINY, "floor": eps * c1}
        return {"w1": 1 - b1, "w2": 1 - b2, "c2": c2, **now}

    slots = dict.fromkeys(("nu", "nu_max"), tree.zeros_like)
    return leafwise(
        amsgrad_rule,
        prepare,
        slots={"mu": partial(tree.zeros_like, dtype=mu_dtype), **slots},
        hyper={"b1": b1, "b2": b2, "eps": eps, "eps_root": eps_root},
    )


@transformation
def amsgrad(
    learning_rate: ScalarOrSchedule,
    b1: ScalarOrSchedule = 0.9,
    b2: ScalarOrSchedule = 0.999,
    eps: ScalarOrSchedule = 1e-8,
    eps_root: ScalarOrSchedule = 0.0,
    mu_dtype: torch.dtype | None = None,
    bias_correction_mu: bool = True,
    bias_correction_nu: bool = True,
) -> GradientTransformation:
    """AMSGrad: `scale_by_amsgrad`, then the learning rate.

    Args:
        learning_rate: 0 or greater, or a schedule.
        b1, b2, eps, eps_root, mu_dtype: see `scale_by_amsgrad`.
        bias_correction_mu, bias_correction_nu: see `scale_by_amsgrad`.

    Raises:
        ValueError: an argument outside its range.

    Source: Reddi, Kale & Kumar, 2018, alg. 2.

    Example:
        >>> import functorch_opt as fo
        >>> fo.amsgrad(0.1)
        amsgrad(0.1)
    """
    return chain(
        scale_by_amsgrad(
            b1, b2, eps, eps_root, mu_dtype, bias_correction_mu, bias_correction_nu
        ),
        scale_by_learning_rate(learning_rate),
    )
