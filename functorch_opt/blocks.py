"""Blocks: the rules of consecutive elementwise stages, compiled once for as many tensors as a block holds, written in place.

A `Segment` sorts the leaves of a model into blocks of equal dtypes; a `Program` is the code of one kind of block, kept for the whole
process. torch's guards are left out, because they would cost more than a small block does. What they would check is checked here, and each
tensor that the compiled code would get wrong (not contiguous, complex, a subclass, fewer than two elements, more than an int32 can index,
memory that is not aligned on a GPU) takes the same rules eagerly.
"""

from __future__ import annotations

import itertools
import re
import warnings
from collections.abc import Callable
from operator import attrgetter
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functorch_opt import tree
from functorch_opt.rule import Each, Leafwise, Misfit, working_dtype, wrong_update
from functorch_opt.tree import PyTree

BLOCK, SMALL_BLOCK = 32, 8
"""Tensors in a block, the smaller one for models that fit into it. The last block is filled up with small tensors."""


class Body:
    """The rules of consecutive elementwise stages, for a block of leaves: what is compiled, and what runs where that cannot be."""

    def __init__(self, stages: list[Leafwise], now: list[dict[str, Any]], add: bool) -> None:
        self.stages, self.add = stages, add
        self.fixed = [{name: v for name, v in of.items() if not isinstance(v, (Tensor, Each))} for of in now]
        self.shared = [[name for name, v in of.items() if isinstance(v, Tensor) and v.dim() == 0] for of in now]
        self.rows = [[name for name, v in of.items() if isinstance(v, Each) or (isinstance(v, Tensor) and v.dim() == 1)] for of in now]
        self.scalars = [of[name] for of, names in zip(now, self.shared, strict=True) for name in names]
        fixed = tuple([tuple(of.items()) for of in self.fixed])
        what = tuple([(_meaning(stage.rule), stage.kind, tuple(stage.slots)) for stage in stages])
        numbers = tuple([(name, v.dtype, v.dim(), v.device) for of in now for name, v in of.items() if isinstance(v, Tensor)])
        self.key = what, add, fixed, numbers, tuple(map(tuple, self.shared)), tuple(map(tuple, self.rows))

    def __call__(
        self, us: list[Tensor], ps: list[Tensor], slots: list[Any], rows: list[Any], outs: list[Any], scalars: list[Tensor]
    ) -> None:
        """Write slots, and the updates to `outs` or, added, to `ps`. `slots` and `rows` have an entry per leaf, stage after stage."""
        for u, p, of_slots, of_rows, out in zip(us, ps, slots, rows, outs, strict=True):
            left, entries, values = list(of_slots), list(of_rows), list(scalars)
            for stage, fixed, shared, row in zip(self.stages, self.fixed, self.shared, self.rows, strict=True):
                now = {**fixed, **{name: values.pop(0) for name in shared}, **{name: entries.pop(0) for name in row}}
                mine = {name: left.pop(0) for name in stage.slots}
                u, new = stage.apply(u, p, mine, now, working_dtype(u, p if "p" in stage.rule_reads else None, *mine.values()))
                for name, slot in mine.items():
                    slot.copy_(new[name])
            if self.add:
                p.copy_(p + u)
            else:
                out.copy_(u)


class _Leaf(NamedTuple):
    """A parameter and its slots."""

    i: int
    p: Tensor
    slots: list[Tensor]


_dtype = attrgetter("dtype")


def _facts(us: list[Any], ps: list[Any], slots: list[list[Any]], rows: list[list[Any]]) -> list[list[Any]]:
    """What shows that these are not the tensors, or not the kinds of tensors, that blocks were made of.

    Of parameters and slots where they lie, and how they are to be read. Of gradients and rows no strides: they are copied if they must be.
    """
    slots = [x for column in slots for x in column]
    return [
        *(list(map(fact, [*ps, *slots])) for fact in (Tensor.data_ptr, Tensor.stride)),
        *(list(map(fact, ps)) for fact in (Tensor.size, _dtype)),
        list(map(_dtype, slots)),
        *(list(map(fact, us)) for fact in (type, Tensor.size, _dtype)),
        *(list(map(fact, row)) for row in rows for fact in (type, Tensor.size, _dtype)),
    ]


class Segment:
    """The leaves of a model, sorted into blocks of equal dtypes, for one body."""

    def __init__(
        self, backend: str, body: Body, params: PyTree, us: list[Any], ps: list[Any], slots: list[list[Any]], rows: list[list[Any]]
    ) -> None:
        self.body = body
        self.present = [u is not None for u in us]
        self.eager: list[int] = []
        groups: dict[Any, list[_Leaf]] = {}
        seen: dict[int, int] = {}
        for i, (u, p) in enumerate(zip(us, ps, strict=True)):
            if u is None:
                continue
            mine = [column[i] for column in slots]
            if wrong := wrong_update(u, p, mine):
                raise ValueError(f"compiled_step: the update at {tree.paths(params)[i]!r} {wrong}")
            if type(p) in (Tensor, torch.nn.Parameter) and p.numel() and (first := seen.setdefault(p.data_ptr(), i)) != i:
                paths = tree.paths(params)
                raise ValueError(
                    f"the parameters at {paths[first]!r} and {paths[i]!r} share memory, so an update in place would move both. "
                    "Give it once."
                )
            signature = _signature(u, p, mine, [row[i] for row in rows])
            groups.setdefault(signature, []).append(_Leaf(i, p, mine))
        self.compiled = sorted(leaf.i for signature, leaves in groups.items() if signature is not None for leaf in leaves)
        self.facts = self._facts(us, ps, slots, rows)
        self.blocks: list[_Block] = []
        for signature, leaves in groups.items():
            if signature is None:
                self.eager += [leaf.i for leaf in leaves]
                continue
            size = BLOCK if len(leaves) > SMALL_BLOCK else SMALL_BLOCK
            shaped = tuple([row[leaves[0].i].dim() > 0 for row in rows])
            key = body.key, signature, shaped, size, backend
            if key not in PROGRAMS:
                PROGRAMS[key] = Program(body, signature, shaped, size, backend)
            self.blocks += [_Block(PROGRAMS[key], leaves[k : k + size]) for k in range(0, len(leaves), size)]

    def fits(self, us: list[Any], ps: list[Any], slots: list[list[Any]], rows: list[list[Any]]) -> bool:
        """Whether these are the tensors that the blocks were made of, where they were, and gradients of the same kind."""
        return [u is not None for u in us] == self.present and self._facts(us, ps, slots, rows) == self.facts

    def _facts(self, us: list[Any], ps: list[Any], slots: list[list[Any]], rows: list[list[Any]]) -> list[list[Any]]:
        if not self.compiled:
            return []
        rows = [row for row in rows if row[self.compiled[0]].dim()]  # of the others the body knows the dtype
        if len(self.compiled) < len(us):
            us, ps, *columns = ([column[i] for i in self.compiled] for column in (us, ps, *slots, *rows))
            slots, rows = columns[: len(slots)], columns[len(slots) :]
        return _facts(us, ps, slots, rows)

    def run(
        self, us: list[Any], ps: list[Any], slots: list[list[Any]], rows: list[list[Any]], outs: list[Any] | None, scalars: list[Tensor]
    ) -> None:
        for i in self.eager:  # of the others the facts are known
            if wrong := wrong_update(us[i], ps[i]):
                raise ValueError(f"compiled_step: the update of leaf {i} {wrong}")
        for block in self.blocks:
            block.run(us, rows, outs, scalars)
        for i in self.eager:
            mine, row, out = [column[i] for column in slots], [row[i] for row in rows], None if outs is None else outs[i]
            try:
                self.body([us[i]], [ps[i]], [mine], [row], [out], scalars)
            except Misfit as misfit:
                raise ValueError(f"compiled_step: the update of leaf {i} {misfit}") from misfit.__cause__


def _signature(u: Tensor, p: Tensor, slots: list[Tensor], rows: list[Tensor]) -> Any:
    """What compiled code depends on; None if these tensors must not meet it."""
    shaped = [u, *(row for row in rows if row.dim())]
    if not 2 <= p.numel() < 2**31 or not all(x.shape == p.shape and x.device == p.device and type(x) is Tensor for x in (*shaped, *slots)):
        return None
    in_place = (p, *slots)
    if not all(x.is_contiguous() and not x.is_complex() and (x.device.type == "cpu" or x.data_ptr() % 16 == 0) for x in in_place):
        return None
    return p.device, u.dtype, p.dtype, tuple([x.dtype for x in slots]), tuple([row.dtype for row in rows])


PROGRAMS: dict[Any, Program] = {}
"""Compiled code, for all steps of this process: the same rules on the same dtypes are compiled once."""


def _meaning(value: Any) -> Any:
    """What a rule computes, for use as a key: its code and what it closes over, where that is plain; else the object itself."""
    if isinstance(value, FunctionType):
        cells = tuple([_meaning(cell.cell_contents) for cell in value.__closure__ or ()])
        return value.__code__, cells, value.__defaults__
    return value if isinstance(value, (bool, int, float, str, torch.dtype, type(None))) else _ByIdentity(value)


class _ByIdentity:
    """A key for an object that is equal to itself only; it keeps the object alive."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ByIdentity) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)


def _flat(x: Tensor, reads_shapes: bool) -> Tensor:
    """`x` as compiled code takes it: one dimension. Called directly it reads the memory only, and making the view would take longer."""
    return x.reshape(-1) if reads_shapes or not x.is_contiguous() else x


class _Block:
    """Up to as many leaves as a program takes, and small tensors for the rest."""

    def __init__(self, program: Program, leaves: list[_Leaf]) -> None:
        self.program, self.indices = program, [leaf.i for leaf in leaves]
        n = len(leaves)
        self.ps = [leaf.p.detach().view(-1) for leaf in leaves] + program.ps[n:]
        self.slots = [[x.view(-1) for x in leaf.slots] for leaf in leaves] + program.slots[n:]

    def run(self, us: list[Any], rows: list[list[Any]], outs: list[Any] | None, scalars: list[Tensor]) -> None:
        n, program = len(self.indices), self.program
        flat_us = [_flat(us[i], program.reads_shapes) for i in self.indices] + program.us[n:]
        flat_rows = [[row[i].reshape(-1) if row[i].dim() else row[i] for row in rows] for i in self.indices] + program.rows[n:]
        flat_outs = program.outs if outs is None else [outs[i].view(-1) for i in self.indices] + program.outs[n:]
        program.block(flat_us, self.ps, self.slots, flat_rows, flat_outs, scalars)


_numbers = itertools.count()


class Program:
    """A body compiled for blocks of `size` leaves of one signature, and the small tensors that it was traced on."""

    def __init__(self, body: Body, signature: Any, shaped_rows: tuple[bool, ...], size: int, backend: str) -> None:
        device, u_dtype, p_dtype, slot_dtypes, row_dtypes = signature
        # Dynamo takes equal sizes for one symbol, and 0 and 1 for constants. On a GPU the sizes it sees decide the launch for good.
        sizes = range(17, 17 + size) if device.type == "cpu" else range(131_072, 131_072 + size)

        def ones(n: int, dtype: torch.dtype) -> Tensor:
            return torch.ones(n, dtype=dtype, device=device)

        self.us = [ones(n, u_dtype) for n in sizes]
        self.ps = [ones(n, p_dtype) for n in sizes]
        self.slots = [[ones(n, dtype) for dtype in slot_dtypes] for n in sizes]
        self.rows = [[ones(n, d) if s else ones(1, d)[0] for d, s in zip(row_dtypes, shaped_rows, strict=True)] for n in sizes]
        self.outs: list[Any] = [None] * size if body.add else [ones(n, tree.at_least_float32(u_dtype)) for n in sizes]

        # Compiled code is kept by code object, and without guards the first would serve every body.
        def block(*args: Any) -> None:
            body(*args)

        block.__code__ = block.__code__.replace(co_name=f"block_{next(_numbers)}")
        direct: list[Callable[..., None]] = []

        def compile_graph(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
            arguments = _arguments(graph)
            if backend != "inductor":
                return torch._dynamo.lookup_backend(backend)(graph, inputs)
            from torch._inductor.compile_fx import compile_fx, compile_fx_inner  # importing it takes seconds

            kernels: list[Callable[..., Any]] = []

            def keep(*args: Any, **kwargs: Any) -> Any:
                kernels.append(compile_fx_inner(*args, **kwargs))
                return kernels[-1]

            # The cache of whole graphs would skip `keep`; that of kernels, below it, is what saves the time.
            with torch._inductor.config.patch(size_asserts=False), torch._functorch.config.patch(enable_autograd_cache=False):
                compiled: Any = compile_fx(graph, inputs, inner_compile=keep)
            if arguments and len(kernels) == 1:

                def call(*args: Any) -> None:
                    kernels[0](arguments({"args": args}))
                    torch.autograd.graph.increment_version(args[1])  # so that autograd sees that parameters have changed

                direct.append(call)
            return compiled

        options: Any = {"guard_filter_fn": torch.compiler.skip_all_guards_unsafe}
        traced = torch.compile(block, fullgraph=True, dynamic=True, backend=compile_graph, options=options)
        try:
            # Otherwise numbers that a rule closes over would become inputs of every call.
            with torch._dynamo.config.patch(specialize_float=True, specialize_int=True):
                traced(self.us, self.ps, self.slots, self.rows, self.outs, body.scalars)
        except torch._dynamo.exc.BackendCompilerFailed as error:
            reason = str(error).strip().splitlines()[0]
            cure = "On a CPU it needs a C++ compiler, e.g. g++."
            warnings.warn(f"compiled_step runs eagerly, for compiling failed: {reason} {cure}", stacklevel=2)
            traced = body
        self.block: Callable[..., None] = direct[0] if direct and traced is not body else traced
        self.reads_shapes = self.block is traced


def _arguments(graph: torch.fx.GraphModule) -> Callable[[dict[str, Any]], list[Any]] | None:
    """From the arguments of a block to the inputs of its graph, as Dynamo names them; None if it needs others.

    Calling the compiled graph directly saves what Dynamo does at each call, which is as much as a block of small tensors takes.
    """
    names = []
    for node in graph.graph.nodes:
        if node.op == "placeholder":
            source = getattr(node.meta.get("grapharg"), "source", None)
            name = getattr(source, "name", "")
            names.append(name() if callable(name) else name)
    if not all(name.startswith("L['args']") for name in names):
        return None
    # Every size is read from the parameters, which are flat.
    sizes = re.compile(r"L\['args'\]\[\d+\]\[(\d+)\](?:\[\d+\])*\.size\(\)\[0\]")
    names = [sizes.sub(r"L['args'][1][\1].size()[0]", name) for name in names]
    return eval(f"lambda L: [{', '.join(names)}]")
