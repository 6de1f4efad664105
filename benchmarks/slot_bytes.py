"""The bytes that every optimizer keeps for an element of a matrix, with its slots in each code."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import functorch_opt as fo
from benchmarks import report
from functorch_opt.codecs.codec import CODECS

SIZE = 512
"""Rows and columns of the matrix."""
USUAL = "float32"


def every_class() -> dict[str, type[fo.optim.Optimizer]]:
    """The optimizers of `fo.optim`, by their names."""
    found = {}
    for name in fo.optim.__all__:
        value = getattr(fo.optim, name)
        is_class = inspect.isclass(value) and issubclass(value, fo.optim.Optimizer)
        if is_class and name not in ("Optimizer", "Partition"):
            found[name] = value
    return found


def required(cls: type) -> dict[str, Any]:
    """The arguments without a default, other than the parameters."""
    _, *rest = inspect.signature(cls).parameters.values()
    given: dict[str, Any] = {}
    for argument in rest:
        is_needed = argument.default is argument.empty
        if is_needed and argument.kind is not argument.VAR_KEYWORD:
            given[argument.name] = 0.01 if argument.name == "lr" else 8
    return given


def kept(opt: torch.optim.Optimizer, p: Tensor) -> float:
    """The bytes of the slots of `p` for each element; counts and keys are left out.

    A tensor of another library may hold several, and so may it hold its map.
    """
    parts: list[Tensor] = []
    for x in opt.state[p].values():
        if not isinstance(x, Tensor) or not x.dim():
            continue
        if hasattr(x, "__tensor_flatten__"):
            parts += [getattr(x, name) for name in x.__tensor_flatten__()[0]]
        else:
            parts.append(x)
    return sum(x.nbytes for x in parts) / p.numel()


def of_code(code: str) -> float:
    """The bytes of a slot for each element of a large tensor."""
    if code not in CODECS:
        return 4
    codec = CODECS[code]
    of_scales = codec.of_scales.itemsize / codec.block if codec.block else 0
    return codec.dtype.itemsize / codec.packed + of_scales


def predicted(make: Callable[..., Any], code: str) -> float:
    """What `kept` should find: slots of zeros in the code, and all others as they are."""
    opt, p = state_of(make, USUAL)
    total = 0.0
    for x in opt.state[p].values():
        if not x.dim():
            continue
        is_coded = x.numel() == p.numel() and x.is_floating_point() and not x.any()
        total += of_code(code) * p.numel() if is_coded else x.nbytes
    return total / p.numel()


def state_of(make: Callable[..., Any], code: str) -> tuple[Any, nn.Parameter]:
    """An optimizer with its first state, and its parameter."""
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(SIZE, SIZE))
    opt = make([("w", p)], state=code)
    opt.init_state()
    return opt, p


def of_one(make: Callable[..., Any], code: str) -> float | None:
    """The bytes for each element, or None if the optimizer has no slot for this code."""
    try:
        return kept(*state_of(make, code))
    except ValueError:
        return None


def measured(codes: Sequence[str], names: Sequence[str] | None) -> list[dict[str, Any]]:
    """For each optimizer the bytes with each code, predicted and measured."""
    classes = every_class()
    rows = []
    for name in report.track(names or [*classes], "bytes of every optimizer"):
        make = partial(classes[name], **required(classes[name]))
        row: dict[str, Any] = {"row": name}
        for code in codes:
            row[code] = {"predicted": predicted(make, code), "bytes": of_one(make, code)}
        rows.append(row)
    return rows


def show(rows: list[dict[str, Any]], codes: Sequence[str]) -> None:
    """A table with one line for all optimizers that keep the same bytes."""
    lines: dict[tuple[str, ...], list[str]] = {}
    for row in rows:
        cells = tuple([cell(**row[code]) for code in codes])
        lines.setdefault(cells, []).append(row["row"])
    shown = [[", ".join(names), *cells] for cells, names in sorted(lines.items())]
    title = f"bytes of slots for each element of a matrix of {SIZE} x {SIZE}"
    report.table(title, ["", *codes], shown, numbers_from=1)


def cell(predicted: float, bytes: float | None) -> str:
    """The bytes, and what was predicted if that differs."""
    if bytes is None:
        return "-"
    found, expected = f"{bytes:.2f}", f"{predicted:.2f}"
    return found if found == expected else f"{found} ({expected} predicted)"
