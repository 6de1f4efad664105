"""Many settings of an optimizer, trained in one vmapped run: the learning-rate finder.

All combinations of the hyperparameters given as lists or 1-dim tensors, times all seeds, are the runs. Their parameters, states and
hyperparameters have a leading dimension of that size, and one vmapped step trains them all. The runs do not see each other: one that
diverges is frozen where its loss stopped being finite, and marked.

    settings x seeds = runs         settings["learning_rate"]: [runs]     curves: [runs, steps]     params: [runs, ...]
"""

from __future__ import annotations

import copy
import inspect
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap

from functorch_opt import random, tree
from functorch_opt._core.transformation import GradientTransformation, apply_updates
from functorch_opt._execution.trials import warn_uncompiled
from functorch_opt.sweeps.report import Sweep, viz
from functorch_opt.tree import PyTree

__all__ = ["sweep"]

Batch = tuple[Tensor, ...]
Loss = Callable[..., Tensor]


COMPILE_FROM = 2_000
"""Steps from which on the time that compiling takes is won back."""


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

    Each run computes what it would compute alone. All begin at the same parameters and see the same minibatches in the same order, so
    that settings are compared on equal terms; only another `seed` changes these.

    Args:
        model_or_loss: a module; a function without arguments that makes one (the class will do), which is called once per seed, after
            ``torch.manual_seed(seed)``; or, if `params` are given, a function ``loss(params, *batch)`` that returns a 0-dim tensor.
        data: a tuple of tensors that have the examples along their first dimension, ``(x, y)``; or a list of batches or a DataLoader,
            each batch such a tuple, used in the order they come. Every run sees the same batches.
        optimizer: a function of hyperparameters that returns a transformation: `adamw`, ``functools.partial(adamw, nesterov=True)``, or
            your own, ``lambda learning_rate, max_norm: chain(clip_by_global_norm(max_norm), adam(learning_rate))``.
        loss: for a module, ``loss(output, *rest)``: the output for the first tensor of the batch, then its other tensors, as in
            ``cross_entropy(model(x), y)``.
        params: for a loss function: where it begins, a tree of tensors; or a function without arguments that makes it, called as above.
        steps: updates; or
        epochs: passes over `data`. One of the two.
        batch_size: examples in a minibatch, if `data` is a tuple; an epoch goes through ``torch.randperm`` of a ``torch.Generator``
            with the run's seed, and drops the remainder. None: all examples, every step.
        seed: a whole number, or several: then each setting is trained with each, and settings are ranked by their mean.
        validation: as `data`. The best setting is that with the lowest loss on it after training. Without it: the lowest training loss,
            the mean of the last tenth of the steps.
        bound: a run whose loss is not finite, or greater than this, counts as diverged: from there its parameters stay as they are and
            its curve is NaN.
        compile: whether to compile the vmapped step. None: if the sweep is so long that it pays (`COMPILE_FROM` steps), for
            compiling takes seconds. If it fails, the sweep warns and runs eagerly.
        progress: show a progress bar (needs the extra ``viz``).
        **hyperparameters: keywords of `optimizer`. A list of numbers, or a 1-dim tensor, has a run for each. Everything else is the
            same for all; a noise `key` is folded with the seed, so that each seed has its own noise.

    Returns:
        A `Sweep`.

    Raises:
        TypeError: an argument that does not fit the others; a hyperparameter that `optimizer` does not have.
        ValueError: a value out of its range, e.g. a negative learning rate; data that end too early.

    Example:
        >>> import torch, functorch_opt as fo
        >>> x = torch.linspace(-1, 1, 64).unsqueeze(1)
        >>> model = torch.nn.Linear(1, 1)
        >>> result = fo.sweep(model, (x, 2 * x), fo.sgd, loss=torch.nn.functional.mse_loss, steps=30, learning_rate=[0.01, 0.1, 10.0])
        >>> result.best
        {'learning_rate': 0.1}
        >>> result.diverged
        tensor([False, False,  True])
    """
    seeds = _seeds(seed)
    axes, fixed = _hyperparameters(optimizer, hyperparameters)
    module, loss_fn, start = _problem(model_or_loss, loss, params, seeds)
    device = tree.leaves(start[0])[0].device

    settings = [
        dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())
    ]
    for setting in settings:
        made = optimizer(
            **fixed, **setting
        )  # with plain numbers, so that one out of its range is an error now
        if not isinstance(made, GradientTransformation):
            raise TypeError(
                f"optimizer must return a transformation, e.g. adam(...); it returned {type(made).__name__} {made!r}."
            )
    runs = len(settings) * len(seeds)
    of_seed = torch.arange(runs, device=device) % len(seeds)
    columns = {
        name: torch.tensor([s[name] for s in settings], dtype=torch.float64).repeat_interleave(
            len(seeds)
        )
        for name in axes
    }
    hyper = {name: column.to(device, tree.real_dtype(device)) for name, column in columns.items()}
    if "key" in fixed:
        keys = random.fold_in(random.as_key(fixed["key"]), torch.tensor(seeds))
        hyper["key"] = keys.to(device)[of_seed]
    rest = {name: value for name, value in fixed.items() if name not in hyper}

    def make(hyper: dict[str, Tensor]) -> GradientTransformation:
        return optimizer(**rest, **hyper)

    def one(
        ps: PyTree, state: PyTree, alive: Tensor, hyper: dict[str, Tensor], batch: Batch
    ) -> tuple[PyTree, PyTree, Tensor, Tensor]:
        """A step of one run, written without a thought of the others."""
        grads, value = grad_and_value(loss_fn)(ps, *batch)
        tx = make(hyper)
        known = {"value": value, "grad": grads, "value_fn": lambda ps: loss_fn(ps, *batch)}
        updates, state = tx.update(
            grads, state, ps, **{name: known[name] for name in tx.extra_args if name in known}
        )
        curve = torch.where(alive, value, math.nan)
        alive = alive & torch.isfinite(value) & (value <= bound)
        ps = tree.map(lambda new, old: torch.where(alive, new, old), apply_updates(ps, updates), ps)
        return ps, state, alive, curve

    batches, steps, each_its_own = _batches(data, batch_size, steps, epochs, seeds, of_seed)
    step: Any = vmap(one, in_dims=(0, 0, 0, 0, 0 if each_its_own else None), randomness="different")
    if compile or (compile is None and steps >= COMPILE_FROM):
        step = _Compiled(step)
    if progress:
        batches = viz("rich.progress", "progress=True").track(batches, f"{runs} runs", total=steps)

    ps = tree.map(lambda *of: torch.stack(of)[of_seed], start[0], *start[1:])
    # Constants come out of vmap with stride 0, and a compiled step would compile again when they no longer are.
    state = tree.map(
        lambda x: x.contiguous(),
        vmap(lambda p, h: make(h).init(p), randomness="different")(ps, hyper),
    )
    alive = torch.ones(runs, dtype=torch.bool, device=device)
    curves = []
    with _seeded(seeds[0]):  # for dropout
        for batch in batches:
            ps, state, alive, curve = step(ps, state, alive, hyper, batch)
            curves.append(curve)

    history = torch.stack(curves, 1)  # [runs, steps]
    final = history[:, -max(1, steps // 10) :].mean(1)
    if validation is not None:
        training = module is not None and module.training
        if module is not None:
            module.eval()
        final = _evaluate(loss_fn, ps, validation, device)
        if module is not None:
            module.train(training)
    alive = alive & torch.isfinite(final)
    final = torch.where(alive, final, math.inf)
    columns |= {"seed": torch.tensor(seeds).repeat(len(settings))} if len(seeds) > 1 else {}
    return Sweep(columns, history.cpu(), final.cpu(), ~alive.cpu(), ps, fixed, module)


# ---- what the arguments mean ---------------------------------------------------------------------------------------------


def _seeds(seed: Any) -> list[int]:
    given = seed.tolist() if isinstance(seed, Tensor) else seed
    seeds = (
        [given]
        if isinstance(given, int)
        else list(given)
        if isinstance(given, (list, tuple, range))
        else []
    )
    if (
        not seeds
        or any(isinstance(s, bool) or not isinstance(s, int) or s < 0 for s in seeds)
        or len(set(seeds)) < len(seeds)
    ):
        raise TypeError(
            f"seed must be a whole number, 0 or greater, or several different ones, e.g. range(5); got {seed!r}."
        )
    return seeds


def _hyperparameters(
    optimizer: Any, given: Mapping[str, Any]
) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """The hyperparameters that vary, with their values, and the others."""
    if isinstance(optimizer, GradientTransformation) or not callable(optimizer):
        raise TypeError(
            f"optimizer must be a function that makes a transformation, e.g. adamw and not adamw(0.1); got {optimizer!r}."
        )
    signature = inspect.signature(optimizer)
    name = getattr(optimizer, "__name__", "optimizer")
    try:
        signature.bind(**given)
    except TypeError as error:
        raise TypeError(
            f"{name}: {error}; its arguments are {list(signature.parameters)}, and sweep was given {list(given)}."
        ) from None
    axes: dict[str, list[float]] = {}
    fixed: dict[str, Any] = {}
    for argument, value in given.items():
        values = None if argument == "key" else _values(argument, value)
        if values is None:
            fixed[argument] = value
        else:
            axes[argument] = values
    return axes, fixed


def _values(name: str, value: Any) -> list[float] | None:
    """The values of a hyperparameter that varies; None if it does not."""
    if hasattr(value, "__array__"):  # a tensor, or of numpy
        shape = tuple(value.shape)
        if not shape:
            return None
        if len(shape) > 1 or 0 in shape:
            raise TypeError(
                f"{name} has shape {shape}; give its values as a list or 1-dim tensor, one run for each."
            )
        value = value.tolist()
    if not isinstance(value, (list, tuple, range)):
        return None
    if not value or any(isinstance(v, bool) or not isinstance(v, (int, float)) for v in value):
        raise TypeError(
            f"{name}={value!r} must be numbers, one run for each. What chooses between rules (bools, strings) cannot vary within a sweep: "
            "make a sweep for each. What belongs to a single run, such as a mask in a list, goes in with functools.partial."
        )
    return [float(v) for v in value]


def _problem(
    model_or_loss: Any, loss: Loss | None, params: PyTree | None, seeds: list[int]
) -> tuple[nn.Module | None, Loss, list[PyTree]]:
    """The module, if there is one, the loss as a function of params and batch, and where each seed begins."""
    if params is not None:
        if isinstance(model_or_loss, nn.Module) or not callable(model_or_loss) or loss is not None:
            raise TypeError(
                "params= goes with a function loss(params, *batch) in the first place, and without loss=. "
                "A module brings its parameters: leave params out and give loss=, e.g. cross_entropy."
            )
        start = _for_each_seed(
            params if callable(params) else lambda: params,
            seeds,
            varies=callable(params),
            what="params",
        )
        return None, model_or_loss, [tree.map(lambda p: p.detach(), of) for of in start]
    if not callable(loss):
        raise TypeError(
            "a module needs loss=, a function of output and target such as torch.nn.functional.cross_entropy; "
            f"a loss function needs params=, where it begins. Got {model_or_loss!r} and loss={loss!r}."
        )
    single = isinstance(model_or_loss, nn.Module)
    modules = _for_each_seed(
        (lambda: copy.deepcopy(model_or_loss)) if single else model_or_loss,
        seeds,
        varies=not single,
        what="a module",
    )
    for made in modules:
        if not isinstance(made, nn.Module):
            raise TypeError(
                f"the first argument must be a module or a function that makes one; it made {type(made).__name__} {made!r}."
            )
        for name, part in made.named_modules():
            if part.training and getattr(part, "track_running_stats", False):
                raise TypeError(
                    f"{name!r} is {type(part).__name__}, whose running statistics change in place, which vmap cannot do for many models. "
                    "Use GroupNorm, or torch.func.replace_all_batch_norm_modules_(model)."
                )
    module = modules[0]

    def loss_fn(params: dict[str, Tensor], x: Tensor, *rest: Tensor) -> Tensor:
        return loss(functional_call(module, params, (x,)), *rest)

    return (
        module,
        loss_fn,
        [
            {name: p.detach() for name, p in made.named_parameters() if p.requires_grad}
            for made in modules
        ],
    )


def _for_each_seed(
    make: Callable[[], Any], seeds: list[int], *, varies: bool, what: str
) -> list[Any]:
    if len(seeds) > 1 and not varies:
        raise TypeError(
            f"{len(seeds)} seeds need a function without arguments that makes {what}, called once per seed; got {what} made already. "
            "To begin all at the same place, give a function that returns it."
        )
    made = []
    for seed in seeds:
        with _seeded(seed):
            made.append(make())
    return made


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Inside, torch's generators start from `seed`; afterwards they go on as if nothing had been drawn."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield


# ---- data ----------------------------------------------------------------------------------------------------------------


def _batches(
    data: Any,
    size: int | None,
    steps: int | None,
    epochs: int | None,
    seeds: list[int],
    of_seed: Tensor,
) -> tuple[Iterator[Batch], int, bool]:
    """The batches, how many there are, and whether they have a first dimension for the runs."""
    if (steps is None) == (epochs is None):
        raise TypeError(
            f"say how long to train: either steps= or epochs=; got steps={steps!r} and epochs={epochs!r}."
        )
    for name, value in (("steps", steps), ("epochs", epochs), ("batch_size", size)):
        if value is not None and (
            isinstance(value, bool) or not isinstance(value, int) or value < 1
        ):
            raise ValueError(f"{name} must be a whole number, at least 1; got {value!r}.")
    arrays = _batch(data, of_seed.device) if isinstance(data, (tuple, Tensor)) else None
    if arrays is None and not hasattr(data, "__iter__"):
        _batch(data, of_seed.device)
    if arrays is None and size is not None:
        raise TypeError(
            f"data is {type(data).__name__}: its batches are made already. Leave out batch_size, or give a tuple of tensors."
        )
    if arrays is None:
        length = len(data) if hasattr(data, "__len__") else None
    else:
        lengths = {len(x) if x.dim() else 0 for x in arrays}
        if size is not None and (len(lengths) != 1 or size > min(lengths)):
            raise ValueError(
                f"batch_size={size} takes that many examples of each tensor in data; got shapes {[tuple(x.shape) for x in arrays]}."
            )
        length = 1 if size is None else min(lengths) // size
    if steps is None:
        if not length:
            raise ValueError(
                f"data of type {type(data).__name__} does not say how long an epoch is: give steps=, or a list of batches."
            )
        steps = (epochs or 1) * length
    if arrays is None:
        return itertools.islice(_in_turn(data, of_seed.device), steps), steps, False
    if size is None:
        return itertools.repeat(arrays, steps), steps, False
    return itertools.islice(_shuffled(arrays, size, seeds, of_seed), steps), steps, len(seeds) > 1


def _batch(batch: Any, device: torch.device) -> Batch:
    if not isinstance(batch, (tuple, list)) or not all(isinstance(x, Tensor) for x in batch):
        raise TypeError(
            f"data must be a tuple of tensors, (x, y), or a list of such tuples; got {type(batch).__name__} {batch!r:.200}."
        )
    return tuple(x.to(device) for x in batch)


def _in_turn(data: Any, device: torch.device) -> Iterator[Batch]:
    """The batches of `data`, again and again."""
    made = 0
    while True:
        before = made
        for batch in data:
            made += 1
            yield _batch(batch, device)
        if made == before:
            raise ValueError(
                f"data ended after {made} batches, for it can be gone through only once: give a list, or fewer steps."
            )


def _shuffled(arrays: Batch, size: int, seeds: list[int], of_seed: Tensor) -> Iterator[Batch]:
    """Minibatches, in a new order each epoch; with several seeds [runs, size, ...]. The remainder of an epoch is left out."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    while True:
        orders = torch.stack([torch.randperm(len(arrays[0]), generator=g) for g in generators]).to(
            of_seed.device
        )
        for rows in orders.split(size, dim=1):  # [seeds, size]
            if rows.shape[1] == size:
                rows = rows[of_seed] if len(seeds) > 1 else rows[0]
                yield tuple(x[rows] for x in arrays)


def _evaluate(loss_fn: Loss, params: PyTree, data: Any, device: torch.device) -> Tensor:
    """The mean loss of every run, each batch weighted by its examples."""
    total, examples = torch.zeros((), device=device), 0
    with torch.no_grad():
        for given in [data] if isinstance(data, tuple) else data:
            batch = _batch(given, device)
            n = batch[0].shape[:1].numel() if batch else 1
            total = total + n * vmap(
                loss_fn, in_dims=(0, *[None] * len(batch)), randomness="different"
            )(params, *batch)
            examples += n
    if not examples:
        raise ValueError("validation holds no example.")
    return total / examples


# ---- compiling -----------------------------------------------------------------------------------------------------------

_numbers = itertools.count()


class _Compiled:
    """A vmapped step, compiled at its first call; eager, with a warning, if that fails."""

    def __init__(self, eager: Callable[..., Any]) -> None:
        def step(*args: Any) -> Any:
            return eager(*args)

        # Dynamo keeps what it compiles by code object, and gives up after a few for the same one: each sweep has its own.
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
        result = self.eager(
            *args
        )  # a mistake in the caller's functions shows itself here, as it would without compiling
        self.run = self.eager
        warn_uncompiled("sweep runs eagerly", error, stacklevel=4)
        return result
