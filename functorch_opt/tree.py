"""Functions of trees of tensors, for those who write transformations.

A *tree* is a tensor, ``None``, or a container of trees: dict, list, tuple, NamedTuple, or a class
that is registered with optree. ``None`` is a leaf, and it means *nothing here*: no gradient for
this parameter, or no parameter. Every function below leaves ``None`` as it is.
"""

from functorch_opt._core.numerics import (
    TINY,
    as_real,
    at_least_float32,
    dot,
    norm,
    zero_count,
    zeros_like,
)
from functorch_opt._core.sharding import is_sharded, part_of, whole
from functorch_opt._core.structure import PyTree, flatten, leaves, map, paths, unflatten

__all__ = [
    "TINY",
    "PyTree",
    "as_real",
    "at_least_float32",
    "dot",
    "flatten",
    "is_sharded",
    "leaves",
    "map",
    "norm",
    "part_of",
    "paths",
    "unflatten",
    "whole",
    "zero_count",
    "zeros_like",
]


def __dir__() -> list[str]:
    return sorted(__all__)
