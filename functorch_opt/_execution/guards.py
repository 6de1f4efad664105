"""What a function computes, as a key for compiled code: its bytecode, and the values that it reads.

A rule may read names of its module, and what it closes over, and these may change: a global is
bound anew, an object gets another attribute. So the key of a function has the values of all that it
reads, functions by what they compute. At every step it is asked again whether they are the same.
What cannot be looked into (an object with methods or properties) stands for itself, and a rule that
reads one is not compiled, for nobody could tell whether it has changed.
"""

from __future__ import annotations

import builtins
import types
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from functorch_opt._core.transformation import Expression

PLAIN = (
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    torch.dtype,
    torch.device,
    type(None),
    type(...),
)
OF_LIBRARIES = (
    "torch",
    "math",
    "builtins",
    "functools",
    "operator",
    "numpy",
    "optree",
    "sys",
    "typing",
    "_operator",
)
"""Packages whose names are not expected to change."""
_ABSENT = object()


class Unknown(Exception):
    """Says what a rule reads that nobody can look into."""


class Meaning:
    """What a function computes. `key` is equal for functions that compute the same."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.look()

    def look(self) -> None:
        """Work out the key anew."""
        reader = _Reader()
        self.key = reader.value(self.function)
        self.fixed = reader.fixed
        self.mutable = reader.mutable
        self.unknown = reader.unknown

    def now(self) -> Any:
        """The key of what it computes now."""
        for cell, content in self.fixed:
            if cell() is not content:
                self.look()
                return self.key
        if self.mutable:
            self.look()
        return self.key


class _Reader:
    """Goes through what a function reads.

    `fixed` is what has to be asked again, as pairs ``(get, value)``.
    """

    def __init__(self) -> None:
        self.fixed: list[tuple[Callable[[], Any], Any]] = []
        self.mutable = False
        self.unknown: str | None = None
        self.inside: set[int] = set()
        self.names: frozenset[str] = frozenset()

    def value(self, x: Any) -> Any:
        """A key that is equal for values that mean the same."""
        if isinstance(x, PLAIN):
            return type(x), repr(x)
        if id(x) in self.inside:
            return "itself"
        self.inside.add(id(x))
        try:
            return self._compound(x)
        finally:
            self.inside.discard(id(x))

    def _compound(self, x: Any) -> Any:
        if isinstance(x, types.FunctionType):
            return self._function(x)
        if isinstance(x, partial):
            return (
                "partial",
                self.value(x.func),
                self.value(x.args),
                self.value(x.keywords),
            )
        if isinstance(x, (tuple, list, frozenset, set)):
            self.mutable |= isinstance(x, (list, set))
            return type(x), tuple([self.value(of) for of in x])
        if isinstance(x, dict):
            self.mutable = True
            pairs = [(self.value(name), self.value(of)) for name, of in x.items()]
            return dict, tuple(pairs)
        if isinstance(x, types.ModuleType):
            return self._module(x)
        value = vars(x).get("value") if isinstance(x, Expression) else None
        if isinstance(value, (types.FunctionType, Expression)):
            return "schedule", self._watched(partial(getattr, x, "value"), value)
        if isinstance(x, Tensor):
            self.mutable = True
            memory = x.data_ptr() if type(x) is Tensor else 0
            return Tensor, _Same(x), x._version, memory
        return self._object(x)

    def _function(self, f: types.FunctionType) -> Any:
        if _of_library(f):
            return _Same(f)
        outer, self.names = self.names, _names(f.__code__)
        try:
            cells = [
                self._watched(partial(_content, cell), _content(cell))
                for cell in f.__closure__ or ()
            ]
            found = [(name, self._global(f, name)) for name in sorted(self.names)]
            defaults = self.value(f.__defaults__), self.value(f.__kwdefaults__)
            self.fixed.append((partial(getattr, f, "__code__"), f.__code__))
            return f.__code__, tuple(cells), defaults, tuple(found)
        finally:
            self.names = outer

    def _watched(self, get: Callable[[], Any], value: Any) -> Any:
        self.fixed.append((get, value))
        return None if value is _ABSENT else self.value(value)

    def _global(self, f: types.FunctionType, name: str) -> Any:
        if name in f.__globals__:
            get = partial(f.__globals__.get, name, _ABSENT)
            return self._watched(get, f.__globals__[name])
        return getattr(builtins, name, None) is not None

    def _module(self, module: types.ModuleType) -> Any:
        if module.__name__.partition(".")[0] in (*OF_LIBRARIES, "functorch_opt"):
            return module.__name__
        there = [name for name in sorted(self.names) if name in vars(module)]
        get = vars(module).get
        found = [
            (name, self._watched(partial(get, name, _ABSENT), get(name)))
            for name in there
        ]
        return module.__name__, tuple(found)

    def _object(self, x: Any) -> Any:
        """An object: its attributes, if nothing of its class computes anything."""
        if isinstance(x, type) or callable(x) or _of_library(type(x)):
            if not (isinstance(x, type) or _of_library(x) or _of_library(type(x))):
                self.unknown = self.unknown or f"{type(x).__name__} {_shown(x)}"
            return _Same(x)
        parts = [_computed(cls, self.names) for cls in type(x).__mro__[:-1]]
        if any(parts) or not hasattr(x, "__dict__"):
            self.unknown = self.unknown or f"{type(x).__name__} {_shown(x)}"
            return _Same(x)
        self.mutable = True
        there = [name for name in sorted(self.names) if hasattr(x, name)]
        values = [(name, self.value(getattr(x, name))) for name in there]
        return _Same(x), tuple(values)


def _computed(cls: type, names: frozenset[str]) -> bool:
    """Whether a class has a method or property of one of these names, or changes what a name is."""
    special = {"__getattr__", "__getattribute__", "__slots__", "__call__", "__getitem__"}
    here = vars(cls)
    if special & here.keys():
        return True
    return any(
        callable(here[name]) or hasattr(here[name], "__get__")
        for name in names & here.keys()
    )


def _names(code: types.CodeType) -> frozenset[str]:
    """The names that a function, and the functions in it, read of globals and attributes."""
    return frozenset(_all_names(code))


def _all_names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _all_names(constant)


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # nothing is bound yet
        return _ABSENT


def _of_library(x: Any) -> bool:
    module = getattr(x, "__module__", None) or ""
    return str(module).partition(".")[0] in OF_LIBRARIES or isinstance(
        x,
        (
            types.BuiltinFunctionType,
            types.MethodDescriptorType,
            types.WrapperDescriptorType,
        ),
    )


def _shown(x: Any) -> str:
    text = repr(x)
    return text if len(text) < 60 else text[:57] + "..."


class _Same:
    """A key for an object that is equal to itself only. It does not keep the object alive."""

    def __init__(self, value: Any) -> None:
        self.number = id(value)
        try:
            self.reference: Any = weakref.ref(value)
        except (
            TypeError
        ):  # some built-in objects take no weak reference; they live on anyway
            self.reference = lambda: value

    def __eq__(self, other: object) -> bool:
        mine = self.reference()
        return isinstance(other, _Same) and mine is not None and other.reference() is mine

    def __hash__(self) -> int:
        return self.number


def surroundings() -> Any:
    """What code depends on that no function names: autocast and the default dtype."""
    devices = [device for device in ("cpu", "cuda") if torch.is_autocast_enabled(device)]
    autocast = [(device, torch.get_autocast_dtype(device)) for device in devices]
    precision = torch.get_float32_matmul_precision()
    return tuple(autocast), torch.get_default_dtype(), precision
