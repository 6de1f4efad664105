"""Optimizers for ordinary loops.

They are any transformation as a `torch.optim.Optimizer`, torch's own names, and a class for each
other optimizer of the library.
"""

from functorch_opt.optim.adafactor import *
from functorch_opt.optim.adagrad import *
from functorch_opt.optim.adam import *
from functorch_opt.optim.adapter import *
from functorch_opt.optim.asgd import *
from functorch_opt.optim.muon import *
from functorch_opt.optim.nadam import *
from functorch_opt.optim.radam import *
from functorch_opt.optim.ready import *
from functorch_opt.optim.rprop import *
from functorch_opt.optim.sgd import *
from functorch_opt.optim.torchs import *
