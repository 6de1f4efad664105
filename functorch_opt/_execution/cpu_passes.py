"""What Inductor leaves to be done for a CPU: exact sums in as few loops as can be, and values kept.

`take_sums` works on a graph that writes nothing yet, so that all it reads may be read later.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from functorch_opt._execution.writes import call

aten = torch.ops.aten
_convert = torch.ops.prims.convert_element_type.default


# ---- sums ----------------------------------------------------------------------------------------


def take_sums(graph: Graph) -> None:
    """Take each sum over all of a float32 tensor in float64.

    That is as exact as Inductor's sum of sums, which goes through memory. A factor that is known
    only after another sum is taken out, ``sum(s x) = s sum(x)``, so that one loop gives both.
    """
    late: set[Any] = set()
    for node in list(graph.nodes):
        if _is_plain_sum(node):
            with graph.inserting_before(node):
                total = _total_of(graph, node.args[0], late)
            node.replace_all_uses_with(total)
            graph.erase_node(node)
            late.add(total)
        elif node.target is aten.sum.default or not late.isdisjoint(node.all_input_nodes):
            late.add(node)


def _is_plain_sum(node: Node) -> bool:
    if node.target is not aten.sum.default or node.kwargs:
        return False
    return node.all_input_nodes[0].meta["val"].dtype is torch.float32


def _total_of(graph: Graph, x: Any, late: set[Any]) -> Node:
    """The sum of `x`, float32."""
    factor, x = _factored(graph, x, late)
    total = _total(graph, x)
    if factor is not None:  # a sum of zeros is 0, whatever the factor
        is_zero = call(graph, aten.eq.Scalar, total, 0)
        product = call(graph, aten.mul.Tensor, total, factor)
        total = call(graph, aten.where.self, is_zero, total, product)
    return call(graph, _convert, total, torch.float32)


def _total(graph: Graph, x: Any) -> Node:
    """The sum of `x`, float64: row by row, as what is of a row is worked out row by row too."""
    dims = [*range(1, x.meta["val"].dim())]
    if dims:
        x = call(graph, aten.sum.dim_IntList, x, dims)
    return call(graph, aten.sum.default, x, dtype=torch.float64)


def _factored(graph: Graph, x: Any, late: set[Any]) -> tuple[Any, Any]:
    """`x` as a float64 number, made of `late` ones, and the rest; or None, and `x`."""
    if x.target is aten.mul.Tensor and x.meta["val"].dim():
        for number, other in (x.args, x.args[::-1]):
            if number in late and not number.meta["val"].dim():
                more, rest = _factored(graph, other, late)
                factor = call(graph, _convert, number, torch.float64)
                if more is not None:
                    factor = call(graph, aten.mul.Tensor, factor, more)
                return factor, rest
    elif x.target is aten.pow.Tensor_Scalar and x.args[1] == 2:
        root, rest = _factored(graph, x.args[0], late)
        if root is not None:
            square = call(graph, aten.mul.Tensor, root, root)
            return square, call(graph, aten.pow.Tensor_Scalar, rest, 2)
    elif x.target is aten.where.self and _is_zero(x.args[2]):
        condition, value, zero = x.args
        factor, rest = _factored(graph, value, late)
        if factor is not None:
            return factor, call(graph, aten.where.self, condition, rest, zero)
    return None, x


def _is_zero(x: Any) -> bool:
    return x.target is aten.scalar_tensor.default and x.args[0] == 0


# ---- values that are kept ------------------------------------------------------------------------


def store_what_many_read(graph: Graph) -> None:
    """Store each number that meets a tensor, and each row that meets a matrix.

    Else they are worked out again for every vector of elements.
    """
    for node in list(graph.nodes):
        x = node.meta.get("val")
        is_view = getattr(node.target, "is_view", False)
        if node.op != "call_function" or is_view or not isinstance(x, Tensor):
            continue
        if readers := [
            user for user in node.users if _is_repeated(x, user.meta.get("val"))
        ]:
            stored = _stored(graph, node)
            for user in readers:
                user.replace_input_with(node, stored)


def _stored(graph: Graph, node: Node) -> Node:
    with graph.inserting_after(node):
        place = graph.call_function(aten.empty_like.default, (node,))
    with graph.inserting_after(place):
        stored = graph.call_function(aten.copy_.default, (place, node))
    place.meta["val"] = stored.meta["val"] = node.meta["val"]
    return stored


def _is_repeated(x: Tensor, y: Any) -> bool:
    """Whether an element of `x` makes many of the tensor `y`, by the rules of broadcasting."""
    if not isinstance(y, Tensor):
        return False
    if x.dim() < y.dim():
        return True
    sizes = zip(x.shape, y.shape, strict=False)
    return any(_is_one(n) and not _is_one(m) for n, m in sizes)


def _is_one(n: Any) -> bool:
    """Whether `n` is 1. A symbol may be 1 too, but whoever traced with it has not said so."""
    return isinstance(n, int) and n == 1
