"""The compiled code of this process."""

from __future__ import annotations

from collections import Counter, OrderedDict
from typing import Any

from functorch_opt._execution.body import Body


class Programs(OrderedDict[Any, list[Any]]):
    """Compiled code, for all steps of this process: the same rules are compiled once.

    It is bounded, so that code which nobody uses any more is let go. `first` has the numbers that
    rules were compiled with first; with other numbers they become inputs. Where that cannot be
    compiled, the rules are in `constant_only`.
    """

    most = 512

    def __init__(self) -> None:
        super().__init__()
        self.first: OrderedDict[Any, Any] = OrderedDict()
        self.constant_only: set[Any] = set()
        self.made: Counter[Any] = Counter()

    def of(self, key: Any) -> list[Any]:
        """The programs under `key`, which is now the one that was used last."""
        found = self.setdefault(key, [])
        self.move_to_end(key)
        while len(self) > self.most:
            self.popitem(last=False)
        return found

    def wants_inputs(self, body: Body) -> bool:
        """Whether the numbers of `body` are others than those that its rules were compiled with."""
        first = self.first.setdefault(body.base, body.numbers)
        if len(self.first) > 2 * self.most:
            self.first.popitem(last=False)
        return first != body.numbers and body.base not in self.constant_only

    def clear(self) -> None:
        super().clear()
        self.first.clear()
        self.constant_only.clear()
        self.made.clear()


PROGRAMS = Programs()
