"""Fixtures that several test files use, and the plugin that gathers comparisons."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from parity_page import Lines


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("parity")
    group.addoption("--parity-page", action="store_true", help="write docs/parity.md")
    group.addoption("--parity-lines", help="write what is compared into this file")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "compares: with a reference; see parity_page.py")
    config.pluginmanager.register(Lines())


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
