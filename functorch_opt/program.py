"""A function of tensors, compiled in place for all sizes at once, and called without what torch does around a compiled function.

The function is traced with sizes as symbols. What the trace, or the compiler, took for granted about them is kept, as the guards of a
`Program`, and asked once for every new shape. On a CPU code that came out as one kernel is called directly: an ordinary C function.
Everything private to torch that compiling needs is in this file.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

_COMBINE = {"combo_kernels": True, "combo_kernel_peak_memory_pct_threshold": None, "combo_kernel_max_num_nodes": 1000}
_COMBINE |= {"combo_kernel_max_num_args": 4000}
"""What makes of a block of tensors one launch on a GPU."""


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
        kernel: if the code is one kernel for tensors of one size: that kernel, a C function; otherwise None.
        arguments: picks the arguments of `kernel` from the tuple of all tensors and, last, their size.
    """

    def __init__(self, f: Callable[[list[Any]], None], examples: list[Tensor], threads: int, backend: Any) -> None:
        from torch.fx.experimental import _config
        from torch.fx.experimental.proxy_tensor import make_fx

        self.kernel: Callable[..., None] | None = None
        self.arguments: Callable[[tuple[Any, ...]], tuple[Any, ...]] = tuple
        symbols: Any = _config
        table: Any = None
        if backend == "inductor":
            from torch._inductor.decomposition import select_decomp_table  # importing it takes seconds

            table = select_decomp_table()
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
        graph.recompile()
        mode, on_cpu = inputs[0].fake_mode, examples[0].device.type == "cpu"
        options = {
            "size_asserts": False,
            "cpp.threads": threads,
            "emulate_precision_casts": True,
            **({} if on_cpu else {k: v for k, v in _COMBINE.items() if hasattr(config, k)}),
        }
        with config.patch(options), tracing(TracingContext(mode)), V.set_fake_mode(mode), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, about itself
            compiled: Any = compile_fx_inner(graph, inputs, is_inference=True)
        if on_cpu and all(x.dim() <= 1 for x in examples):
            self._find_kernel(compiled, examples)
        return compiled

    def _find_kernel(self, compiled: Any, examples: list[Tensor]) -> None:
        """If all that `compiled` does is to call one kernel with its inputs and their size, remember that kernel and the order."""
        call: Any = getattr(compiled, "current_callable", None)
        names = getattr(getattr(call, "__func__", call), "__globals__", {})
        kernels = [name for name in names if name.startswith("cpp_fused")]
        if len(kernels) != 1:
            return
        size = 37
        samples = [torch.empty(size if x.dim() else (), dtype=x.dtype) for x in examples]
        calls: list[tuple[Any, ...]] = []
        kernel = names[kernels[0]]
        names[kernels[0]] = lambda *args: calls.append(args)
        try:
            call(list(samples))
        finally:
            names[kernels[0]] = kernel
        place = {id(x): i for i, x in enumerate(samples)}
        order = [len(samples) if type(x) is int and x == size else place.get(id(x)) for of in calls for x in of]
        if len(calls) == 1 and None not in order:
            self.kernel, self.arguments = kernel, itemgetter(*order)

    def fits(self, args: list[Tensor]) -> bool:
        """Whether what was taken for granted about sizes holds for these."""
        return bool(self.env.evaluate_guards_expression(self.guards, args))

    def __call__(self, args: list[Tensor]) -> None:
        self._run(args)
