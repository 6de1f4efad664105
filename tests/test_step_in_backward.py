"""The step inside of backward: the numbers of a step after it, and one gradient at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import functorch_opt as fo
from benchmarks.memory import allocations

Make = Callable[[nn.Module], torch.optim.Optimizer]


class Net(nn.Module):
    """`rare` is used at some steps only, `tied` twice in each."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(5, 300), nn.Linear(300, 5)
        self.tied, self.rare = nn.Linear(5, 5), nn.Linear(5, 5)

    def forward(self, x: Tensor, step: int) -> Tensor:
        x = self.tied(torch.tanh(self.down(torch.tanh(self.up(x)))))
        x = self.tied(torch.tanh(x))
        return self.rare(x) if step % 3 == 2 else x


def make_net(dtype: torch.dtype = torch.float32) -> Net:
    torch.manual_seed(0)
    return Net().to(dtype)


def of_chain(make: Callable[[], Any], **options: Any) -> Make:
    return lambda net: fo.optim.Optimizer(net.named_parameters(), make(), **options)


def ready(factory: Callable[..., Any], **options: Any) -> Make:
    return lambda net: fo.optim.Optimizer(net.parameters(), factory, **options)


def matrices(path: str, p: Tensor) -> bool:
    return p.dim() > 1


def warming() -> Any:
    """A schedule, which is a clock of the training: `rare` is not at its beginning."""
    schedule = fo.warmup_cosine_decay_schedule(0.0, 0.1, 3, 8)
    return fo.chain(fo.clip_by_block_rms(0.01), fo.adamw(schedule))


def grouped(net: nn.Module) -> torch.optim.Optimizer:
    named = dict(net.named_parameters())
    large = {"params": [p for p in named.values() if p.dim() > 1], "lr": 0.02}
    small = {"params": [p for p in named.values() if p.dim() == 1], "weight_decay": 0.0}
    return fo.optim.AdamW([large, small], lr=0.1)


def parted(net: nn.Module) -> torch.optim.Optimizer:
    transforms = {"muon": fo.muon(0.02), "adamw": fo.adamw(3e-3, weight_decay=0.1)}
    return fo.optim.Partition(
        net.named_parameters(),
        transforms,
        lambda path, p: "muon" if p.dim() == 2 else "adamw",
    )


OPTIMIZERS: dict[str, Make] = {
    "AdamW": lambda net: fo.optim.AdamW(net.parameters(), lr=0.01),
    "groups": grouped,
    "8 bits": lambda net: fo.optim.AdamW(net.parameters(), lr=0.01, state="8bit"),
    "SGD": lambda net: fo.optim.SGD(net.parameters(), lr=0.01, momentum=0.9),
    "Lion": ready(fo.lion, learning_rate=0.01),
    "sums": ready(fo.lamb, learning_rate=0.01),
    "whole tensors": lambda net: fo.optim.Shampoo(net.parameters(), lr=0.01),
    "a schedule": of_chain(warming),
    "a mask by path": of_chain(
        lambda: fo.chain(fo.adam(0.01), fo.masked(fo.scale(0.5), matrices))
    ),
    "labels by number": lambda net: fo.optim.Optimizer(
        net.parameters(),
        fo.partition(
            {"x": fo.adam(0.01), "y": fo.sgd(0.1)},
            lambda path, p: "x" if int(path) % 2 else "y",
        ),
    ),
    "averages": of_chain(lambda: fo.chain(fo.adam(0.01), fo.params_ema(0.9))),
    "a wrapper": of_chain(lambda: fo.keep_master_weights(fo.adamw(0.01))),
    "Partition": parted,
}
each_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


def backward(net: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    dtype = next(net.parameters()).dtype
    x = torch.randn(8, 5, generator=generator).to(dtype)
    (net(x, step).float() ** 2).mean().backward()


def train(
    net: nn.Module,
    opt: torch.optim.Optimizer,
    steps: range,
    scheduler: Any = None,
) -> None:
    """An ordinary loop, with a step after backward whatever happens inside of it."""
    for step in steps:
        opt.zero_grad()
        backward(net, step)
        opt.step()
        if scheduler:
            scheduler.step()


def state_of(net: nn.Module, opt: torch.optim.Optimizer) -> dict[str, Tensor]:
    found = {}
    for name, p in net.named_parameters():
        found[name] = p.detach()
        found |= {f"{name} {key}": x for key, x in opt.state.get(p, {}).items()}
    return found


def check_same(name: str, one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """To the bit; but a step after backward takes small matrices through Muon as a stack."""
    assert one.keys() == other.keys()
    off = 1e-6 if name == "Partition" else 0.0
    pairs = {key: (x, other[key]) for key, x in one.items()}
    differ = [
        key
        for key, pair in pairs.items()
        if not torch.allclose(*pair, rtol=off, atol=off)
    ]
    assert not differ, differ


@each_optimizer
def test_the_numbers_are_those_of_a_step_after_backward(name: str) -> None:
    dtype = torch.bfloat16 if name == "a wrapper" else torch.float32
    nets = [make_net(dtype) for _ in range(2)]
    opts = [OPTIMIZERS[name](net) for net in nets]
    fo.optim.step_in_backward(opts[1])
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(opt, 0.7) for opt in opts]
    for net, opt, scheduler in zip(nets, opts, schedulers, strict=True):
        train(net, opt, range(7), scheduler)
    # At the first step all state is made; a step after backward makes that of who moves.
    expected, found = (state_of(*pair) for pair in zip(nets, opts, strict=True))
    check_same(name, expected, found)
    start = dict(make_net(dtype).named_parameters())
    assert all(not torch.equal(found[n], p) for n, p in start.items())


@each_optimizer
def test_checkpoints_are_those_of_the_optimizer(name: str) -> None:
    """It is saved in the middle of one loop, and goes on in another of either kind."""
    dtype = torch.bfloat16 if name == "a wrapper" else torch.float32
    net = make_net(dtype)
    opt = OPTIMIZERS[name](net)
    fo.optim.step_in_backward(opt)
    train(net, opt, range(3))
    saved = {"net": net.state_dict(), "opt": opt.state_dict()}
    saved = {key: {**of} for key, of in saved.items()}
    ends = []
    for inside in (True, False):
        other = make_net(dtype)
        again = OPTIMIZERS[name](other)
        if inside:
            fo.optim.step_in_backward(again)
        other.load_state_dict({k: x.clone() for k, x in saved["net"].items()})
        again.load_state_dict(saved["opt"])
        train(other, again, range(3, 6))
        ends.append((other, again))
    train(net, opt, range(3, 6))
    for other, again in ends:
        check_same(name, state_of(net, opt), state_of(other, again))


def test_gradients_are_not_there_at_the_same_time() -> None:
    """Of ten layers of a megabyte each, one gradient is there, not ten."""
    torch.manual_seed(0)
    peaks = {}
    for inside in (False, True):
        net = nn.Sequential(*[nn.Linear(512, 512, bias=False) for _ in range(10)])
        opt = fo.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
        if inside:
            fo.optim.step_in_backward(opt)
        there: list[int] = []
        for p in net.parameters():
            p.register_post_accumulate_grad_hook(
                lambda _, net=net, there=there: there.append(
                    sum(p.grad is not None for p in net.parameters())
                )
            )
        x = torch.randn(4, 512)

        def loop(net: Any = net, opt: Any = opt, x: Any = x) -> None:
            net(x).square().mean().backward()
            opt.step()
            opt.zero_grad()

        loop()
        peaks[inside] = allocations(loop)[1] / 2**20
        assert max(there) == (0 if inside else 10)
    assert peaks[False] > 10
    assert peaks[True] < 4


def test_every_backward_is_a_step_and_a_frozen_parameter_has_none() -> None:
    net = make_net()
    net.rare.requires_grad_(False)
    opt = fo.optim.AdamW(net.parameters(), lr=0.01)
    handle = fo.optim.step_in_backward(opt)
    for _ in range(2):
        backward(net, 0)
    assert opt.state[net.up.weight]["step"] == 2
    assert net.rare.weight not in opt.state
    net.rare.requires_grad_(True)
    backward(net, 2)
    assert net.rare.weight.grad is not None and net.up.weight.grad is None
    opt.step()
    assert opt.state[net.rare.weight]["step"] == 1
    handle.remove()
    backward(net, 0)
    assert net.up.weight.grad is not None and opt.state[net.up.weight]["step"] == 3


def summed() -> fo.GradientTransformation:
    def rule(g: Tensor, n: Tensor) -> Tensor:
        return g / n

    return fo.leafwise(rule, totals={"n": lambda g: (g * g).sum()})


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "norm": (
        lambda: fo.chain(fo.clip_by_global_norm(1.0), fo.adam(0.1)),
        "clip_by_global_norm looks at all parameters",
    ),
    "totals": (lambda: summed(), "summed looks at all parameters"),
    "key": (
        lambda: fo.chain(fo.add_noise(0.1, 0.5, key=0), fo.sgd(0.1)),
        "add_noise shares key among all parameters",
    ),
    "gate": (
        lambda: fo.apply_if_finite(fo.adam(0.1), 3),
        "apply_if_finite decides for all parameters at once",
    ),
    "inside": (
        lambda: fo.masked(fo.keep_master_weights(fo.zclip()), matrices),
        "zclip shares mean, variance, seen among all parameters",
    ),
    "whole trees": (
        lambda: fo.chain(fo.sgd(0.1), fo.flatten(fo.adam(0.1))),
        "flatten decides for all parameters at once",
    ),
    "value": (
        lambda: fo.chain(fo.scale(1.0), fo.scale_by_polyak()),
        "reads value, which is known after backward",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_looks_at_several_parameters_is_an_error(name: str) -> None:
    make, message = REFUSED[name]
    net = make_net()
    opt = fo.optim.Optimizer(net.named_parameters(), make())
    with pytest.raises(ValueError, match=message) as caught:
        fo.optim.step_in_backward(opt)
    assert "call optimizer.step() after backward" in str(caught.value)
    assert not opt.state
    backward(net, 0)
    assert net.up.weight.grad is not None


def test_other_optimizers_are_an_error() -> None:
    with pytest.raises(TypeError, match=r"takes an optimizer of fo\.optim; got AdamW"):
        fo.optim.step_in_backward(torch.optim.AdamW(make_net().parameters()))


def test_inside_of_eval_params_it_is_an_error() -> None:
    net = make_net()
    opt = OPTIMIZERS["averages"](net)
    fo.optim.step_in_backward(opt)
    backward(net, 0)
    with (
        opt.eval_params(),
        pytest.raises(RuntimeError, match="call backward after leaving eval_params"),
    ):
        backward(net, 1)


@pytest.mark.slow
def test_compiled() -> None:
    nets = [make_net() for _ in range(2)]
    opts = [fo.optim.AdamW(net.parameters(), lr=0.01, compile=True) for net in nets]
    fo.optim.step_in_backward(opts[1])
    for net, opt in zip(nets, opts, strict=True):
        train(net, opt, range(4))
    for (name, p), q in zip(
        nets[0].named_parameters(), nets[1].parameters(), strict=True
    ):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7, msg=name)
