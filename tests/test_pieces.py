"""The eager execution in place: large tensors in pieces, small ones joined."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from registry import ROWS
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import functorch_opt as fo
from functorch_opt import tree
from functorch_opt._execution import pieces, stacked
from functorch_opt._execution.compiled import CompiledStep
from functorch_opt._execution.segments import IN_PIECES
from functorch_opt._execution.stretches import Stretches

SHAPES = {
    "a": (9, 5),
    "b": (7,),
    "c": (2, 2),
    "d": (2, 3, 2),
    "e": (40,),
    "f": (1,),
    "g": (),
}
DTYPES = [torch.float32, torch.float64, torch.bfloat16]


def draw(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator).to(dtype)
        for name, shape in SHAPES.items()
    }


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PIECE", 16)


def ways(step: CompiledStep) -> set[str]:
    """How tensors went through the rules, large and small ones."""
    parts = [p for of in step.segments.values() for segment in of for p in segment.parts]
    programs = [part.program for part in parts]
    small = [p.small for p in programs if isinstance(p, Stretches)]
    return {type(program).__name__ for program in (*programs, *small)}


def after(
    tx: fo.GradientTransformation, dtype: torch.dtype = torch.float32, steps: int = 4
) -> set[str]:
    """Compare steps in pieces with `update`. Returns how tensors went through the rules."""
    ps, step = draw(0, dtype), CompiledStep(tx, True, IN_PIECES)
    mine = tree.map(torch.clone, ps)
    state, held = tx.init(ps), tx.init(mine)
    for k in range(1, steps + 1):
        gs = draw(k, dtype)
        updates, state = tx.update(gs, state, ps)
        ps = fo.apply_updates(ps, updates)
        mine, held = step(mine, gs, held)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(mine, ps, rtol=4 * eps, atol=4 * eps)
    torch.testing.assert_close(
        fo.state_dict(held), fo.state_dict(state), rtol=1e-6, atol=1e-6
    )
    return ways(step)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "make",
    [
        lambda: fo.adamw(0.1),
        lambda: fo.sgd(0.1, momentum=0.9),
        lambda: fo.chain(fo.clip_by_global_norm(1.0), fo.lion(0.1), fo.params_ema(0.9)),
        lambda: fo.adamw(0.1, mask=lambda path, p: p.dim() > 1),
        lambda: fo.keep_master_weights(fo.adam(0.1)),
    ],
)
def test_pieces_give_the_numbers_of_whole_tensors(
    make: Callable[[], fo.GradientTransformation], dtype: torch.dtype
) -> None:
    assert "Pieces" in after(make(), dtype)


def normalize() -> fo.GradientTransformation:
    return fo.leafwise(lambda g: g / g.norm(), kind="tensorwise")


def keep_and_turn() -> fo.GradientTransformation:
    """The slot becomes the update as it came in, and the update what the slot was."""
    return fo.leafwise(
        lambda g, old: (old, {"old": g}),
        slots={"old": torch.ones_like},
        kind="tensorwise",
    )


def seen_by(layers: Any) -> fo.GradientTransformation:
    return fo.monitor(layers=layers)


STRETCHES = {
    "at the front": lambda: [normalize(), fo.adamw(0.1)],
    "at the end": lambda: [fo.adamw(0.1), normalize()],
    "between": lambda: [fo.trace(0.9), normalize(), fo.scale(-0.1)],
    "two of them": lambda: [fo.trace(0.9), normalize(), keep_and_turn(), fo.scale(-0.1)],
    "at both ends": lambda: [
        seen_by({"before": torch.norm}),
        fo.adamw(0.1),
        seen_by({"after": lambda u, p: u.norm() / p.norm()}),
    ],
    "sums": lambda: [fo.scale_by_adam(), fo.scale_by_trust_ratio(), fo.scale(-0.1)],
    "in a wrapper": lambda: [
        fo.trace(0.9),
        fo.keep_master_weights(fo.chain(normalize(), fo.sgd(0.1, momentum=0.9))),
    ],
    "behind a gate": lambda: [
        fo.trace(0.9),
        fo.gate(normalize(), lambda count: count % 2 == 0, otherwise="pass"),
        fo.scale(-0.1),
    ],
    "in a group": lambda: [
        fo.trace(0.9),
        fo.masked(normalize(), lambda path, p: p.dim() > 1),
        fo.scale(-0.1),
    ],
    "before a look at all": lambda: [
        fo.trace(0.9),
        normalize(),
        fo.scale(-0.1),
        fo.clip_by_global_norm(0.1),
    ],
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", STRETCHES)
def test_rules_of_both_kinds_give_the_numbers_of_whole_tensors(
    name: str, dtype: torch.dtype
) -> None:
    """What is elementwise goes in pieces, before a rule that sees the whole and behind it."""
    assert "Stretches" in after(fo.chain(*STRETCHES[name]()), dtype)


def test_a_rule_may_choose_the_dtype_between_stretches() -> None:
    rounded = fo.leafwise(lambda g: g.bfloat16())
    tx = fo.chain(rounded, normalize(), fo.leafwise(lambda g: g.float() / 3))
    assert "Stretches" in after(tx, torch.float32)


NOT_ELEMENTWISE = {
    "a norm": lambda g: g / g.norm(),
    "a norm that is mostly small": lambda g: g / g.norm().div(100).clamp(min=1),
    "a running sum": lambda g: g.view(-1).cumsum(0).view_as(g),
    "the order": lambda g: g.flip(0) if g.dim() else g,
    "the number of dims": lambda g: 2 * g if g.dim() > 1 else g,
    "the number of elements": lambda g: g / g.numel(),
    "a look at the numbers": lambda g: g if bool((g > 100).any()) else 2 * g,
}


@pytest.mark.parametrize("rule", NOT_ELEMENTWISE.values(), ids=NOT_ELEMENTWISE)
def test_a_rule_that_is_not_elementwise_sees_whole_tensors(rule: Any) -> None:
    """Although it is declared to be."""
    assert "Whole" in after(fo.leafwise(rule))


def test_sums_and_tensorwise_rules_see_whole_tensors() -> None:
    centered = fo.leafwise(lambda g: g - g.mean(), kind="tensorwise")
    assert "Pieces" not in after(centered)
    assert "Pieces" not in after(fo.scale_by_trust_ratio())


def test_rules_with_sums_are_not_tried_in_pieces() -> None:
    """A trial has positive numbers only, and of a sum that makes no number of a tensor it may see
    nothing."""

    def rule(g, p, n):
        return torch.maximum(g, p / n)

    tx = fo.leafwise(rule, sums={"n": lambda g: g.numel()})
    assert after(tx) == {"Whole"}


def test_numbers_of_each_leaf_are_those_of_its_elements() -> None:
    """What the groups of a stateful optimizer differ in is one number for each parameter."""
    given = draw(0)

    def made(make: Any) -> tuple[dict[str, Tensor], Any]:
        ps = {name: torch.nn.Parameter(x.clone()) for name, x in given.items()}
        first = {"params": [ps[n] for n in "abc"], "weight_decay": 0.5, "lr": 0.1}
        last = {"params": [ps[n] for n in "defg"], "weight_decay": 0.0, "lr": 0.2}
        return ps, make([first, last])

    params, opt = made(fo.optim.AdamW)
    theirs, reference = made(torch.optim.AdamW)
    for k in range(1, 5):
        for name, g in draw(k).items():
            params[name].grad, theirs[name].grad = g.clone(), g.clone()
        opt.step()
        reference.step()
    torch.testing.assert_close(params, theirs)


def most_alive(make: Callable[[torch.nn.Parameter], torch.optim.Optimizer]) -> float:
    """The most that is alive at a time during a step, counted by torch's profiler, as a share of the
    parameter's bytes."""
    p = torch.nn.Parameter(torch.randn(400, 400))
    p.grad = torch.randn_like(p)
    opt = make(p)
    opt.step()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        opt.step()
    events = [
        e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"
    ]
    alive, most = 0, 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        alive += event.nbytes()
        most = max(most, alive)
    return most / p.nbytes


def test_a_step_needs_the_memory_of_some_pieces() -> None:
    assert 0 < most_alive(lambda p: fo.optim.AdamW([p])) < 0.05


def test_a_look_at_whole_updates_needs_the_memory_of_one() -> None:
    tx = fo.chain(fo.adamw(0.1), fo.monitor(layers={"norm": torch.norm}))
    assert 1 < most_alive(lambda p: fo.optim.Optimizer([p], tx)) < 1.05


class Counted(TorchDispatchMode):
    """How many operations are dispatched."""

    n = 0

    def __torch_dispatch__(
        self, f: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.n += not getattr(f, "is_view", False)
        return f(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "tx",
    [
        fo.adamw(0.1),
        fo.chain(fo.clip(1.0), fo.trace(0.9), fo.scale(-0.1)),
        fo.inject_hyperparams(fo.lion)(learning_rate=0.1),
        fo.MultiSteps(fo.sgd(0.1), 2),
        fo.sgd(0.1, momentum=0.9),
    ],
    ids=["adamw", "chain", "injected", "accumulated", "lists"],
)
def test_how_many_operations_a_step_takes_does_not_depend_on_the_tensors(
    tx: fo.GradientTransformation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "PIECE", 10_000)
    counts = []
    for n in (4, 60):
        ps = [torch.randn(3, 2 + i % 5) for i in range(n)]
        step, state = CompiledStep(tx, True, IN_PIECES), tx.init(ps)
        for _ in range(2):
            ps, state = step(ps, [torch.randn_like(p) for p in ps], state)
        gs = [torch.randn_like(p) for p in ps]
        with Counted() as counted:
            step(ps, gs, state)
        counts.append(counted.n)
    assert counts[0] == counts[1] > 0


def test_pieces_are_larger_where_calls_take_the_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pieces, "ELSEWHERE", 50)
    monkeypatch.setattr(pieces, "LISTS", 70)
    here, there = torch.empty(3), torch.empty(3, device="meta")
    assert [pieces.most_of(here, lists) for lists in (False, True)] == [16, 16]
    assert [pieces.most_of(there, lists) for lists in (False, True)] == [50, 70]


def test_an_error_in_a_rule_leaves_everything_as_it_was() -> None:
    """The rehearsal meets it before anything is written."""

    def rule(g, m):
        if g.dim() == 3:
            raise RuntimeError("no such tensors here")
        return -g, {"m": m + g}

    params = [torch.nn.Parameter(x) for x in draw(0).values()]
    tx = fo.leafwise(rule, slots={"m": torch.zeros_like})
    opt = fo.optim.Optimizer(params, tx)
    before = [p.detach().clone() for p in params]
    for p in params:
        p.grad = torch.ones_like(p)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no such tensors"):
            opt.step()
    assert all(torch.equal(p, x) for p, x in zip(params, before, strict=True))
    assert not opt.state


def test_parameters_that_overlap_get_the_updates_of_what_they_were() -> None:
    whole = torch.arange(1.0, 7.0)
    first, last = (torch.nn.Parameter(x) for x in (whole[:4], whole[2:]))
    first.grad, last.grad = torch.zeros(4), torch.zeros(4)
    fo.optim.SGD([first, last], lr=0.1, weight_decay=1.0).step()
    torch.testing.assert_close(whole, torch.tensor([0.9, 1.8, 2.4, 3.2, 4.5, 5.4]))


# ---- lists ---------------------------------------------------------------------------------------


def recorded(tx: Any) -> Any:
    """What the rules of `tx` do to a leaf, for lists."""
    params = [torch.randn(6) for _ in range(5)]
    step, state = CompiledStep(tx, True, IN_PIECES), tx.init(params)
    step(params, [torch.randn(6) for _ in params], state)
    ((segment,),) = step.segments.values()
    ((part,),) = [segment.parts]
    return part.program.lists


def test_a_rule_is_recorded_as_one_would_write_it() -> None:
    """In the memory of the slots, and of what nobody reads any more."""
    lists = recorded(fo.scale_by_adam())
    names = [x.name + "_" * x.in_place for x in lists.operations if x.name]
    assert names == ["lerp_", "mul", "lerp_", "add", "sqrt_", "mul_", "add_", "div"]
    momentum = recorded(fo.trace(0.9))
    assert [x.name + "_" * x.in_place for x in momentum.operations] == ["mul_", "add_"]
    assert len(momentum.moves) == 1


@pytest.fixture
def always_lists(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Wherever torch has all of it for lists, small tensors go through rules so."""
    runs: list[int] = []

    def unjoined(self: Any, p: Tensor) -> bool:
        runs.append(1)
        return True

    monkeypatch.setattr(pieces, "PIECE", 10_000)
    monkeypatch.setattr(pieces.Pieces, "_unjoined", unjoined)
    return runs


def keeps_the_gradient() -> fo.GradientTransformation:
    def rule(g, before):
        return g - before, {"before": g}

    return fo.leafwise(rule, slots={"before": torch.zeros_like})


def two_slots_change_places() -> fo.GradientTransformation:
    def rule(g, a, b):
        return g + a - b, {"a": b, "b": a + g}

    return fo.leafwise(rule, slots={"a": torch.zeros_like, "b": torch.zeros_like})


def reads_a_slot_again() -> fo.GradientTransformation:
    def rule(g, a):
        new = a * 0.5 + g
        return new - a / 3 + a, {"a": new}

    return fo.leafwise(rule, slots={"a": torch.zeros_like})


def numbers_first() -> fo.GradientTransformation:
    def rule(g, p):
        return 2 - g * p - (1 / (3 + p * p)) + 0.5 / (g * g + 1)

    return fo.leafwise(rule)


def a_number_of_the_step() -> fo.GradientTransformation:
    def rule(g, count, lr):
        return -(lr / (count + 1)) * g

    return fo.leafwise(rule, hyper={"lr": torch.tensor(0.3)})


OWN = [
    keeps_the_gradient,
    two_slots_change_places,
    reads_a_slot_again,
    numbers_first,
    a_number_of_the_step,
]


@pytest.mark.parametrize("make", OWN)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_lists_give_the_numbers_of_update(
    make: Any, dtype: torch.dtype, always_lists: list[int]
) -> None:
    assert after(make(), dtype) <= {"Pieces", "Whole"}


@pytest.mark.parametrize(
    "row", [row for row in ROWS if not row.keyed], ids=lambda row: row.name
)
def test_lists_give_the_numbers_of_every_row(row: Any, always_lists: list[int]) -> None:
    tx = row.make(**row.hyper)
    if not any(tx.extra_args.values()):
        after(tx, torch.float64)


def test_some_rows_go_through_lists(always_lists: list[int]) -> None:
    after(fo.adamw(0.1))
    after(fo.sgd(0.1, momentum=0.9))
    after(fo.lion(0.1))
    assert len(always_lists) >= 3


# ---- stacks --------------------------------------------------------------------------------------

MATRICES = [(6, 5), (6, 5), (3, 4), (6, 5), (40, 36), (2, 3, 4), (2, 3, 4), (5,)]
STACKABLE = {
    "muon": lambda: fo.muon(0.1),
    "centralize": lambda: fo.chain(fo.centralize(), fo.sgd(0.1, momentum=0.9)),
    "a norm": lambda: fo.leafwise(lambda g: g / g.norm(), kind="tensorwise"),
}


def drawn_matrices(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in MATRICES]


def in_stacks(tx: Any) -> tuple[set[str], int]:
    """Compare steps of matrices with `update`; how they went, and with how many operations."""
    ps, mine = drawn_matrices(0), drawn_matrices(0)
    step, state, held = CompiledStep(tx, True, IN_PIECES), tx.init(ps), tx.init(mine)
    for k in range(1, 4):
        updates, state = tx.update(drawn_matrices(k), state, ps)
        ps = fo.apply_updates(ps, updates)
        with Counted() as counted:
            mine, held = step(mine, drawn_matrices(k), held)
    torch.testing.assert_close(mine, ps, rtol=1e-5, atol=1e-5)
    return ways(step), counted.n


@pytest.mark.parametrize("name", STACKABLE)
def test_small_matrices_of_one_shape_are_stacked(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "PIECE", 10_000)
    found, together = in_stacks(STACKABLE[name]())
    assert "Stacked" in found
    monkeypatch.setattr(stacked, "SHORT", 0)
    _, alone = in_stacks(STACKABLE[name]())
    assert together < alone


@pytest.mark.parametrize("make", [fo.soap, fo.shampoo])
def test_what_may_fail_for_one_matrix_is_not_stacked(make: Any) -> None:
    """Where one cannot be decomposed, its stack could not."""
    assert "Stacked" not in in_stacks(make(0.1))[0]
