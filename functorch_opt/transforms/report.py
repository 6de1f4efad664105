"""A look at one step: each layer's norms, and what each stage of a chain does to the update."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from functorch_opt import tree
from functorch_opt._core import numerics, sharding
from functorch_opt._core.chain import Chain
from functorch_opt._core.gate import Gate
from functorch_opt._core.groups import Groups
from functorch_opt._core.inject import Injected
from functorch_opt._core.rule import Leafwise
from functorch_opt._core.transformation import GradientTransformation
from functorch_opt._core.wrap import Wrap
from functorch_opt.transforms.noise_scale import gradient_noise_scale
from functorch_opt.transforms.report_skips import shared_of, skipped
from functorch_opt.transforms.report_table import OF_LAYERS
from functorch_opt.tree import PyTree

__all__ = ["report"]

Report = dict[str, Tensor]


class Probe(GradientTransformation):
    """A transformation as it is, which tells `see` what came in and what went out, and whether
    it is a gate that is closed."""

    def __init__(self, inner: GradientTransformation, see: Callable[..., None]) -> None:
        self.inner, self.see = inner, see
        self.name, self.last = inner.name, inner.last
        self.extra_args = inner.extra_args

    def _init(self, params: PyTree) -> PyTree:
        return self.inner.init(params)

    def _update(
        self,
        updates: PyTree,
        state: PyTree,
        params: PyTree | None,
        **extra: Any,
    ) -> tuple[PyTree, PyTree]:
        after, new = self.inner.update(updates, state, params, **extra)
        closed = None
        if isinstance(self.inner, Gate):
            active, _ = self.inner.decided(updates, state, params, extra)
            closed = ~active if isinstance(active, Tensor) else not active
        self.see(updates, after, state, new, closed)
        return after, new


class Look:
    """The numbers of one step.

    Args:
        named: what a path is called.
        before: what stands before the name of a stage.
    """

    def __init__(self, named: Callable[[str], str], before: str = "") -> None:
        self.named, self.before = named, before
        self.stages: Report = {}
        self.hypers: Report = {}
        self.layers: dict[str, dict[str, Tensor]] = {}
        self.counts: Report = {}
        self.skips: Report = {}

    def probed(self, tx: GradientTransformation, path: str) -> GradientTransformation:
        """`tx` with a probe at each of its stages, at any depth."""

        def below(inner: GradientTransformation, name: str) -> GradientTransformation:
            below_path = f"{path}/{name}" if path else name
            return self.probed(inner, below_path)

        inside: GradientTransformation = tx
        if isinstance(tx, Chain):
            stages = [below(stage, name) for name, stage in tx.stages.items()]
            inside = Chain(tuple(stages))
        elif isinstance(tx, Groups):
            parts = {label: below(of, label) for label, of in tx.inside.items()}
            inside = Groups(parts, tx.labels, tx.what, tx.otherwise, tx.read)
        elif isinstance(tx, (Gate, Wrap)):
            inside = tx.rebuilt(
                lambda inner: (
                    self.probed(inner, path)
                    if inner.name == tx.name
                    else below(inner, inner.name)
                )
            )
        inside.name = tx.name

        name = self.before + (path or tx.name)

        def see(
            before: PyTree, after: PyTree, state: PyTree, new: PyTree, closed: Any
        ) -> None:
            self.stages |= of_stage(name, before, after)
            if isinstance(tx, Gate) and tx.why:
                for key, value in skipped(tx, closed, new).items():
                    self.skips[f"{key}/{name}/{tx.why}"] = as_number(value)
            self.hypers |= self._hypers(tx, name, before, state)
            for key, value in shared_of(tx, new).items():
                if value.dim() == 0:
                    self.counts[f"state/{name}/{key}"] = as_number(value)
            if isinstance(tx, Leafwise):
                self.counts |= self._numbers_of_layers(name, new.slots)

        is_partition = isinstance(tx, Groups) and tx.otherwise == "error"
        if isinstance(tx, Chain) or is_partition:
            return inside
        return Probe(inside, see)

    def _numbers_of_layers(self, name: str, slots: Mapping[str, PyTree]) -> Report:
        """The slots of a stage that are one number for each parameter, as `monitor` keeps them."""
        found = {}
        for key, slot in slots.items():
            leaves = tree.flatten(slot)[0]
            rows = zip(tree.paths(slot), leaves, strict=True)
            present = {path: x for path, x in rows if x is not None}
            numbers = {path: x for path, x in present.items() if x.dim() == 0}
            if len(numbers) == len(present):
                for path, x in numbers.items():
                    found[f"state/{name}/{key}/{self.named(path)}"] = as_number(x)
        return found

    def _hypers(
        self,
        tx: GradientTransformation,
        name: str,
        updates: PyTree,
        state: Any,
    ) -> Report:
        """The hyperparameters of a stage, those that differ between parameters one by one."""
        paths = tree.paths(updates)
        found = {}
        for hyper, given in hypers_of(tx, state, len(paths)).items():
            value = as_number(given)
            key = f"hyper/{name}/{hyper}"
            if value.dim() == 0:
                found[key] = value
                continue
            for path, of_leaf in zip(paths, value.unbind(), strict=True):
                found[f"{key}/{self.named(path)}"] = of_leaf
        return found

    def step(
        self,
        tx: GradientTransformation,
        updates: PyTree,
        state: PyTree,
        params: PyTree,
        extra: Mapping[str, Any],
    ) -> None:
        """Look at what ``tx.update`` does."""
        probed = self.probed(tx, "")
        after, _ = probed.update(updates, state, params, **extra)
        leaves = [tree.flatten(x)[0] for x in (updates, after, params)]
        rows = zip(tree.paths(updates), *leaves, strict=True)
        for path, *of_leaf in rows:
            if not any(x is None for x in of_leaf):
                self.layers[self.named(path)] = of_layer(*of_leaf)


def hypers_of(
    tx: GradientTransformation,
    state: Any,
    n: int,
) -> dict[str, Any]:
    """The hyperparameters of a stage at this step, for `n` leaves."""
    if isinstance(tx, Injected):
        return tx.next(state)[0]
    if not isinstance(tx, (Leafwise, Gate, Wrap)):
        return {}
    values = tx.once.hypers(shared_of(tx, state), n)
    return {name: values[name] for name in tx.once.hyper}


# ---- numbers -----------------------------------------------------------------------------------


def as_number(value: Any) -> Tensor:
    """A copy of a number, which nobody else writes. All ranks get what one of them has."""
    if isinstance(value, Tensor):
        value = tree.whole(value)
        return value.detach().to(numerics.real_dtype(value.device), copy=True)
    return torch.tensor(float(value), dtype=torch.float64)


def norm(x: Tensor) -> Tensor:
    return as_number(tree.norm([x]))


def over(x: Tensor, y: Tensor) -> Tensor:
    """``x / y``, and 0 where x is 0."""
    return torch.where(x == 0, torch.zeros_like(x), x / y)


def nonzero(x: Tensor) -> Tensor:
    """How many elements are not 0."""
    return as_number(torch.count_nonzero(x))


def of_layer(
    g: Tensor,
    u: Tensor,
    p: Tensor,
) -> Report:
    """The numbers of one parameter, and what the totals are made of."""
    g = tree.whole(g.detach())
    u = tree.whole(u.detach())
    p = tree.whole(p.detach())
    inner = numerics.dot([g], [u])
    n = torch.full_like(as_number(inner), g.numel())
    row = {
        "param_norm": norm(p),
        "grad_norm": norm(g),
        "update_norm": norm(u),
        "grad_zeros": over(n - nonzero(g), n),
        "descent": -as_number(inner),
        "numel": n,
    }
    return with_ratios(row)


def with_ratios(row: Report) -> Report:
    of_grad, of_update = row["grad_norm"], row["update_norm"]
    ratio = over(of_update, row["param_norm"])
    cosine = over(row["descent"], of_grad * of_update)
    return {
        **row,
        "ratio": ratio,
        "cosine": cosine,
    }


def of_all(rows: list[Report]) -> Report:
    """The numbers of all parameters together."""

    def column(name: str) -> Tensor:
        return sharding.stacked([row[name] for row in rows])

    sizes = column("numel")
    zeros = column("grad_zeros") * sizes
    total = {
        "param_norm": column("param_norm").norm(),
        "grad_norm": column("grad_norm").norm(),
        "update_norm": column("update_norm").norm(),
        "grad_zeros": over(zeros.sum(), sizes.sum()),
        "descent": column("descent").sum(),
    }
    return with_ratios(total)


def of_stage(
    name: str,
    before: PyTree,
    after: PyTree,
) -> Report:
    """What a stage does to the updates that come in."""
    came = []
    went = []
    added = []
    zeroed = []
    n = 0
    gs = tree.flatten(before)[0]
    us = tree.flatten(after)[0]
    for g, u in zip(gs, us, strict=True):
        if g is None or u is None:
            continue
        g = tree.whole(g.detach())
        u = tree.whole(u.detach())
        came.append(norm(g))
        went.append(norm(u))
        added.append(norm(u - g))
        stayed = torch.logical_and(g, u)
        zeroed.append(nonzero(g) - nonzero(stayed))
        n += g.numel()
    if not came:
        return {}
    out = sharding.stacked(went).norm()
    return {
        f"scale/{name}": over(out, sharding.stacked(came).norm()),
        f"share/{name}": over(sharding.stacked(added).norm(), out),
        f"zeroed/{name}": sharding.stacked(zeroed).sum() / max(n, 1),
    }


def noise_in(per_example: PyTree | None) -> Report:
    """The noise scale, of all parameters and of each."""
    if per_example is None:
        return {}
    whole = gradient_noise_scale(per_example)
    found = {"noise": whole.noise, "signal": whole.signal, "noise_scale": whole.scale}
    leaves = tree.flatten(per_example)[0]
    rows = zip(tree.paths(per_example), leaves, strict=True)
    for path, x in rows:
        if x is not None:
            found[f"noise_scale/{path}"] = gradient_noise_scale([x]).scale
    return {name: as_number(value) for name, value in found.items()}


def gathered(looks: list[Look]) -> Report:
    """The flat dict of one look or several, as if they were one."""
    layers = {path: row for look in looks for path, row in look.layers.items()}
    found: Report = {}
    total = of_all([*layers.values()]) if layers else {}
    for name in OF_LAYERS:
        if name in total:
            found[name] = total[name]
        for path, row in layers.items():
            found[f"{name}/{path}"] = row[name]
    for kind in ("stages", "hypers", "skips", "counts"):
        for look in looks:
            found |= getattr(look, kind)
    return found


def report(
    tx: GradientTransformation,
    updates: PyTree,
    state: PyTree,
    params: PyTree,
    *,
    per_example: PyTree | None = None,
    **extra: Any,
) -> dict[str, Tensor]:
    """A look at one step: what ``tx.update`` would do with these gradients.

    Nothing is changed, and nothing is kept: call it before a step that you want to look at. It
    costs as much as a few updates, for it takes some norms of every stage. The names are flat, as
    loggers take them, and the values are 0-dim tensors, so that nothing waits for the device. Under
    vmap there is one value for each model. Of sharded parameters the numbers are those of the
    whole; all ranks must call it.

    Of each parameter with a gradient there are, with its path after a slash, and of all together
    without one:

        param_norm, grad_norm, update_norm
        grad_zeros   which share of the gradient is exactly 0: of a dead layer all of it
        ratio        update_norm / param_norm: how far a step moves it
        cosine       between the update and the negative gradient: 1 is straight downhill

    Of each stage, with its path in the chain:

        scale        norm of what goes out / norm of what comes in: a clip's factor
        share        norm of what it has added / norm of what goes out: the decay's share
        zeroed       which share of the elements it has set to 0: masked or clipped away
        hyper        the hyperparameters that it declares, a schedule with its value at this step
        skipped      whether it leaves out this step, 1 or 0, with the reason at the end of the name:
                     ``skipped/apply_if_finite/not_finite``, ``skipped/.../gathering`` in
                     accumulation, the function's name in `MultiSteps` and `conditionally_mask`
        skips        how many steps it has left out, this one among them, with the same ending; not
                     known where neither it nor a stage inside keeps a count
        state        its counts and other numbers after the step, such as `apply_if_finite` keeps,
                     and those that it has for each parameter, such as `monitor` of layers

    A stage inside of a gate that is closed does not run, and is not listed.

    Args:
        tx: the transformation.
        updates: gradients, a tree of the structure of the params.
        state: what ``tx.init`` or the last ``tx.update`` returned.
        params: the current parameters.
        per_example: the gradients of single examples, tensors [B, ...] in the structure of the
            params, if they are at hand. Then there are ``noise``, ``signal`` and ``noise_scale``
            too, see `gradient_noise_scale`, and ``noise_scale/`` with each path.
        **extra: what `tx` declares, e.g. ``value=loss``.

    Returns:
        ``{name: 0-dim tensor}``. Print it with `report_table`.

    Raises:
        ValueError, TypeError: as ``tx.update``.

    Example:
        >>> import torch, functorch_opt as fo
        >>> tx = fo.chain(fo.clip_by_global_norm(1.0), fo.sgd(lambda count: 0.5 / (count + 1)))
        >>> params = {"w": torch.tensor([3.0, 4.0])}
        >>> found = fo.report(tx, {"w": torch.tensor([0.0, 2.0])}, tx.init(params), params)
        >>> found["update_norm/w"].item(), found["ratio/w"].item(), found["grad_zeros/w"].item()
        (0.5, 0.1, 0.5)
        >>> found["scale/clip_by_global_norm"].item()
        0.5
        >>> found["hyper/sgd/scale_by_learning_rate/learning_rate"].item()
        0.5
    """
    look = Look(lambda path: path)
    look.step(tx, updates, state, params, extra)
    return gathered([look]) | noise_in(per_example)
