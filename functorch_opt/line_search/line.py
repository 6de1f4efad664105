"""What line searches share.

Here are a loop that ends when the last of many problems has ended, and the line
``phi(a) = f(params + a updates)``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import grad_and_value

from functorch_opt import tree
from functorch_opt._core import sharding, structure
from functorch_opt._core.state import StageState
from functorch_opt.tree import PyTree

# ---- a loop whose length depends on values -------------------------------------------------------


class _AnyOf(torch.autograd.Function):
    """Whether any element is true, in any of the problems of a vmap.

    The result is not batched, so Python may ask for its value.
    """

    @staticmethod
    def forward(flag: Tensor) -> Tensor:
        return flag.any()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def vmap(info: Any, in_dims: Any, flag: Tensor) -> tuple[Tensor, None]:
        return _AnyOf.apply(flag), None


def any_of(flag: Tensor) -> bool:
    """Whether `flag` is true in any problem of a vmap.

    Compiled code cannot ask for it. There the answer is True, and loops run to their bound.
    """
    return torch.compiler.is_compiling() or bool(_AnyOf.apply(flag))


def where(flag: Tensor, new: PyTree, old: PyTree) -> PyTree:
    """`new` where the 0-dim `flag` is true, `old` elsewhere, leaf by leaf."""

    def chosen(a: Tensor, b: Tensor) -> Tensor:
        return sharding.on_part(lambda x, y: torch.where(flag, x, y), a, a, b)

    return tree.map(chosen, new, old)


def violation(x: Tensor) -> Tensor:
    """By how much ``x <= 0`` is violated. It is infinite where x is NaN."""
    return torch.where(x.isnan(), torch.inf, x.clamp(min=0))


def check_trials(name: str, steps: Any) -> None:
    """Raise ValueError for a number of trials that cannot bound a loop."""
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(
            f"{name} must be a whole number, 1 or greater: it bounds the loop; got {steps!r}."
        )


# ---- a line through the parameters ---------------------------------------------------------------


class Line:
    """``phi(a) = f(params + a updates)``.

    Parameters without an update stay where they are, and f is not differentiated with respect to
    them.
    """

    def __init__(
        self,
        name: str,
        updates: PyTree,
        params: PyTree | None,
        value: Any,
        grad: PyTree,
        value_fn: Callable[[PyTree], Any],
    ):
        if params is None:
            raise ValueError(
                f"{name} reads the parameters: "
                "call update(updates, state, params, value=..., grad=..., value_fn=...)."
            )
        if not callable(value_fn):
            raise TypeError(
                f"{name}: value_fn must be a function of the params that returns the value; "
                f"got {type(value_fn).__name__}."
            )
        self.name, self.params, self.value_fn = name, params, value_fn
        us, spec = structure.flatten_tensors(updates, "updates")
        self.ps = structure.match(updates, spec, params, names=("updates", "params"))
        gs = structure.match(updates, spec, grad, names=("updates", "grad"))
        self._check_shapes(updates, us, gs)
        self.moved = [i for i, u in enumerate(us) if u is not None]
        self.us: list[Any] = [us[i] for i in self.moved]
        self.gs: list[Any] = [gs[i] for i in self.moved]
        self.dtype = value_dtype(self.us or tree.leaves(params))
        self.value = self._checked(value)
        self.slope = tree.dot(self.gs, self.us).to(self.dtype)

    def _check_shapes(self, updates: PyTree, us: list[Any], gs: list[Any]) -> None:
        of_leaves = zip(tree.paths(updates), us, self.ps, gs, strict=True)
        for path, u, p, g in of_leaves:
            if u is None:
                continue
            is_missing = p is None or g is None
            if is_missing or not u.shape == p.shape == g.shape:
                shapes = [None if x is None else tuple(x.shape) for x in (u, p, g)]
                raise ValueError(
                    f"{self.name}: at {path!r} the update, the parameter and grad have the "
                    f"shapes {shapes}; they must be equal."
                )

    def _checked(self, value: Any) -> Tensor:
        # A Python number is given the dtype of the line at once, as the default dtype may be
        # narrower.
        value = tree.whole(value)
        value = (
            value
            if isinstance(value, Tensor)
            else torch.as_tensor(value, dtype=self.dtype)
        )
        if value.numel() != 1 or value.is_complex():
            raise ValueError(
                f"{self.name}: the value must be one real number; "
                f"got {value.dtype} of shape {tuple(value.shape)}."
            )
        return value.reshape(()).to(self.dtype)

    def _at(self, moved: list[Tensor]) -> Tensor:
        ps = list(self.ps)
        for i, p in zip(self.moved, moved, strict=True):
            ps[i] = p
        _, spec = tree.flatten(self.params)
        value = self.value_fn(tree.unflatten(spec, ps))
        return self._checked(value)

    def _point(self, size: Tensor) -> list[Tensor]:
        def moved(p: Tensor, u: Tensor) -> Tensor:
            return (p + size.to(u.real.dtype) * u).to(p.dtype)

        pairs = zip(self.moved, self.us, strict=True)
        return [sharding.on_part(moved, self.ps[i], self.ps[i], u) for i, u in pairs]

    def value_at(self, size: Tensor) -> Tensor:
        """The value at a step size."""
        return self._at(self._point(size))

    def at(self, size: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """The value, the slope and the gradients at a step size."""
        point = self._point(size)
        if sharding.any_sharded(point):
            gs, value = self._grad_of_parts(point)
        else:
            gs, value = grad_and_value(self._at)(point)
        slope = tree.dot(gs, self.us).to(self.dtype)
        return value, slope, list(gs)

    @torch.enable_grad()
    def _grad_of_parts(self, point: list[Any]) -> tuple[list[Any], Tensor]:
        """The gradients and the value where tensors are sharded: autograd goes through messages."""
        parts = [tree.part_of(p).detach().requires_grad_() for p in point]
        pairs = zip(parts, point, strict=True)
        value = self._at([_joined(x, p) for x, p in pairs])
        found = torch.autograd.grad(value, parts, allow_unused=True)
        gs = []
        for x, p, g in zip(parts, point, found, strict=True):
            gs.append(_joined(torch.zeros_like(x) if g is None else g, p))
        return gs, value.detach()

    def finish(
        self,
        updates: PyTree,
        size: Tensor,
        gs: list[Tensor] | None,
        state: StageState,
        shared: dict[str, Tensor],
    ) -> Any:
        """The scaled updates and the next state, in which `gs` are kept as the slot ``grad``."""
        leaves, spec = tree.flatten(updates)
        slots = {}
        if gs is not None:
            kept = structure.match(
                updates, spec, state.slots["grad"], names=("updates", "the state's grad")
            )
            for i, g in zip(self.moved, gs, strict=True):
                kept[i] = g.to(kept[i].dtype)
            slots["grad"] = structure.like(state.slots["grad"], spec, kept)

        def sized(u: Tensor) -> Tensor:
            return size.to(u.real.dtype) * u

        scaled = [u if u is None else sharding.on_part(sized, u, u) for u in leaves]
        return tree.unflatten(spec, scaled), StageState(shared, slots)


def _joined(part: Tensor, like: Any) -> Any:
    return sharding.join(part, like) if sharding.is_sharded(like) else part


def value_dtype(leaves: list[Tensor]) -> torch.dtype:
    """The dtype of values and step sizes: real, as wide as the widest leaf, at least float32."""
    widest = tree.at_least_float32(leaves[0].dtype)
    for x in leaves[1:]:
        widest = torch.promote_types(widest, tree.at_least_float32(x.dtype))
    return torch.zeros((), dtype=widest).real.dtype


def first_state(params: PyTree, store_grad: bool, *errors: str) -> StageState:
    """The state of a search before the first step."""
    p = tree.part_of(tree.leaves(params)[0])
    dtype = value_dtype(tree.leaves(params))

    def number(value: float) -> Tensor:
        return p.new_zeros((), dtype=dtype) + value

    shared = {
        "learning_rate": number(1.0),
        "value": number(float("inf")),
        "num_linesearch_steps": tree.zero_count(params),
    }
    shared |= {name: number(float("inf")) for name in errors}
    slots = {}
    if store_grad:
        slots["grad"] = tree.map(tree.zeros_like, params)
    return StageState(shared, slots)


def check_state(
    name: str, state: Any, shared: tuple[str, ...], slots: tuple[str, ...]
) -> None:
    """Raise ValueError if this is not a state of the stage."""
    if (
        not isinstance(state, StageState)
        or state.shared.keys() != set(shared)
        or state.slots.keys() != set(slots)
    ):
        held = (
            [*state.shared, *state.slots]
            if isinstance(state, StageState)
            else type(state).__name__
        )
        raise ValueError(
            f"this is not a state of {name}, which keeps {[*shared, *slots]}: it holds {held}. "
            "Use the state that its own init or update returned."
        )
