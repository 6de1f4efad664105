"""The compiled step in place equals `update` and `apply_updates`, for every row and kind of
tensor.
"""

from __future__ import annotations

import warnings
import weakref
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from registry import ROWS, Row
from test_laws import CASES, assert_same, grads, params
from torch import Tensor

import functorch_opt as fo
from functorch_opt import tree
from functorch_opt._execution import again, c_function, kernel, part, segments
from functorch_opt._execution.compiled import CompiledStep
from functorch_opt._execution.guards import Meaning
from functorch_opt._execution.segments import PROGRAMS

SMALL = {"a": (4, 3), "b": (3,), "c": (7, 2)}


def draw(
    shapes: dict[str, tuple[int, ...]], seed: int, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator).to(dtype)
        for name, shape in shapes.items()
    }


def eagerly(tx: fo.GradientTransformation, ps, state, gs):
    updates, state = tx.update(gs, state, ps)
    return fo.apply_updates(ps, updates), state


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()
    PROGRAMS.clear()


def said_once(apart: bool) -> AbstractContextManager[Any]:
    """A stage that is not made of rules runs eagerly, and this is said, but once."""
    return (
        pytest.warns(UserWarning, match="eagerly, between the")
        if apart
        else nullcontext()
    )


# ---- law 4, over every row (the executor itself; Dynamo traces its blocks, nothing is generated) -


@pytest.mark.parametrize(("row", "variant"), CASES)
def test_step_equals_update_and_apply(
    row: Row, variant: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if it may not overwrite what it is given. Both share what is traced.

    What is worked out once a step is compiled as soon as two steps went the same way.
    """
    monkeypatch.setattr(again, "STEPS", 0)
    tx = row.build(variant)
    for donate in (True, False):
        step = CompiledStep(tx, donate, backend="eager")
        equals_update_and_apply(tx, step, row.apart)


def equals_update_and_apply(
    tx: fo.GradientTransformation, step: CompiledStep, apart: bool
) -> None:
    ps, mine = params(), params()
    state, ours = tx.init(ps), tx.init(mine)
    for i in range(4):
        before = tree.map(torch.clone, (mine, ours))
        ps, state = eagerly(tx, ps, state, grads(i))
        with said_once(apart and i == 0):
            new = step(mine, grads(i), ours)
        assert_same(new, (ps, state), rtol=1e-12, atol=1e-12)
        if step.donate:
            pairs = zip(tree.leaves(new[0]), tree.leaves(mine), strict=True)
            assert all(x is y for x, y in pairs)
        else:
            assert_same((mine, ours), before)
        mine, ours = new


# ---- the real compiler ---------------------------------------------------------------------------


@pytest.mark.slow
def test_one_program_serves_all_sizes_and_models() -> None:
    tx = fo.chain(
        fo.clip_by_global_norm(0.5),
        fo.adamw(fo.linear_schedule(0.1, 0.0, 9), weight_decay=0.1),
    )
    step = fo.compiled_step(tx)
    models = [
        SMALL,
        {f"p{i}": (i + 2, 3) for i in range(5)},
        {"tiny": (2,), "one": (1,), "empty": (0,), "scalar": (), "big": (300, 70)},
    ]
    for n, shapes in enumerate(models):
        ps, mine = draw(shapes, n), draw(shapes, n)
        state, ours = tx.init(ps), tx.init(mine)
        for i in range(3):
            ps, state = eagerly(tx, ps, state, draw(shapes, 100 + i))
            mine, ours = step(mine, draw(shapes, 100 + i), ours)
            assert_same((mine, ours), (ps, state), rtol=1e-5, atol=1e-6)
    assert len(PROGRAMS) == 1 + (
        torch.get_num_threads() > 1
    )  # "big" has code of its own for all threads


@pytest.mark.parametrize(
    "backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(
    "stage", [fo.scale(0.5), fo.scale_by_trust_ratio()], ids=["plain", "with sums"]
)
def test_blocks_of_several_tensors(
    stage: fo.GradientTransformation, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: the last block of each kind is filled up; every tensor is worked out once."""
    monkeypatch.setitem(segments.BLOCK, "cpu", 3)
    monkeypatch.setattr(segments, "EXAMPLE", 64)
    tx = fo.chain(
        fo.clip_by_global_norm(0.5),
        stage,
        fo.adamw(fo.linear_schedule(0.1, 0.0, 9), weight_decay=0.1),
    )
    shapes = {f"p{i}": (i + 2, 3) for i in range(7)} | {
        "tiny": (2,),
        "one": (1,),
        "scalar": (),
    }
    ps, mine, step = (
        draw(shapes, 0),
        draw(shapes, 0),
        CompiledStep(tx, True, backend=backend),
    )
    state, ours = tx.init(ps), tx.init(mine)
    for i in range(3):
        ps, state = eagerly(tx, ps, state, draw(shapes, 100 + i))
        mine, ours = step(mine, draw(shapes, 100 + i), ours)
        assert_same((mine, ours), (ps, state), rtol=1e-5, atol=1e-6)
    assert sum(map(len, PROGRAMS.values())) == 1


@pytest.mark.slow
def test_two_transformations_do_not_share_code() -> None:
    """Guards are left out, so Dynamo must not find the one's code for the other."""
    ps = draw(SMALL, 0)
    for tx in (fo.sgd(0.1), fo.sgd(0.2), fo.sign_sgd(0.1)):
        mine = draw(SMALL, 0)
        expected, _ = eagerly(tx, ps, tx.init(ps), draw(SMALL, 1))
        got, _ = fo.compiled_step(tx)(mine, draw(SMALL, 1), tx.init(mine))
        assert_same(got, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_kernels_are_called_directly_and_autograd_sees_what_they_change() -> None:
    tx, ps = (
        fo.sgd(0.1),
        {name: torch.nn.Parameter(p) for name, p in draw(SMALL, 0).items()},
    )
    loss = sum((p**2).sum() for p in ps.values())
    ps, _ = fo.compiled_step(tx)(ps, draw(SMALL, 1), tx.init(ps))
    ((program,),) = PROGRAMS.values()
    assert program.kernel is not None
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.slow
def test_threads_share_leaves_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(part, "SHARED", 1)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        tx, shapes = fo.adamw(0.1), {str(i): (5, i + 2) for i in range(40)}
        ps, gs = draw(shapes, 0), draw(shapes, 1)
        expected, state = ps, tx.init(ps)
        mine, ours = tree.map(torch.clone, ps), tx.init(ps)
        step = fo.compiled_step(tx)
        for _ in range(3):
            expected, state = eagerly(tx, expected, state, gs)
            mine, ours = step(mine, gs, ours)
    finally:
        torch.set_num_threads(threads)
    ((segment,),) = step.segments.values()
    assert {part.threads for part in segment.parts} == {2}
    assert_same((mine, ours), (expected, state), rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_where_the_loop_cannot_be_compiled_kernels_are_called_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def missing() -> None:
        raise RuntimeError("no such class")

    monkeypatch.setattr(c_function, "loop", missing)
    tx, ps = fo.adamw(0.1), draw(SMALL, 0)
    expected, _ = eagerly(tx, ps, tx.init(ps), draw(SMALL, 1))
    with pytest.warns(UserWarning, match="kernels are called one by one.*no such class"):
        got, _ = fo.compiled_step(tx)(ps, draw(SMALL, 1), tx.init(ps))
    assert_same(got, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("donate", [True, False], ids=["donated", "kept"])
def test_a_step_keeps_no_model_that_it_is_not_used_for(donate: bool) -> None:
    tx = fo.trace(0.9)
    step = fo.compiled_step(tx, donate=donate)
    ps, gs = draw(SMALL, 0), draw(SMALL, 1)
    state = tx.init(ps)
    for _ in range(3):
        ps, state = step(ps, gs, state)
    slot = weakref.ref(fo.get(state, "trace")["a"])
    others = {name: x.double() for name, x in draw(SMALL, 2).items()}
    step(others, draw(SMALL, 3), tx.init(others))
    step.returned.clear()
    del ps, state
    assert slot() is None


# ---- what guards would have seen -----------------------------------------------------------------


def check(
    tx: fo.GradientTransformation,
    step: CompiledStep,
    ps: dict,
    gs: dict,
    *,
    steps: int = 2,
) -> None:
    """From these very tensors, in place, against the functional step on copies."""
    copies = {name: p.detach().clone() for name, p in ps.items()}
    state, ours = tx.init(copies), tx.init(ps)
    for _ in range(steps):
        copies, state = eagerly(tx, copies, state, gs)
        ps, ours = step(ps, gs, ours)
    assert_same(
        {name: p.detach() for name, p in ps.items()}, copies, rtol=1e-4, atol=1e-5
    )


def kinds() -> dict[str, dict[str, Tensor]]:
    base = torch.arange(60.0) / 7
    return {
        "as before": draw(SMALL, 3),
        "other sizes": {
            "a": torch.randn(9, 5),
            "b": torch.randn(2),
            "c": torch.randn(30),
        },
        "sizes 0 and 1": {
            "a": torch.randn(0, 5),
            "b": torch.randn(1),
            "c": torch.randn(()),
        },
        "transposed": {
            "a": torch.randn(3, 4).t(),
            "b": torch.randn(3),
            "c": torch.randn(7, 2),
        },
        "slices of one buffer": {
            "a": base[1:13].view(4, 3),
            "b": base[13:16],
            "c": base[17:31].view(7, 2),
        },
        "strided": {
            "a": torch.randn(8, 3)[::2],
            "b": torch.randn(6)[::2],
            "c": torch.randn(7, 2),
        },
        "bfloat16": draw(SMALL, 4, torch.bfloat16),
        "float64": draw(SMALL, 5, torch.float64),
        "mixed": {
            "a": torch.randn(4, 3, dtype=torch.float64),
            "b": torch.randn(3).bfloat16(),
            "c": torch.randn(7, 2),
        },
        "complex": {
            "a": torch.randn(4, 3, dtype=torch.complex64),
            "b": torch.randn(3),
            "c": torch.randn(7, 2),
        },
        "parameters": {name: torch.nn.Parameter(p) for name, p in draw(SMALL, 6).items()},
    }


@pytest.mark.slow
def test_changed_tensors_never_meet_code_for_others() -> None:
    """One step object, met by every kind of tensor in turn, and by the first kind again."""
    tx = fo.adam(0.01, eps=1e-3)
    step = fo.compiled_step(tx)
    for name, ps in [*kinds().items(), ("again", draw(SMALL, 7))]:
        gs = {key: torch.randn_like(p).detach() for key, p in ps.items()}
        try:
            check(tx, step, ps, gs)
        except AssertionError as error:
            raise AssertionError(name) from error


@pytest.mark.parametrize(
    "change",
    [
        "data swapped",
        "data transposed",
        "gradient strided",
        "gradient in another dtype",
        "gradient missing",
        "slot replaced",
        "slot in other memory",
        "slot in another dtype",
    ],
)
@pytest.mark.parametrize(
    "backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)]
)
def test_changes_between_steps_are_seen(change: str, backend: str) -> None:
    tx = fo.adam(0.01, eps=1e-3)
    step = CompiledStep(tx, True, backend=backend)
    ps = {"a": torch.randn(3, 3), "b": torch.randn(4)}
    state = tx.init(ps)
    gs = {"a": torch.randn(3, 3), "b": torch.randn(4)}
    for _ in range(2):  # at the second step it has seen the slots before
        ps, state = step(ps, gs, state)
    if change == "data swapped":
        ps["a"].data = torch.randn(3, 3)
    elif change == "data transposed":
        ps["a"].data = ps["a"].data.t()
    elif change == "gradient strided":
        gs["a"] = gs["a"].t()
    elif change == "gradient in another dtype":
        gs["a"] = gs["a"].bfloat16()
    elif change == "gradient missing":
        gs["a"] = None
    elif change == "slot in other memory":
        fo.get(state, "mu")["a"].data = torch.randn(3, 3)
    elif change == "slot in another dtype":
        fo.get(state, "mu")["a"].data = torch.randn(3, 3).double()
    else:
        fo.get(state, "mu")["a"] = torch.randn(3, 3)
    expected, expected_state = eagerly(
        tx, tree.map(torch.clone, ps), tree.map(torch.clone, state), gs
    )
    ps, state = step(ps, gs, state)
    assert_same((ps, state), (expected, expected_state), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)]
)
def test_strided_gradients_before_a_second_pass(backend: str) -> None:
    """What the first pass writes for the second has strides of its own."""
    tx = fo.chain(fo.trace(0.9), fo.clip_by_global_norm(0.1), fo.sgd(0.1))
    ps, step = (
        {"a": torch.randn(3, 4), "b": torch.randn(5)},
        CompiledStep(tx, True, backend=backend),
    )
    mine = tree.map(torch.clone, ps)
    gs = {"a": torch.randn(4, 3).t(), "b": torch.randn(1).expand(5)}
    state, ours = tx.init(ps), tx.init(mine)
    for _ in range(3):
        ps, state = eagerly(tx, ps, state, gs)
        mine, ours = step(mine, gs, ours)
    assert_same((mine, ours), (ps, state), rtol=1e-5, atol=1e-6)


def around(inner: fo.GradientTransformation) -> fo.GradientTransformation:
    return fo.wrap(inner, after=lambda u, g: u + 0.1 * g)


def at_times(inner: fo.GradientTransformation) -> fo.GradientTransformation:
    return fo.gate(inner, lambda count: count % 2 == 0, otherwise="pass")


def clip() -> fo.GradientTransformation:
    return fo.clip_by_global_norm(0.5)


@pytest.mark.parametrize(
    "tx",
    [
        fo.chain(fo.scale_by_adam(), around(at_times(clip()))),
        fo.chain(at_times(fo.scale_by_adam()), around(at_times(clip()))),
        fo.chain(fo.scale_by_adam(), around(fo.chain(clip(), fo.trace(0.9)))),
        fo.partition(
            {"a": fo.chain(clip(), fo.scale_by_adam()), "b": around(clip())},
            lambda path, p: path,
        ),
        fo.partition(
            {"a": fo.trace(0.9), "b": around(at_times(clip()))}, lambda path, p: path
        ),
    ],
)
def test_a_wrapper_begins_and_ends_in_one_pass(tx: fo.GradientTransformation) -> None:
    """Although what is in it looks at all updates first."""
    ps, step = (
        {"a": torch.ones(3), "b": torch.ones(2, 2)},
        CompiledStep(tx, True, "eager"),
    )
    mine = tree.map(torch.clone, ps)
    state, ours = tx.init(ps), tx.init(mine)
    for _ in range(4):
        gs = {"a": 3 * torch.randn(3), "b": 3 * torch.randn(2, 2)}
        ps, state = eagerly(tx, ps, state, gs)
        mine, ours = step(mine, gs, ours)
    assert_same((mine, ours), (ps, state), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("kind", ["elementwise", "tensorwise"])
def test_a_tensor_that_is_given_twice(kind: str, backend: str) -> None:
    """It is given as gradient and extra argument, as the gradient of two parameters, or as
    parameter and gradient; and then no longer.
    """
    agree = fo.leafwise(
        lambda g, raw: g * (g * raw > 0), lambda *, raw: {"raw": fo.Each(raw)}, kind=kind
    )
    tx = fo.chain(fo.adam(0.1, eps=1e-3), agree)
    ps, step = (
        {"a": torch.randn(3, 4), "b": torch.randn(3, 4)},
        CompiledStep(tx, True, backend=backend),
    )
    mine = tree.map(torch.clone, ps)
    state, ours = tx.init(ps), tx.init(mine)
    one, other = torch.randn(3, 4), torch.randn(3, 4)
    for gs in (
        {"a": one, "b": other},
        {"a": one, "b": one},
        None,
        {"a": other, "b": one},
    ):
        for _ in range(2):
            given = tree.map(torch.clone, ps) if gs is None else gs
            updates, state = tx.update(given, state, ps, raw=given)
            ps = fo.apply_updates(ps, updates)
            given = mine if gs is None else gs
            mine, ours = step(mine, given, ours, raw=given)
            assert_same((mine, ours), (ps, state), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("own", [True, False])
def test_a_pass_writes_its_updates_over_what_is_the_steps_own(
    own: bool, backend: str
) -> None:
    """In place of new memory, where shape and dtype allow it.

    What somebody else holds stays as it is.
    """
    drawn = {
        "a": torch.randn(3, 4),
        "b": torch.randn(()),
        "c": torch.randn(5),
        "d": torch.randn(2),
    }
    given, seen = tree.map(torch.clone, drawn), []

    def look(updates):
        seen.append(updates)
        return {}

    add = fo.leafwise(
        lambda g, noise, gg: g + noise / gg,
        lambda: {"noise": fo.Each(drawn, own=own)},
        sums={"gg": lambda g: g.square().sum()},
    )
    tx = fo.chain(add, fo.leafwise(lambda g: 2 * g, look))
    ps, gs = tree.map(torch.zeros_like, drawn), tree.map(torch.ones_like, drawn)
    gs["a"], gs["d"] = gs["a"].bfloat16(), None
    expected = {
        name: None if g is None else g + given[name] / g.numel() for name, g in gs.items()
    }
    mine, _ = CompiledStep(tx, True, backend=backend)(ps, gs, tx.init(ps))
    assert [seen[-1][name] is drawn[name] for name in drawn] == [own, own, own, False]
    assert_same(
        drawn,
        {
            name: given[name] if g is None or not own else expected[name]
            for name, g in gs.items()
        },
        rtol=1e-6,
        atol=0,
    )
    assert_same(
        mine,
        {name: torch.zeros(2) if u is None else 2 * u for name, u in expected.items()},
        rtol=1e-6,
        atol=0,
    )
    if own:  # in a dtype that cannot hold the updates
        wide, gs = tree.map(torch.Tensor.double, ps), tree.map(torch.Tensor.double, gs)
        CompiledStep(tx, True, backend=backend)(wide, gs, tx.init(wide))
        assert not any(seen[-1][name] is drawn[name] for name in drawn)


def test_a_gradient_that_would_broadcast_is_refused_at_any_step_and_for_any_tensor() -> (
    None
):
    """The transposed parameter runs eagerly, the other compiled."""
    tx = fo.sgd(0.1)
    for name in ("a", "b"):
        ps = {"a": torch.randn(3, 4).t(), "b": torch.randn(4, 3)}
        step, state = CompiledStep(tx, True, backend="eager"), tx.init(ps)
        ps, state = step(ps, tree.map(torch.ones_like, ps), state)
        before = tree.map(torch.clone, ps)
        with pytest.raises(ValueError, match="nothing is broadcast"):
            step(ps, {**tree.map(torch.ones_like, ps), name: torch.ones(3)}, state)
        assert_same(ps, before)


def test_hyperparameters_as_tensors_are_inputs() -> None:
    lr = torch.tensor(0.1)
    step = CompiledStep(fo.adam(lr), True, backend="eager")
    ps, state = draw(SMALL, 0), fo.adam(lr).init(draw(SMALL, 0))
    ps, state = step(ps, draw(SMALL, 1), state)
    lr.fill_(0.0)
    before = tree.map(torch.clone, ps)
    ps, state = step(ps, draw(SMALL, 2), state)
    assert_same(ps, before)
    assert len(PROGRAMS) == 1


@pytest.mark.parametrize("donate", [True, False], ids=["donated", "kept"])
def test_inside_a_compiled_function_it_is_part_of_the_one_graph(donate: bool) -> None:
    tx = fo.chain(
        fo.clip_by_global_norm(0.5),
        fo.adamw(fo.linear_schedule(0.1, 0.0, 9), weight_decay=0.1),
    )
    step, ps, mine = fo.compiled_step(tx, donate=donate), draw(SMALL, 0), draw(SMALL, 0)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    @torch.compile(fullgraph=True, backend=backend)
    def train(ps, state, x):
        return step(ps, {name: p * x for name, p in ps.items()}, state)

    state, ours = tx.init(ps), tx.init(mine)
    for i in range(4):
        ps, state = eagerly(
            tx, ps, state, {name: p * (i + 1.0) for name, p in ps.items()}
        )
        new = train(mine, ours, torch.tensor(i + 1.0))
        assert (new[0]["a"] is mine["a"]) is donate
        mine, ours = new
        assert_same((mine, ours), (ps, state), rtol=1e-5, atol=1e-6)
    assert len(graphs) == 1


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (
            lambda step, ps, gs, state: step(ps, {"a": gs["a"]}, state),
            ValueError,
            "params and grads differ in structure",
        ),
        (
            lambda step, ps, gs, state: step(ps, {**gs, "a": gs["b"]}, state),
            ValueError,
            "'a' has shape",
        ),
        (
            lambda step, ps, gs, state: step(
                {"a": ps["a"], "b": ps["a"]},
                {"a": gs["a"], "b": gs["a"]},
                step.tx.init({"a": ps["a"], "b": ps["a"]}),
            ),
            ValueError,
            "'a' and 'b' share memory",
        ),
        (
            lambda step, ps, gs, state: step(ps, gs, fo.sgd(0.1).init(ps)),
            ValueError,
            "not a state of this chain",
        ),
        (
            lambda step, ps, gs, state: step(ps, gs, state, value=1.0),
            TypeError,
            "which no stage reads",
        ),
        (
            lambda step, ps, gs, state: step(ps, {**gs, "a": gs["a"].to_sparse()}, state),
            ValueError,
            "must be dense",
        ),
    ],
)
def test_bad_input(wrong, error, message) -> None:
    tx, ps, gs = fo.adam(0.1), draw(SMALL, 0), draw(SMALL, 1)
    state = tx.init(ps)
    before = tree.map(torch.clone, (ps, state))
    with pytest.raises(error, match=message):
        wrong(CompiledStep(tx, True, backend="eager"), ps, gs, state)
    assert_same((ps, state), before)


def test_equal_rules_share_code_and_others_do_not() -> None:
    ps, gs = draw(SMALL, 0), draw(SMALL, 1)
    for tx, programs in (
        (fo.adam(0.1), 1),
        (fo.adam(0.1), 1),
        (fo.adam(torch.tensor(0.2)), 2),
        (fo.adam(torch.tensor(0.3)), 2),
        (fo.nadam(0.1), 3),
    ):
        expected, _ = eagerly(tx, ps, tx.init(ps), gs)
        got, _ = CompiledStep(tx, False, backend="eager")(ps, gs, tx.init(ps))
        assert_same(got, expected, rtol=1e-6, atol=1e-6)
        assert len(PROGRAMS) == programs


def test_a_number_from_prepare_that_changes_becomes_an_input() -> None:
    numbers = iter([1.0, 2.0, 3.0, 4.0])
    tx = fo.leafwise(lambda g, factor: g * factor, lambda: {"factor": next(numbers)})
    step, ps = CompiledStep(tx, True, backend="eager"), {"w": torch.zeros(4)}
    state = tx.init(ps)
    for expected in (1.0, 3.0, 6.0, 10.0):
        ps, state = step(ps, {"w": torch.ones(4)}, state)
        assert (ps["w"] == expected).all()
    assert len(PROGRAMS) == 2


@pytest.mark.slow
def test_a_number_that_is_whole_and_then_is_not() -> None:
    """As inputs they have two dtypes, so the code for the one is not that for the other."""
    tx = fo.leafwise(lambda g, factor: g * factor, lambda *, weight: {"factor": weight})
    ps, state = {"w": torch.zeros(4)}, tx.init({"w": torch.zeros(4)})
    for weights in ([1, 2, 3], [1.0, 2.0, 3.5], [4, 5, 6]):
        step = fo.compiled_step(tx)
        for weight in weights:
            before = ps["w"].clone()
            ps, state = step(ps, {"w": torch.ones(4)}, state, weight=weight)
            assert (ps["w"] == before + weight).all()


@pytest.mark.parametrize("slot", [None, lambda p: p.new_zeros(len(p) + p.shape[1])])
def test_code_for_a_size_that_a_rule_took_for_a_number_is_for_this_size(
    slot: Any,
) -> None:
    """No guard of torch is about such a size, so tensors of other sizes would run this code."""

    def counted(g):
        return g * sum(1 for _ in range(g.shape[0]))

    def with_slot(g, s):
        return counted(g), {"s": s + 1}

    slots = {"s": slot} if slot else None
    tx = fo.leafwise(with_slot if slot else counted, slots=slots, kind="tensorwise")
    shapes = {"a": (3, 2), "b": (4, 2), "c": (3, 5)}
    ps, ones = draw(shapes, 0), tree.map(torch.ones_like, draw(shapes, 0))
    expected = eagerly(tx, ps, tx.init(ps), ones)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = CompiledStep(tx, False, backend="eager")(ps, ones, tx.init(ps))
    assert_same(got, expected, rtol=1e-6, atol=1e-6)
    assert sum(map(len, PROGRAMS.values())) == 2  # those with 3 rows share theirs


@pytest.mark.parametrize("name", ["mu", "master"])
def test_a_foreign_state_is_refused_before_anything_is_written(name: str) -> None:
    ps, gs = draw(SMALL, 0), draw(SMALL, 1)
    tx = fo.chain(
        fo.trace(0.9), fo.clip_by_global_norm(1.0), fo.keep_master_weights(fo.adam(0.1))
    )
    state = tx.init(ps)
    fo.get(state, name)["a"] = torch.zeros(1, 3)
    before = tree.map(torch.clone, (ps, state))
    with pytest.raises(ValueError, match=f"the state's {name} at 'a' has shape"):
        CompiledStep(tx, True, backend="eager")(ps, gs, state)
    assert_same((ps, state), before)


def test_without_a_compiler_it_warns_once_and_goes_on() -> None:
    def broken(graph, inputs):
        raise RuntimeError("no compiler here")

    tx, ps = fo.adam(0.1), draw(SMALL, 0)
    step = CompiledStep(tx, True, backend=broken)  # type: ignore[arg-type]
    state = tx.init(ps)
    expected, _ = eagerly(tx, ps, state, draw(SMALL, 1))
    with pytest.warns(UserWarning, match="needs a C\\+\\+ compiler"):
        got, state = step(tree.map(torch.clone, ps), draw(SMALL, 1), state)
    assert_same(got, expected, rtol=1e-6, atol=1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(got, draw(SMALL, 2), state)


def test_all_rows_are_here() -> None:
    assert {case.values[0].name for case in CASES} == {row.name for row in ROWS}


def test_repr() -> None:
    assert (
        repr(fo.compiled_step(fo.adam(0.1), donate=False))
        == "compiled_step(adam(0.1), donate=False)"
    )


def test_a_rule_that_reads_fo_tree_does_not_read_all_modules() -> None:
    """``fo.tree.sum`` is no part of a rule that calls the method of a tensor with this name. It
    asks `sys.modules` for DTensors, and so would be of every module that there is.
    """

    def rule(g):
        return g * (g * g + tree.TINY).sum()

    meaning = Meaning(rule)
    assert meaning.unknown is None and not meaning.mutable
    assert len(meaning.fixed) < 10


def test_two_arguments_that_are_one_tensor_first_are_two(recwarn) -> None:
    """A trace takes one tensor for one argument, and later they are two."""
    first = fo.leafwise(lambda g, a: g * a, lambda *, x: {"a": x})
    second = fo.leafwise(lambda g, b: g + b, lambda *, y: {"b": y})
    tx = fo.chain(first, second)
    step, state, params = (
        fo.compiled_step(tx),
        tx.init([torch.zeros(3)]),
        [torch.zeros(3)],
    )
    one = torch.tensor(2.0)
    params, state = step(params, [torch.ones(3)], state, x=one, y=one)
    assert params[0].tolist() == [4.0] * 3
    extra = {"x": torch.tensor(3.0), "y": torch.tensor(5.0)}
    params, state = step(params, [torch.ones(3)], state, **extra)
    assert params[0].tolist() == [12.0] * 3
    assert not [w for w in recwarn if "eagerly" in str(w.message)]


def test_a_tensor_that_no_code_takes_runs_eagerly_and_says_so(monkeypatch) -> None:
    """As one of 2^31 elements on a GPU would, where a program serves tensors of all sizes."""
    monkeypatch.setattr(segments, "BLOCK", {})
    monkeypatch.setattr(segments, "LAUNCH", 2)
    fits = segments.Program.fits
    small = lambda self, args: args[0].numel() < 99 and fits(self, args)  # noqa: E731
    monkeypatch.setattr(segments.Program, "fits", small)
    params, grads = ([torch.randn(n) for n in (7, 100, 8)] for _ in range(2))
    mine = [p.clone() for p in params]
    tx = fo.adamw(0.1)
    updates, _ = tx.update(grads, tx.init(params), params)
    expected = fo.apply_updates(params, updates)
    step = CompiledStep(tx, True, "eager")
    with pytest.warns(UserWarning, match="no code for a tensor of 100 elements"):
        step(mine, grads, tx.init(mine))
    torch.testing.assert_close(mine, expected)


@pytest.mark.slow
def test_inductor_keeps_the_graph_on_disk() -> None:
    """A graph that cannot be written there is passed over, and compiled in every process anew."""
    from torch._dynamo.utils import counters

    def rule(g):
        return g * 0.3125 + 0.0625

    of_inductor = counters["inductor"]
    kept = ("fxgraph_cache_hit", "fxgraph_cache_miss")
    passed_over = of_inductor["fxgraph_cache_bypass"]
    found = sum(of_inductor[name] for name in kept)
    tx, params = fo.leafwise(rule), [torch.zeros(9)]
    fo.compiled_step(tx)(params, [torch.ones(9)], tx.init(params))
    assert of_inductor["fxgraph_cache_bypass"] == passed_over
    assert sum(of_inductor[name] for name in kept) == found + 1


@pytest.mark.slow
def test_code_found_on_disk_comes_with_its_guards() -> None:
    """What the compiler took for granted about sizes holds for code that it finds, too."""

    def f(args: list[Any]) -> list[tuple[int, Any]]:
        return [(0, torch.sin(args[0]) * args[1] + args[2] / 7)]

    from torch._dynamo.utils import counters

    of_inductor: Any = counters["inductor"]
    examples = [torch.randn(6), torch.randn(6), torch.randn(6)]
    first = kernel.Program(f, examples, 1, "inductor")
    hits = of_inductor["fxgraph_cache_hit"]
    second = kernel.Program(f, examples, 1, "inductor")
    assert of_inductor["fxgraph_cache_hit"] == hits + 1
    uneven = [torch.randn(6), torch.randn(7), torch.randn(6)]
    for program in (first, second):
        assert program.kernel is not None
        assert program.fits([torch.randn(5) for _ in range(3)])
        assert not program.fits(uneven)
