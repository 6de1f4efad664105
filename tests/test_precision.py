"""Low precision: float32 copies of bfloat16 and float16 parameters, float32 states, and torch's
tools for mixed precision.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import vmap

import functorch_opt as fo
from functorch_opt import tree
from functorch_opt._core.wrap import Wrap
from functorch_opt._execution.segments import PROGRAMS

LOW = [torch.bfloat16, torch.float16]


def make_params(dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"w": (16, 8), "b": (8,), "s": ()}
    return {
        name: torch.randn(shape, generator=generator).to(dtype)
        for name, shape in shapes.items()
    }


def grads(step: int, dtype: torch.dtype) -> dict[str, Tensor]:
    return make_params(dtype, seed=100 + step)


def run(
    tx: fo.GradientTransformation,
    ps: dict,
    state: object,
    steps: range,
    dtype: torch.dtype,
) -> tuple[dict, object]:
    for step in steps:
        updates, state = tx.update(grads(step, dtype), state, ps)
        ps = fo.apply_updates(ps, updates)
        if isinstance(tx, Wrap):
            for p, m in zip(ps.values(), fo.get(state, "master").values(), strict=True):
                assert torch.equal(m.to(dtype), p)
    return ps, state


# ---- the rounded master --------------------------------------------------------------------------


def every(dtype: torch.dtype) -> Tensor:
    """All 65,536 numbers of a 16-bit dtype."""
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


def check_steps(p: Tensor, master: Tensor, u: Tensor) -> None:
    """The parameter is the rounded copy, bit for bit, and the copy is the exact sum up to its
    rounding.
    """
    tx = fo.keep_master_weights(fo.identity())
    state = tx.init([p])
    state["kept"].slots["master"][0] = master
    updates, state = tx.update([u], state, [p])
    new, copied = fo.apply_updates([p], updates)[0], state["kept"].slots["master"][0]
    rounded = copied.to(p.dtype)
    assert copied.dtype == torch.float32 and new.dtype == p.dtype
    alike = (new.view(torch.int16) == rounded.view(torch.int16)) | (
        new.isnan() & rounded.isnan()
    )
    assert alike.all()
    in_place = p.clone().add_(updates[0])  # as the stateful optimizers write it
    assert (
        (in_place.view(torch.int16) == rounded.view(torch.int16))
        | (in_place.isnan() & rounded.isnan())
    ).all()
    exact = master + u
    ordinary = p.isfinite() & copied.isfinite() & exact.isfinite()
    near = (
        ordinary
        & (exact.abs() <= 2 * p.float().abs())
        & (exact.abs() >= p.float().abs() / 2)
        & (exact.sign() == p.float().sign())
    )
    assert torch.equal(copied[near], exact[near])
    largest = torch.maximum(p.float().abs(), exact.abs()).clamp(
        min=torch.finfo(torch.float32).tiny
    )
    assert ((copied - exact).abs()[ordinary] <= 2.0**-23 * largest[ordinary]).all()


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_the_parameters_are_the_rounded_copy_for_every_number(dtype: torch.dtype) -> None:
    """All 16-bit numbers, with copies all over the interval that rounds to each, and updates from
    zero to far too large.
    """
    p = every(dtype)
    assert p.numel() == p.view(torch.int16).unique().numel() == 2**16
    generator = torch.Generator().manual_seed(0)
    bits = p.float().view(torch.int32)
    inside, half = (
        0,
        2 ** (15 if dtype == torch.bfloat16 else 12),
    )  # of the float32 bits between two neighbours
    for _ in range(12):
        master = (
            bits
            + torch.randint(
                -half, half, bits.shape, generator=generator, dtype=torch.int32
            )
        ).view(torch.float32)
        rounds = master.to(dtype).view(torch.int16) == p.view(torch.int16)
        master = torch.where(rounds, master, p.float())
        inside += int((rounds & (master != p.float())).sum())
        relative = torch.randn(p.shape, generator=generator) * 10.0 ** torch.randint(
            -8, 3, p.shape, generator=generator
        )
        for u in (
            torch.zeros_like(master),
            relative * master,
            -master,
            -master * (1 + 2.0**-20 * relative),
            p.float().flip(0),
            torch.randn(p.shape, generator=generator)
            * 10.0 ** torch.randint(-44, 38, p.shape, generator=generator),
            torch.full_like(master, float("inf")),
            torch.full_like(master, float("nan")),
        ):
            check_steps(p, master, u)
    assert inside > 2**17


def test_the_exact_sum_could_not_be_reached_by_adding() -> None:
    """This is why the copy is p + u and not m + g: from 2.0 no float32 update leads to -2^-23."""
    p, master, g = (
        torch.tensor([2.0], dtype=torch.bfloat16),
        torch.tensor([2.0 - 2.0**-23]),
        torch.tensor([-2.0]),
    )
    exact = master + g
    assert master.to(torch.bfloat16) == p and exact == -(2.0**-23)
    for u in (
        exact - p,
        torch.nextafter(exact - p, torch.tensor(0.0)),
        torch.nextafter(exact - p, torch.tensor(-3.0)),
    ):
        assert (p + u).to(torch.bfloat16) != exact.to(torch.bfloat16)
    check_steps(p, master, g)


def test_an_overflow_takes_the_copy_along() -> None:
    tx, p = (
        fo.keep_master_weights(fo.identity()),
        [torch.tensor([65504.0], dtype=torch.float16)],
    )
    updates, state = tx.update([torch.tensor([5000.0])], tx.init(p), p)
    p = fo.apply_updates(p, updates)
    assert p[0].isinf() and fo.get(state, "master")[0] == 70504.0
    updates, state = tx.update([torch.tensor([-5000.0])], state, p)
    assert fo.apply_updates(p, updates)[0].isnan() and fo.get(state, "master")[0].isnan()


# ---- what it is for ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_small_steps_add_up(dtype: torch.dtype) -> None:
    step = 2.0**-14
    params = {"w": torch.ones(3, dtype=dtype)}
    ends = []
    for tx in (fo.sgd(step), fo.keep_master_weights(fo.sgd(step))):
        ps, state = params, tx.init(params)
        for _ in range(4096):
            updates, state = tx.update({"w": torch.ones(3, dtype=dtype)}, state, ps)
            ps = fo.apply_updates(ps, updates)
        ends.append(ps["w"])
    assert (ends[0] == 1).all() and (ends[1] == 0.75).all()


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_the_copy_takes_the_steps_of_torchs_adamw_in_float32(dtype: torch.dtype) -> None:
    """The same gradients, float32 parameters in torch: the decay reads the copy too."""
    start = make_params(dtype)
    theirs = [nn.Parameter(p.float()) for p in start.values()]
    reference = torch.optim.AdamW(theirs, lr=0.01, weight_decay=0.5)
    tx = fo.keep_master_weights(fo.adamw(0.01, weight_decay=0.5))
    ps, state = start, tx.init(start)
    for step in range(60):
        ps, state = run(tx, ps, state, range(step, step + 1), dtype)
        for q, g in zip(theirs, grads(step, dtype).values(), strict=True):
            q.grad = g.float()
        reference.step()
    for p, m, q, s in zip(
        ps.values(), fo.get(state, "master").values(), theirs, start.values(), strict=True
    ):
        torch.testing.assert_close(m, q.detach(), rtol=1e-5, atol=1e-6)
        assert torch.equal(p, m.to(dtype)) and (p != s).any() and (m != p.float()).any()


def test_a_stage_inside_reads_the_copy() -> None:
    p = {"w": torch.tensor([1.0], dtype=torch.bfloat16)}
    tx = fo.keep_master_weights(fo.chain(fo.add_decayed_weights(1.0), fo.scale(-1.0)))
    state = tx.init(p)
    state["kept"].slots["master"]["w"] = torch.tensor([1.001])
    _, state = tx.update({"w": torch.tensor([0.0], dtype=torch.bfloat16)}, state, p)
    assert (
        fo.get(state, "master")["w"].abs() < 1e-7
    )  # 1.001 - 1.001; with the parameter itself it would be 0.001


def test_what_was_set_from_outside_counts() -> None:
    """Clamped after every step, as for a Wasserstein critic: the copy does not run away."""
    tx = fo.keep_master_weights(fo.sgd(0.25))
    ps, state = {"w": torch.tensor([0.5, 0.5], dtype=torch.bfloat16)}, None
    state = tx.init(ps)
    for _ in range(4):
        updates, state = tx.update(
            {"w": torch.tensor([-1.0, 1e-3], dtype=torch.bfloat16)}, state, ps
        )
        ps = {"w": fo.apply_updates(ps, updates)["w"].clamp(-0.75, 0.75)}
    torch.testing.assert_close(
        fo.get(state, "master")["w"],
        torch.tensor([1.0, 0.5 - 4 * 0.25e-3]),
        rtol=1e-3,
        atol=0,
    )
    updates, _ = tx.update(
        {"w": torch.tensor([1.0, 0.0], dtype=torch.bfloat16)}, state, ps
    )
    assert fo.apply_updates(ps, updates)["w"][0] == 0.5


def test_a_missing_gradient_leaves_the_copy_alone() -> None:
    tx = fo.keep_master_weights(fo.adamw(0.1))
    ps, state = run(
        tx,
        make_params(torch.bfloat16),
        tx.init(make_params(torch.bfloat16)),
        range(2),
        torch.bfloat16,
    )
    gs = grads(2, torch.bfloat16)
    gs["w"] = None
    updates, new = tx.update(gs, state, ps)
    assert updates["w"] is None and torch.equal(
        fo.get(new, "master")["w"], fo.get(state, "master")["w"]
    )
    assert not torch.equal(fo.get(new, "master")["b"], fo.get(state, "master")["b"])


# ---- everywhere ----------------------------------------------------------------------------------


def test_vmapped_equals_a_loop() -> None:
    tx = fo.keep_master_weights(fo.adamw(0.1))
    stacks = [make_params(torch.bfloat16, seed) for seed in range(3)]

    def train(ps: dict, *gradients: dict) -> tuple[dict, object]:
        state = tx.init(ps)
        for g in gradients:
            updates, state = tx.update(g, state, ps)
            ps = fo.apply_updates(ps, updates)
        return ps, state

    gs = [
        [make_params(torch.bfloat16, 10 * i + step) for i in range(3)]
        for step in range(3)
    ]
    stacked = [tree.map(lambda *xs: torch.stack(xs), *trees) for trees in (stacks, *gs)]
    together = vmap(train)(*stacked)
    alone = [train(stacks[i], *[g[i] for g in gs]) for i in range(3)]
    for a, b in zip(
        tree.leaves(together), zip(*map(tree.leaves, alone), strict=True), strict=True
    ):
        torch.testing.assert_close(a, torch.stack(b), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_the_adapter_keeps_the_copy_beside_the_slots_and_goes_on_after_a_checkpoint(
    dtype: torch.dtype,
) -> None:
    """With a scheduler: the group's lr multiplies inside, before the copy is made."""

    def build() -> tuple[
        list[nn.Parameter], torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler
    ]:
        params = [nn.Parameter(p) for p in make_params(dtype).values()]
        opt = fo.optim.Optimizer(
            params,
            fo.chain(fo.clip_by_global_norm(1.0), fo.keep_master_weights(fo.adamw(0.1))),
        )
        return params, opt, torch.optim.lr_scheduler.ExponentialLR(opt, 0.7)

    def train(
        params: list,
        opt: torch.optim.Optimizer,
        sched: torch.optim.lr_scheduler.LRScheduler,
        steps: range,
    ) -> None:
        for step in steps:
            for p, g in zip(params, grads(step, dtype).values(), strict=True):
                p.grad = g
            opt.step()
            sched.step()
            for p in params:
                master = opt.state[p]["keep_master_weights/kept/master"]
                assert master.dtype == torch.float32 and torch.equal(
                    p.detach(), master.to(dtype)
                )

    params, opt, sched = build()
    train(params, opt, sched, range(3))
    assert sorted(opt.state[params[0]]) == [
        "keep_master_weights/inner/scale_by_adam/count",
        "keep_master_weights/inner/scale_by_adam/mu",
        "keep_master_weights/inner/scale_by_adam/nu",
        "keep_master_weights/kept/master",
    ]
    file = io.BytesIO()
    torch.save([opt.state_dict(), sched.state_dict(), [p.detach() for p in params]], file)
    file.seek(0)
    saved = torch.load(file)
    others, other, sched2 = build()
    with torch.no_grad():
        for p, q in zip(others, saved[2], strict=True):
            p.copy_(q)
    other.load_state_dict(saved[0], strict=True)
    sched2.load_state_dict(saved[1])
    train(params, opt, sched, range(3, 6))
    train(others, other, sched2, range(3, 6))
    # by hand: the schedule inside
    tx = fo.chain(
        fo.clip_by_global_norm(1.0),
        fo.keep_master_weights(
            fo.chain(
                fo.adamw(0.1), fo.scale_by_schedule(fo.exponential_decay(1.0, 1, 0.7))
            )
        ),
    )
    ps = make_params(dtype)
    ps, _ = run(tx, ps, tx.init(ps), range(6), dtype)
    for p, q, r in zip(params, others, ps.values(), strict=True):
        assert torch.equal(p, q)
        torch.testing.assert_close(p.detach(), r)
        assert (p.detach() == r).float().mean() > 0.95


def test_part_of_a_model() -> None:
    """The usual mixed model: bfloat16 matrices with a copy, float32 norms without; one lr for both,
    by a scheduler.
    """
    params = {
        "w": nn.Parameter(torch.ones(4, dtype=torch.bfloat16)),
        "norm": nn.Parameter(torch.ones(4)),
    }
    tx = fo.partition(
        {"low": fo.keep_master_weights(fo.sgd(0.001)), "rest": fo.sgd(0.001)},
        lambda path, p: "low" if p.dtype == torch.bfloat16 else "rest",
    )
    opt = fo.optim.Optimizer(params.items(), tx)
    opt.param_groups[0]["lr"] = 0.5
    for _ in range(100):
        for p in params.values():
            p.grad = torch.ones_like(p)
        opt.step()
    torch.testing.assert_close(
        opt.state[params["w"]]["partition/low/kept/master"], torch.full((4,), 0.95)
    )
    torch.testing.assert_close(params["norm"].detach(), torch.full((4,), 0.95))
    assert (
        torch.equal(params["w"].detach(), torch.full((4,), 0.95).bfloat16())
        and "partition/low/kept/master" not in opt.state[params["norm"]]
    )


@pytest.mark.slow
def test_compiled_in_place_equals_update() -> None:
    tx = fo.chain(
        fo.clip_by_global_norm(1.0),
        fo.keep_master_weights(fo.adamw(0.1)),
        fo.params_ema(0.9),
    )
    ps = make_params(torch.bfloat16)
    PROGRAMS.clear()
    state, step = tx.init(ps), fo.compiled_step(tx, donate=False)
    mine, ours = ps, state
    graph = torch.compile(
        lambda g, s, p: tx.update(g, s, p), fullgraph=True, backend="aot_eager"
    )
    for i in range(4):
        gs = grads(i, torch.bfloat16)
        compiled, _ = graph(gs, state, ps)
        updates, state = tx.update(gs, state, ps)
        ps = fo.apply_updates(ps, updates)
        mine, ours = step(mine, gs, ours)
        for a, b in zip(
            tree.leaves((updates, state)), tree.leaves((compiled, ours)), strict=True
        ):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        for p, q, m in zip(
            ps.values(), mine.values(), fo.get(ours, "master").values(), strict=True
        ):
            torch.testing.assert_close(p, q)
            assert torch.equal(q, m.to(torch.bfloat16))
    assert sum(map(len, PROGRAMS.values())) == 1, (
        "clipping, moments, decay, master copy and average are one pass"
    )


@pytest.mark.slow
def test_the_adapter_compiled() -> None:
    runs = []
    for compile in (False, True):
        params = [nn.Parameter(p) for p in make_params(torch.bfloat16).values()]
        opt = fo.optim.Optimizer(
            params, fo.keep_master_weights(fo.adamw(0.1)), compile=compile
        )
        for step in range(4):
            for p, g in zip(params, grads(step, torch.bfloat16).values(), strict=True):
                p.grad = g
            opt.step()
        masters = [opt.state[p]["keep_master_weights/kept/master"] for p in params]
        assert all(
            torch.equal(p.detach(), m.bfloat16())
            for p, m in zip(params, masters, strict=True)
        )
        runs.append([*(p.detach() for p in params), *masters])
    for a, b in zip(*runs, strict=True):
        torch.testing.assert_close(a, b)


def test_it_prints_pickles_and_teaches() -> None:
    tx = fo.keep_master_weights(fo.adamw(0.1))
    assert (
        repr(tx)
        == repr(pickle.loads(pickle.dumps(tx)))
        == "keep_master_weights(adamw(0.1))"
    )
    p = {"w": torch.ones(2, dtype=torch.bfloat16)}
    with pytest.raises(
        TypeError, match=r"takes a transformation, e\.g\. adamw\(1e-3\); got float 0\.1"
    ):
        fo.keep_master_weights(0.1)
    with pytest.raises(ValueError, match="keep_master_weights reads the parameters"):
        tx.update(p, tx.init(p))
    with pytest.raises(
        ValueError, match="not a state of keep_master_weights, which has inner and kept"
    ):
        tx.update(p, fo.adamw(0.1).init(p), p)
    with pytest.raises(
        ValueError,
        match=r"keep_master_weights looks at the new parameters.*last.*clip after it",
    ):
        fo.chain(tx, fo.clip(1.0))


# ---- without it: float32 states ------------------------------------------------------------------


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (
            lambda ps: fo.optim.AdamW(ps, lr=0.01),
            lambda ps: torch.optim.AdamW(ps, lr=0.01),
        ),
        (
            lambda ps: fo.optim.SGD(ps, lr=0.01, momentum=0.9),
            lambda ps: torch.optim.SGD(ps, lr=0.01, momentum=0.9),
        ),
        (
            lambda ps: fo.optim.Optimizer(
                ps, fo.adamw, learning_rate=0.01, weight_decay=0.01
            ),
            lambda ps: torch.optim.AdamW(ps, lr=0.01),
        ),
    ],
    ids=["AdamW", "SGD", "generic"],
)
def test_low_precision_parameters_with_float32_state(
    dtype: torch.dtype, ours: Callable, theirs: Callable
) -> None:
    """The state is that of torch's float32 run with the same gradients; the step is rounded once,
    to the parameter's dtype.
    """
    params = [nn.Parameter(p) for p in make_params(dtype).values()]
    opt = ours(params)
    wide = [nn.Parameter(p.detach().float()) for p in params]
    reference = theirs(wide)
    for step in range(20):
        for p, q, g in zip(params, wide, grads(step, dtype).values(), strict=True):
            p.grad, q.grad = g, g.float()
            with torch.no_grad():
                q.copy_(p)  # the reference starts each step from the rounded parameter
        opt.step()
        reference.step()
        for p, q in zip(params, wide, strict=True):
            largest = float(q.detach().abs().max())
            torch.testing.assert_close(
                p.detach(),
                q.detach().to(dtype),
                rtol=0,
                atol=2 * torch.finfo(dtype).eps * largest,
            )
            assert (p.detach() == q.detach().to(dtype)).float().mean() > 0.95
    for p, q in zip(params, wide, strict=True):
        mine = {key.rpartition("/")[2]: value for key, value in opt.state[p].items()}
        for names in (
            ("mu", "exp_avg"),
            ("nu", "exp_avg_sq"),
            ("momentum_buffer", "momentum_buffer"),
        ):
            value = next((mine[n] for n in names if n in mine), None)
            if value is not None:
                assert value.dtype == torch.float32
                torch.testing.assert_close(
                    value, reference.state[q][names[1]], rtol=1e-5, atol=1e-7
                )


# ---- torch's tools -------------------------------------------------------------------------------


def model_and_data() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    return (
        nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1)),
        torch.randn(64, 4),
        torch.randn(64, 1),
    )


PAIRS = {
    "AdamW": (
        lambda ps: fo.optim.AdamW(ps, lr=0.01),
        lambda ps: torch.optim.AdamW(ps, lr=0.01),
    ),
    "SGD": (
        lambda ps: fo.optim.SGD(ps, lr=0.05, momentum=0.9),
        lambda ps: torch.optim.SGD(ps, lr=0.05, momentum=0.9),
    ),
    "generic": (
        lambda ps: fo.optim.Optimizer(
            ps, fo.adamw, learning_rate=0.01, weight_decay=0.01
        ),
        lambda ps: torch.optim.AdamW(ps, lr=0.01, weight_decay=0.01),
    ),
}


def same_trajectory(
    pair: tuple[Callable, Callable],
    loop: Callable[[nn.Module, torch.optim.Optimizer], list[float]],
) -> None:
    model, *_ = model_and_data()
    twin, start = copy.deepcopy(model), copy.deepcopy(model)
    losses = [
        loop(m, build(m.parameters()))
        for m, build in zip((model, twin), pair, strict=True)
    ]
    torch.testing.assert_close(
        torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=1e-3, atol=1e-4
    )
    for p, q, s in zip(
        model.parameters(), twin.parameters(), start.parameters(), strict=True
    ):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)
        assert not torch.equal(p, s)


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
def test_autocast_loops_follow_torchs(pair: tuple[Callable, Callable]) -> None:
    _, x, y = model_and_data()

    def loop(model: nn.Module, opt: torch.optim.Optimizer) -> list[float]:
        losses = []
        for _ in range(20):
            opt.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                out = model(x)
                loss = nn.functional.mse_loss(out.float(), y)
            assert out.dtype == torch.bfloat16
            loss.backward()
            opt.step()
            losses.append(loss.item())
        return losses

    same_trajectory(pair, loop)


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
def test_grad_scaler_loops_follow_torchs(pair: tuple[Callable, Callable]) -> None:
    """A skipped step changes neither parameters nor state; unscale_, then clip, then step; the
    scale grows and shrinks as with torch.
    """
    _, x, y = model_and_data()

    def loop(model: nn.Module, opt: torch.optim.Optimizer) -> list[float]:
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
        scales = []
        for step in range(20):
            opt.zero_grad()
            with torch.autocast("cpu", dtype=torch.float16):
                loss = nn.functional.mse_loss(model(x).float(), y)
            scaler.scale(loss).backward()
            if step in (0, 7):
                model[0].weight.grad[0, 0] = float("inf") if step else float("nan")
            before = copy.deepcopy(
                ([p.detach() for p in model.parameters()], opt.state_dict()["state"])
            )
            scaler.unscale_(opt)
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            scaler.step(opt)
            scaler.update()
            after = [p.detach() for p in model.parameters()], opt.state_dict()["state"]
            still = all(map(torch.equal, tree.leaves(before[0]), tree.leaves(after[0])))
            assert still == (step in (0, 7))
            if still:
                assert all(
                    map(torch.equal, tree.leaves(before[1]), tree.leaves(after[1]))
                ) and len(before[1]) == len(after[1])
            scales.append(scaler.get_scale())
        assert min(scales) == 512.0 and max(scales) > 2048.0
        return scales

    same_trajectory(pair, loop)


# ---- error bits ----------------------------------------------------------------------------------


def with_errors(p: Tensor, error: Tensor) -> Tensor:
    """The copy that a parameter and its error bits stand for."""
    unit = 0 if error.dtype is torch.int16 else 8
    bits = p.detach().float().view(torch.int32) + (error.to(torch.int32) << unit)
    return bits.view(torch.float32)


def trained_with_errors(opt_of: Callable, steps: range, dtype: torch.dtype) -> tuple:
    """Parameters, and their optimizer, after some steps with the same bfloat16 gradients."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(300, 70, generator=generator).bfloat16()
    p = nn.Parameter(drawn.to(dtype))
    opt = opt_of([p])
    for _ in steps:
        g = torch.randn(300, 70, generator=generator).bfloat16()
        p.grad = g.to(dtype)
        opt.step()
    return p, opt


@pytest.mark.parametrize("compile", [False, True])
def test_16_error_bits_make_float32_training(compile: bool) -> None:
    inner = fo.adamw(0.003, weight_decay=0.1)
    with_bits = fo.keep_error_bits(inner)
    p, opt = trained_with_errors(
        lambda ps: fo.optim.Optimizer(ps, with_bits, compile=compile),
        range(30),
        torch.bfloat16,
    )
    wide, _ = trained_with_errors(
        lambda ps: fo.optim.Optimizer(ps, inner, compile=compile),
        range(30),
        torch.float32,
    )
    copy_of_p = with_errors(p, opt.state[p]["keep_error_bits/kept/error"])
    if compile:  # two kernels, which may differ in the last bit
        torch.testing.assert_close(copy_of_p, wide.detach(), rtol=1e-6, atol=1e-7)
    else:
        assert torch.equal(copy_of_p, wide)
    assert torch.equal(p, copy_of_p.bfloat16()) or (p != copy_of_p.bfloat16()).sum() < 9


@pytest.mark.parametrize(("bits", "most"), [(16, 2.0**-24), (8, 2.0**-15)])
def test_error_bits_are_what_rounding_has_lost(bits: int, most: float) -> None:
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(10_000, generator=generator).bfloat16()
    step = 0.001 * torch.randn(10_000, generator=generator)
    tx = fo.keep_error_bits(fo.identity(), bits)
    u, state = tx.update(step, tx.init(p), p)
    found = with_errors(fo.apply_updates(p, u), fo.get(state, "error"))
    exact = p.double() + step.double()
    assert ((found - exact).abs() <= most * exact.abs()).all()
    assert fo.get(state, "error").abs().max() > 2 ** (bits - 2)


def test_halves_and_what_is_not_finite() -> None:
    p = torch.tensor([1.0, 1.0078125, -1.0, 1.0, 1.0]).bfloat16()
    step = torch.tensor([2.0**-8, 2.0**-8, -(2.0**-8), torch.inf, torch.nan])
    tx = fo.keep_error_bits(fo.identity())
    u, state = tx.update(step, tx.init(p), p)
    new = fo.apply_updates(p, u)
    found = with_errors(new, fo.get(state, "error"))
    assert torch.equal(found[:3], p.float()[:3] + step[:3])
    assert new[3] == torch.inf and new[4].isnan()


@pytest.mark.parametrize("bits", [8, 16])
def test_error_bits_are_resumed(bits: int) -> None:
    tx = fo.keep_error_bits(fo.adamw(0.01), bits)
    opt_of = lambda ps: fo.optim.Optimizer(ps, tx)  # noqa: E731
    p, opt = trained_with_errors(opt_of, range(5), torch.bfloat16)
    saved = io.BytesIO()
    torch.save((p.detach(), opt.state_dict()), saved)
    saved.seek(0)
    weights, state = torch.load(saved, weights_only=True)
    q = nn.Parameter(weights)
    resumed = opt_of([q])
    resumed.load_state_dict(state, strict=True)
    for _ in range(3):
        g = torch.randn_like(p)
        p.grad, q.grad = g, g.clone()
        opt.step()
        resumed.step()
    assert torch.equal(p, q)
    name = "keep_error_bits/kept/error"
    assert torch.equal(opt.state[p][name], resumed.state[q][name])
    assert resumed.state[q][name].dtype is {8: torch.int8, 16: torch.int16}[bits]


def test_error_bits_that_there_are_not() -> None:
    with pytest.raises(ValueError, match="bits must be 8 or 16; got 4"):
        fo.keep_error_bits(fo.sgd(0.1), 4)
    with pytest.raises(TypeError, match="keep_error_bits takes a transformation"):
        fo.keep_error_bits(0.1)
