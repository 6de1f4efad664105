"""The gradient noise scale: how large a batch is worth its cost.

    B_simple = tr(Sigma) / |G|^2        Sigma: the covariance of the gradients of single examples
                                        G: the gradient of all of them

    |G|^2     = (B |G_B|^2 - b |G_b|^2) / (B - b)
    tr(Sigma) = (|G_b|^2 - |G_B|^2) / (1/b - 1/B)

Source: McCandlish, Kaplan, Amodei & the OpenAI Dota Team, "An Empirical Model of Large-Batch
Training", 2018, eq. 2.9 and app. A.1.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from functorch_opt import tree
from functorch_opt._core import numerics
from functorch_opt.tree import PyTree

__all__ = ["NoiseScale", "gradient_noise_scale", "noise_scale_of_norms"]


class NoiseScale(NamedTuple):
    """What `gradient_noise_scale` returns.

    Of several steps take the means of `noise` and of `signal`, and divide these: the mean of
    quotients is biased.

    Args:
        noise: an estimate of tr(Sigma), without bias.
        signal: an estimate of |G|^2, without bias. It may be negative where the noise is large.
    """

    noise: Tensor
    signal: Tensor

    @property
    def scale(self) -> Tensor:
        """B_simple, ``noise / signal``."""
        return self.noise / self.signal


def noise_scale_of_norms(
    small: Tensor | float, big: Tensor | float, b: float, B: float
) -> NoiseScale:
    """The noise scale from gradients of two batch sizes, such as those of one rank and of all.

        |G|^2     = (B big - b small) / (B - b)
        tr(Sigma) = (small - big) / (1/b - 1/B)

    Args:
        small: the squared norm of a gradient that is the mean over `b` examples, or the mean of
            several such squares.
        big: the squared norm of a gradient that is the mean over `B` examples.
        b, B: the batch sizes, 0 < b < B.

    Raises:
        ValueError: `b` is not below `B`, or not above 0.

    Source: McCandlish et al., 2018, app. A.1.

    Example:
        >>> import functorch_opt as fo
        >>> found = fo.noise_scale_of_norms(small=3.0, big=2.0, b=1, B=4)
        >>> [round(x.item(), 4) for x in (found.signal, found.noise, found.scale)]
        [1.6667, 1.3333, 0.8]
    """
    if not 0 < b < B:
        raise ValueError(f"b must be between 0 and B; got b={b}, B={B}.")
    small = torch.as_tensor(small, dtype=dtype_of(small))
    big = torch.as_tensor(big, dtype=dtype_of(big))
    signal = (B * big - b * small) / (B - b)
    noise = (small - big) / (1 / b - 1 / B)
    return NoiseScale(noise, signal)


def dtype_of(x: Tensor | float) -> torch.dtype:
    device = x.device if isinstance(x, Tensor) else torch.device("cpu")
    return numerics.real_dtype(device)


def gradient_noise_scale(grads: PyTree) -> NoiseScale:
    """The noise scale from the gradients of single examples, such as `per_example_grads` gives.

    The estimates are those of `noise_scale_of_norms` with b = 1 and B examples. They equal

        tr(Sigma) = sum_i |g_i - mean g|^2 / (B - 1)
        |G|^2     = |mean g|^2 - tr(Sigma) / B

    It is a pure function: vmap gives one for each model.

    Args:
        grads: a tree of tensors [B, ...], of at least two examples. ``None`` counts as nothing.

    Raises:
        ValueError: fewer than two examples, tensors with different B, or no tensor.

    Source: McCandlish et al., 2018, app. A.1.

    Example:
        >>> import torch, functorch_opt as fo
        >>> grads = {"w": torch.tensor([[1.0, 0.0], [3.0, 0.0]])}
        >>> found = fo.gradient_noise_scale(grads)
        >>> found.noise.item(), found.signal.item(), round(found.scale.item(), 4)
        (2.0, 3.0, 0.6667)
    """
    leaves = tree.leaves(grads)
    sizes = {x.shape[0] if x.dim() else 0 for x in leaves}
    if len(sizes) != 1 or min(sizes) < 2:
        raise ValueError(
            "grads must be tensors [B, ...] of the same B, 2 or greater; got "
            f"{[tuple(x.shape) for x in leaves]}."
        )
    (n,) = sizes
    spread, mean_square = [], []
    for x in leaves:
        real = numerics.real_dtype(x.device)
        x = tree.whole(x)
        x = x.to(numerics.at_least_float32(x.dtype))
        mean = x.mean(0)
        squares = (x - mean).abs().square()
        spread.append(squares.sum(dtype=real))
        mean_square.append(mean.abs().square().sum(dtype=real))
    noise = torch.stack(spread).sum() / (n - 1)
    return NoiseScale(noise, torch.stack(mean_square).sum() - noise / n)
