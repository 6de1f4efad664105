"""First-order optimizers of 2023 to 2025, and clips of spikes, beside plain transcriptions."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import pytest
import torch
from parity_page import assert_near, compares
from test_authors import (
    OPTIONS_OF_ADAMW,
    STEPS,
    assert_same,
    draw,
    plain_adam,
    train,
    train_plainly,
)
from torch import Tensor

import functorch_opt as fo
from functorch_opt import tree

AUTHORS = "plain: the authors' code"

# ---- Adam-mini: loops over the blocks --------------------------------------------------------------


def plain_adam_mini(
    blocks_of: Callable[[Tensor], list[list[int]]],
    lr: float,
    b1: float,
    b2: float,
    eps: float,
    wd: float,
):
    """`blocks_of` gives the places of the elements of each block, in the flat tensor."""

    def make(p: Tensor) -> Callable:
        blocks = blocks_of(p)
        m, v = torch.zeros(p.numel(), dtype=p.dtype), [0.0] * len(blocks)

        def step(t: int, g: Tensor, p: Tensor) -> Tensor:
            flat, new = g.flatten(), ((1 - lr * wd) * p).flatten()
            for i, places in enumerate(blocks):
                mean = sum(flat[at].item() ** 2 for at in places) / len(places)
                v[i] = b2 * v[i] + (1 - b2) * mean
                h = math.sqrt(v[i]) / math.sqrt(1 - b2**t) + eps
                for at in places:
                    m[at] = b1 * m[at] + (1 - b1) * flat[at]
                    new[at] -= lr / (1 - b1**t) * m[at] / h
            return new.reshape(p.shape)

        return step

    return make


def blocks_of_rows(k: int) -> Callable[[Tensor], list[list[int]]]:
    def blocks(p: Tensor) -> list[list[int]]:
        size = k * p[0].numel()
        return [list(range(i, i + size)) for i in range(0, p.numel(), size)]

    return blocks


BLOCKS_OF = {
    "element": lambda p: [[at] for at in range(p.numel())],
    "row": blocks_of_rows(1),
    "head": blocks_of_rows(2),
    "tensor": lambda p: [list(range(p.numel()))],
}
LAYERS = {
    "wte": ((3, 4), "row"),
    "h.0.attn.q_proj.weight": ((4, 3), "head"),
    "h.0.attn.wk.weight": ((2, 2), "head"),
    "h.0.attn.v_proj.weight": ((4, 2), "row"),
    "h.0.attn.o_proj.weight": ((2, 3), "row"),
    "h.0.mlp.up.weight": ((3, 2), "row"),
    "h.0.mlp.up.bias": ((3,), "element"),
    "h.0.ln_1.weight": ((4,), "tensor"),
    "conv.weight": ((2, 2, 3), "tensor"),
    "scale": ((), "tensor"),
}


def draw_layers(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, (shape, _) in LAYERS.items()
    }


@compares("adam_mini", "scale_by_adam_mini", reference=AUTHORS)
@pytest.mark.parametrize("options", OPTIONS_OF_ADAMW)
def test_adam_mini_is_that_of_its_authors(options: tuple[float, ...]) -> None:
    """The blocks of each layer are found by its name."""
    lr, b1, b2, eps, wd = options
    tx = fo.adam_mini(lr, b1, b2, eps, weight_decay=wd, head_dim=2)
    ours = theirs = draw_layers(0)
    state = tx.init(ours)
    steps = {
        name: plain_adam_mini(BLOCKS_OF[kind], *options)(theirs[name])
        for name, (_, kind) in LAYERS.items()
    }
    for t in range(1, STEPS + 1):
        gs = draw_layers(t)
        updates, state = tx.update(gs, state, ours)
        ours = fo.apply_updates(ours, updates)
        theirs = {name: steps[name](t, gs[name], p) for name, p in theirs.items()}
    for name, p in theirs.items():
        assert_near(ours[name], p, 1e-10, name)


def test_adam_mini_keeps_one_number_for_each_block() -> None:
    slots = fo.state_dict(fo.scale_by_adam_mini(head_dim=2).init(draw_layers(0)))
    sizes = {path: x.numel() for path, x in slots.items() if "/nu/" in path}
    found = {path.rpartition("/")[2]: n for path, n in sizes.items()}
    assert found == {
        name: len(BLOCKS_OF[kind](torch.zeros(shape)))
        for name, (shape, kind) in LAYERS.items()
    }


def test_blocks_that_do_not_fit_are_refused() -> None:
    tx = fo.scale_by_adam_mini(head_dim=3)
    with pytest.raises(ValueError, match=r"shape \(4, 2\) has no blocks of 3 rows"):
        tx.init({"q_proj": torch.zeros(4, 2)})
    with pytest.raises(ValueError, match="has no blocks of 1 rows"):
        fo.scale_by_adam_mini(blocks=lambda path, p: "row").init(torch.zeros(()))


# ---- CAME -------------------------------------------------------------------------------------------


def plain_came(
    lr: float,
    b1: float,
    b2: float,
    b3: float,
    eps: float,
    eps_r: float,
    d: float,
    wd: float,
):
    def make(p: Tensor) -> Callable:
        m, second, apart = torch.zeros_like(p), [0.0, 0.0], [0.0, 0.0]

        def follow(means: list, x: Tensor, b: float) -> Tensor:
            """The next two means, and the matrix that they stand for."""
            for i, dim in enumerate((-1, -2)):
                means[i] = b * means[i] + (1 - b) * x.mean(dim)
            row, col = means
            return (
                torch.einsum("...i,...j->...ij", row, col) / row.mean(-1)[..., None, None]
            )

        def step(t: int, g: Tensor, p: Tensor) -> Tensor:
            nonlocal m
            is_matrix, square = p.dim() >= 2, g**2 + eps
            if is_matrix:
                v = follow(second, square, b2)
            else:
                v = second[0] = b2 * second[0] + (1 - b2) * square
            u = g / v.sqrt()
            rms = math.sqrt((u**2).mean().item())
            u = u / max(1.0, rms / d)
            m = b1 * m + (1 - b1) * u
            s = (
                follow(apart, (u - m) ** 2 + eps_r, b3)
                if is_matrix
                else torch.tensor(1.0)
            )
            return (1 - lr * wd) * p - lr * m / s.sqrt()

        return step

    return make


@compares("came", "scale_by_came", reference=AUTHORS)
@pytest.mark.parametrize(
    "options",
    [
        (2e-4, 0.9, 0.999, 0.9999, 1e-30, 1e-16, 1.0, 0.0),
        (0.01, 0.5, 0.9, 0.8, 1e-3, 1e-4, 0.5, 0.1),
        (0.1, 0.95, 0.7, 0.99, 1e-8, 1e-2, 2.0, 0.02),
        (0.05, 0.8, 0.99, 0.5, 1e-2, 1e-8, 0.1, 0.5),
    ],
)
def test_came_is_that_of_its_authors(options: tuple[float, ...]) -> None:
    *others, wd = options
    ours = train(fo.came(*others, weight_decay=wd))
    assert_same(ours, train_plainly(plain_came(*options)))


# ---- FOCUS ------------------------------------------------------------------------------------------


def plain_focus(lr: float, b1: float, b2: float, gamma: float, wd: float):
    def make(p: Tensor) -> Callable:
        m, average = torch.zeros_like(p), torch.zeros_like(p)

        def step(t: int, g: Tensor, p: Tensor) -> Tensor:
            nonlocal m, average
            m = b1 * m + (1 - b1) * g
            average = b2 * average + (1 - b2) * p
            mean = average / (1 - b2**t)
            # At the first step both are the same, and their difference is a rounding.
            pull = torch.zeros_like(p) if t == 1 else torch.sign(p - mean)
            return p - lr * (torch.sign(m) + gamma * pull) - lr * wd * mean

        return step

    return make


@compares("focus", "scale_by_focus", reference=AUTHORS)
@pytest.mark.parametrize(
    "options",
    [
        (0.01, 0.9, 0.999, 0.1, 0.0),
        (0.1, 0.5, 0.9, 0.5, 0.1),
        (0.003, 0.0, 0.99, 2.0, 0.02),
        (0.05, 0.99, 0.5, 0.0, 0.5),
    ],
)
def test_focus_is_that_of_its_authors(options: tuple[float, ...]) -> None:
    assert_same(train(fo.focus(*options)), train_plainly(plain_focus(*options)))


# ---- AdEMAMix with the warmups of its authors --------------------------------------------------------


def plain_ademamix(b1: float, b2: float, b3: float, alpha: float, steps: int):
    def half_life(b: float) -> float:
        return math.log(0.5) / math.log(b) - 1

    def make(p: Tensor) -> Callable:
        m1, m2, nu = (torch.zeros_like(p) for _ in range(3))

        def step(t: int, g: Tensor, p: Tensor) -> Tensor:
            nonlocal m1, m2, nu
            share = min(1.0, t / steps)
            mixed = (1 - share) * half_life(b1) + share * half_life(b3)
            slow = 0.5 ** (1 / (mixed + 1))
            m1, m2 = b1 * m1 + (1 - b1) * g, slow * m2 + (1 - slow) * g
            nu = b2 * nu + (1 - b2) * g**2
            size = (nu / (1 - b2**t)).sqrt() + 1e-8
            return p - 0.01 * (m1 / (1 - b1**t) + share * alpha * m2) / size

        return step

    return make


@pytest.mark.parametrize(
    "options", [(0.9, 0.999, 0.9999, 5.0, 60), (0.5, 0.9, 0.99, 2.0, 7)]
)
def test_ademamix_takes_the_warmups_of_its_authors_as_schedules(options: tuple) -> None:
    """As the docstring of `scale_by_ademamix` writes them."""
    b1, b2, b3, alpha, steps = options
    first, last = (math.log(0.5) / math.log(b) for b in (b1, b3))
    half_life = fo.linear_schedule(first, last, steps)
    growing = fo.linear_schedule(0.0, alpha, steps)
    slow = lambda count: 0.5 ** (1 / half_life(count + 1))  # noqa: E731
    more = {"b3": slow, "alpha": lambda count: growing(count + 1)}
    ours = train(fo.ademamix(0.01, b1, b2, **more))
    assert_same(ours, train_plainly(plain_ademamix(*options)))


# ---- norm floors --------------------------------------------------------------------------------------


@compares("scale_by_norm_floor", reference="plain: the rule of the speedruns")
@pytest.mark.parametrize("floor", [0.35, 0.05, 2.0, 0.0])
@pytest.mark.parametrize("rows", [False, True])
def test_a_norm_floor(floor: float, rows: bool) -> None:
    """An update that is long enough passes, a short one gets the least length."""
    tx, params, grads = fo.scale_by_norm_floor(floor, rows), draw(0), draw(1)
    got, _ = tx.update(grads, tx.init(params), params)
    expected = {}
    for name, p in params.items():
        of_rows = [*zip(grads[name], p, strict=True)] if rows and p.dim() > 1 else None
        pairs = of_rows or [(grads[name], p)]
        moved = [
            u * max(1.0, floor * float(w.norm()) / float(u.norm())) for u, w in pairs
        ]
        expected[name] = torch.stack(moved) if of_rows else moved[0]
    assert_same(got, expected)


def test_focus_pulls_nothing_at_its_first_step() -> None:
    """With any decay of the mean: its first weight is 1, and no quotient that is nearly 1."""
    p = torch.randn(5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for b2 in torch.linspace(0.01, 0.9999, 50).tolist():
        tx = fo.scale_by_focus(b2=b2)
        updates, _ = tx.update(torch.ones_like(p), tx.init(p), p)
        assert (updates == 1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_focus_pulls_nothing_that_has_not_moved(dtype: torch.dtype) -> None:
    """The mean of values that are all the same is this value, to the bit."""
    p = torch.randn(1000, generator=torch.Generator().manual_seed(0)).to(dtype)
    tx = fo.scale_by_focus(b2=0.999)
    state = tx.init(p)
    for _ in range(20):
        updates, state = tx.update(torch.zeros_like(p), state, p)
        assert (updates == 0).all()


# ---- AdamC, and the decay onto Lion -----------------------------------------------------------------


def rate_at(t: int) -> float:
    """A warmup of 20 steps, and then a fall to 0, of the learning rate of step t."""
    return 0.1 * min(t / 20, (101 - t) / 81)


def as_schedule(count: Tensor) -> Tensor:
    t = tree.as_real(count) + 1
    return 0.1 * torch.minimum(t / 20, (101 - t) / 81)


def plain_adamc(b1: float, b2: float, eps: float, wd: float, largest: float | None):
    def make(p: Tensor) -> Callable:
        adam = plain_adam(b1, b2, eps)

        def step(t: int, g: Tensor, p: Tensor) -> Tensor:
            lr = rate_at(t)
            top = max(rate_at(s) for s in range(1, t + 1)) if largest is None else largest
            return p - lr * adam(t, g) - lr * lr / top * wd * p

        return step

    return make


@compares("adamc", "corrected_weight_decay", reference="plain: the paper")
@pytest.mark.parametrize("largest", [None, 0.1, 0.3])
@pytest.mark.parametrize("options", OPTIONS_OF_ADAMW)
def test_adamc_is_that_of_the_paper(
    options: tuple[float, ...], largest: float | None
) -> None:
    _, b1, b2, eps, wd = options
    tx = fo.adamc(as_schedule, b1, b2, eps, weight_decay=wd, max_learning_rate=largest)
    assert_same(train(tx), train_plainly(plain_adamc(b1, b2, eps, wd, largest)))


def plain_lion_with_corrected_decay(b1: float, b2: float, wd: float, largest: float):
    def make(p: Tensor) -> Callable:
        m = torch.zeros_like(p)

        def step(t: int, g: Tensor, p: Tensor) -> Tensor:
            nonlocal m
            u = torch.sign(b1 * m + (1 - b1) * g)
            m = b2 * m + (1 - b2) * g
            lr = rate_at(t)
            return p - lr * u - lr * (lr / largest) * wd * p

        return step

    return make


@compares("corrected_weight_decay", reference="plain: the paper", remark="of Lion")
@pytest.mark.parametrize("wd", [0.1, 1.0])
def test_the_decay_goes_onto_another_optimizer(wd: float) -> None:
    tx = fo.chain(
        fo.scale_by_lion(0.9, 0.99),
        fo.corrected_weight_decay(wd, as_schedule, 0.1),
        fo.scale_by_learning_rate(as_schedule),
    )
    assert_same(
        train(tx), train_plainly(plain_lion_with_corrected_decay(0.9, 0.99, wd, 0.1))
    )


def test_a_scheduler_of_torch_corrects_the_decay() -> None:
    """The largest learning rate is one that a group has had."""
    p = torch.nn.Parameter(torch.ones((), dtype=torch.float64))
    opt = fo.optim.AdamC([p], lr=0.1, weight_decay=0.5)
    p.grad = torch.zeros_like(p)
    opt.step()
    assert p.item() == pytest.approx(0.95)
    opt.param_groups[0]["lr"] = 0.05
    opt.step()
    assert p.item() == pytest.approx(0.95 * (1 - 0.05 * 0.5 * 0.5))


# ---- Stable-SPAM, and its clips ---------------------------------------------------------------------


def drawn_with_spikes(step: int) -> dict[str, Tensor]:
    """Gradients of other sizes at other steps; some have one element that is far too large."""
    size = 10.0 ** math.sin(step)
    xs = {name: size * x for name, x in draw(step).items()}
    if step % 7 == 0:
        xs["w"][1, 2] *= 50
        xs["b"] *= 30
    return xs


def plain_clip_spikes(theta: float) -> Callable:
    a = 0.0

    def clip(t: int, g: Tensor) -> Tensor:
        nonlocal a
        top = g.abs().max().item()
        a = theta * a + (1 - theta) * top
        h = a / (1 - theta**t)
        return torch.where(g.abs() > h, g / top * h, g)

    return clip


def plain_usual_norm(gamma1: float, gamma2: float, eps: float) -> Callable:
    m, v = 0.0, 0.0

    def scale(t: int, g: Tensor) -> Tensor:
        nonlocal m, v
        norm = math.sqrt((g**2).sum().item())
        m = gamma1 * m + (1 - gamma1) * norm
        v = gamma2 * v + (1 - gamma2) * norm**2
        usual = m / (1 - gamma1**t) / (math.sqrt(v / (1 - gamma2**t)) + eps)
        return g / norm * usual

    return scale


def plain_stable_spam(
    lr: float,
    b1: float,
    b2: float,
    eps: float,
    wd: float,
    gamma1: float,
    gamma2: float,
    theta: float,
    period: int,
):
    def make(p: Tensor) -> Callable:
        clip, scale = plain_clip_spikes(theta), plain_usual_norm(gamma1, gamma2, eps)
        adam, start = plain_adam(b1, b2, eps), 0

        def step(t: int, g: Tensor, p: Tensor) -> Tensor:
            nonlocal adam, start
            g = scale(t, clip(t, g))
            if period and t % period == 0:
                adam, start = plain_adam(b1, b2, eps), t - 1
            return (1 - lr * wd) * p - lr * adam(t - start, g)

        return step

    return make


def train_spiky(tx: fo.GradientTransformation) -> dict[str, Tensor]:
    params = draw(0)
    state = tx.init(params)
    for step in range(1, STEPS + 1):
        updates, state = tx.update(drawn_with_spikes(step), state, params)
        params = fo.apply_updates(params, updates)
    return params


def train_spiky_plainly(make: Callable) -> dict[str, Tensor]:
    params = draw(0)
    steps = {name: make(p) for name, p in params.items()}
    for t in range(1, STEPS + 1):
        gs = drawn_with_spikes(t)
        params = {name: steps[name](t, gs[name], p) for name, p in params.items()}
    return params


@compares(
    "stable_spam",
    "scale_by_stable_spam",
    "clip_spikes",
    "scale_to_usual_norm",
    reference="plain: the paper",
    remark="up to the first reset also the authors' code",
)
@pytest.mark.parametrize(
    "options",
    [
        (1e-3, 0.9, 0.999, 1e-8, 0.0, 0.7, 0.9, 0.999, 1000),
        (0.1, 0.9, 0.999, 1e-8, 0.1, 0.7, 0.9, 0.999, 30),
        (0.05, 0.5, 0.9, 1e-2, 0.02, 0.85, 0.99, 0.9, 1),
        (0.01, 0.95, 0.99, 1e-3, 0.5, 0.0, 0.5, 0.5, 0),
    ],
)
def test_stable_spam_is_that_of_the_paper(options: tuple) -> None:
    lr, b1, b2, eps, wd, gamma1, gamma2, theta, period = options
    tx = fo.stable_spam(
        lr,
        b1,
        b2,
        eps,
        weight_decay=wd,
        gamma1=gamma1,
        gamma2=gamma2,
        theta=theta,
        reset_period=period,
    )
    assert_same(train_spiky(tx), train_spiky_plainly(plain_stable_spam(*options)))


@pytest.mark.parametrize("stage", [fo.clip_spikes(), fo.scale_to_usual_norm()], ids=repr)
def test_clips_go_onto_any_optimizer_and_damp_a_spike(
    stage: fo.GradientTransformation,
) -> None:
    """After one spike SGD has moved less far with the stage than without it."""
    tx, plain, p = fo.chain(stage, fo.sgd(1.0)), fo.sgd(1.0), torch.zeros(4)
    state = tx.init(p)
    for g in (1.0, 1.0, 1.0, 1000.0):
        updates, state = tx.update(torch.full((4,), g), state, p)
    spike = plain.update(torch.full((4,), 1000.0), plain.init(p))[0]
    assert updates.norm() < spike.norm() / 3


# ---- ZClip ------------------------------------------------------------------------------------------


def plain_zclip(decay: float, threshold: float, warmup: int, eps: float) -> Callable:
    norms: list[float] = []
    mean, var = 0.0, 0.0

    def factor(gs: dict[str, Tensor]) -> float:
        nonlocal mean, var
        norm = math.sqrt(sum((g**2).sum().item() for g in gs.values()))
        if len(norms) < warmup:
            norms.append(norm)
            mean = sum(norms) / len(norms)
            var = sum((x - mean) ** 2 for x in norms) / len(norms)
            return 1.0
        std = math.sqrt(var)
        z = (norm - mean) / (std + eps)
        top = mean + threshold * std / (z / threshold) if z > threshold else norm
        mean = decay * mean + (1 - decay) * top
        var = decay * var + (1 - decay) * (top - mean) ** 2
        return top / norm

    return factor


@compares("zclip", reference=AUTHORS)
@pytest.mark.parametrize(
    "options",
    [
        (0.97, 2.5, 25, 1e-6),
        (0.9, 1.0, 10, 1e-3),
        (0.5, 0.3, 2, 0.1),
        (0.99, 2.0, 50, 0.0),
    ],
)
def test_zclip_is_that_of_its_authors(options: tuple) -> None:
    tx, factor = fo.chain(fo.zclip(*options), fo.sgd(0.1)), plain_zclip(*options)
    ours, theirs, clipped = draw(0), draw(0), 0
    state = tx.init(ours)
    for step in range(1, STEPS + 1):
        gs = drawn_with_spikes(step)
        updates, state = tx.update(gs, state, ours)
        ours = fo.apply_updates(ours, updates)
        by = factor(gs)
        clipped += by < 1
        theirs = {name: p - 0.1 * by * gs[name] for name, p in theirs.items()}
    assert_same(ours, theirs)
    assert 1 < clipped < 90


def test_a_norm_that_is_not_finite_does_not_count() -> None:
    tx = fo.zclip(warmup_steps=2)
    state = tx.init([torch.zeros(1)])
    for g in (1.0, float("nan"), 3.0, float("inf")):
        _, state = tx.update([torch.tensor([g])], state)
    assert (fo.get(state, "mean"), fo.get(state, "seen")) == (2, 2)


# ---- the real compiler ------------------------------------------------------------------------------

DECAYING = fo.linear_schedule(0.1, 0.0, 9)
IN_PLACE = {
    "adam_mini": fo.adam_mini(0.1, blocks=lambda path, p: "row" if p.ndim else "tensor"),
    "adamc": fo.adamc(DECAYING, weight_decay=0.1),
    "came": fo.came(0.01, eps=1e-3, instability_eps=1e-3),
    "ema_nesterov": fo.ema_nesterov(fo.adam(0.1)),
    "focus": fo.focus(0.1, weight_decay=0.1),
    "outer_loop": fo.outer_loop(fo.adam(0.1), fo.sgd(0.7, momentum=0.5), 2),
    "stable_spam": fo.stable_spam(0.1, weight_decay=0.1, reset_period=2),
    "zclip": fo.chain(fo.zclip(0.9, 0.2, 2, 0.1), fo.adam(0.1)),
    "galore": fo.galore(0.1, 2, 2),
    "apollo": fo.apollo(0.1, 2, 2, key=3),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", IN_PLACE)
def test_all_of_it_is_compiled(name: str) -> None:
    """In place, with the real compiler, it gives the same numbers, and nothing runs eagerly."""
    tx = IN_PLACE[name]
    step, params, mine = fo.compiled_step(tx), draw(0), draw(0)
    params, mine = (tree.map(lambda x: x.float(), x) for x in (params, mine))
    state, ours = tx.init(params), tx.init(mine)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for t in range(1, 5):
            gs = tree.map(lambda x: x.float(), draw(t))
            updates, state = tx.update(gs, state, params)
            params = fo.apply_updates(params, updates)
            mine, ours = step(mine, tree.map(torch.clone, gs), ours)
    for a, b in zip(tree.leaves((mine, ours)), tree.leaves((params, state)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
