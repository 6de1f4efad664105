"""Optimizers with a preconditioner for each dim, beside their rules written out plainly.

The first factor of a matrix that is not square has a null space, in which rounding decides what the
eigenvectors are. So the plain rules make the first factor of the same products, bit for bit.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from parity_page import compares
from test_matrices import AUTHORS, Plain, assert_same, draw, train, train_plainly
from torch import Tensor

import functorch_opt as fo
from functorch_opt._core.points import has_point
from functorch_opt.optimizers.kronecker import Cutting

SHAPES = {"tall": (6, 4), "wide": (3, 5), "square": (4, 4), "kernel": (3, 2, 4)}


def mode(x: Tensor, k: int) -> Tensor:
    """The slices along dim k as rows."""
    return x.movedim(k, 0).reshape(x.shape[k], -1)


def gram(x: Tensor, k: int) -> Tensor:
    return mode(x, k) @ mode(x, k).T


def times(x: Tensor, k: int, a: Tensor) -> Tensor:
    """``a`` times the slices of x along dim k."""
    rest = [n for i, n in enumerate(x.shape) if i != k]
    return (a @ mode(x, k)).reshape(len(a), *rest).movedim(0, k)


def by_all(x: Tensor, matrices: list[Tensor]) -> Tensor:
    for k, a in enumerate(matrices):
        x = times(x, k, a)
    return x


def eigenvectors(a: Tensor) -> Tensor:
    one = torch.eye(len(a), dtype=a.dtype)
    return torch.linalg.eigh(a + 1e-30 * one)[1].flip(1)


def transposed(qs: list[Tensor]) -> list[Tensor]:
    return [q.T for q in qs]


# ---- blocks --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cutting", "shape", "sizes"),
    [
        (Cutting(10), (3, 4), [[3, 4]]),
        (Cutting(3), (3, 4), [[3, 0]]),
        (Cutting(3, blocks=True), (3, 4), [[3, 3], [3, 1]]),
        (Cutting(2, blocks=True), (3, 4), [[2, 2], [2, 2], [1, 2], [1, 2]]),
        (Cutting(10), (3, 1, 4, 1), [[3, 4]]),
        (Cutting(10, merged=8), (4, 3, 2, 2), [[4, 6, 2]]),
        (Cutting(20, merged=12), (4, 3, 2, 2), [[12, 4]]),
        (Cutting(10), (5,), [[0]]),
        (Cutting(10, least_dims=1), (5,), [[5]]),
        (Cutting(10), (1, 5), [[0]]),
        (Cutting(10, count_ones=True), (1, 5), [[5]]),
        (Cutting(20, merged=12, count_ones=True), (4, 3), [[12]]),
        (Cutting(20, merged=12), (4, 3), [[12]]),
        (Cutting(10), (), [[]]),
        (Cutting(10), (0, 2), [[0, 0]]),
    ],
    ids=str,
)
def test_how_tensors_are_cut(cutting: Cutting, shape: tuple, sizes: list) -> None:
    assert cutting.factors(shape) == sizes
    x = torch.randn(shape)
    blocks = cutting.cut(x)
    assert len(blocks) == len(sizes)
    assert torch.equal(cutting.joined(blocks, x), x)
    assert cutting.zeros()(x).numel() == sum(n * n for block in sizes for n in block)
    eyes = cutting.taken(cutting.ones(x), shape)
    for block, ns in zip(eyes, sizes, strict=True):
        assert [0 if q is None else len(q) for q in block] == ns
        assert all(torch.equal(q, torch.eye(len(q))) for q in block if q is not None)


@pytest.mark.parametrize(
    "make",
    [
        lambda **o: fo.scale_by_soap(frequency=2, **{"max_size": 9, **o}),
        lambda **o: fo.scale_by_shampoo(0.9, 0.9, 1e-3, 2, **{"max_size": 9, **o}),
        lambda **o: fo.scale_by_kl_soap(frequency=2, **{"max_size": 9, **o}),
        lambda **o: fo.scale_by_kl_shampoo(frequency=2, **{"max_size": 9, **o}),
    ],
    ids=["soap", "shampoo", "kl_soap", "kl_shampoo"],
)
def test_a_block_is_a_tensor_of_its_own(make: Callable) -> None:
    """Also where the last block is smaller."""
    blocks = {} if "by_shampoo" in repr(make()) else {"blocks": True}
    tx, one = make(max_size=3, **blocks), make()
    state, states = tx.init(draw(0, {"g": (5, 6)})["g"]), {}
    for t in range(5):
        g = draw(t, {"g": (5, 6)})["g"]
        u, state = tx.update(g, state)
        for i, j in itertools.product((0, 3), (0, 3)):
            block = g[i : i + 3, j : j + 3].contiguous()
            mine = states.get((i, j)) or one.init(torch.zeros_like(block))
            wanted, states[i, j] = one.update(block, mine)
            torch.testing.assert_close(u[i : i + 3, j : j + 3], wanted)


# ---- SOAP ----------------------------------------------------------------------------------------


def plain_soap(
    lr: float, b1: float, b2: float, eps: float, wd: float, frequency: int, correct: bool
) -> Plain:
    """With the mean kept in the eigenbasis, as the authors have it."""

    def make(p: Tensor) -> Callable:
        dims = range(p.dim())
        factors, qs = [], []
        m, v = torch.zeros_like(p), torch.zeros_like(p)

        def step(call: int, g: Tensor, p: Tensor) -> Tensor:
            nonlocal factors, qs, m, v
            if call == 1:
                factors = [(1 - b2) * gram(g, k) for k in dims]
                qs = [eigenvectors(f) for f in factors]
                return p
            t = call - 1
            h = by_all(g, transposed(qs))
            m = b1 * m + (1 - b1) * h
            v = b2 * v + (1 - b2) * h**2
            s = lr * (math.sqrt(1 - b2**t) / (1 - b1**t) if correct else 1)
            p = p - s * by_all(m / (v.sqrt() + eps), qs)
            p = p - lr * wd * p
            m = by_all(m, qs)
            factors = [b2 * f + (1 - b2) * gram(g, k) for k, f in enumerate(factors)]
            if t % frequency == 0:
                for k, f in enumerate(factors):
                    estimate = torch.diag(qs[k].T @ f @ qs[k])
                    order = estimate.argsort(descending=True)
                    v = v.index_select(k, order)
                    qs[k] = torch.linalg.qr(f @ qs[k][:, order])[0]
            m = by_all(m, transposed(qs))
            return p

        return step

    return make


@compares("soap", "scale_by_soap", reference=AUTHORS)
@pytest.mark.parametrize(
    "options",
    [
        (3e-3, 0.95, 0.95, 1e-8, 0.01, 10, True),
        (0.01, 0.9, 0.8, 1e-3, 0.1, 1, True),
        (0.02, 0.0, 0.99, 1e-2, 0.0, 3, False),
        (0.05, 0.5, 0.5, 1e-8, 0.2, 7, True),
    ],
)
def test_soap_is_that_of_its_authors(options: tuple) -> None:
    *given, correct = options
    ours = train(fo.soap(*given, bias_correction=correct), SHAPES)
    assert_same(ours, train_plainly(plain_soap(*options), SHAPES))


def test_a_row_and_a_column_have_a_factor() -> None:
    """As the authors have it, whose rule for vectors asks for the number of dims."""
    shapes = {"row": (1, 5), "column": (4, 1), "thin": (2, 1, 3)}
    options = 0.01, 0.9, 0.8, 1e-3, 0.1, 7, True
    ours = train(fo.soap(*options[:-1]), shapes)
    assert_same(ours, train_plainly(plain_soap(*options), shapes))


def test_dims_that_are_merged_into_one_have_its_factor() -> None:
    merged = train(fo.soap(0.01, merged=12), {"w": (4, 3)})
    grads = [draw(t, {"w": (4, 3)})["w"].flatten() for t in range(101)]
    tx, p = fo.soap(0.01, vectors=True), grads[0]
    state = tx.init(p)
    for g in grads[1:]:
        updates, state = tx.update(g, state, p)
        p = fo.apply_updates(p, updates)
    assert_same({"w": merged["w"].flatten()}, {"w": p})


@pytest.mark.parametrize("make", [fo.kl_shampoo, fo.kl_soap])
def test_kl_leaves_a_row_and_a_column_to_adamw(make: Callable) -> None:
    """Without a factor KL-Shampoo would step by the momentum itself, however large it is."""
    shapes = {"row": (1, 5), "column": (4, 1), "thin": (1, 4, 1)}
    adamw = fo.adamw(0.1, 0.8, 0.9, 1e-3, weight_decay=0.0)
    ours = train(make(0.1, 0.8, 0.9, 1e-3, weight_decay=0.5), shapes)
    assert_same(ours, train(adamw, shapes))


def test_soap_of_what_has_no_factor_is_adam() -> None:
    shapes = {"b": (4,), "scale": (), "large": (3, 5)}
    params = draw(0, shapes)
    tx, adam = fo.scale_by_soap(0.9, 0.99, max_size=2), fo.scale_by_adam(0.9, 0.99)
    state, of_adam = tx.init(params), adam.init(params)
    _, state = tx.update(draw(99, shapes), state)
    for t in range(5):
        u, state = tx.update(draw(t, shapes), state)
        wanted, of_adam = adam.update(draw(t, shapes), of_adam)
        # The eps of SOAP is of the moments without correction.
        assert_same(u, wanted, 1e-5)


# ---- Shampoo -------------------------------------------------------------------------------------


def root(a: Tensor, eps: float, power: float) -> Tensor:
    values, vectors = torch.linalg.eigh(a)
    values = values - min(values.min().item(), 0.0) + eps
    return vectors @ torch.diag(values**power) @ vectors.T


def plain_shampoo(
    lr: float,
    b1: float,
    b2: float,
    eps: float,
    wd: float,
    frequency: int,
    start: int,
    grafting: str,
    b3: float,
) -> Plain:
    def make(p: Tensor) -> Callable:
        dims = range(p.dim())
        factors = [p.new_zeros(n, n) for n in p.shape]
        roots: list[Tensor] = []
        m, v = torch.zeros_like(p), torch.zeros_like(p)

        def size_of(t: int, g: Tensor, mean: Tensor) -> Tensor:
            nonlocal v
            if grafting in ("none", "sgd"):
                return mean
            v = v + g**2 if grafting == "adagrad" else b3 * v + (1 - b3) * g**2
            corrected = v / (1 - b3**t) if grafting == "adam" else v
            return mean / (corrected.sqrt() + 1e-8)

        def step(t: int, g: Tensor, p: Tensor) -> Tensor:
            nonlocal factors, roots, m
            w = 1 if b2 == 1 else 1 - b2
            factors = [
                b2 * f + w * gram(g, k) for k, f in zip(dims, factors, strict=True)
            ]
            if t % frequency == 0 and t >= start:
                c = 1 if b2 == 1 else 1 - b2**t
                roots = [root(f / c, eps, -1 / (2 * p.dim())) for f in factors]
            m = b1 * m + (1 - b1) * g
            mean = m / (1 - b1**t)
            u = d = size_of(t, g, mean)
            if t >= start:
                u = by_all(mean, roots)
                if grafting != "none":
                    u = u * d.norm() / (u.norm() + 1e-16)
            return p - lr * (u + wd * p)

        return step

    return make


@compares("shampoo", "scale_by_shampoo", reference=AUTHORS)
@pytest.mark.parametrize(
    "options",
    [
        (0.01, 0.9, 1.0, 1e-3, 0.0, 1, 1, "adam", 0.999),
        (0.02, 0.5, 0.9, 1e-4, 0.1, 3, 6, "rmsprop", 0.9),
        (0.01, 0.0, 0.99, 1e-2, 0.02, 2, 3, "adagrad", 0.9),
        (0.05, 0.8, 0.5, 1e-3, 0.0, 4, 4, "sgd", 0.9),
        (0.05, 0.9, 0.8, 1e-2, 0.0, 5, 5, "none", 0.9),
    ],
    ids=lambda options: options[-2],
)
def test_shampoo_is_that_of_its_authors(options: tuple) -> None:
    *given, start, grafting, b3 = options
    tx = fo.shampoo(*given, start=start, grafting=grafting, graft_b2=b3)
    shapes = {**SHAPES, "b": (5,)}
    assert_same(train(tx, shapes), train_plainly(plain_shampoo(*options), shapes))


# ---- KL-Shampoo, KL-SOAP -------------------------------------------------------------------------


def of_kl(name: str) -> pytest.MarkDecorator:
    return compares(name, f"scale_by_{name}", reference=AUTHORS)


def plain_kl(
    lr: float,
    b1: float,
    b2: float,
    eps: float,
    wd: float,
    frequency: int,
    b3: float,
    init: float,
    soap: bool,
) -> Plain:
    """For matrices, as the authors have it."""

    def make(p: Tensor) -> Callable:
        n, m = p.shape
        left, right, ql, qr = (torch.empty(0, dtype=p.dtype) for _ in range(4))
        a, b = (torch.full((k,), init**-0.5, dtype=p.dtype) for k in p.shape)
        mean, v = torch.zeros_like(p), torch.zeros_like(p)

        def inverse(old: Tensor, value: Tensor) -> Tensor:
            new = 1 / (b3 / old**2 + (1 - b3) * value).sqrt()
            new = torch.where(new.isfinite(), new, torch.zeros_like(new))
            return new.clamp(max=max(10, min(len(new), 4000)))

        def step(call: int, g: Tensor, p: Tensor) -> Tensor:
            nonlocal left, right, ql, qr, a, b, mean, v
            if call == 1:
                left, right = (
                    (1 - b3) * gram(g, 0) * n / (n * m),
                    (1 - b3) * gram(g, 1) * m / (n * m),
                )
                ql, qr = eigenvectors(left), eigenvectors(right)
                return p
            t = call - 1
            h = ql.T @ g @ qr
            if soap:
                mean = b1 * mean + (1 - b1) * h
                v = b2 * v + (1 - b2) * h**2
                u = mean / (v.sqrt() + eps)
            else:
                mean = b1 * mean + (1 - b1) * g
                w = torch.outer(a, b)
                u = (ql.T @ mean @ qr) * (w / (1 + w * eps))
            p = p - lr * (ql @ u @ qr.T)
            p = p - lr * wd * p
            of_left, of_right = (g @ qr) * b, ((ql.T @ g).T * a).T
            left = b3 * left + (1 - b3) * of_left @ of_left.T / m
            right = b3 * right + (1 - b3) * of_right.T @ of_right / n
            value_l, value_r = ((h * b) ** 2).mean(1), ((h.T * a) ** 2).mean(1)
            a, b = inverse(a, value_l), inverse(b, value_r)
            if t % frequency == 0:
                mean = ql @ mean @ qr.T if soap else mean
                ql, qr = torch.linalg.qr(left @ ql)[0], torch.linalg.qr(right @ qr)[0]
                mean = ql.T @ mean @ qr if soap else mean
            return p

        return step

    return make


@pytest.mark.parametrize(
    "soap",
    [
        pytest.param(True, id="KL-SOAP", marks=of_kl("kl_soap")),
        pytest.param(False, id="KL-Shampoo", marks=of_kl("kl_shampoo")),
    ],
)
@pytest.mark.parametrize(
    "options",
    [
        (1e-3, 0.9, 0.98, 1e-8, 0.01, 10, 0.98, 0.1),
        (0.01, 0.5, 0.8, 1e-3, 0.1, 1, 0.9, 0.5),
        (0.02, 0.0, 0.9, 1e-2, 0.0, 3, 0.5, 2.0),
        (0.01, 0.8, 0.5, 1e-4, 0.0, 7, 0.99, 0.001),
    ],
)
def test_kl_is_that_of_its_authors(options: tuple, soap: bool) -> None:
    lr, b1, b2, eps, wd, frequency, b3, init = options
    make = fo.kl_soap if soap else fo.kl_shampoo
    shapes = {name: shape for name, shape in SHAPES.items() if len(shape) == 2}
    ours = train(make(lr, b1, b2, eps, wd, frequency, b3=b3, init=init), shapes)
    assert_same(ours, train_plainly(plain_kl(*options, soap), shapes))


# ---- SPlus ---------------------------------------------------------------------------------------


def plain_splus(
    lr: float,
    b1: float,
    b2: float,
    wd: float,
    frequency: int,
    ema: float,
    scale: float,
    at_x: bool,
    largest: int = 10000,
) -> Plain:
    """With `at_x` it returns where to evaluate, at the last step."""

    def make(p: Tensor) -> Callable:
        is_matrix = p.dim() == 2
        m, x = torch.zeros_like(p), torch.zeros_like(p)
        factors = [p.new_zeros(n, n) for n in p.shape]
        qs = [torch.eye(n, dtype=p.dtype) for n in p.shape]

        def step(t: int, g: Tensor, p: Tensor) -> Tensor:
            nonlocal m, x, factors, qs
            m = b1 * m + (1 - b1) * g
            by = lr * scale
            u = torch.sign(m)
            if is_matrix:
                by = by if max(p.shape) > largest else lr * 2 / sum(p.shape)
                u = by_all(torch.sign(by_all(m, transposed(qs))), qs)
                factors = [b2 * f + (1 - b2) * gram(g, k) for k, f in enumerate(factors)]
                if t == 1 or t % frequency == 0:
                    small = [k for k, n in enumerate(p.shape) if n <= largest]
                    for k in small:
                        qs[k] = eigenvectors(factors[k])
            p = p - by * u
            x = ema * x + (1 - ema) * p
            p = p * (1 - by * wd)
            return x / (1 - ema**t) if at_x and t == 100 else p

        return step

    return make


@compares("splus", "scale_by_splus", reference=AUTHORS)
@pytest.mark.parametrize(
    "options",
    [
        (0.1, 0.9, 0.999, 0.01, 100, 0.999, 1e-3),
        (0.5, 0.5, 0.9, 0.5, 1, 0.9, 0.1),
        (0.2, 0.0, 0.99, 0.0, 7, 0.0, 0.01),
        (0.3, 0.8, 0.5, 0.1, 3, 0.5, 1.0),
    ],
)
def test_splus_is_that_of_its_authors(options: tuple) -> None:
    lr, b1, b2, wd, frequency, ema, scale = options
    # A sign is decided by rounding where the null space of a factor meets the momentum.
    shapes = {"square": (4, 4), "kernel": (3, 2, 4), "b": (5,), "scale": ()}
    tx = fo.splus(lr, b1, b2, 1e-30, wd, frequency, ema=ema, scale=scale)
    assert_same(train(tx, shapes), train_plainly(plain_splus(*options, False), shapes))
    params = draw(0, shapes)
    state = tx.init(params)
    for t in range(1, 101):
        updates, state = tx.update(draw(t, shapes), state, params)
        params = fo.apply_updates(params, updates)
    at_x = train_plainly(plain_splus(*options, True), shapes)
    assert_same(fo.eval_params(tx, state, params), at_x)


def test_splus_has_no_basis_for_a_large_dim() -> None:
    """Where the other dim is not large, it has one all the same, and so has a row or a column."""
    shapes = {"tall": (6, 3), "wide": (4, 7), "large": (6, 7), "row": (1, 4)}
    options = 0.2, 0.5, 0.99, 0.1, 7, 0.9, 0.05
    lr, b1, b2, wd, frequency, ema, scale = options
    given = {"frequency": frequency, "ema": ema, "max_size": 5, "scale": scale}
    tx = fo.splus(lr, b1, b2, 1e-30, wd, **given)
    assert_same(train(tx, shapes), train_plainly(plain_splus(*options, False, 5), shapes))
    sizes = fo.get(tx.init(draw(0, shapes)), "factors")
    assert {name: x.numel() for name, x in sizes.items()} == {
        "tall": 9,
        "wide": 16,
        "large": 0,
        "row": 16,
    }


# ---- PSGD Kron -----------------------------------------------------------------------------------

KRON_SHAPES = {
    "tall": (6, 4),
    "square": (4, 4),
    "kernel": (3, 2, 4),
    "row": (1, 5),
    "b": (5,),
    "s": (),
}


def bound(a: Tensor) -> Tensor:
    largest = a.abs().max()
    a = a / largest
    x = a[:, (a * a).sum(0).argmax()]
    x = x @ a
    x = x / x.norm()
    return (a @ x).norm() * largest


def plain_kron(
    lr: float,
    b1: float,
    wd: float,
    step_size: float,
    scale: float,
    largest: int,
    every: int,
) -> Plain:
    """With Q updated at each `every`-th step. The noise is that of the tree of all shapes."""
    key = fo.random.key(5)

    def make(p: Tensor) -> Callable:
        name = next(name for name, x in draw(0, KRON_SHAPES).items() if torch.equal(x, p))
        dims = [*p.shape] or [1]
        if len(dims) > 2:
            dims = [
                dims[0] * dims[1],
                dims[2],
            ]  # (6, 4), which is as square as (3, 8) is not
        each = scale ** (1 / len(dims))
        full = [len(dims) > 1 and 1 < n <= largest for n in dims]
        pairs = list(zip(dims, full, strict=True))
        qs = [each * torch.eye(n, dtype=p.dtype).double() for n, _ in pairs]
        m = torch.zeros_like(p)

        def update(t: int, h: Tensor) -> Tensor:
            nonlocal qs
            noise = fo.random.normal_like(key, draw(0, KRON_SHAPES), torch.tensor(t - 1))[
                name
            ]
            v = noise.double().reshape(dims)
            h = h + (2.0**-23) ** 0.5 * h.abs().mean() * v
            a = by_all(h, qs)
            b = by_all(v, [torch.linalg.inv(q).T for q in qs])
            new = []
            for k, (q, is_full) in enumerate(zip(qs, full, strict=True)):
                aa, bb = gram(a, k), gram(b, k)
                if is_full:
                    new.append(q - step_size * torch.triu(aa - bb) / bound(aa + bb) @ q)
                else:
                    aa, bb = aa.diag(), bb.diag()
                    new.append(
                        q - torch.diag(step_size * (aa - bb) / (aa + bb).max()) @ q
                    )
            qs = new
            return h

        def step(t: int, g: Tensor, p: Tensor) -> Tensor:
            nonlocal m
            m = b1 * m + (1 - b1) * g
            h = (m / (1 - b1**t)).reshape(dims)
            if t % every == 0:
                h = update(t, h)
            u = by_all(h, [q.T @ q for q in qs]).reshape(p.shape)
            u = u * min(1.0, 1.1 / (u.square().mean().sqrt().item() + 1e-12))
            return p - lr * (u + (wd * p if p.dim() > 1 else 0))

        return step

    return make


@compares(
    "psgd_kron",
    "scale_by_psgd_kron",
    reference=AUTHORS,
    remark="with draws of `fo.random`",
)
@pytest.mark.parametrize(
    "options",
    [
        (3e-4, 0.9, 0.0, 0.1, 1.0, 8192, 1),
        (0.05, 0.5, 0.1, 0.3, 0.1, 8192, 3),
        (0.01, 0.0, 0.02, 0.05, 2.0, 4, 1),
        (0.02, 0.8, 0.0, 0.1, 0.5, 1, 2),
    ],
)
def test_psgd_kron_is_that_of_its_authors(options: tuple) -> None:
    lr, b1, wd, step_size, scale, largest, every = options
    ours = fo.psgd_kron(
        *(lr, b1, wd, step_size, 1 / every),
        key=5,
        init_scale=scale,
        max_size=largest,
        balance_probability=0.0,
    )
    theirs = train_plainly(plain_kron(*options), KRON_SHAPES)
    assert_same(train(ours, KRON_SHAPES), theirs)


def test_psgd_kron_draws_only_when_it_fits_and_ever_less_often(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tx = fo.scale_by_psgd_kron(probability=fo.psgd_probability(1.0, 0.25, 0.5, 3), key=0)
    params, fitted = {"w": draw(0)["tall"]}, []
    state = tx.init(params)
    for t in range(1, 20):
        before = fo.get(state, "q")["w"]
        with monkeypatch.context() as patch:
            drawn = []
            normal_like = fo.random.normal_like
            patch.setattr(
                fo.random,
                "normal_like",
                lambda *a, d=drawn, f=normal_like: d.append(1) or f(*a),
            )
            _, state = tx.update({"w": draw(t)["tall"]}, state, params)
        if not torch.equal(before, fo.get(state, "q")["w"]):
            fitted.append(t)
        assert bool(drawn) == (fitted[-1:] == [t])
    assert fitted[:4] == [1, 2, 3, 4]
    assert {b - a for a, b in itertools.pairwise(fitted[-3:])} == {4}


def test_balanced_preconditioners_have_one_size_and_the_same_product() -> None:
    from functorch_opt.optimizers.psgd_kron import balanced, multiplied

    g = draw(0)["tall"]
    qs = [torch.eye(6).double() * 8, torch.eye(4).double().triu() * 0.5]
    new = balanced(qs)
    assert new[0].abs().max() == pytest.approx(new[1].abs().max()) == pytest.approx(2.0)
    torch.testing.assert_close(multiplied(g, new), multiplied(g, qs))


# ---- how often, and what if it fails -------------------------------------------------------------


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    calls = {"eigh": 0, "qr": 0}
    with monkeypatch.context() as patch:
        for name in calls:
            f = getattr(torch.linalg, name)

            def call(*args, name=name, f=f):
                calls[name] += 1
                return f(*args)

            patch.setattr(torch.linalg, name, call)
        yield calls


TURNED = {2: ("eigh", 2), 6: ("qr", 2), 10: ("qr", 2)}
DECOMPOSITIONS = {
    "soap": (lambda: fo.soap(0.01, frequency=4), TURNED),
    "kl_soap": (lambda: fo.kl_soap(0.01, frequency=4), TURNED),
    "kl_shampoo": (lambda: fo.kl_shampoo(0.01, frequency=4), TURNED),
    "shampoo": (
        lambda: fo.shampoo(0.01, eps=1e-3, frequency=4),
        dict.fromkeys((4, 8, 12), ("eigh", 2)),
    ),
    "splus": (
        lambda: fo.splus(0.01, frequency=4),
        dict.fromkeys((2, 5, 9), ("eigh", 2)),
    ),
}
"""How each is made, and on which updates it makes how many decompositions of which kind."""


@pytest.mark.parametrize("stateful", [False, True])
@pytest.mark.parametrize("name", DECOMPOSITIONS)
def test_there_is_no_decomposition_on_steps_that_need_none(
    name: str, stateful: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, due = DECOMPOSITIONS[name]
    tx, params = make(), {"w": draw(0)["tall"]}
    state, w = tx.init(params), params["w"].clone().requires_grad_()
    optimizer = fo.optim.Optimizer([("w", w)], tx)
    for t in range(1, 13):
        g = draw(t)["tall"]
        with counted(monkeypatch) as calls:
            if stateful:
                w.grad = g
                optimizer.step()
            else:
                _, state = tx.update({"w": g}, state, params)
        kind, n = due.get(t, ("eigh", 0))
        assert calls == {"eigh": 0, "qr": 0, kind: n}, f"step {t}"


@pytest.mark.parametrize("error", [False, True], ids=["NaN", "error"])
@pytest.mark.parametrize("kind", ["eigh", "qr"])
@pytest.mark.parametrize("name", DECOMPOSITIONS)
def test_a_failed_decomposition_keeps_the_last_basis_and_is_counted(
    name: str, kind: str, error: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, due = DECOMPOSITIONS[name]
    steps = [t for t, (which, _) in due.items() if which == kind]
    if not steps:
        pytest.skip("makes no such decomposition")
    tx, params = make(), {"w": draw(0)["tall"]}
    state = tx.init(params)
    for t in range(1, steps[0]):
        _, state = tx.update({"w": draw(t)["tall"]}, state, params)
    slot = "roots" if name == "shampoo" else "bases"
    before = fo.get(state, slot)["w"]
    f = getattr(torch.linalg, kind)

    def failing(x: Tensor) -> object:
        if error and not torch.equal(x, torch.eye(len(x))):
            raise torch.linalg.LinAlgError("did not converge")
        return type(f(x))([torch.full_like(part, torch.nan) for part in f(x)])

    with monkeypatch.context() as patch:
        patch.setattr(torch.linalg, kind, failing)
        updates, state = tx.update({"w": draw(99)["tall"]}, state, params)
    assert torch.equal(fo.get(state, slot)["w"], before)
    assert fo.get(state, "failed")["w"] == due[steps[0]][1]
    assert updates["w"].isfinite().all() and updates["w"].norm() > 0
    for t in range(50, 60):
        updates, state = tx.update({"w": draw(t)["tall"]}, state, params)
    assert not torch.equal(fo.get(state, slot)["w"], before)
    assert fo.get(state, "failed")["w"] == due[steps[0]][1]


# ---- factors without full rank -------------------------------------------------------------------

DEFICIENT = {
    "shampoo": lambda: fo.shampoo(0.01),
    "soap": lambda: fo.soap(0.01, frequency=2),
    "kl_shampoo": lambda: fo.kl_shampoo(0.01, frequency=2),
    "kl_soap": lambda: fo.kl_soap(0.01, frequency=2),
    "splus": lambda: fo.splus(0.1, frequency=2),
    "psgd_kron": lambda: fo.psgd_kron(0.01, key=0),
}


def of_rank_one(seed: int, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """With a row and a column of zeros."""
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(n, generator=generator, dtype=dtype) for n in shape)
    left[0], right[-1] = 0, 0
    return torch.outer(left, right)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(6, 4), (3, 5), (4, 4)], ids=str)
@pytest.mark.parametrize("name", DEFICIENT)
def test_factors_of_rank_one(name: str, shape: tuple, dtype: torch.dtype) -> None:
    """What their null space does is finite, no decomposition fails, and the steps go downhill."""
    tx, g = DEFICIENT[name](), of_rank_one(0, shape, dtype)
    params = {"w": torch.zeros(shape, dtype=dtype)}
    state, first = tx.init(params), params
    for _ in range(12):
        updates, state = tx.update({"w": g}, state, params)
        assert updates["w"].isfinite().all()
        params = fo.apply_updates(params, updates)
    moved = params["w"] - first["w"]
    assert (moved * g).sum() < -0.1 * moved.norm() * g.norm()
    assert all(x.isfinite().all() for x in fo.tree.leaves(state))
    if name != "psgd_kron":
        assert fo.get(state, "failed")["w"] == 0


@pytest.mark.parametrize("name", DEFICIENT)
def test_a_first_factor_without_full_rank_is_grown_out_of(name: str) -> None:
    """After a first gradient of rank one, others come: the loss of a matrix falls all the same."""
    tx = DEFICIENT[name]()
    target = draw(1)["tall"]
    params = {"w": torch.zeros_like(target)}
    state = tx.init(params)
    grads = {"w": of_rank_one(3, (6, 4), target.dtype)}
    for _ in range(600):
        updates, state = tx.update(grads, state, params)
        params = fo.apply_updates(params, updates)
        grads = {"w": params["w"] - target}
    params = fo.eval_params(tx, state, params) if has_point(tx) else params
    assert (params["w"] - target).norm() < 0.2 * target.norm()
