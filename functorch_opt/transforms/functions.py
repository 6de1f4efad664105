"""Functions of trees that are no stages: averages of two trees, and the size of a gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from functorch_opt import tree
from functorch_opt._core.transformation import Scalar
from functorch_opt.tree import PyTree

__all__ = ["global_norm", "incremental_update", "periodic_update", "scale_gradient"]


def global_norm(updates: PyTree) -> Tensor:
    """The 2-norm of all leaves together; the same as ``tree.norm(updates)``.

    Args:
        updates: a tree of tensors.

    Example:
        >>> import torch, functorch_opt as fo
        >>> fo.global_norm({"w": torch.tensor([3.0]), "b": torch.tensor(4.0)})
        tensor(5.)
    """
    return tree.norm(updates)


def incremental_update(
    new_tensors: PyTree, old_tensors: PyTree, step_size: Scalar
) -> PyTree:
    """``step_size new + (1 - step_size) old``: a target network follows the trained one.

    Args:
        new_tensors: a tree of tensors.
        old_tensors: a tree of the same structure. Its dtypes are those of the result.
        step_size: in [0, 1].

    Raises:
        ValueError: the structures differ.

    Source: Lillicrap et al., "Continuous Control with Deep Reinforcement Learning", 2016, alg. 1.

    Example:
        >>> import torch, functorch_opt as fo
        >>> fo.incremental_update([torch.tensor(4.0)], [torch.tensor(0.0)], 0.25)
        [tensor(1.)]
    """

    def moved(new: Tensor, old: Tensor) -> Tensor:
        return (step_size * new + (1 - step_size) * old).to(old.dtype)

    return tree.map(moved, new_tensors, old_tensors)


def periodic_update(
    new_tensors: PyTree, old_tensors: PyTree, steps: Any, update_period: int
) -> PyTree:
    """The new tensors where `steps` is a multiple of the period, and otherwise the old ones.

    Args:
        new_tensors: a tree of tensors.
        old_tensors: a tree of the same structure. Its dtypes are those of the result.
        steps: a number of steps, an int or a 0-dim tensor.
        update_period: 1 or greater.

    Raises:
        ValueError: the structures differ.

    Source: Mnih et al., "Human-level Control through Deep Reinforcement Learning", 2015, alg. 1.

    Example:
        >>> import torch, functorch_opt as fo
        >>> new, old = [torch.tensor(4.0)], [torch.tensor(0.0)]
        >>> fo.periodic_update(new, old, 10, 5), fo.periodic_update(new, old, 11, 5)
        ([tensor(4.)], [tensor(0.)])
    """

    def chosen(new: Tensor, old: Tensor) -> Tensor:
        due = torch.as_tensor(steps, device=old.device) % update_period == 0
        return torch.where(due, new.to(old.dtype), old)

    return tree.map(chosen, new_tensors, old_tensors)


class Scaled(torch.autograd.Function):
    """The identity, whose derivative is a number."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, scale):
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.scale = inputs[1]

    @staticmethod
    def backward(ctx, g):
        return ctx.scale * g, None


def scale_gradient(inputs: PyTree, scale: float) -> PyTree:
    """The inputs as they are, whose gradients are multiplied by `scale`.

    Args:
        inputs: a tree of tensors.
        scale: a number; 0 stops the gradient, and a negative one turns it around.

    Source: Ganin et al., "Domain-Adversarial Training of Neural Networks", 2016, sec. 4.2, with -1.

    Example:
        >>> import torch, functorch_opt as fo
        >>> torch.func.grad(lambda x: fo.scale_gradient(x, -0.5) ** 2)(torch.tensor(3.0))
        tensor(-3.)
    """
    return tree.map(lambda x: Scaled.apply(x, float(scale)), inputs)
