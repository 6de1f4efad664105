"""Many small models trained at once on a device: vmapped, compiled, and in a loop."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.func import functional_call, grad, stack_module_state, vmap

import functorch_opt as fo
from benchmarks import report


def measure(device: str, n: int) -> dict[str, Any]:
    """The time of a training step of `n` models, in ms."""
    from benchmarks.gpu import milliseconds

    torch.manual_seed(0)
    models = [_model().to(device) for _ in range(n)]
    params = {name: p.detach() for name, p in stack_module_state(models)[0].items()}
    x = torch.randn(256, 64, device=device)
    y = torch.randint(10, (256,), device=device)
    tx = fo.adamw(1e-3)

    def loss(p: Any) -> Any:
        return nn.functional.cross_entropy(functional_call(models[0], p, (x,)), y)

    def step(p: Any, state: Any) -> Any:
        updates, state = tx.update(grad(loss)(p), state, p)
        return fo.apply_updates(p, updates), state

    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-3) for model in models]

    def loop() -> None:
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()

    found = {"models": n, "loop": milliseconds(loop, device, 3)}
    for name, run in {
        "vmap": vmap(step),
        "vmap, compiled": torch.compile(vmap(step)),
    }.items():
        now = [params, vmap(tx.init)(params)]

        def call(run: Any = run, now: Any = now) -> None:
            now[:] = run(*now)

        milliseconds(call, device, 3)
        found[name] = milliseconds(call, device, 20)
    return found


def show(found: dict[str, Any]) -> None:
    names = [name for name in found if name != "models"]
    rows = [
        [name, f"{found[name]:.3f}", f"{found['loop'] / found[name]:.1f}"]
        for name in names
    ]
    title = f"A training step of {found['models']} models of 64-128-10"
    report.table(title, ["", "ms", "times as fast as a loop"], rows, numbers_to=3)


def _model() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 10))
