"""One first step in a fresh process.

``python -m benchmarks.first_step WHO TENSORS THREADS DEVICE`` prints how many seconds it took.
"""

from __future__ import annotations

import json
import sys
import time

import torch

from benchmarks import shapes
from benchmarks.contenders import Compiled, Contender, Fused, Optax, draw


class Whole(Fused):
    """What a user of torch writes: the step of torch's own optimizer, compiled as a whole."""

    name, options = "torch.compile(AdamW.step)", {}

    def start(self) -> None:
        super().start()
        self.compiled = torch.compile(self.opt.step)

    def step(self) -> None:
        self.compiled()


WHO: dict[str, type[Contender]] = {"ours": Compiled, "torch": Whole, "optax": Optax}


def main(who: str, tensors: int, threads: int, device: str) -> None:
    torch.set_num_threads(threads)
    of = shapes.small(tensors)
    contender = WHO[who](draw(of, 0, device), draw(of, 1, device))
    times = []
    for _ in range(3):
        begin = time.perf_counter()
        contender.step()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    print(json.dumps({"seconds": times[0], "second": times[1], "third": times[2]}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
