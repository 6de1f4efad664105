"""`fo.optim.SAM`: a step that evaluates its closure twice.

The reference is SAM as people write it for torch: around one of torch's optimizers, in place.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

import functorch_opt as fo

STEPS = 12
BASES = {
    "sgd": (torch.optim.SGD, fo.sgd, {"momentum": 0.9}),
    "adamw": (torch.optim.AdamW, fo.adamw, {"weight_decay": 0.1}),
}


class Plain(torch.optim.Optimizer):
    """SAM around an optimizer of torch, in the form that most loops have."""

    def __init__(self, params, base, rho=0.05, adaptive=False, **hyper) -> None:
        super().__init__(params, {"rho": rho, "adaptive": adaptive, **hyper})
        self.base = base(self.param_groups, **hyper)
        self.param_groups = self.base.param_groups

    @torch.no_grad()
    def step(self, closure):
        with torch.enable_grad():
            loss = closure()
        rows = [(p, of) for of in self.param_groups for p in of["params"]]
        rows = [(p, of) for p, of in rows if p.grad is not None]
        sizes = [
            p.abs() + 0.01 if of["adaptive"] else torch.ones_like(p) for p, of in rows
        ]
        scaled = [t * p.grad for t, (p, _) in zip(sizes, rows, strict=True)]
        norm = torch.stack([x.norm() for x in scaled]).norm()
        old = [p.clone() for p, _ in rows]
        for t, x, (p, of) in zip(sizes, scaled, rows, strict=True):
            p.add_(t * x * of["rho"] / norm)
        with torch.enable_grad():
            closure()
        for (p, _), q in zip(rows, old, strict=True):
            p.copy_(q)
        self.base.step()
        return loss


def make_model() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).double()


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    draw = [torch.randn(16, n, generator=generator, dtype=torch.float64) for n in (4, 2)]
    return draw[0], draw[1]


def closure_of(model: nn.Module, opt: torch.optim.Optimizer, step: int) -> Callable:
    x, y = batch(step)

    def closure() -> Tensor:
        opt.zero_grad()
        loss = ((model(x) - y) ** 2).mean()
        loss.backward()
        return loss

    return closure


def in_groups(model: nn.Module, **of_the_last: float) -> list[dict]:
    first, last = model[0], model[2]
    return [
        {"params": [*first.parameters()]},
        {"params": [*last.parameters()], **of_the_last},
    ]


def train(model, opt, steps=range(STEPS), schedule: bool = True) -> list[float]:
    sched = lr_scheduler.CosineAnnealingLR(opt, 2 * STEPS) if schedule else None
    losses = []
    for step in steps:
        losses.append(opt.step(closure_of(model, opt, step)).item())
        if sched:
            sched.step()
    return losses


def values(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def assert_same(a: list[Tensor], b: list[Tensor], tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("base", "adaptive", "compile"),
    [
        ("sgd", False, False),
        ("sgd", True, False),
        ("adamw", False, False),
        ("adamw", True, True),
    ],
)
def test_it_is_sam_as_written_for_torch(base: str, adaptive: bool, compile: bool) -> None:
    """Groups have a rho of their own, and a scheduler drives the learning rate."""
    theirs, ours, hyper = BASES[base]
    given = {"rho": 0.1, "adaptive": adaptive, "lr": 0.05, **hyper}
    model, reference = make_model(), make_model()
    their_losses = train(reference, Plain(in_groups(reference, rho=0.3), theirs, **given))
    opt = fo.optim.SAM(in_groups(model, rho=0.3), ours, compile=compile, **given)
    losses = train(model, opt)
    assert losses == pytest.approx(their_losses, rel=1e-12)
    assert_same(values(model), values(reference))


@pytest.mark.parametrize("compile", [False, True])
def test_it_is_the_functional_sam(compile: bool) -> None:
    """Also with a stage in front, and more adversarial steps than one."""
    adversary = fo.chain(fo.normalize(), fo.sgd(0.2))
    inner = fo.sam(fo.adam(0.05), adversary, sync_period=3, opaque_mode=True)
    tx = fo.chain(fo.clip(0.05), inner)
    model = make_model()
    ps = dict(model.named_parameters())
    opt = fo.optim.Optimizer(model.named_parameters(), tx, compile=compile)
    params = {name: p.detach().clone() for name, p in ps.items()}
    state = tx.init(params)
    for step in range(STEPS):
        x, y = batch(step)

        def loss(q, x=x, y=y):
            return ((torch.func.functional_call(model, q, x) - y) ** 2).mean()

        slope = torch.func.grad(loss)
        grad_fn = lambda q, i, slope=slope: slope(q)  # noqa: E731
        updates, state = tx.update(slope(params), state, params, grad_fn=grad_fn)
        params = fo.apply_updates(params, updates)
        opt.step(closure_of(model, opt, step))
    assert_same([ps[name].detach() for name in params], [*params.values()])


def test_a_checkpoint_goes_on_bit_for_bit() -> None:
    def made(model):
        return fo.optim.SAM(model.parameters(), fo.adamw, rho=0.1, lr=0.05)

    model = make_model()
    opt = made(model)
    train(model, opt, range(4), schedule=False)
    file = io.BytesIO()
    torch.save((model.state_dict(), opt.state_dict()), file)
    file.seek(0)
    again = make_model()
    weights, state = torch.load(file, weights_only=True)
    again.load_state_dict(weights)
    other = made(again)
    other.load_state_dict(state, strict=True)
    train(model, opt, range(4, 8), schedule=False)
    train(again, other, range(4, 8), schedule=False)
    assert_same(values(model), values(again), 0.0)


def test_a_copy_of_it_makes_steps() -> None:
    model = make_model()
    opt = fo.optim.SAM(model.parameters(), fo.adamw, rho=0.1, lr=0.05)
    train(model, opt, range(2), schedule=False)
    model2, opt2 = copy.deepcopy((model, opt))
    train(model, opt, range(2, 4), schedule=False)
    train(model2, opt2, range(2, 4), schedule=False)
    assert_same(values(model), values(model2), 0.0)


def test_rho_can_change_between_steps() -> None:
    model, reference = make_model(), make_model()
    opt = fo.optim.SAM(model.parameters(), fo.sgd, rho=0.1, lr=0.05)
    other = Plain(reference.parameters(), torch.optim.SGD, rho=0.1, lr=0.05)
    for step in range(4):
        for of in (opt, other):
            of.param_groups[0]["rho"] = 0.1 * step
        opt.step(closure_of(model, opt, step))
        other.step(closure_of(reference, other, step))
    assert_same(values(model), values(reference))


def test_the_closure_is_called_twice_and_the_first_gradient_is_left() -> None:
    w = nn.Parameter(torch.tensor([3.0, 4.0]))
    opt = fo.optim.SAM([w], fo.sgd, rho=0.5, lr=0.5)
    seen = []

    def closure():
        opt.zero_grad()
        seen.append(w.detach().clone())
        loss = (w**2).sum() / 2
        loss.backward()
        return loss

    assert opt.step(closure).item() == 12.5
    assert_same(seen, [torch.tensor([3.0, 4.0]), torch.tensor([3.3, 4.4])], 1e-6)
    assert w.grad.tolist() == [3.0, 4.0]
    assert len(seen) == 2


@pytest.mark.parametrize("compile", [False, True])
def test_after_an_error_in_the_second_evaluation_all_is_as_it_was(compile: bool) -> None:
    model = make_model()
    opt = fo.optim.SAM(model.parameters(), fo.adamw, rho=0.1, lr=0.05, compile=compile)
    train(model, opt, range(2), schedule=False)
    before = values(model), copy.deepcopy(opt.state_dict()["state"])
    inner, calls = closure_of(model, opt, 2), []

    def closure():
        calls.append(1)
        if len(calls) == 2:
            raise KeyError("out of data")
        return inner()

    with pytest.raises(KeyError, match="out of data"):
        opt.step(closure)
    assert_same(values(model), before[0], 0.0)
    torch.testing.assert_close(opt.state_dict()["state"], before[1], rtol=0, atol=0)
    assert all(p.grad is not None for p in model.parameters())


def test_parameters_without_a_gradient() -> None:
    """Without one at first they stay; without one at second the loss does not depend on them."""
    a, b, c = [nn.Parameter(torch.tensor(float(i + 1))) for i in range(3)]
    opt = fo.optim.SAM([a, b, c], fo.sgd, rho=0.1, lr=1.0)
    calls = []

    def closure():
        calls.append(1)
        opt.zero_grad()
        loss = a**2 + (b if len(calls) == 1 else 0)
        loss.backward()
        return loss

    opt.step(closure)
    assert c.item() == 3.0 and b.item() == 2.0
    assert a.item() == pytest.approx(1 - 2 * (1 + 0.1 * 2 / 5**0.5), rel=1e-6)


def test_what_autocast_has_cast_is_cast_again() -> None:
    model = nn.Linear(4, 2)
    opt = fo.optim.SAM(model.parameters(), fo.sgd, rho=5.0, lr=0.1)
    x, losses = torch.randn(8, 4), []

    def closure():
        opt.zero_grad()
        loss = model(x).float().square().mean()
        loss.backward()
        losses.append(loss.item())
        return loss

    with torch.autocast("cpu", torch.bfloat16):
        opt.step(closure)
    assert losses[1] > 2 * losses[0]


def test_a_grad_scaler_refuses_a_closure() -> None:
    model = make_model()
    opt = fo.optim.SAM(model.parameters(), fo.sgd, lr=0.1)
    closure = closure_of(model, opt, 0)
    scaler = torch.amp.GradScaler("cpu", enabled=True)
    scaler.scale(torch.ones(()))
    with pytest.raises(RuntimeError, match="Closure use is not currently supported"):
        scaler.step(opt, closure=closure)
    before = values(model)
    torch.amp.GradScaler("cpu", enabled=False).step(opt, closure)
    assert not torch.equal(before[0], values(model)[0])


def test_a_step_without_closure_is_an_error() -> None:
    model = make_model()
    opt = fo.optim.SAM(model.parameters(), fo.sgd, lr=0.1)
    closure_of(model, opt, 0)()
    before = values(model)
    with pytest.raises(
        TypeError, match=r"reads grad_fn\. Give step a closure.*called again"
    ):
        opt.step()
    assert_same(values(model), before, 0.0)


def test_groups_that_would_be_evaluated_apart_are_an_error() -> None:
    model = make_model()
    opt = fo.optim.SAM(in_groups(model, nesterov=True), fo.sgd, lr=0.1, momentum=0.9)
    before = values(model)
    with pytest.raises(ValueError, match="each would be evaluated by itself"):
        opt.step(closure_of(model, opt, 0))
    assert_same(values(model), before, 0.0)
    for p in model[0].parameters():
        p.requires_grad_(False)
    opt.step(closure_of(model, opt, 0))
    assert_same(values(model)[:2], before[:2], 0.0)
    assert not torch.equal(values(model)[2], before[2])


def test_an_argument_of_the_same_name_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"rho would be that of SAM, and adadelta has"):
        fo.optim.SAM(make_model().parameters(), fo.adadelta, lr=0.1)
    with pytest.raises(ValueError, match="-1"):
        fo.optim.SAM(make_model().parameters(), fo.sgd, rho=-1.0, lr=0.1)


@pytest.mark.parametrize("compile", [False, True])
def test_a_step_inside_of_a_compiled_function_is_an_error(compile: bool) -> None:
    """A graph knows no closure that is called again."""
    model = make_model()
    opt = fo.optim.SAM(model.parameters(), fo.sgd, lr=0.05, compile=compile)
    opt.init_state()
    inner, before = closure_of(model, opt, 0), values(model)
    closure = torch.compiler.disable(lambda: inner().detach())
    refused = pytest.raises(TypeError, match="outside of functions that torch compiles")
    with (
        torch.enable_grad(),
        refused,
    ):  # an error behind a graph break leaves no_grad behind
        torch.compile(lambda: opt.step(closure), backend="eager")()
    assert torch.is_grad_enabled()
    assert_same(values(model), before, 0.0)


def test_the_model_of_the_closure_may_be_compiled() -> None:
    model, reference = make_model(), make_model()
    opt = fo.optim.SAM(model.parameters(), fo.sgd, rho=0.1, lr=0.05)
    other = fo.optim.SAM(reference.parameters(), fo.sgd, rho=0.1, lr=0.05)
    train(reference, other, range(3), schedule=False)
    compiled = torch.compile(model, backend="aot_eager")
    train(compiled, opt, range(3), schedule=False)
    assert_same(values(model), values(reference))
