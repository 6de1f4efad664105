"""A `GradScaler` beside a step that looks at its decision by itself: nobody waits for the device."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import functorch_opt as fo
from functorch_opt._execution import pieces
from functorch_opt.optim import counts, plan

OVERFLOWS = (0, 4, 5)


def chained(ps: Any, **how: Any) -> fo.optim.Optimizer:
    tx = fo.chain(
        fo.clip_by_global_norm(0.5),
        fo.add_noise(0.1, 0.5, 3),
        fo.adamw(fo.linear_schedule(0.1, 0.01, 6)),
        fo.params_ema(0.9),
    )
    return fo.optim.Optimizer(ps, tx, **how)


MAKES: dict[str, Any] = {
    "AdamW": lambda ps, **how: fo.optim.AdamW(ps, lr=0.05, **how),
    "SGD": lambda ps, **how: fo.optim.Optimizer(ps, fo.sgd, lr=0.05, momentum=0.9, **how),
    "plain SGD": lambda ps, **how: fo.optim.Optimizer(ps, fo.sgd, lr=0.05, **how),
    "NAdam": lambda ps, **how: fo.optim.NAdam(ps, lr=0.05, **how),
    "Lion, two groups": lambda ps, **how: fo.optim.Lion(
        [{"params": ps[:1], "lr": 0.01}, {"params": ps[1:]}], lr=0.02, **how
    ),
    "LAMB": lambda ps, **how: fo.optim.LAMB(ps, lr=0.05, **how),
    "accumulated": lambda ps, **how: fo.optim.Optimizer(
        ps, fo.MultiSteps(fo.adam(0.1), 2), **how
    ),
    "chain": chained,
}


class Unread(TorchDispatchMode):
    """To read a number is an error."""

    def __torch_dispatch__(
        self, f: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        assert f is not torch.ops.aten._local_scalar_dense.default, "a number is read"
        return f(*args, **(kwargs or {}))


def on_the_device(self: Any, body: Any, narrow: bool) -> Any:
    """The rules of a step whose numbers lie on the device: there lists of tensors take none."""
    return pieces.Rules(*pieces.plain(body, narrow), None)


@pytest.fixture
def as_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers of the CPU count as those of a device: the host does not know them."""
    for of in (counts, plan):
        monkeypatch.setattr(of, "is_in_torch_dispatch_mode", lambda: False)
    monkeypatch.setattr("functorch_opt._execution.walk.Walk.on_host", False)
    monkeypatch.setattr("functorch_opt._core.gate.known", lambda flag: None)
    monkeypatch.setattr(pieces.Pieces, "_rules", on_the_device)
    support = property(lambda self: self._groups[0].get("capturable", False))
    monkeypatch.setattr(fo.optim.Optimizer, "_step_supports_amp_scaling", support)


def model_and_data() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    return nn.Linear(5, 3), torch.randn(8, 5), torch.randn(8, 3)


@contextmanager
def unread(strict: bool) -> Iterator[None]:
    if not strict:
        yield
        return
    with Unread():
        yield


def trained(make: Any, strict: bool = False, **how: Any) -> Iterator[list[Any]]:
    """After every step: parameters, gradients, state, the scale."""
    model, x, y = model_and_data()
    optimizer = make([*model.parameters()], **how)
    scaler = torch.amp.GradScaler("cpu", init_scale=1000.0, growth_interval=2)
    for k in range(9):
        optimizer.zero_grad()
        scaler.scale(((model(x) - y) ** 2).mean()).backward()
        if k in OVERFLOWS:
            model.weight.grad[1, 2] = float("nan") if k % 2 else float("inf")
        if k % 3 == 1:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.3)
        with unread(strict and k > 2):
            scaler.step(optimizer)
        scaler.update()
        ps = [*model.parameters()]
        yield copy.deepcopy(
            [
                [p.detach() for p in ps],
                [p.grad for p in ps],
                [optimizer.state[p] for p in ps],
                scaler.get_scale(),
            ]
        )


@pytest.mark.usefixtures("as_on_a_device")
@pytest.mark.parametrize("name", MAKES)
def test_it_trains_as_where_the_scaler_leaves_out_the_step(name: str) -> None:
    """Gradients too are what they would be. From the third step on, which may ask whether counts are
    alike, no number is read."""
    mine = trained(MAKES[name], strict=True, capturable=True)
    for k, (ours, theirs) in enumerate(zip(mine, trained(MAKES[name]), strict=True)):
        if k == 0:  # the first step was left out: theirs has no state yet
            assert not any(theirs[2])
            ours[2] = theirs[2]
        assert fo.tree.leaves(ours[0])
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(
                one, other, rtol=1e-5, atol=1e-6, equal_nan=True, check_dtype=True
            )


@pytest.mark.usefixtures("as_on_a_device")
@pytest.mark.parametrize("name", ["AdamW", "chain"])
def test_a_compiled_step_does_too(name: str) -> None:
    make = MAKES[name]
    mine = trained(make, compile=True, capturable=True)
    for k, (ours, theirs) in enumerate(zip(mine, trained(make), strict=True)):
        ours[2] = theirs[2] if k == 0 else ours[2]
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.usefixtures("as_on_a_device")
@pytest.mark.parametrize("compile", [False, True])
def test_a_step_that_is_left_out_changes_no_bit(compile: bool) -> None:
    steps = trained(MAKES["chain"], compile=compile, capturable=True)
    for k, (before, after) in enumerate(itertools.pairwise(steps), 1):
        still = [
            torch.equal(x, y)
            for x, y in zip(
                fo.tree.leaves([before[0], before[2]]),
                fo.tree.leaves([after[0], after[2]]),
                strict=True,
            )
        ]
        assert all(still) == (k in OVERFLOWS)


def scaled(optimizer: Any, p: Tensor, found: float, scale: float | None) -> None:
    """What a scaler does where a step looks at its decision."""
    optimizer.found_inf = torch.tensor(found)
    optimizer.grad_scale = None if scale is None else torch.tensor(scale)
    optimizer.step()
    del optimizer.found_inf, optimizer.grad_scale


@pytest.mark.parametrize("capturable", [False, True])
def test_its_attributes_count_on_a_cpu_too(capturable: bool) -> None:
    p = nn.Parameter(torch.tensor([1.0, -0.0]))
    optimizer = fo.optim.Optimizer([p], fo.sgd, lr=0.5, capturable=capturable)
    p.grad = torch.tensor([8.0, 0.0])
    scaled(optimizer, p, 1.0, 4.0)
    assert p.tolist() == [1.0, 0.0]
    assert p.grad.tolist() == [2.0, 0.0] and optimizer.state[p]["step"].item() == 0
    scaled(optimizer, p, 0.0, None)
    assert p.tolist() == [0.0, 0.0] and optimizer.state[p]["step"].item() == 1
    optimizer.step()
    assert p.tolist() == [-1.0, 0.0] and optimizer.state[p]["step"].item() == 2


def test_after_an_error_a_scaler_can_be_asked_again() -> None:
    """The gradients have their scale again, and the scale is not taken twice."""
    fails = [True]

    def rule(g):
        if fails[0]:
            raise ArithmeticError("not now")
        return g

    p = nn.Parameter(torch.tensor([1.0, 2.0]))
    tx = fo.chain(fo.leafwise(rule), fo.scale(-1.0))
    optimizer = fo.optim.Optimizer([p], tx)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    type(optimizer)._step_supports_amp_scaling.fget(optimizer)
    scaler.scale((p * torch.tensor([0.5, 0.25])).sum()).backward()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fo.optim.Optimizer, "_step_supports_amp_scaling", True)
        with pytest.raises(ArithmeticError):
            scaler.step(optimizer)
        assert p.tolist() == [1.0, 2.0] and p.grad.tolist() == [4.0, 2.0]
        fails[0] = False
        scaler.step(optimizer)
    assert p.tolist() == [0.5, 1.75] and p.grad.tolist() == [0.5, 0.25]


def test_gradients_in_float16_are_refused() -> None:
    p = nn.Parameter(torch.ones(2, dtype=torch.float16))
    p.grad = torch.ones_like(p)
    optimizer = fo.optim.SGD([p], lr=0.5)
    optimizer.found_inf, optimizer.grad_scale = torch.tensor(0.0), torch.tensor(4.0)
    with pytest.raises(ValueError, match=r"float16.*autocast"):
        optimizer.step()
    assert p.tolist() == [1, 1] and not vars(optimizer).keys() & {"found_inf"}


def test_a_compiled_function_has_no_scaler() -> None:
    p = nn.Parameter(torch.ones(2))
    optimizer = fo.optim.SGD([p], lr=0.5)
    optimizer.init_state()
    p.grad = torch.ones(2)
    optimizer.found_inf, optimizer.grad_scale = torch.tensor(1.0), None

    def step() -> None:
        optimizer.step()

    with pytest.raises(Exception, match=r"scaler\.step"):
        torch.compile(step, backend="eager", fullgraph=True)()
    assert p.tolist() == [1, 1]


def test_when_a_scaler_leaves_the_decision_to_the_step() -> None:
    """Where counts lie on a device: `torch.amp.GradScaler` then reads nothing."""
    here = [nn.Parameter(torch.ones(2))]
    with torch.device("meta"):
        there = [nn.Parameter(torch.ones(2))]
    assert fo.optim.AdamW(there, capturable=True)._step_supports_amp_scaling
    assert not fo.optim.AdamW(there)._step_supports_amp_scaling
    assert not fo.optim.AdamW(here, capturable=True)._step_supports_amp_scaling
