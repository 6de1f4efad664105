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
from torch.fx import Node

aten = torch.ops.aten
_convert = torch.ops.prims.convert_element_type.default

_COMBINE = {
    "combo_kernels": True,
    "combo_kernel_peak_memory_pct_threshold": None,
    "combo_kernel_max_num_nodes": 1000,
}
_COMBINE |= {"combo_kernel_max_num_args": 4000}
"""What makes of a block of tensors one launch on a GPU."""

_NAMES = {
    "clear",
    "size",
    "empty_strided_cpu",
    "torch",
    "float16",
    "bfloat16",
    "float32",
    "float64",
    "int64",
    "bool",
}
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
        arguments: picks the arguments of `kernel` from the tuple of all tensors, those of `scratch`, and `sizes`.
    """

    def __init__(
        self, f: Callable[[list[Any]], None], examples: list[Tensor], threads: int, backend: Any
    ) -> None:
        from torch.fx.experimental import _config
        from torch.fx.experimental.proxy_tensor import make_fx

        self.kernel: Callable[..., None] | None = None
        self.arguments: Callable[[tuple[Any, ...]], tuple[Any, ...]] = tuple
        self.dims: list[tuple[int, int]] = []
        self.buffers: list[tuple[list[int], torch.dtype]] = []
        symbols: Any = _config
        table: Any = None
        if backend == "inductor":
            from torch._inductor.decomposition import (
                select_decomp_table,
            )  # importing it takes seconds

            table = select_decomp_table()
        with symbols.patch(
            use_duck_shape=False
        ):  # two sizes that happen to be equal are two symbols
            graph = make_fx(
                lambda *args: f([*args]), decomposition_table=table, tracing_mode="symbolic"
            )(*examples)
        inputs = [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]
        self.env = inputs[0].fake_mode.shape_env
        if backend == "inductor":
            self._run = self._inductor(graph, inputs, examples, threads)
        else:
            run = graph if backend == "eager" else backend(graph, inputs)
            self._run = lambda args: run(*args)
        self.guards = self.env.produce_guards_expression(inputs)

    def _inductor(
        self, graph: Any, inputs: list[Any], examples: list[Tensor], threads: int
    ) -> Callable[[list[Any]], Any]:
        from torch._guards import TracingContext, tracing
        from torch._inductor import config
        from torch._inductor.compile_fx import compile_fx_inner
        from torch._inductor.virtualized import V

        output = next(node for node in graph.graph.nodes if node.op == "output")
        output.args = ((),)
        mode, on_cpu = inputs[0].fake_mode, examples[0].device.type == "cpu"
        if on_cpu:
            _take_sums(graph.graph)
            _store_what_many_read(graph.graph)
        graph.recompile()
        options = {
            "size_asserts": False,
            "cpp.threads": threads,
            "emulate_precision_casts": True,
            **({} if on_cpu else {k: v for k, v in _COMBINE.items() if hasattr(config, k)}),
        }
        with (
            config.patch(options),
            tracing(TracingContext(mode)),
            V.set_fake_mode(mode),
            warnings.catch_warnings(),
        ):
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
        dims = {
            size.node.expr: (i, d)
            for i, x in enumerate(inputs)
            for d, size in enumerate(x.shape)
            if isinstance(size, torch.SymInt)
        }
        telling = dict(zip(dims, _PRIMES, strict=False))
        if len(telling) < len(dims) or not all(of.is_symbol for of in dims):
            return
        shapes = [
            [telling[n.node.expr] if isinstance(n, torch.SymInt) else n for n in x.shape]
            for x in inputs
        ]
        samples = [
            torch.empty(shape, dtype=x.dtype) for shape, x in zip(shapes, inputs, strict=True)
        ]
        calls: list[tuple[Any, ...]] = []
        kernel = names[kernels[0]]
        names[kernels[0]] = lambda *args: calls.append(args)
        try:
            call(list(samples))
        finally:
            names[kernels[0]] = kernel
        if len(calls) != 1:
            return
        buffers = list(
            {
                id(x): x
                for x in calls[0]
                if isinstance(x, Tensor) and not any(x is s for s in samples)
            }.values()
        )
        place = {id(x): i for i, x in enumerate(samples + buffers)}
        of_size = {n: i for i, n in enumerate(telling.values())}
        order = [
            of_size[x] + len(place) if type(x) is int and x in of_size else place.get(id(x))
            for x in calls[0]
        ]
        if None not in order:
            self.kernel, self.arguments, self.dims = kernel, itemgetter(*order), list(dims.values())
            self.buffers = [
                ([of_size[n] for n in x.shape if n in of_size], x.dtype) for x in buffers
            ]

    def sizes(self, args: list[Tensor]) -> tuple[int, ...]:
        """The sizes that the kernel depends on."""
        return tuple([args[i].shape[d] for i, d in self.dims])

    def scratch(self, sizes: list[tuple[int, ...]]) -> list[tuple[int, torch.dtype]]:
        """The memory that the kernel needs to write what it reads again: how much is enough for tensors of any of these `sizes`."""
        return [
            (max(prod([of[i] for i in which]) for of in sizes), dtype)
            for which, dtype in self.buffers
        ]

    def fits(self, args: list[Tensor]) -> bool:
        """Whether what was taken for granted about sizes holds for these."""
        return bool(self.env.evaluate_guards_expression(self.guards, args))

    def __call__(self, args: list[Tensor]) -> None:
        self._run(args)


# ---- what Inductor leaves to be done for a CPU -------------------------------------------------------------------------------


def _take_sums(graph: Any) -> None:
    """Take each sum over all of a float32 tensor in float64: as exact as Inductor's sum of sums, which goes through memory.

    A factor that is known only after another sum is taken out, ``sum(s x) = s sum(x)``, so that both sums can be of the same loop.
    """
    late: set[Any] = set()
    written = {node.args[0] for node in graph.nodes if node.target is aten.copy_.default}
    for node in list(graph.nodes):
        if (
            node.target is aten.sum.default
            and not node.kwargs
            and node.args[0].meta["val"].dtype is torch.float32
        ):
            with graph.inserting_before(node):
                factor, x = _factored(graph, node.args[0], late, written)
                total = _total(graph, x)
                if factor is not None:  # a sum of zeros is 0, whatever the factor
                    is_zero, product = (
                        _call(graph, aten.eq.Scalar, total, 0),
                        _call(graph, aten.mul.Tensor, total, factor),
                    )
                    total = _call(graph, aten.where.self, is_zero, total, product)
                total = _call(graph, _convert, total, torch.float32)
            node.replace_all_uses_with(total)
            graph.erase_node(node)
            late.add(total)
        elif node.target is aten.sum.default or not late.isdisjoint(node.all_input_nodes):
            late.add(node)


def _total(graph: Any, x: Any) -> Any:
    dims = [*range(1, x.meta["val"].dim())]
    if dims:  # row by row, as what is summed is worked out row by row too if anything of a row stands in it
        x = _call(graph, aten.sum.dim_IntList, x, dims)
    return _call(graph, aten.sum.default, x, dtype=torch.float64)


def _factored(graph: Any, x: Any, late: set[Any], written: set[Any]) -> tuple[Any, Any]:
    """`x` as a float64 number, made of `late` ones, and the rest; None, and `x`, if there is no such number."""

    def stays(node: Any) -> bool:  # and can be read later than it was
        return node not in written and not getattr(node.target, "is_view", False)

    if x.target is aten.mul.Tensor and x.meta["val"].dim():
        for number, other in (x.args, x.args[::-1]):
            if number in late and not number.meta["val"].dim():
                more, rest = _factored(graph, other, late, written)
                if stays(rest):
                    factor = _call(graph, _convert, number, torch.float64)
                    return factor if more is None else _call(
                        graph, aten.mul.Tensor, factor, more
                    ), rest
    elif x.target is aten.pow.Tensor_Scalar and x.args[1] == 2:
        root, rest = _factored(graph, x.args[0], late, written)
        if root is not None:
            return _call(graph, aten.mul.Tensor, root, root), _call(
                graph, aten.pow.Tensor_Scalar, rest, 2
            )
    elif (
        x.target is aten.where.self
        and x.args[2].target is aten.scalar_tensor.default
        and x.args[2].args[0] == 0
        and stays(x.args[0])
    ):
        factor, rest = _factored(graph, x.args[1], late, written)
        if factor is not None:
            return factor, _call(graph, aten.where.self, x.args[0], rest, x.args[2])
    return None, x


def _call(graph: Any, target: Any, *args: Any, **kwargs: Any) -> Any:
    """A new node of `graph`, with the value that it stands for."""
    node = graph.call_function(target, args, kwargs)
    node.meta["val"] = target(
        *[x.meta["val"] if isinstance(x, Node) else x for x in args], **kwargs
    )
    return node


def _store_what_many_read(graph: Any) -> None:
    """Store each number that meets a tensor, and each row that meets a matrix: else it is worked out again for every vector of elements."""
    for node in list(graph.nodes):
        x = node.meta.get("val")
        if (
            node.op != "call_function"
            or not isinstance(x, Tensor)
            or getattr(node.target, "is_view", False)
        ):
            continue
        readers = [
            user
            for user in node.users
            if isinstance(y := user.meta.get("val"), Tensor) and _is_repeated(x, y)
        ]
        if readers:
            with graph.inserting_after(node):
                place = graph.call_function(aten.empty_like.default, (node,))
            with graph.inserting_after(place):
                stored = graph.call_function(aten.copy_.default, (place, node))
            place.meta["val"] = stored.meta["val"] = x
            for user in readers:
                user.replace_input_with(node, stored)


def _is_repeated(x: Tensor, y: Tensor) -> bool:
    """Whether an element of `x` makes many of `y`, by the rules of broadcasting."""
    return x.dim() < y.dim() or any(
        _is_one(n) and not _is_one(m) for n, m in zip(x.shape, y.shape, strict=False)
    )


def _is_one(n: Any) -> bool:
    return (
        isinstance(n, int) and n == 1
    )  # a symbol may be 1 too, but whoever traced with it has not said so
