"""Groups of parameters that are trained for a part of a training only."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from functorch_opt._core.transformation import check_choice, check_whole
from functorch_opt.optim.which import fits, told

__all__ = ["FreezeSchedule", "from_the_head_down"]

When = int | tuple[int, int | None]


class FreezeSchedule:
    """Which groups of an optimizer are trained at which steps, or epochs.

    It is used like a scheduler of torch: call `step` once after each step of the optimizer, or once
    after each epoch, and the numbers are of these calls. A frozen parameter has no gradient
    (``requires_grad`` is False), so backward passes do no work for it, and it does not decay. Learning
    rates and other options are not touched, and no scheduler starts anew: a group that is thawed
    later has the learning rate that its schedule has then. Its count, and so Adam's bias
    correction, begins when it is first trained. All parameters of a group that is named here are
    thawed, whoever has frozen them.

    It works with any `torch.optim.Optimizer`, whose groups have a ``name``, as those of `groups`
    have. DistributedDataParallel sees ``requires_grad`` once, when it is made: give it
    ``find_unused_parameters=True`` and all parameters that are trained at any time, and make the
    schedule after it.

    Args:
        optimizer: with all groups, also those that are frozen at first.
        trained: ``{group: when}``. The group is a name, or a pattern with ``*`` for any characters,
            which stands for all groups that it fits and that are not named themselves. When is the number from which on they are
            trained, or a pair ``(from, before)``. Groups that are not named are trained always.
        state: what becomes of the optimizer's state of a group that is frozen again: it may be
            kept, and go on when the group is thawed; or dropped, so that the group starts anew.

    Raises:
        ValueError: a name that fits no group; a group that two names fit; a pair whose end is not
            after its begin; what is no whole number from 0 on.

    Example:
        >>> import torch, functorch_opt as fo
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
        >>> groups = fo.optim.groups(model, {"0.*": {"name": "body"}, "*": {"name": "head"}})
        >>> opt = fo.optim.AdamW(groups, lr=0.1)
        >>> freeze = fo.optim.FreezeSchedule(opt, {"body": 2})
        >>> for _ in range(4):
        ...     opt.zero_grad()
        ...     model(torch.ones(1, 4)).sum().backward()
        ...     opt.step()
        ...     freeze.step()
        >>> opt.state[model[0].weight]["step"], opt.state[model[1].weight]["step"]
        (tensor(2.), tensor(4.))
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        trained: Mapping[str, When],
        *,
        state: Literal["keep", "drop"] = "keep",
    ) -> None:
        check_choice("keep", "drop", state=state)
        self.optimizer = optimizer
        self.state = state
        self.trained = {name: _span(name, when) for name, when in trained.items()}
        self.last_epoch = 0
        self._check_names()
        self._set(drop=False)

    def step(self) -> None:
        """Go on to the next step, or epoch: freeze and thaw what is due."""
        self.last_epoch += 1
        self._set(drop=self.state == "drop")

    def is_trained(self, group: Mapping[str, Any]) -> bool:
        """Whether a group is trained now.

        Args:
            group: one of ``optimizer.param_groups``.
        """
        for name in self._fitting(group):
            first, end = self.trained[name]
            return first <= self.last_epoch and (end is None or self.last_epoch < end)
        return True

    def state_dict(self) -> dict[str, Any]:
        """Where it is, for a checkpoint. Save the optimizer's beside it."""
        return {"last_epoch": self.last_epoch}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go to where `state_dict` was, and freeze and thaw what is due there.

        The optimizer's state is that of its own checkpoint: nothing is dropped.
        """
        self.last_epoch = int(state_dict["last_epoch"])
        self._set(drop=False)

    def _set(self, drop: bool) -> None:
        for group in self.optimizer.param_groups:
            if not self._fitting(group):
                continue
            now = self.is_trained(group)
            for p in group["params"]:
                if p.requires_grad and not now:
                    p.grad = None
                    if drop:
                        self.optimizer.state.pop(p, None)
                if p.requires_grad is not now and _can_change(p):
                    p.requires_grad_(now)

    def _fitting(self, group: Mapping[str, Any]) -> list[str]:
        called = group.get("name", "")
        if called in self.trained:
            return [called]
        return [name for name in self.trained if fits(called, name)]

    def _check_names(self) -> None:
        groups = self.optimizer.param_groups
        names = [group.get("name", "") for group in groups]
        for name in self.trained:
            if not any(fits(called, name) for called in names):
                raise ValueError(
                    f"no group is called {name!r}; there are {told(names)}. Make them with "
                    "fo.optim.groups, or give each a name: {'params': ..., 'name': ...}."
                )
        for group in groups:
            if len(fitting := self._fitting(group)) > 1:
                raise ValueError(
                    f"{told(fitting)} all stand for the group {group['name']!r}: "
                    "say once when it is trained."
                )


def _can_change(p: Tensor) -> bool:
    """Whether a parameter can be trained at all: integers cannot."""
    return p.is_floating_point() or p.is_complex()


def _span(name: str, when: Any) -> tuple[int, int | None]:
    """From when, and before when, a group is trained."""
    first, end = when if isinstance(when, tuple) and len(when) == 2 else (when, None)
    check_whole(0, **{f"when {name!r} is trained": first})
    if end is not None:
        check_whole(first + 1, **{f"the end of {name!r}": end})
    return first, end


def from_the_head_down(
    optimizer: torch.optim.Optimizer, every: int, first: int = 1
) -> dict[str, int]:
    """When each group is thawed, if one layer more is trained from time to time: for
    `FreezeSchedule`.

    The last `first` layers are trained from the beginning, and one layer more after each `every`
    steps or epochs. Groups whose names begin with the same ``layer 3``, as `layer_decay` gives
    them, are one layer; any other group is a layer by itself. They are in the order of the groups,
    of which the last is the head.

    Args:
        optimizer: whose groups have names.
        every: 1 or greater.
        first: how many layers are trained from the beginning, 1 or greater.

    Raises:
        ValueError: a group without a name, or two with the same; a number below 1.

    Source: Howard & Ruder, "Universal Language Model Fine-tuning for Text Classification", 2018,
    section 3.3, "gradual unfreezing", with one layer more after each epoch.

    Example:
        >>> import torch, functorch_opt as fo
        >>> layers = [torch.nn.Linear(4, 4, bias=False) for _ in range(3)]
        >>> model = torch.nn.ModuleDict({"blocks": torch.nn.Sequential(*layers)})
        >>> opt = torch.optim.AdamW(fo.optim.groups(model, fo.optim.layer_decay(0.5), lr=0.1))
        >>> fo.optim.from_the_head_down(opt, every=100)
        {'layer 1: blocks.0': 200, 'layer 2: blocks.1': 100, 'layer 3: blocks.2': 0}
        >>> freeze = fo.optim.FreezeSchedule(opt, fo.optim.from_the_head_down(opt, every=100))
        >>> [p.requires_grad for p in model.parameters()]
        [False, False, True]
    """
    check_whole(1, every=every, first=first)
    names = [group.get("name", "") for group in optimizer.param_groups]
    for name in names:
        if not name or names.count(name) > 1:
            raise ValueError(
                f"each group needs a name of its own; got {told(names)}. Make them with "
                "fo.optim.groups."
            )
    layers = [_layer(name) for name in names]
    order = [*dict.fromkeys(layers)][::-1]
    return {
        name: max(0, order.index(layer) + 1 - first) * every
        for name, layer in zip(names, layers, strict=True)
    }


def _layer(name: str) -> str:
    """The layer of a group, by its name."""
    numbered = re.match(r"layer \d+(?=[:,]|$)", name)
    return numbered.group() if numbered else name
