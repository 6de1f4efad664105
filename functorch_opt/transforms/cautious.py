"""What the gradient says of an update: the signs on which both agree, or the gradient's own signs.

    cautious:        mask = [u and the step down g agree]        u = u mask / max(mean(mask), 1e-3)
    gradient_signs:  u = |u| sign of the step down g

Source: Liang, Chen, Liu & Liu, "Cautious Optimizers: Improving Training with One Line of Code",
2024; Cao, Li, Liang, Sha, Song & Zhang, "Grams: Gradient Descent with Adaptive Momentum Scaling",
2024.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from functorch_opt._core.chain import chain
from functorch_opt._core.rule import leafwise
from functorch_opt._core.transformation import GradientTransformation, transformation
from functorch_opt._core.wrap import wrap

__all__ = ["cautious", "gradient_signs"]


def after(
    inner: GradientTransformation, flip_sign: bool, f: Callable[[Tensor, Tensor], Tensor]
) -> GradientTransformation:
    """`inner`, whose update becomes ``f(u, d)``, where d is a step in the direction of u."""

    def of(u, g):
        if u.is_complex():  # a pair of reals
            pairs = [torch.view_as_real(x.resolve_conj()) for x in (u, g)]
            return torch.view_as_complex(of(*pairs))
        return f(u, -g if flip_sign else g)

    return wrap(inner, after=of)


@transformation
def cautious(
    inner: GradientTransformation, flip_sign: bool = True
) -> GradientTransformation:
    """Of each update of `inner` keep the elements that go down the gradient, and scale them up.

    The rule is at the top of `functorch_opt.transforms.cautious`. The mean is that over the tensor.
    What `inner` decays is masked too: to decay as the authors do, put `add_decayed_weights` after
    it, as in ``chain(cautious(scale_by_adam(), flip_sign=False), add_decayed_weights(0.1),
    scale_by_learning_rate(1e-3))``.

    Args:
        inner: any transformation.
        flip_sign: whether `inner` turns the gradient into a step, as whole optimizers do; False for
            stages before the learning rate.

    Raises:
        TypeError: `inner` is not a transformation.

    Source: Liang et al., 2024.

    Example:
        >>> import torch, functorch_opt as fo
        >>> tx = fo.cautious(fo.sgd(1.0, momentum=0.5))
        >>> _, state = tx.update([torch.tensor([1.0, 1.0])], tx.init([torch.zeros(2)]))
        >>> tx.update([torch.tensor([1.0, -0.25])], state)[0]
        [tensor([-3.,  0.])]
    """

    def rule(g, kept, n):
        return g * (n / kept.clamp(min=n / 1000))

    def kept(g):
        return (g != 0).to(g.dtype).sum()

    def where_both_agree(u, d):
        return torch.where(u * d > 0, u, 0.0)

    return chain(
        after(inner, flip_sign, where_both_agree),
        leafwise(rule, sums={"kept": kept, "n": lambda g: g.numel()}),
    )


@transformation
def gradient_signs(
    inner: GradientTransformation, flip_sign: bool = True
) -> GradientTransformation:
    """Each update has the size that `inner` gives it, and goes down the gradient of this step.

    What `inner` decays gets these signs too, so let it be without weight decay; see `cautious`.

    Args:
        inner: any transformation.
        flip_sign: whether `inner` turns the gradient into a step; see `cautious`.

    Raises:
        TypeError: `inner` is not a transformation.

    Source: Cao et al., 2024.

    Example:
        >>> import torch, functorch_opt as fo
        >>> tx = fo.gradient_signs(fo.sgd(1.0, momentum=0.5))
        >>> _, state = tx.update([torch.tensor([1.0, 1.0])], tx.init([torch.zeros(2)]))
        >>> tx.update([torch.tensor([1.0, -0.25])], state)[0]
        [tensor([-1.5000,  0.2500])]
    """
    return after(inner, flip_sign, lambda u, d: u.abs() * torch.sign(d))
