"""The contract of a torch optimizer, by the numbers of its checks.

This file has F, steps inside of a user's own torch.compile.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler
from training import TORCH_NAMED, make_params, model_and_loss, set_grads

import functorch_opt as fo

GENERIC = {
    "chain": fo.chain(fo.clip_by_global_norm(0.5), fo.adamw(0.1)),
    "masked": fo.masked(fo.adam(0.1), lambda path, p: p.ndim > 1, otherwise="zero"),
}


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def twins(build: Callable[[list], torch.optim.Optimizer], of: str = "") -> list[tuple]:
    pairs = []
    for _ in range(2):
        params = make_params(of=of)[:2]  # what is traced takes its time
        pairs.append((params, build(params)))
    return pairs


def follow(
    pairs: list[tuple],
    steps: list[Callable],
    n: int,
    change_lr: Callable[[dict], None],
    tolerance: float = 1e-12,
) -> list[int]:
    """Make `n` steps with both, and compare; returns how many graphs there were after each."""
    seen = []
    for k in range(n):
        for (params, opt), step in zip(pairs, steps, strict=True):
            set_grads(params, k)
            step()
            for group in opt.param_groups:
                change_lr(group)
        for p, q in zip(*(params for params, _ in pairs), strict=True):
            torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)
        seen.append(graphs())
    return seen


def shrink(group: dict) -> None:
    if isinstance(group["lr"], Tensor):
        group["lr"].mul_(0.9)
    else:
        group["lr"] *= 0.9


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lr", "most", "cudagraphs"),
    [(torch.tensor(0.1), 1, False), (0.1, 2, False), (torch.tensor(0.1), 1, True)],
    ids=["tensor", "float", "tensor with cudagraphs"],
)
def test_39_41_the_functional_core(
    lr: float | Tensor, most: int, cudagraphs: bool
) -> None:
    """Under any scheduler there is one graph with a tensor lr, and there are two with a float.

    With CUDA graphs each float is a new graph, which is a limit of torch.
    """

    def step(
        ps: list[Tensor], gs: list[Tensor], state: dict, lr: float | Tensor
    ) -> tuple:
        updates, state = fo.adamw(
            lr if isinstance(lr, Tensor) else torch.ones(()) * lr
        ).update(gs, state, ps)
        return fo.apply_updates(ps, updates), state

    with torch._inductor.config.patch({"triton.cudagraphs": cudagraphs}):
        compiled = torch.compile(step, fullgraph=True)
        ps = [p.detach() for p in make_params()[:2]]
        qs, state = ps, fo.adamw(0.1).init(ps)
        twin = state
        for _ in range(5):
            gs = [p.sin() for p in ps]
            ps, state = compiled(ps, gs, state, lr)
            qs, twin = step(qs, gs, twin, lr)
            for p, q in zip(ps, qs, strict=True):
                torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-10)
            lr = lr * 0.9
    assert graphs() == most


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "tensor_lr"),
    [
        *((name, True) for name in [*TORCH_NAMED, *GENERIC]),
        ("SGD", False),
        ("AdamW", False),
        ("chain", False),
    ],
)
def test_40_step_is_one_graph(name: str, tensor_lr: bool) -> None:
    """Two for a float lr, at its second value."""

    def build(params: list[nn.Parameter]) -> torch.optim.Optimizer:
        lr = torch.tensor(0.1, dtype=torch.float64) if tensor_lr else 0.1
        groups = [{"params": params, "lr": lr}]
        return (
            fo.optim.Optimizer(groups, GENERIC[name])
            if name in GENERIC
            else getattr(fo.optim, name)(groups)
        )

    pairs = twins(build, of=name)
    pairs[0][1].init_state()
    compiled = torch.compile(pairs[0][1].step, fullgraph=True, backend="eager")
    seen = follow(pairs, [compiled, pairs[1][1].step], 4, shrink)
    assert seen == ([1, 1, 1, 1] if tensor_lr else [1, 2, 2, 2])


@pytest.mark.slow
def test_40_without_init_state() -> None:
    """The state is made outside of the graph. If there may be no outside, the error says what to
    call first.
    """
    pairs = twins(
        lambda ps: fo.optim.AdamW(
            [{"params": ps[:1], "lr": torch.tensor(0.2)}, {"params": ps[1:]}],
            lr=torch.tensor(0.1),
        )
    )
    set_grads(pairs[0][0], 0)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"Optimizer\.init_state"):
        torch.compile(pairs[0][1].step, fullgraph=True, backend="eager")()
    seen = follow(
        pairs,
        [torch.compile(pairs[0][1].step, backend="eager"), pairs[1][1].step],
        4,
        shrink,
    )
    assert seen[1] == seen[-1]


def test_40_init_state_is_what_the_first_step_makes() -> None:
    """And it keeps what is there; a frozen parameter gets none."""
    params = make_params()
    params[1].requires_grad_(False)
    opt = fo.optim.ASGD(params)
    opt.init_state()
    assert set(opt.state) == {p for i, p in enumerate(params) if i != 1}
    assert all(
        entry["step"] == 0 and entry.keys() == {"step", "eta", "mu", "ax"}
        for entry in opt.state.values()
    )
    set_grads(params, 0, missing=(1,))
    opt.step()
    before = {p: dict(entry) for p, entry in opt.state.items()}
    opt.init_state()
    assert all(
        opt.state[p][key] is value
        for p, entry in before.items()
        for key, value in entry.items()
    )


@pytest.mark.slow
def test_40_a_whole_training_step_is_one_graph_under_a_scheduler() -> None:
    """Forward, backward, and the step of an optimizer that a scheduler drives."""
    models = []
    for compiled in (True, False):
        model, x, y = model_and_loss()
        opt = fo.optim.AdamW(model.parameters(), lr=torch.tensor(0.1))
        opt.init_state()
        sched = lr_scheduler.OneCycleLR(
            opt, torch.tensor(0.1), total_steps=12, cycle_momentum=False
        )

        def train_step(
            x: Tensor,
            y: Tensor,
            model: nn.Module = model,
            opt: torch.optim.Optimizer = opt,
        ) -> Tensor:
            def loss(ps: dict[str, Tensor]) -> Tensor:
                return nn.functional.mse_loss(
                    torch.func.functional_call(model, ps, (x,)), y
                )

            gradients, value = torch.func.grad_and_value(loss)(
                dict(model.named_parameters())
            )
            for name, p in model.named_parameters():
                p.grad = gradients[name]
            opt.step()
            return value.detach()

        run = (
            torch.compile(train_step, fullgraph=True, backend="aot_eager")
            if compiled
            else train_step
        )
        losses = []
        for _ in range(6):
            losses.append(run(x, y))
            sched.step()  # it would warn if it had not seen the compiled step
        models.append([*model.parameters(), *losses])
    for p, q in zip(*models, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    assert graphs() == 1


@pytest.mark.slow
def test_41_with_cudagraphs_a_tensor_lr_is_one_graph() -> None:
    with torch._inductor.config.patch({"triton.cudagraphs": True}):
        pairs = twins(
            lambda ps: fo.optim.AdamW(ps, lr=torch.tensor(0.1, dtype=torch.float64))
        )
        pairs[0][1].init_state()
        compiled = torch.compile(pairs[0][1].step, fullgraph=True)
        assert follow(pairs, [compiled, pairs[1][1].step], 4, shrink, 1e-10) == [
            1,
            1,
            1,
            1,
        ]


def test_42_no_name_that_dynamo_takes_for_init_group() -> None:
    """It asks ``name in "_init_group"``: a substring would do."""
    opt = fo.optim.AdamW(make_params())
    names = {
        *vars(opt),
        *(
            name
            for cls in type(opt).__mro__[: -len(torch.optim.Optimizer.__mro__)]
            for name in vars(cls)
        ),
    }
    assert "step" in names and not [name for name in names if name in "_init_group"]
    assert not hasattr(opt, "_init_group")
    assert inspect.isfunction(type(opt).step)


@pytest.mark.slow
@pytest.mark.parametrize("compile", [False, True], ids=["by the user", "by compile=True"])
def test_43_compiled_equals_eager_with_missing_gradients(compile: bool) -> None:
    """With Inductor: 7 steps, one without gradients and three with a frozen tensor; parameters and
    state are compared.
    """
    ours, theirs = make_params(), make_params()
    opt, twin = (
        fo.optim.AdamW(ours, lr=0.1, amsgrad=True, compile=compile),
        torch.optim.AdamW(theirs, lr=0.1, amsgrad=True),
    )
    opt.init_state()
    step = opt.step if compile else torch.compile(opt.step, fullgraph=True)
    for k in range(7):
        missing = {2: range(5), 3: (1,), 4: (1,), 5: (1,)}.get(k, ())
        set_grads(ours, k, missing)
        set_grads(theirs, k, missing)
        step()
        twin.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-10)
        for key, value in twin.state[q].items():
            torch.testing.assert_close(
                opt.state[p][key], value, rtol=1e-10, atol=1e-10, check_dtype=False
            )
