"""Randomness as a function of a key.

The numbers are the same in eager, compiled, vmapped and sharded runs, and after a restart.
"""

from functorch_opt.random.keys import *
from functorch_opt.random.keys import __all__ as __all__
from functorch_opt.random.keys import as_key as as_key
from functorch_opt.random.keys import draw_leaves as draw_leaves


def __dir__() -> list[str]:
    """The public names only."""
    return sorted(__all__)
