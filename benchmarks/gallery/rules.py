"""The rule of an optimizer and its source, from the docstrings, where they are written once."""

from __future__ import annotations

import importlib
import inspect
import re
from dataclasses import dataclass

import functorch_opt as fo
from benchmarks.gallery.entries import Entry

WIDTH = 84
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
    body = re.split(r"\n\n(?:Args|Raises|Returns|Sources?|Example|Extra arguments[^:]*):", text)[0]
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
    functions = [docstring(name) for name in (*entry.rule, entry.name) if name.isidentifier()]
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
    found = [
        text.body for name, text in texts.items() if name not in entry.rule
    ]
    for name in (*entry.rule, *names):
        differs = [s for s in sentences(docstring(name).source)[1:] if not name.endswith(".py")]
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
            lines = [narrow(line[4:]) for line in part.split("\n")]
            if blocks and blocks[-1].endswith("```"):
                blocks[-1] = blocks[-1][:-3] + "\n" + "\n".join(lines) + "\n```"
            else:
                blocks.append("```text\n" + "\n".join(lines) + "\n```")
        elif part:
            blocks.append(inline(part))
    return "\n\n".join(blocks)


def narrow(line: str) -> str:
    """The line with fewer spaces before its remark, so that it fits the page."""
    gaps = re.findall(r"(?<=\S) {3,}(?=\S)", line)
    if len(line) <= WIDTH or not gaps:
        return line
    longest = max(gaps, key=len)
    shorter = max(2, len(longest) - (len(line) - WIDTH))
    return line.replace(longest, " " * shorter, 1)


def inline(text: str) -> str:
    return text.replace("``", "`")
