"""The stateful adapter: torch.optim's classes give torch.optim's numbers, and the ordinary loop's tools work on any transformation."""

from __future__ import annotations

import copy
import gc
import inspect
import io
import itertools
import pickle
import weakref
from collections.abc import Iterator

import pytest
import torch
from registry import ROWS, Row
from torch import Tensor, nn
from torch.optim import lr_scheduler

import functorch_opt as fo
from functorch_opt import tree

SHAPES = {"conv": (2, 3, 1, 2), "bias": (2,), "scalar": (), "empty": (0, 2), "matrix": (4, 3)}
SHAPES_OF = {
    "Adafactor": {"conv": (2, 3, 4, 2), "bias": (2,), "scalar": (), "row": (1, 5), "matrix": (4, 3)},
    "Muon": {"tall": (4, 3), "wide": (3, 4), "square": (5, 5), "row": (1, 6), "large": (20, 30)},
}
"""Where a class does not take every shape. torch's Adafactor divides by the size of a tensor, and so has no empty ones."""


def make_params(dtype: torch.dtype = torch.float64, seed: int = 0, of: str = "") -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    shapes = SHAPES_OF.get(of, SHAPES).values()
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)) for shape in shapes]


def set_grads(params: list[nn.Parameter], step: int, missing: tuple[int, ...] = ()) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for i, p in enumerate(params):
        g = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
        assert g.numel() == 0 or (g != 0).all()
        p.grad = None if i in missing else g


def train(
    opt: torch.optim.Optimizer, params: list[nn.Parameter], steps: int, start: int = 0, missing_at: dict[int, tuple[int, ...]] | None = None
) -> list[Tensor]:
    for step in range(start, start + steps):
        set_grads(params, step, (missing_at or {}).get(step, ()))
        opt.step()
    return [p.detach().clone() for p in params]


# ---- numbers: every torch-named class against torch.optim, over its options ----------------------------------------------

TORCH_NAMED = [name for name in vars(fo.optim) if name[0].isupper() and name != "Optimizer"]


@pytest.fixture
def same_scalars(name: str) -> Iterator[None]:
    """torch keeps NAdam's mu_product and ASGD's eta and mu in the default dtype, we in that of the parameter. Here both are float64."""
    before = torch.get_default_dtype()
    if name in ("NAdam", "ASGD"):
        torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


FREEZE = {2: (0, 1, 2, 3, 4), 4: (1,), 5: (1,), 6: (1, 2)}
"""At step 2 nobody has a gradient; later some have none for a while: their counts must stand still."""

OPTIONS: list[tuple[str, dict]] = [
    *[
        ("SGD", dict(lr=0.1, momentum=m, dampening=d, weight_decay=w, nesterov=n, maximize=x))
        for m, d, w, n, x in [
            (0, 0, 0, False, False),
            (0.9, 0, 0, False, False),
            (0.9, 0.5, 0, False, False),
            (0.9, 0, 0.1, True, False),
            (0.9, 0.3, 0.1, False, True),
            (0, 0, 0.1, False, True),
        ]
    ],
    *[
        (name, dict(lr=0.1, betas=(0.8, 0.95), eps=1e-6, weight_decay=w, amsgrad=a, maximize=x))
        for name, w, a, x in itertools.product(["Adam", "AdamW"], [0, 0.1], [False, True], [False, True])
    ],
    ("Adam", dict(lr=0.1, weight_decay=0.1, decoupled_weight_decay=True)),
    *[
        ("RMSprop", dict(lr=0.01, alpha=0.9, weight_decay=w, momentum=m, centered=c, maximize=x))
        for w, m, c, x in itertools.product([0, 0.1], [0, 0.9], [False, True], [False, True])
    ],
    *[
        ("Adagrad", dict(lr=0.1, lr_decay=d, weight_decay=w, initial_accumulator_value=i, maximize=x))
        for d, w, i, x in itertools.product([0, 0.1], [0, 0.1], [0, 0.5], [False, True])
    ],
    *[
        ("Adadelta", dict(lr=0.5, rho=r, eps=e, weight_decay=w, maximize=x))
        for (r, e), w, x in itertools.product([(0.9, 1e-6), (0.5, 1e-2)], [0, 0.1], [False, True])
    ],
    *[
        ("Adamax", dict(lr=0.1, betas=(0.8, 0.95), eps=1e-3, weight_decay=w, maximize=x))
        for w, x in itertools.product([0, 0.1], [False, True])
    ],
    *[
        ("ASGD", dict(lr=0.1, lambd=l, alpha=a, t0=t, weight_decay=w, maximize=x))
        for (l, a), t, w, x in itertools.product([(1e-4, 0.75), (0.1, 0.5), (0, 0.75)], [1e6, 10, 0], [0, 0.1], [False, True])
    ],
    *[
        ("NAdam", dict(lr=0.1, betas=(0.8, 0.95), eps=1e-6, weight_decay=w, decoupled_weight_decay=d, momentum_decay=m, maximize=x))
        for (w, d), m, x in itertools.product([(0, False), (0.1, False), (0.1, True), (0, True)], [0, 4e-3, 0.1], [False, True])
    ],
    *[
        ("RAdam", dict(lr=0.1, betas=b, eps=e, weight_decay=w, decoupled_weight_decay=d, maximize=x))
        for b, e, (w, d), x in itertools.product(
            [(0.8, 0.999), (0.9, 0.9), (0.9, 0.5)], [1e-8, 1e-2], [(0, False), (0.1, False), (0.1, True)], [False, True]
        )
    ],
    *[
        ("Rprop", dict(lr=l, etas=e, step_sizes=s, maximize=x))
        for l, e, s, x in itertools.product([0.1, 1e-8], [(0.5, 1.2), (0.3, 2.0)], [(1e-6, 50), (1e-2, 0.2)], [False, True])
    ],
    *[
        ("Adafactor", dict(lr=0.1, beta2_decay=b, eps=e, d=d, weight_decay=w, maximize=x))
        for b, e, d, w, x in itertools.product([-0.8, -0.3], [(None, 1e-3), (0.5, 2.0)], [1.0, 1.5], [0, 0.1], [False, True])
    ],
    *[
        ("Muon", dict(lr=0.1, weight_decay=w, momentum=m, nesterov=n, adjust_lr_fn=a))
        for w, m, n, a in itertools.product([0, 0.1], [0, 0.9], [False, True], [None, "original", "match_rms_adamw"])
    ],
    ("Muon", dict(ns_coefficients=(2.0, -1.5, 0.5), eps=1e-2, ns_steps=3)),
    *[(name, {}) for name in TORCH_NAMED],
]
ids = [f"{name}-{'-'.join(f'{k}={v}' for k, v in options.items() if v and k not in ('lr', 'betas', 'eps'))}" for name, options in OPTIONS]


def torchs(name: str, params: list, **options) -> torch.optim.Optimizer:
    """torch's class, as a loop over the parameters."""
    return getattr(torch.optim, name)(params, **options, **({} if name == "Muon" else {"foreach": False}))


@pytest.mark.usefixtures("same_scalars")
@pytest.mark.parametrize(("name", "options"), OPTIONS, ids=ids)
def test_numbers_and_state_keys_are_torchs(name: str, options: dict) -> None:
    """Muon too: Newton-Schulz rounds to bfloat16, but it does so in the same places, and in float64 what it starts from is the same."""
    ours, theirs = make_params(of=name), make_params(of=name)
    a, b = getattr(fo.optim, name)(ours, **options), torchs(name, theirs, **options)
    start = [p.detach().clone() for p in ours]
    x, y = train(a, ours, 50, missing_at=FREEZE), train(b, theirs, 50, missing_at=FREEZE)
    for p, q, s in zip(x, y, start, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-10)
        assert p.numel() == 0 or not torch.equal(p, s)
    for p, q in zip(ours, theirs, strict=True):
        expected = b.state[q]
        assert set(a.state[p]) - {"step"} == set(expected) - {"step"}
        for key, value in expected.items():
            torch.testing.assert_close(a.state[p][key], value, rtol=1e-10, atol=1e-10)


@pytest.mark.usefixtures("same_scalars")
@pytest.mark.parametrize("name", TORCH_NAMED)
def test_groups_and_a_scheduler_as_in_torch(name: str) -> None:
    """Here two groups are one tree, with one entry per parameter for counts and numbers. ASGD hears of an lr a step late, Rprop never."""
    trajectories = []
    for build in (getattr(fo.optim, name), lambda groups, **options: torchs(name, groups, **options)):
        params = make_params(of=name)
        opt = build([{"params": params[:2], "lr": 0.2}, {"params": params[2:]}], lr=0.05)
        sched = lr_scheduler.ExponentialLR(opt, 0.5)
        trajectory = []
        for step in range(12):
            trajectory += train(opt, params, 1, start=step, missing_at=FREEZE)
            sched.step()
        trajectories.append(trajectory)
    for p, q in zip(*trajectories, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", TORCH_NAMED)
def test_arguments_and_defaults_are_torchs(name: str) -> None:
    ours, theirs = (inspect.signature(getattr(module, name)).parameters for module in (fo.optim, torch.optim))
    *like_torch, last = [(p.name, p.default, p.kind) for p in ours.values()]
    assert like_torch == [(p.name, p.default, p.kind) for p in theirs.values()]
    assert last == ("compile", False, inspect.Parameter.KEYWORD_ONLY)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("SGD", {"momentum": 0.9, "dampening": 0.1}),
        ("Adam", {"amsgrad": True}),
        ("AdamW", {}),
        ("RMSprop", {"momentum": 0.9, "centered": True}),
        ("Adagrad", {"lr_decay": 0.1}),
        ("Adadelta", {}),
        ("Adamax", {}),
        ("ASGD", {"t0": 3}),
        ("NAdam", {}),
        ("RAdam", {"betas": (0.9, 0.99)}),
        ("Rprop", {}),
        ("Adafactor", {}),
        ("Muon", {}),
    ],
)
@pytest.mark.usefixtures("same_scalars")
@pytest.mark.parametrize("direction", ["from torch", "to torch"])
def test_a_torch_checkpoint_goes_on(name: str, options: dict, direction: str) -> None:
    first, second = (getattr(torch.optim, name), getattr(fo.optim, name))[:: 1 if direction == "from torch" else -1]
    params = make_params(of=name)
    opt = first(params, **options)
    train(opt, params, 5)
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    others = [nn.Parameter(p.detach().clone()) for p in params]
    other = second(others, **options)
    other.load_state_dict(torch.load(file))
    for p, q in zip(train(opt, params, 20, start=5), train(other, others, 20, start=5), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-10)


@pytest.mark.usefixtures("same_scalars")
@pytest.mark.parametrize("name", [name for name in TORCH_NAMED if name not in ("Adafactor", "Muon")])
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
def test_complex_parameters_as_torch(dtype: torch.dtype, name: str) -> None:
    ours, theirs = make_params(dtype), make_params(dtype)
    for step in range(8):
        set_grads(ours, step)
        for p, q in zip(ours, theirs, strict=True):
            p.grad = p.grad * (1 - 0.5j)
            q.grad = p.grad.clone()
        if step == 0:
            a, b = getattr(fo.optim, name)(ours, lr=0.1), torchs(name, theirs, lr=0.1)
        a.step()
        b.step()
    tolerance = 1e-5 if dtype == torch.complex64 else 1e-10
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", TORCH_NAMED)
def test_low_precision_parameters_as_everywhere_here(name: str) -> None:
    params = make_params(torch.bfloat16, of=name)
    opt = getattr(fo.optim, name)(params)
    train(opt, params, 3)
    assert all(p.dtype == torch.bfloat16 and p.isfinite().all() for p in params)
    assert {value.dtype for p in params for value in opt.state[p].values()} == {torch.float32}


@pytest.mark.parametrize("name", TORCH_NAMED)
def test_zero_lr_and_zero_gradients_move_nothing(name: str) -> None:
    """torch.distributed.checkpoint makes such a step to create state."""
    params = make_params(of=name)
    opt = getattr(fo.optim, name)(params)
    before = [p.detach().clone() for p in params]
    for lr in (0.0, torch.tensor(0.0)):
        for p in params:
            p.grad = torch.zeros_like(p)
        opt.param_groups[0]["lr"] = lr
        opt.step()
    assert all(torch.equal(p.detach(), q) for p, q in zip(params, before, strict=True))


def chain_of(name: str, params: list) -> fo.GradientTransformation:
    """What a class with torch's name runs, as a pure function."""
    opt = getattr(fo.optim, name)(params)
    return opt._chain(**{option: opt.defaults[option] for option in opt._options()})


@pytest.mark.parametrize("name", TORCH_NAMED)
def test_the_chains_can_be_vmapped(name: str) -> None:
    batch = [torch.stack(ps).detach() for ps in zip(*(make_params(seed=i, of=name) for i in range(3)), strict=True)]
    tx = chain_of(name, make_params(of=name))

    def run(ps: list[Tensor]) -> list[Tensor]:
        state = tx.init(ps)
        for step in range(6):
            updates, state = tx.update([(p * (step + 1.0)).sin() for p in ps], state, ps)
            ps = fo.apply_updates(ps, updates)
        return ps

    tolerance = 1e-2 if name == "Muon" else 1e-10  # a batch of bfloat16 products is summed in another order
    for together, *alone in zip(torch.func.vmap(run)(batch), *(run([p[i] for p in batch]) for i in range(3)), strict=True):
        torch.testing.assert_close(together, torch.stack(alone), rtol=tolerance, atol=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["NAdam", "RAdam", "ASGD", "Rprop", "Adafactor", "Muon"])
def test_the_rules_beside_the_classes_compile_to_one_graph(name: str) -> None:
    torch._dynamo.reset()
    params = [p.detach() for p in make_params(of=name)]
    tx = chain_of(name, make_params(of=name))
    compiled = torch.compile(tx.update, fullgraph=True, backend="aot_eager")
    state, twin = tx.init(params), tx.init(params)
    for step in range(6):
        gradients = [(p * (step + 1.0)).sin() for p in params]
        updates, state = tx.update(gradients, state, params)
        with torch.compiler.set_stance("fail_on_recompile" if step > 1 else "default"):
            others, twin = compiled(gradients, twin, params)
        for u, v in zip(updates, others, strict=True):
            torch.testing.assert_close(u, v, rtol=1e-10, atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["NAdam", "RAdam", "ASGD", "Rprop", "Adafactor", "Muon"])
def test_the_rules_beside_the_classes_run_in_compiled_blocks(name: str) -> None:
    """Slots with one number for a parameter (NAdam, ASGD) and matrices (Muon, Adafactor) among them."""
    torch._dynamo.reset()
    ps, qs = ([p.detach() for p in make_params(of=name)] for _ in range(2))
    tx = chain_of(name, make_params(of=name))
    step = fo.compiled_step(tx)
    state, twin = tx.init(ps), tx.init(qs)
    for k in range(4):
        gradients = [None if k == 2 and i == 1 else (p * (k + 1.0)).sin() for i, p in enumerate(ps)]
        updates, state = tx.update(gradients, state, ps)
        ps = fo.apply_updates(ps, updates)
        qs, twin = step(qs, gradients, twin)
        for p, q in zip(ps, qs, strict=True):
            near = 1e-4 if name == "Muon" else 1e-10  # its products of bfloat16 are rounded in another order
            torch.testing.assert_close(p, q, rtol=near, atol=near)


# ---- law 4: the adapter equals update + apply_updates --------------------------------------------------------------------


@pytest.mark.parametrize("named", [False, True], ids=["list", "named"])
@pytest.mark.parametrize(
    ("row", "variant"), [pytest.param(row, v, id=f"{row.id}{i or ''}") for row in ROWS for i, v in enumerate(row.variants)]
)
def test_any_transformation_equals_its_functional_self(row: Row, variant: dict, named: bool) -> None:
    tx = row.build(variant)
    params = make_params()
    names = list(SHAPES)
    opt = fo.optim.Optimizer(zip(names, params, strict=True) if named else params, tx)
    start = [p.detach().clone() for p in params]
    ps = dict(zip(names, start, strict=True)) if named else start
    state = tx.init(ps)
    for step in range(4):
        set_grads(params, step)
        gs = [p.grad for p in params]
        updates, state = tx.update(dict(zip(names, gs, strict=True)) if named else gs, state, ps)
        ps = fo.apply_updates(ps, updates)
        opt.step()
    for p, q in zip(params, ps.values() if named else ps, strict=True):
        torch.testing.assert_close(p.detach(), q, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
def test_compiled_equals_eager() -> None:
    """Two groups with their own numbers, missing gradients, a scheduler: in place, through compiled blocks."""

    def factory(learning_rate: float, weight_decay: float = 0.1) -> fo.GradientTransformation:
        return fo.chain(fo.clip_by_global_norm(1.0), fo.adamw(learning_rate, weight_decay=weight_decay))

    torch._dynamo.reset()
    runs = []
    for compile in (False, True):
        params = make_params()
        groups = [{"params": params[:2], "lr": 0.2}, {"params": params[2:], "weight_decay": 0.0}]
        opt = fo.optim.Optimizer(groups, factory, compile=compile, learning_rate=0.1, weight_decay=0.1)
        sched = lr_scheduler.ExponentialLR(opt, 0.9)
        for step in range(7):
            set_grads(params, step, FREEZE.get(step, ()))
            opt.step()
            sched.step()
        runs.append([*(p.detach() for p in params), *(v for p in params for v in opt.state[p].values())])
    for a, b in zip(*runs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["partition", "NAdam"])
def test_the_state_of_a_stage_that_runs_eagerly_is_kept_under_compile(name: str) -> None:
    """The stages with state in these are not compiled: what they return has to be written back."""
    runs = []
    for compile in (False, True):
        params = make_params()
        if name == "NAdam":
            opt = fo.optim.NAdam(params, compile=compile)
        else:
            tx = fo.partition({"matrix": fo.adam(0.1), "rest": fo.sgd(0.1, 0.9)}, lambda path, p: "matrix" if p.ndim > 1 else "rest")
            opt = fo.optim.Optimizer(params, tx, compile=compile)
        runs.append([*train(opt, params, 4), *(v for p in params for v in opt.state[p].values())])
    for a, b in zip(*runs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_one_tree_for_all_groups() -> None:
    """A factory's clip sees the norm of all groups; each group has its own numbers."""

    def factory(learning_rate, max_norm=1.0):
        return fo.chain(fo.clip_by_global_norm(max_norm), fo.scale_by_learning_rate(learning_rate))

    params = make_params()
    opt = fo.optim.Optimizer([{"params": params[:2], "learning_rate": 0.5, "lr": 0.5}, {"params": params[2:]}], factory, learning_rate=0.1)
    set_grads(params, 0)
    before, norm = [p.detach().clone() for p in params], tree.norm([p.grad for p in params])
    assert norm > 1
    opt.step()
    for i, (p, q) in enumerate(zip(params, before, strict=True)):
        torch.testing.assert_close(p.detach(), q - (0.5 if i < 2 else 0.1) * p.grad / norm)


def test_groups_are_separate_optimizers() -> None:
    params, twins = make_params(), make_params()
    groups = [{"params": params[:2], "lr": 0.2, "weight_decay": 0.0, "amsgrad": True}, {"params": params[2:], "betas": (0.5, 0.9)}]
    opt = fo.optim.AdamW(groups, lr=0.05, weight_decay=0.1)
    one, two = (
        fo.optim.AdamW(twins[:2], lr=0.2, weight_decay=0.0, amsgrad=True),
        fo.optim.AdamW(twins[2:], lr=0.05, weight_decay=0.1, betas=(0.5, 0.9)),
    )
    for step in range(5):
        set_grads(params, step)
        set_grads(twins, step)
        for o in (opt, one, two):
            o.step()
    for p, q in zip(params, twins, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


def test_a_schedule_as_learning_rate_stays_inside_and_lr_multiplies_it() -> None:
    params, twins = make_params(), make_params()
    schedule = fo.linear_schedule(0.1, 0.0, 10)
    opt, twin = fo.optim.Optimizer(params, fo.adam, learning_rate=schedule), fo.optim.Optimizer(twins, fo.adam(schedule))
    assert opt.param_groups[0]["lr"] == 1.0
    for p, q in zip(train(opt, params, 4), train(twin, twins, 4), strict=True):
        assert torch.equal(p, q)
    torch.save(opt.state_dict(), io.BytesIO())


# ---- the ordinary loop ---------------------------------------------------------------------------------------------------


def model_and_loss() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)), torch.randn(32, 4), torch.randn(32, 1)


def test_closure_runs_with_gradients_and_its_value_returns() -> None:
    model, x, y = model_and_loss()
    opt = fo.optim.SGD(model.parameters(), lr=0.1)
    seen = []

    def closure() -> Tensor:
        seen.append(torch.is_grad_enabled())
        opt.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        return loss

    with torch.no_grad():
        losses = [opt.step(closure).item() for _ in range(10)]
    assert seen == [True] * 10 and losses[-1] < losses[0]
    assert all(p.grad is not None and p.grad_fn is None and p.is_leaf for p in model.parameters())


def test_an_error_in_a_closure_or_in_the_update_leaves_everything_as_it_was() -> None:
    params = make_params()
    opt = fo.optim.Optimizer(
        [{"params": params[:1], "nesterov": False}, {"params": params[1:], "nesterov": True}],
        fo.sgd,
        learning_rate=0.1,
        momentum=0.9,
        nesterov=False,
    )
    train(opt, params, 2)
    before = copy.deepcopy((opt.state_dict(), params))
    set_grads(params, 2)
    params[4].grad = params[4].grad.to_sparse()
    with pytest.raises(ValueError, match="dense"):
        opt.step()

    def closure():
        raise RuntimeError("backward failed")

    with pytest.raises(RuntimeError, match="backward failed"):
        opt.step(closure)
    after = (opt.state_dict(), params)
    for a, b in zip(tree.leaves(before[0]["state"]), tree.leaves(after[0]["state"]), strict=True):
        assert torch.equal(a, b)
    assert all(torch.equal(a, b) for a, b in zip(before[1], params, strict=True))


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(set_to_none: bool) -> None:
    params = make_params()
    opt = fo.optim.AdamW(params)
    set_grads(params, 0)
    opt.zero_grad(set_to_none=set_to_none)
    assert all((p.grad is None) if set_to_none else (p.grad == 0).all() for p in params)


def test_update_is_in_place() -> None:
    params = make_params()
    opt = fo.optim.AdamW(params)
    train(opt, params, 1)
    pointers = [p.data_ptr() for p in params] + [v.data_ptr() for p in params for v in opt.state[p].values()]
    identities = [id(v) for p in params for v in opt.state[p].values()]
    train(opt, params, 2, start=1)
    assert pointers == [p.data_ptr() for p in params] + [v.data_ptr() for p in params for v in opt.state[p].values()]
    assert identities == [id(v) for p in params for v in opt.state[p].values()]
    assert not any(v.requires_grad for p in params for v in opt.state[p].values())


SCHEDULERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda e: 0.9**e),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda e: 0.95),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 3, 0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 5], 0.5),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 8),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 8),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 4),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=3),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=12),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(o, [lr_scheduler.ConstantLR(o, 0.1), lr_scheduler.ExponentialLR(o, 0.9)], [4]),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler([lr_scheduler.ConstantLR(o, 0.1), lr_scheduler.ExponentialLR(o, 0.9)]),
}


def test_all_schedulers_are_in_the_table() -> None:
    assert set(SCHEDULERS) == {name for name in lr_scheduler.__all__ if name != "LRScheduler"}


@pytest.mark.parametrize("tensor_lr", [False, True], ids=["float", "tensor"])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_schedulers_drive_us_as_they_drive_torch(scheduler: str, tensor_lr: bool) -> None:
    """Learning rates and parameters, and the momentum or betas that OneCycle and Cyclic move."""
    for name, options in (("SGD", {"momentum": 0.9}), ("Adam", {})):
        runs = []
        for module in (fo.optim, torch.optim):
            params = make_params()
            opt = getattr(module, name)(params, lr=torch.tensor(0.05, dtype=torch.float64) if tensor_lr else 0.05, **options)
            lr = opt.param_groups[0]["lr"]
            sched = SCHEDULERS[scheduler](opt)
            trajectory = []
            for step in range(10):
                set_grads(params, step)
                opt.step()
                sched.step(1.0) if scheduler == "ReduceLROnPlateau" else sched.step()
                trajectory += [torch.as_tensor(opt.param_groups[0]["lr"]).double().clone(), *(p.detach().clone() for p in params)]
            assert not tensor_lr or opt.param_groups[0]["lr"] is lr or scheduler == "ReduceLROnPlateau"
            runs.append(trajectory)
        for a, b in zip(*runs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_a_generic_chain_is_driven_by_a_scheduler() -> None:
    params, twins = make_params(), make_params()
    opt = fo.optim.Optimizer(params, fo.chain(fo.clip_by_global_norm(0.5), fo.adam(0.1)))
    sched = lr_scheduler.StepLR(opt, 1, 0.5)
    state = (
        tx := fo.chain(fo.clip_by_global_norm(0.5), fo.scale_by_adam(), fo.scale_by_schedule(fo.exponential_decay(-0.1, 1, 0.5)))
    ).init(twins)
    ps = [p.detach() for p in twins]
    for step in range(4):
        set_grads(params, step)
        updates, state = tx.update([p.grad for p in params], state, ps)
        ps = fo.apply_updates(ps, updates)
        opt.step()
        sched.step()
    for p, q in zip(params, ps, strict=True):
        torch.testing.assert_close(p.detach(), q, rtol=1e-10, atol=1e-10)


def test_a_tensor_lr_is_not_shared_between_groups() -> None:
    params = make_params()
    opt = fo.optim.AdamW([{"params": params[:2]}, {"params": params[2:]}], lr=torch.tensor(0.1))
    sched = lr_scheduler.LambdaLR(opt, [lambda e: 1.0, lambda e: 0.1])
    assert [group["lr"].item() for group in opt.param_groups] == pytest.approx([0.1, 0.01])
    set_grads(params, 0)
    opt.step()
    sched.step()


@pytest.mark.parametrize(
    "build",
    [
        lambda ps: fo.optim.AdamW(ps, amsgrad=True),
        lambda ps: fo.optim.Optimizer(ps, fo.chain(fo.add_noise(0.1, 0.5, key=2**40 + 3), fo.adam(fo.linear_schedule(0.1, 0.0, 20)))),
        lambda ps: fo.optim.Optimizer(ps, fo.lion, learning_rate=0.1),
        lambda ps: fo.optim.NAdam(ps),
        lambda ps: fo.optim.ASGD(ps, t0=1),
        lambda ps: fo.optim.Rprop(ps),
        lambda ps: fo.optim.Adafactor(ps[:3] + ps[4:]),
        lambda ps: fo.optim.Muon(ps[4:]),
    ],
    ids=["AdamW", "noise", "lion", "NAdam", "ASGD", "Rprop", "Adafactor", "Muon"],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_resumed_equals_uninterrupted_bit_for_bit(build, dtype: torch.dtype) -> None:
    params = make_params(dtype)
    opt = build(params)
    train(opt, params, 3)
    file = io.BytesIO()
    torch.save({"opt": opt.state_dict(), "params": [p.detach() for p in params]}, file)
    file.seek(0)
    saved = torch.load(file)
    others = [nn.Parameter(p) for p in saved["params"]]
    other = build(others)
    other.load_state_dict(saved["opt"])
    for p, q in zip(params, others, strict=True):
        for key, value in opt.state[p].items():
            twin = other.state[q][key]
            assert twin.dtype == value.dtype and torch.equal(twin, value)
    for p, q in zip(train(opt, params, 3, start=3), train(other, others, 3, start=3), strict=True):
        assert torch.equal(p, q)


def test_load_copies() -> None:
    params = make_params()
    opt = fo.optim.AdamW(params)
    train(opt, params, 2)
    saved = copy.deepcopy(opt.state_dict())
    other = fo.optim.AdamW(make_params())
    other.load_state_dict(saved)
    kept = copy.deepcopy(saved)
    train(other, other.param_groups[0]["params"], 2)
    for a, b in zip(tree.leaves(saved["state"]), tree.leaves(kept["state"]), strict=True):
        assert torch.equal(a, b)


def test_older_and_foreign_state_dicts_load() -> None:
    params = make_params()
    opt = fo.optim.AdamW(params)
    train(opt, params, 2)
    saved = opt.state_dict()
    for entry in saved["state"].values():
        entry["step"] = 2  # a python number, as old checkpoints have it
    for group in saved["param_groups"]:
        del group["amsgrad"]
        group["mine"] = {"kept": 1}
    other = fo.optim.AdamW(make_params())
    other.load_state_dict(saved)
    group = other.param_groups[0]
    assert group["amsgrad"] is False and group["mine"] == {"kept": 1}
    train(other, group["params"], 1)
    assert other.state[group["params"][0]]["step"].item() == 3


def test_add_param_group_starts_fresh() -> None:
    params, late = make_params(), make_params(seed=1)
    opt = fo.optim.AdamW(params, lr=0.1)
    train(opt, params, 3)
    opt.add_param_group({"params": late, "lr": 0.2})
    twins = make_params(seed=1)
    twin = fo.optim.AdamW(twins, lr=0.2)
    for step in range(3):
        set_grads(params, step)
        set_grads(late, step)
        set_grads(twins, step)
        opt.step()
        twin.step()
    for p, q in zip(late, twins, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)
    assert opt.state[late[0]]["step"].item() == 3 and opt.state[params[0]]["step"].item() == 6


def test_a_refused_group_is_not_added() -> None:
    params = make_params()
    opt = fo.optim.AdamW(params[:2])
    with pytest.raises(ValueError, match="b1 must be in"):
        opt.add_param_group({"params": params[2:], "betas": (1.5, 0.9)})
    with pytest.raises(ValueError, match="Tensor lr must be 1-element"):
        opt.add_param_group({"params": params[2:], "lr": torch.ones(3)})
    assert len(opt.param_groups) == 1
    train(opt, params, 1)


def test_groups_edited_in_place_are_honoured() -> None:
    """As FSDP2 and accelerate do: parameters replaced, options rebound, between steps."""
    params = make_params()
    opt = fo.optim.AdamW(params, lr=0.1)
    train(opt, params, 1)
    swapped = make_params(seed=3)
    opt.param_groups[0]["params"] = swapped
    opt.param_groups[0]["lr"] = torch.tensor(0.2)
    twins = make_params(seed=3)
    twin = fo.optim.AdamW(twins, lr=0.2)
    for p, q in zip(train(opt, swapped, 2), train(twin, twins, 2), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


def test_grad_scaler_skips_infinite_steps_and_unscales() -> None:
    model, x, y = model_and_loss()
    twin = copy.deepcopy(model)
    opt, reference = fo.optim.AdamW(model.parameters(), lr=0.1), torch.optim.AdamW(twin.parameters(), lr=0.1)
    for m, o in ((model, opt), (twin, reference)):
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for step in range(5):
            o.zero_grad()
            scaler.scale(nn.functional.mse_loss(m(x), y)).backward()
            if step == 0:
                next(iter(m.parameters())).grad[0] = float("inf")
                scaler.step(o)
                scaler.update()
                assert not o.state and scaler.get_scale() == 512.0
                continue
            scaler.unscale_(o)
            nn.utils.clip_grad_norm_(m.parameters(), 0.1)
            scaler.step(o)
            scaler.update()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize(
    "build",
    [
        fo.optim.AdamW,
        lambda ps: fo.optim.Optimizer(ps, fo.chain(fo.add_noise(0.1, 0.0, key=1), fo.adam(0.1))),
        lambda ps: fo.optim.Optimizer(ps, fo.adamw, learning_rate=0.1),
    ],
    ids=["AdamW", "chain", "factory"],
)
def test_copies_go_on_alike(how, build) -> None:
    params = make_params()
    opt = build(params)
    train(opt, params, 2)
    others, other = how((params, opt))
    assert {k for k in vars(opt) if not k.startswith("_")} == {k for k in vars(other) if not k.startswith("_")}
    for p, q in zip(train(opt, params, 2, start=2), train(other, others, 2, start=2), strict=True):
        assert torch.equal(p, q)


def test_freed_without_the_garbage_collector() -> None:
    gc.disable()
    try:
        params = make_params()
        opt = fo.optim.AdamW(params)
        train(opt, params, 2)
        ref = weakref.ref(opt)
        del opt
        assert ref() is None
    finally:
        gc.enable()


def test_low_precision_parameters_keep_float32_moments() -> None:
    params = make_params(torch.bfloat16)
    opt = fo.optim.Optimizer(params, fo.adamw, learning_rate=0.1)
    train(opt, params, 2)
    assert all(p.dtype == torch.bfloat16 for p in params)
    assert all(opt.state[p]["scale_by_adam/mu"].dtype == torch.float32 for p in params)


def test_the_step_of_a_fresh_checkpoint_moves_nothing() -> None:
    """torch.distributed.checkpoint makes a step with lr 0 and zero gradients to create state."""
    for row in ROWS:
        params = make_params()
        opt = fo.optim.Optimizer(params, row.build())
        before = [p.detach().clone() for p in params]
        for p in params:
            p.grad = torch.zeros_like(p)
        for lr in (0.0, torch.tensor(0.0)):
            opt.param_groups[0]["lr"] = lr
            opt.step(closure=None)
        for p, q in zip(params, before, strict=True):
            assert torch.equal(p.detach(), q), row.name
            assert opt.state[p], row.name


def test_hooks_fire_in_order_once() -> None:
    params = make_params()
    opt = fo.optim.AdamW(params)
    calls = []
    opt.register_step_pre_hook(lambda *_: calls.append("before"))
    opt.register_step_post_hook(lambda *_: calls.append("after"))
    train(opt, params, 1)
    assert calls == ["before", "after"]


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (
            lambda ps: fo.optim.Optimizer(ps, fo.adam(0.1), learning_rate=0.1),
            TypeError,
            "ready transformation takes no hyperparameters; got learning_rate",
        ),
        (lambda ps: fo.optim.Optimizer(ps, "adam"), TypeError, "must be a transformation or a function"),
        (lambda ps: fo.optim.Optimizer(ps, fo.adamw, learning_rat=0.1), TypeError, "learning_rat"),
        (lambda ps: fo.optim.Optimizer(ps, fo.adamw, learning_rate=-0.1), ValueError, "learning_rate must be in"),
        (lambda ps: fo.optim.AdamW(ps, lr=-1.0), ValueError, "learning_rate must be in"),
        (lambda ps: fo.optim.AdamW(ps, lr=float("nan")), ValueError, "learning_rate must be in"),
        (lambda ps: fo.optim.AdamW(ps, betas=(0.9, 1.0)), ValueError, "b2 must be in"),
        (lambda ps: fo.optim.AdamW(ps, lr=torch.ones(2)), ValueError, "Tensor lr must be 1-element"),
        (lambda ps: fo.optim.AdamW(ps, differentiable=True), ValueError, "functional layer"),
        (lambda ps: fo.optim.SGD(ps, nesterov=True), ValueError, "Nesterov momentum requires a momentum"),
        (lambda ps: fo.optim.Adadelta(ps, rho=1.1), ValueError, "rho must be in"),
        (lambda ps: fo.optim.Adadelta(ps, eps=-1.0), ValueError, "eps must be in"),
        (lambda ps: fo.optim.Adadelta(ps, weight_decay=-1.0), ValueError, "weight_decay must be in"),
        (lambda ps: fo.optim.Adamax(ps, betas=(0.0, 1.0)), ValueError, "b2 must be in"),
        (lambda ps: fo.optim.Adamax(ps, lr=-1.0), ValueError, "learning_rate must be in"),
        (lambda ps: fo.optim.ASGD(ps, lr=-1.0), ValueError, "lr must be in"),
        (lambda ps: fo.optim.ASGD(ps, weight_decay=-0.5), ValueError, "weight_decay must be in"),
        (lambda ps: fo.optim.ASGD(ps, lr=torch.ones(2)), ValueError, "Tensor lr must be 1-element"),
        (lambda ps: fo.optim.NAdam(ps, betas=(1.0, 0.9)), ValueError, "b1 must be in"),
        (lambda ps: fo.optim.NAdam(ps, momentum_decay=-0.2), ValueError, "momentum_decay must be in"),
        (lambda ps: fo.optim.NAdam(ps, differentiable=True), ValueError, "functional layer"),
        (lambda ps: fo.optim.RAdam(ps, eps=-1.0), ValueError, "eps must be in"),
        (lambda ps: fo.optim.Rprop(ps, etas=(1.0, 0.5)), ValueError, "etaminus must be in"),
        (lambda ps: fo.optim.Rprop(ps, etas=(0.5, 1.0)), ValueError, "etaplus must be in"),
        (lambda ps: fo.optim.Rprop([{"params": ps, "lr": -1.0}]), ValueError, "lr must be in"),
        (lambda ps: fo.optim.Adafactor(ps, eps=(-1e-30, 1e-3)), ValueError, "eps1 must be in"),
        (lambda ps: fo.optim.Adafactor(ps, eps=(None, -1e-3)), ValueError, "eps2 must be in"),
        (lambda ps: fo.optim.Adafactor(ps, d=0.0), ValueError, "d must be in"),
        (lambda ps: fo.optim.Adafactor(ps, beta2_decay=0.8), ValueError, "beta2_decay must be 0 or less"),
        (lambda ps: fo.optim.Adafactor([*ps, torch.ones(2) * 1j]), ValueError, "parameter 5 .* does not take complex"),
        (lambda ps: fo.optim.Muon(ps), ValueError, r"parameter 0 .* shape \(2, 3, 1, 2\)\. Muon takes real matrices only"),
        (lambda ps: fo.optim.Muon(ps[4:], momentum=-0.1), ValueError, "momentum must be in"),
        (lambda ps: fo.optim.Muon(ps[4:], ns_steps=100), ValueError, "ns_steps must be in"),
        (lambda ps: fo.optim.Muon(ps[4:], ns_coefficients=(1.0, 2.0)), ValueError, "must be three numbers"),
        (lambda ps: fo.optim.Muon(ps[4:], adjust_lr_fn="arbitrary"), ValueError, "adjust_lr_fn must be"),
        (lambda ps: fo.optim.AdamW([]), ValueError, "empty parameter list"),
        (lambda ps: fo.optim.AdamW(ps[0]), TypeError, "iterable of Tensors or dicts"),
        (lambda ps: fo.optim.AdamW([{"params": ps}, {"params": ps[0]}]), ValueError, "more than one parameter group"),
    ],
)
def test_bad_arguments(build, error, message) -> None:
    with pytest.raises(error, match=message):
        build(make_params())
