"""Schedules: functions of the count. They are pure, so they trace, vmap and differentiate."""

from functorch_opt.schedules import curves, cycles, pieces, schedule, warmups
from functorch_opt.schedules.curves import *
from functorch_opt.schedules.cycles import *
from functorch_opt.schedules.pieces import *
from functorch_opt.schedules.preview import preview as preview
from functorch_opt.schedules.schedule import *
from functorch_opt.schedules.warmups import *

__all__ = sorted(
    name
    for family in (schedule, curves, pieces, warmups, cycles)
    for name in family.__all__
)
