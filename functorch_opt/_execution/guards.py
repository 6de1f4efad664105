"""What a function computes, as a key for compiled code: its bytecode, and the values that it reads.

A rule may read names of its module, and what it closes over, and these may change: a global is
bound anew, an object gets another attribute. So the key of a function has the values of all that it
reads, functions by what they compute. At every step it is asked again whether they are the same.
What cannot be looked into (an object with methods or properties) stands for itself, and a rule that
reads one is not compiled, for nobody could tell whether it has changed.

Compiled code may have the numbers of a small tensor in it. Those of one in the memory of the host
are part of the key. On a GPU the host would have to wait for them, so that a change there is seen
only if it is one of the tensor itself, and not of its ``data``.
"""

from __future__ import annotations

import builtins
import types
import weakref
from collections.abc import Callable, Iterator
from enum import Enum, EnumMeta
from functools import partial
from typing import Any

import torch
from torch import Tensor

from functorch_opt._core import sharding
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
FOR_EVER = (
    object,
    range,
    slice,
    torch.layout,
    torch.memory_format,
    torch.finfo,
    torch.iinfo,
    type(NotImplemented),
)
"""Types of libraries whose objects never change."""
BY_TEXT = frozenset({"getattr", "hasattr", "vars", "globals", "__dict__"})
"""What finds a value by a name that is given as text."""
FEW = 16
"""Up to so many numbers of a tensor may be constants of compiled code."""
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
        self.inside: set[Any] = set()
        self.names: frozenset[str] = frozenset()

    def value(self, x: Any) -> Any:
        """A key that is equal for values that mean the same."""
        if isinstance(x, PLAIN):
            return type(x), repr(x)
        # A function reads the same names every time, and an object has others read by each.
        names = frozenset() if isinstance(x, types.FunctionType) else self.names
        now = id(x), names
        if now in self.inside:
            return "itself"
        self.inside.add(now)
        try:
            return self._compound(x)
        finally:
            self.inside.discard(now)

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
            return type(x), tuple([self.value(of) for of in x]), self._attributes(x)
        if isinstance(x, dict):
            self.mutable = True
            pairs = [(self.value(name), self.value(of)) for name, of in x.items()]
            return dict, tuple(pairs), self._attributes(x)
        if isinstance(x, types.ModuleType):
            return self._module(x)
        value = vars(x).get("value") if isinstance(x, Expression) else None
        if isinstance(value, (types.FunctionType, Expression)):
            return "schedule", self._watched(partial(getattr, x, "value"), value)
        if isinstance(x, Tensor):
            self.mutable = True
            return Tensor, _Same(x), x._version, *_in_memory(x)
        if isinstance(x, (types.MethodType, types.BuiltinMethodType)):
            return self._method(x)
        if type(x).__module__ == "numpy" and hasattr(x, "tobytes"):
            self.mutable = True
            return "array", str(x.dtype), x.shape, x.tobytes()
        if isinstance(x, type):
            return self._class(x)
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
            of_function = [
                self._watched(partial(getattr, f, name), getattr(f, name))
                for name in ("__defaults__", "__kwdefaults__")
            ]
            self.names |= outer  # who calls it may read its attributes as well
            attributes = self._attributes(f)
            self.fixed.append((partial(getattr, f, "__code__"), f.__code__))
            return f.__code__, tuple(cells), *of_function, tuple(found), attributes
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

    def _attributes(self, x: Any) -> Any:
        """Those of its own attributes that are read, where it has any."""
        own: dict[str, Any] = getattr(x, "__dict__", {})
        there = sorted(self.names & own.keys())
        return tuple(
            [
                (name, self._watched(partial(own.get, name, _ABSENT), own[name]))
                for name in there
            ]
        )

    def _method(self, x: Any) -> Any:
        """A method that is bound to an object: what it is of, and its name."""
        of = x.__self__
        if of is None or isinstance(of, (type, types.ModuleType)):
            return _Same(x) if _of_library(x) else self._unknown(x)
        function = x.__func__ if isinstance(x, types.MethodType) else None
        return x.__name__, self.value(function), self.value(of)

    def _class(self, x: type) -> Any:
        """A class: those of its attributes that are read."""
        ours = x.__module__.partition(".")[0] == "functorch_opt"
        if ours or _of_library(x) or isinstance(x, EnumMeta):
            return _Same(x)
        if type(x) is not type:
            return self._unknown(x)
        self.mutable = True
        bases = [vars(base) for base in x.__mro__ if not _of_library(base)]
        there = [(name, of) for of in bases for name in sorted(self.names & of.keys())]
        return _Same(x), tuple([(name, self._member(of[name])) for name, of in there])

    def _member(self, x: Any) -> Any:
        """What stands in a class. A method reads attributes of what it is called with."""
        if isinstance(x, staticmethod):
            return self.value(x.__func__)
        if isinstance(x, (types.FunctionType, classmethod, property)):
            return self._unknown(x)
        return _Same(x) if hasattr(type(x), "__get__") else self.value(x)

    def _unknown(self, x: Any) -> Any:
        self.unknown = self.unknown or f"{type(x).__name__} {_shown(x)}"
        return _Same(x)

    def _object(self, x: Any) -> Any:
        """An object: its attributes, if nothing of its class computes anything."""
        if callable(x) and not isinstance(x, torch.nn.Module):
            known = _of_library(x) or _of_library(type(x))
            return _Same(x) if known else self._unknown(x)
        if isinstance(x, Enum) or type(x).__module__ == "typing" or type(x) in FOR_EVER:
            return _Same(x)
        parts = [_computed(cls, self.names) for cls in type(x).__mro__[:-1]]
        looks_inside = hasattr(x, "__dict__") and not _of_library(type(x))
        if any(parts) or not looks_inside:
            return self._unknown(x)
        self.mutable = True
        there = [name for name in sorted(self.names) if hasattr(x, name)]
        values = [(name, self.value(getattr(x, name))) for name in there]
        return _Same(x), tuple(values)


def _in_memory(x: Tensor) -> tuple[Any, ...]:
    """Where the numbers of a tensor lie; and the numbers, if they may be constants of code."""
    if type(x) not in sharding.PLAIN or x.is_meta:
        return ()
    if x.device.type != "cpu" or x.layout is not torch.strided or x.numel() > FEW:
        return (x.data_ptr(),)
    return x.data_ptr(), repr(x.tolist())


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
    by_text = not BY_TEXT.isdisjoint(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _all_names(constant)
        elif by_text and isinstance(constant, str):
            yield constant


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
