"""A step of many models at once, in place: what ``vmap`` of a step of one model computes.

Every tensor has a first dimension with an entry for each model; so have counts and hyperparameters.
The whole step is one function of these tensors, with what stages work out once a step inside. It is
compiled for all sizes, mostly into one kernel, which reads everything once and writes it in place.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from itertools import chain
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap

from functorch_opt import tree
from functorch_opt._core import sharding, structure
from functorch_opt._core.chain import Chain
from functorch_opt._core.gate import Gate
from functorch_opt._core.groups import Groups
from functorch_opt._core.inject import Injected
from functorch_opt._core.rule import Leafwise
from functorch_opt._core.transformation import GradientTransformation, apply_updates
from functorch_opt._core.wrap import Wrap
from functorch_opt._execution.body import entry_of
from functorch_opt._execution.guards import Meaning, surroundings
from functorch_opt._execution.kernel import Program
from functorch_opt._execution.memory import apart_from_params, with_memory_of_its_own
from functorch_opt._execution.segments import LARGE, Unreadable, Watched
from functorch_opt._execution.trials import warn_uncompiled
from functorch_opt._execution.writes import computed, run_eagerly
from functorch_opt.tree import PyTree

MOST = 8
"""Programs that a step keeps, for models of other shapes and kinds."""


class ModelsStep:
    """What `compiled_step` makes for many models."""

    def __init__(
        self, tx: GradientTransformation, donate: bool, backend: Any = "inductor"
    ) -> None:
        self.tx = tx
        self.donate = donate
        _check_has_no_tensors(tx)

        def step(params: PyTree, state: PyTree, grads: PyTree, extra: PyTree) -> Any:
            updates, new = tx.update(grads, state, params, **extra)
            return apply_updates(params, updates), new

        self.run = OverModels(step, functions_of(tx), backend)
        self.returned: list[PyTree] = []

    def __repr__(self) -> str:
        donate = "" if self.donate else ", donate=False"
        return f"compiled_step({self.tx!r}{donate}, models=True)"

    @torch.no_grad()
    def __call__(
        self, params: PyTree, grads: PyTree, state: PyTree, **extra: Any
    ) -> tuple[PyTree, PyTree]:
        extra = self.tx.read_of(extra)
        if torch.compiler.is_compiling():
            return self._traced(params, grads, state, extra)
        if not self.donate:
            params = tree.map(torch.clone, params)
            state = tree.map(torch.clone, state)
        elif not any(state is one for one in self.returned):
            _check_memory(params)
            others = [*tree.leaves(params), *tree.leaves(grads)]
            state = with_memory_of_its_own(state, others)
            self.returned = [state, *self.returned[: MOST - 1]]
        self.run(params, state, grads, extra)
        return params, state

    def _traced(
        self, params: PyTree, grads: PyTree, state: PyTree, extra: PyTree
    ) -> tuple[PyTree, PyTree]:
        """The step as operations of a graph that somebody else compiles."""
        leaves, spec = structure.flatten((params, state, grads, extra))
        present = tuple([x is not None for x in leaves])
        function = OnTensors(self.run.f, (params, state), spec, present)
        args = [x for x in leaves if x is not None]
        writes = function(args)
        new = iter([computed(x) for _, x in writes])
        places = present[: function.places]
        filled = [next(new) if there else None for there in places]
        moved, state = structure.unflatten(function.moved, filled)
        if self.donate:
            moved = tree.map(Tensor.copy_, params, moved)
        return moved, state


class OverModels:
    """A function of the trees of one model, applied to those of all models, in place.

    Args:
        f: the pure function ``(params, state, *given) -> (params, state)`` of one model.
        functions: what it runs that may read something that changes.
        backend: compiles; see `Program`.
    """

    def __init__(
        self, f: Callable[..., Any], functions: list[Any], backend: Any = "inductor"
    ) -> None:
        self.f = f
        self.backend = backend
        self.meanings = [Meaning(function) for function in functions]
        self.made: OrderedDict[Any, list[Prepared]] = OrderedDict()

    @torch.no_grad()
    def __call__(self, params: PyTree, state: PyTree, *given: PyTree) -> None:
        """Overwrite the tensors of `params` and `state`."""
        leaves, spec = structure.flatten_tensors((params, state, *given), "the step")
        present = tuple([x is not None for x in leaves])
        args = [x for x in leaves if x is not None]
        meaning = tuple([meaning.now() for meaning in self.meanings])
        key = spec, present, meaning, surroundings()
        made = self.made.setdefault(key, [])
        self.made.move_to_end(key)
        fitting = (one for one in made if one.watched.are_like([args]))
        prepared = next(fitting, None)
        if prepared is None:
            function = OnTensors(self.f, (params, state), spec, present)
            prepared = self._prepared(function, made, args)
        written = args[: prepared.function.writes]
        read = apart_from_params(args[prepared.function.writes :], written)
        torch.autograd.graph.increment_version(written)
        prepared([*written, *read])

    def _prepared(
        self, function: OnTensors, made: list[Prepared], args: list[Any]
    ) -> Prepared:
        """What runs tensors like these, for which there is nothing yet."""
        check_models(args)
        is_large = sum(map(Tensor.numel, args)) > LARGE
        threads = torch.get_num_threads() if is_large else 1
        lying = [x.contiguous() for x in args]
        known = [one.program for one in made if one.threads == threads and one.program]
        fitting = (one for one in known if one.fits(lying))
        program = next(fitting, None)
        if program is None:
            program = self._compiled(function, lying, threads)
        new = Prepared(function, program, threads, Watched([args]))
        made[:] = [new, *made[: MOST - 1]]
        while len(self.made) > MOST:
            self.made.popitem(last=False)
        return new

    def _compiled(
        self, function: OnTensors, args: list[Tensor], threads: int
    ) -> Program | None:
        """The function compiled; None, with a warning, if that cannot be."""
        unknown = [meaning.unknown for meaning in self.meanings if meaning.unknown]
        try:
            if unknown:
                raise Unreadable(("the transformation", unknown[0]))
            examples = [x.detach() for x in args]
            return Program(function, examples, threads, self.backend)
        except Exception as error:
            failure = error
        function(args)  # A mistake in the caller's functions raises its own error here.
        warn_uncompiled("many models are stepped eagerly", failure, stacklevel=6)
        return None


class OnTensors:
    """The function of trees as one of the list of their tensors, which says what is written.

    What it writes are the first tensors of the list, those of the parameters and the state.
    """

    def __init__(
        self, f: Callable[..., Any], moved: PyTree, spec: Any, present: tuple[bool, ...]
    ) -> None:
        self.f, self.spec, self.present = f, spec, present
        leaves, self.moved = structure.flatten(moved)
        self.places = len(leaves)
        self.writes = len([x for x in leaves if x is not None])

    def __call__(self, args: list[Tensor]) -> list[tuple[int, Tensor]]:
        new = vmap(self._of_one, randomness="different")(args)
        return [*enumerate(new)]

    def _of_one(self, args: list[Tensor]) -> list[Tensor]:
        left = iter(args)
        leaves = [next(left) if there else None for there in self.present]
        params, state, *given = structure.unflatten(self.spec, leaves)
        new = self.f(params, state, *given)
        names = ("params and state", "what came of them")
        found = structure.match((params, state), self.moved, new, names=names)
        for old, x in zip(leaves, found, strict=False):
            _check_stays(old, x)
        return [x for x in found if x is not None]


class Prepared:
    """What runs tensors of one kind."""

    def __init__(
        self, function: OnTensors, program: Program | None, threads: int, watched: Watched
    ) -> None:
        self.function = function
        self.program = program
        self.threads = threads
        self.watched = watched

    def __call__(self, args: list[Tensor]) -> None:
        if self.program is None:
            run_eagerly(self.function, args)
            return
        lying = [x.contiguous() for x in args]
        self.program(lying)
        written = args[: self.function.writes]
        for x, new in zip(written, lying, strict=False):
            if x is not new:
                x.copy_(new)


# ---- what is read --------------------------------------------------------------------------------


def stages_of(tx: GradientTransformation) -> list[GradientTransformation]:
    """`tx` and the transformations in it."""
    values = vars(tx).values()
    inner = [of for of in values if isinstance(of, GradientTransformation)]
    if isinstance(tx, Chain):
        inner = [*tx.stages.values()]
    elif isinstance(tx, Groups):
        inner = [*tx.inside.values()]
    return [tx, *chain.from_iterable(map(stages_of, inner))]


def functions_of(tx: GradientTransformation) -> list[Any]:
    """What an update of `tx` runs of a user's code."""
    return [*chain.from_iterable(map(_functions_of_stage, stages_of(tx)))]


def _functions_of_stage(tx: GradientTransformation) -> list[Any]:
    if isinstance(tx, Injected):
        made = tx.factory(**tx.fixed, **tx.numbers)
        return [*tx.schedules.values(), *functions_of(made)]
    if not isinstance(tx, (Leafwise, Wrap, Gate)):
        values = vars(tx).values()
        return [f for f in values if isinstance(f, FunctionType)]
    varying = tx.once.varying.values()
    schedules = [x for x in varying if callable(x)]
    found: list[Any] = [tx.once.prepare, *schedules]
    if isinstance(tx, Leafwise):
        found += entry_of("rule", tx).functions
        found += [*tx.totals.functions.values(), tx.due]
    if isinstance(tx, Wrap):
        found += entry_of("enter", tx).functions
    return [f for f in found if f is not None]


# ---- checks --------------------------------------------------------------------------------------


def check_models(args: list[Any]) -> None:
    """Raise an error if these tensors have no first dimension, of one size, for the models."""
    if any(map(sharding.is_sharded, args)):
        raise TypeError(
            "many models are not stepped over sharded tensors; got a DTensor."
        )
    shapes = [tuple(x.shape) for x in args]
    numbers_of_models = {shape[:1] for shape in shapes}
    if len(numbers_of_models) > 1 or not all(shapes):
        raise ValueError(
            "every tensor of params, grads, state and extra arguments needs a first dimension of "
            f"one size, with an entry for each model; got the shapes {sorted({*shapes})}. "
            "A state of many models comes from vmap(tx.init)(params)."
        )


def _check_memory(params: PyTree) -> None:
    """Raise ValueError where models, or parameters, share memory."""
    leaves = structure.flatten_tensors(params, "params")[0]
    seen: set[int] = set()
    for path, p in zip(structure.paths(params), leaves, strict=True):
        if p is None or not p.numel():
            continue
        if torch._debug_has_internal_overlap(p) == 1 or p.data_ptr() in seen:
            raise ValueError(
                f"the parameter at {path!r} shares memory, within itself or with another one, so "
                "that an update in place would move more than one. Give clones."
            )
        seen.add(p.data_ptr())


def _check_stays(old: Tensor | None, new: Tensor | None) -> None:
    """Raise ValueError if a tensor cannot be written into the memory of the one before."""

    def kind(x: Tensor | None) -> Any:
        return None if x is None else (x.dtype, tuple(x.shape))

    if kind(old) != kind(new):
        raise ValueError(
            f"a step in place keeps dtypes and shapes; {kind(old)} became {kind(new)}."
        )


def _check_has_no_tensors(tx: GradientTransformation) -> None:
    """Raise TypeError if a hyperparameter is a tensor, which would be read once for ever."""
    for stage in stages_of(tx):
        once = getattr(stage, "once", None)
        for name, x in once.varying.items() if once else ():
            if isinstance(x, Tensor):
                raise TypeError(
                    f"{stage.name}: {name} is a tensor, which many models do not read anew at "
                    "every step. Give a number; or, for one of each model, "
                    f"inject_hyperparams(...)({name}=...), whose state holds it."
                )
