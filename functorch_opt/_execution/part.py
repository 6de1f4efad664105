"""How a program is called for the leaves that it serves."""

from __future__ import annotations

from functools import cached_property
from itertools import chain as joined
from typing import Any

import torch

from functorch_opt._execution.body import Body, Columns
from functorch_opt._execution.kernel import Program
from functorch_opt._execution.launches import LANES, flat, has_lanes, is_aligned
from functorch_opt._execution.pieces import Whole

SHARED = 65_536
"""Elements from which on it pays to share leaves out to threads."""


class Part:
    """Leaves that one program serves, `size` of them at a time.

    They are `narrow` if they are computed in float32. The `device` is given if there are several.
    """

    def __init__(
        self,
        program: Program | Whole,
        size: int,
        narrow: bool,
        device: torch.device | None,
    ) -> None:
        self.program, self.size, self.narrow = program, size, narrow
        self.device = device
        self.indices: list[int] = []
        self.sizes: list[tuple[int, ...]] = []
        self.elements = 0
        """Of all parameters."""
        self.filling: Columns | None = None

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

    def run(self, columns: Columns, body: Body) -> None:
        """Apply the body to these leaves."""
        body = at_device(body, self.device)
        if len(self.indices) < len(columns[0]):
            columns = [[column[i] for i in self.indices] for column in columns]
        if isinstance(self.program, Whole):
            self.program.run(columns, self.sizes, self.narrow, body)
            return
        if self.program.kernel is not None and self.size == 1:
            self._call(self.program, columns, body)
            return
        launches = self.program.launches
        if launches is not None:
            columns = _aligned(columns, body)
        elif not body.whole:
            columns = [[*map(flat, column)] for column in columns]
        leaves = [*zip(*columns, strict=True), *self.padding(columns)]
        starts = range(0, len(leaves), self.size)
        scalars = body.given(self.narrow)
        parts = [joined.from_iterable(leaves[k : k + self.size]) for k in starts]
        blocks = [[*part, *scalars] for part in parts]
        if launches is not None:
            launches(*blocks)
        else:
            for block in blocks:
                self.program(block)

    def padding(self, columns: Columns) -> Columns:
        """What fills the last block up. What is written there is never read."""
        if self.filling is None:
            missing = -len(columns[0]) % self.size
            like = [column[0] for column in columns]
            of: Any = (2, LANES) if has_lanes(like[1]) else (2,)
            shapes = [of if x.dim() else () for x in like]
            pairs = [*zip(like, shapes, strict=True)]
            self.filling = [
                [x.new_zeros(shape) for x, shape in pairs] for _ in range(missing)
            ]
        return self.filling

    def _call(self, program: Program, columns: Columns, body: Body) -> None:
        """Call the kernel for all leaves at once."""
        scalars: list[Any] = body.scalars
        if self.narrow:
            pairs = zip(scalars, body.wide, strict=True)
            scalars = [(x,) if is_wide else x for x, is_wide in pairs]
        scratch = [torch.empty(n, dtype=dtype) for n, dtype in self.scratch]
        given = [*columns, *scalars, *scratch, *self.columns_of_sizes]
        program.call(len(self.indices), self.threads, given)


def at_device(body: Body, device: torch.device | None) -> Body:
    """The body with its values on `device`, if one is given; on the host they are at hand for all."""
    if device is None:
        return body
    elsewhere = {x.device for x in body.scalars} - {device, torch.device("cpu")}
    return body.on(device) if elsewhere else body


def _aligned(columns: Columns, body: Body) -> Columns:
    """The columns, with copies of gradients and rows that are not aligned. What is written is."""
    columns = [*columns]
    for c in (0, *range(2 + body.n_slots, len(columns))):
        if c != body.place and not all(map(is_aligned, columns[c])):
            columns[c] = [x if is_aligned(x) else x.clone() for x in columns[c]]
    return columns
