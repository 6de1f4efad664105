"""Randomness as a function of a key.

The tests compare it with published vectors, and look at statistics, the layout of streams, and the
bits in every mode.
"""

from __future__ import annotations

import io
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import vmap

import functorch_opt as fo
from functorch_opt import random, tree
from functorch_opt.random import philox

STEP = 1 << 36
"""Blocks that one step of `add_noise` owns."""


# ---- the generator -------------------------------------------------------------------------------


def philox_in_python(seed: int, counter: int) -> tuple[int, ...]:
    """Philox-4x32-10 of a 64-bit seed and a 128-bit counter, in unbounded integers, as in the
    paper.
    """
    k = [seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF]
    c = [counter >> 32 * i & 0xFFFFFFFF for i in range(4)]
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [b >> 32 ^ c[1] ^ k[0], b & 0xFFFFFFFF, a >> 32 ^ c[3] ^ k[1], a & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return tuple(c)


KNOWN_ANSWERS = [  # Random123, tests/kat_vectors: key, counter, output
    (
        "00000000 00000000",
        "00000000 00000000 00000000 00000000",
        "6627e8d5 e169c58d bc57ac4c 9b00dbd8",
    ),
    (
        "ffffffff ffffffff",
        "ffffffff ffffffff ffffffff ffffffff",
        "408f276d 41c83b0e a20bc7c6 6d5451fd",
    ),
    (
        "a4093822 299f31d0",
        "243f6a88 85a308d3 13198a2e 03707344",
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


@pytest.mark.parametrize(("key", "counter", "output"), KNOWN_ANSWERS)
def test_philox_known_answers(key: str, counter: str, output: str) -> None:
    k, c, wanted = (
        [int(word, 16) for word in words.split()] for words in (key, counter, output)
    )
    got = philox.philox(*(torch.tensor(word) for word in k + c))
    assert [word.item() for word in got] == wanted
    seed, count = (
        sum(word << 32 * i for i, word in enumerate(k)),
        sum(word << 32 * i for i, word in enumerate(c)),
    )
    assert list(philox_in_python(seed, count)) == wanted


@pytest.mark.parametrize("seed", [0, 42, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1])
@pytest.mark.parametrize("offset", [0, 5, 2**32 - 2, 2**63 - 2, -(2**63), -2])
def test_words_are_those_of_the_64_bit_counter(seed: int, offset: int) -> None:
    """Seed and offset in two's complement; ``offset + block`` carries into the high word and wraps
    around at 2**64.
    """
    key = torch.stack([random.key(seed)[0], torch.tensor(offset)])
    for i, words in enumerate(
        zip(*(w.tolist() for w in philox.words(key, torch.arange(4))), strict=True)
    ):
        assert words == philox_in_python(seed, (offset + i) % 2**64)


def test_a_large_block_number() -> None:
    block = 3 * STEP + 12345
    assert tuple(
        w.item() for w in philox.words(random.key(9), torch.tensor(block))
    ) == philox_in_python(9, block)


def test_golden_normals() -> None:
    torch.testing.assert_close(
        random.normal(random.key(42), (4,)),
        torch.tensor([-0.9702, 0.1940, -1.2356, 1.9239]),
        atol=5e-5,
        rtol=0,
    )


def test_normals_are_box_and_muller_of_the_words() -> None:
    w = philox_in_python(42, 1)
    u = [word * 2.0**-32 + 2.0**-33 for word in w]
    wanted = [
        trig(2 * math.pi * angle) * math.sqrt(-2 * math.log(radius))
        for radius, angle in ((u[0], u[1]), (u[2], u[3]))
        for trig in (math.cos, math.sin)
    ]
    torch.testing.assert_close(
        random.normal(random.key(42), (8,))[4:],
        torch.tensor(wanted, dtype=torch.float32),
        rtol=1e-5,
        atol=1e-6,
    )


def test_the_largest_and_smallest_words_are_finite() -> None:
    words = torch.tensor([0, 1, 2**32 - 1])
    assert ((philox.unit(words) > 0) & (philox.unit(words) <= 1)).all()
    z = torch.stack(philox.box_muller(words[:, None], words[None, :]))
    assert z.isfinite().all()
    assert 6.7 < z.abs().max() < 6.8


def test_seeds_are_taken_modulo_2_to_the_64() -> None:
    assert random.key(2**64 + 7).tolist() == random.key(7).tolist() == [7, 0]
    assert random.key(-1).tolist() == random.key(2**64 - 1).tolist() == [-1, 0]
    assert random.key(2**63).tolist() == [-(2**63), 0]


# ---- statistics ----------------------------------------------------------------------------------

N = 100_000


def assert_standard_normal(z: Tensor) -> None:
    """Four moments within four standard errors, and Kolmogorov and Smirnov's distance (1.95 is
    passed once in a thousand).
    """
    z, n = z.double().flatten(), z.numel()
    for k, (moment, variance) in enumerate([(0, 1), (1, 2), (0, 15), (3, 96)], 1):
        assert abs((z**k).mean() - moment) < 4 * math.sqrt(variance / n), f"moment {k}"
    cdf, steps = (
        torch.special.ndtr(z.sort().values),
        torch.arange(n + 1, dtype=torch.float64) / n,
    )
    distance = torch.maximum((steps[1:] - cdf).max(), (cdf - steps[:-1]).max())
    assert distance * math.sqrt(n) < 1.95


def assert_uncorrelated(a: Tensor, b: Tensor) -> None:
    for x, y in ((a, b), (a**2 - 1, b**2 - 1)):
        correlation = torch.corrcoef(torch.stack([x.flatten(), y.flatten()]).double())[
            0, 1
        ]
        assert abs(correlation) < 4 / math.sqrt(a.numel())


@pytest.mark.parametrize("seed", [0, 1, 2**63 + 11])
def test_normals_are_normal(seed: int) -> None:
    assert_standard_normal(random.normal(random.key(seed), (N,)))


def test_each_lane_of_a_block_is_normal_and_by_itself() -> None:
    lanes = random.normal(random.key(3), (N // 4, 4)).unbind(1)
    for i, a in enumerate(lanes):
        assert_standard_normal(a)
        for b in lanes[:i]:
            assert_uncorrelated(a, b)
        assert_uncorrelated(a[1:], a[:-1])


def test_neighbouring_and_derived_keys_are_independent() -> None:
    parent = random.key(5)
    keys = [
        parent,
        random.key(6),
        random.key(5 + 2**32),
        *random.split(parent),
        random.fold_in(parent, 7),
        random.fold_in(random.key(6), 7),
    ]
    draws = [random.normal(key, (N // 4,)) for key in keys]
    for i, a in enumerate(draws):
        assert_standard_normal(a)
        for b in draws[:i]:
            assert_uncorrelated(a, b)


# ---- keys ----------------------------------------------------------------------------------------


def test_split_is_fold_in_of_0_1_2() -> None:
    key = random.key(11)
    keys = random.split(key, 5)
    assert keys.shape == (5, 2)
    assert keys.dtype == torch.int64
    assert torch.equal(keys, torch.stack([random.fold_in(key, i) for i in range(5)]))
    assert torch.equal(random.split(key), keys[:2])
    assert random.split(key, 0).shape == (0, 2)


def test_fold_in_takes_any_shape() -> None:
    data = torch.tensor([[0, 1, 2], [3, 4, 2**40]], dtype=torch.int64)
    keys = random.fold_in(random.key(1), data)
    assert keys.shape == (2, 3, 2)
    assert torch.equal(keys[1, 2], random.fold_in(random.key(1), 2**40))
    assert torch.equal(keys, random.fold_in(random.key(1), data.to(torch.int64)))
    assert torch.equal(keys[0], random.fold_in(random.key(1), data[0].to(torch.int32)))


def test_a_derived_key_is_the_words_of_its_block() -> None:
    w = philox_in_python(11, 3)
    wanted = [w[0] | w[1] << 32, w[2] | w[3] << 32]
    assert [x % 2**64 for x in random.fold_in(random.key(11), 3).tolist()] == wanted


def test_derived_keys_are_all_different() -> None:
    parents = [random.key(i) for i in range(10)]
    children = torch.cat([random.split(parent, 5000) for parent in parents])
    grandchildren = torch.cat([random.split(child, 50) for child in children[:100]])
    keys = torch.cat([torch.stack(parents), children, grandchildren])
    assert len(torch.unique(keys, dim=0)) == len(keys)
    assert (
        len(torch.unique(keys[10:, 0])) == len(keys) - 10
    )  # the seeds alone, and the offsets alone
    assert len(torch.unique(keys[10:, 1])) == len(keys) - 10


def test_draws_of_one_key_agree_where_they_overlap() -> None:
    key = random.key(8)
    long = random.normal(key, (9,))
    assert torch.equal(random.normal(key, (5,)), long[:5])
    assert torch.equal(random.normal(key, (3, 3)), long.reshape(3, 3))
    assert torch.equal(random.normal(key, ()), long[0])
    assert random.normal(key, (0, 3)).shape == (0, 3)


def test_the_offset_wraps_around() -> None:
    start, last = torch.tensor([5, 0]), torch.tensor([5, -1])
    assert torch.equal(random.normal(last, (12,))[4:], random.normal(start, (8,)))


# ---- the same bits in every mode -----------------------------------------------------------------


def everything(key: Tensor) -> tuple[Tensor, ...]:
    a, b = random.split(key)
    return (
        random.normal(key, (3, 5)),
        random.normal(a, ()),
        random.fold_in(b, 7),
        random.normal(random.fold_in(b, 3), (17,)),
    )


@pytest.mark.parametrize("seed", [0, 2**63 + 5])
def test_compiled_equals_eager(seed: int) -> None:
    compiled = torch.compile(everything, backend="aot_eager", fullgraph=True)
    for got, wanted in zip(
        compiled(random.key(seed)), everything(random.key(seed)), strict=True
    ):
        assert torch.equal(got, wanted)


def test_vmapped_keys_equal_a_loop() -> None:
    keys = torch.cat([random.split(random.key(4), 3), torch.tensor([[-1, -1]])])
    rows = zip(*(everything(key) for key in keys), strict=True)
    for got, wanted in zip(vmap(everything)(keys), rows, strict=True):
        assert torch.equal(got, torch.stack(wanted))


# ---- add_noise -----------------------------------------------------------------------------------


def params() -> dict:
    """Sizes that fill blocks and that do not, an empty leaf, a scalar, a complex one; in the order
    in which they are flattened.
    """
    return {
        "a": torch.zeros(5),
        "b": [torch.zeros(2, 4), torch.zeros(0, 3)],
        "c": torch.zeros(3, dtype=torch.complex64),
        "d": torch.zeros(()),
        "e": torch.zeros(7, dtype=torch.float64),
    }


BLOCKS = {
    "a": (0, 5),
    "b/0": (2, 8),
    "b/1": (4, 0),
    "c": (4, 6),
    "d": (6, 1),
    "e": (7, 7),
}
"""For every leaf of `params`: its first block, and how many numbers it takes."""


def drawn(
    tx: fo.GradientTransformation,
    state: Any = None,
    count: Any = 0,
    gs: dict | None = None,
) -> dict[str, Tensor]:
    """The noise of one step, by path: what is added to gradients of zero."""
    ps = params()
    state = tx.init(ps) if state is None else state
    state = state._replace(shared={**state.shared, "count": torch.as_tensor(count)})
    updates, _ = tx.update(
        tree.map(torch.zeros_like, ps) if gs is None else gs, state, ps
    )
    return fo.state_dict(updates)


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[path], b[path]) for path in a)


@pytest.mark.parametrize(("eta", "gamma"), [(0.25, 0.0), (4.0, 0.55), (1.0, 1.0)])
def test_variance(eta: float, gamma: float) -> None:
    tx, ps = fo.add_noise(eta, gamma, key=1), torch.zeros(N // 4)
    state, draws = tx.init(ps), []
    for t in range(4):
        z, state = tx.update(torch.zeros_like(ps), state)
        draws.append(z / math.sqrt(eta / (1 + t) ** gamma))
        assert_standard_normal(draws[-1])
    for t, a in enumerate(draws):
        for b in draws[:t]:
            assert_uncorrelated(a, b)


def test_noise_is_added_to_the_update() -> None:
    tx, g = fo.add_noise(1.0, 0.0, key=1), torch.tensor([10.0, -20.0])
    assert torch.equal(
        tx.update(g, tx.init(g))[0], g + tx.update(torch.zeros(2), tx.init(g))[0]
    )
    silent = fo.add_noise(0.0, 0.0, key=1)
    assert torch.equal(silent.update(g, silent.init(g))[0], g)


@pytest.mark.parametrize("count", [0, 1, 1000])
def test_every_leaf_has_blocks_of_its_own(count: int) -> None:
    """Each leaf has the stream from its first block, and the blocks of leaves and steps do not
    overlap.
    """
    got = drawn(fo.add_noise(1.0, 0.0, key=7), count=count)
    assert got.keys() == BLOCKS.keys()
    taken: set[int] = set()
    for path, (first, size) in BLOCKS.items():
        z = random.normal(torch.tensor([7, count * STEP + first]), (size,))
        have = torch.view_as_real(got[path]) if got[path].is_complex() else got[path]
        assert torch.equal(have.flatten(), z.to(have.dtype)), path
        mine = set(range(first, first + -(-size // 4)))
        assert not mine & taken
        taken |= mine
    assert taken == set(range(9))


def test_leaves_are_uncorrelated() -> None:
    tx, ps = fo.add_noise(1.0, 0.0, key=2), [torch.zeros(N // 4) for _ in range(4)]
    first, state = tx.update(ps, tx.init(ps))
    second, _ = tx.update(ps, state)
    draws = [*first, *second]
    for i, a in enumerate(draws):
        for b in draws[:i]:
            assert_uncorrelated(a, b)


def test_two_stages_with_split_keys_are_uncorrelated() -> None:
    a, b = random.split(random.key(0))
    ps = torch.zeros(N // 4)
    one, two = (
        tx.update(ps, tx.init(ps))[0]
        for tx in (fo.add_noise(1.0, 0.0, a), fo.add_noise(1.0, 0.0, b))
    )
    assert_uncorrelated(one, two)


@pytest.mark.parametrize("missing", [{"a"}, {"b/0", "c"}, {"d", "e"}])
def test_a_missing_gradient_does_not_move_the_streams_of_the_others(
    missing: set[str],
) -> None:
    tx, gs = fo.add_noise(1.0, 0.5, key=7), tree.map(torch.zeros_like, params())
    leaves, spec = tree.flatten(gs)
    gs = tree.unflatten(
        spec,
        [
            None if path in missing else g
            for path, g in zip(tree.paths(gs), leaves, strict=True)
        ],
    )
    got, whole = drawn(tx, count=3, gs=gs), drawn(tx, count=3)
    assert got.keys() == whole.keys() - missing
    assert_equal(got, {path: whole[path] for path in got})


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 8])
def test_chunks_do_not_matter(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tx, counts = fo.add_noise(1.0, 0.5, key=7), torch.tensor([0, 4, 1, 2, 0, 9])
    whole, whole_counted = drawn(tx, count=3), drawn(tx, count=counts)
    monkeypatch.setattr(philox, "CHUNK", chunk)
    assert_equal(drawn(tx, count=3), whole)
    assert_equal(drawn(tx, count=counts), whole_counted)


def test_one_count_per_leaf() -> None:
    """As in the stateful adapter, equal counts give the noise of one count, and different counts
    give each leaf the noise of its own.
    """
    tx, n = fo.add_noise(0.5, 0.55, key=7), len(BLOCKS)
    assert_equal(drawn(tx, count=torch.full((n,), 6)), drawn(tx, count=6))
    counts = [0, 4, 1, 2, 7, 4]
    got = drawn(tx, count=torch.tensor(counts))
    assert_equal(
        got,
        {path: drawn(tx, count=t)[path] for path, t in zip(BLOCKS, counts, strict=True)},
    )
    state = tx.init(params())
    state = state._replace(shared={**state.shared, "count": torch.tensor(counts)})
    _, new = tx.update(params(), state, params())
    assert fo.get(new, "count").tolist() == [t + 1 for t in counts]


def test_resumed_stream_continues() -> None:
    tx = fo.noisy_sgd(0.1, key=2**63 + 9)
    file, state, wanted = io.BytesIO(), tx.init(params()), []
    for step in range(5):
        if step == 2:
            torch.save(fo.state_dict(state), file)
        updates, state = tx.update(params(), state, params())
        wanted.append(fo.state_dict(updates))
    file.seek(0)
    state = fo.load_state_dict(fo.noisy_sgd(0.1, key=0).init(params()), torch.load(file))
    for step in range(2, 5):
        updates, state = tx.update(params(), state, params())
        assert_equal(fo.state_dict(updates), wanted[step])
    assert not torch.equal(wanted[0]["a"], wanted[1]["a"])


def test_the_key_is_in_the_state() -> None:
    """The key with which a transformation was made matters only at init; a state goes on as it
    began.
    """
    one, two = fo.add_noise(1.0, 0.0, key=1), fo.add_noise(1.0, 0.0, key=2)
    assert_equal(drawn(one, state=two.init(params())), drawn(two))
    assert not torch.equal(drawn(one)["a"], drawn(two)["a"])


def test_complex_noise_is_real_noise_in_both_parts() -> None:
    tx, p = fo.add_noise(2.0, 0.0, key=3), torch.zeros(N // 8, dtype=torch.complex64)
    z, _ = tx.update(p, tx.init(p))
    assert z.dtype == torch.complex64
    assert_standard_normal(z.real / math.sqrt(2))
    assert_standard_normal(z.imag / math.sqrt(2))
    assert_uncorrelated(z.real / math.sqrt(2), z.imag / math.sqrt(2))
    pairs = torch.view_as_real(p)
    assert torch.equal(torch.view_as_real(z), tx.update(pairs, tx.init(pairs))[0])


def test_compiled_noise_equals_eager_noise() -> None:
    tx = fo.add_noise(0.5, 0.55, key=7)
    gs, state = params(), tx.init(params())
    compiled = torch.compile(tx.update, backend="aot_eager", fullgraph=True)
    for _ in range(3):
        wanted = tx.update(gs, state, gs)
        updates, state = compiled(gs, state, gs)
        assert_equal(fo.state_dict((updates, state)), fo.state_dict(wanted))


def test_vmapped_noise_equals_a_loop() -> None:
    keys, counts = random.split(random.key(0), 3), torch.tensor([0, 5, 2])

    def step(key: Tensor, count: Tensor) -> dict[str, Tensor]:
        return drawn(fo.add_noise(0.5, 0.55, key), count=count)

    batched = vmap(step)(keys, counts)
    looped = [step(key, count) for key, count in zip(keys, counts, strict=True)]
    assert_equal(
        batched, {path: torch.stack([one[path] for one in looped]) for path in batched}
    )
    assert not torch.equal(batched["a"][0], batched["a"][1])


def test_one_key_for_all_members_is_the_same_noise() -> None:
    tx, gs = fo.add_noise(1.0, 0.0, key=0), torch.zeros(3, 4)
    state = tx.init(torch.zeros(4))
    z = vmap(lambda g: tx.update(g, state)[0])(gs)
    assert torch.equal(z[0], z[1])
    assert torch.equal(z[0], z[2])
