"""The whole theory: a gradient transformation is a pair of pure functions.

    init(params) -> state
    update(updates, state, params=None, **extra) -> (updates, state)
    apply_updates(params, updates) -> params + updates

Everything else is convenience. Most transformations are one rule for one tensor, from which
`functorch_opt.leafwise` makes the pair; `functorch_opt.chain` makes one transformation of many.
"""

from __future__ import annotations

import dis
import functools
from collections.abc import Callable, Iterator, Mapping
from types import FunctionType
from typing import Any, NamedTuple, ParamSpec, TypeVar

from torch import Tensor

from functorch_opt._core import structure
from functorch_opt._core.structure import PyTree, flatten_tensors, match, paths, unflatten

__all__ = [
    "EmptyState",
    "GradientTransformation",
    "GradientTransformationExtraArgs",
    "Scalar",
    "ScalarOrSchedule",
    "Schedule",
    "apply_updates",
    "init_empty_state",
    "stateless",
    "stateless_with_tree_map",
    "transformation",
    "with_extra_args_support",
]

Scalar = float | Tensor
"""A hyperparameter: a number or a 0-dim tensor.

A tensor can be vmapped over, differentiated, and changed without recompiling.
"""
Schedule = Callable[[Tensor], Any]
"""A function of the count that gives a hyperparameter; the count is an int64 tensor."""
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


class GradientTransformationExtraArgs(GradientTransformation):
    """A `GradientTransformation` from an ``update`` in the form that optax asks for.

    There ``update`` takes every extra argument, reads those that it names, and leaves the others in
    ``**extra_args``. Here it gets those that it names. The others are ignored, as they are with
    `with_extra_args_support`, by this transformation only: a chain around it takes what its stages
    name.

    Args:
        init: ``params -> state``.
        update: ``(updates, state, params) -> (updates, state)``. It reads the arguments that it
            names after ``params``, such as ``def update(updates, state, params=None, *, value,
            **extra_args)``. One without a default is required.
        extra_args: only for wrappers, whose ``update`` hands ``**extra_args`` on: the
            ``extra_args`` of the transformation inside.
        last: see `GradientTransformation`.

    Raises:
        TypeError: ``update`` does something with its ``**extra_args``, and `extra_args` does not say
            which they are.

    Source: optax.GradientTransformationExtraArgs.

    Example:
        >>> import torch, functorch_opt as fo
        >>> def update(updates, state, params=None, *, value, **extra_args):
        ...     return [u * value for u in updates], state
        >>> tx = fo.GradientTransformationExtraArgs(fo.init_empty_state, update)
        >>> g, state = [torch.ones(1)], tx.init([torch.zeros(1)])
        >>> tx.update(g, state, value=torch.tensor(3.0), grad=g)[0]
        [tensor([3.])]
    """

    ignores = True

    def __init__(
        self,
        init: Callable[[PyTree], PyTree],
        update: Callable[..., tuple[PyTree, PyTree]],
        *,
        extra_args: Mapping[str, bool] | None = None,
        last: bool = False,
    ) -> None:
        declared = named_after_params(update) if extra_args is None else extra_args
        super().__init__(init, update, extra_args=declared, last=last)


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
            "after '*', or pass extra_args= for a wrapper. GradientTransformationExtraArgs ignores "
            "what it does not name."
        )
    return _after_star(f)


def _after_star(f: Any) -> dict[str, bool]:
    code = _code(f)
    names = code.co_varnames[code.co_argcount : code.co_argcount + code.co_kwonlyargcount]
    if not names:
        return {}
    try:
        defaults = f.__kwdefaults__ or {}
    except AttributeError:
        # The function is made inside of compiled code, and Dynamo does not know its defaults.
        defaults = {}
    return {name: name not in defaults for name in names}


def named_after_params(update: Any) -> dict[str, bool]:
    """The arguments that ``update(updates, state, params, ...)`` names after ``params``."""
    code = _code(update)
    if code.co_flags & 0x08:
        at = code.co_argcount + code.co_kwonlyargcount + bool(code.co_flags & 0x04)
        others = code.co_varnames[at]
        if _uses(code, others):
            raise TypeError(
                f"{update.__qualname__} hands on **{others}, and nothing says which they are: "
                "GradientTransformationExtraArgs(init, update, extra_args=inner.extra_args)."
            )
    first = 4 if hasattr(update, "__self__") else 3
    names = code.co_varnames[first : code.co_argcount]
    # Dynamo of torch 2.13 does not know the defaults of a function that is made in compiled code.
    defaults = (update.__defaults__ or ()) if names else ()
    required = names[: max(0, len(names) - len(defaults))]
    by_position = {name: name in required for name in names}
    return {**by_position, **_after_star(update)}


def _uses(code: Any, name: str) -> bool:
    """Whether the code does anything with an argument but ``del``."""
    if name in code.co_cellvars:
        return True
    for step in dis.get_instructions(code):
        # From Python 3.13 on one instruction may load two names.
        names = step.argval if isinstance(step.argval, tuple) else (step.argval,)
        if step.opname.startswith("LOAD_FAST") and name in names:
            return True
    return False


# This is torch.compiler.assume_constant_result, for which torch would load its compiler at once.
_uses._dynamo_marked_constant = True  # type: ignore[attr-defined]


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


class EmptyState(NamedTuple):
    """The state of a transformation that keeps nothing, in an ``init`` of yours: ``EmptyState()``.

    It is an empty tuple, and a tree without leaves. Stages of this library have ``()``.
    """


def init_empty_state(params: PyTree) -> EmptyState:
    """The ``init`` of a transformation that keeps nothing.

    Args:
        params: any tree; nothing is read.

    Source: optax.init_empty_state.

    Example:
        >>> import torch, functorch_opt as fo
        >>> fo.init_empty_state({"w": torch.zeros(2)})
        EmptyState()
    """
    return EmptyState()


@transformation
def stateless_with_tree_map(
    f: Callable[[Tensor, Tensor | None], Tensor],
) -> GradientTransformation:
    """Make a transformation without state from a function of one update and its parameter.

    `f` runs as it is written, in the dtype of the update, which steps in place do not compile. For a
    rule that they compile see `leafwise`.

    Args:
        f: ``(update, param) -> update``, called for every update that is not None. ``param`` is None
            where ``update`` is called without params.

    Raises:
        ValueError: the structures of updates and params differ.

    Source: optax.stateless_with_tree_map.

    Example:
        >>> import torch, functorch_opt as fo
        >>> tx = fo.stateless_with_tree_map(lambda u, p: u if p is None else u + 0.1 * p)
        >>> params = {"w": torch.tensor(10.0)}
        >>> tx.update({"w": torch.tensor(1.0)}, tx.init(params), params)[0]
        {'w': tensor(2.)}
    """

    def update(
        updates: PyTree, state: PyTree, params: PyTree | None
    ) -> tuple[PyTree, PyTree]:
        if params is None:
            return structure.map(lambda u: f(u, None), updates), state
        names = ("updates", "params")
        return structure.map(f, updates, params, names=names), state

    return GradientTransformation(lambda params: (), update)


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
