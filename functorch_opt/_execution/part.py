"""How a program is called for the leaves that it serves."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import cached_property
from itertools import chain as joined
from itertools import repeat, starmap

import torch
from torch import Tensor

from functorch_opt._execution.body import Body
from functorch_opt._execution.kernel import Program
from functorch_opt._execution.pieces import Whole


class Part:
    """Leaves that one program serves, `size` of them at a time.

    They are `narrow` if they are computed in float32.
    """

    def __init__(self, program: Program | Whole, size: int, narrow: bool) -> None:
        self.program, self.size, self.narrow = program, size, narrow
        self.indices: list[int] = []
        self.sizes: list[tuple[int, ...]] = []

    @cached_property
    def scratch(self) -> list[tuple[int, torch.dtype]]:
        return [] if isinstance(self.program, Whole) else self.program.scratch(self.sizes)

    def run(self, columns: list[list[Tensor]], body: Body) -> None:
        """Apply the body to these leaves."""
        if len(self.indices) < len(columns[0]):
            columns = [[column[i] for i in self.indices] for column in columns]
        if isinstance(self.program, Whole):
            self.program.run(columns, self.sizes, self.narrow, body)
            return
        scalars = body.narrowed if self.narrow else body.scalars
        if self.program.kernel is not None and self.size == 1:
            self._call(self.program.kernel, self.program.order, columns, scalars)
            return
        whole = body.whole
        leaves = [
            [x if whole or not x.dim() else x.view(-1) for x in leaf]
            for leaf in zip(*columns, strict=True)
        ]
        for k in range(0, len(leaves), self.size):
            block = leaves[k : k + self.size]
            missing = self.size - len(block)
            block += [
                [x.new_empty(2 if x.dim() else ()) for x in block[0]]
                for _ in range(missing)
            ]
            self.program([*joined.from_iterable(block), *scalars])

    def _call(
        self,
        kernel: Callable[..., None],
        order: list[int],
        columns: list[list[Tensor]],
        scalars: list[Tensor],
    ) -> None:
        """Call the kernel for each leaf, with nothing between the calls that Python has to do."""
        scratch = [torch.empty(n, dtype=dtype) for n, dtype in self.scratch]
        given = [
            *columns,
            *map(repeat, (*scalars, *scratch)),
            *zip(*self.sizes, strict=True),
        ]
        calls = zip(*[given[i] for i in order], strict=False)
        deque(starmap(kernel, calls), maxlen=0)
