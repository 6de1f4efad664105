"""Rules of papers, written out as they stand there: where optax has another one, or fails."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from parity_page import assert_near, compares
from torch import Tensor

import functorch_opt as fo
from functorch_opt import tree

STEPS = 100


def draw(seed: int) -> dict[str, Tensor]:
    """No entry near zero."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"kernel": (2, 3, 2), "w": (3, 4), "b": (4,), "scale": ()}
    xs = {
        name: torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in shapes.items()
    }
    return {name: x + 0.01 * torch.sign(x) for name, x in xs.items()}


def train(tx: fo.GradientTransformation) -> dict[str, Tensor]:
    params = draw(0)
    state = tx.init(params)
    for step in range(1, STEPS + 1):
        updates, state = tx.update(draw(step), state, params)
        params = fo.apply_updates(params, updates)
    return params


def train_plainly(make: Callable[[Tensor], Callable]) -> dict[str, Tensor]:
    """`make` gets the first value of a parameter, and returns ``(t, g, p) -> next p``."""
    params = draw(0)
    steps = {name: make(p) for name, p in params.items()}
    for t in range(1, STEPS + 1):
        gs = draw(t)
        params = {name: steps[name](t, gs[name], p) for name, p in params.items()}
    return params


def assert_same(
    ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float = 1e-10
) -> None:
    assert not torch.equal(ours["w"], draw(0)["w"])
    for name in theirs:
        assert_near(ours[name], theirs[name], tolerance, name)


# ---- Adan, alg. 1, with the decays of the authors' code --------------------------------------------------------------------


def plain_adan(lr: float, b1: float, b2: float, b3: float, eps: float, wd: float):
    def make(p: Tensor) -> Callable:
        m, v, n, last = (torch.zeros_like(p) for _ in range(4))

        def step(t: int, g: Tensor, p: Tensor) -> Tensor:
            nonlocal m, v, n, last
            change = torch.zeros_like(g) if t == 1 else g - last
            m = b1 * m + (1 - b1) * g
            v = b2 * v + (1 - b2) * change
            n = b3 * n + (1 - b3) * (g + b2 * change) ** 2
            last = g
            eta = lr / ((n / (1 - b3**t)).sqrt() + eps)
            return (1 - lr * wd) * p - eta * (m / (1 - b1**t) + b2 * v / (1 - b2**t))

        return step

    return make


@compares(
    "adan",
    "scale_by_adan",
    reference="plain: the authors' code",
    remark="optax 0.2.8 has 1 - b2 where they have b2",
)
@pytest.mark.parametrize(
    "options",
    [
        (0.1, 0.98, 0.92, 0.99, 1e-8, 0.0),
        (0.05, 0.9, 0.7, 0.95, 1e-2, 0.1),
        (0.1, 0.0, 0.9, 0.5, 1e-3, 0.02),
        (0.01, 0.99, 0.0, 0.999, 1e-8, 0.0),
    ],
)
def test_adan_is_that_of_its_authors(options: tuple[float, ...]) -> None:
    lr, b1, b2, b3, eps, wd = options
    ours = train(fo.adan(lr, b1, b2, b3, eps, 0.0, wd))
    assert_same(ours, train_plainly(plain_adan(lr, b1, b2, b3, eps, wd)))


# ---- SM3-II, alg. 2, element by element -------------------------------------------------------------------------------------


def plain_sm3(lr: float, momentum: float, eps: float):
    def make(p: Tensor) -> Callable:
        # The slices of a tensor: one index is fixed. A number is the only slice of itself.
        cover = [(d, i) for d, n in enumerate(p.shape) for i in range(n)] or [None]
        elements = list(itertools.product(*[range(n) for n in p.shape]))
        held_by = {
            at: [r for r in cover if r is None or at[r[0]] == r[1]] for at in elements
        }
        mu, m = dict.fromkeys(cover, 0.0), torch.zeros_like(p)

        def step(t: int, g: Tensor, p: Tensor) -> Tensor:
            nonlocal mu, m
            new, u = dict.fromkeys(cover, 0.0), torch.zeros_like(g)
            for at in elements:
                nu = min(mu[r] for r in held_by[at]) + g[at].item() ** 2
                u[at] = g[at] / math.sqrt(nu + eps)
                new |= {r: max(new[r], nu) for r in held_by[at]}
            mu, m = new, momentum * m + (1 - momentum) * u
            return p - lr * m

        return step

    return make


@compares(
    "sm3",
    "scale_by_sm3",
    reference="plain: the paper",
    remark="optax 0.2.8 cannot take parameters that are numbers",
)
@pytest.mark.parametrize("options", [(0.1, 0.9), (0.5, 0.0), (0.01, 0.99), (1.0, 0.5)])
def test_sm3_is_that_of_the_paper_for_numbers_too(options: tuple[float, ...]) -> None:
    assert_same(train(fo.sm3(*options)), train_plainly(plain_sm3(*options, 1e-8)))


def test_sm3_keeps_one_maximum_for_each_slice() -> None:
    slots = fo.get(fo.scale_by_sm3().init(draw(0)), "mu")
    assert {name: x.numel() for name, x in slots.items()} == {
        "kernel": 7,
        "w": 7,
        "b": 4,
        "scale": 1,
    }


def test_sm3_of_complex_numbers_divides_by_their_size() -> None:
    """What multiplies all gradients by a number of size 1 multiplies the updates by it."""
    tx, turn = fo.scale_by_sm3(), torch.polar(torch.tensor(1.0), torch.tensor(0.7))
    real, turned = ({"w": x, "s": y} for x, y in [(draw(0)["w"], draw(0)["scale"])] * 2)
    turned = tree.map(lambda x: x * turn.to(torch.complex128), turned)
    a, b = tx.init(real), tx.init(turned)
    for _ in range(3):
        u, a = tx.update(real, a)
        v, b = tx.update(turned, b)
        torch.testing.assert_close(
            v, tree.map(lambda x: x * turn.to(torch.complex128), u)
        )


# ---- MADGRAD, alg. 1, with the authors' eps beside the learning rate ---------------------------------------------------------


def plain_madgrad(lr: float, momentum: float, decay: float, eps: float):
    def make(p: Tensor) -> Callable:
        first, s, nu = p, torch.zeros_like(p), torch.zeros_like(p)

        def step(t: int, g: Tensor, p: Tensor) -> Tensor:
            nonlocal s, nu
            g = g + decay * p
            lamb = (lr + eps) * math.sqrt(t)
            s, nu = s + lamb * g, nu + lamb * g**2
            z = first - s / (nu ** (1 / 3) + eps)
            return momentum * p + (1 - momentum) * z

        return step

    return make


@compares("madgrad", "scale_by_madgrad", reference="plain: the authors' code")
@pytest.mark.parametrize(
    "options",
    [
        (0.1, 0.9, 0.0, 1e-6),
        (0.5, 0.5, 0.1, 1e-3),
        (0.01, 0.0, 0.01, 1e-8),
        (1.0, 0.99, 0.5, 1e-2),
    ],
)
def test_madgrad_is_that_of_its_authors(options: tuple[float, ...]) -> None:
    assert_same(train(fo.madgrad(*options)), train_plainly(plain_madgrad(*options)))


# ---- adaptive gradient clipping, eq. 3, of torch's layers ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "units"),
    [
        (torch.nn.Linear(3, 5), 5),
        (torch.nn.Linear(3, 1), 1),
        (torch.nn.Linear(1, 5), 1),
        (torch.nn.Conv1d(2, 4, 3), 4),
        (torch.nn.Conv2d(2, 4, 3), 4),
        (torch.nn.Conv2d(4, 4, 3, groups=4), 4),
        (torch.nn.Conv3d(2, 4, 3), 4),
        (torch.nn.LayerNorm(6), 1),
    ],
    ids=str,
)
def test_the_units_of_adaptive_clipping_are_the_outputs(
    layer: torch.nn.Module, units: int
) -> None:
    weight = layer.weight.detach()
    g = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    tx = fo.adaptive_grad_clip(0.1)
    clipped = tx.update(g, tx.init(weight), weight)[0]
    rows = zip(*(x.reshape(units, -1) for x in (weight, g, clipped)), strict=True)
    for w, before, after in rows:
        scale = min(1.0, 0.1 * max(w.norm().item(), 1e-3) / before.norm().item())
        torch.testing.assert_close(after, scale * before)


def test_zero_updates_have_no_direction() -> None:
    """In optax 0 / 0 is NaN."""
    tx = fo.normalize_by_update_norm(eps=0.0)
    zeros = tree.map(torch.zeros_like, draw(0))
    assert all((u == 0).all() for u in tree.leaves(tx.update(zeros, tx.init(zeros))[0]))


# ---- the weights that Fromage keeps, and torch's NAdamW ------------------------------------------------------------------------


def test_fromage_keeps_the_norm_where_the_gradient_is_at_right_angles() -> None:
    tx, p = fo.fromage(0.3), torch.tensor([3.0, 4.0], dtype=torch.float64)
    for _ in range(10):
        updates, _ = tx.update(torch.stack([-p[1], p[0]]), tx.init(p), p)
        p = fo.apply_updates(p, updates)
    torch.testing.assert_close(p.norm().item(), 5.0, rtol=1e-12, atol=0)


@compares(
    "nadamw",
    "scale_by_nadam",
    reference="torch.optim.NAdam",
    bound=1e-8,
    remark="torch multiplies the decays of the momentum in float32",
)
@pytest.mark.parametrize("momentum_decay", [4e-3, 0.1, 0.5, 0.0])
def test_nadamw_is_torchs_nadam_with_decoupled_decay(momentum_decay: float) -> None:
    theirs = {name: torch.nn.Parameter(p.clone()) for name, p in draw(0).items()}
    options = {"weight_decay": 0.1, "momentum_decay": momentum_decay}
    optimizer = torch.optim.NAdam(
        theirs.values(), lr=0.01, decoupled_weight_decay=True, **options
    )
    for step in range(1, STEPS + 1):
        for name, g in draw(step).items():
            theirs[name].grad = g
        optimizer.step()
    ours = train(fo.nadamw(0.01, **options))
    # torch multiplies the decays of the momentum in float32.
    assert_same(ours, {name: p.detach() for name, p in theirs.items()}, 1e-8)


# ---- cautious AdamW and Grams, with the decay outside of the mask --------------------------------------------------------------


def plain_adam(b1: float, b2: float, eps: float) -> Callable:
    """Adam's update of one tensor: ``(t, g) -> u``."""
    m, v = torch.tensor(0.0), torch.tensor(0.0)

    def step(t: int, g: Tensor) -> Tensor:
        nonlocal m, v
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g**2
        return m / (1 - b1**t) / ((v / (1 - b2**t)).sqrt() + eps)

    return step


def plain_cautious(lr: float, b1: float, b2: float, eps: float, wd: float):
    def make(p: Tensor) -> Callable:
        adam = plain_adam(b1, b2, eps)

        def step(t: int, g: Tensor, p: Tensor) -> Tensor:
            u = adam(t, g)
            mask = (u * g > 0).double()
            u = u * mask / max(mask.mean().item(), 1e-3)
            return (1 - lr * wd) * p - lr * u

        return step

    return make


OPTIONS_OF_ADAMW = [
    (0.1, 0.9, 0.999, 1e-8, 0.0),
    (0.05, 0.5, 0.9, 1e-2, 0.1),
    (0.01, 0.99, 0.7, 1e-6, 0.02),
    (0.2, 0.0, 0.5, 1e-3, 0.5),
]


@compares("cautious", reference="plain: the authors' code")
@pytest.mark.parametrize("options", OPTIONS_OF_ADAMW)
def test_cautious_adamw_is_that_of_its_authors(options: tuple[float, ...]) -> None:
    lr, b1, b2, eps, wd = options
    ours = fo.chain(
        fo.cautious(fo.scale_by_adam(b1, b2, eps), flip_sign=False),
        fo.add_decayed_weights(wd),
        fo.scale_by_learning_rate(lr),
    )
    assert_same(train(ours), train_plainly(plain_cautious(*options)))


def test_flip_sign_says_where_the_learning_rate_is() -> None:
    for wrapper in (fo.cautious, fo.gradient_signs):
        inside = wrapper(fo.adam(0.1))
        outside = fo.chain(
            wrapper(fo.scale_by_adam(), flip_sign=False), fo.scale_by_learning_rate(0.1)
        )
        assert_same(train(inside), train(outside))


def plain_grams(lr: float, b1: float, b2: float, eps: float, wd: float):
    def make(p: Tensor) -> Callable:
        adam = plain_adam(b1, b2, eps)

        def step(t: int, g: Tensor, p: Tensor) -> Tensor:
            return (1 - lr * wd) * p - lr * torch.sign(g) * adam(t, g).abs()

        return step

    return make


@compares(
    "grams", "gradient_signs", "scale_by_grams", reference="plain: the authors' code"
)
@pytest.mark.parametrize("options", OPTIONS_OF_ADAMW)
def test_grams_is_that_of_its_authors(options: tuple[float, ...]) -> None:
    lr, b1, b2, eps, wd = options
    ours = fo.grams(lr, b1, b2, eps, weight_decay=wd)
    assert_same(train(ours), train_plainly(plain_grams(*options)))


# ---- cautious weight decay ------------------------------------------------------------------------------------------------------


def plain_cautious_decay(lr: float, b1: float, b2: float, eps: float, wd: float):
    def make(p: Tensor) -> Callable:
        adam = plain_adam(b1, b2, eps)

        def step(t: int, g: Tensor, p: Tensor) -> Tensor:
            u = adam(t, g)
            return p - lr * (u + wd * p * (u * p >= 0).double())

        return step

    return make


@compares("cautious_weight_decay", reference="plain: the paper")
@pytest.mark.parametrize("options", OPTIONS_OF_ADAMW)
def test_cautious_weight_decay_is_that_of_the_paper(options: tuple[float, ...]) -> None:
    lr, b1, b2, eps, wd = options
    ours = fo.chain(
        fo.scale_by_adam(b1, b2, eps),
        fo.cautious_weight_decay(wd),
        fo.scale_by_learning_rate(lr),
    )
    assert_same(train(ours), train_plainly(plain_cautious_decay(*options)))


# ---- LaProp ---------------------------------------------------------------------------------------------------------------------


def plain_laprop(lr: float, b1: float, b2: float, eps: float, wd: float):
    def make(p: Tensor) -> Callable:
        m, n = torch.zeros_like(p), torch.zeros_like(p)

        def step(t: int, g: Tensor, p: Tensor) -> Tensor:
            nonlocal m, n
            n = b2 * n + (1 - b2) * g**2
            m = b1 * m + lr * (1 - b1) * g / ((n / (1 - b2**t)).sqrt() + eps)
            return (1 - lr * wd) * p - m / (1 - b1**t)

        return step

    return make


@compares("laprop", "scale_by_laprop", reference="plain: the authors' code")
@pytest.mark.parametrize("options", OPTIONS_OF_ADAMW)
def test_laprop_is_that_of_its_authors(options: tuple[float, ...]) -> None:
    lr, b1, b2, eps, wd = options
    ours = fo.laprop(lr, b1, b2, eps, weight_decay=wd)
    assert_same(train(ours), train_plainly(plain_laprop(*options)))


# ---- StableAdamW, alg. 2, with the paper's decays that correct themselves ---------------------------------------------------------


def plain_stable_adamw(lr: float, b1: float, b2: float, eps: float, wd: float):
    def make(p: Tensor) -> Callable:
        v, u = torch.zeros_like(p), torch.zeros_like(p)

        def step(t: int, g: Tensor, p: Tensor) -> Tensor:
            nonlocal v, u
            d1, d2 = (b * (1 - b ** (t - 1)) / (1 - b**t) for b in (b1, b2))
            v = d1 * v + (1 - d1) * g
            u = d2 * u + (1 - d2) * g**2
            rms = (g**2 / u.clamp(min=eps**2)).mean().sqrt().item()
            eta = lr / max(1.0, rms)
            return p - eta * wd * p - eta * v / (u.sqrt() + eps)

        return step

    return make


@compares("stable_adamw", "scale_by_stable_adamw", reference="plain: the paper")
@pytest.mark.parametrize("options", OPTIONS_OF_ADAMW)
def test_stable_adamw_is_that_of_the_paper(options: tuple[float, ...]) -> None:
    ours = train(fo.stable_adamw(*options))
    assert_same(ours, train_plainly(plain_stable_adamw(*options)))


# ---- MARS-AdamW, in the authors' approximate form ---------------------------------------------------------------------------------


def plain_mars_adamw(
    gamma: float, lr: float, b1: float, b2: float, eps: float, wd: float
):
    def make(p: Tensor) -> Callable:
        adam, last = plain_adam(b1, b2, eps), torch.zeros_like(p)

        def step(t: int, g: Tensor, p: Tensor) -> Tensor:
            nonlocal last
            c = g + gamma * b1 / (1 - b1) * (g - last)
            last = g
            c = c / max(1.0, c.norm().item())
            return p - lr * (wd * p + adam(t, c))

        return step

    return make


@compares("mars_adamw", "scale_by_mars", reference="plain: the authors' code")
@pytest.mark.parametrize("gamma", [0.025, 0.3])
@pytest.mark.parametrize("options", OPTIONS_OF_ADAMW)
def test_mars_adamw_is_that_of_its_authors(
    gamma: float, options: tuple[float, ...]
) -> None:
    lr, b1, b2, eps, wd = options
    ours = fo.mars_adamw(lr, b1, b2, eps, weight_decay=wd, gamma=gamma)
    assert_same(train(ours), train_plainly(plain_mars_adamw(gamma, *options)))


# ---- Schedule-Free, with the three sequences of the paper -----------------------------------------------------------------------


class PlainScheduleFree:
    """z, x and y of one tensor, and the sum of the weights."""

    def __init__(self, lr: float, warmup: int, b1: float, wd: float, r: float) -> None:
        self.lr, self.warmup, self.b1, self.wd, self.r = lr, warmup, b1, wd, r
        self.highest = self.total = 0.0

    def __call__(self, p: Tensor) -> Callable:
        z, x, v = p, p, torch.zeros_like(p)
        highest = total = 0.0

        def step(t: int, g: Tensor, y: Tensor) -> Tensor:
            nonlocal z, x, v, highest, total
            lr = self.lr * min(1.0, t / self.warmup) if self.warmup else self.lr
            v, d = self.direction(t, g, v)
            z = z - lr * (d + self.wd * y)
            highest = max(highest, lr)
            weight = t**self.r * highest**2
            total += weight
            x = (1 - weight / total) * x + weight / total * z
            self.x = x
            return (1 - self.b1) * z + self.b1 * x

        return step

    def direction(self, t: int, g: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return v, g


class PlainScheduleFreeAdamW(PlainScheduleFree):
    def direction(self, t: int, g: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        v = 0.99 * v + 0.01 * g**2
        return v, g / ((v / (1 - 0.99**t)).sqrt() + 1e-3)


OPTIONS_OF_SCHEDULE_FREE = [
    (0.1, 0, 0.9, 0.0, 0.0),
    (0.05, 40, 0.5, 0.1, 1.0),
    (0.5, 7, 0.98, 0.02, 0.0),
    (0.01, 100, 0.7, 0.5, 2.0),
]


@compares(
    "schedule_free",
    "schedule_free_sgd",
    "schedule_free_adamw",
    reference="plain: the authors' code",
    remark="optax's weights are one step ahead under warm-up",
)
@pytest.mark.parametrize("options", OPTIONS_OF_SCHEDULE_FREE)
def test_schedule_free_is_that_of_its_authors(options: tuple) -> None:
    lr, warmup, b1, wd, r = options
    given = {"warmup_steps": warmup, "b1": b1, "weight_decay": wd, "r": r}
    sgd, adamw = PlainScheduleFree(*options), PlainScheduleFreeAdamW(*options)
    ours = train(fo.schedule_free_sgd(lr, **given))
    assert_same(ours, train_plainly(sgd))
    ours = train(fo.schedule_free_adamw(lr, b2=0.99, eps=1e-3, **given))
    assert_same(ours, train_plainly(adamw))


def plain_schedule_free_radam(
    lr: float, betas: tuple[float, float], eps: float, wd: float, r: float, power: float,
    silent: bool,
):  # fmt: skip
    b1, b2 = betas

    def make(p: Tensor) -> Callable:
        z, x, v, highest, total = p, p, torch.zeros_like(p), 0.0, 0.0

        def step(t: int, g: Tensor, y: Tensor) -> Tensor:
            nonlocal z, x, v, highest, total
            longest = 2 / (1 - b2) - 1
            length = longest - 2 * t * b2**t / (1 - b2**t)
            v = b2 * v + (1 - b2) * g**2
            rate, d = 0.0 if silent else lr, g
            if length > 4:
                above = (length - 4) * (length - 2) * longest
                below = (longest - 4) * (longest - 2) * length
                rate = lr * math.sqrt(above / below)
                d = g / ((v / (1 - b2**t)).sqrt() + eps)
            highest = max(highest, rate)
            total += t**r * highest**power
            c = t**r * highest**power / total if total else 0.0
            z = z - rate * (d + wd * y)
            x = (1 - c) * x + c * z
            return (1 - b1) * z + b1 * x

        return step

    return make


@compares(
    "schedule_free_radam",
    reference="plain: the authors' code",
    remark="as RAdamScheduleFree of schedulefree 1.4.1",
)
@pytest.mark.parametrize(
    "options",
    [
        (0.0025, (0.9, 0.999), 1e-8, 0.0, 0.0, 2.0, True),
        (0.05, (0.5, 0.9), 1e-3, 0.1, 1.0, 1.0, False),
        (0.1, (0.98, 0.99), 1e-8, 0.02, 0.0, 0.0, True),
        (0.01, (0.7, 0.5), 1e-2, 0.0, 0.5, 2.0, False),
        (0.1, (0.9, 0.7), 1e-2, 0.1, 2.0, 3.0, True),
    ],
)
def test_schedule_free_radam_is_that_of_its_authors(options: tuple) -> None:
    lr, (b1, b2), eps, wd, r, power, silent = options
    tx = fo.schedule_free_radam(
        *(lr, b1, b2, eps, wd, power), silent_sgd_phase=silent, r=r
    )
    assert_same(train(tx), train_plainly(plain_schedule_free_radam(*options)))


def test_schedule_free_evaluates_at_the_average() -> None:
    tx, plain = fo.schedule_free_sgd(0.1, 5), PlainScheduleFree(0.1, 5, 0.9, 0.0, 0.0)
    params, state = draw(0), None
    state = tx.init(params)
    step, y = plain(params["w"]), params["w"]
    for t in range(1, STEPS + 1):
        updates, state = tx.update(draw(t), state, params)
        params = fo.apply_updates(params, updates)
        y = step(t, draw(t)["w"], y)
    averages = fo.eval_params(tx, state, params)
    torch.testing.assert_close(averages["w"], plain.x, rtol=1e-10, atol=1e-10)


# ---- ACProp, with the authors' mean that has seen g -----------------------------------------------------------------------------


def plain_acprop(lr: float, b1: float, b2: float, eps: float, wd: float):
    def make(p: Tensor) -> Callable:
        m, s = torch.zeros_like(p), torch.zeros_like(p)

        def step(t: int, g: Tensor, p: Tensor) -> Tensor:
            nonlocal m, s
            p = (1 - lr * wd) * p
            if t == 1:
                p = p - lr * g
            else:
                s = s + eps
                p = p - lr * g / ((s / (1 - b2 ** (t - 1))).sqrt() + eps)
            m = b1 * m + (1 - b1) * g
            s = b2 * s + (1 - b2) * (g - m) ** 2
            return p

        return step

    return make


@compares(
    "acprop",
    "scale_by_acprop",
    reference="plain: the authors' code",
    remark="optax 0.2.8 subtracts the mean of the step before",
)
@pytest.mark.parametrize(
    "options",
    [
        (0.1, 0.9, 0.999, 1e-16, 0.0),
        (0.05, 0.5, 0.9, 1e-2, 0.1),
        (0.01, 0.99, 0.7, 1e-6, 0.02),
        (0.2, 0.0, 0.5, 1e-3, 0.5),
    ],
)
def test_acprop_is_that_of_its_authors(options: tuple[float, ...]) -> None:
    lr, b1, b2, eps, wd = options
    ours = train(fo.acprop(lr, b1, b2, eps, eps, wd))
    assert_same(ours, train_plainly(plain_acprop(*options)))


# ---- DoG and DoWG ---------------------------------------------------------------------------------------------------------------


def train_whole(
    step: Callable[[int, Tensor, Tensor, Tensor], Tensor],
) -> dict[str, Tensor]:
    """``step(t, g, p, first p) -> next p``, of one vector that holds all parameters."""

    def joined(xs: dict[str, Tensor]) -> Tensor:
        return torch.cat([x.reshape(-1) for x in xs.values()])

    first = draw(0)
    p = joined(first)
    for t in range(1, STEPS + 1):
        p = step(t, joined(draw(t)), p, joined(first))
    parts = p.split([x.numel() for x in first.values()])
    rows = zip(first.items(), parts, strict=True)
    return {name: part.reshape(x.shape) for (name, x), part in rows}


def plain_dog(lr: float, kind: str, value: float, eps: float, wd: float):
    r, gathered = 0.0, 0.0

    def step(t: int, g: Tensor, p: Tensor, first: Tensor) -> Tensor:
        nonlocal r, gathered
        g = g + wd * p
        least = {"heuristic": value * (1 + first.norm().item()), "distance": value}
        r = max(r, least.get(kind, 0.0), (p - first).norm().item())
        gathered += g.norm().item() ** 2
        first_rate = kind == "learning_rate" and t == 1
        eta = value if first_rate else r / math.sqrt(gathered + eps)
        return p - lr * eta * g

    return step


@compares("dog", "scale_by_dog", reference="plain: the paper")
@pytest.mark.parametrize(
    "options",
    [
        (1.0, "heuristic", 1e-6, 1e-8, 0.0),
        (0.5, "distance", 0.1, 1e-2, 0.1),
        (2.0, "learning_rate", 0.05, 1e-8, 0.02),
        (0.2, "heuristic", 0.1, 1.0, 0.5),
    ],
)
def test_dog_is_that_of_the_paper(options: tuple) -> None:
    lr, kind, value, eps, wd = options
    ours = train(fo.dog(lr, (kind, value), eps, wd))
    assert_same(ours, train_whole(plain_dog(*options)))


def plain_dowg(lr: float, least: float | None, eps: float, wd: float):
    s, gathered = least or eps, 0.0

    def step(t: int, g: Tensor, p: Tensor, first: Tensor) -> Tensor:
        nonlocal s, gathered
        g = g + wd * p
        s = max(s, (p - first).norm().item() ** 2)
        gathered += s * g.norm().item() ** 2
        return p - lr * s / (math.sqrt(gathered) + eps) * g

    return step


@compares("dowg", "scale_by_dowg", reference="plain: the paper")
@pytest.mark.parametrize(
    "options",
    [
        (1.0, None, 1e-4, 0.0),
        (0.5, 0.1, 1e-2, 0.1),
        (2.0, 1e-3, 1e-8, 0.02),
        (0.2, 1.0, 1.0, 0.5),
    ],
)
def test_dowg_is_that_of_the_paper(options: tuple) -> None:
    assert_same(train(fo.dowg(*options)), train_whole(plain_dowg(*options)))


# ---- Prodigy, the authors' code ---------------------------------------------------------------------------------------------------


def plain_prodigy(
    lr: float | Tensor,
    betas: tuple[float, float],
    beta3: float | None,
    d0: float,
    coef: float,
    wd: float,
    safeguard: bool,
    growth: float,
    corrected: bool,
):
    (b1, b2), d, d_max, r = betas, d0, d0, 0.0
    b3 = math.sqrt(b2) if beta3 is None else beta3
    m = v = s = torch.tensor(0.0)

    def step(t: int, g: Tensor, p: Tensor, first: Tensor) -> Tensor:
        nonlocal d, d_max, r, m, v, s
        bias = math.sqrt(1 - b2**t) / (1 - b1**t) if corrected else 1.0
        dlr = d * lr * bias
        r = b3 * r + d / d0 * torch.dot(dlr * g, first - p).item()
        m = b1 * m + d * (1 - b1) * g
        v = b2 * v + d * d * (1 - b2) * g**2
        s = b3 * s + d / d0 * (d * (lr > 0) if safeguard else dlr) * g
        estimate = coef * r / s.abs().sum().item()
        if d == d0:
            d = max(d, estimate)
        d_max = max(d_max, estimate)
        d = min(d_max, d * growth)
        return p - dlr * wd * p - dlr * m / (v.sqrt() + d * 1e-8)

    return step


@compares(
    "prodigy",
    reference="plain: the authors' code",
    remark="optax 0.2.8 has other numbers",
)
@pytest.mark.parametrize(
    "options",
    [
        (1.0, (0.9, 0.999), None, 1e-6, 1.0, 0.0, False, math.inf, False),
        (0.5, (0.8, 0.9), 0.95, 1e-3, 2.0, 0.1, True, 1.02, True),
        (2.0, (0.5, 0.99), None, 1e-2, 0.5, 0.02, False, 1.5, False),
        (1.0, (0.9, 0.99), 0.5, 1e-4, 1.0, 0.0, True, math.inf, False),
    ],
)
def test_prodigy_is_that_of_its_authors(options: tuple) -> None:
    lr, betas, beta3, d0, coef, wd, safeguard, growth, corrected = options
    tx = fo.prodigy(
        lr,
        betas,
        beta3,
        1e-8,
        d0,
        coef,
        wd,
        safeguard,
        growth_rate=None if growth == math.inf else growth,
        use_bias_correction=corrected,
    )
    assert_same(train(tx), train_whole(plain_prodigy(*options)))


def only_vectors(path: str, p: Tensor) -> bool:
    return path in ("b", "scale")


@compares(
    "prodigy",
    reference="plain: the authors' code",
    remark="optax 0.2.8 has other numbers",
)
@pytest.mark.parametrize(
    "mask", [{name: only_vectors(name, p) for name, p in draw(0).items()}, only_vectors]
)
def test_prodigy_decays_where_the_mask_says(mask: Any) -> None:
    """The mask is that of optax after 0.2.8; in the authors' package it is a group without decay."""
    decay = of_elements((0.0, 0.3))
    given = (0.5, (0.9, 0.99), None, 1e-3, 1.0, decay, False, 1.5, True)
    tx = fo.prodigy(
        *(0.5, (0.9, 0.99), None, 1e-8, 1e-3, 1.0, 0.3, False, mask),
        growth_rate=1.5,
        use_bias_correction=True,
    )
    expected = train_whole(plain_prodigy(*given))
    assert_same(train(tx), expected)
    assert_same(train(fo.masked(tx, True)), expected)


# ---- Prodigy of groups, and Schedule-Free around it, the authors' packages -----------------------------------------------------


def of_elements(numbers: tuple[float, float]) -> Tensor:
    """For each element of all parameters the number of its group."""
    return torch.cat(
        [
            torch.full((x.numel(),), numbers[name in ("b", "scale")], dtype=x.dtype)
            for name, x in draw(0).items()
        ]
    )


def train_in_groups(
    make: Callable[[list], torch.optim.Optimizer], *options: dict[str, float]
) -> dict[str, Tensor]:
    """Two groups with these options."""
    params = {name: torch.nn.Parameter(p) for name, p in draw(0).items()}
    names = ("kernel", "w"), ("b", "scale")
    groups = [
        {"params": [params[name] for name in some], **given}
        for some, given in zip(names, options, strict=True)
    ]
    opt = make(groups)
    for t in range(1, STEPS + 1):
        for name, g in draw(t).items():
            params[name].grad = g
        opt.step()
    return {name: p.detach() for name, p in params.items()}


@pytest.mark.parametrize("decays", [(0.1, 0.0), (0.02, 0.5)])
def test_prodigy_of_groups_has_one_distance_and_a_decay_for_each(decays: tuple) -> None:
    """In the authors' package the d of all groups is one."""
    decay = of_elements(decays)
    given = (1.0, (0.9, 0.999), None, 1e-3, 1.0, decay, False, math.inf, False)
    options = [{"weight_decay": x} for x in decays]
    ours = train_in_groups(lambda gs: fo.optim.Prodigy(gs, estim_lr0=1e-3), *options)
    assert_same(ours, train_whole(plain_prodigy(*given)))


@pytest.mark.parametrize("safeguard", [False, True])
@pytest.mark.parametrize("rates", [(1.0, 0.0), (0.5, 0.0), (1.0, 0.25)])
def test_prodigy_of_groups_with_other_rates(rates: tuple, safeguard: bool) -> None:
    """In the authors' package a rate is the same for all or 0; here it may be any."""
    lr = of_elements(rates)
    given = (lr, (0.9, 0.99), None, 1e-3, 1.0, 0.1, safeguard, 1.5, True)
    more = {"growth_rate": 1.5, "use_bias_correction": True}
    more |= {"safeguard_warmup": safeguard, "weight_decay": 0.1}
    ours = train_in_groups(
        lambda gs: fo.optim.Prodigy(gs, 1.0, (0.9, 0.99), estim_lr0=1e-3, **more),
        *[{"lr": x} for x in rates],
    )
    assert_same(ours, train_whole(plain_prodigy(*given)))


@pytest.mark.parametrize("make", [fo.prodigy, fo.schedule_free_prodigy])
def test_the_lr_of_a_group_is_a_factor_of_the_rate(make: Callable) -> None:
    """Also in the estimate of d."""
    ours = train_in_groups(
        lambda gs: fo.optim.Optimizer(gs, make(2.0, estim_lr0=1e-3), lr=0.25), {}, {}
    )
    assert_same(ours, train(make(0.5, estim_lr0=1e-3)))


def test_a_group_with_a_rate_of_zero_says_nothing_of_d_adaptation() -> None:
    def make(groups: list) -> torch.optim.Optimizer:
        return fo.optim.DAdaptAdamW(groups, 1.0, estim_lr0=1e-3, weight_decay=0.1)

    ours = train_in_groups(make, {"lr": 1.0}, {"lr": 0.0})
    tx = fo.dadapt_adamw(1.0, estim_lr0=1e-3, weight_decay=0.1)
    alone = train(
        fo.masked(tx, lambda path, p: path in ("kernel", "w"), otherwise="zero")
    )
    assert_same(ours, alone)


def test_prodigy_may_have_a_distance_for_each_group() -> None:
    tx = fo.partition(
        {"one": fo.prodigy(estim_lr0=1e-2), "other": fo.prodigy(estim_lr0=1e-3)},
        {"kernel": "one", "w": "one", "b": "other", "scale": "other"},
    )
    together = train(tx)
    for d0, names in ((1e-2, ("kernel", "w")), (1e-3, ("b", "scale"))):
        tx, params = fo.prodigy(estim_lr0=d0), {name: draw(0)[name] for name in names}
        state = tx.init(params)
        for t in range(1, STEPS + 1):
            gs = {name: draw(t)[name] for name in names}
            updates, state = tx.update(gs, state, params)
            params = fo.apply_updates(params, updates)
        for name in names:
            torch.testing.assert_close(together[name], params[name])


def plain_schedule_free_prodigy(
    lr: float,
    b1: float,
    b2: float,
    b3: float | None,
    d0: float,
    coef: float,
    wd: float,
    safeguard: bool,
    power: float,
    growth: float,
):
    d, d_max, r, highest, total = d0, d0, 0.0, 0.0, 0.0
    b3 = math.sqrt(b2) if b3 is None else b3
    z = x = v = s = torch.tensor(0.0)

    def step(t: int, g: Tensor, y: Tensor, first: Tensor) -> Tensor:
        nonlocal d, d_max, r, highest, total, z, x, v, s
        z, x = (first, first) if t == 1 else (z, x)
        dlr = d * lr
        r = b3 * r + d / d0 * dlr * torch.dot(g, first - z).item()
        v = b2 * v + d * d * (1 - b2) * g**2
        s = b3 * s + d / d0 * (d if safeguard else dlr) * g
        estimate = coef * r / s.abs().sum().item()
        if d == d0:
            d = max(d, estimate)
        d_max = max(d_max, estimate)
        d = min(d_max, d * growth)
        z = z - dlr * wd * z
        z = z - dlr * d * g / (v.sqrt() + d * 1e-8)
        highest = max(highest, lr * d)
        total += highest**power
        c = highest**power / total
        x = (1 - c) * x + c * z
        return b1 * x + (1 - b1) * z

    return step


@compares(
    "schedule_free_prodigy",
    reference="plain: the authors' code",
    remark="their wrapper around Prodigy",
)
@pytest.mark.parametrize(
    "options",
    [
        (1.0, 0.9, 0.999, None, 1e-6, 1.0, 0.0, False, 2.0, math.inf),
        (0.5, 0.5, 0.9, 0.95, 1e-3, 2.0, 0.1, True, 2.0, math.inf),
        (2.0, 0.98, 0.99, None, 1e-2, 0.5, 0.02, False, 1.0, 1.02),
        (1.0, 0.8, 0.99, 0.5, 1e-4, 1.0, 0.0, True, 0.0, 1.5),
    ],
)
def test_schedule_free_prodigy_is_that_of_its_authors(options: tuple) -> None:
    *given, growth = options
    lr, b1, b2, b3, d0, coef, wd, safeguard, power = given
    tx = fo.schedule_free_prodigy(
        *(lr, (b1, b2), b3, 1e-8, d0, coef, wd, safeguard, power),
        growth_rate=None if growth == math.inf else growth,
    )
    assert_same(train(tx), train_whole(plain_schedule_free_prodigy(*options)))


# ---- MoMo and MoMo-Adam: the model of the loss, of values that are given ----------------------------------------------------------


def value_at(t: int) -> float:
    return 40 / t + 2 + math.sin(t)


def train_with_values(tx: fo.GradientTransformation) -> dict[str, Tensor]:
    params = draw(0)
    state = tx.init(params)
    for t in range(1, STEPS + 1):
        value = torch.tensor(value_at(t), dtype=torch.float64)
        updates, state = tx.update(draw(t), state, params, value=value)
        params = fo.apply_updates(params, updates)
    return params


def plain_momo(
    lr: float, b1: float, b2: float | None, lowest: float, wd: float, adapt: bool
):
    m, v, f, c, lower = torch.tensor(0.0), torch.tensor(0.0), 0.0, 0.0, lowest

    def step(t: int, g: Tensor, p: Tensor, first: Tensor) -> Tensor:
        nonlocal m, v, f, c, lower
        b, bias, d = (0.0 if t == 1 else b1), 1.0, torch.ones_like(g)
        if b2 is not None:
            v = b2 * v + (1 - b2) * g**2
            b, bias, d = b1, 1 - b1**t, (v / (1 - b2**t)).sqrt() + 1e-3
        m = b * m + (1 - b) * g
        f = b * f + (1 - b) * value_at(t)
        c = b * c + (1 - b) * torch.dot(g, p).item()
        model, size = f - c, torch.dot(m, m / d).item()
        there = torch.dot(m, p).item()
        cap = (1 + lr * wd) * model + there
        if adapt and cap < (1 + lr * wd) * bias * lower:
            lower = max(cap / (2 * bias * (1 + lr * wd)), lowest)
        tau = min(lr / bias, max(0.0, cap - (1 + lr * wd) * bias * lower) / size)
        if adapt:
            lower = max((model + there - tau * size / 2) / bias, lowest)
        return p / (1 + lr * wd) - tau * m / d

    return step


@pytest.mark.parametrize(
    "b2",
    [
        pytest.param(None, marks=compares("momo", reference="plain: the paper")),
        pytest.param(0.95, marks=compares("momo_adam", reference="plain: the paper")),
    ],
)
@pytest.mark.parametrize(
    "options",
    [
        (1.0, 0.9, 0.0, 0.0, False),
        (0.05, 0.5, -1.0, 0.1, False),
        (0.1, 0.9, 0.5, 0.1, True),
        (1.0, 0.7, 0.0, 0.0, True),
    ],
)
def test_momo_is_that_of_the_paper(options: tuple, b2: float | None) -> None:
    lr, b1, lowest, wd, adapt = options
    plain = {"lower_bound": lowest, "weight_decay": wd, "adapt_lower_bound": adapt}
    tx = (
        fo.momo(lr, b1, **plain)
        if b2 is None
        else fo.momo_adam(lr, b1, b2, 1e-3, **plain)
    )
    ours = train_with_values(tx)
    assert_same(ours, train_whole(plain_momo(lr, b1, b2, lowest, wd, adapt)))


# ---- D-Adaptation of Adam, the authors' code (dadaptation 3.2, decoupled, with its correction) --------------------------------------


def plain_dadapt(lr: float, betas: tuple[float, float], eps: float, d0: float, wd: float):
    (b1, b2), d, r = betas, d0, 0.0
    b3 = math.sqrt(b2)
    m = v = s = torch.tensor(0.0)

    def step(t: int, g: Tensor, p: Tensor, first: Tensor) -> Tensor:
        nonlocal d, r, m, v, s
        dlr = d * lr * math.sqrt(1 - b2**t) / (1 - b1**t)
        came = dlr * (g * s / (v.sqrt() + eps)).sum().item()
        m = b1 * m + dlr * (1 - b1) * g
        v = b2 * v + (1 - b2) * g**2
        s = b3 * s + dlr * (1 - b3) * g
        r = b3 * r + (1 - b3) * came
        d = max(d, r / ((1 - b3) * s.abs().sum().item()))
        return (1 - wd * dlr) * p - m / (v.sqrt() + eps)

    return step


@compares("dadapt_adamw", reference="plain: the authors' code")
@pytest.mark.parametrize(
    "options",
    [
        (1.0, (0.9, 0.999), 1e-8, 1e-6, 0.0),
        (0.5, (0.8, 0.9), 1e-3, 1e-3, 0.1),
        (2.0, (0.5, 0.99), 1e-2, 1e-2, 0.02),
        (0.1, (0.0, 0.5), 1e-8, 0.1, 0.0),
    ],
)
def test_dadapt_adamw_is_that_of_its_authors(options: tuple) -> None:
    assert_same(train(fo.dadapt_adamw(*options)), train_whole(plain_dadapt(*options)))


# ---- Mechanic, alg. 1, with the bound of the authors' later code ------------------------------------------------------------------


def plain_mechanic(
    rate: float, decay: float, eps: float, s_init: float, n: int, momentum: float
):
    """Around gradient descent with momentum; each part has a loop of its own."""
    betas = [1 - 0.1**i for i in range(1, n + 1)]
    r, m, v, s = [0.0] * n, [0.0] * n, [0.0] * n, [s_init] * n
    ball = torch.tensor(0.0)

    def step(t: int, g: Tensor, p: Tensor, first: Tensor) -> Tensor:
        nonlocal ball
        total, delta = sum(s), (first - p) / (sum(s) + eps)
        size = g.norm().item() / (p.norm().item() + eps)
        h = torch.dot(g + decay * total * size * p, delta).item()
        ball = g + momentum * ball
        for i, b in enumerate(betas):
            r[i] = b * r[i] + max(-m[i], min(h, m[i])) * s[i]
            m[i] = max(b * m[i], abs(h) + eps)
            v[i] = b**2 * v[i] + h**2
            wealth = s_init / n * m[i] + max(r[i], 0.0)
            s[i] = wealth / (math.sqrt(v[i]) + eps)
        return first - sum(s) * (delta + rate * ball)

    return step


@compares("mechanize", reference="plain: the paper", remark="around gradient descent")
@pytest.mark.parametrize(
    "options",
    [
        (1.0, 1e-2, 1e-8, 1e-6, 6, 0.0),
        (0.1, 0.1, 1e-3, 0.1, 3, 0.9),
        (1.0, 0.0, 1e-6, 1e-2, 1, 0.5),
        (0.5, 0.02, 1e-8, 1e-3, 4, 0.99),
    ],
)
def test_mechanic_is_that_of_its_authors(options: tuple) -> None:
    rate, decay, eps, s_init, n, momentum = options
    tx = fo.mechanize(fo.sgd(rate, momentum), decay, eps, s_init, n)
    assert_same(train(tx), train_whole(plain_mechanic(*options)))


def test_the_rate_of_mechanic_grows() -> None:
    """The comparison would say little if the factor stayed where it begins."""
    tx, params = fo.mechanize(fo.sgd(1.0)), draw(0)
    state = tx.init(params)
    for step in range(1, STEPS + 1):
        updates, state = tx.update(draw(step % 3), state, params)
        params = fo.apply_updates(params, updates)
    assert fo.get(state, "factor") > 10
