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
from test_matrices import Plain, assert_same, draw, train, train_plainly
from torch import Tensor

import functorch_opt as fo
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
    "make", [lambda **o: fo.scale_by_soap(frequency=2, **o)], ids=["soap"]
)
def test_a_block_is_a_tensor_of_its_own(make: Callable) -> None:
    """Also where the last block is smaller."""
    tx, one = make(max_size=3, blocks=True), make()
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


DECOMPOSITIONS = {
    "soap": (
        lambda: fo.soap(0.01, frequency=4),
        {2: ("eigh", 2), 6: ("qr", 2), 10: ("qr", 2)},
    ),
}


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
    before = fo.get(state, "bases")["w"]
    f = getattr(torch.linalg, kind)

    def failing(x: Tensor) -> object:
        if error and not torch.equal(x, torch.eye(len(x))):
            raise torch.linalg.LinAlgError("did not converge")
        return type(f(x))([torch.full_like(part, torch.nan) for part in f(x)])

    with monkeypatch.context() as patch:
        patch.setattr(torch.linalg, kind, failing)
        updates, state = tx.update({"w": draw(99)["tall"]}, state, params)
    assert torch.equal(fo.get(state, "bases")["w"], before)
    assert fo.get(state, "failed")["w"] == due[steps[0]][1]
    assert updates["w"].isfinite().all() and updates["w"].norm() > 0
    for t in range(50, 60):
        updates, state = tx.update({"w": draw(t)["tall"]}, state, params)
    assert not torch.equal(fo.get(state, "bases")["w"], before)
    assert fo.get(state, "failed")["w"] == due[steps[0]][1]
