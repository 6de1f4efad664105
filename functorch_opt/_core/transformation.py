"""The whole theory: a gradient transformation is two pure functions, and most are one rule for one tensor.

    init(params) -> state
    update(updates, state, params=None, **extra) -> (updates, state)
    apply_updates(params, updates) -> params + updates

Everything else is convenience: `functorch_opt.leafwise` makes the pair from a rule for one tensor, `functorch_opt.chain` one of many.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any, ParamSpec, TypeVar

from torch import Tensor

from functorch_opt._core.structure import PyTree, flatten_tensors, match, paths, unflatten

__all__ = [
    "GradientTransformation",
    "Scalar",
    "ScalarOrSchedule",
    "apply_updates",
    "stateless",
    "transformation",
]

Scalar = float | Tensor
"""A hyperparameter: a number, or a 0-dim tensor (to vmap over it, differentiate it, or change it without recompiling)."""
Schedule = Callable[[Tensor], Any]
ScalarOrSchedule = Scalar | Schedule
"""A hyperparameter, or a function of the count that gives it."""


# ---- objects that know how they were written ---------------------------------------------------------------------------


class Expression:
    """Something made by a call. It prints as that call, and pickles as that call."""

    call: tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]] | None = None

    def __repr__(self) -> str:
        if self.call is None:
            return object.__repr__(self)
        function, args, kwargs = self.call
        written = [
            *map(_written, args),
            *(f"{name}={_written(value)}" for name, value in kwargs.items()),
        ]
        return f"{_written(function)}({', '.join(written)})"

    def __reduce__(self) -> Any:
        return object.__reduce__(self) if self.call is None else (_call, self.call)


def _written(value: Any) -> str:
    return value.__name__ if isinstance(value, (FunctionType, type)) else repr(value)


def _call(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return function(*args, **kwargs)


P = ParamSpec("P")
T = TypeVar("T", bound="GradientTransformation")


def transformation(factory: Callable[P, T]) -> Callable[P, T]:
    """Decorate a function that builds a transformation, so that what it builds carries its name, prints as the call, and pickles.

    Example:
        >>> import functorch_opt as fo
        >>> @fo.transformation
        ... def halve():
        ...     return fo.leafwise(lambda g: g / 2)
        >>> fo.chain(halve(), fo.clip(1.0))
        chain(halve(), clip(1.0))
    """

    @functools.wraps(factory)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> T:
        tx = factory(*args, **kwargs)
        tx.name, tx.call = factory.__name__, (wrapper, args, kwargs)
        return tx

    return wrapper


# ---- the pair ----------------------------------------------------------------------------------------------------------


class GradientTransformation(Expression):
    """A pure function of gradients with a state: ``init(params)`` and ``update(updates, state, params=None, **extra)``.

    Build one from two functions over trees; for a rule per tensor, which is nearly always what you want, see `leafwise`.

    Args:
        init: ``params -> state``. A state is tensors in dicts, tuples and NamedTuples.
        update: ``(updates, state, params) -> (updates, state)``. Extra arguments are declared by naming them after ``*``:
            ``def update(updates, state, params, *, value)``.
        extra_args: for wrappers only: the ``extra_args`` of the transformation inside, which ``update`` takes as ``**extra``.

    Attributes:
        name: under which `chain` keeps its state.
        extra_args: the extra arguments that ``update`` reads, ``{name: required}``.
        last: whether it looks at the new parameters, ``params + updates``, so that nothing may change the updates after it.

    Example:
        >>> import torch, functorch_opt as fo
        >>> negate = fo.GradientTransformation(lambda params: (), lambda updates, state, params: ([-u for u in updates], state))
        >>> negate.update([torch.tensor(2.0)], negate.init([torch.tensor(0.0)]))[0]
        [tensor(-2.)]
    """

    last: bool = False

    def __init__(
        self,
        init: Callable[[PyTree], PyTree],
        update: Callable[..., tuple[PyTree, PyTree]],
        *,
        extra_args: Mapping[str, bool] | None = None,
        last: bool = False,
    ) -> None:
        self._init, self._update = init, update
        self.extra_args = dict(keyword_only(update) if extra_args is None else extra_args)
        self.name, self.last = enclosing_name(update), last

    def init(self, params: PyTree) -> PyTree:
        """The state before the first update.

        Raises:
            TypeError: a leaf of `params` is not a tensor or None.
            ValueError: `params` has no tensor at all.
        """
        leaves, _ = flatten_tensors(params, "params")
        if all(leaf is None for leaf in leaves):
            raise ValueError(
                "params holds no tensor: there is nothing to optimize. Was the generator of parameters already used up?"
            )
        return self._init(params)

    def update(
        self, updates: PyTree, state: PyTree, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, PyTree]:
        """The transformed updates and the next state; nothing given is changed.

        Args:
            updates: a tree of the structure of the params: gradients, or what an earlier stage made of them. ``None``: no gradient.
            state: what `init` or the last `update` returned.
            params: the current parameters; some stages need them.
            **extra: what the stages declare, e.g. ``value=loss``.

        Raises:
            TypeError: an extra argument that no stage declares, or a declared one that is missing.
            ValueError: structures or shapes that do not fit, params missing, the state of another transformation.
        """
        self.check_extra(extra)
        return self._update(updates, state, params, **extra)

    def check_extra(self, extra: dict[str, Any]) -> None:
        """Raise TypeError for an extra argument that no stage declares, or a declared one that is missing."""
        undeclared = [name for name in extra if name not in self.extra_args]
        if undeclared:
            declared = ", ".join(sorted(self.extra_args)) or "none"
            raise TypeError(
                f"{self.name}.update got {', '.join(undeclared)}, which no stage reads. Declared extra arguments: {declared}."
            )
        missing = [
            name for name, required in self.extra_args.items() if required and name not in extra
        ]
        if missing:
            raise TypeError(
                f"{self.name} reads {', '.join(missing)}: call update(updates, state, params, {', '.join(f'{m}=...' for m in missing)})."
            )


def apply_updates(params: PyTree, updates: PyTree) -> PyTree:
    """``params + updates``, each sum rounded once to the dtype of the parameter.

    Args:
        params: tree of tensors.
        updates: tree of the same structure; where it is ``None`` the parameter stays as it is.

    Raises:
        ValueError: the structures, or two shapes, differ; an update that its parameter cannot hold (complex into real).
        TypeError: a leaf is not a tensor or None.

    Example:
        >>> import torch, functorch_opt as fo
        >>> fo.apply_updates({"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([0.5, -0.5])})
        {'w': tensor([1.5000, 1.5000])}
    """
    ps, spec = flatten_tensors(params, "params")
    us = match(params, spec, updates, names=("params", "updates"))
    new = []
    for i, (p, u) in enumerate(zip(ps, us, strict=True)):
        if u is not None:
            if p is None or p.shape != u.shape or (p.dtype is not u.dtype and _rank(u) > _rank(p)):
                there = "None" if p is None else f"{p.dtype} of shape {tuple(p.shape)}"
                given = f"{u.dtype} of shape {tuple(u.shape)}"
                raise ValueError(
                    f"the update at {paths(params)[i]!r} is {given}, its parameter {there}: nothing is broadcast or cut off."
                )
            p = p + u if p.dtype is u.dtype else (p + u).to(p.dtype)
        new.append(p)
    return unflatten(spec, new)


def _rank(x: Tensor) -> int:
    """Integers fit into reals, and reals into complex numbers, but not the other way."""
    return 2 if x.is_complex() else int(x.is_floating_point())


# ---- reading signatures (plain attributes, so that torch.compile can trace a factory) -----------------------------------


def positional(f: Any) -> tuple[str, ...]:
    code = _code(f)
    if code.co_flags & (0x04 | 0x08):
        raise TypeError(
            f"{f.__qualname__} takes *args or **kwargs; its arguments must be named, for their names say what it reads."
        )
    return tuple(code.co_varnames[: code.co_argcount])


def keyword_only(f: Any) -> dict[str, bool]:
    code = _code(f)
    if code.co_flags & 0x08:
        at = code.co_argcount + code.co_kwonlyargcount + bool(code.co_flags & 0x04)
        raise TypeError(
            f"{f.__qualname__} takes **{code.co_varnames[at]}; name the extra arguments it reads "
            "after '*', or pass extra_args= for a wrapper."
        )
    names = code.co_varnames[code.co_argcount : code.co_argcount + code.co_kwonlyargcount]
    if not names:
        return {}
    try:
        defaults = f.__kwdefaults__ or {}
    except (
        AttributeError
    ):  # a function that is made inside compiled code: Dynamo does not know its defaults
        defaults = {}
    return {name: name not in defaults for name in names}


def _code(f: Any) -> Any:
    if not hasattr(f, "__code__"):
        raise TypeError(
            f"{f!r} must be a plain function: the names of its arguments say what it reads."
        )
    return f.__code__


def enclosing_name(f: Any) -> str:
    name: str = (
        getattr(_code(f), "co_qualname", None) or f.__qualname__
    )  # Python 3.10 has the latter only, Dynamo of torch 2.11 the former
    return name.split(".<locals>")[0].rsplit(".", 1)[-1].replace("<lambda>", "leafwise")


# ---- hyperparameter checks, for factories --------------------------------------------------------------------------------


def check_range(low: float, high: float, *, above: bool = False, **hyper: Any) -> None:
    """Raise ValueError for a number outside ``[low, high)``, or ``(low, high)`` if `above`; NaN is outside.

    Tensors and schedules are not looked into.
    """
    for name, value in hyper.items():
        if (
            isinstance(value, (int, float))
            and not isinstance(value, bool)
            and not (low <= value < high and (value > low or not above))
        ):
            raise ValueError(
                f"{name} must be in {'(' if above else '['}{low}, {high}); got {value}."
            )


def check_choice(*choices: Any, **options: Any) -> None:
    """Raise ValueError for an option that is none of these."""
    for name, value in options.items():
        if value not in choices:
            known = " or ".join(map(repr, choices))
            raise ValueError(f"{name} must be {known}; got {value!r}.")


# ---- the simplest transformations -----------------------------------------------------------------------------------------


@transformation
def stateless(f: Callable[[PyTree, PyTree | None], PyTree]) -> GradientTransformation:
    """A transformation without state from a function of whole trees; for a function of one tensor see `leafwise`.

    Args:
        f: ``(updates, params) -> updates``.

    Example:
        >>> import torch, functorch_opt as fo
        >>> tx = fo.stateless(lambda updates, params: {k: u * len(updates) for k, u in updates.items()})
        >>> tx.update({"w": torch.tensor(1.0), "b": torch.tensor(2.0)}, ())[0]
        {'w': tensor(2.), 'b': tensor(4.)}
    """
    return GradientTransformation(
        lambda params: (), lambda updates, state, params: (f(updates, params), state)
    )
