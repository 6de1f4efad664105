"""What containers cost around a chain: the same AdamW in groups, behind a mask, with its numbers in the state, accumulated."""

from __future__ import annotations

import functorch_opt as fo
from benchmarks.contenders import BETAS, DECAY, EPS, LR, Compiled, our_adamw

EVERY = 4


class Plain(Compiled):
    name = "the chain by itself"


class Partition(Compiled):
    name = "partition, two groups"

    def chain(self) -> fo.GradientTransformation:
        return fo.partition({"few": our_adamw(), "many": our_adamw()}, _by_dims)


class Masked(Compiled):
    name = "masked, all leaves"

    def chain(self) -> fo.GradientTransformation:
        return fo.masked(our_adamw(), lambda path, p: True)


class DecayMask(Compiled):
    name = "adamw(mask=matrices)"

    def chain(self) -> fo.GradientTransformation:
        return fo.adamw(LR, *BETAS, EPS, weight_decay=DECAY, mask=_is_matrix)


class Injected(Compiled):
    name = "inject_hyperparams"

    def chain(self) -> fo.GradientTransformation:
        return fo.inject_hyperparams(fo.adamw)(LR, *BETAS, EPS, weight_decay=DECAY)


class FourSteps(Compiled):
    name = "four steps"

    def step(self) -> None:
        for _ in range(EVERY):
            super().step()


class Accumulated(FourSteps):
    name = "four steps of MultiSteps(adamw, 4)"

    def chain(self) -> fo.GradientTransformation:
        return fo.MultiSteps(our_adamw(), EVERY)


def _by_dims(path, p):
    return "many" if p.dim() > 1 else "few"


def _is_matrix(path, p):
    return p.dim() > 1


CONTAINERS = (Plain, Partition, Masked, DecayMask, Injected)
ACCUMULATION = (FourSteps, Accumulated)
