"""Where the numbers of a stateful optimizer lie, for a device that is not there."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

import functorch_opt as fo
from functorch_opt.optim import hosts
from functorch_opt.optim.numbers import Numbers

META = torch.device("meta")


def numbers_of(make: Any, **options: Any) -> Numbers:
    """Of one group with a parameter on the meta device, which here is the one that is not the host."""
    few = [torch.empty(2, device=META)]
    groups = [{"params": few, **options}]
    return hosts.with_numbers(make, [*options], groups, [0], few)[0]


@pytest.fixture(autouse=True)
def counts_that_can_be_moved(monkeypatch: Any) -> None:
    """There is nothing on the meta device that could be."""

    def moved(x: torch.Tensor) -> torch.Tensor:
        is_count = not (x.dim() or x.is_floating_point())
        return torch.zeros((), dtype=x.dtype) if is_count else x

    monkeypatch.setattr(hosts, "_count_on_host", moved)


def test_they_lie_on_the_host() -> None:
    assert numbers_of(lambda now: fo.adamw(now["lr"]), lr=0.1).device.type == "cpu"


def test_a_rate_on_the_device_takes_all_there() -> None:
    rate = torch.empty((), device=META)
    numbers = numbers_of(lambda now: fo.adamw(now["lr"]), lr=rate)
    assert numbers.device == META
    assert numbers.buffers["lr"].device == META


def test_where_an_operation_takes_none_from_the_host_all_lie_on_the_device() -> None:
    def make(now: dict[str, Any]) -> fo.GradientTransformation:
        def rule(g, lr):
            if lr.device != g.device:
                raise RuntimeError("Expected all tensors to be on the same device")
            return g * lr

        return fo.leafwise(rule, hyper={"lr": now["lr"]})

    assert numbers_of(make, lr=0.1).device == META


def test_a_step_with_numbers_on_the_host_is_not_captured(monkeypatch: Any) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    p: Any = SimpleNamespace(device=torch.device("cuda"))
    with pytest.raises(RuntimeError, match="CUDA graph"):
        hosts.refuse_capture(False, p)
    hosts.refuse_capture(True, p)
    hosts.refuse_capture(False, torch.zeros(()))


def test_the_numbers_of_a_step_to_capture_lie_on_the_device() -> None:
    few = [torch.empty(2, device=META)]
    groups = [{"params": few, "lr": 0.1, "capturable": True}]
    given = (lambda now: fo.adamw(now["lr"]), ["lr"], groups, [0], few)
    assert hosts.with_numbers(*given)[0].device == META
