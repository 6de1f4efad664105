"""Options that make one value for all parameters must be the same in all groups."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import functorch_opt as fo

ONE_FOR_ALL = [
    ("Prodigy", "estim_lr0", 1e-3, "'shared/d' of prodigy"),
    ("Prodigy", "estim_lr_coef", 2.0, "'shared/d' of prodigy"),
    ("DAdaptAdamW", "estim_lr0", 1e-3, "'shared/d' of dadapt_adamw"),
    ("ScheduleFreeProdigy", "weight_lr_power", 1.0, "of schedule_free_prodigy"),
    ("ScheduleFreeAdamW", "r", 1.0, "of schedule_free_adamw"),
    ("MoMo", "beta", 0.5, "'shared/average' of momo"),
    ("MoMoAdam", "b1", 0.5, "'shared/average' of momo_adam"),
    ("DoWG", "eps", 1e-2, "of dowg"),
]
"""A class, an option, another number than its default, and what the error says."""


def two(start: float = 1.0) -> list[nn.Parameter]:
    return [
        nn.Parameter(torch.full((3,), start + i, dtype=torch.float64)) for i in range(2)
    ]


def step(opt: torch.optim.Optimizer, params: list[nn.Parameter]) -> None:
    def closure() -> Tensor:
        opt.zero_grad()
        loss = sum((p**2).sum() for p in params)
        loss.backward()
        return loss

    opt.step(closure)


@pytest.mark.parametrize(("name", "option", "value", "says"), ONE_FOR_ALL)
def test_an_option_that_must_be_alike_is_named(
    name: str, option: str, value: float, says: str
) -> None:
    """And only it: the learning rates differ too, which is allowed."""
    params = two()
    groups = [{"params": params[:1]}, {"params": params[1:], "lr": 0.5, option: value}]
    opt = getattr(fo.optim, name)(groups)
    before = [p.detach().clone() for p in params]
    match = rf"the option {option} makes .*{says}.* the same in all groups.*partition"
    with pytest.raises(ValueError, match=match):
        step(opt, params)
    torch.testing.assert_close([p.detach() for p in params], before, rtol=0, atol=0)
    opt.param_groups[1][option] = opt.param_groups[0][option]
    step(opt, params)
    assert not torch.equal(params[1].detach(), before[1])


def test_partition_gives_each_its_own() -> None:
    """What the error says to write instead, and it is two optimizers in one."""
    params, others = two(), two()
    first, second = fo.prodigy(estim_lr0=1e-3), fo.prodigy(estim_lr0=1e-2)
    tx = fo.partition({"a": first, "b": second}, ["a", "b"])
    opt = fo.optim.Optimizer(params, tx)
    apart = [
        fo.optim.Optimizer([p], of) for p, of in zip(others, (first, second), strict=True)
    ]
    for _ in range(5):
        step(opt, params)
        for p, of in zip(others, apart, strict=True):
            step(of, [p])
    torch.testing.assert_close(params, others, rtol=1e-12, atol=1e-12)
