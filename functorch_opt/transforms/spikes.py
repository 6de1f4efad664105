"""Clips of what is larger than it has been so far: of elements, of tensors, of all updates together.

    clip_spikes           a   = decay a + (1 - decay) max|u|                      over the tensor
                          h   = a / (1 - decay^t)
                          u   = h u / max|u|                                      where |u| > h

    scale_to_usual_norm   m   = b1 m + (1 - b1) |u|              v = b2 v + (1 - b2) |u|^2
                          u   = m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) u / |u|

    zclip                 z   = (|u| - mean) / (std + eps)                        over all tensors
                          top = mean + threshold^2 std / z if z > threshold, otherwise |u|
                          u   = top u / |u|
                          mean = decay mean + (1 - decay) top
                          var  = decay var + (1 - decay) (top - mean)^2

Sources: Huang, Hu, Zhang, Jin, Li, Shen, Chen, Liu, Wen, Wang & Liu, "Stable-SPAM: How to Train in
4-Bit More Stably than 16-Bit Adam", 2025, alg. 1; Kumar, Owen, Chowdhury & Güra, "ZClip: Adaptive
Spike Mitigation for LLM Pre-Training", 2025, alg. 1.
"""

from __future__ import annotations

import torch

from functorch_opt import tree
from functorch_opt._core import numerics
from functorch_opt._core.rule import leafwise
from functorch_opt._core.sums import largest
from functorch_opt._core.transformation import (
    GradientTransformation,
    Scalar,
    ScalarOrSchedule,
    check_range,
    check_whole,
    transformation,
)

__all__ = ["clip_spikes", "scale_to_usual_norm", "zclip"]


@transformation
def clip_spikes(decay: ScalarOrSchedule = 0.999) -> GradientTransformation:
    """Bring down the elements that are above the usual largest one of their tensor: AdaClip.

    The rule is at the top of `functorch_opt.transforms.spikes`. It belongs before the moments.

    Args:
        decay: of the mean of the largest elements, in [0, 1).

    Raises:
        ValueError: decay outside [0, 1).

    Source: Huang et al., 2025, alg. 1.

    Example:
        >>> import torch, functorch_opt as fo
        >>> tx = fo.clip_spikes(0.5)
        >>> _, state = tx.update([torch.tensor([1.0, -2.0])], tx.init([torch.zeros(2)]))
        >>> tx.update([torch.tensor([1.0, -8.0])], state)[0]
        [tensor([ 1., -6.])]
    """
    check_range(0, 1, decay=decay)

    def prepare(count, decay):
        t = tree.as_real(count + 1)
        return {"weight": 1 - decay, "correction": 1 / (1 - decay**t)}

    def top(g):
        return g.abs().amax() if g.numel() else g.new_zeros(())

    def rule(g, usual, top, weight, correction):
        usual = torch.lerp(usual, top, weight)
        bound = correction * usual
        share = bound / top.clamp(min=tree.TINY)
        u = torch.where(g.abs() > bound, share * g, g)
        return u, {"usual": usual}

    slots = {"usual": numerics.scalar_slot(0.0)}
    sums = {"top": largest(top)}
    return leafwise(rule, prepare, slots=slots, hyper={"decay": decay}, sums=sums)


@transformation
def scale_to_usual_norm(
    b1: ScalarOrSchedule = 0.7, b2: ScalarOrSchedule = 0.9, eps: ScalarOrSchedule = 1e-8
) -> GradientTransformation:
    """Give each tensor a norm near 1, by the history of its norms: AdaGN.

    The rule is at the top of `functorch_opt.transforms.spikes`. It belongs before the moments. A
    tensor of zeros stays as it is.

    Args:
        b1: decay of the mean of norms, in [0, 1).
        b2: decay of the mean of squares of norms, in [0, 1).
        eps: added outside the root, 0 or greater.

    Raises:
        ValueError: an argument outside its range.

    Source: Huang et al., 2025, alg. 1.

    Example:
        >>> import torch, functorch_opt as fo
        >>> tx = fo.scale_to_usual_norm()
        >>> tx.update([torch.tensor([3.0, -4.0])], tx.init([torch.zeros(2)]))[0]
        [tensor([ 0.6000, -0.8000])]
    """
    check_range(0, 1, b1=b1, b2=b2)
    check_range(0, float("inf"), eps=eps)

    def prepare(count, b1, b2):
        t = tree.as_real(count + 1)
        weights = {"w1": 1 - b1, "w2": 1 - b2}
        return {**weights, "c1": 1 / (1 - b1**t), "c2": 1 / (1 - b2**t)}

    def rule(g, mean, square, gg, w1, w2, c1, c2, eps):
        is_zero = gg == 0
        norm = torch.where(is_zero, 1.0, gg).sqrt()  # so its slope at 0 is finite
        mean = torch.lerp(mean, torch.where(is_zero, 0.0, norm), w1)
        square = torch.lerp(square, gg, w2)
        usual = c1 * mean / ((c2 * square + tree.TINY).sqrt() + eps)
        return g * (usual / norm), {"mean": mean, "square": square}

    slots = {name: numerics.scalar_slot(0.0) for name in ("mean", "square")}
    hyper = {"b1": b1, "b2": b2, "eps": eps}
    sums = {"gg": lambda g: g.square().sum()}
    return leafwise(rule, prepare, slots=slots, hyper=hyper, sums=sums)


@transformation
def zclip(
    decay: Scalar = 0.97,
    threshold: Scalar = 2.5,
    warmup_steps: int = 25,
    eps: Scalar = 1e-6,
) -> GradientTransformation:
    """Scale all updates down where their norm is an outlier among those so far.

    The rule is at the top of `functorch_opt.transforms.spikes`. During the warmup nothing is clipped,
    and the mean and the variance are those of all norms so far. A norm that is not finite does not
    count; to leave such a step out, put `apply_if_finite` around the optimizer. The authors then
    clip to norm 1 too: ``chain(zclip(), clip_by_global_norm(1.0), ...)``.

    Args:
        decay: of mean and variance, in [0, 1).
        threshold: the z-score above which a norm is an outlier, greater than 0.
        warmup_steps: how many steps only measure, 2 or greater.
        eps: added to the standard deviation, 0 or greater.

    Raises:
        ValueError: an argument outside its range.

    Source: Kumar et al., 2025, alg. 1 with its reciprocal clipping.

    Example:
        >>> import torch, functorch_opt as fo
        >>> tx = fo.zclip(warmup_steps=2)
        >>> state = tx.init([torch.zeros(1)])
        >>> for g in (1.0, 3.0, 22.0):
        ...     updates, state = tx.update([torch.tensor([g])], state)
        >>> updates                                                           # 2 + 2.5^2 * 1 / 20
        [tensor([2.3125])]
    """
    check_range(0, 1, decay=decay)
    check_range(0, float("inf"), above=True, threshold=threshold)
    check_range(0, float("inf"), eps=eps)
    check_whole(2, warmup_steps=warmup_steps)

    def prepare(updates, mean, variance, seen, decay, threshold, eps):
        norm = (tree.norm(updates).to(mean.dtype) ** 2 + tree.TINY).sqrt()
        z = (norm - mean) / ((variance + tree.TINY).sqrt() + eps)
        warm = seen >= warmup_steps
        spike = warm & (z > threshold)
        outer = threshold**2 * (variance + tree.TINY).sqrt()
        top = torch.where(spike, mean + outer / torch.where(spike, z, 1.0), norm)
        n = tree.as_real(seen + 1)
        weight = torch.where(warm, 1 - decay, 1 / n)
        new_mean = mean + weight * (top - mean)
        # While it is warming up, this is the variance of all norms; afterwards a running mean.
        apart = torch.where(warm, top - new_mean, top - mean) * (top - new_mean)
        new_variance = variance + weight * (apart - variance)
        counts = torch.isfinite(norm)
        now = {
            "mean": torch.where(counts, new_mean, mean),
            "variance": torch.where(counts, new_variance, variance),
            "seen": torch.where(counts, seen + 1, seen),
        }
        return {"factor": torch.where(spike, top / norm, 1.0)}, now

    return leafwise(
        lambda g, factor: g * factor,
        prepare,
        shared={
            "mean": torch.zeros((), dtype=torch.float64),
            "variance": torch.zeros((), dtype=torch.float64),
            "seen": torch.zeros((), dtype=torch.int64),
        },
        hyper={"decay": decay, "threshold": threshold, "eps": eps},
    )
