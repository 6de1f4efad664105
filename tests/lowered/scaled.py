"""Makes steps of stateful optimizers on a card that is pretended, and prints what they do there.

``python tests/lowered/scaled.py`` prints a line of JSON for each: an optimizer whose counts lie on
the device, as it is and beside a `GradScaler`, which sets ``found_inf`` and ``grad_scale``; and a
step of parameters on two devices.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import pretended  # noqa: E402
import torch  # noqa: E402
from rows import SHAPES  # noqa: E402
from torch._subclasses import FakeTensorMode  # noqa: E402
from torch.fx.experimental.symbolic_shapes import ShapeEnv  # noqa: E402

import functorch_opt as fo  # noqa: E402
from functorch_opt._execution import segments  # noqa: E402
from functorch_opt.optim import beginning, counts, plan  # noqa: E402

MADE = {
    "adamw": fo.adamw(1e-3),
    "chain": fo.chain(
        fo.clip_by_global_norm(1.0),
        fo.adamw(fo.linear_schedule(0.1, 0.01, 10)),
        fo.params_ema(0.9),
    ),
}


def pretend() -> None:
    """As `pretended.pretend`; and fake counts pass for real ones that are known to be alike."""
    pretended.pretend()
    segments.LAUNCH = 2
    of: Any
    for of in (counts, plan):
        of.is_in_torch_dispatch_mode = lambda: False
    beginning.with_memory_of_its_own = lambda state, params: state  # type: ignore[assignment]

    def known(self: Any, key: str, together: Any) -> Any:
        return torch.zeros((), dtype=torch.int64, device=self.device)

    counts.Counts._known_alike = known  # type: ignore[method-assign]


def look(tx: fo.GradientTransformation, compile: bool, is_scaled: bool) -> dict[str, Any]:
    """What the fourth step does on the device."""
    ps = [torch.nn.Parameter(torch.empty(shape, device="cuda")) for shape in SHAPES]
    optimizer = fo.optim.Optimizer(ps, tx, compile=compile, capturable=True)
    for p in ps:
        p.grad = torch.empty_like(p)
    for _ in range(4):
        if is_scaled:
            optimizer.found_inf, optimizer.grad_scale = (
                torch.empty((), device="cuda") for _ in range(2)
            )
        pretended.LAUNCHED.clear()
        with pretended.Counter() as seen:
            optimizer.step()
        if is_scaled:
            del optimizer.found_inf, optimizer.grad_scale
    return {
        "hands_over": optimizer._step_supports_amp_scaling,
        "launches": len(pretended.LAUNCHED),
        "operations": len(seen.operations),
        "waits": seen.waits,
    }


def of_two_devices(tx: fo.GradientTransformation) -> dict[str, Any]:
    """What a compiled step does whose parameters lie on two devices."""
    ps = [torch.empty(shape, device=f"cuda:{k // 4}") for k, shape in enumerate(SHAPES)]
    grads = [torch.empty_like(p) for p in ps]
    step, state = fo.compiled_step(tx), tx.init(ps)
    ps, state = step(ps, grads, state)
    pretended.LAUNCHED.clear()
    with pretended.Counter() as seen:
        step(ps, grads, state)
    return {"launches": len(pretended.LAUNCHED), "waits": seen.waits}


def main() -> None:
    pretend()
    for name, tx in MADE.items():
        with FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv()):
            found = of_two_devices(tx)
        print(json.dumps({"name": f"{name}, two devices", **found}), flush=True)
    for name, compile, is_scaled in itertools.product(MADE, (True, False), (True, False)):
        with FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv()):
            found = look(MADE[name], compile, is_scaled)
        kind = "compiled" if compile else "eager"
        of = f"{name}, {kind}" + (", scaled" if is_scaled else "")
        print(json.dumps({"name": of, **found}), flush=True)


if __name__ == "__main__":
    main()
