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
from functorch_opt.base import GradientTransformation
from functorch_opt.combine import chain
from functorch_opt.optim.adapter import Optimizer
from functorch_opt.transforms.decay import add_decayed_weights
from functorch_opt.transforms.scale import scale

Number = float | Tensor


class TorchNamed(Optimizer):
    _fixed: ClassVar[tuple[str, ...]] = ()
    """Options that are no hyperparameters although they look like numbers: where they change, the chain is another one."""

    def _begin(
        self, params: Iterable[Any], options: dict[str, Any], *, differentiable: bool = False, compile: bool = False, **flags: Any
    ) -> None:
        """Take torch's arguments: `options` say what is computed, `flags` how."""
        if differentiable:
            raise ValueError(
                f"{type(self).__name__} updates in place. To differentiate through updates use the functional layer: "
                "tx.update and apply_updates."
            )
        self._chain(**options)  # as in torch, an argument outside its range is an error before any parameter is looked at
        numbers = [name for name, value in options.items() if name not in self._fixed and not isinstance(value, bool)]
        self._setup(params, {**options, **flags}, numbers, compile)

    def _refusal(self, p: Tensor) -> str | None:
        """Why `p` cannot be a parameter of this class, for those that do not take every shape or dtype."""
        return None

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        for i, p in enumerate(self.param_groups[-1]["params"]):
            if refusal := self._refusal(p):
                self.param_groups.pop()
                raise ValueError(f"parameter {i} of the group is {p.dtype} of shape {tuple(p.shape)}. {refusal}")


def parts(*stages: GradientTransformation | None) -> GradientTransformation:
    return chain(*(stage for stage in stages if stage is not None))


def ascend(maximize: bool) -> GradientTransformation | None:
    return scale(-1.0) if maximize else None


def l2(weight_decay: Number) -> GradientTransformation | None:
    return None if isinstance(weight_decay, (int, float)) and weight_decay == 0 else add_decayed_weights(weight_decay)


def scalar_slot(value: float) -> Callable[[Tensor], Tensor]:
    """A slot with one real number for a parameter, `value` at first; in its dtype, at least float32."""
    return lambda p: p.new_full((), value, dtype=tree.at_least_float32(p.real.dtype))
