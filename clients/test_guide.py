"""The examples of docs/guide-clients.md run, from top to bottom, in one namespace."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser

PAGE = Path(__file__).parent.parent / "docs" / "guide-clients.md"


@pytest.mark.filterwarnings("default")  # advice of the trainers, shown and no error
def test_the_examples_run() -> None:
    torch.manual_seed(0)
    examples = list(Sybil([PythonCodeBlockParser()]).parse(PAGE).examples())
    assert examples
    for example in examples:
        example.evaluate()
