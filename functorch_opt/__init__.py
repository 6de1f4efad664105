"""functorch_opt: optimizers as pure functions on parameter trees, composable, vmappable, differentiable; and as torch.optim optimizers."""

from functorch_opt import optim, random, tree
from functorch_opt._core.chain import *
from functorch_opt._core.checkpoint import *
from functorch_opt._core.groups import *
from functorch_opt._core.inject import *
from functorch_opt._core.leaf import *
from functorch_opt._core.rule import *
from functorch_opt._core.state import *
from functorch_opt._core.transformation import *
from functorch_opt._execution.compiled import *
from functorch_opt.line_search.lbfgs import *
from functorch_opt.line_search.searches import *
from functorch_opt.optimizers.adafactor import *
from functorch_opt.optimizers.adagrad import *
from functorch_opt.optimizers.adam import *
from functorch_opt.optimizers.asgd import *
from functorch_opt.optimizers.lamb import *
from functorch_opt.optimizers.langevin import *
from functorch_opt.optimizers.lion import *
from functorch_opt.optimizers.muon import *
from functorch_opt.optimizers.nadam import *
from functorch_opt.optimizers.radam import *
from functorch_opt.optimizers.rprop import *
from functorch_opt.optimizers.sgd import *
from functorch_opt.privacy.aggregate import *
from functorch_opt.privacy.per_example import *
from functorch_opt.privacy.private import *
from functorch_opt.schedules.schedules import *
from functorch_opt.sweeps.report import *
from functorch_opt.sweeps.sweep import *
from functorch_opt.transforms.averaging import *
from functorch_opt.transforms.clip import *
from functorch_opt.transforms.decay import *
from functorch_opt.transforms.momentum import *
from functorch_opt.transforms.noise import *
from functorch_opt.transforms.rounding import *
from functorch_opt.transforms.scale import *
from functorch_opt.wrappers.precision import *

__version__ = "0.1.0"
