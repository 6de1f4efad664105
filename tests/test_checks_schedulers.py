"""The contract of a torch optimizer, by the numbers of its checks: C schedulers, AMP, averaging."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler
from training import SCHEDULERS, make_params, model_and_loss, set_grads, train

import functorch_opt as fo


def test_18_all_schedulers_are_in_the_table() -> None:
    assert set(SCHEDULERS) == {name for name in lr_scheduler.__all__ if name != "LRScheduler"}


@pytest.mark.parametrize("tensor_lr", [False, True], ids=["float", "tensor"])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_18_19_schedulers_drive_us_as_they_drive_torch(scheduler: str, tensor_lr: bool) -> None:
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


def test_18_a_generic_chain_is_driven_by_a_scheduler() -> None:
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


def test_21_freed_without_the_garbage_collector() -> None:
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


def test_22_grad_scaler_skips_infinite_steps_and_unscales() -> None:
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
