"""Every function of `functorch_opt.tree` on every container, and the laws on drawn trees."""

from __future__ import annotations

import copy
import io
import math
from collections import OrderedDict, deque
from typing import Any

import optree
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from registry import ROWS
from strategies import (
    DTYPES,
    Block,
    Layer,
    Pair,
    assert_same_bits,
    bounded,
    grads_like,
    params_like,
    plans,
    trees,
)
from torch import Tensor, ones, tensor, zeros

import functorch_opt as fo
from functorch_opt import tree
from functorch_opt._core import structure
from functorch_opt._core.state import StageState


def t(*shape: int) -> Tensor:
    return torch.arange(math.prod(shape), dtype=torch.float32).reshape(shape) + 1


EXAMPLES = {  # name: (tree, paths of its leaves)
    "bare": (t(2), [""]),
    "none": (None, [""]),
    "dict": ({"w": t(2), "b": t()}, ["b", "w"]),
    "numbered": ({1: t(2), 0: t()}, ["0", "1"]),
    "ordered": (OrderedDict(w=t(2), b=t()), ["w", "b"]),
    "list": ([t(2), None, t()], ["0", "1", "2"]),
    "tuple": ((t(2), (t(),)), ["0", "1/0"]),
    "namedtuple": (Pair(t(2), t()), ["w", "b"]),
    "namedtuple-with-none": (Pair(t(2), None), ["w", "b"]),
    "dataclass": (Layer(t(2), None, name="head"), ["kernel", "bias"]),
    "global-dataclass": (Block([t(2)]), ["layers/0"]),
    "deque": (deque([t(2), t()]), ["0", "1"]),
    "state": (
        StageState({"count": tensor(0)}, {"mu": {"w": t(2)}}),
        ["shared/count", "slots/mu/w"],
    ),
    "nested": (
        {
            "encoder": [Layer(t(2, 3), Pair(t(1), None)), ()],
            "head": OrderedDict(z={"x": t()}, a=(t(0), {})),
        },
        [
            "encoder/0/kernel",
            "encoder/0/bias/w",
            "encoder/0/bias/b",
            "head/z/x",
            "head/a/0",
        ],
    ),
    "empty-dict": ({}, []),
    "empty-list": ([], []),
    "empty-inside": ({"a": (), "b": [{}]}, []),
}
examples = pytest.mark.parametrize(("example", "paths"), EXAMPLES.values(), ids=EXAMPLES)


# ---- structure -----------------------------------------------------------------------------------


@examples
def test_paths(example: Any, paths: list[str]) -> None:
    assert tree.paths(example) == paths == structure.unique_paths(example)
    assert len(tree.flatten(example)[0]) == len(paths)


@examples
def test_flatten_and_unflatten(example: Any, paths: list[str]) -> None:
    leaves, spec = tree.flatten(example)
    again = tree.unflatten(spec, leaves)
    assert type(again) is type(example)
    assert tree.flatten(again)[1] == spec
    assert all(a is b for a, b in zip(tree.flatten(again)[0], leaves, strict=True))
    assert tree.leaves(example) == [x for x in leaves if x is not None]


def test_none_is_a_leaf() -> None:
    assert tree.flatten({"a": None})[0] == [None]
    assert tree.leaves({"a": None}) == []


def test_the_namespace() -> None:
    """`Layer` is a container here and a leaf elsewhere; its other fields stay."""
    layer = Layer(t(1), t(2), name="head")
    assert optree.tree_leaves(layer) == [layer]
    doubled = tree.map(lambda x: 2 * x, layer)
    assert doubled.name == "head"
    assert torch.equal(doubled.bias, 2 * t(2))


@examples
def test_map(example: Any, paths: list[str]) -> None:
    other = tree.map(lambda x: 10 * x, example)
    total = tree.map(lambda x, y, z: x + y + z, example, other, other)
    assert tree.flatten(total)[1] == tree.flatten(example)[1]
    for x, y in zip(tree.flatten(example)[0], tree.flatten(total)[0], strict=True):
        assert y is None if x is None else torch.equal(y, 21 * x)


def test_map_hands_over_none_leaves_of_the_first_tree_and_gives_those_of_the_others() -> (
    None
):
    seen = []
    result = tree.map(
        lambda x, y: seen.append((x, y)) or x, [1, None, 3], [None, t(), t()]
    )
    assert seen == [(1, None), (3, t())]
    assert result == [1, None, 3]


def test_map_names_the_trees_in_its_error() -> None:
    with pytest.raises(
        ValueError, match=r"^params and grads differ in structure: at 'b' params has"
    ):
        tree.map(torch.add, {"a": t(), "b": t()}, {"a": t()}, names=("params", "grads"))


def test_map_leaves_sees_none_too() -> None:
    assert structure.map_leaves(repr, {"a": None, "b": [True, "x"]}) == {
        "a": "None",
        "b": ["True", "'x'"],
    }


@examples
def test_match_with_itself(example: Any, paths: list[str]) -> None:
    leaves, spec = tree.flatten(example)
    assert all(
        a is b
        for a, b in zip(
            structure.match(example, spec, example, names=("a", "b")), leaves, strict=True
        )
    )


def test_match_goes_by_key_not_by_order() -> None:
    """dict and OrderedDict mix; leaves come in the order of the reference."""
    w, b = t(2), t()
    for reference in ({"w": 1, "b": 2}, OrderedDict(w=1, b=2), OrderedDict(b=2, w=1)):
        for other in ({"w": w, "b": b}, OrderedDict(w=w, b=b), OrderedDict(b=b, w=w)):
            matched = structure.match(
                reference, tree.flatten(reference)[1], other, names=("a", "b")
            )
            assert [x is w for x in matched] == [
                path == "w" for path in tree.paths(reference)
            ]


@pytest.mark.parametrize(
    "same",
    [
        "dict",
        "ordered",
        "list",
        "tuple",
        "namedtuple",
        "dataclass",
        "global-dataclass",
        "nested",
        "state",
    ],
)
def test_match_refuses_every_other_structure(same: str) -> None:
    reference = EXAMPLES[same][0]
    spec = tree.flatten(reference)[1]
    for name, (other, _) in EXAMPLES.items():
        if (
            name != same
            and {name, same} != {"dict", "ordered"}
            and not (same == "namedtuple" and name.startswith(same))
        ):
            with pytest.raises(
                ValueError,
                match=r"^one and two differ in structure: at .* one has .* and two has ",
            ):
                structure.match(reference, spec, other, names=("one", "two"))


@pytest.mark.parametrize(
    ("one", "two", "place"),
    [
        ({"a": t()}, {"a": {"b": t()}}, "'a'"),
        ({"a": {"b": t()}}, {"a": t()}, "'a'"),
        ({"a": t()}, {"a": []}, "'a'"),
        ({"a": []}, {"a": None}, "'a'"),
        ({"a": ()}, {"a": []}, "'a'"),
        ({"a": t(), "z": t()}, {"a": t()}, "'z'"),
        ({"a": [t(), Pair(t(), t())]}, {"a": [t(), Pair(t(), (t(),))]}, "'a/1/b'"),
        ([t()], [t(), t()], "'1'"),
        (Pair(t(), t()), (t(), t()), "the root"),
        (Block(t()), Layer(t(), t()), "the root"),
        (t(), None, None),
        (Layer(t(), t(), name="a"), Layer(t(), t(), name="b"), "the root"),
    ],
)
def test_the_first_difference(one: Any, two: Any, place: str | None) -> None:
    spec = tree.flatten(one)[1]
    if place is None:
        assert structure.match(one, spec, two, names=("one", "two")) == [None]
        return
    with pytest.raises(ValueError, match=f"differ in structure: at {place} one has"):
        structure.match(one, spec, two, names=("one", "two"))


def test_broadcast() -> None:
    below = {"a": {"w": t(2), "b": None}, "z": (t(), [])}
    names = ("mask", "params")
    assert structure.broadcast(True, below, names=names) == [True] * 3
    assert structure.broadcast({"a": 1, "z": 2}, below, names=names) == [1, 1, 2]
    assert structure.broadcast(
        {"a": {"b": 1, "w": 2}, "z": (3, [])}, below, names=names
    ) == [
        1,
        2,
        3,
    ]
    assert structure.broadcast(
        OrderedDict(z=2, a={"w": 3, "b": None}), below, names=names
    ) == [
        None,
        3,
        2,
    ]
    assert structure.broadcast("x", t(), names=names) == ["x"]
    assert structure.broadcast("x", {}, names=names) == []
    with pytest.raises(
        ValueError,
        match=r"^mask and params differ in structure: at 'a' mask has nothing and params has dict",
    ):
        structure.broadcast({"z": 1}, below, names=names)


# ---- numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norm(dtype: torch.dtype) -> None:
    example = {
        "a": (3 * ones(1)).to(dtype),
        "b": [(4 * ones(())).to(dtype), None, zeros(0, dtype=dtype)],
    }
    if dtype.is_complex:
        example["b"][0] = example["b"][0] * 1j
    norm = tree.norm(example)
    assert norm.dtype == (
        torch.float64 if dtype in (torch.float64, torch.complex128) else torch.float32
    )
    assert norm.shape == ()
    assert norm.item() == 5.0


def test_norm_is_computed_in_float32_at_least() -> None:
    assert (
        tree.norm([torch.full((400,), 300.0, dtype=torch.float16)]).item() == 6000.0
    )  # the squares overflow in float16
    small = torch.full(
        (4096,), 2.0**-7, dtype=torch.bfloat16
    )  # the sum of squares stops growing in bfloat16
    assert tree.norm([small, small]).item() == pytest.approx(
        math.sqrt(2 * 4096) / 128, rel=1e-6
    )
    assert (
        tree.norm(
            [ones(2), ones(2, dtype=torch.float64), ones(1, dtype=torch.bfloat16)]
        ).dtype
        == torch.float64
    )


@pytest.mark.parametrize("example", [{}, None, [None], {"a": ()}, [zeros(0)]], ids=str)
def test_norm_of_nothing(example: Any) -> None:
    assert tree.norm(example).item() == 0.0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_of_the_norm_at_zero_is_zero(dtype: torch.dtype) -> None:
    example = [
        zeros(3, dtype=dtype, requires_grad=True),
        zeros((), dtype=dtype, requires_grad=True),
    ]
    tree.norm(example).backward()
    assert all(torch.equal(x.grad, torch.zeros_like(x)) for x in example)
    half = [
        zeros(2, dtype=dtype, requires_grad=True),
        ones(2, dtype=dtype).requires_grad_(),
    ]
    tree.norm(half).backward()
    assert torch.equal(half[0].grad, torch.zeros_like(half[0]))
    torch.testing.assert_close(half[1].grad, half[1].detach() / math.sqrt(2))


def test_functional_gradient_of_the_norm_at_zero_is_zero() -> None:
    ps = {"a": zeros(3), "b": [zeros(())]}
    assert_same_bits(torch.func.grad(tree.norm)(ps), ps)
    assert torch.func.jvp(tree.norm, (ps,), (tree.map(torch.ones_like, ps),))[
        1
    ].isfinite()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zeros_like(dtype: torch.dtype) -> None:
    x = ones(2, 3).to(dtype).mT
    z = tree.zeros_like(x)
    assert z.dtype == {torch.bfloat16: torch.float32, torch.float16: torch.float32}.get(
        dtype, dtype
    )
    assert z.shape == x.shape
    assert not z.any()
    assert tree.zeros_like(
        x, torch.complex128 if dtype.is_complex else torch.bfloat16
    ).dtype in (
        torch.complex128,
        torch.bfloat16,
    )


# ---- reading a state -----------------------------------------------------------------------------

PARAMS = {"enc": Layer(ones(2, 3), ones(3)), "head": Pair(ones(3), None)}


def test_get() -> None:
    tx = fo.chain(fo.clip(1.0), fo.trace(0.5), fo.adam(0.1), fo.scale_by_lion())
    _, state = tx.update(PARAMS, tx.init(PARAMS))
    assert fo.get(state, "nu") is state["adam"]["scale_by_adam"].slots["nu"]
    assert fo.get(state, "count") is state["adam"]["scale_by_adam"].shared["count"]
    assert fo.get(state, "adam") is state["adam"]
    assert fo.get(state, "scale_by_adam") is state["adam"]["scale_by_adam"]
    assert fo.get(state, "scale_by_lion/mu") is state["scale_by_lion"].slots["mu"]
    assert (
        fo.get(state, "adam/scale_by_adam/mu")
        is state["adam"]["scale_by_adam"].slots["mu"]
    )
    assert tree.paths(fo.get(state, "nu")) == tree.paths(PARAMS)


def test_every_path_that_get_offers_can_be_given() -> None:
    """If a stage and its slot have one name, that is the slot, and each path finds its value."""
    state = fo.chain(fo.trace(0.9), fo.ema(0.9), fo.trace(0.5)).init(PARAMS)
    assert fo.get(state, "trace/trace") is state["trace"].slots["trace"]
    assert fo.get(state, "ema") is state["ema"].slots["ema"]
    with pytest.raises(KeyError, match="it could be 'trace/trace', 'trace_1/trace'"):
        fo.get(state, "trace")
    assert fo.get(state, "trace_1/trace") is state["trace_1"].slots["trace"]


def test_get_from_inside_groups_and_injected_hyperparameters() -> None:
    tx = fo.partition(
        {"head": fo.inject_hyperparams(fo.sgd)(0.1, momentum=0.9), "rest": fo.adam(0.1)},
        {"enc": "rest", "head": "head"},
    )
    state = tx.init(PARAMS)
    assert fo.get(state, "learning_rate").item() == 0.1
    assert fo.get(state, "mu").keys() == {"enc/kernel", "enc/bias"}
    assert fo.get(state, "trace/trace").keys() == {"head/w"}
    assert fo.get([(), state], "nu").keys() == {"enc/kernel", "enc/bias"}


def test_describe() -> None:
    example = {"a": zeros(2, 1000, dtype=torch.bfloat16), "b": [None, tensor(0)]}
    assert fo.describe(example).splitlines() == [
        "a      (2, 1000)  bfloat16  4,000 B",
        "b/1    ()         int64         8 B",
        "total                       4,008 B",
    ]
    assert fo.describe({}).split() == ["total", "0", "B"]


def test_describe_says_what_each_model_has_of_its_own() -> None:
    params, x = {"w": torch.randn(4, 3, 2)}, torch.randn(4, 5)
    tx = fo.add_noise(1.0, 0.5, key=0)
    trees = params, torch.vmap(tx.init)(params), torch.rand(4), x
    lines = fo.describe(trees, in_dims=(0, 0, None, 0)).splitlines()
    assert [(line.split()[0], line.partition("B  ")[2]) for line in lines[:-1]] == [
        ("0/w", "each its own"),
        ("1/shared/count", "all 4 equal"),
        ("1/shared/key", "all 4 equal"),  # the same noise for all
        ("2", "shared"),  # learning rates that are not mapped
        ("3", "each its own"),
    ]
    assert "4 x (3, 2)" in lines[0]
    assert "5 x (4,)" in fo.describe(x, in_dims=-1)
    with pytest.raises(
        ValueError, match=r"'shared/count' has shape \(\).*vmap\(tx.init\)"
    ):
        fo.describe(tx.init(params), in_dims=0)
    with pytest.raises(
        ValueError,
        match=r"'1' has shape \(5, 4\): 5 models along dimension 0, where others have 4",
    ):
        fo.describe((x, x.T), in_dims=(0, 0))


# ---- checkpoints ---------------------------------------------------------------------------------


@examples
def test_state_dict_and_back(example: Any, paths: list[str]) -> None:
    flat = fo.state_dict(example)
    assert list(flat) == [
        path
        for path, leaf in zip(paths, tree.flatten(example)[0], strict=True)
        if leaf is not None
    ]
    assert all(a is b for a, b in zip(flat.values(), tree.leaves(example), strict=True))
    again = fo.load_state_dict(tree.map(torch.zeros_like, example), flat)
    assert_same_bits(again, example)
    assert not {x.data_ptr() for x in tree.leaves(again) if x.numel()} & {
        x.data_ptr() for x in flat.values()
    }


def test_load_state_dict_keeps_the_saved_dtype_and_leaves_its_arguments_alone() -> None:
    state, saved = {"w": zeros(2)}, {"w": ones(2, dtype=torch.float64)}
    loaded = fo.load_state_dict(state, saved)
    assert loaded["w"].dtype == torch.float64
    loaded["w"].add_(1)
    assert torch.equal(saved["w"], ones(2, dtype=torch.float64))
    assert torch.equal(state["w"], zeros(2))


# ---- mixed containers ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tx",
    [
        fo.adamw(0.1),
        fo.masked(fo.adam(0.1), {"b": True, "w": False, "z": True}),
        fo.masked(fo.adam(0.1), lambda path, p: path != "w", otherwise="zero"),
        fo.partition(
            {"a": fo.adam(0.1), "b": fo.sgd(0.3)}, {"b": "a", "w": "b", "z": "a"}
        ),
        fo.partition(
            {"b": fo.adam(0.1), "w": fo.sgd(0.3), "z": fo.trace(0.5)},
            lambda path, p: path,
        ),
        fo.chain(fo.clip_by_global_norm(0.5), fo.inject_hyperparams(fo.rmsprop)(0.1)),
    ],
    ids=["adamw", "mask", "predicate", "partition", "labels", "inject"],
)
def test_gradients_in_another_kind_of_dict(tx: fo.GradientTransformation) -> None:
    """What belongs together is found by key.

    An OrderedDict keeps its order, and a dict is flattened in the order of its keys.
    """
    ps, gs = (
        {"w": t(3), "b": t(3), "z": t(3)},
        {"w": -t(3), "b": 2 * t(3), "z": t(3) ** 2},
    )
    wanted, wanted_state = tx.update(gs, tx.init(ps), ps)
    for order in (["w", "b", "z"], ["z", "w", "b"]):
        updates, state = tx.update(
            OrderedDict((k, gs[k]) for k in order), tx.init(ps), ps
        )
        assert list(updates) == order
        for key in order:
            torch.testing.assert_close(
                updates[key], wanted[key]
            )  # a norm adds in another order
        for path, value in fo.state_dict(wanted_state).items():
            torch.testing.assert_close(fo.state_dict(state)[path], value)
        torch.testing.assert_close(
            fo.apply_updates(ps, updates), fo.apply_updates(ps, wanted)
        )


# ---- drawn trees: the functions ------------------------------------------------------------------


@bounded
@given(trees)
def test_functions_on_drawn_trees(plan: Any) -> None:
    example = params_like(plan)
    leaves, spec = tree.flatten(example)
    assert (
        len(tree.paths(example))
        == len(set(structure.unique_paths(example)))
        == len(leaves)
    )
    assert_same_bits(tree.unflatten(spec, leaves), example)
    assert_same_bits(tree.map(lambda x, y: y, example, params_like(plan)), example)
    assert all(
        a is b
        for a, b in zip(
            structure.match(example, spec, example, names=("a", "b")), leaves, strict=True
        )
    )
    assert structure.broadcast(True, example, names=("a", "b")) == [True] * len(leaves)
    assert structure.broadcast(
        structure.map_leaves(lambda x: 7, example), example, names=("a", "b")
    ) == [7] * len(leaves)
    assert_same_bits(fo.load_state_dict(example, fo.state_dict(example)), example)
    size = sum(x.numel() * x.element_size() for x in tree.leaves(example))
    assert fo.describe(example).splitlines()[-1].split() == ["total", f"{size:,}", "B"]
    assert len(fo.describe(example).splitlines()) == len(tree.leaves(example)) + 1


@bounded
@given(trees)
def test_norm_of_drawn_trees(plan: Any) -> None:
    example = params_like(plan)
    flat = [x.to(torch.complex128).flatten() for x in tree.leaves(example)]
    wanted = torch.linalg.vector_norm(torch.cat(flat)).item() if flat else 0.0
    assert tree.norm(example).item() == pytest.approx(wanted, rel=1e-5)


@bounded
@given(plans, plans)
def test_two_drawn_trees_fit_or_the_error_tells_where_not(one: Any, two: Any) -> None:
    a, b = params_like(one), params_like(two)
    try:
        updated = fo.apply_updates(a, b)
    except ValueError:
        told = "differ in structure: at |nothing is broadcast or cut off"
        with pytest.raises(ValueError, match=told):
            fo.apply_updates(a, b)
    else:
        assert tree.paths(updated) == tree.paths(a)
        for x, y in zip(
            tree.flatten(a)[0],
            structure.match(a, tree.flatten(a)[1], b, names=("a", "b")),
            strict=True,
        ):
            assert y is None or x.shape == y.shape


# ---- drawn trees: the laws -----------------------------------------------------------------------

CASES = [(row, variant) for row in ROWS for variant in row.variants]


def outline(example: Any) -> Any:
    leaves, spec = tree.flatten(example)
    return spec, [None if x is None else (x.shape, x.dtype) for x in leaves]


def slots_by_param(state: Any) -> dict[str, dict[str, Tensor]]:
    """``{path of a parameter: {place of a slot: tensor}}``, also where the state keeps its part as
    a flat dict by path.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for path, value in fo.state_dict(state).items():
        place, here, below = path.partition("slots/")
        if here:
            slot, _, param = below.partition("/")
            found.setdefault(param, {})[place + slot] = value
    return found


def through_a_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(fo.state_dict(state), file)
    file.seek(0)
    return torch.load(file)


@bounded
@given(plans, st.sampled_from(CASES))
def test_laws_on_drawn_trees(plan: Any, case: tuple[Any, dict]) -> None:
    """Two steps of any row: pure, every shape and dtype stays, what has no gradient stays, and a
    saved state goes on the same.
    """
    row, variant = case
    tx, ps = row.build(variant), params_like(plan)
    state = tx.init(ps)
    kinds = outline(ps), outline(state)
    for step in range(2):
        gs = grads_like(plan, step)
        inputs = (gs, state, ps)
        before = copy.deepcopy(inputs)
        updates, new = tx.update(*inputs)
        assert_same_bits(tx.update(*inputs), (updates, new))
        assert_same_bits(
            tx.update(gs, fo.load_state_dict(tx.init(ps), through_a_file(state)), ps),
            (updates, new),
        )
        assert_same_bits(inputs, before)

        moved = fo.apply_updates(ps, updates)
        assert (outline(moved), outline(new)) == kinds
        old_slots, new_slots = slots_by_param(state), slots_by_param(new)
        assert new_slots.keys() == old_slots.keys() <= set(tree.paths(ps))
        columns = (tree.flatten(x)[0] for x in (ps, gs, updates, moved))
        for path, p, g, u, q in zip(tree.paths(ps), *columns, strict=True):
            if g is None:
                assert u is None, path
                assert q is p, path
                assert_same_bits(new_slots.get(path, {}), old_slots.get(path, {}))
            else:
                assert u.shape == p.shape, path
                assert u.dtype in (p.dtype, tree.at_least_float32(p.dtype)), path
        state, ps = new, moved


def test_the_drawn_trees_have_what_the_laws_are_about() -> None:
    """Over the examples of a run: every dtype, every row, missing gradients, empty and 0-dim
    tensors, every container.
    """
    seen: set[Any] = set()

    def look(node: Any) -> None:
        seen.add(type(node).__name__)
        for child in (structure._children(node) or {}).values():
            look(child)

    @bounded
    @given(plans, st.sampled_from(CASES))
    def collect(plan: Any, case: tuple[Any, dict]) -> None:
        look(plan)
        for here in tree.flatten(plan)[0]:
            if here is not None:
                seen.update([here.leaf.dtype, here.leaf.shape, here.leaf.missing])
        seen.add(case[0].name)

    collect()
    assert seen >= {
        *DTYPES,
        (),
        (0,),
        (True, False),
        (False, True),
        "dict",
        "OrderedDict",
        "list",
        "tuple",
        "Pair",
        "Layer",
        "Block",
        "NoneType",
    }
    assert len(seen & {row.name for row in ROWS}) > 15


def test_state_keeps_its_containers_when_gradients_come_in_others() -> None:
    params = {"w": torch.ones(2), "b": torch.ones(3)}
    grads = OrderedDict(w=torch.full((2,), 2.0), b=torch.full((3,), 3.0))
    tx = fo.adam(0.1)
    _, state = tx.update(grads, tx.init(params), params)
    assert type(fo.get(state, "mu")) is dict
    torch.testing.assert_close(
        fo.get(state, "mu"), {"w": torch.full((2,), 0.2), "b": torch.full((3,), 0.3)}
    )


@pytest.mark.parametrize("keys", [(10, 9), ("b", "a"), ((1, 0), (0, 1))])
def test_a_graph_has_the_order_of_leaves_that_there_is_outside(keys: tuple) -> None:
    params = {key: torch.full((2,), float(k)) for k, key in enumerate(keys)}

    def order(params):
        return [x * 1 for x in tree.leaves(params)], tree.paths(params)

    torch._dynamo.reset()
    inside = torch.compile(order, backend="eager", fullgraph=True)(params)
    outside = order(params)
    assert [x.tolist() for x in inside[0]] == [x.tolist() for x in outside[0]]
    assert inside[1] == outside[1]
