"""A table of what went where: the label of each parameter, and the learning rate that it has."""

from __future__ import annotations

import inspect
import itertools
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
        routes = routes_of(tx, named(params))
    elif hasattr(tx, "param_groups") and hasattr(tx, "_chain"):
        routes = routes_of_groups(tx)
    else:
        raise TypeError(
            "routing_table takes a transformation, or an optimizer of fo.optim; "
            f"got {type(tx).__name__}."
        )
    return aligned(routes)


def named(params: nn.Module | PyTree) -> dict[str, Tensor]:
    """The parameters by their paths."""
    if isinstance(params, nn.Module):
        params = dict(params.named_parameters())
    leaves, _ = tree.flatten(params)
    by_path = zip(tree.paths(params), leaves, strict=True)
    return {path: p for path, p in by_path if p is not None}


def routes_of(
    tx: GradientTransformation,
    params: Mapping[str, Tensor],
) -> list[Route]:
    """The routes of a transformation, in the order of the parameters."""
    found = {}
    for route in walk(tx, params, "", {}):
        found[route.path] = route
    return [found[path] for path in params]


def walk(
    tx: GradientTransformation,
    params: Mapping[str, Tensor],
    label: str,
    why: Mapping[str, str],
) -> Iterator[Route]:
    """A route for each parameter; of the groups that are inside, those of the last ones hold."""
    rate = rate_of(tx) or UNKNOWN
    for path, p in params.items():
        yield Route(
            path,
            shape_of(p),
            label or UNKNOWN,
            rate,
            why.get(path, ""),
        )
    for groups in groups_in(tx):
        leaves = [*params.values()]
        labels = groups.assigned(dict(params), [*params], leaves, True)
        reasons = getattr(groups.labels, "why", why)
        parts: dict[str, dict[str, Tensor]] = {}
        for path, own in zip(params, labels, strict=True):
            part = parts.setdefault(own, {})
            part[path] = params[path]
        for own, part in parts.items():
            full = f"{label}/{own}" if label else own
            inside = groups.inside[own]
            yield from walk(inside, part, full, reasons)


def shape_of(p: Tensor) -> str:
    return str(list(p.shape))


def groups_in(tx: GradientTransformation) -> Iterator[Groups]:
    """The partitions of a chain, and not those that are inside of them."""
    if isinstance(tx, Groups) and tx.otherwise == "error":
        yield tx
    for stage in stages_of(tx):
        yield from groups_in(stage)


def stages_of(tx: GradientTransformation) -> list[GradientTransformation]:
    if isinstance(tx, Chain):
        return [*tx.stages.values()]
    return []


def rate_of(tx: GradientTransformation) -> str | None:
    """The argument that is called learning_rate, of the transformation or of one of its stages."""
    if tx.call is not None:
        function, args, kwargs = tx.call
        signature = inspect.signature(function)
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        if "learning_rate" in given:
            return written(given["learning_rate"])
    last = None
    for stage in stages_of(tx):
        last = rate_of(stage) or last
    return last


def written(rate: Any) -> str:
    if isinstance(rate, Tensor):
        return f"{rate.item():g}"
    return str(rate)


def routes_of_groups(optimizer: Any) -> list[Route]:
    """The routes of a stateful optimizer, in the order of its groups."""
    routes: list[Route] = []
    number = itertools.count()
    for group in optimizer.param_groups:
        ps = group["params"]
        numbers = [str(next(number)) for _ in ps]
        names = group.get("param_names", numbers)
        by_name = dict(zip(names, ps, strict=True))
        if "algorithm" in group:
            routes += routes_of_algorithm(group, by_name)
            continue
        options = {}
        for name in optimizer._own:
            options[name] = group[name]
        tx = optimizer._chain(**options)
        routes += routes_of(tx, by_name)
    return routes


def routes_of_algorithm(
    group: Mapping[str, Any],
    params: Mapping[str, Tensor],
) -> Iterator[Route]:
    """The routes of a group of `fo.optim.Partition`."""
    for path, p in params.items():
        yield Route(
            path,
            shape_of(p),
            group["algorithm"],
            written(group["lr"]),
            "",
        )


def aligned(routes: list[Route]) -> str:
    """The routes as a table."""
    columns = zip(*routes, strict=True)
    widths = [max(map(len, column)) for column in columns]
    lines = []
    for route in routes:
        cells = zip(route, widths, strict=True)
        lines.append("  ".join([f"{cell:{width}}" for cell, width in cells]).rstrip())
    return "\n".join(lines)
