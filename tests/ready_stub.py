"""Writes `functorch_opt/optim/ready.pyi`, from which type checkers, editors and the API page know
the classes of `ready.py`.

Run it by ``python -m tests.ready_stub`` when a factory is new or has other arguments.
`test_ready.py` says when it is needed.
"""

from __future__ import annotations

import inspect
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from functorch_opt.optim import ready

FILE = Path(ready.__file__).with_suffix(".pyi")
HOMES = {
    "Any": "typing",
    "Callable": "collections.abc",
    "Coefficients": "functorch_opt.optimizers.orthogonal",
    "Iterable": "collections.abc",
    "LabelsOrFn": "functorch_opt._core.groups",
    "Literal": "typing",
    "Mapping": "collections.abc",
    "MaskOrFn": "functorch_opt._core.groups",
    "MatrixDims": "functorch_opt.optimizers.matrices",
    "Scalar": "functorch_opt._core.transformation",
    "ScalarOrSchedule": "functorch_opt._core.transformation",
    "Scaling": "functorch_opt.optimizers.matrices",
    "Tensor": "torch",
}
"""Where the names in annotations are from; those that are not here are the factory's file's own."""
BUILTINS = {"None", "bool", "dict", "float", "int", "list", "str", "tuple"}
HEAD = '''"""Each ready-made optimizer as a class; ``python -m tests.ready_stub`` writes this file."""
'''
CLASS = '''
class {name}(Ready):
    """{doc}"""

    def __init__(
        self,
{arguments}
    ) -> None: ...
'''
READY = """
class Ready(Optimizer): ...
"""


def written_default(value: Any) -> str:
    if isinstance(value, (bool, int, float, str, tuple, torch.dtype, type(None))):
        return repr(value).replace("'", '"')
    return "..."


def written_arguments(cls: type) -> str:
    lines, starred = [], False
    for p in inspect.signature(cls).parameters.values():
        if p.kind is p.KEYWORD_ONLY and not starred:
            lines.append("*")
            starred = True
        default = "" if p.default is p.empty else f" = {written_default(p.default)}"
        lines.append(f"{p.name}: {p.annotation}{default}".replace("'", '"'))
    return "\n".join([f"        {line}," for line in lines])


def imports(classes: list[type[ready.Ready]]) -> str:
    homes = defaultdict(set)
    homes["functorch_opt.optim.adapter"].add("Optimizer")
    for cls in classes:
        for p in inspect.signature(cls).parameters.values():
            annotation = re.sub(r"'[^']*'|torch\.dtype", "", p.annotation)
            for name in set(re.findall(r"\w+", annotation)) - BUILTINS:
                homes[HOMES.get(name, cls._factory.__module__)].add(name)
    standard = {home for home in homes if home in ("collections.abc", "typing")}
    library = {home for home in homes if home.startswith("functorch_opt")}
    lines = [*written_imports(homes, standard), ""]
    lines += ["import torch", *written_imports(homes, {*homes} - standard - library), ""]
    return "\n".join([*lines, *written_imports(homes, library)])


def written_imports(homes: dict[str, set[str]], some: set[str]) -> list[str]:
    return [
        f"from {home} import {', '.join(sorted(homes[home]))}" for home in sorted(some)
    ]


def stub() -> str:
    in_order = sorted(ready.CLASSES, key=lambda name: (not name.isupper(), name))
    classes = [ready.CLASSES[name] for name in in_order]
    names = "\n".join([f'    "{cls.__name__}",' for cls in classes])
    text = f"{HEAD}\n{imports(classes)}\n\n__all__ = [\n{names}\n]\n{READY}"
    for cls in classes:
        doc = (cls.__doc__ or "").partition("\n\n    Args:")[0]
        arguments = written_arguments(cls)
        text += CLASS.format(name=cls.__name__, doc=f"{doc}\n    ", arguments=arguments)
    return text


if __name__ == "__main__":
    FILE.write_text(stub())
