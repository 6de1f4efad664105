"""Each replicated parameter is stepped by one rank, and the updates are sent to all, as in ZeRO."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from functorch_opt import tree
from functorch_opt._core import numerics, structure
from functorch_opt._core.on_owner import errors_kept
from functorch_opt._core.owned import refuse_derivatives
from functorch_opt._core.replicas import Replicas, is_one_process
from functorch_opt._core.transformation import GradientTransformation, transformation

__all__ = ["with_owners"]


@transformation
def with_owners(inner: GradientTransformation) -> GradientTransformation:
    """Divide the work and the state of `inner` among the ranks: each parameter has one owner.

    It is for parameters and gradients that are the same on every rank, as under
    `DistributedDataParallel`. Every rank works only on the parameters that it owns, and keeps only
    their slots; then the updates go to all ranks, in one message for each dtype. So all ranks have
    the same updates, to the bit, and they are those of one process. The owners follow from the
    shapes, and nothing is sent to agree on them. Sharded parameters (DTensors) stay as they are.

    What looks at all tensors, such as a global norm, needs one more message of a number from each
    rank. A rule that sees whole tensors, such as that of Muon, needs one too, which says whether it
    has failed on any rank. In one process, and without a process group, `inner` runs as it is.

    Args:
        inner: the transformation. Its slots are tensors that lie with their owner, as DTensors on
            a mesh of one rank. `functorch_opt.tree.whole` gives every rank a copy of one.

    Raises:
        TypeError: `inner` is not a transformation, or has L-BFGS in it; an extra argument is a function, such as the
            ``value_fn`` of a line search, for it would be called with parts of the parameters.
        ValueError: a gradient is missing, and ``update`` is called without params.
        NotImplementedError: in torch.compile, or where a derivative is wanted.
        RuntimeError: `inner` raised an error on another rank.

    Source: Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter
    Models", 2020, section 5.1. There each rank has a part of the elements, and here whole tensors.

    Example:
        >>> import torch, functorch_opt as fo
        >>> tx = fo.with_owners(fo.chain(fo.clip_by_global_norm(1.0), fo.adamw(0.1)))
        >>> params = {"w": torch.tensor([2.0, 2.0]), "b": torch.tensor(0.0)}
        >>> updates, state = tx.update(params, tx.init(params), params)
        >>> sorted(updates)
        ['b', 'w']
    """
    if not isinstance(inner, GradientTransformation):
        raise TypeError(
            "with_owners takes a transformation, e.g. adamw(1e-3); "
            f"got {type(inner).__name__} {inner!r}."
        )

    def init(params):
        if is_one_process():
            return inner.init(params)
        ps, spec = tree.flatten(params)
        return inner.init(tree.unflatten(spec, Replicas(ps).given(ps)))

    def update(updates, state, params=None, **extra: Any):
        if is_one_process():
            return inner.update(updates, state, params, **extra)
        gs, spec = tree.flatten(updates)
        ps = _like(gs, spec, updates, params)
        refuse_derivatives("with_owners", [*gs, *ps])
        replicas = Replicas(ps)
        given = {name: _extra(name, x, spec, replicas) for name, x in extra.items()}
        beside = None if params is None else tree.unflatten(spec, replicas.given(ps))
        us, new = replicas.given(gs), state
        with errors_kept() as errors:
            try:
                moved, new = inner.update(
                    tree.unflatten(spec, us), state, beside, **given
                )
                us = structure.match(updates, spec, moved, names=("updates", "updates"))
            except Exception as error:
                us = [_wide(u) for u in us]
                errors.append(error)
        return tree.unflatten(spec, replicas.taken(us, errors)), new

    return GradientTransformation(
        init, update, extra_args=inner.extra_args, last=inner.last
    )


def _like(
    gs: list[Any],
    spec: Any,
    updates: Any,
    params: Any,
) -> list[Any]:
    """The tensors whose shapes decide who owns what: the same at every step."""
    if params is not None:
        return structure.match(updates, spec, params, names=("updates", "params"))
    if any(g is None for g in gs):
        raise ValueError(
            "with_owners needs the parameters where a gradient is missing: "
            "call update(updates, state, params)."
        )
    return gs


def _extra(
    name: str,
    value: Any,
    spec: Any,
    replicas: Replicas,
) -> Any:
    """An extra argument: of a tree as the updates are, each tensor with its owner."""
    if callable(value) and not isinstance(value, Tensor):
        raise TypeError(
            f"with_owners: {name} is a function of whole parameters, and a rank has only its own "
            "here. Give what needs it the parameters without with_owners."
        )
    xs, own = tree.flatten(value)
    alike = own == spec and len(xs) > 1
    return tree.unflatten(spec, replicas.given(xs)) if alike else value


def _wide(x: Any) -> Any:
    """The tensor in the dtype that its update would have had: the other ranks wait for that."""
    return None if x is None else x.to(numerics.at_least_float32(x.dtype))
