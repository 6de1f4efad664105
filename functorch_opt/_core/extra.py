"""The libraries of the extra ``viz``, which are imported where they are used."""

from __future__ import annotations

import importlib
from typing import Any


def viz(module: str, what: str) -> Any:
    """A module of the libraries in the extra ``viz``. An error says that `what` needs it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = (error.name or module).partition(".")[0]
        raise ModuleNotFoundError(
            f"{what} needs {missing}: pip install 'functorch_opt[viz]'", name=missing
        ) from error
