"""Any transformation as a `torch.optim.Optimizer`: the same pure update, with its state kept where torch's tools look for it.

A step gathers the gradients and the state into trees, calls ``tx.update``, and writes what came back into the parameters and the state,
in place. Two places are the truth, and are read anew at every step, because schedulers, checkpoints and wrappers write into them:

    opt.state[p]        a flat dict of tensors: this parameter's slots, e.g. ``exp_avg``, and its counts, e.g. ``step``
    opt.param_groups    the hyperparameters; ``lr`` is always among them

Counts are kept per parameter, as torch does: without a gradient a parameter keeps its count. Values that a stage shares among all
parameters (a noise key) are kept with the first one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor

from functorch_opt.base import GradientTransformation
from functorch_opt.combine import Chain, chain, hyperparameters
from functorch_opt.optim.plan import Make, Plan, layout
from functorch_opt.rule import leafwise

__all__ = ["Optimizer"]


class Optimizer(torch.optim.Optimizer):
    """A ready transformation, or a factory of one, as a `torch.optim.Optimizer`.

    ``Optimizer(params, tx)``: the group option ``lr``, 1.0 by default, multiplies what `tx` gives; schedulers drive it.
    ``Optimizer(params, factory, **hyper)``: the factory's arguments become group options, ``learning_rate`` under the name ``lr``; numbers
    may differ from group to group and change between steps. All groups make one tree: a global norm is that of all of them. (Groups whose
    other options differ, a bool for example, are updated separately.) A schedule given as ``learning_rate`` stays in the transformation,
    and ``lr`` multiplies it.

    Args:
        params: parameters, ``(name, parameter)`` pairs or group dicts, as for every torch optimizer. With names, masks and labels see
            the tree ``{name: parameter}``, otherwise a list.
        tx: a transformation, or a function that returns one.
        compile: run the step in place through `compiled_step`; the numbers are the same. The first step then takes seconds.
        **hyper: arguments of the function.

    Raises:
        TypeError: `tx` is neither; an argument that the function does not take; a parameter that is not floating or complex.
        ValueError: a hyperparameter outside its range.

    Example:
        >>> import torch, functorch_opt as fo
        >>> model = torch.nn.Linear(2, 1)
        >>> tx = fo.chain(fo.clip_by_global_norm(1.0), fo.adamw(3e-4))
        >>> opt = fo.optim.Optimizer(model.parameters(), tx)
        >>> opt = fo.optim.Optimizer(model.parameters(), fo.adamw, learning_rate=3e-4, weight_decay=0.1)
        >>> opt.param_groups[0]["lr"], opt.param_groups[0]["weight_decay"]
        (0.0003, 0.1)
        >>> model(torch.ones(1, 2)).sum().backward()
        >>> opt.step()
        >>> sorted(opt.state[model.weight])
        ['scale_by_adam/mu', 'scale_by_adam/nu', 'step']
    """

    _names: ClassVar[dict[str, str]] = {}
    """Keys of ``state[p]`` that are called otherwise: {the chain's: torch's}."""
    _structural: ClassVar[tuple[str, ...]] = ()
    """Options that, when zero, leave a stage out."""

    def __init__(
        self,
        params: Iterable[Any],
        tx: GradientTransformation | Callable[..., GradientTransformation],
        *,
        compile: bool = False,
        **hyper: Any,
    ) -> None:
        if isinstance(tx, GradientTransformation):
            if hyper:
                raise TypeError(
                    f"a ready transformation takes no hyperparameters; got {', '.join(hyper)}. "
                    "Give the function that makes it: Optimizer(params, adamw, learning_rate=...)."
                )
            numbers: dict[str, Any] = {}
            others: dict[str, Any] = {}
        elif callable(tx):
            tx(**hyper)  # what it does not like about its arguments, it says now
            numbers, others = hyperparameters(tx, (), hyper)
        else:
            raise TypeError(f"tx must be a transformation or a function that returns one; got {type(tx).__name__} {tx!r}.")
        plain = {name: value for name, value in others.items() if isinstance(value, (bool, int, str, torch.dtype, type(None)))}
        fixed = {name: value for name, value in (others | numbers).items() if name not in plain and callable(value)}
        numbers = {name: value for name, value in numbers.items() if name not in fixed}
        fixed |= {name: value for name, value in others.items() if name not in plain}
        has_lr = "learning_rate" in numbers
        lr = numbers.pop("learning_rate", 1.0)
        self._recipe: tuple[Any, dict[str, Any], bool] = (tx, fixed, has_lr)
        self._setup(params, {"lr": lr, **numbers, **plain}, ("lr", *numbers), compile)

    def _setup(self, params: Iterable[Any], defaults: dict[str, Any], numbers: Iterable[str], compile: bool) -> None:
        """What every constructor ends with; `numbers` names the options that are hyperparameters."""
        self._compile = compile
        self._numbers = frozenset(numbers)
        self._plans: dict[Any, Plan] = {}
        self._called = {"step": False}
        super().__init__(params, defaults)

    def _chain(self, *args: Any, **options: Any) -> GradientTransformation:
        """The transformation for these group options, of which numbers may be tensors: 0-dim, or one entry per parameter."""
        tx, fixed, has_lr = self._recipe
        lr = options.pop("lr")
        if has_lr:
            return tx(**fixed, **options, learning_rate=lr)
        ready: GradientTransformation = tx if isinstance(tx, GradientTransformation) else tx(**fixed, **options)
        stages = ready.stages.values() if isinstance(ready, Chain) else [ready]
        return chain(*stages, leafwise(lambda g, lr: g * lr, hyper={"lr": lr}))

    # ---- what torch.optim.Optimizer asks for -----------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its parameters start with fresh state. A tensor lr is copied, so that groups do not share it.

        Args:
            param_group: ``{"params": ..., option: value, ...}``; options that are left out take their defaults.

        Raises:
            ValueError: an option outside its range.
            TypeError: a parameter that is not floating or complex.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._check({name: group[name] for name in self._options()})
        except Exception:
            self.param_groups.pop()
            raise
        if isinstance(group["lr"], Tensor):
            group["lr"] = group["lr"].clone()

    def _check(self, options: dict[str, Any]) -> None:
        """Raise an error for options of which no chain can be made."""
        if isinstance(lr := options["lr"], Tensor) and lr.numel() != 1:
            raise ValueError(f"Tensor lr must be 1-element; got shape {tuple(lr.shape)}.")
        self._chain(**options)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient, in place.

        Args:
            closure: evaluates the model anew and returns the loss; called with gradients enabled, before any gradient is read.

        Returns:
            What `closure` returned, or None.
        """
        self._called["step"] = True
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            self._advance()
        return loss

    # To see that steps come before theirs, torch's schedulers put a wrapper around step, which torch.compile cannot trace. Not around one
    # that says it has it. What the wrapper would set is `_opt_called`; in a dict, for Dynamo does not set attributes of optimizers.
    step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]

    @property
    def _opt_called(self) -> bool:
        return self._called["step"]

    @_opt_called.setter
    def _opt_called(self, value: bool) -> None:
        self._called["step"] = value

    @torch._disable_dynamo
    def init_state(self) -> None:
        """Create the state of all parameters now; otherwise the first step does.

        Call it before `torch.compile` of ``opt.step`` or of a training step: then there is one graph, from the first step on. And
        before ``torch.distributed.checkpoint`` asks for the state: it would make a step to have one. What is there stays.

        Example:
            >>> import torch, functorch_opt as fo
            >>> w = torch.nn.Parameter(torch.tensor(1.0))
            >>> opt = fo.optim.AdamW([w])
            >>> opt.init_state()
            >>> opt.state[w]["step"], w.item()
            (tensor(0.), 1.0)
        """
        with torch.no_grad():
            for fixed, groups in self._buckets():
                if any(group["params"] for group in groups):
                    self._plan(fixed, groups).initialize(groups, self.state)

    def _initialized(self) -> bool:
        for fixed, groups in self._buckets():
            plan = self._plans.get(fixed)
            if any(p.grad is not None for group in groups for p in group["params"]) and not (plan and plan.serves(groups, self.state)):
                return False
        return True

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` gave, or torch's optimizer of the same name. Every tensor is copied, and keeps its dtype.

        Args:
            state_dict: as from ``torch.load``. Options that it lacks keep their defaults.

        Raises:
            ValueError: the groups do not fit.
        """
        final: list[dict[str, Any]] = []

        def see_final(_: Any, given: dict[str, Any]) -> None:
            final.append(given)

        handle = self.register_load_state_dict_pre_hook(see_final)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        # torch casts every tensor but "step" to the dtype of its parameter: a noise key would lose its bits.
        saved = final[0]
        ids = [i for group in saved["param_groups"] for i in group["params"]]
        for i, p in zip(ids, [p for group in self.param_groups for p in group["params"]], strict=True):
            for name, value in saved["state"].get(i, {}).items():
                if isinstance(value, Tensor):
                    self.state[p][name] = value.to(self.state[p][name].device, copy=True)
                elif name == "step":
                    self.state[p][name] = torch.tensor(float(value))

    def __getstate__(self) -> dict[str, Any]:
        private: dict[str, Any] = {name: vars(self)[name] for name in ("_recipe", "_numbers", "_compile") if name in vars(self)}
        return {**super().__getstate__(), **private}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._plans = {}
        self.__dict__.setdefault("_called", {"step": False})
        for group in self.param_groups:
            for name, value in self.defaults.items():
                if name != "differentiable":
                    group.setdefault(name, value.clone() if isinstance(value, Tensor) else value)

    # ---- a step ------------------------------------------------------------------------------------------------------------

    def _advance(self) -> None:
        """Compute everything, then write everything: an error on the way leaves parameters and state as they were."""
        if torch.compiler.is_compiling() and not self._initialized():
            self.init_state()  # outside of the graph. Call it before torch.compile, and there is one graph.
        writes = [
            self._plan(fixed, groups).compute(groups, self.state, self._maker(fixed))
            for fixed, groups in self._buckets()
            if any(p.grad is not None for group in groups for p in group["params"])
        ]
        for write in writes:
            write()

    def _buckets(self) -> Iterable[tuple[tuple[Any, ...], list[dict[str, Any]]]]:
        """The groups, in order, by their options that are not numbers: each bucket is one tree with one transformation."""
        buckets: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
        for group in self.param_groups:
            for name, value in group.items():
                if isinstance(value, list) and name in self.defaults:
                    group[name] = tuple(value)
            fixed = tuple((name, group[name]) for name in self._options() if not self._varies(name, group[name]))
            buckets.setdefault(fixed, []).append(group)
        return buckets.items()

    def _options(self) -> list[str]:
        return [name for name in self.defaults if name not in _FLAGS]

    def _varies(self, name: str, value: Any) -> bool:
        """Whether a change of this option leaves the chain as it is: hyperparameters do, unless a zero leaves out a stage."""
        return name in self._numbers and (name not in self._structural or isinstance(value, Tensor) or value != 0)

    def _plan(self, fixed: tuple[Any, ...], groups: list[dict[str, Any]]) -> Plan:
        plan = self._plans.get(fixed)
        if plan is None or plan.layout != layout(groups):
            varying = [name for name in self._options() if name not in dict(fixed)]
            plan = self._plans[fixed] = Plan(self._maker(fixed), varying, groups, self._names, self._compile)
        return plan

    def _maker(self, fixed: tuple[Any, ...]) -> Make:
        return lambda numbers: self._chain(**dict(fixed), **numbers)


_FLAGS = ("foreach", "fused", "capturable", "differentiable")
"""Options by which torch chooses among its implementations. There is one here."""
