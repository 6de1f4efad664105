"""Writes the table at the head of each page in ``docs/api/``: its names, and what each does.

Run it by ``python -m tests.api_tables`` when a name or the first line of a docstring is new.
`test_lists.py` says when it is needed.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs" / "api").glob("*.md"))
DIRECTIVE = re.compile(r"^::: (\S+)$", flags=re.MULTILINE)
MARK = "<!-- names -->"
TABLE = re.compile(rf"{MARK}\n+(?:\|.*\n)*\n*")
WHOLE = {"functorch_opt.optim.ready"}
"""Files that a page shows by one directive, with all their names."""


def directives() -> list[str]:
    """The full names that the pages show."""
    return [name for page in PAGES for name in DIRECTIVE.findall(page.read_text())]


def written_below(module: str, name: str) -> str:
    """The string below the assignment of a name that is neither a function nor a class."""
    body = ast.parse(inspect.getsource(importlib.import_module(module))).body
    for node, below in pairwise(body):
        assigned = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name
        if assigned and isinstance(below, ast.Expr):
            return inspect.cleandoc(ast.literal_eval(below.value))
    return ""


def what_it_does(full_name: str) -> str:
    """The first sentence of the docstring, or of the string below, as the cell of a table."""
    module, _, name = full_name.rpartition(".")
    value = getattr(importlib.import_module(module), name)
    source = SOURCES.get(full_name)
    text = written_below(source, name) if source else inspect.getdoc(value)
    assert text, f"{full_name} has no docstring, or no line in SOURCES"
    sentence = re.split(r"(?<=[a-z)`\]]\.)\s|\n\n", text, maxsplit=1)[0]
    return " ".join(sentence.split()).rstrip(".:;").replace("``", "`")


OPTAX_TYPES = (
    "ArrayTree",
    "OptState",
    "Params",
    "TransformInitFn",
    "TransformUpdateExtraArgsFn",
    "TransformUpdateFn",
    "Updates",
)
SOURCES = {
    **{
        f"functorch_opt.{name}": "functorch_opt._core.names_of_types"
        for name in OPTAX_TYPES
    },
    "functorch_opt.MaskOrFn": "functorch_opt._core.groups",
    "functorch_opt.Scalar": "functorch_opt._core.transformation",
    "functorch_opt.ScalarOrSchedule": "functorch_opt._core.transformation",
    "functorch_opt.Schedule": "functorch_opt._core.transformation",
    "functorch_opt.tree.TINY": "functorch_opt._core.numerics",
    "functorch_opt.tree.PyTree": "functorch_opt._core.structure",
}
"""Where names that are neither functions nor classes are written."""


def with_table(text: str) -> str:
    """The page, with its table."""
    names = [name for name in DIRECTIVE.findall(text) if name not in WHOLE]
    rows = [
        f"| [`{name.rpartition('.')[2]}`][{name}] | {what_it_does(name)} |\n"
        for name in names
    ]
    table = f"{MARK}\n\n| name | what it does |\n|---|---|\n{''.join(rows)}\n"
    return TABLE.sub(lambda _: table, text, count=1)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(with_table(page.read_text()))
