"""SM3: Adagrad, which keeps of the squares one maximum for each row, each column, each slice.

    nu_i = min of mu_r over the slices r that hold i  +  g_i^2
    mu_r = max of nu_i over the elements i of r                        m = b1 m + (1 - b1) u
    u    = g / sqrt(nu + eps)

A slice is what remains of a tensor where one index is fixed: there are n + m of an [n, m] matrix.
With b2 < 1 it is ``nu = b2 min mu + (1 - b2) g^2``.

Source: Anil, Gupta, Koren & Singer, "Memory-Efficient Adaptive Optimization", 2019, alg. 2 (SM3-II)
and sec. 4 (momentum).
"""

from __future__ import annotations

from functools import reduce

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
from functorch_opt.transforms.scale import scale_by_learning_rate

__all__ = ["scale_by_sm3", "sm3"]


def _dims(x):
    """Its shape; a number is a tensor with one element."""
    return list(x.shape) or [1]


def _slice_maxima(p):
    """Zeros for the slices along the first dim, then for those along the second, and so on."""
    return p.new_zeros(sum(_dims(p)), dtype=tree.at_least_float32(p.real.dtype))


def _least(mu, dims):
    """For each element the smallest maximum of the slices that hold it."""
    each = []
    for i, x in enumerate(mu.split(dims)):
        shape = [1] * len(dims)
        shape[i] = -1
        each.append(x.reshape(shape))
    return reduce(torch.minimum, each).expand(dims)


def _maxima(nu):
    """The largest element of each slice."""
    found = []
    for i in range(nu.dim()):
        others = [j for j in range(nu.dim()) if j != i]
        found.append(nu.amax(others) if others else nu)
    return torch.cat(found)


@transformation
def scale_by_sm3(
    b1: ScalarOrSchedule = 0.9,
    b2: ScalarOrSchedule = 1.0,
    eps: ScalarOrSchedule = 1e-8,
) -> GradientTransformation:
    """``u = g / sqrt(nu + eps)``, with ``nu = g^2`` plus the least maximum; and of u the mean.

    The rule is at the top of `functorch_opt.optimizers.sm3`. optax fails for a parameter that is a
    number, and refuses complex ones. Here a number is a tensor with one element, and the square of
    a complex number is ``|g|^2``. The slot ``mu`` has the maxima of all slices one after another.

    Args:
        b1: decay of the mean of u, in [0, 1).
        b2: decay of the maxima, in [0, 1]; 1: the maxima grow, and ``g^2`` has weight 1.
        eps: 0 or greater.

    Raises:
        ValueError: an argument outside its range.

    Source: Anil, Gupta, Koren & Singer, 2019, alg. 2.

    Example:
        >>> import torch, functorch_opt as fo
        >>> tx = fo.scale_by_sm3(b1=0.0)
        >>> g = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
        >>> _, state = tx.update({"w": g}, tx.init({"w": torch.zeros(2, 3)}))
        >>> fo.get(state, "mu")["w"]
        tensor([ 9., 36., 16., 25., 36.])
    """
    check_range(0, 1, b1=b1)
    check_range(0, float("inf"), eps=eps)
    check_range(0, 1, closed=True, b2=b2)

    def prepare(b1, b2, eps):
        return {"w1": 1 - b1, "w2": 1 - b2 + (b2 == 1), "root": eps + tree.TINY}

    def rule(g, mu, m, w1, b2, w2, root):
        if not g.numel():
            return g, {"mu": mu.real.clone(), "m": m.clone()}
        square = (g * g.conj()).real.reshape(_dims(g))
        nu = (b2 * _least(mu.real, _dims(g)) + w2 * square).real
        m = torch.lerp(m, g * (nu + root).rsqrt().reshape(g.shape), w1)
        return m, {"mu": _maxima(nu), "m": m}

    slots = {"mu": _slice_maxima, "m": tree.zeros_like}
    hyper = {"b1": b1, "b2": b2, "eps": eps}
    return leafwise(rule, prepare, slots=slots, hyper=hyper, kind="tensorwise")


@transformation
def sm3(
    learning_rate: ScalarOrSchedule, momentum: ScalarOrSchedule = 0.9
) -> GradientTransformation:
    """SM3: `scale_by_sm3`, then the learning rate. optax takes no schedule for it.

    Args:
        learning_rate: 0 or greater, or a schedule.
        momentum: b1 of `scale_by_sm3`, in [0, 1).

    Raises:
        ValueError: an argument outside its range.

    Source: Anil, Gupta, Koren & Singer, 2019, alg. 2.

    Example:
        >>> import functorch_opt as fo
        >>> fo.sm3(0.1, momentum=0.0)
        sm3(0.1, momentum=0.0)
    """
    check_range(0, 1, momentum=momentum)
    return chain(scale_by_sm3(momentum), scale_by_learning_rate(learning_rate))
