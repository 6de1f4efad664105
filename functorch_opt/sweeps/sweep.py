"""Many settings of an optimizer, trained in one vmapped run: the learning-rate finder.

All combinations of the hyperparameters given as lists or 1-dim tensors, times all seeds, are the
runs. Their parameters, states and hyperparameters have a leading dimension of that size, and one
vmapped step trains them all. The runs do not see each other. A run that diverges is frozen where
its loss stopped being finite, and it is marked.

    settings x seeds = runs
    settings["learning_rate"]: [runs]     curves: [runs, steps]     params: [runs, ...]
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import grad_and_value, vmap

from functorch_opt import tree
from functorch_opt._core.extra import viz
from functorch_opt._core.points import eval_params, has_point
from functorch_opt._core.transformation import GradientTransformation, apply_updates
from functorch_opt._execution.memory import with_memory_of_its_own
from functorch_opt._execution.models import OverModels
from functorch_opt._execution.trials import warn_uncompiled
from functorch_opt.sweeps.batches import Batch, Batches, as_batch, read_batches
from functorch_opt.sweeps.problem import Loss, Problem, read_problem, seeded
from functorch_opt.sweeps.report import Sweep
from functorch_opt.sweeps.runs import Runs, read_hyperparameters, read_seeds
from functorch_opt.tree import PyTree

__all__ = ["sweep"]


COMPILE_FROM = 2_000
"""The number of steps from which on compiling saves more time than it takes."""


def sweep(
    model_or_loss: nn.Module | Callable[..., Any],
    data: Any,
    optimizer: Callable[..., GradientTransformation],
    *,
    loss: Loss | None = None,
    params: PyTree | Callable[[], PyTree] | None = None,
    steps: int | None = None,
    epochs: int | None = None,
    batch_size: int | None = None,
    seed: Any = 0,
    validation: Any = None,
    bound: float = math.inf,
    compile: bool | None = None,
    progress: bool = False,
    **hyperparameters: Any,
) -> Sweep:
    """Train with all combinations of hyperparameters in one run, and say which is best.

    Each run computes what it would compute alone. All runs begin at the same parameters and see the
    same minibatches in the same order, so that settings are compared on equal terms. Only another
    `seed` changes these.

    Args:
        model_or_loss: a module; or a function without arguments that makes one (the class will do),
            which is called once for each seed, after ``torch.manual_seed(seed)``; or, if `params`
            are given, a function ``loss(params, *batch)`` that returns a 0-dim tensor.
        data: a tuple of tensors with the examples along their first dimension, such as ``(x, y)``;
            or a list of batches or a DataLoader. Each of these batches is such a tuple, and they
            are used in the order in which they come, by every run.
        optimizer: a function of hyperparameters that returns a transformation: `adamw`,
            ``functools.partial(adamw, nesterov=True)``, or your own, ``lambda learning_rate,
            max_norm: chain(clip_by_global_norm(max_norm), adam(learning_rate))``.
        loss: for a module, ``loss(output, *rest)``: the output for the first tensor of the batch,
            then its other tensors, as in ``cross_entropy(model(x), y)``.
        params: for a loss function, the first parameters: a tree of tensors, or a function without
            arguments that makes one, which is called as above.
        steps: how many updates to make; or
        epochs: how often to go through `data`. Give one of the two.
        batch_size: how many examples a minibatch has, if `data` is a tuple. An epoch takes the
            examples in the order of ``torch.randperm``, with a ``torch.Generator`` of the run's
            seed, and drops the remainder. With None every step takes all examples.
        seed: a whole number, or several. Then each setting is trained with each seed, and settings
            are ranked by their mean.
        validation: data of the same kind as `data`. The best setting is the one with the lowest
            loss on them after training, at the parameters of `eval_params`. Without them it is the one with the lowest training loss,
            which is the mean over the last tenth of the steps.
        bound: a run whose loss is not finite, or greater than this, counts as diverged. From then
            on its parameters stay as they are, and its curve is NaN.
        compile: whether to compile the vmapped step. Compiling takes seconds, so with None the step
            is compiled if the sweep has at least `COMPILE_FROM` steps. If compiling fails, the
            sweep warns and runs eagerly.
        progress: whether to show a progress bar, which needs the extra ``viz``.
        **hyperparameters: keywords of `optimizer`. Of a list of numbers, or a 1-dim tensor, each
            number has runs of its own. Everything else is the same for all runs, except that a
            noise `key` is folded with the seed, so that each seed has its own noise.

    Returns:
        A `Sweep`.

    Raises:
        TypeError: an argument does not fit the others; `optimizer` does not have a hyperparameter.
        ValueError: a value is out of its range, e.g. a negative learning rate; the data end too
            early.

    Example:
        >>> import torch, functorch_opt as fo
        >>> x = torch.linspace(-1, 1, 64).unsqueeze(1)
        >>> model, mse = torch.nn.Linear(1, 1), torch.nn.functional.mse_loss
        >>> rates = [0.01, 0.1, 10.0]
        >>> result = fo.sweep(model, (x, 2 * x), fo.sgd, loss=mse, steps=30, learning_rate=rates)
        >>> result.best
        {'learning_rate': 0.1}
        >>> result.diverged
        tensor([False, False,  True])
    """
    seeds = read_seeds(seed)
    axes, fixed = read_hyperparameters(optimizer, hyperparameters)
    problem = read_problem(model_or_loss, loss, params, seeds)
    device = tree.leaves(problem.starts[0])[0].device
    runs = Runs(optimizer, axes, fixed, seeds, device)
    batches = read_batches(data, batch_size, steps, epochs, seeds, runs.of_seed)
    compiled = compile or (compile is None and batches.steps >= COMPILE_FROM)
    make = _compiled if compiled else _step_of_all
    step = make(problem.loss, runs, bound, batches.of_runs)
    if progress:
        track = viz("rich.progress", "progress=True").track
        shown = track(batches.each, f"{runs.number} runs", total=batches.steps)
        batches = batches._replace(each=shown)
    trained = _train(step, problem, runs, batches)
    last = max(1, batches.steps // 10)
    final = trained.curves[:, -last:].mean(1)
    if validation is not None:
        final = _evaluate_module(problem, trained.params, validation, device)
    alive = trained.alive & torch.isfinite(final)
    losses = torch.where(alive, final, math.inf)
    curves, diverged = trained.curves.cpu(), ~alive.cpu()
    of_runs = runs.reported(), curves, losses.cpu(), diverged
    return Sweep(*of_runs, trained.params, fixed, problem.module)


# ---- training ------------------------------------------------------------------------------------


class _Trained(NamedTuple):
    """All runs at the end; every tensor has a first dimension for them."""

    params: PyTree
    alive: Tensor
    curves: Tensor


def _step_of_all(loss: Loss, runs: Runs, bound: float, batches_of_runs: bool) -> Any:
    """A step of all runs: ``(params, state, alive, hyper, batch) -> ..., curve``."""

    def one(
        ps: PyTree, state: PyTree, alive: Tensor, hyper: dict[str, Tensor], batch: Batch
    ) -> tuple[PyTree, PyTree, Tensor, Tensor]:
        """A step of one run, which knows nothing of the others."""
        grads, value = grad_and_value(loss)(ps, *batch)
        tx = runs.make(hyper)

        def value_fn(ps: PyTree) -> Tensor:
            return loss(ps, *batch)

        known = {"value": value, "grad": grads, "value_fn": value_fn}
        extra = {name: known[name] for name in tx.extra_args if name in known}
        updates, state = tx.update(grads, state, ps, **extra)
        curve = torch.where(alive, value, math.nan)
        alive = alive & torch.isfinite(value) & (value <= bound)
        moved = apply_updates(ps, updates)
        ps = tree.map(lambda new, old: torch.where(alive, new, old), moved, ps)
        return ps, state, alive, curve

    in_dims = (0, 0, 0, 0, 0 if batches_of_runs else None)
    return vmap(one, in_dims=in_dims, randomness="different")


def _compiled(loss: Loss, runs: Runs, bound: float, batches_of_runs: bool) -> Any:
    """The same step, compiled: the gradients of all runs first, then their updates in place.

    Updates that evaluate the loss are compiled together with the gradients.
    """
    if runs.evaluates:
        return _Compiled(_step_of_all(loss, runs, bound, batches_of_runs))

    def one(
        ps: PyTree, state: PyTree, grads: PyTree, given: dict[str, Any]
    ) -> tuple[PyTree, PyTree]:
        """The update of one run. It does not see the examples."""
        tx, alive = runs.make(given["hyper"]), given["alive"]
        known = {"value": given["value"], "grad": grads}
        extra = {name: known[name] for name in tx.extra_args if name in known}
        updates, state = tx.update(grads, state, ps, **extra)
        moved = apply_updates(ps, updates)
        return tree.map(lambda new, old: torch.where(alive, new, old), moved, ps), state

    def gradient(ps: PyTree, batch: Batch) -> tuple[PyTree, Tensor]:
        return grad_and_value(loss)(ps, *batch)

    in_dims = (0, 0 if batches_of_runs else None)
    gradients = _Compiled(vmap(gradient, in_dims=in_dims, randomness="different"))
    move = OverModels(one, [])

    def step(
        ps: PyTree, state: PyTree, alive: Tensor, hyper: dict[str, Tensor], batch: Batch
    ) -> tuple[PyTree, PyTree, Tensor, Tensor]:
        grads, value = gradients(ps, batch)
        curve = torch.where(alive, value, math.nan)
        alive = alive & torch.isfinite(value) & (value <= bound)
        move(ps, state, grads, {"hyper": hyper, "alive": alive, "value": value})
        return ps, state, alive, curve

    return step


def _begin(problem: Problem, runs: Runs) -> tuple[PyTree, PyTree]:
    """The first parameters and states of all runs."""
    first, *others = problem.starts

    def stacked(*of_starts: Tensor) -> Tensor:
        return torch.stack(of_starts)[runs.of_seed]

    def init(p: PyTree, hyper: dict[str, Tensor]) -> PyTree:
        return runs.make(hyper).init(p)

    ps = tree.map(stacked, first, *others)
    state = vmap(init, randomness="different")(ps, runs.hyper)
    # Constants come out of vmap with stride 0. A compiled step would be compiled again at the second
    # step, when they no longer have it, or write into them.
    return ps, with_memory_of_its_own(state, tree.leaves(ps))


def _train(step: Any, problem: Problem, runs: Runs, batches: Batches) -> _Trained:
    """All runs after these batches, with their curves, [runs, steps]."""
    ps, state = _begin(problem, runs)
    device = runs.of_seed.device
    alive = torch.ones(runs.number, dtype=torch.bool, device=device)
    curves = []
    with seeded(runs.seeds[0]):  # for dropout
        for batch in batches.each:
            ps, state, alive, curve = step(ps, state, alive, runs.hyper, batch)
            curves.append(curve)
    ps = _to_evaluate(runs, state, ps, alive)
    return _Trained(ps, alive, torch.stack(curves, 1))


def _to_evaluate(runs: Runs, state: PyTree, params: PyTree, alive: Tensor) -> PyTree:
    """The averages, if the optimizer keeps some, of runs that have not diverged."""

    def read(
        state: PyTree, ps: PyTree, hyper: dict[str, Tensor], alive: Tensor
    ) -> PyTree:
        tx = runs.make(hyper)
        if not has_point(tx):
            return ps
        found = eval_params(tx, state, ps)
        return tree.map(lambda x, p: torch.where(alive, x, p), found, ps)

    return vmap(read)(state, params, runs.hyper, alive)


def _evaluate_module(
    problem: Problem, params: PyTree, data: Any, device: torch.device
) -> Tensor:
    """The mean loss of every run. If there is a module, it is in evaluation mode."""
    module = problem.module
    if module is None:
        return _evaluate(problem.loss, params, data, device)
    training = module.training
    module.eval()
    losses = _evaluate(problem.loss, params, data, device)
    module.train(training)
    return losses


def _evaluate(loss: Loss, params: PyTree, data: Any, device: torch.device) -> Tensor:
    """The mean loss of every run, in which each batch has the weight of its number of examples."""
    total, examples = torch.zeros((), device=device), 0
    with torch.no_grad():
        for given in [data] if isinstance(data, tuple) else data:
            batch = as_batch(given, device)
            n = batch[0].shape[:1].numel() if batch else 1
            in_dims = (0, *[None] * len(batch))
            of_runs = vmap(loss, in_dims=in_dims, randomness="different")
            total = total + n * of_runs(params, *batch)
            examples += n
    if not examples:
        raise ValueError("validation holds no example.")
    return total / examples


# ---- compiling -----------------------------------------------------------------------------------

_numbers = itertools.count()


class _Compiled:
    """A vmapped step, compiled at its first call. If that fails, it warns and runs eagerly."""

    def __init__(self, eager: Callable[..., Any]) -> None:
        def step(*args: Any) -> Any:
            return eager(*args)

        # Dynamo keeps compiled code by code object, and gives up after a few versions of the same
        # one. So each sweep has its own code object.
        step.__code__ = step.__code__.replace(co_name=f"sweep_{next(_numbers)}")
        self.run, self.eager = torch.compile(step, fullgraph=True), eager
        self.first = True

    def __call__(self, *args: Any) -> Any:
        if not self.first:
            return self.run(*args)
        self.first = False
        try:
            return self.run(*args)
        except Exception as failure:
            error = failure
        # A mistake in the caller's functions raises its error here, as it would without compiling.
        result = self.eager(*args)
        self.run = self.eager
        warn_uncompiled("sweep runs eagerly", error, stacklevel=5)
        return result
