"""Transformations that work at some steps only, by a decision once a step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from functorch_opt import tree
from functorch_opt._core.decision import chosen, known
from functorch_opt._core.once import Once, check_declared, check_reads
from functorch_opt._core.state import StageState, check_around
from functorch_opt._core.transformation import GradientTransformation
from functorch_opt.tree import PyTree

__all__ = ["gate"]


class Gate(GradientTransformation):
    """What `gate` makes. Its parts are attributes, from which every execution is derived."""

    why = "not_due"
    skips: Callable[[Mapping[str, Tensor]], Tensor] | None = None

    def __init__(self, inner: GradientTransformation, once: Once, otherwise: str) -> None:
        self.inner, self.once, self.otherwise = inner, once, otherwise
        self.name = once.name
        self.last = inner.last
        self.extra_args = {**once.extra_args, **inner.extra_args}

    def explained(
        self,
        why: str,
        skips: Callable[[Mapping[str, Tensor]], Tensor] | None = None,
    ) -> Gate:
        """The same gate, which says why it is closed, and how often it was, from shared values.

        Nothing is said of one that leaves out no work of an optimizer: ``why=""``.
        """
        self.why = why
        self.skips = skips
        return self

    def rebuilt(
        self, f: Callable[[GradientTransformation], GradientTransformation]
    ) -> Gate:
        """The same gate, around what `f` makes of the inner transformation."""
        return Gate(f(self.inner), self.once, self.otherwise)

    def check_state(self, state: Any) -> None:
        check_around(state, self.name, "gate", self.once.keys, ())

    def decided(
        self,
        updates: PyTree,
        state: Any,
        params: PyTree | None,
        extra: Mapping[str, Any],
    ) -> tuple[Any, dict[str, Tensor]]:
        """Whether `inner` works at this step, and the next shared values.

        The decision is a bool if the host knows it, and otherwise a 0-dim tensor.
        """
        self.check_state(state)
        if params is None and self.once.needs_params:
            raise ValueError(
                f"{self.name} reads the parameters: call update(updates, state, params)."
            )
        shared = state["gate"].shared
        mine = {name: extra[name] for name in self.once.extra_args if name in extra}
        trees = {"updates": updates, "params": params}
        hypers = self.once.hypers(shared, 0)
        now, new = self.once.prepared(hypers, shared, trees, mine)
        active = now["active"]
        host = known(active)
        return (active if host is None else host), new

    def _init(self, params: PyTree) -> dict[str, PyTree]:
        return {
            "inner": self.inner.init(params),
            "gate": StageState(self.once.first(params), {}),
        }

    def _update(
        self,
        updates: PyTree,
        state: dict[str, PyTree],
        params: PyTree | None,
        **extra: Any,
    ) -> tuple[PyTree, dict[str, PyTree]]:
        active, shared = self.decided(updates, state, params, extra)
        kept = StageState(shared, {})
        if active is False:
            return self.instead(updates), {"inner": state["inner"], "gate": kept}
        mine = {name: extra[name] for name in self.inner.extra_args if name in extra}
        moved, inner = self.inner.update(updates, state["inner"], params, **mine)
        if active is not True:
            moved = tree.map(
                lambda u, g: chosen(active, u, g), moved, self.instead(updates)
            )
            inner = tree.map(
                lambda new, old: chosen(active, new, old), inner, state["inner"]
            )
        return moved, {"inner": inner, "gate": kept}

    def instead(self, updates: PyTree) -> PyTree:
        """The updates of a step at which `inner` does not work."""
        return updates if self.otherwise == "pass" else tree.map(tree.zeros_like, updates)


def gate(
    inner: GradientTransformation,
    active: Callable[..., Any],
    *,
    shared: Mapping[str, Tensor] | None = None,
    otherwise: Literal["zero", "pass"] = "zero",
) -> Gate:
    """A transformation that works only at the steps at which `active` says so.

    At the other steps its state stays as it is, and so do its counts and schedules. If the host
    knows the decision, `inner` is not even run at those steps. In a graph, under vmap and on a GPU
    the decision is a choice between values, and nobody waits for the device.

    Args:
        inner: the transformation.
        active: a function that says whether to work. It returns a 0-dim bool tensor, or
            ``(that, {shared: new value})``. It reads by name: ``count`` (of all steps),
            ``updates``, ``params``, shared values, and extra arguments after ``*``.
        shared: ``{name: first value}``; the values are tensors.
        otherwise: the update at the other steps: ``"zero"``, or ``"pass"`` for the update that came
            in.

    Returns:
        A transformation whose state is ``{"inner": state, "gate": StageState(shared, {})}``.

    Raises:
        TypeError: `inner` is not a transformation; `active` reads a name that nothing provides.
        ValueError: `otherwise` is something else.

    Example:
        >>> import torch, functorch_opt as fo
        >>> tx = fo.gate(fo.sgd(1.0), lambda count: count % 2 == 1)
        >>> state = tx.init([torch.zeros(1)])
        >>> for _ in range(2):
        ...     updates, state = tx.update([torch.ones(1)], state)
        ...     print(updates)
        [tensor([0.])]
        [tensor([-1.])]
    """
    if not isinstance(inner, GradientTransformation):
        raise TypeError(
            f"gate takes a transformation, e.g. adamw(1e-3); got {type(inner).__name__} {inner!r}."
        )
    if otherwise not in ("zero", "pass"):
        raise ValueError(f"otherwise must be 'zero' or 'pass'; got {otherwise!r}.")
    check_declared(None, shared, None)
    once = Once("gate", active, {}, shared or {}, one_clock=True)
    check_reads(
        "gate", "active", once.reads, {"updates", "params", "count", *once.shared}
    )
    once.read_result = _decision
    return Gate(inner, once, otherwise)


def _decision(result: Any) -> Any:
    """What `active` returned, as `prepare` would return it."""
    flag, changed = result if isinstance(result, tuple) else (result, {})
    if not isinstance(flag, (bool, Tensor)) or (isinstance(flag, Tensor) and flag.dim()):
        raise TypeError(
            "active must return a 0-dim bool tensor, or (that, {shared: new value}); "
            f"it returned {type(flag).__name__}."
        )
    return {"active": flag if isinstance(flag, bool) else flag.to(torch.bool)}, changed
