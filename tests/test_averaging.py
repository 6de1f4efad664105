"""Averages of the parameters.

They are compared with closed forms and with torch's, and put into a model and taken out again.
torch's own averages are tried with our optimizers.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.optim import swa_utils

import functorch_opt as fo
from functorch_opt import tree

SHAPES = ((4, 3), (3,), ())


def make_params(dtype: torch.dtype = torch.float64, seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [
        nn.Parameter(
            torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        )
        for shape in SHAPES
    ]


def set_grads(
    params: list[nn.Parameter], step: int, missing: tuple[int, ...] = ()
) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for i, p in enumerate(params):
        g = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
        p.grad = None if i in missing else g


def trajectory(
    tx: fo.GradientTransformation, steps: int
) -> tuple[list[list[Tensor]], list[list[Tensor]], object]:
    """The parameters from the first on, and their averages after each step."""
    params = make_params()
    ps = [p.detach() for p in params]
    state = tx.init(ps)
    all_ps, averages = [ps], [fo.eval_params(tx, state, ps)]
    for step in range(steps):
        set_grads(params, step)
        updates, state = tx.update([p.grad for p in params], state, ps)
        ps = fo.apply_updates(ps, updates)
        all_ps.append(ps)
        averages.append(fo.eval_params(tx, state, ps))
    return all_ps, averages, state


# ---- numbers -------------------------------------------------------------------------------------


def weights(d: float, t: int) -> dict[str, list[float]]:
    """The weights that the docstring gives to the parameters after steps 0, ..., t in the
    average.
    """
    return {
        "debiased": [
            0.0,
            *((1 - d) * d ** (t - i) / (1 - d**t) for i in range(1, t + 1)),
        ],
        "from the start": [d**t, *((1 - d) * d ** (t - i) for i in range(1, t + 1))],
        "mean": [0.0, *(1 / t for _ in range(t))],
    }


@pytest.mark.parametrize(
    ("kind", "stage"),
    [
        ("debiased", fo.params_ema(0.8)),
        ("from the start", fo.params_ema(0.8, debias=False)),
        ("mean", fo.params_ema(lambda count: 1 - 1 / (count.double() + 1), debias=False)),
    ],
    ids=["debiased", "from the start", "mean"],
)
def test_the_closed_form(kind: str, stage: fo.GradientTransformation) -> None:
    ps, averages, _ = trajectory(fo.chain(fo.adamw(0.1), stage), 8)
    assert all(torch.equal(a, p) for a, p in zip(averages[0], ps[0], strict=True))
    for t in range(1, 9):
        w = weights(0.8, t)[kind]
        assert abs(sum(w) - 1) < 1e-12
        for k, average in enumerate(averages[t]):
            expected = sum(w[i] * ps[i][k] for i in range(t + 1))
            torch.testing.assert_close(average, expected, rtol=1e-12, atol=1e-12)
            assert t == 1 or (average != ps[t][k]).all()


def test_updates_pass_as_they_are() -> None:
    with_, without = trajectory(fo.chain(fo.adamw(0.1), fo.params_ema(0.8)), 4)[0], []
    params = make_params()
    opt = fo.optim.Optimizer(params, fo.adamw(0.1))
    for step in range(4):
        set_grads(params, step)
        opt.step()
        without = [p.detach() for p in params]
    assert all(map(torch.equal, with_[-1], without))


@pytest.mark.parametrize(
    "build", [fo.optim.AdamW, torch.optim.AdamW], ids=["ours", "torch"]
)
def test_an_averaged_model_has_the_same_average(build: Callable) -> None:
    """torch's EMA, updated once before training, equals ``debias=False``.

    torch's average of all steps equals that of the schedule.
    """
    for decay, multi_avg_fn, before, tolerance in (
        (0.8, swa_utils.get_ema_multi_avg_fn(0.8), True, 1e-12),
        (
            lambda count: 1 - 1 / (count.double() + 1),
            swa_utils.get_swa_multi_avg_fn(),
            False,
            1e-7,
        ),  # torch divides in float32
    ):
        tx = fo.chain(fo.adamw(0.1, weight_decay=0.1), fo.params_ema(decay, debias=False))
        mine, theirs = make_params(), nn.ParameterList(make_params())
        opt, reference = (
            fo.optim.Optimizer(mine, tx),
            build(theirs.parameters(), lr=0.1, weight_decay=0.1),
        )
        model = swa_utils.AveragedModel(theirs, multi_avg_fn=multi_avg_fn)
        if before:
            model.update_parameters(theirs)
        for step in range(6):
            set_grads(mine, step)
            set_grads(list(theirs), step)
            opt.step()
            reference.step()
            model.update_parameters(theirs)
            for p, q in zip(mine, model.parameters(), strict=True):
                torch.testing.assert_close(
                    opt.state[p]["params_ema/averaged"],
                    q.detach(),
                    rtol=tolerance,
                    atol=tolerance,
                )
        with opt.eval_params():
            for p, q in zip(mine, model.parameters(), strict=True):
                torch.testing.assert_close(
                    p.detach(), q.detach(), rtol=tolerance, atol=tolerance
                )


def test_low_precision_parameters_are_averaged_in_float32_and_handed_out_in_their_dtype() -> (
    None
):
    """After the master copy the average is that of the copy."""
    tx = fo.chain(fo.keep_master_weights(fo.sgd(2.0**-12)), fo.params_ema(0.5))
    ps = {"w": torch.ones(2, dtype=torch.bfloat16)}
    state = tx.init(ps)
    for _ in range(3):
        updates, state = tx.update({"w": torch.ones(2, dtype=torch.bfloat16)}, state, ps)
        ps = fo.apply_updates(ps, updates)
    assert (ps["w"] == 1).all()
    steps = sum(w * t for t, w in enumerate(weights(0.5, 3)["debiased"]))
    torch.testing.assert_close(
        fo.get(state, "averaged")["w"],
        torch.full((2,), 1 - steps * 2.0**-12),
        rtol=1e-7,
        atol=0,
    )
    assert fo.eval_params(tx, state, ps)["w"].dtype == torch.bfloat16


# ---- reading it out of a state -------------------------------------------------------------------

PS = {"enc": {"w": torch.ones(2), "b": torch.zeros(())}, "head": torch.full((3,), 2.0)}
GS = tree.map(torch.ones_like, PS)


HALF = fo.chain(fo.sgd(1.0), fo.params_ema(0.5, debias=False))


@pytest.mark.parametrize(
    ("tx", "averaged"),
    [
        (HALF, ["enc/w", "enc/b", "head"]),
        (fo.chain(fo.clip(9.0), HALF), ["enc/w", "enc/b", "head"]),
        (
            fo.chain(
                fo.sgd(1.0),
                fo.masked(fo.params_ema(0.5, debias=False), {"enc": True, "head": False}),
            ),
            ["enc/w", "enc/b"],
        ),
        (
            fo.partition(
                {"a": HALF, "b": fo.masked(HALF, lambda path, p: p.ndim > 0)},
                {"enc": "b", "head": "a"},
            ),
            ["enc/w", "head"],
        ),
        (fo.keep_master_weights(HALF), ["enc/w", "enc/b", "head"]),
        (
            fo.inject_hyperparams(
                lambda decay: fo.chain(fo.sgd(1.0), fo.params_ema(decay, debias=False))
            )(decay=0.5),
            ["enc/w", "enc/b", "head"],
        ),
    ],
    ids=[
        "chain",
        "nested",
        "masked",
        "partition of masked",
        "master weights",
        "injected",
    ],
)
def test_at_any_depth(tx: fo.GradientTransformation, averaged: list[str]) -> None:
    state = tx.init(PS)
    updates, state = tx.update(GS, state, PS)
    new = fo.apply_updates(PS, updates)
    columns = (
        tree.leaves(PS),
        tree.leaves(new),
        tree.leaves(fo.eval_params(tx, state, new)),
    )
    for path, p, q, m in zip(tree.paths(PS), *columns, strict=True):
        torch.testing.assert_close(m, (p + q) / 2 if path in averaged else q)


def test_the_adapters_lr_comes_before_the_average_at_any_depth() -> None:
    """lr 0.5 halves the step, and the average is that of the parameters as they are."""
    for tx in (
        fo.params_ema(0.5, debias=False),
        HALF,
        fo.chain(fo.clip(9.0), HALF),
        fo.chain(
            fo.sgd(1.0), fo.masked(fo.params_ema(0.5, debias=False), lambda path, p: True)
        ),
        fo.masked(HALF, lambda path, p: p.ndim > 0),
        fo.partition(
            {"a": HALF, "b": fo.sgd(1.0)}, lambda path, p: "a" if p.ndim else "b"
        ),
        fo.keep_master_weights(HALF),
    ):
        params = make_params()
        opt = fo.optim.Optimizer(params, tx)
        opt.param_groups[0]["lr"] = 0.5
        before = [p.detach().clone() for p in params]
        set_grads(params, 0)
        opt.step()
        for p, q in zip(params, before, strict=True):
            torch.testing.assert_close(
                (p.detach() - q).abs(), 0.5 * p.grad.abs(), rtol=1e-12, atol=1e-12
            )
            for key, value in opt.state[p].items():
                if key.endswith("averaged"):
                    torch.testing.assert_close(value, (p.detach() + q) / 2)
        assert any(key.endswith("averaged") for key in opt.state[params[0]])


def test_what_looks_at_the_new_parameters_comes_last() -> None:
    with pytest.raises(
        ValueError,
        match="params_ema looks at the new parameters, so it must come last in the chain; scale after it",
    ):
        fo.chain(fo.params_ema(0.9), fo.scale(2.0))
    with pytest.raises(
        ValueError, match=r"masked looks at the new parameters.*clip after it"
    ):
        fo.chain(fo.masked(fo.params_ema(0.9), lambda path, p: True), fo.clip(1.0))
    with pytest.raises(
        TypeError, match="lr has no place in <lambda>, which looks at the new parameters"
    ):
        fo.optim.Optimizer(
            make_params(),
            fo.inject_hyperparams(lambda decay: fo.params_ema(decay))(decay=0.5),
        )


def test_what_cannot_be_read() -> None:
    tx = fo.adam(0.1)
    state = tx.init(PS)
    with pytest.raises(
        ValueError,
        match=r"nothing in this transformation averages the parameters: put params_ema\(decay\) last",
    ):
        fo.eval_params(tx, state, PS)
    twice = fo.chain(fo.params_ema(0.5), fo.params_ema(0.9))
    with pytest.raises(ValueError, match="two stages average the parameter at 'enc/b'"):
        fo.eval_params(twice, twice.init(PS), PS)
    tx = fo.params_ema(0.5)
    one = tx.init(PS)
    with pytest.raises(
        ValueError, match="params and the state's averaged differ in structure"
    ):
        fo.eval_params(tx, one, {"head": PS["head"]})
    with pytest.raises(
        ValueError,
        match=r"average at 'head' has shape \(3,\), and its parameter has \(4,\)",
    ):
        fo.eval_params(tx, one, {**PS, "head": torch.zeros(4)})
    with pytest.raises(ValueError, match=r"decay must be in \[0, 1\); got 1.0"):
        fo.params_ema(1.0)
    with pytest.raises(ValueError, match="a schedule cannot be debiased"):
        fo.params_ema(lambda count: 0.5)


def test_a_parameter_that_is_none_and_under_vmap() -> None:
    tx = HALF
    ps = {"w": torch.ones(3, 2), "none": None}

    def one(p: Tensor) -> Tensor:
        params = {"w": p, "none": None}
        updates, state = tx.update({"w": p, "none": None}, tx.init(params), params)
        averages = fo.eval_params(tx, state, fo.apply_updates(params, updates))
        assert averages["none"] is None
        return averages["w"]

    assert torch.equal(torch.func.vmap(one)(ps["w"]), ps["w"] / 2)


# ---- into the model and out ----------------------------------------------------------------------


def trained(
    steps: int = 4, dtype: torch.dtype = torch.float64, **options: object
) -> tuple[list[nn.Parameter], fo.optim.Optimizer]:
    params = make_params(dtype)
    opt = fo.optim.Optimizer(
        params, fo.chain(fo.adamw(0.1), fo.params_ema(0.8)), **options
    )
    for step in range(steps):
        set_grads(params, step)
        opt.step()
    return params, opt


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_in_and_out_bit_for_bit(
    error: type[BaseException] | None, dtype: torch.dtype
) -> None:
    """Parameters come back bit for bit, also a NaN with its payload and a negative zero.

    They keep their memory, and training goes on as if nothing had happened.
    """
    (params, opt), (twins, twin) = trained(dtype=dtype), trained(dtype=dtype)
    for p in (params[0], twins[0]):
        with torch.no_grad():
            p[0, 0], p[0, 1] = -0.0, float("nan")
    before, pointers = (
        [p.detach().clone() for p in params],
        [p.data_ptr() for p in params],
    )

    def inside() -> None:
        with opt.eval_params():
            for p in params:
                assert (
                    torch.equal(p.detach(), opt.state[p]["params_ema/averaged"].to(dtype))
                    and p.data_ptr() in pointers
                )
            if error:
                raise error

    if error:
        with pytest.raises(error):
            inside()
    else:
        inside()
    integers = {torch.float64: torch.int64, torch.bfloat16: torch.int16}[dtype]
    for p, q in zip(params, before, strict=True):
        assert torch.equal(p.detach().view(integers), q.view(integers))
    for step in range(4, 6):
        set_grads(params, step)
        set_grads(twins, step)
        opt.step()
        twin.step()
    for p, q in zip(params, twins, strict=True):
        assert torch.equal(p.detach().view(integers), q.detach().view(integers))


def test_a_state_dict_saved_inside_is_the_same_and_nothing_can_be_changed() -> None:
    params, opt = trained()
    outside = copy.deepcopy(opt.state_dict())
    with opt.eval_params():
        inside = copy.deepcopy(opt.state_dict())
        with pytest.raises(
            RuntimeError, match=r"hold their averages: step after leaving eval_params\(\)"
        ):
            opt.step()
        with pytest.raises(
            RuntimeError, match=r"hold their averages: load after leaving eval_params\(\)"
        ):
            opt.load_state_dict(outside)
        with opt.eval_params():  # a second time changes nothing
            assert torch.equal(
                params[0].detach(), opt.state[params[0]]["params_ema/averaged"]
            )
        assert torch.equal(
            params[0].detach(), opt.state[params[0]]["params_ema/averaged"]
        )
        with pytest.raises(RuntimeError, match="step after leaving"):
            opt.step()
    left, right = (tree.flatten(d["state"]) for d in (inside, outside))
    assert left[1] == right[1] and all(map(torch.equal, left[0], right[0]))
    assert inside["param_groups"] == outside["param_groups"]
    opt.step()


def test_parameters_without_a_step_or_an_average_stay() -> None:
    params = make_params()
    opt = fo.optim.Optimizer(
        params,
        fo.chain(fo.sgd(0.1), fo.masked(fo.params_ema(0.5), lambda path, p: p.ndim > 0)),
    )
    before = [p.detach().clone() for p in params]
    with opt.eval_params():
        assert all(map(torch.equal, before, params))
    set_grads(params, 0, missing=(0,))
    opt.step()
    set_grads(params, 1, missing=(0,))
    opt.step()
    now = [p.detach().clone() for p in params]
    with opt.eval_params():
        same = [torch.equal(p.detach(), q) for p, q in zip(params, now, strict=True)]
        assert same == [True, False, True]


def test_two_averages_or_none_are_an_error() -> None:
    with (
        pytest.raises(
            ValueError, match="nothing in this optimizer averages the parameters"
        ),
        fo.optim.AdamW(make_params()).eval_params(),
    ):
        pass
    opt = fo.optim.Optimizer(
        make_params(), fo.chain(fo.sgd(0.1), fo.params_ema(0.5), fo.params_ema(0.9))
    )
    with (
        pytest.raises(
            ValueError,
            match="two stages average the parameter at '0': read the one you mean",
        ),
        opt.eval_params(),
    ):
        pass


def test_groups_with_other_options_each_have_theirs() -> None:
    def factory(
        learning_rate: float, nesterov: bool = False
    ) -> fo.GradientTransformation:
        return fo.chain(fo.sgd(learning_rate, 0.9, nesterov), fo.params_ema(0.5))

    params = make_params()
    opt = fo.optim.Optimizer(
        [{"params": params[:1]}, {"params": params[1:], "nesterov": True}],
        factory,
        learning_rate=0.1,
        nesterov=False,
    )
    for step in range(3):
        set_grads(params, step)
        opt.step()
    with opt.eval_params():
        assert all(
            torch.equal(p.detach(), opt.state[p]["params_ema/averaged"]) for p in params
        )


def test_averages_are_in_the_checkpoint() -> None:
    params, opt = trained()
    file = io.BytesIO()
    torch.save([opt.state_dict(), [p.detach() for p in params]], file)
    file.seek(0)
    saved = torch.load(file)
    others = [nn.Parameter(p) for p in saved[1]]
    other = fo.optim.Optimizer(others, fo.chain(fo.adamw(0.1), fo.params_ema(0.8)))
    other.load_state_dict(saved[0], strict=True)
    for ps, o in ((params, opt), (others, other)):
        for step in range(4, 7):
            set_grads(ps, step)
            o.step()
    with opt.eval_params(), other.eval_params():
        assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))


@pytest.mark.slow
def test_compiled_it_runs_in_the_same_pass() -> None:
    from functorch_opt._execution.segments import PROGRAMS

    PROGRAMS.clear()
    params, opt = trained(compile=True, dtype=torch.float32)
    assert len(PROGRAMS) == 1  # adamw and the average together
    twins, twin = trained(dtype=torch.float32)
    for p, q in zip(params, twins, strict=True):
        torch.testing.assert_close(p, q)
        torch.testing.assert_close(
            opt.state[p]["params_ema/averaged"], twin.state[q]["params_ema/averaged"]
        )
    with opt.eval_params():
        torch.testing.assert_close(
            params[0].detach(), opt.state[params[0]]["params_ema/averaged"]
        )
    set_grads(params, 4)
    set_grads(twins, 4)
    opt.step()
    twin.step()
    torch.testing.assert_close(params[0], twins[0])


# ---- torch's averages with our optimizers --------------------------------------------------------


def model_and_loader() -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1))
    return model.double(), [
        (torch.randn(16, 4).double(), torch.randn(16, 1).double()) for _ in range(4)
    ]


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (
            lambda ps: fo.optim.SGD(ps, lr=0.1, momentum=0.9),
            lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9),
        ),
        (lambda ps: fo.optim.AdamW(ps, lr=0.1), lambda ps: torch.optim.AdamW(ps, lr=0.1)),
        (
            lambda ps: fo.optim.Optimizer(ps, fo.sgd, learning_rate=0.1),
            lambda ps: torch.optim.SGD(ps, lr=0.1),
        ),
    ],
    ids=["SGD", "AdamW", "generic"],
)
@pytest.mark.parametrize("average", ["swa", "ema"])
def test_averaged_model_swalr_and_update_bn(
    ours: Callable, theirs: Callable, average: str
) -> None:
    """The loop of torch's documentation: a scheduler, and SWALR and the average from the third
    epoch.

    The statistics of batch norm are computed at the end.
    """
    ends = []
    for build in (ours, theirs):
        model, loader = model_and_loader()
        opt = build(model.parameters())
        fn = (
            swa_utils.get_ema_multi_avg_fn(0.9)
            if average == "ema"
            else swa_utils.get_swa_multi_avg_fn()
        )
        averaged = swa_utils.AveragedModel(model, multi_avg_fn=fn)
        sched, swa = (
            torch.optim.lr_scheduler.CosineAnnealingLR(opt, 6),
            swa_utils.SWALR(opt, swa_lr=0.02, anneal_epochs=2),
        )
        lrs = []
        for epoch in range(6):
            for x, y in loader:
                opt.zero_grad()
                nn.functional.mse_loss(model(x), y).backward()
                opt.step()
            if epoch >= 2:
                averaged.update_parameters(model)
                swa.step()
            else:
                sched.step()
            lrs.append(opt.param_groups[0]["lr"])
        swa_utils.update_bn(loader, averaged)
        ends.append(
            [torch.tensor(lrs), *averaged.state_dict().values(), averaged(loader[0][0])]
        )
        assert not torch.equal(averaged.module[0].weight, model[0].weight)
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


def test_update_bn_for_our_average() -> None:
    """On a copy: the model keeps its own statistics, and the copy has those of the averages."""
    model, loader = model_and_loader()
    opt = fo.optim.Optimizer(
        model.parameters(), fo.chain(fo.adamw(0.1), fo.params_ema(0.9))
    )
    for x, y in loader:
        opt.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        opt.step()
    before = copy.deepcopy(model.state_dict())
    with opt.eval_params():
        averaged = copy.deepcopy(model)
        swa_utils.update_bn(loader, averaged)
    assert all(
        torch.equal(a, b)
        for a, b in zip(before.values(), model.state_dict().values(), strict=True)
    )
    assert torch.equal(
        averaged[0].weight, opt.state[model[0].weight]["params_ema/averaged"]
    )
    hidden = torch.cat([averaged[0](x) for x, _ in loader])
    torch.testing.assert_close(
        averaged[1].running_mean, hidden.mean(0).detach(), rtol=1e-10, atol=1e-10
    )
