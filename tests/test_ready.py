"""Every ready-made optimizer is a class in `fo.optim`, made from its factory.

What it computes is the functional update; what it does in a loop is what a torch optimizer does.
"""

from __future__ import annotations

import copy
import inspect
import io
import pickle

import pytest
import torch
from ready_stub import FILE, stub
from registry import ROWS, Row
from torch import Tensor
from torch.optim import lr_scheduler
from training import make_params, set_grads, train

import functorch_opt as fo
from functorch_opt.optim.ready import CLASSES

ROW = {row.name: row for row in ROWS}
STEPS = 5


def factory_of(name: str) -> str:
    return CLASSES[name]._factory.__name__


def hyper(name: str) -> dict:
    """Numbers that are not the defaults, from the row of the factory; the rate is ``lr``."""
    row = ROW[factory_of(name)]
    given = {**({"key": 7} if row.keyed else {}), "learning_rate": 0.1, **row.hyper}
    return as_class(given)


def required(name: str) -> dict:
    """What has no default beside the rate, with other values than those of `hyper`."""
    _, _, *rest = inspect.signature(getattr(fo.optim, name)).parameters.values()
    return {p.name: 9 for p in rest if p.default is p.empty}


def as_class(given: dict) -> dict:
    return {"lr" if n == "learning_rate" else n: value for n, value in given.items()}


def make(name: str, params: list, **options) -> fo.optim.Optimizer:
    return getattr(fo.optim, name)(params, **hyper(name), **options)


def loss_at(step: int) -> Tensor:
    return torch.tensor(40 / (step + 1), dtype=torch.float64)


def run(opt: torch.optim.Optimizer, params: list, steps: range) -> list[Tensor]:
    for step in steps:
        set_grads(params, step)
        opt.step(lambda step=step: loss_at(step))
    return [p.detach().clone() for p in params]


def run_purely(tx: fo.GradientTransformation, params: list) -> list[Tensor]:
    ps = [p.detach().clone() for p in params]
    state = tx.init(ps)
    for step in range(STEPS):
        set_grads(params, step)
        extra = {"value": loss_at(step)} if "value" in tx.extra_args else {}
        updates, state = tx.update([p.grad for p in params], state, ps, **extra)
        ps = fo.apply_updates(ps, updates)
    return ps


def assert_equal(a: list[Tensor], b: list[Tensor], tolerance: float = 0.0) -> None:
    for p, q in zip(a, b, strict=True):
        torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)


# ---- lists -------------------------------------------------------------------------------------------


def test_every_ready_made_optimizer_is_a_class() -> None:
    """By another way than `ready.py` looks for them."""
    factories = {
        name
        for name in fo.__all__
        if inspect.isfunction(function := getattr(fo, name))
        and function.__module__.startswith("functorch_opt.optimizers.")
        and [*inspect.signature(function).parameters][:1] == ["learning_rate"]
        and not name.startswith("scale_by_")
    }
    classes = {name.lower() for name in dir(fo.optim) if name[0].isupper()}
    assert {"lion", "prodigy", "adamw", "sophia"} < factories
    factories -= {
        "hyperball",  # a stage
        "sophia",  # it reads the loss as a function of the params
    }
    assert {name.replace("_", "") for name in factories} <= classes


def test_the_types_are_those_of_the_factories() -> None:
    assert FILE.read_text() == stub(), "run `python -m tests.ready_stub`"


@pytest.mark.parametrize("name", CLASSES)
def test_arguments_and_help(name: str) -> None:
    cls, factory = getattr(fo.optim, name), getattr(fo, factory_of(name))
    params, lr, *rest, compile, state, capturable, owners = inspect.signature(
        cls
    ).parameters.values()
    rate, *others = inspect.signature(factory).parameters.values()
    last = [x.name for x in (compile, state, capturable, owners)]
    assert (params.name, lr.name) == ("params", "lr")
    assert last == ["compile", "state", "capturable", "owners"]
    assert lr.default == rate.default
    assert rest == others
    assert f"functorch_opt.{factory.__name__}" in cls.__doc__
    assert cls.__name__ == cls.__qualname__ == name
    assert issubclass(cls, fo.optim.Optimizer)


def test_it_prints_as_torchs_do() -> None:
    opt = fo.optim.Lion(make_params(), 0.5, weight_decay=0.1)
    first, group, *options, last = repr(opt).splitlines()
    assert (first, group, last) == ("Lion (", "Parameter Group 0", ")")
    assert "    lr: 0.5" in options
    assert "    weight_decay: 0.1" in options


# ---- numbers -----------------------------------------------------------------------------------------


def variants() -> list:
    cases = []
    for name in CLASSES:
        row: Row = ROW[factory_of(name)]
        for i, variant in enumerate(row.variants):
            cases.append(pytest.param(name, variant, id=f"{name}{i or ''}"))
    return cases


@pytest.mark.parametrize(("name", "variant"), variants())
def test_it_is_the_functional_update(name: str, variant: dict) -> None:
    options = {**hyper(name), **as_class(variant)}
    params, twins = make_params(), make_params()
    opt = getattr(fo.optim, name)(params, **options)
    for step in range(STEPS):
        set_grads(params, step)
        opt.step(lambda step=step: loss_at(step))
    tx = CLASSES[name]._factory(options.pop("lr"), **options)
    after = [p.detach() for p in params]
    assert_equal(after, run_purely(tx, twins), 1e-12)
    assert not any(
        torch.equal(p, q) for p, q in zip(after, make_params(), strict=True) if p.numel()
    )


@pytest.mark.parametrize("name", CLASSES)
def test_it_is_the_optimizer_of_its_factory(name: str) -> None:
    params, twins = make_params(), make_params()
    a = make(name, params)
    b = fo.optim.Optimizer(twins, getattr(fo, factory_of(name)), **hyper(name))
    assert a.state_dict()["param_groups"] == b.state_dict()["param_groups"]
    assert_equal(run(a, params, range(8)), run(b, twins, range(8)))


@pytest.mark.parametrize("name", CLASSES)
def test_groups_that_are_alike_are_one(name: str) -> None:
    """Also where a value for all parameters is computed from a hyperparameter."""
    params, twins = make_params(), make_params()
    groups = [{"params": params[:2]}, {"params": params[2:]}]
    a, b = (
        run(make(name, groups), params, range(4)),
        run(make(name, twins), twins, range(4)),
    )
    assert_equal(a, b, 1e-12)


def test_groups_may_become_different() -> None:
    params, twins = make_params(), make_params()
    a = fo.optim.Lion([{"params": params[:2]}, {"params": params[2:]}], lr=0.1)
    b = [fo.optim.Lion(twins[:2], lr=0.1), fo.optim.Lion(twins[2:], lr=0.1)]
    for step in range(6):
        set_grads(params, step)
        set_grads(twins, step)
        if step == 2:
            a.param_groups[0]["lr"] = b[0].param_groups[0]["lr"] = 0.3
        if step == 4:
            a.param_groups[1]["lr"] = b[1].param_groups[0]["lr"] = 0.3
        for each in (a, *b):
            each.step()
    assert_equal([p.detach() for p in params], [p.detach() for p in twins], 1e-12)


def test_each_group_has_its_own_numbers() -> None:
    params, twins = make_params(), make_params()
    groups = [
        {"params": params[:2], "lr": 0.3, "b1": 0.5},
        {"params": params[2:], "weight_decay": 0.0},
    ]
    opt = fo.optim.Lion(groups, lr=0.1, weight_decay=0.2)
    parts = [
        fo.optim.Lion(twins[:2], lr=0.3, b1=0.5, weight_decay=0.2),
        fo.optim.Lion(twins[2:], lr=0.1, weight_decay=0.0),
    ]
    for step in range(STEPS):
        set_grads(params, step)
        set_grads(twins, step)
        for each in (opt, *parts):
            each.step()
    assert_equal([p.detach() for p in params], [p.detach() for p in twins], 1e-12)


@pytest.mark.parametrize("name", CLASSES)
def test_groups_may_have_other_rates(name: str) -> None:
    params = make_params()
    opt = make(name, [{"params": params[:2]}, {"params": params[2:], "lr": 0.01}])
    first = [p.detach().clone() for p in params]
    moved = run(opt, params, range(STEPS))
    for p, old in zip(moved, first, strict=True):
        assert p.isfinite().all()
        assert p.numel() == 0 or not torch.equal(p, old)


@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "name", ["ScheduleFreeAdamW", "ScheduleFreeSGD", "ScheduleFreeRAdam"]
)
def test_rates_in_proportion_are_averaged_as_those_of_each_alone(
    name: str, compile: bool
) -> None:
    params, twins = make_params(), make_params()
    rates, given = (0.3, 0.05, 0.0), hyper(name)
    pieces = slice(0, 2), slice(2, 4), slice(4, None)
    cls = getattr(fo.optim, name)
    groups = [{"params": params[i], "lr": x} for i, x in zip(pieces, rates, strict=True)]
    opt = cls(groups, **given, compile=compile)
    parts = [
        cls(twins[i], **{**given, "lr": x}) for i, x in zip(pieces, rates, strict=True)
    ]
    all_of_them = [opt, *parts]
    schedulers = [
        lr_scheduler.LambdaLR(each, lambda t: min(1, (t + 1) / 3)) for each in all_of_them
    ]
    for step in range(7):
        set_grads(params, step)
        set_grads(twins, step)
        for each, scheduler in zip(all_of_them, schedulers, strict=True):
            each.step()
            scheduler.step()
    assert_equal([p.detach() for p in params], [p.detach() for p in twins], 1e-10)


@pytest.mark.parametrize(
    ("name", "number"),
    [("Mano", "eps"), ("SPlus", "scale"), ("Shampoo", "graft_eps"), ("Scion", "radius")],
)
def test_numbers_that_only_some_tensors_read_may_differ(name: str, number: str) -> None:
    params, twins = make_params(), make_params()
    groups = [{"params": params[:2], number: 0.9}, {"params": params[2:]}]
    opt, given = make(name, groups), hyper(name)
    parts = [
        getattr(fo.optim, name)(twins[:2], **{**given, number: 0.9}),
        getattr(fo.optim, name)(twins[2:], **given),
    ]
    run(opt, params, range(STEPS))
    for step in range(STEPS):
        set_grads(twins, step)
        for each in parts:
            each.step()
    assert_equal([p.detach() for p in params], [p.detach() for p in twins], 1e-12)


@pytest.mark.parametrize("name", CLASSES)
def test_a_scheduler_drives_lr(name: str) -> None:
    def ends(driven: bool) -> list[Tensor]:
        params = make_params()
        opt = make(name, params)
        scheduler = lr_scheduler.ExponentialLR(opt, 0.5)
        for step in range(STEPS):
            run(opt, params, range(step, step + 1))
            if driven:
                scheduler.step()
                assert opt.param_groups[0]["lr"] == pytest.approx(0.5**step * first / 2)
        return [p.detach() for p in params]

    first = hyper(name)["lr"]
    driven, left = ends(True), ends(False)
    assert any(not torch.equal(p, q) for p, q in zip(driven, left, strict=True))


# SOAP, Shampoo and their kin are not among them: a decomposition and its neighbours make graphs for
# which Inductor takes minutes. test_compiled.py runs them as traced, without Inductor.
@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["Lion", "Prodigy", "ScheduleFreeAdamW", "SM3", "NorMuon", "Mano"]
)
def test_compiled_equals_eager(name: str) -> None:
    torch._dynamo.reset()
    params, twins = make_params(), make_params()
    compiled, eager = make(name, params, compile=True), make(name, twins)
    assert_equal(train(compiled, params, 4), train(eager, twins, 4), 1e-10)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("name", CLASSES)
def test_a_gradient_may_come_late(name: str, device: str) -> None:
    """Or be missing later; on the meta device, where nothing can be read, it is a dry run."""
    sizes = ((3, 4), (4, 2), (4,))
    params = [torch.nn.Parameter(torch.randn(size, device=device)) for size in sizes]
    opt = make(name, params)
    for steps in ((0, 2), (0, 2), (0, 1, 2), (1,)):
        for i, p in enumerate(params):
            p.grad = torch.randn_like(p) if i in steps else None
        before = [p.detach().clone() for p in params]
        opt.step(lambda: loss_at(0))
        for i, (p, old) in enumerate(zip(params, before, strict=True)):
            assert p.is_meta or i in steps or torch.equal(p, old)
            assert p.is_meta or p.isfinite().all()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("MoMo", {}),
        ("MoMoAdam", {"adapt_lower_bound": True}),
        ("DAdaptAdamW", {}),
        ("Prodigy", {"use_bias_correction": True}),
        ("DoG", {"init_step": ("learning_rate", 0.2)}),
    ],
)
def test_what_all_parameters_share_counts_the_steps_of_all(
    name: str, options: dict
) -> None:
    """So a gradient that is missing changes nothing in how the bias of these numbers is corrected."""
    params, given = make_params(), {**hyper(name), **options}
    opt = getattr(fo.optim, name)(params, **given)
    ps = [p.detach().clone() for p in params]
    tx = CLASSES[name]._factory(given.pop("lr"), **given)
    state = tx.init(ps)
    for step in range(STEPS):
        set_grads(params, step)
        if step in (0, 1, 3):
            params[0].grad = None
        extra = {"value": loss_at(step)} if "value" in tx.extra_args else {}
        updates, state = tx.update([p.grad for p in params], state, ps, **extra)
        ps = fo.apply_updates(ps, updates)
        opt.step(lambda step=step: loss_at(step))
    assert_equal([p.detach() for p in params], ps, 1e-12)


# ---- torch's habits ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CLASSES)
def test_resumed_equals_uninterrupted_bit_for_bit(name: str) -> None:
    params = make_params()
    opt = make(name, params)
    run(opt, params, range(4))
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    others = [torch.nn.Parameter(p.detach().clone()) for p in params]
    other = getattr(fo.optim, name)(others, lr=0.7, **required(name))
    other.load_state_dict(torch.load(file, weights_only=True), strict=True)
    a, b = opt.state_dict(), other.state_dict()
    assert a["param_groups"] == b["param_groups"]
    assert fo.tree.paths(a["state"]) == fo.tree.paths(b["state"])
    assert_equal(fo.tree.leaves(a["state"]), fo.tree.leaves(b["state"]))
    assert_equal(run(other, others, range(4, 8)), run(opt, params, range(4, 8)))


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("name", CLASSES)
def test_a_copy_goes_on_alike(name: str, how: str) -> None:
    params = make_params()
    opt = make(name, params)
    run(opt, params, range(3))
    both = (params, opt)
    others, other = (
        copy.deepcopy(both) if how == "deepcopy" else pickle.loads(pickle.dumps(both))
    )
    assert type(other) is type(opt)
    assert_equal(run(other, others, range(3, 6)), run(opt, params, range(3, 6)))


# ---- errors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CLASSES)
def test_a_wrong_option_is_an_error_that_lists_the_right_ones(name: str) -> None:
    cls = getattr(fo.optim, name)
    known = ", ".join(inspect.signature(cls).parameters)
    with pytest.raises(TypeError) as error:
        cls(make_params(), **hyper(name), beta_7=0.9)
    assert str(error.value) == (
        f"{name}: no argument is called beta_7; its arguments are {known}."
    )
    with pytest.raises(ValueError, match=r"learning_rate must be in \[0, inf\); got -1"):
        cls(make_params(), **{**hyper(name), "lr": -1.0})
    with pytest.raises(ValueError, match="learning_rate must be in"):
        cls([{"params": make_params(), "lr": -1.0}], **hyper(name))


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (
            lambda ps: fo.optim.Lion(ps, learning_rate=0.1),
            TypeError,
            r"no argument is called learning_rate \(it is called lr\)",
        ),
        (lambda ps: fo.optim.Lion(ps), TypeError, "missing a required argument: 'lr'"),
        (lambda ps: fo.optim.Lion(ps, lr="0.1"), TypeError, "must be a number"),
        (
            lambda ps: fo.optim.Prodigy([{"params": ps, "betas": (0.5, 0.9)}]),
            ValueError,
            "betas of Prodigy cannot differ between groups",
        ),
        (
            lambda ps: fo.optim.Lion([{"params": ps, "b1": 1.0}], lr=0.1),
            ValueError,
            r"b1 must be in \[0, 1\)",
        ),
    ],
)
def test_errors(build, error, message) -> None:
    with pytest.raises(error, match=message):
        build(make_params())
