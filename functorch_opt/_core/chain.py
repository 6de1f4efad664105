"""One after another: each stage takes the updates of the one before it."""

from __future__ import annotations

from typing import Any

from functorch_opt._core.leafwise import update_in_one_pass
from functorch_opt._core.rule import Leafwise
from functorch_opt._core.transformation import GradientTransformation, transformation
from functorch_opt.tree import PyTree

__all__ = ["chain"]


class Chain(GradientTransformation):
    """What `chain` makes. Its ``stages`` are the transformations by their names, in order."""

    def __init__(self, stages: tuple[GradientTransformation, ...]) -> None:
        self.name = "chain"
        self.stages: dict[str, GradientTransformation] = {}
        self.extra_args: dict[str, bool] = {}
        for i, stage in enumerate(stages):
            if not isinstance(stage, GradientTransformation):
                raise TypeError(
                    f"stage {i} of a chain must be a transformation, e.g. scale_by_adam(); "
                    f"got {type(stage).__name__} {stage!r}."
                )
            name = stage.name
            n = 0
            while name in self.stages:
                n += 1
                name = f"{stage.name}_{n}"
            self.stages[name] = stage
            for extra, required in stage.extra_args.items():
                self.extra_args[extra] = required or self.extra_args.get(extra, False)
            if self.last and not stage.last:
                looking = next(before.name for before in stages if before.last)
                raise ValueError(
                    f"{looking} looks at the new parameters, so it must come last in the chain; "
                    f"{stage.name} after it would change them."
                )
            self.last = stage.last
        self.passes = self._passes()

    def _init(self, params: PyTree) -> dict[str, PyTree]:
        return {name: stage.init(params) for name, stage in self.stages.items()}

    def check_state(self, state: Any) -> None:
        if not isinstance(state, dict) or state.keys() != self.stages.keys():
            held = list(state) if isinstance(state, dict) else type(state).__name__
            raise ValueError(
                f"this is not a state of this chain: its stages are {list(self.stages)}, "
                f"the state is of {held}. "
                "Use what its own init or update returned."
            )

    def _update(
        self,
        updates: PyTree,
        state: dict[str, PyTree],
        params: PyTree | None,
        **extra: Any,
    ) -> tuple[PyTree, dict[str, PyTree]]:
        self.check_state(state)
        new: dict[str, PyTree] = {}
        for names in self.passes:
            stages: list[Any] = [self.stages[name] for name in names]
            if len(stages) > 1:
                updates, states = update_in_one_pass(
                    stages, updates, [state[name] for name in names], params, extra
                )
                new |= dict(zip(names, states, strict=True))
            else:
                mine = {e: extra[e] for e in stages[0].extra_args if e in extra}
                updates, new[names[0]] = stages[0].update(
                    updates, state[names[0]], params, **mine
                )
        return updates, new

    def _passes(self) -> list[list[str]]:
        """The names of the stages of each pass, which are worked out together, leaf by leaf.

        A pass consists of consecutive rules, of which only the first may look at the whole tree.
        Any other stage is a list of its own.
        """
        passes: list[list[str]] = []
        goes_on = False
        for name, stage in self.stages.items():
            if goes_on and isinstance(stage, Leafwise) and not stage.looks_around:
                passes[-1].append(name)
            else:
                passes.append([name])
            goes_on = isinstance(stage, Leafwise)
        return passes


@transformation
def chain(*stages: GradientTransformation) -> Chain:
    """Apply `stages` one after another. Each takes the updates of the one before it.

    The state is a dict, keyed by the name of the stage (a repeated name gets ``_1``, ``_2``, ...).
    Extra arguments of ``update`` reach only the stages that declare them.

    Args:
        *stages: transformations, chains among them.

    Raises:
        TypeError: a stage that is not a transformation.
        ValueError: a stage after one that looks at the new parameters, e.g. `params_ema`.

    Example:
        >>> import torch, functorch_opt as fo
        >>> stages = fo.clip_by_global_norm(1.0), fo.scale_by_adam(), fo.scale_by_learning_rate(0.1)
        >>> tx = fo.chain(*stages)
        >>> list(tx.init({"w": torch.zeros(3)}))
        ['clip_by_global_norm', 'scale_by_adam', 'scale_by_learning_rate']
    """
    return Chain(stages)
