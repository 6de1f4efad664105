"""The contract of a torch optimizer, by the numbers of its checks. This file has D,
serialization.
"""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from training import TORCH_NAMED, make_params, model_and_loss, train

import functorch_opt as fo
from functorch_opt import tree

BUILDS = {
    **{name: getattr(fo.optim, name) for name in TORCH_NAMED},
    "stateless": lambda ps: fo.optim.Optimizer(ps, fo.clip(1.0)),
    "masked": lambda ps: fo.optim.Optimizer(
        ps, fo.masked(fo.adam(0.1), lambda path, p: p.ndim > 1, otherwise="zero")
    ),
    "noise": lambda ps: fo.optim.Optimizer(
        ps, fo.chain(fo.add_noise(0.1, 0.5, key=2**40 + 3), fo.adam(0.1))
    ),
    "factory": lambda ps: fo.optim.Optimizer(ps, fo.adamw, learning_rate=0.1),
}


def through_a_file(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("build", BUILDS)
def test_24_25_schema(build: str) -> None:
    """Numbered parameters, each with a flat dict of tensors; and a file of it holds the same."""
    params = make_params(of=build)
    opt = BUILDS[build](params)
    train(opt, params, 1)
    saved = opt.state_dict()
    assert (
        list(saved["state"])
        == list(range(len(params)))
        == saved["param_groups"][0]["params"]
    )
    for entry in saved["state"].values():
        assert entry and all(
            type(key) is str and type(value) is torch.Tensor
            for key, value in entry.items()
        )
    loaded = through_a_file(saved)
    assert loaded["param_groups"] == saved["param_groups"]
    for i, entry in saved["state"].items():
        assert entry.keys() == loaded["state"][i].keys()
        assert all(
            torch.equal(value, loaded["state"][i][key]) for key, value in entry.items()
        )


@pytest.mark.parametrize(
    "build",
    [
        lambda ps: fo.optim.AdamW(ps, amsgrad=True),
        lambda ps: fo.optim.Optimizer(
            ps,
            fo.chain(
                fo.add_noise(0.1, 0.5, key=2**40 + 3),
                fo.adam(fo.linear_schedule(0.1, 0.0, 20)),
            ),
        ),
        lambda ps: fo.optim.Optimizer(ps, fo.lion, learning_rate=0.1),
        lambda ps: fo.optim.NAdam(ps),
        lambda ps: fo.optim.ASGD(ps, t0=1),
        lambda ps: fo.optim.Rprop(ps),
        lambda ps: fo.optim.Adafactor(ps[:3] + ps[4:]),
        lambda ps: fo.optim.Muon(ps[4:]),
    ],
    ids=["AdamW", "noise", "lion", "NAdam", "ASGD", "Rprop", "Adafactor", "Muon"],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_26_27_resumed_equals_uninterrupted_bit_for_bit(
    build, dtype: torch.dtype
) -> None:
    params = make_params(dtype)
    opt = build(params)
    train(opt, params, 3)
    saved = through_a_file(
        {"opt": opt.state_dict(), "params": [p.detach() for p in params]}
    )
    others = [nn.Parameter(p) for p in saved["params"]]
    other = build(others)
    other.load_state_dict(saved["opt"])
    for p, q in zip(params, others, strict=True):
        for key, value in opt.state[p].items():
            twin = other.state[q][key]
            assert twin.dtype == value.dtype and torch.equal(twin, value)
    for p, q in zip(
        train(opt, params, 3, start=3), train(other, others, 3, start=3), strict=True
    ):
        assert torch.equal(p, q)


def test_27_a_count_under_bfloat16_survives() -> None:
    params = make_params(torch.bfloat16)
    opt = fo.optim.Optimizer(
        params,
        fo.chain(fo.ema(0.9), fo.scale_by_schedule(fo.linear_schedule(-0.1, 0.0, 1000))),
    )
    train(opt, params, 257)
    other = fo.optim.Optimizer(make_params(torch.bfloat16), opt._recipe[0])
    other.load_state_dict(opt.state_dict())
    counts = [
        (key, value)
        for entry in other.state.values()
        for key, value in entry.items()
        if key.endswith(("step", "count", "clock"))
    ]
    assert counts and all(value == 257 for _, value in counts)
    assert len({key for key, _ in counts}) == 2


@pytest.mark.parametrize("named", ["saved", "loading", "both"])
def test_28_names_and_other_ids(named: str) -> None:
    """torch.distributed.checkpoint has names for numbers; parameters are matched by position."""
    params, others = make_params(), make_params()
    names = [f"layer.{i}" for i in range(len(params))]
    opt = fo.optim.AdamW(
        params if named == "loading" else zip(names, params, strict=True)
    )
    other = fo.optim.AdamW(
        others if named == "saved" else zip(names, others, strict=True)
    )
    train(opt, params, 2)
    train(other, others, 2)
    saved = opt.state_dict()
    saved = {
        "state": {names[i]: entry for i, entry in saved["state"].items()},
        "param_groups": [
            {**group, "params": [names[i] for i in group["params"]]}
            for group in saved["param_groups"]
        ],
    }
    other.load_state_dict(state_dict=saved)
    for p, q in zip(
        train(opt, params, 2, start=2), train(other, others, 2, start=2), strict=True
    ):
        assert torch.equal(p, q)


def test_28_older_and_foreign_state_dicts_load() -> None:
    params = make_params()
    opt = fo.optim.AdamW(params)
    train(opt, params, 2)
    saved = opt.state_dict()
    for entry in saved["state"].values():
        entry["step"] = 2  # a python number, as old checkpoints have it
    for group in saved["param_groups"]:
        del group["amsgrad"]
        group["mine"] = {"kept": 1}
    other = fo.optim.AdamW(make_params())
    other.load_state_dict(saved)
    group = other.param_groups[0]
    assert group["amsgrad"] is False and group["mine"] == {"kept": 1}
    train(other, group["params"], 1)
    assert other.state[group["params"][0]]["step"].item() == 3


def test_29_load_copies() -> None:
    params = make_params()
    opt = fo.optim.AdamW(params)
    train(opt, params, 2)
    saved = copy.deepcopy(opt.state_dict())
    other = fo.optim.AdamW(make_params())
    other.load_state_dict(saved)
    kept = copy.deepcopy(saved)
    train(other, other.param_groups[0]["params"], 2)
    for a, b in zip(tree.leaves(saved["state"]), tree.leaves(kept["state"]), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("steps", [0, 2], ids=["fresh", "stepped"])
@pytest.mark.parametrize("build", BUILDS)
def test_30_a_round_trip_changes_nothing(build: str, steps: int) -> None:
    """accelerate makes one when it takes an optimizer over."""
    params, twins = make_params(of=build), make_params(of=build)
    opt, twin = BUILDS[build](params), BUILDS[build](twins)
    train(opt, params, steps)
    train(twin, twins, steps)
    before = copy.deepcopy(opt.state_dict())
    opt.load_state_dict(opt.state_dict())
    after = opt.state_dict()
    assert (
        after["param_groups"] == before["param_groups"]
        and after["state"].keys() == before["state"].keys()
    )
    for i, entry in before["state"].items():
        assert entry.keys() == after["state"][i].keys()
        assert all(
            torch.equal(v, after["state"][i][k]) and v.dtype == after["state"][i][k].dtype
            for k, v in entry.items()
        )
    for p, q in zip(
        train(opt, params, 2, start=steps),
        train(twin, twins, 2, start=steps),
        strict=True,
    ):
        assert torch.equal(p, q)


@pytest.mark.parametrize("scheduled", [False, True], ids=["", "scheduled"])
@pytest.mark.parametrize(
    "how",
    [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))],
    ids=["deepcopy", "pickle"],
)
@pytest.mark.parametrize(
    "build",
    [
        fo.optim.AdamW,
        lambda ps: fo.optim.Optimizer(
            ps, fo.chain(fo.add_noise(0.1, 0.0, key=1), fo.adam(0.1))
        ),
        lambda ps: fo.optim.Optimizer(ps, fo.adamw, learning_rate=0.1),
    ],
    ids=["AdamW", "chain", "factory"],
)
def test_31_copies_go_on_alike(how, build, scheduled: bool) -> None:
    params = make_params()
    opt = build(params)
    sched = lr_scheduler.ExponentialLR(opt, 0.5) if scheduled else None
    train(opt, params, 2)
    if sched:
        sched.step()
    others, other = how((params, opt))
    assert {k for k in vars(opt) if not k.startswith("_")} == {
        k for k in vars(other) if not k.startswith("_")
    }
    for p, q in zip(
        train(opt, params, 2, start=2), train(other, others, 2, start=2), strict=True
    ):
        assert torch.equal(p, q)


def test_31_a_copy_of_lbfgs_makes_steps() -> None:
    """torch's own cannot."""
    model, x, y = model_and_loss()
    opt = fo.optim.LBFGS(model.parameters())
    others, other = copy.deepcopy((model, opt))
    losses = []
    for m, o in ((model, opt), (others, other)):

        def closure(m=m, o=o):
            o.zero_grad()
            loss = nn.functional.mse_loss(m(x), y)
            loss.backward()
            return loss

        losses.append([o.step(closure).item() for _ in range(3)])
    assert losses[0] == losses[1] and losses[0][2] < losses[0][0]


def test_32_hooks() -> None:
    """All six kinds, once each, in torch's order; what a hook puts into the state passes
    through.
    """
    params = make_params()
    opt = fo.optim.AdamW(params)
    calls: list[str] = []

    def note(name: str, result=None):
        return lambda *_: (calls.append(name), result)[1]

    opt.register_step_pre_hook(note("step pre"))
    opt.register_step_post_hook(note("step post"))
    handles = [
        register_optimizer_step_pre_hook(note("global pre")),
        register_optimizer_step_post_hook(note("global post")),
    ]
    opt.register_state_dict_pre_hook(
        lambda o: (calls.append("save pre"), o.state.__setitem__("test", 1))[0]
    )
    opt.register_state_dict_post_hook(note("save post"))
    opt.register_load_state_dict_pre_hook(note("load pre"))
    opt.register_load_state_dict_pre_hook(note("load pre, first"), prepend=True)
    opt.register_load_state_dict_post_hook(note("load post"))
    opt.register_load_state_dict_post_hook(note("load post, first"), prepend=True)
    try:
        train(opt, params, 1)
        opt.load_state_dict(opt.state_dict())
        train(opt, params, 1, start=1)
    finally:
        for handle in handles:
            handle.remove()
    step = ["global pre", "step pre", "step post", "global post"]
    assert calls == [
        *step,
        "save pre",
        "save post",
        "load pre, first",
        "load pre",
        "load post, first",
        "load post",
        *step,
    ]
    assert opt.state["test"] == 1 and opt.state[params[0]]["step"] == 2


def test_32_a_hook_may_change_what_is_loaded() -> None:
    params, others = make_params(), make_params()
    opt, other = fo.optim.AdamW(params), fo.optim.AdamW(others)
    train(opt, params, 2)

    def halve(_, saved):
        saved["state"] = {
            i: {**entry, "exp_avg": entry["exp_avg"] / 2}
            for i, entry in saved["state"].items()
        }
        return saved

    other.register_load_state_dict_pre_hook(halve)
    other.load_state_dict(opt.state_dict())
    for p, q in zip(params, others, strict=True):
        assert torch.equal(other.state[q]["exp_avg"], opt.state[p]["exp_avg"] / 2)
