"""functorch_opt: optimizers as pure functions on parameter trees, and as torch.optim optimizers.

The pure functions compose, and `torch.func.vmap`, `torch.func.grad` and `torch.compile` apply to
them. The optimizers with torch's names are in `functorch_opt.optim`.
"""

import importlib as _importlib
import typing as _typing

from functorch_opt._names import NAMES as _NAMES

__version__ = "0.1.0"

if _typing.TYPE_CHECKING:
    from functorch_opt import optim as optim
    from functorch_opt import projections as projections
    from functorch_opt import random as random
    from functorch_opt import schedules as schedules
    from functorch_opt import tree as tree
    from functorch_opt._core.chain import *
    from functorch_opt._core.checkpoint import *
    from functorch_opt._core.gate import *
    from functorch_opt._core.groups import *
    from functorch_opt._core.inject import *
    from functorch_opt._core.leaf import *
    from functorch_opt._core.names_of_types import *
    from functorch_opt._core.points import *
    from functorch_opt._core.rule import *
    from functorch_opt._core.state import *
    from functorch_opt._core.sums import *
    from functorch_opt._core.transformation import *
    from functorch_opt._core.wrap import *
    from functorch_opt._execution.compiled import *
    from functorch_opt.codecs.convert import *
    from functorch_opt.codecs.stored import *
    from functorch_opt.line_search.backtracking import *
    from functorch_opt.line_search.lbfgs import *
    from functorch_opt.line_search.reuse import *
    from functorch_opt.line_search.zoom import *
    from functorch_opt.optimizers.acprop import *
    from functorch_opt.optimizers.adafactor import *
    from functorch_opt.optimizers.adagrad import *
    from functorch_opt.optimizers.adam import *
    from functorch_opt.optimizers.adam_mini import *
    from functorch_opt.optimizers.adamc import *
    from functorch_opt.optimizers.adamuon import *
    from functorch_opt.optimizers.adan import *
    from functorch_opt.optimizers.ademamix import *
    from functorch_opt.optimizers.adopt import *
    from functorch_opt.optimizers.amsgrad import *
    from functorch_opt.optimizers.apollo import *
    from functorch_opt.optimizers.asgd import *
    from functorch_opt.optimizers.belief import *
    from functorch_opt.optimizers.came import *
    from functorch_opt.optimizers.cocob import *
    from functorch_opt.optimizers.dadapt import *
    from functorch_opt.optimizers.dion import *
    from functorch_opt.optimizers.dog import *
    from functorch_opt.optimizers.fira import *
    from functorch_opt.optimizers.focus import *
    from functorch_opt.optimizers.galore import *
    from functorch_opt.optimizers.grams import *
    from functorch_opt.optimizers.hyperball import *
    from functorch_opt.optimizers.kl_shampoo import *
    from functorch_opt.optimizers.lamb import *
    from functorch_opt.optimizers.langevin import *
    from functorch_opt.optimizers.laprop import *
    from functorch_opt.optimizers.lion import *
    from functorch_opt.optimizers.madgrad import *
    from functorch_opt.optimizers.mano import *
    from functorch_opt.optimizers.mars import *
    from functorch_opt.optimizers.matrices import *
    from functorch_opt.optimizers.momo import *
    from functorch_opt.optimizers.muon import *
    from functorch_opt.optimizers.nadam import *
    from functorch_opt.optimizers.normuon import *
    from functorch_opt.optimizers.novograd import *
    from functorch_opt.optimizers.optimistic import *
    from functorch_opt.optimizers.prodigy import *
    from functorch_opt.optimizers.projected import *
    from functorch_opt.optimizers.psgd_kron import *
    from functorch_opt.optimizers.radam import *
    from functorch_opt.optimizers.routes import *
    from functorch_opt.optimizers.routing_table import *
    from functorch_opt.optimizers.rprop import *
    from functorch_opt.optimizers.schedule_free import *
    from functorch_opt.optimizers.schedule_free_prodigy import *
    from functorch_opt.optimizers.schedule_free_radam import *
    from functorch_opt.optimizers.scion import *
    from functorch_opt.optimizers.sgd import *
    from functorch_opt.optimizers.shampoo import *
    from functorch_opt.optimizers.sm3 import *
    from functorch_opt.optimizers.soap import *
    from functorch_opt.optimizers.sophia import *
    from functorch_opt.optimizers.splus import *
    from functorch_opt.optimizers.stable_adamw import *
    from functorch_opt.optimizers.stable_spam import *
    from functorch_opt.optimizers.yogi import *
    from functorch_opt.privacy.accounting import *
    from functorch_opt.privacy.aggregate import *
    from functorch_opt.privacy.clips import *
    from functorch_opt.privacy.per_example import *
    from functorch_opt.privacy.private import *
    from functorch_opt.schedules.curves import *
    from functorch_opt.schedules.cycles import *
    from functorch_opt.schedules.pieces import *
    from functorch_opt.schedules.schedule import *
    from functorch_opt.schedules.warmups import *
    from functorch_opt.sweeps.report import *
    from functorch_opt.sweeps.sweep import *
    from functorch_opt.transforms.averaging import *
    from functorch_opt.transforms.cautious import *
    from functorch_opt.transforms.clip import *
    from functorch_opt.transforms.constrain import *
    from functorch_opt.transforms.decay import *
    from functorch_opt.transforms.functions import *
    from functorch_opt.transforms.momentum import *
    from functorch_opt.transforms.monitor import *
    from functorch_opt.transforms.noise import *
    from functorch_opt.transforms.noise_scale import *
    from functorch_opt.transforms.plateau import *
    from functorch_opt.transforms.qk_clip import *
    from functorch_opt.transforms.report import *
    from functorch_opt.transforms.report_plot import *
    from functorch_opt.transforms.report_table import *
    from functorch_opt.transforms.rounding import *
    from functorch_opt.transforms.scale import *
    from functorch_opt.transforms.spikes import *
    from functorch_opt.wrappers.accumulate import *
    from functorch_opt.wrappers.complex_values import *
    from functorch_opt.wrappers.conditional import *
    from functorch_opt.wrappers.flat import *
    from functorch_opt.wrappers.freezing import *
    from functorch_opt.wrappers.lookahead import *
    from functorch_opt.wrappers.mechanic import *
    from functorch_opt.wrappers.named_chain import *
    from functorch_opt.wrappers.outer import *
    from functorch_opt.wrappers.precision import *
    from functorch_opt.wrappers.sam import *
    from functorch_opt.wrappers.skipping import *
    from functorch_opt.wrappers.with_owners import *
else:
    _MODULES = ("optim", "projections", "random", "schedules", "tree")
    _HOMES = {name: module for module, names in _NAMES.items() for name in names}
    __all__ = ["__version__", *_MODULES, *_HOMES]

    def __getattr__(name: str) -> object:
        """Import what is public when it is first used, for all of it takes a fifth of a second."""
        if name in _MODULES:
            return _importlib.import_module(f"functorch_opt.{name}")
        if name not in _HOMES:
            elsewhere = _importlib.import_module("functorch_opt._elsewhere")
            raise elsewhere.missing("functorch_opt", name)
        value = getattr(_importlib.import_module(_HOMES[name]), name)
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        """The public names only: the folders of the package are not among them."""
        return sorted(__all__)
