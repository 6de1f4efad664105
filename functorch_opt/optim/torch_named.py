"""What the optimizers with torch.optim's names have in common.

Each has torch.optim's arguments, defaults, numbers and state keys, and is a short chain of stages
of the functional layer. A class is written as one declaration and one function:

    _names       keys of ``state[p]`` that torch calls otherwise than the stages do
    _structural  options that, when zero, leave a stage out
    _fixed       options that are no hyperparameters although they look like numbers
    _ranges      what torch's errors call an option, and where it must lie
    __init__     torch's arguments and defaults; each that is no flag is an option of the groups
    _chain       the chain of these options; it hands a number on as it is, because it may be a
                 tensor that is written to before every step

What chooses among torch's implementations (``foreach``, ``fused``) is accepted and has no effect.
``capturable`` means what it does in torch. ``differentiable`` belongs to the functional layer.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from functorch_opt._core.chain import chain
from functorch_opt._core.transformation import GradientTransformation
from functorch_opt.optim.adapter import Optimizer
from functorch_opt.optim.checkpoint import KEYS
from functorch_opt.optim.codes import with_scales
from functorch_opt.optim.options import FLAGS, plain
from functorch_opt.transforms.decay import add_decayed_weights
from functorch_opt.transforms.scale import scale, scale_by_learning_rate

Number = float | Tensor

Range = tuple[str, float, float]
_inf = float("inf")
RANGES: dict[str, Range] = {
    "lr": ("learning rate", 0, _inf),
    "betas": ("beta parameter", 0, 1),
    "eps": ("epsilon value", 0, _inf),
    "rho": ("rho value", 0, 1),
    "weight_decay": ("weight_decay value", 0, _inf),
    "momentum": ("momentum value", 0, _inf),
    "lr_decay": ("lr_decay value", 0, _inf),
    "momentum_decay": ("momentum_decay value", 0, _inf),
    "initial_accumulator_value": ("initial_accumulator_value value", 0, _inf),
}
"""What torch's errors call an option, and where it must lie: ``[low, high)``.

Tensors are not looked into.
"""


class TorchNamed(Optimizer):
    _fixed: ClassVar[tuple[str, ...]] = ()
    """Options that are no hyperparameters although they look like numbers: where they change, the
    chain is another one."""
    _ranges: ClassVar[dict[str, Range]] = RANGES
    _sees_names: ClassVar = False

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        KEYS.update(with_scales(cls._names).values())

    def _begin(self, given: dict[str, Any], **options: Any) -> None:
        """What every constructor consists of; `given` are its ``locals()``.

        Constructors are written out, and not made from `_chain`, so that editors, type checkers and
        the API page know their arguments.
        """
        given = {**given, **options}
        _ = given.pop("self")
        params = given.pop("params")
        compile = given.pop("compile")
        state = given.pop("state")
        owners = given.pop("owners")
        if given.pop("differentiable", False):
            raise ValueError(
                f"{type(self).__name__} updates in place. To differentiate through updates use the "
                "functional layer: tx.update and apply_updates."
            )
        options = {n: plain(value) for n, value in given.items() if n not in FLAGS}
        # Somebody writes weight_decay=False.
        options |= {n: int(options[n]) for n in self._ranges if options.get(n) is False}
        # As in torch, an argument outside its range is an error before any parameter is looked at.
        self._check(options)
        numbers = [
            name
            for name, value in options.items()
            if name not in self._fixed and not isinstance(value, bool)
        ]
        defaults = {**given, **options}
        self._setup(params, defaults, numbers, compile, state=state, owners=owners)

    def _check(self, options: dict[str, Any]) -> None:
        for name, (what, low, high) in self._ranges.items():
            value = options.get(name)
            for i, number in enumerate(
                value if isinstance(value, (tuple, list)) else (value,)
            ):
                if isinstance(number, (int, float)) and not low <= number < high:
                    place = f" at index {i}" if isinstance(value, (tuple, list)) else ""
                    raise ValueError(
                        f"Invalid {what}{place}: {number}. It must be in [{low}, {high})."
                    )
        super()._check(options)

    def _check_parameter(self, p: Tensor, group: dict[str, Any]) -> None:
        """Raise an error, torch's, for what cannot be a parameter of a group of this class."""

    @torch._disable_dynamo
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        try:
            group = self.param_groups[-1]
            for p in group["params"]:
                self._check_parameter(p, group)
        except Exception:
            self.param_groups.pop()
            raise


def parts(*stages: GradientTransformation | None) -> GradientTransformation:
    return chain(*(stage for stage in stages if stage is not None))


def ascend(maximize: bool) -> GradientTransformation | None:
    return scale(-1.0) if maximize else None


def is_zero(number: Any) -> bool:
    """Whether it leaves its stage out; a tensor may change, and does not."""
    return isinstance(number, (int, float)) and number == 0


def l2(weight_decay: Number) -> GradientTransformation | None:
    return None if is_zero(weight_decay) else add_decayed_weights(weight_decay)


def descent(
    *stages: GradientTransformation | None,
    lr: Any,
    weight_decay: Any = 0,
    maximize: bool = False,
    decoupled_weight_decay: bool = False,
) -> GradientTransformation:
    """The chain that most of torch's optimizers are: `stages`, weight decay before them or
    after."""
    decay = l2(weight_decay)
    decayed = (*stages, decay) if decoupled_weight_decay else (decay, *stages)
    return parts(ascend(maximize), *decayed, scale_by_learning_rate(lr))
