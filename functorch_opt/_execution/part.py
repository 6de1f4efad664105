"""How a program is called for the leaves that it serves."""

from __future__ import annotations

from functools import cached_property
from itertools import chain as joined
from typing import Any

import torch
from torch import Tensor

from functorch_opt._execution.body import Body
from functorch_opt._execution.kernel import Program
from functorch_opt._execution.pieces import Whole

SHARED = 65_536
"""Elements from which on it pays to share leaves out to threads."""


class Part:
    """Leaves that one program serves, `size` of them at a time.

    They are `narrow` if they are computed in float32.
    """

    def __init__(self, program: Program | Whole, size: int, narrow: bool) -> None:
        self.program, self.size, self.narrow = program, size, narrow
        self.indices: list[int] = []
        self.sizes: list[tuple[int, ...]] = []
        self.elements = 0
        """Of all parameters."""

    @cached_property
    def columns_of_sizes(self) -> list[list[int]]:
        """The sizes that the kernel depends on, a list of all leaves for each."""
        return [[*column] for column in zip(*self.sizes, strict=True)]

    @cached_property
    def threads(self) -> int:
        """How many threads share the leaves out, where a kernel does not share a leaf out."""
        alone = (
            isinstance(self.program, Whole) or self.program.threads > 1 or self.scratch
        )
        return 1 if alone or self.elements < SHARED else torch.get_num_threads()

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
        if self.program.kernel is not None and self.size == 1:
            self._call(self.program, columns, body)
            return
        scalars = body.narrowed if self.narrow else body.scalars
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

    def _call(self, program: Program, columns: list[list[Tensor]], body: Body) -> None:
        """Call the kernel for all leaves at once."""
        scalars: list[Any] = body.scalars
        if self.narrow:
            pairs = zip(scalars, body.wide, strict=True)
            scalars = [(x,) if is_wide else x for x, is_wide in pairs]
        scratch = [torch.empty(n, dtype=dtype) for n, dtype in self.scratch]
        given = [*columns, *scalars, *scratch, *self.columns_of_sizes]
        program.call(len(self.indices), self.threads, given)
