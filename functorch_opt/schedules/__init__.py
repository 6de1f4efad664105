"""Schedules: functions of the count. They are pure, so they trace, vmap and differentiate."""

from functorch_opt.schedules.schedules import *
from functorch_opt.schedules.schedules import __all__ as __all__
