"""Writes `functorch_opt/_names.py`, by which a public name is found when it is first used.

Run it by ``python -m tests.lazy_names`` when a public name is new. `test_package.py` says when it is
needed.
"""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import functorch_opt

PACKAGE = Path(functorch_opt.__file__).parent
FILE = PACKAGE / "_names.py"
HEAD = '''"""Where each public name is; ``python -m tests.lazy_names`` writes this file."""

NAMES: dict[str, tuple[str, ...]] = {
'''


def starred() -> list[str]:
    """The modules whose names are public: those that type checkers read in ``__init__``."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    return [of.module for of in imports if of.module and of.names[0].name == "*"]


def text() -> str:
    lines = []
    for module in starred():
        names = importlib.import_module(module).__all__
        quoted = [f'"{name}"' for name in sorted(names)]
        end = "," if len(quoted) == 1 else ""
        line = f'    "{module}": ({", ".join(quoted)}{end}),\n'
        if len(line) > 91:
            inner = "".join(f"        {name},\n" for name in quoted)
            line = f'    "{module}": (\n{inner}    ),\n'
        lines.append(line)
    return HEAD + "".join(lines) + "}\n"


if __name__ == "__main__":
    FILE.write_text(text())
