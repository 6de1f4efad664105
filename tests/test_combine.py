"""Chains, masks, partitions and injected hyperparameters: what reaches which stage, and the
state.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch.func import grad, vmap

import functorch_opt as fo
from functorch_opt import tree


@fo.transformation
def scale_by_value() -> fo.GradientTransformation:
    """Reads an extra argument: ``u -> value u``."""

    def prepare(*, value):
        return {"value": value}

    return fo.leafwise(lambda g, value: g * value, prepare)


@fo.transformation
def count_calls(factor: float = 1.0) -> fo.GradientTransformation:
    """A treewise transformation with an extra argument that has a default."""

    def update(updates, state, params, *, bonus=0.0):
        return tree.map(lambda u: u * factor + bonus, updates), {
            "calls": state["calls"] + 1
        }

    return fo.GradientTransformation(
        lambda params: {"calls": torch.zeros((), dtype=torch.int64)}, update
    )


PARAMS = {"w": torch.tensor([1.0, 2.0]), "b": torch.tensor(3.0)}
GRADS = {"w": torch.tensor([0.5, -0.5]), "b": torch.tensor(2.0)}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tx: tx,
        lambda tx: fo.chain(tx),
        lambda tx: fo.chain(fo.identity(), fo.chain(tx)),
        lambda tx: fo.masked(tx, {"w": True, "b": True}),
        lambda tx: fo.partition({"a": tx, "b": fo.identity()}, {"w": "a", "b": "a"}),
    ],
)
def test_extra_arguments_reach_the_stages_that_declare_them(wrap) -> None:
    tx = wrap(scale_by_value())
    assert tx.extra_args == {"value": True}
    updates, _ = tx.update(GRADS, tx.init(PARAMS), PARAMS, value=torch.tensor(3.0))
    torch.testing.assert_close(updates, tree.map(lambda g: 3 * g, GRADS))
    with pytest.raises(TypeError, match="reads value"):
        tx.update(GRADS, tx.init(PARAMS), PARAMS)
    with pytest.raises(
        TypeError,
        match=r"got valeu, which no stage reads. Declared extra arguments: value\.",
    ):
        tx.update(GRADS, tx.init(PARAMS), PARAMS, valeu=3.0)


@pytest.mark.parametrize(
    "of",
    [
        lambda: fo.adam(0.1),
        lambda: fo.chain(fo.clip(1.0), fo.adam(0.1)),
        lambda: fo.chain(fo.adam(0.1), scale_by_value()),
        lambda: fo.inject_hyperparams(fo.adam)(0.1),
        lambda: fo.masked(fo.adam(0.1), True),
        lambda: fo.MultiSteps(fo.adam(0.1), 1, should_skip_update_fn=fo.skip_not_finite),
        lambda: fo.stateless(lambda updates, params: tree.map(torch.neg, updates)),
    ],
    ids=["rules", "chain", "reads", "injected", "masked", "gate", "functions"],
)
def test_extra_arguments_that_nothing_reads_are_ignored_on_request(of) -> None:
    """By `update`, and by a compiled step; the transformation that was given stays strict."""
    tx = of()
    lenient = fo.with_extra_args_support(tx)
    state, known = tx.init(PARAMS), {"value": torch.tensor(3.0)}
    read = {name: known[name] for name in tx.extra_args}
    updates, new = tx.update(GRADS, state, PARAMS, **read)
    theirs, kept = lenient.update(GRADS, state, PARAMS, **known, other="anything")
    torch.testing.assert_close(theirs, updates, rtol=0, atol=0)
    torch.testing.assert_close(kept, new, rtol=0, atol=0)
    assert repr(lenient) == f"with_extra_args_support({tx!r})"
    assert (lenient.name, lenient.extra_args) == (tx.name, tx.extra_args)
    with pytest.raises(TypeError, match="got other, which no stage reads"):
        tx.update(GRADS, state, PARAMS, **read, other="anything")


def test_a_step_ignores_extra_arguments_on_request() -> None:
    tx = fo.chain(fo.adam(0.1), fo.reduce_on_plateau())
    lenient = fo.with_extra_args_support(tx)
    params, state = tree.map(torch.clone, PARAMS), lenient.init(PARAMS)
    value = torch.tensor(1.0)
    updates, _ = tx.update(GRADS, state, PARAMS, value=value)
    step = fo.compiled_step(lenient)
    moved, _ = step(params, GRADS, state, value=value, grad=GRADS)
    torch.testing.assert_close(moved, fo.apply_updates(PARAMS, updates))
    with pytest.raises(TypeError, match="reads value"):
        lenient.update(GRADS, lenient.init(PARAMS), PARAMS, grad=GRADS)


# ---- updates in the form of optax -------------------------------------------------------------------


def of_optax() -> fo.GradientTransformation:
    """``u -> value u``, with an ``update`` as in scripts for optax."""

    def update(updates, state, params=None, *, value, **extra_args):
        del params, extra_args
        return tree.map(lambda u: u * value, updates), state

    return fo.GradientTransformationExtraArgs(fo.init_empty_state, update)


def injected() -> fo.GradientTransformation:
    def factory(step_size: float) -> fo.GradientTransformation:
        return fo.chain(of_optax(), fo.scale(step_size))

    return fo.inject_hyperparams(factory)(step_size=1.0)


@pytest.mark.parametrize(
    "of",
    [
        of_optax,
        lambda: fo.chain(of_optax(), fo.scale(1.0)),
        lambda: fo.masked(of_optax(), True),
        lambda: fo.partition({"a": of_optax(), "b": of_optax()}, {"w": "a", "b": "b"}),
        lambda: fo.MultiSteps(of_optax(), 1),
        lambda: fo.flatten(of_optax()),
        injected,
    ],
    ids=["alone", "chain", "masked", "partition", "gate", "flatten", "injected"],
)
def test_an_update_in_the_form_of_optax_gets_what_it_names(of) -> None:
    tx, value = of(), torch.tensor(-3.0)
    assert tx.extra_args == {"value": True}
    wanted = tree.map(lambda g: -3 * g, GRADS)
    updates, state = tx.update(GRADS, tx.init(PARAMS), PARAMS, value=value)
    torch.testing.assert_close(updates, wanted)
    step, params = fo.compiled_step(tx), tree.map(torch.clone, PARAMS)
    with pytest.warns(UserWarning, match="eagerly"):
        params, _ = step(params, GRADS, state, value=value)
    torch.testing.assert_close(params, fo.apply_updates(PARAMS, wanted))
    with pytest.raises(TypeError, match="reads value: call update"):
        tx.update(GRADS, state, PARAMS)


def test_an_update_in_the_form_of_optax_ignores_the_others() -> None:
    """Alone it does; a chain around it says that it would be lost."""
    tx, value = of_optax(), torch.tensor(-3.0)
    updates, _ = tx.update(GRADS, (), PARAMS, value=value, other="anything")
    torch.testing.assert_close(updates, tree.map(lambda g: -3 * g, GRADS))
    around = fo.chain(tx, fo.clip(1.0))
    with pytest.raises(TypeError, match="got other, which no stage reads"):
        around.update(GRADS, around.init(PARAMS), PARAMS, value=value, other="anything")
    assert fo.with_extra_args_support(tx).extra_args == tx.extra_args


def test_a_stateful_optimizer_gives_an_update_of_optax_its_value() -> None:
    p = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = fo.optim.Optimizer([p], fo.chain(of_optax(), fo.scale(-0.1)))

    def closure():
        optimizer.zero_grad()
        loss = (p**2).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    value = torch.tensor(5.0)
    torch.testing.assert_close(p.detach(), torch.tensor([1.0, -2.0]) * (1 - 0.2 * value))


def by_position(updates, state, params=None, factor=2.0, *, value, bonus=0.0, **others):
    return tree.map(lambda u: u * value * factor + bonus, updates), state


def required(updates, state, params, value):
    return tree.map(lambda u: u * value, updates), state


def test_an_update_of_optax_may_name_arguments_by_position() -> None:
    tx = fo.GradientTransformationExtraArgs(fo.init_empty_state, by_position)
    assert tx.extra_args == {"factor": False, "value": True, "bonus": False}
    updates, _ = tx.update(GRADS, (), PARAMS, factor=3.0, value=2.0, bonus=1.0)
    torch.testing.assert_close(updates, tree.map(lambda g: 6 * g + 1, GRADS))
    updates, _ = tx.update(GRADS, (), PARAMS, value=2.0)
    torch.testing.assert_close(updates, tree.map(lambda g: 4 * g, GRADS))
    tx = fo.GradientTransformationExtraArgs(fo.init_empty_state, required)
    assert tx.extra_args == {"value": True}


class Stateful:
    """A method is an ``update`` too."""

    def update(self, updates, state, params=None, value=2.0, **extra_args):
        return tree.map(lambda u: u * value, updates), state


def test_a_method_may_be_an_update_of_optax() -> None:
    tx = fo.GradientTransformationExtraArgs(fo.init_empty_state, Stateful().update)
    assert tx.extra_args == {"value": False}
    updates, _ = tx.update(GRADS, (), PARAMS, value=3.0, other=1.0)
    torch.testing.assert_close(updates, tree.map(lambda g: 3 * g, GRADS))


def handing_on(inner, **options):
    """A wrapper as in scripts for optax."""

    def update(updates, state, params=None, **extra_args):
        updates, state = inner.update(updates, state, params, **extra_args)
        return tree.map(torch.neg, updates), state

    return fo.GradientTransformationExtraArgs(inner.init, update, **options)


def in_a_function(updates, state, params=None, **extra_args):
    def double(u):
        return u * extra_args.get("value", 2.0)

    return tree.map(double, updates), state


def test_a_wrapper_says_which_arguments_it_hands_on() -> None:
    """It would be called without them, and the transformation inside has a default perhaps."""
    inner = fo.chain(count_calls(), scale_by_value())
    hands_on = r"update hands on \*\*extra_args.*extra_args=inner\.extra_args"
    with pytest.raises(TypeError, match=hands_on):
        handing_on(inner)
    with pytest.raises(TypeError, match=r"in_a_function hands on \*\*extra_args"):
        fo.GradientTransformationExtraArgs(fo.init_empty_state, in_a_function)
    tx = fo.chain(handing_on(inner, extra_args=inner.extra_args), fo.scale(2.0))
    updates, _ = tx.update(GRADS, tx.init(PARAMS), PARAMS, value=3.0, bonus=1.0)
    torch.testing.assert_close(updates, tree.map(lambda g: -6 * (g + 1), GRADS))


@pytest.mark.parametrize("hands_on", [False, True])
def test_an_update_of_optax_may_be_made_in_compiled_code(hands_on: bool) -> None:
    def step(grads, params, value):
        tx = handing_on(fo.identity()) if hands_on else fo.chain(of_optax())
        return tx.update(grads, tx.init(params), params, value=value)[0]

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    if hands_on:
        with pytest.raises(torch._dynamo.exc.Unsupported, match="hands on"):
            compiled(GRADS, PARAMS, torch.tensor(3.0))
        return
    found = compiled(GRADS, PARAMS, torch.tensor(3.0))
    torch.testing.assert_close(found, tree.map(lambda g: 3 * g, GRADS))


# ---- transformations without state ------------------------------------------------------------------


def test_a_function_of_one_update_is_called_with_or_without_its_parameter() -> None:
    tx = fo.stateless_with_tree_map(lambda u, p: -u if p is None else u * p)
    grads = {**GRADS, "b": None}
    updates, state = tx.update(grads, tx.init(PARAMS), PARAMS)
    assert updates["b"] is None and state == ()
    torch.testing.assert_close(updates["w"], GRADS["w"] * PARAMS["w"])
    torch.testing.assert_close(tx.update(GRADS, ())[0], tree.map(torch.neg, GRADS))
    with pytest.raises(ValueError, match="params"):
        tx.update(GRADS, (), {"w": PARAMS["w"]})


def test_an_empty_state_is_a_tree_without_leaves() -> None:
    state = fo.init_empty_state(PARAMS)
    assert state == fo.EmptyState() == ()
    assert tree.leaves(state) == [] and fo.state_dict({"a": state}) == {}
    tx = fo.chain(of_optax(), fo.adam(0.1))
    saved = fo.state_dict(tx.init(PARAMS))
    assert fo.load_state_dict(tx.init(PARAMS), saved)["of_optax"] == state


def test_an_optional_extra_argument_may_be_left_out() -> None:
    tx = fo.chain(count_calls(), fo.scale(2.0), scale_by_value())
    assert tx.extra_args == {"bonus": False, "value": True}
    plain, state = tx.update(GRADS, tx.init(PARAMS), value=1.0)
    raised, _ = tx.update(GRADS, state, value=1.0, bonus=1.0)
    assert plain["b"] == 4.0 and raised["b"] == 6.0
    assert fo.get(state, "calls") == 1


def test_injected_factories_pass_extra_arguments_on() -> None:
    def factory(step_size: float):
        return fo.chain(scale_by_value(), fo.scale(step_size))

    tx = fo.inject_hyperparams(factory)(step_size=2.0)
    updates, _ = tx.update(GRADS, tx.init(PARAMS), value=3.0)
    assert updates["b"] == 12.0


def test_chain_state_is_keyed_by_stage_and_survives_an_inserted_stage() -> None:
    tx = fo.chain(
        fo.trace(0.9), fo.scale(1.0), fo.trace(0.5), fo.scale(2.0), fo.adamw(0.1)
    )
    assert list(tx.init(PARAMS)) == ["trace", "scale", "trace_1", "scale_1", "adamw"]
    _, state = tx.update(GRADS, tx.init(PARAMS), PARAMS)
    longer = fo.chain(fo.clip(9.0), *tx.stages.values())
    moved = longer.init(PARAMS) | state
    assert fo.get(moved, "trace_1/trace") is fo.get(state, "trace_1/trace")


def test_repr_reads_as_it_was_written() -> None:
    tx = fo.chain(
        fo.clip_by_global_norm(1.0),
        fo.masked(
            fo.adamw(fo.cosine_decay_schedule(0.1, 100), weight_decay=0.01),
            {"w": True, "b": False},
        ),
        count_calls(factor=2.0),
    )
    written = (
        "chain(clip_by_global_norm(1.0), masked(adamw(cosine_decay_schedule(0.1, 100), weight_decay=0.01), {'w': True, 'b': False}), "
        "count_calls(factor=2.0))"
    )
    assert repr(tx) == written
    assert repr(eval(written, {**vars(fo), "count_calls": count_calls})) == written


def test_masked_leaves_pass_or_become_zero() -> None:
    for otherwise, expected in (("pass", GRADS["b"]), ("zero", torch.zeros(()))):
        tx = fo.masked(fo.scale(10.0), lambda path, p: path == "w", otherwise)
        updates, _ = tx.update(GRADS, tx.init(PARAMS), PARAMS)
        assert torch.equal(updates["w"], 10 * GRADS["w"])
        assert torch.equal(updates["b"], expected)


def test_groups_have_no_holes() -> None:
    """The transformation of a group sees a flat dict of its own leaves.

    So norms are those of the group, and states can be vmapped.
    """
    params = {
        "deep": {"w": torch.ones(2, 2), "b": torch.ones(2)},
        "out": (torch.ones(3),),
    }
    tx = fo.partition(
        {
            "matrix": fo.chain(fo.clip_by_global_norm(1.0), fo.adam(0.1)),
            "rest": fo.trace(0.9),
        },
        lambda path, p: "matrix" if p.ndim == 2 else "rest",
    )
    state = tx.init(params)
    assert set(state["matrix"]["adam"]["scale_by_adam"].slots["mu"]) == {"deep/w"}
    assert set(fo.get(state, "trace")) == {"deep/b", "out/0"}
    updates, _ = tx.update(tree.map(lambda p: 3 * p, params), state, params)
    assert torch.equal(updates["deep"]["b"], torch.full((2,), 3.0))
    batched = vmap(tx.init)(tree.map(lambda p: p.expand(4, *p.shape), params))
    assert fo.get(batched, "mu")["deep/w"].shape == (4, 2, 2)


def test_a_group_without_leaves_has_no_state() -> None:
    tx = fo.partition({"all": fo.sgd(0.1), "none": fo.adam(0.1)}, "all")
    state = tx.init(PARAMS)
    assert list(state) == ["all"]
    assert tx.update(GRADS, state)[0]["b"] == pytest.approx(-0.2)


class Layer(NamedTuple):
    mu: torch.Tensor
    count: torch.Tensor


def test_get_is_not_misled_by_parameters_with_a_slots_name() -> None:
    params = {"mu": Layer(torch.ones(2), torch.ones(3)), "count": torch.ones(1)}
    _, state = fo.adam(0.1).update(params, fo.adam(0.1).init(params))
    assert isinstance(fo.get(state, "mu")["mu"], Layer)
    assert fo.get(state, "count") == 1


LAYERS = {"enc": {"w": torch.ones(2), "b": torch.ones(1)}, "head": {"w": torch.ones(2)}}


@pytest.mark.parametrize(
    "mask",
    [
        {"enc": {"w": True, "b": False}, "head": {"w": True}},
        {"enc": {"w": True, "b": False}, "head": True},
        {"enc/w": True, "enc/b": False},
        lambda path, p: path != "enc/b",
    ],
    ids=["whole", "with a bool for all below", "of the group", "function"],
)
def test_a_mask_inside_a_group_is_of_all_params_or_of_the_group(mask: Any) -> None:
    inner = fo.masked(fo.scale(10.0), mask)
    tx = fo.partition({"a": inner, "b": fo.identity()}, {"enc": "a", "head": "b"})
    updates, _ = tx.update(LAYERS, tx.init(LAYERS))
    wanted = {
        "enc": {"w": torch.full((2,), 10.0), "b": torch.ones(1)},
        "head": LAYERS["head"],
    }
    torch.testing.assert_close(updates, wanted)


def test_labels_are_found_at_any_depth_of_groups() -> None:
    labels = {"enc": {"w": "x", "b": "y"}, "head": "z"}
    inner = fo.partition(
        {"x": fo.scale(2.0), "y": fo.scale(3.0), "z": fo.scale(5.0)}, labels
    )
    tx = fo.masked(
        fo.masked(inner, {"enc": True, "head": False}), {"enc": True, "head": True}
    )
    updates, state = tx.update(LAYERS, tx.init(LAYERS))
    assert updates["enc"]["w"][0] == 2 and updates["enc"]["b"][0] == 3
    assert updates["head"]["w"][0] == 1
    assert list(state["inner"]["inner"]) == ["x", "y"]


def test_a_list_of_params_has_its_labels_found_too() -> None:
    params = [torch.ones(2), torch.ones(3), torch.ones(4)]
    inner = fo.masked(fo.scale(2.0), [True, False, True])
    tx = fo.partition({"a": inner, "b": fo.scale(7.0)}, ["b", "a", "a"])
    assert [u[0].item() for u in tx.update(params, tx.init(params))[0]] == [7.0, 1.0, 2.0]


@pytest.mark.parametrize(
    "mask", [{"enc": [True, False], "head": True}, {"enc": True, "head": False}]
)
def test_a_tree_of_bools_is_read_inside_of_compiled_code(mask: Any) -> None:
    params = {"head": torch.ones(2), "enc": [torch.ones(3), torch.ones(1)]}
    tx = fo.masked(fo.scale(10.0), mask)
    state = tx.init(params)
    compiled = torch.compile(tx.update, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(params, state), tx.update(params, state))


@pytest.mark.parametrize(
    "mask", [{"enc": {"w": True}}, {"head": True}, {"enc": {"w": {"x": True}}}]
)
def test_a_mask_that_lacks_a_parameter_of_the_group_is_refused(mask: Any) -> None:
    tx = fo.partition(
        {"a": fo.masked(fo.sgd(1.0), mask), "b": fo.sgd(1.0)}, {"enc": "a", "head": "b"}
    )
    with pytest.raises(ValueError, match="mask and params differ in structure"):
        tx.init(LAYERS)


def test_outside_of_groups_a_mask_of_more_than_the_params_is_refused() -> None:
    with pytest.raises(ValueError, match="mask and params differ in structure"):
        fo.masked(fo.sgd(1.0), {"w": True, "b": True, "c": True}).init(PARAMS)


def test_injected_equals_plain_and_is_readable_and_writable() -> None:
    plain, injected = fo.adamw(0.1, b1=0.8), fo.inject_hyperparams(fo.adamw)(0.1, b1=0.8)
    a, b = plain.init(PARAMS), injected.init(PARAMS)
    for _ in range(3):
        u, a = plain.update(GRADS, a, PARAMS)
        v, b = injected.update(GRADS, b, PARAMS)
        torch.testing.assert_close(u, v)
    assert fo.get(b, "b1").item() == 0.8
    b["hyperparams"]["learning_rate"] = torch.tensor(0.0)
    assert all((u == 0).all() for u in tree.leaves(injected.update(GRADS, b, PARAMS)[0]))


def test_injected_schedules_are_evaluated_and_stored() -> None:
    tx = fo.inject_hyperparams(fo.sgd)(fo.linear_schedule(1.0, 0.0, 4))
    state = tx.init(PARAMS)
    seen = []
    for _ in range(3):
        updates, state = tx.update(GRADS, state)
        seen.append((fo.get(state, "learning_rate").item(), updates["b"].item()))
    assert seen == [(1.0, -2.0), (0.75, -1.5), (0.5, -1.0)]


def test_injected_hyperparameters_vmap_and_differentiate() -> None:
    tx = fo.inject_hyperparams(fo.adam)(learning_rate=0.1)

    def after(lr):
        state = tx.init(PARAMS)
        state["hyperparams"]["learning_rate"] = lr
        updates, _ = tx.update(GRADS, state, PARAMS)
        return fo.apply_updates(PARAMS, updates)["b"]

    rates = torch.tensor([0.0, 0.1, 0.5])
    torch.testing.assert_close(vmap(after)(rates), 3.0 - rates)
    torch.testing.assert_close(grad(after)(torch.tensor(0.1)), torch.tensor(-1.0))


def test_static_arguments_stay_what_they_are() -> None:
    tx = fo.inject_hyperparams(fo.adam, static_args=("b1",))(learning_rate=0.1)
    hyperparams = tx.init(PARAMS)["hyperparams"]
    assert "b1" not in hyperparams and "b2" in hyperparams
    assert repr(tx) == "inject_hyperparams(adam, static_args=('b1',))(learning_rate=0.1)"


def test_stateless_sees_whole_trees() -> None:
    tx = fo.stateless(
        lambda updates, params: tree.map(lambda u, p: u * p, updates, params)
    )
    assert tx.update(GRADS, tx.init(PARAMS), PARAMS)[0]["b"] == 6.0


def test_tensorwise_rules_see_whole_complex_tensors() -> None:
    tx = fo.leafwise(lambda g: g / torch.linalg.vector_norm(g), kind="tensorwise")
    g = torch.tensor([3.0 + 4.0j])
    assert torch.allclose(tx.update([g], tx.init([g]))[0][0].abs(), torch.ones(1))


# ---- what optax allows too -----------------------------------------------------------------------


def test_a_transformation_can_be_taken_apart() -> None:
    tx = fo.chain(fo.trace(0.9), fo.scale(-0.1))
    init, update = tx
    state = init(PARAMS)
    first, state = update(GRADS, state, PARAMS)
    second, _ = update(first, state, PARAMS)
    expected, after = tx.update(GRADS, tx.init(PARAMS), PARAMS)
    torch.testing.assert_close(first, expected)
    torch.testing.assert_close(second, tx.update(expected, after, PARAMS)[0])


@pytest.mark.parametrize("names", ["momentum", ["momentum"], {"momentum"}])
def test_static_arguments_are_one_name_or_several(names: Any) -> None:
    tx = fo.inject_hyperparams(fo.sgd, static_args=names)(0.1, momentum=0.9)
    assert tx.init(PARAMS)["hyperparams"].keys() == {"learning_rate"}
    assert (
        "momentum" in fo.inject_hyperparams(fo.sgd)(0.1, 0.9).init(PARAMS)["hyperparams"]
    )
