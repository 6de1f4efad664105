"""What the ranks do with `fo.optim.SAM`: its closure is called twice in a step, on every rank."""

from __future__ import annotations

import torch
from scenarios import STEPS, batch, gathered, loss, make_net, my_rows, shard
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import functorch_opt as fo


def train(net: nn.Module, opt: torch.optim.Optimizer, mine: slice = slice(None)) -> None:
    for step in range(STEPS):
        x, y = batch(step)

        def closure(x=x[mine], y=y[mine]):
            opt.zero_grad()
            error = loss(net, x, y)
            error.backward()
            return error

        opt.step(closure)


def optimizer(net: nn.Module) -> torch.optim.Optimizer:
    return fo.optim.SAM(net.parameters(), fo.adamw, rho=0.3, lr=0.05)


def run(rank: int, how: str) -> dict[str, float]:
    """The largest difference to one process, and how far it is from a run without SAM."""
    alone = make_net()
    train(alone, optimizer(alone))
    net = make_net()
    if how == "fsdp":
        wrapped: nn.Module = shard(net)
    else:
        views = how == "ddp, views"
        wrapped = DistributedDataParallel(net, gradient_as_bucket_view=views)
    train(wrapped, optimizer(net), my_rows(rank))
    plain = make_net()
    train(plain, fo.optim.Optimizer(plain.parameters(), fo.adamw, lr=0.05))
    a, b, c = gathered(net), gathered(alone), gathered(plain)
    return {
        "error": max(float((a[name] - b[name]).abs().max()) for name in a),
        "apart": max(float((a[name] - c[name]).abs().max()) for name in a),
    }


def refused(rank: int) -> str:
    net = make_net()
    before = gathered(net)
    adversary = fo.chain(fo.normalize(), fo.sgd(0.3))
    tx = fo.sam(fo.adamw(0.05), adversary, opaque_mode=True)
    opt = fo.optim.Optimizer(net.parameters(), tx, owners=True)
    try:
        train(DistributedDataParallel(net), opt, my_rows(rank))
    except ValueError as error:
        assert all(torch.equal(x, before[name]) for name, x in gathered(net).items())
        return str(error)
    return ""
