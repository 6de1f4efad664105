"""A function of tensors, compiled in place for all sizes at once, and called without detours.

The function is traced with sizes as symbols. What the trace, or the compiler, took for granted
about them is kept, as the guards of a `Program`, and asked once for every new shape. On a CPU code
that came out as one kernel, an ordinary C function, is called directly, for all tensors in one call
(`table`). What is private to torch, and compiling needs, is in these two files.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from math import prod
from typing import Any

import torch
from torch import Tensor

from functorch_opt._execution.c_function import (
    Buffer,
    WithSizes,
    find_kernel,
    samples_of,
    symbols_in,
)
from functorch_opt._execution.cpu_passes import store_what_many_read, take_sums
from functorch_opt._execution.launches import (
    Launches,
    find_launches,
    in_lanes,
    in_one_launch,
)
from functorch_opt._execution.table import Scratch, loop
from functorch_opt._execution.trials import LOCK, Untraceable, tolerances_of, try_out
from functorch_opt._execution.writes import Pure, write_in_place

_SIZES_COME_WITH_ASSERTS = hasattr(torch._C._dynamo.guards, "assert_size_stride_grouped")
"""From torch 2.14 on generated code knows its sizes only where it checks them too."""


class Program:
    """`f`, traced on `examples` and compiled to write in place.

    It takes a list of tensors of the same dtypes, devices and ranks, of any sizes that it `fits`.
    Everything is read as it was, then everything is written.

    Args:
        f: takes a list of contiguous tensors. It writes nothing, and returns what is to be
            written: pairs of a position in the list and a new value.
        examples: such a list; its sizes are hints. A size of 1 stays 1.
        threads: that a CPU kernel may use.
        backend: ``"inductor"``; ``"eager"`` runs the trace as it is; or a function of graph and
            inputs that returns a function.

    Raises:
        Untraceable: `f` cannot be made into a graph.
        WrongCode: the compiled code does not do on small tensors what `f` does.
        Exception: of many kinds, where there is no compiler.

    Attributes:
        kernel: if the code is one kernel: the address of that C function; otherwise None.
        launches: if the code only launches kernels on a GPU: these.
        order: which of all tensors, those of `scratch`, and `sizes`, in this order, are the
            arguments of `kernel`.
    """

    def __init__(
        self, f: Pure, examples: list[Tensor], threads: int, backend: Any
    ) -> None:
        self.kernel: int | None = None
        self.launches: Launches | None = None
        self.threads = threads
        self.order: list[int] = []
        self.dims: list[tuple[int, int]] = []
        self.buffers: list[Buffer] = []
        self.last: tuple[Any, Scratch] = None, Scratch([])
        with LOCK:
            self._make(f, examples, threads, backend)

    def _make(
        self,
        f: Pure,
        examples: list[Tensor],
        threads: int,
        backend: Any,
    ) -> None:
        examples = told_apart(examples)
        on_cpu = examples[0].device.type == "cpu"
        help_cpu = on_cpu and backend == "inductor"
        try:
            graph, targets = _trace(f, examples, backend)
        except Exception as error:
            raise Untraceable(f"a rule cannot be traced: {error}") from error
        if help_cpu:
            take_sums(graph.graph)
        graph.graph.eliminate_dead_code()
        tolerances = tolerances_of(graph.graph, targets)
        write_in_place(graph.graph, targets)
        if help_cpu:
            store_what_many_read(graph.graph)
        graph.recompile()
        inputs = [
            node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"
        ]
        self.env = inputs[0].fake_mode.shape_env
        if backend == "inductor":
            compiled, with_sizes = _inductor(graph, inputs, threads, on_cpu)
            self._run = lambda args: compiled(with_sizes(args))
            call = getattr(compiled, "current_callable", None)
            if on_cpu and (found := find_kernel(call, with_sizes, inputs)):
                self.kernel, self.order, self.dims, self.buffers = found
            if examples[0].device.type == "cuda":
                self.launches = _find_launches(call, with_sizes, inputs)
        else:
            run = graph if backend == "eager" else backend(graph, inputs)
            self._run = lambda args: run(*args)
        self.fixed = _fixed_sizes(inputs)
        self.guards = self.env.produce_guards_expression(inputs)
        try_out(self, f, inputs, examples, tolerances)

    def sizes(self, args: list[Tensor]) -> tuple[int, ...]:
        """The sizes that the kernel depends on."""
        return tuple([args[i].shape[d] for i, d in self.dims])

    def scratch(self, sizes: list[tuple[int, ...]]) -> list[tuple[int, torch.dtype]]:
        """The memory that the kernel needs to write what it reads again.

        How much is enough for tensors of any of these `sizes`.
        """
        return [
            (of.number * max(prod([n[i] for i in of.sizes]) for n in sizes), of.dtype)
            for of in self.buffers
        ]

    def fits(self, args: list[Tensor]) -> bool:
        """Whether what was taken for granted about sizes holds for these."""
        if any(args[i].shape[d] != n for i, d, n in self.fixed):
            return False
        guards = self.guards
        return guards is None or bool(self.env.evaluate_guards_expression(guards, args))

    def __call__(self, args: list[Tensor]) -> None:
        if self.launches is not None:
            self.launches(args)
            return
        if self.kernel is None:
            self._run(args)
            return
        sizes = self.sizes(args)
        known, scratch = self.last
        if known != sizes:
            scratch = Scratch(self.scratch([sizes]))
            self.last = sizes, scratch
        _memory, places = scratch.taken()
        self.call(1, 1, [*args, *places, *sizes])

    def call(self, rows: int, threads: int, given: list[Any]) -> None:
        """Call the kernel for several rows of arguments, which `threads` share out.

        What is `given` in each place is a list with an entry for each row, or one value for all.
        """
        assert self.kernel is not None
        ordered = tuple([given[i] for i in self.order])
        loop()(self.kernel, rows, threads, ordered)


# ---- tracing -------------------------------------------------------------------------------------


def told_apart(examples: list[Tensor]) -> list[Tensor]:
    """The examples, with copies of those that are there twice.

    A trace takes what is one tensor for one argument, and others may be two tensors later.
    """
    seen: set[int] = set()
    found = []
    for x in examples:
        is_new = id(x) not in seen
        found.append(x if is_new else x.clone())
        seen.add(id(x))
    return found


def _fixed_sizes(inputs: list[Any]) -> list[tuple[int, int, int]]:
    """The sizes that the trace took for numbers: input, dim and size. No guard is about them."""
    fixed = []
    for i, x in enumerate(inputs):
        for d, n in enumerate(x.shape):
            number = n if isinstance(n, int) else n.node.maybe_as_int()
            if number is not None:
                fixed.append((i, d, number))
    return fixed


def _trace(f: Pure, examples: list[Tensor], backend: Any) -> tuple[Any, list[int]]:
    """The graph of the values that `f` would write, and the positions where."""
    from torch.fx.experimental import _config
    from torch.fx.experimental.proxy_tensor import make_fx

    table: Any = None
    if backend == "inductor":
        from torch._inductor.decomposition import (
            select_decomp_table,
        )  # takes seconds to import

        table = select_decomp_table()
    targets: list[int] = []

    def values(*args: Any) -> list[Tensor]:
        writes = f([*args])
        targets[:] = [i for i, _ in writes]
        return [value for _, value in writes]

    def traced(function: Any) -> Any:
        given = in_lanes(examples) if examples[0].device.type == "cuda" else examples
        return make_fx(function, decomposition_table=table, tracing_mode="symbolic")(
            *given
        )

    symbols: Any = _config
    with symbols.patch(
        use_duck_shape=False
    ):  # two sizes that happen to be equal are two symbols
        graph = traced(values)
        if _writes(graph):  # into tensors that the rule has made
            graph = traced(torch.func.functionalize(values))
            if _writes(graph):
                raise TypeError("a rule writes into a tensor that it was given")
    return graph, targets


def _writes(graph: Any) -> bool:
    """Whether there are operations in `graph` that write in place."""
    schemas = [getattr(node.target, "_schema", None) for node in graph.graph.nodes]
    return any(schema is not None and schema.is_mutable for schema in schemas)


# ---- Inductor ------------------------------------------------------------------------------------


def _inductor(
    graph: Any, inputs: list[Any], threads: int, on_cpu: bool
) -> tuple[Callable[..., Any], WithSizes]:
    """Code of Inductor, which empties the list that it is given, and what that list is made by.

    Code that Inductor finds on disk comes with guards for the sizes among its inputs only, not for
    those of tensors. So all sizes are inputs. Where they cannot be, code is made anew.
    """
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx_inner

    options: dict[str, Any] = {
        "size_asserts": _SIZES_COME_WITH_ASSERTS,
        "cpp.threads": threads,
        "emulate_precision_casts": True,
    }
    graph.shape_env = None  # Inductor keeps code on disk, and could not write this there
    symbols = symbols_in(inputs)
    if all(of.is_symbol for of in symbols):
        places = [*symbols.values()]
        sizes = [inputs[i].shape[d] for i, d in places]
        _take(graph, sizes)
    else:
        places = []
        sizes = []
        options["fx_graph_cache"] = False
    with (
        nullcontext() if on_cpu else in_one_launch(graph.graph),
        config.patch(options),
        _as_if_traced(inputs[0].fake_mode),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # torch's, about itself
        compiled: Any = compile_fx_inner(graph, [*inputs, *sizes], is_inference=True)

    def with_sizes(args: list[Tensor]) -> list[Any]:
        return [*args, *[args[i].shape[d] for i, d in places]]

    return compiled, with_sizes


def _take(graph: Any, sizes: list[Any]) -> None:
    """Let `graph` take `sizes` after its other inputs."""
    *_, last = [node for node in graph.graph.nodes if node.op == "placeholder"]
    with graph.graph.inserting_after(last):
        for k, size in reversed([*enumerate(sizes)]):
            graph.graph.placeholder(f"size_{k}").meta["val"] = size
    graph.recompile()


@contextmanager
def _as_if_traced(mode: Any) -> Iterator[None]:
    from torch._guards import TracingContext, tracing
    from torch._inductor.virtualized import V

    with tracing(TracingContext(mode)), V.set_fake_mode(mode):
        yield


def _find_launches(
    call: Any, with_sizes: WithSizes, inputs: list[Any]
) -> Launches | None:
    """The launches, if all that the generated function `call` does is to make them."""
    symbols = dict.fromkeys(symbols_in(inputs))
    if not all(of.is_symbol for of in symbols):
        return None
    # Odd numbers: no multiple of `LANES` is among them.
    telling = {of: 17 + 2 * k for k, of in enumerate(symbols)}
    samples = samples_of(inputs, telling)
    return find_launches(call, samples, with_sizes)
