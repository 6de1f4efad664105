"""Schedules: functions of the count. They are pure, so they trace, vmap and differentiate."""

from functorch_opt._elsewhere import missing as _missing
from functorch_opt.schedules import curves, cycles, pieces, schedule, warmups
from functorch_opt.schedules.curves import *
from functorch_opt.schedules.cycles import *
from functorch_opt.schedules.pieces import *
from functorch_opt.schedules.preview import preview as preview
from functorch_opt.schedules.schedule import *
from functorch_opt.schedules.warmups import *

__all__ = sorted(
    [
        "preview",
        *schedule.__all__,
        *curves.__all__,
        *pieces.__all__,
        *warmups.__all__,
        *cycles.__all__,
    ]
)


def __getattr__(name: str) -> object:
    """An error, which of a name of ``optax.schedules`` says what there is in place of it."""
    raise _missing("functorch_opt.schedules", name)


def __dir__() -> list[str]:
    """The public names only."""
    return sorted(__all__)
