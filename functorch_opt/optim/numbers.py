"""The hyperparameters of a stateful optimizer.

They go from the groups to where a transformation reads them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from operator import is_
from typing import Any

import torch
from torch import Tensor

from functorch_opt import tree
from functorch_opt._core import numerics
from functorch_opt.optim.derived import Operation
from functorch_opt.optim.options import check_number

Groups = list[dict[str, Any]]


class Numbers:
    """The options that are hyperparameters: one number, or one for each parameter where groups
    differ."""

    def __init__(
        self, names: list[str], groups: Groups, order: list[int], device: torch.device
    ) -> None:
        """`order` are the numbers of the parameters in the order of the leaves."""
        self.device, self.capturable = device, is_capturable(groups)

        def buffer(value: Any, shape: tuple[int, ...]) -> Any:
            """Where a hyperparameter is written at every step, for the transformation to read."""
            if isinstance(value, tuple):
                return tuple(buffer(part, shape) for part in value)
            return torch.zeros(shape, dtype=numerics.real_dtype(device), device=device)

        self.order = order
        # Prodigy's distance, for example, is one for all parameters, and is computed with lr.
        self.alike = [name for name in names if _are_alike(name, groups)]
        self.buffers = {
            name: buffer(groups[0][name], () if name in self.alike else (len(order),))
            for name in names
        }
        self.written: dict[str, list[Any]] = {}
        self.given: list[Any] = []
        """All that was written last, if nothing of it can change by itself."""
        self.derived: list[Operation] = []
        """What the transformation was made of, beside the buffers."""

    def check_first_state(self, init: Callable[[], Any], name: str) -> None:
        """Raise ValueError where a first state depends on a number that differs between groups:
        `init` knows no groups."""
        differing = [option for option in self.buffers if option not in self.alike]
        for option in differing:
            try:
                one, other = [self._filled(option, x, init) for x in (0.25, 0.75)]
                depends = not all(map(torch.equal, one, other))
            except RuntimeError:  # entries of parameters met the elements of a tensor
                depends = True
            if depends:
                raise ValueError(
                    f"the option {option} makes the first state of {name}, and so must be the same "
                    "in all groups. Give every group one number, or each its own optimizer."
                )

    def _filled(self, option: str, value: float, init: Callable[[], Any]) -> list[Tensor]:
        """The tensors of a first state where the option has this value."""
        buffer = self.buffers[option]
        for part in buffer if isinstance(buffer, tuple) else (buffer,):
            part.fill_(value)
        self._derive()
        self.written.pop(option, None)
        self.given = []
        return tree.leaves(init())

    def fit(self, groups: Groups) -> bool:
        """Whether groups that were alike still are, and numbers lie where they should."""
        if self.capturable != is_capturable(groups):
            return False
        return all(_are_alike(name, groups) for name in self.alike)

    def write(self, groups: Groups) -> None:
        """Write the hyperparameters where the transformation reads them."""
        given = [group[name] for name in self.buffers for group in groups]
        if len(given) == len(self.given) and all(map(is_, given, self.given)):
            return
        for name, target in self.buffers.items():
            of_all = groups[:1] if name in self.alike else groups
            values = [group[name] for group in of_all]
            # A tensor may be changed without our seeing it.
            plain = all(isinstance(value, (int, float)) for value in values)
            if plain and values == self.written.get(name):
                continue
            for value in values:
                check_number(name, value, target)
            if isinstance(target, tuple):
                for part, of_groups in zip(
                    target, zip(*values, strict=True), strict=True
                ):
                    _write(part, of_groups, of_all, self.order)
            else:
                _write(target, values, of_all, self.order)
            self.written[name] = values if plain else []
        self._derive()
        self.given = given if all(map(_is_plain, given)) else []

    def _derive(self) -> None:
        """Work out again what was worked out of the buffers."""
        for operation in self.derived:
            operation.again()

    def read(self, groups: Groups) -> dict[str, Any]:
        """The hyperparameters as `write` writes them, in new tensors."""
        numbers: dict[str, Any] = {}
        for name, target in self.buffers.items():
            values = [group[name] for group in groups]
            if isinstance(target, tuple):
                pairs = zip(target, zip(*values, strict=True), strict=True)
                numbers[name] = tuple(
                    [_read(part, of, groups, self.order) for part, of in pairs]
                )
            else:
                numbers[name] = _read(target, values, groups, self.order)
        return numbers


def is_capturable(groups: Groups) -> bool:
    """Whether a step of these groups is to be captured as a CUDA graph."""
    return any(group.get("capturable") for group in groups)


def is_zero(value: Any) -> bool:
    """Whether an option is the number zero. A tensor may become another number."""
    return not isinstance(value, Tensor) and bool(value == 0)


def decays(name: str, groups: Groups) -> bool:
    """Whether `name` is a weight decay that some group has.

    Then a zero in another group is a number as well, and both groups go through the same rules. A
    weight decay has no state, so that a group without one keeps the state that it has.
    """
    return name == "weight_decay" and not all(is_zero(of.get(name, 0)) for of in groups)


def _are_alike(name: str, groups: Groups) -> bool:
    """Whether all groups have one number there, as far as can be seen: nobody looks into
    tensors."""
    first, *others = [group[name] for group in groups]
    plain = _is_plain(first)
    return not others or (plain and all(_is_plain(x) and x == first for x in others))


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(_is_plain(part) for part in value)
    return isinstance(value, (int, float))


def _write(
    target: Tensor, values: Iterable[Any], groups: Groups, order: list[int]
) -> None:
    values = list(values)
    if len(groups) > 1:
        of_groups = zip(values, groups, strict=True)
        of_params = [float(value) for value, group in of_groups for _ in group["params"]]
        of_leaves = [of_params[i] for i in order]
        target.copy_(torch.tensor(of_leaves, dtype=target.dtype))
    elif isinstance(values[0], Tensor):
        target.copy_(values[0].reshape(()))
    else:
        target.fill_(values[0])


def _read(
    target: Tensor, values: Iterable[Any], groups: Groups, order: list[int]
) -> Tensor:
    """A float is multiplied in, for so it can change without compiling again."""
    one = torch.ones((), dtype=target.dtype, device=target.device)
    numbers = [
        value.to(target).reshape(()) if isinstance(value, Tensor) else one * value
        for value in values
    ]
    if len(groups) == 1:
        return numbers[0]
    pairs = zip(numbers, groups, strict=True)
    of_params = [number for number, group in pairs for _ in group["params"]]
    return torch.stack([of_params[i] for i in order])
