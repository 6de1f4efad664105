"""Random transformations, as somebody might write them: each from its seed, as Python source that
can be pasted and run.

A program is a transformation, the parameters it starts from, and the gradients of every step. It
is drawn as a tree of parts (rules, library stages, wrappers, chains), so that a program that fails
can be made smaller part by part, and written as source text, which is what runs. What it may do is
what a pure rule may do: return anything that it was given, views and old slots too, keep
parameters and gradients in its state, decide by `torch.where`.

Everything drawn is continuous in its inputs and of bounded slope. So two executions that are both
right stay close together, and what is far away is wrong.
"""

from __future__ import annotations

import inspect
import itertools
import linecache
import random
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any

import functorch_opt as fo

PRELUDE = """\
import torch
import functorch_opt as fo


def draw(seed, *shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def with_nan(x):
    x.view(-1)[0] = float("nan")
    return x


def turned(x):
    return x.t() if x.dim() == 2 and x.shape[0] == x.shape[1] else x
"""

MECHANISMS = {
    name: hasattr(fo, name) for name in ("wrap", "gate", "every", "largest")
} | {
    f"leafwise {name}": name in inspect.signature(fo.leafwise).parameters
    for name in ("every", "totals")
}
"""Which of the newer mechanisms this version has. Programs use those that are there."""


# ---- expressions ---------------------------------------------------------------------------------


@dataclass
class Scope:
    """The names that an expression may read: of tensors of the shape of the leaf, and of
    scalars.
    """

    tensors: list[str]
    scalars: list[str] = field(default_factory=list)
    tensorwise: bool = False
    promotes: bool = False
    """Whether the tensors may be of different dtypes, as in a function of whole trees."""


def alias(rng: random.Random, scope: Scope) -> str:
    """One of the tensors in reach, or a view or a copy of one: the same numbers, perhaps in the
    same memory.
    """
    x = rng.choice(scope.tensors)
    forms = ["{}"] * 6 + [
        "{}.detach()",
        "{}.clone()",
        "{}.view_as({})",
        "{}[...]",
        "{} * 1",
    ]
    forms += ["{}.flatten().view({}.shape)", "{}.reshape({}.shape)", "{}.contiguous()"]
    if scope.tensorwise:
        forms += ["turned({})"] * 3 + ["{}.mean().expand({}.shape)"]
    return rng.choice(forms).replace("{}", x)


UNARY = [
    "torch.tanh({a})",
    "0.5 * {a}",
    "-{a}",
    "{a}.abs()",
    "torch.sqrt({a}.abs() + 0.1)",
    "torch.where({a} > 0, {a}, 0.5 * {a})",
    "{a}.clamp(-1, 1)",
    "{a} * {a} / (1 + {a}.abs())",
    "torch.zeros_like({a})",
    "torch.ones_like({a})",
]
BINARY = [
    "({a} + {b})",
    "({a} - {b})",
    "{a} * torch.tanh({b})",
    "torch.maximum({a}, {b})",
    "{a} / (1 + {b}.abs())",
    "(0.9 * {a} + 0.1 * {b})",
]
LERPS = ["torch.lerp({a}, {b}, 0.3)", "{a}.lerp({b}, 0.1)"]
SCALED = ["{s} * {a}", "({a} + 0.1 * {s})", "{a} / (1 + abs({s}))"]
WHOLE = [
    "({a} - {a}.mean(dim=-1, keepdim=True))",
    "{a} * torch.tanh({b}.mean())",
    "turned({a})",
]


def expression(rng: random.Random, scope: Scope, depth: int = 2) -> str:
    """A tensor worked out from what is in `scope`."""
    if depth == 0:
        return alias(rng, scope) if rng.random() < 0.1 else rng.choice(scope.tensors)
    forms = rng.choice(
        [UNARY, BINARY, BINARY]
        + ([] if scope.promotes else [LERPS])
        + ([SCALED] * 2 if scope.scalars else [])
        + ([WHOLE] if scope.tensorwise else [])
    )
    parts = {
        "a": expression(rng, scope, depth - 1),
        "b": expression(rng, scope, depth - 1),
    }
    if scope.scalars:
        parts["s"] = rng.choice(scope.scalars)
    form = rng.choice(forms)
    if form.count("{a}") > 1 and not parts["a"].isidentifier():
        parts["a"] = rng.choice(scope.tensors)
    return form.format(**{name: enclosed(x) for name, x in parts.items()})


def enclosed(text: str) -> str:
    """The source `text`, in parentheses where an operator beside it would take it apart."""
    depth = 0
    for i, letter in enumerate(text):
        depth += (letter in "([") - (letter in ")]")
        if depth == 0 and letter in ") " and i + 1 < len(text):
            return f"({text})"
    return f"({text})" if text.startswith("-") else text


def reads(name: str, text: str) -> bool:
    """Whether the source `text` names `name`."""
    return re.search(rf"(?<![\w.\"]){name}(?![\w\"=])", text) is not None


def renamed(text: str, old: str, new: str) -> str:
    """The source `text`, with another name for `old`."""
    return re.sub(rf"(?<![\w.\"]){old}(?![\w\"=])", new, text)


def entries(values: dict[str, str]) -> str:
    """The source of a dict whose values are source."""
    return "{" + ", ".join(f'"{name}": {value}' for name, value in values.items()) + "}"


# ---- parts of a program --------------------------------------------------------------------------


class Definitions:
    """The functions that the parts of a program define, each under a name of its own."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def add(self, kind: str, arguments: str, body: list[str]) -> str:
        name = f"{kind}_{len(self.texts)}"
        lines = [f"def {name}({arguments}):", *(f"    {line}" for line in body)]
        self.texts.append("\n".join(line.rstrip() for line in lines))
        return name


class Part:
    """A transformation to be: it writes the functions it needs, and the expression that makes
    it.
    """

    last = False

    def write(self, definitions: Definitions) -> str:
        raise NotImplementedError

    def children(self) -> list[Part]:
        return []

    def with_children(self, children: list[Part]) -> Part:
        return self

    def counts(self) -> bool:
        """Whether a rule in it reads the count of its parameter, which the stateful optimizers let
        lag.
        """
        return any(child.counts() for child in self.children())

    def shares_counts(self) -> bool:
        """Whether a value that all parameters share is made of a count."""
        return any(child.shares_counts() for child in self.children())

    def shards(self) -> bool:
        """Whether it takes sharded tensors: what is written over whole trees, by hand, need not."""
        return all(child.shards() for child in self.children())

    def smaller(self) -> Iterator[Part]:
        """Parts that do less, to find what a failure needs."""
        yield from self.children()


@dataclass
class Library(Part):
    """A stage of the library, as the call that makes it."""

    call: str
    counted: bool = False
    last: bool = False

    def write(self, definitions: Definitions) -> str:
        return self.call

    def counts(self) -> bool:
        return self.counted


@dataclass
class Rule(Part):
    """A stage made by `leafwise`. Which argument names its functions take is found out from what
    they read.
    """

    first: dict[str, str] = field(default_factory=dict)
    new: dict[str, str] = field(default_factory=dict)
    update: str = "g"
    hyper: dict[str, str] = field(default_factory=dict)
    sums: dict[str, str] = field(default_factory=dict)
    totals: dict[str, str] = field(default_factory=dict)
    shared: dict[str, str] = field(default_factory=dict)
    new_shared: dict[str, str] = field(default_factory=dict)
    now: dict[str, str] = field(default_factory=dict)
    work: dict[str, str] = field(default_factory=dict)
    every: str = "2"
    kind: str = "elementwise"
    injected: bool = False

    def counts(self) -> bool:
        texts = [
            *self.now.values(),
            *self.new_shared.values(),
            *self.new.values(),
            self.update,
        ]
        return bool(self.work) or any(reads("count", text) for text in texts)

    def shares_counts(self) -> bool:
        return any(reads("count", text) for text in self.new_shared.values())

    def taken(self, names: list[str], texts: list[str]) -> str:
        """The arguments of a function of this source."""
        return ", ".join(
            name for name in names if any(reads(name, text) for text in texts)
        )

    def write(self, definitions: Definitions) -> str:
        of_step = [*self.hyper, *self.shared, "count"]
        of_leaf = ["g", "p", *self.first, *self.now, *of_step]
        in_rule = [*of_leaf, *self.sums, *self.totals]
        texts = [*self.new.values(), self.update]
        body = [f"def rule({self.taken(in_rule, texts)}):"]
        body += [f"    new_{name} = {value}" for name, value in self.new.items()]
        if self.first:
            slots = entries({name: f"new_{name}" for name in self.first})
            body += [f"    return {self.update}, {slots}", ""]
        else:
            body += [f"    return {self.update}", ""]
        options = []
        if self.now or self.new_shared:
            texts = [*self.now.values(), *self.new_shared.values()]
            names = [*of_step, *self.totals, "updates", "params"]
            body += [f"def prepare({self.taken(names, texts)}):"]
            result = entries(self.now)
            if self.new_shared:
                result += f", {entries(self.new_shared)}"
            body += [f"    return {result}", ""]
            options.append("prepare")
        if self.first:
            options.append(f"slots={entries(self.first)}")
        if self.shared:
            options.append(f"shared={entries(self.shared)}")
        if self.hyper:
            options.append(f"hyper={entries({name: name for name in self.hyper})}")
        for option, functions in (("sums", self.sums), ("totals", self.totals)):
            if functions:
                options.append(f"{option}={entries(self._folds(functions))}")
        if self.work:
            body += [f"def work({self.taken(of_leaf, [*self.work.values()])}):"]
            body += [f"    return {entries(self.work)}", ""]
            options.append(f"every=fo.every({self.every}, work)")
        if self.kind != "elementwise":
            options.append(f'kind="{self.kind}"')
        body.append(f"return fo.leafwise({', '.join(['rule', *options])})")
        arguments = ", ".join(f"{name}={value}" for name, value in self.hyper.items())
        name = definitions.add("stage", arguments, body)
        return f"fo.inject_hyperparams({name})()" if self.injected else f"{name}()"

    def _folds(self, functions: dict[str, str]) -> dict[str, str]:
        """The functions that sum over a tensor, or take its largest element."""
        folds = {}
        for name, body in functions.items():
            function = f"lambda {self.taken(['g', 'p', *self.first], [body])}: {body}"
            folds[name] = (
                f"fo.largest({function})" if body.endswith(".max()") else function
            )
        return folds

    def _without(self, name: str) -> Rule:
        """This rule without one of its names; what read it reads ``g``, and where there is no
        ``g`` the number 1.
        """
        fields: dict[str, Any] = {}
        for of in (
            "first",
            "new",
            "hyper",
            "sums",
            "totals",
            "shared",
            "new_shared",
            "now",
            "work",
        ):
            known_g = of in ("new", "sums", "totals", "work")
            instead = (
                "g"
                if known_g and (name in self.first or "Each" in self.now.get(name, ""))
                else "1.0"
            )
            if of == "first":
                fields[of] = {k: x for k, x in self.first.items() if k != name}
            else:
                fields[of] = {
                    k: renamed(renamed(x, f"new_{name}", "g"), name, instead)
                    for k, x in getattr(self, of).items()
                    if k != name
                }
        tensor = name in self.first or "Each" in self.now.get(name, "")
        update = renamed(
            renamed(self.update, f"new_{name}", "g"), name, "g" if tensor else "1.0"
        )
        return replace(self, update=update, **fields)

    def smaller(self) -> Iterator[Part]:
        names = [*self.first, *self.now, *self.sums, *self.totals, *self.hyper]
        for name in names:
            yield self._without(name)
        if self.new_shared or self.shared:
            for name in self.shared:
                yield self._without(name)
        if self.injected:
            yield replace(self, injected=False)
        if self.work:
            yield replace(self, work={})
        if self.kind != "elementwise" and "turned" not in str(self.new):
            yield replace(self, kind="elementwise")
        for name in ("g", *self.first):
            yield from self._simply(self.update, name, lambda x: replace(self, update=x))
        for name, value in self.first.items():
            if value != "torch.zeros_like":
                yield replace(self, first={**self.first, name: "torch.zeros_like"})
        for slot, value in self.new.items():
            for name in ("g", "p", slot):
                yield from self._simply(
                    value,
                    name,
                    lambda x, slot=slot: replace(self, new={**self.new, slot: x}),
                )
        for name, value in self.hyper.items():
            if value != "0.5":
                yield replace(self, hyper={**self.hyper, name: "0.5"})

    @staticmethod
    def _simply(value: str, name: str, put: Callable[[str], Rule]) -> Iterator[Rule]:
        """The rule with something simple in the place of `value`: the tensor `name` itself only
        where there is some tensor itself already, for what is shared may be another fault.
        """
        itself = not re.search(r"[-+*/,] |^-|abs|tanh|clamp", value)
        simple = name if itself else f"0.5 * {name}"
        if len(simple) < len(value):
            yield put(simple)


@dataclass
class Nest(Part):
    """What holds other parts: the source of it, with ``{0}``, ``{1}`` where they go."""

    form: str
    inner: list[Part]
    last: bool = False

    def write(self, definitions: Definitions) -> str:
        return self.form.format(*[part.write(definitions) for part in self.inner])

    def children(self) -> list[Part]:
        return self.inner

    def with_children(self, children: list[Part]) -> Part:
        return replace(self, inner=children)


@dataclass
class Chained(Part):
    """One part after another."""

    stages: list[Part]

    @property
    def last(self) -> bool:  # type: ignore[override]
        return any(stage.last for stage in self.stages)

    def write(self, definitions: Definitions) -> str:
        return f"fo.chain({', '.join(stage.write(definitions) for stage in self.stages)})"

    def children(self) -> list[Part]:
        return self.stages

    def with_children(self, children: list[Part]) -> Part:
        return replace(self, stages=children)

    def smaller(self) -> Iterator[Part]:
        yield from self.stages
        if len(self.stages) > 1:
            for i in range(len(self.stages)):
                yield Chained(self.stages[:i] + self.stages[i + 1 :])


@dataclass
class ByHand(Part):
    """A transformation written as two functions over whole trees: the body of a function that
    returns it, with ``inner`` perhaps.
    """

    name: str
    body: str
    inner: list[Part] = field(default_factory=list)

    def write(self, definitions: Definitions) -> str:
        given = [part.write(definitions) for part in self.inner]
        name = definitions.add(
            self.name, "inner" if given else "", self.body.splitlines()
        )
        return f"{name}({', '.join(given)})"

    def children(self) -> list[Part]:
        return self.inner

    def with_children(self, children: list[Part]) -> Part:
        return replace(self, inner=children)

    def shards(self) -> bool:
        return False


@dataclass
class Declared(Part):
    """A wrapper that is declared: `wrap` or `gate`. Its functions are written before it, the part
    inside is its argument.
    """

    name: str
    body: str
    inner: list[Part]

    write = ByHand.write
    children = ByHand.children
    with_children = ByHand.with_children


def variations(part: Part) -> Iterator[Part]:
    """The same program part with something left out, anywhere in it."""
    yield from part.smaller()
    children = part.children()
    for i, child in enumerate(children):
        for other in variations(child):
            yield part.with_children([*children[:i], other, *children[i + 1 :]])


# ---- drawing parts -------------------------------------------------------------------------------

NUMBERS = [
    "0.9",
    "0.5",
    "0.1",
    "torch.tensor(0.3)",
    "torch.tensor(0.7, dtype=torch.float64)",
]
SCHEDULES = [
    "lambda count: torch.where(count < 2, 0.8, 0.2)",
    "lambda count: 0.5 / (1 + count)",
    "fo.linear_schedule(0.9, 0.1, 3)",
    "fo.exponential_decay(0.9, 2, 0.5)",
    "lambda count: 0.6",
]
FIRST = ["torch.zeros_like", "fo.tree.zeros_like", "torch.clone", "lambda p: p"]
FIRST += [
    "lambda p: p.detach()",
    "lambda p: torch.full_like(p, 0.5)",
    "lambda p: p.view_as(p)",
]
FIRST += ["lambda p: 0.5 * p", "torch.zeros_like", "torch.clone", "lambda p: p"]
UNUSUAL_FIRST = ["lambda p: p.new_zeros(()).expand(p.shape)"]
UNUSUAL_FIRST += ["lambda p: torch.zeros_like(p, dtype=torch.float64)"]

NORM = "torch.tanh(0.3 * fo.tree.norm({tree}))"
BY_HAND = "torch.tanh(0.1 * sum([x.abs().sum() for x in fo.tree.leaves({tree})], torch.zeros(())))"
OF_COUNT = [
    "1 - 0.9 ** fo.tree.as_real(count + 1)",
    "torch.where(count % 2 == 0, 1.0, 0.5)",
    "1 / (1 + fo.tree.as_real(count))",
]
EACH = [
    "fo.Each(updates)",
    "fo.Each(params)",
    "fo.Each(fo.tree.map(torch.tanh, updates))",
    "fo.Each(fo.tree.map(lambda x: 0.5 * x, params), own=True)",
]

LIBRARY = [
    ("fo.clip_by_global_norm(1.0)", False),
    ("fo.clip(0.8)", False),
    ("fo.add_decayed_weights(0.1)", False),
    ("fo.scale_by_schedule(fo.linear_schedule(1.0, 0.2, 3))", False),
    ("fo.scale_by_schedule(lambda count: torch.where(count < 2, 1.0, 0.3))", False),
    ("fo.trace(0.9)", False),
    ("fo.trace(0.5, nesterov=True)", False),
    ("fo.ema(0.7, debias=False)", False),
    ("fo.centralize()", False),
    ("fo.zero_nans()", False),
    ("fo.scale(-0.3)", False),
    ("fo.inject_hyperparams(fo.sgd)(learning_rate=0.3)", False),
    ("fo.inject_hyperparams(fo.trace)(decay=0.6)", False),
    (
        "fo.inject_hyperparams(fo.sgd)(learning_rate=fo.linear_schedule(0.5, 0.1, 3))",
        False,
    ),
    ("fo.scale_by_adam(eps=0.3)", True),
    ("fo.ema(0.7)", True),
    ("fo.add_noise(0.01, 0.5, key={key})", True),
    ("fo.adamw(0.3, eps=0.3)", True),
    ("fo.inject_hyperparams(fo.adam)(learning_rate=0.3, eps=0.3)", True),
]

REMEMBER = """\
def init(params):
    return {init}

def update(updates, state, params):
    {unpack} = {state}
    moved = fo.tree.map(lambda u, p, a: {moved}, updates, params, kept)
    kept = {kept}
    return moved, {result}

return fo.GradientTransformation(init, update)"""

SKIPPING = """\
def init(params):
    return {"inner": inner.init(params)}

def update(updates, state, params, **extra):
    ok = torch.isfinite(fo.tree.norm(updates))
    safe = fo.tree.map(lambda u: torch.where(ok, u, torch.zeros_like(u)), updates)
    moved, new = inner.update(safe, state["inner"], params, **extra)
    moved = fo.tree.map(lambda u: torch.where(ok, u, torch.zeros_like(u)), moved)
    new = fo.tree.map(lambda a, b: torch.where(ok, a, b), new, state["inner"])
    return moved, {"inner": new}

return fo.GradientTransformation(init, update, extra_args=inner.extra_args)"""

ACCUMULATING = """\
def init(params):
    total = fo.tree.map(torch.zeros_like, params)
    return {"inner": inner.init(params), "total": total, "micro": fo.tree.zero_count(params)}

def update(updates, state, params, **extra):
    mean = fo.tree.map(lambda u, t: t + u / 2, updates, state["total"])
    moved, new = inner.update(mean, state["inner"], params, **extra)
    go = state["micro"] % 2 == 1
    moved = fo.tree.map(lambda u: torch.where(go, u, torch.zeros_like(u)), moved)
    new = fo.tree.map(lambda a, b: torch.where(go, a, b), new, state["inner"])
    total = fo.tree.map(
        lambda t, m: t if m is None else torch.where(go, torch.zeros_like(t), m.to(t.dtype)),
        state["total"],
        mean,
    )
    return moved, {"inner": new, "total": total, "micro": state["micro"] + 1}

return fo.GradientTransformation(init, update, extra_args=inner.extra_args)"""

EVERY = """\
def init(params):
    return {"inner": inner.init(params), "step": fo.tree.zero_count(params)}

def update(updates, state, params, **extra):
    moved, new = inner.update(updates, state["inner"], params, **extra)
    go = state["step"] % 3 != 1
    moved = fo.tree.map(lambda a, b: torch.where(go, a, 0.3 * b), moved, updates)
    new = fo.tree.map(lambda a, b: torch.where(go, a, b), new, state["inner"])
    return moved, {"inner": new, "step": state["step"] + 1}

return fo.GradientTransformation(init, update, extra_args=inner.extra_args)"""

LOOKING_AHEAD = """\
def init(params):
    return inner.init(params), {"slow": params}, fo.tree.zero_count(params)

def update(updates, state, params, **extra):
    inside, kept, count = state
    moved, inside = inner.update(updates, inside, params, **extra)
    go = count % 2 == 1
    slow = fo.tree.map(
        lambda s, u, p: s if u is None else torch.where(go, s + 0.5 * (p + u - s), s).to(s.dtype),
        kept["slow"],
        moved,
        params,
    )
    moved = fo.tree.map(lambda u, s, p: torch.where(go, s - p, u), moved, slow, params)
    return moved, (inside, {"slow": slow}, count + 1)

return fo.GradientTransformation(init, update, extra_args=inner.extra_args)"""

PREVIOUS = """\
def init(params):
    return {"inner": inner.init(params), "before": params, "gradients": params}

def update(updates, state, params, **extra):
    seen = fo.tree.map(
        lambda u, a, b: u + 0.1 * a - 0.1 * b, updates, state["before"], state["gradients"]
    )
    moved, new = inner.update(seen, state["inner"], params, **extra)
    gradients = fo.tree.map(
        lambda a, u: a if u is None else u.to(a.dtype), state["gradients"], updates
    )
    return moved, {"inner": new, "before": params, "gradients": gradients}

return fo.GradientTransformation(init, update, extra_args=inner.extra_args)"""

WRAPPERS = {
    "skipping": SKIPPING,
    "accumulating": ACCUMULATING,
    "every_other": EVERY,
    "looking_ahead": LOOKING_AHEAD,
    "with_previous": PREVIOUS,
}

GATES = [
    "def active(count):\n    return count % 2 == 0\n",
    "def active(updates):\n    return torch.isfinite(fo.tree.norm(updates))\n",
    "def active(updates, params):\n    return fo.tree.norm(updates) < 2.0 + fo.tree.norm(params)\n",
]
GATE_WITH_SHARED = """\
def active(count, updates, usual):
    here = torch.tanh(0.3 * fo.tree.norm(updates))
    return here < 1.5 * usual, {"usual": 0.7 * usual + 0.3 * here}
"""


OF_LIBRARY = [
    ("MultiSteps", "fo.MultiSteps({0}, 2)", False),
    ("MultiSteps", "fo.MultiSteps({0}, 3, use_grad_mean=False)", False),
    ("apply_if_finite", "fo.apply_if_finite({0}, 5)", False),
    ("lookahead", "fo.lookahead({0}, 2, 0.5)", True),
]
OF_LIBRARY = [row for row in OF_LIBRARY if hasattr(fo, row[0])]
"""Wrappers of the library, those that there are, and whether they have to come last."""


class Author:
    """Draws the parts of one program."""

    def __init__(
        self,
        rng: random.Random,
        missing: bool,
        mixed: bool,
        mechanisms: dict[str, bool] = MECHANISMS,
    ) -> None:
        self.rng, self.missing, self.mixed, self.has = rng, missing, mixed, mechanisms
        self.counting = not missing or rng.random() < 0.2

    def chance(self, p: float) -> bool:
        return self.rng.random() < p

    def whole(self) -> Part:
        """A whole transformation, with what must come last."""
        part = self.part(depth=3 if self.chance(0.3) else 2)
        if self.chance(0.12):
            lasts = ["fo.keep_master_weights({0})"] + [
                row[1] for row in OF_LIBRARY if row[2]
            ]
            part = Nest(self.rng.choice(lasts), [part], last=True)
        elif self.chance(0.6):
            end = self.rng.choice(["fo.scale(-0.3)", "fo.scale_by_learning_rate(0.2)"])
            part = Chained([part, Library(end)])
        if self.chance(0.12):
            debias = self.counting and self.chance(0.5)
            average = Library(f"fo.params_ema(0.7, debias={debias})", debias, last=True)
            part = Chained([part, average])
        return part

    def part(self, depth: int) -> Part:
        kinds = {"rule": 10, "library": 2, "by hand": 2}
        if depth:
            kinds |= {"chain": 7, "groups": 3, "wrapper": 4}
            kinds |= {"wrap": 4} if self.has["wrap"] else {}
            kinds |= {"gate": 3} if self.has["gate"] else {}
        kind = self.rng.choices([*kinds], [*kinds.values()])[0]
        if kind == "rule":
            return self.rule()
        if kind == "library":
            return self.library()
        if kind == "by hand":
            return self.by_hand()
        if kind == "chain" and self.chance(0.1):
            return Declared(
                "twice", "return fo.chain(inner, inner)", [self.part(depth - 1)]
            )
        if kind == "chain":
            return Chained([self.part(depth - 1) for _ in range(self.rng.randint(1, 4))])
        if kind == "groups":
            return self.groups(depth - 1)
        if kind == "wrapper" and OF_LIBRARY and self.chance(0.4):
            forms = [form for _, form, last in OF_LIBRARY if not last]
            return Nest(self.rng.choice(forms), [self.part(depth - 1)])
        if kind == "wrapper":
            name = self.rng.choice([*WRAPPERS])
            return ByHand(name, WRAPPERS[name], [self.part(depth - 1)])
        return self.wrap(depth - 1) if kind == "wrap" else self.gate(depth - 1)

    def library(self) -> Part:
        call, counted = self.rng.choice(
            [row for row in LIBRARY if self.counting or not row[1]]
        )
        return Library(call.format(key=self.rng.randint(0, 99)), counted)

    def groups(self, depth: int) -> Part:
        which = self.rng.choice(
            [
                "p.dim() > 1",
                "p.dim() == 0",
                'path.endswith("a")',
                'path < "b"',
                "p.numel() > 3",
            ]
        )
        if self.chance(0.5):
            otherwise = self.rng.choice(["pass", "zero"])
            form = f'fo.masked({{0}}, lambda path, p: {which}, otherwise="{otherwise}")'
            return Nest(form, [self.part(depth)])
        form = (
            'fo.partition({{"x": {0}, "y": {1}}}, lambda path, p: "x" if '
            + which
            + ' else "y")'
        )
        return Nest(form, [self.part(depth), self.part(depth)])

    def by_hand(self) -> Part:
        """A function of whole trees that remembers something of them."""
        rng = self.rng
        inside = Scope(["u", "p", "a"], promotes=True)
        moved = expression(rng, inside, rng.randint(1, 2))
        if not reads("a", moved):
            moved = f"{moved} + 0.3 * a"
        init = rng.choice(["params", "params", "fo.tree.map(torch.zeros_like, params)"])
        as_it_is = not self.mixed and not self.missing and self.chance(0.6)
        if as_it_is:
            kept = rng.choice(["params", "updates", "moved", "updates"])
        elif init == "params" and self.chance(0.3):
            kept = "params"
        else:
            new = rng.choice(["u", "p", f"torch.tanh({expression(rng, inside, 1)})"])
            kept = (
                f"fo.tree.map(lambda a, u, p: a if u is None else ({new}).to(a.dtype), "
                "kept, updates, params)"
            )
        if self.chance(0.5):
            shape, unpack, state = "({}, {})", "kept, step", "state"
        else:
            shape, unpack, state = (
                '{{"kept": {}, "step": {}}}',
                "kept, step",
                '(state["kept"], state["step"])',
            )
            moved = (
                f"torch.where(step % 2 == 0, 1.0, 0.5) * ({moved})"
                if self.chance(0.3)
                else moved
            )
        texts = {
            "init": shape.format(init, "fo.tree.zero_count(params)"),
            "unpack": unpack,
            "state": state,
            "moved": moved,
            "kept": kept,
            "result": shape.format("kept", "step + 1"),
        }
        return ByHand("remember", REMEMBER.format(**texts))

    # ---- rules ----

    def rule(self) -> Rule:
        rng = self.rng
        part = Rule(kind="tensorwise" if self.chance(0.2) else "elementwise")
        slots = ["m", "v", "w"][: rng.choice([0, 1, 1, 2, 2, 3])]
        for name in slots:
            part.first[name] = rng.choice(UNUSUAL_FIRST if self.chance(0.05) else FIRST)
        for name in ["h", "lr"][: rng.choice([0, 0, 1, 2])]:
            part.hyper[name] = rng.choice(SCHEDULES if self.chance(0.3) else NUMBERS)
        self.sums_of(part)
        if self.chance(0.45):
            self.prepare_of(part)
        scope = Scope(
            ["g", *slots] + ["p"] * self.chance(0.6),
            [*part.hyper, *part.sums, *part.totals]
            + [name for name, value in part.now.items() if "Each" not in value]
            + [*part.shared] * self.chance(0.3),
            part.kind == "tensorwise",
        )
        each = [name for name, value in part.now.items() if "Each" in value]
        scope.tensors += each
        if self.counting and self.chance(0.08):
            scope.scalars.append("torch.tanh(0.3 * count)")
        for name in slots:
            part.new[name] = self.new_value(name, scope)
            scope = replace(scope, tensors=[*scope.tensors, f"new_{name}"])
        part.update = self.update_of(slots + each, scope)
        if part.kind == "tensorwise" and self.chance(0.3):
            part.first["rows"] = (
                "lambda p: fo.tree.zeros_like(p.mean(dim=-1, keepdim=True))"
            )
            of = expression(rng, scope, 1)
            part.new["rows"] = f"0.9 * rows + 0.1 * ({of}).mean(dim=-1, keepdim=True)"
            part.update = f"{part.update} + 0.3 * {rng.choice(['rows', 'new_rows'])}"
        if (
            slots
            and self.has["every"]
            and self.has["leafwise every"]
            and self.chance(0.25)
        ):
            chosen = rng.choice(slots)
            inside = Scope(["g", "p", *slots], [*part.hyper], scope.tensorwise)
            part.work[chosen] = self.new_value(chosen, inside)
            part.every = rng.choice(["2", "3", "lambda count: count % 3 != 1"])
        part.injected = bool(part.hyper) and self.chance(0.15)
        return part

    def sums_of(self, part: Rule) -> None:
        names = ["g", *part.first]

        def fold() -> str:
            a, b = self.rng.choice(names), self.rng.choice([*names, "p"])
            forms = [f"torch.tanh({a} * {b}).sum()", f"(0.1 * {a} * {a}).sum()"]
            forms += ["g.numel()"] + [f"{a}.abs().max()"] * self.has["largest"]
            return self.rng.choice(forms)

        if part.kind == "elementwise" and self.chance(0.2):
            part.sums = {name: fold() for name in ["t", "n"][: self.rng.randint(1, 2)]}
        if self.has["leafwise totals"] and self.chance(0.2):
            part.totals = {"total": fold()}

    def prepare_of(self, part: Rule, counting: bool | None = None) -> None:
        rng = self.rng
        counting = self.counting if counting is None else counting
        if self.chance(0.35):
            for name in ["k", "l"][: rng.randint(1, 2)]:
                part.shared[name] = (
                    f"torch.tensor({rng.choice([0.3, 0.6])}, dtype=torch.float64)"
                )
        tree = rng.choice(["updates", "updates", "params"])
        sources = ["0.5", "2", *part.hyper, *part.shared]
        sources += [rng.choice([NORM, BY_HAND]).format(tree=tree)] * 2
        sources += [f"torch.tanh(0.1 * {name})" for name in part.totals] * 2
        sources += [rng.choice(OF_COUNT)] * 2 if counting else []

        def scalar() -> str:
            a, b = rng.choice(sources), rng.choice(sources)
            return rng.choice([a, f"0.5 * ({a}) + 0.3 * ({b})", f"({a}) * ({b})"])

        for name in ["c", "d"][: rng.randint(1, 2)]:
            part.now[name] = scalar()
        if self.chance(0.3):
            part.now["e"] = rng.choice(EACH)
        for name in part.shared:
            alias = rng.choice([*part.shared])
            mixed = f"0.8 * {name} + 0.1 * ({scalar()})"
            part.new_shared[name] = alias if self.chance(0.3) else mixed

    def new_value(self, name: str, scope: Scope) -> str:
        """What becomes of a slot."""
        if self.chance(0.45):
            return alias(self.rng, scope)
        value = expression(self.rng, scope, self.rng.randint(1, 2))
        forms = ["torch.tanh({x})", "0.9 * {name} + 0.1 * ({x})", "{x}"]
        forms += [] if scope.promotes else ["torch.lerp({name}, {x}, 0.2)"]
        form = self.rng.choice(forms)
        return form.format(name=name, x=value)

    def update_of(self, tensors: list[str], scope: Scope) -> str:
        """The update: what is in the slots has to show in it, mostly."""
        if self.chance(0.15):
            return alias(self.rng, scope)
        value = expression(self.rng, scope, self.rng.randint(1, 2))
        unread = [name for name in tensors if not reads(name, value)]
        if self.chance(0.9):
            value = " + ".join(
                [value, *(f"0.{3 + i} * {x}" for i, x in enumerate(unread))]
            )
        return value

    # ---- what is declared around others ----

    def wrap(self, depth: int) -> Part:
        """Functions around another part. They see the dtypes that there are."""
        rng = self.rng
        part = Rule(first={n: rng.choice(FIRST) for n in ["m", "v"][: rng.randint(0, 2)]})
        if self.chance(0.5):
            part.hyper["h"] = rng.choice(SCHEDULES if self.chance(0.3) else NUMBERS)
        if self.chance(0.4):
            self.prepare_of(part, counting=True)
        scalars = [name for name, value in part.now.items() if "Each" not in value]
        scope = Scope(["g", "p", *part.first], [*scalars, *part.hyper], promotes=True)
        names = ["g", "p", *part.first, *part.now, *part.hyper, *part.shared]
        lines, options = [], []
        if self.chance(0.7) or not part.first:
            result = self.seen_by_inner(scope)
            lines += [f"def before({part.taken(names, result)}):"]
            lines += [f"    return {', '.join(result)}", ""]
            options.append("before=before")
        if part.first or self.chance(0.5):
            scope = replace(scope, tensors=["u", *scope.tensors])
            new = {name: self.new_value(name, scope) for name in part.first}
            u = self.update_of(["u", *part.first], scope)
            lines += [f"def after({part.taken(['u', *names], [u, *new.values()])}):"]
            lines += [f"    return {u}, {entries(new)}" if new else f"    return {u}", ""]
            options.append("after=after")
        texts = [*part.now.values(), *part.new_shared.values()]
        if texts:
            known = [*part.hyper, *part.shared, "count", "updates", "params"]
            result = [entries(part.now)] + [entries(part.new_shared)] * bool(
                part.new_shared
            )
            lines += [f"def prepare({part.taken(known, texts)}):"]
            lines += [f"    return {', '.join(result)}", ""]
            options.append("prepare=prepare")
        values = {"slots": part.first, "shared": part.shared, "hyper": part.hyper}
        options += [
            f"{option}={entries(value)}" for option, value in values.items() if value
        ]
        lines.append(f"return fo.wrap({', '.join(['inner', *options])})")
        return Declared("wrapped", "\n".join(lines), [self.part(depth)])

    def seen_by_inner(self, scope: Scope) -> list[str]:
        """What `before` returns: g and p where it reads both, else the one that it reads."""
        rng = self.rng
        g = rng.choice([alias(rng, scope), expression(rng, scope, 1), "g"])
        p = rng.choice([alias(rng, scope), expression(rng, scope, 1), "p"])
        of_g = [x for x in (g, p) if reads("g", x)]
        if of_g and (reads("p", g) or reads("p", p)):
            return [g, p]
        return of_g[:1] or [p]

    def gate(self, depth: int) -> Part:
        otherwise = ', otherwise="pass"' if self.chance(0.3) else ""
        if self.chance(0.25):
            shared = ', shared={"usual": torch.tensor(0.5, dtype=torch.float64)}'
            body = f"{GATE_WITH_SHARED}\nreturn fo.gate(inner, active{shared}{otherwise})"
        else:
            body = f"{self.rng.choice(GATES)}\nreturn fo.gate(inner, active{otherwise})"
        return Declared("gated", body, [self.part(depth)])


# ---- programs ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Leaf:
    """A parameter: its shape, its dtype, whether it is contiguous."""

    shape: tuple[int, ...]
    dtype: str = "float32"
    strided: bool = False


@dataclass
class Program:
    """A transformation, what it starts from, and the gradients of every step: their kinds, by leaf
    and step.
    """

    seed: int
    part: Part
    leaves: dict[str, Leaf]
    nesting: str
    steps: int
    kinds: dict[tuple[str, int], str]
    groups: bool = False

    @property
    def missing(self) -> bool:
        """Whether some gradient is missing."""
        return "missing" in self.kinds.values()

    @property
    def lags(self) -> bool:
        """Whether a count of a parameter is read that lags in a stateful optimizer, where its
        gradients are missing.
        """
        return self.missing and self.part.counts()

    @property
    def shards(self) -> bool:
        """Whether it takes sharded tensors. torch has no view of an empty one that is sharded."""
        empty = any(0 in leaf.shape for leaf in self.leaves.values())
        return self.part.shards() and not (empty and "view" in self.source())

    def source(self) -> str:
        """The whole program, to be pasted and run."""
        definitions = Definitions()
        made = self.part.write(definitions)
        pieces = [
            f'"""Program {self.seed} of tests/programs.py."""\n\n{PRELUDE.rstrip()}',
            *definitions.texts,
            f"def transformation():\n    return {made}",
            f"def params(model=0):\n    return {self._nested(self._parameters())}",
            "\n".join(["def gradients(step, params, model=0):", *self._gradients()]),
            self._loop(),
        ]
        return "\n\n\n".join(pieces) + "\n"

    def _loop(self) -> str:
        lines = [
            'if __name__ == "__main__":',
            "    tx, ps = transformation(), params()",
            "    state = tx.init(ps)",
            f"    for step in range({self.steps}):",
            "        updates, state = tx.update(gradients(step, ps), state, ps)",
            "        ps = fo.apply_updates(ps, updates)",
            "    print(ps, state)",
        ]
        return "\n".join(lines)

    def _draw(self, seed: int, shape: tuple[int, ...], dtype: str) -> str:
        arguments = [f"{seed} + 1000 * model", *map(str, shape)]
        if dtype != "float32":
            arguments.append(f"dtype=torch.{dtype}")
        return f"draw({', '.join(arguments)})"

    def _parameters(self) -> dict[str, str]:
        drawn = {}
        for i, (path, leaf) in enumerate(self.leaves.items()):
            shape = leaf.shape[::-1] if leaf.strided else leaf.shape
            turn = ".t()" if leaf.strided else ""
            drawn[path] = self._draw(i, shape, leaf.dtype) + turn
        return drawn

    def _gradients(self) -> Iterator[str]:
        for step in range(self.steps):
            rows = {}
            for i, (path, leaf) in enumerate(self.leaves.items()):
                kind = self.kinds.get((path, step), "plain")
                rows[path] = self._gradient(100 * (step + 1) + i, leaf, path, kind)
            yield f"    if step == {step}:"
            for path in rows:
                twin = self.kinds.get((path, step), "").removeprefix("same as ")
                if twin in rows:
                    name = f"of_{[*rows].index(twin)}"
                    if rows[twin] != name:
                        yield f"        {name} = {rows[twin]}"
                    rows[twin] = rows[path] = name
            yield f"        return {self._nested(rows)}"

    def _gradient(self, seed: int, leaf: Leaf, path: str, kind: str) -> str:
        shape = leaf.shape
        if kind == "missing":
            return "None"
        if kind == "transposed" and len(shape) == 2:
            return f"{self._draw(seed, shape[::-1], leaf.dtype)}.t()"
        if kind == "expanded" and shape:
            ones = (*shape[:-1], 1)
            return f"{self._draw(seed, ones, leaf.dtype)}.expand({', '.join(map(str, shape))})"
        if kind == "sliced":
            return f"{self._draw(seed, (*shape, 2), leaf.dtype)}[..., 1]"
        if kind == "parameter":
            return f"params{self._index(path)}"
        drawn = self._draw(seed, shape, leaf.dtype)
        if kind == "nan" and 0 not in shape:
            return f"(with_nan({drawn}) if model == 0 else {drawn})"
        return drawn

    def _index(self, path: str) -> str:
        if self.nesting == "list":
            return f"[{[*self.leaves].index(path)}]"
        return "".join(f'["{key}"]' for key in path.split("/"))

    def _nested(self, values: dict[str, str]) -> str:
        if self.nesting == "list":
            return f"[{', '.join(values.values())}]"
        flat = {path: value for path, value in values.items() if "/" not in path}
        below: dict[str, dict[str, str]] = {}
        for path, value in values.items():
            if "/" in path:
                below.setdefault(path.split("/")[0], {})[path.split("/")[1]] = value
        return entries(flat | {key: entries(inside) for key, inside in below.items()})

    def smaller(self) -> Iterator[Program]:
        """Programs that do less; in every step there is still a gradient."""
        for program in self._smaller():
            missing = [key for key, kind in program.kinds.items() if kind == "missing"]
            steps = [step for _, step in missing if step < program.steps]
            if not any(steps.count(step) == len(program.leaves) for step in steps):
                yield program

    def _smaller(self) -> Iterator[Program]:
        for part in variations(self.part):
            yield replace(self, part=part)
        if len(self.leaves) > 1:
            for path in self.leaves:
                leaves = {p: leaf for p, leaf in self.leaves.items() if p != path}
                kinds = {
                    k: kind
                    for k, kind in self.kinds.items()
                    if k[0] != path and path not in kind
                }
                yield replace(self, leaves=leaves, kinds=kinds)
        if self.steps > 1:
            yield replace(self, steps=self.steps - 1)
        for key in self.kinds:
            yield replace(
                self, kinds={k: kind for k, kind in self.kinds.items() if k != key}
            )
        if self.groups:
            yield replace(self, groups=False)
        for path, leaf in self.leaves.items():
            if leaf.dtype != "float32" or leaf.strided:
                yield replace(self, leaves={**self.leaves, path: Leaf(leaf.shape)})

    def load(self) -> ModuleType:
        """The module that this source is."""
        source, name = self.source(), f"program_{self.seed}"
        module = ModuleType(name)
        module.__file__ = f"<{name} of tests/programs.py, {next(_LOADED)}>"
        lines = source.splitlines(keepends=True)
        linecache.cache[module.__file__] = (len(source), None, lines, module.__file__)
        sys.modules[name] = module
        exec(compile(source, module.__file__, "exec"), vars(module))
        return module


_LOADED = itertools.count()

SHAPES: list[tuple[int, ...]] = [(), (1,), (3,), (2, 3), (3, 3), (0, 2), (3,), (2, 3)]
STRIDES = ["transposed", "expanded", "sliced"]


def program(seed: int) -> Program:
    """The program of this seed. It depends on nothing else, but for which mechanisms the library
    has.
    """
    rng = random.Random(seed)
    dtypes = ["float32"]
    if rng.random() < 0.25:
        dtypes = rng.choice(
            [["float64"], ["float64", "float32"], ["bfloat16", "float32"]]
        )
    features = [
        name for name in ("missing", "nan", "strides", "aliases") if rng.random() < 0.3
    ]
    nesting = rng.choice(["flat", "nested", "list"])
    paths = {
        "flat": ["a", "b", "c"],
        "nested": ["a", "b/a", "b/c"],
        "list": ["0", "1", "2"],
    }[nesting][: rng.randint(1, 3)]
    author = Author(rng, "missing" in features, len(dtypes) > 1 or "bfloat16" in dtypes)
    part = author.whole()
    shapes = (
        [shape for shape in SHAPES if 0 not in shape] if MECHANISMS["largest"] else SHAPES
    )
    leaves = {}
    for path in paths:
        shape = rng.choice(shapes)
        strided = len(shape) == 2 and rng.random() < 0.1
        leaves[path] = Leaf(shape, rng.choice(dtypes), strided)
    steps = rng.randint(3, 5)
    kinds = _kinds(rng, features, leaves, steps)
    return Program(seed, part, leaves, nesting, steps, kinds, groups=rng.random() < 0.25)


def _kinds(
    rng: random.Random, features: list[str], leaves: dict[str, Leaf], steps: int
) -> dict[tuple[str, int], str]:
    """What is unusual about which gradient. In every step there is a gradient of some leaf."""
    kinds: dict[tuple[str, int], str] = {}
    everywhere = {path: rng.choice(STRIDES) for path in leaves if rng.random() < 0.6}
    for step in range(steps):
        for path, leaf in leaves.items():
            if "strides" in features and path in everywhere and rng.random() < 0.9:
                kinds[path, step] = everywhere[path]
            if "aliases" in features and rng.random() < 0.2:
                twins = [
                    other for other in leaves if other < path and leaves[other] == leaf
                ]
                twins = [other for other in twins if (other, step) not in kinds]
                kinds[path, step] = (
                    f"same as {rng.choice(twins)}" if twins else "parameter"
                )
        if "nan" in features and rng.random() < 0.3:
            kinds[rng.choice([*leaves]), step] = "nan"
        if "missing" in features and len(leaves) > 1:
            for path in rng.sample([*leaves], rng.randint(0, len(leaves) - 1)):
                if rng.random() < 0.7:
                    kinds[path, step] = "missing"
    return {
        (path, step): kind
        for (path, step), kind in kinds.items()
        if kinds.get((kind.removeprefix("same as "), step)) != "missing"
    }
