"""The orthogonal matrix nearest to a matrix, nearly: by a few steps of Newton-Schulz.

    x = m / (slack |m| + eps)                                                      frobenius
    x = m / (slack (largest singular value of m) + eps)                            spectral
    x = m / (slack sqrt(|m m'|))                                                   schatten
    x = m / (slack sqrt(sum of each row of |m m'|))                                aol
    x = a x + (b (x x') + c (x x')^2) x                  for the coefficients (a, b, c) of each step

If m = U S V', x is about U V'. For Gram's method only small matrices are multiplied, as long as the
short side of m:

    r = x x',  q = I
    z = b r + c r^2       q = q z + a q       s = r z + a r       r = s z + a s         each step
    x = q x,  r = x x',  q = I                              before the third step, which mends errors
    x = q x                                                                                at the end

Where m is tall, it is turned before all that. "aol" and "schatten" as in optax: Boissin, Massena,
Mamalet & Serrurier, "Turbo-Muon", 2025.

Sources of the coefficients: "jordan", Jordan et al., "Muon", 2024. "you", J. You's schedule for five
steps in modded-nanogpt, 2025, which Dion uses too. "polar_express", Amsel, Persson, Musco & Gower,
"The Polar Express", 2025, alg. 1. "cans", Grishina, Smirnov & Rakhuba, "Accelerating Newton-Schulz
Iteration for Orthogonalization via Chebyshev-type Polynomials", 2025. "gram", Dao et al.,
gram-newton-schulz, 2026, with the coefficients of "polar_express".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from functorch_opt import tree
from functorch_opt._core.transformation import check_range, check_whole

Triple = tuple[float, float, float]
Triples = tuple[Triple, ...]
Coefficients = str | Triple | Triples
Preconditioning = Literal["frobenius", "spectral", "aol", "schatten"]


class Preset(NamedTuple):
    """Coefficients of each step, of which the last is repeated, and how the start is made small."""

    triples: Triples
    slack: float = 1.0
    gram: bool = False


def _made_safe(triples: Triples, by: float) -> Triples:
    """The polynomials of x / by; but not the last, which is the one at the fixed point."""
    safe = [(a / by, b / by**3, c / by**5) for a, b, c in triples[:-1]]
    return (*safe, triples[-1])


POLAR_EXPRESS = _made_safe(
    (
        (8.28721201814563, -23.595886519098837, 17.300387312530933),
        (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
        (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
        (3.3184196573706015, -2.488488024314874, 0.51004894012372),
        (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
        (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
        (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
        (1.875, -1.25, 0.375),
    ),
    1.01,
)
PRESETS = {
    "jordan": Preset(((3.4445, -4.775, 2.0315),)),
    "you": Preset(
        (
            (4.0848, -6.8946, 2.9270),
            (3.9505, -6.3029, 2.6377),
            (3.7418, -5.5913, 2.3037),
            (2.8769, -3.1427, 1.2046),
            (2.8366, -3.0525, 1.2012),
        )
    ),
    "polar_express": Preset(POLAR_EXPRESS, 1.01),
    "cans": Preset(
        (
            (8.4703, -25.1081, 18.6293),
            (4.1828, -3.1087, 0.5806),
            (3.9619, -2.9541, 0.5630),
            (3.2866, -2.4647, 0.5074),
            (2.2737, -1.6447, 0.4162),
        )
    ),
    "gram": Preset(POLAR_EXPRESS, 1.01, gram=True),
}


def preset(ns_coeffs: Coefficients, ns_steps: int) -> Preset:
    """What `ns_coeffs` stand for, with the coefficients of each of the steps.

    Raises:
        ValueError: there is no such preset; there are not three coefficients, or too many steps.
    """
    check_whole(0, ns_steps=ns_steps)
    check_range(0, 100, ns_steps=ns_steps)
    if isinstance(ns_coeffs, str):
        if ns_coeffs not in PRESETS:
            raise ValueError(f"ns_coeffs must be one of {[*PRESETS]}; got {ns_coeffs!r}.")
        found = PRESETS[ns_coeffs]
        more = found.triples[-1:] * (ns_steps - len(found.triples))
        return found._replace(triples=(*found.triples[:ns_steps], *more))
    if is_triple(ns_coeffs):
        return Preset((tuple(ns_coeffs),) * ns_steps)  # type: ignore[arg-type]
    of_steps = isinstance(ns_coeffs, (tuple, list)) and len(ns_coeffs) > 0
    if not of_steps or not all(map(is_triple, ns_coeffs)):
        raise ValueError(
            f"ns_coeffs must be three numbers, or three for each step; got {ns_coeffs!r}."
        )
    return Preset(tuple(ns_coeffs))  # type: ignore[arg-type]


def is_triple(given: Any) -> bool:
    """Whether these are the coefficients of one step."""
    several = isinstance(given, (tuple, list)) and len(given) == 3
    return several and all(isinstance(x, (int, float, Tensor)) for x in given)


def newton_schulz(x: Tensor, triples: Triples) -> Tensor:
    """Nearly the orthogonal matrix of `x`, whose singular values must be at most 1."""
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x  # [..., n, m] with n <= m: the products below are [n, n]
    batch = x.shape[:-2]
    x = x.flatten(0, -3) if len(batch) > 1 else x
    add = torch.baddbmm if batch else torch.addmm
    for a, b, c in triples:
        gram = x @ x.mH
        x = add(x, add(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    x = x.unflatten(0, batch) if len(batch) > 1 else x
    return x.mT if tall else x


def gram_newton_schulz(x: Tensor, triples: Triples) -> Tensor:
    """The same numbers as those of `newton_schulz`, up to rounding, from small products."""
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    one = torch.eye(x.shape[-2], dtype=x.dtype, device=x.device)
    r, q = x @ x.mH, one
    for i, (a, b, c) in enumerate(triples):
        if i == 2:
            x = q @ x
            r, q = x @ x.mH, one
        z = b * r + c * (r @ r)
        q = q @ z + a * q
        s = r @ z + a * r
        r = s @ z + a * s
    x = q @ x
    return x.mT if tall else x


def norm(x: Tensor) -> Tensor:
    """The norm of each matrix, with dims of length 1."""
    return torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)


def size_of(x: Tensor, preconditioning: Preconditioning) -> Tensor:
    """What each matrix, or each row or column of one, is divided by."""
    if preconditioning == "frobenius":
        return norm(x)
    if preconditioning == "spectral":
        # There are no singular values of numbers in 16 bits.
        exact = x.to(tree.at_least_float32(x.dtype))
        return torch.linalg.matrix_norm(exact, 2, keepdim=True)
    rows, columns = x.shape[-2:]
    if rows > columns:
        gram = x.mH @ x
        dim = -2
    else:
        gram = x @ x.mH
        dim = -1
    if preconditioning == "schatten":
        return (norm(gram) + tree.TINY).sqrt()  # which has a slope at zero
    sums = gram.abs().sum(dim, keepdim=True)
    return (sums + tree.TINY).sqrt()


def dtype_of_iteration(x: Tensor, given: torch.dtype | None) -> torch.dtype:
    """On a GPU products of float32 are slow, and the iteration needs few digits."""
    if given is not None:
        return given
    return torch.bfloat16 if x.is_cuda and x.dtype is torch.float32 else x.dtype


def orthogonalizer(
    ns_coeffs: Coefficients,
    ns_steps: int,
    ns_dtype: torch.dtype | None = None,
    bounded: bool = False,
    preconditioning: Preconditioning = "frobenius",
) -> Callable[[Tensor, float | Tensor], Tensor]:
    """A function of a matrix and eps: nearly the orthogonal matrix nearest to it.

    Args:
        ns_coeffs, ns_steps: see `preset`.
        ns_dtype: dtype of the iteration; None as `dtype_of_iteration` says.
        bounded: whether eps is the least norm, and not added to it.
        preconditioning: what a matrix is divided by.
    """
    triples, slack, gram = preset(ns_coeffs, ns_steps)
    iterate = gram_newton_schulz if gram else newton_schulz
    at_least = bounded or preconditioning in ("aol", "schatten")

    def orthogonal(m: Tensor, eps: float | Tensor) -> Tensor:
        x = m.to(dtype_of_iteration(m, ns_dtype))
        size = size_of(x, preconditioning) * slack
        if isinstance(eps, Tensor):
            eps = eps.real
        size = size.clamp(min=eps) if at_least else size + eps
        x = x / size
        return iterate(x.to(dtype_of_iteration(m, ns_dtype)), triples).to(m.dtype)

    return orthogonal
