"""Optimizers for ordinary loops.

They are any transformation as a `torch.optim.Optimizer`, torch's own names, and a class for each
other optimizer of the library. With them are the groups of parameters that they take.
"""

import types as _types
import typing as _typing

from functorch_opt.optim.adafactor import *
from functorch_opt.optim.adagrad import *
from functorch_opt.optim.adam import *
from functorch_opt.optim.adapter import *
from functorch_opt.optim.asgd import *
from functorch_opt.optim.callbacks import *
from functorch_opt.optim.exported import *
from functorch_opt.optim.in_backward import *
from functorch_opt.optim.muon import *
from functorch_opt.optim.nadam import *
from functorch_opt.optim.on_host import *
from functorch_opt.optim.param_groups import *
from functorch_opt.optim.partition import *
from functorch_opt.optim.qk_hook import *
from functorch_opt.optim.radam import *
from functorch_opt.optim.ready import *
from functorch_opt.optim.rprop import *
from functorch_opt.optim.rules import *
from functorch_opt.optim.sam import *
from functorch_opt.optim.sgd import *
from functorch_opt.optim.torchs import *
from functorch_opt.optim.unfreezing import *

# Type checkers read the star imports above; they do not read a computed list.
if not _typing.TYPE_CHECKING:
    __all__ = [
        name
        for name, value in globals().items()
        if not name.startswith("_") and not isinstance(value, _types.ModuleType)
    ]

    def __dir__() -> list[str]:
        """The API only: the files of the package are not among it."""
        return sorted(__all__)
