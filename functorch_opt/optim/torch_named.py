"""What the optimizers with torch.optim's names have in common.

Each has torch.optim's arguments, defaults, numbers and state keys, and is a short chain: of the stages of the functional layer where the
formulas agree, and of a rule beside the class where torch's algorithm is another one.

What chooses among torch's implementations (``foreach``, ``fused``, ``capturable``) is accepted and has no effect. ``differentiable``
belongs to the functional layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar

from torch import Tensor

from functorch_opt import tree
from functorch_opt._core.chain import chain
from functorch_opt._core.transformation import GradientTransformation
from functorch_opt.optim.adapter import Optimizer
from functorch_opt.transforms.decay import add_decayed_weights
from functorch_opt.transforms.scale import scale

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
"""What torch's errors call an option, and where it must lie: ``[low, high)``. Tensors are not looked into."""


class TorchNamed(Optimizer):
    _fixed: ClassVar[tuple[str, ...]] = ()
    """Options that are no hyperparameters although they look like numbers: where they change, the chain is another one."""
    _ranges: ClassVar[dict[str, Range]] = RANGES

    def _begin(
        self,
        params: Iterable[Any],
        options: dict[str, Any],
        *,
        differentiable: bool = False,
        compile: bool = False,
        **flags: Any,
    ) -> None:
        """Take torch's arguments: `options` say what is computed, `flags` how."""
        if differentiable:
            raise ValueError(
                f"{type(self).__name__} updates in place. To differentiate through updates use the functional layer: "
                "tx.update and apply_updates."
            )
        self._check(
            options
        )  # as in torch, an argument outside its range is an error before any parameter is looked at
        numbers = [
            name
            for name, value in options.items()
            if name not in self._fixed and not isinstance(value, bool)
        ]
        self._setup(params, {**options, **flags}, numbers, compile)

    def _check(self, options: dict[str, Any]) -> None:
        for name, (what, low, high) in self._ranges.items():
            value = options.get(name)
            for i, number in enumerate(value if isinstance(value, (tuple, list)) else (value,)):
                if isinstance(number, (int, float)) and not low <= number < high:
                    place = f" at index {i}" if isinstance(value, (tuple, list)) else ""
                    raise ValueError(
                        f"Invalid {what}{place}: {number}. It must be in [{low}, {high})."
                    )
        super()._check(options)

    def _check_parameter(self, p: Tensor) -> None:
        """Raise an error, torch's, for what cannot be a parameter of this class."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        try:
            for p in self.param_groups[-1]["params"]:
                self._check_parameter(p)
        except Exception:
            self.param_groups.pop()
            raise


def parts(*stages: GradientTransformation | None) -> GradientTransformation:
    return chain(*(stage for stage in stages if stage is not None))


def ascend(maximize: bool) -> GradientTransformation | None:
    return scale(-1.0) if maximize else None


def l2(weight_decay: Number) -> GradientTransformation | None:
    return (
        None
        if isinstance(weight_decay, (int, float)) and weight_decay == 0
        else add_decayed_weights(weight_decay)
    )


def scalar_slot(value: float) -> Callable[[Tensor], Tensor]:
    """A slot with one real number for a parameter, `value` at first; in its dtype, at least float32."""
    return lambda p: p.new_full((), value, dtype=tree.at_least_float32(p.real.dtype))
