"""Blocks: the rules of consecutive stages, compiled once for the tensors of any model, written in place.

A `Body` is what the rules of a chain do to one tensor, or to a block of them. A `Segment` sorts the leaves of a model by dtypes and finds a
`Program` for each sort; programs are kept for the whole process. torch's guards are left out, because they would cost more than a small
tensor does. What they would check is checked here, and each tensor that the compiled code would get wrong (not contiguous, complex, fewer
than two elements, memory that is not aligned on a GPU) takes the same rules eagerly. Of sharded tensors elementwise rules see the shards.
"""

from __future__ import annotations

from functools import cached_property
from itertools import chain as joined
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functorch_opt import tree
from functorch_opt._core.leaf import Each, Misfit, working_dtype, wrong_update
from functorch_opt._core.rule import Leafwise
from functorch_opt._execution.kernel import Program
from functorch_opt._execution.trials import warn_uncompiled
from functorch_opt._execution.writes import Writes, run_eagerly
from functorch_opt.tree import PyTree

BLOCK = {"cpu": 1}
"""Tensors in a block: on a CPU calling a kernel costs nothing, so one is enough; elsewhere `LAUNCH` share a launch."""
LAUNCH = 32
EXAMPLE = 131_072
"""Elements of the tensors that a block of several is traced on."""
LARGE = 16_384
"""Elements from which on it pays to wake other threads."""


class Enter(NamedTuple):
    """Stands among the stages: from here on, rules see ``rule(held, p)`` for the parameter p, where `held` is a slot."""

    rule: Any
    slots: tuple[str, ...] = ("held",)
    kind: str = "elementwise"


class Leave(NamedTuple):
    """Rules see the parameter again; ``rule(u, held, p)`` gives the update and the new slot."""

    rule: Any
    slots: tuple[str, ...] = ()
    kind: str = "elementwise"


class Body:
    """The rules of consecutive stages: what is compiled, and what runs where that cannot be.

    It is called with a list: for every leaf its update, parameter, slots and rows (values of its own); then the scalars that all leaves
    have in common. Updates are added to the parameters, or written `into` a row: over a value that has been read, or behind the others.
    """

    def __init__(
        self, stages: list[Leafwise | Enter | Leave], now: list[dict[str, Any]], into: int | None
    ) -> None:
        self.stages = stages
        self.whole = any(stage.kind == "tensorwise" for stage in stages)
        self.fixed = [
            {name: v for name, v in of.items() if not isinstance(v, (Tensor, Each))} for of in now
        ]
        self.shared = [
            [name for name, v in of.items() if isinstance(v, Tensor) and v.dim() == 0] for of in now
        ]
        self.rows = [
            [
                name
                for name, v in of.items()
                if isinstance(v, Each) or (isinstance(v, Tensor) and v.dim() == 1)
            ]
            for of in now
        ]
        self.scalars = [
            of[name] for of, names in zip(now, self.shared, strict=True) for name in names
        ]
        n_rows, n_slots = sum(map(len, self.rows)), sum(len(stage.slots) for stage in stages)
        self.width = 2 + n_slots + n_rows + (into == n_rows)
        self.place = None if into is None else 2 + n_slots + into
        fixed = tuple([tuple(of.items()) for of in self.fixed])
        what = tuple(
            [
                (_meaning(stage.rule), stage.kind, tuple(stage.slots), _meanings(stage))
                for stage in stages
            ]
        )
        numbers = tuple(
            [
                (name, v.dtype, v.dim(), v.device)
                for of in now
                for name, v in of.items()
                if isinstance(v, Tensor)
            ]
        )
        self.key = (
            what,
            into,
            fixed,
            numbers,
            tuple(map(tuple, self.shared)),
            tuple(map(tuple, self.rows)),
        )

    def __call__(self, args: list[Tensor]) -> Writes:
        """What is to be written: positions in `args`, and new values."""
        end, writes = len(args) - len(self.scalars), []
        for k in range(0, end, self.width):
            leaf = self._leaf(list(args[k : k + self.width]), list(args[end:]))
            writes += [(k + i, value) for i, value in leaf]
        return writes

    def _leaf(self, args: list[Tensor], scalars: list[Tensor]) -> Writes:
        u, p, *left = args
        n_slots = sum(len(stage.slots) for stage in self.stages)
        entries = left[n_slots:]
        places = iter(range(2, 2 + n_slots))
        writes: Writes = []
        seen, held, of_held = p, p, 1
        for stage, fixed, shared, row in zip(
            self.stages, self.fixed, self.shared, self.rows, strict=True
        ):
            where = {name: next(places) for name in stage.slots}
            mine = {name: args[i] for name, i in where.items()}
            if isinstance(stage, Enter):
                held, of_held = mine["held"], where["held"]
                seen = stage.rule(held, p)
            elif isinstance(stage, Leave):
                u, new_held = stage.rule(u, held, p)
                writes.append((of_held, new_held))
                seen = p
            else:
                now = {
                    **fixed,
                    **{name: scalars.pop(0) for name in shared},
                    **{name: entries.pop(0) for name in row},
                }
                u, new = stage.apply(
                    u,
                    seen,
                    mine,
                    now,
                    working_dtype(u, seen if "p" in stage.reads else None, *mine.values()),
                )
                writes += [(i, new[name]) for name, i in where.items()]
        return [*writes, (1, p + u) if self.place is None else (self.place, u)]


class _Part:
    """Leaves that one program serves, `size` of them at a time; `narrow` if they are computed in float32."""

    def __init__(self, program: Any, size: int, narrow: bool) -> None:
        self.program, self.size, self.narrow = program, size, narrow
        self.indices: list[int] = []
        self.sizes: list[tuple[int, ...]] = []

    @cached_property
    def scratch(self) -> list[tuple[int, torch.dtype]]:
        return self.program.scratch(self.sizes)

    def run(self, columns: list[list[Tensor]], scalars: list[Tensor], whole: bool) -> None:
        if len(self.indices) < len(columns[0]):
            columns = [[column[i] for i in self.indices] for column in columns]
        kernel = getattr(self.program, "kernel", None)
        if kernel is not None and self.size == 1:
            arguments, last = (
                self.program.arguments,
                (*scalars, *[torch.empty(n, dtype=dtype) for n, dtype in self.scratch]),
            )
            for leaf, sizes in zip(zip(*columns, strict=True), self.sizes, strict=True):
                kernel(*arguments((*leaf, *last, *sizes)))
            return
        leaves = [
            [x if whole or not x.dim() else x.view(-1) for x in leaf]
            for leaf in zip(*columns, strict=True)
        ]
        for k in range(0, len(leaves), self.size):
            block = leaves[k : k + self.size]
            block += [
                [x.new_empty(2 if x.dim() else ()) for x in block[0]]
                for _ in range(self.size - len(block))
            ]
            self.program([*joined.from_iterable(block), *scalars])


class Segment:
    """The leaves of a model, sorted by the programs that serve them, for one body."""

    def __init__(self, backend: Any, body: Body, params: PyTree, columns: list[list[Any]]) -> None:
        self.body, self.backend = body, backend
        us, ps = columns[:2]
        self.present = [u is not None for u in us]
        n_slots = sum(len(stage.slots) for stage in body.stages)
        self.sharded = not body.whole and any(map(tree.is_sharded, ps))
        sorts: dict[Any, list[int]] = {}
        seen: dict[int, int] = {}
        for i, leaf in enumerate(zip(*columns, strict=True)):
            u, p, *others = leaf
            if u is None:
                continue
            if wrong := wrong_update(u, p, others[:n_slots]):
                raise ValueError(f"compiled_step: the update at {tree.paths(params)[i]!r} {wrong}")
            if (
                type(p) in (Tensor, torch.nn.Parameter)
                and p.numel()
                and (first := seen.setdefault(p.data_ptr(), i)) != i
            ):
                paths = tree.paths(params)
                raise ValueError(
                    f"the parameters at {paths[first]!r} and {paths[i]!r} share memory, so an update in place would move both. "
                    "Give it once."
                )
            sorts.setdefault(self._sort(leaf, 2 + n_slots), []).append(i)
        self.eager = sorts.pop(None, [])
        self.compiled = [i for indices in sorts.values() for i in indices]
        self.parts: list[_Part] = []
        number = {i: k for k, i in enumerate(self.compiled)}
        mine = self._mine(columns)
        # What may have any strides is copied if it must be; what is written to lies as it must.
        self.copies = [
            c
            for c in range(len(columns))
            if (c == 0 or c >= 2 + n_slots) and not all(x.is_contiguous() for x in mine[c])
        ]
        flat = [
            [x.reshape(-1) if x.dim() and not body.whole else x for x in column] for column in mine
        ]
        for sort, indices in sorts.items():
            of_program: dict[int, _Part] = {}
            for i in indices:
                of_leaf = [column[number[i]] for column in flat]
                program, size = self._program(sort, of_leaf)
                part = of_program.setdefault(id(program), _Part(program, size, _narrow(of_leaf)))
                part.indices.append(number[i])
                part.sizes.append(program.sizes(of_leaf) if size == 1 else ())
            self.parts += of_program.values()
        checked = [x for column in mine for x in column]
        places: dict[int, int] = {}
        place_of = [places.setdefault(id(x), k) for k, x in enumerate(checked)]
        # A tensor may be there twice, such as a gradient that is an extra argument too. The guards want each of them once.
        self.once = [*places.values()]
        self.again = [(k, place) for k, place in enumerate(place_of) if k != place]
        shapes: list[Any] = [[*checked[k].shape] for k in self.once]
        strides: list[Any] = [[*checked[k].stride()] for k in self.once]
        guards = torch._C._dynamo.guards.TensorGuards
        self.guards = guards(
            *[checked[k] for k in self.once],
            dynamic_dims_sizes=shapes,
            dynamic_dims_strides=strides,
        )

    def _sort(self, leaf: tuple[Any, ...], in_place: int) -> Any:
        """What compiled code depends on beside sizes; None if these tensors must not meet it."""
        p: Any = leaf[1]
        if tree.is_sharded(p) and not self.body.whole:
            if not all(
                x._spec.placements == p._spec.placements and x._spec.mesh == p._spec.mesh
                if tree.is_sharded(x)
                else not x.dim()
                for x in leaf
            ):
                return None
            leaf = tuple(map(_local, leaf))
            p = leaf[1]
        if p.numel() < 2 or any(
            type(x) not in (Tensor, torch.nn.Parameter) or x.is_complex() for x in leaf
        ):
            return None
        if not all(
            x.is_contiguous() and (p.device.type == "cpu" or x.data_ptr() % 16 == 0)
            for x in leaf[1:in_place]
        ):
            return None
        if not all(
            x.device == p.device and (self.body.whole or not x.dim() or x.shape == p.shape)
            for x in leaf
        ):
            return None
        written = {x.data_ptr() for x in leaf[1:in_place]}
        if any(x.data_ptr() in written for x in (leaf[0], *leaf[in_place:])):
            return None  # a gradient that is the parameter itself
        threads = torch.get_num_threads() if p.numel() >= LARGE else 1
        whole = self.body.whole
        shapes = tuple(
            [tuple([n if n < 2 else -1 for n in x.shape]) if whole else bool(x.dim()) for x in leaf]
        )
        return p.device, threads, shapes, tuple([x.dtype for x in leaf])

    def _mine(self, columns: list[list[Any]]) -> list[list[Tensor]]:
        """The columns with the entries of compiled leaves only, of sharded ones the shards."""
        if self.compiled != list(range(len(columns[0]))):
            columns = [[column[i] for i in self.compiled] for column in columns]
        return [list(map(_local, column)) for column in columns] if self.sharded else columns

    def _program(self, sort: Any, leaf: list[Any]) -> tuple[Any, int]:
        """A program for this leaf, and how many leaves it takes at a time."""
        device, threads = sort[:2]
        size = 1 if self.body.whole else BLOCK.get(device.type, LAUNCH)
        programs = PROGRAMS.setdefault((self.body.key, sort, self.backend), [])
        scalars = _narrowed(self.body.scalars) if _narrow(leaf) else self.body.scalars
        for program in programs:
            if program.fits([*leaf * size, *scalars]):
                return program, size
        examples = [x.detach() for x in leaf]
        if size > 1:  # on a GPU the sizes it sees decide the launch for good
            examples = [x.new_empty(EXAMPLE if x.dim() else ()) for _ in range(size) for x in leaf]
        try:
            program = Program(self.body, [*examples, *scalars], threads, self.backend)
        except Exception as error:
            warn_uncompiled("compiled_step runs eagerly", error)
            program = _Uncompiled(self.body)
        programs.append(program)
        return program, size

    def run(self, columns: list[list[Any]], scalars: list[Tensor]) -> bool:
        """Apply the body to these leaves; False, and nothing is done, if they are not of the kind that the segment was made for."""
        if [u is not None for u in columns[0]] != self.present:
            return False
        mine = self._mine(columns)
        if self.compiled and not self._are_known([x for column in mine for x in column]):
            return False
        for i in self.eager:  # the others are as they were
            if wrong := wrong_update(columns[0][i], columns[1][i]):
                raise ValueError(f"compiled_step: the update of leaf {i} {wrong}")
        if self.compiled:
            torch.autograd.graph.increment_version(
                mine[1]
            )  # so that autograd sees that parameters have changed
            mine = [
                [x.contiguous() for x in column] if c in self.copies else column
                for c, column in enumerate(mine)
            ]
            narrowed = _narrowed(scalars)
            for part in self.parts:
                part.run(mine, narrowed if part.narrow else scalars, self.body.whole)
        for i in self.eager:
            self._eagerly(i, [column[i] for column in columns], scalars)
        return True

    def _are_known(self, tensors: list[Any]) -> bool:
        """Whether these are of the kind that the code was made for; in Python this would cost more than small tensors do."""
        if any(tensors[k] is not tensors[place] for k, place in self.again):
            return False
        return bool(
            self.guards.check(*([tensors[k] for k in self.once] if self.again else tensors))
        )

    def _eagerly(self, i: int, leaf: list[Any], scalars: list[Tensor]) -> None:
        try:
            run_eagerly(self.body, [*leaf, *scalars])
        except Misfit as misfit:
            raise ValueError(
                f"compiled_step: the update of leaf {i} {misfit}"
            ) from misfit.__cause__


class _Uncompiled:
    """Stands in for a program where there is no compiler."""

    def __init__(self, body: Body) -> None:
        self.body = body

    def fits(self, args: list[Tensor]) -> bool:
        return True

    def sizes(self, args: list[Tensor]) -> tuple[int, ...]:
        return ()

    def __call__(self, args: list[Tensor]) -> None:
        run_eagerly(self.body, args)


def _narrow(leaf: list[Any]) -> bool:
    """Whether all rules compute in float32 for this leaf."""
    return not any(x.dtype in (torch.float64, torch.complex128) for x in leaf)


def _narrowed(scalars: list[Tensor]) -> list[Tensor]:
    """Those of float64 in float32. A rule would do this itself, but a kernel would do it again for every vector of every tensor."""
    wide = [x for x in scalars if x.dtype is torch.float64]
    if not wide or len({x.device for x in wide}) > 1:
        return scalars
    left = iter(torch.stack(wide).to(torch.float32).unbind())
    return [next(left) if x.dtype is torch.float64 else x for x in scalars]


def _local(x: Any) -> Any:
    return x._local_tensor if tree.is_sharded(x) else x


PROGRAMS: dict[Any, list[Any]] = {}
"""Compiled code, for all steps of this process: the same rules on the same dtypes are compiled once."""


def _meanings(stage: Leafwise | Enter | Leave) -> Any:
    return (
        tuple([(name, _meaning(of)) for name, of in stage.sums.items()])
        if isinstance(stage, Leafwise)
        else ()
    )


def _meaning(value: Any) -> Any:
    """What a rule computes, for use as a key: its code and what it closes over, where that is plain; else the object itself."""
    if isinstance(value, FunctionType):
        cells = tuple([_meaning(cell.cell_contents) for cell in value.__closure__ or ()])
        return value.__code__, cells, value.__defaults__
    return (
        value
        if isinstance(value, (bool, int, float, str, torch.dtype, type(None)))
        else _ByIdentity(value)
    )


class _ByIdentity:
    """A key for an object that is equal to itself only; it keeps the object alive."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ByIdentity) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)
