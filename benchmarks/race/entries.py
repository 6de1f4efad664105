"""Who takes part: every ready-made optimizer, found by its first argument, and those that are added.

Nothing here is a result: what is fixed and what is tried beside the learning rate was written down
before the race was run. See docs/race.md.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import functorch_opt as fo
from functorch_opt import line_search, optimizers, privacy

Factory = Callable[..., fo.GradientTransformation]


@dataclass(frozen=True)
class Entry:
    name: str
    make: Factory
    other: dict[str, tuple[float, ...]] = field(default_factory=dict)
    """Values of one more hyperparameter."""


ADDED: list[str] = []
"""Your own optimizers, as in ``--add``: ``"my_module:my_optimizer"``, a function of the learning rate
that returns a transformation."""

FIXED: dict[str, dict[str, Any]] = {
    "apollo": {"key": 0, "rank": 8},
    "dion": {"rank": 8},
    "fira": {"rank": 8},
    "galore": {"rank": 8},
    "noisy_sgd": {"key": 0},
    "psgd_kron": {"key": 0},
    "sgld": {"key": 0},
}
"""Arguments without a default, and ranks, whose defaults are larger than any matrix here."""

_ADAM_FOR_THE_REST = {"adam_learning_rate": (1e-3, 1e-2)}
OTHER: dict[str, dict[str, tuple[float, ...]]] = {
    "adamuon": _ADAM_FOR_THE_REST,
    "adamw": {"weight_decay": (0.0, 0.1)},
    "ademamix": {"alpha": (5.0, 8.0)},
    "dion": _ADAM_FOR_THE_REST,
    "lion": {"weight_decay": (0.0, 1.0)},
    "mano": _ADAM_FOR_THE_REST,
    "muon": _ADAM_FOR_THE_REST,
    "muon_with_adamw": {"adamw_learning_rate": (1e-3, 1e-2)},
    "muonh": _ADAM_FOR_THE_REST,
    "normuon": _ADAM_FOR_THE_REST,
    "prodigy": {"estim_lr_coef": (1.0, 2.0)},
    "schedule_free_adamw": {"b1": (0.9, 0.98)},
    "schedule_free_sgd": {"b1": (0.9, 0.98)},
    "sgd": {"momentum": (0.0, 0.9)},
}
"""One more hyperparameter, with two values, where the authors say that it is tuned."""

LEFT_OUT = {
    "differentially_private_aggregate": "it is a stage of `dpsgd`",
    "dp_adam": "it takes gradients of single examples, and adds noise for privacy",
    "dpsgd": "it takes gradients of single examples, and adds noise for privacy",
    "hyperball": "it is the last stage of an optimizer; `muonh` is one with it",
    "lbfgs": "its line search asks for the loss several times a step, "
    "and steps are what is counted",
    "polyak_sgd": "it has no learning rate: it takes the largest step, and needs the lowest loss",
    "schedule_free": "it is a wrapper; three optimizers with it take part",
    "sophia": "it asks for second derivatives of the loss, which sweep does not give",
}
"""Optimizers that do not take part, and why."""


def competitors(added: list[str] | None = None) -> dict[str, Entry]:
    """All that take part, by name."""
    found = {}
    for factory in sorted(_factories(), key=lambda factory: factory.__name__):
        name = factory.__name__
        if name not in LEFT_OUT:
            fixed = FIXED.get(name)
            make = partial(factory, **fixed) if fixed else factory
            found[name] = Entry(name, make, OTHER.get(name, {}))
    for text in [*ADDED, *(added or [])]:
        entry = read_added(text)
        if entry.name in found:
            raise SystemExit(
                f"{text}: there is an optimizer called {entry.name} already."
            )
        found[entry.name] = entry
    return found


def read_added(text: str) -> Entry:
    """The optimizer of ``module:function``."""
    where, _, name = text.partition(":")
    try:
        make = getattr(importlib.import_module(where), name)
        made = make(learning_rate=0.1)
    except Exception as error:
        raise SystemExit(
            f"{text}: {type(error).__name__}: {error}. Give module:function, where "
            "function(learning_rate) returns a transformation."
        ) from None
    if not isinstance(made, fo.GradientTransformation):
        raise SystemExit(f"{text} returned {made!r}, which is no transformation.")
    return Entry(name, make)


def _factories() -> Iterator[Factory]:
    """Public functions of the family files whose first argument is the learning rate."""
    for function in _public(optimizers):
        first = next(iter(inspect.signature(function).parameters), None)
        if first == "learning_rate" and not function.__name__.startswith("scale_by_"):
            yield function


def everything() -> set[str]:
    """The names of all public functions that return an optimizer, in the race or not."""
    names = set()
    for package in (optimizers, line_search, privacy):
        for function in _public(package):
            returned = inspect.signature(function).return_annotation
            is_stage = function.__name__.startswith(("scale_by_", "project_"))
            if "GradientTransformation" in str(returned) and not is_stage:
                names.add(function.__name__)
    return names


def _public(package: Any) -> Iterator[Factory]:
    for file in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
        module = importlib.import_module(file.name)
        for name in getattr(module, "__all__", ()):
            if inspect.isfunction(value := getattr(module, name)):
                yield value
