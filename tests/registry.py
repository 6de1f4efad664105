"""One row per transformation and optimizer. Every law in `test_laws.py` runs over every row; what a row cannot do is a column of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import functorch_opt as fo


@dataclass(frozen=True)
class Row:
    name: str
    make: Callable[..., fo.GradientTransformation]
    """Builds the transformation from its numeric hyperparameters, given by name."""
    hyper: dict[str, float] = field(default_factory=dict)
    """Hyperparameters that may be tensors: vmapped over, differentiated, changed without recompiling."""
    variants: tuple[dict[str, Any], ...] = ({},)
    """Other ways to call `make`: options that change what is computed."""
    smooth: bool = True
    """Whether finite differences mean anything at a random point."""
    keyed: bool = False
    """Whether it draws noise, from a `key` argument."""
    reads_shape: bool = False
    """Whether it looks at the shape of a tensor, so that a complex one is not just pairs of reals."""
    passes_none: bool = True
    """Whether it leaves parameters without gradient alone; a function of whole trees does as it likes."""
    written: bool = True
    """Whether `make` is the public function itself, so that what it builds prints as one call and pickles."""

    @property
    def id(self) -> str:
        return self.name

    def build(self, variant: dict[str, Any] | None = None, **hyper: Any) -> fo.GradientTransformation:
        return self.make(**{**({"key": 7} if self.keyed else {}), **self.hyper, **(variant or {}), **hyper})


LR = {"learning_rate": 0.1}
ADAM = {"b1": 0.9, "b2": 0.99, "eps": 1e-3}
decay_schedule = fo.exponential_decay(0.5, 3, 0.5)

ROWS = [
    Row(
        "add_decayed_weights",
        fo.add_decayed_weights,
        {"weight_decay": 0.1},
        ({}, {"mask": lambda path, p: p.ndim > 1}, {"weight_decay": decay_schedule}),
    ),
    Row("add_noise", fo.add_noise, {"eta": 0.1, "gamma": 0.5}, ({}, {"gamma": 0.0}), keyed=True),
    Row("centralize", fo.centralize, reads_shape=True),
    Row(
        "chain",
        lambda max_norm, learning_rate: fo.chain(fo.clip_by_global_norm(max_norm), fo.adamw(learning_rate)),
        {"max_norm": 0.5, **LR},
        written=False,
    ),
    Row("clip", fo.clip, {"max_delta": 0.7}),
    Row("clip_by_global_norm", fo.clip_by_global_norm, {"max_norm": 0.5}, ({}, {"max_norm": 1e6})),
    Row("ema", fo.ema, {"decay": 0.9}, ({}, {"debias": False})),
    Row("identity", fo.identity),
    Row("inject_hyperparams", fo.inject_hyperparams(fo.adamw), {**LR, **ADAM}, ({}, {"learning_rate": decay_schedule})),
    Row(
        "masked",
        lambda step_size, **v: fo.masked(fo.chain(fo.trace(0.9), fo.scale(step_size)), **{"mask": lambda path, p: p.ndim > 0, **v}),
        {"step_size": -0.3},
        ({}, {"otherwise": "zero"}),
        reads_shape=True,
        written=False,
    ),
    Row(
        "partition",
        lambda learning_rate: fo.partition(
            {"matrix": fo.chain(fo.clip_by_global_norm(0.5), fo.adam(learning_rate)), "rest": fo.sgd(0.2)},
            lambda path, p: "matrix" if p.ndim > 1 else "rest",
        ),
        LR,
        reads_shape=True,
        written=False,
    ),
    Row("scale", fo.scale, {"step_size": -0.3}),
    Row("scale_by_adadelta", fo.scale_by_adadelta, {"rho": 0.9, "eps": 1e-3}),
    Row("scale_by_adam", fo.scale_by_adam, ADAM, ({}, {"nesterov": True}, {"amsgrad": True}, {"amsgrad": "torch"}, {"eps_root": 1e-3})),
    Row("scale_by_adamax", fo.scale_by_adamax, ADAM),
    Row("scale_by_learning_rate", fo.scale_by_learning_rate, LR, ({}, {"flip_sign": False}, {"learning_rate": decay_schedule})),
    Row("scale_by_lion", fo.scale_by_lion, {"b1": 0.9, "b2": 0.99}, smooth=False),
    Row(
        "scale_by_rms",
        fo.scale_by_rms,
        {"decay": 0.9, "eps": 1e-3},
        ({}, {"eps_in_sqrt": False}, {"bias_correction": True}, {"initial_scale": 0.5}),
    ),
    Row("scale_by_rss", fo.scale_by_rss, {"eps": 1e-3}, ({}, {"initial_accumulator_value": 0.0}, {"eps_in_sqrt": False})),
    Row("scale_by_schedule", lambda: fo.scale_by_schedule(decay_schedule), written=False),
    Row("scale_by_stddev", fo.scale_by_stddev, {"decay": 0.9, "eps": 1e-3}, ({}, {"eps_in_sqrt": False}, {"bias_correction": True})),
    Row("set_to_zero", fo.set_to_zero),
    Row("sign", fo.sign, smooth=False),
    Row("stateless", lambda: fo.stateless(lambda updates, params: fo.tree.map(lambda u: 2 * u, updates)), passes_none=False, written=False),
    Row("trace", fo.trace, {"decay": 0.9}, ({}, {"nesterov": True}, {"dampening": 0.5})),
    Row("zero_nans", fo.zero_nans),
    # optimizers
    Row("adadelta", fo.adadelta, {"learning_rate": 1.0, "eps": 1e-3, "weight_decay": 0.1}),
    Row("adagrad", fo.adagrad, {**LR, "eps": 1e-3}),
    Row("adam", fo.adam, {**LR, **ADAM}, ({}, {"learning_rate": decay_schedule})),
    Row("adamax", fo.adamax, {**LR, **ADAM}),
    Row("adamw", fo.adamw, {**LR, **ADAM, "weight_decay": 0.1}, ({}, {"mask": lambda path, p: p.ndim > 1})),
    Row("amsgrad", fo.amsgrad, {**LR, **ADAM}),
    Row("lion", fo.lion, {**LR, "weight_decay": 0.1}, smooth=False),
    Row("nadam", fo.nadam, {**LR, **ADAM}),
    Row("noisy_sgd", fo.noisy_sgd, {**LR, "eta": 0.1}, keyed=True),
    Row("rmsprop", fo.rmsprop, {**LR, "eps": 1e-3}, ({}, {"centered": True, "momentum": 0.9}, {"momentum": 0.9, "nesterov": True})),
    Row("sgd", fo.sgd, LR, ({}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True})),
    Row("sign_sgd", fo.sign_sgd, LR, smooth=False),
]

NOT_TRANSFORMATIONS = {
    "Each",
    "GradientTransformation",
    "Scalar",
    "ScalarOrSchedule",
    "StageState",
    "Sweep",
    "apply_updates",
    "compiled_step",
    "describe",
    "get",
    "leafwise",
    "load_state_dict",
    "state_dict",
    "sweep",
    "transformation",
}
"""Public names that need no row here (schedules have their own table in `test_schedules.py`)."""
