"""GaLore, Fira and APOLLO, beside the authors' code written out for one matrix."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from parity_page import compares
from test_authors import plain_adam
from test_matrices import SHAPES, assert_same, draw, train, train_plainly
from torch import Tensor

import functorch_opt as fo
from functorch_opt.optimizers.low_rank import LowRank

AUTHORS = "plain: the authors' code"
ALL = {**SHAPES, "vector": (5,)}


class Plain:
    """What the three have in common: a matrix, a projection, and Adam's moments of it."""

    def __init__(self, rank: int, gap: int, b1: float, b2: float, eps: float) -> None:
        self.rank, self.gap, self.b1, self.b2, self.eps = rank, gap, b1, b2, eps
        self.m, self.v, self.last = torch.tensor(0.0), torch.tensor(0.0), None
        self.left = self.right = None

    def find(self, t: int, g: Tensor) -> None:
        if (t - 1) % self.gap == 0:
            u, _, vh = torch.linalg.svd(g, full_matrices=False)
            self.left, self.right = u[:, : self.rank], vh[: self.rank]

    def is_tall(self, g: Tensor) -> bool:
        return g.shape[0] >= g.shape[1]

    def project(self, g: Tensor) -> Tensor:
        return g @ self.right.T if self.is_tall(g) else self.left.T @ g

    def back(self, s: Tensor, g: Tensor) -> Tensor:
        return s @ self.right if self.is_tall(g) else self.left @ s

    def adam(self, s: Tensor) -> Tensor:
        self.m = self.b1 * self.m + (1 - self.b1) * s
        self.v = self.b2 * self.v + (1 - self.b2) * s**2
        return self.m / (self.v.sqrt() + self.eps)

    def factor(self, d: Tensor, s: Tensor, g: Tensor) -> Tensor:
        dim = 1 if self.is_tall(g) else 0
        sizes = (d**2).sum(dim).sqrt() / ((s**2).sum(dim).sqrt() + 1e-8)
        return sizes[:, None] if dim == 1 else sizes[None]

    def limit(self, w: Tensor) -> Tensor:
        size = math.sqrt((w**2).sum().item())
        if self.last is not None:
            too_large = max(size / (self.last + 1e-8), 1.01) / 1.01
            w, size = w / too_large, size / too_large
        self.last = size
        return w

    def correction(self, t: int) -> float:
        return math.sqrt(1 - self.b2**t) / (1 - self.b1**t)


def stepped(
    lr: float,
    b1: float,
    b2: float,
    eps: float,
    wd: float,
    direction: Callable[[Plain], Callable[[int, Tensor], Tensor]],
    rank: int,
    gap: int,
):
    """`direction` for matrices; Adam without decay for the rest."""

    def make(p: Tensor) -> Callable:
        if p.dim() < 2:
            adam = plain_adam(b1, b2, eps)
            return lambda t, g, p: p - lr * adam(t, g)
        of = direction(Plain(rank, gap, b1, b2, eps))

        def step(t: int, g: Tensor, p: Tensor) -> Tensor:
            p = p - lr * of(t, g)
            return p - lr * wd * p

        return step

    return make


OPTIONS = [
    (0.01, 128, 200, 0.25, 0.9, 0.999, 1e-6, 0.0),
    (0.05, 2, 7, 0.5, 0.9, 0.99, 1e-3, 0.1),
    (0.1, 1, 1, 1.0, 0.5, 0.9, 1e-2, 0.02),
    (0.02, 3, 30, 2.0, 0.95, 0.7, 1e-8, 0.5),
]


def plain_galore(scale: float) -> Callable:
    def direction(of: Plain) -> Callable:
        def step(t: int, g: Tensor) -> Tensor:
            of.find(t, g)
            return of.correction(t) * scale * of.back(of.adam(of.project(g)), g)

        return step

    return direction


def plain_fira(scale: float) -> Callable:
    def direction(of: Plain) -> Callable:
        def step(t: int, g: Tensor) -> Tensor:
            of.find(t, g)
            s = of.project(g)
            d = of.adam(s)
            w = of.limit((g - scale * of.back(s, g)) * of.factor(d, s, g))
            return of.correction(t) * (scale * of.back(d, g) + w)

        return step

    return direction


@compares("galore", "scale_by_galore", reference=AUTHORS)
@pytest.mark.parametrize("options", OPTIONS)
def test_galore_is_that_of_its_authors(options: tuple) -> None:
    lr, rank, gap, scale, b1, b2, eps, wd = options
    plain = stepped(lr, b1, b2, eps, wd, plain_galore(scale), rank, gap)
    assert_same(train(fo.galore(*options), ALL), train_plainly(plain, ALL))


@compares("fira", "scale_by_fira", reference=AUTHORS)
@pytest.mark.parametrize("options", OPTIONS)
def test_fira_is_that_of_its_authors(options: tuple) -> None:
    lr, rank, gap, scale, b1, b2, eps, wd = options
    plain = stepped(lr, b1, b2, eps, wd, plain_fira(scale), rank, gap)
    assert_same(train(fo.fira(*options), ALL), train_plainly(plain, ALL))


def plain_apollo(scale: float, by_tensor: bool, draws: dict[int, Tensor]) -> Callable:
    """`draws` are standard normals for each step with a new projection, ``[r, shorter side]``."""

    def direction(of: Plain) -> Callable:
        def step(t: int, g: Tensor) -> Tensor:
            if (t - 1) % of.gap == 0:
                of.right = draws[t] / math.sqrt(len(draws[t]))
                of.left = of.right.T
            s = of.project(g)
            d = of.adam(s)
            factor = of.factor(d, s, g)
            if by_tensor:
                factor = math.sqrt((d**2).sum()) / (math.sqrt((s**2).sum()) + 1e-8)
            return of.correction(t) * math.sqrt(scale) * of.limit(g * factor)

        return step

    return direction


def draws_of_bases(rank: int, gap: int) -> dict[str, dict[int, Tensor]]:
    """For each matrix, and each step with a new projection, ``[r, shorter side]``."""
    shapes = {name: (min(rank, min(s)), min(s)) for name, s in SHAPES.items()}
    draws: dict[str, dict[int, Tensor]] = {name: {} for name in SHAPES}
    for t in range(1, 101, gap):
        like = {name: torch.empty(shape) for name, shape in shapes.items()}
        drawn = fo.random.normal_like(fo.random.key(5), like, t - 1)
        for name, x in drawn.items():
            draws[name][t] = x.double()
    return draws


@compares(
    "apollo", "scale_by_apollo", reference=AUTHORS, remark="with draws of `fo.random`"
)
@pytest.mark.parametrize("scaling", ["channel", "tensor"])
@pytest.mark.parametrize("options", OPTIONS)
def test_apollo_is_that_of_its_authors(options: tuple, scaling: str) -> None:
    lr, rank, gap, scale, b1, b2, eps, wd = options
    draws = draws_of_bases(rank, gap)

    def make(p: Tensor) -> Callable:
        (name,) = [name for name, shape in SHAPES.items() if shape == p.shape]
        plain = plain_apollo(scale, scaling == "tensor", draws[name])
        return stepped(lr, b1, b2, eps, wd, plain, rank, gap)(p)

    tx = fo.apollo(*options, key=5, scaling=scaling)
    assert_same(train(tx), train_plainly(make))


# ---- around any optimizer ---------------------------------------------------------------------------


def plain_projected_momentum(scale: float, momentum: float) -> Callable:
    def direction(of: Plain) -> Callable:
        velocity = torch.tensor(0.0)

        def step(t: int, g: Tensor) -> Tensor:
            nonlocal velocity
            of.find(t, g)
            velocity = of.project(g) + momentum * velocity
            return scale * of.back(velocity, g)

        return step

    return direction


@compares("project_gradients", reference="plain: the paper", remark="of momentum")
@pytest.mark.parametrize(
    "options",
    [(128, 200, 0.25, 0.9), (2, 7, 0.5, 0.5), (1, 1, 1.0, 0.0), (3, 30, 2.0, 0.9)],
)
def test_any_optimizer_can_be_projected(options: tuple) -> None:
    rank, gap, scale, momentum = options
    direction = fo.project_gradients(fo.trace(momentum), rank, gap, scale)
    ours = train(fo.chain(direction, fo.scale(-0.05)))
    plain = plain_projected_momentum(scale, momentum)
    theirs = train_plainly(stepped(0.05, 0.0, 0.0, 0.0, 0.0, plain, rank, gap))
    assert_same(ours, theirs)


def plain_full_momentum(scale: float, momentum: float, draws: dict | None) -> Callable:
    """Fira of momentum; with `draws`, APOLLO of it."""

    def direction(of: Plain) -> Callable:
        velocity = torch.tensor(0.0)

        def step(t: int, g: Tensor) -> Tensor:
            nonlocal velocity
            if draws is None:
                of.find(t, g)
            elif (t - 1) % of.gap == 0:
                of.right = draws[t] / math.sqrt(len(draws[t]))
                of.left = of.right.T
            s = of.project(g)
            velocity = s + momentum * velocity
            factor = of.factor(velocity, s, g)
            if draws is not None:
                return math.sqrt(scale) * of.limit(g * factor)
            w = of.limit((g - scale * of.back(s, g)) * factor)
            return scale * of.back(velocity, g) + w

        return step

    return direction


@compares("project_gradients", reference=AUTHORS, remark="Fira and APOLLO of momentum")
@pytest.mark.parametrize("kind", ["fira", "apollo"])
@pytest.mark.parametrize(
    "options",
    [(128, 200, 0.25, 0.9), (2, 7, 0.5, 0.5), (1, 1, 1.0, 0.0), (3, 30, 2.0, 0.9)],
)
def test_any_optimizer_has_steps_of_full_rank(options: tuple, kind: str) -> None:
    rank, gap, scale, momentum = options
    draws = draws_of_bases(rank, gap) if kind == "apollo" else dict.fromkeys(SHAPES)

    def make(p: Tensor) -> Callable:
        (name,) = [name for name, shape in SHAPES.items() if shape == p.shape]
        plain = plain_full_momentum(scale, momentum, draws[name])
        return stepped(0.05, 0.0, 0.0, 0.0, 0.0, plain, rank, gap)(p)

    key = {"key": 5} if kind == "apollo" else {}
    inner = fo.trace(momentum)
    direction = fo.project_gradients(inner, rank, gap, scale, kind=kind, **key)
    ours = train(fo.chain(direction, fo.scale(-0.05)))
    assert_same(ours, train_plainly(make))


@pytest.mark.parametrize(("kind", "key"), [("apollo", None), ("fira", 0), ("galore", 0)])
def test_the_draws_of_apollo_need_a_key_and_nothing_else_has_one(
    kind: str, key: int | None
) -> None:
    with pytest.raises(ValueError, match="key is for the draws of kind='apollo' alone"):
        fo.project_gradients(fo.trace(0.9), kind=kind, key=key)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "more"),
    [(fo.scale_by_fira, {"kind": "fira"}), (fo.scale_by_apollo, {"kind": "apollo"})],
)
def test_the_first_step_around_adam_is_that_of_the_stage(
    make: Callable, more: dict
) -> None:
    """Later the bound of w is another one, since w is."""
    key = {"key": 5} if more["kind"] == "apollo" else {}
    adam = fo.scale_by_adam(0.9, 0.99, 0.0)
    around = fo.project_gradients(adam, 2, 10, 0.5, **more, **key)
    direct = make(2, 10, 0.5, 0.9, 0.99, 0.0, **key)
    params, g = draw(0), draw(1)
    ours, _ = around.update(g, around.init(params), params)
    theirs, _ = direct.update(g, direct.init(params), params)
    assert_same(ours, theirs, 1e-6)


def test_the_projection_of_adam_is_galore() -> None:
    """But for eps, which GaLore adds before the correction."""
    adam = fo.scale_by_adam(0.9, 0.99, 0.0, eps_root=0.0)
    ours = fo.chain(fo.project_gradients(adam, 2, 10, 0.5), fo.scale(-0.05))
    direct = fo.scale_by_galore(2, 10, 0.5, 0.9, 0.99, 0.0)
    assert_same(train(ours), train(fo.chain(direct, fo.scale(-0.05))), 1e-9)


# ---- what is kept, and when work is done -----------------------------------------------------------


def test_decompositions_are_made_on_the_steps_that_need_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = 0
    found = LowRank.leading

    def counted(*given: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal calls
        calls += 1
        return found(*given)

    monkeypatch.setattr(LowRank, "leading", counted)
    for tx in (fo.scale_by_galore(2, 25), fo.scale_by_fira(2, 25)):
        calls = 0
        train(tx)
        assert calls == 4 * len(SHAPES)


@pytest.mark.parametrize("make", [fo.scale_by_galore, fo.scale_by_fira])
def test_a_basis_that_cannot_be_found_is_the_last_one(make: Callable) -> None:
    """A gradient that is not finite does not spoil the basis; it is counted."""
    tx, params = make(1, 1, b1=0.0), draw(0)
    state = tx.init(params)
    _, state = tx.update(draw(1), state, params)
    before = fo.get(state, "basis")
    broken = {name: g.clone() for name, g in draw(2).items()}
    broken["tall"][0, 0] = float("inf")
    _, state = tx.update(broken, state, params)
    assert torch.equal(fo.get(state, "basis")["tall"], before["tall"])
    assert not torch.equal(fo.get(state, "basis")["wide"], before["wide"])
    assert fo.get(state, "failed") == {"tall": 1, "wide": 0, "square": 0}


@pytest.mark.parametrize("make", [fo.scale_by_fira, fo.scale_by_apollo])
def test_what_begins_with_a_zero_gradient_is_not_stuck(make: Callable) -> None:
    """As the first matrix of LoRA, behind one of zeros: with the authors' limit it moves by 1e-8."""
    tx = make(1, **({"key": 0} if make is fo.scale_by_apollo else {}))
    zero = torch.zeros(4, 3)
    _, state = tx.update(zero, tx.init(zero), zero)
    g = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    assert tx.update(g, state, zero)[0].norm() > 1e-2


@pytest.mark.parametrize(
    "tx",
    [
        fo.scale_by_galore(2),
        fo.scale_by_fira(2),
        fo.scale_by_apollo(2, key=0),
        fo.project_gradients(fo.trace(0.9), 2),
        fo.project_gradients(fo.trace(0.9), 2, kind="fira"),
        fo.project_gradients(fo.trace(0.9), 2, kind="apollo", key=0),
    ],
    ids=str,
)
def test_a_gradient_that_comes_after_the_first_step_moves(
    tx: fo.GradientTransformation,
) -> None:
    params = draw(0)
    _, state = tx.update({**draw(1), "tall": None}, tx.init(params), params)
    updates, _ = tx.update(draw(2), state, params)
    assert updates["tall"].norm() > 1e-2


def test_steps_of_galore_have_low_rank_and_those_of_fira_do_not() -> None:
    g = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    for make, rank in ((fo.scale_by_galore, 2), (fo.scale_by_fira, 6)):
        tx = make(2)
        u, _ = tx.update(g, tx.init(g), g)
        assert torch.linalg.matrix_rank(u) == rank


def test_a_batch_of_matrices_is_its_matrices() -> None:
    dims = fo.MatrixDims(rows=-2, columns=-1)
    stack = {"w": (3, 6, 4)}
    together = train(
        fo.chain(fo.scale_by_galore(2, 10, dims=dims), fo.scale(-0.1)), stack
    )
    first, grads = draw(0, stack)["w"], [draw(t, stack)["w"] for t in range(1, 101)]
    for i in range(3):
        tx, p = fo.chain(fo.scale_by_galore(2, 10), fo.scale(-0.1)), first[i]
        state = tx.init(p)
        for g in grads:
            updates, state = tx.update(g[i], state, p)
            p = fo.apply_updates(p, updates)
        torch.testing.assert_close(together["w"][i], p, rtol=1e-10, atol=1e-10)


def test_fused_matrices_are_refused() -> None:
    for make in (fo.scale_by_galore, fo.scale_by_fira):
        with pytest.raises(ValueError, match="takes no fused matrices"):
            make(dims=fo.MatrixDims(split=2))
