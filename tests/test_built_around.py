"""What people build around optimizers, by small programs of the same form.

Each runs twice, with torch's optimizer and with ours, and both must end with the same numbers. What
can be had as a library is in clients/.
"""

from __future__ import annotations

import copy
import gc
import time
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor, nn

import functorch_opt as fo
from functorch_opt._execution.segments import PROGRAMS

Make = Callable[..., torch.optim.Optimizer]


def torchs(params: Iterable[Any], lr: float = 0.01) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, lr=lr)


def named(params: Iterable[Any], lr: float = 0.01) -> torch.optim.Optimizer:
    return fo.optim.Adam(params, lr=lr)


def chained(params: Iterable[Any], lr: float = 0.01) -> torch.optim.Optimizer:
    return fo.optim.Optimizer(params, fo.adam, lr=lr)


def named_compiled(params: Iterable[Any], lr: float = 0.01) -> torch.optim.Optimizer:
    return fo.optim.Adam(params, lr=lr, compile=True)


def chained_compiled(params: Iterable[Any], lr: float = 0.01) -> torch.optim.Optimizer:
    return fo.optim.Optimizer(params, fo.adam, lr=lr, compile=True)


EAGER = [named, chained]
COMPILED = [
    pytest.param(make, marks=pytest.mark.slow)
    for make in (named_compiled, chained_compiled)
]
each_optimizer = pytest.mark.parametrize("make", [*EAGER, *COMPILED])


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def batch(k: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(k)
    x = torch.randn(16, 6, generator=generator, dtype=torch.float64)
    return x, torch.sin(x[:, :3])


def loss_of(net: nn.Module, k: int) -> Tensor:
    x, y = batch(k)
    return ((net(x) - y) ** 2).mean()


def weights(net: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in net.parameters()]


def assert_same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


# ---- parameters that are replaced ----------------------------------------------------------------


class Splats:
    """Gaussian splatting: points are pruned, copied and reset, and so is the state of each."""

    def __init__(self, make: Make) -> None:
        generator = torch.Generator().manual_seed(0)
        shapes = {"xyz": (3,), "features": (4, 3), "opacity": (1,)}
        self.tensors = {
            name: nn.Parameter(
                torch.randn(20, *shape, generator=generator, dtype=torch.float64)
            )
            for name, shape in shapes.items()
        }
        groups = [
            {"params": [p], "lr": 0.01 * (i + 1), "name": name}
            for i, (name, p) in enumerate(self.tensors.items())
        ]
        self.optimizer = make(groups, lr=0.0)

    def train(self, steps: int) -> None:
        for _ in range(steps):
            loss = sum(((p - 0.5) ** 4).sum() for p in self.tensors.values())
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()

    def replace(
        self,
        change: Callable[[Tensor], Tensor],
        of_state: Callable[[Tensor], Tensor],
        only: str | None = None,
    ) -> None:
        """Put another parameter in the place of each, and change its moments alike."""
        for group in self.optimizer.param_groups:
            if only not in (None, group["name"]):
                continue
            before = group["params"][0]
            stored = self.optimizer.state.get(before, None)
            after = nn.Parameter(change(before.detach()).requires_grad_(True))
            if stored is not None:
                for key, value in stored.items():
                    if value.shape == before.shape:
                        stored[key] = of_state(value)
                del self.optimizer.state[before]
                self.optimizer.state[after] = stored
            group["params"][0] = after
            self.tensors[group["name"]] = after
            del before

    def prune(self) -> None:
        x = self.tensors["xyz"].detach()[:, 0]
        keep = x > x.quantile(0.2)
        self.replace(lambda p: p[keep], lambda x: x[keep])

    def grow(self) -> None:
        self.replace(
            lambda p: torch.cat((p, p[:5] * 0.9)),
            lambda x: torch.cat((x, torch.zeros_like(x[:5]))),
        )

    def reset_opacity(self) -> None:
        self.replace(lambda p: p.clamp(max=-0.2), torch.zeros_like, only="opacity")


@each_optimizer
def test_gaussian_splatting(make: Make) -> None:
    ours, theirs = Splats(make), Splats(torchs)
    ours.grow()  # before there is any state
    theirs.grow()
    ours.train(2)
    theirs.train(2)
    assert (programs := [*PROGRAMS])
    for splats in (ours, theirs):
        for _ in range(3):
            splats.train(2)
            splats.grow()
            splats.prune()  # and no step between
            splats.train(2)
            splats.reset_opacity()
        splats.train(2)
    assert [*PROGRAMS] == programs, "another number of points is no reason to compile"
    assert len(ours.tensors["xyz"]) not in (20, 25, 30, 35, 40)
    assert_same(
        [p.detach() for p in ours.tensors.values()],
        [p.detach() for p in theirs.tensors.values()],
    )
    assert len(ours.optimizer.state) == 3
    saved = copy.deepcopy(ours.optimizer.state_dict())
    ours.optimizer.load_state_dict(saved, strict=True)
    for splats in (ours, theirs):
        splats.train(1)
    assert_same(
        [p.detach() for p in ours.tensors.values()],
        [p.detach() for p in theirs.tensors.values()],
    )


def test_another_parameter_may_come_to_lie_where_the_last_one_was() -> None:
    """Python gives the address of a freed parameter to the next one, of whatever shape."""

    def label(path: str, p: Tensor) -> str:
        return "fast" if p.ndim > 1 else "slow"

    def step(p: nn.Parameter) -> Tensor:
        opt.state.clear()
        opt.param_groups[0]["params"][:] = [p]
        p.grad = torch.ones_like(p)
        opt.step()
        return p.detach().clone()

    tx = fo.partition({"fast": fo.sgd(1.0), "slow": fo.sgd(0.001)}, label)
    opt = fo.optim.Optimizer([nn.Parameter(torch.zeros(2, 2))], tx)
    for _ in range(20):  # now and then the address goes to something else
        step(p := nn.Parameter(torch.zeros(2, 2)))
        address, seen = id(p), weakref.ref(p)
        opt.param_groups[0]["params"].clear()
        opt.state.clear()
        del p
        gc.collect()
        assert seen() is None
        others = []
        while len(others) < 10_000 and (not others or id(others[-1]) != address):
            others.append(nn.Parameter(torch.zeros(3)))
        if id(others[-1]) == address:
            break
    assert id(others[-1]) == address
    torch.testing.assert_close(step(others[-1]), torch.full((3,), -0.001))


# ---- wrappers ------------------------------------------------------------------------------------


class SAM(torch.optim.Optimizer):
    """Foret et al., 2021, in the form that most repositories have: two steps of one optimizer,
    which shares its groups with the optimizer inside."""

    def __init__(self, params: Iterable[Any], base: Make, rho: float = 0.05) -> None:
        super().__init__(params, {"rho": rho})
        self.base_optimizer = base(self.param_groups)
        self.param_groups = self.base_optimizer.param_groups
        self.defaults.update(self.base_optimizer.defaults)

    def _moved(self) -> list[tuple[dict[str, Any], nn.Parameter]]:
        return [
            (group, p)
            for group in self.param_groups
            for p in group["params"]
            if p.grad is not None
        ]

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        norms = [p.grad.norm(p=2) for _, p in self._moved()]
        norm = torch.norm(torch.stack(norms), p=2)
        for group, p in self._moved():
            self.state[p]["old_p"] = p.data.clone()
            p.add_(p.grad * (group["rho"] / (norm + 1e-12)))
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def second_step(self, zero_grad: bool = False) -> None:
        for _, p in self._moved():
            p.data = self.state[p]["old_p"]
        self.base_optimizer.step()
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        assert closure is not None
        closure = torch.enable_grad()(closure)
        self.first_step(zero_grad=True)
        closure()
        self.second_step()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.base_optimizer.param_groups = self.param_groups


@each_optimizer
@pytest.mark.parametrize("with_closure", [False, True])
def test_sam(make: Make, with_closure: bool) -> None:
    def run(one: Make) -> list[Tensor]:
        net = model()
        groups = [{"params": net[0].parameters()}, {"params": net[2].parameters()}]
        groups[1]["rho"] = 0.2
        optimizer = SAM(groups, one)
        rate = torch.optim.lr_scheduler.StepLR(optimizer.base_optimizer, 5, 0.5)
        for k in range(20):
            loss_of(net, k).backward()

            def again(k: int = k) -> None:
                loss_of(net, k).backward()

            if with_closure:
                optimizer.step(again)
                optimizer.zero_grad()
            else:
                optimizer.first_step(zero_grad=True)
                again()
                optimizer.second_step(zero_grad=True)
            rate.step()
            if k == 10:
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        assert optimizer.base_optimizer.param_groups is optimizer.param_groups
        return weights(net)

    assert_same(run(make), run(torchs))


class Averaging(torch.optim.Optimizer):
    """The form of Horovod: methods that are put over the class of any optimizer."""

    def __init__(self, params: Iterable[Any], names: dict[Tensor, str]) -> None:
        # The class above this one in a subclass that is made below is the optimizer's own.
        super(self.__class__, self).__init__(params)
        self.names = names
        self.synchronized = 0
        self.hooks = [
            p.register_post_accumulate_grad_hook(self._reduce)
            for group in self.param_groups
            for p in group["params"]
            if p.requires_grad
        ]

    def _reduce(self, p: Tensor) -> None:
        p.grad.mul_(0.5)  # the mean over two, of whom one had no gradient

    def synchronize(self) -> None:
        self.synchronized += 1

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        self.synchronize()
        return super(self.__class__, self).step(closure)

    def zero_grad(self, *args: Any, **kwargs: Any) -> None:
        return super(self.__class__, self).zero_grad(*args, **kwargs)


def wrapped(optimizer: torch.optim.Optimizer, net: nn.Module) -> torch.optim.Optimizer:
    cls = type(
        optimizer.__class__.__name__, (optimizer.__class__,), dict(Averaging.__dict__)
    )
    names = {p: name for name, p in net.named_parameters()}
    return cls(optimizer.param_groups, names)


class CompiledAdamW(fo.optim.AdamW):
    """Only the groups come along to the new class: what else is given goes into one of one's
    own."""

    def __init__(self, params: Iterable[Any], **options: Any) -> None:
        super().__init__(params, compile=True, **options)


class OwnAdamW(fo.optim.Optimizer):
    def __init__(self, params: Iterable[Any], lr: float = 0.0) -> None:
        super().__init__(params, fo.adamw, lr=lr, weight_decay=0.01)


AROUND = {
    **{name: name for name in ("Adam", "AdamW", "SGD", "Adagrad", "RMSprop")},
    "OwnAdamW": "AdamW",
    "CompiledAdamW": "AdamW",
}


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        pytest.param(*pair, marks=pytest.mark.slow) if "Compiled" in pair[0] else pair
        for pair in AROUND.items()
    ],
)
def test_subclasses_that_are_made_on_the_way(ours: str, theirs: str) -> None:
    def run(make: Any) -> list[Tensor]:
        net = model()
        groups = [
            {"params": net[0].parameters(), "lr": 0.02},
            {"params": net[2].parameters(), "weight_decay": 0.1},
        ]
        optimizer = wrapped(make(groups, lr=0.01), net)
        assert isinstance(optimizer, make) and type(optimizer) is not make
        assert getattr(optimizer, "_compile", False) == (make is CompiledAdamW)
        for k in range(10):
            optimizer.zero_grad()
            loss_of(net, k).backward()
            optimizer.step()
            if k == 5:
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        assert optimizer.synchronized == 10
        return weights(net)

    mine = globals().get(ours) or getattr(fo.optim, ours)
    assert_same(run(mine), run(getattr(torch.optim, theirs)))


# ---- gradients and backward ----------------------------------------------------------------------


def projected(gradients: list[Tensor]) -> Tensor:
    """Yu et al., 2020 (PCGrad): of each task without what another task's gradient speaks against."""
    total = torch.zeros_like(gradients[0])
    for i, g in enumerate(gradients):
        mine = g.clone()
        for j, other in enumerate(gradients):
            along = mine @ other
            if i != j and along < 0:
                mine -= along / (other @ other) * other
        total += mine
    return total


@each_optimizer
def test_gradient_surgery(make: Make) -> None:
    """Each ``p.grad`` is a view of one new vector, and None where no task has a gradient."""

    def run(one: Make) -> list[Tensor]:
        net = model()
        unused = nn.Parameter(torch.ones(3, dtype=torch.float64))
        params = [*net.parameters(), unused]
        optimizer, conflicts = one(params), 0
        for k in range(20):
            vectors = []
            for sign in (1.0, -1.0):
                optimizer.zero_grad(set_to_none=True)
                x, y = batch(k)
                ((net(x) - sign * y) ** 2).mean().backward()
                gradients = [p.grad for p in net.parameters()]
                vectors.append(torch.cat([g.flatten() for g in gradients]))
            conflicts += bool(vectors[0] @ vectors[1] < 0)
            merged = projected(vectors).split([p.numel() for p in net.parameters()])
            for p, g in zip(net.parameters(), merged, strict=True):
                p.grad = g.view_as(p)
            assert unused.grad is None
            optimizer.step()
        assert conflicts > 0 and (unused == 1).all()
        return weights(net)

    assert_same(run(make), run(torchs))


@each_optimizer
def test_optimizer_in_backward(make: Make) -> None:
    """One optimizer for each parameter steps as soon as the gradient is there, and frees it."""

    def run(one: Make) -> list[Tensor]:
        net = model()
        optimizers = {p: one([p]) for p in net.parameters()}
        rates = [
            torch.optim.lr_scheduler.ExponentialLR(o, 0.9) for o in optimizers.values()
        ]

        def step(p: Tensor) -> None:
            optimizers[p].step()
            optimizers[p].zero_grad()

        for p in net.parameters():
            p.register_post_accumulate_grad_hook(step)
        for k in range(20):
            loss_of(net, k).backward()
            assert all(p.grad is None for p in net.parameters())
            for rate in rates:
                rate.step()
            if k == 10:
                for optimizer in optimizers.values():
                    saved = copy.deepcopy(optimizer.state_dict())
                    optimizer.load_state_dict(saved)
        return weights(net)

    assert_same(run(make), run(torchs))


# ---- processes and devices -----------------------------------------------------------------------


def train_freely(net: nn.Module, make: Make, turn: Any, rank: int) -> None:
    """A worker of Hogwild: an optimizer of its own, of a model that another one trains too."""
    optimizer = make(net.parameters())
    for k in range(100):
        optimizer.zero_grad()
        loss_of(net, 2 * k + rank).backward()
        with turn:
            optimizer.step()


def train_in_turn(net: nn.Module, optimizer: Any, barrier: Any, rank: int) -> None:
    """A worker that has the state of the other one too."""
    for k in range(10):
        if k % 2 == rank:
            optimizer.zero_grad()
            loss_of(net, k).backward()
            optimizer.step()
        barrier.wait(120)


def work(
    rank: int, freely: list[Any], in_turn: list[Any], turn: Any, barrier: Any
) -> None:
    torch.set_num_threads(1)
    for net, make in freely:
        train_freely(net, make, turn, rank)
    for net, optimizer in in_turn:
        train_in_turn(net, optimizer, barrier, rank)


@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_hogwild(compile: bool) -> None:
    """Two processes train models in shared memory, and come to an end by themselves.

    In turn, with state that is shared too, they make the steps of one process.
    """

    def shared(name: str) -> Any:
        net = model().share_memory()
        optimizer = getattr(fo.optim, name)(net.parameters(), lr=0.01, compile=compile)
        optimizer.init_state()
        if name == "Adagrad":
            optimizer.share_memory()  # the sums; the counts are shared below
        for entry in optimizer.state.values():
            for value in entry.values():
                value.share_memory_()
        return net, optimizer

    makes = [torchs, *((named_compiled, chained_compiled) if compile else EAGER)]
    freely = [(model().share_memory(), make) for make in makes]
    names = ["Adagrad", "Adam"]
    in_turn = [*map(shared, names)]
    context = mp.get_context("spawn")
    args = freely, in_turn, context.Lock(), context.Barrier(2)
    workers = mp.start_processes(work, args, nprocs=2, join=False, start_method="spawn")
    try:
        deadline = time.monotonic() + 400
        while not workers.join(10):
            assert time.monotonic() < deadline, "they do not end"
    finally:
        for process in workers.processes:
            process.kill()

    def loss(net: nn.Module) -> float:
        return sum(loss_of(net, k).item() for k in range(20))

    for net, _ in freely:
        assert loss(net) < 0.5 * loss(model())
    for name, (net, optimizer) in zip(names, in_turn, strict=True):
        twin = model()
        theirs = getattr(torch.optim, name)(twin.parameters(), lr=0.01)
        for k in range(10):
            theirs.zero_grad()
            loss_of(twin, k).backward()
            theirs.step()
        assert_same(weights(net), weights(twin))
        assert all(entry["step"] == 10 for entry in optimizer.state.values())


def moved(optimizer: torch.optim.Optimizer, to: Callable[[Tensor], Tensor]) -> None:
    """The loop that everybody writes after a checkpoint was loaded, or to free a device's memory."""
    for entry in optimizer.state.values():
        for key, value in entry.items():
            if isinstance(value, Tensor):
                entry[key] = to(value)


@each_optimizer
def test_state_goes_to_another_place_and_back(make: Make) -> None:
    """The tensors are others each time, also the counts; the old ones are read no more."""

    def run(one: Make) -> list[Tensor]:
        net = model()
        optimizer = one(net.parameters())
        for k in range(20):
            loss_of(net, k).backward()
            optimizer.step()
            optimizer.zero_grad()
            if k % 5 == 2:
                old = [x for entry in optimizer.state.values() for x in entry.values()]
                moved(optimizer, torch.clone)
                for x in old:
                    x.fill_(1e6)
            if k % 5 == 4:
                moved(optimizer, lambda x: x.to("cpu"))
        return weights(net)

    assert_same(run(make), run(torchs))


@each_optimizer
def test_a_model_goes_away_and_comes_back(make: Make) -> None:
    """Offload: parameters and state leave their memory between two phases of a training, in place
    (``p.data``), as libraries for reinforcement learning do."""

    def run(one: Make) -> list[Tensor]:
        net = model()
        optimizer = one([{"params": [p]} for p in net.parameters()])
        for k in range(12):
            loss_of(net, k).backward()
            optimizer.step()
            optimizer.zero_grad()
            if k % 4 == 1:
                host = {p: p.data.clone() for p in net.parameters()}
                kept = {
                    (p, key): value.clone()
                    for p, entry in optimizer.state.items()
                    for key, value in entry.items()
                }
                for p in net.parameters():
                    p.data = torch.empty(0, dtype=p.dtype)
                moved(optimizer, lambda x: x.to("meta"))
                for p in net.parameters():
                    p.data = host[p]
                    for key in optimizer.state[p]:
                        optimizer.state[p][key] = kept[p, key].to(p.device)
        return weights(net)

    assert_same(run(make), run(torchs))
