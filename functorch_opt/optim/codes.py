"""The option ``state`` of the stateful optimizers: how slots are stored."""

from __future__ import annotations

from functorch_opt._core.transformation import GradientTransformation
from functorch_opt.codecs.codec import CODECS
from functorch_opt.codecs.coded import SCALE
from functorch_opt.codecs.stored import stored

AS_USUAL = "float32"


def check_code(code: str) -> None:
    """Raise ValueError for a code that there is not."""
    if code != AS_USUAL and code not in CODECS:
        known = sorted([AS_USUAL, *CODECS])
        raise ValueError(f"state must be one of {known}; got {code!r}.")


def in_code(tx: GradientTransformation, code: str | None) -> GradientTransformation:
    """`tx` with its slots in a code; None and float32: as usual."""
    if code is None or code == AS_USUAL:
        return tx
    check_code(code)
    return stored(tx, code)


def with_scales(names: dict[str, str]) -> dict[str, str]:
    """What slots are called in ``state[p]``, and their scales too."""
    scales = {key + SCALE: name + SCALE for key, name in names.items()}
    return {**names, **scales} if names else names
