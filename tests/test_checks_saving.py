"""The contract of a torch optimizer, by the numbers of its checks: D serialization."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from training import make_params, train

import functorch_opt as fo
from functorch_opt import tree


@pytest.mark.parametrize(
    "build",
    [
        lambda ps: fo.optim.AdamW(ps, amsgrad=True),
        lambda ps: fo.optim.Optimizer(ps, fo.chain(fo.add_noise(0.1, 0.5, key=2**40 + 3), fo.adam(fo.linear_schedule(0.1, 0.0, 20)))),
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
def test_26_27_resumed_equals_uninterrupted_bit_for_bit(build, dtype: torch.dtype) -> None:
    params = make_params(dtype)
    opt = build(params)
    train(opt, params, 3)
    file = io.BytesIO()
    torch.save({"opt": opt.state_dict(), "params": [p.detach() for p in params]}, file)
    file.seek(0)
    saved = torch.load(file)
    others = [nn.Parameter(p) for p in saved["params"]]
    other = build(others)
    other.load_state_dict(saved["opt"])
    for p, q in zip(params, others, strict=True):
        for key, value in opt.state[p].items():
            twin = other.state[q][key]
            assert twin.dtype == value.dtype and torch.equal(twin, value)
    for p, q in zip(train(opt, params, 3, start=3), train(other, others, 3, start=3), strict=True):
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


@pytest.mark.parametrize("how", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize(
    "build",
    [
        fo.optim.AdamW,
        lambda ps: fo.optim.Optimizer(ps, fo.chain(fo.add_noise(0.1, 0.0, key=1), fo.adam(0.1))),
        lambda ps: fo.optim.Optimizer(ps, fo.adamw, learning_rate=0.1),
    ],
    ids=["AdamW", "chain", "factory"],
)
def test_31_copies_go_on_alike(how, build) -> None:
    params = make_params()
    opt = build(params)
    train(opt, params, 2)
    others, other = how((params, opt))
    assert {k for k in vars(opt) if not k.startswith("_")} == {k for k in vars(other) if not k.startswith("_")}
    for p, q in zip(train(opt, params, 2, start=2), train(other, others, 2, start=2), strict=True):
        assert torch.equal(p, q)


def test_32_hooks_fire_in_order_once() -> None:
    params = make_params()
    opt = fo.optim.AdamW(params)
    calls = []
    opt.register_step_pre_hook(lambda *_: calls.append("before"))
    opt.register_step_post_hook(lambda *_: calls.append("after"))
    train(opt, params, 1)
    assert calls == ["before", "after"]
