"""Functions of trees of tensors, for those who write transformations.

A *tree* is a tensor, ``None``, or a container of trees: dict, list, tuple, NamedTuple, or a class
that is registered with optree. ``None`` is a leaf, and it means *nothing here*: no gradient for
this parameter, or no parameter. Every function below leaves ``None`` as it is.
"""

from typing import TYPE_CHECKING

from functorch_opt._core.arithmetic import (
    add,
    add_scale,
    allclose,
    batch_shape,
    bias_correction,
    cast,
    cast_like,
    clip,
    conj,
    div,
    full_like,
    max,
    min,
    mul,
    ones_like,
    real,
    scale,
    size,
    sub,
    sum,
    update_infinity_moment,
    update_moment,
    update_moment_per_elem_norm,
    vdot,
    where,
)
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
from functorch_opt._core.state import get, set
from functorch_opt._core.state import tree_map_params as map_params
from functorch_opt._core.structure import PyTree, flatten, leaves, map, paths, unflatten
from functorch_opt._elsewhere import missing
from functorch_opt.random.keys import random_like

__all__ = [
    "TINY",
    "PyTree",
    "add",
    "add_scale",
    "allclose",
    "as_real",
    "at_least_float32",
    "batch_shape",
    "bias_correction",
    "cast",
    "cast_like",
    "clip",
    "conj",
    "div",
    "dot",
    "flatten",
    "full_like",
    "get",
    "is_sharded",
    "leaves",
    "map",
    "map_params",
    "max",
    "min",
    "mul",
    "norm",
    "ones_like",
    "part_of",
    "paths",
    "random_like",
    "real",
    "scale",
    "set",
    "size",
    "sub",
    "sum",
    "unflatten",
    "update_infinity_moment",
    "update_moment",
    "update_moment_per_elem_norm",
    "vdot",
    "where",
    "whole",
    "zero_count",
    "zeros_like",
]


def __dir__() -> list[str]:
    return sorted(__all__)


if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        """An error, which of a name of ``optax.tree`` says what there is in place of it."""
        raise missing("functorch_opt.tree", name)
