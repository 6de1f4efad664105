"""A float32 copy of low-precision parameters, kept in the state: what is too small for bfloat16 adds up there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from functorch_opt import tree
from functorch_opt._core.transformation import GradientTransformation, transformation
from functorch_opt.tree import PyTree, StageState

__all__ = ["keep_master_weights"]


class MasterWeights(GradientTransformation):
    """What `keep_master_weights` makes: `inner`, and an elementwise function of one tensor before and after it.

    An execution that knows them can run all three in one pass: `enter`, the rules of `inner` with its result as ``p``, `leave`.
    """

    last = True

    def __init__(self, inner: GradientTransformation) -> None:
        if not isinstance(inner, GradientTransformation):
            raise TypeError(
                f"keep_master_weights takes a transformation, e.g. adamw(1e-3); got {type(inner).__name__} {inner!r}."
            )
        self.name, self.extra_args, self.inner = "keep_master_weights", inner.extra_args, inner
        self.rebuilt = lambda f: MasterWeights(f(inner))

    @staticmethod
    def enter(master: Tensor, p: Tensor) -> Tensor:
        """The master copy; where the parameter is not what that rounds to, somebody has set it, and it counts."""
        return torch.where(master.to(p.dtype) == p, master, p.to(master.dtype))

    @staticmethod
    def leave(u: Tensor, master: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
        """The update that takes `p` to the new master copy, and that copy: what ``p + update`` is in float32, before it is rounded."""
        wide = p.to(master.dtype)
        u = (master + u).to(master.dtype) - wide
        return u, wide + u

    def check_state(self, state: Any) -> None:
        if not isinstance(state, dict) or state.keys() != {"inner", "weights"}:
            held = list(state) if isinstance(state, dict) else type(state).__name__
            raise ValueError(
                f"this is not a state of keep_master_weights, which has inner and weights: it holds {held}."
            )

    def _init(self, params: PyTree) -> dict[str, PyTree]:
        master = tree.map(lambda p: p.to(tree.at_least_float32(p.dtype), copy=True), params)
        return {"inner": self.inner.init(master), "weights": StageState({}, {"master": master})}

    def _update(
        self, updates: PyTree, state: dict[str, PyTree], params: PyTree | None, **extra: Any
    ) -> tuple[PyTree, dict[str, PyTree]]:
        self.check_state(state)
        if params is None:
            raise ValueError(
                "keep_master_weights reads the parameters: call update(updates, state, params)."
            )
        kept = state["weights"].slots["master"]
        now = tree.map(self.enter, kept, params, names=("the state's master", "params"))
        updates, inner = self.inner.update(updates, state["inner"], now, **extra)
        us, spec = tree.flatten_tensors(updates, "updates")
        old, ms, ps = (
            tree.match(updates, spec, t, names=("updates", "params")) for t in (kept, now, params)
        )
        pairs = [
            (None, m) if u is None else self.leave(u, w, p)
            for u, m, w, p in zip(us, old, ms, ps, strict=True)
        ]
        master = tree.like(kept, tree.unflatten(spec, [m for _, m in pairs]))
        return tree.unflatten(spec, [u for u, _ in pairs]), {
            "inner": inner,
            "weights": StageState({}, {"master": master}),
        }


@transformation
def keep_master_weights(inner: GradientTransformation) -> GradientTransformation:
    """Run `inner` on a float32 copy of the parameters, kept in the state. The parameters are always that copy, rounded once.

        m' = m + inner(g, m)        u = m' - p        then  p + u = m'  is rounded to the dtype of p

    Every stage of `inner` sees the copy as its parameters, weight decay too. So bfloat16 training takes the steps that float32 training
    would take with the same gradients, where ``p + u`` alone loses every step below 1/512 of ``p``.

    The copy is ``p + u`` as float32 has it. Where a step changes a parameter to less than half or more than twice of what it was, that is
    ``m'`` rounded once more, at the scale of the larger of the two. A parameter that was set from outside (clamped, loaded) is no longer
    the rounded copy, and is taken as it is. One that overflows its dtype is lost, with its copy: inf, then NaN.

    It looks at the new parameters, so it comes last in a chain, before `params_ema` only, which then averages the copy. For float32 and
    wider parameters it is a plain copy, and changes nothing but memory: leave them out with `partition`.

    Args:
        inner: a whole optimizer, with its learning rate.

    Raises:
        TypeError: `inner` is no transformation.
        ValueError: ``update`` called without params.

    Source: Micikevicius et al., "Mixed Precision Training", 2018, sec. 3.1.

    Example:
        >>> import torch, functorch_opt as fo
        >>> params = {"w": torch.tensor(1.0, dtype=torch.bfloat16)}
        >>> def after_1000_steps(tx, p):
        ...     state = tx.init(p)
        ...     for _ in range(1000):
        ...         updates, state = tx.update({"w": torch.tensor(1.0, dtype=torch.bfloat16)}, state, p)
        ...         p = fo.apply_updates(p, updates)
        ...     return p["w"]
        >>> after_1000_steps(fo.sgd(5e-4), params), after_1000_steps(fo.keep_master_weights(fo.sgd(5e-4)), params)
        (tensor(1., dtype=torch.bfloat16), tensor(0.5000, dtype=torch.bfloat16))
    """
    return MasterWeights(inner)
