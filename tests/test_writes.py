"""What runs in place reads everything as it was: all is written that `update` says, and no more."""

from __future__ import annotations

import threading
import warnings

import pytest
import torch
from test_laws import assert_same
from torch import Tensor

import functorch_opt as fo
from functorch_opt import tree
from functorch_opt._execution.compiled import CompiledStep
from functorch_opt._execution.kernel import Program
from functorch_opt._execution.trials import Untraceable, WrongCode, warn_uncompiled
from functorch_opt._execution.writes import run_eagerly

BF16, INT, BOOL = torch.bfloat16, torch.int64, torch.bool
WIDE, TALL, SQUARE = (6, 7), (7, 6), (7, 7)


def swap(a, b):
    return [(0, b), (1, a)]


def circle(a, b, c, d):
    return [(0, b), (1, c), (2, a), (3, a + d)]


CASES = {
    "history of gradients": (lambda g, p, a, b: [(1, p - g - a - b), (2, g), (3, a)], "4 vectors"),
    "history, the other way round": (lambda g, p, a, b: [(3, a), (2, g), (1, p - a)], "4 vectors"),
    "history cloned": (lambda g, a, b, c: [(3, b.clone()), (2, a.clone()), (1, g)], "4 vectors"),
    "a clone that is read late": (lambda a, b: [(0, b * 2), (1, a.clone() + 1)], "2 vectors"),
    "delayed by a step": (lambda g, p, old: [(1, p + old), (2, g)], "3 vectors"),
    "the parameter before": (lambda g, p, old: [(1, p - g + old), (2, p)], "3 vectors"),
    "the parameter from a slot": (lambda p, slot: [(0, slot), (1, slot / 2)], "2 vectors"),
    "swap": (swap, "2 vectors"),
    "swap of clones": (lambda a, b: [(0, b.clone()), (1, a.clone())], "2 vectors"),
    "swap of views": (lambda a, b: [(0, b.view(-1).view(b.shape)), (1, a)], [WIDE, WIDE]),
    "swap of transposes": (lambda a, b: [(0, b.t()), (1, a.t())], [WIDE, TALL]),
    "swap of bits": (lambda a, b: [(0, b.view(torch.int32)), (1, a.view(torch.float32))], "bits"),
    "circle": (circle, "4 vectors"),
    "circle and who reads it": (lambda a, b, c: [(2, a), (0, b), (1, a.clone())], "3 vectors"),
    "nothing new": (lambda a, b, c: [(0, a), (1, b.clone()), (2, c.detach())], "3 vectors"),
    "transpose of itself": (lambda a, b: [(0, a.t()), (1, a + b)], [SQUARE, SQUARE]),
    "contiguous transpose": (lambda a, b: [(0, a.t().contiguous()), (1, a)], [SQUARE, SQUARE]),
    "flipped": (lambda a, b: [(0, a.flip(0)), (1, a.flip(0, 1))], [WIDE, WIDE]),
    "rolled": (lambda a, b: [(0, a.roll(1)), (1, a)], [WIDE, WIDE]),
    "a row for all": (lambda a, b: [(0, b[:1].expand(b.shape)), (1, a)], [WIDE, WIDE]),
    "a row of itself": (lambda a, b: [(0, a[:, :1].expand_as(a)), (1, a * 2)], [WIDE, WIDE]),
    "means": (lambda a, b: [(0, b.mean(-1, True).expand_as(b)), (1, a)], [WIDE, WIDE]),
    "a number": (lambda a, b, n: [(0, a * n), (1, n.expand(b.shape)), (2, b.sum())], "number"),
    "narrow and wide": (lambda g, p, a, b: [(1, p + g), (2, g), (3, p)], "narrow and wide"),
    "swap of dtypes": (swap, "dtypes"),
    "swap of integers": (swap, "integers"),
    "swap of booleans": (swap, "booleans"),
    "rounded integers": (lambda a, b: [(0, b.floor()), (1, a.ceil())], "integers"),
    "in place, on its own": (lambda a, b: [(0, torch.zeros_like(a).add_(b)), (1, a)], "2 vectors"),
}
KINDS = {
    "number": [((9,), None), ((9,), None), ((), None)],
    "bits": [((9,), torch.int32), ((9,), None)],
    "narrow and wide": [((9,), BF16), ((9,), BF16), ((9,), None), ((9,), None)],
    "dtypes": [((9,), BF16), ((9,), None)],
    "integers": [((9,), INT), ((9,), INT)],
    "booleans": [((9,), BOOL), ((9,), BOOL)],
}


def _kinds(kind: str) -> list[tuple]:
    return KINDS.get(kind) or [((9,), None)] * int(kind[0])


def drawn(kind: str | list[tuple[int, ...]], seed: int) -> list[Tensor]:
    kinds = [(shape, None) for shape in kind] if isinstance(kind, list) else _kinds(kind)
    generator = torch.Generator().manual_seed(seed)
    return [
        (8 * torch.randn(shape, generator=generator)).to(dtype or torch.float32)
        for shape, dtype in kinds
    ]


BACKENDS = ["none", "eager", pytest.param("inductor", marks=pytest.mark.slow)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_all_is_read_before_anything_is_written(name: str, backend: str) -> None:
    function, kind = CASES[name]

    def f(args: list[Tensor]) -> list[tuple[int, Tensor]]:
        return function(*args)

    args = drawn(kind, 0)
    expected = [x.clone() for x in args]
    for i, value in [(i, value.clone()) for i, value in f(args)]:
        expected[i] = value.to(args[i].dtype)
    if backend == "none":
        run_eagerly(f, args)
    else:
        program = Program(f, drawn(kind, 1), 1, backend)
        program(args)
    assert_same(args, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_rules_that_return_what_they_were_given(backend: str) -> None:
    """Over steps, in a chain, against `update` and `apply_updates`."""

    def history(g, last, before):
        return -(g + last + before) / 3, {"last": g, "before": last.clone()}

    def momentum(g, p, old):
        return -0.1 * g + 0.5 * (p - old), {"old": p}

    def turns(g, a, b):
        return g * a, {"a": b, "b": a}

    zeros = {"last": torch.zeros_like, "before": torch.zeros_like}
    ones = {"a": torch.ones_like, "b": tree.zeros_like}
    tx = fo.chain(
        fo.leafwise(history, slots=zeros),
        fo.leafwise(turns, slots=ones),
        fo.leafwise(momentum, slots={"old": torch.clone}),
    )
    ps, step = [torch.randn(4, 3), torch.randn(5)], CompiledStep(tx, True, backend=backend)
    mine = tree.map(torch.clone, ps)
    state, ours = tx.init(ps), tx.init(mine)
    for _ in range(4):
        gs = [torch.randn(4, 3), torch.randn(5)]
        updates, state = tx.update(gs, state, ps)
        ps = fo.apply_updates(ps, updates)
        mine, ours = step(mine, gs, ours)
        assert_same((mine, ours), (ps, state), rtol=1e-5, atol=1e-6)


# ---- trials --------------------------------------------------------------------------------------


def add(args: list[Tensor]) -> list[tuple[int, Tensor]]:
    return [(0, args[0] + args[1])]


def wrong(graph, inputs):
    """A compiler that forgets the last element of each tensor."""

    def run(*args):
        kept = [x[-1:].clone() for x in args]
        graph(*args)
        for x, last in zip(args, kept, strict=True):
            x[-1:] = last

    return run


def failing(graph, inputs):
    def run(*args):
        raise NameError("name 's57' is not defined")

    return run


@pytest.mark.parametrize(
    ("backend", "message"), [(wrong, "other numbers than the rules"), (failing, "'s57'")]
)
def test_wrong_code_is_found_out_and_not_used(backend, message: str) -> None:
    with pytest.raises(WrongCode, match=message):
        Program(add, [torch.ones(4), torch.ones(4)], 1, backend)
    tx, ps, gs = fo.sgd(0.1), {"w": torch.ones(5)}, {"w": torch.ones(5)}
    step = CompiledStep(tx, True, backend=backend)
    with pytest.warns(UserWarning, match=f"runs eagerly.*{message}.*Please report it"):
        ps, state = step(ps, gs, tx.init(ps))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ps, _ = step(ps, gs, state)
    assert_same(ps, {"w": torch.full((5,), 0.8)}, rtol=1e-6, atol=0)


def test_a_rule_that_cannot_be_traced_says_so() -> None:
    tx = fo.leafwise(lambda g: -g if g.sum() > 0 else g)
    ps, gs = [torch.zeros(3)], [torch.ones(3)]
    step = CompiledStep(tx, True, backend="eager")
    with pytest.warns(UserWarning, match=r"cannot be traced.*without Python's `if`"):
        ps, _ = step(ps, gs, tx.init(ps))
    assert_same(ps, [-torch.ones(3)])


def test_a_rule_must_not_write_into_what_it_is_given() -> None:
    with pytest.raises(Untraceable, match="writes into a tensor that it was given"):
        Program(lambda args: [(0, args[1].add_(1))], [torch.ones(3), torch.ones(3)], 1, "eager")


def test_a_tie_is_no_wrong_code() -> None:
    """A rule that compares may come out otherwise where two ways to compute differ by rounding."""
    trials = []

    def once(graph, inputs):
        def run(*args):
            graph(*args)
            if not trials:
                args[0].add_(1)
            trials.append(args)

        return run

    Program(add, [torch.ones(4), torch.ones(4)], 1, once)
    assert len(trials) == 3


def test_trials_are_of_two_sizes_and_leave_the_examples_alone() -> None:
    seen = []

    def looks(graph, inputs):
        return lambda *args: seen.append([*args[0].shape]) or graph(*args)

    examples = [torch.ones(4, 6), torch.ones(4, 6)]
    Program(add, examples, 1, looks)
    assert len(seen) == 2 and seen[0] != seen[1]
    assert_same(examples, [torch.ones(4, 6)] * 2)


def test_sizes_that_the_trace_has_settled_are_kept_to() -> None:
    """Here the sizes divide by four, and the trial finds such."""
    seen = []

    def halves(args: list[Tensor]) -> list[tuple[int, Tensor]]:
        x = args[0].view(args[0].shape[0] // 4, 4).flip(1)
        return [(0, x.reshape(-1) if args[0].shape[0] % 4 == 0 else args[0])]

    def looks(graph, inputs):
        return lambda *args: seen.append(len(args[0])) or graph(*args)

    Program(halves, [torch.ones(12)], 1, looks)
    assert len(seen) == 2 and all(n % 4 == 0 for n in seen)


@pytest.mark.parametrize(
    ("error", "cure"),
    [
        (RuntimeError("no compiler"), "C\\+\\+ compiler"),
        (WrongCode("other numbers"), "report"),
        (Untraceable("if"), "torch's operations"),
    ],
)
def test_each_reason_has_its_cure(error: Exception, cure: str) -> None:
    with pytest.warns(
        UserWarning, match=f"it runs eagerly, for compiling failed: {error}. .*{cure}"
    ):
        warn_uncompiled("it runs eagerly", error)


# ---- threads -------------------------------------------------------------------------------------


def test_programs_are_made_in_several_threads() -> None:
    errors: list[Exception] = []

    def make(k: int) -> None:
        try:
            args = [torch.full((k + 2,), 1.0), torch.full((k + 2,), 2.0)]
            Program(add, [torch.ones(4), torch.ones(4)], 1, "eager")(args)
            assert_same(args[0], torch.full((k + 2,), 3.0))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=make, args=(k,)) for k in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
