"""The classes with torch.optim's names have its numbers, arguments, defaults and checkpoints (check
50).
"""

from __future__ import annotations

import inspect
import io
import itertools

import pytest
import torch
from parity_page import assert_near, compares
from torch import Tensor, nn
from torch.optim import lr_scheduler
from training import FREEZE, TORCH_NAMED, make_params, set_grads, torchs, train

import functorch_opt as fo

OPTIONS: list[tuple[str, dict]] = [
    *[
        (
            "SGD",
            dict(lr=0.1, momentum=m, dampening=d, weight_decay=w, nesterov=n, maximize=x),
        )
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
        (
            name,
            dict(
                lr=0.1, betas=(0.8, 0.95), eps=1e-6, weight_decay=w, amsgrad=a, maximize=x
            ),
        )
        for name, w, a, x in itertools.product(
            ["Adam", "AdamW"], [0, 0.1], [False, True], [False, True]
        )
    ],
    ("Adam", dict(lr=0.1, weight_decay=0.1, decoupled_weight_decay=True)),
    *[
        (
            "RMSprop",
            dict(lr=0.01, alpha=0.9, weight_decay=w, momentum=m, centered=c, maximize=x),
        )
        for w, m, c, x in itertools.product(
            [0, 0.1], [0, 0.9], [False, True], [False, True]
        )
    ],
    *[
        (
            "Adagrad",
            dict(
                lr=0.1,
                lr_decay=d,
                weight_decay=w,
                initial_accumulator_value=i,
                maximize=x,
            ),
        )
        for d, w, i, x in itertools.product([0, 0.1], [0, 0.1], [0, 0.5], [False, True])
    ],
    *[
        ("Adadelta", dict(lr=0.5, rho=r, eps=e, weight_decay=w, maximize=x))
        for (r, e), w, x in itertools.product(
            [(0.9, 1e-6), (0.5, 1e-2)], [0, 0.1], [False, True]
        )
    ],
    *[
        ("Adamax", dict(lr=0.1, betas=(0.8, 0.95), eps=1e-3, weight_decay=w, maximize=x))
        for w, x in itertools.product([0, 0.1], [False, True])
    ],
    *[
        ("ASGD", dict(lr=0.1, lambd=l, alpha=a, t0=t, weight_decay=w, maximize=x))
        for (l, a), t, w, x in itertools.product(
            [(1e-4, 0.75), (0.1, 0.5), (0, 0.75)], [1e6, 10, 0], [0, 0.1], [False, True]
        )
    ],
    *[
        (
            "NAdam",
            dict(
                lr=0.1,
                betas=(0.8, 0.95),
                eps=1e-6,
                weight_decay=w,
                decoupled_weight_decay=d,
                momentum_decay=m,
                maximize=x,
            ),
        )
        for (w, d), m, x in itertools.product(
            [(0, False), (0.1, False), (0.1, True), (0, True)],
            [0, 4e-3, 0.1],
            [False, True],
        )
    ],
    *[
        (
            "RAdam",
            dict(
                lr=0.1,
                betas=b,
                eps=e,
                weight_decay=w,
                decoupled_weight_decay=d,
                maximize=x,
            ),
        )
        for b, e, (w, d), x in itertools.product(
            [(0.8, 0.999), (0.9, 0.9), (0.9, 0.5)],
            [1e-8, 1e-2],
            [(0, False), (0.1, False), (0.1, True)],
            [False, True],
        )
    ],
    *[
        ("Rprop", dict(lr=l, etas=e, step_sizes=s, maximize=x))
        for l, e, s, x in itertools.product(
            [0.1, 1e-8],
            [(0.5, 1.2), (0.3, 2.0)],
            [(1e-6, 50), (1e-2, 0.2)],
            [False, True],
        )
    ],
    *[
        ("Adafactor", dict(lr=0.1, beta2_decay=b, eps=e, d=d, weight_decay=w, maximize=x))
        for b, e, d, w, x in itertools.product(
            [-0.8, -0.3], [(None, 1e-3), (0.5, 2.0)], [1.0, 1.5], [0, 0.1], [False, True]
        )
    ],
    *[
        ("Muon", dict(lr=0.1, weight_decay=w, momentum=m, nesterov=n, adjust_lr_fn=a))
        for w, m, n, a in itertools.product(
            [0, 0.1], [0, 0.9], [False, True], [None, "original", "match_rms_adamw"]
        )
    ],
    ("Muon", dict(ns_coefficients=(2.0, -1.5, 0.5), eps=1e-2, ns_steps=3)),
    *[(name, {}) for name in TORCH_NAMED],
]


CASES = [
    pytest.param(name, options, marks=compares(f"optim.{name}", reference="torch.optim"))
    for name, options in OPTIONS
]
ids = [
    f"{name}-{'-'.join(f'{k}={v}' for k, v in options.items() if v and k not in ('lr', 'betas', 'eps'))}"
    for name, options in OPTIONS
]


@pytest.mark.usefixtures("same_scalars")
@pytest.mark.parametrize(("name", "options"), CASES, ids=ids)
def test_50_numbers_and_state_keys_are_torchs(name: str, options: dict) -> None:
    """This holds for Muon too: Newton-Schulz rounds to bfloat16, but in the same places, and in
    float64 it starts from the same numbers.
    """
    ours, theirs = make_params(of=name), make_params(of=name)
    a, b = getattr(fo.optim, name)(ours, **options), torchs(name, theirs, **options)
    start = [p.detach().clone() for p in ours]
    x, y = (
        train(a, ours, 100, missing_at=FREEZE),
        train(b, theirs, 100, missing_at=FREEZE),
    )
    for p, q, s in zip(x, y, start, strict=True):
        assert_near(p, q)
        assert p.numel() == 0 or not torch.equal(p, s)
    for p, q in zip(ours, theirs, strict=True):
        expected = b.state[q]
        assert set(a.state[p]) - {"step"} == set(expected) - {"step"}
        for key, value in expected.items():
            torch.testing.assert_close(a.state[p][key], value, rtol=1e-10, atol=1e-10)


def torchs_schedule(count: Tensor) -> Tensor:
    """The relative step size of torch's Adafactor."""
    return (fo.tree.as_real(count + 1) ** -0.5).clamp(max=0.01)


FUNCTIONAL = {
    "NAdam": fo.nadam(2e-3, momentum_decay=4e-3),
    "RAdam": fo.radam(1e-3, variant="torch"),
    "Rprop": fo.rprop(0.01),
    "ASGD": fo.asgd(0.01),
    "Muon": fo.muon(1e-3, eps=1e-7, weight_decay=0.1, variant="torch"),
    "Adafactor": fo.chain(
        fo.scale_by_factored_rms(variant="torch"),
        fo.clip_by_block_rms(1.0),
        fo.scale_by_param_block_rms(),
        fo.scale_by_learning_rate(torchs_schedule),
    ),
}


NAMES = [
    pytest.param(
        name, marks=compares(name.lower(), reference="torch.optim", remark="defaults")
    )
    for name in FUNCTIONAL
]


@pytest.mark.usefixtures("same_scalars")
@pytest.mark.parametrize("name", NAMES)
def test_the_functions_have_the_defaults_of_torch_as_they_say(name: str) -> None:
    tx, params = FUNCTIONAL[name], make_params(of=name)
    ps = [p.detach().clone() for p in params]
    opt, state = torchs(name, params), tx.init(ps)
    for step in range(100):
        set_grads(params, step)
        updates, state = tx.update([p.grad for p in params], state, ps)
        ps = fo.apply_updates(ps, updates)
        opt.step()
    for p, q in zip(ps, params, strict=True):
        assert_near(p, q.detach())


@pytest.mark.usefixtures("same_scalars")
@pytest.mark.parametrize("name", TORCH_NAMED)
def test_50_groups_and_a_scheduler_as_in_torch(name: str) -> None:
    """Here two groups are one tree, in which counts and numbers have one entry for each parameter.

    A new lr acts one step late in ASGD, and never in Rprop.
    """
    trajectories = []
    for build in (
        getattr(fo.optim, name),
        lambda groups, **options: torchs(name, groups, **options),
    ):
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


MORE = {"Muon": ("dims", "ns_dtype")}
"""Arguments that torch's class does not have."""


@pytest.mark.parametrize("name", TORCH_NAMED)
def test_arguments_and_defaults_are_torchs(name: str) -> None:
    ours, theirs = (
        inspect.signature(getattr(module, name)).parameters
        for module in (fo.optim, torch.optim)
    )
    *like_torch, compile, state, owners = [
        (p.name, p.default, p.kind)
        for p in ours.values()
        if p.name not in MORE.get(name, ())
    ]
    assert like_torch == [(p.name, p.default, p.kind) for p in theirs.values()]
    assert compile == ("compile", False, inspect.Parameter.KEYWORD_ONLY)
    assert state == ("state", None, inspect.Parameter.KEYWORD_ONLY)
    assert owners == ("owners", False, inspect.Parameter.KEYWORD_ONLY)


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
    first, second = (getattr(torch.optim, name), getattr(fo.optim, name))[
        :: 1 if direction == "from torch" else -1
    ]
    params = make_params(of=name)
    opt = first(params, **options)
    train(opt, params, 5)
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    others = [nn.Parameter(p.detach().clone()) for p in params]
    other = second(others, **options)
    other.load_state_dict(torch.load(file))
    for p, q in zip(
        train(opt, params, 20, start=5), train(other, others, 20, start=5), strict=True
    ):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-10)


@pytest.mark.usefixtures("same_scalars")
@pytest.mark.parametrize(
    "name", [name for name in TORCH_NAMED if name not in ("Adafactor", "Muon")]
)
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
def test_14_complex_parameters_as_torch(dtype: torch.dtype, name: str) -> None:
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
    assert {value.dtype for p in params for value in opt.state[p].values()} == {
        torch.float32
    }


def chain_of(name: str, params: list) -> fo.GradientTransformation:
    """What a class with torch's name runs, as a pure function."""
    opt = getattr(fo.optim, name)(params)
    return opt._chain(**{option: opt.defaults[option] for option in opt._options()})


@pytest.mark.parametrize("name", TORCH_NAMED)
def test_the_chains_can_be_vmapped(name: str) -> None:
    batch = [
        torch.stack(ps).detach()
        for ps in zip(*(make_params(seed=i, of=name) for i in range(3)), strict=True)
    ]
    tx = chain_of(name, make_params(of=name))

    def run(ps: list[Tensor]) -> list[Tensor]:
        state = tx.init(ps)
        for step in range(6):
            updates, state = tx.update([(p * (step + 1.0)).sin() for p in ps], state, ps)
            ps = fo.apply_updates(ps, updates)
        return ps

    tolerance = (
        1e-2 if name == "Muon" else 1e-10
    )  # a batch of bfloat16 products is summed in another order
    for together, *alone in zip(
        torch.func.vmap(run)(batch),
        *(run([p[i] for p in batch]) for i in range(3)),
        strict=True,
    ):
        torch.testing.assert_close(
            together, torch.stack(alone), rtol=tolerance, atol=tolerance
        )


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
    """Slots with one number for a parameter (NAdam, ASGD) and matrices (Muon, Adafactor) among
    them.
    """
    torch._dynamo.reset()
    ps, qs = ([p.detach() for p in make_params(of=name)] for _ in range(2))
    tx = chain_of(name, make_params(of=name))
    step = fo.compiled_step(tx)
    state, twin = tx.init(ps), tx.init(qs)
    for k in range(4):
        gradients = [
            None if k == 2 and i == 1 else (p * (k + 1.0)).sin() for i, p in enumerate(ps)
        ]
        updates, state = tx.update(gradients, state, ps)
        ps = fo.apply_updates(ps, updates)
        qs, twin = step(qs, gradients, twin)
        for p, q in zip(ps, qs, strict=True):
            near = (
                1e-4 if name == "Muon" else 1e-10
            )  # its products of bfloat16 are rounded in another order
            torch.testing.assert_close(p, q, rtol=near, atol=near)
