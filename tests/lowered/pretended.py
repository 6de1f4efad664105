"""Two CUDA devices that are not there: code is generated for them, and its kernels are interpreted.

`pretend` changes torch for the whole process, so it has a process of its own (`rows.py`). Tensors on
the device are fake ones. What Inductor writes for them is real, and is loaded; where Triton would
compile a kernel there is an `Interpreted` one, which counts its launches and runs on tensors of the
CPU. It needs a torch with Triton, and ``TRITON_INTERPRET=1`` before torch is imported.
"""

from __future__ import annotations

import contextlib
import math
import re
import tempfile
import types
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.utils._python_dispatch import TorchDispatchMode

CARD = types.SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=80 << 30,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472,
    L2_cache_size=50 << 20,
    gcnArchName="",
    is_integrated=0,
    is_multi_gpu_board=0,
    uuid="x",
    pci_bus_id=0,
    pci_device_id=0,
    pci_domain_id=0,
)
BLOCK = 64
"""Elements that one instance of an interpreted kernel works on."""
LAUNCHED: list[str] = []
"""The kernels that were launched."""
MADE: list[tuple[int, ...]] = []
"""The shapes of temporaries that generated code has made."""


class Interpreted:
    """A kernel that Triton's interpreter runs, on tensors of the CPU. Fake tensors it only counts."""

    def __init__(self, name: str, source: str) -> None:
        imports = "from torch._inductor.runtime import triton_helpers"
        source = source.replace(f"{imports}, triton_heuristics", imports)
        source = source.replace("triton_helpers.set_driver_to_gpu()", "")
        self.name = name
        self.in_turn = "'RoundRobinComboKernelGrid'" in source
        found = re.search(r"'num_kernels': (\d+)", source)
        self.inside = int(found.group(1)) if found else 0
        self.fixed = dict(re.findall(r"'(xnumel_\d+)': (\d+)", source))
        file = Path(tempfile.mkdtemp()) / f"{name}.py"
        file.write_text(source)
        names = {
            "triton_heuristics": _Heuristics(),
            "__name__": name,
            "__file__": str(file),
        }
        exec(compile(source, str(file), "exec"), names)
        names["libdevice"] = _Libdevice()
        self.function = names[name]

    def run(self, *args: Any, stream: Any = None) -> None:
        LAUNCHED.append(self.name)
        if any(isinstance(x, FakeTensor) for x in args):
            return
        names = self.function.arg_names
        given = {
            name: n for name, n in zip(names, args, strict=False) if "xnumel" in name
        }
        of_all = [f"xnumel_{k}" for k in range(self.inside)] or ["xnumel"]
        sizes = [int(given.get(name, self.fixed.get(name, 1))) for name in of_all]
        blocks = {name: BLOCK for name in names if name.endswith("BLOCK")}
        x = blocks.get("XBLOCK", 1)
        counts = [math.ceil(n / x) for n in sizes]
        grid = len(counts) * max(counts) if self.in_turn else sum(counts)
        self.function[(grid,)](*args, **blocks)


class _Libdevice:
    """Functions that the interpreter does not have, by numpy."""

    others: ClassVar[dict[str, str]] = {
        "pow": "power",
        "nearbyint": "rint",
        "acos": "arccos",
        "asin": "arcsin",
        "atan": "arctan",
    }

    def __getattr__(self, name: str) -> Any:
        import numpy as np
        import triton.language as tl
        from triton.runtime.interpreter import TensorHandle

        def call(*xs: Any) -> Any:
            if name == "rsqrt":
                return 1 / self.sqrt(*xs)
            f = getattr(np, self.others.get(name, name))
            data = np.asarray(f(*[x.handle.data for x in xs]))
            return tl.core.tensor(TensorHandle(data, xs[0].handle.dtype), xs[0].type)

        return call


class _Heuristics:
    """In the place of the decorators that tune kernels."""

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **options: lambda function: function


class Counter(TorchDispatchMode):
    """Notes operations on the device that are more than a view, and waits for it."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[str] = []
        self.waits: list[str] = []

    def __torch_dispatch__(
        self, f: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        made = f(*args, **(kwargs or {}))
        many = made if isinstance(made, (list, tuple)) else [made]
        of = [x for x in (*args, *many) if isinstance(x, Tensor)]
        on_card = [x for x in of if x.device.type == "cuda"]
        crosses = bool(on_card) and len(on_card) < len(of) and "copy" in str(f)
        if crosses or (f is torch.ops.aten._local_scalar_dense.default and on_card):
            self.waits.append(str(f))
        here = any(isinstance(x, Tensor) and x.device.type == "cuda" for x in many)
        if here and not f.is_view and "empty" not in str(f):
            self.operations.append(str(f))
        return made


class _Here(contextlib.nullcontext):  # type: ignore[type-arg]
    """In the place of the contexts that choose a device."""

    def __init__(self, *args: Any) -> None:
        super().__init__()


def pretend(large: bool = False) -> None:
    """Let torch and this package see a card.

    If `large`, code is made for tensors of many elements, and is not run.
    """
    _torch()
    _triton()
    _package(large)


def _torch() -> None:
    import torch._dynamo.device_interface as devices
    import torch._subclasses.fake_tensor as fake
    from torch._inductor.fx_passes import fuse_attention, misc_patterns, pad_mm

    cuda: Any = torch.cuda
    answers: dict[str, Any] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 2,
        "current_device": lambda: 0,
        "get_device_properties": lambda device=None: CARD,
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_name": lambda device=None: CARD.name,
        "is_bf16_supported": lambda *args, **kwargs: True,
        "set_device": lambda device: None,
        "synchronize": lambda device=None: None,
        "get_rng_state": lambda *args: torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": lambda *args, **kwargs: None,
        "is_current_stream_capturing": lambda: False,
        "current_stream": lambda device=None: types.SimpleNamespace(cuda_stream=0),
        "_lazy_init": lambda: None,
        "_exchange_device": lambda i: 0,
        "_maybe_exchange_device": lambda i: 0,
        "device": _Here,
        "_DeviceGuard": _Here,
    }
    for name, answer in answers.items():
        setattr(cuda, name, answer)
    cuda.graphs.is_current_stream_capturing = answers["is_current_stream_capturing"]
    interface: Any = devices.CudaInterface
    of_interface = (
        "current_device",
        "device_count",
        "get_device_properties",
        "set_device",
    )
    for name in (*of_interface, "synchronize"):
        setattr(interface, name, staticmethod(answers[name]))
    interface.exchange_device = staticmethod(lambda i: 0)
    interface.maybe_exchange_device = staticmethod(lambda i: 0)
    devices.caching_worker_device_properties["cuda"] = [CARD, CARD]  # type: ignore[list-item]
    devices.caching_worker_current_devices["cuda"] = 0
    if hasattr(fake, "init_gpu_context"):
        fake.init_gpu_context = lambda *args: None
    torch.accelerator.is_available = lambda: False
    torch._C._cuda_getCurrentRawStream = lambda i: 0  # type: ignore[attr-defined]
    guards: Any = torch._C._dynamo.guards
    guards._empty_strided_cuda = _empty
    for passes, name in (
        (fuse_attention, "_sfdp_init"),
        (pad_mm, "_pad_mm_init"),
        (misc_patterns, "_misc_patterns_init"),
    ):
        setattr(passes, name, lambda *args, **kwargs: None)


def _empty(size: Any, stride: Any, dtype: torch.dtype) -> Tensor:
    """A temporary of generated code, in real runs on the CPU."""
    MADE.append(tuple(size))
    active = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None
    device = "cuda" if active else "cpu"
    return torch.empty_strided(size, stride, dtype=dtype, device=device)


def _triton() -> None:
    import triton.backends
    from torch._inductor.async_compile import AsyncCompile
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver

    real: Any = triton.backends.backends["nvidia"].driver

    class Driver(real):  # type: ignore[misc]
        def __init__(self) -> None:
            pass

        def get_current_target(self) -> Any:
            return GPUTarget("cuda", 90, 32)

        def get_current_device(self) -> int:
            return 0

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cuda", 0)

    driver.set_active(Driver())
    compiler: Any = AsyncCompile
    compiler.triton = lambda self, name, source, device_str="cuda": Interpreted(
        name, source
    )
    compiler.wait = lambda self, scope: None


def _package(large: bool) -> None:
    """Let fake tensors pass for real ones, and trials run on the CPU, or not at all."""
    from functorch_opt._core import numerics, once, sharding
    from functorch_opt._core.numerics import at_least_float32
    from functorch_opt._execution import (
        compiled,
        kernel,
        launches,
        segments,
        together,
        trials,
    )
    from functorch_opt._execution.body import Body

    plain = (*sharding.PLAIN, FakeTensor)
    of: Any
    for of in (sharding, numerics, together):
        of.PLAIN = plain
    sharding._NOT_SHARDED.add(FakeTensor)
    if not large:
        segments.EXAMPLE = 4 * launches.LANES
    FakeTensor.data_ptr = lambda self: 16 * id(self)  # type: ignore[method-assign]
    copy: Any = torch.ops.aten.copy_.default  # torch's own asks for the driver
    torch.Tensor.copy_ = lambda x, y, non_blocking=False: copy(x, y, non_blocking)  # type: ignore[method-assign]
    together.same = lambda x, y: True  # fake tensors have no numbers
    compiled.check_memory = lambda walk: None  # type: ignore[assignment]
    compiled.with_memory_of_its_own = lambda state, ps: state  # type: ignore[assignment]
    compiled.apart_from_params = lambda us, ps: us  # type: ignore[assignment]

    Body.dtype_of_update = lambda self, leaf: at_least_float32(leaf[0].dtype)  # type: ignore[method-assign]
    kernel.in_lanes = _in_lanes  # type: ignore[assignment]
    real_trace, real_trial, real_drawn = kernel._trace, trials.try_out, trials.drawn

    def trace(*args: Any) -> Any:
        with unset_fake_temporarily():
            return real_trace(*args)

    def trial(*args: Any) -> None:
        if large:
            return
        with unset_fake_temporarily():
            real_trial(*args)

    def drawn(shapes: Any, like: Any, seed: int) -> list[Tensor]:
        here = [torch.empty((), dtype=x.dtype) for x in like]
        return real_drawn(shapes, here, seed)

    kernel._trace, kernel.try_out, trials.drawn = trace, trial, drawn

    def first(self: Any, params: Any) -> dict[str, Tensor]:
        """Written by the device: a fake mode takes no copy of a real tensor there."""
        device = once.tree.leaves(params)[0].device
        with unset_fake_temporarily():
            values = {name: x.tolist() for name, x in self.shared.items()}
        shared = {
            name: torch.full(
                x.shape, 1 if x.dim() else values[name], dtype=x.dtype, device=device
            )
            for name, x in self.shared.items()
        }
        left = {
            n: once.tree.zero_count(params) for n in self.keys if n not in self.shared
        }
        return shared | left

    once.Once.first = first  # type: ignore[method-assign]


def _in_lanes(examples: list[Tensor]) -> list[Tensor]:
    """As `launches.in_lanes`, which starts from real tensors."""
    from torch._dynamo.source import ConstantSource

    from functorch_opt._execution.launches import LANES

    env = ShapeEnv(duck_shape=False)
    mode = FakeTensorMode(shape_env=env, allow_non_fake_inputs=True)
    found = []
    for i, x in enumerate(examples):
        sizes: list[Any] = []
        for d, n in enumerate(x.shape):
            if n < 2 or (d == 1 and x.dim() == 2 and n == LANES):
                sizes.append(n)
                continue
            source = ConstantSource(f"x{i}_{d}")
            symbol = env.create_symbol(n, source, DimDynamic.DYNAMIC)
            sizes.append(env.create_symintnode(symbol, hint=n, source=source))
        with mode:
            found.append(torch.empty(sizes, dtype=x.dtype, device=x.device))
    return found
