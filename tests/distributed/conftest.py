"""The ranks. The files here, and the ranks, can import `registry` from the folder above."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ranks import Ranks


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[[int], Ranks]]:
    """``ranks(2)``: two processes, started when they are first asked for."""
    worlds: dict[int, Ranks] = {}
    yield lambda world: worlds.setdefault(world, Ranks(world))
    for each in worlds.values():
        each.stop()
