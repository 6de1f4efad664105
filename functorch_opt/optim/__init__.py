"""Optimizers for ordinary loops: any transformation as a `torch.optim.Optimizer`, and torch's own names."""

from functorch_opt.optim.adapter import *
from functorch_opt.optim.classes import *
