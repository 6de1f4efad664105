"""Draws of parts, trees and sharded tensors are parts of one stream; compiled draws equal eager
ones.
"""

from __future__ import annotations

import datetime
import itertools
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from test_random import N, assert_uncorrelated, philox_in_python
from torch import Tensor
from torch.func import vmap

import functorch_opt as fo
from functorch_opt import random, tree
from functorch_opt._execution.compiled import CompiledStep
from functorch_opt.random import philox

KEY = random.key(2**63 + 5)
DRAWS = [random.bits, random.uniform, random.normal]
draws = pytest.mark.parametrize("draw", DRAWS, ids=lambda draw: draw.__name__)

# ---- bits and uniforms ---------------------------------------------------------------------------


def test_golden_bits() -> None:
    """Those of ``torch.func._random`` for the same key."""
    assert random.bits(random.key(42), (4,)).tolist() == [
        -1662324653,
        2012563771,
        314527917,
        1463989207,
    ]


def test_bits_are_the_words_and_uniforms_their_low_24_bits() -> None:
    words = [word for block in range(3) for word in philox_in_python(2**63 + 5, block)]
    got = random.bits(KEY, (3, 4))
    assert got.dtype == torch.int32
    assert [x % 2**32 for x in got.flatten().tolist()] == words
    assert random.uniform(KEY, (12,)).tolist() == [
        (word % 2**24) / 2**24 for word in words
    ]


def test_every_bit_is_a_fair_coin_and_by_itself() -> None:
    n = 50_000
    coins = (random.bits(KEY, (n, 1)) >> torch.arange(32) & 1).double()
    assert ((coins.mean(0) - 0.5).abs() < 5 * 0.5 / math.sqrt(n)).all()
    correlations = torch.corrcoef(coins.T) - torch.eye(32)
    assert (correlations.abs() < 5 / math.sqrt(n)).all()


def test_uniforms_are_uniform() -> None:
    u = random.uniform(KEY, (N,))
    assert u.dtype == torch.float32
    assert ((u >= 0) & (u < 1)).all()
    steps = torch.arange(N + 1, dtype=torch.float64) / N
    ordered = u.double().sort().values
    distance = torch.maximum((steps[1:] - ordered).max(), (ordered - steps[:-1]).max())
    assert (
        distance * math.sqrt(N) < 1.95
    )  # Kolmogorov and Smirnov; passed once in a thousand
    for moment in (1, 2, 3):
        variance = 1 / (2 * moment + 1) - 1 / (moment + 1) ** 2
        assert abs((u.double() ** moment).mean() - 1 / (moment + 1)) < 4 * math.sqrt(
            variance / N
        )
    assert_uncorrelated(u[1:] - 0.5, u[:-1] - 0.5)


# ---- parts ---------------------------------------------------------------------------------------

SHAPES = [(), (1,), (7,), (16,), (5, 3), (4, 8), (3, 1, 5), (2, 3, 4), (2, 2, 3, 2)]


def parts(shape: tuple[int, ...]) -> list[tuple[slice, ...]]:
    """Every box in the whole, but of large dimensions some of the sides only."""
    sides = [
        [
            slice(a, b)
            for a in range(n + 1)
            for b in range(a, n + 1)
            if n < 4 or a in (0, 1, 3) or b == n
        ]
        for n in shape
    ]
    return list(itertools.product(*sides))


@draws
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_any_part_is_that_part_of_the_whole(draw: Any, shape: tuple[int, ...]) -> None:
    whole = draw(KEY, shape)
    for part in parts(shape)[:: 1 if draw is random.bits else 17]:
        got = draw(KEY, shape, part)
        assert got.shape == whole[part].shape
        assert torch.equal(got, whole[part]), part


def test_only_the_part_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a whole that would not fit into memory; a run of 6 elements takes 3 blocks at most."""
    drawn = []
    monkeypatch.setattr(
        philox,
        "words",
        lambda key, blocks, of=philox.words: (
            drawn.append(blocks.numel()) or of(key, blocks)
        ),
    )
    shape = (2**20, 2**10, 2**8 + 1)
    got = random.bits(
        KEY, shape, (slice(2**19 + 1, 2**19 + 3), slice(5, 8), slice(100, 106))
    )
    assert drawn == [2 * 3 * 3]
    for i, j, k in itertools.product(range(2), range(3), range(6)):
        element = ((2**19 + 1 + i) * shape[1] + 5 + j) * shape[2] + 100 + k
        assert (
            got[i, j, k].item() % 2**32
            == philox_in_python(2**63 + 5, element // 4)[element % 4]
        )


def test_parts_under_vmap_and_torch_compile() -> None:
    part = (slice(1, 4), slice(2, 5))
    keys = random.split(KEY, 3)
    got = vmap(lambda key: random.normal(key, (5, 7), part))(keys)
    assert torch.equal(
        got, torch.stack([random.normal(key, (5, 7), part) for key in keys])
    )
    compiled = torch.compile(
        lambda key: random.bits(key, (5, 7), part), backend="aot_eager", fullgraph=True
    )
    assert torch.equal(compiled(KEY), random.bits(KEY, (5, 7))[part])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ((5,), slice(2)),
            r"part must be a tuple of slices .* for each dimension of \(5,\); got slice",
        ),
        (((5, 2), (slice(2),)), "one for each dimension"),
        (((5,), (slice(0, 4, 2),)), "without step"),
        (((5,), (3,)), "tuple of slices"),
        ((5,), "shape must be a tuple of sizes"),
    ],
)
def test_wrong_parts(args: tuple, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        random.normal(KEY, *args)


# ---- trees ---------------------------------------------------------------------------------------


def leaves() -> dict:
    return {
        "a": torch.zeros(5),
        "b": [None, torch.zeros(2, 4), torch.zeros(0, 3)],
        "c": torch.zeros(3, dtype=torch.complex64),
        "d": torch.ones(()),
    }


def test_leaves_of_a_tree_follow_each_other_and_counts_are_far_apart() -> None:
    for count in (0, 3, torch.tensor(3)):
        got = random.normal_like(KEY, leaves(), count)
        start = torch.stack([KEY[0], torch.tensor(int(count) << 36)])
        stream = random.normal(start, (4 * 7,)).reshape(7, 4)  # blocks: 2, 2, 0, 2, 1
        assert torch.equal(got["a"], stream[:2].flatten()[:5])
        assert got["b"][0] is None
        assert torch.equal(got["b"][1], stream[2:4].reshape(2, 4))
        assert got["b"][2].shape == (0, 3)
        assert torch.equal(
            torch.view_as_real(got["c"]), stream[4:6].flatten()[:6].reshape(3, 2)
        )
        assert torch.equal(got["d"], stream[6, 0])
    assert {x.dtype for x in tree.leaves(got)} == {torch.float32, torch.complex64}


def test_uniforms_of_a_tree_are_those_of_the_same_words() -> None:
    got = random.uniform_like(KEY, leaves(), 2)
    start = torch.stack([KEY[0], torch.tensor(2 << 36)])
    assert torch.equal(got["b"][1], random.uniform(start, (16,))[8:].reshape(2, 4))


def test_trees_without_numbers() -> None:
    assert random.normal_like(KEY, {}) == {}
    assert random.normal_like(KEY, [None]) == [None]
    assert random.normal_like(KEY, torch.zeros(0, 2)).shape == (0, 2)


@pytest.mark.parametrize("count", [1.5, True, torch.ones(())])
def test_wrong_counts(count: Any) -> None:
    with pytest.raises(TypeError, match="count must be a whole number"):
        random.normal_like(KEY, torch.zeros(2), count)


def test_a_negative_count() -> None:
    with pytest.raises(ValueError, match="count must be 0 or greater; got -1"):
        random.normal_like(KEY, torch.zeros(2), -1)


def test_what_is_no_tensor_has_no_shape() -> None:
    with pytest.raises(TypeError, match=r"tree holds float 1\.0 at 'w'"):
        random.normal_like(KEY, {"w": 1.0})


# ---- sharded tensors, in real processes ----------------------------------------------------------

SHARDED = {"a": (5, 3), "b": (4, 6), "c": (7,), "d": (1, 5), "e": (2, 3, 5), "f": (3, 2)}
"""Uneven, and one of them with nothing for the second rank."""


def _rank(rank: int, file: str, out: str) -> None:
    from torch.distributed.tensor import (
        Replicate,
        Shard,
        distribute_tensor,
        init_device_mesh,
    )

    torch.set_num_threads(1)
    store = dist.FileStore(file, 2)
    dist.init_process_group(
        "gloo",
        store=store,
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(seconds=60),
    )
    result = {}
    mesh = init_device_mesh("cpu", (2,))
    for dim in (0, 1, 2, None):
        ps = {
            name: torch.zeros(
                shape, dtype=torch.complex64 if name == "f" else torch.float32
            ).requires_grad_(name == "a")
            for name, shape in SHARDED.items()
        }
        placed = {
            name: distribute_tensor(
                p,
                mesh,
                [Replicate() if dim is None or dim >= p.dim() else Shard(dim)],
                src_data_rank=None,
            )
            for name, p in ps.items()
        }
        placed["z"] = torch.zeros(3)  # beside sharded ones: an ordinary tensor
        noise = random.normal_like(KEY, placed, 2)
        assert all(
            noise[name].placements == placed[name].placements
            and noise[name].shape == placed[name].shape
            for name in SHARDED
        )
        result[str(dim)] = {
            name: x.full_tensor() if name in SHARDED else x for name, x in noise.items()
        }
        # and as a stage, under a vector of counts too
        tx = fo.add_noise(1.0, 0.5, key=7)
        for count in (torch.tensor(3), torch.arange(7)):
            state = tx.init(ps | {"z": torch.zeros(3)})
            state = state._replace(shared={**state.shared, "count": count})
            gs = {name: placed[name] * 0 for name in placed}
            with torch.no_grad():
                u, _ = tx.update(gs, state, placed)
            result[f"{dim} add_noise {count.dim()}"] = {
                name: x.full_tensor() if name in SHARDED else x for name, x in u.items()
            }
    grid = init_device_mesh("cpu", (1, 2))
    both = distribute_tensor(
        torch.zeros(5, 6), grid, [Shard(0), Shard(1)], src_data_rank=None
    )
    result["grid"] = {"x": random.uniform_like(KEY, both).full_tensor()}
    if rank == 0:
        torch.save(tree.map(torch.clone, result), out)
    dist.barrier()  # gloo ends the process whose peer has gone
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def gathered(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Tensor]]:
    """What two processes drew, put together."""
    folder: Path = tmp_path_factory.mktemp("ranks")
    mp.spawn(_rank, (str(folder / "store"), str(folder / "out")), nprocs=2)
    return torch.load(folder / "out")


def whole() -> dict[str, Tensor]:
    ps = {
        name: torch.zeros(shape, dtype=torch.complex64 if name == "f" else torch.float32)
        for name, shape in SHARDED.items()
    }
    return {**ps, "z": torch.zeros(3)}


@pytest.mark.parametrize("dim", ["0", "1", "2", "None"])
def test_each_rank_draws_its_part_of_what_one_process_draws(
    gathered: dict, dim: str
) -> None:
    wanted = random.normal_like(KEY, whole(), 2)
    for name, x in wanted.items():
        assert torch.equal(gathered[dim][name], x), name


@pytest.mark.parametrize(
    "counts", [torch.tensor(3), torch.arange(7)], ids=["one count", "a count each"]
)
@pytest.mark.parametrize("dim", ["0", "1", "2", "None"])
def test_noise_of_sharded_gradients_is_that_of_the_unsharded_run(
    gathered: dict, dim: str, counts: Tensor
) -> None:
    tx, ps = fo.add_noise(1.0, 0.5, key=7), whole()
    state = tx.init(ps)
    wanted, _ = tx.update(
        ps, state._replace(shared={**state.shared, "count": counts}), ps
    )
    for name, x in wanted.items():
        assert torch.equal(gathered[f"{dim} add_noise {counts.dim()}"][name], x), name


def test_sharded_by_two_dimensions(gathered: dict) -> None:
    assert torch.equal(gathered["grid"]["x"], random.uniform_like(KEY, torch.zeros(5, 6)))


# ---- compiled ------------------------------------------------------------------------------------


def test_the_compiled_draw_is_used_where_it_can_be(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = []
    monkeypatch.setattr(
        philox,
        "_compiled",
        lambda make, backend: lambda *args: calls.append(backend) or make(*args),
    )
    wanted = random.normal(KEY, (9,))
    assert calls == []
    with philox.compiled("some"):
        assert torch.equal(random.normal(KEY, (9,)), wanted)
        assert calls == ["some"]
        random.normal(KEY, (4,))  # one block: a constant to torch.compile
        vmap(lambda key: random.normal(key, (9,)))(random.split(KEY))
        torch.compile(
            lambda key: random.normal(key, (9,)), backend="eager", fullgraph=True
        )(KEY)
        assert calls == ["some"]
    random.normal(KEY, (9,))
    assert calls == ["some"]


def test_compiled_step_draws_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(
        philox,
        "_compiled",
        lambda make, backend: lambda *args: calls.append(make) or make(*args),
    )
    tx, ps = (
        fo.chain(fo.noisy_sgd(0.1, key=0), fo.stochastic_round(1)),
        {"w": torch.ones(9, dtype=torch.bfloat16)},
    )
    CompiledStep(tx, True, backend="eager")(ps, {"w": torch.ones(9)}, tx.init(ps))
    assert calls == [philox.normal, philox.uniform]


def test_the_stateful_optimizer_draws_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """It counts for each parameter; its noise is that of `update`."""
    calls = []
    monkeypatch.setattr(
        philox,
        "_compiled",
        lambda make, backend: lambda *args: calls.append(make) or make(*args),
    )
    tx, ps = fo.noisy_sgd(0.1, key=0), [torch.zeros(9), torch.zeros(5)]
    opt = fo.optim.Optimizer(
        [torch.nn.Parameter(p.clone()) for p in ps], tx, compile=True
    )
    monkeypatch.setattr(CompiledStep, "__init__", _with_backend("eager"))
    state = tx.init(ps)
    for _ in range(2):
        for p in opt.param_groups[0]["params"]:
            p.grad = torch.ones_like(p)
        opt.step()
        updates, state = tx.update([torch.ones_like(p) for p in ps], state, ps)
        ps = fo.apply_updates(ps, updates)
    assert calls == [philox.normal, philox.normal]
    for p, wanted in zip(opt.param_groups[0]["params"], ps, strict=True):
        torch.testing.assert_close(p.detach(), wanted)


def _with_backend(backend: str) -> Any:
    init = CompiledStep.__init__
    return lambda self, tx, donate, _: init(self, tx, donate, backend)


@pytest.mark.slow
def test_noise_in_a_compiled_step() -> None:
    tx, ps = fo.sgld(0.1, key=3), {"w": torch.zeros(37, 3), "b": torch.zeros(50)}
    step, mine = fo.compiled_step(tx), tree.map(torch.clone, ps)
    state, ours = tx.init(ps), tx.init(ps)
    for _ in range(3):
        updates, state = tx.update(ps, state, ps)
        ps = fo.apply_updates(ps, updates)
        mine, ours = step(mine, tree.map(torch.clone, mine), ours)
        torch.testing.assert_close(mine, ps, rtol=5e-6, atol=5e-6)
    assert ps["w"].std() > 0.3


@pytest.mark.slow
def test_compiled_draws_equal_eager_ones() -> None:
    """Uniform numbers are the same. Normal ones differ by rounding, and do not depend on where in
    the stream a kernel begins.
    """
    torch._dynamo.reset()
    philox._compiled.cache_clear()
    n, shape, part = 4 * 37 + 3, (7, 30), (slice(1, 6), slice(3, 9))
    with philox.compiled():
        uniform = random.uniform(KEY, shape, part)
        normal = random.normal(KEY, (n,))
        with torch._dynamo.config.patch(
            error_on_recompile=True
        ):  # one kernel for all sizes and keys
            later, other = (
                random.normal(KEY, (n,), (slice(21, n - 5),)),
                random.normal(random.key(8), (3, 333)),
            )
    assert torch.equal(uniform, random.uniform(KEY, shape)[part])
    torch.testing.assert_close(normal, random.normal(KEY, (n,)), rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(
        other, random.normal(random.key(8), (3, 333)), rtol=2e-6, atol=2e-6
    )
    assert torch.equal(later, normal[21 : n - 5])


def test_without_a_compiler_it_warns_once_and_draws() -> None:
    def broken(graph, inputs):
        raise RuntimeError("no compiler here")

    with philox.compiled(broken):
        with pytest.warns(UserWarning, match="drawn eagerly, for compiling failed"):
            assert torch.equal(
                random.normal(KEY, (9,)), random.normal(KEY, (12,), (slice(9),))
            )
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            random.normal(KEY, (9,))


@pytest.mark.parametrize("kind", ["wrong", "failing"])
def test_compiled_draws_that_are_wrong_are_not_used(kind: str) -> None:
    def backend(graph, inputs):
        def run(*args):
            if kind == "failing":
                raise NameError("name 's57' is not defined")
            return [x * 1.01 for x in graph(*args)]

        return run

    with philox.compiled(backend):
        with pytest.warns(
            UserWarning, match=r"drawn eagerly.*the compiled code.*report it"
        ):
            drawn = random.normal(KEY, (9,))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert torch.equal(drawn, random.normal(KEY, (9,)))
    assert torch.equal(drawn, random.normal(KEY, (9,)))
