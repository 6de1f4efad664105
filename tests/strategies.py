"""Hypothesis strategies for trees of any structure, with shapes, dtypes and missing gradients."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import optree
import torch
from hypothesis import settings
from hypothesis import strategies as st
from optree.registry import __GLOBAL_NAMESPACE as EVERYWHERE
from torch import Tensor

from functorch_opt import tree
from functorch_opt._core import structure

DTYPES = [
    torch.bfloat16,
    torch.float16,
    torch.float32,
    torch.float64,
    torch.complex64,
    torch.complex128,
]
SHAPES = [(), (1,), (3,), (0,), (2, 3), (2, 0, 3), (3, 1, 2)]

bounded = settings(deadline=None, derandomize=True, max_examples=60, database=None)
"""The same examples in every run, and few enough of them."""


# ---- containers ----------------------------------------------------------------------------------


class Pair(NamedTuple):
    w: Any
    b: Any


@dataclass
class Layer:
    """A container that only functorch_opt knows; `name` is not a child."""

    kernel: Any
    bias: Any
    name: str = "layer"


@dataclass
class Block:
    """A container that all users of optree know."""

    layers: Any


optree.register_pytree_node(
    Layer,
    lambda layer: ((layer.kernel, layer.bias), layer.name, ("kernel", "bias")),
    lambda name, children: Layer(*children, name),
    namespace="functorch_opt",
)
optree.register_pytree_node(
    Block,
    lambda block: ((block.layers,), None, ("layers",)),
    lambda _, children: Block(*children),
    namespace=EVERYWHERE,
)


# ---- trees ---------------------------------------------------------------------------------------


class Leaf(NamedTuple):
    """The description of a parameter, for which `params_like` and `grads_like` draw numbers."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    missing: tuple[bool, bool]
    """Whether it has no gradient, in the first step and in the second."""


class Leaves:
    """A leaf for optree. A `Leaf` itself is a tuple, which optree would take for a container."""

    def __init__(self, leaf: Leaf) -> None:
        self.leaf = leaf

    def __repr__(self) -> str:
        dtype = str(self.leaf.dtype).removeprefix("torch.")
        missing = "-".join("x" if m else "" for m in self.leaf.missing)
        return f"{dtype}{list(self.leaf.shape)}{missing}"


leaf = st.builds(
    lambda *given: Leaves(Leaf(*given)),
    st.sampled_from(SHAPES),
    st.sampled_from(DTYPES),
    st.tuples(*[st.integers(0, 3).map(lambda n: n == 3)] * 2),
)
keys = st.one_of(
    st.sampled_from(["w", "b", "0", "layer.weight", "a b", "Gewicht"]), st.integers(1, 3)
)


def containers(child: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Every kind of container, empty ones too, with `child` in its places."""
    items = st.lists(child, max_size=3)
    named = st.dictionaries(keys, child, max_size=3)
    return st.one_of(
        named,
        named.map(lambda d: OrderedDict(reversed(d.items()))),
        items,
        items.map(tuple),
        st.builds(Pair, child, child),
        st.builds(Layer, child, child, st.sampled_from(["layer", "head"])),
        st.builds(Block, child),
    )


trees = st.recursive(st.one_of(leaf, leaf, leaf, st.none()), containers, max_leaves=6)
"""Trees with `Leaves` and ``None`` in them. Some are a bare leaf, and some have no leaf at all."""

plans = trees.filter(
    lambda plan: any(isinstance(x, Leaves) for x in tree.flatten(plan)[0])
)
"""Trees that can be optimized: with one parameter at least."""


def params_like(plan: Any, seed: int = 0) -> Any:
    """The tree of random tensors that `plan` describes."""
    generator = torch.Generator().manual_seed(seed)

    def draw(here: Leaves | None) -> Tensor | None:
        if here is None:
            return None
        wide = torch.complex128 if here.leaf.dtype.is_complex else torch.float64
        return torch.randn(here.leaf.shape, generator=generator, dtype=wide).to(
            here.leaf.dtype
        )

    return structure.map_leaves(draw, plan)


def grads_like(plan: Any, step: int) -> Any:
    """Random gradients for it: ``None`` where `plan` says that there is none in this step."""
    drop = {
        path
        for path, here in zip(tree.paths(plan), tree.flatten(plan)[0], strict=True)
        if here is not None and here.leaf.missing[step]
    }
    whole = params_like(plan, seed=1000 + step)
    leaves, spec = tree.flatten(whole)
    return tree.unflatten(
        spec,
        [
            None if path in drop else x
            for path, x in zip(tree.paths(whole), leaves, strict=True)
        ],
    )


def assert_same_bits(a: Any, b: Any) -> None:
    """The same structure, dtypes and bits (a NaN is itself)."""
    assert tree.flatten(a)[1] == tree.flatten(b)[1]
    for path, x, y in zip(
        tree.paths(a), tree.flatten(a)[0], tree.flatten(b)[0], strict=True
    ):
        assert (x is None) == (y is None), path
        if x is not None:
            torch.testing.assert_close(
                x,
                y,
                rtol=0,
                atol=0,
                equal_nan=True,
                msg=lambda m, path=path: f"{path!r}: {m}",
            )
