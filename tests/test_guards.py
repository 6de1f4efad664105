"""Code that is kept is used only as long as all that its functions read is what it was."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import functorch_opt as fo
from functorch_opt import tree
from functorch_opt._execution import again
from functorch_opt._execution.compiled import CompiledStep
from functorch_opt._execution.guards import Meaning
from functorch_opt._execution.programs import PROGRAMS
from functorch_opt._execution.together import KNOWN

Read = Callable[[], Any]
Change = Callable[[float], None]


class Settings:
    rate = 0.1


class Special(Settings):
    """Has the attribute of its base."""


class Methods:
    rate = 0.1

    @staticmethod
    def fixed() -> float:
        return Methods.rate

    @classmethod
    def of_class(cls) -> float:
        return cls.rate


def of_class() -> tuple[Read, Change]:
    return lambda: Settings.rate, lambda x: setattr(Settings, "rate", x)


def of_base() -> tuple[Read, Change]:
    return lambda: Special.rate, lambda x: setattr(Settings, "rate", x)


def of_static_method() -> tuple[Read, Change]:
    return lambda: Methods.fixed(), lambda x: setattr(Methods, "rate", x)


def of_class_method() -> tuple[Read, Change]:
    return lambda: Methods.of_class(), lambda x: setattr(Methods, "rate", x)


def of_function() -> tuple[Read, Change]:
    def read() -> float:
        return read.rate  # type: ignore[attr-defined]

    return read, lambda x: setattr(read, "rate", x)


def of_defaults() -> tuple[Read, Change]:
    def read(x: float = 0.1) -> float:
        return x

    return read, lambda x: setattr(read, "__defaults__", (x,))


def of_keyword_defaults() -> tuple[Read, Change]:
    def read(*, x: float = 0.1) -> float:
        return x

    return read, lambda x: setattr(read, "__kwdefaults__", {"x": x})


def of_array() -> tuple[Read, Change]:
    array = np.array([0.1])
    return lambda: float(array[0]), lambda x: array.__setitem__(0, x)


def of_bound_method() -> tuple[Read, Change]:
    known = {"rate": 0.1}
    get = known.get
    return lambda: get("rate"), lambda x: known.__setitem__("rate", x)


def of_text() -> tuple[Read, Change]:
    known = types.ModuleType("known")
    name = "rate"
    return lambda: getattr(known, "rate"), lambda x: setattr(known, name, x)  # noqa: B009


def of_tuple() -> tuple[Read, Change]:
    class Own(tuple):
        rate: float

    own = Own((1,))
    return lambda: own.rate, lambda x: setattr(own, "rate", x)


def of_optimizer() -> tuple[Read, Change]:
    opt = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    group = opt.param_groups[0]
    return lambda: opt.param_groups[0]["lr"], lambda x: group.__setitem__("lr", x)


def of_data() -> tuple[Read, Change]:
    number = torch.tensor(0.1)
    return lambda: number * 1.0, lambda x: number.data.fill_(x) and None


def of_parameter() -> tuple[Read, Change]:
    number = torch.nn.Parameter(torch.tensor(0.1))

    def change(x: float) -> None:
        number.data = torch.tensor(x)

    return lambda: number * 1.0, change


def of_shared_memory() -> tuple[Read, Change]:
    array = np.array([0.1])
    number = torch.from_numpy(array)[0]
    return lambda: number * 1.0, lambda x: array.__setitem__(0, x)


SOURCES = [
    of_class,
    of_base,
    of_static_method,
    of_class_method,
    of_function,
    of_defaults,
    of_keyword_defaults,
    of_array,
    of_bound_method,
    of_text,
    of_tuple,
    of_optimizer,
    of_data,
    of_parameter,
    of_shared_memory,
]


def in_rule(read: Read) -> fo.GradientTransformation:
    return fo.leafwise(lambda g: -read() * g)


def in_prepare(read: Read) -> fo.GradientTransformation:
    def prepare(count: Tensor) -> dict[str, Any]:
        return {"rate": read(), "one": 1.0 / (1.0 + 0 * count)}

    def rule(g: Tensor, rate: Any, one: Tensor) -> Tensor:
        return -rate * one * g

    return fo.leafwise(rule, prepare)


def in_schedule(read: Read) -> fo.GradientTransformation:
    return fo.scale_by_learning_rate(lambda count: read() / (1.0 + 0 * count))


@pytest.mark.filterwarnings("ignore:compiled_step")
@pytest.mark.parametrize("where", [in_rule, in_prepare, in_schedule])
@pytest.mark.parametrize("source", SOURCES)
def test_what_a_function_reads_may_change_between_steps(
    source: Callable[[], tuple[Read, Change]],
    where: Callable[[Read], fo.GradientTransformation],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(again, "STEPS", 0)
    monkeypatch.setattr(KNOWN, "made", KNOWN.made.__class__())
    monkeypatch.setattr(PROGRAMS, "made", PROGRAMS.made.__class__())
    read, change = source()
    change(0.1)
    tx = where(read)
    backend = "inductor" if source in (of_data, of_parameter) else "eager"
    step, ps = CompiledStep(tx, True, backend), {"w": torch.randn(5)}
    state = tx.init(ps)
    for rate in (0.1, 0.1, 0.1, 0.1, 0.7, 0.7, 0.3):
        change(rate)
        before, gs = tree.map(torch.clone, ps), {"w": torch.randn(5)}
        ps, state = step(ps, gs, state)
        torch.testing.assert_close(ps["w"], before["w"] - rate * gs["w"])
    change(0.1)


def test_functions_that_read_a_class_are_compiled() -> None:
    """A class with attributes can be looked into, and one with methods that are read cannot."""
    assert Meaning(lambda: Settings.rate).unknown is None
    assert Meaning(lambda: Methods.fixed()).unknown is None
    assert "classmethod" in str(Meaning(lambda: Methods.of_class()).unknown)
