"""The law over programs: what `update` and `apply_updates` give is the meaning, and every other
execution gives the same numbers.

An execution takes a program, runs all its steps, and returns what it saw after each. How far two
right executions may be apart is measured: the meaning is worked out twice, the second time from
numbers that are a few roundings off.
"""

from __future__ import annotations

import copy
import math
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from programs import Program
from torch import Tensor, nn

import functorch_opt as fo
from functorch_opt import tree
from functorch_opt._core import gate
from functorch_opt._execution import pieces, together
from functorch_opt._execution.compiled import CompiledStep
from functorch_opt._execution.models import ModelsStep, stages_of
from functorch_opt._execution.segments import IN_PIECES
from functorch_opt._execution.walk import Walk
from functorch_opt._execution.writes import memory_of

Seen = list[dict[str, Tensor]]
"""Of every step: parameters by ``params/PATH``, and if the execution has a functional state, its
tensors by ``state/PATH``.
"""

Execution = Callable[[Program, "Plan"], Seen]


# ---- a program that is loaded --------------------------------------------------------------------


class Plan:
    """What a program says, as tensors: each call makes them anew, so that nothing that is
    overwritten is used again.
    """

    def __init__(self, program: Program) -> None:
        self.program, self.module = program, program.load()
        self.steps = range(program.steps)

    def tx(self) -> fo.GradientTransformation:
        made: fo.GradientTransformation = self.module.transformation()
        return made

    def params(self, model: int = 0) -> Any:
        return self.module.params(model)

    def grads(self, step: int, params: Any, model: int = 0) -> Any:
        return self.module.gradients(step, params, model)


def look(params: Any, state: Any = None) -> dict[str, Tensor]:
    """A copy of what is there now."""
    seen = dict(
        zip(
            (f"params/{path}" for path in tree.paths(params)),
            tree.flatten(params)[0],
            strict=True,
        )
    )
    for path, x in zip(tree.paths(state), tree.flatten(state)[0], strict=True):
        if x is not None:
            seen[f"state/{path}"] = x
    return {path: tree.whole(x).detach().clone() for path, x in seen.items()}


def pure_step(
    tx: fo.GradientTransformation,
) -> Callable[[Any, Any, Any], tuple[Any, Any]]:
    """The meaning of a step."""

    def step(params: Any, grads: Any, state: Any) -> tuple[Any, Any]:
        updates, state = tx.update(grads, state, params)
        return fo.apply_updates(params, updates), state

    return step


def run(
    plan: Plan,
    step: Callable[[Any, Any, Any], tuple[Any, Any]],
    tx: fo.GradientTransformation,
    model: int = 0,
    moved: Callable[[Any], Any] = lambda x: x,
) -> Seen:
    """All steps of a functional execution. `moved` is applied to all that comes from the
    program.
    """
    params = moved(plan.params(model))
    state, seen = tx.init(params), []
    for i in plan.steps:
        params, state = step(params, moved(plan.grads(i, params, model)), state)
        seen.append(look(params, state))
    return seen


# ---- executions ----------------------------------------------------------------------------------


def meaning(program: Program, plan: Plan) -> Seen:
    tx = plan.tx()
    return run(plan, pure_step(tx), tx)


def update_is_pure(program: Program, plan: Plan) -> Seen:
    tx = plan.tx()
    return run(plan, untouched(pure_step(tx)), tx)


def untouched(
    step: Callable[[Any, Any, Any], tuple[Any, Any]],
) -> Callable[..., tuple[Any, Any]]:
    """`step`, and a look at whether what it was given is still what it was, now and after the
    steps that follow.
    """
    given: list[tuple[str, Tensor, Tensor]] = []

    def watched(params: Any, grads: Any, state: Any) -> tuple[Any, Any]:
        for name, what in (("params", params), ("grads", grads), ("state", state)):
            for path, x in zip(tree.paths(what), tree.flatten(what)[0], strict=True):
                if x is not None:
                    given.append((f"{name}/{path}", x, x.clone()))
        result = step(params, grads, state)
        for path, x, before in given:
            if not torch.equal(x.nan_to_num(7.0), before.nan_to_num(7.0)):
                raise AssertionError(f"{path}, which was given, has been overwritten")
        return result

    return watched


def compiled(donate: bool, backend: str, as_on_a_device: bool = False) -> Execution:
    """By `compiled_step`.

    `as_on_a_device`, what stages work out once a step is compiled too, of all stages together, and
    the host knows no decision.
    """

    def execute(program: Program, plan: Plan) -> Seen:
        tx = plan.tx()
        step: Any = CompiledStep(tx, donate, backend)
        with undecided() if as_on_a_device else nullcontext():
            return run(plan, step if donate else untouched(step), tx)

    return execute


@contextmanager
def undecided() -> Iterator[None]:
    """Numbers of the CPU count as those of a device."""
    with (
        mock.patch.object(together, "DEVICES", {"cpu"}),
        mock.patch.object(Walk, "on_host", False),
        mock.patch.object(gate, "known", return_value=None),
    ):
        yield


def update_resumed(program: Program, plan: Plan) -> Seen:
    """`update`, with a state that is saved and loaded into a new one after every step."""
    tx = plan.tx()

    def step(params: Any, grads: Any, state: Any) -> tuple[Any, Any]:
        params, state = pure_step(tx)(params, grads, state)
        return params, fo.load_state_dict(plan.tx().init(params), fo.state_dict(state))

    return run(plan, step, tx)


def two_models_in_turn(program: Program, plan: Plan) -> Seen:
    """One compiled step for two models; the first is seen."""
    tx = plan.tx()
    step, other = CompiledStep(tx, True, "eager"), plan.params(1)
    others = [tx.init(other)]

    def turn(params: Any, grads: Any, state: Any) -> tuple[Any, Any]:
        result = step(params, grads, state)
        i = len(others) - 1
        others.append(step(other, plan.grads(i, other, 1), others[-1])[1])
        return result

    return run(plan, turn, tx)


@contextmanager
def afresh() -> Iterator[None]:
    """Inside, Dynamo knows no graphs of before, and may make one for each step.

    torch takes a graph again, from its cache on the disk too, where a parameter and its gradient
    share memory in one step and not in the next. `test_torch_takes_a_graph_again` shows it.
    """
    torch._dynamo.reset()
    no_cache = torch._functorch.config.patch(enable_autograd_cache=False)
    with torch._dynamo.config.patch(recompile_limit=32), no_cache:
        yield


def afresh_where_memory_is_shared(step: Callable[..., Any]) -> Callable[..., Any]:
    """`step` of trees, for which the graphs are forgotten when other tensors share their memory."""
    last: list[Any] = []

    def watched(*trees: Any) -> Any:
        memory = [memory_of(x) for x in tree.leaves(list(trees))]
        shared = [memory.index(place) for place in memory]
        if last and last[0] != shared:
            torch._dynamo.reset()
        last[:] = [shared]
        return step(*trees)

    return watched


def users_compile(donate: bool | None, backend: str) -> Execution:
    """A user's own `torch.compile` around update and apply_updates, or if `donate` is not None
    around a compiled step.
    """

    def execute(program: Program, plan: Plan) -> Seen:
        tx = plan.tx()
        step: Any = pure_step(tx) if donate is None else CompiledStep(tx, donate)

        def around(params: Any, grads: Any, state: Any) -> tuple[Any, Any]:
            return step(params, grads, state)

        with afresh():
            graph = torch.compile(around, fullgraph=True, backend=backend)
            graph = afresh_where_memory_is_shared(graph)
            return run(plan, graph if donate else untouched(graph), tx)

    return execute


Put = Callable[[Tensor], Tensor]
"""Where a tensor goes before it is used: to several ranks, or nowhere."""


def here(x: Tensor) -> Tensor:
    return x


def optimizer(
    program: Program, plan: Plan, compile: bool, put: Put = here
) -> fo.optim.Optimizer:
    """The optimizer of a program, over copies of its parameters."""
    first = plan.params()
    params = [nn.Parameter(put(p.clone())) for p in tree.flatten(first)[0]]
    named = list(zip(tree.paths(first), params, strict=True))
    return fo.optim.Optimizer(groups_of(program, named), plan.tx(), compile=compile)


def groups_of(
    program: Program, named: list[tuple[str, nn.Parameter]]
) -> list[dict[str, Any]]:
    """One group or two."""
    half = len(named) // 2 if program.groups else 0
    return [{"params": part} for part in (named[:half], named[half:]) if part]


def train(
    plan: Plan,
    opt: fo.optim.Optimizer,
    step: Callable[[], Any],
    written_over: bool = False,
    put: Put = here,
) -> Seen:
    """All steps of an optimizer. Gradients are new tensors in every step, or if `written_over`
    numbers in those that are there, as `backward` leaves them.
    """
    params = [p for group in opt.param_groups for p in group["params"]]
    spec, seen = tree.flatten(plan.params())[1], []
    for i in plan.steps:
        now = tree.unflatten(spec, [p.detach() for p in params])
        for p, g in zip(params, tree.flatten(plan.grads(i, now))[0], strict=True):
            if g is None:
                p.grad = None
            elif written_over and p.grad is not None:
                p.grad.copy_(g)
            else:
                p.grad = g.clone() if written_over else put(g)
        step()
        seen.append(look(tree.unflatten(spec, params)))
    return seen


def stateful(compile: bool, written_over: bool = False) -> Execution:
    """The optimizer; with ``compile=True`` through Inductor."""

    def execute(program: Program, plan: Plan) -> Seen:
        opt = optimizer(program, plan, compile)
        return train(plan, opt, opt.step, written_over)

    return execute


def stateful_in_pieces(program: Program, plan: Plan) -> Seen:
    """The optimizer, with pieces so small that most tensors have several."""
    usual, pieces.PIECE = pieces.PIECE, 4
    try:
        return stateful(False)(program, plan)
    finally:
        pieces.PIECE = usual


def stateful_traced(written_over: bool = False) -> Execution:
    """The optimizer with ``compile=True``, all of it but Inductor."""

    def execute(program: Program, plan: Plan) -> Seen:
        with traced():
            return stateful(True, written_over)(program, plan)

    return execute


def stateful_resumed(program: Program, plan: Plan) -> Seen:
    """The optimizer, replaced after every step by a new one that loads what the old one saved."""
    opts = [optimizer(program, plan, False)]
    params = [p for group in opts[0].param_groups for p in group["params"]]
    named = list(zip(tree.paths(plan.params()), params, strict=True))

    def step() -> None:
        opts[-1].step()
        saved = copy.deepcopy(opts[-1].state_dict())
        opts.append(fo.optim.Optimizer(groups_of(program, named), plan.tx()))
        opts[-1].load_state_dict(saved)

    return train(plan, opts[0], step)


@contextmanager
def traced() -> Iterator[None]:
    """Inside, every compiled step is traced, and the trace is run as it is, in milliseconds."""
    made = CompiledStep.__init__

    def init(self: CompiledStep, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **kwargs)
        self.backend = "eager"

    CompiledStep.__init__ = init  # type: ignore[method-assign]
    try:
        yield
    finally:
        CompiledStep.__init__ = made  # type: ignore[method-assign]


def users_compiled_optimizer(compile: bool, backend: str) -> Execution:
    """A user's own `torch.compile` of the step of an optimizer."""

    def execute(program: Program, plan: Plan) -> Seen:
        with afresh():
            opt = optimizer(program, plan, compile)
            opt.init_state()
            graph = torch.compile(opt.step, fullgraph=True, backend=backend)
            params = [p for group in opt.param_groups for p in group["params"]]
            watched = afresh_where_memory_is_shared(lambda *_: graph())
            return train(plan, opt, lambda: watched(params, [p.grad for p in params]))

    return execute


def of_two_models(make: Callable[[Any], Callable[..., Any]]) -> Execution:
    """Two models at once, by the step that is made of the transformation. The second is compared
    with its own loop here, the first is returned.
    """
    models = 2

    def execute(program: Program, plan: Plan) -> Seen:
        of_model = [plan.params(m) for m in range(models)]
        tx = plan.tx()
        step = make(tx)
        params = tree.map(lambda *xs: torch.stack(xs), *of_model)
        state = torch.vmap(tx.init)(params)
        seen: list[Seen] = [[] for _ in range(models)]

        def of(m: int, what: Any) -> Any:
            return tree.map(lambda x: x[m].clone(), what)

        for i in plan.steps:
            grads = [plan.grads(i, of(m, params), m) for m in range(models)]
            stacked = tree.map(lambda *xs: torch.stack(xs), *grads)
            params, state = step(params, stacked, state)
            for m in range(models):
                seen[m].append(look(of(m, params), of(m, state)))
        loop = run(plan, pure_step(tx), tx, model=1)
        difference = first_difference(loop, seen[1], slack(program, plan, loop, model=1))
        if difference is not None:
            raise OfSecondModel(difference)
        return seen[0]

    return execute


def vmapped(tx: Any) -> Callable[..., Any]:
    """A step of all models, by `vmap`."""

    def step(params: Any, grads: Any, state: Any) -> Any:
        leaves, spec = tree.flatten(grads)
        there = [k for k, g in enumerate(leaves) if g is not None]

        def one(ps: Any, given: list[Tensor], state: Any) -> Any:
            mine: list[Any] = [None] * len(leaves)
            for k, g in zip(there, given, strict=True):
                mine[k] = g
            return pure_step(tx)(ps, tree.unflatten(spec, mine), state)

        return torch.vmap(one)(params, [leaves[k] for k in there], state)

    return step


def of_models(backend: str, donate: bool = True) -> Execution:
    """A compiled step of many models."""
    return of_two_models(lambda tx: ModelsStep(tx, donate, backend))


class OfSecondModel(AssertionError):
    """The second of two models differs."""

    def __init__(self, difference: Difference) -> None:
        super().__init__(f"of the second model, {difference}")
        self.difference = difference


EAGER: dict[str, Execution] = {
    "update, pure": update_is_pure,
    "compiled_step, donate, traced": compiled(True, "eager"),
    "compiled_step, donate=False, traced": compiled(False, "eager", as_on_a_device=True),
    "compiled_step, donate, as on a device": compiled(True, "eager", as_on_a_device=True),
    "in place, as on a device": compiled(True, IN_PIECES, as_on_a_device=True),
    "Optimizer": stateful(False),
    "Optimizer, gradients written over": stateful(False, written_over=True),
    "Optimizer, in pieces": stateful_in_pieces,
    "Optimizer, compile=True, traced": stateful_traced(),
    "Optimizer, compile=True, traced, gradients written over": stateful_traced(
        written_over=True
    ),
    "vmap of update": of_two_models(vmapped),
    "compiled_step of models, traced": of_models("eager"),
}
"""What can be checked of a program without compiling anything."""

LIVES: dict[str, Execution] = {
    "update, resumed": update_resumed,
    "Optimizer, resumed": stateful_resumed,
    "compiled_step, two models in turn, traced": two_models_in_turn,
}
"""The same again in a longer life: saved and loaded, or used for something else between."""

INDUCTOR: dict[str, Execution] = {
    "compiled_step, donate": compiled(True, "inductor"),
    "compiled_step, donate=False": compiled(False, "inductor"),
    "compiled_step of models": of_models("inductor"),
    "Optimizer, compile=True": stateful(True),
    "torch.compile of update": users_compile(None, "inductor"),
    "torch.compile of compiled_step, donate": users_compile(True, "inductor"),
    "torch.compile of compiled_step, donate=False": users_compile(False, "inductor"),
    "torch.compile of Optimizer.step": users_compiled_optimizer(False, "inductor"),
    "torch.compile of Optimizer.step, compile=True": users_compiled_optimizer(
        True, "inductor"
    ),
}
"""What Inductor makes of a program: seconds each."""

DYNAMO: dict[str, Execution] = {
    "torch.compile of update, aot_eager": users_compile(None, "aot_eager"),
    "torch.compile of compiled_step, donate, aot_eager": users_compile(True, "aot_eager"),
    "torch.compile of compiled_step, donate=False, aot_eager": users_compile(
        False, "aot_eager"
    ),
    "torch.compile of Optimizer.step, aot_eager": users_compiled_optimizer(
        False, "aot_eager"
    ),
}
"""The same without Inductor: graphs with all their writes, run as they are."""

ALL = EAGER | LIVES | INDUCTOR | DYNAMO


def has_tensors(tx: fo.GradientTransformation) -> bool:
    """Whether a hyperparameter of a stage is a tensor."""
    onces = [getattr(stage, "once", None) for stage in stages_of(tx)]
    varying = [x for once in onces if once for x in once.varying.values()]
    return any(isinstance(x, Tensor) for x in varying)


def applies(name: str, program: Program) -> bool:
    """Whether an execution is to give the same numbers: a count that a rule reads lags in the
    stateful ones, as in torch. In a graph it is one for each parameter, and so no value that all
    share can be made of it, which is an error that says so. A step of many models refuses
    hyperparameters that are tensors.
    """
    if "torch.compile of Optimizer" in name and program.part.shares_counts():
        return False
    if "of models" in name and has_tensors(Plan(program).tx()):
        return False
    return not ("Optimizer" in name and program.lags)


# ---- how far apart two right executions may be ---------------------------------------------------

ROUNDING = {
    torch.bfloat16: 2**-6,
    torch.float16: 2**-9,
    torch.float32: 1e-5,
    torch.float64: 1e-6,
}
"""What may be off at the least, relative to the size of the numbers. In float64 too, for a
schedule may give float32.
"""


def size(x: Tensor) -> float:
    """The largest element that is finite."""
    return float(x.double().nan_to_num(0, 0, 0).abs().max()) if x.numel() else 0.0


def slack(program: Program, plan: Plan, expected: Seen, model: int = 0) -> list[float]:
    """For each step how much an execution may be off: what a few roundings at the beginning and of
    every gradient become.
    """
    dtypes = {getattr(torch, leaf.dtype) for leaf in program.leaves.values()}
    eps = max(torch.finfo(dtype).eps for dtype in dtypes)
    tx = plan.tx()

    def moved(given: Any) -> Any:
        return tree.map(lambda x: (x.double() * (1 + 2 * eps)).to(x.dtype), given)

    nearby = run(plan, pure_step(tx), tx, model, moved)
    allowed, least = [], max(ROUNDING[dtype] for dtype in dtypes)
    drift, largest = 0.0, 1.0
    for a, b in zip(expected, nearby, strict=True):
        for path, x in a.items():
            if x.is_floating_point():
                drift = max(drift, size(x - b[path]))
                largest = max(largest, size(x))
        allowed.append(least * largest + 8 * drift)
    return allowed


@dataclass
class Difference:
    """The first place where an execution is not what is meant."""

    step: int
    path: str
    expected: Any
    got: Any
    allowed: float

    def is_of_dtype(self) -> bool:
        """Whether the numbers are the same, and only their dtype is another."""
        x, y = self.expected, self.got
        if not isinstance(y, Tensor) or x.dtype is y.dtype or x.shape != y.shape:
            return False
        wide = x.double(), y.double()
        return torch.allclose(*wide, rtol=0, atol=self.allowed, equal_nan=True)

    def __str__(self) -> str:
        return (
            f"after step {self.step} {self.path} is\n    {shown(self.got)}\nand means\n"
            f"    {shown(self.expected)}\n(what may be off is {self.allowed:.1e})"
        )


def shown(x: Any) -> str:
    return repr(x).replace("\n", "\n    ")


def first_difference(
    expected: Seen, got: Seen, allowed: list[float]
) -> Difference | None:
    """Where `got` differs. What `got` does not know of (the state, in the stateful optimizers) is
    not compared.
    """
    for step, (a, b) in enumerate(zip(expected, got, strict=True)):
        for path, x in a.items():
            if path not in b:
                if path.startswith("params") or any(
                    other.startswith("state") for other in b
                ):
                    return Difference(step, path, x, "nothing", 0.0)
                continue
            y = b[path]
            same = x.shape == y.shape and x.dtype is y.dtype
            if same and x.is_floating_point():
                wide = x.double(), y.double()
                same = torch.allclose(*wide, rtol=0, atol=allowed[step], equal_nan=True)
            elif same:
                same = torch.equal(x, y)
            if not same:
                return Difference(step, path, x, y, allowed[step])
    return None


# ---- checking a program --------------------------------------------------------------------------


@dataclass
class Failure:
    """An execution of a program that gives other numbers, or an error."""

    program: Program
    execution: str
    what: str
    kind: str

    def __str__(self) -> str:
        kinds = "\n".join(
            f"    step {step}: {path} {kind}"
            for (path, step), kind in sorted(
                self.program.kinds.items(), key=lambda row: row[0][::-1]
            )
        )
        return (
            f"program {self.program.seed}, execution {self.execution!r}:\n\n{self.what}\n\n"
            f"Unusual gradients:\n{kinds or '    none'}\n"
            f"Groups: {2 if self.program.groups else 1}\n\n"
            f"The program, whose loop below is what is meant:\n\n{self.program.source()}"
        )


MEANING = "update, the meaning itself"
"""An error in it is a failure too: what programs do is allowed."""


class Unfit(Exception):
    """A program whose numbers depend too much on rounding says nothing about executions."""


def check(
    program: Program, executions: Iterable[str], limit: float = 0.03
) -> list[Failure]:
    """What is wrong with these executions of a program.

    Raises:
        Unfit: the program is not one to compare with. At most `limit`, relative to the numbers,
        may rounding change; more in bfloat16.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            plan = Plan(program)
            expected = meaning(program, plan)
            allowed = slack(program, plan, expected)
        except Exception as error:
            return [error_in(program, MEANING, error)]
        low = any(leaf.dtype == "bfloat16" for leaf in program.leaves.values())
        scale = max(
            [1.0, *(size(x) for x in expected[-1].values() if x.is_floating_point())]
        )
        if not math.isfinite(allowed[-1]) or allowed[-1] > scale * (
            0.3 if low else limit
        ):
            raise Unfit(f"rounding alone may change it by {allowed[-1]:.1e}")
        failures = []
        for name in executions:
            if applies(name, program):
                failures += failures_of(program, name, plan, expected, allowed)
    return failures


def changes_its_form(plan: Plan, expected: Seen) -> bool:
    """Whether some state is of another shape or dtype than it began with, which the stateful
    optimizers and a step of many models refuse.
    """
    began = look({}, plan.tx().init(plan.params()))
    forms = [
        {path: (x.shape, x.dtype) for path, x in seen.items() if path.startswith("state")}
        for seen in (began, *expected)
    ]
    return any(form != forms[0] for form in forms)


def refuses_other_forms(name: str, error: Exception) -> bool:
    """Whether an execution says that the state is of another form than before."""
    of_optimizer = "Optimizer" in name and "changes its form" in str(error)
    of_models = "of models" in name and "keeps dtypes and shapes" in str(error)
    return of_optimizer or of_models


def error_in(program: Program, name: str, error: Exception) -> Failure:
    last = "".join(traceback.format_exception(error)[-9:])
    return Failure(program, name, last, type(error).__name__)


def failures_of(
    program: Program, name: str, plan: Plan, expected: Seen, allowed: list[float]
) -> list[Failure]:
    difference = None
    try:
        got = ALL[name](program, plan)
    except OfSecondModel as error:
        difference = error.difference
    except Exception as error:
        if refuses_other_forms(name, error) and changes_its_form(plan, expected):
            return []
        return [error_in(program, name, error)]
    difference = difference or first_difference(expected, got, allowed)
    if difference is None:
        return []
    if (
        name == "vmap of update"
        and difference.is_of_dtype()
        and changes_its_dtype(program)
    ):
        return []
    return [Failure(program, name, str(difference), "numbers")]


def changes_its_dtype(program: Program) -> bool:
    """Whether some state of a model is of another dtype once an inner transformation has run.

    Under vmap a gate chooses between the state before and after, for each model, and a tensor has
    one dtype for all of them.
    """
    plan = Plan(replace(program, steps=6))
    runs = [run(plan, pure_step(plan.tx()), plan.tx(), model) for model in (0, 1)]
    return any(changes_its_form(plan, seen) for seen in runs)


def smallest(failure: Failure, tries: int = 300) -> Failure:
    """A smaller program that fails in the same execution and in the same way."""
    found, tried = failure, 0
    while True:
        for program in found.program.smaller():
            tried += 1
            if tried > tries:
                return found
            try:
                failures = check(program, [failure.execution])
            except Unfit:
                continue
            if failures and failures[0].kind == failure.kind:
                found = failures[0]
                break
        else:
            return found
