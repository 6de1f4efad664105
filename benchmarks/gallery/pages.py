"""The pages docs/gallery/*.md and docs/which-optimizer.md, as text."""

from __future__ import annotations

import functools
import html
import inspect
from pathlib import Path

import torch

import functorch_opt as fo
from benchmarks.gallery.entries import ADVICE, ENTRIES, FAMILIES, Entry, Family
from benchmarks.gallery.loops import ORTHOGONAL
from benchmarks.gallery.paths import EXAMPLES, RATES, STEPS
from benchmarks.gallery.race import Race
from benchmarks.gallery.rules import notes, rule, source, sources

WRITTEN = "<!-- `make gallery` writes this page; its text is in benchmarks/gallery/entries.py. -->\n\n"
WIDE = "---\nhide: [navigation, toc]\n---\n\n"
"""With nothing beside it, a table has more room."""
SIDE = 1024
"""Of the layer whose state is measured."""


def pages(race: Race, pictures: Path) -> dict[str, str]:
    """The text of every page, by its path in docs/."""
    found = {"gallery/index.md": overview(), "which-optimizer.md": table_page(race)}
    for family in FAMILIES:
        found[f"gallery/{family.page}.md"] = family_page(family, race, pictures)
    texts = {name: WRITTEN + text.strip() + "\n" for name, text in found.items()}
    texts["which-optimizer.md"] = WIDE + texts["which-optimizer.md"]
    return texts


def members(family: Family) -> list[Entry]:
    return [entry for entry in ENTRIES if entry.family == family.page]


@functools.cache
def bytes_per_parameter(entry: Entry) -> float:
    """Of the state for a layer of 1024 x 1024 weights and 1024 biases in float32, by its defaults."""
    given = {"learning_rate": 0.1} if "learning_rate" in _arguments(entry) else {}
    for name, parameter in _arguments(entry).items():
        if parameter.default is parameter.empty and name in entry.settings:
            given[name] = entry.settings[name]
    params = {"hidden.weight": torch.zeros(SIDE, SIDE), "hidden.bias": torch.zeros(SIDE)}
    state = getattr(fo, entry.name)(**given).init(params)
    tensors = [x for x in fo.tree.leaves(state) if isinstance(x, torch.Tensor)]
    return sum(x.numel() * x.element_size() for x in tensors) / (SIDE * SIDE + SIDE)


def _arguments(entry: Entry) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(getattr(fo, entry.name)).parameters)


def overview() -> str:
    lines = [
        "# The gallery",
        f"All {len(ENTRIES)} ready-made optimizers, by family. "
        "[Which optimizer, when](../which-optimizer.md) has them in one table that can be sorted.",
        "[![The path of every optimizer on Rosenbrock's function](pictures/all.png)](pictures/all.png)",
    ]
    for family in FAMILIES:
        names = " · ".join(link(entry, f"{family.page}.md") for entry in members(family))
        lines += [f"## [{family.title}]({family.page}.md)", family.text, names]
    lines += [
        "## How to read an entry",
        "**The rule** is that of the docstrings, in their letters: `g` is the gradient, `p` the parameter, "
        "`t` the step, which counts from 1, and `u` the update, of which `p` loses `learning_rate u`. "
        "`|x|` is a norm where x is a tensor. Under it is the rule as a loop in plain torch; "
        "`tests/test_gallery.py` runs the loop against the library, with two sets of hyperparameters.",
        "**The paths** show two functions of two numbers. On the left is Rosenbrock's function. On the right "
        "is a bowl that is 50 times as steep one way as the other, whose gradients have noise. "
        f"The protocol is the same for all: {STEPS} steps, {len(RATES)} learning rates from "
        f"{RATES[0]:.0e} to {RATES[-1]:.0f} at once in one vmapped run, means over {EXAMPLES} noisy examples a "
        "step, and of these rates the one with the lowest mean of the function over all steps. "
        "The white dot is the start, the cross the minimum, the ring the end, and a dot stands at every "
        "tenth step. An optimizer that is meant to be used without a learning rate runs once, with its "
        "defaults. Optimizers of matrices get a matrix of 2 x 2: its diagonal are the two numbers, "
        "and the squares of the other two, which begin at 0.5 and -0.5, are added to the function. "
        "A path says how an optimizer moves. It does not say which one trains a network better.",
        "**Memory** is the state by the defaults, for a layer of 1024 x 1024 weights and 1024 biases in "
        "float32, divided by the number of parameters. AdamW has 8 bytes.",
        "**The race** is that of `python -m benchmarks race`. The grey band holds the middle 80% of all "
        "optimizers, and the dashed line is their median.",
        "**Elsewhere** are the names in other collections: torch 2.13, optax 0.2.8, timm 1.0.31, "
        "pytorch_optimizer 4.1.0, HeavyBall 3, and the authors' packages.",
        "`make gallery` draws the pictures and writes the pages; "
        "`python -m benchmarks.gallery --pages` writes the pages only.",
    ]
    return "\n\n".join(lines)


def link(entry: Entry, page: str) -> str:
    return f"[{entry.title}]({page}#{anchor(entry)})"


def anchor(entry: Entry) -> str:
    return entry.title.lower().replace(" ", "-")


def family_page(family: Family, race: Race, pictures: Path) -> str:
    lines = [f"# {family.title}", family.text]
    if any("orthogonal(" in entry.loop for entry in members(family)):
        lines += [
            "`orthogonal` in the loops below is this, with `norm(m)` over all numbers. It takes matrices "
            "that are tall, too, where it is faster to turn them first:",
            f"```text\n{ORTHOGONAL.strip()}\n```",
        ]
    for entry in members(family):
        lines += entry_lines(entry, race, pictures)
    several = sources(members(family))
    if several:
        lines += ["## Sources", *(f"- {text}" for text in several)]
    return "\n\n".join(lines)


def entry_lines(entry: Entry, race: Race, pictures: Path) -> list[str]:
    lines = [f"## {entry.title}", rule(entry)]
    lines += [loop_details(entry)] if entry.loop else []
    lines += [f"![{entry.title}: its paths on two functions](pictures/{entry.name}.png)"]
    if race.has(entry.name) and (pictures / f"{entry.name}-race.png").exists():
        lines += [
            f"![{entry.title}: its curves in the race](pictures/{entry.name}-race.png)"
        ]
    lines += [facts(entry, race), *notes(entry)]
    return lines


def loop_details(entry: Entry) -> str:
    code = html.escape(entry.loop.strip(), quote=False)
    summary = "<summary>The same as a loop in plain torch</summary>"
    return f"<details>{summary}<pre><code>{code}</code></pre></details>"


def facts(entry: Entry, race: Race) -> str:
    """A table with a row for each fact, without a head."""
    in_race = raced(entry, race)
    rows = {
        f"`fo.{entry.name}`": "",
        "When": entry.when,
        "Set": entry.set,
        "Memory": f"{bytes_per_parameter(entry):.1f} bytes a parameter",
        "Work": entry.work,
        **({"Race": in_race} if in_race else {}),
        "Source": source(entry),
        "Elsewhere": entry.peers,
    }
    head, *rest = [(name, text.replace("|", "\\|")) for name, text in rows.items()]
    lines = [f"| {head[0]} | |", "|:--|:--|"]
    lines += [f"| **{name}** | {text} |" for name, text in rest if text]
    return "\n".join(lines)


def raced(entry: Entry, race: Race) -> str:
    """What came out of it, in a sentence for each task."""
    why_not = race.why_not(entry.name)
    if why_not:
        return f"Not in it: {why_not}."
    parts = []
    for task in race.tasks if race.has(entry.name) else ():
        line = race.of[task, entry.name]
        steps = line["steps_to_target"]
        reached = "target not reached" if steps is None else f"target after {steps} steps"
        mean, sd = line["held_out_mean"], line["held_out_sd"]
        ended = "diverged" if mean is None else f"held-out loss {mean:.3g} ± {sd:.1g}"
        rate = f"learning rate {line['learning_rate']:.2g}"
        parts.append(f"{race.title(task)}: {reached}, {ended}, {rate}.")
    return " ".join(parts)


def table_page(race: Race) -> str:
    lines = [
        "# Which optimizer, when",
        f"All {len(ENTRIES)} ready-made optimizers of the library. A name leads to its rule, its paths and "
        "what to set, in [the gallery](gallery/index.md).",
        "## What to take first",
        "\n".join(f"- {text}" for text in ADVICE),
        "These are habits of the field and of the authors. Your own sweep is worth more.",
        "## All in one table",
        '<p class="sort-hint" hidden>Click on a head to sort by it.</p>',
        table(race),
        "**Bytes** are those of the state for each parameter, by the defaults, for a layer of 1024 x 1024 "
        "weights and 1024 biases in float32. **Kind**: whether it treats "
        "weights as matrices, or is rate-free, so that its learning rate is only a factor with a usual value.",
    ]
    if race:
        tasks = ", ".join(f"*{race.title(task)}*" for task in race.tasks)
        versions, date = race.found["versions"], race.found["date"][:10]
        lines += [
            f"**Steps** are those to the target loss of {tasks}, and **Place** is the mean place over all tasks "
            f"of the race: `{race.found['command']}`, torch {versions['torch']}, {date}. A hyphen: it did not "
            "reach the target, or does not take part.",
        ]
    return "\n\n".join(lines)


def table(race: Race) -> str:
    heads = ["Optimizer", "When", "Family", "Bytes", "Kind"]
    heads += [f"Steps, {task.split('-')[0]}" for task in race.tasks]
    heads += ["Place"] if race else []
    number = {"Bytes", "Place"}
    under = [
        "--:" if head in number or head.startswith("Steps") else ":--" for head in heads
    ]
    lines = [f"| {' | '.join(heads)} |", f"|{'|'.join(under)}|"]
    for family in FAMILIES:
        for entry in members(family):
            cells = [link(entry, f"gallery/{family.page}.md"), first_sentence(entry.when)]
            cells += [family.short, f"{bytes_per_parameter(entry):.1f}"]
            cells += ["matrices" * entry.matrices + "rate-free" * entry.free]
            cells += [number_or_dash(race.steps(task, entry.name)) for task in race.tasks]
            cells += [number_or_dash(race.place(entry.name))] if race else []
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def number_or_dash(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def first_sentence(text: str) -> str:
    """Up to the first colon or point, which a table has room for."""
    for mark in (". ", ": "):
        text = text.split(mark)[0]
    return text.rstrip(".")
