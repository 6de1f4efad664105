"""The whole theory: a gradient transformation is a pair of pure functions.

    init(params) -> state
    update(updates, state, params=None, **extra) -> (updates, state)
    apply_updates(params, updates) -> params + updates

Everything else is convenience. Most transformations are one rule for one tensor, from which
`functorch_opt.leafwise` makes the pair; `functorch_opt.chain` makes one transformation of many.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
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
    "with_extra_args_support",
]

Scalar = float | Tensor
"""A hyperparameter: a number or a 0-dim tensor.

A tensor can be vmapped over, differentiated, and changed without recompiling.
"""
Schedule = Callable[[Tensor], Any]
ScalarOrSchedule = Scalar | Schedule
"""A hyperparameter, or a function of the count that gives it."""


# ---- objects that know how they were written ---------------------------------------------------


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


def _call(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    return function(*args, **kwargs)


P = ParamSpec("P")
T = TypeVar("T", bound="GradientTransformation")


def transformation(factory: Callable[P, T]) -> Callable[P, T]:
    """Decorate a function that builds a transformation.

    What it builds then carries the name of the function, prints as the call, and can be pickled.

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


# ---- the pair ----------------------------------------------------------------------------------


class GradientTransformation(Expression):
    """A pure function of gradients that has a state.

    Its two halves are ``init(params)`` and ``update(updates, state, params=None, **extra)``;
    ``init, update = adam(0.1)`` takes them apart.

    Build one directly from two functions of whole trees. What you nearly always want is a rule for
    one tensor; for that see `leafwise`.

    Args:
        init: ``params -> state``. A state consists of tensors in dicts, tuples and NamedTuples.
        update: ``(updates, state, params) -> (updates, state)``. Extra arguments are declared by
            naming them after ``*``: ``def update(updates, state, params, *, value)``.
        extra_args: only for wrappers, whose ``update`` takes ``**extra``: the ``extra_args`` of the
            transformation inside.

    Attributes:
        name: the key under which `chain` keeps its state.
        extra_args: the extra arguments that ``update`` reads, ``{name: required}``.
        last: whether it looks at the new parameters, ``params + updates``, so that nothing may
            change the updates after it.

    Example:
        >>> import torch, functorch_opt as fo
        >>> def init(params):
        ...     return ()
        >>> def update(updates, state, params):
        ...     return [-u for u in updates], state
        >>> negate = fo.GradientTransformation(init, update)
        >>> negate.update([torch.tensor(2.0)], negate.init([torch.tensor(0.0)]))[0]
        [tensor(-2.)]
    """

    last: bool = False
    ignores: bool = False
    """Whether extra arguments that nothing reads are no error."""

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

    def __iter__(self) -> Iterator[Callable[..., Any]]:
        """The two halves, as in optax, where a transformation is a pair."""
        yield self.init
        yield self.update

    def init(self, params: PyTree) -> PyTree:
        """The state before the first update.

        Raises:
            TypeError: a leaf of `params` is not a tensor or None.
            ValueError: `params` has no tensor at all.
        """
        leaves, _ = flatten_tensors(params, "params")
        if all(leaf is None for leaf in leaves):
            raise ValueError(
                "params holds no tensor: there is nothing to optimize. "
                "Was the generator of parameters already used up?"
            )
        return self._init(params)

    def update(
        self, updates: PyTree, state: PyTree, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, PyTree]:
        """The transformed updates and the next state. No argument is modified.

        Args:
            updates: a tree of the structure of the params: gradients, or what an earlier stage made
                of them. ``None`` stands for no gradient.
            state: what `init` or the last `update` returned.
            params: the current parameters; some stages need them.
            **extra: what the stages declare, e.g. ``value=loss``.

        Raises:
            TypeError: an extra argument that no stage declares, or a required one that is missing.
            ValueError: structures or shapes that do not fit, params missing, the state of another
                transformation.
        """
        return self._update(updates, state, params, **self.read_of(extra))

    def read_of(self, extra: dict[str, Any]) -> dict[str, Any]:
        """Those of the extra arguments that ``update`` reads.

        Raises:
            TypeError: one is undeclared, unless these are ignored; one is required and missing.
        """
        undeclared = [name for name in extra if name not in self.extra_args]
        if undeclared and not self.ignores:
            declared = ", ".join(sorted(self.extra_args)) or "none"
            raise TypeError(
                f"{self.name}.update got {', '.join(undeclared)}, which no stage reads. "
                f"Declared extra arguments: {declared}. "
                "With with_extra_args_support(...) around it, others are ignored."
            )
        missing = [
            name
            for name, required in self.extra_args.items()
            if required and name not in extra
        ]
        if missing:
            given = ", ".join(f"{name}=..." for name in missing)
            raise TypeError(
                f"{self.name} reads {', '.join(missing)}: "
                f"call update(updates, state, params, {given})."
            )
        if not undeclared:
            return extra
        return {name: value for name, value in extra.items() if name in self.extra_args}


def apply_updates(params: PyTree, updates: PyTree) -> PyTree:
    """``params + updates``, each sum rounded once to the dtype of the parameter.

    Args:
        params: tree of tensors.
        updates: tree of the same structure; where it is ``None``, the parameter stays as it is.

    Raises:
        ValueError: the structures, or two shapes, differ; an update that its parameter cannot hold
            (complex into real).
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
            if (
                p is None
                or p.shape != u.shape
                or (p.dtype is not u.dtype and _rank(u) > _rank(p))
            ):
                there = "None" if p is None else f"{p.dtype} of shape {tuple(p.shape)}"
                given = f"{u.dtype} of shape {tuple(u.shape)}"
                raise ValueError(
                    f"the update at {paths(params)[i]!r} is {given}, its parameter {there}: "
                    "nothing is broadcast or cut off."
                )
            p = p + u if p.dtype is u.dtype else (p + u).to(p.dtype)
        new.append(p)
    return unflatten(spec, new)


def _rank(x: Tensor) -> int:
    """Integers fit into reals, and reals into complex numbers, but not the other way."""
    return 2 if x.is_complex() else int(x.is_floating_point())


# ---- reading signatures (plain attributes, so that torch.compile can trace a factory) ----------


def positional(f: Any) -> tuple[str, ...]:
    code = _code(f)
    if code.co_flags & (0x04 | 0x08):
        raise TypeError(
            f"{f.__qualname__} takes *args or **kwargs; its arguments must be named, "
            "for their names say what it reads."
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
    except AttributeError:
        # The function is made inside of compiled code, and Dynamo does not know its defaults.
        defaults = {}
    return {name: name not in defaults for name in names}


def _code(f: Any) -> Any:
    if not hasattr(f, "__code__"):
        raise TypeError(
            f"{f!r} must be a plain function: the names of its arguments say what it reads."
        )
    return f.__code__


def enclosing_name(f: Any) -> str:
    # Python 3.10 has only the latter, and Dynamo of torch 2.11 only the former.
    name: str = getattr(_code(f), "co_qualname", None) or f.__qualname__
    outermost = name.split(".<locals>")[0]
    own = outermost.rsplit(".", 1)[-1]
    return own.replace("<lambda>", "leafwise")


# ---- hyperparameter checks, for factories ------------------------------------------------------


def check_number(name: str, value: Any) -> None:
    """Raise TypeError for what cannot be a hyperparameter."""
    number = isinstance(value, (int, float, Tensor)) and not isinstance(value, bool)
    if not (number or callable(value)):
        raise TypeError(
            f"{name} must be a number, a 0-dim tensor or a schedule (a function of the "
            f"count); got {type(value).__name__} {value!r}."
        )
    if isinstance(value, Tensor) and value.dim() > 1:
        raise TypeError(
            f"{name} must be a 0-dim tensor; got shape {tuple(value.shape)}. "
            "To train with many values at once, vmap over it."
        )


def check_range(
    low: float, high: float, *, above: bool = False, closed: bool = False, **hyper: Any
) -> None:
    """Raise ValueError for a number outside of ``[low, high)``.

    With `above` it must not be `low`, and with `closed` it may be `high`. NaN is outside. The values
    of tensors and schedules are not checked. What is neither is a TypeError.
    """
    for name, value in hyper.items():
        if value is None:
            continue  # left out; whoever needs it says so
        check_number(name, value)
        if not isinstance(value, (int, float)):
            continue
        is_inside = low <= value <= high
        is_low = above and value == low
        is_high = not closed and value == high
        if not is_inside or is_low or is_high:
            first, last = "(" if above else "[", "]" if closed else ")"
            raise ValueError(
                f"{name} must be in {first}{low}, {high}{last}; got {value}."
            )


def check_whole(least: int, **given: Any) -> None:
    """Raise ValueError for anything but a whole number, of at least `least`."""
    for name, n in given.items():
        if isinstance(n, bool) or not isinstance(n, int) or n < least:
            raise ValueError(f"{name} must be a whole number from {least}; got {n!r}.")


def check_choice(*choices: Any, **options: Any) -> None:
    """Raise ValueError for an option that is none of these."""
    for name, value in options.items():
        if value not in choices:
            known = " or ".join(map(repr, choices))
            raise ValueError(f"{name} must be {known}; got {value!r}.")


# ---- the simplest transformations --------------------------------------------------------------


@transformation
def stateless(f: Callable[[PyTree, PyTree | None], PyTree]) -> GradientTransformation:
    """Make a transformation without state from a function of whole trees.

    For a function of one tensor see `leafwise`.

    Args:
        f: ``(updates, params) -> updates``.

    Example:
        >>> import torch, functorch_opt as fo
        >>> def times_their_number(updates, params):
        ...     return {name: u * len(updates) for name, u in updates.items()}
        >>> tx = fo.stateless(times_their_number)
        >>> tx.update({"w": torch.tensor(1.0), "b": torch.tensor(2.0)}, ())[0]
        {'w': tensor(2.), 'b': tensor(4.)}
    """
    return GradientTransformation(
        lambda params: (), lambda updates, state, params: (f(updates, params), state)
    )


def with_extra_args_support(tx: T) -> T:
    """The same transformation, which ignores extra arguments that it does not read.

    Every transformation takes extra arguments, and hands them to the stages that name them. One
    that no stage names is an error, because it may be misspelt. A training loop for any optimizer,
    which gives ``value=loss`` to all of them, is written with this. Give it the whole chain: what is
    around it, such as another chain, still takes only the arguments that are read.

    Args:
        tx: any transformation. It stays as it is, and its state has the same form.

    Raises:
        TypeError: `tx` is not a transformation.

    Source: optax.with_extra_args_support.

    Example:
        >>> import torch, functorch_opt as fo
        >>> tx = fo.with_extra_args_support(fo.sgd(1.0))
        >>> params = [torch.zeros(1)]
        >>> tx.update([torch.ones(1)], tx.init(params), params, value=torch.tensor(0.5))[0]
        [tensor([-1.])]
    """
    if not isinstance(tx, GradientTransformation):
        raise TypeError(
            "with_extra_args_support takes a transformation, e.g. adamw(1e-3); "
            f"got {type(tx).__name__} {tx!r}."
        )
    made: T = object.__new__(type(tx))
    vars(made).update(vars(tx))
    made.ignores, made.call = True, (with_extra_args_support, (tx,), {})
    return made
