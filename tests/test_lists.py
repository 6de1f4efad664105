"""Lists that must agree: exports, test rows and API page; who imports whom; examples; lengths."""

from __future__ import annotations

import ast
import collections
import doctest
import functools
import importlib
import inspect
import io
import pkgutil
import pydoc
import re
import sys
import tokenize
import types
from collections.abc import Iterator
from pathlib import Path

import api_tables
import pytest
import registry

import functorch_opt as fo

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "functorch_opt"
FILES = sorted(file for file in PACKAGE.rglob("*.py") if file.name != "_names.py")
"""What is written by hand."""


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
    for node in ast.walk(_parse(init)):
        if isinstance(node, ast.ImportFrom) and node.names[0].name == "*":
            for name in importlib.import_module(node.module).__all__:
                assert name not in names, (
                    f"{name} is exported by {names[name]} and by {node.module}"
                )
                names[name] = node.module
    return names


def _home_of_tree(name: str) -> str:
    """The module with a function of `fo.tree`; one with another name at home is listed there too."""
    value = getattr(fo.tree, name)
    is_own = inspect.isfunction(value) and value.__name__ == name
    return value.__module__ if is_own else "functorch_opt.tree"


PUBLIC = {
    "functorch_opt": _exports(PACKAGE / "__init__.py"),
    "functorch_opt.projections": dict.fromkeys(
        fo.projections.__all__, "functorch_opt.projections"
    ),
    "functorch_opt.random": dict.fromkeys(fo.random.__all__, "functorch_opt.random.keys"),
    "functorch_opt.schedules": {"preview": "functorch_opt.schedules.preview"},
    "functorch_opt.tree": {name: _home_of_tree(name) for name in fo.tree.__all__},
    "functorch_opt.optim": _exports(PACKAGE / "optim" / "__init__.py"),
}
SCHEDULES = set(fo.schedules.__all__) - PUBLIC["functorch_opt.schedules"].keys()


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
def test_every_export_is_on_one_api_page(module: str) -> None:
    directives = api_tables.directives()
    assert len(directives) == len(set(directives)), "a name is in docs/api/ twice"
    whole = api_tables.WHOLE
    shown = {
        name.rpartition(".")[2]
        for name in directives
        if name.rpartition(".")[0] == module and name not in whole
    }
    shown |= {name for name, home in PUBLIC[module].items() if home in whole}
    assert set(directives) >= whole
    assert shown == set(PUBLIC[module]), (
        f"docs/api/ and the exports of {module} differ: {_difference(shown, set(PUBLIC[module]))}"
    )


def test_every_directive_is_of_a_known_module() -> None:
    assert {name.rpartition(".")[0] for name in api_tables.directives()} == set(PUBLIC)


@pytest.mark.parametrize("page", api_tables.PAGES, ids=lambda page: page.stem)
def test_the_table_of_an_api_page_is_current(page: Path) -> None:
    text = page.read_text()
    assert text == api_tables.with_table(text), "run `python -m tests.api_tables`"
    assert api_tables.MARK in text
    rows = re.findall(r"^\| \[.*\]\[.*\] \| (.*) \|$", text, flags=re.MULTILINE)
    assert rows and all(rows), "a name without a docstring"


def test_the_api_page_leads_to_every_page() -> None:
    linked = re.findall(r"\(api/([\w-]+)\.md\)", (ROOT / "docs" / "api.md").read_text())
    assert sorted(linked) == [page.stem for page in api_tables.PAGES]


def test_dir_is_the_api() -> None:
    modules = {name.partition(".")[2] for name in PUBLIC} - {""}
    wanted = {"__version__", *modules, *PUBLIC["functorch_opt"]}
    assert dir(fo) == sorted(fo.__all__) == sorted(wanted)
    assert dir(fo.tree) == sorted(fo.tree.__all__)
    for package in (fo.optim, fo.random, fo.schedules):
        assert dir(package) == sorted(package.__all__)
        public = [getattr(package, name) for name in package.__all__]
        assert not any(isinstance(x, types.ModuleType) for x in public)


def test_pydoc_shows_the_api() -> None:
    text = pydoc.render_doc(fo, renderer=pydoc.plaintext)
    api = {name: getattr(fo, name) for name in PUBLIC["functorch_opt"]}
    functions, data = text[text.index("\nFUNCTIONS") :].split("\nDATA")
    shown = set(re.findall(r"^    (\w+)\(", functions, flags=re.MULTILINE))
    assert shown == {name for name, value in api.items() if inspect.isfunction(value)}
    shown |= set(re.findall(r"^    class (\w+)\(", text, flags=re.MULTILINE))
    shown |= set(re.findall(r"^    (\w+) = ", data, flags=re.MULTILINE))
    # From Python 3.11 on ``Any`` is a class, and another name for it is shown as one.
    shown |= set(re.findall(r"^    (\w+) = class Any", text, flags=re.MULTILINE))
    assert set(api) <= shown, f"pydoc does not show {sorted(set(api) - shown)}"


def test_every_file_with_exports_is_exported() -> None:
    exported = {
        *PUBLIC["functorch_opt"].values(),
        *PUBLIC["functorch_opt.optim"].values(),
    }
    exported |= {
        "functorch_opt",
        "functorch_opt.optim",
        "functorch_opt.projections",
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
    assert having == exported, (
        f"exported and having exports: {_difference(exported, having)}"
    )


# ---- floors --------------------------------------------------------------------------------------------------------------

FLOORS = {
    "_names.py": 0,
    "_elsewhere.py": 0,
    "_core/__init__.py": 0,
    "_core/extra.py": 0,
    "_core/in_graph.py": 0,
    "_core/structure.py": 1,
    "_core/decision.py": 0,
    "_execution/writes.py": 0,
    "_execution/cpu_passes.py": 0,
    "_execution/table.py": 0,
    "_execution/launches.py": 0,
    "_execution/c_function.py": 1,
    "_execution/trials.py": 2,
    "_execution/kernel.py": 3,
    "_core/owned.py": 0,
    "_core/exchange.py": 1,
    "_core/sharding.py": 2,
    "_core/on_owner.py": 3,
    "_core/arithmetic.py": 3,
    "_core/numerics.py": 3,
    "_core/names_of_types.py": 3,
    "_core/state.py": 3,
    "_core/checkpoint.py": 3,
    "random/": 3,
    "tree.py": 4,
    "_core/transformation.py": 5,
    "projections.py": 5,
    "_core/leaf.py": 6,
    "_core/owners.py": 6,
    "_core/sums.py": 6,
    "_core/replicas.py": 7,
    "_core/once.py": 7,
    "_core/one_tensor.py": 7,
    "_core/leafwise.py": 7,
    "_core/wrapped.py": 7,
    "_core/rule.py": 8,
    "_core/chain.py": 9,
    "_core/groups.py": 9,
    "_core/inject.py": 9,
    "_core/wrap.py": 9,
    "_core/gate.py": 9,
    "_core/points.py": 10,
    "schedules/": 10,
    "transforms/": 11,
    "optimizers/": 12,
    "line_search/": 12,
    "wrappers/": 12,
    "codecs/": 12,
    "_execution/": 13,
    "privacy/": 13,
    "sweeps/": 14,
    "optim/": 14,
    "__init__.py": 15,
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
                names.append(
                    inner if inner == "torch.optim" or _file(inner) else node.module
                )
    return names


def _file(module: str) -> Path | None:
    """The file of a module of this package."""
    if not module.startswith("functorch_opt"):
        return None
    place = PACKAGE.parent.joinpath(*module.split("."))
    return next(
        (
            file
            for file in (place.with_suffix(".py"), place / "__init__.py")
            if file.exists()
        ),
        None,
    )


@pytest.mark.parametrize("file", FILES, ids=_path)
def test_imports_point_downwards(file: Path) -> None:
    here = _floor(_path(file))
    for module in _imports(file):
        if target := _file(module):
            there = _floor(_path(target))
            within = (
                file.parent == target.parent
                and here == there
                and file.parent != PACKAGE / "_core"
            )
            assert there < here or within, (
                f"{_path(file)} (floor {here}) imports {module} (floor {there}); what both need moves down"
            )


OPTIONAL = {"privacy/accounting.py": "dp_accounting"}
"""What a file imports where it is used, and says how to install where it is missing."""


@pytest.mark.parametrize("file", FILES, ids=_path)
def test_the_package_needs_torch_and_optree_only(file: Path) -> None:
    at_once = {
        alias.name
        for node in _parse(file).body
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    at_once |= {
        node.module for node in _parse(file).body if isinstance(node, ast.ImportFrom)
    }
    for module in _imports(file):
        top = module.partition(".")[0]
        optional = top == OPTIONAL.get(_path(file)) and module not in at_once
        assert (
            top in sys.stdlib_module_names
            or top in ("functorch_opt", "torch", "optree")
            or optional
        ), f"{_path(file)} imports {module}"
        of_trees = "_core/structure.py", "_core/in_graph.py"
        assert top != "optree" or _path(file) in of_trees, (
            f"{_path(file)} imports optree; only structure.py and in_graph.py do"
        )
        assert not module.startswith("torch.optim") or _path(file).startswith("optim/"), (
            f"{_path(file)} imports torch.optim; only optim/ does"
        )
    attributes = {
        ast.unparse(node)
        for node in ast.walk(_parse(file))
        if isinstance(node, ast.Attribute)
    }
    assert "torch.optim" not in attributes or _path(file).startswith("optim/"), (
        f"{_path(file)} uses torch.optim; only optim/ does"
    )


def test_the_floors_are_in_the_design_page() -> None:
    table = re.findall(
        r"^\| (\d+) \| (.*?) \|",
        (ROOT / "docs" / "design.md").read_text(),
        flags=re.MULTILINE,
    )
    shown = {
        place: int(floor)
        for floor, places in table
        for place in re.findall(r"`([^`]+)`", places)
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
            test.name
            for test in finder.find(importlib.import_module(info.name))
            if test.examples
        }
    return found


def _public_names() -> list[tuple[str, str]]:
    return [(module, name) for names in PUBLIC.values() for name, module in names.items()]


@pytest.mark.parametrize(
    ("module", "name"),
    _public_names(),
    ids=lambda value: value.removeprefix("functorch_opt."),
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
        is_function = inspect.isfunction(value)
        home = f"{value.__module__}.{value.__name__}"
        assert (home if is_function else f"{module}.{name}") in _with_doctests(), (
            f"the example of {name} is not found by doctest"
        )


@pytest.mark.parametrize("file", FILES, ids=_path)
def test_every_file_says_what_it_is(file: Path) -> None:
    assert ast.get_docstring(_parse(file)), f"{_path(file)} has no docstring"


@pytest.mark.parametrize("file", FILES, ids=_path)
def test_names_in_docstrings_exist(file: Path) -> None:
    for name in set(re.findall(r"\bfunctorch_opt(?:\.[A-Za-z_]\w*)+", file.read_text())):
        value, known = fo, "functorch_opt"
        for part in name.split(".")[1:]:
            known = f"{known}.{part}"
            assert hasattr(value, part), f"{_path(file)} names {name}"
            value = getattr(value, part)


# ---- the house -------------------------------------------------------------------------------------------------------------

TOKENS_IN_A_LINE, TOKENS_ON_AVERAGE = 40, 9
LINES_OF_A_FUNCTION, LINES_OF_A_FILE = 40, 299


@functools.cache
def _tokens(file: Path) -> dict[int, int]:
    """``{line: how many tokens}`` of the lines with code: no blank, no comment, no docstring."""
    docstrings = {
        line
        for node in ast.walk(_parse(file))
        if isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
        for line in range(node.lineno, node.end_lineno + 1)
    }
    silent = ("COMMENT", "NL", "NEWLINE", "INDENT", "DEDENT", "ENDMARKER")
    count: dict[int, int] = collections.Counter()
    depth = (
        0  # of f-strings: from Python 3.12 on they are several tokens, and count as one
    )
    for token in tokenize.generate_tokens(io.StringIO(file.read_text()).readline):
        name = tokenize.tok_name[token.type]
        if name.endswith("STRING_END"):
            depth -= 1
            continue
        if not depth and name not in silent and token.start[0] not in docstrings:
            count[token.start[0]] += 1
        depth += name.endswith("STRING_START")
    return count


def _functions(node: ast.AST, name: str = "") -> Iterator[tuple[str, ast.FunctionDef]]:
    """Every function below `node`, by its name within the file: ``Class.method.inner``."""
    for child in ast.iter_child_nodes(node):
        here = name
        if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
            here = f"{name}.{child.name}".removeprefix(".")
        if isinstance(child, ast.FunctionDef):
            yield here, child
        yield from _functions(child, here)


def _over_budget(file: Path) -> dict[str, int]:
    tokens, path = _tokens(file), _path(file)
    over = {}
    if len(tokens) > LINES_OF_A_FILE:
        over[path] = len(tokens)
    if long := sum(n > TOKENS_IN_A_LINE for n in tokens.values()):
        over[f"{path}: lines with too many tokens"] = long
    for name, node in _functions(_parse(file)):
        length = sum(node.lineno <= line <= node.end_lineno for line in tokens)
        if length > LINES_OF_A_FUNCTION:
            over[f"{path}:{name}"] = max(length, over.get(f"{path}:{name}", 0))
    return over


@pytest.mark.parametrize("file", FILES, ids=_path)
def test_the_budgets_of_a_file(file: Path) -> None:
    """Lines, functions and files are so short that each can be read at once."""
    over = _over_budget(file)
    assert not over, f"longer than the budget: {over}"


def test_a_line_has_few_tokens() -> None:
    counts = [n for file in FILES for n in _tokens(file).values()]
    assert sum(counts) <= TOKENS_ON_AVERAGE * len(counts)


def test_what_counts_as_code(tmp_path: Path) -> None:
    """A docstring, a comment and a blank line are none; an f-string is one token."""
    file = tmp_path / "example.py"
    file.write_text(
        '"""Says what it is."""\n\n# Why.\nx = f"{1 + 1} {2}"\n"""What x is."""\n'
    )
    assert _tokens(file) == {4: 3}
