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

    @classmethod
    def __tensor_unflatten__(cls, parts: dict[str, Tensor], rest: Any) -> Any:
        return with_parts(cls, parts["codes"].shape, parts)

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


# ---- the other way -------------------------------------------------------------------------------


class Packed(torch.Tensor):
    """torchao's ``OptimState4bit``: codes are a vector, two in a byte."""

    def __tensor_flatten__(self) -> Any:
        return ["codes", "scale", "qmap"], [self.shape]

    @classmethod
    def __tensor_unflatten__(cls, parts: dict[str, Tensor], rest: Any) -> Any:
        assert parts["codes"].dim() == 1
        return with_parts(cls, rest[0], parts)

    def dequantize(self) -> Tensor:
        codes = torch.stack([self.codes >> 4, self.codes & 15], -1).flatten()
        x = self.qmap[codes.int()].view(len(self.scale), -1) * self.scale[:, None]
        return x.view(self.shape)


class Floats(torch.Tensor):
    """torchao's ``OptimStateFp8``."""

    def __tensor_flatten__(self) -> Any:
        return ["codes", "scale"], []

    @classmethod
    def __tensor_unflatten__(cls, parts: dict[str, Tensor], rest: Any) -> Any:
        assert parts["codes"].dtype is torch.float8_e4m3fn
        return with_parts(cls, parts["codes"].shape, parts)

    def dequantize(self) -> Tensor:
        x = self.codes.float().view(len(self.scale), -1) * self.scale[:, None]
        return x.view(self.codes.shape)


def with_parts(cls: Any, shape: torch.Size, parts: dict[str, Tensor]) -> Any:
    made = torch.empty(shape).as_subclass(cls)
    for name, x in parts.items():
        assert type(x) is Tensor
        setattr(made, name, x)
    return made


CLASS_OF = {"8bit": OptimState8bit, "4bit": Packed, "float8": Floats}


class Library:
    """What is asked of an optimizer of any library: its groups."""

    def __init__(self, params: list[Tensor], code: str | None) -> None:
        self.param_groups = [{"params": params}]
        self.code = code

    def state_dict(self) -> dict[str, Any]:
        groups = [{"params": [*range(len(self.param_groups[0]["params"]))], "lr": 0.5}]
        return {"state": {}, "param_groups": groups}


class Torchaos(Library):
    """What is asked of one of torchao: its buffers too."""

    def _new_buffer(self, p: Tensor, signed: bool) -> Tensor:
        if p.numel() < 4096 or p.numel() % 256:
            return torch.zeros_like(p)
        codes = torch.zeros(p.shape, dtype=torch.uint8)
        if self.code == "4bit":
            codes = codes.flatten()[::2]
        if self.code == "float8":
            codes = codes.to(torch.float8_e4m3fn)
        made = torch.empty(p.shape).as_subclass(CLASS_OF[self.code])
        made.codes = codes
        return made


class Bitsandbytes(Library):
    """What is asked of one of bitsandbytes."""

    name2qmap: Any = None


def trained(state: str | None, steps: int = 5) -> tuple[list[Tensor], Any]:
    """Of these tensors one is small, and one has a last block that is not full."""
    torch.manual_seed(0)
    shapes = [(64, 128), (100, 60), (7,), (96, 48)]
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    opt = fo.optim.AdamW(params, lr=0.01, state=state)
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape)
        opt.step()
    return params, opt


def read_back(params: list[Tensor], given: dict[str, Any]) -> Any:
    """An optimizer in float32 that has loaded this state."""
    plain = fo.optim.AdamW(params)
    groups = plain.state_dict()["param_groups"]
    plain.load_state_dict({**given, "param_groups": groups}, strict=True)
    return plain


@pytest.mark.parametrize(
    ("library", "code"),
    [
        (Bitsandbytes, "8bit"),
        (Bitsandbytes, None),
        (Torchaos, "8bit"),
        (Torchaos, "4bit"),
        (Torchaos, "float8"),
    ],
)
def test_what_is_handed_on_comes_back(library: Any, code: str | None) -> None:
    """Every number of every slot, to the rounding of a product."""
    params, opt = trained(code)
    found = fo.optim.exported(opt, library(params, code))
    assert found["param_groups"] == library(params, code).state_dict()["param_groups"]
    expected, back = (
        read_back(params, given).state for given in (opt.state_dict(), found)
    )
    for p in params:
        assert back[p]["step"] == 5
        for slot in ("exp_avg", "exp_avg_sq"):
            x = expected[p][slot]
            assert x.abs().max() > 0
            torch.testing.assert_close(back[p][slot], x, rtol=3e-7, atol=0)
    coded = [
        x
        for entry in found["state"].values()
        for key, x in entry.items()
        if type(x) is not Tensor or x.dtype is torch.uint8
        if key != "step"
    ]
    full = 4 if library is Torchaos else 6
    assert len(coded) == (full if code else 0)


def test_a_slot_with_blocks_of_both_maps_gets_the_signed_one() -> None:
    params, opt = trained("8bit")
    p = params[0]
    x = torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
    x[:2] = x[:2].abs() + 1e-3  # the first of the blocks of 256
    plain = read_back(params, opt.state_dict())
    plain.state[p]["exp_avg"] = x
    groups = opt.state_dict()["param_groups"]
    opt.load_state_dict({**plain.state_dict(), "param_groups": groups}, strict=True)
    scales = opt.state[p]["exp_avg_scale"]
    assert scales[0] < 0 and (scales[1:] > 0).all()
    expected = read_back(params, opt.state_dict()).state[p]["exp_avg"]
    found = fo.optim.exported(opt, Bitsandbytes(params, "8bit"))
    back = read_back(params, found).state[p]["exp_avg"]
    torch.testing.assert_close(back[2:], expected[2:], rtol=3e-7, atol=0)
    off = (back[:2] - expected[:2]).abs().max() / expected[:2].max()
    assert 1e-4 < off < 0.0071  # half of the widest gap between two levels


def test_what_cannot_be_handed_on_is_said() -> None:
    params, opt = trained("4bit", steps=1)
    with pytest.raises(TypeError, match="SGD is an optimizer of neither"):
        fo.optim.exported(opt, torch.optim.SGD(params))
    with pytest.raises(TypeError, match=r"'exp_avg' of parameter 0 is stored as 4bit"):
        fo.optim.exported(opt, Bitsandbytes(params, "8bit"))
    with pytest.raises(TypeError, match=r"stored as '4bit'.*torchao has OptimState8bit"):
        fo.optim.exported(opt, Torchaos(params, "8bit"))
    with pytest.raises(ValueError, match=r"shapes \[\(64, 128\).*Give both the same"):
        fo.optim.exported(opt, Bitsandbytes(params[:2], "8bit"))
    three = fo.optim.AdamW(params, amsgrad=True)
    three.init_state()
    with pytest.raises(ValueError, match="keeps at most 2 slots, and here there are 3"):
        fo.optim.exported(three, Bitsandbytes(params, "8bit"))
    low = fo.optim.AdamW(params, state="bfloat16")
    low.init_state()
    with pytest.raises(TypeError, match=r"torch.bfloat16, and torchao has \['8bit'"):
        fo.optim.exported(low, Torchaos(params, "8bit"))
