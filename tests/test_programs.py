"""The law over random transformations: `update` and `apply_updates` are the meaning, and every
execution gives the same numbers.

The programs of the fixed seeds are the same in every run; some more have seeds that change with
it, and FO_SEED sets where those begin. A failure shows the smallest program found that fails in
the same execution, as source; `make fuzz` looks at many more.
"""

from __future__ import annotations

import os
import time

import pytest
import torch
from executions import DYNAMO, EAGER, INDUCTOR, Unfit, check, first_difference, smallest
from programs import program

FIXED, CHANGING = 400, 100
BEGIN = int(os.environ.get("FO_SEED", time.time_ns() // 1000 % 10**9))
COMPILED = 44
TRACED_BY_DYNAMO = 12


def obey(seed: int, names: list[str]) -> None:
    """The law, for one program and these executions."""
    try:
        failures = check(program(seed), names)
    except Unfit as reason:
        pytest.skip(f"no program to compare with: {str(reason).splitlines()[0]}")
    if failures:
        others = ", ".join(failure.execution for failure in failures[1:])
        shown = smallest(failures[0], tries=0 if names[0] in INDUCTOR else 150)
        also = f"It fails as well in {others}.\n\n" if others else ""
        pytest.fail(f"FO_SEED={seed}\n\n{also}{shown}", pytrace=False)


@pytest.mark.parametrize("seed", range(FIXED))
def test_every_execution_gives_the_numbers_of_update(seed: int) -> None:
    obey(seed, [*EAGER])


@pytest.mark.parametrize("k", range(CHANGING))
def test_and_of_programs_that_nobody_has_seen(k: int) -> None:
    """Other programs in every run. The message of a failure says what FO_SEED to set to see it
    again, as ``k = 0``.
    """
    obey(BEGIN + k, [*EAGER])


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10_000, 10_000 + COMPILED))
def test_compiled_by_inductor(seed: int) -> None:
    """Each program in two of the executions that Inductor makes code for, in turn."""
    names = [*INDUCTOR]
    torch._dynamo.reset()
    obey(seed, [names[seed % len(names)], names[(seed + 3) % len(names)]])


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20_000, 20_000 + TRACED_BY_DYNAMO))
def test_in_a_graph_of_somebody_elses(seed: int) -> None:
    torch._dynamo.reset()
    obey(seed, [*DYNAMO])


# ---- the law itself ------------------------------------------------------------------------------


def test_a_program_depends_on_its_seed_only() -> None:
    for seed in range(50):
        assert program(seed).source() == program(seed).source()
    assert program(1).source() != program(2).source()


def test_programs_are_of_all_kinds() -> None:
    """What the generator promises to write, it writes."""
    text = "\n".join(program(seed).source() for seed in range(FIXED))
    wanted = [
        "lambda p: p}",
        "new_zeros(()).expand",
        "turned(",
        ".view(",
        "count % 2",
        "sums=",
        "own=True",
    ]
    wanted += [
        "shared=",
        "fo.partition(",
        "fo.masked(",
        "fo.keep_master_weights(",
        "fo.params_ema(",
    ]
    wanted += [
        "fo.inject_hyperparams(stage",
        "def skipping",
        "def accumulating",
        "def looking_ahead",
    ]
    wanted += [
        "def with_previous",
        "def remember",
        'kind="tensorwise"',
        "= params\n",
        "= updates\n",
    ]
    wanted += [
        "None",
        "with_nan(draw",
        ".expand(",
        "[..., 1]",
        ".t()",
        "bfloat16",
        "float64",
        "of_0 =",
    ]
    assert [piece for piece in wanted if piece not in text] == []


def unfit(seed: int) -> bool:
    try:
        check(program(seed), [])
    except Unfit:
        return True
    return False


def test_nearly_every_program_can_be_compared() -> None:
    assert sum(unfit(seed) for seed in range(100)) <= 3


def test_what_is_off_is_seen() -> None:
    """A law that never fails is no law: a number that is off by a thousandth, a NaN, a dtype, a
    tensor that is not there.
    """
    x = torch.tensor([1.0, 2.0])
    others = [x * 1.001, torch.tensor([1.0, float("nan")]), x.double(), x[:1]]
    for y in [*others, None]:
        seen = [{"params/w": x}], [{} if y is None else {"params/w": y}]
        difference = first_difference(*seen, [1e-4])
        assert difference is not None and difference.path == "params/w"
    assert first_difference([{"params/w": x}], [{"params/w": x.clone()}], [1e-4]) is None
