"""Stages that let the updates pass, and keep a number about them in the state."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from functorch_opt import tree
from functorch_opt._core import numerics
from functorch_opt._core.chain import chain
from functorch_opt._core.gate import gate
from functorch_opt._core.rule import identity, leafwise
from functorch_opt._core.transformation import (
    Expression,
    GradientTransformation,
    Scalar,
    check_range,
    check_whole,
    transformation,
)
from functorch_opt.transforms.snapshot_tree import keeping
from functorch_opt.tree import PyTree

__all__ = ["measure_with_ema", "monitor", "snapshot"]

Measure = Callable[[PyTree], Any]
OfLayer = Callable[..., Tensor]
NOTHING: dict[str, Any] = {}
ANY_NUMBER = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


class MeasureWithEma(Expression):
    """What `measure_with_ema` makes: a measure for `monitor` whose mean is kept."""

    def __init__(self, measure: Measure, decay: Scalar, debias: bool) -> None:
        self.measure, self.decay, self.debias = measure, decay, debias


@transformation
def snapshot(
    measure_name: str, measure: Measure, *, is_tree: bool = False
) -> GradientTransformation:
    """Keep the number ``measure(updates)`` in the state, under the name `measure_name`.

    The updates pass unchanged, so it may stand anywhere in a chain. Before the first update the
    number is NaN.

    Args:
        measure_name: the name, for ``get(state, measure_name)``.
        measure: a function of the tree of updates, which returns a number or a 0-dim tensor. It is
            kept as float64.
        is_tree: whether `measure` returns a tree of tensors, of any shapes. They are kept in their
            dtypes. ``init`` measures the params, to know the form. A compiled step runs such a
            stage eagerly, and says so.

    Raises:
        TypeError: `measure` is not a function, or returns something else.

    Source: optax.snapshot, which needs no `is_tree`.

    Example:
        >>> import torch, functorch_opt as fo
        >>> tx = fo.chain(fo.snapshot("norm_before", fo.tree.norm), fo.clip_by_global_norm(1.0))
        >>> _, state = tx.update([torch.tensor([3.0, 4.0])], tx.init([torch.zeros(2)]))
        >>> fo.get(state, "norm_before")
        tensor(5., dtype=torch.float64)

        The largest element of each tensor:

        >>> def largest(updates):
        ...     return fo.tree.map(lambda u: u.abs().amax(), updates)
        >>> tx = fo.snapshot("largest", largest, is_tree=True)
        >>> params = {"w": torch.zeros(2), "b": torch.zeros(1)}
        >>> updates = {"w": torch.tensor([3.0, -4.0]), "b": torch.tensor([1.0])}
        >>> fo.get(tx.update(updates, tx.init(params))[1], "largest")
        {'w': tensor(4.), 'b': tensor(1.)}
    """
    if is_tree:
        check_measure(measure_name, measure)
        return keeping({measure_name: measure})
    return measuring({measure_name: measure})


@transformation
def monitor(
    measures: Mapping[str, Measure | MeasureWithEma] = NOTHING,
    *,
    layers: Mapping[str, OfLayer] = NOTHING,
    trees: Mapping[str, Measure] = NOTHING,
    every: int | Callable[[Any], Any] = 1,
) -> GradientTransformation:
    """Keep several numbers about the updates in the state, each under its name: of all updates
    together, and of each parameter by itself.

    The updates pass unchanged. Before the first update the numbers are NaN. They are tensors on the
    device of the parameters, and nothing waits for them. At the steps that are not chosen nothing
    is worked out, and the numbers stay as they were; with ``every=0`` the stage is `identity`.

    Args:
        measures: ``{name: measure}``. A measure is a function of the tree of updates, which returns
            a number or a 0-dim tensor; or what `measure_with_ema` makes of one.
        layers: ``{name: measure}``. A measure is a function of one update, or of one update and its
            parameter, which returns a 0-dim tensor. The state has a tree of these numbers, in the
            dtype of the parameter, but at least float32.
        trees: ``{name: measure}``. A measure is a function of the tree of updates, which returns a
            tree of tensors of any shapes, as in ``snapshot(..., is_tree=True)``. With one, a
            compiled step runs the stage eagerly, and says so.
        every: k, for the first step and each k-th after it; or a function of the number of updates
            before this one, which returns a 0-dim bool tensor or a bool; 0 for no step at all.

    Raises:
        TypeError: a measure is no function, or returns something else; one name for two measures.
        ValueError: `every` is a number that is not whole, or negative.

    Source: optax.monitor, whose measures may be transformations, and whose state changes its form
    at the first update. What a measure returns may be a tree there; here such measures are `trees`.
    It has no `layers` and no `every`.

    Example:
        >>> import torch, functorch_opt as fo
        >>> def is_clipped(updates):
        ...     return fo.tree.norm(updates) > 1
        >>> measures = {"norm": fo.tree.norm, "clipped": fo.measure_with_ema(is_clipped, 0.9)}
        >>> tx = fo.chain(fo.monitor(measures), fo.clip_by_global_norm(1.0))
        >>> _, state = tx.update([torch.tensor([3.0, 4.0])], tx.init([torch.zeros(2)]))
        >>> fo.get(state, "norm").item(), fo.get(state, "clipped").item()
        (5.0, 1.0)
        >>> def ratio(u, p):
        ...     return u.norm() / p.norm()
        >>> params = {"w": torch.tensor([3.0, 4.0]), "b": torch.tensor([2.0])}
        >>> tx = fo.chain(fo.sgd(0.1), fo.monitor(layers={"ratio": ratio}, every=50))
        >>> _, state = tx.update(params, tx.init(params), params)
        >>> fo.get(state, "ratio")
        {'w': tensor(0.1000), 'b': tensor(0.1000)}
    """
    for name, measure in (*layers.items(), *trees.items()):
        check_measure(name, measure)
    if twice := trees.keys() & {*measures, *layers}:
        raise TypeError(
            f"give different names to what is kept: {min(twice)!r} is there twice."
        )
    if not callable(every):
        check_whole(0, every=every)
    stage: GradientTransformation = measuring(measures, layers)
    if trees:
        stage = chain(stage, keeping(trees)) if measures or layers else keeping(trees)
    if every == 0:
        return identity()
    if every == 1:
        return stage

    def is_due(count):
        return every(count) if callable(every) else count % every == 0

    stage.name = "monitor"
    return gate(stage, is_due, otherwise="pass").explained("")


def measure_with_ema(
    measure: Measure, decay: Scalar, debias: bool = True
) -> MeasureWithEma:
    """A measure for `monitor`, of which the exponential moving average is kept.

        mean = decay mean + (1 - decay) measure(updates)
        the number that is kept: mean / (1 - decay^t), or mean if not `debias`

    Args:
        measure: a function of the tree of updates, which returns a number or a 0-dim tensor.
        decay: in [0, 1).
        debias: whether to correct for the mean having started at 0.

    Raises:
        TypeError: `measure` is not a function.
        ValueError: `decay` is outside of [0, 1).

    Source: optax.measure_with_ema; the mean is kept in float64, so there is no dtype to choose.

    Example:
        >>> import torch, functorch_opt as fo
        >>> tx = fo.monitor({"norm": fo.measure_with_ema(fo.tree.norm, 0.5)})
        >>> state = tx.init([torch.zeros(1)])
        >>> for g in (1.0, 4.0):
        ...     _, state = tx.update([torch.tensor([g])], state)
        >>> fo.get(state, "norm")
        tensor(3., dtype=torch.float64)
    """
    check_measure("measure", measure)
    check_range(0, 1, decay=decay)
    made = MeasureWithEma(measure, decay, debias)
    options = {} if debias else {"debias": False}
    made.call = (measure_with_ema, (measure, decay), options)
    return made


def check_measure(name: str, measure: Any) -> None:
    if not callable(measure):
        raise TypeError(
            f"{name} must be a function of the updates, e.g. tree.norm; got {measure!r}."
        )


KEPT = ("measurements", "means")
"""How many measurements were made, and the means before they are corrected."""


def measuring(
    measures: Mapping[str, Any], layers: Mapping[str, OfLayer] = NOTHING
) -> GradientTransformation:
    """The stage that keeps these numbers, and the means that some of them are made of."""
    averaged = [m for m in measures.values() if isinstance(m, MeasureWithEma)]
    for name, measure in measures.items():
        if measure not in averaged:
            check_measure(name, measure)
        if name in KEPT:
            raise ValueError(f"a measure cannot be called {name!r}: choose another name.")

    def measured(updates):
        """The numbers of this step, in order."""
        found = {}
        for name, measure in measures.items():
            f = measure.measure if measure in averaged else measure
            found[name] = number(name, f(updates), updates)
        return found

    def prepare(updates):
        return {}, measured(updates)

    def prepare_means(updates, measurements, means):
        now, t = measured(updates), tree.as_real(measurements + 1)
        names = [name for name, m in measures.items() if m in averaged]
        new = []
        for mean, name, m in zip(means, names, averaged, strict=True):
            mean = m.decay * mean + (1 - m.decay) * now[name]
            new.append(mean)
            now[name] = mean / (1 - m.decay**t) if m.debias else mean.clone()
        kept = {"measurements": measurements + 1, "means": torch.stack(new)}
        return {}, {**now, **kept}

    nan = torch.full((), float("nan"), dtype=torch.float64)
    shared: dict[str, Tensor] = dict.fromkeys(measures, nan)
    of_layers = options_of(layers)
    if not averaged:
        return leafwise(prepare=prepare if shared else None, shared=shared, **of_layers)
    shared["measurements"] = torch.zeros((), dtype=torch.int64)
    shared["means"] = torch.zeros(len(averaged), dtype=torch.float64)
    return leafwise(prepare=prepare_means, shared=shared, **of_layers)


def options_of(layers: Mapping[str, OfLayer]) -> dict[str, Any]:
    """The rule of the stage and its slots: one number of each parameter for each measure."""
    if not layers:
        return {"rule": lambda g: g}
    takes_p = {name: takes_two(measure) for name, measure in layers.items()}

    def measured(g, p):
        found = {}
        for name, measure in layers.items():
            value = measure(g, p) if takes_p[name] else measure(g)
            if not isinstance(value, Tensor) or value.dim() or value.is_complex():
                raise TypeError(
                    f"the measure {name!r} of layers must return a real 0-dim tensor; "
                    f"got {value!r}."
                )
            dtype = numerics.at_least_float32(g.real.dtype)
            found[name] = value.to(dtype, copy=True)
        return g, found

    rule = measured if any(takes_p.values()) else lambda g: measured(g, None)
    slots = dict.fromkeys(layers, numerics.scalar_slot(float("nan")))
    return {"rule": rule, "slots": slots, "kind": "tensorwise"}


def takes_two(measure: OfLayer) -> bool:
    """Whether a measure of a layer reads the parameter beside the update."""
    try:
        parameters = inspect.signature(measure).parameters.values()
    except (TypeError, ValueError):  # functions in C do not tell
        return False
    single = [x for x in parameters if x.kind not in ANY_NUMBER]
    needed = [x for x in single if x.default is x.empty]
    return len(needed) == 2


def number(name: str, value: Any, updates: PyTree) -> Tensor:
    """A measurement as a 0-dim tensor of float64, or of float32 where there is no float64."""
    if not isinstance(value, (int, float, Tensor)) or (
        isinstance(value, Tensor) and (value.dim() or value.is_complex())
    ):
        raise TypeError(
            f"the measure {name!r} must return a number or a 0-dim tensor; got {value!r}. "
            "For a tree of tensors write snapshot(name, measure, is_tree=True)."
        )
    device = next((x.device for x in tree.leaves(updates)), torch.device("cpu"))
    # A copy, for what is kept may be no part of the updates.
    dtype = numerics.real_dtype(device)
    if isinstance(value, Tensor):
        return tree.whole(value).to(device, dtype, copy=True)
    return torch.full((), float(value), dtype=dtype, device=device)
