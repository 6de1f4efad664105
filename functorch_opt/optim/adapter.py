"""Any transformation as a `torch.optim.Optimizer`.

It is the same pure update, with its state kept where torch's tools look for it. A step gathers the
gradients and the state into trees, calls ``tx.update``, and writes what came back into the
parameters and the state, in place. Two places are the truth, and are read anew at every step,
because schedulers, checkpoints and wrappers write into them:

    opt.state[p]        a flat dict of tensors: this parameter's slots, e.g. ``exp_avg``, and its
                        counts, e.g. ``step``; of a generic chain by the path they have in its
                        state, e.g. ``scale_by_adam/mu``, so that a stage more or less moves no
                        other
    opt.param_groups    the hyperparameters; ``lr`` is always among them

Others may keep entries of their own in both, under other names: they are let be, saved and loaded.

Counts are kept per parameter, as torch does: without a gradient a parameter keeps its count. Values
that a stage shares among all parameters (a noise key) are kept with the first one that is trained.
A parameter of integers, such as a quantised weight, is frozen, and no part of the trees.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor

from functorch_opt._core.transformation import GradientTransformation
from functorch_opt.optim.closure import called, loss_of
from functorch_opt.optim.codes import check_code, in_code, with_scales
from functorch_opt.optim.evaluation import held, points_in
from functorch_opt.optim.loading import load
from functorch_opt.optim.look import look
from functorch_opt.optim.loss_scale import leaves_it_to_the_step, step_scaled
from functorch_opt.optim.numbers import decays, is_zero
from functorch_opt.optim.one_operation import as_one, number_of
from functorch_opt.optim.options import (
    FLAGS,
    PRIVATE,
    arguments,
    check_like,
    check_names,
    check_number,
    in_a_step,
    is_open,
    is_plain,
    only_sets_up,
    plain,
    scalar,
)
from functorch_opt.optim.owned import divided
from functorch_opt.optim.params import some_can_be_trained
from functorch_opt.optim.plan import Make, Plan
from functorch_opt.optim.recipe import Recipe, made, shown
from functorch_opt.transforms.report import noise_in

__all__ = ["Optimizer"]


class Optimizer(torch.optim.Optimizer):
    """A ready transformation, or a factory of one, as a `torch.optim.Optimizer`.

    ``Optimizer(params, tx)``: the group option ``lr``, 1.0 by default, multiplies what `tx` gives;
    schedulers drive it. ``Optimizer(params, factory, **hyper)``: the factory's arguments become
    group options, ``learning_rate`` under the name ``lr``; numbers may differ from group to group
    and change between steps. All groups make one tree: a global norm is that of all of them.
    (Groups whose other options differ, a bool for example, are updated separately, and each draws
    noise of its own.) A schedule given as ``learning_rate`` stays in the transformation, and ``lr``
    multiplies it.

    Where there is a momentum in the transformation (``b1`` of Adam, say) and no argument of that
    name, the groups have an option ``momentum``, which is None: as the transformation says. A
    number takes its place; OneCycleLR and CyclicLR write one.

    Args:
        params: parameters, ``(name, parameter)`` pairs or group dicts, as for every torch
            optimizer. With names, which must be unique, masks and labels see the tree ``{name:
            parameter}``, otherwise a list.
        tx: a transformation, or a function that returns one.
        compile: run the step in place through `compiled_step`; the numbers are the same. The first
            step then takes seconds. In a graph that you compile the step is one operation.
        state: how slots are stored, such as ``"8bit"``; see `functorch_opt.stored`. Given here, it
            is also an option of the groups, and there ``"float32"`` means as usual. A checkpoint
            whose slots are stored otherwise is converted when it is loaded.
        capturable: keep counts and rates on the device, so that a step can be captured as a CUDA
            graph, after two ordinary ones. A learning rate that changes between replays must be a
            tensor on the device. False: a step that is being captured is an error.
        owners: whether each parameter is stepped by one rank, its owner, which alone keeps its
            state and then sends the parameter to all; as in ZeRO. For parameters that are the same
            on every rank, as under DDP. All ranks call `step`, and `state_dict`, which divides the
            state among the ranks. In one process nothing is divided.
        **hyper: arguments of the function; ``lr`` is another name of ``learning_rate``. Beside a
            ready transformation only ``lr``.

    Raises:
        TypeError: `tx` is neither; an argument that the function does not take; (by `step`) a
            function that looks at the value of an argument that is an option of the groups.
        ValueError: a hyperparameter outside its range; names that are not unique.
        RuntimeError: (by `step`) it is being captured as a CUDA graph, and not `capturable`.

    Example:
        >>> import torch, functorch_opt as fo
        >>> model = torch.nn.Linear(2, 1)
        >>> tx = fo.chain(fo.clip_by_global_norm(1.0), fo.adamw(3e-4))
        >>> opt = fo.optim.Optimizer(model.parameters(), tx)
        >>> opt = fo.optim.Optimizer(model.parameters(), fo.adamw, lr=3e-4, weight_decay=0.1)
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
    _optional: frozenset[str] = frozenset()
    """Options that are hyperparameters while they are a float or a tensor."""
    _sees_names: ClassVar = True
    """Whether a mask or a label may look at the names of parameters."""
    _evaluating = _slots_on_host = False
    found_inf: Tensor | int | None = None
    """What a `torch.amp.GradScaler` sets for the time of a step."""

    def __init__(
        self,
        params: Iterable[Any],
        tx: GradientTransformation | Callable[..., GradientTransformation],
        *,
        compile: bool = False,
        state: str | None = None,
        capturable: bool = False,
        owners: bool = False,
        **hyper: Any,
    ) -> None:
        given = arguments(tx, hyper)
        self._setup(
            params,
            {**given.defaults, **({"capturable": True} if capturable else {})},
            ("lr", *given.numbers),
            compile,
            (tx, given.fixed, given.rate, given.has_momentum),
            state,
            owners,
        )

    @torch._disable_dynamo
    def _setup(
        self,
        params: Iterable[Any],
        defaults: dict[str, Any],
        numbers: Iterable[str],
        compile: bool,
        recipe: Recipe | None = None,
        state: str | None = None,
        owners: bool = False,
    ) -> None:
        """What every constructor ends with; `numbers` names the options that are hyperparameters.

        Where a function that makes an optimizer is compiled, attributes that it sets are lost. So
        they are all set here, outside of the graph.
        """
        self._compile, self._owners = compile, owners
        if state is not None:
            check_code(state)
            defaults = {**defaults, "state": state}
        if recipe is not None:
            self._recipe = recipe
            self._optional = frozenset(filter(is_open(defaults), defaults))
        self._own = tuple(name for name in defaults if name not in FLAGS)
        self._numbers = frozenset(numbers)
        self._plans: dict[Any, Plan] = {}
        self._called = {"step": False}
        self._number = number_of(self)
        super().__init__(params, defaults)

    def _chain(self, *args: Any, **options: Any) -> GradientTransformation:
        """The transformation for these group options.

        Numbers among them may be tensors: 0-dim, or with one entry per parameter.
        """
        return made(self._recipe, options)

    def _made(self, options: dict[str, Any]) -> GradientTransformation:
        """The chain of these options, whose slots are stored as the option ``state`` says."""
        code = options.pop("state", None)
        return in_code(self._chain(**options), code)

    # ---- what torch.optim.Optimizer asks for -----------------------------------------------------

    @torch._disable_dynamo
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its parameters start with fresh state.

        A tensor lr that another group has already is copied: schedulers write into it, for each
        group by itself.

        Args:
            param_group: ``{"params": ..., option: value, ...}``; options that are left out take
                their defaults.

        Raises:
            ValueError: an option outside its range; names that are not unique.
            TypeError: an option of another type.
        """
        rate = self._recipe[2] if "_recipe" in vars(self) else None
        if rate is not None and rate in param_group:
            param_group.setdefault("lr", param_group.pop(rate))
        super().add_param_group(param_group)
        *others, group = self.param_groups
        try:
            self._check_group(group)
            if self._sees_names:
                check_names(self.param_groups)
        except Exception:
            self.param_groups.pop()
            raise
        if isinstance(lr := group["lr"], Tensor) and any(lr is x["lr"] for x in others):
            group["lr"] = lr.clone()

    def _check(self, options: dict[str, Any]) -> None:
        """Raise an error for options of which no chain can be made."""
        if isinstance(lr := options["lr"], Tensor) and lr.numel() != 1:
            raise ValueError(f"Tensor lr must be 1-element; got shape {tuple(lr.shape)}.")
        self._made({name: scalar(value) for name, value in options.items()})

    def _of(self, group: dict[str, Any]) -> Any:
        """What knows the options of a group: their defaults, and which are hyperparameters."""
        return self

    def _check_option(self, of: Any, name: str, value: Any) -> None:
        """Raise an error for an option of another type than its default."""
        check = check_number if self._is_number(of, name, value) else check_like
        check(name, value, of.defaults[name])

    def _check_group(self, group: dict[str, Any], loaded: bool = False) -> None:
        """Raise for options that no step could be made with, and for others than were given.

        Of what is loaded no range is checked: schedulers and people write any number into a group,
        a step takes it, and so it can be saved.
        """
        of = self._of(group)
        options = {name: plain(group[name]) for name in of._own}
        for name, value in options.items():
            self._check_option(of, name, value)
        group.update(options)
        if loaded:
            options = {
                name: in_a_step(value) if self._varies(of, name, value) else value
                for name, value in options.items()
            }
        self._check(options)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient, in place.

        A first step with zero lr and zero gradients (torch.distributed.checkpoint makes one)
        creates the state, and is not counted.

        Args:
            closure: evaluates the model anew and returns the loss; called with gradients enabled,
                before any gradient is read. A transformation that reads ``value``
                (`scale_by_polyak`) gets this loss, and one that reads ``grad`` the gradients. For
                one that reads ``grad_fn`` (`sam` with `opaque_mode`) it is called again, while the
                parameters have other values.

        Returns:
            What `closure` returned, or None.

        Raises:
            TypeError: the transformation reads ``value`` or ``grad_fn`` and there is no closure; it
                reads something else, such as the ``value_fn`` of a line search, which a closure cannot
                be; a gradient of a parameter that is not floating or complex.
        """
        if self._evaluating:
            raise RuntimeError(
                "the parameters hold their averages: step after leaving eval_params()."
            )
        self._called["step"] = True
        loss = loss_of(closure)
        with torch.no_grad():
            given = called(loss, closure, self._groups)
            if self.found_inf is None:
                self._advance(given)
            else:
                step_scaled(self, given)
        return loss

    # To see that steps come before theirs, torch's schedulers put a wrapper around step, which
    # torch.compile cannot trace. Not around one that says it has it. What the wrapper would set is
    # `_opt_called`; in a dict, for Dynamo does not set attributes of optimizers.
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

        Call it before `torch.compile` of ``opt.step`` or of a training step: then there is one
        graph, from the first step on. And before ``torch.distributed.checkpoint`` asks for the
        state: it would make a step to have one. What is there stays. Make schedulers that write a
        momentum before it: the first number may put a stage into the chain.

        Example:
            >>> import torch, functorch_opt as fo
            >>> w = torch.nn.Parameter(torch.tensor(1.0))
            >>> opt = fo.optim.AdamW([w])
            >>> opt.init_state()
            >>> opt.state[w]["step"], w.item()
            (tensor(0.), 1.0)
        """
        with torch.no_grad():
            for fixed, groups in self._trained_buckets():
                self._plan(fixed, groups).initialize(groups, self.state)

    def _initialized(self) -> bool:
        for fixed, groups in self._buckets():
            plan = self._plans.get(fixed)
            if any(
                p.grad is not None for group in groups for p in group["params"]
            ) and not (plan and plan.serves(groups, self.state)):
                return False
        return True

    def state_dict(self) -> dict[str, Any]:
        """The state and the groups, as every torch optimizer gives them.

        Of sharded parameters call it on all ranks: what a rule that sees whole tensors keeps lies
        with one rank, and here it is divided among all. So any number of ranks can load it.
        """
        given = super().state_dict()
        return {**given, "state": divided(given["state"], self.param_groups)}

    def load_state_dict(
        self, state_dict: dict[str, Any], *, strict: bool = False
    ) -> None:
        """Load what `state_dict` gave, or torch's optimizer of the same name. Every tensor is
        copied, and keeps its dtype.

        What is called alike is loaded, so the checkpoint of a chain outlives a stage that is put in
        or taken out. A chain that was put into another is found again by the end of its names:
        ``scale_by_adam/mu`` is loaded as ``adamw/scale_by_adam/mu``. The names of parameters stay
        those of this optimizer. What is not called like the state of an optimizer belongs to
        others, and is loaded too.

        Args:
            state_dict: as from ``torch.load``. Options that it lacks keep their defaults; any
                number that a step takes is taken.
            strict: whether names that do not fit exactly are an error. False: a warning lists what
                was left over on either side.

        Raises:
            KeyError: names that do not fit, if strict.
            ValueError: groups that do not fit; an option that no step can be made with; a shape
                that differs; a count that cannot be one.
            TypeError: no state dict; a value that is no tensor, or of a kind that cannot stand
                there.
            RuntimeError: inside `eval_params`.

        After an error, that of a hook too, the optimizer is as it was before.
        """
        if self._evaluating:
            raise RuntimeError(
                "the parameters hold their averages: load after leaving eval_params()."
            )
        load(self, super().load_state_dict, state_dict, strict)

    @contextmanager
    def eval_params(self) -> Iterator[None]:
        """Inside, the parameters hold the averages that a stage keeps of them (`params_ema`);
        afterwards they are as before, bit for bit.

        Also after an exception. Parameters without an average, or without a step so far, stay.
        Buffers are not touched: batch norm's are those of the parameters
        (`torch.optim.swa_utils.update_bn`, on a copy of the model, makes those of the averages).
        ``state_dict`` of the optimizer is the same inside, that of the model holds the averages.

        Raises:
            ValueError: nothing in the optimizer averages parameters, or two stages average the same
                one.
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
        values = points_in(self)
        outside = self._evaluating
        with held(values):
            self._evaluating = True
            try:
                yield
            finally:
                self._evaluating = outside

    @torch.no_grad()
    def report(self, loss: Any = None, per_example: Any = None) -> dict[str, Tensor]:
        """A look at the step that `step` would make with the gradients that are there.

        Nothing is changed. Call it after ``backward``, and after a `GradScaler` has unscaled the
        gradients, at the steps that you want to look at. The names are those of
        `functorch_opt.report`, with the number of a parameter for its path where parameters have no
        names. ``lr/`` and the name of a group, or its number, is its option ``lr``. Where groups are
        updated separately, as the algorithms of a `Partition` are, the names of stages begin with
        the algorithm, or the number of the update.

        Args:
            loss: for a transformation that reads ``value``.
            per_example: the gradients of single examples, a tree such as ``{name: [B, ...]}``; then
                there is the noise scale too, see `functorch_opt.report`.

        Returns:
            ``{name: 0-dim tensor}``. Print it with `functorch_opt.report_table`.

        Raises:
            TypeError: as `step`.
            RuntimeError: inside `eval_params`.

        Example:
            >>> import torch, functorch_opt as fo
            >>> w = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
            >>> opt = fo.optim.Optimizer([("w", w)], fo.sgd, lr=0.5)
            >>> w.grad = torch.tensor([0.0, 2.0])
            >>> found = opt.report()
            >>> found["ratio/w"].item(), found["lr/0"].item(), w.tolist()
            (0.2, 0.5, [3.0, 4.0])
        """
        if self._evaluating:
            raise RuntimeError(
                "the parameters hold their averages: report after leaving eval_params()."
            )
        return look(self, loss) | noise_in(per_example)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups: parameters and options.

        Where a graph is traced that reads them by this name, torch compiles it anew for every value
        in them. So what needs the parameters only reads `_groups`.
        """
        return self._groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self._groups = groups

    def __getstate__(self) -> dict[str, Any]:
        mine = vars(self)
        private = {name: mine[name] for name in PRIVATE if name in mine}
        return {**super().__getstate__(), **private}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "param_groups" in vars(self):  # where torch has put it, behind the property
            self.param_groups = vars(self).pop("param_groups")
        self._plans = {}
        self._number = number_of(self)
        self.__dict__.setdefault("_called", {"step": False})
        for group in self.param_groups:
            for name, value in self.defaults.items():
                if name != "differentiable":
                    group.setdefault(
                        name, value.clone() if isinstance(value, Tensor) else value
                    )

    # ---- a step ----------------------------------------------------------------------------------

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """What `torch.amp.GradScaler` asks: whether the step looks at ``found_inf`` by itself."""
        return leaves_it_to_the_step(self._groups)

    def _advance(self, loss: Any = None, active: Tensor | None = None) -> None:
        """Compute everything, then write everything: an error on the way leaves parameters and
        state as they were."""
        traced = torch.compiler.is_compiling()
        if traced and self._compile and as_one(self._groups, loss, self._number):
            return
        if traced and not self._initialized():
            # Outside of the graph. Call it before torch.compile, and there is one graph.
            self.init_state()
        if only_sets_up(self.param_groups, self.state):
            self.init_state()
            return
        writes = [
            self._plan(fixed, groups).compute(
                groups, self.state, self._maker(fixed), loss, active
            )
            for fixed, groups in self._buckets()
            if any(p.grad is not None for group in groups for p in group["params"])
        ]
        for write in writes:
            write()

    def _buckets(self) -> Iterable[tuple[tuple[Any, ...], list[dict[str, Any]]]]:
        """The groups, in order, by their options that are not numbers: each bucket is one tree with
        one transformation."""
        buckets: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
        for group in self.param_groups:
            of = self._of(group)
            for name in of._own:
                if not is_plain(group[name]):
                    group[name] = plain(group[name])
            fixed = tuple(
                (name, group[name])
                for name in of._own
                if not self._varies(of, name, group[name])
            )
            buckets.setdefault(fixed, []).append(group)
        return buckets.items()

    def _trained_buckets(self) -> list[tuple[tuple[Any, ...], list[dict[str, Any]]]]:
        """Those with a parameter that can be trained: of the others there is no tree."""
        return [(fixed, of) for fixed, of in self._buckets() if some_can_be_trained(of)]

    def _options(self) -> list[str]:
        return [*self._own]

    def _is_number(self, of: Any, name: str, value: Any) -> bool:
        """Whether this option is a hyperparameter, with this value."""
        return name in of._numbers or (
            name in of._optional and isinstance(value, (float, Tensor))
        )

    def _varies(self, of: Any, name: str, value: Any) -> bool:
        """Whether a change of this option leaves the chain as it is: hyperparameters do, unless a
        zero leaves out a stage."""
        leaves_out = name in self._structural and is_zero(value)
        if leaves_out and self._compile:
            leaves_out = not decays(name, self.param_groups)
        return self._is_number(of, name, value) and not leaves_out

    def _plan(self, fixed: tuple[Any, ...], groups: list[dict[str, Any]]) -> Plan:
        plan = self._plans.get(fixed)
        if plan is None or not plan.fits(groups):
            of = self._of(groups[0])
            for group in groups:
                for name in of._own:
                    self._check_option(of, name, group[name])
            varying = [name for name in of._own if name not in dict(fixed)]
            params = [p for group in self.param_groups for p in group["params"]]
            plan = Plan(
                self._maker(fixed),
                varying,
                groups,
                with_scales(self._names),
                self._compile,
                self.state,
                params,
                self._owners,
                self._slots_on_host,
            )
            # Of options that have had many values only the last ones are remembered.
            for old in [*self._plans][: -len(self.param_groups) - 8]:
                del self._plans[old]
            self._plans[fixed] = plan
        return plan

    def _maker(self, fixed: tuple[Any, ...]) -> Make:
        return lambda numbers: self._made({**dict(fixed), **numbers})

    def __repr__(self) -> str:
        text = super().__repr__()
        if "_recipe" not in vars(self):
            return text
        first, _, groups = text.partition("\n")
        return f"{first}\nTransformation: {shown(self._recipe)}\n{groups}"
