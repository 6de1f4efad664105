"""A function of tensors, compiled in place for all sizes at once, and called without what torch does around a compiled function.

The function is traced with sizes as symbols. What the trace, or the compiler, took for granted about them is kept, as the guards of a
`Program`, and asked once for every new shape. On a CPU code that came out as one kernel is called directly: an ordinary C function.
Everything private to torch that compiling needs is in this file.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from math import prod
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

_COMBINE = {"combo_kernels": True, "combo_kernel_peak_memory_pct_threshold": None, "combo_kernel_max_num_nodes": 1000}
_COMBINE |= {"combo_kernel_max_num_args": 4000}
"""What makes of a block of tensors one launch on a GPU."""

_NAMES = {"clear", "size", "empty_strided_cpu", "torch", "float16", "bfloat16", "float32", "float64", "int64", "bool"}
"""What generated code that does nothing but call a kernel may name beside it."""
_PRIMES = (11, 13, 17, 19, 23, 29, 31)


def warn_uncompiled(what: str, error: Exception, stacklevel: int = 3) -> None:
    """Say `what` is done eagerly, and why."""
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    cure = "On a CPU it needs a C++ compiler, e.g. g++."
    warnings.warn(f"{what}, for compiling failed: {reason} {cure}", stacklevel=stacklevel)


class Program:
    """`f`, traced on `examples` and compiled; it takes a list of tensors of the same dtypes, devices and ranks, of any sizes that `fits`.

    Args:
        f: takes a list of contiguous tensors, writes into some of them and returns nothing.
        examples: such a list; its sizes are hints. A size of 1 stays 1.
        threads: that a CPU kernel may use.
        backend: ``"inductor"``; ``"eager"`` runs the trace as it is; or a function of graph and inputs that returns a function.

    Attributes:
        kernel: if the code is one kernel: that kernel, a C function; otherwise None.
        arguments: picks the arguments of `kernel` from the tuple of all tensors, of `scratch`, and of `sizes`.
    """

    def __init__(self, f: Callable[[list[Any]], None], examples: list[Tensor], threads: int, backend: Any) -> None:
        from torch.fx.experimental import _config
        from torch.fx.experimental.proxy_tensor import make_fx

        self.kernel: Callable[..., None] | None = None
        self.arguments: Callable[[tuple[Any, ...]], tuple[Any, ...]] = tuple
        self.dims: list[tuple[int, int]] = []
        self.buffers: list[tuple[list[int], torch.dtype]] = []
        symbols: Any = _config
        table: Any = None
        if backend == "inductor":
            from torch._inductor.decomposition import select_decomp_table  # importing it takes seconds

            table = {**select_decomp_table(), **(_ON_CPU if examples[0].device.type == "cpu" else {})}
        with symbols.patch(use_duck_shape=False):  # two sizes that happen to be equal are two symbols
            graph = make_fx(lambda *args: f([*args]), decomposition_table=table, tracing_mode="symbolic")(*examples)
        inputs = [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]
        self.env = inputs[0].fake_mode.shape_env
        if backend == "inductor":
            self._run = self._inductor(graph, inputs, examples, threads)
        else:
            run = graph if backend == "eager" else backend(graph, inputs)
            self._run = lambda args: run(*args)
        self.guards = self.env.produce_guards_expression(inputs)

    def _inductor(self, graph: Any, inputs: list[Any], examples: list[Tensor], threads: int) -> Callable[[list[Any]], Any]:
        from torch._guards import TracingContext, tracing
        from torch._inductor import config
        from torch._inductor.compile_fx import compile_fx_inner
        from torch._inductor.virtualized import V

        output = next(node for node in graph.graph.nodes if node.op == "output")
        output.args = ((),)
        mode, on_cpu = inputs[0].fake_mode, examples[0].device.type == "cpu"
        if on_cpu:
            _store_what_many_read(graph.graph)
        graph.recompile()
        options = {
            "size_asserts": False,
            "cpp.threads": threads,
            "emulate_precision_casts": True,
            **({} if on_cpu else {k: v for k, v in _COMBINE.items() if hasattr(config, k)}),
        }
        with config.patch(options), tracing(TracingContext(mode)), V.set_fake_mode(mode), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, about itself
            compiled: Any = compile_fx_inner(graph, inputs, is_inference=True)
        if on_cpu:
            self._find_kernel(compiled, inputs)
        return compiled

    def _find_kernel(self, compiled: Any, inputs: list[Any]) -> None:
        """If all that `compiled` does is to call one kernel, remember that kernel, and what of its arguments is which."""
        call: Any = getattr(compiled, "current_callable", None)
        function = getattr(call, "__func__", call)
        names = getattr(function, "__globals__", {})
        kernels = [name for name in names if name.startswith("cpp_fused")]
        if len(kernels) != 1 or set(function.__code__.co_names) - {*kernels, *_NAMES}:
            return
        # It is called once with tensors of sizes that tell which is which, and the kernel replaced by one that looks at them.
        dims = {size.node.expr: (i, d) for i, x in enumerate(inputs) for d, size in enumerate(x.shape) if isinstance(size, torch.SymInt)}
        telling = dict(zip(dims, _PRIMES, strict=False))
        if len(telling) < len(dims) or not all(of.is_symbol for of in dims):
            return
        shapes = [[telling[n.node.expr] if isinstance(n, torch.SymInt) else n for n in x.shape] for x in inputs]
        samples = [torch.empty(shape, dtype=x.dtype) for shape, x in zip(shapes, inputs, strict=True)]
        calls: list[tuple[Any, ...]] = []
        kernel = names[kernels[0]]
        names[kernels[0]] = lambda *args: calls.append(args)
        try:
            call(list(samples))
        finally:
            names[kernels[0]] = kernel
        if len(calls) != 1:
            return
        buffers = list({id(x): x for x in calls[0] if isinstance(x, Tensor) and not any(x is s for s in samples)}.values())
        place = {id(x): i for i, x in enumerate(samples + buffers)}
        of_size = {n: i for i, n in enumerate(telling.values())}
        order = [of_size[x] + len(place) if type(x) is int and x in of_size else place.get(id(x)) for x in calls[0]]
        if None not in order:
            self.kernel, self.arguments, self.dims = kernel, itemgetter(*order), list(dims.values())
            self.buffers = [([of_size[n] for n in x.shape if n in of_size], x.dtype) for x in buffers]

    def sizes(self, args: list[Tensor]) -> tuple[int, ...]:
        """The sizes that the kernel depends on."""
        return tuple([args[i].shape[d] for i, d in self.dims])

    def scratch(self, sizes: list[tuple[int, ...]]) -> list[Tensor]:
        """Memory for the kernel to write what it reads again, enough for tensors of any of these `sizes`."""
        return [torch.empty(max(prod([of[i] for i in which]) for of in sizes), dtype=dtype) for which, dtype in self.buffers]

    def fits(self, args: list[Tensor]) -> bool:
        """Whether what was taken for granted about sizes holds for these."""
        return bool(self.env.evaluate_guards_expression(self.guards, args))

    def __call__(self, args: list[Tensor]) -> None:
        self._run(args)


# ---- what Inductor leaves to be done for a CPU -------------------------------------------------------------------------------


def _sum(x: Tensor, *, dtype: torch.dtype | None = None) -> Any:
    """A sum over all of a float32 tensor, in float64: as exact as Inductor's sum of sums, which goes through memory."""
    if x.dtype is not torch.float32 or dtype is not None:
        return NotImplemented
    if x.dim() > 1:  # row by row, as what is summed is worked out row by row too if anything of a row stands in it
        x = torch.ops.aten.sum.dim_IntList(x, [*range(1, x.dim())])
    return torch.ops.aten.sum.default(x, dtype=torch.float64).to(torch.float32)


_ON_CPU: dict[Any, Callable[..., Any]] = {torch.ops.aten.sum.default: _sum}


def _store_what_many_read(graph: Any) -> None:
    """Store each number that meets a tensor, and each row that meets a matrix: else it is worked out again for every vector of elements."""
    copy, empty_like = torch.ops.aten.copy_.default, torch.ops.aten.empty_like.default
    for node in list(graph.nodes):
        x = node.meta.get("val")
        if node.op != "call_function" or not isinstance(x, Tensor) or getattr(node.target, "is_view", False):
            continue
        readers = [user for user in node.users if isinstance(y := user.meta.get("val"), Tensor) and _is_repeated(x, y)]
        if readers:
            with graph.inserting_after(node):
                place = graph.call_function(empty_like, (node,))
            with graph.inserting_after(place):
                stored = graph.call_function(copy, (place, node))
            place.meta["val"] = stored.meta["val"] = x
            for user in readers:
                user.replace_input_with(node, stored)


def _is_repeated(x: Tensor, y: Tensor) -> bool:
    """Whether an element of `x` makes many of `y`, by the rules of broadcasting."""
    return x.dim() < y.dim() or any(_is_one(n) and not _is_one(m) for n, m in zip(x.shape, y.shape, strict=False))


def _is_one(n: Any) -> bool:
    return isinstance(n, int) and n == 1  # a symbol may be 1 too, but whoever traced with it has not said so
