"""The order of writes: everything is read as it was before anything is overwritten.

A function that is run in place says what it would write, as pairs of a position among its arguments
and a new value, and writes nothing itself. `run_eagerly` works all values out and then writes them.
`write_in_place` puts the writes into a traced graph, each as early as is right.

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


# ---- without a compiler --------------------------------------------------------------------------


@torch.no_grad()
def run_eagerly(f: Pure, args: list[Any]) -> None:
    """Write what `f` of `args` says."""
    writes = [(args[i], value) for i, value in f(args) if value is not args[i]]
    written = {_storage(target) for target, _ in writes}
    kept = [
        (target, value.clone() if _storage(value) in written else value) for target, value in writes
    ]
    for target, value in kept:
        target.copy_(value)


def _storage(x: Any) -> int:
    """A number for the memory that `x` lies in; 0 for those that do not tell."""
    local = getattr(x, "_local_tensor", x)
    try:
        return int(local.untyped_storage().data_ptr())
    except (RuntimeError, NotImplementedError):
        return 0


# ---- in a graph ----------------------------------------------------------------------------------

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
    """Let `graph` write the values that it returns into its arguments `targets`; it returns none."""
    places = [node for node in graph.nodes if node.op == "placeholder"]
    *_, output = graph.nodes
    values = dict(zip([places[i] for i in targets], output.args[0], strict=True))
    output.args = ((),)
    for target in [t for t, value in values.items() if _is_all_of(value, t)]:
        del values[target]
    _Placing(graph, values).run()


class _Placing:
    """Puts the writes of `values`, new values by the arguments that they replace, into `graph`."""

    def __init__(self, graph: Graph, values: dict[Node, Node]) -> None:
        self.graph, self.values = graph, values
        self.place: dict[Node, int] = {}
        self.after: list[Node] = []  # for each place, the last node that stands there
        self.stands: dict[Node, set[Node]] = {}  # the arguments that a node may be as it stands
        self.read: dict[Node, int] = {}  # the last place where an argument must be as it was
        for node in graph.nodes:
            if node.op != "output":
                self._look_at(node)

    def _look_at(self, node: Node) -> None:
        if node.op == "placeholder":  # nothing is written before all of them are there
            self.place[node], self.stands[node], self.after = 0, {node}, [node]
            return
        self.place[node] = len(self.after)
        self.after.append(node)
        of: set[Node] = set().union(*[self.stands[x] for x in node.all_input_nodes])
        self.stands[node] = of if _may_be_its_input(node) else set()
        if not self.stands[node]:
            self.read |= dict.fromkeys(of, self.place[node])

    def run(self) -> None:
        for target, value in self.values.items():
            if target in self.stands[value]:  # a view of itself, such as its transpose
                self._compute(target)
        left = dict.fromkeys(self.values)
        while left:
            waiting = set().union(*[self.stands[self.values[target]] for target in left])
            ready = [target for target in left if target not in waiting]
            if not ready:
                self._compute(next(t for t in left if self.stands[self.values[t]] & left.keys()))
            for target in ready:
                self._write(target)
                del left[target]

    def _write(self, target: Node) -> None:
        value = self.values[target]
        place = max(self.place[value], self.read.get(target, 0))
        node = self._insert(place, aten.copy_.default, target, value)
        node.meta["val"] = target.meta["val"]
        self._is_read(value, place)

    def _compute(self, target: Node) -> None:
        """Make the value of `target` one that is computed, so that it is read where it stands."""
        value = self.values[target]
        place, x = self.place[value], value.meta["val"]
        operation = aten.bitwise_and.Tensor if x.dtype is torch.bool else aten.mul.Tensor
        other = (value, x) if x.dtype is torch.bool else (1, 1)
        node = self._insert(place, operation, value, other[0])
        node.meta["val"] = operation(x, other[1])
        self._is_read(value, place)
        self.values[target], self.place[node], self.stands[node] = node, place, set()

    def _is_read(self, value: Node, place: int) -> None:
        self.read |= {x: max(place, self.read.get(x, 0)) for x in self.stands[value]}

    def _insert(self, place: int, operation: Any, *args: Any) -> Node:
        with self.graph.inserting_after(self.after[place]):
            self.after[place] = self.graph.call_function(operation, args)
        return self.after[place]


def _name(node: Node) -> str:
    return str(getattr(node.target, "overloadpacket", node.target)).rpartition(".")[2]


def _may_be_its_input(node: Node) -> bool:
    """Whether a compiler may take `node` for an input of it: a view, or what computes nothing."""
    name, x = _name(node), node.meta.get("val")
    if node.op != "call_function" or not isinstance(x, Tensor):
        return False
    if getattr(node.target, "is_view", False) or name in _MAY_BE_NOTHING:
        return True
    if name in _KEEP_ORDER:
        tensors = [of.meta.get("val") for of in node.all_input_nodes]
        return any(isinstance(of, Tensor) and of.dtype is x.dtype for of in tensors)
    if name in _ROUNDING:
        return not x.dtype.is_floating_point
    return name.endswith("_copy") or (name == "pow" and node.args[1] == 1)


def _is_all_of(value: Node, target: Node) -> bool:
    """Whether `value` is `target` as it stands, every element in its place."""
    last = value
    while value is not target and _name(value) in _KEEP_ORDER and _may_be_its_input(value):
        value = value.all_input_nodes[0]
    return value is target and _layout(last) == _layout(target)


def _layout(node: Node) -> tuple[Any, ...]:
    """The dtype and the sizes, as they are written: to compare symbols would settle them."""
    x = node.meta["val"]
    sizes = [n.node.expr if isinstance(n, torch.SymInt) else n for n in x.shape]
    return x.dtype, *sizes
