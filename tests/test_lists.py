"""Lists that must agree: exports, test rows and API page; who imports whom; examples; lengths of files."""

from __future__ import annotations

import ast
import doctest
import functools
import importlib
import inspect
import pkgutil
import re
import sys
from pathlib import Path

import pytest
import registry

import functorch_opt as fo

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "functorch_opt"
FILES = sorted(PACKAGE.rglob("*.py"))


def _path(file: Path) -> str:
    return file.relative_to(PACKAGE).as_posix()


@functools.cache
def _parse(file: Path) -> ast.Module:
    return ast.parse(file.read_text())


def _module(file: Path) -> str:
    parts = ["functorch_opt", *file.relative_to(PACKAGE).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


# ---- exports, rows, API page -------------------------------------------------------------------------------------------


def _exports(init: Path) -> dict[str, str]:
    """The names that an ``__init__.py`` re-exports with a star, ``{name: module}``."""
    names: dict[str, str] = {}
    for node in _parse(init).body:
        if isinstance(node, ast.ImportFrom) and node.names[0].name == "*":
            for name in importlib.import_module(node.module).__all__:
                assert name not in names, (
                    f"{name} is exported by {names[name]} and by {node.module}"
                )
                names[name] = node.module
    return names


PUBLIC = {
    "functorch_opt": _exports(PACKAGE / "__init__.py"),
    "functorch_opt.random": dict.fromkeys(fo.random.__all__, "functorch_opt.random.keys"),
    "functorch_opt.optim": _exports(PACKAGE / "optim" / "__init__.py"),
}
SCHEDULES = set(importlib.import_module("functorch_opt.schedules.schedules").__all__)


def _rows() -> set[str]:
    return {row.name for row in registry.ROWS}


def _difference(left: set[str], right: set[str]) -> str:
    return f"only in the first: {sorted(left - right)}; only in the second: {sorted(right - left)}"


def test_every_export_has_a_row() -> None:
    listed = _rows() | set(registry.NOT_TRANSFORMATIONS) | SCHEDULES
    assert listed == set(PUBLIC["functorch_opt"]), (
        f"tests/registry.py and the exports differ: {_difference(listed, set(PUBLIC['functorch_opt']))}"
    )
    assert len(registry.ROWS) == len(_rows())
    assert not _rows() & set(registry.NOT_TRANSFORMATIONS)


@pytest.mark.parametrize("module", PUBLIC)
def test_every_export_is_on_the_api_page(module: str) -> None:
    directives = re.findall(
        r"^::: (\S+)$", (ROOT / "docs" / "api.md").read_text(), flags=re.MULTILINE
    )
    assert len(directives) == len(set(directives)), "a name is on the API page twice"
    shown = {name.rpartition(".")[2] for name in directives if name.rpartition(".")[0] == module}
    assert shown == set(PUBLIC[module]), (
        f"docs/api.md and the exports of {module} differ: {_difference(shown, set(PUBLIC[module]))}"
    )


def test_every_directive_is_of_a_known_module() -> None:
    directives = re.findall(
        r"^::: (\S+)$", (ROOT / "docs" / "api.md").read_text(), flags=re.MULTILINE
    )
    assert {name.rpartition(".")[0] for name in directives} == set(PUBLIC)


def test_every_file_with_exports_is_exported() -> None:
    exported = {*PUBLIC["functorch_opt"].values(), *PUBLIC["functorch_opt.optim"].values()}
    exported |= {
        "functorch_opt.random.keys",
        "functorch_opt.random",
        "functorch_opt.schedules",
        "functorch_opt.tree",
    }
    having = {
        _module(file)
        for file in FILES
        if getattr(importlib.import_module(_module(file)), "__all__", None)
    }
    assert having == exported, f"exported and having exports: {_difference(exported, having)}"


# ---- floors --------------------------------------------------------------------------------------------------------------

FLOORS = {
    "_core/__init__.py": 0,
    "_core/structure.py": 0,
    "_execution/cpu_passes.py": 0,
    "_execution/kernel.py": 0,
    "_execution/trials.py": 0,
    "_execution/writes.py": 0,
    "_core/sharding.py": 1,
    "_core/numerics.py": 2,
    "_core/state.py": 2,
    "_core/checkpoint.py": 2,
    "tree.py": 3,
    "_core/transformation.py": 4,
    "_core/leaf.py": 4,
    "random/": 4,
    "_core/leafwise.py": 5,
    "_core/rule.py": 6,
    "_core/chain.py": 7,
    "_core/groups.py": 7,
    "_core/inject.py": 7,
    "schedules/": 8,
    "transforms/": 9,
    "optimizers/": 10,
    "line_search/": 10,
    "wrappers/": 11,
    "privacy/": 11,
    "_execution/": 12,
    "sweeps/": 13,
    "optim/": 13,
    "__init__.py": 14,
}
"""A file imports from lower floors only. Files of one folder may import each other: LAMB is built on Adam."""


def _floor(path: str) -> int:
    place = path if path in FLOORS else path.partition("/")[0] + "/"
    assert place in FLOORS, (
        f"{path} has no floor: add it to FLOORS, and to the table in docs/design.md"
    )
    return FLOORS[place]


def _imports(file: Path) -> list[str]:
    """The full names of the modules that a file imports, ``from a import b`` as ``a.b`` where that is a module."""
    names: list[str] = []
    for node in ast.walk(_parse(file)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{_path(file)}: import by the full name"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                names.append(inner if inner == "torch.optim" or _file(inner) else node.module)
    return names


def _file(module: str) -> Path | None:
    """The file of a module of this package."""
    if not module.startswith("functorch_opt"):
        return None
    place = PACKAGE.parent.joinpath(*module.split("."))
    return next(
        (file for file in (place.with_suffix(".py"), place / "__init__.py") if file.exists()), None
    )


@pytest.mark.parametrize("file", FILES, ids=_path)
def test_imports_point_downwards(file: Path) -> None:
    here = _floor(_path(file))
    for module in _imports(file):
        if target := _file(module):
            there = _floor(_path(target))
            within = (
                file.parent == target.parent and here == there and file.parent != PACKAGE / "_core"
            )
            assert there < here or within, (
                f"{_path(file)} (floor {here}) imports {module} (floor {there}); what both need moves down"
            )


OPTIONAL = {"privacy/private.py": "dp_accounting"}
"""What a file imports where it is used, and says how to install where it is missing."""


@pytest.mark.parametrize("file", FILES, ids=_path)
def test_the_package_needs_torch_and_optree_only(file: Path) -> None:
    at_once = {
        alias.name
        for node in _parse(file).body
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    at_once |= {node.module for node in _parse(file).body if isinstance(node, ast.ImportFrom)}
    for module in _imports(file):
        top = module.partition(".")[0]
        optional = top == OPTIONAL.get(_path(file)) and module not in at_once
        assert (
            top in sys.stdlib_module_names
            or top in ("functorch_opt", "torch", "optree")
            or optional
        ), f"{_path(file)} imports {module}"
        assert top != "optree" or _path(file) == "_core/structure.py", (
            f"{_path(file)} imports optree; only structure.py does"
        )
        assert not module.startswith("torch.optim") or _path(file).startswith("optim/"), (
            f"{_path(file)} imports torch.optim; only optim/ does"
        )
    attributes = {
        ast.unparse(node) for node in ast.walk(_parse(file)) if isinstance(node, ast.Attribute)
    }
    assert "torch.optim" not in attributes or _path(file).startswith("optim/"), (
        f"{_path(file)} uses torch.optim; only optim/ does"
    )


def test_the_floors_are_in_the_design_page() -> None:
    table = re.findall(
        r"^\| (\d+) \| (.*?) \|", (ROOT / "docs" / "design.md").read_text(), flags=re.MULTILINE
    )
    shown = {
        place: int(floor) for floor, places in table for place in re.findall(r"`([^`]+)`", places)
    }
    assert shown == FLOORS


# ---- docstrings ------------------------------------------------------------------------------------------------------------


@functools.cache
def _with_doctests() -> set[str]:
    """The full names of everything whose examples ``pytest --doctest-modules`` finds and runs."""
    finder = doctest.DocTestFinder(exclude_empty=True)
    found: set[str] = set()
    for info in pkgutil.walk_packages(fo.__path__, "functorch_opt."):
        found |= {
            test.name for test in finder.find(importlib.import_module(info.name)) if test.examples
        }
    return found


def _public_names() -> list[tuple[str, str]]:
    return [(module, name) for names in PUBLIC.values() for name, module in names.items()]


@pytest.mark.parametrize(
    ("module", "name"), _public_names(), ids=lambda value: value.removeprefix("functorch_opt.")
)
def test_docstring(module: str, name: str) -> None:
    value = getattr(importlib.import_module(module), name)
    if not (inspect.isfunction(value) or inspect.isclass(value)):
        return  # a type alias
    assert inspect.getdoc(value), f"{name} has no docstring"
    if inspect.isfunction(value) or issubclass(
        value, (fo.GradientTransformation, fo.optim.Optimizer)
    ):
        assert "Example:\n" in value.__doc__, f"{name} has no Example"
        assert f"{module}.{name}" in _with_doctests(), (
            f"the example of {name} is not found by doctest"
        )


@pytest.mark.parametrize("file", FILES, ids=_path)
def test_every_file_says_what_it_is(file: Path) -> None:
    assert ast.get_docstring(_parse(file)), f"{_path(file)} has no docstring"


# ---- lengths ---------------------------------------------------------------------------------------------------------------

LONGEST = 480
MAY_BE_LONGER = {
    "schedules/schedules.py": "one family: every schedule, and more docstring than code",
}


@pytest.mark.parametrize("file", FILES, ids=_path)
def test_length(file: Path) -> None:
    length = len(file.read_text().splitlines())
    assert length <= LONGEST or _path(file) in MAY_BE_LONGER, (
        f"{_path(file)} has {length} lines, more than {LONGEST}: is there a second family in it?"
    )
