"""The step inside of backward: each parameter moves as soon as its gradient is there.

The gradient is freed before the next one is made. So the gradients of a model are never there at the
same time, which are as many bytes as the parameters.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from functorch_opt._core.chain import Chain
from functorch_opt._core.groups import Groups
from functorch_opt._core.rule import Leafwise
from functorch_opt._core.transformation import GradientTransformation
from functorch_opt._core.wrap import Wrap
from functorch_opt.optim.adapter import Optimizer
from functorch_opt.optim.counts import Counts
from functorch_opt.optim.options import plain, scalar
from functorch_opt.optim.plan import Plan

__all__ = ["step_in_backward"]


def step_in_backward(optimizer: Optimizer) -> InBackward:
    """Let `optimizer` step inside of ``backward``, parameter by parameter.

    As soon as ``backward`` has worked out the whole gradient of a parameter, that parameter makes its
    step, and its ``grad`` becomes None. The numbers are those of a step after ``backward``. Every
    ``backward`` is a step.

    It stays one optimizer: schedulers write into its groups, and its state and its checkpoints are
    what they would be. ``optimizer.step()`` after ``backward`` finds no gradients and does nothing, so
    a loop need not change. Parameters that are frozen now, or come with a later group, have no hook:
    they make their step there.

    What it cannot know: a loss scale (`GradScaler`), a norm of all gradients (``clip_grad_norm_``),
    and gradients that are averaged later (`DistributedDataParallel`) have no effect or are wrong.
    FSDP2 calls hooks after it has averaged. If ``backward`` raises an error, some parameters have
    moved.

    Args:
        optimizer: any optimizer of `fo.optim`. Its transformation must work on each parameter by
            itself: chains, groups and wrappers of rules. Its state is made now.

    Returns:
        A handle, whose ``remove()`` ends it.

    Raises:
        TypeError: no optimizer of `fo.optim`.
        ValueError: a stage that looks at several parameters, such as a global norm; one that shares
            a value among all of them, such as a key for noise; a gate; one that reads what only a
            closure knows.

    Source: Lv et al., "Full Parameter Fine-tuning for Large Language Models with Limited Resources",
    2023, arXiv:2306.09782, section 3.2.

    Example:
        >>> import torch, functorch_opt as fo
        >>> model = torch.nn.Linear(2, 1)
        >>> opt = fo.optim.AdamW(model.parameters(), lr=0.1)
        >>> handle = fo.optim.step_in_backward(opt)
        >>> model(torch.ones(1, 2)).sum().backward()
        >>> model.weight.grad is None, opt.state[model.weight]["step"]
        (True, tensor(1.))
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            "step_in_backward takes an optimizer of fo.optim; "
            f"got {type(optimizer).__name__}. fo.optim has the names of torch.optim."
        )
    return InBackward(optimizer)


class InBackward:
    """What `step_in_backward` returns: the hooks of the parameters."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.alone: dict[Tensor, _Alone] = {}
        for group in optimizer.param_groups:
            check_alone(made_of(optimizer, group))
        for k, group in enumerate(optimizer.param_groups):
            for i, p in enumerate(group["params"]):
                if p.requires_grad:
                    self.alone[p] = _Alone(optimizer, k, i)
        for one in self.alone.values():
            one.begin()
        self.moved: set[Tensor] = set()
        """Which parameters have moved in this pass."""
        self.task = -1
        self.now: dict[str, Tensor] = {}
        """What time it was when this pass began, by the name of the clock."""
        self.handles = [
            p.register_post_accumulate_grad_hook(self._step) for p in self.alone
        ]

    def remove(self) -> None:
        """Let the optimizer step as usual again."""
        for handle in self.handles:
            handle.remove()

    @torch.no_grad()
    def _step(self, p: Tensor) -> None:
        if self.optimizer._evaluating:
            raise RuntimeError(
                "the parameters hold their averages: call backward after leaving eval_params()."
            )
        self._notice_pass(p)
        self.alone[p].step(self.now)
        self.optimizer._called["step"] = True
        p.grad = None

    def _notice_pass(self, p: Tensor) -> None:
        """See where another backward pass begins. Schedules must not see the steps of this one."""
        task = torch._C._current_graph_task_id()
        if p not in self.moved and task in (-1, self.task):
            return
        self.task = task
        self.moved.clear()
        self.now = {}
        for key in {key for one in self.alone.values() for key in one.clocks}:
            entries = self.optimizer.state.values()
            times = [entry[key].cpu() for entry in entries if key in entry]
            self.now[key] = torch.stack(times).amax()


class _Alone:
    """An optimizer of one parameter, which shares the state and the options of another."""

    def __init__(self, optimizer: Optimizer, group: int, i: int) -> None:
        self.of = optimizer
        self.group = group
        of_group = optimizer.param_groups[group]
        self.p = of_group["params"][i]
        # A path is what it is in the tree of all parameters.
        first = sum(len(before["params"]) for before in optimizer.param_groups[:group])
        self.name = of_group.get("param_names", {i: str(first + i)})[i]
        self.one = copy.copy(optimizer)
        self.plan: Plan | None = None
        self.clocks: list[str] = []

    def _renew(self) -> None:
        """Take over what a scheduler has written, or a checkpoint has brought."""
        options = dict(self.of.param_groups[self.group])
        options |= {"params": [self.p], "param_names": [self.name]}
        self.one.param_groups = [options]
        self.one.state = self.of.state
        ((fixed, groups),) = self.one._buckets()
        plan = self.one._plan(fixed, groups)
        if self.of._slots_on_host and self.p.device.type != "cpu":
            raise ValueError(
                "inside of backward a step has one parameter, and nothing to do while its slots "
                "are fetched from the host. Leave slots_on_host or step_in_backward away."
            )
        if plan is self.plan:
            return
        self.plan = plan
        # A parameter has the counts of all stages, also of those that are for other parameters.
        whole = self.of._plan(fixed, dict(self.of._buckets())[fixed]).counts
        plan.counts = Counts(whole.counts, whole.clocks, plan.counts.device)
        mine = {key for _, key in plan.clocked}
        self.clocks = whole.clocks
        self.others = [key for key in whole.clocks if key not in mine]

    def begin(self) -> None:
        """Make the state of the parameter."""
        self._renew()
        self.one.init_state()

    def step(self, now: dict[str, Tensor]) -> None:
        self._renew()
        entry = self.of.state[self.p]
        for key in self.clocks:
            entry[key] = now[key].clone()
        self.one._advance()
        for key in self.others:
            entry[key] = now[key] + 1


def made_of(optimizer: Optimizer, group: dict[str, Any]) -> GradientTransformation:
    """The transformation of the options of a group."""
    names = optimizer._of(group)._own
    return optimizer._made({name: scalar(plain(group[name])) for name in names})


def check_alone(tx: GradientTransformation) -> None:
    """Raise ValueError if `tx` does not work on each parameter by itself."""
    if isinstance(tx, Chain):
        for stage in tx.stages.values():
            check_alone(stage)
    elif isinstance(tx, Groups):
        for inside in tx.inside.values():
            check_alone(inside)
    else:
        if why := _reason(tx):
            raise ValueError(
                f"step_in_backward: {tx.name} {why}, and inside of backward there is one parameter "
                "at a time. Leave it out (clip and clip_by_block_rms look at one parameter, "
                "clip_by_global_norm at all), or call optimizer.step() after backward."
            )
        if isinstance(tx, Wrap):
            check_alone(tx.inner)


def _reason(tx: GradientTransformation) -> str | None:
    """Why a stage does not work on each parameter by itself; None if it does."""
    if not isinstance(tx, (Leafwise, Wrap)):
        return "decides for all parameters at once"
    if tx.once.shared:
        return f"shares {', '.join(tx.once.shared)} among all parameters"
    if required := [name for name, needed in tx.once.extra_args.items() if needed]:
        return f"reads {', '.join(required)}, which is known after backward"
    has_totals = isinstance(tx, Leafwise) and tx.has_totals
    if has_totals or {"updates", "params"} & {*tx.once.reads}:
        return "looks at all parameters"
    return None
