"""What may stand in a group: types of options, and the flags of torch that mean nothing here."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def check_number(name: str, value: Any) -> None:
    """Raise TypeError for what is no number, no tensor that holds one, and no tuple of these."""
    if isinstance(value, tuple):
        for part in value:
            check_number(name, part)
    elif isinstance(value, bool) or not isinstance(value, (int, float, Tensor)):
        raise TypeError(f"{name} must be a number or a 1-element tensor; got {type(value).__name__} {value!r}.")
    elif isinstance(value, Tensor) and (value.numel() != 1 or value.is_complex()):
        raise TypeError(f"{name} must be a number or a 1-element tensor; got {value.dtype} of shape {tuple(value.shape)}.")


def check_like(name: str, value: Any, default: Any) -> None:
    """Raise TypeError for an option that is no hyperparameter, and is of another type than its default."""
    if isinstance(default, tuple) and isinstance(value, tuple):
        for part in value:
            check_like(name, part, None if part is None else 0.0)
        return
    wanted: Any = (bool, int, float, str, tuple, torch.dtype, type(None)) if default is None else type(default)
    if not isinstance(value, (int, float) if wanted is float else wanted) or (isinstance(value, bool) and wanted in (int, float)):
        raise TypeError(f"{name} must be of the type of {default!r}; got {type(value).__name__} {value!r}.")


FLAGS = ("foreach", "fused", "capturable", "differentiable")
"""Options by which torch chooses among its implementations. There is one here."""
