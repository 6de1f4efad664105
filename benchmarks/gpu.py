"""``benchmarks gpu``: whether the numbers are right, and then how fast it is.

It needs only torch and optree. ``--device cpu`` rehearses it without a GPU.
"""

from __future__ import annotations

import gc
import os
import statistics
import time
from argparse import Namespace
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import functorch_opt as fo
from benchmarks import (
    compile_time,
    floor,
    many_models,
    on_device,
    per_example,
    record,
    report,
    shapes,
)
from benchmarks.contenders import (
    BETAS,
    DECAY,
    EPS,
    LR,
    OURS,
    OURS_OPTIM,
    Adapter,
    Compiled,
    Contender,
    Foreach,
    Fused,
    HeavyBall,
    TorchOptim,
    Unavailable,
    draw,
    gradients,
    our_adamw,
    same,
)
from functorch_opt import tree


class Set(NamedTuple):
    title: str
    shapes: shapes.Shapes
    dtype: torch.dtype


MODELS = {
    "gpt2": ("GPT-2 124M", shapes.GPT2),
    "resnet50": ("ResNet-50", shapes.RESNET50),
    "huge": ("32 of 2048x2048", shapes.HUGE),
    "matrices": ("32 of 512x512", shapes.MATRICES),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SETS = {
    f"{model}-{kind}": Set(f"{title}, {kind}", of, dtype)
    for model, (title, of) in MODELS.items()
    for kind, dtype in DTYPES.items()
}
ROWS = ("check", *SETS, "models", "per-example", "first")
DEFAULT = ("check", "huge-fp32", "gpt2-fp32", "matrices-fp32", "models", "per-example")
"""What fits eight minutes of a bare machine, for there code is compiled for the first time."""
SHORT = ("huge-fp32", "gpt2-fp32")
"""What fits two minutes, after something was tuned: in few rounds, and with few contenders."""
QUICK = (*SETS, "models", "per-example")
CHECK_SECONDS = 150


# ---- contenders ----------------------------------------------------------------------------------


class LowMoments(Compiled):
    """Moments in the dtype of the params, as torch.optim keeps them: the same bytes as fused."""

    name = f"{OURS}, moments in bf16"

    def chain(self) -> fo.GradientTransformation:
        low = self.ps[0].dtype
        return fo.chain(
            fo.scale_by_adam(*BETAS, EPS, mu_dtype=low, nu_dtype=low),
            fo.add_decayed_weights(DECAY),
            fo.scale_by_learning_rate(LR),
        )


class Default(TorchOptim):
    """The class with torch's name, as a newcomer makes it."""

    name = f"{OURS_OPTIM}, default"

    def make(self) -> torch.optim.Optimizer:
        return fo.optim.AdamW(self.ps, lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY)


class Chain(Compiled):
    """Another chain than AdamW. Its numbers are compared with its own eager updates."""

    moved: ClassVar[int | None] = None
    """How many tensors of the size of the parameters are read or written, if that is all."""


class Clipped(Chain):
    name, moved = f"{OURS}: clip, AdamW, schedule, EMA", 10

    def chain(self) -> fo.GradientTransformation:
        rate = fo.cosine_decay_schedule(LR, 1000)
        adamw = fo.adamw(rate, *BETAS, EPS, weight_decay=DECAY)
        return fo.chain(fo.clip_by_global_norm(1.0), adamw, fo.params_ema(0.99))


class Lion(Chain):
    name, moved = f"{OURS}: Lion", 5

    def chain(self) -> fo.GradientTransformation:
        return fo.lion(LR)


class Lamb(Chain):
    name = f"{OURS}: LAMB"

    def chain(self) -> fo.GradientTransformation:
        return fo.lamb(LR)


class OfMatrices(Chain):
    """An optimizer of matrices, of which one is given; AdamW for the rest."""

    largest: ClassVar[int]

    def start(self) -> None:
        sizes = [n for p in self.ps if p.dim() == 2 for n in p.shape]
        if not 0 < max(sizes, default=0) <= self.largest:
            raise Unavailable(f"for matrices of up to {self.largest}")
        super().start()

    def matrix(self) -> fo.GradientTransformation:
        raise NotImplementedError

    def chain(self) -> fo.GradientTransformation:
        transforms = {"matrices": self.matrix(), "rest": our_adamw()}
        return fo.partition(
            transforms, lambda path, p: "matrices" if p.dim() == 2 else "rest"
        )


class Muon(OfMatrices):
    name, largest = f"{OURS}: Muon", 1 << 16

    def matrix(self) -> fo.GradientTransformation:
        return fo.muon(LR)


class Soap(OfMatrices):
    name, largest = f"{OURS}: SOAP", 512

    def matrix(self) -> fo.GradientTransformation:
        return fo.soap(LR)


class EightBit(Chain):
    """Codes of one byte for the two moments; the scales of blocks of them are left out of the sum."""

    name, moved = f"{OURS}: AdamW, state in 8 bits", 4

    def chain(self) -> fo.GradientTransformation:
        return fo.stored(our_adamw(), "8bit")


class FusedCapturable(Fused):
    name, options = "torch fused, capturable", {"fused": True, "capturable": True}


class CompiledCapturable(Compiled):
    def start(self) -> None:
        super().start()
        self.advance = fo.compiled_step(self.chain(), capturable=True)


class Graph(Contender):
    """The step of another contender as a CUDA graph. It writes where it has read."""

    of: type[Contender]

    def start(self) -> None:
        if self.ps[0].device.type != "cuda":
            raise Unavailable("needs a CUDA device")
        self.inner = self.of(self.ps, self.gs)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self.inner.step()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.inner.step()
        self.begin_again()

    @torch.no_grad()
    def begin_again(self) -> None:
        """Warming up has moved parameters and state."""
        for mine, first in zip(self.inner.ps, self.ps, strict=True):
            mine.copy_(first)
        if isinstance(self.inner, Compiled):
            for mine, first in zip(
                tree.leaves(self.inner.state),
                tree.leaves(self.inner.chain().init(self.ps)),
                strict=True,
            ):
                mine.copy_(first)
        elif isinstance(self.inner, Fused):
            for of in self.inner.opt.state.values():
                for value in of.values():
                    value.zero_()

    def step(self) -> None:
        self.graph.replay()

    def feed(self, gs: list[Tensor]) -> None:
        self.inner.feed(gs)

    def read(self) -> list[Tensor]:
        return self.inner.read()


class CompiledGraph(Graph):
    name, of = f"{OURS}, CUDA graph", CompiledCapturable


class FusedGraph(Graph):
    name, of = "torch fused, CUDA graph", FusedCapturable


CONTENDERS = (
    Compiled,
    LowMoments,
    CompiledGraph,
    Adapter,
    Default,
    Fused,
    Foreach,
    FusedGraph,
    HeavyBall,
    Clipped,
    Lion,
    Lamb,
    Muon,
    Soap,
    EightBit,
)
SHORTLY = (Compiled, CompiledGraph, Adapter, Default, Fused, FusedGraph, Clipped)
"""What a change of the compiled step is looked at with."""


# ---- times ---------------------------------------------------------------------------------------


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def milliseconds(call: Callable[[], Any], device: str, n: int) -> float:
    """Per call, of n calls one after another: by CUDA events, and on a CPU by the clock."""
    if not device.startswith("cuda"):
        begin = time.perf_counter()
        for _ in range(n):
            call()
        return 1e3 * (time.perf_counter() - begin) / n
    start, end = (
        torch.cuda.Event(enable_timing=True),
        torch.cuda.Event(enable_timing=True),
    )
    torch.cuda.synchronize()
    start.record()
    for _ in range(n):
        call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / n


def host_milliseconds(call: Callable[[], Any], device: str, n: int) -> float:
    """Until the call returns, with the device idle at its start: the time of Python and of
    launching.
    """
    times = []
    for _ in range(n):
        synchronize(device)
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    synchronize(device)
    return 1e3 * statistics.median(times)


def memory(call: Callable[[], Any], device: str) -> int:
    """The most bytes that are alive during a step, beyond those before it; 0 on a CPU."""
    if not device.startswith("cuda"):
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def launches(call: Callable[[], Any], device: str) -> dict[str, Any]:
    """Of one call, by the profiler: kernels, copies, and times that the host waits for the device;
    None on a CPU.
    """
    if not device.startswith("cuda"):
        return {"kernels": None, "copies": None, "waits": None}
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    events = profiler.events()
    on_device = [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA]
    copies = [e for e in on_device if e.name.startswith(("Memcpy", "Memset"))]
    waits = [e for e in events if e.name in ("cudaStreamSynchronize", "cudaMemcpy")]
    return {
        "kernels": len(on_device) - len(copies),
        "copies": len(copies),
        "waits": len(waits),
    }


# ---- a row ---------------------------------------------------------------------------------------


def eagerly(
    make: type[Compiled], ps: list[Tensor], feeds: list[list[Tensor]]
) -> list[Tensor]:
    """What the chain gives by `update` and `apply_updates`."""
    contender = object.__new__(make)
    contender.ps = [p.clone() for p in ps]
    tx = contender.chain()
    state, mine = tx.init(contender.ps), contender.ps
    for gs in feeds:
        updates, state = tx.update(gs, state, mine)
        mine = fo.apply_updates(mine, updates)
    return mine


def prepare(
    row: Set, device: str, contenders: tuple[type[Contender], ...]
) -> tuple[dict[str, Contender], dict[str, dict[str, Any]]]:
    """Contenders after three steps; what is known of each: the first step's time, and how far it is
    from eager updates.
    """
    ps = draw(row.shapes, 0, device, row.dtype, scale=0.02)
    feeds = [gradients(row.shapes, seed, device, row.dtype) for seed in (1, 2, 3)]
    # In bf16 the last bit of a parameter is 2^-8 of it, and low moments are rounded at every step.
    # Three steps move it by 3e-3.
    tolerance = (
        {"rtol": 1e-4, "atol": 1e-5}
        if row.dtype == torch.float32
        else {"rtol": 2**-7, "atol": 2e-4}
    )
    expected = eagerly(Compiled, ps, feeds)
    ready: dict[str, Contender] = {}
    known: dict[str, dict[str, Any]] = {}
    for make in report.track(contenders, f"{row.title}: check"):
        if make is LowMoments and row.dtype == torch.float32:
            continue
        entry = known[make.name] = {}
        try:
            contender = make(ps, feeds[0])
            for i, gs in enumerate(feeds):
                contender.feed(gs)
                synchronize(device)
                begin = time.perf_counter()
                contender.step()
                synchronize(device)
                if i == 0:
                    entry["first_step_s"] = time.perf_counter() - begin
        except ModuleNotFoundError as error:
            entry["note"] = f"not installed ({error.name})"
        except Unavailable as why:
            entry["note"] = str(why)
        except Exception as error:
            entry["note"] = (
                f"failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:90]}"
            )
        else:
            wanted = eagerly(make, ps, feeds) if issubclass(make, Chain) else expected
            entry["difference_over_tolerance"] = same(
                [wanted, contender.read()], **tolerance
            )
            if not entry["difference_over_tolerance"] <= 1:
                entry["note"] = (
                    f"DIFFERENT NUMBERS: {entry['difference_over_tolerance']:.3g} x the tolerance"
                )
            ready[make.name] = contender
    return ready, known


def measure(name: str, row: Set, args: Namespace) -> dict[str, Any]:
    device, rounds = args.device, 2 if args.quick else args.rounds
    if args.short:
        rounds = min(rounds, 5)
    ready, known = prepare(row, device, SHORTLY if args.short else CONTENDERS)
    n = shapes.numel(row.shapes)
    low = row.dtype.itemsize
    copy, copied = floor.copy(1 << (16 if args.quick else 28), device)
    in_place, size = floor.adamw(n, device=device, dtypes=(row.dtype, torch.float32))
    work: dict[str, Callable[[], Any]] = {
        label: contender.step for label, contender in ready.items()
    }
    work |= {"copy": copy, "floor": in_place}
    for call in work.values():  # SOAP finds eigenbases at every tenth step, by other code
        milliseconds(call, device, 12)
    times: dict[str, list[float]] = {label: [] for label in work}
    for _ in report.track(range(rounds), f"{row.title}: time"):
        for label, call in work.items():
            call()
            times[label].append(milliseconds(call, device, 2 if args.quick else 10))
    bandwidth = copied / statistics.median(times["copy"]) / 1e6  # GB/s
    for label, contender in ready.items():
        moments = (
            low if isinstance(contender, (Fused, Foreach, LowMoments, FusedGraph)) else 4
        )
        moved: int | None = n * (3 * low + 4 * moments)
        if isinstance(contender, Chain):
            moved = contender.moved and n * contender.moved * 4
        ms = statistics.median(times[label])
        known[label] |= {
            "ms": ms,
            "ratio": statistics.median(
                a / b
                for a, b in zip(
                    times[label], times.get(Fused.name, times[label]), strict=True
                )
            ),
            "host_ms": host_milliseconds(contender.step, device, rounds),
            "bytes": moved,
            "memory": memory(contender.step, device) / n / low,
            "of_copy_bandwidth": moved and moved / ms / 1e6 / bandwidth,
            **launches(contender.step, device),
        }
    return {
        "row": name,
        "title": row.title,
        "tensors": len(row.shapes),
        "parameters": n,
        "device": device,
        "copy_GB_s": bandwidth,
        "floor_ms": statistics.median(times["floor"]),
        "floor_of_copy_bandwidth": size
        / statistics.median(times["floor"])
        / 1e6
        / bandwidth,
        "results": known,
    }


def show(result: dict[str, Any]) -> None:
    rows = []
    for name, entry in result["results"].items():
        first = f"{entry['first_step_s']:.1f}" if "first_step_s" in entry else "-"
        if "ms" not in entry:
            rows.append([name, *"------", first, "-", entry.get("note", "")])
            continue
        counted = (
            "-"
            if entry["kernels"] is None
            else f"{entry['kernels']}+{entry['copies']}, {entry['waits']}"
        )
        numbers = [
            f"{entry['ms']:.3f}",
            f"{entry['ratio']:.2f}",
            f"{100 * entry['of_copy_bandwidth']:.0f}%" if entry["bytes"] else "-",
            f"{entry['host_ms']:.3f}",
            f"{100 * entry['memory']:.0f}%",
        ]
        right = f"{entry['difference_over_tolerance']:.2g}"
        rows.append([name, *numbers, right, first, counted, entry.get("note", "")])
    header = [
        "",
        "ms",
        "to fused",
        "of copy",
        "host ms",
        "memory",
        "difference",
        "first step here, s",
        "kernels+copies, waits",
        "",
    ]
    title = f"AdamW, {result['title']}, {result['device']}; copy {result['copy_GB_s']:.0f} GB/s; "
    report.table(
        title + f"floor in place, float32 moments: {result['floor_ms']:.3f} ms",
        header,
        rows,
        numbers_to=9,
    )


def run(args: Namespace) -> dict[str, Any]:
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise SystemExit(
            "No CUDA device, so nothing is measured. To rehearse the program: python -m benchmarks gpu --device cpu --quick"
        )
    result = record.header("gpu") | {"device": args.device, "rows": []}
    usual = SHORT if args.short else DEFAULT
    names = args.rows or (QUICK if args.quick else usual)
    if "check" in names:
        result["check"] = on_device.check(
            args, CHECK_SECONDS, min(14, os.cpu_count() or 1)
        )
        on_device.show(result["check"])
    for name in [name for name in names if name in SETS]:
        row = SETS[name]._replace(shapes=shapes.TINY) if args.quick else SETS[name]
        result["rows"].append(measure(name, row, args))
        show(result["rows"][-1])
        gc.collect()
        if args.device.startswith("cuda"):
            torch.cuda.empty_cache()
    if "models" in names:
        n = 4 if args.quick else 64
        result["models"] = many_models.on_device(args.device, n, milliseconds)
        many_models.show_on_device(result["models"])
    if "per-example" in names:
        size = 8 if args.quick else 256
        result["per_example"] = per_example.on_device(args.device, size, milliseconds)
        per_example.show_on_device(result["per_example"])
    if "first" in names:
        cases = report.track((20, 150), "first steps in fresh processes")
        result["first_steps"] = [
            compile_time.case("ours", n, threads=4, limit=400, device=args.device)
            for n in cases
        ]
        compile_time.show(result["first_steps"])
    record.write(args.out / "gpu.json", result)
    panels = [
        (
            row["title"],
            [
                (name, entry["ms"] / row["floor_ms"])
                for name, entry in row["results"].items()
                if "ms" in entry
            ],
            1.0,
        )
        for row in result["rows"]
    ]
    report.bars(
        args.out / "gpu.png",
        panels,
        "step time, in multiples of an in-place pass with float32 moments (the line at 1)",
        log=True,
    )
    return result
