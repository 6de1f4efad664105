"""Clipped sums of gradients that are there for every example, with the results of optax."""

from __future__ import annotations

import torch
from torch import Tensor

from functorch_opt import tree
from functorch_opt._core import sharding
from functorch_opt._core.transformation import Scalar
from functorch_opt.privacy import ranks
from functorch_opt.tree import PyTree

__all__ = ["per_example_global_norm_clip", "per_example_layer_norm_clip"]


def per_example_global_norm_clip(
    grads: PyTree, l2_norm_clip: Scalar
) -> tuple[PyTree, Tensor]:
    """The sum of the gradients of all examples, each made shorter than a bound.

    `clip_and_sum` does the same, and also knows the norms.

    Args:
        grads: a tree of tensors [B, ...], in which the first axis is that of the examples.
        l2_norm_clip: the largest norm of the gradient of an example, over all leaves.

    Returns:
        A pair: the sum, a tree without the first axis; and how many gradients were clipped.

    Raises:
        ValueError: the leaves have no first axis, or not the same number of examples.

    Source: Abadi et al., "Deep Learning with Differential Privacy", 2016, alg. 1.

    Example:
        >>> import torch, functorch_opt as fo
        >>> grads = [torch.tensor([[0.0, 0.0], [3.0, 4.0]])]
        >>> fo.per_example_global_norm_clip(grads, 1.0)
        ([tensor([0.6000, 0.8000])], tensor(1))
    """
    here = tree.leaves(grads)
    division = check_examples("per_example_global_norm_clip", here)
    squares = [norm**2 for norm in ranks.norms(here, division)]
    norm = torch.stack(squares).sum(0).sqrt()
    by = factors(norm, l2_norm_clip)
    total = tree.map(lambda g: ranks.summed(by, g), grads)
    return total, clipped(by, division)


def per_example_layer_norm_clip(
    grads: PyTree, global_l2_norm_clip: Scalar, uniform: bool = True
) -> tuple[PyTree, PyTree]:
    """The same, with a bound for each leaf: the bound C divided among the K leaves.

    It is ``C / sqrt(K)``, or ``C sqrt(d / D)`` for the d of all D elements that a leaf has.

    Args:
        grads: a tree of tensors [B, ...], in which the first axis is that of the examples.
        global_l2_norm_clip: C.
        uniform: whether all leaves have the same bound.

    Returns:
        A pair: the sum, a tree without the first axis; and for each leaf, how many gradients were
        clipped.

    Raises:
        ValueError: the leaves have no first axis, or not the same number of examples.

    Source: McMahan, Ramage, Talwar & Zhang, "Learning Differentially Private Recurrent Language
    Models", 2018, sec. 3.

    Example:
        >>> import torch, functorch_opt as fo
        >>> grads = [torch.tensor([[0.0, 0.0], [3.0, 4.0]]), torch.tensor([[1.0], [0.1]])]
        >>> fo.per_example_layer_norm_clip(grads, 2**0.5)
        ([tensor([0.6000, 0.8000]), tensor([1.1000])], [tensor(1), tensor(0)])
    """
    here = tree.leaves(grads)
    division = check_examples("per_example_layer_norm_clip", here)
    lengths = iter(ranks.norms(here, division))
    number = len(here)
    total = sum(g.shape[1:].numel() for g in here)

    def of_leaf(g: Tensor) -> Tensor:
        share = 1 / number if uniform else g.shape[1:].numel() / total
        return factors(next(lengths), global_l2_norm_clip * share**0.5)

    by = tree.map(of_leaf, grads)
    counts = tree.map(lambda of_leaf: clipped(of_leaf, division), by)
    return tree.map(lambda g, of_leaf: ranks.summed(of_leaf, g), grads, by), counts


def check_examples(name: str, here: list[Tensor]) -> ranks.Division:
    """How the examples are divided. Raise ValueError for leaves of different examples."""
    numbers = {g.shape[0] if g.dim() else None for g in here}
    if len(numbers) != 1 or None in numbers:
        shapes = ", ".join(str(tuple(g.shape)) for g in here)
        raise ValueError(
            f"{name} takes gradients with an axis of examples, which comes first and has the "
            f"same size in all of them; got the shapes {shapes or 'of no tensor'}."
        )
    return ranks.of_gradients(name, here, len(here[0]))


def factors(lengths: Tensor, bound: Scalar) -> Tensor:
    """By how much each gradient is multiplied, at most 1; zeros stay."""
    return torch.where(
        lengths > bound, bound / torch.where(lengths > 0, lengths, 1.0), 1.0
    )


def clipped(by: Tensor, division: ranks.Division) -> Tensor:
    """How many examples, of all ranks, are multiplied by less than 1."""
    number: Tensor = sharding.whole(division.total((by < 1).sum()))
    return number
