"""Generates the code of rows of the registry for a card that is pretended, and prints what it is.

``python tests/lowered/rows.py NAME ...`` prints a line of JSON for each row. The numbers of every
kernel are compared with the rules run eagerly, as for any code that is made. With ``--large`` first
the code is made for tensors of the size that real code is made for. A sum over so many elements is
made in two launches. Such kernels are counted, and not run: the interpreter would take minutes.
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import pretended  # noqa: E402
import torch  # noqa: E402
from registry import ROWS  # noqa: E402
from torch._subclasses import FakeTensorMode  # noqa: E402
from torch.fx.experimental.symbolic_shapes import ShapeEnv  # noqa: E402

import functorch_opt as fo  # noqa: E402
from functorch_opt._execution import segments, together  # noqa: E402

SHAPES = [(6, 16), (7, 5), (48,), (4, 3, 2, 2)] * 2
"""Two blocks of two tensors each for sizes that are multiples of 16, and for others."""


def look(tx: fo.GradientTransformation) -> dict[str, Any]:
    """What a step of `tx` does on the device."""
    segments.PROGRAMS.clear()
    together.KNOWN.clear()
    together.KNOWN.made.clear()
    pretended.LAUNCHED.clear()
    with FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv()):
        params, grads = (
            [torch.empty(shape, device="cuda") for shape in SHAPES] for _ in range(2)
        )
        step, state = fo.compiled_step(tx), tx.init(params)
        params, state = step(params, grads, state)
        pretended.LAUNCHED.clear()
        pretended.MADE.clear()
        with pretended.Counter() as seen:
            step(params, grads, state)
    return {
        "launches": len(pretended.LAUNCHED),
        "kernels": [*dict.fromkeys(pretended.LAUNCHED)],
        "temporaries": [shape for shape in pretended.MADE if shape not in ((), (1,))],
        "operations": seen.operations,
        "waits": seen.waits,
    }


def main(names: list[str]) -> None:
    large = "--large" in names
    pretended.pretend(large)
    segments.LAUNCH = 2
    for row in ROWS:
        if row.name not in names:
            continue
        began = time.perf_counter()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            try:
                found = look(row.build())
            except Exception as error:
                found = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
        about = [str(w.message) for w in said if "eagerly" in str(w.message)]
        entry = {"name": row.name, **found, "warnings": about}
        print(json.dumps(entry | {"s": time.perf_counter() - began}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
