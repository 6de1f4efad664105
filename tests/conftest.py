"""Fixtures that several test files use."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def same_scalars(name: str) -> Iterator[None]:
    """Make the default dtype float64, in which torch keeps NAdam's mu_product and ASGD's eta and
    mu.

    Here they have the dtype of the parameter, so both are float64.
    """
    before = torch.get_default_dtype()
    if name in ("NAdam", "ASGD"):
        torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)
