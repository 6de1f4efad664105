"""Schedules: functions of the count. They are pure, so they trace, vmap and differentiate."""

from functorch_opt.schedules import curves, cycles, pieces
from functorch_opt.schedules.curves import *
from functorch_opt.schedules.cycles import *
from functorch_opt.schedules.pieces import *

__all__ = sorted([*curves.__all__, *pieces.__all__, *cycles.__all__])
