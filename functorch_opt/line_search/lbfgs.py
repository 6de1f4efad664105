"""L-BFGS: the gradient times an estimate H of the inverse Hessian, made of the last m differences of parameters and gradients.

With ``s = p_new - p``, ``y = g_new - g`` in the rows of S and Y, oldest first, ``R = triu(S Y')``, ``D = diag(S Y')``, ``H0 = c I``:

    a = R^-1 S g      b = R'^-1 ((D + c Y Y') a - c Y g)      H g = c g + S' b - c Y' a      c = s'y / y'y of the newest pair

This is the two-loop recursion in matrix form: two passes over the memory, and two triangular solves of size m.

Sources: Liu & Nocedal, "On the Limited Memory BFGS Method for Large Scale Optimization", 1989. Byrd, Nocedal & Schnabel, "Representations
of Quasi-Newton Matrices and Their Use in Limited Memory Methods", 1994, eq. 3.1 (H) and sec. 4. Nocedal & Wright, 2006, alg. 7.4, eq. 7.20.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from functorch_opt import tree
from functorch_opt._core.chain import chain
from functorch_opt._core.transformation import (
    GradientTransformation,
    ScalarOrSchedule,
    identity,
    transformation,
)
from functorch_opt.line_search.line import check_state, value_dtype
from functorch_opt.line_search.zoom import scale_by_zoom_linesearch
from functorch_opt.transforms.scale import scale, scale_by_learning_rate
from functorch_opt.tree import PyTree, StageState

__all__ = ["lbfgs", "scale_by_lbfgs"]

_SLOTS = ("params", "updates", "diff_params_memory", "diff_updates_memory")


def _inverse_hessian_times(
    g: list[Tensor], S: list[Tensor], Y: list[Tensor], scaled: bool
) -> list[Tensor]:
    """``H g``; S and Y have one matrix for each leaf, with a row of zeros for a pair that is not there."""

    def gram(A: list[Tensor], B: list[Tensor]) -> Tensor:
        return torch.stack([x @ y for x, y in zip(A, B, strict=True)]).sum(0)

    SY, YY = gram(S, [y.mT for y in Y]), gram(Y, [y.mT for y in Y])
    Sg, Yg = gram(S, g), gram(Y, g)
    D = SY.diagonal()
    R = SY.triu() + torch.diag((~(D > 0)).to(D.dtype))
    if scaled:
        # Before there is a pair, the first step is at most as long as 1.
        first = 1 / torch.clamp(tree.norm(g).to(R.dtype), min=1.0)
        c = torch.where(D[-1] > 0, D[-1] / torch.where(YY[-1, -1] > 0, YY[-1, -1], 1.0), first)
    else:
        c = torch.ones_like(D[-1])
    a = torch.linalg.solve_triangular(R, Sg[:, None], upper=True)[:, 0]
    b = torch.linalg.solve_triangular(R.mT, (D * a + c * (YY @ a - Yg))[:, None], upper=False)[:, 0]
    return [c * x + s.mT @ b - c * (y.mT @ a) for x, s, y in zip(g, S, Y, strict=True)]


@transformation
def scale_by_lbfgs(
    memory_size: int = 10, scale_init_precond: bool = True
) -> GradientTransformation:
    """``u = H g``, see the formulas at the top of `functorch_opt.algorithms.lbfgs`; follow it with a line search, as `lbfgs` does.

    A pair with ``s'y <= eps |s| |y|`` is left out, so that H stays positive definite and ``-u`` a descent direction (optax keeps all but
    ``s'y = 0``). A parameter without gradient takes part in the pairs with zeros. A complex one counts as pairs of reals.

    Args:
        memory_size: how many pairs are kept, 1 or greater: memory for twice as many copies of the params, at least in float32.
        scale_init_precond: ``H0 = s'y / y'y``, and before there is a pair ``min(1, 1 / |g|)``. False: 1.

    Raises:
        ValueError: a memory size that is no whole number from 1; params missing.

    Example:
        >>> import torch, functorch_opt as fo
        >>> tx, p = fo.scale_by_lbfgs(), torch.tensor([3.0, 4.0])
        >>> u, state = tx.update(p, tx.init(p), p)
        >>> u
        tensor([0.6000, 0.8000])
    """
    if isinstance(memory_size, bool) or not isinstance(memory_size, int) or memory_size < 1:
        raise ValueError(f"memory_size must be a whole number, 1 or greater; got {memory_size!r}.")

    def init(params: PyTree) -> StageState:
        def memory(p: Tensor) -> Tensor:
            first = tree.zeros_like(p)
            return first.new_zeros((memory_size, *p.shape))

        makes: tuple[Any, ...] = (tree.zeros_like, tree.zeros_like, memory, memory)
        slots = {name: tree.map(make, params) for name, make in zip(_SLOTS, makes, strict=True)}
        return StageState({"count": tree.zero_count(params)}, slots)

    def update(
        updates: PyTree, state: StageState, params: PyTree | None
    ) -> tuple[PyTree, StageState]:
        check_state("scale_by_lbfgs", state, ("count",), _SLOTS)
        if params is None:
            raise ValueError(
                "scale_by_lbfgs reads the parameters: call update(updates, state, params)."
            )
        flat, spec = tree.flatten_tensors(updates, "updates")
        leaves: list[Any] = flat
        tree.refuse_sharded("scale_by_lbfgs", flat)
        ps = tree.match(updates, spec, params, names=("updates", "params"))
        old = {
            name: tree.match(
                updates, spec, state.slots[name], names=("updates", f"the state's {name}")
            )
            for name in _SLOTS
        }
        for path, u, p, before in zip(tree.paths(updates), leaves, ps, old["updates"], strict=True):
            if u is not None and (
                p is None or before is None or not u.shape == p.shape == before.shape
            ):
                shapes = [None if x is None else tuple(x.shape) for x in (u, p, before)]
                raise ValueError(
                    f"scale_by_lbfgs: at {path!r} the update, the parameter and the state have the shapes {shapes}."
                )
        here = [i for i, u in enumerate(leaves) if u is not None]
        if not here:
            return updates, StageState({"count": state.shared["count"] + 1}, state.slots)
        dtype = value_dtype([old["updates"][i] for i in here])

        def real(x: Tensor, rows: bool = False) -> Tensor:
            return (
                (torch.view_as_real(x) if x.is_complex() else x)
                .to(dtype)
                .reshape(memory_size if rows else -1, *([-1] if rows else []))
            )

        g = [real(leaves[i]) for i in here]
        s = [real(ps[i]) - real(old["params"][i]) for i in here]
        y = [x - real(old["updates"][i]) for i, x in zip(here, g, strict=True)]
        curved = tree.dot(s, y) > torch.finfo(dtype).eps * (tree.norm(s) * tree.norm(y)).to(dtype)
        keep = curved & (state.shared["count"] > 0).all()

        def remember(memory: Tensor, x: Tensor) -> Tensor:
            return torch.where(keep, torch.cat([memory[1:], x[None].to(memory.dtype)]), memory)

        new = {name: list(column) for name, column in old.items()}
        S, Y = [], []
        for i, p in enumerate(ps):
            for name, now, before in (
                ("diff_params_memory", p, "params"),
                ("diff_updates_memory", leaves[i], "updates"),
            ):
                if new[name][i] is not None:
                    difference = (
                        torch.zeros_like(old[before][i])
                        if leaves[i] is None
                        else now - old[before][i]
                    )
                    new[name][i] = remember(new[name][i], difference)
            if leaves[i] is not None:
                new["params"][i], new["updates"][i] = (
                    x.to(old["params"][i].dtype, copy=True) for x in (p, leaves[i])
                )
                S.append(real(new["diff_params_memory"][i], rows=True))
                Y.append(real(new["diff_updates_memory"][i], rows=True))
        us: list[Any] = [None] * len(leaves)
        for i, u in zip(here, _inverse_hessian_times(g, S, Y, scale_init_precond), strict=True):
            like = old["updates"][i]
            us[i] = (
                torch.view_as_complex(u.reshape(*like.shape, 2))
                if like.is_complex()
                else u.reshape(like.shape)
            ).to(like.dtype)
        slots = {
            name: tree.like(state.slots[name], tree.unflatten(spec, column))
            for name, column in new.items()
        }
        return tree.unflatten(spec, us), StageState({"count": state.shared["count"] + 1}, slots)

    return GradientTransformation(init, update)


_ZOOM = scale_by_zoom_linesearch(max_linesearch_steps=20, initial_guess_strategy="one")


@transformation
def lbfgs(
    learning_rate: ScalarOrSchedule | None = None,
    memory_size: int = 10,
    scale_init_precond: bool = True,
    linesearch: GradientTransformation | None = _ZOOM,
) -> GradientTransformation:
    """L-BFGS: `scale_by_lbfgs`, the learning rate, then a line search.

    ``update`` takes ``value``, ``grad`` and ``value_fn`` for the search; with ``linesearch=None`` it takes none of them. The function must
    be the same at every step: mini-batches spoil the differences.

    Args:
        learning_rate: 0 or greater, or a schedule; scales the direction before the search. None: 1.
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
        ...     updates, state = tx.update(grad, state, p, value=value, grad=grad, value_fn=rosenbrock)
        ...     p = fo.apply_updates(p, updates)
        >>> p
        tensor([1., 1.], dtype=torch.float64)
    """
    sized = scale(-1.0) if learning_rate is None else scale_by_learning_rate(learning_rate)
    return chain(
        scale_by_lbfgs(memory_size, scale_init_precond),
        sized,
        identity() if linesearch is None else linesearch,
    )
