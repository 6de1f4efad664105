"""The parameters of a model with all that they can be chosen by, and what chooses them.

One vocabulary says which parameters are meant: a pattern of names, a class of modules, a shape, a
function, or several of these.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from functorch_opt import tree
from functorch_opt._core.groups import check_takes_path_and_leaf
from functorch_opt.optimizers.routes import fits
from functorch_opt.tree import PyTree


class Parameter(NamedTuple):
    """A parameter, and where it is."""

    path: str
    p: Tensor
    names: tuple[str, ...]
    """All of its names. A tied weight has several, of which `path` is the first."""
    owners: tuple[nn.Module, ...]
    """The module that has it, under each of its names. In a tree of params there is none."""
    above: tuple[nn.Module, ...]
    """All modules that it is part of."""

    @property
    def last(self) -> str:
        """The last part of its path, in small letters."""
        return self.path.replace("/", ".").rpartition(".")[2].lower()


Chooser = Callable[[Parameter], bool]


def parameters_of(params: nn.Module | PyTree) -> list[Parameter]:
    """All parameters of a model or of a tree of params, in its order.

    Raises:
        ValueError: there is none; a parameter of a lazy module has no shape yet.
    """
    if isinstance(params, nn.Module):
        found = _of_module(params)
    else:
        leaves, _ = tree.flatten(params)
        pairs = zip(tree.paths(params), leaves, strict=True)
        found = [_of_tree(path, p) for path, p in pairs if p is not None]
    if not found:
        raise ValueError("there is no parameter: give a model, or a tree of params.")
    if lazy := [of.path for of in found if is_lazy(of.p)]:
        raise ValueError(
            f"these parameters have no shape yet: {told(lazy)}. Their modules are lazy: "
            "call the model with a batch once, and then make the groups."
        )
    return found


def _of_tree(path: str, p: Tensor) -> Parameter:
    """A leaf of a tree: it has one name, and belongs to no module."""
    return Parameter(path, p, (path,), (), ())


def _of_module(model: nn.Module) -> list[Parameter]:
    modules = dict(model.named_modules(remove_duplicate=False))
    names: dict[Tensor, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        names.setdefault(p, []).append(name)
    return [_placed(p, of_p, modules) for p, of_p in names.items()]


def _placed(p: Tensor, names: list[str], modules: dict[str, nn.Module]) -> Parameter:
    owners, above = [], []
    for name in names:
        around = [modules[prefix] for prefix in _prefixes(name)]
        owners.append(around[-1])
        above.extend(around)
    return Parameter(names[0], p, tuple(names), tuple(owners), tuple(above))


def _prefixes(name: str) -> list[str]:
    """``"a.b.weight"`` -> ``["", "a", "a.b"]``."""
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(len(parts))]


def chooser(which: Any, typed: bool) -> Chooser:
    """Whether a parameter is one of `which`. `typed`: they are those of a model.

    Raises:
        TypeError: `which` is none of what can choose parameters.
    """
    if isinstance(which, str):

        def by_name(of: Parameter) -> bool:
            return any(fits(name, which) for name in of.names)

        return by_name
    if isinstance(which, type) and issubclass(which, nn.Module):
        if not typed:
            raise TypeError(
                f"{which.__name__} is a class of modules, and a tree of params has none: "
                "give the model, or a pattern of names."
            )

        def by_module(of: Parameter) -> bool:
            return any(isinstance(module, which) for module in of.above)

        return by_module
    if isinstance(which, tuple):
        return _by_shape(which) if is_shape(which) else _by_any(which, typed)
    if isinstance(which, type) or not callable(which):
        raise TypeError(
            "parameters are chosen by a pattern of names ('*.bias'), a class of modules "
            "(nn.LayerNorm), a shape ((None, 768)), a function of path and parameter, or a tuple "
            f"of these; got {which!r}."
        )
    check_takes_path_and_leaf("what chooses parameters", which)

    def by_function(of: Parameter) -> bool:
        return _is_chosen(which, of)

    return by_function


def is_shape(which: tuple[Any, ...]) -> bool:
    """Whether it is a shape, and not several of what can choose."""
    return all(size is None or type(size) is int for size in which)


def _by_shape(shape: tuple[int | None, ...]) -> Chooser:
    def chosen(of: Parameter) -> bool:
        if of.p.dim() != len(shape):
            return False
        pairs = zip(of.p.shape, shape, strict=True)
        return all(wanted in (None, n) for n, wanted in pairs)

    return chosen


def _by_any(several: tuple[Any, ...], typed: bool) -> Chooser:
    choosers = [chooser(one, typed) for one in several]

    def chosen(of: Parameter) -> bool:
        return any(by(of) for by in choosers)

    return chosen


def _is_chosen(function: Callable[[str, Tensor], Any], of: Parameter) -> bool:
    answer = function(of.path, of.p)
    if not isinstance(answer, bool):
        raise TypeError(
            f"{name_of(function)} must return True or False; for {of.path!r} it returned "
            f"{type(answer).__name__} {answer!r}."
        )
    return answer


def name_of(which: Any) -> str:
    """What a table calls it."""
    if isinstance(which, str):
        return which
    if not isinstance(which, tuple):
        name = getattr(which, "__name__", None)
        return name or type(which).__name__
    if not is_shape(which):
        return " or ".join(map(name_of, which))
    sizes = ["*" if size is None else str(size) for size in which]
    return f"[{', '.join(sizes)}]"


def told(names: list[str], most: int = 8) -> str:
    """The first of these names, and how many more there are."""
    shown = ", ".join(map(repr, names[:most]))
    left = len(names) - most
    return f"{shown} and {left} more" if left > 0 else shown
