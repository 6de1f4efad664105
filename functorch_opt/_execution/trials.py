"""Trials: compiled code is run on a few small tensors before anybody relies on it.

A compiler may be missing in part, or give other numbers than it should. So each new program runs on
random tensors of two sets of sizes, and so does the function that it was made from, eagerly. What
raises, or differs by more than rounding, is `WrongCode`, and is not used.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from functorch_opt._execution.writes import Pure, name_of, run_eagerly

LOCK = threading.RLock()
"""Tracing and compiling patch settings of the whole process: one thread at a time."""


class Untraceable(RuntimeError):
    """The function cannot be made into a graph."""

    cure = "Rules are made of torch's operations, without Python's `if` or `float` on tensors."


class WrongCode(RuntimeError):
    """The compiled code does not do what the function does."""

    cure = "Please report it, with the version of torch and what the step is made of."


def warn_uncompiled(what: str, error: Exception, stacklevel: int = 3) -> None:
    """Say `what` is done eagerly, why, and what helps."""
    lines = str(error).strip().splitlines()
    reason = lines[0].rstrip(".") if lines else type(error).__name__
    cure = getattr(error, "cure", "On a CPU it needs a C++ compiler, e.g. g++.")
    warnings.warn(
        f"{what}, for compiling failed: {reason}. {cure}", stacklevel=stacklevel
    )


class InParts(RuntimeError):
    """Blocks may lie on several ranks, and an element has to know the bounds of its block."""

    cure = "It is right, and takes longer. What must be compiled needs slots in float32."

    def __init__(self, stage: str) -> None:
        super().__init__(f"{stage} has slots in a code, of sharded parameters")


def say_if_in_parts(
    body: Any,
    columns: Sequence[Any],
    indices: list[int],
) -> None:
    """Warn if any of these leaves, which are not compiled, has entries for blocks."""
    blocked = [k for k, block in enumerate(body.blocks, 2) if block is not None]
    if any(columns[k][i].numel() for k in blocked for i in indices):
        names = [entry.name for entry in body.entries if entry.blocks]
        warn_uncompiled("compiled_step runs eagerly", InParts(names[0]))


# ---- a trial -------------------------------------------------------------------------------------

SEEDS = 3
"""A rule that rounds may meet a tie, with other numbers it will not. Wrong code fails always."""
MOST = 1 << 16
"""Elements of all tensors of a trial on a CPU. Elsewhere the sizes to be used come first."""


def try_out(
    program: Any,
    f: Pure,
    inputs: list[Any],
    examples: list[Tensor],
    tolerances: dict[int, float],
) -> None:
    """Compare `program` with `f` run eagerly.

    Args:
        program: takes a list of tensors and writes into them.
        f: what it was made from.
        inputs: like `examples`, with symbols as sizes.
        examples: what `program` was traced on.
        tolerances: by how much what is written may differ, by its position.

    Raises:
        WrongCode: it raises, or gives other numbers.
    """
    for shapes in islice(_shapes(program, inputs, examples), 2):
        wrong = None
        for seed in range(SEEDS):
            args = drawn(shapes, examples, seed)
            wrong = _difference(program, f, args, tolerances)
            if wrong is None:
                break
        if wrong is not None:
            raise WrongCode(wrong)


def _difference(
    program: Any, f: Pure, args: list[Tensor], tolerances: dict[int, float]
) -> str | None:
    """What is wrong with `program` for `args`; None if nothing is."""
    expected = [x.clone() for x in args]
    try:
        run_eagerly(f, expected)
    except Exception:
        return None  # numbers that this function does not take
    try:
        program(args)
    except Exception as error:
        raise WrongCode(
            f"the compiled code raised {type(error).__name__}: {error}"
        ) from error
    for i, (x, y) in enumerate(zip(args, expected, strict=True)):
        tolerance = tolerances.get(i, 0.0) if x.is_floating_point() else 0.0
        atol = tolerance / 10
        if not torch.allclose(x, y, rtol=tolerance, atol=atol, equal_nan=True):
            off = (x.double() - y.double()).abs().max()
            return (
                "the compiled code gave other numbers than the rules run eagerly "
                f"(by up to {off:.2g} in tensor {i} of {len(args)})"
            )
    return None


def drawn(shapes: list[list[int]], like: list[Tensor], seed: int) -> list[Tensor]:
    """Tensors of `shapes`: positive numbers, of which roots and logarithms can be taken."""
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for shape, x in zip(shapes, like, strict=True):
        numbers = torch.rand(shape, generator=generator, dtype=torch.float64)
        if x.dtype is torch.bool:
            numbers = numbers > 0.5
        elif x.is_floating_point():
            numbers = 0.1 + 0.9 * numbers
        else:
            numbers = 1 + (4 * numbers).floor()
        drawn.append(numbers.to(x.device, x.dtype))
    return drawn


# ---- sizes ---------------------------------------------------------------------------------------


def _shapes(
    program: Any, inputs: list[Any], examples: list[Tensor]
) -> Iterator[list[list[int]]]:
    """Shapes that `program` takes."""
    on_cpu = examples[0].device.type == "cpu"
    of_examples = [[*x.shape] for x in examples]
    if not on_cpu:  # the first sizes that it sees decide the launch for good
        yield of_examples
    found = False
    rank = max(x.dim() for x in inputs)
    for start, step in _starts(rank):
        shapes = _replaced(inputs, start, step)
        places = [
            torch.empty(n, dtype=x.dtype, device="meta")
            for n, x in zip(shapes, examples, strict=True)
        ]
        if sum(x.numel() for x in places) <= MOST and program.fits(places):
            found = True
            yield shapes
    if on_cpu and not found and sum(x.numel() for x in examples) <= MOST:
        yield of_examples


def _starts(rank: int) -> list[tuple[int, int]]:
    """Sizes to be tried, as the first and what is added for each next one.

    Less than a vector of elements comes before some vectors and a rest.
    """
    some = {1: 37, 2: 19}.get(rank, 5)
    growing = [(3, 2), (some, 2)]
    return growing + [(n, 0) for n in (some, 8, 16, 64, 128)]


def _replaced(inputs: list[Any], start: int, step: int) -> list[list[int]]:
    """The shapes of `inputs` with a number for each symbol; equal symbols are equal numbers."""
    numbers: dict[Any, int] = {}

    def number(n: Any) -> int:
        if not isinstance(n, torch.SymInt):
            return int(n)
        return numbers.setdefault(n.node.expr, start + step * len(numbers))

    return [[number(n) for n in x.shape] for x in inputs]


# ---- rounding ------------------------------------------------------------------------------------

_PRODUCTS = {"mm", "bmm", "addmm", "baddbmm", "mv", "addmv", "dot"}
_ROUNDING = {
    torch.float64: 1e-7,  # for there are constants of float32
    torch.float32: 1e-4,
    torch.float16: 1e-2,
    torch.bfloat16: 5e-2,
}
"""By how much two ways to compute in a dtype may differ."""
_OF_PRODUCTS = 8
"""How many times more after a row of matrix products."""


def tolerances_of(graph: Graph, targets: list[int]) -> dict[int, float]:
    """By how much the values that `graph` returns may differ from others, computed otherwise.

    It depends on the coarsest dtype on the way: a float32 slot may be made of bfloat16 products.
    """
    rough: dict[Node, float] = {}
    for node in graph.nodes:
        rough[node] = max([rough[x] for x in node.all_input_nodes], default=0.0)
        if node.op == "call_function":
            rough[node] = max(rough[node], _roughness(node))
    places = [node for node in graph.nodes if node.op == "placeholder"]
    *_, output = graph.nodes
    return {
        i: max(rough[value], _of_dtype(places[i]))
        for i, value in zip(targets, output.args[0], strict=True)
    }


def _roughness(node: Node) -> float:
    name = name_of(node)
    if name in _PRODUCTS or "linalg" in name:
        return max(1e-2, _OF_PRODUCTS * _of_dtype(node))
    return _of_dtype(node)


def _of_dtype(node: Node) -> float:
    x = node.meta.get("val")
    return _ROUNDING.get(x.dtype, 0.0) if isinstance(x, Tensor) else 0.0
