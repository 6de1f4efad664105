"""Options that all groups must set alike: what they make is one value for all parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from functorch_opt._core.checkpoint import state_dict
from functorch_opt._core.transformation import GradientTransformation
from functorch_opt.optim.closure import for_a_rehearsal
from functorch_opt.optim.numbers import Groups, Numbers
from functorch_opt.tree import PyTree

Make = Callable[[dict[str, Any]], GradientTransformation]
CURE = (
    "must be the same in all groups. Give every group one number, or each its own optimizer: "
    "functorch_opt.partition, or fo.optim.Partition, makes one of several."
)


def check_groups(
    make: Make, numbers: Numbers, groups: Groups, tx: GradientTransformation, few: PyTree
) -> None:
    """Raise ValueError for an option that differs between groups and must not.

    Args:
        make: makes the transformation of numbers.
        numbers: those of the groups, where `tx` reads them.
        groups: the groups.
        tx: the transformation.
        few: a few elements in the place of each parameter.
    """
    numbers.check_first_state(lambda: tx.init(few), tx.name)
    differing = [name for name in numbers.buffers if name not in numbers.alike]
    if not differing:
        return
    numbers.write(groups)
    if not (path := grows(tx, few)):
        return
    guilty = [name for name in differing if grows(make(only(name, numbers)), few)]
    options = ", ".join(guilty or differing)
    raise ValueError(
        f"the option {options} makes {path!r} of {tx.name}, which is one value for all parameters, "
        f"and so {CURE}"
    )


def only(option: str, numbers: Numbers) -> dict[str, Any]:
    """The numbers, where one option alone differs between groups."""
    return {
        name: value if name == option else first_of(value)
        for name, value in numbers.buffers.items()
    }


def first_of(value: Any) -> Any:
    """The number of the first parameter."""
    if isinstance(value, tuple):
        return tuple([first_of(part) for part in value])
    return value[0] if value.dim() else value


def grows(tx: GradientTransformation, few: PyTree) -> str | None:
    """The path of a value of the state that is one number first, and several after an update."""
    extra = for_a_rehearsal(tx, few)
    state = tx.init(few)
    try:
        new = state_dict(tx.update(few, state, few, **extra)[1])
    except Exception:  # the step will say what is wrong
        return None
    old = state_dict(state)
    return next((path for path in old if became_several(path, old, new)), None)


def became_several(path: str, old: dict[str, Tensor], new: dict[str, Tensor]) -> bool:
    """Whether a value of all parameters, which is no count, was one number and is several."""
    of_all = "/shared/" in f"/{path}" and not path.endswith(("/count", "/clock"))
    return of_all and not old[path].dim() and new[path].dim() > 0
