"""Slots in a code: the dynamic map, its blocks, and the laws for each row that has slots."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import test_laws as laws
import test_programs as programs_law
import torch
from executions import EAGER, Plan
from parity_page import assert_near, compares
from programs import program
from registry import ROWS, Row, everywhere
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import functorch_opt as fo
from functorch_opt import tree
from functorch_opt._execution import pieces
from functorch_opt.codecs import maps
from functorch_opt.codecs.codec import CODECS, DYNAMIC, FLOAT8, FOUR_BITS, Codec
from functorch_opt.codecs.maps import dynamic_map
from functorch_opt.codecs.rounded import KEY, to_bfloat16

BLOCKWISE = [codec for codec in CODECS.values() if codec.block]


def bitsandbytes_map(signed: bool) -> np.ndarray:
    """``create_dynamic_map`` of bitsandbytes 0.45, for 8 bits and 7 bits of exponent."""
    levels = []
    for i in range(7):
        items = 2**i + 1 if signed else 2 ** (i + 1) + 1
        edges = np.linspace(0.1, 1, items)
        means = 10.0 ** (-6 + i) * (edges[:-1] + edges[1:]) / 2
        levels += [*means, *(-means if signed else [])]
    return np.sort([*levels, 0.0, 1.0])


def written(codec: Codec, x: Tensor) -> tuple[Tensor, Tensor]:
    return codec.write(x, codec.n_blocks(x.numel()))


def read(codec: Codec, codes: Tensor, scales: Tensor) -> Tensor:
    """A slot whose number of elements is even, or whose codes are not packed."""
    return codec.read(codes, scales.float(), codec.packed * codes.numel())


# ---- the map -------------------------------------------------------------------------------------


@pytest.mark.parametrize("signed", [True, False])
def test_the_levels_are_those_of_bitsandbytes(signed: bool) -> None:
    ours, theirs = dynamic_map(signed).numpy(), bitsandbytes_map(signed)
    assert len(ours) == len(theirs) == 256
    np.testing.assert_allclose(ours[signed:], theirs[signed:], rtol=1e-12)
    if signed:
        assert ours[0] == -1
        assert theirs[0] == pytest.approx(-0.993, abs=1e-3)


@pytest.mark.parametrize("signed", [True, False])
def test_codes_and_levels_are_worked_out(signed: bool) -> None:
    """All 256 levels have their codes, and numbers beside each bound the codes on its sides."""
    codes = torch.arange(256).to(torch.uint8)
    unsigned = torch.tensor([float(not signed)])
    levels = maps.levels(codes, unsigned)
    np.testing.assert_allclose(levels, dynamic_map(signed), rtol=1.3e-7)
    assert torch.equal(maps.nearest(levels, unsigned), codes)
    middle = (dynamic_map(signed)[1:] + dynamic_map(signed)[:-1]) / 2
    for off in (1e-6, 1e-5, 1e-3):
        below, above = middle - off * middle.abs(), middle + off * middle.abs()
        assert torch.equal(maps.nearest(below.float(), unsigned), codes[:-1])
        assert torch.equal(maps.nearest(above.float(), unsigned), codes[1:])


@pytest.mark.parametrize("signed", [True, False])
def test_what_is_looked_up_is_what_is_worked_out(signed: bool) -> None:
    unsigned = torch.tensor([[float(not signed)]])
    codes = torch.arange(256).to(torch.uint8)[None]
    assert torch.equal(
        maps.levels(codes, unsigned), maps.levels_looked_up(codes, unsigned)
    )
    bounds = maps.tables_on(torch.device("cpu")).bounds.view(2, 256)[1 - int(signed), :-1]
    middle = dynamic_map(signed).float()
    near = [bounds]
    for _ in range(20):
        near = [near[0].nextafter(torch.tensor(-1.0)), *near]
        near = [*near, near[-1].nextafter(torch.tensor(1.0))]
    random = torch.rand(200_000, generator=torch.Generator().manual_seed(0)) * 2 - 1
    y = torch.cat([*near, middle, random, random**9, random**21]).clamp(-1, 1)[None]
    assert torch.equal(maps.nearest(y, unsigned), maps.nearest_looked_up(y, unsigned))


def once_stored(codec: Codec, x: Tensor) -> Tensor:
    return codec.read_whole(*codec.write_whole(x), x.shape)


@pytest.mark.parametrize("codec", BLOCKWISE, ids=lambda codec: codec.name)
def test_in_a_graph_nothing_is_looked_up(codec: Codec) -> None:
    x = torch.randn(3, 700)
    graph = make_fx(lambda x: once_stored(codec, x))(x)
    assert "index" not in graph.code
    assert "searchsorted" not in graph.code and "bucketize" not in graph.code
    assert torch.equal(graph(x), once_stored(codec, x))


NUMBERS = {
    "normal": lambda x: x,
    "positive": lambda x: x * x,
    "negative": lambda x: -x.abs(),
    "wide": lambda x: x**9,
    "small": lambda x: x * 1e-38,
    "denormal": lambda x: x * 1e-44,
    "zero": lambda x: 0 * x,
    "equal": lambda x: torch.full_like(x, -2.5),
}


@pytest.mark.parametrize("codec", BLOCKWISE, ids=lambda codec: codec.name)
@pytest.mark.parametrize("numbers", NUMBERS)
def test_what_was_stored_is_stored_as_it_is(codec: Codec, numbers: str) -> None:
    x = NUMBERS[numbers](torch.randn(20_002, generator=torch.Generator().manual_seed(0)))
    codes, scales = written(codec, x)
    once = read(codec, codes, scales)
    again = written(codec, once)
    assert torch.equal(read(codec, *again), once)
    exact = {"zero", "equal"} | ({"denormal"} if codec is DYNAMIC else set())
    assert (once != x).any() == (numbers not in exact)


@pytest.mark.parametrize("numbers", ["normal", "positive", "negative", "wide"])
def test_a_code_is_the_nearest_level(numbers: str) -> None:
    x = NUMBERS[numbers](torch.randn(2_561, generator=torch.Generator().manual_seed(1)))
    codes, scales = written(DYNAMIC, x)
    off = (read(DYNAMIC, codes, scales) - x).double().abs()
    for k, scale in enumerate(scales.tolist()):
        block = slice(256 * k, 256 * (k + 1))
        levels = dynamic_map(signed=scale >= 0) * abs(scale)
        least = (x[block, None].double() - levels).abs().amin(1)
        torch.testing.assert_close(off[block], least, rtol=0, atol=2e-7 * abs(scale))
        assert abs(scale) == x[block].abs().max()
    assert (scales < 0).all() == (numbers == "positive")


def test_a_block_is_256_elements_of_the_flat_tensor_and_knows_no_other() -> None:
    x = torch.randn(1_000)
    codes, scales = written(DYNAMIC, x)
    for k in range(4):
        block = x[256 * k : 256 * (k + 1)]
        alone, scale = written(DYNAMIC, block)
        assert torch.equal(codes[256 * k : 256 * (k + 1)], alone)
        assert torch.equal(scales[k : k + 1], scale)


@pytest.mark.parametrize("codec", BLOCKWISE, ids=lambda codec: codec.name)
def test_what_is_not_finite_stays_so(codec: Codec) -> None:
    x = torch.ones(3, codec.block)
    x[0, 7], x[1, 7] = torch.inf, torch.nan
    found = read(codec, *written(codec, x.flatten())).view(3, codec.block)
    assert not found[:2].isfinite().any()
    assert torch.equal(found[2], x[2])


# ---- four bits and float8 ------------------------------------------------------------------------


def levels_of_torchao(signed: bool) -> np.ndarray:
    """The maps of torchao's ``subclass_4bit.py``: ``create_dynamic_map(True, 3, 4)``, and linear."""
    if not signed:
        return np.linspace(0, 1, 17)[1:]
    levels = []
    for i in range(3):
        edges = np.linspace(0.1, 1, 2**i + 1)
        means = 10.0 ** (i - 2) * (edges[:-1] + edges[1:]) / 2
        levels += [*means, *-means]
    return np.sort([*levels, 0.0, 1.0])


@pytest.mark.parametrize("numbers", ["normal", "positive", "negative", "wide"])
def test_four_bits_are_the_nearest_levels_of_torchao(numbers: str) -> None:
    x = NUMBERS[numbers](torch.randn(1_281, generator=torch.Generator().manual_seed(1)))
    codes, scales = FOUR_BITS.write_whole(x)
    assert codes.shape == (641,) and scales.shape == (11,)
    found = FOUR_BITS.read_whole(codes, scales, x.shape).double()
    for k, scale in enumerate(scales.tolist()):
        block = slice(128 * k, 128 * (k + 1))
        levels = levels_of_torchao(signed=scale >= 0)
        if scale >= 0:
            levels[0] = -1
        y = x[block].double() / abs(scale)
        off = (y[:, None] - torch.from_numpy(levels)).abs()
        torch.testing.assert_close(
            (found[block] / abs(scale) - y).abs(), off.amin(1), rtol=0, atol=2e-7
        )
        assert abs(scale) == x[block].abs().max()
    assert (scales < 0).all() == (numbers == "positive")


def test_two_codes_lie_in_a_byte_as_in_torchao() -> None:
    """The first one in the upper bits; the levels of codes 0 and 15 are -1 and 1."""
    codes, scales = FOUR_BITS.write_whole(torch.tensor([-1.0, 1.0, 0.0]))
    assert codes.tolist() == [0x0F, 0x70]
    assert scales.tolist() == [1.0]


def test_packed_codes_have_half_of_the_last_dimension_if_that_is_even() -> None:
    for shape, expected in {(3, 4, 6): (3, 4, 3), (6,): (3,), (3, 5): (8,)}.items():
        x = torch.randn(shape)
        codes, scales = FOUR_BITS.write_whole(x)
        assert codes.shape == expected == FOUR_BITS.shape_of_codes(x.shape)
        found = FOUR_BITS.read_whole(codes, scales, x.shape)
        assert found.shape == shape and (found - x).abs().max() < 0.2 * x.abs().max()


@pytest.mark.parametrize("codec", [FOUR_BITS, FLOAT8], ids=lambda codec: codec.name)
def test_no_positive_number_of_a_second_moment_becomes_zero(codec: Codec) -> None:
    x = torch.rand(256, generator=torch.Generator().manual_seed(0)) ** 9 + 1e-30
    x[3::5] = 0
    x[:128:2] = 0
    x[128:] += 1e-20
    found = once_stored(codec, x)
    assert torch.equal(found > 0, x > 0)
    assert found[x > 0].min() < 1e-2 or codec is FOUR_BITS


def test_float8_is_e4m3_with_a_scale_that_rounds_nothing() -> None:
    """The reference is the cast of torch, of numbers as large as it can take."""
    x = torch.randn(1_300, generator=torch.Generator().manual_seed(0)) ** 5
    codes, scales = FLOAT8.write_whole(x)
    assert codes.shape == x.shape and scales.dtype is torch.bfloat16
    found = FLOAT8.read_whole(codes, scales, x.shape)
    for k, scale in enumerate(scales.tolist()):
        block = slice(128 * k, 128 * (k + 1))
        assert np.frexp(scale)[0] == 0.5
        assert 224 < x[block].abs().max() / scale <= 448
        cast = (x[block].double() / scale).to(torch.float8_e4m3fn)
        assert torch.equal(found[block], cast.float() * scale)


@compares(
    "stored",
    reference="bitsandbytes' blockwise Adam, transcribed",
    remark="the lowest level is -1",
)
@pytest.mark.parametrize("b2", [0.999, 0.9, 0.5, 0.99])
def test_adam_with_moments_in_8_bits(b2: float) -> None:
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(20, 30, generator=generator, dtype=torch.float64)
    tx = fo.stored(fo.scale_by_adam(b2=b2), where=everywhere)
    state = tx.init(p)
    moments = [np.zeros(600), np.zeros(600)]
    for t in range(1, 101):
        g = torch.randn(20, 30, generator=generator, dtype=torch.float64)
        u, state = tx.update(g, state, p)
        flat = g.flatten().numpy()
        mu = 0.9 * moments[0] + (1 - 0.9) * flat
        nu = b2 * moments[1] + (1 - b2) * flat**2
        expected = mu / (1 - 0.9**t) / (np.sqrt(nu / (1 - b2**t)) + 1e-8)
        assert_near(u.flatten(), expected, where=f"step {t}")
        moments = [kept(state, "mu", mu), kept(state, "nu", nu)]


def kept(state: Any, slot: str, x: np.ndarray) -> np.ndarray:
    """A slot as it is stored, of which each number is the nearest level that bitsandbytes has."""
    codes, scales = fo.get(state, slot).flatten(), fo.get(state, slot + "_scale")
    found = read(DYNAMIC, codes, scales).numpy()
    for k in range(0, len(x), 256):
        block = x[k : k + 256].astype(np.float32)
        largest = np.abs(block).max()
        levels = bitsandbytes_map(signed=bool((block < 0).any()))
        if (block < 0).any():
            levels[0] = -1
        off = np.abs((block / largest)[:, None].astype(float) - levels)
        assert (off.min(1) + 3e-7 >= np.abs(found[k : k + 256] - block) / largest).all()
        assert abs(scales[k // 256]) == largest
    return found.astype(float)


# ---- the laws ------------------------------------------------------------------------------------


EVERY_CODE = "FO_EVERY_CODE" in os.environ
"""Whether the laws run for every code around every row, which takes an hour: `make codes`."""


def with_slots(codes: str, names: set[str] | None = None) -> list[Any]:
    """Each row that has slots which start at zero, with these stored in a code. Options are slow.

    If `names` are given, only those rows, unless all were asked for.
    """
    found = []
    rows = [row for row in ROWS if names is None or EVERY_CODE or row.name in names]
    for row in rows:
        for i, variant in enumerate(row.variants):
            try:
                fo.stored(row.build(variant), codes)
            except ValueError:
                continue
            slow = [pytest.mark.slow] if i else []
            name = f"{row.name}{i or ''}-{codes}"
            stored = stored_row(row, codes)
            found.append(pytest.param(stored, variant, id=name, marks=slow))
    return found


def stored_row(row: Row, codes: str) -> Row:
    def make(**given: Any) -> fo.GradientTransformation:
        return fo.stored(row.make(**given), codes, where=everywhere)

    return replace(row, make=make, smooth=False, written=False)


CASES = with_slots("8bit")
cases = pytest.mark.parametrize(("row", "variant"), CASES)
LAWS = [
    laws.test_update_is_pure,
    laws.test_two_inits_share_nothing,
    laws.test_vmap_equals_a_loop,
    laws.test_missing_gradient_leaves_param_and_slots_alone,
    laws.test_a_param_that_is_none_is_nothing,
    laws.test_zero_gradient_and_zero_learning_rate_move_nothing,
    laws.test_resumed_equals_uninterrupted,
]


def test_many_rows_have_slots() -> None:
    names = {case.values[0].name for case in CASES}
    assert {"adamw", "lion", "muon", "soap", "lamb", "adafactor", "MultiSteps"} <= names
    assert len(names) > 60


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__.removeprefix("test_"))
@cases
def test_the_laws_hold_with_slots_in_a_code(law: Any, row: Row, variant: dict) -> None:
    law(row, variant)


@cases
def test_structure_stays(row: Row, variant: dict) -> None:
    laws.test_structure_shape_and_dtype_stay(row, variant, torch.bfloat16)


SAMPLE = {"adamw", "lion", "trace", "lamb", "adafactor", "muon", "soap", "MultiSteps"}
"""Elementwise rules, rules with sums, matrix rules, and a gate."""
sample = [case for case in CASES if case.values[0].name in SAMPLE and not case.marks]
OTHERS = [code for code in CODECS if code != "8bit"]
others = [case for code in OTHERS for case in with_slots(code, SAMPLE)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64], ids=str)
@pytest.mark.parametrize(("row", "variant"), sample)
def test_structure_stays_in_other_dtypes(
    row: Row, variant: dict, dtype: torch.dtype
) -> None:
    laws.test_structure_shape_and_dtype_stay(row, variant, dtype)


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__.removeprefix("test_"))
@pytest.mark.parametrize(("row", "variant"), others)
def test_the_laws_hold_in_other_codes(law: Any, row: Row, variant: dict) -> None:
    law(row, variant)


# ---- executions ----------------------------------------------------------------------------------

SHAPES = {
    "whole": (64, 64),
    "rest": (70, 61),
    "large": (300, 257),
    "vector": (5000,),
    "few": (9,),
    "number": (),
    "none": (0, 3),
}


def draw(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(s, generator=generator) for n, s in SHAPES.items()}


def trained(tx: fo.GradientTransformation, steps: int = 3) -> dict[str, Tensor]:
    params, state = draw(0), tx.init(draw(0))
    for k in range(1, steps + 1):
        updates, state = tx.update(draw(k), state, params)
        params = fo.apply_updates(params, updates)
    return params


def trained_in_place(opt_of: Any, steps: int = 3) -> tuple[dict[str, Tensor], Any]:
    params = {name: torch.nn.Parameter(x) for name, x in draw(0).items()}
    opt = opt_of(params.items())
    for k in range(1, steps + 1):
        for name, g in draw(k).items():
            params[name].grad = g
        opt.step()
    return {name: p.detach() for name, p in params.items()}, opt


TRANSFORMATIONS = {
    "adamw": fo.adamw(0.1),
    "lion": fo.chain(fo.clip_by_global_norm(1.0), fo.lion(0.1)),
    "sums": fo.lamb(0.1),
    "matrices": fo.muon(0.1),
    "gate": fo.MultiSteps(fo.adam(0.1), 2),
    "master": fo.keep_master_weights(fo.adam(0.1)),
}


OFF: dict[str, float] = {}
"""How far one step away another level leads, of codes with few levels."""
codes = pytest.mark.parametrize("code", CODECS)


@codes
@pytest.mark.parametrize("where", [fo.large_matrices, everywhere], ids=["large", "all"])
@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_pieces_are_update(
    name: str, where: Any, code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "PIECE", 1024)
    tx = fo.stored(TRANSFORMATIONS[name], code, where=where)
    found, opt = trained_in_place(lambda params: fo.optim.Optimizer(params, tx))
    expected = trained(tx)
    assert found.keys() == expected.keys()
    for leaf in expected:
        torch.testing.assert_close(
            found[leaf], expected[leaf], rtol=1e-5, atol=1e-6, msg=leaf
        )
    kept = [x for entry in opt.state.values() for x in entry.values()]
    assert any(x.dtype is CODECS[code].dtype for x in kept)


@codes
@pytest.mark.parametrize("name", ["adamw", "lion", "sums"])
def test_compiled_is_update(name: str, code: str) -> None:
    """To rounding, which may lead to the next level."""
    tx = fo.stored(TRANSFORMATIONS[name], code)
    params, step = draw(0), fo.compiled_step(tx)
    state = tx.init(params)
    for k in range(1, 4):
        params, state = step(params, draw(k), state)
    for leaf, expected in trained(tx).items():
        off = (params[leaf] - expected).abs()
        assert (off > 1e-5).double().mean().nan_to_num() < 1e-4, leaf
        assert off.numel() == 0 or off.max() < OFF.get(code, 2e-3), leaf


def most_alive(step: Any) -> int:
    """The most bytes that are alive at a time, counted by torch's profiler."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        step()
    events = [
        e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"
    ]
    alive, most = 0, 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        alive += event.nbytes()
        most = max(most, alive)
    return most


@pytest.mark.parametrize(
    ("code", "compile"),
    [("8bit", False), ("8bit", True), ("4bit", False), ("float8", False)],
)
def test_no_slot_is_ever_whole_in_float32(
    code: str, compile: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "PIECE", 8192)
    p = torch.nn.Parameter(torch.randn(1024, 1024))
    p.grad = torch.randn_like(p)
    opt = fo.optim.Optimizer([p], fo.stored(fo.adamw(0.1), code), compile=compile)
    opt.step()
    assert 0 < most_alive(opt.step) < 0.25 * p.nbytes
    kept = sum(x.nbytes for x in opt.state[p].values())
    assert kept < 2.13 * p.numel() / CODECS[code].packed


# ---- which slots, which leaves -------------------------------------------------------------------


def dtypes(state: Any) -> dict[str, torch.dtype]:
    return {path: x.dtype for path, x in fo.state_dict(state).items()}


def test_small_tensors_vectors_and_embeddings_stay_as_they_are() -> None:
    params = {
        "embed": torch.zeros(64, 64),
        "fc": torch.zeros(64, 64),
        "small": torch.zeros(4, 4),
        "norm": torch.zeros(5000),
    }
    found = dtypes(fo.stored(fo.trace(0.9)).init(params))
    coded = [path for path, dtype in found.items() if dtype is torch.uint8]
    assert coded == ["slots/trace/fc"]


def test_slots_are_chosen_by_name() -> None:
    tx = fo.stored(fo.adam(0.1), {"mu": "bfloat16", "nu": "8bit"}, where=everywhere)
    state = tx.init([torch.zeros(8)])
    assert fo.get(state, "mu")[0].dtype is torch.bfloat16
    assert fo.get(state, "nu")[0].dtype is torch.uint8
    with pytest.raises(KeyError):
        fo.get(state, "mu_scale")


def test_what_does_not_start_at_zero_is_stored_only_by_name() -> None:
    with pytest.raises(ValueError, match=r"no slot .* starts at zero.*'sum'"):
        fo.stored(fo.scale_by_rss())
    state = fo.stored(fo.scale_by_rss(), {"sum": "8bit"}, where=everywhere).init(
        [torch.zeros(8)]
    )
    assert fo.get(state, "sum")[0].dtype is torch.uint8


def test_what_is_wrong_is_said() -> None:
    with pytest.raises(TypeError, match="stored takes a transformation"):
        fo.stored(0.1)
    with pytest.raises(ValueError, match=r"codes are .*'8bit'.*got '3bit'"):
        fo.stored(fo.adam(0.1), "3bit")
    with pytest.raises(ValueError, match="none is called 'nuu'"):
        fo.stored(fo.adam(0.1), {"nuu": "8bit"})


def test_hyperparameters_in_the_state() -> None:
    tx = fo.stored(fo.inject_hyperparams(fo.adamw)(learning_rate=0.1))
    expected = trained(fo.stored(fo.adamw(0.1)))
    for leaf, x in trained(tx).items():
        torch.testing.assert_close(x, expected[leaf])


def test_groups_see_the_same_leaves() -> None:
    tx = fo.partition(
        {"a": fo.adam(0.1), "b": fo.lion(0.1)}, lambda path, p: "ab"[p.dim() > 1]
    )
    state = fo.stored(tx, where=everywhere).init(
        {"x": torch.zeros(3), "y": torch.zeros(2, 2)}
    )
    coded = [path for path, of in dtypes(state).items() if of is torch.uint8]
    assert len(coded) == 3
    assert all(x is not None for x in tree.leaves(state))


SEEDS = [3, 6, 11, 17, 20, 27]
"""Programs with slots that start at zero."""


CODED = [("8bit", seed) for seed in SEEDS]
CODED += [(code, seed) for code in OTHERS for seed in SEEDS[:4]]


@pytest.mark.parametrize(("code", "seed"), CODED)
def test_random_programs_with_slots_in_a_code(
    code: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every eager execution of a random transformation gives the numbers of `update`."""
    made = Plan.tx

    def stored(plan: Plan) -> fo.GradientTransformation:
        return fo.stored(made(plan), code, where=everywhere)

    monkeypatch.setattr(Plan, "tx", stored)
    for failure in programs_law.check(program(seed), [*EAGER]):
        pytest.fail(str(failure), pytrace=False)


# ---- rounded at random ---------------------------------------------------------------------------


@pytest.mark.parametrize("half", [0, 1])
def test_a_number_is_rounded_up_as_often_as_its_last_bits_say(half: int) -> None:
    """The reference cuts and adds integers; what is away from zero is up for positive numbers."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(100_000, generator=generator) ** 5
    bits = torch.randint(-(2**31), 2**31, x.shape, generator=generator).to(torch.int32)
    noise = (bits.long() >> (16 * half)) & 0xFFFF
    whole = x.view(torch.int32).long() & 0xFFFFFFFF
    rest = whole & 0xFFFF
    is_away = torch.where(x > 0, noise < rest, noise >= 2**16 - rest) & (rest > 0)
    expected = (whole - rest + 2**16 * is_away).to(torch.uint32).view(torch.float32)
    found = to_bfloat16(x, bits, half)
    assert torch.equal(found, expected)
    assert torch.equal(found, found.bfloat16().float())
    assert 0.4 < is_away.double().mean() < 0.6


def test_a_second_moment_decays_in_bfloat16() -> None:
    """Rounded to nearest, a decay of 0.999 moves nothing."""
    g = torch.full((100, 100), 0.1)
    ends = {}
    for code in ("bfloat16", "bfloat16_stochastic"):
        tx = fo.stored(fo.scale_by_rms(decay=0.999), code, where=everywhere)
        state = tx.init(g)
        for k in range(300):
            _, state = tx.update(g if k < 20 else 0 * g, state)
        ends[code] = fo.get(state, "nu").float().mean().item()
    exact = 0.01 * (1 - 0.999**20) * 0.999**280
    assert ends["bfloat16"] > 1.2 * exact
    assert ends["bfloat16_stochastic"] == pytest.approx(exact, rel=0.005)


def test_each_model_has_draws_of_its_own() -> None:
    """Under vmap the models with the same numbers round them otherwise, as a loop over keys does."""
    g = torch.rand(50, 40, generator=torch.Generator().manual_seed(0))
    keys = fo.random.split(fo.random.key(1), 3)

    def after(key: Tensor) -> Tensor:
        tx = fo.stored(fo.trace(0.9), "bfloat16_stochastic", where=everywhere, key=key)
        return fo.get(tx.update(g, tx.init(g))[1], "trace")

    found = torch.vmap(after)(keys)
    assert torch.equal(found, torch.stack([*map(after, keys)]))
    assert (found[0] != found[1]).double().mean() > 0.2


def test_slots_and_stages_have_draws_of_their_own() -> None:
    g = torch.full((64, 64), 0.1003)
    code = "bfloat16_stochastic"
    rule = fo.trace(0.9)
    tx = fo.stored(fo.chain(rule, fo.scale(0.0), fo.add_noise(0.0, 0.0, 1), rule), code)
    state = tx.init(g)
    shared = [x for path, x in fo.state_dict(state).items() if path.endswith(KEY)]
    assert len(shared) == 2 and not torch.equal(*shared)
    tx = fo.stored(fo.scale_by_adam(b1=0.5, b2=0.5), code, where=everywhere)
    state = tx.update(g.sqrt(), tx.init(g))[1]
    mu, nu = fo.get(state, "mu").float(), fo.get(state, "nu").float()
    ups = torch.stack([(mu > mu.mean()).flatten(), (nu > nu.mean()).flatten()])
    assert len(mu.unique()) == len(nu.unique()) == 2
    assert ups.double().corrcoef()[0, 1].abs() < 0.08


@pytest.mark.parametrize("make", [fo.trace, fo.adam])
def test_a_float32_checkpoint_has_no_key_and_gets_one(make: Any) -> None:
    params = {"w": torch.randn(80, 64)}
    plain, stored = make(0.1), fo.stored(make(0.1), "bfloat16_stochastic")
    _, state = plain.update(params, plain.init(params))
    fresh = stored.init(params)
    loaded = fo.load_state_dict(fresh, fo.recoded(fo.state_dict(state), fresh))
    kept = [dtype for path, dtype in dtypes(loaded).items() if path.endswith("/w")]
    assert set(kept) == {torch.bfloat16}
    back = fo.recoded(fo.state_dict(loaded), state)
    assert back.keys() == fo.state_dict(state).keys()


# ---- in the stateful optimizers ------------------------------------------------------------------


def optimized(make: Any, steps: int = 3) -> tuple[torch.nn.Linear, Any]:
    torch.manual_seed(0)
    model = torch.nn.Linear(100, 60)
    opt = make(model)
    go_on(model, opt, range(steps))
    return model, opt


def go_on(model: torch.nn.Linear, opt: Any, steps: range) -> None:
    for k in steps:
        x = torch.randn(16, 100, generator=torch.Generator().manual_seed(k))
        opt.zero_grad()
        model(x).square().mean().backward()
        opt.step()


STATEFUL = {
    "AdamW": (lambda params, **given: fo.optim.AdamW(params, **given), "exp_avg"),
    "SGD": (
        lambda params, **given: fo.optim.SGD(params, 0.1, momentum=0.9, **given),
        "momentum_buffer",
    ),
    "Lion": (
        lambda params, **given: fo.optim.Lion(params, 0.1, **given),
        "scale_by_lion/mu",
    ),
    "factory": (
        lambda params, **given: fo.optim.Optimizer(params, fo.lamb, lr=0.1, **given),
        "scale_by_adam/mu",
    ),
}
stateful = pytest.mark.parametrize("name", STATEFUL)


@codes
@stateful
def test_an_optimizer_with_slots_in_a_code_is_resumed(name: str, code: str) -> None:
    make, slot = STATEFUL[name]
    model, opt = optimized(lambda model: make(model.parameters(), state=code))
    assert opt.state[model.weight][slot].dtype is CODECS[code].dtype
    assert opt.state[model.bias][slot].dtype is torch.float32
    assert opt.param_groups[0]["state"] == code
    saved = laws.io.BytesIO()
    torch.save((model.state_dict(), opt.state_dict()), saved)
    saved.seek(0)
    weights, state = torch.load(saved, weights_only=True)
    other, resumed = optimized(lambda model: make(model.parameters(), state=code), 0)
    other.load_state_dict(weights)
    resumed.load_state_dict(state, strict=True)
    go_on(model, opt, range(3, 6))
    go_on(other, resumed, range(3, 6))
    assert torch.equal(model.weight, other.weight)


@pytest.mark.parametrize("there", [None, *CODECS])
@pytest.mark.parametrize("here", [None, *CODECS])
@stateful
def test_checkpoints_are_converted(name: str, here: Any, there: Any) -> None:
    make, slot = STATEFUL[name]
    model, opt = optimized(lambda model: make(model.parameters(), state=there))
    other, resumed = optimized(lambda model: make(model.parameters(), state=here), 0)
    saved = opt.state_dict()
    for group in saved["param_groups"]:
        group.pop("state", None)  # otherwise slots would be stored as they were there
    resumed.load_state_dict(saved, strict=True)
    entry = resumed.state[other.weight]
    codec = CODECS.get(here)
    assert entry[slot].dtype is (codec.dtype if codec else entry[slot].dtype)
    assert (slot + "_scale" in entry) == bool(codec and codec.block)
    kept = float32(opt, model, slot, there)
    found = float32(resumed, other, slot, here)
    bound = {"4bit": 0.17, "float8": 0.07}.get(here, 0.01)
    assert (kept - found).abs().max() <= bound * kept.abs().max()
    go_on(other, resumed, range(3, 5))


def float32(opt: Any, model: torch.nn.Linear, slot: str, code: Any) -> Tensor:
    entry = opt.state[model.weight]
    codec = CODECS.get(code)
    if not codec or not codec.block:
        return entry[slot].float()
    return codec.read_whole(entry[slot], entry[slot + "_scale"], model.weight.shape)


def test_a_group_says_how_its_slots_are_stored() -> None:
    model = torch.nn.Linear(100, 60)
    other = torch.nn.Linear(100, 60)
    groups = [
        {"params": model.parameters(), "state": "8bit"},
        {"params": other.parameters()},
    ]
    opt = fo.optim.AdamW(groups, state="float32")
    for p in [*model.parameters(), *other.parameters()]:
        p.grad = torch.ones_like(p)
    opt.step()
    assert opt.state[model.weight]["exp_avg"].dtype is torch.uint8
    assert opt.state[other.weight]["exp_avg"].dtype is torch.float32
    assert "exp_avg_scale" not in opt.state[other.weight]


def test_a_state_that_there_is_not() -> None:
    p = [torch.nn.Parameter(torch.ones(2, 2))]
    with pytest.raises(ValueError, match=r"state must be one of .*got '9bit'"):
        fo.optim.AdamW(p, state="9bit")
    with pytest.raises(ValueError, match=r"starts at zero"):
        fo.optim.SGD(p, state="8bit")


def test_recoded_goes_there_and_back() -> None:
    params = {"slots": torch.randn(80, 64), "b": torch.randn(9)}
    plain, stored = fo.adam(0.1), fo.stored(fo.adam(0.1))
    state = plain.init(params)
    for _ in range(2):
        _, state = plain.update(tree.map(torch.randn_like, params), state)
    saved = fo.state_dict(state)
    fresh = stored.init(params)
    loaded = fo.load_state_dict(fresh, fo.recoded(saved, fresh))
    assert fo.get(loaded, "mu")["slots"].dtype is torch.uint8
    back = fo.recoded(fo.state_dict(loaded), state)
    assert back.keys() == saved.keys()
    for path, x in saved.items():
        assert (back[path] - x).abs().max() <= 0.01 * x.abs().max(), path
    again = fo.recoded(fo.state_dict(loaded), fresh)
    assert all(torch.equal(again[path], x) for path, x in fo.state_dict(loaded).items())
