"""The Python time of a step: a step of the same tree with next to nothing to compute, and a profile
of where it goes.
"""

from __future__ import annotations

import cProfile
import pstats
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from benchmarks import report
from benchmarks.chains import EmaCompiled, ResearchCompiled
from benchmarks.contenders import Compiled, Contender, draw, our_adamw
from benchmarks.shapes import NANOGPT, TINY, Shapes
from functorch_opt._core.chain import Chain
from functorch_opt._core.rule import Leafwise
from functorch_opt._execution import part


def microseconds(call: Callable[[], None], n: int) -> float:
    """The median of n calls."""
    times = []
    for _ in range(n):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return 1e6 * statistics.median(times)


def profile(call: Callable[[], None], n: int) -> list[dict[str, Any]]:
    """The functions with the most time of their own, in microseconds a call; the profiler itself
    makes everything slower.
    """
    profiler = cProfile.Profile()
    profiler.enable()
    for _ in range(n):
        call()
    profiler.disable()
    stats: Any = pstats.Stats(profiler)
    entries = sorted(stats.stats.items(), key=lambda item: -item[1][2])
    found = []
    for (file, line, function), (_, calls, own, total, _) in entries:
        where = (
            function
            if file == "~"
            else f"{'/'.join(file.replace(chr(92), '/').split('/')[-2:])}:{line} {function}"
        )
        found.append(
            {
                "function": where,
                "calls": calls / n,
                "own_us": 1e6 * own / n,
                "with_calls_us": 1e6 * total / n,
            }
        )
    return found


PARTS = {
    "AdamW": Compiled,
    "clip + AdamW + warmup-cosine + parameter EMA": EmaCompiled,
    "8-stage research chain": ResearchCompiled,
}


def run(of: Shapes, n: int) -> dict[str, Any]:
    real, tiny = draw(of, 0), [torch.randn([2] * max(1, len(shape))) for shape in of]
    step, small = (
        Compiled(real, draw(of, 1)),
        Compiled(tiny, [torch.ones_like(x) for x in tiny]),
    )
    for _ in range(10):
        step.step()
        small.step()
    profiled = profile(step.step, n)
    result: dict[str, Any] = {
        "tensors": len(of),
        "threads": torch.get_num_threads(),
        "step_us": microseconds(step.step, n),
        "kernels_us": _kernels(step, n),
        "step_of_tiny_tensors_us": microseconds(small.step, n),
        "prepare_us": _prepare(real, n),
        "profile": profiled[:12],
        "parts": [
            {"step": title} | parts(make, of if of is TINY else NANOGPT, n // 6)
            for title, make in PARTS.items()
        ],
    }
    result["python_us"] = result["step_us"] - result["kernels_us"]
    show(result)
    return result


def _kernels(contender: Contender, n: int) -> float:
    """The time of a step in the loop that calls the kernels."""
    times = []
    with _clock(part.Part, "_call") as kernels:
        for _ in range(n):
            kernels.clear()
            contender.step()
            times.append(1e6 * sum(kernels))
    return statistics.median(times)


def parts(make: type[Compiled], of: Shapes, n: int) -> dict[str, Any]:
    """Of a step as it runs: the kernels, and `prepare` of all stages, by clocks around them; the
    rest is Python. In microseconds.
    """
    contender, seen = (
        make(draw(of, 0), draw(of, 1)),
        {"step": [], "kernels": [], "prepare": []},
    )
    with _clock(part.Part, "run") as kernels, _clock(Leafwise, "scalars") as prepare:
        for i in range(n + 10):
            kernels.clear()
            prepare.clear()
            begin = time.perf_counter()
            contender.step()
            if i >= 10:
                for name, seconds in (
                    ("step", time.perf_counter() - begin),
                    ("kernels", sum(kernels)),
                    ("prepare", sum(prepare)),
                ):
                    seen[name].append(1e6 * seconds)
    return {f"{name}_us": statistics.median(of) for name, of in seen.items()}


@contextmanager
def _clock(of: Any, name: str) -> Iterator[list[float]]:
    """Inside, the method of that name notes the seconds that each call takes."""
    method, seconds = getattr(of, name), []

    def timed(*args: Any) -> Any:
        begin = time.perf_counter()
        try:
            return method(*args)
        finally:
            seconds.append(time.perf_counter() - begin)

    setattr(of, name, timed)
    try:
        yield seconds
    finally:
        setattr(of, name, method)


def show(result: dict[str, Any], quiet: bool = False) -> None:
    shown = [
        ("a step", "step_us"),
        ("the kernels, by a clock around them", "kernels_us"),
        ("the difference: Python", "python_us"),
        ("of which prepare, eager, by itself", "prepare_us"),
        (
            "a step of as many tensors of 2 or 4 elements: everything but arithmetic",
            "step_of_tiny_tensors_us",
        ),
    ]
    rows = [[text, f"{result[key]:.0f}"] for text, key in shown]
    report.table(
        f"AdamW, {result['tensors']} tensors: Python time; threads: {result['threads']}",
        ["", "us"],
        rows,
        quiet=quiet,
    )
    rows = [
        [
            p["function"],
            f"{p['calls']:.0f}",
            f"{p['own_us']:.0f}",
            f"{p['with_calls_us']:.0f}",
        ]
        for p in result["profile"]
    ]
    report.table(
        "Where it goes, by cProfile (which slows it down)",
        ["function", "calls", "own us", "with calls us"],
        rows,
        quiet=quiet,
    )
    rows = [
        [
            p["step"],
            *[f"{p[key] / 1e3:.2f}" for key in ("step_us", "kernels_us", "prepare_us")],
        ]
        + [f"{(p['step_us'] - p['kernels_us'] - p['prepare_us']) / 1e3:.2f}"]
        for p in result["parts"]
    ]
    title = "Where the time of long steps goes, 12 M GPT, ms (prepare: the norm of the clip, schedules)"
    report.table(
        title, ["", "step", "kernels", "prepare", "the rest: Python"], rows, quiet=quiet
    )


def _prepare(ps: list[torch.Tensor], n: int) -> float:
    """The scalars of a step, worked out for one tensor: an `update` of it, less its rule, would be
    about this.
    """
    tx = our_adamw()
    state = tx.init(ps)
    stages = (
        [(stage, state[name]) for name, stage in tx.stages.items()]
        if isinstance(tx, Chain)
        else []
    )

    @torch.no_grad()
    def scalars() -> None:
        for stage, of in stages:
            columns = {name: list(slot) for name, slot in of.slots.items()}
            stage.scalars(ps, of.shared, ps, {}, ps, ps, columns)

    return microseconds(scalars, n)
