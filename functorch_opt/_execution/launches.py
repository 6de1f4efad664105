"""Kernels on a GPU: many tensors in one launch, called without the code that Inductor writes around.

The code around a kernel takes the sizes and the numbers of tensors apart, and copies what is not
aligned. For a hundred tensors that takes longer than the kernel. All it hands over are tensors,
how many elements they have, and numbers that lie on the host. So it is called once, on tensors that
can be told apart, with something in the place of each kernel that looks at what it is given.
Afterwards the kernels are given the same themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

LANES = 16
"""Where the number of elements is known to be a multiple of this, a kernel reads several at a time."""

_COMBINE = {
    "combo_kernels": True,
    "combo_kernel_peak_memory_pct_threshold": None,
    "combo_kernel_max_num_nodes": 1000,
    "combo_kernel_max_num_args": 4000,
}
"""What makes of a block of tensors one launch."""

_AGAIN = {"realize_reads_threshold": 10_000, "realize_opcount_threshold": 10_000}
"""What makes Inductor work out a value again behind a sum, in place of writing it to memory."""
SMALL_ENOUGH = 5_000
"""Operations for an element up to which it is worked out again."""
_SUMS = {"sum", "mean", "amax", "amin", "linalg_vector_norm", "any", "all", "prod", "var"}
_MATRICES = {"mm", "bmm", "addmm", "baddbmm"}

_NAMES = {
    "assert_size_stride",
    "assert_size_stride_grouped",
    "clear",
    "copy_if_misaligned",
    "cuda",
    "device",
    "get_raw_stream",
    "item",
    "run",
    "set_device",
    "size",
    "torch",
    "_DeviceGuard",
}
"""What generated code that does nothing but launch kernels may name beside them."""


Take = Callable[[Any], Any]


class Launches:
    """Kernels, and what each is given of the tensors of a program.

    Args:
        kernels: each with a function that takes its arguments out of a list: the tensors, and then
            how many elements some of them have.
        sized: the tensors whose elements are counted.
        hosts: the tensors that lie on the host. Kernels are given the numbers in them.
        constants: what else they are given, at the end of the list.
    """

    def __init__(
        self,
        kernels: list[tuple[Any, Take]],
        sized: list[int],
        hosts: list[int],
        constants: list[int],
    ) -> None:
        self.kernels, self.sized, self.hosts = kernels, sized, hosts
        self.constants = constants

    def __call__(self, *blocks: list[Tensor]) -> None:
        """Launch the kernels for each block of tensors."""
        device = blocks[0][0].device
        with torch.cuda.device(device):
            stream = torch.cuda.current_stream(device).cuda_stream
            for tensors in blocks:
                given: list[Any] = [*tensors, *[tensors[i].numel() for i in self.sized]]
                given += self.constants
                for i in self.hosts:
                    given[i] = given[i].item()
                for kernel, take in self.kernels:
                    kernel.run(*take(given), stream=stream)


def find_launches(
    call: Any, samples: list[Tensor], with_sizes: Callable[[list[Tensor]], list[Any]]
) -> Launches | None:
    """The launches of the generated function `call`, if it does nothing else.

    Args:
        call: takes a list of tensors, and empties it.
        samples: tensors for it. What must be of one size is, and what may differ does.
        with_sizes: makes of tensors the list for `call`.
    """
    call = _unwrapped(call)
    function = getattr(call, "__func__", call)
    names = getattr(function, "__globals__", {})
    kernels = [name for name in names if name.startswith("triton_")]
    code = getattr(function, "__code__", None)
    if code is None or set(code.co_names) - {*kernels, *_NAMES}:
        return None
    hosts = [i for i, x in enumerate(samples) if x.device.type == "cpu"]
    for k, i in enumerate(hosts):
        samples[i].fill_(1001 + k)
    looks: list[tuple[Any, Any, Any]] = []
    real = {name: names[name] for name in kernels}
    names.update({name: _Look(real[name], looks) for name in kernels})
    try:
        call(with_sizes(samples))
    finally:
        names.update(real)
    sized = {x.numel(): i for i, x in enumerate(samples) if x.dim()}
    constants: list[int] = []
    places: dict[Any, int] = {id(x): i for i, x in enumerate(samples)}
    places |= {float(samples[i].item()): i for i in hosts}
    places |= {float(n): len(samples) + k for k, n in enumerate(sized)}
    found: list[tuple[Any, Take]] = []
    for kernel, given, others in looks:
        marks = [id(x) if isinstance(x, Tensor) else float(x) for x in given]
        if not sized:  # then a number in the code does not depend on any size
            for x in set(marks) - places.keys():
                places[x] = len(samples) + len(constants)
                constants.append(int(x))
        if others or len(marks) < 2 or not places.keys() >= set(marks):
            return None
        found.append((kernel, itemgetter(*[places[mark] for mark in marks])))
    return Launches(found, [*sized.values()], hosts, constants) if found else None


def _unwrapped(call: Any) -> Any:
    """The function itself, without the one around it that copies what is not aligned."""
    code = getattr(call, "__code__", None)
    if code is not None and "model" in code.co_freevars:
        return _unwrapped(call.__closure__[code.co_freevars.index("model")].cell_contents)
    return call


class _Look:
    """Stands in for a kernel, and keeps what it is given."""

    def __init__(self, kernel: Any, looks: list[tuple[Any, Any, Any]]) -> None:
        self.kernel = kernel
        self.looks = looks

    def run(self, *args: Any, stream: Any = None, **others: Any) -> None:
        self.looks.append((self.kernel, args, others))


def flat(x: Tensor) -> Tensor:
    """All elements of `x` in a row, as compiled code sees them; or in rows of `LANES`."""
    if not x.dim():
        return x
    return x.reshape(-1, LANES) if has_lanes(x) else x.reshape(-1)


def is_aligned(x: Tensor) -> bool:
    """Whether a kernel may read several elements of `x` at a time where it begins."""
    if not x.dim() or x.device.type == "cpu":
        return True
    return x.data_ptr() % 16 == 0


def has_lanes(x: Tensor) -> bool:
    """Whether a kernel may read several elements of `x` at a time."""
    n = x.numel()
    return x.device.type == "cuda" and n > LANES and n % LANES == 0


def in_lanes(examples: list[Tensor]) -> list[Tensor]:
    """Stand-ins for a trace, with symbols as sizes. How long a row of `LANES` is stays a number."""
    from torch._dynamo.source import ConstantSource
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import (
        DimDynamic,
        ShapeEnv,
        StatelessSymbolicContext,
    )

    mode = FakeTensorMode(
        shape_env=ShapeEnv(duck_shape=False), allow_non_fake_inputs=True
    )
    found: list[Tensor] = []
    for i, x in enumerate(examples):
        sizes = [DimDynamic.DYNAMIC] * x.dim()
        if x.dim() == 2 and x.shape[1] == LANES:
            sizes[1] = DimDynamic.STATIC
        context: Any = StatelessSymbolicContext(dynamic_sizes=sizes)
        source = ConstantSource(f"x{i}")
        found.append(mode.from_tensor(x, source=source, symbolic_context=context))
    return found


# ---- compiling -----------------------------------------------------------------------------------


@contextmanager
def in_one_launch(graph: Any) -> Iterator[None]:
    """Let Inductor make one launch of what is independent of each other in `graph`.

    And let it keep nothing of a tensor's size between a sum and what needs it. A value before the
    sum is worked out again after it. That reads the slots once more, and writes nothing.
    """
    from torch._inductor import config, scheduler

    wanted = _COMBINE | (_AGAIN if _is_worked_out_again(graph) else {})
    options = {name: x for name, x in wanted.items() if hasattr(config, name)}
    nodes: Any = scheduler.ForeachKernelSchedulerNode
    grouped = nodes.group_algorithm_for_combo_kernels
    if "combo_kernel_max_num_nodes" not in options:  # before torch 2.13 it is fixed, at 8
        nodes.group_algorithm_for_combo_kernels = staticmethod(_all_of_a_level)
    try:
        with config.patch(options):
            yield
    finally:
        nodes.group_algorithm_for_combo_kernels = staticmethod(grouped)


def _is_worked_out_again(graph: Any) -> bool:
    """Whether there are sums, and what they need of an element is little enough.

    Inductor goes through an expression as often as it is read. So what is read twice, and read
    twice again by what reads it, would take it for ever.
    """
    times: dict[Any, int] = {}
    has_sums = False
    for node in graph.nodes:
        name = getattr(node.target, "__name__", str(node.target)).partition(".")[0]
        if name in _MATRICES:
            return False
        has_sums |= name in _SUMS
        before = sum([times[x] for x in node.all_input_nodes])
        times[node] = 1 if name in _SUMS else 1 + before
    return has_sums and max(times.values()) <= SMALL_ENOUGH


def _all_of_a_level(scheduler: Any) -> list[list[Any]]:
    """The nodes that can be combined: those that wait for equally many others, on one device."""
    groups = []
    for level in scheduler._topological_sort_nodes():
        by_device: dict[Any, list[Any]] = {}
        for node in level:
            mixed = type(node).__name__ == "FusedMixOrderReductions"
            if not mixed and node.get_device() is not None:
                by_device.setdefault(node.get_device(), []).append(node)
        launch = [device for device in by_device if device.type not in ("cpu", "mps")]
        groups += [by_device[device] for device in launch]
    return groups
