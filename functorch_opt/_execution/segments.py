"""Which program serves which tensor. Leaves are sorted by what compiled code depends on.

A `Segment` sorts the leaves that go through one `Body` by dtypes, and finds a `Program` for each
sort; programs are kept for the whole process. torch's guards are left out, for they would cost more
than a small tensor does. What they would check is checked here, and each tensor that compiled code
would get wrong (complex, fewer than two elements, memory that is not aligned on a GPU) takes the
same rules eagerly. Of sharded tensors elementwise rules see the shards.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from functorch_opt import tree
from functorch_opt._core import sharding
from functorch_opt._core.leaf import Misfit, wrong_update
from functorch_opt._execution.body import Body, Columns
from functorch_opt._execution.guards import surroundings
from functorch_opt._execution.kernel import Program
from functorch_opt._execution.launches import LANES, flat, has_lanes, is_aligned
from functorch_opt._execution.part import Part, at_device
from functorch_opt._execution.pieces import Whole
from functorch_opt._execution.programs import PROGRAMS
from functorch_opt._execution.rows_of_blocks import has_size, in_rows, with_sizes_settled
from functorch_opt._execution.stretches import eagerly
from functorch_opt._execution.table import identity
from functorch_opt._execution.trials import say_if_in_parts, warn_uncompiled
from functorch_opt._execution.writes import run_eagerly

IN_PIECES = "in pieces"
"""The backend that compiles nothing."""
BLOCK = {"cpu": 1}
"""Tensors in a block. On a CPU a call costs nothing; elsewhere `LAUNCH` tensors share a launch."""
CPU = torch.device("cpu")
LAUNCH = 16
EXAMPLE = 131_072
"""Elements of the tensors that a block of several is traced on."""
LARGE = 16_384
"""Elements from which on it pays to wake other threads."""
MOST = 32
"""Programs of the same rules for the same tensors, before one stops making more of them."""


class NeedsConstants(Exception):
    """Rules could not be compiled with their numbers as inputs."""


class Segment:
    """The leaves of a model that go through one body, sorted by the programs that serve them.

    Args:
        backend: compiles; see `Program`.
        body: what happens to each leaf.
        columns: the updates, parameters, slots and rows, a list of leaves for each.
        where: the path of each leaf, for errors.
        remember: whether the slots of a step are expected to be those of the next.
    """

    def __init__(
        self,
        backend: Any,
        body: Body,
        columns: Columns,
        where: list[str],
        remember: bool,
    ) -> None:
        self.body = body
        self.backend = backend
        self.remember = remember
        self.around = surroundings()
        self.absent = [i for i, u in enumerate(columns[0]) if u is None]
        self.sharded = not body.whole and sharding.any_sharded(columns[1])
        sorts = self._sorts(columns, where)
        self.eager = sorts.pop(None, [])
        if self.sharded and backend != IN_PIECES:
            say_if_in_parts(body, columns, self.eager)
        self.where = where
        self.compiled = [i for indices in sorts.values() for i in indices]
        self.is_everything = self.compiled == [*range(len(columns[0]))]
        mine = self._mine(columns)
        # What may have any strides is copied if it must be; what is written to lies as it must.
        free = [0, *range(2 + body.n_slots, len(columns))]
        self.copies = [c for c in free if not all(x.is_contiguous() for x in mine[c])]
        self.parts = self._parts(sorts, mine)
        self._watch(mine)

    def _sorts(self, columns: Columns, where: list[str]) -> dict[Any, list[int]]:
        """The leaves that have an update, by what compiled code depends on."""
        sorts: dict[Any, list[int]] = {}
        end = 2 + self.body.n_slots
        for i, leaf in enumerate(zip(*columns, strict=True)):
            u, p, *others = leaf
            if u is None:
                continue
            if wrong := wrong_update(u, p, others[: self.body.n_slots]):
                raise ValueError(f"compiled_step: the update at {where[i]!r} {wrong}")
            sorts.setdefault(self._sort(leaf, end), []).append(i)
        return sorts

    def _sort(self, leaf: tuple[Any, ...], end: int) -> Any:
        """What compiled code depends on beside sizes; None if these tensors must not meet it."""
        p: Any = leaf[1]
        whole = self.body.whole
        if tree.is_sharded(p) and not whole:
            if not all(_laid_out_alike(x, p) for x in leaf):
                return None
            leaf = tuple(map(_local, leaf))
            p = leaf[1]
        plain = all(type(x) in sharding.PLAIN and not x.is_complex() for x in leaf)
        if p.numel() < 2 or not plain:
            return None
        if not all(x.is_contiguous() and is_aligned(x) for x in leaf[1:end]):
            return None
        blocks = [None, None, *self.body.blocks, *[None] * len(leaf)]
        if not all(
            _meets(x, p) and (whole or not x.dim() or has_size(x, p, of))
            for x, of in zip(leaf, blocks, strict=False)
        ):
            return None
        written = {x.data_ptr() for x in leaf[1:end]}
        if any(x.data_ptr() in written for x in (leaf[0], *leaf[end:])):
            return None  # a gradient that is the parameter itself
        threads = torch.get_num_threads() if p.numel() >= LARGE else 1
        shapes = tuple(
            [
                tuple([n if n < 2 else -1 for n in x.shape])
                if whole or self.body.row
                else self._rank(x)
                for x in leaf
            ]
        )
        return p.device, threads, shapes, tuple([x.dtype for x in leaf])

    def _rank(self, x: Any) -> int:
        """What code depends on of the dims of `x`. Compiled code sees all elements in a row."""
        if self.backend == IN_PIECES or not x.dim():
            return int(x.dim())
        return -LANES if has_lanes(x) else 1

    def _mine(self, columns: Columns) -> Columns:
        """The columns with the entries of compiled leaves only, of sharded ones the shards."""
        if not self.is_everything:
            columns = [[column[i] for i in self.compiled] for column in columns]
        return (
            [list(map(_local, column)) for column in columns] if self.sharded else columns
        )

    def _parts(self, sorts: dict[Any, list[int]], mine: Columns) -> list[Part]:
        number = {i: k for k, i in enumerate(self.compiled)}
        devices = {sort[0] for sort in sorts}
        # What is worked out once a step lies with the first parameter of all.
        others = {x.device for x in self.body.scalars} - {*devices, CPU}
        several = len(devices) > 1 or bool(others)
        in_a_row = not (self.body.whole or self.body.row) and self.backend != IN_PIECES
        lie = flat if in_a_row else Tensor.contiguous
        columns = [[lie(x).contiguous() for x in column] for column in mine]
        parts: list[Part] = []
        for sort, indices in sorts.items():
            of_program: dict[int, Part] = {}
            for i in indices:
                leaf = [column[number[i]] for column in columns]
                at = sort[0] if several else None
                program, size = self._program(sort, leaf, at_device(self.body, at))
                part = Part(program, size, _narrow(leaf), at)
                part = of_program.setdefault(id(program), part)
                part.indices.append(number[i])
                part.sizes.append(program.sizes(leaf) if size == 1 else ())
                part.elements += leaf[1].numel()
            parts += of_program.values()
        return parts

    def _watch(self, mine: Columns) -> None:
        """Remember what the tensors are."""
        kept, given = self._kept(mine)
        self.kept, self.given = Watched(kept), Watched(given)
        self.forget()
        programs = [part.program for part in self.parts]
        self.has_kernel = any(getattr(x, "kernel", None) is not None for x in programs)
        compiled = all(isinstance(x, Program) for x in programs)
        on_one = all(part.device is None for part in self.parts)
        self.is_direct = compiled and on_one and not self.eager
        """Whether all leaves go through compiled code, which takes its scalars as they are."""

    def forget(self) -> None:
        """Let go of the tensors that it was used for last."""
        self.seen: tuple[bytes, Any] = b"", None

    def _kept(self, mine: Columns) -> tuple[Columns, ...]:
        """The slots, which mostly are those of the step before; and the rest."""
        end = 2 + self.body.n_slots
        return mine[2:end], [*mine[:2], *mine[end:]]

    def _program(self, sort: Any, leaf: list[Tensor], body: Body) -> tuple[Any, int]:
        """A program for this leaf, and how many leaves it takes at a time."""
        device, threads = sort[:2]
        size = 1 if self.body.whole else BLOCK.get(device.type, LAUNCH)
        programs = PROGRAMS.of((self.body.key, sort, self.backend, self.around))
        scalars = body.given(_narrow(leaf))
        if self.body.row:
            if not programs:
                made = None if self.backend == IN_PIECES else self._made
                programs.append(in_rows(body, leaf, scalars, made, threads, sort))
            return programs[0], 1
        if self.backend == IN_PIECES:
            if not programs:
                programs.append(eagerly(body, leaf, _narrow(leaf)))
            return programs[0], 1
        wanted = [*leaf * size, *scalars]
        for program in programs:
            if program.fits(wanted):
                return program, size
        if size == 1 or not programs:
            examples = [x.detach() for x in leaf]
            if size > 1:
                examples = _general(leaf * size)
            program = self._made([*examples, *scalars], threads, sort)
            programs.append(program)
            if program.fits(wanted):
                return program, size
        warn_uncompiled("compiled_step runs eagerly", Unfitting(leaf[1]))
        return Whole(), 1

    def _made(self, examples: list[Tensor], threads: int, sort: Any) -> Any:
        """A new program, or what stands in for it where there can be none."""
        codes = tuple(
            [f.__code__ for entry in self.body.entries for f in entry.functions]
        )
        family = codes, self.body.base[1:], sort, str(self.backend)
        PROGRAMS.made[family] += 1
        try:
            if unknown := self.body.unknown:
                raise Unreadable(unknown)
            if PROGRAMS.made[family] > MOST:
                raise TooMany
            f: Any = with_sizes_settled(self.body) if any(self.body.blocks) else self.body
            return Program(f, examples, threads, self.backend)
        except Exception as error:
            if any(self.body.exact) and not isinstance(error, (Unreadable, TooMany)):
                raise NeedsConstants from error
            warn_uncompiled("compiled_step runs eagerly", error)
            return Whole()

    # ---- a step ----------------------------------------------------------------------------------

    def knows(self, columns: Columns) -> bool:
        """Whether these leaves are of the kind that it was made for."""
        us = columns[0]
        if len(us) != len(self.where):
            return False
        if self.around != surroundings() or any(us[i] is not None for i in self.absent):
            return False
        if any(us[i] is None for i in self.eager):
            return False
        if not self.compiled:
            return True
        kept, given = self._kept(self._mine(columns))
        if not self.given.are_like(given):
            return False
        if not (self.has_kernel and self.remember):
            return self.kept.are_like(kept)
        # The same slots in the same memory are what they were. (A slot is given another form in
        # that memory, by `data`, only together with its parameter.)
        now = identity(kept)
        if now == self.seen[0]:
            return True
        if not self.kept.are_like(kept):
            return False
        # It keeps the objects, so that no other is taken for one.
        self.seen = now, kept
        return True

    def check(self, columns: Columns) -> None:
        """Raise ValueError for a leaf that runs eagerly, and does not fit."""
        for i in self.eager:
            if wrong := wrong_update(columns[0][i], columns[1][i]):
                raise ValueError(
                    f"compiled_step: the update at {self.where[i]!r} {wrong}"
                )

    def run(self, columns: Columns, body: Body) -> None:
        """Apply `body`, which has the key that this was made for, to leaves that it knows."""
        if self.compiled:
            mine = [*self._mine(columns)]
            # Autograd must see that parameters have changed.
            torch.autograd.graph.increment_version(mine[1])
            for c in self.copies:
                mine[c] = [x.contiguous() for x in mine[c]]
            for part in self.parts:
                part.run(mine, body)
        for i in self.eager:
            leaf = [column[i] for column in columns]
            here = at_device(body.with_constants, leaf[1].device)
            try:
                run_eagerly(here, [*leaf, *here.scalars])
            except Misfit as misfit:
                where = self.where[i]
                raise ValueError(
                    f"compiled_step: the update at {where!r} {misfit}"
                ) from misfit


def let_go(segments: Iterable[Segment], used: Segment) -> None:
    """Let the segments that are not `used` now keep no tensors."""
    for segment in segments:
        if segment is not used:
            segment.forget()


class Watched:
    """What some tensors are: types, dtypes, devices, shapes and strides."""

    def __init__(self, columns: Columns) -> None:
        # A tensor may be there twice; torch's guards want it once.
        tensors = [x for column in columns for x in column]
        places: dict[int, int] = {}
        place_of = [places.setdefault(id(x), k) for k, x in enumerate(tensors)]
        self.once = [*places.values()]
        self.again = [(k, place) for k, place in enumerate(place_of) if k != place]
        shapes: list[Any] = [[*tensors[k].shape] for k in self.once]
        strides: list[Any] = [[*tensors[k].stride()] for k in self.once]
        self.guards = torch._C._dynamo.guards.TensorGuards(
            *[tensors[k] for k in self.once],
            dynamic_dims_sizes=shapes,
            dynamic_dims_strides=strides,
        )

    def are_like(self, columns: Columns) -> bool:
        """Whether these tensors are of the same kinds, and the same ones are there twice."""
        tensors = [x for column in columns for x in column]
        if any(tensors[k] is not tensors[place] for k, place in self.again):
            return False
        if self.again:
            tensors = [tensors[k] for k in self.once]
        return bool(self.guards.check(*tensors))


class Unfitting(RuntimeError):
    """The compiled code does not take tensors of this size."""

    cure = "Split it: the code counts elements with 32 bits."

    def __init__(self, p: Tensor) -> None:
        super().__init__(f"there is no code for a tensor of {p.numel()} elements")


class TooMany(RuntimeError):
    """Rules that mean something else at every step are not compiled for ever."""

    cure = "Give what changes as a hyperparameter, or as a value that prepare returns."

    def __init__(self) -> None:
        super().__init__(
            f"{MOST} programs were made of the same rules, for what they read changes"
        )


class Unreadable(RuntimeError):
    """A rule reads something that may change without anybody seeing it."""

    cure = "Give its values as hyperparameters, or as values that prepare returns."

    def __init__(self, unknown: tuple[str, str]) -> None:
        stage, what = unknown
        super().__init__(f"{stage} reads {what}, which may change unseen")


def _general(leaves: list[Tensor]) -> list[Tensor]:
    """Examples of a size that is worth a launch: on a GPU what is seen first decides it for good."""
    found = []
    for x in leaves:
        rows = (EXAMPLE // LANES, LANES) if has_lanes(x) else (EXAMPLE + 1,)
        found.append(x.new_empty(rows if x.dim() else ()))
    return found


def _narrow(leaf: list[Any]) -> bool:
    """Whether all rules compute in float32 for this leaf."""
    return not any(x.dtype in (torch.float64, torch.complex128) for x in leaf)


def _meets(x: Tensor, p: Tensor) -> bool:
    """Whether a kernel on the device of `p` takes `x`: a single number may lie on the host."""
    return x.device == p.device or (not x.dim() and x.device.type == "cpu")


def _laid_out_alike(x: Any, p: Any) -> bool:
    if not tree.is_sharded(x):
        return not x.dim() or not x.numel()
    return bool(x._spec.placements == p._spec.placements and x._spec.mesh == p._spec.mesh)


def _local(x: Any) -> Any:
    return x._local_tensor if tree.is_sharded(x) else x
