"""A model whose parameters lie on several devices, with the numbers that it has on one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from several_devices import numbers, placed, several
from torch import Tensor

import functorch_opt as fo
from functorch_opt import tree
from functorch_opt._execution.compiled import CompiledStep
from functorch_opt._execution.segments import IN_PIECES

SHAPES = [(4, 3), (4, 3), (5,), (4, 3), ()]
PLACES = {
    "two cards": ["cuda:0", "cuda:0", "cuda:1", "cuda:1", "cuda:0"],
    "a card, and the host beside": ["cuda:0", "cpu", "cuda:0", "cpu", "cuda:0"],
    "the host first": ["cpu", "cuda:0", "cpu", "cuda:1", "cuda:1"],
}
MAKES: dict[str, Any] = {
    "sgd": lambda: fo.sgd(0.1, momentum=0.9),
    "adamw": lambda: fo.adamw(fo.linear_schedule(0.1, 0.01, 3)),
    "clipped": lambda: fo.chain(
        fo.clip_by_global_norm(0.5), fo.adamw(0.1), fo.params_ema(0.9)
    ),
    "clipped later": lambda: fo.chain(fo.scale_by_adam(), fo.clip_by_global_norm(0.5)),
    "noise": lambda: fo.chain(fo.add_noise(0.1, 0.5, 3), fo.sgd(0.1)),
    "lamb": lambda: fo.lamb(0.1),
    "prodigy": lambda: fo.prodigy(),
    "injected": lambda: fo.inject_hyperparams(fo.adam)(0.1),
    "master": lambda: fo.keep_master_weights(fo.adam(0.1)),
    "finite": lambda: fo.apply_if_finite(fo.adam(0.1), 3),
    "accumulated": lambda: fo.MultiSteps(fo.adam(0.1), 2),
    "schedule free": lambda: fo.schedule_free_sgd(0.1),
    "groups": lambda: fo.partition(
        {"a": fo.adam(0.1), "b": fo.chain(fo.clip_by_global_norm(0.1), fo.sgd(0.1))},
        lambda path, p: "a" if p.dim() > 1 else "b",
    ),
    "a device a group": lambda: fo.chain(
        fo.clip_by_global_norm(0.5),
        fo.partition(
            {"a": fo.adam(0.1), "b": fo.sgd(0.1, 0.9), "c": fo.lion(0.1)},
            lambda path, p: {"1": "b", "2": "c", "3": "b"}.get(path, "a"),
        ),
    ),
    "totals": lambda: fo.leafwise(
        lambda g, top: g / top, totals={"top": fo.largest(lambda g: g.abs().amax())}
    ),
}


def drawn(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def updated(tx: Any, ps: list[Tensor], steps: list[list[Tensor]]) -> list[Tensor]:
    state = tx.init(ps)
    for gs in steps:
        updates, state = tx.update(gs, state, ps)
        ps = fo.apply_updates(ps, updates)
    return ps


def stepped(tx: Any, ps: list[Tensor], steps: list[list[Tensor]]) -> list[Tensor]:
    step, state = CompiledStep(tx, True, IN_PIECES), tx.init(ps)
    for gs in steps:
        ps, state = step(ps, gs, state)
    return ps


def optimized(tx: Any, ps: list[Tensor], steps: list[list[Tensor]]) -> list[Tensor]:
    params = [torch.nn.Parameter(p, requires_grad=True) for p in ps]
    optimizer = fo.optim.Optimizer(params, tx)
    for gs in steps:
        for p, g in zip(params, gs, strict=True):
            p.grad = g
        optimizer.step()
    return [p.detach() for p in params]


HOW = {"update": updated, "in place": stepped, "optimizer": optimized}


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("places", PLACES)
@pytest.mark.parametrize("name", MAKES)
def test_the_numbers_are_those_of_one_device(name: str, places: str, how: str) -> None:
    tx = MAKES[name]()
    expected = updated(tx, drawn(0), [drawn(k) for k in (1, 2, 3)])
    devices = PLACES[places]

    def there(xs: list[Tensor]) -> list[Tensor]:
        return [placed(x, device) for x, device in zip(xs, devices, strict=True)]

    with several():
        found = HOW[how](tx, there(drawn(0)), [there(drawn(k)) for k in (1, 2, 3)])
        assert [str(x.device) for x in found] == devices
    torch.testing.assert_close([*map(numbers, found)], expected, rtol=1e-5, atol=1e-6)


def test_such_devices_do_not_mix() -> None:
    """So the test above can fail."""
    with several(), pytest.raises(RuntimeError, match="several devices"):
        placed(torch.ones(2), "cuda:0") + placed(torch.ones(2), "cuda:1")
    with several(), pytest.raises(RuntimeError, match="several devices"):
        placed(torch.ones(2), "cuda:0") * placed(torch.ones(()), "cuda:1")


def test_norms_and_sums_of_a_tree_on_several_devices() -> None:
    xs = drawn(0)
    with several():
        there = [placed(x, f"cuda:{k % 2}") for k, x in enumerate(xs)]
        for f in (tree.norm, tree.sum, tree.max):
            found = f(there)
            assert str(found.device) == "cuda:0"
            torch.testing.assert_close(numbers(found), f(xs))
