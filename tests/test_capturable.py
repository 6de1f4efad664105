"""A step that is captured and replayed, as a CUDA graph does: by a tape of its operations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import functorch_opt as fo
from functorch_opt._execution import compiled, pieces
from functorch_opt._execution.compiled import CompiledStep
from functorch_opt._execution.segments import IN_PIECES
from functorch_opt.optim import counts, hosts, plan

SIZES = [(3, 4), (5,), ()]


def on_the_device(self: Any, body: Any, narrow: bool) -> Any:
    """The rules of a step whose numbers lie on the device: there lists of tensors take none."""
    return pieces.Rules(*pieces.plain(body, narrow), None)


@pytest.fixture(autouse=True)
def as_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tape is no trace, and numbers of the CPU count as those of a device."""
    for of in (counts, plan):
        monkeypatch.setattr(of, "is_in_torch_dispatch_mode", lambda: False)
    monkeypatch.setattr(pieces.Pieces, "_rules", on_the_device)


def capture(patch: pytest.MonkeyPatch) -> None:
    """Let a step believe that it is being captured."""
    for of in (counts, hosts):
        patch.setattr(of, "is_capturing", lambda device: True)


class Tape(TorchDispatchMode):
    """Keeps the operations of a step, with the tensors that they read and wrote.

    A replay does the same operations with the same memory. What Python worked out is not worked out
    again, as in a CUDA graph. To read a number is an error, as in a capture.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(
        self, f: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        assert f is not torch.ops.aten._local_scalar_dense.default, (
            "the host reads a number"
        )
        made = f(*args, **(kwargs or {}))
        if not f.is_view and f.namespace == "aten":
            self.kept.append((f, args, kwargs or {}, made))
        return made

    @torch.no_grad()
    def replay(self) -> None:
        for f, args, kwargs, made in self.kept:
            again = f(*args, **kwargs)
            if again is not None:
                pairs = zip(fo.tree.leaves(made), fo.tree.leaves(again), strict=True)
                for x, new in pairs:
                    if x is not new:
                        x.copy_(new)


def params_and_grads(seed: int) -> tuple[list[Any], list[list[Tensor]]]:
    draw = torch.Generator().manual_seed(seed)
    ps = [
        torch.nn.Parameter(torch.randn(size, generator=draw, dtype=torch.float64))
        for size in SIZES
    ]
    grads = [
        [torch.randn(size, generator=draw, dtype=torch.float64) for size in SIZES]
        for _ in range(8)
    ]
    return ps, grads


MAKES: dict[str, Any] = {
    "Adam": lambda ps, **how: fo.optim.Adam(ps, amsgrad=True, **how),
    "AdamW": lambda ps, **how: fo.optim.AdamW(ps, **how),
    "NAdam": lambda ps, **how: fo.optim.NAdam(ps, **how),
    "RAdam": lambda ps, **how: fo.optim.RAdam(ps, **how),
    "Rprop": lambda ps, **how: fo.optim.Rprop(ps, **how),
    "Adadelta": lambda ps, **how: fo.optim.Adadelta(ps, **how),
    "Lion": lambda ps, **how: fo.optim.Lion(ps, **how),
    "Adan": lambda ps, **how: fo.optim.Adan(ps, **how),
    "clip, schedule, mean": lambda ps, lr, **how: fo.optim.Optimizer(
        ps,
        fo.chain(
            fo.clip_by_global_norm(0.5),
            fo.adamw(fo.linear_schedule(0.1, 0.01, 6)),
            fo.params_ema(0.9),
        ),
        lr=lr,
        **how,
    ),
}


@pytest.mark.parametrize("name", MAKES)
def test_a_step_on_tape_goes_on_as_ordinary_steps_do(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the learning rate changes between replays."""
    ps, grads = params_and_grads(0)
    theirs, _ = params_and_grads(0)
    rate = torch.tensor(0.02, dtype=torch.float64)
    mine = MAKES[name](ps, lr=rate, capturable=True)
    other = MAKES[name](theirs, lr=0.02)
    for p, g in zip(ps, grads[0], strict=True):
        p.grad = g.clone()
    tape = Tape()
    for k, gs in enumerate(grads):
        for p, q, g in zip(ps, theirs, gs, strict=True):
            p.grad.copy_(g)
            q.grad = g.clone()
        if k == 5:
            rate.fill_(0.005)
            other.param_groups[0]["lr"] = 0.005
        if k < 2:
            mine.step()
        elif k == 2:
            with monkeypatch.context() as patch, tape:
                capture(patch)
                mine.step()
        else:
            tape.replay()
        other.step()
        torch.testing.assert_close(ps, theirs, rtol=1e-12, atol=1e-14)
    # Afterwards ordinary steps go on from there.
    for p, q, g in zip(ps, theirs, grads[1], strict=True):
        p.grad.copy_(g)
        q.grad = g.clone()
    mine.step()
    other.step()
    torch.testing.assert_close(ps, theirs, rtol=1e-12, atol=1e-14)


def test_the_tape_of_an_ordinary_step_repeats_it() -> None:
    """So the test above can fail: the learning rate and the counts are those of the host."""
    (mine, grads), (theirs, _) = params_and_grads(0), params_and_grads(0)
    for p, q, g in zip(mine, theirs, grads[0], strict=True):
        p.grad, q.grad = g.clone(), g.clone()
    ours, other = fo.optim.AdamW(mine, lr=0.1), fo.optim.AdamW(theirs, lr=0.1)
    for _ in range(2):
        ours.step()
        other.step()
    tape = Tape()
    with tape:
        ours.step()
    other.step()
    torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-14)
    tape.replay()
    other.param_groups[0]["lr"] = 0.05
    other.step()
    assert not all(map(torch.allclose, mine, theirs))


def test_without_it_a_capture_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    ps, grads = params_and_grads(0)
    optimizer = fo.optim.AdamW(ps)
    for p, g in zip(ps, grads[0], strict=True):
        p.grad = g
    before = [p.detach().clone() for p in ps]
    capture(monkeypatch)
    with pytest.raises(RuntimeError, match="capturable=True"):
        optimizer.step()
    assert all(map(torch.equal, ps, before))


def test_a_capture_needs_two_steps_before(monkeypatch: pytest.MonkeyPatch) -> None:
    ps, grads = params_and_grads(0)
    optimizer = fo.optim.AdamW(ps, capturable=True)
    for p, g in zip(ps, grads[0], strict=True):
        p.grad = g
    optimizer.step()
    ps[0].grad = None
    capture(monkeypatch)
    with pytest.raises(RuntimeError, match="two steps before"):
        optimizer.step()


def test_a_parameter_that_is_frozen_does_not_matter(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ps, grads = params_and_grads(0)
    optimizer = fo.optim.AdamW(ps, capturable=True)
    for p, g in zip(ps[1:], grads[0][1:], strict=True):
        p.grad = g
    optimizer.step()
    optimizer.step()
    capture(monkeypatch)
    with Tape():
        optimizer.step()
    assert [optimizer.state[p]["step"].item() for p in ps[1:]] == [3, 3]


def test_counts_of_a_checkpoint_that_are_not_alike_are_asked_for_once() -> None:
    ps, grads = params_and_grads(0)
    theirs, _ = params_and_grads(0)
    mine = fo.optim.Adam(ps, capturable=True)
    other = fo.optim.Adam(theirs)
    for of, own in ((mine, ps), (other, theirs)):
        for k, gs in enumerate(grads[:4]):
            for i, (p, g) in enumerate(zip(own, gs, strict=True)):
                p.grad = None if i == k else g.clone()
            of.step()
    of_mine = [mine.state[p]["step"].item() for p in ps]
    assert of_mine == [other.state[p]["step"].item() for p in theirs] == [3, 3, 3]
    torch.testing.assert_close(ps, theirs, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    "tx",
    [
        fo.adamw(fo.linear_schedule(0.1, 0.01, 6)),
        fo.chain(fo.clip_by_global_norm(0.5), fo.nadam(0.05), fo.params_ema(0.9)),
        fo.inject_hyperparams(fo.adam)(0.1),
        fo.gate(fo.adam(0.1), lambda updates: fo.tree.norm(updates) > 2),
    ],
    ids=["schedule", "clip, mean", "injected", "gate"],
)
def test_a_functional_step_on_tape_goes_on(
    tx: fo.GradientTransformation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counts and numbers that stages share are written where the state has them."""
    monkeypatch.setattr("functorch_opt._execution.walk.Walk.on_host", False)
    monkeypatch.setattr("functorch_opt._core.gate.known", lambda flag: None)
    (ps, grads), (theirs, _) = params_and_grads(0), params_and_grads(0)
    mine = [p.detach() for p in ps]
    reference = [p.detach() for p in theirs]
    step = CompiledStep(tx, True, IN_PIECES, capturable=True)
    state, other = tx.init(mine), tx.init(reference)
    given = [x.clone() for x in grads[0]]
    kept = fo.state_dict(state)
    tape = Tape()
    for k, gs in enumerate(grads):
        torch._foreach_copy_(given, gs)
        if k < 2:
            mine, state = step(mine, given, state)
        elif k == 2:
            with tape:
                step(mine, given, state)
        else:
            tape.replay()
        updates, other = tx.update(gs, other, reference)
        reference = fo.apply_updates(reference, updates)
        torch.testing.assert_close(mine, reference, rtol=1e-12, atol=1e-14)
    now = fo.state_dict(state)
    torch.testing.assert_close(now, fo.state_dict(other), rtol=1e-12, atol=1e-14)
    assert all(now[path].data_ptr() == x.data_ptr() for path, x in kept.items())


def test_a_functional_step_is_not_captured_without_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(compiled, "is_captured", lambda params: True)
    tx, params = fo.adam(0.1), [torch.zeros(2)]
    state = tx.init(params)
    with pytest.raises(RuntimeError, match="capturable=True"):
        fo.compiled_step(tx)(params, [torch.ones(2)], state)
    assert params[0].tolist() == [0, 0]


def test_a_step_that_keeps_what_it_is_given_cannot_be_captured() -> None:
    with pytest.raises(ValueError, match="donate"):
        fo.compiled_step(fo.adam(0.1), donate=False, capturable=True)
    with pytest.raises(ValueError, match="models"):
        fo.compiled_step(fo.adam(0.1), models=True, capturable=True)


# ---- a graph that somebody else compiles ---------------------------------------------------------


def looked_at(seen: list[torch.fx.Node]) -> Any:
    """A backend that compiles nothing, and keeps the operations of steps."""

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        nodes = graph.graph.nodes
        seen.extend(node for node in nodes if "functorch_opt" in str(node.target))
        return graph.forward

    return backend


def test_inductor_keeps_a_compiled_step_out_of_its_cuda_graphs() -> None:
    """It reads numbers on the host, and so a replay would repeat them."""
    from torch._inductor.utils import is_cudagraph_unsafe_fx_node

    ps, grads = params_and_grads(0)
    optimizer = fo.optim.AdamW(ps, compile=True)
    optimizer.init_state()
    for p, g in zip(ps, grads[0], strict=True):
        p.grad = g
    seen: list[torch.fx.Node] = []
    torch.compile(optimizer.step, backend=looked_at(seen), fullgraph=True)()
    (node,) = seen
    assert is_cudagraph_unsafe_fx_node(node)
    writes = node.target._schema.arguments[0]  # type: ignore[union-attr]
    assert writes.name == "params" and writes.alias_info.is_write


@pytest.mark.slow
@pytest.mark.parametrize("compile", [False, True])
def test_a_training_step_may_be_compiled_with_reduce_overhead(compile: bool) -> None:
    """On a CPU there are no graphs, and the numbers are those of ordinary steps; a learning rate
    that changes is seen."""
    (mine, grads), (theirs, _) = params_and_grads(0), params_and_grads(0)
    ours, other = fo.optim.AdamW(mine, lr=0.1, compile=compile), fo.optim.AdamW(theirs)
    ours.init_state()
    step = torch.compile(ours.step, mode="reduce-overhead")
    for k, gs in enumerate(grads[:4]):
        rate = 0.1 / (1 + k)
        ours.param_groups[0]["lr"] = other.param_groups[0]["lr"] = rate
        for p, q, g in zip(mine, theirs, gs, strict=True):
            p.grad, q.grad = g.clone(), g.clone()
        step()
        other.step()
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)
