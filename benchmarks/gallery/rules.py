"""The rule of an optimizer and its source, from the docstrings, where they are written once."""

from __future__ import annotations

import importlib
import inspect
import re
from dataclasses import dataclass

import functorch_opt as fo
from benchmarks.gallery.entries import Entry

WIDTH = 80
MARGIN = 20
"""What is indented by so much continues the line above."""
PACKAGES = ("functorch_opt.optimizers", "functorch_opt.line_search")
ELSEWHERE = r"The\s+(?:whole\s+)?rule\s+is\s+at\s+the\s+top\s+of\s+`[\w.]+`"
END_OF_SENTENCE = re.compile(
    r"(?<! al)(?<! alg)(?<! algs)(?<! sec)(?<! eq)(?<! eqs)(?<! fig)(?<! tab)(?<! [A-Z])\. "
    r"(?=[A-Z`]|optax|pytorch_optimizer)"
)


@dataclass(frozen=True)
class Docstring:
    body: str
    """What comes before the arguments and the source."""
    source: str
    several: bool
    """Whether the source is that of several optimizers."""


def docstring(name: str) -> Docstring:
    """That of a file, ``adam.py``, or of a public function, ``adamw``."""
    text = inspect.getdoc(_owner(name)) or ""
    body = re.split(
        r"\n\n(?:Args|Raises|Returns|Sources?|Example|Extra arguments[^:]*):", text
    )[0]
    found = re.search(r"\n(Sources?):(.*?)(?:\n\n|\Z)", text, re.DOTALL)
    source = " ".join(found[2].split()) if found else ""
    return Docstring(body, source, bool(found) and found[1] == "Sources")


def _owner(name: str) -> object:
    if not name.endswith(".py"):
        return getattr(fo, name)
    for package in PACKAGES:
        try:
            return importlib.import_module(f"{package}.{name[:-3]}")
        except ModuleNotFoundError:
            continue
    raise LookupError(f"There is no file {name} of an optimizer.")


def rule(entry: Entry) -> str:
    """The rule in Markdown."""
    return "\n\n".join(markdown(docstring(name).body) for name in entry.rule)


def source(entry: Entry) -> str:
    """Where it comes from: from a file of its own, or else from the functions."""
    files = [docstring(name) for name in entry.rule if name.endswith(".py")]
    functions = [
        docstring(name) for name in (*entry.rule, entry.name) if name.isidentifier()
    ]
    of_file = [text for text in files if text.source and not text.several]
    texts = of_file or [text for text in functions if text.source]
    found = [sentences(text.source)[0] for text in texts]
    return inline("; ".join(dict.fromkeys(part.rstrip(".") for part in found))) + "."


def sources(entries: list[Entry]) -> list[str]:
    """The sources of files that hold several optimizers."""
    texts = [docstring(name) for entry in entries for name in entry.rule]
    return list(dict.fromkeys(inline(text.source) for text in texts if text.several))


def notes(entry: Entry) -> list[str]:
    """What else the docstrings say: of what it is made, and where it differs from others."""
    direction = f"scale_by_{entry.name}"
    names = [entry.name] + [direction] * hasattr(fo, direction)
    texts = {name: docstring(name) for name in names}
    found = [text.body for name, text in texts.items() if name not in entry.rule]
    for name in (*entry.rule, *names):
        differs = [
            s for s in sentences(docstring(name).source)[1:] if not name.endswith(".py")
        ]
        found += [" ".join(differs)] if differs else []
    return list(dict.fromkeys(filter(None, map(markdown, found))))


def sentences(text: str) -> list[str]:
    parts = END_OF_SENTENCE.split(text)
    return [part if part.endswith(".") else f"{part}." for part in parts if part]


def markdown(text: str) -> str:
    """A docstring's text: indented blocks are formulas, and the rest is prose."""
    text = re.sub(ELSEWHERE + r"\.\s*", "", text)
    text = re.sub(ELSEWHERE + r", and is", "The rule is", text)
    blocks = []
    for part in re.split(r"\n\n+", text.strip()):
        if part.startswith("    "):
            lines = fitted([line[4:] for line in part.split("\n")])
            if blocks and blocks[-1].endswith("```"):
                blocks[-1] = blocks[-1][:-3] + "\n" + "\n".join(lines) + "\n```"
            else:
                blocks.append("```text\n" + "\n".join(lines) + "\n```")
        elif part:
            blocks.append(inline(part))
    return "\n\n".join(blocks)


def fitted(lines: list[str]) -> list[str]:
    """Lines that fit the page: with fewer spaces before a remark, or else broken.

    What does not fit goes to the next line, if that one continues the sentence.
    """
    found: list[str] = []
    rest, start = "", 0
    for line in _closer(lines):
        indent = len(line) - len(line.lstrip())
        if rest and indent >= MARGIN:
            line = f"{' ' * indent}{rest} {line.lstrip()}"
        elif rest:
            found.append(" " * start + rest)
        line, rest = _cut(line)
        gap = re.search(r"(?<=\S) {2,}(?=\S)|= ", line)
        start = gap.end() if gap else MARGIN
        found.append(line)
    return [*found, " " * start + rest] if rest else found


def _closer(lines: list[str]) -> list[str]:
    """Remarks of lines that are too long begin further left, and so do those below each other."""
    by_column: dict[int, int] = {}
    for line in lines:
        column = _remark(line)
        if column:
            by_column[column] = max(by_column.get(column, 0), len(line) - WIDTH)
    return [_moved(line, by_column.get(_remark(line), 0)) for line in lines]


def _remark(line: str) -> int:
    """Where its remark begins, or 0."""
    gaps = [gap.end() for gap in re.finditer(r"(?<=\S) {3,}(?=\S)", line)]
    return max((end for end in gaps if end > MARGIN + 8), default=0)


def _moved(line: str, by: int) -> str:
    column = _remark(line)
    before = line[:column].rstrip()
    spaces = max(2, column - len(before) - max(by, 0))
    return before + " " * spaces + line[column:] if column else line


def _cut(line: str) -> tuple[str, str]:
    """What fits, and the rest."""
    if len(line) <= WIDTH:
        return line, ""
    end = line.rfind(" ", 0, WIDTH + 1)
    return line[:end].rstrip(), line[end:].strip()


def inline(text: str) -> str:
    return text.replace("``", "`")
