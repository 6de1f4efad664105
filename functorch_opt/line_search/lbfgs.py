"""L-BFGS: the gradient times an estimate H of the inverse Hessian.

H is made of the last m differences of parameters and of gradients. With ``s = p_new - p`` and
``y = g_new - g`` in the rows of S and Y, oldest first, ``R = triu(S Y')``, ``D = diag(S Y')`` and
``H0 = c I``:

    a   = R^-1 S g
    b   = R'^-1 ((D + c Y Y') a - c Y g)
    H g = c g + S' b - c Y' a                    c = s'y / y'y of the newest pair

This is the two-loop recursion in matrix form: two passes over the memory, and two triangular solves
of size m.

Sources: Liu & Nocedal, "On the Limited Memory BFGS Method for Large Scale Optimization", 1989.
Byrd, Nocedal & Schnabel, "Representations of Quasi-Newton Matrices and Their Use in Limited Memory
Methods", 1994, eq. 3.1 (H) and sec. 4. Nocedal & Wright, 2006, alg. 7.4, eq. 7.20.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from functorch_opt import tree
from functorch_opt._core import sharding, structure
from functorch_opt._core.chain import chain
from functorch_opt._core.rule import identity
from functorch_opt._core.state import StageState
from functorch_opt._core.transformation import (
    GradientTransformation,
    ScalarOrSchedule,
    transformation,
)
from functorch_opt.line_search.line import check_state, value_dtype
from functorch_opt.line_search.zoom import scale_by_zoom_linesearch
from functorch_opt.transforms.scale import scale, scale_by_learning_rate
from functorch_opt.tree import PyTree

__all__ = ["lbfgs", "scale_by_lbfgs"]


@transformation
def scale_by_lbfgs(
    memory_size: int = 10, scale_init_precond: bool = True
) -> GradientTransformation:
    """``u = H g``. Let a line search follow, as `lbfgs` does.

    H is an estimate of the inverse Hessian, made of the last differences of parameters and of
    gradients. A pair with ``s'y <= eps |s| |y|`` is left out, so that H stays positive definite,
    and ``-u`` a descent direction (optax keeps all pairs but those with ``s'y = 0``). A parameter
    without gradient has zeros in the pair. A complex parameter counts as pairs of reals.

    Args:
        memory_size: how many pairs are kept, 1 or greater. They take the memory of twice as many
            copies of the params, at least in float32.
        scale_init_precond: whether H0 is ``s'y / y'y``, or ``min(1, 1 / |g|)`` before there is a
            pair. If False, it is 1.

    Raises:
        ValueError: the memory size is not a whole number, or less than 1; params are missing.
        TypeError: the parameters have owners, see `functorch_opt.with_owners`.

    Source: Byrd, Nocedal & Schnabel, 1994, eq. 3.1.

    Example:
        >>> import torch, functorch_opt as fo
        >>> tx, p = fo.scale_by_lbfgs(), torch.tensor([3.0, 4.0])
        >>> u, state = tx.update(p, tx.init(p), p)
        >>> u
        tensor([0.6000, 0.8000])
    """
    if (
        isinstance(memory_size, bool)
        or not isinstance(memory_size, int)
        or memory_size < 1
    ):
        raise ValueError(
            f"memory_size must be a whole number, 1 or greater; got {memory_size!r}."
        )

    def init(params: PyTree) -> StageState:
        _refuse_owners(params)

        def memory(p: Tensor) -> Tensor:
            row = tree.zeros_like(tree.part_of(p))
            return sharding.rows_like(row.new_zeros((memory_size, *row.shape)), p)

        slots: dict[str, Any] = {}
        for name in _LAST:
            slots[name] = tree.map(tree.zeros_like, params)
        for name in _MEMORIES:
            slots[name] = tree.map(memory, params)
        return StageState({"count": tree.zero_count(params)}, slots)

    def update(
        updates: PyTree, state: StageState, params: PyTree | None
    ) -> tuple[PyTree, StageState]:
        gs, ps, old = _columns(updates, state, params)
        _check_shapes(updates, gs, ps, old)
        spec = tree.flatten(updates)[1]
        count = {"count": state.shared["count"] + 1}
        if all(g is None for g in gs):
            return updates, StageState(count, state.slots)
        begun = (state.shared["count"] > 0).all()
        new = _remembered(gs, ps, old, begun)
        us = _directions(gs, new, scale_init_precond)
        slots = {
            name: structure.like(state.slots[name], spec, column)
            for name, column in new.items()
        }
        return tree.unflatten(spec, us), StageState(count, slots)

    return GradientTransformation(init, update)


def _refuse_owners(params: PyTree) -> None:
    """Raise TypeError for parameters of which one rank has the whole, and the others nothing."""
    if any(map(sharding.is_owned, tree.leaves(params))):
        raise TypeError(
            "scale_by_lbfgs takes no parameters with owners: its pairs are of all of them. "
            "Leave out with_owners or owners=True, or shard the parameters."
        )


_LAST = ("params", "updates")
"""The last parameters and gradients."""
_MEMORIES = ("diff_params_memory", "diff_updates_memory")
"""The rows of S and Y for each leaf."""
_SLOTS = (*_LAST, *_MEMORIES)

Columns = dict[str, list[Any]]
"""The leaves of every slot."""


def _columns(
    updates: PyTree, state: StageState, params: PyTree | None
) -> tuple[list[Any], list[Any], Columns]:
    """The leaves of the gradients, of the parameters, and of every slot."""
    check_state("scale_by_lbfgs", state, ("count",), _SLOTS)
    if params is None:
        raise ValueError(
            "scale_by_lbfgs reads the parameters: call update(updates, state, params)."
        )
    gs, spec = structure.flatten_tensors(updates, "updates")
    ps = structure.match(updates, spec, params, names=("updates", "params"))
    old = {}
    for name in _SLOTS:
        names = ("updates", f"the state's {name}")
        old[name] = structure.match(updates, spec, state.slots[name], names=names)
    return gs, ps, old


def _check_shapes(
    updates: PyTree,
    gs: list[Any],
    ps: list[Any],
    old: Columns,
) -> None:
    """Raise ValueError where a gradient, its parameter and the state have different shapes."""
    for path, g, p, before in zip(
        tree.paths(updates), gs, ps, old["updates"], strict=True
    ):
        if g is None:
            continue
        is_missing = p is None or before is None
        if is_missing or not g.shape == p.shape == before.shape:
            shapes = [None if x is None else tuple(x.shape) for x in (g, p, before)]
            raise ValueError(
                f"scale_by_lbfgs: at {path!r} the update, the parameter and the state "
                f"have the shapes {shapes}."
            )


# ---- the memory ----------------------------------------------------------------------------------


def _remembered(
    gs: list[Any],
    ps: list[Any],
    old: Columns,
    begun: Tensor,
) -> Columns:
    """The slots after this step. The new pair is kept if there is one, and if it is curved."""
    keep = _is_curved(gs, ps, old) & begun

    def remember(
        memory: Tensor, now: Tensor, before: Tensor, has_gradient: bool
    ) -> Tensor:
        rows, last = tree.part_of(memory), tree.part_of(before)
        row = tree.part_of(now, before) - last if has_gradient else torch.zeros_like(last)
        row = row.to(rows.dtype)
        longer = torch.cat([rows[1:], row[None]])
        return sharding.rows_like(torch.where(keep, longer, rows), before)

    new = {name: list(column) for name, column in old.items()}
    for i, (g, p) in enumerate(zip(gs, ps, strict=True)):
        has_gradient = g is not None
        for name, x in (("params", p), ("updates", g)):
            kept, before = f"diff_{name}_memory", old[name][i]
            memory = old[kept][i]
            if memory is not None:
                new[kept][i] = remember(memory, x, before, has_gradient)
            if has_gradient:
                dtype = old["params"][i].dtype
                new[name][i] = sharding.on_part(
                    lambda part, dtype=dtype: part.to(dtype, copy=True), x, x
                )
    return new


def _is_curved(gs: list[Any], ps: list[Any], old: Columns) -> Tensor:
    """Whether the gradient has grown along the step by more than rounding."""
    here = [i for i, g in enumerate(gs) if g is not None]
    dtype = _real_dtype(gs, old)

    def moved(x: Tensor, last: Tensor) -> Tensor:
        return (_flat(x, dtype) - _flat(last, dtype)).reshape(_reals(last).shape)

    def moves(now: list[Any], before: list[Any]) -> list[Tensor]:
        return [sharding.on_part(moved, now[i], now[i], before[i]) for i in here]

    s = moves(ps, old["params"])
    y = moves(gs, old["updates"])
    lengths = (tree.norm(s) * tree.norm(y)).to(dtype)
    return tree.dot(s, y) > torch.finfo(dtype).eps * lengths


def _real_dtype(gs: list[Any], old: Columns) -> torch.dtype:
    """The dtype in which a step is computed."""
    pairs = zip(gs, old["updates"], strict=True)
    here = [x for g, x in pairs if g is not None]
    return value_dtype(here)


def _flat(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The elements as one row of reals. A complex element is two of them."""
    return _reals(x).to(dtype).reshape(-1)


def _reals(x: Tensor) -> Tensor:
    return torch.view_as_real(x.resolve_conj()) if x.is_complex() else x


# ---- the direction -------------------------------------------------------------------------------


def _directions(gs: list[Any], slots: Columns, scaled: bool) -> list[Any]:
    """``H g``, in the shapes of the gradients, and None where there is no gradient."""
    here = [i for i, g in enumerate(gs) if g is not None]
    dtype = _real_dtype(gs, slots)

    def rows(memory: Tensor) -> Tensor:
        mine = _reals(tree.part_of(memory)).to(dtype)
        return mine.reshape(len(mine), mine[0].numel())

    S = [rows(slots["diff_params_memory"][i]) for i in here]
    Y = [rows(slots["diff_updates_memory"][i]) for i in here]
    leaves = [gs[i] for i in here]
    g = [_flat(tree.part_of(x), dtype) for x in leaves]
    products = _inverse_hessian_times(g, S, Y, leaves, scaled)
    us: list[Any] = [None] * len(gs)
    for i, u in zip(here, products, strict=True):
        like = slots["updates"][i]
        us[i] = sharding.on_part(lambda part, u=u: _shaped(u, part), like, like)
    return us


def _shaped(u: Tensor, like: Tensor) -> Tensor:
    """The row of reals `u` in the shape and dtype of `like`."""
    if like.is_complex():
        return torch.view_as_complex(u.reshape(*like.shape, 2)).to(like.dtype)
    return u.reshape(like.shape).to(like.dtype)


def _inverse_hessian_times(
    g: list[Tensor],
    S: list[Tensor],
    Y: list[Tensor],
    leaves: list[Any],
    scaled: bool,
) -> list[Tensor]:
    """``H g``, in the letters of the formula above.

    S and Y consist of one matrix for each leaf. It has a row of zeros for each pair that is
    missing. Of sharded leaves they are this rank's parts, and all products are summed in one
    message.
    """
    of_leaves = []
    for s, y, x in zip(S, Y, g, strict=True):
        right = torch.cat([y, x[None]]).mT
        of_leaves.append(torch.stack([s @ right, y @ right]))
    of_s, of_y = sharding.added_over_ranks(of_leaves, leaves)
    SY, Sg = of_s[:, :-1], of_s[:, -1]
    YY, Yg = of_y[:, :-1], of_y[:, -1]
    D = SY.diagonal()
    is_unused = ~(D > 0)
    R = SY.triu() + torch.diag(is_unused.to(D.dtype))
    newest = D[-1]
    c = _first_scale(leaves, newest, YY[-1, -1]) if scaled else torch.ones_like(newest)
    a = _solved(R, Sg, upper=True)
    right = D * a + c * (YY @ a - Yg)
    b = _solved(R.mT, right, upper=False)
    Sb = [s.mT @ b for s in S]
    Ya = [y.mT @ a for y in Y]
    of_tensors = zip(g, Sb, Ya, strict=True)
    return [c * x + sb - c * ya for x, sb, ya in of_tensors]


def _first_scale(g: list[Any], sy: Tensor, yy: Tensor) -> Tensor:
    """``s'y / y'y`` of the newest pair.

    Before there is a pair, it is such that the length of the first step is at most 1.
    """
    length = tree.norm(g).to(sy.dtype)
    first = 1 / torch.clamp(length, min=1.0)
    divisor = torch.where(yy > 0, yy, 1.0)
    return torch.where(sy > 0, sy / divisor, first)


def _solved(triangle: Tensor, vector: Tensor, upper: bool) -> Tensor:
    solved = torch.linalg.solve_triangular(triangle, vector[:, None], upper=upper)
    return solved[:, 0]


# ---- the optimizer -------------------------------------------------------------------------------


_ZOOM = scale_by_zoom_linesearch(max_linesearch_steps=20, initial_guess_strategy="one")


@transformation
def lbfgs(
    learning_rate: ScalarOrSchedule | None = None,
    memory_size: int = 10,
    scale_init_precond: bool = True,
    linesearch: GradientTransformation | None = _ZOOM,
) -> GradientTransformation:
    """L-BFGS: `scale_by_lbfgs`, then the learning rate, then a line search.

    ``update`` takes ``value``, ``grad`` and ``value_fn`` for the search; with ``linesearch=None``
    it takes none of them. The function must be the same at every step, because minibatches would
    spoil the differences.

    Args:
        learning_rate: 0 or greater, or a schedule. It scales the direction before the search. None
            means 1.
        memory_size, scale_init_precond: see `scale_by_lbfgs`.
        linesearch: `scale_by_zoom_linesearch`, `scale_by_backtracking_linesearch`, or None.

    Source: Liu & Nocedal, 1989.

    Example:
        >>> import torch, functorch_opt as fo
        >>> from torch.func import grad_and_value
        >>> rosenbrock = lambda p: 100 * (p[1] - p[0] ** 2) ** 2 + (1 - p[0]) ** 2
        >>> tx, p = fo.lbfgs(), torch.tensor([-1.2, 1.0], dtype=torch.float64)
        >>> state = tx.init(p)
        >>> for _ in range(40):
        ...     grad, value = grad_and_value(rosenbrock)(p)
        ...     search = {"value": value, "grad": grad, "value_fn": rosenbrock}
        ...     updates, state = tx.update(grad, state, p, **search)
        ...     p = fo.apply_updates(p, updates)
        >>> p
        tensor([1., 1.], dtype=torch.float64)
    """
    sized = (
        scale(-1.0) if learning_rate is None else scale_by_learning_rate(learning_rate)
    )
    return chain(
        scale_by_lbfgs(memory_size, scale_init_precond),
        sized,
        identity() if linesearch is None else linesearch,
    )
