"""Loading a state dict: torch loads the groups, and the state is put in here."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from functorch_opt._core.checkpoint import LEFT_OVER, Fit
from functorch_opt.codecs.convert import converted
from functorch_opt.codecs.rounded import KEY
from functorch_opt.optim.checkpoint import Expected, check_form, expectations, fitted
from functorch_opt.optim.foreign import in_float32
from functorch_opt.optim.owned import with_owners


def load(
    optimizer: Any,
    torchs: Callable[[dict[str, Any]], None],
    state_dict: dict[str, Any],
    strict: bool,
) -> None:
    """Load `state_dict`; after an error the optimizer is as it was.

    `torchs` is ``load_state_dict`` of torch's class, which runs the hooks and loads the groups.
    """
    if not isinstance(state_dict, Mapping):
        check_form(state_dict)
    before = {"state": optimizer.state, "param_groups": optimizer.param_groups}
    given: dict[str, Any] = {}
    found: list[Fit] = []

    def take(_: Any, final: dict[str, Any]) -> dict[str, Any]:
        """The last hook before: keeps the state from torch, which would cast it.

        A noise key would lose its bits. The names of parameters are those of this optimizer: its
        masks and labels were written for them.
        """
        check_form(final)
        given.update(final)
        groups = [{**group} for group in final["param_groups"]]
        for group in groups:
            group.pop("param_names", None)
        return {**final, "state": {}, "param_groups": groups}

    def fill(_: Any) -> None:
        """The first hook after: the groups are loaded."""
        found.append(_fill(optimizer, given))
        if strict and not found[0].exact:
            raise KeyError(str(found[0]))

    handles = [
        optimizer.register_load_state_dict_pre_hook(take),
        optimizer.register_load_state_dict_post_hook(fill, prepend=True),
    ]
    try:
        torchs(state_dict)
        # A wrapper that lends its class from this one, as that of Lightning does, registers hooks
        # on one object and runs those of another: then nothing has been filled yet.
        if not found:
            fill(optimizer)
        if found[0].missing or found[0].unexpected:
            told = f"{found[0]} {LEFT_OVER} With strict=True this is an error."
            warnings.warn(told, stacklevel=3)
    except BaseException:
        optimizer.__setstate__(before)
        raise
    finally:
        for handle in handles:
            handle.remove()


def _fill(optimizer: Any, given: dict[str, Any]) -> Fit:
    """Take over the tensors of a state dict whose groups are loaded already."""
    for k, group in enumerate(optimizer.param_groups):
        if "state" not in optimizer._of(group)._own:
            group.pop("state", None)  # slots are stored here as usual, whatever was saved
        try:
            optimizer._check_group(group, loaded=True)
        except Exception as error:
            raise ValueError(
                f"group {k} of this state dict has options that do not fit: {error}"
            ) from error
    expected = _expected(optimizer)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    of_params = [expected.get(p, {}) for p in params]
    mine, others = _parted(given)
    mine = _recoded(mine, of_params)
    optional = {*optimizer._uncounted, *rounding_keys(of_params)}
    entries, found = fitted(mine, params, of_params, optional)
    with_owners(entries, of_params, params)
    state: defaultdict[Any, Any] = defaultdict(dict)
    for p, entry in zip(params, entries, strict=True):
        if entry:
            state[p] = entry
    state.update(others)
    optimizer.state = state
    optimizer._plans = {}
    return found


def _parted(given: dict[str, Any]) -> tuple[dict[str, Any], dict[Any, Any]]:
    """The state dict with the state of parameters only, and what else lies in its state.

    That belongs to others, hooks and wrappers, and is kept as it is, as in torch.
    """
    numbers = [number for group in given["param_groups"] for number in group["params"]]
    kinds = {type(number) for number in numbers}
    mine: dict[Any, Any] = {}
    others: dict[Any, Any] = {}
    for key, value in given["state"].items():
        if type(key) in kinds and isinstance(value, Mapping):
            mine[key] = value
        else:
            others[key] = value
    return {**given, "state": mine}, others


def _recoded(
    given: dict[str, Any],
    expected: list[dict[str, Expected]],
) -> dict[str, Any]:
    """The state dict with slots stored as they are here."""
    numbers = [number for group in given["param_groups"] for number in group["params"]]
    state = dict(given["state"])
    for number, keys in zip(numbers, expected, strict=False):
        if state.get(number):
            state[number] = in_float32(state[number], keys, number)
    there = {key for entry in state.values() for key in entry}
    for number, keys in zip(numbers, expected, strict=False):
        entry = state.get(number)
        if entry:
            wanted = {key: of.like for key, of in keys.items()}
            state[number] = converted(entry, wanted, there)
    return {**given, "state": state}


def _expected(optimizer: Any) -> dict[Tensor, dict[str, Expected]]:
    """What belongs into the state of each parameter."""
    expected: dict[Tensor, dict[str, Expected]] = {}
    for fixed, groups in optimizer._trained_buckets():
        params = [p for group in groups for p in group["params"]]
        try:
            keys = expectations(optimizer._plan(fixed, groups), params)
        except Exception as error:
            raise ValueError(
                "the options of this state dict make no optimizer of these parameters: "
                f"{error}"
            ) from error
        expected |= zip(params, keys, strict=True)
    return expected


def rounding_keys(expected: list[dict[str, Expected]]) -> set[str]:
    """The keys of slots that are rounded at random. One that a checkpoint lacks is made anew."""
    return {key for keys in expected for key in keys if key.endswith(KEY)}
