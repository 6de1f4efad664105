"""A training script that may be killed at any time. It prints what it has saved.

Run it by ``python resumable.py CHECKPOINT STEPS compile|eager``.
"""

from __future__ import annotations

import hashlib
import os
import sys

import torch
from torch import nn

import functorch_opt as fo

EVERY = 5


def main(checkpoint: str, steps: int, compile: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    tx = fo.chain(
        fo.clip_by_global_norm(1.0),
        fo.add_noise(0.01, 0.55, key=2**40 + 3),
        fo.adamw(fo.cosine_decay_schedule(0.1, steps), weight_decay=0.1),
        fo.params_ema(0.9),
    )
    opt = fo.optim.Optimizer(model.parameters(), tx, compile=compile)
    sched = torch.optim.lr_scheduler.StepLR(opt, 7, 0.9)
    start = 0
    if os.path.exists(checkpoint):
        saved = torch.load(checkpoint)
        model.load_state_dict(saved["model"])
        opt.load_state_dict(saved["opt"], strict=True)
        sched.load_state_dict(saved["sched"])
        start = saved["step"]
        print("resumed", start, flush=True)
    for step in range(start, steps):
        generator = torch.Generator().manual_seed(step)
        x, y = (
            torch.randn(16, 4, generator=generator),
            torch.randn(16, 1, generator=generator),
        )
        opt.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        opt.step()
        sched.step()
        if (step + 1) % EVERY == 0:
            saved = {
                "model": model.state_dict(),
                "opt": opt.state_dict(),
                "sched": sched.state_dict(),
                "step": step + 1,
            }
            torch.save(saved, checkpoint + ".new")
            os.replace(
                checkpoint + ".new", checkpoint
            )  # a kill leaves the old one or the new one, never a half
            print("saved", step + 1, flush=True)
    values = [
        *model.parameters(),
        *(v for p in model.parameters() for _, v in sorted(opt.state[p].items())),
    ]
    digest = hashlib.sha256(b"".join(v.detach().numpy().tobytes() for v in values))
    print("finished", opt.param_groups[0]["lr"], digest.hexdigest(), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3] == "compile")
