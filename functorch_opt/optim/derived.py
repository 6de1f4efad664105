"""Numbers that a function works out of its arguments when it makes a transformation.

In a stateful optimizer these arguments are tensors, into which the numbers of the groups are written
at every step. What was worked out of them, such as ``2 * learning_rate``, is worked out again then.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

LOOKS = ("__bool__", "__float__", "__index__", "__int__", "equal", "item", "tolist")
"""Functions that look at the value of a tensor."""


OPTION = "of the function that makes the transformation, which is an option of the groups"
WRITES = (
    f"would change an argument {OPTION}: write the operation that gives a new tensor."
)
SEVERAL = f"gives several tensors of an argument {OPTION}: only one can be made again at every step."


class Operation(NamedTuple):
    """One operation on numbers, and what it gave."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Tensor

    def again(self) -> None:
        """Work it out of what its arguments are now."""
        self.result.copy_(self.function(*self.args, **self.kwargs))


class Recording(TorchFunctionMode):
    """Inside, what is worked out of some tensors is written down."""

    def __init__(self, numbers: dict[str, Any]) -> None:
        super().__init__()
        self.operations: list[Operation] = []
        self.known = {id(x): x for x in tree_leaves(numbers)}
        """The tensors themselves, and all that was worked out of them."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if not any(id(x) in self.known for x in tree_leaves((args, kwargs))):
            return func(*args, **kwargs)
        if func.__name__ in LOOKS:
            raise TypeError(
                "the function that makes the transformation looks at the value of one of its "
                f"arguments ({func.__name__}), which is an option of the groups and may change at "
                "every step. Give lambda learning_rate: function(learning_rate, argument=0.1), "
                "where it is no option, or decide by torch.where."
            )
        if is_in_place(func.__name__):
            raise TypeError(f"{func.__name__} {WRITES}")
        result = func(*args, **kwargs)
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and id(x) not in self.known:
                if x is not result:
                    raise TypeError(f"{func.__name__} {SEVERAL}")
                self.known[id(x)] = x
                self.operations.append(Operation(func, args, kwargs, x))
        return result


def is_in_place(name: str) -> bool:
    """Whether a function of this name, such as ``mul_``, changes its argument.

    For ``x *= 2`` Python then takes ``x = x * 2``, which does not.
    """
    return name == "__setitem__" or (name.endswith("_") and not name.startswith("__"))
