"""The stateful adapter: any transformation in the ordinary loop. `test_checks*.py` has its
contract.
"""

from __future__ import annotations

import copy
import io

import pytest
import torch
from registry import ROWS, Row
from torch.optim import lr_scheduler
from training import FREEZE, SHAPES, make_params, set_grads, train

import functorch_opt as fo
from functorch_opt import tree


@pytest.mark.parametrize("named", [False, True], ids=["list", "named"])
@pytest.mark.parametrize(
    ("row", "variant"),
    [
        pytest.param(row, v, id=f"{row.id}{i or ''}")
        for row in ROWS
        for i, v in enumerate(row.variants)
    ],
)
def test_any_transformation_equals_its_functional_self(
    row: Row, variant: dict, named: bool
) -> None:
    tx = row.build(variant)
    params = make_params()
    names = list(SHAPES)
    opt = fo.optim.Optimizer(zip(names, params, strict=True) if named else params, tx)
    start = [p.detach().clone() for p in params]
    ps = dict(zip(names, start, strict=True)) if named else start
    state = tx.init(ps)
    for step in range(4):
        set_grads(params, step)
        gs = [p.grad for p in params]
        updates, state = tx.update(
            dict(zip(names, gs, strict=True)) if named else gs, state, ps
        )
        ps = fo.apply_updates(ps, updates)
        opt.step()
    for p, q in zip(params, ps.values() if named else ps, strict=True):
        torch.testing.assert_close(p.detach(), q, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
def test_compiled_equals_eager() -> None:
    """Two groups with their own numbers, missing gradients, a scheduler: in place, through compiled
    blocks.
    """

    def factory(
        learning_rate: float, weight_decay: float = 0.1
    ) -> fo.GradientTransformation:
        return fo.chain(
            fo.clip_by_global_norm(1.0),
            fo.adamw(learning_rate, weight_decay=weight_decay),
        )

    torch._dynamo.reset()
    runs = []
    for compile in (False, True):
        params = make_params()
        groups = [
            {"params": params[:2], "lr": 0.2},
            {"params": params[2:], "weight_decay": 0.0},
        ]
        opt = fo.optim.Optimizer(
            groups, factory, compile=compile, learning_rate=0.1, weight_decay=0.1
        )
        sched = lr_scheduler.ExponentialLR(opt, 0.9)
        for step in range(7):
            set_grads(params, step, FREEZE.get(step, ()))
            opt.step()
            sched.step()
        runs.append(
            [
                *(p.detach() for p in params),
                *(v for p in params for v in opt.state[p].values()),
            ]
        )
    for a, b in zip(*runs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["partition", "NAdam"])
def test_the_state_of_a_stage_that_runs_eagerly_is_kept_under_compile(name: str) -> None:
    """The stages with state in these are not compiled: what they return has to be written back."""
    runs = []
    for compile in (False, True):
        params = make_params()
        if name == "NAdam":
            opt = fo.optim.NAdam(params, compile=compile)
        else:
            tx = fo.partition(
                {"matrix": fo.adam(0.1), "rest": fo.sgd(0.1, 0.9)},
                lambda path, p: "matrix" if p.ndim > 1 else "rest",
            )
            opt = fo.optim.Optimizer(params, tx, compile=compile)
        runs.append(
            [*train(opt, params, 4), *(v for p in params for v in opt.state[p].values())]
        )
    for a, b in zip(*runs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_one_tree_for_all_groups() -> None:
    """A factory's clip sees the norm of all groups; each group has its own numbers."""

    def factory(learning_rate, max_norm=1.0):
        return fo.chain(
            fo.clip_by_global_norm(max_norm), fo.scale_by_learning_rate(learning_rate)
        )

    params = make_params()
    opt = fo.optim.Optimizer(
        [{"params": params[:2], "learning_rate": 0.5, "lr": 0.5}, {"params": params[2:]}],
        factory,
        learning_rate=0.1,
    )
    set_grads(params, 0)
    before, norm = (
        [p.detach().clone() for p in params],
        tree.norm([p.grad for p in params]),
    )
    assert norm > 1
    opt.step()
    for i, (p, q) in enumerate(zip(params, before, strict=True)):
        torch.testing.assert_close(
            p.detach(), q - (0.5 if i < 2 else 0.1) * p.grad / norm
        )


def test_a_schedule_as_learning_rate_stays_inside_and_lr_multiplies_it() -> None:
    params, twins = make_params(), make_params()
    schedule = fo.linear_schedule(0.1, 0.0, 10)
    opt, twin = (
        fo.optim.Optimizer(params, fo.adam, learning_rate=schedule),
        fo.optim.Optimizer(twins, fo.adam(schedule)),
    )
    assert opt.param_groups[0]["lr"] == 1.0
    for p, q in zip(train(opt, params, 4), train(twin, twins, 4), strict=True):
        assert torch.equal(p, q)
    torch.save(opt.state_dict(), io.BytesIO())


def test_an_error_in_a_closure_or_in_the_update_leaves_everything_as_it_was() -> None:
    params = make_params()
    opt = fo.optim.Optimizer(
        [
            {"params": params[:1], "nesterov": False},
            {"params": params[1:], "nesterov": True},
        ],
        fo.sgd,
        learning_rate=0.1,
        momentum=0.9,
        nesterov=False,
    )
    train(opt, params, 2)
    before = copy.deepcopy((opt.state_dict(), params))
    set_grads(params, 2)
    params[4].grad = params[4].grad.to_sparse()
    with pytest.raises(ValueError, match="dense"):
        opt.step()

    def closure():
        raise RuntimeError("backward failed")

    with pytest.raises(RuntimeError, match="backward failed"):
        opt.step(closure)
    after = (opt.state_dict(), params)
    for a, b in zip(
        tree.leaves(before[0]["state"]), tree.leaves(after[0]["state"]), strict=True
    ):
        assert torch.equal(a, b)
    assert all(torch.equal(a, b) for a, b in zip(before[1], params, strict=True))


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(set_to_none: bool) -> None:
    params = make_params()
    opt = fo.optim.AdamW(params)
    set_grads(params, 0)
    opt.zero_grad(set_to_none=set_to_none)
    assert all((p.grad is None) if set_to_none else (p.grad == 0).all() for p in params)


def test_low_precision_parameters_keep_float32_moments() -> None:
    params = make_params(torch.bfloat16)
    opt = fo.optim.Optimizer(params, fo.adamw, learning_rate=0.1)
    train(opt, params, 2)
    assert all(p.dtype == torch.bfloat16 for p in params)
    assert all(opt.state[p]["scale_by_adam/mu"].dtype == torch.float32 for p in params)


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (
            lambda ps: fo.optim.Optimizer(ps, fo.adam(0.1), learning_rate=0.1),
            TypeError,
            "ready transformation takes no hyperparameters; got learning_rate",
        ),
        (
            lambda ps: fo.optim.Optimizer(ps, "adam"),
            TypeError,
            "must be a transformation or a function",
        ),
        (
            lambda ps: fo.optim.Optimizer(ps, fo.adamw, learning_rat=0.1),
            TypeError,
            "learning_rat",
        ),
        (
            lambda ps: fo.optim.Optimizer(ps, fo.adamw, learning_rate=-0.1),
            ValueError,
            "learning_rate must be in",
        ),
        (
            lambda ps: fo.optim.AdamW(ps, lr=-1.0),
            ValueError,
            "Invalid learning rate: -1.0. It must be in",
        ),
        (
            lambda ps: fo.optim.AdamW(ps, lr=float("nan")),
            ValueError,
            "Invalid learning rate: nan",
        ),
        (
            lambda ps: fo.optim.AdamW(ps, betas=(0.9, 1.0)),
            ValueError,
            "Invalid beta parameter at index 1: 1.0",
        ),
        (
            lambda ps: fo.optim.SGD(ps, nesterov=True),
            ValueError,
            "Nesterov momentum requires a momentum",
        ),
        (
            lambda ps: fo.optim.SGD(ps, momentum=0.9, nesterov=True, dampening=0.1),
            ValueError,
            "Nesterov momentum requires a momentum and zero dampening",
        ),
        (
            lambda ps: fo.optim.Adadelta(ps, eps=-1.0),
            ValueError,
            "Invalid epsilon value: -1.0",
        ),
        (
            lambda ps: fo.optim.Rprop(ps, etas=(0.5, 1.0)),
            ValueError,
            "Invalid eta values: 0.5, 1.0",
        ),
        (
            lambda ps: fo.optim.Rprop([{"params": ps, "lr": -1.0}]),
            ValueError,
            "Invalid learning rate: -1.0",
        ),
        (
            lambda ps: fo.optim.Adafactor(ps, eps=(None, -1e-3)),
            ValueError,
            "epsilon2 should be >= 0 but is -0.001",
        ),
        (
            lambda ps: fo.optim.Muon(ps[4:], momentum=-0.1),
            ValueError,
            "Invalid momentum value: -0.1",
        ),
        (
            lambda ps: fo.optim.Muon(ps[4:], ns_steps=100),
            ValueError,
            "ns_steps must be in",
        ),
        (
            lambda ps: fo.optim.Muon(ps[4:], ns_coefficients=(1.0, 2.0)),
            ValueError,
            "must be three numbers",
        ),
        (lambda ps: fo.optim.AdamW([]), ValueError, "empty parameter list"),
    ],
)
def test_bad_arguments(build, error, message) -> None:
    """Beside those that torch's database lists, which are in `test_database.py`."""
    with pytest.raises(error, match=message):
        build(make_params())


@pytest.mark.parametrize("n", [2, 5], ids=["as many elements as tensors", "more"])
def test_what_makes_the_first_state_is_the_same_in_all_groups(n: int) -> None:
    """Entries of parameters must not be taken for elements of a tensor."""
    ps = [torch.nn.Parameter(torch.ones(n)) for _ in range(2)]
    for p in ps:
        p.grad = torch.ones(n)
    groups = [{"params": ps[:1], "initial_accumulator_value": 0.5}, {"params": ps[1:]}]
    opt = fo.optim.Optimizer(groups, fo.adagrad, lr=0.1)
    message = "initial_accumulator_value makes the first state of adagrad"
    with pytest.raises(ValueError, match=message):
        opt.step()
    assert all(torch.equal(p, torch.ones(n)) for p in ps)
    opt.param_groups[1]["initial_accumulator_value"] = 0.5
    opt.step()
    assert all(bool((p < 1).all()) for p in ps)


@pytest.mark.parametrize("compile", [False, True], ids=["eager", "compiled"])
def test_init_state_makes_what_the_first_step_makes_of_the_options(compile: bool) -> None:
    p = torch.nn.Parameter(torch.ones(3))
    options = {"lr": 0.1, "initial_accumulator_value": 0.5}
    opt = fo.optim.Optimizer([p], fo.adagrad, compile=compile, **options)
    opt.init_state()
    assert opt.state[p]["scale_by_rss/sum"].tolist() == [0.5] * 3
