"""A sweep computes what its runs would compute alone; it marks those that diverge, and finds the
best.
"""

from __future__ import annotations

import functools
import itertools
import math
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.functional import mse_loss

import functorch_opt as fo

N, BATCH, EPOCHS = 22, 5, 3  # four minibatches an epoch, two examples left over


def draw(seed: int, n: int = N) -> tuple[Tensor, Tensor]:
    x = torch.randn(
        n, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    return x, torch.sin(x.sum(1, keepdim=True))


DATA, HELD_OUT = draw(100), draw(101)


def make_model() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()


run = functools.partial(
    fo.sweep, make_model, DATA, loss=mse_loss, epochs=EPOCHS, batch_size=BATCH
)


def stacked(result: fo.Sweep) -> Tensor:
    """All parameters, [runs, ...]."""
    return torch.cat([p.flatten(1) for p in result.params.values()], 1)


# ---- each run is what it would be alone ----------------------------------------------------------


def train_alone(
    seed: int,
    make_optimizer: Callable[[Any], torch.optim.Optimizer],
    bound: float = math.inf,
) -> tuple[list[float], nn.Module]:
    """An ordinary loop, without this library."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = make_model()
    optimizer, generator, losses = (
        make_optimizer(model.parameters()),
        torch.Generator().manual_seed(seed),
        [],
    )
    for _ in range(EPOCHS):
        order = torch.randperm(N, generator=generator)
        for i in range(0, N - BATCH + 1, BATCH):
            rows = order[i : i + BATCH]
            loss = mse_loss(model(DATA[0][rows]), DATA[1][rows])
            losses.append(loss.item())
            if not loss <= bound:
                return losses, model
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return losses, model


ADAMW = {
    "learning_rate": [1e-3, 0.03, 0.3],
    "b1": torch.tensor([0.5, 0.9], dtype=torch.float64),
    "weight_decay": (0.0, 0.2),
}


@pytest.mark.parametrize("seed", [0, 3, range(2, 4)], ids=str)
def test_every_run_equals_a_loop_of_torch_optim(seed: Any) -> None:
    result = run(fo.adamw, seed=seed, eps=1e-6, **ADAMW)
    combinations = list(
        itertools.product(
            *(list(map(float, values)) for values in ADAMW.values()),
            [seed] if isinstance(seed, int) else seed,
        )
    )
    assert result.curves.shape == (len(combinations), EPOCHS * (N // BATCH))
    for i, (lr, b1, weight_decay, own_seed) in enumerate(combinations):
        assert [result.settings[name][i] for name in ADAMW] == [lr, b1, weight_decay]
        losses, model = train_alone(
            own_seed,
            functools.partial(
                torch.optim.AdamW,
                lr=lr,
                betas=(b1, 0.999),
                eps=1e-6,
                weight_decay=weight_decay,
            ),
        )
        torch.testing.assert_close(
            result.curves[i], torch.tensor(losses, dtype=torch.float64), rtol=1e-9, atol=0
        )
        torch.testing.assert_close(
            result.params_of(i),
            {k: p.detach() for k, p in model.named_parameters()},
            rtol=1e-8,
            atol=1e-11,
        )
    assert len(result.curves[:, -1].unique()) == len(
        combinations
    )  # every hyperparameter matters


def test_float32_runs_stay_float32() -> None:
    x, y = (t.float() for t in DATA)
    result = fo.sweep(
        lambda: make_model().float(),
        (x, y),
        fo.adam,
        loss=mse_loss,
        steps=2,
        learning_rate=[0.1, 0.2],
    )
    assert (
        {p.dtype for p in result.params.values()}
        == {torch.float32}
        == {result.curves.dtype}
    )


def test_a_chain_of_ones_own_and_frozen_parameters() -> None:
    model = make_model()
    model[0].bias.requires_grad_(False)

    def own(learning_rate: Any, max_norm: Any) -> fo.GradientTransformation:
        return fo.chain(fo.clip_by_global_norm(max_norm), fo.sgd(learning_rate))

    result = fo.sweep(
        model,
        DATA,
        own,
        loss=mse_loss,
        steps=3,
        learning_rate=[0.1, 1.0],
        max_norm=[0.01, 100.0],
    )
    assert sorted(result.params) == ["0.weight", "2.bias", "2.weight"]
    for i, (lr, max_norm) in enumerate(itertools.product([0.1, 1.0], [0.01, 100.0])):
        params = {k: p.detach() for k, p in model.named_parameters() if p.requires_grad}
        tx, loss = (
            own(lr, max_norm),
            lambda ps: mse_loss(functional_call(model, ps, DATA[0]), DATA[1]),
        )
        state = tx.init(params)
        for _ in range(3):
            updates, state = tx.update(torch.func.grad(loss)(params), state, params)
            params = fo.apply_updates(params, updates)
        torch.testing.assert_close(result.params_of(i), params)


def test_a_loss_function_without_data_and_an_optimizer_that_reads_the_loss() -> None:
    def polyak(scale: float) -> fo.GradientTransformation:
        """The step length of Polyak, 1987, for a smallest loss of 0."""

        def update(updates, state, params, *, value):
            return fo.tree.map(
                lambda g: -scale * value / fo.tree.norm(updates) ** 2 * g, updates
            ), state

        return fo.GradientTransformation(lambda params: (), update)

    result = fo.sweep(
        lambda p: (p**2).sum(),
        (),
        polyak,
        params=torch.tensor([3.0, -4.0]),
        steps=3,
        scale=[0.5, 1.0, 1.5],
    )
    # each step multiplies p by 1 - scale/2
    torch.testing.assert_close(
        result.params,
        torch.tensor([0.75**3, 0.5**3, 0.25**3]).unsqueeze(1) * torch.tensor([3.0, -4.0]),
    )
    assert result.best == {"scale": 1.5}


def test_averages_are_what_is_evaluated() -> None:
    """Schedule-Free trains at one point and is evaluated at another."""
    rates = [0.1, 1.0]
    result = fo.sweep(
        lambda p, x: ((p - x) ** 2).sum(),
        (torch.tensor([[1.0, 2.0], [3.0, 0.0]]),),
        fo.schedule_free_sgd,
        params=torch.zeros(2),
        steps=4,
        batch_size=1,
        bound=1e3,
        validation=(torch.tensor([2.0, 1.0]),),
        learning_rate=[*rates, 1e3],
    )
    order = torch.Generator().manual_seed(0)
    x = torch.tensor([[1.0, 2.0], [3.0, 0.0]])
    batches = [x[i] for _ in range(2) for i in torch.randperm(2, generator=order)]
    for i, rate in enumerate(rates):
        tx, p = fo.schedule_free_sgd(rate), torch.zeros(2)
        state = tx.init(p)
        for batch in batches:
            updates, state = tx.update(2 * (p - batch), state, p)
            p = fo.apply_updates(p, updates)
        averages = fo.eval_params(tx, state, p)
        assert not torch.allclose(averages, p)
        torch.testing.assert_close(result.params_of(i), averages)
        loss = ((averages - torch.tensor([2.0, 1.0])) ** 2).sum()
        torch.testing.assert_close(result.losses[i], loss)
    assert result.diverged.tolist() == [False, False, True]
    assert result.params_of(2).isfinite().all()


# ---- diverging runs ------------------------------------------------------------------------------


def test_diverging_runs_are_marked_and_the_others_do_not_notice() -> None:
    tame, wild = [0.01, 0.1, 0.3], [1e30, 1e150]
    result, alone = (
        run(fo.sgd, learning_rate=[*tame, *wild]),
        run(fo.sgd, learning_rate=tame),
    )
    assert result.diverged.tolist() == [False] * 3 + [True] * 2
    assert torch.equal(result.curves[:3], alone.curves)
    assert torch.equal(stacked(result)[:3], stacked(alone))
    assert result.losses[3:].isinf().all()
    first_bad = (~result.curves[3].isfinite()).nonzero()[0, 0]
    assert 0 < first_bad < result.curves.shape[1] - 1
    assert result.curves[3, first_bad + 1 :].isnan().all()
    assert result.best == alone.best
    assert "diverged" in result.table()


def test_a_run_above_the_bound_stays_where_it_was() -> None:
    result = run(fo.sgd, learning_rate=[0.1, 30.0], bound=50.0)
    losses, model = train_alone(0, lambda ps: torch.optim.SGD(ps, lr=30.0), bound=50.0)
    assert 1 < len(losses) < result.curves.shape[1]
    assert result.diverged.tolist() == [False, True]
    torch.testing.assert_close(
        result.curves[1, : len(losses)], torch.tensor(losses, dtype=torch.float64)
    )
    assert result.curves[1, len(losses) :].isnan().all()
    torch.testing.assert_close(
        result.params_of(1), {k: p.detach() for k, p in model.named_parameters()}
    )


def test_without_a_run_that_ends_there_is_no_best() -> None:
    result = run(fo.sgd, learning_rate=[1e100, 1e150])
    with pytest.raises(ValueError, match="2 of 2 runs diverged"):
        _ = result.best


# ---- seeds ---------------------------------------------------------------------------------------


def test_a_run_depends_on_its_own_seed_only() -> None:
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    several, one = (
        run(fo.adam, learning_rate=[0.01, 0.1], seed=[5, 0, 7]),
        run(fo.adam, learning_rate=0.1, seed=7),
    )
    assert torch.equal(before, torch.random.get_rng_state())
    assert several.settings["seed"].tolist() == [5, 0, 7] * 2
    torch.testing.assert_close(several.curves[5], one.curves[0], rtol=1e-12, atol=0)
    assert (
        len(several.curves[:, 0].unique()) == 3
    )  # three beginnings, each with both settings
    assert one.best == {"learning_rate": 0.1}
    assert several.best.keys() == {"learning_rate"}


def test_the_best_setting_is_that_of_the_lowest_mean() -> None:
    result = fo.Sweep(
        settings={
            "learning_rate": torch.tensor([1.0, 1.0, 2.0, 2.0, 3.0, 3.0]),
            "seed": torch.tensor([0, 1] * 3),
        },
        curves=torch.ones(6, 4),
        losses=torch.tensor([0.1, 1.0, 0.5, 0.4, 0.0, math.inf]),
        diverged=torch.tensor([False] * 5 + [True]),
        params={"w": torch.arange(6.0)},
        fixed={"nesterov": True},
        module_of_runs=None,
    )
    assert result.best == {"learning_rate": 2.0, "nesterov": True}
    assert result.best_run == 3
    assert result.params_of() == {"w": torch.tensor(3.0)}
    assert result.table().splitlines()[1:4] == [
        "            2       0.45  0.4 to 0.5",
        "            1       0.55    0.1 to 1",
        "            3        inf    0 to inf  1 of 2 diverged",
    ]


def test_each_seed_has_its_own_noise_and_each_setting_the_same() -> None:
    def noise_only(eta: Any, key: Any) -> fo.GradientTransformation:
        return fo.chain(fo.scale(0.0), fo.add_noise(eta, 0.0, key), fo.scale(-1.0))

    result = fo.sweep(
        lambda: make_model(),
        DATA,
        noise_only,
        loss=mse_loss,
        steps=1,
        eta=[1.0, 4.0],
        key=3,
        seed=[0, 1],
    )
    start = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        start.append(torch.cat([p.detach().flatten() for p in make_model().parameters()]))
    drawn = start[0] - stacked(result)[0], start[1] - stacked(result)[1]
    assert not torch.isclose(drawn[0], drawn[1]).any()
    torch.testing.assert_close(start[0] - stacked(result)[2], 2 * drawn[0])
    tx = noise_only(1.0, fo.random.fold_in(fo.random.key(3), 1))
    gs = {name: torch.zeros_like(p[0]) for name, p in result.params.items()}
    updates, _ = tx.update(gs, tx.init(gs))
    torch.testing.assert_close(
        torch.cat([u.flatten() for u in updates.values()]), -drawn[1]
    )


def test_dropout_is_reproducible_and_off_in_validation() -> None:
    def noisy() -> nn.Module:
        return nn.Sequential(make_model(), nn.Dropout(0.5))

    results = [
        fo.sweep(
            noisy,
            DATA,
            fo.sgd,
            loss=mse_loss,
            steps=3,
            learning_rate=[0.1, 0.1],
            validation=HELD_OUT,
        )
        for _ in range(2)
    ]
    assert torch.equal(results[0].curves, results[1].curves)
    assert not torch.equal(results[0].curves[0], results[0].curves[1])
    model = results[0].module(1)
    assert model.training
    torch.testing.assert_close(
        mse_loss(model.eval()(HELD_OUT[0]), HELD_OUT[1]), results[0].losses[1]
    )


# ---- data ----------------------------------------------------------------------------------------


def test_batches_may_come_from_anywhere() -> None:
    batches = [
        (DATA[0][i : i + 8], DATA[1][i : i + 8]) for i in range(0, N, 8)
    ]  # the last has six
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(*DATA), batch_size=8
    )
    sweep = functools.partial(
        fo.sweep, make_model, optimizer=fo.adam, loss=mse_loss, learning_rate=[0.1, 0.01]
    )
    first = sweep(batches, epochs=2)
    assert first.curves.shape == (2, 6)
    assert torch.equal(first.curves, sweep(loader, epochs=2).curves)
    assert torch.equal(first.curves, sweep(iter(batches * 2), steps=6).curves)
    assert torch.equal(first.curves[:, :5], sweep(batches, steps=5).curves)


def test_without_batch_size_every_step_sees_everything() -> None:
    result = fo.sweep(
        make_model, DATA, fo.sgd, loss=mse_loss, epochs=3, learning_rate=0.1, seed=[0, 1]
    )
    assert result.curves.shape == (2, 3)
    torch.manual_seed(1)
    torch.testing.assert_close(
        result.curves[1, 0], mse_loss(make_model()(DATA[0]), DATA[1]).detach()
    )


def test_validation_decides() -> None:
    result = run(fo.sgd, learning_rate=[1e-3, 0.3], validation=HELD_OUT)
    for i in range(2):
        torch.testing.assert_close(
            result.losses[i],
            mse_loss(result.module(i)(HELD_OUT[0]), HELD_OUT[1]).detach(),
        )
    uneven = [tuple(t[:20] for t in HELD_OUT), tuple(t[20:] for t in HELD_OUT)]
    torch.testing.assert_close(
        run(fo.sgd, learning_rate=[1e-3, 0.3], validation=uneven).losses, result.losses
    )
    without = run(fo.sgd, learning_rate=[1e-3, 0.3])
    torch.testing.assert_close(
        without.losses, without.curves[:, -1:].mean(1)
    )  # a tenth of 12 steps is one


# ---- what comes out ------------------------------------------------------------------------------


def test_the_best_as_a_module() -> None:
    model = nn.Sequential(make_model(), nn.BatchNorm1d(1).double().eval())
    before = {k: v.clone() for k, v in model.state_dict().items()}
    result = fo.sweep(
        model, DATA, fo.adam, loss=mse_loss, steps=5, learning_rate=[1e-4, 0.1]
    )
    best = result.module()
    torch.testing.assert_close(dict(best.named_parameters()), result.params_of(1))
    assert all(
        torch.equal(before[k], v) for k, v in model.state_dict().items()
    )  # what was given is left alone
    assert fo.adam(**result.best).name == "adam"
    best[0][0].weight.data.zero_()
    assert not torch.equal(
        result.params["0.0.weight"][1], torch.zeros(4, 3).double()
    )  # a copy


def test_the_table_shows_the_best_first() -> None:
    result = run(fo.sgd, learning_rate=torch.logspace(-4, -1, 12))
    lines = result.table(rows=3).splitlines()
    assert len(lines) == 5
    shown = [float(line.split()[1]) for line in lines[1:4]]
    assert shown == sorted(shown)
    assert lines[-1] == "9 more settings; 0 of 12 runs diverged"
    assert repr(result) == result.table()


# ---- tables, bars and pictures -------------------------------------------------------------------


@pytest.mark.parametrize(("seed", "weight_decay"), [(0, 0.0), (range(2), [0.0, 0.1])])
def test_the_picture(seed: Any, weight_decay: Any, tmp_path: Any) -> None:
    pytest.importorskip("matplotlib")
    result = run(
        fo.adamw, learning_rate=[1e-3, 0.1, 1e200], weight_decay=weight_decay, seed=seed
    )
    figure = result.plot()
    left, right = figure.axes[:2]
    assert (left.get_xlabel(), left.get_xscale(), right.get_ylabel()) == (
        "learning_rate",
        "log",
        "training loss",
    )
    labels = left.get_legend_handles_labels()[1]
    assert "diverged" in labels and "best: learning_rate=0.1" in labels
    best = next(line for line in left.lines if line.get_label().startswith("best"))
    assert best.get_xdata()[0] == 0.1
    figure.savefig(tmp_path / "sweep.png")
    assert (tmp_path / "sweep.png").stat().st_size > 10_000


def test_rich_prints_a_table_and_a_bar(capsys: pytest.CaptureFixture) -> None:
    rich = pytest.importorskip("rich")
    result = run(fo.sgd, learning_rate=[0.1, 0.2], progress=True)
    assert "2 runs" in capsys.readouterr().out
    rich.print(result)
    assert "learning_rate" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("library", "call"),
    [
        ("rich.progress", lambda: run(fo.sgd, learning_rate=[0.1], progress=True)),
        ("rich.table", lambda: run(fo.sgd, learning_rate=[0.1]).__rich__()),
        ("matplotlib.figure", lambda: run(fo.sgd, learning_rate=[0.1]).plot()),
    ],
)
def test_without_the_extra_the_message_says_what_to_install(
    library: str, call: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(
        ModuleNotFoundError,
        match=rf"needs {library.partition('.')[0]}: pip install 'functorch_opt\[viz\]'",
    ):
        call()


# ---- compiled ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_compiled_equals_eager_and_compiles_once() -> None:
    kwargs: dict[str, Any] = dict(
        learning_rate=[1e-3, 0.1, 1e100], momentum=[0.0, 0.9], seed=range(2)
    )
    eager = run(fo.sgd, **kwargs)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    compiled = run(fo.sgd, compile=True, **kwargs)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before + 1
    torch.testing.assert_close(compiled.curves[:8], eager.curves[:8], rtol=1e-9, atol=0)
    assert (
        compiled.diverged.tolist() == eager.diverged.tolist() == [False] * 8 + [True] * 4
    )
    tame = run(fo.sgd, compile=True, **{**kwargs, "learning_rate": [1e-3, 0.1, 0.2]})
    assert torch.equal(
        compiled.curves[:8], tame.curves[:8]
    )  # not a bit of those that diverged


def test_long_sweeps_are_compiled_unless_told_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compiled = []
    monkeypatch.setattr(
        torch, "compile", lambda step, **_: (compiled.append(step), step)[1]
    )
    monkeypatch.setattr("functorch_opt.sweeps.sweep.COMPILE_FROM", 6)
    for steps, compile, times in (
        (5, None, 0),
        (6, None, 1),
        (6, False, 1),
        (5, True, 2),
    ):
        fo.sweep(
            lambda ps, x: (ps["w"] * x).sum(),
            (torch.ones(3),),
            fo.sgd,
            learning_rate=[0.1],
            params={"w": torch.ones(3)},
            steps=steps,
            compile=compile,
        )
        assert len(compiled) == times


@pytest.mark.slow
def test_every_sweep_of_a_process_compiles_however_many_there_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        torch, "compile", functools.partial(torch.compile, backend="eager")
    )
    for i in range(3):  # a function that gives up warns, and warnings are errors
        loss = lambda p, i=i: (p**2 + i).sum()  # noqa: E731
        with torch._dynamo.config.patch(recompile_limit=1):
            result = fo.sweep(
                loss,
                (),
                fo.sgd,
                params=torch.ones(2),
                steps=1,
                learning_rate=[0.1, 0.2],
                compile=True,
            )
        assert result.curves[0, 0] == 2 + 2 * i


def test_without_a_compiler_it_runs_eagerly_and_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(*args: Any) -> None:
        raise RuntimeError("no working C++ compiler")

    eager = run(fo.sgd, learning_rate=[0.1, 0.2])
    monkeypatch.setattr(torch, "compile", lambda f, **kwargs: fails)
    with pytest.warns(UserWarning, match=r"runs eagerly.*no working C\+\+ compiler"):
        assert torch.equal(
            run(fo.sgd, learning_rate=[0.1, 0.2], compile=True).curves, eager.curves
        )


# ---- errors --------------------------------------------------------------------------------------

LR = {"learning_rate": [0.1, 0.2]}
MODEL = make_model()


def bad(*args: Any, **kwargs: Any) -> Callable[[], Any]:
    return lambda: fo.sweep(*args, **{"loss": mse_loss, **kwargs})


ERRORS = {
    "transformation": (
        bad(MODEL, DATA, fo.adam(0.1), steps=1),
        TypeError,
        r"adamw and not adamw\(0.1\); got adam\(0.1\)",
    ),
    "unknown": (
        bad(MODEL, DATA, fo.adam, steps=1, lr=[0.1]),
        TypeError,
        r"its arguments are \['learning_rate'.*given \['lr'\]",
    ),
    "missing": (
        bad(MODEL, DATA, fo.adam, steps=1, b1=[0.1]),
        TypeError,
        "missing a required argument: 'learning_rate'",
    ),
    "negative": (
        bad(MODEL, DATA, fo.adam, steps=1, learning_rate=[0.1, -1.0]),
        ValueError,
        r"learning_rate must be in \[0, inf\); got -1.0",
    ),
    "b1": (
        bad(MODEL, DATA, fo.adam, steps=1, **LR, b1=torch.tensor([0.5, 1.0])),
        ValueError,
        r"b1 must be in \[0, 1\); got 1.0",
    ),
    "bools": (
        bad(MODEL, DATA, fo.adam, steps=1, **LR, nesterov=[True, False]),
        TypeError,
        "nesterov=.*chooses between rules",
    ),
    "matrix": (
        bad(MODEL, DATA, fo.adam, steps=1, learning_rate=torch.ones(2, 2)),
        TypeError,
        r"learning_rate has shape \(2, 2\)",
    ),
    "empty": (
        bad(MODEL, DATA, fo.adam, steps=1, learning_rate=[]),
        TypeError,
        r"learning_rate=\[\] must be numbers",
    ),
    "not made": (
        bad(MODEL, DATA, lambda learning_rate: 3, steps=1, **LR),
        TypeError,
        "must return a transformation.*it returned int 3",
    ),
    "no loss": (
        bad(MODEL, DATA, fo.adam, steps=1, loss=None, **LR),
        TypeError,
        "a module needs loss=",
    ),
    "loss and params": (
        bad(MODEL, DATA, fo.adam, steps=1, params={}, **LR),
        TypeError,
        r"params= goes with a function loss\(params",
    ),
    "no module": (
        bad(lambda: 3, DATA, fo.adam, steps=1, **LR),
        TypeError,
        "it made int 3",
    ),
    "batch norm": (
        bad(nn.Sequential(nn.BatchNorm1d(3)), DATA, fo.adam, steps=1, **LR),
        TypeError,
        "'0' is BatchNorm1d.*GroupNorm",
    ),
    "one module": (
        bad(MODEL, DATA, fo.adam, steps=1, seed=[0, 1], **LR),
        TypeError,
        "2 seeds need a function without arguments",
    ),
    "seed": (
        bad(make_model, DATA, fo.adam, steps=1, seed=0.5, **LR),
        TypeError,
        "seed must be a whole number.*got 0.5",
    ),
    "same seeds": (
        bad(make_model, DATA, fo.adam, steps=1, seed=[1, 1], **LR),
        TypeError,
        "several different ones",
    ),
    "how long": (
        bad(MODEL, DATA, fo.adam, **LR),
        TypeError,
        "either steps= or epochs=; got steps=None and epochs=None",
    ),
    "too long": (
        bad(MODEL, DATA, fo.adam, steps=1, epochs=1, **LR),
        TypeError,
        "either steps= or epochs=",
    ),
    "no steps": (
        bad(MODEL, DATA, fo.adam, steps=0, **LR),
        ValueError,
        "steps must be a whole number, at least 1; got 0",
    ),
    "large batch": (
        bad(MODEL, DATA, fo.adam, steps=1, batch_size=23, **LR),
        ValueError,
        "batch_size=23 takes that many",
    ),
    "batched": (
        bad(MODEL, [DATA], fo.adam, steps=1, batch_size=2, **LR),
        TypeError,
        "its batches are made already",
    ),
    "list of tensors": (
        bad(MODEL, list(DATA), fo.adam, steps=1, **LR),
        TypeError,
        r"data must be a tuple of tensors, \(x, y\)",
    ),
    "no data": (bad(MODEL, 3, fo.adam, steps=1, **LR), TypeError, "got int 3"),
    "used up": (
        bad(MODEL, iter([DATA]), fo.adam, steps=2, **LR),
        ValueError,
        "data ended after 1 batches",
    ),
    "no length": (
        bad(MODEL, iter([DATA]), fo.adam, epochs=2, **LR),
        ValueError,
        "does not say how long an epoch is",
    ),
    "no validation": (
        bad(MODEL, DATA, fo.adam, steps=1, validation=[], **LR),
        ValueError,
        "validation holds no example",
    ),
    "shapes": (
        bad(MODEL, (DATA[0][:, :2], DATA[1]), fo.adam, steps=1, compile=False, **LR),
        RuntimeError,
        "mat1|shapes|size",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_bad_input(case: str) -> None:
    call, kind, message = ERRORS[case]
    with pytest.raises(kind, match=message):
        call()


def test_a_sweep_of_a_function_has_no_module() -> None:
    result = fo.sweep(lambda p: p**2, (), fo.sgd, params=torch.tensor(1.0), steps=1, **LR)
    with pytest.raises(TypeError, match=r"params_of"):
        result.module()
    torch.testing.assert_close(result.params_of(0), torch.tensor(0.8))
    assert vmap(torch.sin)(result.params).shape == (2,)
