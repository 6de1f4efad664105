"""What is installed works by itself: the version, the type marker, and a few lines."""

import importlib.metadata
import importlib.resources
import sys
from pathlib import Path

import torch
from torch.func import grad, vmap

import functorch_opt as fo

file = Path(sys.argv[1]).name
assert Path(fo.__file__).is_relative_to(sys.prefix), fo.__file__
assert importlib.metadata.version("functorch_opt") == fo.__version__
assert f"-{fo.__version__}" in file
assert importlib.resources.files(fo).joinpath("py.typed").is_file()
assert importlib.resources.files(fo).joinpath("optim/ready.pyi").is_file()

start = {"w": torch.tensor([3.0, -2.0])}


def final_loss(learning_rate):
    tx = fo.chain(fo.clip_by_global_norm(1.0), fo.adam(learning_rate))
    params, state = start, tx.init(start)
    for _ in range(20):
        updates, state = tx.update(grad(loss)(params), state, params)
        params = fo.apply_updates(params, updates)
    return loss(params)


def loss(params):
    return (params["w"] ** 2).sum()


assert vmap(final_loss)(torch.tensor([0.01, 0.1])).diff() < 0

w = torch.nn.Parameter(start["w"].clone())
optimizer = fo.optim.Lion([w], lr=0.1, weight_decay=0.0)
(w**2).sum().backward()
optimizer.step()
torch.testing.assert_close(w.detach(), torch.tensor([2.9, -1.9]))
print(f"{file}: installs, imports and runs; version {fo.__version__}")
