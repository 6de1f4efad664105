"""What has no counterpart elsewhere, against plain loops: mechanisms, averages, noise, privacy.

The loops know neither trees nor rules: they are what the docstrings say, one tensor at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from parity_page import assert_near, compares
from registry import distance_over_gradients
from test_authors import STEPS, assert_same, draw, plain_adam, train, train_plainly
from torch import Tensor

import functorch_opt as fo
from functorch_opt import random

PLAIN = "plain"


# ---- mechanisms --------------------------------------------------------------------------------------


@compares("every", reference=PLAIN)
@pytest.mark.parametrize(("k", "decay"), [(1, 0.9), (2, 0.9), (3, 0.5), (7, 0.0)])
def test_every(k: int, decay: float) -> None:
    def work(g, size, decay):
        return {"size": decay * size + (1 - decay) * g * g}

    def rule(g, size):
        return -0.1 * g / (size + 0.01).sqrt(), {"size": size}

    def make(p: Tensor) -> Callable:
        size = torch.zeros_like(p)

        def step(t: int, g: Tensor, p: Tensor) -> Tensor:
            nonlocal size
            if (t - 1) % k == 0:
                size = decay * size + (1 - decay) * g**2
            return p - 0.1 * g / (size + 0.01).sqrt()

        return step

    tx = fo.leafwise(
        rule,
        slots={"size": fo.tree.zeros_like},
        hyper={"decay": decay},
        every=fo.every(k, work),
    )
    assert_same(train(tx), train_plainly(make))


@compares("gate", reference=PLAIN)
@pytest.mark.parametrize(
    ("k", "otherwise"), [(1, "zero"), (2, "zero"), (3, "zero"), (3, "pass")]
)
def test_gate(k: int, otherwise: str) -> None:
    def make(p: Tensor) -> Callable:
        adam, worked = plain_adam(0.9, 0.999, 1e-8), 0

        def step(t: int, g: Tensor, p: Tensor) -> Tensor:
            nonlocal worked
            if (t - 1) % k == 0:
                worked += 1
                return p - 0.1 * adam(worked, g)
            return p + g if otherwise == "pass" else p

        return step

    tx = fo.gate(fo.adam(0.1), lambda count: count % k == 0, otherwise=otherwise)
    assert_same(train(tx), train_plainly(make))


@compares("wrap", reference=PLAIN)
@pytest.mark.parametrize(
    ("lr", "decay"), [(0.1, 0.5), (0.01, 0.9), (0.05, 0.0), (0.2, 0.1)]
)
def test_wrap(lr: float, decay: float) -> None:
    def before(g, p, ball, decay):
        return g + decay * p, p + decay * ball

    def after(u, ball, decay):
        ball = u + decay * ball
        return ball, {"ball": ball}

    def make(p: Tensor) -> Callable:
        adam, ball = plain_adam(0.9, 0.999, 1e-8), torch.zeros_like(p)

        def step(t: int, g: Tensor, p: Tensor) -> Tensor:
            nonlocal ball
            there = p + decay * ball
            u = -lr * (adam(t, g + decay * p) + 0.1 * there)
            ball = u + decay * ball
            return p + ball

        return step

    tx = fo.wrap(
        fo.adamw(lr, weight_decay=0.1),
        slots={"ball": fo.tree.zeros_like},
        hyper={"decay": decay},
        before=before,
        after=after,
    )
    assert_same(train(tx), train_plainly(make))


@compares("MultiSteps", reference=PLAIN, remark="with weights and flushes")
@pytest.mark.parametrize(
    ("k", "mean", "weighted", "flushed"),
    [
        (3, True, True, ()),
        (4, False, True, ()),
        (3, True, False, (7, 50, 51)),
        (5, True, True, (98,)),
    ],
)
def test_weighted_steps(
    k: int, mean: bool, weighted: bool, flushed: tuple[int, ...]
) -> None:
    def weight(t: int) -> float:
        return t * 7 % 11 + 0.5 if weighted else 1.0

    def make(p: Tensor) -> Callable:
        adam, made, gathered = plain_adam(0.9, 0.999, 1e-8), 0, []

        def step(t: int, g: Tensor, p: Tensor) -> Tensor:
            nonlocal made
            gathered.append((weight(t), g))
            if len(gathered) < k and t not in flushed:
                return p
            g = sum(w * g for w, g in gathered)
            g = g / sum(w for w, _ in gathered) if mean else g
            gathered.clear()
            made += 1
            return p - 0.1 * adam(made, g)

        return step

    tx = fo.MultiSteps(fo.adam(0.1), k, mean, weighted=weighted, flushes=True)
    ps, state = draw(0), tx.init(draw(0))
    for t in range(1, STEPS + 1):
        extra = {"weight": weight(t)} if weighted else {}
        updates, state = tx.update(draw(t), state, ps, flush=t in flushed, **extra)
        ps = fo.apply_updates(ps, updates)
    assert_same(ps, train_plainly(make))


@compares("largest", reference=PLAIN)
@pytest.mark.parametrize("first_distance", [1e-3, 0.01, 0.1, 1.0])
def test_largest(first_distance: float) -> None:
    start = ps = draw(0)
    distance = gathered = 0.0
    for t in range(1, STEPS + 1):
        gs = draw(t)
        moved = max((ps[name] - start[name]).abs().max().item() for name in ps)
        distance = max(distance, moved)
        gathered += sum(g.square().sum().item() for g in gs.values())
        rate = (distance + first_distance) / math.sqrt(gathered + 1e-8)
        ps = {name: p - rate * gs[name] for name, p in ps.items()}
    assert_same(train(distance_over_gradients(first_distance)), ps)


# ---- averages and copies -----------------------------------------------------------------------------


@compares("params_ema", reference=PLAIN)
@pytest.mark.parametrize("debias", [True, False])
@pytest.mark.parametrize("decay", [0.9, 0.5, 0.99])
def test_params_ema(decay: float, debias: bool) -> None:
    tx = fo.chain(fo.adam(0.1), fo.params_ema(decay, debias=debias))
    ps = draw(0)
    state = tx.init(ps)
    mean = {name: torch.zeros_like(p) if debias else p for name, p in ps.items()}
    for t in range(1, STEPS + 1):
        updates, state = tx.update(draw(t), state, ps)
        ps = fo.apply_updates(ps, updates)
        for name, p in ps.items():
            mean[name] = decay * mean[name] + (1 - decay) * p
        for name, average in fo.eval_params(tx, state, ps).items():
            assert_near(average, mean[name] / (1 - decay**t if debias else 1))


@compares(
    "keep_master_weights",
    reference="torch.optim",
    bound=1e-5,
    remark="float32 parameters there, bfloat16 and their copies here",
)
@pytest.mark.parametrize(
    ("inner", "theirs"),
    [
        (fo.sgd(0.1), lambda ps: torch.optim.SGD(ps, lr=0.1)),
        (fo.sgd(0.01, 0.9), lambda ps: torch.optim.SGD(ps, lr=0.01, momentum=0.9)),
        (fo.adam(0.01), lambda ps: torch.optim.Adam(ps, lr=0.01)),
        (
            fo.adamw(0.01, weight_decay=0.5),
            lambda ps: torch.optim.AdamW(ps, lr=0.01, weight_decay=0.5),
        ),
    ],
    ids=["sgd", "momentum", "adam", "adamw"],
)
def test_keep_master_weights(inner: fo.GradientTransformation, theirs: Callable) -> None:
    tx = fo.keep_master_weights(inner)
    ps = {name: p.bfloat16() for name, p in draw(0).items()}
    twins = {name: torch.nn.Parameter(p.float()) for name, p in ps.items()}
    state, optimizer = tx.init(ps), theirs(twins.values())
    for t in range(1, STEPS + 1):
        gs = {name: g.bfloat16() for name, g in draw(t).items()}
        updates, state = tx.update(gs, state, ps)
        ps = fo.apply_updates(ps, updates)
        for name, g in gs.items():
            twins[name].grad = g.float()
        optimizer.step()
    for name, copy in fo.get(state, "master").items():
        assert_near(copy, twins[name].detach(), 1e-5)
        assert torch.equal(ps[name], copy.bfloat16())


@compares(
    "keep_error_bits", reference="the same on float32 parameters", remark="bit for bit"
)
@pytest.mark.parametrize(
    "inner",
    [fo.sgd(0.1), fo.sgd(0.01, 0.9), fo.adam(0.01), fo.adamw(0.01, weight_decay=0.5)],
    ids=["sgd", "momentum", "adam", "adamw"],
)
def test_keep_error_bits(inner: fo.GradientTransformation) -> None:
    tx = fo.keep_error_bits(inner)
    ps = {name: p.bfloat16() for name, p in draw(0).items()}
    twins = {name: p.float() for name, p in ps.items()}
    state, theirs = tx.init(ps), inner.init(twins)
    for t in range(1, STEPS + 1):
        gs = {name: g.bfloat16() for name, g in draw(t).items()}
        updates, state = tx.update(gs, state, ps)
        ps = fo.apply_updates(ps, updates)
        wide = {name: g.float() for name, g in gs.items()}
        updates, theirs = inner.update(wide, theirs, twins)
        twins = fo.apply_updates(twins, updates)
    for name, error in fo.get(state, "error").items():
        bits = ps[name].float().view(torch.int32) + error.to(torch.int32)
        assert_near(bits.view(torch.float32), twins[name])
        assert torch.equal(bits.view(torch.float32), twins[name])


# ---- torch's options of functions ----------------------------------------------------------------------


@compares("asgd", reference="torch.optim")
@pytest.mark.parametrize(
    "options",
    [(0.1, 1e-4, 0.75, 1e6), (0.1, 0.1, 0.5, 10.0), (0.5, 0.0, 0.75, 0.0), (0.01, 0.5, 1.0, 3.0)],
)  # fmt: skip
def test_asgd(options: tuple[float, ...]) -> None:
    lr, lambd, alpha, t0 = options
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # in which torch keeps eta and mu
    try:
        twins = {name: torch.nn.Parameter(p) for name, p in draw(0).items()}
        theirs = torch.optim.ASGD(
            twins.values(), lr=lr, lambd=lambd, alpha=alpha, t0=t0, foreach=False
        )
        for t in range(1, STEPS + 1):
            for name, g in draw(t).items():
                twins[name].grad = g
            theirs.step()
    finally:
        torch.set_default_dtype(default)
    assert_same(train(fo.asgd(*options)), {n: p.detach() for n, p in twins.items()})


# ---- noise ---------------------------------------------------------------------------------------------


@compares("sgld", reference=PLAIN, remark="eq. 4 of the paper, with draws of `fo.random`")
@pytest.mark.parametrize(
    ("rate", "temperature"), [(0.1, 1.0), (0.5, 2.0), (0.01, 0.3), (0.2, 0.0)]
)
def test_sgld(rate: float, temperature: float) -> None:
    tx, key, ps = fo.sgld(rate, temperature, key=5), random.key(5), draw(0)
    state = tx.init(ps)
    for t in range(STEPS):
        gs, noise = draw(t + 1), random.normal_like(key, ps, t)
        updates, state = tx.update(gs, state, ps)
        for name, u in updates.items():
            epsilon = 2 * rate
            drawn = math.sqrt(epsilon * temperature) * noise[name].double()
            assert_near(u, -epsilon / 2 * gs[name] + drawn)


# ---- privacy, without noise: test_private.py looks at its distribution ---------------------------------

SILENT = "without the noise, whose distribution tests/test_private.py compares"
OF_PRIVACY = [(0.5, None), (2.0, None), (5.0, 4.0), (100.0, 10.0)]
"""The bound of a norm, and the batch size that is expected of 6 examples."""


def examples(t: int) -> dict[str, Tensor]:
    each = [draw(1000 * t + i) for i in range(6)]
    return {name: torch.stack([g[name] for g in each]) for name in each[0]}


def clipped_mean(gs: dict[str, Tensor], bound: float, size: float) -> dict[str, Tensor]:
    total = {name: torch.zeros_like(g[0]) for name, g in gs.items()}
    for i in range(6):
        norm = math.sqrt(sum(g[i].square().sum().item() for g in gs.values()))
        for name, g in gs.items():
            total[name] = total[name] + g[i] / max(1.0, norm / bound)
    return {name: x / size for name, x in total.items()}


def train_privately(
    tx: fo.GradientTransformation, make: Callable, bound: float, size: float | None
) -> None:
    ps = twins = draw(0)
    state = tx.init(ps)
    steps = {name: make(p) for name, p in ps.items()}
    for t in range(1, STEPS + 1):
        gs = examples(t)
        updates, state = tx.update(gs, state, ps)
        ps = fo.apply_updates(ps, updates)
        means = clipped_mean(gs, bound, size or 6)
        twins = {name: steps[name](t, means[name], p) for name, p in twins.items()}
    assert_same(ps, twins)


@compares("differentially_private_aggregate", reference=PLAIN, remark=SILENT)
@pytest.mark.parametrize(("bound", "size"), OF_PRIVACY)
def test_private_aggregate(bound: float, size: float | None) -> None:
    tx = fo.differentially_private_aggregate(bound, 0.0, 0, expected_batch_size=size)
    train_privately(tx, lambda p: lambda t, g, p: p + g, bound, size)


@compares("dpsgd", reference=PLAIN, remark=SILENT)
@pytest.mark.parametrize("momentum", [None, 0.9])
@pytest.mark.parametrize(("bound", "size"), OF_PRIVACY)
def test_dpsgd(bound: float, size: float | None, momentum: float | None) -> None:
    def make(p: Tensor) -> Callable:
        buffer = torch.zeros_like(p)

        def step(t: int, g: Tensor, p: Tensor) -> Tensor:
            nonlocal buffer
            buffer = (momentum or 0.0) * buffer + g
            return p - 0.1 * buffer

        return step

    options = {"momentum": momentum, "expected_batch_size": size}
    tx = fo.dpsgd(0.1, bound, 0.0, key=0, **options)
    train_privately(tx, make, bound, size)


@compares("dp_adam", reference=PLAIN, remark=SILENT)
@pytest.mark.parametrize(("bound", "size"), OF_PRIVACY)
def test_dp_adam(bound: float, size: float | None) -> None:
    def make(p: Tensor) -> Callable:
        adam = plain_adam(0.8, 0.95, 1e-3)
        return lambda t, g, p: p - 0.1 * adam(t, g)

    options = {"b1": 0.8, "b2": 0.95, "eps": 1e-3, "expected_batch_size": size}
    tx = fo.dp_adam(0.1, bound, 0.0, key=0, **options)
    train_privately(tx, make, bound, size)
