"""The gradient of every example, ``g_i = grad loss(params, example i)``.

Either all of them are returned, or their clipped sum, for which only some are held at a time.

A loss is a function ``loss(params, *batch) -> scalar`` of a batch, as it is written for ordinary
training. It is called with batches of one example, under `torch.func.vmap`. Use a module through
`torch.func.functional_call`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.func import grad_and_value, vmap

from functorch_opt import tree
from functorch_opt._core import structure
from functorch_opt._core.sharding import part_of, whole
from functorch_opt.privacy.aggregate import (
    ClippedSum,
    Norms,
    check_bounds,
    check_weights,
    clip_and_sum,
    examples,
)
from functorch_opt.privacy.ranks import Division, of_batch
from functorch_opt.tree import PyTree

__all__ = ["clipped_grad_sum", "per_example_grads"]

Loss = Callable[..., Tensor]
Randomness = Literal["error", "different", "same"]


def per_example_grads(
    loss: Loss, chunk_size: int | None = None, randomness: Randomness = "error"
) -> Callable[..., PyTree]:
    """A function that gives the gradient of every example.

    In comparison, ``grad(loss)`` gives the gradient of a batch.

    If the loss of a batch is the sum of the losses of its examples, its gradient is the sum of
    these gradients; if it is the mean, its gradient is their mean. A layer that mixes examples
    (batch normalization in training) sees a batch of one example, if it accepts that at all.

    Args:
        loss: ``(params, *batch) -> scalar``. It gets batches of one example, in which the first
            axis of every tensor has size 1.
        chunk_size: how many examples to work on at a time; None means all. It bounds the memory
            that is needed beside the result.
        randomness: what random operations in `loss`, such as dropout, do: they are "different" for
            every example, the "same" for all examples of a chunk, or an "error".

    Returns:
        ``(params, *batch) -> grads``. The `batch` consists of trees of tensors [B, ...]; let `loss`
        close over what is not per example. The `grads` have the structure of `params`, with tensors
        [B, ...]. If the batch consists of DTensors with ``Shard(0)``, each rank works on its own
        examples, and the gradients are DTensors that are divided in the same way. Sharded `params`
        are gathered for it.

    Raises:
        ValueError: `chunk_size` below 1; tensors with different B; a batch of ordinary tensors for
            sharded `params`, or one that is not divided by examples.
        NotImplementedError: a derivative would go from one rank to another.

    Example:
        >>> import torch, functorch_opt as fo
        >>> def loss(params, x, y):
        ...     return ((x @ params["w"] - y) ** 2).sum()
        >>> grads = fo.per_example_grads(loss)({"w": torch.ones(2)}, torch.eye(2), torch.zeros(2))
        >>> grads["w"]
        tensor([[2., 0.],
                [0., 2.]])
    """
    _check_chunk_size(chunk_size)

    def grads(params: PyTree, *batch: PyTree) -> PyTree:
        params, batch, division = _here("per_example_grads", params, batch)
        chunks = [
            _of_chunk(loss, params, chunk, randomness)[0]
            for chunk, _ in _chunks(batch, None, chunk_size)
        ]
        return tree.map(lambda *gs: division.of_examples(_cat(gs)), *chunks)

    return grads


def clipped_grad_sum(
    loss: Loss,
    l2_norm_clip: Norms,
    chunk_size: int | None = None,
    randomness: Randomness = "error",
) -> Callable[..., ClippedSum]:
    """A function that gives the sum of the clipped gradients of the examples.

    It never holds more than `chunk_size` gradients.

    The result is that of ``clip_and_sum(per_example_grads(loss)(params, *batch), l2_norm_clip,
    weights)``, with the loss of every example. Each chunk is clipped and added before the next one
    begins. Of a batch that the ranks divide, the sum is that over all ranks, as a DTensor, and the
    norms and losses are divided as the batch is.

    Args:
        loss: ``(params, *batch) -> scalar``, see `per_example_grads`.
        l2_norm_clip: C, greater than 0; infinity does not clip. With a tree of them, parts are
            clipped by their own norms, see `clip_and_sum`.
        chunk_size: how many gradients to hold at a time; None means all. On a CPU, 32 to 128 is
            often the fastest too.
        randomness: what random operations in `loss` do, see `per_example_grads`.

    Returns:
        ``(params, *batch, weights=None) -> ClippedSum``. B may be 0; then the sum is zero. The
        `weights`, [B], are factors of the losses.

    Raises:
        ValueError: `chunk_size` below 1; tensors with different B; what `clip_and_sum` raises.
        NotImplementedError, ValueError: with many ranks, see `per_example_grads`.

    Example:
        >>> import torch, functorch_opt as fo
        >>> def loss(params, x, y):
        ...     return ((x @ params["w"] - y) ** 2).sum()
        >>> clipped_sum = fo.clipped_grad_sum(loss, l2_norm_clip=1.0, chunk_size=1)
        >>> clipped = clipped_sum({"w": torch.ones(2)}, torch.eye(2), torch.zeros(2))
        >>> clipped.sum, clipped.norms, clipped.values
        ({'w': tensor([1., 1.])}, tensor([2., 2.]), tensor([1., 1.]))
    """
    _check_chunk_size(chunk_size)
    check_bounds(l2_norm_clip, finite=False)

    def of_chunk(
        params: PyTree, chunk: tuple[PyTree, ...], weights: Tensor | None
    ) -> tuple[ClippedSum, Tensor]:
        grads, values = _of_chunk(loss, params, chunk, randomness)
        return clip_and_sum(grads, l2_norm_clip, weights), values

    def clipped(
        params: PyTree, *batch: PyTree, weights: Tensor | None = None
    ) -> ClippedSum:
        n = examples(batch, "batch")
        check_weights(weights, n)
        params, batch, division = _here("clipped_grad_sum", params, batch)
        total: Any = None
        norms, values = [], []
        for chunk, w in _chunks(batch, division.weights_here(weights), chunk_size):
            # It is a call of its own, so that its gradients are freed before the next one.
            part, losses = of_chunk(params, chunk, w)
            total = part.sum if total is None else tree.map(torch.add, total, part.sum)
            norms.append(part.norms)
            values.append(losses)
        return ClippedSum(
            tree.map(division.total, total),
            tree.map(lambda *ns: division.of_examples(_cat(ns)), *norms),
            l2_norm_clip,
            division.of_examples(_cat(values)),
        )

    return clipped


def _here(
    name: str,
    params: PyTree,
    batch: tuple[PyTree, ...],
) -> tuple[PyTree, tuple[PyTree, ...], Division]:
    """The whole parameters, this rank's examples of the batch, and how the batch is divided."""
    examples(batch, "batch")
    ps, xs = tree.leaves(params), tree.leaves(batch)
    division = of_batch(name, ps, xs)
    return tree.map(whole, params), tree.map(part_of, batch), division


def _cat(chunks: Sequence[Tensor]) -> Tensor:
    return chunks[0] if len(chunks) == 1 else torch.cat(list(chunks))


def _chunks(
    batch: tuple[PyTree, ...], weights: Tensor | None, chunk_size: int | None
) -> Iterator[tuple[tuple[PyTree, ...], Tensor | None]]:
    """The batch, some examples at a time. An empty batch is a chunk of its own."""
    n = examples(batch, "batch")
    size = n if chunk_size is None else min(chunk_size, n)
    for begin in range(0, n, size) if n else [0]:
        chunk = slice(begin, begin + size)
        yield (
            tree.map(lambda x, chunk=chunk: x[chunk], batch),
            None if weights is None else weights[chunk],
        )


def _of_chunk(
    loss: Loss, params: PyTree, batch: tuple[PyTree, ...], randomness: Randomness
) -> tuple[PyTree, Tensor]:
    ps, spec = structure.flatten_tensors(params, "params")
    xs, batch_spec = structure.flatten_tensors(batch, "batch")

    def value(present: dict[int, Tensor], example: dict[int, Tensor]) -> Tensor:
        rows = {i: x.unsqueeze(0) for i, x in example.items()}
        params = tree.unflatten(spec, _in_order(present, ps))
        batch = tree.unflatten(batch_spec, _in_order(rows, xs))
        return loss(params, *batch)

    present, stacked = _present(ps), _present(xs)
    if examples(batch, "batch"):
        found, values = vmap(
            grad_and_value(value), in_dims=(None, 0), randomness=randomness
        )(present, stacked)
    else:  # what vmap makes of no examples depends on the operations
        found = {i: p.new_zeros(0, *p.shape) for i, p in present.items()}
        values = tree.leaves(params)[0].new_zeros(0)
    return tree.unflatten(spec, _in_order(found, ps)), values


def _present(leaves: list[Tensor | None]) -> dict[int, Tensor]:
    return {i: x for i, x in enumerate(leaves) if x is not None}


def _in_order(found: dict[int, Tensor], leaves: list[Any]) -> list[Tensor | None]:
    """What was found for these leaves, and None where there is none."""
    return [found.get(i) for i in range(len(leaves))]


def _check_chunk_size(chunk_size: int | None) -> None:
    if chunk_size is not None and (
        isinstance(chunk_size, bool) or not isinstance(chunk_size, int) or chunk_size < 1
    ):
        raise ValueError(
            "chunk_size must be a whole number, 1 or greater, or None for all at once; "
            f"got {chunk_size!r}."
        )
