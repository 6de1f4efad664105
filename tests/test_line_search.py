"""Line searches and L-BFGS.

They meet their conditions and find known minima, for many problems at once and compiled. They are
compared with torch.optim.LBFGS.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.func import grad_and_value, vmap

import functorch_opt as fo

F64 = torch.float64


def rosenbrock(p: Tensor) -> Tensor:
    return (100 * (p[1:] - p[:-1] ** 2) ** 2 + (1 - p[:-1]) ** 2).sum()


def minimize(tx: fo.GradientTransformation, f, p, steps: int):
    state = tx.init(p)
    for _ in range(steps):
        g, value = grad_and_value(f)(p)
        extra = {
            name: x
            for name, x in {"value": value, "grad": g, "value_fn": f}.items()
            if name in tx.extra_args
        }
        updates, state = tx.update(g, state, p, **extra)
        p = fo.apply_updates(p, updates)
    return p, state


def convex_problems(n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Log-sum-exp plus a quadratic, of 6 variables; some 100 times steeper than others."""
    generator = torch.Generator().manual_seed(1)
    A = (
        torch.randn(n, 6, 6, generator=generator, dtype=F64)
        * torch.logspace(-1, 1, n, dtype=F64)[:, None, None]
    )
    return (
        A,
        torch.randn(n, 6, generator=generator, dtype=F64),
        torch.randn(n, 6, generator=generator, dtype=F64),
    )


def convex(p: Tensor, A: Tensor, b: Tensor) -> Tensor:
    return torch.logsumexp(A @ p + b, 0) + 0.05 * (p**2).sum()


SEARCHES = {
    "zoom": fo.lbfgs(),
    "backtracking": fo.lbfgs(linesearch=fo.scale_by_backtracking_linesearch(30)),
    "descent": fo.chain(fo.sgd(1.0), fo.scale_by_zoom_linesearch(30)),
}


# ---- alone ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 10])
def test_rosenbrock(n: int) -> None:
    p, state = minimize(fo.lbfgs(), rosenbrock, torch.full((n,), -1.2, dtype=F64), 80)
    torch.testing.assert_close(p, torch.ones(n, dtype=F64), rtol=0, atol=1e-8)
    assert fo.get(state, "value") < 1e-15


def test_zoom_meets_both_conditions() -> None:
    generator = torch.Generator().manual_seed(0)
    tried = 0
    for _ in range(30):
        p = torch.randn(5, generator=generator, dtype=F64)
        g, value = grad_and_value(rosenbrock)(p)
        u = -g * 10 ** torch.empty((), dtype=F64).uniform_(-4, 1, generator=generator)
        tx = fo.scale_by_zoom_linesearch(
            40, approx_dec_rtol=None, slope_rtol=1e-3, curv_rtol=0.3
        )
        step, state = tx.update(
            u, tx.init(p), p, value=value, grad=g, value_fn=rosenbrock
        )
        new_g, new = grad_and_value(rosenbrock)(p + step)
        a = fo.get(state, "learning_rate")
        torch.testing.assert_close(step, a * u)
        torch.testing.assert_close(
            (fo.get(state, "value"), fo.get(state, "grad")), (new, new_g)
        )
        assert (
            new <= value + 1e-3 * a * (g @ u) and (new_g @ u).abs() <= 0.3 * (g @ u).abs()
        )
        tried += int(fo.get(state, "num_linesearch_steps"))
    assert tried > 90  # otherwise the first guesses were good, and nothing was searched


def test_backtracking_takes_the_first_that_decreases_enough() -> None:
    p = torch.tensor([-1.2, 1.0], dtype=F64)
    g, value = grad_and_value(rosenbrock)(p)
    tx = fo.chain(
        fo.scale(-1.0),
        fo.scale_by_backtracking_linesearch(60, slope_rtol=0.2, decrease_factor=0.5),
    )
    step, state = tx.update(g, tx.init(p), p, value=value, grad=g, value_fn=rosenbrock)
    good = [
        i
        for i in range(60)
        if rosenbrock(p - 0.5**i * g) <= value - 0.2 * 0.5**i * (g @ g)
    ]
    assert good[0] > 3
    assert fo.get(state, "num_linesearch_steps") == good[0] + 1
    torch.testing.assert_close(step, -(0.5 ** good[0]) * g)


def test_a_search_outside_the_domain() -> None:
    """p - log p is NaN beside p > 0.

    Where nothing is finite, the step is 0, and the next search starts anew.
    """

    def f(p: Tensor) -> Tensor:
        return (p - p.log()).sum()

    for search in (
        fo.scale_by_zoom_linesearch(30),
        fo.scale_by_backtracking_linesearch(30),
    ):
        p, _ = minimize(
            fo.chain(fo.sgd(50.0), search), f, torch.tensor([3.0, 0.2], dtype=F64), 40
        )
        torch.testing.assert_close(p, torch.ones(2, dtype=F64), rtol=0, atol=1e-4)
        p = torch.ones(1)
        for _ in range(2):
            step, state = search.update(
                p,
                search.init(p),
                p,
                value=f(p),
                grad=p,
                value_fn=lambda p: p.sum() * torch.nan,
            )
            assert step == 0
        again, _ = search.update(
            -p, state, p, value=0.0, grad=p, value_fn=lambda p: p.sum() - 1
        )
        assert again.isfinite() and again < 0


def test_a_frozen_parameter_is_left_alone() -> None:
    ps = {
        "a": torch.tensor([-1.2], dtype=F64),
        "b": torch.tensor([1.0], dtype=F64),
        "c": torch.tensor(2.0, dtype=F64),
    }

    def f(ps: dict) -> Tensor:
        return rosenbrock(torch.cat([ps["a"], ps["b"]])) * ps["c"]

    tx = fo.lbfgs()
    state = tx.init(ps)
    for _ in range(60):
        gs, value = grad_and_value(f)(ps)
        gs["c"] = None
        updates, state = tx.update(gs, state, ps, value=value, grad=gs, value_fn=f)
        ps = fo.apply_updates(ps, updates)
    torch.testing.assert_close(torch.cat([ps["a"], ps["b"]]), torch.ones(2, dtype=F64))
    assert ps["c"] == 2.0


def test_value_and_gradient_come_from_the_state() -> None:
    calls = []

    def counted(p: Tensor) -> Tensor:
        calls.append(1)
        return rosenbrock(p)

    tx, p, mine = (
        fo.lbfgs(),
        torch.tensor([-1.2, 1.0], dtype=F64),
        torch.tensor([-1.2, 1.0], dtype=F64),
    )
    state, value_and_grad, searched = tx.init(p), fo.value_and_grad_from_state(counted), 0
    for _ in range(20):
        value, g = value_and_grad(p, state=state)
        updates, state = tx.update(g, state, p, value=value, grad=g, value_fn=counted)
        p = fo.apply_updates(p, updates)
        searched += int(fo.get(state, "num_linesearch_steps"))
    assert len(calls) == searched + 1
    mine, _ = minimize(tx, rosenbrock, mine, 20)
    torch.testing.assert_close(p, mine)


# ---- many at once --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SEARCHES)
def test_a_hundred_problems_at_once_equal_a_loop(name: str) -> None:
    tx, (A, b, start) = SEARCHES[name], convex_problems(100)

    def solve(p: Tensor, A: Tensor, b: Tensor):
        return minimize(tx, lambda p: convex(p, A, b), p, 5)

    together = vmap(solve)(start, A, b)
    alone = [solve(start[i], A[i], b[i]) for i in range(0, 100, 7)]
    torch.testing.assert_close(
        together[0][::7], torch.stack([p for p, _ in alone]), rtol=1e-6, atol=1e-7
    )
    sizes, steps = (
        fo.get(together[1], "learning_rate"),
        fo.get(together[1], "num_linesearch_steps"),
    )
    assert (
        len(sizes.unique()) > 3 and len(steps.unique()) > 1
    )  # every problem has its own
    torch.testing.assert_close(
        steps[::7],
        torch.stack([fo.get(state, "num_linesearch_steps") for _, state in alone]),
    )


def test_a_hundred_problems_are_solved() -> None:
    A, b, start = convex_problems(100)
    p, _ = vmap(lambda p, A, b: minimize(fo.lbfgs(), lambda p: convex(p, A, b), p, 60))(
        start, A, b
    )
    gs = vmap(lambda p, A, b: grad_and_value(convex)(p, A, b)[0])(p, A, b)
    assert gs.abs().max() < 1e-5


# ---- compiled ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("batched", [False, True])
def test_compiles_to_one_graph(batched: bool) -> None:
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    tx = fo.lbfgs(
        memory_size=2,
        linesearch=fo.scale_by_zoom_linesearch(4, initial_guess_strategy="one"),
    )

    def step(p, state):
        g, value = grad_and_value(rosenbrock)(p)
        updates, state = tx.update(g, state, p, value=value, grad=g, value_fn=rosenbrock)
        return fo.apply_updates(p, updates), state

    step, init = (vmap(step), vmap(tx.init)) if batched else (step, tx.init)
    p = torch.tensor([[-1.2, 1.0], [0.3, 2.0]], dtype=F64)
    p = p if batched else p[0]
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    ours, state = p, init(p)
    mine = state
    for _ in range(4):
        p, state = step(p, state)
        ours, mine = compiled(ours, mine)
        torch.testing.assert_close((ours, mine), (p, state), rtol=1e-9, atol=1e-9)
    assert len(graphs) == 1


# ---- against torch.optim.LBFGS -------------------------------------------------------------------


def test_first_directions_are_those_of_torch() -> None:
    """At the same fixed step size.

    The first step of torch is min(1, 1 / |g|_1) long, so both begin at its second.
    """
    p = torch.tensor([0.5, -0.3, 0.8], dtype=F64)
    A = torch.diag(torch.tensor([1.0, 5.0, 20.0], dtype=F64)) + 0.3
    theirs = p.clone().requires_grad_()
    opt = torch.optim.LBFGS(
        [theirs], lr=0.5, max_iter=1, history_size=4, tolerance_grad=0, tolerance_change=0
    )

    def closure():
        opt.zero_grad()
        loss = 0.5 * theirs @ A @ theirs
        loss.backward()
        return loss

    tx = fo.scale_by_lbfgs(memory_size=4)
    state = tx.init(p)
    for step in range(8):
        opt.step(closure)
        direction, state = tx.update(A @ p, state, p)
        p = theirs.detach().clone() if step == 0 else p - 0.5 * direction
        torch.testing.assert_close(p, theirs.detach(), rtol=1e-10, atol=1e-12)


def test_logistic_regression_on_digits_beside_torch() -> None:
    datasets = pytest.importorskip(
        "sklearn.datasets",
        reason="the digits need scikit-learn: pip install scikit-learn",
    )
    digits = datasets.load_digits()
    x, y = (
        torch.tensor(digits.data / 16, dtype=F64)[:600],
        torch.tensor(digits.target)[:600],
    )

    def loss(ps: dict) -> Tensor:
        return (
            torch.nn.functional.cross_entropy(x @ ps["w"] + ps["b"], y)
            + 1e-3 * (ps["w"] ** 2).sum()
        )

    start = {"w": torch.zeros(64, 10, dtype=F64), "b": torch.zeros(10, dtype=F64)}
    ours, _ = minimize(fo.lbfgs(), loss, start, 60)
    theirs = {name: p.clone().requires_grad_() for name, p in start.items()}
    opt = torch.optim.LBFGS(
        theirs.values(),
        max_iter=60,
        history_size=10,
        line_search_fn="strong_wolfe",
        tolerance_change=0,
    )

    def closure():
        opt.zero_grad()
        value = loss(theirs)
        value.backward()
        return value

    opt.step(closure)
    assert loss(start) > 2
    torch.testing.assert_close(loss(ours), loss(theirs).detach(), rtol=1e-4, atol=0)


# ---- as torch optimizers -------------------------------------------------------------------------


def stateful(tx: fo.GradientTransformation, steps: int) -> Tensor:
    p = torch.tensor([-0.9, 1.3], dtype=F64, requires_grad=True)
    opt = fo.optim.Optimizer([p], tx)

    def closure() -> Tensor:
        opt.zero_grad()
        loss = rosenbrock(p)
        loss.backward()
        return loss

    for _ in range(steps):
        opt.step(closure)
    return p.detach()


@pytest.mark.parametrize(
    "tx", [fo.polyak_sgd(0.1), fo.lbfgs(1e-3, linesearch=None)], ids=repr
)
def test_a_closure_gives_the_value(tx: fo.GradientTransformation) -> None:
    torch.testing.assert_close(
        stateful(tx, 20),
        minimize(tx, rosenbrock, torch.tensor([-0.9, 1.3], dtype=F64), 20)[0],
    )


def test_what_a_closure_cannot_give_is_an_error_and_nothing_moves() -> None:
    p = torch.ones(2, requires_grad=True)
    p.sum().backward()
    with pytest.raises(TypeError, match="Give step a closure that returns the loss"):
        fo.optim.Optimizer([p], fo.polyak_sgd()).step()
    with pytest.raises(TypeError, match=r"reads value_fn\. A closure cannot provide it"):
        fo.optim.Optimizer([p], fo.lbfgs()).step(lambda: 1.0)
    assert torch.equal(p, torch.ones(2))


# ---- errors --------------------------------------------------------------------------------------

P = torch.ones(2)
WRONG = {
    "steps": (
        lambda: fo.scale_by_zoom_linesearch(0),
        ValueError,
        "max_linesearch_steps must be a whole number",
    ),
    "steps as a float": (
        lambda: fo.scale_by_backtracking_linesearch(2.5),
        ValueError,
        "max_backtracking_steps",
    ),
    "decrease": (
        lambda: fo.scale_by_backtracking_linesearch(5, decrease_factor=1.5),
        ValueError,
        "decrease_factor must be in",
    ),
    "increase": (
        lambda: fo.scale_by_backtracking_linesearch(5, increase_factor=0.5),
        ValueError,
        "increase_factor must be 1 or greater",
    ),
    "guess": (
        lambda: fo.scale_by_zoom_linesearch(5, initial_guess_strategy="two"),
        ValueError,
        "'keep' or 'one'",
    ),
    "curvature": (
        lambda: fo.scale_by_zoom_linesearch(5, curv_rtol=0.0),
        ValueError,
        "curv_rtol must be greater than 0",
    ),
    "memory": (
        lambda: fo.lbfgs(memory_size=0),
        ValueError,
        "memory_size must be a whole number",
    ),
    "variant": (lambda: fo.polyak_sgd(variant="sps2"), ValueError, "'sps' or 'sps\\+'"),
    "nothing given": (
        lambda: fo.lbfgs().update(P, fo.lbfgs().init(P), P),
        TypeError,
        "reads value, grad, value_fn",
    ),
    "no params": (lambda: searched(P, None), ValueError, "reads the parameters"),
    "two values": (
        lambda: searched(P, P, value=P),
        ValueError,
        "must be one real number",
    ),
    "no function": (
        lambda: searched(P, P, value_fn=3.0),
        TypeError,
        "value_fn must be a function",
    ),
    "grad of another shape": (
        lambda: searched(P, P, grad=torch.ones(3)),
        ValueError,
        "must be equal",
    ),
    "another's state": (
        lambda: fo.scale_by_lbfgs().update(P, fo.trace(0.9).init(P), P),
        ValueError,
        "not a state of scale_by_lbfgs",
    ),
    "no gradient kept": (
        lambda: fo.value_and_grad_from_state(torch.sum)(
            P, state=fo.scale_by_backtracking_linesearch(5).init(P)
        ),
        KeyError,
        "nothing is called 'grad'",
    ),
}


def searched(updates, params, **given):
    tx = fo.scale_by_zoom_linesearch(5)
    return tx.update(
        updates,
        tx.init(P),
        params,
        **{"value": 1.0, "grad": P, "value_fn": torch.sum, **given},
    )


@pytest.mark.parametrize("case", WRONG)
def test_errors(case: str) -> None:
    call, error, message = WRONG[case]
    with pytest.raises(error, match=message):
        call()
