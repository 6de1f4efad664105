"""Fixtures of several test files."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def same_scalars(name: str) -> Iterator[None]:
    """torch keeps NAdam's mu_product and ASGD's eta and mu in the default dtype, we in that of the
    parameter. Here both are float64.
    """
    before = torch.get_default_dtype()
    if name in ("NAdam", "ASGD"):
        torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)
