"""PSGD Kron: a preconditioner for each dim, fitted by small steps. There is no decomposition.

    mu = b1 mu + (1 - b1) G                                    and h = mu / (1 - b1^t)
    at the updates that are due, with V standard normal:
        h   = h + sqrt(2^-23) mean|h| V
        A   = h along each dim multiplied by Q_k
        B   = V along each dim multiplied by the inverse of Q_k'
        Q_k = Q_k - precond_lr triu(A_k A_k' - B_k B_k') / lb(A_k A_k' + B_k B_k') Q_k
    u  = h along each dim multiplied by Q_k' Q_k
    u  = min(1, 1.1 / RMS(u)) u

``A_k`` is A as a matrix, with dim k for its rows, and ``lb`` a lower bound of the largest eigenvalue.
Q_k is upper triangular; for large dims, and of vectors, a diagonal.

Source: Li, "Preconditioned Stochastic Gradient Descent", 2015; Pooladzandi & Li, "Curvature-Informed
SGD via General Purpose Lie-Group Preconditioners", 2024; kron_torch, whose numbers these are.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from functorch_opt import random, tree
from functorch_opt._core.chain import chain
from functorch_opt._core.groups import MaskOrFn
from functorch_opt._core.leaf import Each
from functorch_opt._core.rule import every, leafwise
from functorch_opt._core.transformation import (
    GradientTransformation,
    ScalarOrSchedule,
    check_choice,
    check_range,
    check_whole,
    transformation,
)
from functorch_opt.optimizers.kronecker import (
    along,
    on_host,
    outer,
    turned_back,
    unfolded,
)
from functorch_opt.transforms.decay import add_decayed_weights
from functorch_opt.transforms.noise import sized
from functorch_opt.transforms.scale import scale_by_learning_rate

__all__ = ["psgd_kron", "psgd_probability", "scale_by_psgd_kron"]

Diagonals = Literal["large", "largest", "larger", "all"]
EPS = torch.finfo(torch.float32).eps ** 0.5


def psgd_probability(
    largest: float = 1.0, smallest: float = 0.03, decay: float = 1e-3, flat: int = 500
) -> Callable[[Tensor], Tensor]:
    """How often preconditioners are updated: always at first, and then ever less.

    ``largest exp(-decay (count - flat))``, at most `largest` and at least `smallest`.

    Args:
        largest: during the first `flat` updates; above 0, at most 1.
        smallest: at the end.
        decay: how fast it falls.
        flat: after how many updates it begins to fall.

    Source: kron_torch.

    Example:
        >>> import torch, functorch_opt as fo
        >>> fo.psgd_probability()(torch.tensor([0, 500, 1500, 9999]))
        tensor([1.0000, 1.0000, 0.3679, 0.0300], dtype=torch.float64)
    """

    def probability(count: Tensor) -> Tensor:
        falling = largest * torch.exp(-decay * (tree.as_real(count) - flat))
        return falling.clamp(min=smallest, max=largest)

    return probability


class Shapes(NamedTuple):
    """Which dims a tensor is taken to have, and which of them have a triangle.

    Args:
        largest: the largest dim that has a triangle; others have a diagonal.
        diagonals: which dims have a diagonal beside those.
    """

    largest: int
    diagonals: Diagonals

    def dims(self, shape: Any) -> list[int]:
        """A matrix, as square as neighbouring dims make it, for more than two dims."""
        if len(shape) <= 2:
            return list(shape) or [1]
        last = [math.prod(shape[:-1]), shape[-1]]
        first = [shape[0], math.prod(shape[1:])]
        return last if last[1] - last[0] <= first[1] - first[0] else first

    def triangles(self, shape: Any) -> list[bool]:
        """For each dim whether it has a triangle."""
        dims = self.dims(shape)
        if len(dims) < 2 or self.diagonals == "all":
            return [False for _ in dims]
        found = [1 < n <= self.largest for n in dims]
        at = 0 if dims[0] > dims[1] else 1
        one_is_larger = dims[0] != dims[1]
        if self.diagonals == "largest":
            found[at] = False
        if self.diagonals == "larger" and one_is_larger:
            found[at] = False
        return found

    def first(self, scale: float) -> Callable[[Tensor], Tensor]:
        """A function that makes of a parameter the first preconditioners, one after another."""

        def make(p: Tensor) -> Tensor:
            dims = self.dims(p.shape)
            each = scale ** (1 / len(dims))
            if len(dims) == 1:
                return tree.zeros_like(p).reshape(-1) + each
            dtype = tree.at_least_float32(p.dtype)
            parts = []
            for n, is_triangle in zip(dims, self.triangles(p.shape), strict=True):
                one = torch.eye(n, dtype=dtype, device=p.device)
                first = one.flatten() if is_triangle else one.diagonal()
                parts.append(each * first)
            return torch.cat(parts)

        return make

    def taken(self, flat: Tensor, shape: Any) -> list[Tensor]:
        """The preconditioners that the slot holds."""
        triangles = self.triangles(shape)
        dims = zip(self.dims(shape), triangles, strict=True)
        forms = [[n, n] if is_triangle else [n] for n, is_triangle in dims]
        sizes = [math.prod(form) for form in forms]
        parts = zip(flat.split(sizes), forms, strict=True)
        return [part.reshape(form) for part, form in parts]


def multiplied(x: Tensor, qs: list[Tensor]) -> Tensor:
    """`x` along each dim multiplied by ``Q``."""
    for dim, q in enumerate(qs):
        if q.dim() == 2:
            only: list[Tensor | None] = [None] * x.dim()
            only[dim] = q
            x = turned_back(x, only)
        else:
            x = x * along(q, dim, x)
    return x


def divided(x: Tensor, qs: list[Tensor]) -> Tensor:
    """`x` along each dim multiplied by the inverse of ``Q'``."""
    for dim, q in enumerate(qs):
        if q.dim() == 2:
            columns = unfolded(x, dim)
            solved = torch.linalg.solve_triangular(q.mH, columns, upper=False)
            moved = x.movedim(dim, 0)
            x = solved.reshape(moved.shape).movedim(0, dim)
        else:
            x = x / along(q.conj(), dim, x)
    return x


def lower_bound(a: Tensor, largest: Tensor) -> Tensor:
    """A lower bound of the spectral norm of a symmetric matrix, by one step of power iteration.

    `largest` is its largest element, in absolute value.
    """
    a = a / largest
    squares = (a * a.conj()).real
    column = squares.sum(0).argmax()
    x = a.mH @ a.index_select(1, column.reshape(1))
    x = x / torch.linalg.vector_norm(x)
    return torch.linalg.vector_norm(a @ x) * largest


def fitted(q: Tensor, dim: int, a: Tensor, b: Tensor, step: Any) -> Tensor:
    """The next preconditioner of a dim."""
    tiny = torch.finfo(torch.float32).tiny
    if q.dim() < 2:
        aa = (unfolded(a, dim).abs() ** 2).sum(1)
        bb = (unfolded(b, dim).abs() ** 2).sum(1)
        bound = (aa + bb).amax().clamp(min=tiny)
        return q - step * (aa - bb) * q / bound
    aa, bb = outer(a, dim), outer(b, dim)
    both = aa + bb
    largest = both.abs().amax().clamp(min=tiny)
    bound = lower_bound(both, largest).clamp(min=tiny)
    slope = (aa - bb).triu()
    return q - ((step / bound) * slope) @ q


def balanced(qs: list[Tensor]) -> list[Tensor]:
    """The same product, of preconditioners that all have the same largest element."""
    sizes = torch.stack([q.abs().amax() for q in qs])
    mean = sizes.log().mean().exp()
    pairs = zip(qs, sizes.unbind(), strict=True)
    return [q * (mean / size) for q, size in pairs]


def _fit(shapes, h, q, noise, step, balance):
    """What the rare work makes: the next preconditioners."""
    qs = shapes.taken(q, h.shape)
    dims = shapes.dims(h.shape)
    if len(dims) > 1:
        pairs = zip(balanced(qs), qs, strict=True)
        qs = [torch.where(balance, new, old) for new, old in pairs]
    h, noise = h.reshape(dims), noise.reshape(dims)
    a, b = multiplied(h, qs), divided(noise, qs)
    found = [fitted(x, dim, a, b, step).reshape(-1) for dim, x in enumerate(qs)]
    return {"q": torch.cat(found)}


def _perturbed(h, noise):
    return h + EPS * h.abs().mean() * noise


def _prepare(balance_probability: float) -> Callable[..., Any]:
    def prepare(count, key, since, b1, probability, updates, params=None):
        due = _is_due(since, probability)
        now: dict[str, Any] = {
            "w1": 1 - b1,
            "c1": 1 / (1 - b1 ** tree.as_real(count + 1)),
            "is_due": on_host(due),
            "noise": 0.0,
            "balance": False,
        }
        if now["is_due"] is not False:
            like = sized("scale_by_psgd_kron", updates, params)
            now["noise"] = Each(random.normal_like(key, like, count))
            key_of_balance = random.fold_in(key, count.amax())
            drawn = random.uniform(key_of_balance, ())
            now["balance"] = drawn < balance_probability
        return now, {"since": torch.where(due, 0, since + 1)}

    return prepare


def _is_due(since: Tensor, probability: Any) -> Tensor:
    return since + 1 >= 1 / probability


def _rule(shapes: Shapes) -> Callable[..., Any]:
    def rule(g, mu, q, w1, c1, noise, is_due):
        if not g.numel():
            return g.clone(), {"mu": mu.clone(), "q": q.clone()}
        mu = torch.lerp(mu, g, w1)
        h = c1 * mu
        if is_due is not False:
            due = torch.as_tensor(is_due, device=g.device)
            h = torch.where(due, _perturbed(h, noise), h)
        qs = shapes.taken(q, g.shape)
        adjoint = [x.mH if x.dim() == 2 else x.conj() for x in qs]
        h = h.reshape(shapes.dims(g.shape))
        u = multiplied(multiplied(h, qs), adjoint)
        mean_square = u.abs().square().mean()
        rms = (mean_square + tree.TINY).sqrt()
        u = u * (1.1 / (rms + 1e-12)).clamp(max=1)
        return u.reshape(g.shape), {"mu": mu, "q": q.clone()}

    return rule


@transformation
def scale_by_psgd_kron(
    b1: ScalarOrSchedule = 0.9,
    precond_lr: ScalarOrSchedule = 0.1,
    probability: ScalarOrSchedule | None = None,
    *,
    key: Tensor | int,
    init_scale: float = 1.0,
    max_size: int = 8192,
    diagonals: Diagonals = "large",
    balance_probability: float = 0.01,
) -> GradientTransformation:
    """The momentum, whitened by preconditioners that follow it in small steps.

    The rule is at the top of `functorch_opt.optimizers.psgd_kron`. The state is ``mu``, and ``q``, a
    vector with all preconditioners of a tensor. On updates that are not due no noise is drawn.

    Args:
        b1: decay of the momentum, in [0, 1).
        precond_lr: the step of the preconditioners, 0 or greater.
        probability: of an update of the preconditioners, in (0, 1], or a schedule. They are updated
            at regular distances, all together. None means `psgd_probability`.
        key: int64 [2], see `functorch_opt.random.key`, or a seed.
        init_scale: of the first preconditioner, above 0.
        max_size: the largest dim that has a triangular matrix. Larger dims have a diagonal.
        diagonals: "large": only dims above `max_size`. "largest": the largest dim too. "larger": it
            too, if no other has its size. "all": all dims.
        balance_probability: of an update before which the preconditioners of a tensor are brought
            to one size.

    Raises:
        ValueError: an argument outside its range; a gradient that is None in a call without params.
        TypeError: something that is not a key.

    Source: kron_torch. There triangular systems are solved in float32; here in the dtype of the
    rule.

    Example:
        >>> import torch, functorch_opt as fo
        >>> tx = fo.scale_by_psgd_kron(key=0)
        >>> state = tx.init([torch.zeros(3, 2)])
        >>> fo.get(state, "q")[0].shape                                            # 3 * 3 + 2 * 2
        torch.Size([13])
    """
    check_range(0, 1, b1=b1)
    check_range(0, float("inf"), precond_lr=precond_lr)
    check_range(0, 1, above=True, closed=True, probability=probability)
    check_range(0, 1, closed=True, balance_probability=balance_probability)
    check_range(0, float("inf"), above=True, init_scale=init_scale)
    check_whole(0, max_size=max_size)
    check_choice(*get_args(Diagonals), diagonals=diagonals)
    shapes = Shapes(max_size, diagonals)

    def work(g, mu, q, w1, c1, noise, precond_lr, balance):
        if not g.numel():
            return {"q": q.clone()}
        h = _perturbed(c1 * torch.lerp(mu, g, w1), noise)
        balance = torch.as_tensor(balance, device=g.device)
        return _fit(shapes, h, q, noise, precond_lr, balance)

    given = psgd_probability() if probability is None else probability
    return leafwise(
        _rule(shapes),
        _prepare(balance_probability),
        slots={"mu": tree.zeros_like, "q": shapes.first(init_scale)},
        shared={"key": random.as_key(key), "since": torch.zeros((), dtype=torch.int64)},
        hyper={"b1": b1, "precond_lr": precond_lr, "probability": given},
        every=every(_is_due, work),
        kind="tensorwise",
    )


@transformation
def psgd_kron(
    learning_rate: ScalarOrSchedule = 3e-4,
    b1: ScalarOrSchedule = 0.9,
    weight_decay: ScalarOrSchedule = 0.0,
    precond_lr: ScalarOrSchedule = 0.1,
    probability: ScalarOrSchedule | None = None,
    mask: MaskOrFn | None = None,
    *,
    key: Tensor | int,
    init_scale: float = 1.0,
    max_size: int = 8192,
    diagonals: Diagonals = "large",
    balance_probability: float = 0.01,
) -> GradientTransformation:
    """PSGD Kron: `scale_by_psgd_kron`, decoupled weight decay, the learning rate.

    Args:
        learning_rate: 0 or greater, or a schedule; about a third of that of Adam.
        b1, precond_lr, probability, key, init_scale, max_size, diagonals, balance_probability: see
            `scale_by_psgd_kron`.
        weight_decay: multiplied by the learning rate.
        mask: which parameters decay, see `masked`; by default those with two dims or more.

    Raises:
        ValueError: an argument outside its range; ``update`` called without params.
        TypeError: something that is not a key.

    Source: kron_torch.

    Example:
        >>> import functorch_opt as fo
        >>> fo.psgd_kron(1e-3, key=0)
        psgd_kron(0.001, key=0)
    """
    direction = scale_by_psgd_kron(
        b1,
        precond_lr,
        probability,
        key=key,
        init_scale=init_scale,
        max_size=max_size,
        diagonals=diagonals,
        balance_probability=balance_probability,
    )
    matrices = (lambda path, p: p.ndim >= 2) if mask is None else mask
    decay = add_decayed_weights(weight_decay, matrices)
    return chain(direction, decay, scale_by_learning_rate(learning_rate))
