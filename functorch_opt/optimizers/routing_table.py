"""A table of what went where: the label of each parameter, and the learning rate that it has."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from functorch_opt import tree
from functorch_opt._core.chain import Chain
from functorch_opt._core.groups import Groups
from functorch_opt._core.transformation import GradientTransformation
from functorch_opt.tree import PyTree

__all__ = ["routing_table"]

UNKNOWN = "-"


class Route(NamedTuple):
    """Where one parameter went. It is a line of the table."""

    path: str
    shape: str
    label: str
    learning_rate: str
    why: str


def routing_table(tx: Any, params: nn.Module | PyTree | None = None) -> str:
    """What went where: path, shape, label and learning rate of each parameter, and why, if known.

    Print it before the training begins. A label inside of another one is written after it.

    Args:
        tx: a transformation with a `partition` in it, such as `muon_with_adamw` is; or an optimizer
            of `fo.optim`, whose rates are those of its groups now.
        params: of a transformation: a model, or a tree of params. An optimizer has its own.

    Raises:
        TypeError: `tx` is neither; a transformation without params.

    Example:
        >>> import torch, functorch_opt as fo
        >>> model = torch.nn.Sequential(torch.nn.Embedding(50, 8), torch.nn.Linear(8, 4))
        >>> tx = fo.muon_with_adamw(0.02, 3e-4, fo.matrix_labels(model))
        >>> print(fo.routing_table(tx, model))
        0.weight  [50, 8]  adamw  0.0003  Embedding
        1.bias    [4]      adamw  0.0003  fewer than two dims
        1.weight  [4, 8]   muon   0.02    a matrix
        >>> rates = {"lr": 0.02, "adamw_learning_rate": 1e-3}
        >>> opt = fo.optim.MuonWithAdamW(model[1].named_parameters(), **rates)
        >>> print(fo.routing_table(opt))
        weight  [4, 8]  muon   0.02
        bias    [4]     adamw  0.001
    """
    if isinstance(tx, GradientTransformation):
        if params is None:
            raise TypeError("routing_table of a transformation needs the params.")
        named = (
            dict(params.named_parameters()) if isinstance(params, nn.Module) else params
        )
        leaves = tree.flatten(named)[0]
        by_path = dict(zip(tree.paths(named), leaves, strict=True))
        routes = routes_of(tx, {path: p for path, p in by_path.items() if p is not None})
    elif hasattr(tx, "param_groups") and hasattr(tx, "_chain"):
        routes = routes_of_groups(tx)
    else:
        raise TypeError(
            "routing_table takes a transformation, or an optimizer of fo.optim; "
            f"got {type(tx).__name__}."
        )
    return aligned(routes)


def routes_of(tx: GradientTransformation, params: Mapping[str, Tensor]) -> list[Route]:
    """The routes of a transformation, in the order of the parameters."""
    found = {route.path: route for route in walk(tx, params, "", UNKNOWN)}
    return [found[path] for path in params]


def walk(
    tx: GradientTransformation, params: Mapping[str, Tensor], label: str, why: Any
) -> Iterator[Route]:
    """A route for each parameter; of the groups that are inside, those of the last ones hold."""
    whys = why if isinstance(why, Mapping) else {}
    for path, p in params.items():
        shape, rate = str(list(p.shape)), rate_of(tx)
        yield Route(path, shape, label or UNKNOWN, rate or UNKNOWN, whys.get(path, ""))
    for groups in groups_in(tx):
        labels = groups.assigned(dict(params), [*params], [*params.values()], True)
        label_of = dict(zip(params, labels, strict=True))
        for name, inside in groups.inside.items():
            part = {path: p for path, p in params.items() if label_of[path] == name}
            outer_and_own = [x for x in (label, str(name)) if x]
            reasons = getattr(groups.labels, "why", why)
            yield from walk(inside, part, "/".join(outer_and_own), reasons)


def groups_in(tx: GradientTransformation) -> Iterator[Groups]:
    """The partitions of a chain, and not those that are inside of them."""
    if isinstance(tx, Groups) and tx.otherwise == "error":
        yield tx
    for stage in stages_of(tx):
        yield from groups_in(stage)


def stages_of(tx: GradientTransformation) -> list[GradientTransformation]:
    return [*tx.stages.values()] if isinstance(tx, Chain) else []


def rate_of(tx: GradientTransformation) -> str | None:
    """The argument that is called learning_rate, of the transformation or of one of its stages."""
    if tx.call is not None:
        function, args, kwargs = tx.call
        given = inspect.signature(function).bind(*args, **kwargs)
        given.apply_defaults()
        if "learning_rate" in given.arguments:
            return written(given.arguments["learning_rate"])
    found = [rate for stage in stages_of(tx) if (rate := rate_of(stage))]
    return found[-1] if found else None


def written(rate: Any) -> str:
    return f"{rate.item():g}" if isinstance(rate, Tensor) else str(rate)


def routes_of_groups(optimizer: Any) -> list[Route]:
    """The routes of a stateful optimizer, in the order of its groups."""
    routes, start = [], 0
    for group in optimizer.param_groups:
        ps = group["params"]
        numbers = [str(start + i) for i in range(len(ps))]
        named = dict(zip(group.get("param_names", numbers), ps, strict=True))
        start += len(ps)
        if "algorithm" in group:
            label, rate = group["algorithm"], written(group["lr"])
            routes += [
                Route(name, str(list(p.shape)), label, rate, "")
                for name, p in named.items()
            ]
            continue
        options = {name: group[name] for name in optimizer._own}
        routes += routes_of(optimizer._chain(**options), named)
    return routes


def aligned(routes: list[Route]) -> str:
    """The routes as a table."""
    columns = zip(*routes, strict=True)
    widths = [max(map(len, column)) for column in columns]
    lines = []
    for route in routes:
        cells = zip(route, widths, strict=True)
        lines.append("  ".join([f"{cell:{width}}" for cell, width in cells]).rstrip())
    return "\n".join(lines)
