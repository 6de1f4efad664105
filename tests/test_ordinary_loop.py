"""Habits of ordinary loops.

What people do with an optimizer of torch works with those here, or says what to write instead.
"""

from __future__ import annotations

import copy
import functools
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.optim import lr_scheduler
from training import TORCH_NAMED

import functorch_opt as fo


def zeros(n: int = 3) -> nn.Parameter:
    return nn.Parameter(torch.zeros(n))


def step(opt: torch.optim.Optimizer, *params: nn.Parameter, g: float = 1.0) -> None:
    for p in params:
        p.grad = torch.full_like(p, g)
    opt.step()


def through_a_file(state_dict: dict) -> dict:
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


# ---- names ---------------------------------------------------------------------------------------


def by_head() -> fo.GradientTransformation:
    return fo.partition(
        {"fast": fo.sgd(1.0), "slow": fo.sgd(0.001)},
        lambda path, p: "fast" if path.startswith("head") else "slow",
    )


@pytest.mark.parametrize("saved_as", ["module.head.w", "_orig_mod.head.w", None])
def test_labels_see_the_names_of_this_optimizer(saved_as: str | None) -> None:
    """Saved under DDP or torch.compile, or without names; resumed bare."""
    p = zeros()
    first = fo.optim.Optimizer([(saved_as, p)] if saved_as else [p], by_head())
    step(first, p)
    saved = through_a_file(first.state_dict())
    q = zeros()
    opt = fo.optim.Optimizer([("head.w", q)], by_head())
    opt.load_state_dict(saved)
    step(opt, q)
    assert q.tolist() == [-1.0] * 3
    assert opt.param_groups[0]["param_names"] == ["head.w"]
    bare = fo.optim.Optimizer([zeros()], fo.sgd(1.0))
    bare.load_state_dict(saved)
    assert "param_names" not in bare.param_groups[0]


def test_a_hook_sees_the_names_of_the_checkpoint() -> None:
    """The recipe in torch's documentation reads them there."""
    p, seen = zeros(), []
    first = fo.optim.AdamW([("module.w", p)])
    second = fo.optim.AdamW([("w", zeros())])
    second.register_load_state_dict_pre_hook(
        lambda opt, given: seen.append(given["param_groups"][0]["param_names"])
    )
    second.load_state_dict(first.state_dict())
    assert seen == [["module.w"]]


def test_names_that_masks_see_are_unique() -> None:
    one, two = nn.Linear(2, 1), nn.Linear(2, 1)
    tx = fo.adamw(0.1, weight_decay=1.0, mask=lambda path, p: path.endswith("weight"))
    groups = [{"params": m.named_parameters()} for m in (one, two)]
    with pytest.raises(ValueError, match=r"'weight', 'bias'.*generator\.\{name\}"):
        fo.optim.Optimizer(groups, tx)
    opt = fo.optim.Optimizer(one.named_parameters(), tx)
    with pytest.raises(ValueError, match="must be unique"):
        opt.add_param_group({"params": two.named_parameters()})
    assert len(opt.param_groups) == 1
    named = [(f"two.{name}", p) for name, p in two.named_parameters()]
    opt.add_param_group({"params": named})
    before = two.weight.detach().clone()
    step(opt, *one.parameters(), *two.parameters(), g=0.0)
    assert (two.weight != before).all()


def test_the_named_classes_look_at_no_name_as_torchs() -> None:
    one, two = nn.Linear(2, 1), nn.Linear(2, 1)
    opt = fo.optim.AdamW([{"params": m.named_parameters()} for m in (one, two)])
    before = two.weight.detach().clone()
    step(opt, *one.parameters(), *two.parameters())
    assert (two.weight != before).all()


# ---- entries of others ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Adam", "SGD", "Muon", "RAdam"])
def test_an_entry_of_somebody_else_is_no_step(name: str) -> None:
    def train(note: bool) -> Tensor:
        p = nn.Parameter(torch.ones(2, 2))
        opt = getattr(fo.optim, name)([p], lr=0.1)
        if note:
            opt.state[p]["note"] = torch.zeros(())
        opt.init_state()
        for g in (1.0, -2.0):
            step(opt, p, g=g)
        assert opt.state[p]["step"] == 2
        return p.detach()

    assert torch.equal(train(False), train(True))


def test_entries_of_others_are_saved_and_loaded() -> None:
    p, q = zeros(), zeros()
    opt = fo.optim.AdamW([p, q])
    step(opt, p)
    mine = {"z": torch.ones(1), "deep": {"a": [torch.ones(1), "text", None]}}
    opt.state[p].update(mine)
    opt.state[q]["z"] = 3
    opt.state["whole"] = {"k": 1}
    saved = through_a_file(opt.state_dict())
    for other in (opt, fo.optim.AdamW([zeros(), zeros()])):
        other.load_state_dict(saved, strict=True)
        a, b = other.param_groups[0]["params"]
        assert (
            other.state[a]["z"] == 1 and other.state[a]["z"] is not saved["state"][0]["z"]
        )
        assert other.state[a]["deep"] == {"a": [torch.ones(1), "text", None]}
        assert other.state[b] == {"z": 3} and other.state["whole"] == {"k": 1}
        step(other, a, b)
        assert other.state[b]["step"] == 1


def test_state_of_another_optimizer_is_left_out_all_the_same() -> None:
    p, q = zeros(), zeros()
    adam, sgd = fo.optim.Adam([p]), fo.optim.SGD([q], momentum=0.9)
    step(adam, p)
    with pytest.warns(UserWarning, match=r"not expected \['exp_avg', 'exp_avg_sq'\]"):
        sgd.load_state_dict(adam.state_dict())
    assert set(sgd.state[q]) == {"step"}


@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_defaults_and_groups_may_be_added_to(compile: bool) -> None:
    """Wrappers such as Lookahead do."""
    p = zeros()
    opt = fo.optim.AdamW([p], compile=compile)
    opt.defaults.update(lookahead_k=6, lookahead_steps=[1, 2])
    for group in opt.param_groups:
        group.setdefault("lookahead_k", 6)
        group["lookahead_steps"] = [1, 2]
    step(opt, p)
    opt.add_param_group({"params": [zeros()]})
    opt.load_state_dict(through_a_file(opt.state_dict()))
    step(pickle.loads(pickle.dumps(opt)), p)
    step(opt, p)
    assert opt.param_groups[1]["lookahead_k"] == 6
    assert opt.param_groups[0]["lookahead_steps"] == [1, 2] and (p != 0).all()


# ---- numbers -------------------------------------------------------------------------------------

NUMBERS = [
    ("lr", np.float32(1e-3)),
    ("lr", np.float64(1e-3)),
    ("lr", np.array(1e-3)),
    ("lr", np.array([1e-3])),
    ("lr", np.int64(1)),
    ("lr", torch.full((1, 1), 1e-3)),
    ("betas", (np.float32(0.9), np.float64(0.99))),
    ("betas", np.array([0.9, 0.99]).tolist()),
    ("weight_decay", np.float32(0.1)),
    ("eps", np.float32(1e-6)),
    ("maximize", np.bool_(True)),
]


@pytest.mark.parametrize(("option", "value"), NUMBERS, ids=repr)
def test_numbers_of_numpy_are_numbers(option: str, value: object) -> None:
    for groups in (1, 2):
        params = [zeros() for _ in range(groups)]
        opt = fo.optim.AdamW([{"params": [p]} for p in params], **{option: value})
        plain = value.tolist() if isinstance(value, Tensor) else np.array(value).tolist()
        while option == "lr" and isinstance(plain, list):
            (plain,) = plain
        twin = torch.optim.AdamW([zeros()], **{option: plain})
        step(opt, *params)
        step(twin, *twin.param_groups[0]["params"])
        for p in params:
            torch.testing.assert_close(p, twin.param_groups[0]["params"][0])
        other = fo.optim.AdamW([{"params": [zeros()]} for _ in range(groups)])
        file = io.BytesIO()
        torch.save(opt.state_dict(), file)
        file.seek(0)
        other.load_state_dict(torch.load(file))  # with weights_only


TAKEN = [
    *NUMBERS,
    ("lr", -1e-3),
    ("lr", float("nan")),
    ("betas", (0.9, 1.0)),
    ("betas", [0.9, 0.99]),
    ("weight_decay", -0.1),
    ("weight_decay", torch.tensor([0.1])),
    ("maximize", 1),
    ("amsgrad", 0),
]


@pytest.mark.parametrize(("option", "value"), TAKEN, ids=repr)
def test_what_a_step_takes_can_be_loaded(option: str, value: object) -> None:
    p = zeros()
    opt = fo.optim.AdamW([p])
    opt.param_groups[0][option] = value
    step(opt, p)
    opt.load_state_dict(through_a_file(opt.state_dict()))
    step(opt, p)
    other = fo.optim.AdamW([zeros()])
    other.load_state_dict(opt.state_dict())
    step(other, *other.param_groups[0]["params"])


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("lr", "0.1", "lr must be a number or a 1-element tensor; got str '0.1'"),
        ("lr", None, "lr must be a number or a 1-element tensor; got NoneType"),
        ("lr", torch.ones(2), r"Tensor lr must be 1-element and real; got .* \(2,\)"),
        ("lr", np.ones(2), "lr must be a number or a 1-element tensor; got ndarray"),
        ("betas", (0.9, "b"), "betas must be a number"),
        ("betas", 0.9, r"betas must be 2 numbers; got float 0\.9"),
        ("betas", (0.9,), r"betas has not enough values: there must be 2; got \(0\.9,\)"),
        ("lr", (0.1, 0.2), "lr must be a number or a 1-element tensor; got tuple"),
        ("maximize", "no", "maximize must be of the type of False; got str 'no'"),
        ("amsgrad", 2, "amsgrad must be of the type of False; got int 2"),
    ],
)
def test_what_cannot_be_loaded_no_step_takes(
    option: str, value: object, message: str
) -> None:
    p = zeros()
    opt = fo.optim.AdamW([p])
    step(opt, p)
    saved, before = copy.deepcopy(opt.state_dict()), p.detach().clone()
    opt.param_groups[0][option] = saved["param_groups"][0][option] = value
    with pytest.raises((TypeError, ValueError), match=message):
        step(opt, p)
    assert torch.equal(p, before) and opt.state[p]["step"] == 1
    with pytest.raises(ValueError, match=message):
        fo.optim.AdamW([zeros()]).load_state_dict(saved)


@pytest.mark.parametrize("shape", [(1,), (1, 1), (1, 1, 1)], ids=str)
@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_tensor_of_one_element_has_any_shape(shape: tuple, compile: bool) -> None:
    p, q = zeros(), zeros()
    groups = [{"params": [p]}, {"params": [q], "weight_decay": torch.full(shape, 0.1)}]
    opt = fo.optim.SGD(groups, lr=torch.full(shape, 0.1), compile=compile)
    generic = fo.optim.Optimizer([zeros()], fo.adamw, lr=torch.full(shape, 0.1))
    for _ in range(2):
        step(opt, p, q)
        step(generic, *generic.param_groups[0]["params"])
    torch.testing.assert_close(p.detach(), torch.full((3,), -0.2))
    opt.load_state_dict(opt.state_dict())


def test_a_tensor_lr_is_the_users() -> None:
    for build in (fo.optim.SGD, lambda ps, lr: fo.optim.Optimizer(ps, fo.sgd, lr=lr)):
        lr, p, late = torch.tensor(0.1), zeros(), zeros()
        opt = build([p], lr=lr)
        assert opt.param_groups[0]["lr"] is lr
        lr.fill_(0.0)
        step(opt, p)
        assert (p == 0).all()
        lr.fill_(0.5)
        opt.add_param_group({"params": [late], "lr": lr})
        step(opt, p, late)
        assert (p == -0.5).all() and (late == -0.5).all()
        opt.param_groups[1]["lr"].fill_(0.0)  # schedulers write into each by itself
        assert lr == 0.5


# ---- parameters that are frozen ------------------------------------------------------------------


@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.bool], ids=str)
def test_frozen_integers_stay_where_they_are(
    dtype: torch.dtype, named: bool, compile: bool
) -> None:
    """Quantised base weights under adapters."""

    def make() -> tuple[nn.ParameterDict, torch.optim.Optimizer]:
        model = nn.ParameterDict({"a": zeros(), "b": zeros(2)})
        for name in ("base", "c"):
            model[name] = nn.Parameter(torch.ones(3).to(dtype), requires_grad=False)
        given = list(model.named_parameters())
        groups = [
            {"params": [pair if named else pair[1] for pair in part]}
            for part in (given[:2], given[2:])
        ]
        groups[0]["lr"] = 0.5
        tx = fo.chain(
            fo.clip_by_global_norm(1.0),
            fo.masked(fo.scale(2.0), lambda path, p: p.ndim > 0),
            fo.scale_by_adam(),
            fo.add_noise(0.1, 0.5, key=3),
            fo.scale(-0.1),
            fo.params_ema(0.9),
        )
        return model, fo.optim.Optimizer(groups, tx, compile=compile)

    model, opt = make()
    opt.init_state()
    for _ in range(2):
        step(opt, model["a"], model["b"])
    assert (model["base"] == torch.ones(3).to(dtype)).all() and (model["a"] != 0).all()
    assert model["base"] not in opt.state
    with opt.eval_params():
        assert model["base"].dtype == dtype
    other, again = make()
    other.load_state_dict(model.state_dict())
    again.load_state_dict(through_a_file(opt.state_dict()), strict=True)
    for m, o in ((model, opt), (other, again)):
        step(o, m["a"], m["b"])
    assert all(
        torch.equal(p, q) for p, q in zip(model.values(), other.values(), strict=True)
    )


def test_groups_of_nothing_but_integers_or_of_nothing() -> None:
    base = nn.Parameter(torch.ones(3, dtype=torch.uint8), requires_grad=False)
    p = zeros()
    groups = [{"params": [base], "maximize": True}, {"params": []}, {"params": [p]}]
    opt = fo.optim.AdamW(groups)
    opt.init_state()
    step(opt, p)
    opt.load_state_dict(opt.state_dict(), strict=True)
    assert set(opt.state) == {p} and (p != 0).all()
    ema = fo.optim.Optimizer([*groups], fo.chain(fo.sgd(1.0), fo.params_ema(0.5)))
    with ema.eval_params():
        pass


def test_a_gradient_of_integers_is_an_error_that_changes_nothing() -> None:
    base = nn.Parameter(torch.ones(3, dtype=torch.uint8), requires_grad=False)
    p = zeros()
    opt = fo.optim.AdamW([("w", p), ("base", base)])
    base.grad = torch.ones_like(base)
    with pytest.raises(TypeError, match=r"'base' is torch.uint8.*Set its grad to None"):
        step(opt, p)
    assert (p == 0).all() and not opt.state
    alone = fo.optim.AdamW([{"params": [p]}, {"params": [base], "maximize": True}])
    with pytest.raises(TypeError, match=r"a group are torch.uint8.*Set its grad to None"):
        step(alone, p)
    assert (p == 0).all() and not alone.state


def scheduled() -> fo.GradientTransformation:
    return fo.inject_hyperparams(fo.sgd)(learning_rate=fo.linear_schedule(1.0, 0.0, 10))


@pytest.mark.parametrize("frozen", [0, 1])
@pytest.mark.parametrize(
    "make",
    [scheduled, lambda: fo.chain(fo.add_noise(1.0, 0.0, key=0), fo.sgd(0.1))],
    ids=["hyperparams", "key"],
)
def test_shared_state_is_saved_where_parameters_are_frozen(
    make: Callable[[], fo.GradientTransformation], frozen: int
) -> None:
    """torch.distributed.checkpoint leaves out what lies with a frozen parameter."""

    def build() -> tuple[nn.Linear, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = nn.Linear(3, 1)
        list(model.parameters())[frozen].requires_grad_(False)
        return model, fo.optim.Optimizer(model.parameters(), make())

    def train(model: nn.Linear, opt: torch.optim.Optimizer) -> None:
        opt.zero_grad()
        model(torch.ones(2, 3)).sum().backward()
        opt.step()

    model, opt = build()
    for _ in range(4):
        train(model, opt)
    saved = copy.deepcopy(get_state_dict(model, opt))
    train(model, opt)
    other, again = build()
    set_state_dict(other, again, model_state_dict=saved[0], optim_state_dict=saved[1])
    train(other, again)
    assert all(map(torch.equal, model.parameters(), other.parameters()))


def test_shared_state_is_found_with_whichever_parameter_has_it() -> None:
    """The first is frozen when it is saved, and trained when it is loaded; and the other way."""
    for before, after in ((False, True), (True, False)):
        p, q = zeros().requires_grad_(before), zeros()
        opt = fo.optim.Optimizer([p, q], scheduled())
        for _ in range(3):
            step(opt, q)
        a, b = zeros().requires_grad_(after), q.detach().clone().requires_grad_()
        other = fo.optim.Optimizer([a, b], scheduled())
        other.load_state_dict(through_a_file(opt.state_dict()), strict=True)
        p.requires_grad_(after)
        step(opt, q)
        step(other, b)
        assert torch.equal(q, b) and q[0] != -4


def test_no_empty_entries() -> None:
    frozen, p, idle = zeros().requires_grad_(False), zeros(), zeros()
    opt = fo.optim.AdamW([frozen, p, idle])
    step(opt, p)
    opt.load_state_dict(opt.state_dict())
    step(opt, p)
    assert [*opt.state_dict()["state"]] == [1]
    opt.init_state()
    assert [*opt.state_dict()["state"]] == [1, 2]


# ---- schedulers that write a momentum ------------------------------------------------------------

WITH_MOMENTUM = {
    "factory": lambda p: fo.optim.Optimizer(p, fo.adamw, learning_rate=0.1),
    "chain": lambda p: fo.optim.Optimizer(p, fo.chain(fo.clip(1.0), fo.adamw(0.1))),
    "sgd": lambda p: fo.optim.Optimizer(p, fo.sgd, lr=0.1),
    "trace": lambda p: fo.optim.Optimizer(p, fo.chain(fo.trace(0.9), fo.scale(-0.1))),
    "muon": lambda p: fo.optim.Optimizer(p, fo.muon, lr=0.1),
    "lookahead": lambda p: fo.optim.Optimizer(p, fo.lookahead(fo.nadam(0.1), 2, 0.5)),
    "groups": lambda p: fo.optim.Optimizer(
        p,
        fo.partition(
            {"a": fo.adam(0.1), "b": fo.sgd(0.1, 0.9)},
            lambda path, p: "a" if p.ndim == 1 else "b",
        ),
    ),
    "AdamW": lambda p: fo.optim.AdamW(p, lr=0.1),
    "SGD": lambda p: fo.optim.SGD(p, lr=0.1),
}


@pytest.mark.parametrize("name", WITH_MOMENTUM)
@pytest.mark.parametrize("scheduler", ["OneCycleLR", "CyclicLR"])
def test_schedulers_that_cycle_a_momentum(name: str, scheduler: str) -> None:
    runs = []
    for cycled in (True, False):
        p, q = nn.Parameter(torch.ones(2, 2)), zeros()
        opt = WITH_MOMENTUM[name]([{"params": [p]}, {"params": [q]}])
        if scheduler == "OneCycleLR":
            sched = lr_scheduler.OneCycleLR(
                opt, max_lr=0.1, total_steps=40, cycle_momentum=cycled
            )
        else:
            sched = lr_scheduler.CyclicLR(
                opt, 0.01, 0.1, step_size_up=5, cycle_momentum=cycled
            )
        generator = torch.Generator().manual_seed(0)
        for _ in range(30):
            for x in (p, q):
                x.grad = torch.randn(x.shape, generator=generator)
            opt.step()
            sched.step()
        assert len(opt._plans) == 1
        saved = through_a_file(opt.state_dict())
        other = WITH_MOMENTUM[name](
            [{"params": [nn.Parameter(p.detach().clone())]}, {"params": [zeros()]}]
        )
        other.load_state_dict(saved, strict=True)
        a, b = other.param_groups[0]["params"][0], p
        step(other, a)
        step(opt, b)
        assert torch.equal(a, b)
        runs.append(p.detach())
    assert not torch.equal(*runs)


def test_the_momentum_that_is_written_is_that_of_the_chain() -> None:
    p, q = zeros(), zeros()
    opt = fo.optim.Optimizer([p], fo.chain(fo.clip(9.0), fo.adamw(0.1)))
    twin = fo.optim.Optimizer([q], fo.adamw, lr=0.1)
    assert opt.param_groups[0]["momentum"] is None
    for g, momentum in ((1.0, 0.9), (-2.0, 0.5), (3.0, 0.7)):
        opt.param_groups[0]["momentum"] = twin.param_groups[0]["b1"] = momentum
        step(opt, p, g=g)
        step(twin, q, g=g)
    torch.testing.assert_close(p, q, rtol=1e-6, atol=0)


def test_a_chain_without_momentum_has_no_such_option() -> None:
    opt = fo.optim.Optimizer([zeros()], fo.chain(fo.clip(1.0), fo.sgd(0.1)))
    assert "momentum" not in opt.defaults
    with pytest.raises(ValueError, match="cycle_momentum"):
        lr_scheduler.OneCycleLR(opt, max_lr=0.1, total_steps=10)
    lr_scheduler.OneCycleLR(opt, max_lr=0.1, total_steps=10, cycle_momentum=False)


def test_a_new_value_of_an_option_needs_no_new_plan() -> None:
    def factory(learning_rate, momentum=0, power=None):
        return fo.chain(fo.trace(momentum), fo.scale_by_learning_rate(learning_rate))

    for make, option in ((fo.sgd, "momentum"), (factory, "momentum"), (factory, "power")):
        p = zeros()
        opt = fo.optim.Optimizer([p], make, lr=0.1)
        for k in range(20):
            opt.param_groups[0][option] = 0.9 + k / 1000
            step(opt, p)
        assert len(opt._plans) == 1


def test_plans_of_values_that_are_gone_are_forgotten() -> None:
    """A number of Muon that is no hyperparameter: each value is another chain."""
    p = nn.Parameter(torch.ones(2, 2))
    opt = fo.optim.Muon([p])
    for k in range(40):
        opt.param_groups[0]["eps"] = 1e-7 * (k + 1)
        step(opt, p)
    assert len(opt._plans) < 12 and opt.state[p]["step"] == 40


# ---- the generic optimizer -----------------------------------------------------------------------


def test_lr_is_an_argument() -> None:
    ps = [zeros()]
    assert fo.optim.Optimizer(ps, fo.adamw, lr=0.1).param_groups[0]["lr"] == 0.1
    p = zeros()
    opt = fo.optim.Optimizer([p], fo.chain(fo.clip(1.0), fo.sgd(2.0)), lr=0.1)
    step(opt, p)
    torch.testing.assert_close(p.detach(), torch.full((3,), -0.2))
    with pytest.raises(
        TypeError, match=r"the same argument; got lr=0.1 and learning_rate"
    ):
        fo.optim.Optimizer(ps, fo.adamw, lr=0.1, learning_rate=0.2)
    with pytest.raises(TypeError, match="lr must be a number"):
        fo.optim.Optimizer(ps, fo.sgd(1.0), lr="0.1")
    schedule = fo.linear_schedule(1.0, 0.0, 10)
    p = zeros()
    opt = fo.optim.Optimizer([p], fo.sgd, learning_rate=schedule, lr=0.5)
    step(opt, p)
    step(opt, p)
    torch.testing.assert_close(p.detach(), torch.full((3,), -0.95))
    q = zeros()
    opt = fo.optim.Optimizer([q], fo.sgd, lr=schedule)
    step(opt, q)
    assert (q == -1).all() and opt.param_groups[0]["lr"] == 1.0


def test_a_factory_may_call_its_learning_rate_lr() -> None:
    def factory(lr, scale=1.0):
        return fo.chain(fo.scale(scale), fo.scale_by_learning_rate(lr))

    p, q = zeros(), zeros()
    opt = fo.optim.Optimizer([{"params": [p]}, {"params": [q], "lr": 1}], factory, lr=0.5)
    step(opt, p, q)
    assert (p == -0.5).all() and (q == -1).all()


def test_a_group_may_call_its_learning_rate_as_the_factory_does() -> None:
    p, q = zeros(), zeros()
    groups = [{"params": [p], "learning_rate": 0.5}, {"params": [q]}]
    opt = fo.optim.Optimizer(groups, fo.sgd, learning_rate=1.0)
    step(opt, p, q)
    assert (p == -0.5).all() and (q == -1).all()
    assert "learning_rate" not in opt.param_groups[0]


def test_factories_need_no_name() -> None:
    for factory in (functools.partial(fo.adamw, weight_decay=0.0), Factory()):
        p, q = zeros(), zeros()
        opt = fo.optim.Optimizer([p], factory, lr=0.1)
        step(opt, p)
        step(fo.optim.AdamW([q], lr=0.1, weight_decay=False), q)
        torch.testing.assert_close(p, q)
        assert "Transformation: " in repr(opt)
    with pytest.raises(TypeError, match="hyperparameters need names"):
        fo.optim.Optimizer([zeros()], fo.inject_hyperparams(fo.sgd), learning_rate=1.0)


class Factory:
    def __call__(self, learning_rate: float) -> fo.GradientTransformation:
        return fo.adam(learning_rate)


def noisy(nesterov: bool = False) -> fo.GradientTransformation:
    noise = fo.add_noise(eta=1.0, gamma=0.0, key=0)
    return fo.chain(noise, fo.sgd(1.0, momentum=0.9, nesterov=nesterov))


def test_groups_that_are_updated_separately_have_noise_of_their_own() -> None:
    a, b, c = zeros(4), zeros(4), zeros(4)
    groups = [{"params": [a], "nesterov": True}, {"params": [b]}, {"params": [c]}]
    opt = fo.optim.Optimizer(groups, noisy, nesterov=False)
    step(opt, a, b, c, g=0.0)
    assert not torch.allclose(a / 1.9, b) and not torch.allclose(a / 1.9, c)
    assert not torch.allclose(b, c)
    twin = zeros(4)
    step(fo.optim.Optimizer([twin], noisy(True)), twin, g=0.0)
    assert torch.equal(a, twin)  # the first as if it were alone
    saved, values = through_a_file(opt.state_dict()), [p.detach() for p in (a, b, c)]
    copies = [nn.Parameter(x.clone()) for x in values]
    groups = [{"params": [p]} for p in copies]
    again = fo.optim.Optimizer(groups, noisy, nesterov=False)
    again.load_state_dict(saved, strict=True)
    step(opt, a, b, c, g=0.0)
    step(again, *copies, g=0.0)
    assert all(map(torch.equal, copies, (a, b, c)))


def test_printing_shows_the_chain() -> None:
    text = repr(fo.optim.Optimizer([zeros()], fo.chain(fo.clip(1.0), fo.sgd(0.1))))
    assert text.startswith("Optimizer (\nTransformation: chain(clip(1.0), sgd(0.1))\n")
    assert "\nParameter Group 0\n    lr: 1.0\n" in text and text.endswith(")")
    assert "Transformation: adamw\n" in repr(
        fo.optim.Optimizer([zeros()], fo.adamw, lr=0.1)
    )
    ours, theirs = (m.AdamW([zeros()]) for m in (fo.optim, torch.optim))
    assert repr(ours).splitlines()[:2] == repr(theirs).splitlines()[:2]


def test_a_mask_of_the_whole_tree_is_explained() -> None:
    for build in (
        lambda mask: fo.adamw(0.1, mask=mask),
        lambda mask: fo.masked(fo.sgd(0.1), mask),
        lambda mask: fo.partition({"a": fo.sgd(0.1)}, mask),
    ):
        with pytest.raises(TypeError, match=r"function of path and leaf.*as in optax"):
            build(lambda params: {"w": True}).init({"w": torch.zeros(2)})


# ---- where optimizers are made -------------------------------------------------------------------


@pytest.mark.parametrize(
    "build",
    [
        lambda p: fo.optim.AdamW([p]),
        lambda p: fo.optim.SGD([{"params": [p], "momentum": 0.9}], lr=torch.tensor(0.1)),
        lambda p: fo.optim.Adagrad([p]),
        lambda p: fo.optim.Optimizer([("w", p)], fo.adamw, lr=0.1),
        lambda p: fo.optim.Optimizer([p], fo.chain(fo.clip(1.0), fo.adamw(0.1))),
    ],
    ids=["AdamW", "SGD", "Adagrad", "factory", "chain"],
)
def test_made_inside_a_compiled_function(build: Callable) -> None:
    torch._dynamo.reset()

    def make(p: nn.Parameter) -> torch.optim.Optimizer:
        opt = build(p)
        (p**2).sum().backward()
        return opt

    p, q = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    for opt in (make(p), torch.compile(make, backend="eager")(q)):
        opt.step()
        opt.load_state_dict(copy.deepcopy(opt.state_dict()), strict=True)
        opt.step()
    assert torch.equal(p, q) and p[0] != 1


@pytest.mark.parametrize("name", TORCH_NAMED)
def test_meta_parameters(name: str) -> None:
    """A dry run of a model that does not fit: shapes only."""
    p = nn.Parameter(torch.ones(3, 3, device="meta"))
    opt = getattr(fo.optim, name)([p])
    for _ in range(2):
        p.grad = torch.ones_like(p)
        opt.step()
    assert opt.state[p]["step"] == 2 and not opt.state[p]["step"].is_meta


def test_types_reach_the_user() -> None:
    assert (Path(fo.__file__).parent / "py.typed").exists()


# ---- several processes, several optimizers -------------------------------------------------------


@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "build",
    [
        lambda ps, compile: fo.optim.AdamW(ps, compile=compile),
        lambda ps, compile: fo.optim.Optimizer(
            ps, fo.adamw(fo.linear_schedule(0.1, 0.0, 9)), compile=compile
        ),
    ],
    ids=["AdamW", "schedule"],
)
def test_state_in_shared_memory_stays_there(build: Callable, compile: bool) -> None:
    params = [zeros(), zeros(2)]
    opt = build(params, compile)
    opt.init_state()
    shared = [x.share_memory_() for p in params for x in opt.state[p].values()]
    for _ in range(2):
        step(opt, *params)
    now = [x for p in params for x in opt.state[p].values()]
    assert all(a is b and a.is_shared() for a, b in zip(shared, now, strict=True))
    assert all(x == 2 for x in shared if x.dim() == 0)


def test_adagrad_has_its_state_from_the_start_as_torchs() -> None:
    p = zeros()
    ours = fo.optim.Adagrad([p], initial_accumulator_value=0.5)
    theirs = torch.optim.Adagrad([p], initial_accumulator_value=0.5)
    assert ours.state[p] == theirs.state[p] | {"sum": ours.state[p]["sum"]}
    assert torch.equal(ours.state[p]["sum"], theirs.state[p]["sum"])
    ours.share_memory()
    kept = ours.state[p]["sum"]
    step(ours, p)
    assert kept.is_shared() and kept[0] == 1.5 and ours.state[p]["sum"] is kept


@pytest.mark.parametrize("generic", [False, True])
@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_two_optimizers_of_one_model(generic: bool, compile: bool) -> None:
    """Each has some of the parameters, as of a body and a head; saved and loaded together."""

    def make() -> tuple[nn.Module, list[torch.optim.Optimizer]]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
        parts = [model[0].parameters(), model[2].parameters()]
        if generic:
            noise = fo.chain(fo.add_noise(0.1, 0.5, key=1), fo.adamw(0.1))
            tx = [noise, fo.sgd(0.1, momentum=0.9)]
            pairs = zip(parts, tx, strict=True)
            return model, [fo.optim.Optimizer(*pair, compile=compile) for pair in pairs]
        adamw = fo.optim.AdamW(parts[0], compile=compile)
        return model, [adamw, fo.optim.SGD(parts[1], momentum=0.9, compile=compile)]

    def train(model: nn.Module, opts: list[torch.optim.Optimizer]) -> None:
        for opt in opts:
            opt.zero_grad()
        model(torch.ones(2, 3)).sum().backward()
        for opt in opts:
            opt.step()

    model, opts = make()
    for _ in range(3):
        train(model, opts)
    saved = copy.deepcopy(get_state_dict(model, opts))
    train(model, opts)
    other, again = make()
    set_state_dict(other, again, model_state_dict=saved[0], optim_state_dict=saved[1])
    train(other, again)
    assert all(map(torch.equal, model.parameters(), other.parameters()))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["AdamW", "Adam", "SGD", "NAdam"])
def test_groups_with_and_without_decay_are_one_compiled_step(name: str) -> None:
    """A zero beside other weight decays is a number like them, and its group has no step of its own."""

    def made(of: Any, **options: Any) -> Any:
        torch.manual_seed(0)
        ps = [nn.Parameter(torch.randn(5, dtype=torch.float64)) for _ in range(4)]
        decayed = {"params": ps[:2], "weight_decay": 0.1}
        groups = [decayed, {"params": ps[2:], "weight_decay": 0.0}]
        return ps, of(groups, lr=0.01, **options)

    def steps(ps: list[nn.Parameter], opt: Any, count: int) -> None:
        generator = torch.Generator().manual_seed(count)
        for _ in range(count):
            for p in ps:
                p.grad = torch.randn(5, dtype=torch.float64, generator=generator)
            opt.step()

    theirs, torchs = made(getattr(torch.optim, name))
    mine, ours = made(getattr(fo.optim, name), compile=True)
    for decays in ((0.1, 0.0), (0.1, 0.2), (0.0, 0.0), (0.0, 0.3)):
        for opt in (torchs, ours):
            for group, decay in zip(opt.param_groups, decays, strict=True):
                group["weight_decay"] = decay
        steps(theirs, torchs, 3)
        steps(mine, ours, 3)
        assert len(list(ours._buckets())) == 1
        for a, b in zip(mine, theirs, strict=True):
            # torch keeps NAdam's product of momenta in float32.
            rtol = 1e-8 if name == "NAdam" else 1e-12
            torch.testing.assert_close(a, b, rtol=rtol, atol=1e-10)
