"""The order of writes: everything is read as it was before anything is overwritten.

A function that is run in place says what it would write, as pairs of a position among its arguments
and a new value, and writes nothing itself. `run_eagerly` works all values out and then writes them.
`write_in_place` puts the writes at the end of a traced graph; the compiler moves them to where
their values are worked out.

A value may be an argument as it stands: a gradient that becomes a slot, or a view or a clone of an
old slot. The compiler takes such no-ops out, so they read what is in memory when they are written.
Such a write comes before the argument's own. Where that is a circle (two slots that swap), one
value is multiplied by 1, which the compiler computes; clones and copies it would take out again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

aten = torch.ops.aten

Writes = list[tuple[int, Tensor]]
"""What is to be written: positions among the arguments, and new values."""
Pure = Callable[[list[Any]], Writes]
"""A function that only says what it would write."""


_PLAIN = {Tensor, torch.nn.Parameter}

# ---- without a compiler --------------------------------------------------------------------------


@torch.no_grad()
def run_eagerly(f: Pure, args: list[Any]) -> None:
    """Write what `f` of `args` says."""
    write(args, f(args), [])


def write(args: list[Any], writes: Writes, moves: Writes) -> None:
    """Write the values of `writes` into `args`, and add those of `moves`."""
    into = [(args[i], value) for i, value in writes if value is not args[i]]
    adds = [(args[i], u) for i, u in moves]
    targets = [target for target, _ in (*into, *adds)]
    written = {*memories(targets)} - {0}
    into = [(target, apart_from(written, value)) for target, value in into]
    adds = [(target, apart_from(written, u)) for target, u in adds]
    for target, value in into:
        target.copy_(value)
    for target, u in adds:
        if u.dtype is target.dtype and u.shape == target.shape:
            target.add_(u)
        else:
            target.copy_(target + u)


def memory_of(x: Any) -> int:
    """A number for the memory that `x` lies in; 0 for what does not tell, or has none.

    Of a sharded tensor it is that of this rank's part.
    """
    if x is None:
        return 0
    try:
        return int(getattr(x, "_local_tensor", x).untyped_storage().data_ptr())
    except (RuntimeError, NotImplementedError):
        return 0


def memories(xs: list[Any]) -> list[int]:
    """`memory_of` each of `xs`."""
    if {type(x) for x in xs} <= _PLAIN:
        try:
            return [x.untyped_storage().data_ptr() for x in xs]
        except (RuntimeError, NotImplementedError):
            pass
    return [memory_of(x) for x in xs]


def apart_from(written: set[int], x: Any) -> Any:
    """`x`, or a copy of it where it lies in memory that is going to be written."""
    return x.clone() if x is not None and memory_of(x) in written else x


# ---- in a graph ----------------------------------------------------------------------------------


def computed(x: Tensor) -> Tensor:
    """`x`, as a value of its own in a graph.

    The compiler takes copies and clones of an argument out, and would read it after it was written.
    What is multiplied by 1 it computes.
    """
    return x & x if x.dtype is torch.bool else x * 1


_KEEP_ORDER = {
    "_to_copy",
    "_unsafe_view",
    "alias",
    "clone",
    "contiguous",
    "convert_element_type",
    "detach",
    "device_put",
    "lift_fresh",
    "lift_fresh_copy",
    "reshape",
    "to",
    "view",
    "view_of",
}
"""Operations that compute nothing if the dtype stays, and keep the elements in their order."""
_MAY_BE_NOTHING = {"cat", "constant_pad_nd", "copy", "repeat", "slice_scatter"}
"""Operations that compute nothing for some of their arguments."""
_ROUNDING = {"ceil", "floor", "round", "trunc"}


def write_in_place(graph: Graph, targets: list[int]) -> None:
    """Let `graph` write what it returns into its arguments `targets`, and return nothing."""
    places = [node for node in graph.nodes if node.op == "placeholder"]
    *_, output = graph.nodes
    values = dict(zip([places[i] for i in targets], output.args[0], strict=True))
    output.args = ((),)
    left = {
        target: value for target, value in values.items() if not _is_all_of(value, target)
    }
    stands = _standing(graph)
    with graph.inserting_before(output):
        while left:
            _write_what_is_read(graph, left, stands)


def _standing(graph: Graph) -> dict[Node, set[Node]]:
    """Of each node, the arguments whose memory it may be."""
    stands: dict[Node, set[Node]] = {}
    for node in graph.nodes:
        of = [stands[x] for x in node.all_input_nodes if _may_be_its_input(node)]
        stands[node] = {node} if node.op == "placeholder" else set().union(*of)
    return stands


def _write_what_is_read(
    graph: Graph, left: dict[Node, Node], stands: dict[Node, set[Node]]
) -> None:
    """Write, of the values that are `left`, those into arguments that no other is to be read of.

    If there are none, the values go in circles: two that swap, or a transpose of what it is written
    into. One is computed, and so read before anything is written.
    """
    unread = set().union(*[stands[value] for value in left.values()])
    ready = [target for target in left if target not in unread]
    for target in ready:
        node = graph.call_function(aten.copy_.default, (target, left.pop(target)))
        node.meta["val"] = target.meta["val"]
    if not ready:
        target = next(t for t, value in left.items() if stands[value] & left.keys())
        left[target] = _computed(graph, left[target])
        stands[left[target]] = set()


def _computed(graph: Graph, value: Node) -> Node:
    """What equals `value`, and is no view or clone of anything."""
    x = value.meta["val"]
    if x.dtype is torch.bool:
        return call(graph, aten.bitwise_and.Tensor, value, value)
    return call(graph, aten.mul.Tensor, value, 1)


def call(graph: Graph, operation: Any, *args: Any, **kwargs: Any) -> Node:
    """A new node of `graph`, with the value that it stands for."""
    node = graph.call_function(operation, args, kwargs)
    values = [x.meta["val"] if isinstance(x, Node) else x for x in args]
    node.meta["val"] = operation(*values, **kwargs)
    return node


def name_of(node: Node) -> str:
    """The name of the operation of `node`."""
    return str(getattr(node.target, "overloadpacket", node.target)).rpartition(".")[2]


def _may_be_its_input(node: Node) -> bool:
    """Whether a compiler may take `node` for an input of it: a view, or what computes nothing."""
    name, x = name_of(node), node.meta.get("val")
    if node.op != "call_function" or not isinstance(x, Tensor):
        return False
    if getattr(node.target, "is_view", False) or name in _MAY_BE_NOTHING:
        return True
    if name in _KEEP_ORDER:
        tensors = [of.meta.get("val") for of in node.all_input_nodes]
        return any(isinstance(of, Tensor) and of.dtype is x.dtype for of in tensors)
    if name in _ROUNDING:
        return not x.is_floating_point()
    return name.endswith("_copy") or bool(name == "pow" and node.args[1] == 1)


def _is_all_of(value: Node, target: Node) -> bool:
    """Whether `value` is `target` as it stands, every element in its place."""
    last = value
    while (
        value is not target and name_of(value) in _KEEP_ORDER and _may_be_its_input(value)
    ):
        value = value.all_input_nodes[0]
    return value is target and _layout(last) == _layout(target)


def _layout(node: Node) -> tuple[Any, ...]:
    """The dtype and the sizes, as they are written: to compare symbols would settle them."""
    x = node.meta["val"]
    sizes = [n.node.expr if isinstance(n, torch.SymInt) else n for n in x.shape]
    return x.dtype, *sizes
