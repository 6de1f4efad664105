"""Hyperparameters that are kept in the state, as tensors."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from functorch_opt import tree
from functorch_opt._core import numerics
from functorch_opt._core.transformation import (
    Expression,
    GradientTransformation,
    Scalar,
    ScalarOrSchedule,
    keyword_only,
)
from functorch_opt.tree import PyTree

__all__ = ["inject_hyperparams"]


class Factory(Expression):
    """A factory whose transformations keep their hyperparameters in the state."""

    def __init__(
        self, factory: Callable[..., GradientTransformation], static_args: tuple[str, ...]
    ) -> None:
        self.factory = factory
        self.static_args = static_args
        given = {"static_args": static_args} if static_args else {}
        self.call = (inject_hyperparams, (factory,), given)

    def __call__(self, *args: Any, **kwargs: Any) -> Injected:
        numbers, fixed = hyperparameters(self.factory, args, kwargs, self.static_args)
        inner = self.factory(*args, **kwargs)
        if not isinstance(inner, GradientTransformation):
            raise TypeError(
                f"{self.factory.__name__} must return a transformation; "
                f"it returned {type(inner).__name__} {inner!r}."
            )
        tx = Injected(self.factory, numbers, fixed, inner)
        tx.call = (self, args, kwargs)
        return tx


class Injected(GradientTransformation):
    """A transformation that is made anew at every step, from the hyperparameters in the state."""

    def __init__(
        self,
        factory: Callable[..., GradientTransformation],
        numbers: dict[str, Any],
        fixed: dict[str, Any],
        inner: GradientTransformation,
    ) -> None:
        self.factory, self.numbers, self.fixed = factory, numbers, fixed
        scheduled = {name: value for name, value in numbers.items() if callable(value)}
        self.stateful = {n: of for n, of in scheduled.items() if is_stateful(of)}
        self.schedules = {n: of for n, of in scheduled.items() if n not in self.stateful}
        self.name = factory.__name__
        self.last = inner.last
        read = [inner.extra_args, *map(reads, self.stateful.values())]
        self.extra_args = {
            name: any(of.get(name, False) for of in read)
            for name in itertools.chain(*read)
        }

    def _init(self, params: PyTree) -> dict[str, PyTree]:
        device = tree.leaves(params)[0].device
        count = tree.zero_count(params)
        own = {name: schedule.init() for name, schedule in self.stateful.items()}
        first = {name: schedule(own[name]) for name, schedule in self.stateful.items()}
        first |= {name: schedule(count) for name, schedule in self.schedules.items()}
        values = {
            name: _as_tensor(first.get(name, value), device)
            for name, value in self.numbers.items()
        }
        kept: dict[str, PyTree] = {"count": count} if self.schedules else {}
        kept |= {"schedules": own} if own else {}
        return {"hyperparams": values, "inner": self.made(values).init(params), **kept}

    def made(self, values: dict[str, Tensor]) -> GradientTransformation:
        """The transformation for these values of the hyperparameters."""
        return self.factory(**self.fixed, **values)

    def next(
        self, state: Any, extra: Mapping[str, Any] | None = None
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The hyperparameters of this step, and the next count and states of schedules, if any.

        Who does not make a step has no extra arguments: the last value of a stateful schedule.
        """
        expected = {"hyperparams", "inner", *(["count"] if self.schedules else [])}
        expected |= {"schedules"} if self.stateful else set()
        fits = isinstance(state, dict) and state.keys() == expected
        held = state["hyperparams"] if fits else None
        if not isinstance(held, dict) or held.keys() != self.numbers.keys():
            there = list(state) if isinstance(state, dict) else type(state).__name__
            raise ValueError(
                f"this is not a state of {self!r}, which has {sorted(expected)} with the "
                f"hyperparams {list(self.numbers)}: it holds {there}. "
                "Use what its own init or update returned."
            )
        values, kept = dict(held), {}
        if self.schedules:
            count = state["count"]
            for name, schedule in self.schedules.items():
                values[name] = _as_tensor(schedule(count), count.device)
            kept["count"] = count + 1
        if self.stateful and extra is not None:
            kept["schedules"] = own = {**state["schedules"]}
            for name, schedule in self.stateful.items():
                value = schedule(own[name], **_read_by(schedule.__call__, extra))
                values[name] = _as_tensor(value, held[name].device)
                own[name] = schedule.update(own[name], **_read_by(schedule.update, extra))
        return values, kept

    def _update(
        self,
        updates: PyTree,
        state: dict[str, PyTree],
        params: PyTree | None,
        **extra: Any,
    ) -> tuple[PyTree, dict[str, PyTree]]:
        values, kept = self.next(state, extra)
        tx = self.made(values)
        mine = {name: value for name, value in extra.items() if name in tx.extra_args}
        updates, inner = tx.update(updates, state["inner"], params, **mine)
        return updates, {"hyperparams": values, "inner": inner, **kept}


def is_stateful(value: Any) -> bool:
    """Whether it is a schedule with a state of its own: not a function of the count alone."""
    return callable(value) and hasattr(value, "init") and hasattr(value, "update")


def reads(schedule: Any) -> dict[str, bool]:
    """The extra arguments that a stateful schedule reads, ``{name: required}``."""
    of_value = keyword_only(schedule.__call__.__func__)
    of_state = keyword_only(schedule.update.__func__)
    if required := [name for name, needed in of_value.items() if needed]:
        raise TypeError(
            f"{type(schedule).__name__}.__call__ needs {', '.join(required)}, and init calls it with "
            "the first state only: give a default, or let update read it."
        )
    return {**of_value, **of_state}


def _read_by(method: Any, extra: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the extra arguments that a method names."""
    return {name: extra[name] for name in keyword_only(method.__func__) if name in extra}


def _as_tensor(value: Any, device: torch.device) -> Tensor:
    if isinstance(value, Tensor):
        # It is not detached, which would take a forward-mode derivative away.
        return value.clone()
    dtype = numerics.real_dtype(device)
    return torch.full((), float(value), dtype=dtype, device=device)


def inject_hyperparams(
    inner_factory: Callable[..., GradientTransformation],
    static_args: str | Iterable[str] = (),
) -> Callable[..., GradientTransformation]:
    """Keep the hyperparameters of a factory in the state.

    There they can be logged, set between steps, vmapped over and differentiated.

    ``inject_hyperparams(adamw)(learning_rate=0.1)`` is `adamw` with the state ``{"hyperparams":
    {"learning_rate": tensor, "b1": tensor, ...}, "inner": ...}``. A number (a float, a 0-dim
    tensor, or an argument annotated ``Scalar``) becomes a tensor, float64 if the device has it. A
    schedule is evaluated at every update and its value is stored, so it has no effect to set that
    value. Everything else stays fixed. Changing a value does not recompile.

    A schedule may have a state of its own, which reads extra arguments of ``update``, such as the
    loss. It is an object with ``init() -> state``, ``__call__(state) -> value`` and
    ``update(state, *, ...) -> state``; the state is a tree of tensors. What comes after ``*`` in
    the last two are the extra arguments. The value of a step is that of the state before it.

    Args:
        inner_factory: a function that returns a transformation.
        static_args: the name or names of arguments that stay fixed, though they are numbers.

    Returns:
        A function that takes the arguments of `inner_factory`, and returns such a transformation.

    Example:
        >>> import torch, functorch_opt as fo
        >>> tx = fo.inject_hyperparams(fo.sgd)(learning_rate=0.1)
        >>> tx
        inject_hyperparams(sgd)(learning_rate=0.1)
        >>> state = tx.init([torch.zeros(1)])
        >>> state["hyperparams"]["learning_rate"] = torch.tensor(0.5)
        >>> tx.update([torch.ones(1)], state)[0]
        [tensor([-0.5000])]

        A schedule with a state, which is the sum of the losses:

        >>> class Slower:
        ...     def init(self):
        ...         return torch.tensor(0.0)
        ...     def __call__(self, state):
        ...         return 1 / (1 + state)
        ...     def update(self, state, *, value):
        ...         return state + value
        >>> tx = fo.inject_hyperparams(fo.sgd)(Slower())
        >>> state = tx.init([torch.zeros(1)])
        >>> for loss in (3.0, 1.0):
        ...     updates, state = tx.update([torch.ones(1)], state, value=torch.tensor(loss))
        ...     print(updates)
        [tensor([-1.])]
        [tensor([-0.2500])]
    """
    if not callable(inner_factory):
        raise TypeError(
            "inject_hyperparams takes the function that makes a transformation; "
            f"got {inner_factory!r}. "
            "Write inject_hyperparams(adamw)(learning_rate=0.1)."
        )
    known = list(inspect.signature(inner_factory).parameters)
    names = (static_args,) if isinstance(static_args, str) else tuple(static_args)
    if any(name not in known for name in names):
        raise TypeError(
            f"static_args must be names among {known}, which are the arguments "
            f"of {inner_factory.__name__}; got {static_args!r}."
        )
    return Factory(inner_factory, names)


_WITHOUT_NAMES = (
    inspect.Parameter.VAR_POSITIONAL,
    inspect.Parameter.VAR_KEYWORD,
    inspect.Parameter.POSITIONAL_ONLY,
)


def hyperparameters(
    factory: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    static_args: tuple[str, ...] = (),
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments of a call of `factory`, with their defaults, in two dicts.

    The first has the hyperparameters, which are numbers and schedules; the second has the rest.
    """
    signature = inspect.signature(factory)
    called = getattr(factory, "__name__", repr(factory))
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        given = [*map(repr, args), *(f"{name}=" for name in kwargs)]
        raise TypeError(
            f"{called}: {error}; got ({', '.join(given)}); "
            f"its arguments are {list(signature.parameters)}."
        ) from None
    bound.apply_defaults()
    numbers: dict[str, Any] = {}
    fixed: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        parameter = signature.parameters[name]
        if parameter.kind in _WITHOUT_NAMES:
            raise TypeError(
                f"{called} takes {parameter}; hyperparameters need names. "
                "Wrap it in a function that names them."
            )
        annotated = parameter.annotation in (Scalar, ScalarOrSchedule) or "Scalar" in str(
            parameter.annotation
        )
        number = isinstance(value, float | Tensor) or is_stateful(value)
        whole = isinstance(value, int) and not isinstance(value, bool)
        number = number or (annotated and (callable(value) or whole))
        (numbers if number and name not in static_args else fixed)[name] = value
    return numbers, fixed
