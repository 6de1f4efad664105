"""Loading a checkpoint into a stateful optimizer.

All of it is checked against what the optimizer expects before any of it counts.

The keys of ``state[p]`` are matched by name, as `functorch_opt._core.checkpoint.fit` does it. So
the checkpoint of a chain outlives a stage that is put in or taken out.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functorch_opt._core.checkpoint import Fit, fit, state_dict
from functorch_opt.optim.host import lies_apart, to_host
from functorch_opt.optim.params import on_meta
from functorch_opt.optim.plan import Plan

KEYS = {"step"}
"""What the classes with torch's names call their state."""


class Expected(NamedTuple):
    """What belongs under a key of ``state[p]``.

    It is a "slot", a "count", or what is "joint": of some parameters together, with one of them.
    """

    kind: str
    like: Tensor
    of: int = 0
    """By which parameters it is shared: those with the same number here."""
    on_host: bool = False
    """Whether it lies on the host, whatever device its parameter is on."""


def expectations(plan: Plan, params: list[Tensor]) -> list[dict[str, Expected]]:
    """For every parameter of a plan, the keys of its state."""
    first = state_dict(plan.tx.init(plan.tree(plan.given(on_meta(params)))))
    keys: list[dict[str, Expected]] = [
        {key: Expected("count", torch.zeros(())) for key in plan.counts.keys}
        for _ in params
    ]
    for place in plan.flat:
        if place and place.kind == "slot":
            mine = keys[place.i]
            apart = lies_apart(plan, place, params[place.i])
            mine[place.key] = Expected("slot", first[place.path], on_host=apart)
        elif place and place.kind == "joint":
            for mine in keys:
                mine[place.key] = Expected("joint", first[place.path], plan.place)
    return keys


def check_form(given: Any) -> None:
    """Raise TypeError or ValueError for what is no state dict of an optimizer."""
    if not isinstance(given, Mapping) or not {"state", "param_groups"} <= set(given):
        held = list(given) if isinstance(given, Mapping) else type(given).__name__
        raise TypeError(
            f"a state dict of an optimizer is a dict with 'state' and 'param_groups'; got {held}."
        )
    state, groups = given["state"], given["param_groups"]
    if not isinstance(state, Mapping) or not all(
        isinstance(entry, Mapping) or isinstance(key, str) for key, entry in state.items()
    ):
        raise TypeError(
            "'state' must be a dict from the number of a parameter to the dict of its tensors."
        )
    if not isinstance(groups, (list, tuple)) or not all(
        isinstance(g, Mapping) and isinstance(g.get("params"), (list, tuple))
        for g in groups
    ):
        raise TypeError(
            "'param_groups' must be a list of dicts with the numbers of their parameters under "
            "'params'."
        )
    numbers = _numbers(given)
    are_names = all(isinstance(number, (int, str)) for number in numbers)
    if not are_names or len(set(numbers)) < len(numbers):
        raise ValueError(
            "every parameter needs a number of its own in 'param_groups'; "
            f"got {[list(group['params']) for group in groups]}."
        )


def _numbers(given: Mapping[str, Any]) -> list[Any]:
    return [number for group in given["param_groups"] for number in group["params"]]


def fitted(
    given: Mapping[str, Any],
    params: list[Tensor],
    expected: list[dict[str, Expected]],
    optional: Collection[str],
) -> tuple[list[dict[str, Any]], Fit]:
    """The entries of ``state[p]``, copied from a state dict, and how well its names fitted.

    Those in `optional` may be missing.

    Raises:
        TypeError: a value that is no tensor, or one of another kind (integer for floating, real for
            complex).
        ValueError: a shape that differs; a count that is no whole number from 0.

    What is not called like the state of an optimizer is somebody else's, and comes along.
    """
    numbers = _numbers(given)
    saved = [_entry(given, number) for number in numbers]
    keys_here = [key for keys in expected for key in keys]
    names = fit(keys_here, [key for entry in saved for key in entry])
    somebodys = {key for entry in saved for key in entry if _is_somebodys(key)}
    saved, others = _parted(saved, somebodys - set(names.source.values()))
    shared = _found_somewhere(names.source, expected, saved)
    entries: list[dict[str, Any]] = []
    source: dict[str, str] = {}
    missing: dict[str, list[Any]] = {}
    unexpected: dict[str, None] = {}
    begun = 0
    for number, p, keys, entry in zip(numbers, params, expected, saved, strict=True):
        mine = {key: names.source[key] for key in keys if names.source.get(key) in entry}
        entries.append(_copied(mine, entry, keys, p, number))
        source |= mine
        # A parameter that never had a gradient has no state of its own.
        own = any(keys[key].kind != "joint" for key in mine)
        has_state = own or len(mine) < len(entry)
        begun += has_state
        for key, at in keys.items():
            absent = key not in {*mine, *optional} and (at.of, key) not in shared
            if absent and (has_state or (at.kind == "joint" and any(saved))):
                missing.setdefault(key, []).append(number)
        unexpected |= dict.fromkeys(
            str(there) for there in entry if there not in mine.values()
        )
    strays = [n for n in given["state"] if n not in numbers]
    left = [*unexpected, *(f"all of parameter {number!r}" for number in strays)]
    told = [_missing(name, those, begun, expected) for name, those in missing.items()]
    rows = zip(entries, params, numbers, others, strict=True)
    for entry, p, number, also in rows:
        for key, value in also.items():
            entry[key] = _moved(value, p, f"{key!r} of parameter {number}")
    return entries, Fit(source, told, left)


def _copied(
    mine: dict[str, Any],
    entry: dict[str, Any],
    keys: dict[str, Expected],
    p: Tensor,
    number: Any,
) -> dict[str, Any]:
    """What is saved of a parameter, by the names that it has here."""
    return {
        key: _checked(entry[there], keys[key], p, f"{there!r} of parameter {number}", key)
        for key, there in mine.items()
    }


def _parted(
    saved: list[dict[Any, Any]], somebodys: set[Any]
) -> tuple[list[dict[str, Any]], list[dict[Any, Any]]]:
    """What is saved of each parameter, and beside it what is somebody else's."""
    mine: list[dict[str, Any]] = []
    others: list[dict[Any, Any]] = []
    for entry in saved:
        mine.append({k: x for k, x in entry.items() if k not in somebodys})
        others.append({k: x for k, x in entry.items() if k in somebodys})
    return mine, others


def _found_somewhere(
    source: Mapping[str, str],
    expected: list[dict[str, Expected]],
    saved: list[dict[str, Any]],
) -> set[tuple[int, str]]:
    """What is joint and saved with any of the parameters that share it."""
    return {
        (at.of, key)
        for keys, entry in zip(expected, saved, strict=True)
        for key, at in keys.items()
        if at.kind == "joint" and source.get(key) in entry
    }


def _is_somebodys(key: Any) -> bool:
    """Whether no optimizer here has state of this name.

    Chains name it by the path of its stage, with a slash, and the classes as torch does.
    """
    return not isinstance(key, str) or ("/" not in key and key not in KEYS)


def _moved(value: Any, p: Tensor, name: str) -> Any:
    """Somebody else's value, with copies of its tensors beside the parameter, as torch does it."""
    if isinstance(value, Tensor):
        _check_real(value, p, name)
        return value.detach().to(p.device, copy=True)
    if type(value) is dict:
        return {key: _moved(part, p, name) for key, part in value.items()}
    if type(value) in (list, tuple):
        return type(value)([_moved(part, p, name) for part in value])
    return value


def _entry(given: Mapping[str, Any], number: Any) -> dict[str, Any]:
    """What is saved of one parameter."""
    saved = given["state"].get(number, {})
    return {key: value for key, value in saved.items() if value is not None}


def _missing(
    name: str,
    numbers: list[Any],
    begun: int,
    expected: list[dict[str, Expected]],
) -> str:
    """A missing name, and of which parameters, if it is not missing of all."""
    joint = any(name in keys and keys[name].kind == "joint" for keys in expected)
    if joint or len(numbers) == begun:
        return name
    return f"{name} (of parameter {', '.join(map(str, numbers))})"


def _checked(value: Any, expected: Expected, p: Tensor, name: str, key: str) -> Tensor:
    """A copy of `value`, if it can stand where it is expected."""
    if isinstance(value, Tensor):
        _check_real(value, p, name)
    if expected.kind == "count":
        return _count(value, name, key)
    like = expected.like
    if not isinstance(value, Tensor) or value.layout is not torch.strided:
        raise TypeError(f"{name} must be a dense tensor; got {_told(value)}.")
    if value.shape != like.shape:
        raise ValueError(
            f"{name} has shape {tuple(value.shape)}, and here it is {tuple(like.shape)}. "
            "Is it the state of other parameters?"
        )
    if _kind(value) != _kind(like):
        raise TypeError(
            f"{name} is {value.dtype}, and here it is {like.dtype}, which cannot be made of it."
        )
    if expected.on_host:
        return to_host(value)
    return value.detach().to(p.device, copy=True)


def _check_real(value: Tensor, p: Tensor, name: str) -> None:
    """Raise TypeError for a meta tensor, where the parameter is none."""
    if value.is_meta and not p.is_meta:
        raise TypeError(f"{name} is a meta tensor: there is no value in it.")


def _count(value: Any, name: str, key: str) -> Tensor:
    """A count as it is kept: int64, but ``step`` floating, as torch has it."""
    is_scalar = isinstance(value, Tensor) and value.dim() == 0
    dense = is_scalar and value.layout is torch.strided
    number = value.item() if dense else value
    if isinstance(number, bool) or not isinstance(number, (int, float)):
        raise TypeError(
            f"{name} must be a number or a 0-dim tensor: how many steps were made; "
            f"got {_told(value)}."
        )
    is_whole = math.isfinite(number) and number == int(number)
    if not is_whole or number < 0:
        raise ValueError(
            f"{name} must be a whole number from 0: how many steps were made; got {number}."
        )
    if key != "step":
        return torch.tensor(int(number), dtype=torch.int64)
    if dense and value.dtype in (torch.float32, torch.float64):
        return value.detach().to("cpu", copy=True)
    return torch.tensor(float(number), dtype=torch.float32)


def _kind(x: Tensor) -> Any:
    """What may stand for each other: floating dtypes, complex ones; of the others each by itself.

    Slots that are no floating numbers are noise keys and the like, of which no bit may change.
    """
    return (
        "floating" if x.is_floating_point() else "complex" if x.is_complex() else x.dtype
    )


def _told(value: Any) -> str:
    return (
        f"a {value.layout} tensor of shape {tuple(value.shape)}"
        if isinstance(value, Tensor)
        else f"{type(value).__name__} {value!r}"
    )
