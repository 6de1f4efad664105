"""Optimizers of matrices, beside their rules written out plainly: one matrix, one loop."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from parity_page import assert_near, compares
from test_authors import plain_adam
from torch import Tensor, nn

import functorch_opt as fo
from functorch_opt.optimizers.matrices import scale_of
from functorch_opt.optimizers.orthogonal import (
    PRESETS,
    gram_newton_schulz,
    newton_schulz,
    orthogonalizer,
    preset,
)

STEPS = 100
AUTHORS = "plain: the authors' code"
SHAPES = {"tall": (6, 4), "wide": (3, 5), "square": (4, 4)}
JORDAN = [(3.4445, -4.775, 2.0315)] * 5
CUBIC = [(1.5, -0.5, 0.0)] * 4

Plain = Callable[[Tensor], Callable[[int, Tensor, Tensor], Tensor]]


def draw(seed: int, shapes: dict[str, tuple[int, ...]] = SHAPES) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in shapes.items()
    }


def train(
    tx: fo.GradientTransformation, shapes: dict[str, tuple[int, ...]] = SHAPES
) -> dict[str, Tensor]:
    params = draw(0, shapes)
    state = tx.init(params)
    for t in range(1, STEPS + 1):
        updates, state = tx.update(draw(t, shapes), state, params)
        params = fo.apply_updates(params, updates)
    return params


def train_plainly(
    make: Plain, shapes: dict[str, tuple[int, ...]] = SHAPES
) -> dict[str, Tensor]:
    """`make` gets the first value of a parameter, and returns ``(t, g, p) -> next p``."""
    params = draw(0, shapes)
    steps = {name: make(p) for name, p in params.items()}
    for t in range(1, STEPS + 1):
        gs = draw(t, shapes)
        params = {name: steps[name](t, gs[name], p) for name, p in params.items()}
    return params


def assert_same(
    ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float = 1e-10
) -> None:
    assert ours.keys() == theirs.keys()
    for name, x in theirs.items():
        assert_near(ours[name], x, tolerance, name)


def plain_orthogonal(
    m: Tensor, triples: list, eps: float = 1e-7, slack: float = 1.0
) -> Tensor:
    """Newton-Schulz by the singular values: ``U f(S) V'`` with the polynomials of each step."""
    u, s, vh = torch.linalg.svd(m, full_matrices=False)
    s = s / (slack * m.square().sum().sqrt() + eps)
    for a, b, c in triples:
        s = a * s + b * s**3 + c * s**5
    return u @ torch.diag(s) @ vh


# ---- the iteration -------------------------------------------------------------------------------

BANDS = {
    "jordan": (5, 0.68, 1.14),
    "you": (5, 0.97, 1.04),
    "polar_express": (5, 0.87, 1.13),
    "cans": (5, 0.88, 1.12),
    "gram": (8, 0.999, 1.001),
}


@pytest.mark.parametrize("name", PRESETS)
def test_singular_values_come_near_1(name: str) -> None:
    """From a hundredth of the norm on, as the sources of the coefficients say."""
    steps, low, high = BANDS[name]
    s = torch.logspace(-2, 0, 60, dtype=torch.float64)
    found = preset(name, steps)
    out = torch.diag(newton_schulz(torch.diag(s / found.slack), found.triples))
    assert low < out.min() < out.max() < high


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (2, 3, 4), (2, 2, 5, 3)], ids=str)
@pytest.mark.parametrize("name", PRESETS)
def test_the_iteration_is_that_of_the_singular_values(
    name: str, shape: tuple[int, ...]
) -> None:
    m = torch.randn(
        shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    found = preset(name, 6)
    got = orthogonalizer(name, 6)(m, 0.01)
    matrices = m.reshape(-1, *shape[-2:]), got.reshape(-1, *shape[-2:])
    for x, o in zip(*matrices, strict=True):
        wanted = plain_orthogonal(x, [*found.triples], 0.01, found.slack)
        torch.testing.assert_close(o, wanted, rtol=1e-10, atol=1e-10)


def test_grams_method_multiplies_small_matrices_only() -> None:
    """Two products with the matrix itself before, at and after the restart; all others are small."""
    wide, large = torch.randn(3, 50, dtype=torch.float64), 0

    class Counting(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal large
            large += func is torch.ops.aten.mm.default and 50 in (
                *args[0].shape,
                *args[1].shape,
            )
            return func(*args, **(kwargs or {}))

    with Counting():
        gram_newton_schulz(wide / wide.norm(), preset("gram", 8).triples)
    assert large == 4


def test_the_dtype_of_the_iteration() -> None:
    m = torch.randn(4, 6)
    exact = orthogonalizer("jordan", 5)(m, 1e-7)
    coarse = orthogonalizer("jordan", 5, torch.bfloat16)(m, 1e-7)
    assert exact.dtype == coarse.dtype == torch.float32
    assert 1e-5 < (exact - coarse).abs().max() < 0.1


@pytest.mark.parametrize("preconditioning", ["frobenius", "spectral", "aol", "schatten"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_each_start_may_be_in_16_bits(preconditioning: str, dtype: torch.dtype) -> None:
    """As it is for float32 on a GPU. torch has no singular values in 16 bits."""
    m = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    exact, coarse = (
        orthogonalizer("you", 5, in_dtype, False, preconditioning)(m, 1e-7)
        for in_dtype in (None, dtype)
    )
    assert (exact - coarse).abs().max() < 0.1 * exact.abs().max()


# ---- Muon: dims, scales --------------------------------------------------------------------------


def plain_muon(
    lr: float,
    beta: float,
    eps: float,
    nesterov: bool,
    triples: list,
    factor: Callable,
    wd: float = 0.0,
) -> Plain:
    def make(p: Tensor) -> Callable:
        mu = torch.zeros_like(p)

        def step(t: int, g: Tensor, p: Tensor) -> Tensor:
            nonlocal mu
            mu = beta * mu + (1 - beta) * g
            m = mu / (1 - beta**t)
            if nesterov:
                m = beta * mu / (1 - beta ** (t + 1)) + (1 - beta) * g / (1 - beta**t)
            u = factor(*p.shape) * plain_orthogonal(m, triples, eps)
            return p - lr * (u + wd * p)

        return step

    return make


FACTORS = {
    "original": lambda n, m: math.sqrt(max(1, n / m)),
    "match_rms_adamw": lambda n, m: 0.2 * math.sqrt(max(n, m)),
    "rms_to_rms": lambda n, m: math.sqrt(n / m),
    "spectral": lambda n, m: math.sqrt(max(n, m)),
    "none": lambda n, m: 1.0,
}


@compares("muon", "scale_by_muon", reference=AUTHORS, remark="each scaling")
@pytest.mark.parametrize("scaling", FACTORS)
@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_is_that_of_its_authors(scaling: str, nesterov: bool) -> None:
    ours = train(
        fo.muon(0.02, CUBIC, beta=0.9, eps=1e-3, nesterov=nesterov, scaling=scaling)
    )
    plain = plain_muon(0.02, 0.9, 1e-3, nesterov, CUBIC, FACTORS[scaling])
    assert_same(ours, train_plainly(plain))


def one_step(dims: fo.MatrixDims, g: Tensor) -> Tensor:
    tx = fo.scale_by_muon("you", scaling="rms_to_rms", dims=dims)
    return tx.update(g, tx.init(g))[0]


def of_one(x: Tensor) -> Tensor:
    """Muon's first step for one matrix."""
    return one_step(fo.MatrixDims(), x)


def test_a_convolution_is_one_matrix() -> None:
    g = torch.randn(4, 3, 2, 2, dtype=torch.float64)
    wanted = of_one(g.reshape(4, 12)).reshape(g.shape)
    torch.testing.assert_close(one_step(fo.MatrixDims(), g), wanted)


def test_other_dims_are_batch() -> None:
    g = torch.randn(3, 5, 2, dtype=torch.float64)
    experts = torch.stack([of_one(x) for x in g])
    torch.testing.assert_close(one_step(fo.MatrixDims(-2, -1), g), experts)
    swapped = torch.stack([of_one(x.mT).mT for x in g])
    torch.testing.assert_close(one_step(fo.MatrixDims(-1, -2), g), swapped)


def test_rows_may_be_several_dims() -> None:
    """Weights of attention as JAX has them: [model, heads, head]."""
    g = torch.randn(6, 2, 3, dtype=torch.float64)
    wanted = of_one(g.reshape(6, 6).mT).mT.reshape(g.shape)
    torch.testing.assert_close(one_step(fo.MatrixDims((1, 2), 0), g), wanted)


def test_fused_matrices_are_split() -> None:
    """The scale is that of each block, which for blocks of other shapes is another one."""
    g = torch.randn(8, 3, dtype=torch.float64)
    sizes = torch.cat([of_one(x) for x in g.split([4, 2, 2])])
    torch.testing.assert_close(one_step(fo.MatrixDims(split=(4, 2, 2)), g), sizes)
    heads = torch.cat([of_one(x) for x in g.split(4)])
    torch.testing.assert_close(one_step(fo.MatrixDims(split=2), g), heads)
    assert (sizes - heads).abs().max() > 0.01


@pytest.mark.parametrize(
    ("dims", "shape"),
    [
        (fo.MatrixDims(), (3,)),
        (fo.MatrixDims(0, 2), (3, 3)),
        (fo.MatrixDims(0, 0), (3, 3)),
        (fo.MatrixDims(split=2), (3, 3)),
        (fo.MatrixDims(split=(1, 1)), (3, 3)),
        (fo.MatrixDims(split=0), (3, 3)),
        (fo.MatrixDims(split=True), (3, 3)),
        (fo.MatrixDims(split=()), (3, 3)),
        (fo.MatrixDims(split=(4, -1)), (3, 3)),
        (fo.MatrixDims(split=[1, 2]), (3, 3)),  # type: ignore[arg-type]
    ],
)
@pytest.mark.parametrize(
    "make", [fo.scale_by_muon, fo.scale_by_normuon, fo.scale_by_adamuon, fo.scale_by_mano]
)
def test_what_is_no_matrix_is_refused(
    make: Callable, dims: fo.MatrixDims, shape: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match=r"masked or partition|cannot be split"):
        make(dims=dims).init(torch.zeros(shape))


def test_an_unknown_scale_or_preset_is_refused() -> None:
    with pytest.raises(ValueError, match="scaling must be 'original' or"):
        fo.scale_by_muon(scaling="moonlight")
    with pytest.raises(ValueError, match="ns_coeffs must be one of"):
        fo.scale_by_muon("keller")
    assert scale_of((8, 2), "original") == 2


# ---- which goes where ----------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.qkv = nn.Linear(8, 24)
        self.experts = nn.Parameter(torch.randn(2, 4, 8))
        self.gate_proj = nn.Linear(8, 8, bias=False)
        self.gate = nn.Linear(8, 2, bias=False)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lookup = nn.Embedding(10, 8)
        self.conv = nn.Conv2d(3, 4, 3)
        self.depthwise = nn.Conv2d(4, 4, 3, groups=4)
        self.audio = nn.Conv1d(4, 8, 3)
        self.blocks = nn.ModuleList([Block()])
        self.head2 = nn.Linear(8, 10)


DIMS = {"*.qkv.weight": fo.MatrixDims(split=3), "*.experts": fo.MatrixDims(-2, -1)}


def test_labels_of_a_model() -> None:
    found = fo.matrix_labels(Model(), DIMS)
    muon = {name for name, label in found.labels.items() if label == "muon"}
    assert muon == {"conv.weight", "blocks.0.gate_proj.weight"}
    assert found.labels["blocks.0.qkv.weight"] == "*.qkv.weight"
    assert found.labels["blocks.0.experts"] == "*.experts"
    assert found.why["lookup.weight"] == "Embedding"
    assert found.why["head2.weight"] == "its name has 'head'"
    assert found.why["blocks.0.gate.weight"] == "its name has 'gate'"
    assert found.why["depthwise.weight"] == "one channel each"
    assert found.why["audio.weight"] == "three dims"
    assert found.why["blocks.0.norm.weight"] == "fewer than two dims"
    lines = str(found).splitlines()
    assert len(lines) == len(found.labels)
    assert any(
        line.split() == ["conv.weight", "[4,", "3,", "3,", "3]", "muon", "a", "matrix"]
        for line in lines
    )


def test_without_a_model_the_type_is_not_known() -> None:
    params = dict(Model().named_parameters())
    assert fo.matrix_labels(params).labels["lookup.weight"] == "muon"
    assert fo.matrix_labels(params, adamw=("lookup",)).labels["lookup.weight"] == "adamw"


def test_muon_with_adamw_steps_each_in_its_way() -> None:
    torch.manual_seed(0)
    model = Model().double()
    params = {name: p.detach() for name, p in model.named_parameters()}
    gradients = {name: torch.randn_like(p) for name, p in params.items()}
    tx = fo.muon_with_adamw(0.5, 0.1, fo.matrix_labels(model, DIMS), dims=DIMS)
    updates, _ = tx.update(gradients, tx.init(params), params)

    def wanted(name: str, dims: fo.MatrixDims) -> Tensor:
        one = fo.scale_by_muon(dims=dims)
        return -0.5 * one.update(gradients[name], one.init(params[name]))[0]

    torch.testing.assert_close(
        updates["conv.weight"], wanted("conv.weight", fo.MatrixDims())
    )
    for pattern, name in zip(
        DIMS, ("blocks.0.qkv.weight", "blocks.0.experts"), strict=True
    ):
        torch.testing.assert_close(updates[name], wanted(name, DIMS[pattern]))
    for name in ("lookup.weight", "head2.weight", "head2.bias", "audio.weight"):
        torch.testing.assert_close(
            updates[name].abs(), torch.full_like(params[name], 0.1), rtol=1e-3, atol=0
        )


def test_the_table_says_what_went_where_with_its_rate() -> None:
    model = Model()
    tx = fo.muon_with_adamw(0.5, 0.1, fo.matrix_labels(model, DIMS), dims=DIMS)
    table = fo.routing_table(fo.chain(fo.clip(1.0), tx), model).splitlines()
    assert len(table) == len([*model.parameters()])
    rows = {line.split()[0]: line for line in table}
    assert "  muon" in rows["conv.weight"] and "  0.5  " in rows["conv.weight"]
    assert rows["blocks.0.experts"].count("*.experts") == 1
    assert "  0.5  " in rows["blocks.0.experts"]
    assert rows["lookup.weight"].split()[-3:] == ["adamw", "0.1", "Embedding"]


def test_the_table_of_an_optimizer_has_the_rates_of_its_groups() -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3))
    groups = [
        {"params": [("table", model[0].weight)], "adamw_learning_rate": 0.25},
        {"params": [*model[1].named_parameters()]},
    ]
    labels = {"table": "adamw", "weight": "muon", "bias": "adamw"}
    opt = fo.optim.MuonWithAdamW(
        groups, lr=0.5, adamw_learning_rate=0.125, labels=lambda path, p: labels[path]
    )
    opt.param_groups[1]["lr"] = 0.75
    lines = [line.split() for line in fo.routing_table(opt).splitlines()]
    assert [(line[0], *line[-2:]) for line in lines] == [
        ("table", "adamw", "0.25"),
        ("weight", "muon", "0.75"),
        ("bias", "adamw", "0.125"),
    ]
    several = {"muon": fo.muon(0.5), "adamw": fo.adamw(0.125)}
    opt = fo.optim.Partition(model.named_parameters(), several, fo.matrix_labels(model))
    lines = [line.split() for line in fo.routing_table(opt).splitlines()]
    assert [(line[0], *line[-2:]) for line in lines] == [
        ("1.weight", "muon", "0.5"),
        ("0.weight", "adamw", "0.125"),
        ("1.bias", "adamw", "0.125"),
    ]


def test_the_table_is_of_a_transformation_with_params_or_of_an_optimizer() -> None:
    with pytest.raises(TypeError, match="needs the params"):
        fo.routing_table(fo.sgd(0.1))
    with pytest.raises(TypeError, match="takes a transformation, or an optimizer of fo"):
        fo.routing_table(torch.optim.SGD([torch.zeros(1)], 0.1))
    line = fo.routing_table(fo.sgd(0.1), {"w": torch.zeros(2, 2)})
    assert line.split() == ["w", "[2,", "2]", "-", "0.1"]


def plain_adamw(lr: float, b1: float, b2: float, eps: float, wd: float) -> Plain:
    def make(p: Tensor) -> Callable:
        adam = plain_adam(b1, b2, eps)
        return lambda t, g, p: p - lr * (adam(t, g) + wd * p)

    return make


def of_rows(plain: Plain, n: int) -> Plain:
    """`plain` for each block of n rows, as a matrix of its own."""

    def make(p: Tensor) -> Callable:
        steps = [plain(x) for x in p.flatten(1).split(n)]

        def step(t: int, g: Tensor, p: Tensor) -> Tensor:
            blocks = zip(steps, g.flatten(1).split(n), p.flatten(1).split(n), strict=True)
            return torch.cat([one(t, x, y) for one, x, y in blocks]).reshape(p.shape)

        return step

    return make


@compares("muon_with_adamw", reference=AUTHORS, remark="each parameter where it belongs")
@pytest.mark.parametrize(
    ("rates", "decays", "adam", "nesterov", "scaling"),
    [
        ((0.02, 3e-4), (0.0, 0.0), (0.9, 0.95, 1e-8), True, "original"),
        ((0.1, 0.01), (0.1, 0.0), (0.8, 0.99, 1e-3), False, "match_rms_adamw"),
        ((0.01, 0.1), (0.0, 0.2), (0.0, 0.5, 1e-2), True, "rms_to_rms"),
        ((0.05, 0.05), (0.3, 0.1), (0.5, 0.9, 1e-8), True, "spectral"),
    ],
)
def test_muon_with_adamw_is_that_of_its_authors(
    rates: tuple, decays: tuple, adam: tuple, nesterov: bool, scaling: str
) -> None:
    shapes = {
        "up": (6, 4),
        "conv": (3, 2, 2, 2),
        "qkv": (6, 5),
        "b": (4,),
        "head": (4, 5),
    }
    dims = {"qkv": fo.MatrixDims(split=3)}
    options = {"dims": dims, "nesterov": nesterov, "scaling": scaling}
    ours = train(fo.muon_with_adamw(*rates, None, *decays, *adam, **options), shapes)

    numbers = rates[0], 0.95, 1e-8, nesterov, JORDAN
    muon = plain_muon(*numbers, FACTORS[scaling], decays[0])
    adamw = plain_adamw(rates[1], *adam, decays[1])
    rules = {"up": of_rows(muon, 6), "conv": of_rows(muon, 3), "qkv": of_rows(muon, 2)}
    by_shape = {shape: rules.get(name, adamw) for name, shape in shapes.items()}
    theirs = train_plainly(lambda p: by_shape[tuple(p.shape)](p), shapes)
    assert_same(ours, theirs)


def test_a_parameter_that_is_new_has_no_label() -> None:
    labels = fo.matrix_labels({"w": torch.zeros(2, 2)})
    with pytest.raises(ValueError, match="no label for the parameter at 'v'"):
        fo.muon_with_adamw(0.1, 0.1, labels).init({"v": torch.zeros(2, 2)})


# ---- NorMuon, AdaMuon ----------------------------------------------------------------------------


def plain_normuon(
    lr: float, beta: float, b2: float, wd: float, nesterov: bool, short: bool
) -> Plain:
    def make(p: Tensor) -> Callable:
        n, m = p.shape
        mu, over_rows = torch.zeros_like(p), not short or n >= m
        v = p.new_zeros(n if over_rows else m)

        def step(t: int, g: Tensor, p: Tensor) -> Tensor:
            nonlocal mu, v
            mu = beta * mu + (1 - beta) * g
            d = (1 - beta) * g + beta * mu if nesterov else mu
            o = plain_orthogonal(d, JORDAN)
            v = b2 * v + (1 - b2) * (o**2).mean(1 if over_rows else 0)
            scaled = o / (v.sqrt() + 1e-10).unsqueeze(1 if over_rows else 0)
            scaled = scaled * o.norm() / (scaled.norm() + 1e-10)
            return p * (1 - lr * wd) - lr * max(1, n / m) ** 0.5 * scaled

        return step

    return make


@compares("normuon", "scale_by_normuon", reference=AUTHORS)
@pytest.mark.parametrize(
    "options",
    [
        (0.02, 0.95, 0.95, 0.0, True, False),
        (0.01, 0.9, 0.8, 0.1, False, False),
        (0.05, 0.0, 0.5, 0.02, True, True),
        (0.02, 0.8, 0.99, 0.0, False, True),
    ],
)
def test_normuon_is_that_of_its_authors(options: tuple) -> None:
    lr, beta, b2, wd, nesterov, short = options
    ours = fo.normuon(
        *(lr, JORDAN, 5, beta, b2),
        weight_decay=wd,
        nesterov=nesterov,
        axis="short" if short else "rows",
    )
    assert_same(train(ours), train_plainly(plain_normuon(*options)))


@pytest.mark.parametrize("split", [2, (4, 2)])
def test_normuon_of_fused_matrices_is_that_of_each(split: int | tuple[int, ...]) -> None:
    fused = fo.scale_by_normuon(dims=fo.MatrixDims(split=split))
    one, g = fo.scale_by_normuon(), torch.randn(6, 5, dtype=torch.float64)
    parts = g.split(list(split) if isinstance(split, tuple) else 3)
    wanted = torch.cat([one.update(x, one.init(x))[0] for x in parts])
    torch.testing.assert_close(fused.update(g, fused.init(g))[0], wanted)


def plain_adamuon(lr: float, beta: float, eps: float, wd: float, nesterov: bool) -> Plain:
    def make(p: Tensor) -> Callable:
        mu, v = torch.zeros_like(p), torch.zeros_like(p)

        def step(t: int, g: Tensor, p: Tensor) -> Tensor:
            nonlocal mu, v
            mu = mu + (1 - beta) * (g - mu)
            d = g + beta * (mu - g) if nesterov else mu
            o = plain_orthogonal(torch.sign(d), JORDAN)
            v = beta * v + (1 - beta) * o * o
            o = o / (v.sqrt() + eps)
            o = o * (0.2 * math.sqrt(p.numel())) / (o.norm() + eps)
            return p * (1 - lr * wd) - lr * o

        return step

    return make


@compares("adamuon", "scale_by_adamuon", reference=AUTHORS)
@pytest.mark.parametrize(
    "options",
    [
        (0.02, 0.95, 1e-8, 0.01, True),
        (0.01, 0.9, 1e-3, 0.1, False),
        (0.05, 0.0, 1e-2, 0.0, True),
        (0.02, 0.5, 1e-8, 0.0, False),
    ],
)
def test_adamuon_is_that_of_its_authors(options: tuple) -> None:
    lr, beta, eps, wd, nesterov = options
    ours = fo.adamuon(lr, JORDAN, 5, beta, eps, wd, nesterov=nesterov)
    assert_same(train(ours), train_plainly(plain_adamuon(*options)))


# ---- Hyperball -----------------------------------------------------------------------------------


def plain_hyperball(lr: float, direction: Plain) -> Plain:
    """`direction` is an optimizer with a learning rate of 1."""

    def make(p: Tensor) -> Callable:
        radius, plain = p.norm(), direction(p)

        def step(t: int, g: Tensor, p: Tensor) -> Tensor:
            u = p - plain(t, g, p)
            q = p - lr * p.norm() * u / max(u.norm(), 1e-10)
            return q * radius / q.norm()

        return step

    return make


@compares("muonh", "hyperball", reference="plain: the paper")
@pytest.mark.parametrize("lr", [0.018, 0.3, 0.001])
@pytest.mark.parametrize("nesterov", [True, False])
def test_muonh_is_that_of_its_authors(lr: float, nesterov: bool) -> None:
    muon = plain_muon(1.0, 0.9, 1e-8, nesterov, JORDAN, FACTORS["none"])
    ours = train(fo.muonh(lr, JORDAN, beta=0.9, nesterov=nesterov))
    assert_same(ours, train_plainly(plain_hyperball(lr, muon)))
    for name, p in draw(0).items():
        torch.testing.assert_close(ours[name].norm(), p.norm())


@compares("hyperball", reference="plain: the paper", remark="AdamH")
@pytest.mark.parametrize("lr", [0.1, 0.01, 0.5])
@pytest.mark.parametrize("b1", [0.9, 0.0])
def test_hyperball_goes_onto_adam(lr: float, b1: float) -> None:
    shapes = {**SHAPES, "b": (5,), "kernel": (3, 2, 2)}
    ours = train(fo.chain(fo.scale_by_adam(b1), fo.hyperball(lr)), shapes)
    adam = plain_adamw(1.0, b1, 0.999, 1e-8, 0.0)
    assert_same(ours, train_plainly(plain_hyperball(lr, adam), shapes))


@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "make",
    [
        fo.muonh,
        lambda lr: fo.chain(fo.scale_by_adam(), fo.hyperball(lr)),
        lambda lr: fo.masked(
            fo.hyperball(lr), lambda path, p: p.ndim > 1, otherwise="zero"
        ),
        fo.hyperball,
    ],
    ids=["muonh", "adamh", "masked", "alone"],
)
def test_the_lr_of_a_group_multiplies_the_rate_of_hyperball(
    make: Callable, compile: bool
) -> None:
    """The size of the updates has no effect there, so a factor of them would be lost."""
    half, params = fo.exponential_decay(0.05, 1, 0.5), draw(0)
    tx, stateful = make(half), {n: nn.Parameter(p.clone()) for n, p in params.items()}
    opt = fo.optim.Optimizer(stateful.items(), make(0.1), lr=0.5, compile=compile)
    scheduler, state = torch.optim.lr_scheduler.ExponentialLR(opt, 0.5), tx.init(params)
    for step in (1, 2, 3):
        updates, state = tx.update(draw(step), state, params)
        params = fo.apply_updates(params, updates)
        for name, g in draw(step).items():
            stateful[name].grad = g
        opt.step()
        scheduler.step()
    for name, p in stateful.items():
        torch.testing.assert_close(p.detach(), params[name], rtol=1e-6, atol=1e-6)
        assert (p.detach() - draw(0)[name]).norm() > 0.01


def test_hyperball_leaves_zeros_alone() -> None:
    tx, zeros = fo.hyperball(0.1), torch.zeros(3)
    updates, _ = tx.update(torch.ones(3), tx.init(zeros), zeros)
    assert torch.equal(updates, zeros)


# ---- Scion ---------------------------------------------------------------------------------------


def lmo(norm: str, m: Tensor) -> Tensor:
    if norm == "rms":
        return m / (m.square().mean().sqrt() + 1e-8)
    if norm == "sign":
        return m.sign() / m.shape[1]
    if norm == "column":
        return torch.stack([c / (c.norm() / len(c) ** 0.5 + 1e-8) for c in m.T], 1)
    if norm == "row":
        return torch.stack([r / (r.norm() * len(r) ** 0.5 + 1e-8) for r in m])
    out, inside, *kernel = m.shape
    o = plain_orthogonal(m.reshape(out, -1), JORDAN).reshape(m.shape)
    return o * (out / inside) ** 0.5 / math.prod(kernel)


def plain_scion(
    lr: float, b1: float, radius: float, norm: str, constrained: bool
) -> Plain:
    def make(p: Tensor) -> Callable:
        m = torch.zeros_like(p)

        def step(t: int, g: Tensor, p: Tensor) -> Tensor:
            nonlocal m
            m = b1 * m + (1 - b1) * g
            p = p * (1 - lr) if constrained else p
            return p - lr * radius * lmo(norm if p.dim() > 1 else "rms", m)

        return step

    return make


@compares("scion", "scale_by_scion", reference=AUTHORS)
@pytest.mark.parametrize("constrained", [True, False])
@pytest.mark.parametrize("norm", ["spectral", "sign", "column", "row", "rms"])
def test_scion_is_that_of_its_authors(norm: str, constrained: bool) -> None:
    shapes = {**SHAPES, **({"conv": (3, 2, 2, 2)} if norm == "spectral" else {})}
    role = "hidden" if norm == "spectral" else "head"
    ours = fo.scion(
        *(0.01, 0.9, 5.0, 5.0),
        labels=dict.fromkeys(shapes, role),
        head_norm=norm,
        constrained=constrained,
    )
    plain = plain_scion(0.01, 0.9, 5.0, norm, constrained)
    assert_same(train(ours, shapes), train_plainly(plain, shapes))


def test_scion_knows_vectors_by_their_shape() -> None:
    shapes = {"w": (3, 4), "b": (4,)}
    ours = train(fo.scion(0.02, 0.5, 2.0, vector_radius=3.0), shapes)
    for name, radius in (("w", 2.0), ("b", 3.0)):
        plain = plain_scion(0.02, 0.5, radius, "spectral", True)
        assert_same({name: ours[name]}, {name: train_plainly(plain, shapes)[name]})


# ---- Dion ----------------------------------------------------------------------------------------


def plain_dion(
    lr: float, rank: int, beta: float, eps: float, wd: float, seed: int
) -> Plain:
    def make(p: Tensor) -> Callable:
        n, m = p.shape
        r = min(rank, n, m)
        q = fo.random.normal(fo.random.key(seed), (m, r)).double()
        momentum = torch.zeros_like(p)

        def step(t: int, g: Tensor, p: Tensor) -> Tensor:
            nonlocal q, momentum
            momentum = momentum + g
            left = torch.linalg.qr(momentum @ q)[0]
            right = momentum.T @ left
            momentum = momentum - (1 - beta) * left @ right.T
            q = torch.stack([c / (c.norm() + eps) for c in right.T], 1)
            return p * (1 - lr * wd) - lr * math.sqrt(n / m) * left @ q.T

        return step

    return make


@compares("dion", "scale_by_dion", reference=AUTHORS, remark="with draws of `fo.random`")
@pytest.mark.parametrize(
    "options",
    [
        (0.01, 768, 0.95, 1e-8, 0.01, 0),
        (0.02, 2, 0.9, 1e-3, 0.1, 3),
        (0.05, 1, 0.5, 1e-2, 0.0, 0),
        (0.01, 3, 0.0, 1e-8, 0.0, 1),
    ],
)
def test_dion_is_that_of_its_authors(options: tuple) -> None:
    *given, seed = options
    assert_same(train(fo.dion(*given, seed=seed)), train_plainly(plain_dion(*options)))


def test_what_dion_leaves_out_stays_in_the_momentum() -> None:
    tx, g = fo.scale_by_dion(rank=1, beta=0.0), torch.randn(4, 3, dtype=torch.float64)
    u, state = tx.update(g, tx.init(g))
    left = u / u.norm()
    assert torch.linalg.matrix_rank(u) == 1
    assert torch.linalg.matrix_rank(fo.get(state, "mu")) == 2
    assert (g * left).sum() > 0


# ---- Mano ----------------------------------------------------------------------------------------


def plain_mano(lr: float, beta: float, eps: float, wd: float, nesterov: bool) -> Plain:
    def make(p: Tensor) -> Callable:
        m = torch.zeros_like(p)

        def step(t: int, g: Tensor, p: Tensor) -> Tensor:
            nonlocal m
            m = beta * m + g
            d = g + beta * m if nesterov else m
            dim = (t - 1) % 2
            unit = p / p.norm(dim=dim, keepdim=True).clamp(min=eps)
            d = d - (d * unit).sum(dim, keepdim=True) * unit
            u = d / d.norm(dim=dim, keepdim=True).clamp(min=eps)
            return p * (1 - lr * wd) - lr * 0.2 * p.shape[dim] ** 0.5 * u

        return step

    return make


@compares("mano", "scale_by_mano", reference=AUTHORS)
@pytest.mark.parametrize(
    "options",
    [
        (1e-3, 0.95, 1e-8, 0.1, False),
        (0.05, 0.9, 1e-8, 0.0, True),
        (0.02, 0.0, 1.5, 0.1, False),
        (0.1, 0.5, 1e-3, 0.02, True),
    ],
)
def test_mano_is_that_of_its_authors(options: tuple) -> None:
    *given, nesterov = options
    assert_same(
        train(fo.mano(*given, nesterov=nesterov)), train_plainly(plain_mano(*options))
    )


# ---- what is no matrix goes to AdamW -------------------------------------------------------------


@pytest.mark.parametrize(
    "make", [fo.normuon, fo.adamuon, fo.muonh, fo.dion, fo.mano], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("rate", [None, 0.3])
def test_the_rest_goes_to_adamw(make: Callable, rate: float | None) -> None:
    shapes = {"w": (3, 4), "b": (4,), "scale": ()}
    given = {"adam_b1": 0.5, "adam_b2": 0.7, "adam_eps": 1e-3, "adam_learning_rate": rate}
    ours = train(make(0.1, **given), shapes)
    theirs = train(fo.adamw(rate or 0.1, 0.5, 0.7, 1e-3, weight_decay=0.0), shapes)
    assert_same(
        {k: ours[k] for k in ("b", "scale")}, {k: theirs[k] for k in ("b", "scale")}
    )
    assert (ours["w"] - theirs["w"]).abs().max() > 1e-3
