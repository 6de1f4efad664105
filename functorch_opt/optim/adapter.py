"""Any transformation as a `torch.optim.Optimizer`: the same pure update, with its state kept where torch's tools look for it.

A step gathers the gradients and the state into trees, calls ``tx.update``, and writes what came back into the parameters and the state,
in place. Two places are the truth, and are read anew at every step, because schedulers, checkpoints and wrappers write into them:

    opt.state[p]        a flat dict of tensors: this parameter's slots, e.g. ``exp_avg``, and its counts, e.g. ``step``; of a generic chain
                        by the path they have in its state, e.g. ``scale_by_adam/mu``, so that a stage more or less moves no other
    opt.param_groups    the hyperparameters; ``lr`` is always among them

Counts are kept per parameter, as torch does: without a gradient a parameter keeps its count. Values that a stage shares among all
parameters (a noise key) are kept with the first one.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor

from functorch_opt._core.chain import Chain, chain
from functorch_opt._core.checkpoint import LEFT_OVER, Fit
from functorch_opt._core.points import has_point
from functorch_opt._core.rule import leafwise
from functorch_opt._core.transformation import GradientTransformation
from functorch_opt.optim.checkpoint import Expected, check_form, expectations, fitted
from functorch_opt.optim.evaluation import held
from functorch_opt.optim.group_lr import then
from functorch_opt.optim.options import (
    FLAGS,
    arguments,
    check_like,
    check_number,
    only_sets_up,
)
from functorch_opt.optim.plan import Make, Plan, layout

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
        ['scale_by_adam/count', 'scale_by_adam/mu', 'scale_by_adam/nu']
    """

    _names: ClassVar[dict[str, str]] = {}
    """Keys of ``state[p]`` that are called otherwise: {the chain's: torch's}."""
    _structural: ClassVar[tuple[str, ...]] = ()
    """Options that, when zero, leave a stage out."""
    _uncounted: ClassVar[tuple[str, ...]] = ()
    """Keys that a checkpoint of torch's class may lack: SGD and Muon keep no step."""
    _evaluating = False

    def __init__(
        self,
        params: Iterable[Any],
        tx: GradientTransformation | Callable[..., GradientTransformation],
        *,
        compile: bool = False,
        **hyper: Any,
    ) -> None:
        numbers, plain, fixed = arguments(tx, hyper)
        has_lr = "learning_rate" in numbers
        lr = numbers.pop("learning_rate", 1.0)
        self._recipe: tuple[Any, dict[str, Any], bool] = (tx, fixed, has_lr)
        self._setup(params, {"lr": lr, **numbers, **plain}, ("lr", *numbers), compile)

    def _setup(
        self,
        params: Iterable[Any],
        defaults: dict[str, Any],
        numbers: Iterable[str],
        compile: bool,
    ) -> None:
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
        ready: GradientTransformation = (
            tx if isinstance(tx, GradientTransformation) else tx(**fixed, **options)
        )
        scaled = then(ready, leafwise(lambda g, lr: g * lr, hyper={"lr": lr}))
        return scaled if isinstance(scaled, Chain) else chain(scaled)

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
            self._check_group(group)
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

    def _check_group(self, group: dict[str, Any]) -> None:
        """Raise for options that no step could be made with."""
        for name in self._options():
            if isinstance(group[name], list):
                group[name] = tuple(group[name])  # as JSON has it
            if name in self._numbers:
                check_number(name, group[name])
            else:
                check_like(name, group[name], self.defaults[name])
        self._check({name: group[name] for name in self._options()})

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient, in place.

        A first step with zero lr and zero gradients (torch.distributed.checkpoint makes one) creates the state, and is not counted.

        Args:
            closure: evaluates the model anew and returns the loss; called with gradients enabled, before any gradient is read. A
                transformation that reads ``value`` (`scale_by_polyak`) gets this loss, and one that reads ``grad`` the gradients.

        Returns:
            What `closure` returned, or None.

        Raises:
            TypeError: the transformation reads ``value`` and there is no closure; it reads something else, such as the ``value_fn`` of
                a line search, which a closure cannot be.
        """
        if self._evaluating:
            raise RuntimeError(
                "the parameters hold their averages: step after leaving eval_params()."
            )
        self._called["step"] = True
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            self._advance(loss)
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
            if any(
                p.grad is not None for group in groups for p in group["params"]
            ) and not (plan and plan.serves(groups, self.state)):
                return False
        return True

    def load_state_dict(
        self, state_dict: dict[str, Any], *, strict: bool = False
    ) -> None:
        """Load what `state_dict` gave, or torch's optimizer of the same name. Every tensor is copied, and keeps its dtype.

        What is called alike is loaded, so the checkpoint of a chain outlives a stage that is put in or taken out. A chain that was put into
        another is found again by the end of its names: ``scale_by_adam/mu`` is loaded as ``adamw/scale_by_adam/mu``.

        Args:
            state_dict: as from ``torch.load``. Options that it lacks keep their defaults.
            strict: whether names that do not fit exactly are an error. False: a warning lists what was left over on either side.

        Raises:
            KeyError: names that do not fit, if strict.
            ValueError: groups that do not fit; an option outside its range; a shape that differs; a count that cannot be one.
            TypeError: no state dict; a value that is no tensor, or of a kind that cannot stand there.
            RuntimeError: inside `eval_params`.

        After an error, that of a hook too, the optimizer is as it was before.
        """
        if self._evaluating:
            raise RuntimeError(
                "the parameters hold their averages: load after leaving eval_params()."
            )
        if not isinstance(state_dict, Mapping):
            check_form(state_dict)
        before = self.state, self.param_groups
        given: dict[str, Any] = {}
        found: list[Fit] = []

        def take(_: Any, final: dict[str, Any]) -> dict[str, Any]:
            """The last hook before: keeps the state from torch, which would cast it (a noise key would lose its bits)."""
            check_form(final)
            given.update(final)
            return {**final, "state": {}}

        def fill(_: Any) -> None:
            """The first hook after: the groups are loaded."""
            found.append(self._fill(given))
            if strict and not found[0].exact:
                raise KeyError(str(found[0]))

        handles = [
            self.register_load_state_dict_pre_hook(take),
            self.register_load_state_dict_post_hook(fill, prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
            # A wrapper that lends its class from this one, as that of Lightning does, registers
            # hooks on one object and runs those of another: then nothing has been filled yet.
            if not found:
                fill(self)
            if found[0].missing or found[0].unexpected:
                warnings.warn(
                    f"{found[0]} {LEFT_OVER} With strict=True this is an error.",
                    stacklevel=2,
                )
        except BaseException:
            self.__setstate__({"state": before[0], "param_groups": before[1]})
            raise
        finally:
            for handle in handles:
                handle.remove()

    def _expected(self) -> dict[Tensor, dict[str, Expected]]:
        """What belongs into the state of each parameter."""
        expected: dict[Tensor, dict[str, Expected]] = {}
        for fixed, groups in self._buckets():
            params = [p for group in groups for p in group["params"]]
            if params:
                try:
                    expected |= zip(
                        params,
                        expectations(self._plan(fixed, groups), params),
                        strict=True,
                    )
                except Exception as error:
                    raise ValueError(
                        f"the options of this state dict make no optimizer of these parameters: {error}"
                    ) from error
        return expected

    def _fill(self, given: dict[str, Any]) -> Fit:
        """Take over the tensors of a state dict whose groups are loaded already."""
        for k, group in enumerate(self.param_groups):
            try:
                self._check_group(group)
            except Exception as error:  # noqa: PERF203
                raise ValueError(
                    f"group {k} of this state dict has options that do not fit: {error}"
                ) from error
        expected = self._expected()
        params = [p for group in self.param_groups for p in group["params"]]
        other = {
            key: value
            for key, value in given["state"].items()
            if not isinstance(value, Mapping)
        }  # a hook's own, as in torch
        given = {
            **given,
            "state": {
                key: entry for key, entry in given["state"].items() if key not in other
            },
        }
        entries, found = fitted(
            given, params, [expected[p] for p in params], self._uncounted
        )
        self.state = defaultdict(
            dict,
            {p: entry for p, entry in zip(params, entries, strict=True) if entry} | other,
        )
        self._plans = {}
        return found

    @contextmanager
    def eval_params(self) -> Iterator[None]:
        """Inside, the parameters hold the averages that a stage keeps of them (`params_ema`); afterwards they are as before, bit for bit.

        Also after an exception. Parameters without an average, or without a step so far, stay. Buffers are not touched: batch norm's are
        those of the parameters (`torch.optim.swa_utils.update_bn`, on a copy of the model, makes those of the averages).
        ``state_dict`` of the optimizer is the same inside, that of the model holds the averages.

        Raises:
            ValueError: nothing in the optimizer averages parameters, or two stages average the same one.
            RuntimeError: by `step` and `load_state_dict`, inside.

        Example:
            >>> import torch, functorch_opt as fo
            >>> w = torch.nn.Parameter(torch.tensor(0.0))
            >>> opt = fo.optim.Optimizer([w], fo.chain(fo.sgd(1.0), fo.params_ema(0.5)))
            >>> for _ in range(2):
            ...     w.grad = torch.tensor(-3.0)
            ...     opt.step()
            >>> with opt.eval_params():
            ...     w.item()
            5.0
            >>> w.item()
            6.0
        """
        values: dict[Tensor, Tensor] = {}
        averaging = False
        with torch.no_grad():
            for fixed, groups in self._buckets():
                plan = self._plan(fixed, groups)
                averaging |= has_point(plan.tx)
                values |= plan.points(groups, self.state)
        if not averaging:
            raise ValueError(
                "nothing in this optimizer averages the parameters: "
                "put params_ema(decay) last in the chain."
            )
        outside = self._evaluating
        with held(values):
            self._evaluating = True
            try:
                yield
            finally:
                self._evaluating = outside

    def __getstate__(self) -> dict[str, Any]:
        private: dict[str, Any] = {
            name: vars(self)[name]
            for name in ("_recipe", "_numbers", "_compile")
            if name in vars(self)
        }
        return {**super().__getstate__(), **private}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._plans = {}
        self.__dict__.setdefault("_called", {"step": False})
        for group in self.param_groups:
            for name, value in self.defaults.items():
                if name != "differentiable":
                    group.setdefault(
                        name, value.clone() if isinstance(value, Tensor) else value
                    )

    # ---- a step ------------------------------------------------------------------------------------------------------------

    def _advance(self, loss: Any = None) -> None:
        """Compute everything, then write everything: an error on the way leaves parameters and state as they were."""
        if torch.compiler.is_compiling() and not self._initialized():
            self.init_state()  # outside of the graph. Call it before torch.compile, and there is one graph.
        if only_sets_up(self.param_groups, self.state):
            self.init_state()
            return
        writes = [
            self._plan(fixed, groups).compute(
                groups, self.state, self._maker(fixed), loss
            )
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
            fixed = tuple(
                (name, group[name])
                for name in self._options()
                if not self._varies(name, group[name])
            )
            buckets.setdefault(fixed, []).append(group)
        return buckets.items()

    def _options(self) -> list[str]:
        return [name for name in self.defaults if name not in FLAGS]

    def _varies(self, name: str, value: Any) -> bool:
        """Whether a change of this option leaves the chain as it is: hyperparameters do, unless a zero leaves out a stage."""
        return name in self._numbers and (
            name not in self._structural or isinstance(value, Tensor) or value != 0
        )

    def _plan(self, fixed: tuple[Any, ...], groups: list[dict[str, Any]]) -> Plan:
        plan = self._plans.get(fixed)
        if plan is None or plan.layout != layout(groups):
            varying = [name for name in self._options() if name not in dict(fixed)]
            plan = self._plans[fixed] = Plan(
                self._maker(fixed), varying, groups, self._names, self._compile
            )
        return plan

    def _maker(self, fixed: tuple[Any, ...]) -> Make:
        return lambda numbers: self._chain(**dict(fixed), **numbers)
