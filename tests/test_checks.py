"""The contract of a torch optimizer, by the numbers of its checks.

This file has A, construction; B, the step; E, swapped state; and G, clients.
"""

from __future__ import annotations

import copy

import pytest
import torch
from registry import ROWS
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.optim import lr_scheduler
from torch.profiler._memory_profiler import Category
from training import (
    SCHEDULERS,
    TORCH_NAMED,
    make_params,
    model_and_loss,
    set_grads,
    torchs,
    train,
)

import functorch_opt as fo

# ---- A. class and construction -------------------------------------------------------------------


@pytest.mark.parametrize("name", TORCH_NAMED)
def test_01_is_a_torch_optimizer_that_every_scheduler_takes(name: str) -> None:
    """OneCycle and Cyclic need a momentum or betas. If torch's class has neither, ours has
    neither.
    """
    for scheduler, attach in SCHEDULERS.items():
        outcomes = []
        for cls in (getattr(fo.optim, name), getattr(torch.optim, name)):
            opt = cls(make_params(of=name))
            assert isinstance(opt, torch.optim.Optimizer)
            try:
                attach(opt)
                outcomes.append(opt.param_groups[0]["lr"])
            except ValueError as error:
                outcomes.append(str(error))
            assert "step" not in vars(opt) or cls.__module__.startswith("torch"), (
                "torch.compile cannot trace a step of an instance"
            )
        assert outcomes[0] == outcomes[1], scheduler


@pytest.mark.parametrize("name", [*TORCH_NAMED, "LBFGS", "SparseAdam"])
def test_02_every_form_of_params(name: str) -> None:
    cls = getattr(fo.optim, name)
    params = make_params(of=name)
    forms = {
        "list": params,
        "generator": (p for p in params),
        "named": [(f"p{i}", p) for i, p in enumerate(params)],
        "groups": [{"params": params, "lr": 0.5}],
        "named groups": [
            {"params": [(f"p{i}", p) for i, p in enumerate(params)], "lr": 0.5}
        ],
        "groups of another": cls(params, lr=0.5).param_groups,
    }
    for form, given in forms.items():
        opt = cls(given)
        assert opt.param_groups[0]["params"] == params, form
        assert (opt.param_groups[0]["lr"] == 0.5) == ("groups" in form), form
        assert opt.param_groups[0].get("param_names") == (
            [f"p{i}" for i in range(len(params))] if "named" in form else None
        )


def test_07_unknown_options_of_a_group_are_kept() -> None:
    params = make_params()
    opt = fo.optim.AdamW([{"params": params, "foo": 1, "name": "x"}])
    train(opt, params, 2)
    other = fo.optim.AdamW(make_params())
    other.load_state_dict(opt.state_dict())
    for o in (opt, other):
        assert (o.param_groups[0]["foo"], o.param_groups[0]["name"]) == (1, "x")


def test_lists_in_options_are_tuples() -> None:
    """As a file of JSON has them."""
    params, twins = make_params(of="Adafactor"), make_params(of="Adafactor")
    opt, twin = (
        fo.optim.Adafactor([{"params": params, "eps": [None, 1e-2]}]),
        fo.optim.Adafactor(twins, eps=(None, 1e-2)),
    )
    for p, q in zip(train(opt, params, 2), train(twin, twins, 2), strict=True):
        assert torch.equal(p, q)
    opt = fo.optim.AdamW([{"params": params, "betas": [0.5, 0.9]}])
    train(opt, params, 1)
    opt.param_groups[0]["betas"] = [0.9, 0.99]
    train(opt, params, 1)


def test_04_a_tensor_lr_is_not_shared_between_groups() -> None:
    params = make_params()
    opt = fo.optim.AdamW(
        [{"params": params[:2]}, {"params": params[2:]}], lr=torch.tensor(0.1)
    )
    sched = lr_scheduler.LambdaLR(opt, [lambda e: 1.0, lambda e: 0.1])
    assert [group["lr"].item() for group in opt.param_groups] == pytest.approx(
        [0.1, 0.01]
    )
    set_grads(params, 0)
    opt.step()
    sched.step()


def test_05_add_param_group_starts_fresh() -> None:
    params, late = make_params(), make_params(seed=1)
    opt = fo.optim.AdamW(params, lr=0.1)
    train(opt, params, 3)
    opt.add_param_group({"params": late, "lr": 0.2})
    twins = make_params(seed=1)
    twin = fo.optim.AdamW(twins, lr=0.2)
    for step in range(3):
        set_grads(params, step)
        set_grads(late, step)
        set_grads(twins, step)
        opt.step()
        twin.step()
    for p, q in zip(late, twins, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)
    assert (
        opt.state[late[0]]["step"].item() == 3
        and opt.state[params[0]]["step"].item() == 6
    )


def test_05_a_refused_group_is_not_added() -> None:
    params = make_params()
    opt = fo.optim.AdamW(params[:2])
    with pytest.raises(ValueError, match="Invalid beta parameter at index 0"):
        opt.add_param_group({"params": params[2:], "betas": (1.5, 0.9)})
    with pytest.raises(ValueError, match="Tensor lr must be 1-element"):
        opt.add_param_group({"params": params[2:], "lr": torch.ones(3)})
    assert len(opt.param_groups) == 1
    train(opt, params, 1)


def test_06_groups_are_separate_optimizers() -> None:
    params, twins = make_params(), make_params()
    groups = [
        {"params": params[:2], "lr": 0.2, "weight_decay": 0.0, "amsgrad": True},
        {"params": params[2:], "betas": (0.5, 0.9)},
    ]
    opt = fo.optim.AdamW(groups, lr=0.05, weight_decay=0.1)
    one, two = (
        fo.optim.AdamW(twins[:2], lr=0.2, weight_decay=0.0, amsgrad=True),
        fo.optim.AdamW(twins[2:], lr=0.05, weight_decay=0.1, betas=(0.5, 0.9)),
    )
    for step in range(5):
        set_grads(params, step)
        set_grads(twins, step)
        for o in (opt, one, two):
            o.step()
    for p, q in zip(params, twins, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


# ---- B. step -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TORCH_NAMED)
def test_09_without_gradient_nothing_moves(name: str) -> None:
    params = make_params(of=name)
    opt = getattr(fo.optim, name)(params)
    train(opt, params, 2)
    frozen = params[1]
    before = copy.deepcopy((frozen.detach(), dict(opt.state[frozen])))
    train(opt, params, 3, start=2, missing_at={2: (1,), 3: (1,), 4: (1,)})
    assert torch.equal(frozen, before[0])
    assert all(
        torch.equal(value, before[1][key]) for key, value in opt.state[frozen].items()
    )
    assert opt.state[frozen]["step"] == 2 and opt.state[params[0]]["step"] == 5


@pytest.mark.parametrize("name", TORCH_NAMED)
def test_10_a_step_without_any_gradient(name: str) -> None:
    """Integers too, which torch's tests of hooks optimize."""
    params = [torch.tensor([[1, 1]]), *make_params(of=name)[:1]]
    opt = getattr(fo.optim, name)(params)
    calls = []
    opt.register_step_post_hook(lambda *_: calls.append(1))
    opt.step()
    first = (
        {params[1]} if name == "Adagrad" else set()
    )  # from construction on, as in torch
    assert calls == [1] and set(opt.state) == first


@pytest.mark.parametrize(
    "build",
    [fo.optim.AdamW, lambda ps, lr: fo.optim.Optimizer(ps, fo.adamw, learning_rate=lr)],
    ids=["named", "generic"],
)
def test_11_lr_is_read_at_every_step(build) -> None:
    """Bound anew as ignite does, from a number to a tensor and back, between steps."""
    rates = [
        0.1,
        torch.tensor(0.05, dtype=torch.float64),
        0.2,
        torch.tensor([0.3], dtype=torch.float64),
        0.0,
    ]
    params, twins = make_params(), make_params()
    opt = build(params, lr=1.0)
    twin = torch.optim.AdamW(twins, lr=1.0, weight_decay=opt.defaults["weight_decay"])
    for step, lr in enumerate(rates):
        opt.param_groups[0]["lr"], twin.param_groups[0]["lr"] = lr, float(lr)
        x, y = train(opt, params, 1, start=step), train(twin, twins, 1, start=step)
        for p, q in zip(x, y, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-10)


def test_13_parameters_swapped_before_the_first_step() -> None:
    """As FSDP2 does: no state of the old ones is left."""
    params, swapped = make_params(), make_params(seed=3)
    opt = fo.optim.AdamW(params)
    opt.param_groups[0]["params"] = swapped
    train(opt, swapped, 1)
    assert set(opt.state) == set(swapped) and set(opt.state_dict()["state"]) == set(
        range(5)
    )


@pytest.mark.parametrize("name", TORCH_NAMED)
def test_14_layouts_and_dtypes(name: str) -> None:
    """Transposed, strided, expanded in the gradient, views of one buffer, and float32 beside
    float64.

    Shapes and complex tensors are in `test_named.py`.
    """

    def build() -> list[nn.Parameter]:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(6, 8, generator=generator, dtype=torch.float64)
        return [
            nn.Parameter(v)
            for v in (
                x.clone().t(),
                x.clone()[::2, ::2],
                x.clone()[1:3],
                x.clone().float(),
            )
        ]

    ours, theirs = build(), build()
    assert (
        not ours[0].is_contiguous()
        and not ours[1].is_contiguous()
        and ours[3].dtype == torch.float32
    )
    a, b = getattr(fo.optim, name)(ours, lr=0.1), torchs(name, theirs, lr=0.1)
    for step in range(5):
        set_grads(ours, step)
        ours[2].grad = ours[2].grad[:, :1].expand(ours[2].shape)
        for p, q in zip(ours, theirs, strict=True):
            q.grad = p.grad.clone()
        a.step()
        b.step()
    # torch's Adafactor takes the eps of the first parameter for all
    tolerance = 1e-2 if name == "Muon" else 1e-5
    for p, q in zip(ours, theirs, strict=True):
        assert p.stride() == q.stride() and p.dtype == q.dtype
        torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)


def test_15_a_sparse_gradient_is_a_clear_error() -> None:
    table = nn.Embedding(4, 2, sparse=True)
    opt = fo.optim.AdamW(table.parameters())
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match=r"Gradients must be dense.*sparse=False"):
        opt.step()
    assert not opt.state


def test_08_closure_runs_with_gradients_and_its_value_returns() -> None:
    model, x, y = model_and_loss()
    opt = fo.optim.SGD(model.parameters(), lr=0.1)
    seen = []

    def closure() -> Tensor:
        seen.append(torch.is_grad_enabled())
        opt.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        return loss

    with torch.no_grad():
        losses = [opt.step(closure).item() for _ in range(10)]
    assert seen == [True] * 10 and losses[-1] < losses[0]
    assert all(
        p.grad is not None and p.grad_fn is None and p.is_leaf for p in model.parameters()
    )


@pytest.mark.parametrize("name", TORCH_NAMED)
def test_12_zero_lr_and_zero_gradients_move_nothing(name: str) -> None:
    """torch.distributed.checkpoint makes such a step to create state."""
    params = make_params(of=name)
    opt = getattr(fo.optim, name)(params)
    before = [p.detach().clone() for p in params]
    for lr in (0.0, torch.tensor(0.0)):
        for p in params:
            p.grad = torch.zeros_like(p)
        opt.param_groups[0]["lr"] = lr
        opt.step()
    assert all(torch.equal(p.detach(), q) for p, q in zip(params, before, strict=True))


def test_12_the_step_of_a_fresh_checkpoint_moves_nothing() -> None:
    """torch.distributed.checkpoint makes a step with lr 0 and zero gradients to create state."""
    for row in ROWS:
        params = make_params()
        with torch.no_grad():
            for p in params:
                p.abs_()  # for a projection would move a negative one, whatever the learning rate
        opt = fo.optim.Optimizer(params, row.build())
        before = [p.detach().clone() for p in params]
        for p in params:
            p.grad = torch.zeros_like(p)
        for lr in (0.0, torch.tensor(0.0)) if row.lr_is_all else (0.0,):
            opt.param_groups[0]["lr"] = lr
            opt.step(closure=None)
        for p, q in zip(params, before, strict=True):
            assert torch.equal(p.detach(), q), row.name
            assert opt.state[p], row.name


def test_13_groups_edited_in_place_are_honoured() -> None:
    """As FSDP2 and accelerate do: parameters replaced, options rebound, between steps."""
    params = make_params()
    opt = fo.optim.AdamW(params, lr=0.1)
    train(opt, params, 1)
    swapped = make_params(seed=3)
    opt.param_groups[0]["params"] = swapped
    opt.param_groups[0]["lr"] = torch.tensor(0.2)
    twins = make_params(seed=3)
    twin = fo.optim.AdamW(twins, lr=0.2)
    for p, q in zip(train(opt, swapped, 2), train(twin, twins, 2), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", TORCH_NAMED)
def test_16_17_update_is_in_place_and_leaves_no_graph(name: str) -> None:
    params = make_params(of=name)
    opt = getattr(fo.optim, name)(params)
    train(opt, params, 1)
    pointers = [p.data_ptr() for p in params] + [
        v.data_ptr() for p in params for v in opt.state[p].values()
    ]
    identities = [id(v) for p in params for v in opt.state[p].values()]
    train(opt, params, 2, start=1)
    assert pointers == [p.data_ptr() for p in params] + [
        v.data_ptr() for p in params for v in opt.state[p].values()
    ]
    assert identities == [id(v) for p in params for v in opt.state[p].values()]
    assert not any(v.requires_grad for p in params for v in opt.state[p].values())
    assert all(p.grad_fn is None and p.is_leaf and p.requires_grad for p in params)


# ---- E. parameters and state from outside --------------------------------------------------------


def test_38_swapped_in_parameters_and_state() -> None:
    """A step on other tensors, in place, while the live ones rest; and the graph of it."""
    swap_in = pytest.importorskip(
        "torch.optim._stateless"
    ).swap_in_optimizer_params_and_state
    params, twins = make_params(), make_params()
    opt, twin = fo.optim.AdamW(params, lr=0.1), fo.optim.AdamW(twins, lr=0.1)
    train(opt, params, 2)
    train(twin, twins, 2)
    live = copy.deepcopy(([p.detach() for p in params], opt.state_dict()))
    others = {str(i): p.detach().clone() for i, p in enumerate(params)}
    saved = copy.deepcopy(opt.state_dict())

    def step(others: dict[str, Tensor], gs: list[Tensor], saved: dict) -> list[Tensor]:
        with swap_in(opt, others, saved):
            for p, g in zip(opt.param_groups[0]["params"], gs, strict=True):
                p.grad = g
            opt.step()
        return [
            *others.values(),
            *(value for entry in saved["state"].values() for value in entry.values()),
        ]

    set_grads(twins, 2)
    gs = [p.grad.clone() for p in twins]
    graph = make_fx(step, tracing_mode="fake")(
        copy.deepcopy(others), gs, copy.deepcopy(saved)
    )
    traced = graph(copy.deepcopy(others), gs, copy.deepcopy(saved))
    here = step(others, gs, saved)
    twin.step()
    expected = [
        *(p.detach() for p in twins),
        *(value for p in twins for value in twin.state[p].values()),
    ]
    for a, b, c in zip(here, traced, expected, strict=True):
        torch.testing.assert_close(a, c)
        torch.testing.assert_close(b, c)
    for p, q in zip(params, live[0], strict=True):
        assert torch.equal(p, q)
    for i, p in enumerate(params):
        assert all(
            torch.equal(value, live[1]["state"][i][key])
            for key, value in opt.state[p].items()
        )


# ---- G. clients ----------------------------------------------------------------------------------


def test_49_the_profiler_knows_the_step_and_the_state() -> None:
    model, x, y = model_and_loss()
    opt = fo.optim.AdamW(model.parameters())
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU],
        profile_memory=True,
        record_shapes=True,
        with_stack=True,
    ) as profile:
        for _ in range(2):
            opt.zero_grad()
            nn.functional.mse_loss(model(x), y).backward()
            opt.step()
    assert "Optimizer.step#AdamW.step" in {event.key for event in profile.key_averages()}
    memory = profile._memory_profile()
    state = {
        value.data_ptr()
        for entry in opt.state.values()
        for key, value in entry.items()
        if key != "step"
    }
    found = {
        key.storage.ptr
        for _, _, (key, version), _ in memory.timeline
        if memory._categories.get(key, version) == Category.OPTIMIZER_STATE
    }
    assert state <= found
