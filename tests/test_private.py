"""Private aggregation against closed forms, optax and Opacus; sampling and accounting."""

from __future__ import annotations

import math
import pickle
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

import functorch_opt as fo
from functorch_opt import tree

C, SIGMA = 0.7, 1.3


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def per_example(n: int) -> dict[str, Tensor]:
    """Gradients with norms below and above C."""
    scale = torch.logspace(-2, 1, n, dtype=torch.float64)
    return {
        "w": drawn(n, 2, 3) * scale[:, None, None],
        "b": drawn(n, 3, seed=1) * scale[:, None],
    }


def params() -> dict[str, Tensor]:
    return {"w": drawn(2, 3, seed=2), "b": drawn(3, seed=3)}


def normal_cdf(x: float) -> float:
    return 0.5 * math.erfc(-x / math.sqrt(2))


# ---- the transformation --------------------------------------------------------------------------


@pytest.mark.parametrize("bounds", [C, {"w": 0.5, "b": 0.2}], ids=["whole", "parts"])
@pytest.mark.parametrize("expected", [None, 20.0])
def test_it_is_the_clipped_sum_and_the_noise_over_the_batch_size(
    bounds: Any, expected: float | None
) -> None:
    """The noise is that of `add_noise` with the same key, and ``sigma sqrt(sum_k C_k^2)`` for its
    standard deviation.
    """
    ps, grads = params(), per_example(9)
    tx = fo.differentially_private_aggregate(
        bounds, SIGMA, key=5, expected_batch_size=expected
    )
    sensitivity = C if bounds is C else math.sqrt(0.5**2 + 0.2**2)
    noise = fo.add_noise((SIGMA * sensitivity) ** 2, 0.0, key=5)
    state, other = tx.init(ps), noise.init(ps)
    clipped = fo.clip_and_sum(grads, bounds)
    for _ in range(3):
        updates, state = tx.update(grads, state, ps)
        noisy, other = noise.update(clipped.sum, other, ps)
        for name, u in updates.items():
            torch.testing.assert_close(
                u, noisy[name] / (expected or 9), rtol=1e-12, atol=1e-15
            )
            assert not torch.allclose(u, clipped.sum[name] / (expected or 9), rtol=0.01)


def test_gradients_and_their_clipped_sum_give_the_same_step() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    start = {name: p.detach() for name, p in model.named_parameters()}
    x, y = drawn(8, 4), torch.arange(8) % 3

    def loss(ps: Any, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, ps, x), y)

    each, clipped = fo.per_example_grads(loss), fo.clipped_grad_sum(loss, C, chunk_size=3)
    for make in (fo.dpsgd, fo.dp_adam):
        tx = make(0.1, C, SIGMA, key=1, expected_batch_size=8)
        ends = []
        for gradients in (each, clipped):
            ps, state = start, tx.init(start)
            for _ in range(3):
                updates, state = tx.update(gradients(ps, x, y), state, ps)
                ps = fo.apply_updates(ps, updates)
            ends.append(torch.cat([p.flatten() for p in ps.values()]))
        torch.testing.assert_close(*ends, rtol=1e-10, atol=1e-12)
        assert (ends[0] - torch.cat([p.flatten() for p in start.values()])).norm() > 0.01


def test_the_noise_is_normal() -> None:
    """The Kolmogorov-Smirnov distance from ``N(0, (sigma C / B)^2)`` of 40,000 numbers; two steps
    differ.
    """
    ps = {"w": torch.zeros(20_000)}
    tx = fo.differentially_private_aggregate(
        C, SIGMA, key=fo.random.key(11), expected_batch_size=32
    )
    state, steps = tx.init(ps), []
    for _ in range(2):
        updates, state = tx.update({"w": torch.zeros(4, 20_000)}, state, ps)
        steps.append(updates["w"].double() / (SIGMA * C / 32))
    assert abs(torch.corrcoef(torch.stack(steps))[0, 1]) < 0.02
    z = torch.cat(steps).sort().values
    cdf = torch.special.ndtr(z)
    rank = torch.arange(len(z) + 1, dtype=torch.float64) / len(z)
    distance = max((cdf - rank[:-1]).max(), (rank[1:] - cdf).max())
    assert distance < 1.63 / math.sqrt(
        len(z)
    )  # 1% of draws are farther off; the key is fixed


def test_noise_by_a_schedule() -> None:
    ps = {"w": torch.zeros(20_000)}
    tx = fo.differentially_private_aggregate(
        C, fo.piecewise_constant_schedule(2.0, {1: 0.25}), key=0
    )
    state = tx.init(ps)
    for sigma in (2.0, 0.5):
        updates, state = tx.update({"w": torch.zeros(4, 20_000)}, state, ps)
        assert abs(float(updates["w"].std()) / (sigma * C / 4) - 1) < 0.02


def test_an_empty_batch_is_its_noise() -> None:
    ps = params()
    tx = fo.dpsgd(1.0, C, SIGMA, key=3, expected_batch_size=4)
    empty = {name: p.new_zeros(0, *p.shape) for name, p in ps.items()}
    zeros = {name: p.new_zeros(2, *p.shape) for name, p in ps.items()}
    updates, state = tx.update(empty, tx.init(ps), ps)
    expected, _ = tx.update(zeros, tx.init(ps), ps)
    for name, u in updates.items():
        assert torch.equal(u, expected[name]) and (u != 0).all()
    assert fo.get(state, "count") == 1
    with pytest.raises(
        ValueError, match=r"no example to average over\. Give expected_batch_size"
    ):
        fo.dpsgd(1.0, C, SIGMA, key=3).update(empty, tx.init(ps), ps)


def test_one_example_moves_the_sum_by_c_at_most() -> None:
    """Neighbouring batches: with and without an example, however large its gradient, whatever its
    weight.
    """
    grads = per_example(9)
    grads["w"][4] *= 1e12
    for weights in (None, torch.linspace(-50, 50, 9, dtype=torch.float64)):
        whole = fo.clip_and_sum(grads, C, weights).sum
        for i in range(9):
            rest = [j for j in range(9) if j != i]
            without = fo.clip_and_sum(
                tree.map(lambda g, rest=rest: g[rest], grads),
                C,
                None if weights is None else weights[rest],
            ).sum
            assert tree.norm(tree.map(torch.sub, whole, without)) <= C * (1 + 1e-12)


def test_dp_adam_is_adam_on_private_gradients() -> None:
    ps = params()
    tx = fo.dp_adam(0.1, C, SIGMA, 2, 0.8, 0.9, 1e-3, expected_batch_size=9)
    apart = fo.chain(
        fo.differentially_private_aggregate(C, SIGMA, 2, expected_batch_size=9),
        fo.adam(0.1, 0.8, 0.9, 1e-3),
    )
    state, other = tx.init(ps), apart.init(ps)
    for _ in range(3):
        updates, state = tx.update(per_example(9), state, ps)
        expected, other = apart.update(per_example(9), other, ps)
        assert all(torch.equal(updates[name], expected[name]) for name in ps)


@pytest.mark.parametrize("make", [fo.dpsgd, fo.dp_adam])
def test_repr_reads_as_the_call_and_pickles(
    make: Callable[..., fo.GradientTransformation],
) -> None:
    tx = make(
        0.1,
        l2_norm_clip={"w": 1.0, "b": 0.5},
        noise_multiplier=1.1,
        key=7,
        expected_batch_size=9,
    )
    assert (
        repr(eval(repr(tx), vars(fo))) == repr(pickle.loads(pickle.dumps(tx))) == repr(tx)
    )
    ps = params()
    one, two = (
        t.update(per_example(9), t.init(ps), ps)[0]
        for t in (tx, pickle.loads(pickle.dumps(tx)))
    )
    assert all(torch.equal(one[name], two[name]) for name in ps)


P, G = {"w": torch.zeros(3, 2)}, {"w": torch.ones(4, 3, 2)}


def one_update(updates: Any, bound: Any = C, ps: Any = P, **given: Any) -> Any:
    tx = fo.differentially_private_aggregate(bound, SIGMA, key=0, **given)
    return tx.update(updates, tx.init(P), ps)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: fo.dpsgd(0.1, 0.0, 1.0, 0), ValueError, r"l2_norm_clip must be greater than 0 and finite; got 0\.0"),
        (lambda: fo.dpsgd(0.1, math.inf, 1.0, 0), ValueError, "l2_norm_clip must be greater than 0 and finite; got inf"),
        (lambda: fo.dpsgd(0.1, 1.0, -1.0, 0), ValueError, r"noise_multiplier must be in \[0, inf\); got -1.0"),
        (lambda: fo.dpsgd(0.1, 1.0, 1.0, 0, expected_batch_size=0), ValueError, r"expected_batch_size must be in \(0, inf\); got 0"),
        (lambda: fo.dpsgd(0.1, 1.0, 1.0, 0, momentum=-1.0), ValueError, "momentum must be"),
        (lambda: fo.dpsgd(0.1, 1.0, 1.0, 0.5), TypeError, "seed must be a whole number"),
        (lambda: one_update({"w": torch.ones(3, 2)}), ValueError, r"'w' has shape \(3, 2\) and its parameter \(3, 2\).*\('B', 3, 2\)"),
        (lambda: one_update({"v": torch.ones(4, 3, 2)}), ValueError, "updates and params differ in structure"),
        (lambda: one_update({"w": torch.tensor(1.0)}, ps=None), ValueError, "every tensor of grads must.*'w': a scalar"),
        (lambda: one_update(fo.clip_and_sum(G, 2 * C)), ValueError, r"was clipped to l2_norm_clip=1\.4, and the noise is for 0\.7"),
        (lambda: one_update(fo.clip_and_sum(G, {"w": C})), ValueError, r"was clipped to l2_norm_clip=\{'w': 0\.7\}, and the noise is for"),
        (lambda: fo.poisson_sample(fo.random.key(0), 10, 11), ValueError, "expected_batch_size must be from 0 to size, which is 10"),
        (lambda: fo.poisson_sample(0, 10, 5), TypeError, "key must be an int64 tensor"),
        (lambda: fo.privacy_spent(0.0, 0.1, 10, 1e-5), ValueError, r"noise_multiplier must be in \(0, inf\)"),
        (lambda: fo.privacy_spent(1.0, 1.1, 10, 1e-5), ValueError, r"sampling_rate must be in \(0, 1\].*got sampling_rate=1\.1"),
        (lambda: fo.privacy_spent(1.0, 0.1, 2.5, 1e-5), ValueError, "steps a whole number.*steps=2.5"),
        (lambda: fo.noise_for(0.0, 0.1, 10, 1e-5), ValueError, r"epsilon must be in \(0, inf\)"),
        (lambda: fo.noise_for(1.0, 0.1, 0, 1e-5), ValueError, "steps must be 1 or more"),
        (lambda: fo.noise_for(1.0, 1.1, 10, 1e-5), ValueError, r"sampling_rate must be in \(0, 1\]"),
        (lambda: fo.privacy_spent(1.0, 0.1, 10, 0.0), ValueError, r"delta in \(0, 1\).*delta=0\.0"),
    ],
)  # fmt: skip
def test_errors(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


# ---- sampling and accounting ---------------------------------------------------------------------


def test_poisson_sampling() -> None:
    """Over 2,000 batches: sizes have the mean and variance of the binomial, examples are in one
    independently and equally often.
    """
    n, expected, batches = 50, 8.0, 2000
    q = expected / n
    inside = torch.zeros(batches, n, dtype=torch.float64)
    for step, key in enumerate(fo.random.split(fo.random.key(4), batches)):
        found = fo.poisson_sample(key, n, expected)
        assert found.dtype == torch.int64 and (found.diff() > 0).all()
        inside[step, found] = 1
    sizes = inside.sum(1)
    assert abs(sizes.mean() - expected) < 4 * math.sqrt(n * q * (1 - q) / batches)
    assert abs(sizes.var() / (n * q * (1 - q)) - 1) < 4 * math.sqrt(2 / batches)
    assert (inside.mean(0) - q).abs().max() < 4.5 * math.sqrt(q * (1 - q) / batches)
    assert (torch.corrcoef(inside.T) - torch.eye(n)).abs().max() < 5 / math.sqrt(batches)


def test_poisson_sampling_at_its_ends() -> None:
    key = fo.random.key(0)
    assert fo.poisson_sample(key, 5, 0).tolist() == []
    assert fo.poisson_sample(key, 5, 5).tolist() == [0, 1, 2, 3, 4]
    assert fo.poisson_sample(key, 0, 0).tolist() == []
    assert len(fo.poisson_sample(key, 10_000, 10_000 - 1e-6)) == 10_000


@pytest.mark.parametrize("sigma", [0.8, 2.0])
def test_privacy_of_one_step_on_everything_is_that_of_the_gaussian_mechanism(
    sigma: float,
) -> None:
    """Balle & Wang, "Improving the Gaussian Mechanism for Differential Privacy", 2018, theorem
    8.
    """
    epsilon = fo.privacy_spent(sigma, sampling_rate=1.0, steps=1, delta=1e-5)
    delta = normal_cdf(1 / (2 * sigma) - epsilon * sigma) - math.exp(
        epsilon
    ) * normal_cdf(-1 / (2 * sigma) - epsilon * sigma)
    assert 0.99 < delta / 1e-5 <= 1 + 1e-6
    assert fo.privacy_spent(
        sigma, sampling_rate=1.0, steps=4, delta=1e-5
    ) == pytest.approx(
        fo.privacy_spent(sigma / 2, sampling_rate=1.0, steps=1, delta=1e-5), rel=1e-3
    )  # k steps with sigma are one with sigma / sqrt(k)


def test_without_dp_accounting_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(
        ModuleNotFoundError, match=r'pip install "functorch_opt\[privacy\]"'
    ):
        fo.privacy_spent(1.0, 0.1, 10, 1e-5)
    with pytest.raises(ModuleNotFoundError, match="noise_for needs dp-accounting"):
        fo.noise_for(1.0, 0.1, 10, 1e-5)


@pytest.mark.parametrize(
    ("epsilon", "rate", "steps"),
    [(0.5, 0.01, 100), (2.0, 1.0, 1), (0.05, 1.0, 3)],
)
def test_noise_for_is_the_inverse_of_privacy_spent(
    epsilon: float, rate: float, steps: int
) -> None:
    sigma = fo.noise_for(epsilon, rate, steps, 1e-5)
    assert fo.privacy_spent(sigma, rate, steps, 1e-5) <= epsilon
    assert fo.privacy_spent(sigma / 1.002, rate, steps, 1e-5) > epsilon


# ---- optax ---------------------------------------------------------------------------------------


def test_clipping_is_optaxs() -> None:
    optax = pytest.importorskip("optax")
    grads = {name: g.float() for name, g in per_example(9).items()}
    leaves = [g.numpy() for g in grads.values()]
    whole, _ = optax.per_example_global_norm_clip(leaves, C)
    parts, _ = optax.per_example_layer_norm_clip(leaves, C)
    for bound, expected in (
        (C, whole),
        ({name: C / math.sqrt(2) for name in grads}, parts),
    ):
        for ours, theirs in zip(
            fo.clip_and_sum(grads, bound).sum.values(), expected, strict=True
        ):
            torch.testing.assert_close(
                ours, torch.from_numpy(theirs.__array__().copy()), rtol=1e-5, atol=1e-6
            )


@pytest.mark.filterwarnings("ignore:.*seed.* is deprecated:DeprecationWarning")
def test_dpsgd_without_noise_is_optaxs() -> None:
    optax = pytest.importorskip("optax")
    from optax import contrib

    ps = {name: p.float() for name, p in params().items()}
    for options in ({}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}):
        ours, theirs = (
            fo.dpsgd(0.1, C, 0.0, key=0, **options),
            contrib.dpsgd(0.1, C, 0.0, 0, **options),
        )
        mine, state = ps, ours.init(ps)
        their, other = (
            (there := {name: p.numpy() for name, p in ps.items()}),
            theirs.init(there),
        )
        for seed in range(3):
            gs = {name: (g * (1 + seed)).float() for name, g in per_example(9).items()}
            updates, state = ours.update(gs, state, mine)
            mine = fo.apply_updates(mine, updates)
            steps, other = theirs.update(
                {name: g.numpy() for name, g in gs.items()}, other, their
            )
            their = optax.apply_updates(their, steps)
        for name, p in mine.items():
            torch.testing.assert_close(
                p, torch.from_numpy(their[name].__array__().copy()), rtol=1e-5, atol=1e-6
            )


# ---- Opacus --------------------------------------------------------------------------------------


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2), nn.GroupNorm(2, 4), nn.Tanh(), nn.Flatten(), nn.Linear(36, 8), nn.ReLU(), nn.Linear(8, 3)
    ).double()  # fmt: skip


def scaled_loss(out: Tensor, y: Tensor) -> Tensor:
    """The loss is scaled because Opacus adds 1e-6 to a norm before it divides by it.

    With norms near 1,000 this changes the ninth digit.
    """
    return 1000 * F.cross_entropy(out, y)


def opacus_optimizer(
    model: nn.Module, bound: Any, noise: float, lr: float, **given: Any
) -> torch.optim.Optimizer:
    optimizers = pytest.importorskip("opacus.optimizers")
    return (
        optimizers.DPPerLayerOptimizer
        if isinstance(bound, list)
        else optimizers.DPOptimizer
    )(
        torch.optim.SGD(model.parameters(), lr=lr, **given),
        noise_multiplier=noise,
        max_grad_norm=bound,
        expected_batch_size=10,
        generator=torch.Generator().manual_seed(3),
    )


@pytest.mark.filterwarnings("ignore:Full backward hook")
@pytest.mark.parametrize("parts", [False, True], ids=["whole", "parts"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_without_noise_it_is_opacus_to_rounding(parts: bool, momentum: float) -> None:
    model, theirs = net(), pytest.importorskip("opacus").GradSampleModule(net())
    start = ps = {name: p.detach() for name, p in model.named_parameters()}
    bound: Any = {name: 200.0 * (i + 1) for i, name in enumerate(ps)} if parts else 1600.0
    opt = opacus_optimizer(
        theirs, [*bound.values()] if parts else bound, 0.0, 1e-4, momentum=momentum
    )

    def loss(ps: Any, x: Tensor, y: Tensor) -> Tensor:
        return scaled_loss(functional_call(model, ps, x), y)

    gradients = fo.clipped_grad_sum(loss, bound, chunk_size=3)
    tx = fo.dpsgd(
        1e-4, bound, 0.0, key=0, momentum=momentum or None, expected_batch_size=10
    )
    state, over = tx.init(ps), []
    for step in range(3):
        x, y = drawn(7, 1, 8, 8, seed=step), torch.arange(7) % 3
        opt.zero_grad()
        scaled_loss(theirs(x), y).backward()
        opt.step()
        clipped = gradients(ps, x, y)
        updates, state = tx.update(clipped, state, ps)
        ps = fo.apply_updates(ps, updates)
        over += [
            norms > b
            for norms, b in zip(
                tree.leaves(clipped.norms), tree.leaves(bound), strict=True
            )
        ]
    assert 0.1 < torch.cat(over).double().mean() < 0.9  # some are clipped, some are not
    for (name, p), other in zip(ps.items(), theirs.parameters(), strict=True):
        torch.testing.assert_close(
            p,
            other.detach(),
            rtol=1e-7,
            atol=1e-9,
            msg=lambda m, name=name: f"{name}: {m}",
        )
        assert (p - start[name]).abs().max() > 1e-4


@pytest.mark.filterwarnings("ignore:Full backward hook")
def test_with_noise_it_is_opacus_in_distribution() -> None:
    """How far 40 steps without a gradient move the parameters: the Kolmogorov-Smirnov test takes
    the two samples for one.
    """
    theirs = pytest.importorskip("opacus").GradSampleModule(net())
    opt = opacus_optimizer(theirs, C, SIGMA, lr=1.0)
    ps = {name: p.detach().clone() for name, p in net().named_parameters()}
    tx = fo.dpsgd(1.0, C, SIGMA, key=21, expected_batch_size=10)
    state, moved = tx.init(ps), ([], [])
    for _ in range(40):
        before = [p.detach().clone() for p in theirs.parameters()]
        opt.zero_grad()
        (0 * theirs(drawn(3, 1, 8, 8))).sum().backward()
        opt.step()
        moved[0].extend(
            (p.detach() - old).flatten()
            for p, old in zip(theirs.parameters(), before, strict=True)
        )
        updates, state = tx.update(
            tree.map(lambda p: p.new_zeros(3, *p.shape), ps), state, ps
        )
        moved[1].extend(u.flatten() for u in updates.values())
    a, b = (torch.cat(of) for of in moved)
    assert len(a) == len(b) > 10_000
    above = torch.where(torch.cat([a, b]).argsort() < len(a), 1.0, -1.0).cumsum(0) / len(
        a
    )
    assert above.abs().max() < 1.63 * math.sqrt(
        2 / len(a)
    )  # 1% of pairs are farther apart; key and seed are fixed
    assert abs(float(a.std() / b.std()) - 1) < 0.03


def test_the_accounting_agrees_with_opacus() -> None:
    """The bound from Renyi divergences is above ours.

    The one from the privacy loss distribution of Gopi et al., 2021, is within its error of ours.
    """
    accountants = pytest.importorskip("opacus.accountants")
    for sigma, q, steps in ((1.1, 256 / 50_000, 11_700), (0.8, 0.01, 1000)):
        ours = fo.privacy_spent(sigma, q, steps, 1e-5)
        rdp, prv = accountants.RDPAccountant(), accountants.PRVAccountant()
        for accountant in (rdp, prv):
            accountant.history = [(sigma, q, steps)]
        assert ours < rdp.get_epsilon(1e-5) < 1.25 * ours
        assert prv.get_epsilon(1e-5) == pytest.approx(ours, rel=0.01)


# ---- the benchmark and the picture ---------------------------------------------------------------


@pytest.mark.filterwarnings("default")
def test_the_benchmark_compares_like_with_like(tmp_path: Path) -> None:
    for extra in ("rich", "matplotlib", "opacus"):
        pytest.importorskip(extra)
    from benchmarks import __main__, per_example

    threads = torch.get_num_threads()
    try:
        result = __main__.main(["per-example", "--quick", "--out", str(tmp_path)])
    finally:
        torch.set_num_threads(threads)
    assert [row["row"] for row in result["rows"]] == [*per_example.NETS]
    for row in result["rows"]:
        assert row["results"].keys() == {*per_example.CONTENDERS, "floor"}
        assert all(
            entry["ms"] > 0 and entry["peak"] > 0 and "note" not in entry
            for entry in row["results"].values()
        )


@pytest.mark.filterwarnings("default")
def test_the_picture_of_the_guide_is_drawn(tmp_path: Path) -> None:
    for extra in ("sklearn", "matplotlib"):
        pytest.importorskip(extra)
    script = runpy.run_path(
        str(Path(__file__).parent.parent / "docs" / "pictures" / "per_example.py")
    )
    assert (
        script["draw"](tmp_path / "picture.png", steps=2, every=2, sigmas=(8.0,))
        .stat()
        .st_size
        > 10_000
    )
