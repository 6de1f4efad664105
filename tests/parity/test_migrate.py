"""The pairs of docs/migrate.md give the same numbers.

Each block of optax ends with `theirs`, and our block after it ends with `ours`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser

pytest.importorskip("optax", reason="the page has the code of optax beside ours")
PAGE = Path(__file__).parents[2] / "docs" / "migrate.md"


def test_the_pairs_of_the_page_give_the_same_numbers() -> None:
    document = Sybil([PythonCodeBlockParser(), SkipParser()]).parse(PAGE)
    compared = 0
    for example in document.examples():
        example.evaluate()
        if "theirs" in document.namespace and "ours" in document.namespace:
            theirs, ours = (
                np.asarray(document.namespace.pop(name)) for name in ("theirs", "ours")
            )
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
            assert np.abs(theirs).min() > 1e-3
            compared += 1
    assert compared == PAGE.read_text().count("theirs = ") == 7
