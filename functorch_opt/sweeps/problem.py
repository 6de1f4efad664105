"""What a sweep minimizes, and where it begins.

A problem is a module with a loss, or a function of parameters.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from functorch_opt import tree
from functorch_opt.tree import PyTree

Loss = Callable[..., Tensor]


class Problem(NamedTuple):
    """The module, if there is one, and the loss as a function of params and batch."""

    module: nn.Module | None
    loss: Loss
    starts: list[PyTree]
    """The first parameters, for each seed."""


def read_problem(
    model_or_loss: Any, loss: Loss | None, params: PyTree | None, seeds: list[int]
) -> Problem:
    """The problem that these arguments of `sweep` describe."""
    if params is not None:
        return _of_a_function(model_or_loss, loss, params, seeds)
    if not callable(loss):
        raise TypeError(
            "a module needs loss=, a function of output and target such as "
            "torch.nn.functional.cross_entropy; a loss function needs params=, where it begins. "
            f"Got {model_or_loss!r} and loss={loss!r}."
        )
    return _of_a_module(model_or_loss, loss, seeds)


def _of_a_function(
    model_or_loss: Any, loss: Loss | None, params: PyTree, seeds: list[int]
) -> Problem:
    if (
        isinstance(model_or_loss, nn.Module)
        or not callable(model_or_loss)
        or loss is not None
    ):
        raise TypeError(
            "params= goes with a function loss(params, *batch) in the first place, and without "
            "loss=. A module brings its parameters: leave params out and give loss=, "
            "e.g. cross_entropy."
        )
    varies = callable(params)
    make = params if callable(params) else lambda: params
    starts = _for_each_seed(make, seeds, varies=varies, what="params")
    return Problem(
        None, model_or_loss, [tree.map(lambda p: p.detach(), of) for of in starts]
    )


def _of_a_module(model: Any, loss: Loss, seeds: list[int]) -> Problem:
    single = isinstance(model, nn.Module)
    make = (lambda: copy.deepcopy(model)) if single else model
    modules = _for_each_seed(make, seeds, varies=not single, what="a module")
    for made in modules:
        _check_module(made)
    module = modules[0]

    def loss_fn(params: dict[str, Tensor], x: Tensor, *rest: Tensor) -> Tensor:
        return loss(functional_call(module, params, (x,)), *rest)

    return Problem(module, loss_fn, [_trained_parameters(made) for made in modules])


def _trained_parameters(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}


def _check_module(made: Any) -> None:
    """Raise TypeError for anything but a module that many models can share."""
    if not isinstance(made, nn.Module):
        raise TypeError(
            "the first argument must be a module or a function that makes one; "
            f"it made {type(made).__name__} {made!r}."
        )
    for name, part in made.named_modules():
        if part.training and getattr(part, "track_running_stats", False):
            raise TypeError(
                f"{name!r} is {type(part).__name__}, whose running statistics change in place, "
                "which vmap cannot do for many models. Use GroupNorm, or "
                "torch.func.replace_all_batch_norm_modules_(model)."
            )


def _for_each_seed(
    make: Callable[[], Any], seeds: list[int], *, varies: bool, what: str
) -> list[Any]:
    """What `make` returns for each seed."""
    if len(seeds) > 1 and not varies:
        raise TypeError(
            f"{len(seeds)} seeds need a function without arguments that makes {what}, called once "
            f"per seed; got {what} made already. To begin all at the same place, give a function "
            "that returns it."
        )
    made = []
    for seed in seeds:
        with seeded(seed):
            made.append(make())
    return made


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside of it, torch's generators start from `seed`.

    Afterwards they go on as if nothing had been drawn from them.
    """
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield
