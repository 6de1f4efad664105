"""Checkpoints of chains that have changed since they were saved.

Values with the same names are loaded, the rest is reported, and an error changes nothing.
"""

from __future__ import annotations

import copy
import io
import re
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

import functorch_opt as fo
from functorch_opt import tree
from functorch_opt._core.checkpoint import fit


def make_params(seed: int = 0, dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [
        nn.Parameter(
            torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        )
        for shape in ((4, 3), (3,), ())
    ]


def train(opt: torch.optim.Optimizer, steps: int, start: int = 0) -> None:
    for step in range(start, start + steps):
        generator = torch.Generator().manual_seed(100 + step)
        for p in (p for group in opt.param_groups for p in group["params"]):
            p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(
                p.dtype
            )
        opt.step()


def through_a_file(state_dict: dict) -> dict:
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file)


def snapshot(opt: torch.optim.Optimizer) -> list:
    """All that a failed load must leave alone."""
    groups = [
        {name: copy.deepcopy(value) for name, value in g.items() if name != "params"}
        for g in opt.param_groups
    ]
    params = [p for g in opt.param_groups for p in g["params"]]
    return [
        groups,
        list(map(id, params)),
        [p.detach().clone() for p in params],
        [dict(opt.state.get(p, {})) for p in params],
    ]


def same(a: object, b: object) -> bool:
    """Bitwise; NaN is itself."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        alike = a.dtype == b.dtype and a.shape == b.shape
        return alike and torch.equal(
            a.contiguous().reshape(-1).view(torch.uint8),
            b.contiguous().reshape(-1).view(torch.uint8),
        )
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)) and type(a) is type(b):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and (a == b or (a != a and b != b))


ADAM = ["scale_by_adam/count", "scale_by_adam/mu", "scale_by_adam/nu"]


def chain_with(*names: str) -> fo.GradientTransformation:
    stages = {
        "clip": lambda: fo.clip(1.0),
        "noise": lambda: fo.add_noise(0.1, 0.5, key=7),
        "trace": lambda: fo.trace(0.9),
        "adam": fo.scale_by_adam,
        "schedule": lambda: fo.scale_by_schedule(fo.linear_schedule(-0.1, -0.01, 10)),
    }
    return fo.chain(*(stages[name]() for name in names))


# ---- a stage more or less ------------------------------------------------------------------------


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("stage", ["clip", "noise", "trace"])
def test_a_stage_put_in_moves_no_other(stage: str, place: int) -> None:
    """The count of Adam goes on, and that of the new stage begins, even if it is put in first."""
    first = fo.optim.Optimizer(make_params(), chain_with("adam", "schedule"))
    train(first, 3)
    saved = through_a_file(first.state_dict())
    names = ["adam", "schedule"]
    names.insert(place, stage)
    params = make_params(1)
    second = fo.optim.Optimizer(params, chain_with(*names))
    if stage == "clip":
        second.load_state_dict(saved, strict=True)  # it has no state: nothing is missing
    else:
        with pytest.warns(
            UserWarning, match="This state dict does not fit exactly: missing"
        ) as caught:
            second.load_state_dict(saved)
        assert len(caught) == 1 and "not expected" not in str(caught[0].message)
        listed = {
            "noise": ["add_noise/count", "add_noise/key"],
            "trace": ["trace/trace"],
        }[stage]
        assert set(re.findall(r"'([^']+)'", str(caught[0].message))) == set(listed)
        assert caught[0].filename == __file__
    for p, q in zip(first.param_groups[0]["params"], params, strict=True):
        for key in [*ADAM, "scale_by_schedule/clock"]:
            assert same(first.state[p][key], second.state[q][key])
    train(second, 2, start=3)
    state = second.state[params[0]]
    assert state["scale_by_adam/count"] == state["scale_by_schedule/clock"] == 5
    assert stage != "noise" or state["add_noise/count"] == 2


def test_a_stage_taken_out_is_reported_and_the_others_go_on() -> None:
    first = fo.optim.Optimizer(
        make_params(), chain_with("noise", "trace", "adam", "schedule")
    )
    train(first, 3)
    params = make_params()
    second = fo.optim.Optimizer(params, chain_with("adam", "schedule"))
    with pytest.warns(
        UserWarning, match=r"fit exactly: not expected \[.*left out"
    ) as caught:
        second.load_state_dict(through_a_file(first.state_dict()))
    assert len(caught) == 1
    assert set(re.findall(r"'([^']+)'", str(caught[0].message))) == {
        "add_noise/count",
        "add_noise/key",
        "trace/trace",
    }
    for p, q in zip(first.param_groups[0]["params"], params, strict=True):
        assert all(
            same(first.state[p][key], value) for key, value in second.state[q].items()
        )
        assert set(second.state[q]) == {*ADAM, "scale_by_schedule/clock"}


def test_the_numbers_after_a_change_are_those_of_the_chain_that_was_meant() -> None:
    """Adam goes on with its moments and counts, and the new stage starts at this step.

    The expected numbers are computed by hand with the functional layer.
    """
    opt = fo.optim.Optimizer(make_params(), chain_with("adam", "schedule"))
    train(opt, 3)
    params = make_params(1)
    changed = fo.optim.Optimizer(params, chain_with("trace", "adam", "schedule"))
    with pytest.warns(UserWarning, match="missing"):
        changed.load_state_dict(opt.state_dict())
    state, ps = (
        chain_with("adam", "schedule").init([p.detach() for p in params]),
        [p.detach().clone() for p in params],
    )
    for step in range(3):
        generator = torch.Generator().manual_seed(100 + step)
        gs = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in ps]
        _, state = chain_with("adam", "schedule").update(gs, state, ps)
    tx = chain_with("trace", "adam", "schedule")
    state = {"trace": tx.init(ps)["trace"], **state}
    for step in range(3, 6):
        generator = torch.Generator().manual_seed(100 + step)
        gs = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in ps]
        updates, state = tx.update(gs, state, ps)
        ps = fo.apply_updates(ps, updates)
    train(changed, 3, start=3)
    for p, q in zip(params, ps, strict=True):
        torch.testing.assert_close(p.detach(), q, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("direction", ["into", "out of"])
def test_a_chain_put_into_another_is_found_again(direction: str) -> None:
    """``adamw(...)`` becomes ``chain(clip(...), adamw(...))``: the names get a stage's name in
    front.
    """
    alone, inside = fo.adamw(0.1), fo.chain(fo.clip(1.0), fo.adamw(0.1))
    before, after = (alone, inside) if direction == "into" else (inside, alone)
    first, params = fo.optim.Optimizer(make_params(), before), make_params()
    train(first, 3)
    second = fo.optim.Optimizer(params, after)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing was left over
        second.load_state_dict(first.state_dict())
    for p, q in zip(first.param_groups[0]["params"], params, strict=True):
        assert len(second.state[q]) == 3
        assert all(map(same, first.state[p].values(), second.state[q].values()))
    third = fo.optim.Optimizer(make_params(), after)
    with pytest.raises(KeyError, match="under another name"):
        third.load_state_dict(first.state_dict(), strict=True)


def test_an_end_that_two_could_claim_is_nobodys() -> None:
    first = fo.optim.Optimizer(make_params(), fo.chain(fo.scale_by_adam()))
    train(first, 2)
    second = fo.optim.Optimizer(make_params(), fo.chain(fo.adam(0.1), fo.adamw(0.1)))
    with pytest.warns(
        UserWarning,
        match=r"missing .*'adam/scale_by_adam/mu'.*not expected .*'scale_by_adam/mu'",
    ):
        second.load_state_dict(first.state_dict())
    assert not any(second.state.values())


def test_strict_raises_with_the_same_list_and_changes_nothing() -> None:
    first = fo.optim.Optimizer(make_params(), chain_with("trace", "adam", "schedule"))
    train(first, 3)
    second = fo.optim.Optimizer(make_params(1), chain_with("noise", "adam", "schedule"))
    train(second, 1)
    before = snapshot(second)
    with pytest.raises(KeyError) as error:
        second.load_state_dict(first.state_dict(), strict=True)
    assert same(snapshot(second), before)
    with pytest.warns(UserWarning, match="fit exactly") as caught:
        second.load_state_dict(first.state_dict())
    listed = [
        re.findall(r"(missing|not expected) (\[.*?\])", str(said))
        for said in (error.value, caught[0].message)
    ]
    assert (
        listed[0]
        == listed[1]
        == [
            ("missing", "['add_noise/count', 'add_noise/key']"),
            ("not expected", "['trace/trace']"),
        ]
    )


def test_a_parameter_without_a_key_is_named() -> None:
    first = fo.optim.AdamW(make_params())
    train(first, 2)
    saved = first.state_dict()
    del saved["state"][1]["exp_avg"]
    second = fo.optim.AdamW(make_params())
    with pytest.warns(UserWarning, match=r"missing \['exp_avg \(of parameter 1\)'\]"):
        second.load_state_dict(saved)
    with pytest.raises(KeyError, match=r"exp_avg \(of parameter 1\)"):
        second.load_state_dict(saved, strict=True)


def test_a_parameter_that_never_had_a_gradient_misses_nothing() -> None:
    """The first parameter keeps the noise key, and no slots."""
    params = make_params()
    opt = fo.optim.Optimizer(params, chain_with("noise", "adam", "schedule"))
    for p in params[1:]:
        p.grad = torch.ones_like(p)
    opt.step()
    other = fo.optim.Optimizer(make_params(), chain_with("noise", "adam", "schedule"))
    other.load_state_dict(through_a_file(opt.state_dict()), strict=True)
    assert list(other.state[other.param_groups[0]["params"][0]]) == ["add_noise/key"]
    fresh = fo.optim.Optimizer(make_params(), chain_with("noise", "adam", "schedule"))
    fresh.load_state_dict(
        fo.optim.Optimizer(make_params(), chain_with("adam")).state_dict(), strict=True
    )
    assert not fresh.state


def test_a_warning_that_is_an_error_changes_nothing() -> None:
    first = fo.optim.Optimizer(make_params(), chain_with("trace", "adam"))
    train(first, 1)
    second = fo.optim.Optimizer(make_params(1), chain_with("adam"))
    train(second, 2)
    before = snapshot(second)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="not expected"):
            second.load_state_dict(first.state_dict())
    assert same(snapshot(second), before)


def test_hooks_and_schedulers_go_on_working_across_a_change() -> None:
    """A pre-hook may return another dict, a post-hook sees what was loaded, and a scheduler drives
    the loaded groups.
    """
    first = fo.optim.Optimizer(make_params(), chain_with("adam", "schedule"))
    sched = lr_scheduler.StepLR(first, 1, 0.5)
    train(first, 1)
    sched.step()
    saved = through_a_file({"opt": first.state_dict(), "sched": sched.state_dict()})
    second = fo.optim.Optimizer(make_params(), chain_with("clip", "adam", "schedule"))
    sched = lr_scheduler.StepLR(second, 1, 0.5)
    calls = []

    def halve(opt: torch.optim.Optimizer, given: dict) -> dict:
        calls.append("before")
        return {
            **given,
            "param_groups": [
                {**group, "lr": group["lr"] / 2} for group in given["param_groups"]
            ],
        }

    second.register_load_state_dict_pre_hook(halve)
    second.register_load_state_dict_post_hook(
        lambda opt: calls.append(
            opt.state[opt.param_groups[0]["params"][0]]["scale_by_adam/count"].item()
        )
    )
    second.load_state_dict(saved["opt"])
    sched.load_state_dict(saved["sched"])
    assert calls == ["before", 1]
    assert second.param_groups[0]["lr"] == 0.25
    train(second, 1, start=1)
    sched.step()
    assert second.param_groups[0]["lr"] == 0.125


@pytest.mark.parametrize("hook", ["before", "after"])
def test_a_hook_that_raises_leaves_the_optimizer_as_it_was(hook: str) -> None:
    first = fo.optim.AdamW(make_params(1), lr=0.5)
    train(first, 3)
    second, twin = fo.optim.AdamW(make_params()), fo.optim.AdamW(make_params())
    train(second, 1)
    train(twin, 1)
    before = snapshot(second)

    def fail(*_: object) -> None:
        raise RuntimeError("the hook failed")

    register = (
        second.register_load_state_dict_pre_hook
        if hook == "before"
        else second.register_load_state_dict_post_hook
    )
    handle = register(fail)
    with pytest.raises(RuntimeError, match="the hook failed"):
        second.load_state_dict(first.state_dict())
    assert same(snapshot(second), before)
    handle.remove()
    train(second, 1, start=1)
    train(twin, 1, start=1)
    assert same(snapshot(second)[2:], snapshot(twin)[2:])
    second.load_state_dict(first.state_dict())  # and no hook of ours is left behind
    assert (
        len(second._optimizer_load_state_dict_pre_hooks)
        == len(second._optimizer_load_state_dict_post_hooks)
        == 0
    )


# ---- what cannot be loaded -----------------------------------------------------------------------


def edit(path: list, value: object) -> Callable[[dict], None]:
    def change(saved: dict) -> None:
        place = saved
        for step in path[:-1]:
            place = place[step]
        place[path[-1]] = value

    return change


FUNCTIONAL: list[tuple[str, Tensor, type[Exception], str]] = [
    ("shared/count", torch.tensor(2.5), ValueError, "whole numbers"),
    ("shared/count", torch.tensor(float("nan")), ValueError, "whole numbers"),
    ("shared/count", torch.tensor(1e30), ValueError, "whole numbers"),
    ("shared/count", torch.tensor(-1), ValueError, "0 or greater"),
    ("shared/count", torch.tensor(True), TypeError, "torch.bool .* torch.int64"),
    ("shared/count", torch.tensor(1j), TypeError, "torch.complex64 .* torch.int64"),
    ("slots/mu/w", torch.zeros(2, dtype=torch.int32), TypeError, "torch.int32 .*float32"),
    ("slots/mu/w", torch.zeros(2, dtype=torch.bool), TypeError, "torch.bool .*float32"),
    (
        "slots/mu/w",
        torch.zeros(2, dtype=torch.complex64),
        TypeError,
        "complex64 .*float32",
    ),
    ("slots/mu/z", torch.zeros(2), TypeError, "torch.float32 .* torch.complex64"),
]


@pytest.mark.parametrize(
    ("path", "value", "error", "message"),
    FUNCTIONAL,
    ids=[f"{p}-{v}" for p, v, _, _ in FUNCTIONAL],
)
def test_a_state_takes_tensors_of_the_same_kind_only(
    path: str, value: Tensor, error: type[Exception], message: str
) -> None:
    tx = fo.scale_by_adam()
    state = tx.init({"w": torch.zeros(2), "z": torch.zeros(2, dtype=torch.complex64)})
    with pytest.raises(error, match=f"'{path}' .*{message}"):
        fo.load_state_dict(state, {**fo.state_dict(state), path: value})


def test_whole_numbers_take_the_dtype_here_and_floating_ones_keep_theirs() -> None:
    tx, params = (
        fo.chain(fo.add_noise(0.1, 0.5, key=-1), fo.adam(0.1)),
        {"w": torch.zeros(2)},
    )
    state = tx.init(params)
    saved = fo.state_dict(state)
    for count in (torch.tensor(3.0), torch.tensor(3, dtype=torch.uint8)):
        saved["adam/scale_by_adam/shared/count"] = count
        saved["adam/scale_by_adam/slots/mu/w"] = torch.ones(2, dtype=torch.float64)
        loaded = fo.load_state_dict(state, saved)
        assert same(fo.get(loaded, "scale_by_adam/count"), torch.tensor(3))
        assert same(fo.get(loaded, "mu")["w"], torch.ones(2, dtype=torch.float64))
        assert same(fo.get(loaded, "key"), torch.tensor([-1, 0]))


@pytest.mark.parametrize(
    "count", [7, torch.tensor(7.0), torch.tensor(7, dtype=torch.uint8)]
)
def test_a_count_of_an_optimizer_is_kept_so_that_it_can_grow(count: object) -> None:
    first = fo.optim.Optimizer(make_params(), fo.scale_by_adam())
    train(first, 1)
    saved = first.state_dict()
    for entry in saved["state"].values():
        entry["count" if "count" in entry else "scale_by_adam/count"] = count
    first.load_state_dict(saved)
    entry = first.state[first.param_groups[0]["params"][0]]
    assert same(next(v for k, v in entry.items() if k.endswith("count")), torch.tensor(7))


BAD: list[tuple[str, Callable[[dict], None], type[Exception], str]] = [
    (
        "shape",
        edit(["state", 0, "exp_avg"], torch.zeros(3, 4)),
        ValueError,
        r"'exp_avg' of parameter 0 has shape \(3, 4\), .* \(4, 3\)",
    ),
    (
        "broadcast",
        edit(["state", 1, "exp_avg"], torch.zeros(1)),
        ValueError,
        "'exp_avg' of parameter 1 has shape",
    ),
    (
        "integers",
        edit(["state", 1, "exp_avg"], torch.zeros(3, dtype=torch.int64)),
        TypeError,
        "is torch.int64, and here it is torch.float64",
    ),
    (
        "complex",
        edit(["state", 1, "exp_avg"], torch.zeros(3, dtype=torch.complex64)),
        TypeError,
        "is torch.complex64",
    ),
    (
        "sparse",
        edit(["state", 1, "exp_avg"], torch.zeros(3).to_sparse()),
        TypeError,
        "dense tensor; got a torch.sparse_coo tensor",
    ),
    (
        "list",
        edit(["state", 1, "exp_avg"], [0.0, 0.0, 0.0]),
        TypeError,
        "must be a dense tensor; got list",
    ),
    (
        "string",
        edit(["state", 1, "exp_avg"], "abc"),
        TypeError,
        "must be a dense tensor; got str 'abc'",
    ),
    (
        "NaN step",
        edit(["state", 1, "step"], torch.tensor(float("nan"))),
        ValueError,
        "'step' of parameter 1 .* whole number from 0.* nan",
    ),
    (
        "negative step",
        edit(["state", 1, "step"], -1),
        ValueError,
        "whole number from 0.* -1",
    ),
    (
        "half a step",
        edit(["state", 1, "step"], torch.tensor(0.5)),
        ValueError,
        "whole number from 0.* 0.5",
    ),
    (
        "steps",
        edit(["state", 1, "step"], torch.ones(3)),
        TypeError,
        "0-dim tensor.* shape",
    ),
    ("a string as step", edit(["state", 1, "step"], "3"), TypeError, "got str '3'"),
    (
        "an entry that is a list",
        edit(["state", 1], [1, 2]),
        TypeError,
        "'state' must be a dict from the number",
    ),
    ("state is a list", edit(["state"], []), TypeError, "'state' must be a dict"),
    (
        "groups are a dict",
        edit(["param_groups"], {}),
        TypeError,
        "'param_groups' must be a list",
    ),
    (
        "no params",
        edit(["param_groups", 0], {"lr": 0.1}),
        TypeError,
        "'param_groups' must be a list of dicts with .*'params'",
    ),
    (
        "no groups",
        edit(["param_groups"], []),
        ValueError,
        "different number of parameter groups",
    ),
    (
        "a parameter too few",
        edit(["param_groups", 0, "params"], [0, 1]),
        ValueError,
        "doesn't match the size",
    ),
    (
        "a parameter twice",
        edit(["param_groups", 0, "params"], [0, 0, 1]),
        ValueError,
        r"number of its own .*\[0, 0, 1\]",
    ),
    (
        "lr is a string",
        edit(["param_groups", 0, "lr"], "0.1"),
        ValueError,
        "group 0 .* must be a number.* got str",
    ),
    (
        "lr is None",
        edit(["param_groups", 0, "lr"], None),
        ValueError,
        "group 0 .* must be a number",
    ),
    (
        "lr is a vector",
        edit(["param_groups", 0, "lr"], torch.ones(2)),
        ValueError,
        "group 0 .* 1-element",
    ),
    (
        "one beta",
        edit(["param_groups", 0, "betas"], (0.9,)),
        ValueError,
        "group 0 .* not enough values",
    ),
    (
        "betas is a number",
        edit(["param_groups", 0, "betas"], 0.9),
        ValueError,
        "group 0 ",
    ),
    (
        "amsgrad is a number",
        edit(["param_groups", 0, "amsgrad"], 2),
        ValueError,
        "group 0 .* amsgrad must be of the type of False; got int 2",
    ),
    (
        "maximize is a list",
        edit(["param_groups", 0, "maximize"], []),
        ValueError,
        "group 0 .* maximize must be of the type of False; got tuple",
    ),
]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [case[1:] for case in BAD],
    ids=[case[0] for case in BAD],
)
def test_what_cannot_be_loaded_is_an_error_that_changes_nothing(
    change, error, message
) -> None:
    first, second, twin = (fo.optim.AdamW(make_params(), lr=0.1) for _ in range(3))
    for opt in (first, second, twin):
        train(opt, 2)
    saved = copy.deepcopy(first.state_dict())
    change(saved)
    before = snapshot(second)
    with pytest.raises(error, match=message):
        second.load_state_dict(saved)
    assert same(snapshot(second), before)
    train(second, 1, start=2)
    train(twin, 1, start=2)
    assert same(snapshot(second)[2:], snapshot(twin)[2:])


@pytest.mark.parametrize("given", [None, [], 3, "state", {}, {"state": {}}])
def test_what_is_no_state_dict(given: object) -> None:
    opt = fo.optim.AdamW(make_params())
    with pytest.raises(TypeError, match="a dict with 'state' and 'param_groups'"):
        opt.load_state_dict(given)


def test_nan_in_a_slot_is_loaded_as_it_is() -> None:
    """A run that diverged is saved like any other."""
    first, second = fo.optim.AdamW(make_params()), fo.optim.AdamW(make_params())
    train(first, 1)
    first.state[first.param_groups[0]["params"][0]]["exp_avg"].fill_(float("nan"))
    second.load_state_dict(first.state_dict())
    assert same(snapshot(second)[3], snapshot(first)[3])


def test_the_state_of_a_parameter_that_no_group_has_is_reported() -> None:
    opt = fo.optim.AdamW(make_params())
    train(opt, 1)
    saved = opt.state_dict()
    saved["state"][7] = saved["state"][0]
    with pytest.warns(UserWarning, match=r"not expected \['all of parameter 7'\]"):
        opt.load_state_dict(saved)
    assert set(opt.state) == set(opt.param_groups[0]["params"])


@pytest.mark.parametrize(
    ("name", "options"), [("SGD", {"momentum": 0.9}), ("SGD", {}), ("Muon", {})]
)
def test_torchs_classes_without_a_step_load_strictly(name: str, options: dict) -> None:
    params = make_params()[:1]
    theirs = getattr(torch.optim, name)(params, **options)
    train(theirs, 2)
    getattr(fo.optim, name)(make_params()[:1], **options).load_state_dict(
        theirs.state_dict(), strict=True
    )


# ---- the functional layer ------------------------------------------------------------------------


def test_a_functional_state_outlives_a_change_if_asked_to() -> None:
    params = {"w": torch.ones(2), "b": torch.zeros(())}
    grads = tree.map(lambda p: p + 1, params)
    _, old = chain_with("trace", "adam", "schedule").update(
        grads, chain_with("trace", "adam", "schedule").init(params), params
    )
    tx = chain_with("noise", "adam", "schedule")
    fresh = tx.init(params)
    with pytest.raises(
        KeyError,
        match=r"missing \['add_noise/shared/.*not expected \['trace/.*strict=False",
    ):
        fo.load_state_dict(fresh, fo.state_dict(old))
    with pytest.warns(
        UserWarning, match=r"missing \['add_noise/shared/.*not expected \['trace/"
    ) as caught:
        new = fo.load_state_dict(fresh, fo.state_dict(old), strict=False)
    assert len(caught) == 1
    flat, before, first = fo.state_dict(new), fo.state_dict(old), fo.state_dict(fresh)
    for path, value in flat.items():
        source = first if path.startswith("add_noise") else before
        assert same(value, source[path]) and value.data_ptr() != source[path].data_ptr()
    assert flat["scale_by_adam/shared/count"] == 1


def test_names_are_matched_by_their_ends_if_there_is_no_choice() -> None:
    found = fit(
        ["x/mu", "x/nu", "y/a", "z", "same"], ["mu", "q/nu", "a", "b/z", "c/z", "same"]
    )
    assert found.source == {"same": "same", "x/mu": "mu", "y/a": "a"}
    assert found.missing == ["x/nu", "z"] and found.unexpected == ["q/nu", "b/z", "c/z"]
    assert found.moved == {"x/mu": "mu", "y/a": "a"} and not found.exact
    assert fit(["a"], ["a"]).exact
