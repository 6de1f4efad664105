"""What may stand in a group: types of options, and the flags of torch that mean nothing here."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functorch_opt import tree
from functorch_opt._core.inject import hyperparameters
from functorch_opt._core.transformation import GradientTransformation
from functorch_opt.optim.momentum import has_momentum

PLAIN = (float, int, str, Tensor, torch.dtype, type(None))
"""Types of options that stay as they are."""


def is_plain(value: Any) -> bool:
    """Whether `plain` gives it back. In compiled code a group is written only where it has to be,
    for a write is compiled again."""
    if isinstance(value, tuple):
        return all(is_plain(part) for part in value)
    return isinstance(value, PLAIN)


def plain(value: Any) -> Any:
    """numpy's numbers, and arrays of one element, as Python's; lists, which JSON has, as tuples."""
    if isinstance(value, (list, tuple)):
        return tuple([plain(part) for part in value])
    if isinstance(value, (Tensor, bool)) or type(value) in PLAIN:
        return value
    one = getattr(value, "size", None) == 1 and hasattr(value, "item")
    return value.item() if one else value


def scalar(value: Any) -> Any:
    """Tensors of one element as 0-dim ones, which a transformation takes; also within a tuple."""
    if isinstance(value, tuple):
        return tuple([scalar(part) for part in value])
    one = isinstance(value, Tensor) and value.dim() > 0 and value.numel() == 1
    return value.reshape(()) if one else value


def in_a_step(value: Any) -> Any:
    """What a hyperparameter is in a step: a tensor, into whose value nobody looks."""
    if isinstance(value, tuple):
        return tuple([in_a_step(part) for part in value])
    return torch.zeros((), dtype=torch.float64)


def check_number(name: str, value: Any, like: Any) -> None:
    """Raise TypeError for what is no number and no tensor, or no tuple of these where `like` is
    one; ValueError for a tensor that does not hold one number, and for a tuple of more or fewer."""
    if isinstance(like, tuple):
        if not isinstance(value, tuple):
            raise TypeError(
                f"{name} must be {len(like)} numbers; got {type(value).__name__} {value!r}."
            )
        if len(value) != len(like):
            few = "not enough" if len(value) < len(like) else "too many"
            raise ValueError(
                f"{name} has {few} values: there must be {len(like)}; got {value!r}."
            )
        for part in value:
            check_number(name, part, None)
    elif isinstance(value, bool) or not isinstance(value, (int, float, Tensor)):
        raise TypeError(
            f"{name} must be a number or a 1-element tensor; "
            f"got {type(value).__name__} {value!r}."
        )
    elif isinstance(value, Tensor) and (value.numel() != 1 or value.is_complex()):
        raise ValueError(
            f"Tensor {name} must be 1-element and real; "
            f"got {value.dtype} of shape {tuple(value.shape)}."
        )


def check_like(name: str, value: Any, default: Any) -> None:
    """Raise TypeError for an option that is no hyperparameter, and is of another type than its
    default. 0 and 1 may stand for False and True."""
    if isinstance(default, tuple) and isinstance(value, tuple):
        for part in value:
            check_like(name, part, None if part is None else 0.0)
        return
    wanted: Any = (
        (bool, int, float, str, tuple, torch.dtype, type(None))
        if default is None
        else type(default)
    )
    number = wanted in (int, float)
    fits = isinstance(value, (int, float) if number else wanted) and not (
        isinstance(value, bool) and number
    )
    is_flag = wanted is bool and type(value) is int and value in (0, 1)
    if not fits and not is_flag:
        raise TypeError(
            f"{name} must be of the type of {default!r}; got {type(value).__name__} {value!r}."
        )


def check_names(groups: list[dict[str, Any]]) -> None:
    """Raise ValueError where two parameters have one name: a mask could not tell them apart."""
    names = [name for group in groups for name in group.get("param_names", ())]
    if len(set(names)) < len(names):
        twice = [name for name, n in Counter(names).items() if n > 1]
        raise ValueError(
            "names of parameters must be unique, for masks and labels see them; several "
            f"parameters are called {', '.join(map(repr, twice[:5]))}. Put the name of their "
            f"model before it: [(f'generator.{{name}}', p) for name, p in "
            "model.named_parameters()]."
        )


def is_open(options: dict[str, Any]) -> Callable[[str], bool]:
    """Whether an option is a hyperparameter as soon as it is a float: where it is None or an
    int."""
    return lambda name: options[name] is None or type(options[name]) is int


FLAGS = ("foreach", "fused", "capturable", "differentiable")
"""Options by which torch chooses among its implementations. There is one here."""
PRIVATE = (
    "_recipe",
    "_own",
    "_numbers",
    "_optional",
    "_compile",
    "_owners",
    "_slots_on_host",
)
"""Attributes of an optimizer that are pickled beside torch's."""


def only_sets_up(groups: list[dict[str, Any]], state: dict[Any, Any]) -> bool:
    """Whether this is the step by which torch.distributed.checkpoint has a fresh optimizer make its
    state: zero lr, zero gradients.

    If it were counted, looking at the state of an optimizer would change its training
    (pytorch#164929).
    """
    if state or any(group["lr"] != 0 for group in groups):
        return False
    grads = [p.grad for group in groups for p in group["params"]]
    return bool(tree.norm(grads) == 0)


Options = dict[str, Any]


class Arguments(NamedTuple):
    """The arguments of a factory, and what they are in a stateful optimizer."""

    lr: Any
    """The group option ``lr``."""
    rate: str | None
    """The argument that it is; None: it multiplies what the transformation gives."""
    numbers: Options
    """Hyperparameters, other options of the groups, and what is none."""
    others: Options
    fixed: Options
    has_momentum: bool = False
    """Whether the group option ``momentum`` has something to set; see `with_momentum`."""

    @property
    def defaults(self) -> Options:
        """The options of the groups."""
        options = {"lr": self.lr, **self.numbers, **self.others}
        return {"momentum": None, **options} if self.has_momentum else options


def arguments(tx: Any, hyper: Options) -> Arguments:
    """The arguments of a factory.

    Raises:
        TypeError: `tx` is no transformation and no function; a transformation with arguments; a
            learning rate by two names.
    """
    hyper = {
        name: value if isinstance(value, (list, tuple)) else plain(value)
        for name, value in hyper.items()
    }
    if isinstance(tx, GradientTransformation):
        lr = hyper.pop("lr", 1.0)
        if hyper:
            raise TypeError(
                f"a ready transformation takes no hyperparameters; got {', '.join(hyper)}. "
                "Give the function that makes it: Optimizer(params, adamw, learning_rate=...). "
                "Beside a ready transformation there is only lr, which multiplies what it gives."
            )
        return Arguments(lr, None, {}, {}, {}, has_momentum(tx))
    if not callable(tx):
        raise TypeError(
            "tx must be a transformation or a function that returns one; "
            f"got {type(tx).__name__} {tx!r}."
        )
    rate, lr = _rate(tx, hyper)
    # What it does not like about its arguments, it says now.
    scalars = {name: scalar(value) for name, value in hyper.items()}
    ready = tx(**scalars)
    numbers, others = hyperparameters(tx, (), hyper)
    return _sorted(ready, rate, lr, numbers, others)


def _rate(tx: Any, hyper: Options) -> tuple[str, Any]:
    """What the factory calls its learning rate, and the group option that multiplies it if it is a
    schedule. The argument ``lr`` is put in its place among `hyper`."""
    known = inspect.signature(tx).parameters
    rate = "lr" if "lr" in known else "learning_rate"
    if rate == "lr" or "lr" not in hyper:
        return rate, 1.0
    lr = hyper.pop("lr")
    if rate not in known or callable(hyper.get(rate)):
        return rate, lr
    if rate in hyper:
        raise TypeError(
            f"lr and {rate} are the same argument; got lr={lr!r} and {rate}={hyper[rate]!r}. "
            "Give one of them."
        )
    hyper[rate] = lr
    return rate, 1.0


def _sorted(
    ready: Any, rate: str, lr: Any, numbers: Options, others: Options
) -> Arguments:
    """The arguments by what they are."""
    if type(others.get(rate)) is int:
        numbers[rate] = others.pop(rate)
    options = {
        name: value
        for name, value in others.items()
        if isinstance(value, (bool, int, str, torch.dtype, type(None)))
    }
    fixed = {name: value for name, value in numbers.items() if callable(value)}
    fixed |= {name: value for name, value in others.items() if name not in options}
    numbers = {name: value for name, value in numbers.items() if name not in fixed}
    moves = "momentum" not in (numbers | others | fixed) and has_momentum(ready)
    if rate not in numbers:
        return Arguments(lr, None, numbers, options, fixed, moves)
    return Arguments(numbers.pop(rate), rate, numbers, options, fixed, moves)
