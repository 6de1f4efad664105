"""Matrix rules for many small matrices at once: those of one shape go through them as a stack.

A small matrix costs the calls and not the arithmetic. So leaves of one shape are stacked, and the
rules are mapped over the stack. Rules with a decomposition are not: where one matrix cannot be
decomposed, all of its stack could not.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from functorch_opt._execution.body import Body, Columns
from functorch_opt._execution.pieces import PIECE, Rules, Whole, plain, same
from functorch_opt._execution.trials import drawn

SHORT = 32
"""The short side up to which a stack is faster on a CPU: measured, in docs/decisions.md."""


class Stacked(Whole):
    """Small leaves of one shape go through the rules together, others as they are."""

    def run(
        self, columns: Columns, sizes: list[tuple[int, ...]], narrow: bool, body: Body
    ) -> None:
        rules = Rules(*plain(body, narrow), None)
        stacks: dict[Any, list[list[Tensor]]] = defaultdict(list)
        for leaf in zip(*columns, strict=True):
            shapes = tuple([x.shape for x in leaf])
            stacks[shapes if _is_small(leaf[1]) else id(leaf[1])].append([*leaf])
        for leaves in stacks.values():
            most = max(1, PIECE // max(1, leaves[0][1].numel()))
            for k in range(0, len(leaves), most):
                _apply(rules, leaves[k : k + most])


def if_stackable(body: Body, leaf: list[Tensor], narrow: bool) -> Whole:
    """How leaves like `leaf` go through rules that need whole tensors.

    Two small ones must give the same numbers in a stack.
    """
    p = leaf[1]
    if p.device.type != "cpu" or any(x.dim() and x.shape != p.shape for x in leaf):
        return Whole()
    try:
        rules = Rules(*plain(body, narrow), None)
        shapes = [[min(n, 6) for n in x.shape] for x in leaf]
        leaves = [drawn(shapes, leaf, seed) for seed in (0, 1)]
        expected = [[x.clone() for x in one] for one in leaves]
        with _Decompositions() as seen:
            for one in expected:
                rules.apply(one)
        _apply(rules, leaves)
        pairs = zip(leaves, expected, strict=True)
        agree = all(all(map(same, one, wanted)) for one, wanted in pairs)
    except Exception:
        return Whole()  # the tensors themselves say what is wrong
    return Stacked() if agree and not seen.any else Whole()


def _is_small(p: Tensor) -> bool:
    return p.dim() > 1 and min(p.shape) <= SHORT and p.numel() <= PIECE


@torch.no_grad()
def _apply(rules: Rules, leaves: list[list[Tensor]]) -> None:
    """Apply the rules to leaves of one shape."""
    if len(leaves) == 1:
        rules.apply(leaves[0])
        return
    places: list[tuple[list[int], list[int]]] = []

    def values(*leaf: Tensor) -> tuple[Tensor, ...]:
        writes, moves = rules.body.apart([*leaf, *rules.scalars])
        places.append(([i for i, _ in writes], [i for i, _ in moves]))
        return tuple([x for _, x in (*writes, *moves)])

    columns = [torch.stack(column) for column in zip(*leaves, strict=True)]
    found = torch.vmap(values)(*columns)
    written, moved = places[0]
    for i, x in zip(written, found, strict=False):
        torch._foreach_copy_([leaf[i] for leaf in leaves], [*x.unbind()])
    for i, x in zip(moved, found[len(written) :], strict=True):
        torch._foreach_add_([leaf[i] for leaf in leaves], [*x.unbind()])


class _Decompositions(TorchDispatchMode):
    """Sees whether a matrix is decomposed, or a number read."""

    any = False

    def __torch_dispatch__(
        self, f: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = str(f)
        may_fail = "linalg" in name and "norm" not in name
        self.any |= may_fail or "cholesky" in name or "scalar_dense" in name
        return f(*args, **(kwargs or {}))
