"""With ``compile=True`` a step in a graph that a user compiles is one operation of it."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import functorch_opt as fo
from functorch_opt.optim import one_operation

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


class Seen:
    """A backend that remembers its graphs."""

    def __init__(self, backend: str) -> None:
        self.backend, self.graphs = backend, []

    def __call__(self, graph: Any, inputs: Any) -> Callable[..., Any]:
        self.graphs.append(graph)
        return torch._dynamo.lookup_backend(self.backend)(graph, inputs)

    def steps(self) -> list[int]:
        """In each graph, how many of its operations are steps."""
        ours = one_operation.step._opoverload.overloadpacket
        targets = [[node.target for node in graph.graph.nodes] for graph in self.graphs]
        return [sum(t in (ours, ours.default) for t in of) for of in targets]


def make_params(n: int = 3, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(4, 3), (3,), (5, 2, 2)] * n
    drawn = [torch.randn(shape, generator=generator) for shape in shapes[:n]]
    return [nn.Parameter(x.to(dtype)) for x in drawn]


def groups(ps: list[nn.Parameter]) -> list[dict[str, Any]]:
    return [{"params": ps[:1]}, {"params": ps[1:], "weight_decay": 0.0}]


MAKES = {
    "AdamW": (
        lambda ps: fo.optim.AdamW(ps, lr=0.1, compile=True),
        lambda ps: torch.optim.AdamW(ps, lr=0.1),
    ),
    "groups": (
        lambda ps: fo.optim.AdamW(groups(ps), lr=0.1, compile=True),
        lambda ps: torch.optim.AdamW(groups(ps), lr=0.1),
    ),
    "SGD": (
        lambda ps: fo.optim.SGD(ps, lr=0.1, momentum=0.9, compile=True),
        lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9),
    ),
    "clipped": (
        lambda ps: fo.optim.Optimizer(
            ps, fo.chain(fo.clip_by_global_norm(0.5), fo.adam(0.1)), lr=0.1, compile=True
        ),
        lambda ps: fo.optim.Optimizer(
            ps, fo.chain(fo.clip_by_global_norm(0.5), fo.adam(0.1)), lr=0.1
        ),
    ),
}


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("name", MAKES)
def test_the_numbers_are_those_of_an_ordinary_step(name: str, backend: str) -> None:
    """Also where rates change, and where the graph has changed the parameters before."""
    ours, theirs = make_params(), make_params()
    make, peer = MAKES[name]
    opt, twin = make(ours), peer(theirs)
    seen = Seen(backend)

    def train(
        ps: list[nn.Parameter], optimizer: torch.optim.Optimizer, x: Tensor
    ) -> None:
        with torch.no_grad():
            for p in ps:
                p.mul_(0.9)
                p.grad = (p * x).sin()
            optimizer.step()

    compiled = torch.compile(train, fullgraph=True, backend=seen)
    for k in range(4):
        compiled(ours, opt, torch.tensor(1.0 + k))
        train(theirs, twin, torch.tensor(1.0 + k))
        for group in (*opt.param_groups, *twin.param_groups):
            group["lr"] *= 0.7
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    assert seen.steps() == [1]


def test_the_graph_does_not_grow_with_the_tensors() -> None:
    sizes = []
    for n in (2, 12):
        ps = make_params(n)
        opt = fo.optim.AdamW(ps, lr=0.1, compile=True)
        for p in ps:
            p.grad = torch.ones_like(p)
        seen = Seen("eager")
        torch.compile(opt.step, fullgraph=True, backend=seen)()
        (graph,) = seen.graphs
        called = [node for node in graph.graph.nodes if node.op == "call_function"]
        sizes.append(len(called))
    assert sizes[0] == sizes[1]


def test_missing_gradients_and_a_state_that_begins_in_the_graph() -> None:
    ours, theirs = make_params(), make_params()
    opt = fo.optim.Adam(ours, lr=0.1, compile=True)
    twin = torch.optim.Adam(theirs, lr=0.1)
    compiled = torch.compile(opt.step, fullgraph=True, backend="aot_eager")
    for k in range(3):
        for ps in (ours, theirs):
            for i, p in enumerate(ps):
                p.grad = None if (i, k) == (1, 1) else torch.ones_like(p) * (k + 1)
        compiled()
        twin.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
        assert opt.state[p]["step"] == twin.state[q]["step"]
        assert p.grad is not None


def test_a_loss_is_handed_on() -> None:
    ours, theirs = make_params(), make_params()

    def make(ps: list[nn.Parameter], compile: bool) -> fo.optim.Optimizer:
        return fo.optim.Optimizer(ps, fo.polyak_sgd(), compile=compile)

    def train(ps: list[nn.Parameter], opt: fo.optim.Optimizer) -> None:
        for p in ps:
            p.grad = 2 * p.detach()
        opt.step(lambda: sum((p.detach() ** 2).sum() for p in ps))

    seen = Seen("aot_eager")
    compiled = torch.compile(train, fullgraph=True, backend=seen)
    opt, twin = make(ours, True), make(theirs, False)
    for _ in range(3):
        compiled(ours, opt)
        train(theirs, twin)
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    assert seen.steps() == [1]


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda opt: pickle.loads(pickle.dumps(opt))],
    ids=["copied", "pickled"],
)
def test_a_copy_is_found_by_a_number_of_its_own(copied: Callable[..., Any]) -> None:
    opt = fo.optim.AdamW(make_params(), lr=0.1, compile=True)
    twin = copied(opt)
    before = [p.detach().clone() for p in opt.param_groups[0]["params"]]
    mine = twin.param_groups[0]["params"]
    for p in mine:
        p.grad = torch.ones_like(p)
    torch.compile(twin.step, fullgraph=True, backend="aot_eager")()
    for p, q, old in zip(mine, opt.param_groups[0]["params"], before, strict=True):
        assert not torch.equal(p, old)
        assert torch.equal(q, old)


def test_the_groups_may_be_set_anew() -> None:
    """Some wrappers do so."""
    opt = fo.optim.AdamW(make_params(), lr=0.1, compile=True)
    p = nn.Parameter(torch.ones(3))
    opt.param_groups = [{**opt.param_groups[0], "params": [p]}]
    p.grad = torch.ones(3)
    torch.compile(opt.step, fullgraph=True, backend="aot_eager")()
    assert opt.param_groups[0]["params"] == [p]
    assert p[0] < 1
