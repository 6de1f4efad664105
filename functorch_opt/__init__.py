"""functorch_opt: optimizers as pure functions on parameter trees, composable, vmappable, differentiable; and as torch.optim optimizers."""

from functorch_opt import optim, random
from functorch_opt.algorithms.adagrad import *
from functorch_opt.algorithms.adam import *
from functorch_opt.algorithms.lamb import *
from functorch_opt.algorithms.langevin import *
from functorch_opt.algorithms.lbfgs import *
from functorch_opt.algorithms.lion import *
from functorch_opt.algorithms.sgd import *
from functorch_opt.base import *
from functorch_opt.combine import *
from functorch_opt.compiled import *
from functorch_opt.leaf import *
from functorch_opt.per_example import *
from functorch_opt.private import *
from functorch_opt.report import *
from functorch_opt.rule import *
from functorch_opt.schedules import *
from functorch_opt.sweeps import *
from functorch_opt.transforms.aggregate import *
from functorch_opt.transforms.averaging import *
from functorch_opt.transforms.clip import *
from functorch_opt.transforms.decay import *
from functorch_opt.transforms.line_search import *
from functorch_opt.transforms.momentum import *
from functorch_opt.transforms.noise import *
from functorch_opt.transforms.rounding import *
from functorch_opt.transforms.scale import *
from functorch_opt.tree import *
from functorch_opt.wrappers.precision import *

__version__ = "0.1.0"
