"""The eager execution over lists of tensors: one call of torch's foreach operations for all of them.

What rules do to one leaf is recorded once, on a few numbers, as a list of operations. If torch has
each of them for lists, all leaves go through it together: an operation takes one call from Python
however many leaves there are, and on a GPU a few launches. A value is worked out in memory that
nobody reads any more, the memory of slots among it, as one would write it by hand.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from functorch_opt._execution.body import Body, Columns

aten = torch.ops.aten

_OF_TWO = {
    aten.add.Tensor: "add",
    aten.sub.Tensor: "sub",
    aten.mul.Tensor: "mul",
    aten.div.Tensor: "div",
    aten.maximum.default: "maximum",
    aten.minimum.default: "minimum",
}
"""Operations of two tensors, or of a tensor and a number."""
_OF_ONE = {
    aten.abs.default: "abs",
    aten.exp.default: "exp",
    aten.neg.default: "neg",
    aten.reciprocal.default: "reciprocal",
    aten.rsqrt.default: "rsqrt",
    aten.sign.default: "sign",
    aten.sqrt.default: "sqrt",
    aten.tanh.default: "tanh",
}
_TURNED = {"add", "mul", "maximum", "minimum"}
"""Operations whose two arguments may change places."""


class Operation(NamedTuple):
    """``value[out] = foreach(value[args[0]], ...)``, in the memory of the first argument or not.

    With `name` None it is an operation of single numbers, `function`.
    """

    name: str | None
    function: Any
    args: list[Any]
    out: int
    in_place: bool = False
    read_last: tuple[int, ...] = ()
    """Places whose values nobody reads afterwards."""


class Value(NamedTuple):
    """Stands for a value among the arguments of an operation."""

    place: int


class Recorder(TorchDispatchMode):
    """Records the operations that are made of the tensors `known`."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.values: list[Tensor] = [*known]
        self.place = {id(x): i for i, x in enumerate(known)}
        self.made: list[Operation] = []
        self.fits = len(self.place) == len(known)

    def __torch_dispatch__(
        self, f: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = f(*args, **(kwargs or {}))
        if f is aten.detach.default and id(args[0]) in self.place:
            self._keep(result, self.place[id(args[0])])
            return result
        operation = self._operation(f, args, kwargs, result)
        if operation is None:
            self.fits = False
        else:
            self.made.append(operation)
        return result

    def _keep(self, x: Any, place: int) -> int:
        self.values.append(x)  # which keeps it alive, so that no other has its id
        self.place[id(x)] = place
        return place

    def _operation(
        self,
        f: Any,
        args: Any,
        kwargs: Any,
        result: Any,
    ) -> Operation | None:
        tensors = [x for x in args if isinstance(x, Tensor)]
        known = all(id(x) in self.place for x in tensors)
        if kwargs or not known or not isinstance(result, Tensor):
            return None
        given = [Value(self.place[id(x)]) if isinstance(x, Tensor) else x for x in args]
        many = [x for x in tensors if x.dim()]
        if any(x.dtype is not result.dtype for x in many):
            return None
        out = self._keep(result, len(self.values))
        if not many:
            return Operation(None, f, given, out)
        return self._of_lists(f, args, given, out)

    def _of_lists(
        self, f: Any, args: Any, given: list[Any], out: int
    ) -> Operation | None:
        is_list = [isinstance(x, Tensor) and bool(x.dim()) for x in args]
        if f in _OF_ONE:
            return Operation(_OF_ONE[f], None, given, out)
        if f in _OF_TWO and len(args) == 2:
            name = _OF_TWO[f]
            if is_list == [False, True]:
                return (
                    Operation(name, None, given[::-1], out) if name in _TURNED else None
                )
            return Operation(name, None, given, out)
        if f in (aten.lerp.Tensor, aten.lerp.Scalar) and is_list == [True, True, False]:
            return Operation("lerp", None, given, out)
        if f is aten.pow.Tensor_Scalar:
            return Operation("pow", None, given, out)
        return None


class Recorded:
    """What a body does to one leaf, for lists of leaves.

    Args:
        operations: as they were recorded. The first places are those of the leaf's tensors and of
            the scalars.
        writes: places of the leaf, and the place of the value to be written there.
        moves: places of parameters, and that of the value to be added.
        width: how many tensors a leaf has.
    """

    def __init__(
        self,
        operations: list[Operation],
        writes: list[tuple[int, int]],
        moves: list[tuple[int, int]],
        width: int,
    ) -> None:
        self.writes, self.moves = writes, moves
        of_lists = [x for x in operations if x.name is not None]
        self.calls = len(of_lists) + len(moves)
        """How many calls a leaf takes."""
        self.moved = width + len(writes) + len(moves)
        """How many calls it takes to join a leaf to others, and to take it apart again."""
        self.last = self._last_reads(operations)
        self.free = {i for i, _ in writes}
        """Places whose memory is ours: values that are made here, and slots, once they are read."""
        self.operations: list[Operation] = []
        for k, operation in enumerate(operations):
            self._add(k, operation)

    def _last_reads(self, operations: list[Operation]) -> dict[int, int]:
        """Of each place that is read, the operation that reads it last."""
        last = {
            x.place: k
            for k, operation in enumerate(operations)
            for x in operation.args
            if isinstance(x, Value)
        }
        at_the_end = [x for _, x in (*self.writes, *self.moves)]
        return last | dict.fromkeys(at_the_end, len(operations))

    def _add(self, k: int, operation: Operation) -> None:
        """Add an operation, in place where nobody reads its first argument any more."""
        args = operation.args
        places = [x.place if isinstance(x, Value) else -1 for x in args]
        free = [place in self.free and self.last[place] == k for place in places]
        if operation.name in _TURNED and free == [False, True]:
            args, places, free = args[::-1], places[::-1], free[::-1]
        in_place = operation.name is not None and free[0] and places.count(places[0]) == 1
        over = {place for place in places if self.last.get(place) == k}
        now = operation._replace(args=args, in_place=in_place, read_last=(*over,))
        self.operations.append(now)
        if operation.name is not None:
            self.free.add(operation.out)

    def run(self, columns: Columns, scalars: list[Any]) -> None:
        """Apply them to all leaves. Slots and parameters are overwritten.

        Args:
            columns: the updates, parameters and slots: a list of leaves for each.
            scalars: 0-dim tensors on the host.
        """
        values: dict[int, Any] = dict(enumerate([*columns, *scalars]))
        for name, function, args, out, in_place, read_last in self.operations:
            given = [values[x.place] if isinstance(x, Value) else x for x in args]
            if name is None:
                values[out] = function(*given)
            else:
                given = [_number(x) for x in given]
                made = getattr(torch, f"_foreach_{name}{'_' if in_place else ''}")(*given)
                values[out] = given[0] if in_place else made
            for place in read_last:
                del values[place]
        for i, x in self.writes:
            if values[x] is not columns[i]:
                torch._foreach_copy_(columns[i], values[x])
        for i, x in self.moves:
            torch._foreach_add_(columns[i], values[x])


def recorded(body: Body, leaf: list[Tensor], scalars: list[Tensor]) -> Recorded | None:
    """What `body` does to `leaf`, for lists; None if torch has not all of it for lists.

    Args:
        body: whose rules are elementwise.
        leaf: its tensors, with at least one dim each.
        scalars: what all leaves have in common.
    """
    with Recorder([*leaf, *scalars]) as seen:
        writes, moves = body.apart([*leaf, *scalars])
    if not seen.fits or not all(x.dim() for x in leaf):
        return None
    both = [*writes, *moves]
    if any(leaf[i].dtype is not x.dtype or id(x) not in seen.place for i, x in both):
        return None
    places = [(i, seen.place[id(x)]) for i, x in both]
    written = {i for i, _ in places}
    if any(x in written and x != i for i, x in places):
        return None  # an old value is to be kept somewhere else
    n = len(writes)
    return Recorded(seen.made, places[:n], places[n:], len(leaf))


def _number(x: Any) -> Any:
    return x.item() if isinstance(x, Tensor) else x
