"""State dicts of torchao and bitsandbytes, transcribed: their layouts, and the numbers in them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import functorch_opt as fo
from functorch_opt.codecs.maps import dynamic_map

WRAPPED = "__bnb_optimizer_quant_state__"


def model() -> torch.nn.Linear:
    torch.manual_seed(0)
    return torch.nn.Linear(100, 60)


def coded(x: Tensor, signed: bool, block: int = 256) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, map and scales: the nearest level of each number of a block, as both libraries do."""
    qmap = dynamic_map(signed).float()
    if signed:
        qmap[0] = -qmap[-2]  # -0.993
    flat = torch.nn.functional.pad(x.flatten(), (0, -x.numel() % block)).view(-1, block)
    scales = flat.abs().amax(1)
    off = ((flat / scales[:, None])[..., None] - qmap).abs()
    codes = off.argmin(-1).to(torch.uint8).flatten()[: x.numel()]
    return codes.view(x.shape), qmap, scales


def moments(p: Tensor) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(p.numel())
    mu = torch.randn(p.shape, generator=generator)
    return mu, torch.rand(p.shape, generator=generator) + 0.1


def of_bitsandbytes(p: Tensor, wrapped: bool, slots: int = 2) -> dict[str, Any]:
    """``Optimizer2State.init_state`` and ``state_dict`` of bitsandbytes 0.50."""
    entry: dict[str, Any] = {}
    for k, x in enumerate(moments(p)[:slots], start=1):
        entry[f"state{k}"] = x
        if p.numel() >= 4096:
            names = (f"state{k}", f"qmap{k}", f"absmax{k}")
            entry |= zip(names, coded(x, signed=k == 1), strict=True)
    return {"step": 7, WRAPPED: entry} if wrapped else {"step": 7, **entry}


class OptimState8bit(torch.Tensor):
    """What is read of torchao's class of this name: the attributes, and ``dequantize``."""

    codes: Tensor
    scale: Tensor
    qmap: Tensor

    def __tensor_flatten__(self) -> Any:
        return ["codes", "scale", "qmap"], []

    def dequantize(self) -> Tensor:
        x = self.qmap[self.codes.int()].view(len(self.scale), -1) * self.scale[:, None]
        return x.view(self.codes.shape)


def of_torchao(p: Tensor) -> dict[str, Any]:
    entry: dict[str, Any] = {"step": torch.tensor(7.0)}
    pairs = zip(("exp_avg", "exp_avg_sq"), moments(p), strict=True)
    for name, x in pairs:
        entry[name] = x
        if p.numel() >= 4096:
            made = torch.empty(p.shape).as_subclass(OptimState8bit)
            made.codes, made.qmap, made.scale = coded(x, name == "exp_avg", 250)
            entry[name] = made
    return entry


def saved(opt: Any, entry: Any) -> dict[str, Any]:
    params = opt.param_groups[0]["params"]
    given = opt.state_dict()
    return {**given, "state": {i: entry(p.detach()) for i, p in enumerate(params)}}


LAYOUTS = {
    "bitsandbytes": lambda p: of_bitsandbytes(p, wrapped=False),
    "bitsandbytes, wrapped": lambda p: of_bitsandbytes(p, wrapped=True),
    "torchao": of_torchao,
}


@pytest.mark.parametrize("state", [None, "8bit", "4bit"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_codes_of_another_library_are_loaded(layout: str, state: str | None) -> None:
    """Each moment is what it was, to the error of both codes."""
    net = model()
    opt = fo.optim.AdamW(net.parameters(), state=state)
    given = saved(opt, LAYOUTS[layout])
    opt.load_state_dict(given, strict=True)
    off = {None: 0.02, "8bit": 0.03, "4bit": 0.2}[state]
    plain = fo.optim.AdamW(net.parameters())  # reads the state back
    back = opt.state_dict()
    back["param_groups"] = plain.state_dict()["param_groups"]
    plain.load_state_dict(back, strict=True)
    for p in net.parameters():
        found = plain.state[p]
        assert found["step"] == 7
        for slot, x in zip(("exp_avg", "exp_avg_sq"), moments(p), strict=True):
            assert found[slot].dtype is torch.float32
            error = (found[slot] - x).abs().max() / x.abs().max()
            assert error <= (off if p.numel() >= 4096 else 0), slot
    net(torch.ones(2, 100)).sum().backward()
    opt.step()


def test_a_rule_with_one_slot_has_the_first_state() -> None:
    net = model()
    opt = fo.optim.Lion(net.parameters(), 1e-3)
    given = saved(opt, lambda p: of_bitsandbytes(p, wrapped=True, slots=1))
    opt.load_state_dict(given, strict=True)
    mu = moments(net.weight)[0]
    assert (opt.state[net.weight]["scale_by_lion/mu"] - mu).abs().max() < 0.1


def test_what_does_not_fit_is_said() -> None:
    net = model()
    opt = fo.optim.Lion(net.parameters(), 1e-3)
    before = copy.deepcopy(opt.state_dict())
    with pytest.raises(ValueError, match=r"bitsandbytes and has 2 slots.*same rule"):
        opt.load_state_dict(saved(opt, LAYOUTS["bitsandbytes"]))
    opt = fo.optim.AdamW(net.parameters())

    def without_blocks(p: Tensor) -> dict[str, Any]:
        entry = of_bitsandbytes(p, wrapped=False)
        return {key: x for key, x in entry.items() if not key.startswith("absmax")}

    with pytest.raises(ValueError, match="block_wise=False"):
        opt.load_state_dict(saved(opt, without_blocks))

    def stacked(p: Tensor) -> dict[str, Any]:
        entry = of_bitsandbytes(p, wrapped=False)
        state1 = torch.stack([moments(p)[0]] * 2)
        return {**entry, "state1": state1}

    with pytest.raises(ValueError, match="AdEMAMix keeps two slots in one"):
        opt.load_state_dict(saved(opt, stacked))
    assert not opt.state and before["state"] == {}
