"""The contract of a torch optimizer, by the numbers of its checks.

This file has C: schedulers, AMP and averaging.
"""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler, swa_utils
from training import SCHEDULERS, make_params, model_and_loss, set_grads, train

import functorch_opt as fo
from functorch_opt._execution.segments import PROGRAMS


def test_18_all_schedulers_are_in_the_table() -> None:
    assert set(SCHEDULERS) == {
        name for name in lr_scheduler.__all__ if name != "LRScheduler"
    }


@pytest.mark.parametrize("tensor_lr", [False, True], ids=["float", "tensor"])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_18_19_schedulers_drive_us_as_they_drive_torch(
    scheduler: str, tensor_lr: bool
) -> None:
    """Learning rates and parameters, and the momentum or betas that OneCycle and Cyclic move."""
    for name, options in (("SGD", {"momentum": 0.9}), ("Adam", {})):
        runs = []
        for module in (fo.optim, torch.optim):
            params = make_params()
            opt = getattr(module, name)(
                params,
                lr=torch.tensor(0.05, dtype=torch.float64) if tensor_lr else 0.05,
                **options,
            )
            lr = opt.param_groups[0]["lr"]
            sched = SCHEDULERS[scheduler](opt)
            trajectory = []
            for step in range(20):
                set_grads(params, step)
                opt.step()
                sched.step(1.0) if scheduler == "ReduceLROnPlateau" else sched.step()
                trajectory += [
                    torch.as_tensor(opt.param_groups[0]["lr"]).double().clone(),
                    *(p.detach().clone() for p in params),
                ]
            assert (
                not tensor_lr
                or opt.param_groups[0]["lr"] is lr
                or scheduler == "ReduceLROnPlateau"
            )
            runs.append(trajectory)
        for a, b in zip(*runs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_18_19_schedulers_with_compile(name: str) -> None:
    """One compilation serves them all: what they write are inputs of the compiled code."""
    torch._dynamo.reset()
    PROGRAMS.clear()
    options = {"momentum": 0.9} if name == "SGD" else {}
    for tensor_lr in (False, True):
        for scheduler, attach in SCHEDULERS.items():
            runs = []
            for cls, how in (
                (getattr(fo.optim, name), {"compile": True}),
                (getattr(torch.optim, name), {"foreach": False}),
            ):
                params = make_params(torch.float32)
                opt = cls(
                    params, lr=torch.tensor(0.05) if tensor_lr else 0.05, **options, **how
                )
                sched = attach(opt)
                for step in range(10):
                    set_grads(params, step)
                    opt.step()
                    sched.step(1.0) if scheduler == "ReduceLROnPlateau" else sched.step()
                runs.append(params)
            for p, q in zip(*runs, strict=True):
                torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
    assert len(PROGRAMS) == 1


@pytest.mark.parametrize("override", ["", "of an instance", "of a class"])
def test_20_warnings_of_schedulers(override: str) -> None:
    """In the right order there are no warnings; a warning is an error in these tests.

    In the wrong order they come as they do for torch's optimizers.
    """

    class Mine(fo.optim.SGD):
        if override == "of a class":

            @torch.no_grad()
            def step(self, closure=None):
                return self._advance()

    opt = Mine(make_params())
    sched = lr_scheduler.StepLR(opt, 1)
    set_grads(opt.param_groups[0]["params"], 0)
    if override == "of an instance":
        opt.step = lambda: None
        with pytest.warns(UserWarning, match="has been overridden"):
            sched.step()
        return
    opt.step()
    sched.step()
    late = lr_scheduler.StepLR(Mine(make_params()), 1)
    with pytest.warns(UserWarning, match=r"before `optimizer.step"):
        late.step()
    opt.load_state_dict(opt.state_dict())
    lr_scheduler.StepLR(opt, 1).step()


def test_18_a_generic_chain_is_driven_by_a_scheduler() -> None:
    params, twins = make_params(), make_params()
    opt = fo.optim.Optimizer(params, fo.chain(fo.clip_by_global_norm(0.5), fo.adam(0.1)))
    sched = lr_scheduler.StepLR(opt, 1, 0.5)
    state = (
        tx := fo.chain(
            fo.clip_by_global_norm(0.5),
            fo.scale_by_adam(),
            fo.scale_by_schedule(fo.exponential_decay(-0.1, 1, 0.5)),
        )
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


@pytest.mark.parametrize(
    "compile",
    [False, pytest.param(True, marks=pytest.mark.slow)],
    ids=["eager", "compiled"],
)
def test_21_freed_without_the_garbage_collector(compile: bool) -> None:
    gc.collect()
    gc.disable()
    try:
        params = make_params()
        opt = fo.optim.AdamW(params, compile=compile)
        sched = lr_scheduler.StepLR(opt, 1)
        train(opt, params, 2)
        sched.step()
        ref = weakref.ref(opt)
        del opt, sched
        assert ref() is None
    finally:
        gc.enable()


def test_22_grad_scaler_skips_infinite_steps_and_unscales() -> None:
    model, x, y = model_and_loss()
    twin = copy.deepcopy(model)
    opt, reference = (
        fo.optim.AdamW(model.parameters(), lr=0.1),
        torch.optim.AdamW(twin.parameters(), lr=0.1),
    )
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


@pytest.mark.parametrize("kind", ["ema", "swa"])
def test_23_averaged_models(kind: str) -> None:
    """An average of the model beside the optimizer, whose lr SWALR moves."""
    runs = []
    for module in (fo.optim, torch.optim):
        model, x, y = model_and_loss()
        opt = module.AdamW(model.parameters(), lr=0.1)
        average = swa_utils.AveragedModel(
            model,
            multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.9) if kind == "ema" else None,
        )
        sched = swa_utils.SWALR(opt, swa_lr=0.01, anneal_epochs=5)
        for _ in range(8):
            opt.zero_grad()
            nn.functional.mse_loss(model(x), y).backward()
            opt.step()
            average.update_parameters(model)
            sched.step()
        runs.append([*average.parameters(), torch.tensor(opt.param_groups[0]["lr"])])
    for p, q in zip(*runs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
